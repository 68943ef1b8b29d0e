"""Holds on folders, with the clock handed in."""

import json
from typing import Any

from sfwatch.logs import event_log
from sfwatch.settings import Uploads
from sfwatch.storage import Storage

A, B = ("in", "a.jsonl"), ("in", "b.jsonl")
DONE, FAILED = "/srv/done", "/srv/failed"


def storage(lines: list[dict[str, Any]]) -> Storage:
    """Return a storage that pauses for 1 s, 2 s, 4 s at the most."""
    log = event_log(lambda line: lines.append(json.loads(line)))
    return Storage(log, Uploads(first_retry_s=1.0, longest_retry_s=4.0), lambda _: 7)


def test_a_hold_is_told_once_when_it_begins_and_once_when_it_ends() -> None:
    """However many files meet it meanwhile."""
    lines: list[dict[str, Any]] = []
    it = storage(lines)
    for key in (A, B, A):
        it.refused(DONE, "no_space", "it is full", 0.0, by=key)
    assert it.ready({DONE}, A, 1.0)
    it.end_trial(A, 1.5, proved=True, refused=None)
    assert [(line["event"], line["waiting"]) for line in lines] == [("storage.held", 7), ("storage.resumed", 7)]
    assert lines[1]["held_s"] == 1.5


def test_only_one_file_tries_at_a_time() -> None:
    """Everybody else who needs the folder waits; who does not need it goes on."""
    it = storage([])
    it.refused(DONE, "no_space", "it is full", 0.0, by=A)
    assert not it.ready({DONE}, A, 0.9)
    assert it.ready({FAILED}, B, 0.9)
    assert it.ready({DONE}, A, 1.0)
    assert not it.ready({DONE}, B, 9.0)


def test_pauses_grow_to_the_longest() -> None:
    """A try that fails doubles the pause; a straggler of before the hold does not."""
    it = storage([])
    it.refused(DONE, "no_space", "it is full", 0.0, by=A)
    now, pauses = 0.0, []
    for _ in range(4):
        it.refused(DONE, "no_space", "it is full", now, by=B)
        pauses.append(it.due()[0] - now)
        now = it.due()[0]
        assert it.ready({DONE}, A, now)
        it.refused(DONE, "no_space", "it is full", now, by=A)
    assert pauses == [1.0, 2.0, 4.0, 4.0]


def test_a_try_that_did_not_come_to_the_folder_proves_nothing() -> None:
    """The hold goes on, and somebody may try after the same pause."""
    it = storage([])
    it.refused(DONE, "no_space", "it is full", 0.0, by=A)
    assert it.ready({DONE}, A, 1.0)
    it.end_trial(A, 1.0, proved=False, refused=None)
    assert not it.ready({DONE}, B, 1.5)
    assert it.ready({DONE}, B, 2.0)


def test_a_file_may_prove_one_folder_and_meet_the_next() -> None:
    """Two folders are held: what it met last stays held, the other one is as before."""
    it = storage([])
    it.refused(DONE, "no_space", "it is full", 0.0, by=A)
    it.refused(FAILED, "read_only", "it is read-only", 0.0, by=B)
    assert it.ready({DONE, FAILED}, A, 1.0)
    it.refused(FAILED, "read_only", "it is read-only", 1.0, by=A)
    it.end_trial(A, 1.0, proved=False, refused=FAILED)
    assert it.due() == [2.0, 3.0]

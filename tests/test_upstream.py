"""One target as the main thread sees it: slots, and holds that are reported once."""

import itertools
import json
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from sfwatch import target as rules
from sfwatch.job import Tools
from sfwatch.logs import event_log
from sfwatch.settings import Uploads
from sfwatch.target import Target
from sfwatch.upstream import Service

NUMBERS = itertools.count()
HOLD = ("unauthorized", "401")


def service(*inboxes: str, concurrency: int = 4) -> tuple[Service, list[dict[str, Any]]]:
    said: list[dict[str, Any]] = []
    tools = Tools(
        target="host (file key)",
        client=cast("Any", None),
        journal=cast("Any", None),
        uploads=Uploads(),
        state_dir=str(Path("/nowhere")),
        log=event_log(lambda line: said.append(json.loads(line))).bind(target="host (file key)"),
        environ={},
        clock=lambda: 0.0,
        wall=lambda: 0.0,
        stop=lambda: False,
        sleep=lambda _: None,
    )
    return Service(tools, Target(concurrency), deque(inboxes or ("a",))), said


def test_a_hold_is_said_when_it_begins_and_when_it_ends_and_never_between() -> None:
    """Its second failure and a straggler's say nothing."""
    it, said = service()
    it.change(rules.after_account_fault(it.state, ("a", "x"), *HOLD, now=10, luck=0.5), 10, waiting=7)
    it.change(rules.after_account_fault(it.state, ("a", "y"), *HOLD, now=11, luck=0.5), 11, waiting=7)
    it.change(rules.after_accepted(it.state, ("a", "z"), 25), 25, waiting=6)
    it.change(rules.after_accepted(it.state, ("a", "z"), 26), 26, waiting=6)
    assert [e["event"] for e in said] == ["target.held", "target.resumed"]
    assert said[0]["waiting"] == 7
    assert said[0]["target"] == "host (file key)"
    assert said[1]["held_s"] == 15


def test_the_time_in_holds_adds_up() -> None:
    """Past holds and the present one."""
    it, _ = service()
    it.change(rules.after_account_fault(it.state, ("a", "x"), *HOLD, now=10, luck=0.5), 10, waiting=1)
    it.change(rules.after_accepted(it.state, ("a", "x"), 25), 25, waiting=0)
    assert it.held_s(100) == 15
    it.change(rules.after_account_fault(it.state, ("a", "x"), *HOLD, now=100, luck=0.5), 100, waiting=1)
    assert it.held_s(130) == 45


@pytest.mark.parametrize(
    ("inboxes", "concurrency", "most"), [(("a",), 3, 3), (("a", "b"), 3, 2), (("a", "b"), 1, 1)]
)
def test_one_slot_is_left_to_other_inboxes_where_there_are_others_and_slots(
    inboxes: tuple[str, ...], concurrency: int, most: int
) -> None:
    """A lone inbox may have all; with one slot only, turns must do."""
    it, _ = service(*inboxes, concurrency=concurrency)
    started = 0
    while it.room_for("a", 0.0):
        it.start(("a", str(started)), 0.0)
        started += 1
    assert started == most
    assert it.room_for("b", 0.0) == (most < concurrency)


def fill(it: Service, inbox: str = "a") -> int:
    """Start files of this inbox as long as there is room; return how many."""
    before = len(it.under_way)
    while it.room_for(inbox, 0.0):
        it.start((inbox, f"{next(NUMBERS)}.jsonl"), 0.0)
    return len(it.under_way) - before


def test_files_are_made_ready_ahead_of_their_turn() -> None:
    """One for every four uploads at once; none ahead while a rate limit or a hold lets fewer go."""
    assert fill(service(concurrency=8)[0]) == 8 + 2
    slowed, _ = service(concurrency=8)
    slowed.state = replace(slowed.state, interval_s=0.25)
    assert fill(slowed) == 1
    held, _ = service(concurrency=8)
    held.change(rules.after_account_fault(held.state, None, *HOLD, now=0, luck=0.5), 0, waiting=1)
    assert fill(held) == 0


def test_what_is_accepted_makes_room_while_it_is_filed_away() -> None:
    """As far as there are workers: no more than twice as many files as uploads at once are under way."""
    it, _ = service(concurrency=3)
    assert fill(it) == 3
    it.accepted |= it.under_way
    assert fill(it) == 3
    it.accepted |= it.under_way
    assert fill(it) == 0
    it.end(next(iter(it.under_way)))
    assert fill(it) == 1

"""Events as a person reads them at a terminal."""

import json
import re
from datetime import UTC, timedelta, timezone
from typing import Any

import pytest

from sfwatch import console, logs

STAMP = "2026-11-22T20:01:12.345678Z"
SHA256 = "7b6017495149dd817627a8ce1e7c149676b84c57bd5b59328f2ab8146b02267e"
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def rendered(event: str, *, level: str = "info", colour: bool = False, **keys: Any) -> str:
    """The line of an event, its head cut off when it is the usual one."""
    line = console.line({"timestamp": STAMP, "level": level, "event": event, **keys}, colour=colour, zone=UTC)
    return line.removeprefix("20:01:12  ")


REFUSED = {"http_status": 503, "code": 50505, "trace_id": "ti_1", "detail": "the host is overloaded"}
FILE = {"inbox": "evals", "file": "a.jsonl", "size": 1_234_567}
SENT = {**FILE, "target": "api (file /k)"}

LINES: dict[str, tuple[dict[str, Any], str]] = {
    "daemon.started": (
        {"version": "1.0", "pid": 7, "config": "/e/s.yaml", "state_dir": "/v/s", "inboxes": ["a", "b"]},
        "daemon.started     sfwatch 1.0 · /e/s.yaml · inboxes: a, b · state in /v/s",
    ),
    "daemon.ready": ({"files": 1, "total_s": 0.002}, "daemon.ready       1 file found · 2 ms"),
    "daemon.stopping": (
        {"signal": "SIGTERM", "under_way": 2, "grace_s": 30.0},
        "daemon.stopping    SIGTERM · 2 under way · at most 30 s more",
    ),
    "daemon.stopped": (
        {"done": 3, "failed": 1, "waiting": 0},
        "daemon.stopped     3 done · 1 failed · 0 waiting",
    ),
    "config.loaded": (
        {"config": "/e/s.yaml", "inboxes": ["a"]},
        "config.loaded      /e/s.yaml · inboxes: a",
    ),
    "config.rejected": (
        {"config": "/e/s.yaml", "problems": ["a: bad", "b: worse"]},
        "config.rejected    /e/s.yaml · a: bad; b: worse",
    ),
    "config.warning": ({"detail": "the key is open to all"}, "config.warning     the key is open to all"),
    "journal.set_aside": (
        {"path": "/v/s/j.damaged", "reason": "damaged", "detail": "a new one was begun"},
        "journal.set_aside  /v/s/j.damaged            damaged  a new one was begun",
    ),
    "journal.orphaned": (
        {"path": "/old", "waiting": 2, "detail": "not in the configuration"},
        "journal.orphaned   /old                      2 waiting  not in the configuration",
    ),
    "claim.foreign": (
        {"inbox": "evals", "instance": "0a1b", "waiting": 2, "detail": "it runs"},
        "claim.foreign      evals                     claimed by 0a1b · 2 waiting  it runs",
    ),
    "folder.created": (
        {"inbox": "evals", "path": "/srv/done"},
        "folder.created     evals                     /srv/done",
    ),
    "inbox.watched": (
        {
            "inbox": "evals",
            "path": "/in",
            "mode": "inotify",
            "fs_type": "ext4",
            "interval_s": 30.0,
            "trusted": True,
            "detail": "ext4 is local",
        },
        "inbox.watched      evals                     inotify  ext4 is local",
    ),
    "inbox.lost": (
        {"inbox": "evals", "path": "/srv/in", "reason": "missing", "detail": "/srv/in is not there"},
        "inbox.lost         evals                     missing  /srv/in is not there",
    ),
    "inbox.found": (
        {"inbox": "evals", "path": "/srv/in"},
        "inbox.found        evals                     /srv/in",
    ),
    "inbox.released": (
        {"inbox": "evals", "path": "/srv/inbox"},
        "inbox.released     evals                     /srv/inbox",
    ),
    "inbox.overflowed": (
        {"inbox": "evals"},
        "inbox.overflowed   evals                     the kernel dropped some news of it: a full look follows",
    ),
    "inbox.others": (
        {"inbox": "evals", "others": 3},
        "inbox.others       evals                     3 other names there",
    ),
    "inbox.skipped": (
        {"inbox": "evals", "path": "/srv/in/a", "reason": "unreadable", "detail": "it may not be read"},
        "inbox.skipped      evals                     /srv/in/a · unreadable  it may not be read",
    ),
    "file.seen": (FILE, "file.seen          evals/a.jsonl             1.2 MB"),
    "file.ignored": (
        {**FILE, "reason": "symlink", "detail": "it is a symlink"},
        "file.ignored       evals/a.jsonl             symlink  it is a symlink",
    ),
    "file.waiting": (
        {**FILE, "reason": "empty", "detail": "it is empty"},
        "file.waiting       evals/a.jsonl             empty  it is empty",
    ),
    "file.stuck": (
        {**FILE, "reason": "being_written", "waited_s": 600.0, "detail": "pid 7 has it open"},
        "file.stuck         evals/a.jsonl             being_written · after 10 min  pid 7 has it open",
    ),
    "file.settled": (
        {**FILE, "settled_by": "lease", "waited_s": 2.04},
        "file.settled       evals/a.jsonl             by lease · after 2 s",
    ),
    "file.changed": (
        {**FILE, "attempt": 1, "orphans": ["file-x"], "detail": "it was changed"},
        "file.changed       evals/a.jsonl             orphans at the service: file-x  it was changed",
    ),
    "file.warning": (
        {**FILE, "reason": "crlf", "line": 1, "detail": "lines end with CRLF"},
        "file.warning       evals/a.jsonl             line 1  lines end with CRLF",
    ),
    "file.vanished": (
        {**FILE, "detail": "it was taken away"},
        "file.vanished      evals/a.jsonl             it was taken away",
    ),
    "upload.started": (
        {**SENT, "attempt": 2, "remote_name": "a-0123.jsonl", "sha256": SHA256, "lines": 5000},
        "upload.started     evals/a.jsonl             1.2 MB · 5,000 lines · try 2 · as a-0123.jsonl",
    ),
    "upload.progress": (
        {**FILE, "attempt": 1, "sent": 400_000, "bytes_per_s": 35_000_000},
        "upload.progress    evals/a.jsonl             400 KB of 1.2 MB (32 %) · 35 MB/s",
    ),
    "upload.stuck": (
        {**FILE, "sent": 400_000, "detail": "it is not back"},
        "upload.stuck       evals/a.jsonl             400 KB of 1.2 MB (32 %)  it is not back",
    ),
    "upload.accepted": (
        {
            **SENT,
            "attempt": 1,
            "file_id": "file-x",
            "trace_id": "ti_1",
            "http_status": 200,
            "duration_s": 0.41,
            "bytes_per_s": 3_011_000,
        },
        "upload.accepted    evals/a.jsonl             file-x · in 0.41 s · 3 MB/s",
    ),
    "upload.deferred": (
        {**SENT, "attempt": 3, "reason": "overloaded", "retry_in_s": 4.2, **REFUSED},
        (
            "upload.deferred    evals/a.jsonl             "
            "overloaded · HTTP 503 · try 3 · next try in 4.2 s · trace ti_1  the host is overloaded"
        ),
    ),
    "upload.unknown": (
        {**SENT, "attempt": 1, "reason": "stalled", "retry_in_s": 1.0, "detail": "no answer came"},
        "upload.unknown     evals/a.jsonl             stalled · next try in 1 s  no answer came",
    ),
    "upload.recovered": (
        {**SENT, "attempt": 1, "file_id": "file-x", "orphans": ["file-y"]},
        "upload.recovered   evals/a.jsonl             file-x · orphans at the service: file-y",
    ),
    "upload.resent": (
        {**SENT, "attempt": 2, "detail": "it is not there"},
        "upload.resent      evals/a.jsonl             try 2  it is not there",
    ),
    "upload.undecided": (
        {**SENT, "reason": "ambiguous", "candidates": ["x", "y"], "retry_in_s": 300.0, "detail": "two fit"},
        "upload.undecided   evals/a.jsonl             ambiguous · may be x or y · next try in 5 min  two fit",
    ),
    "upload.mismatch": (
        {**SENT, "file_id": "file-x", "trace_id": "ti_1", "detail": "bytes 2 instead of 3"},
        "upload.mismatch    evals/a.jsonl             file-x · trace ti_1  bytes 2 instead of 3",
    ),
    "file.done": (
        {
            **SENT,
            "attempts": 1,
            "path": "/srv/done/a.jsonl",
            "sidecar": "/srv/done/a.jsonl.fileid.json",
            "sha256": SHA256,
            "lines": 12,
            "file_id": "file-x",
            "trace_id": "ti_1",
            "total_s": 2.44,
        },
        "file.done          evals/a.jsonl             file-x · 12 lines · 1.2 MB · 2.4 s · done/a.jsonl",
    ),
    "file.failed": (
        {
            **SENT,
            "attempts": 0,
            "path": "/srv/failed/a.jsonl",
            "report": "/srv/failed/a.jsonl.error.json",
            "reason": "not_json",
            "line": 17,
            "detail": "it is no JSON",
        },
        "file.failed        evals/a.jsonl             not_json · line 17 · failed/a.jsonl  it is no JSON",
    ),
    "target.held": (
        {
            "target": "api (file /k)",
            "reason": "unauthorized",
            "waiting": 3,
            "probe_in_s": 1.0,
            "detail": "the key is refused",
        },
        (
            "target.held        api (file /k)             "
            "unauthorized · 3 waiting · next try in 1 s  the key is refused"
        ),
    ),
    "target.resumed": (
        {"target": "api (file /k)", "reason": "unauthorized", "waiting": 3, "held_s": 200.0},
        "target.resumed     api (file /k)             held for 3.3 min · 3 waiting",
    ),
    "storage.held": (
        {"path": "/srv/done", "reason": "full", "waiting": 1, "probe_in_s": 1.0, "detail": "it is full"},
        "storage.held       /srv/done                 full · 1 waiting · next try in 1 s  it is full",
    ),
    "storage.resumed": (
        {"path": "/srv/done", "reason": "full", "waiting": 0, "held_s": 7200.0},
        "storage.resumed    /srv/done                 held for 2 h · 0 waiting",
    ),
    "internal.error": (
        {"inbox": "evals", "file": "a.jsonl", "detail": "KeyError: 'x'"},
        "internal.error     evals/a.jsonl             KeyError: 'x'",
    ),
}


@pytest.mark.parametrize("event", logs.EVENTS)
def test_every_event_has_its_line(event: str) -> None:
    """Each event is one aligned line with the facts that matter, and needs no key that it does not list."""
    keys, line = LINES[event]
    assert keys.keys() <= logs.EVENTS[event].keys
    assert rendered(event, **keys) == line


@pytest.mark.parametrize("event", logs.EVENTS)
def test_every_event_is_readable_without_any_of_its_keys(event: str) -> None:
    """Nothing is relied on but time, level and event."""
    assert rendered(event).startswith(event)


def test_facts_are_keys_that_their_events_list() -> None:
    """What is shown of an event is what the event can hold."""
    assert console._FACTS.keys() == logs.EVENTS.keys()
    for event, facts in console._FACTS.items():
        assert set(facts.split()) <= logs.EVENTS[event].keys, event


def test_words_are_given_for_the_facts_that_are_shown() -> None:
    """Every key that is shown has its words, and no words are left over."""
    shown = {key for facts in console._FACTS.values() for key in facts.split()}
    assert shown == console._WORDS.keys()


@pytest.mark.parametrize("event", logs.EVENTS)
def test_colour_changes_nothing_but_the_colour(event: str) -> None:
    """Without its colours a coloured line is the plain one, and every colour is switched off again."""
    keys, line = LINES[event]
    painted = rendered(event, colour=True, **keys)
    assert ESCAPES.sub("", painted).removeprefix("20:01:12  ") == line
    assert painted != line
    assert len(re.findall(r"\x1b\[0m", painted)) * 2 == len(ESCAPES.findall(painted))


@pytest.mark.parametrize(
    ("level", "code"), [("info", "32"), ("warning", "33"), ("error", "31"), ("critical", "1;31")]
)
def test_the_level_is_seen_by_the_colour_of_the_event(level: str, code: str) -> None:
    """Green is well, yellow is worth a look, red is trouble."""
    assert f"\x1b[{code}mfile.done\x1b[0m" in rendered("file.done", level=level, colour=True)


def test_a_traceback_stands_below_its_event() -> None:
    """It is indented, so that none of its lines can be taken for an event."""
    text = "Traceback (most recent call last):\nKeyError: 'x\n20:01:12  file.done'"
    head, *below = rendered("internal.error", detail="KeyError", traceback=text).splitlines()
    assert head.endswith("KeyError")
    assert [line[:4] for line in below] == ["  | "] * 3


def test_times_are_shown_in_the_zone_wanted() -> None:
    """The log is in UTC; a person reads the time of his own clock."""
    event = {"timestamp": STAMP, "level": "info", "event": "daemon.ready"}
    assert console.line(event, colour=False, zone=timezone(timedelta(hours=8))).startswith("04:01:12  ")


def test_chinese_names_are_aligned_too() -> None:
    """A Chinese character takes two cells of a terminal."""
    line = rendered("file.waiting", inbox="in", file="问题.jsonl", reason="empty")
    assert line == "file.waiting       in/问题.jsonl             empty"


def test_a_path_in_done_keeps_the_subfolders_of_the_file() -> None:
    """What is above done is the same for every file and left out."""
    line = rendered("file.done", inbox="in", file="x/y/a.jsonl", path="/srv/done/x/y/a.1.jsonl")
    assert line.endswith("  done/x/y/a.1.jsonl")


def test_an_upload_under_its_own_name_does_not_repeat_it() -> None:
    """The remote name is told when it differs."""
    assert "as " not in rendered("upload.started", inbox="in", file="x/a.jsonl", remote_name="a.jsonl")


def test_how_often_an_inbox_is_looked_at_matters_where_the_kernel_tells_nothing() -> None:
    """With inotify the looks are a safety net."""
    line = rendered("inbox.watched", inbox="a", mode="polling", interval_s=5.0, detail="nfs4 is not local")
    assert line.endswith("polling · a look every 5 s  nfs4 is not local")


def test_a_first_try_and_a_small_file_have_no_noise() -> None:
    """That it is the first try, and what rate a few bytes made, is nothing to read."""
    line = rendered("upload.accepted", inbox="in", file="a.jsonl", size=9, bytes_per_s=9, attempt=1)
    assert line == "upload.accepted    in/a.jsonl"


def test_an_event_of_a_newer_version_is_shown_with_its_keys() -> None:
    """A log may have been written by another version than the one that shows it."""
    line = rendered("file.praised", inbox="in", file="a.jsonl", stars=5, detail="well done")
    assert line == "file.praised       in/a.jsonl                stars=5  well done"


def test_a_value_of_an_odd_type_is_shown_as_it_is() -> None:
    """Saying an event must not fail for the way that it is shown."""
    assert rendered("file.seen", inbox="in", file="a", size="big").endswith("  size=big")


NASTY = "\x1b[2J\r\n20:01:12  file.done\u202e\x9b31m\u2028.jsonl"


@pytest.mark.parametrize("event", logs.EVENTS)
def test_no_text_of_others_moves_the_cursor_or_makes_a_line(event: str) -> None:
    """Names and answers come through the log with their control characters escaped, whatever key holds them."""
    lines: list[str] = []
    say = logs.event_log(
        lines.append, level="debug", form=lambda said: console.line(said, colour=False, zone=UTC)
    )
    say(event, **dict.fromkeys(logs.EVENTS[event].keys - {"traceback"}, NASTY))
    assert len(lines) == 1
    assert lines[0].isprintable()


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1_234_567, "1.2 MB"),
        (35_000_000, "35 MB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (340_000_000, "340 MB"),
        (1_000_000_000, "1 GB"),
        (5_400_000_000_000_000, "5,400 TB"),
    ],
)
def test_sizes(count: int, said: str) -> None:
    """Two digits are enough, in powers of ten."""
    assert console.size(count) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 ms"),
        (0.004, "4 ms"),
        (0.41, "0.41 s"),
        (2.04, "2 s"),
        (35.2, "35 s"),
        (89.4, "89 s"),
        (200, "3.3 min"),
        (45 * 60, "45 min"),
        (2 * 3600, "2 h"),
        (12 * 86400, "12 days"),
        (400 * 86400, "400 days"),
    ],
)
def test_spans(seconds: float, said: str) -> None:
    """Two digits are enough, in the unit that a person would use."""
    assert console.span(seconds) == said


@pytest.mark.parametrize(
    ("environ", "terminal", "wanted"),
    [
        ({"TERM": "xterm"}, True, True),
        ({}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm"}, False, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    environ: dict[str, str],
    terminal: bool,  # noqa: FBT001
    wanted: bool,  # noqa: FBT001
) -> None:
    """NO_COLOR counts when it is set and not empty."""
    assert console.wants_colour(environ, terminal=terminal) is wanted


def test_what_the_log_says_in_json_can_be_shown_later() -> None:
    """A line of the JSON log renders as the event did at once."""
    as_json: list[str] = []
    at_once: list[str] = []
    for write, form in ((as_json.append, None), (at_once.append, lambda e: console.line(e, colour=False))):
        logs.event_log(write, form=form)("inbox.others", inbox="in", others=3)
    assert console.line(json.loads(as_json[0]), colour=False)[8:] == at_once[0][8:]

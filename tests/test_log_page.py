"""A log as `sfwatch log` shows it: what is asked for, made harmless, and a file that is rotated meanwhile."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import console
from sfwatch.log_page import LONGEST_LINE, LogPage, Tail, Wanted, lines, wanted_of
from sfwatch.logs import EVENTS, KEYS, printable

STAMP = "2026-11-22T20:01:12.345678Z"
DAY = "Sunday, 22 November 2026"


def event(name: str = "file.done", **keys: Any) -> bytes:
    said = {"timestamp": STAMP, "level": "info", "event": name, "inbox": "evals", "file": "a.jsonl"}
    return json.dumps(said | keys).encode() + b"\n"


def shown(*given_lines: bytes, **wanted: Any) -> list[str]:
    page = LogPage(colour=False, zone=UTC)
    return [row for found in wanted_of(given_lines, Wanted(**wanted)) for row in page.rows(found)]


def test_an_event_is_shown_as_the_console_shows_it() -> None:
    """Under its day, which the console's own lines leave out."""
    line = event(file_id="file-1", lines=12)
    assert shown(line) == [DAY, console.line(json.loads(line), colour=False, zone=UTC)]


def test_each_day_has_a_heading() -> None:
    """Once, before its first event that is shown."""
    later = event(timestamp="2026-11-24T00:00:01Z")
    rows = shown(
        event(), event("file.seen", timestamp="2026-11-23T01:00:00Z", level="debug"), later, later, level="info"
    )
    assert [row for row in rows if "2026" in row] == [DAY, "Tuesday, 24 November 2026"]


@pytest.mark.parametrize(
    "line",
    [
        b"Started sfwatch.service",
        b"{}",
        b"[1]",
        b'{"event": 1, "level": "info", "timestamp": "2026-11-22T20:01:12Z"}',
        b'{"event": "x", "level": "info", "timestamp": "yesterday"}',
        b'{"event": "x", "level": "info", "timestamp": "0001-01-01T00:00:00+14:00"}',
        b'{"event": "file.done", "lev',
        b"[" * 100_000,
        b'{"event": ' + b"9" * 5000,
    ],
)
def test_what_is_no_event_is_shown_as_it_is(line: bytes) -> None:
    """Unless something is asked for: it can't be that."""
    assert shown(line + b"\n") == [line.decode()]
    assert shown(line + b"\n", level="info") == []


def test_empty_lines_are_nothing() -> None:
    """They come from logs that were torn."""
    assert shown(b"\n", b"\r\n") == []


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        ({"inboxes": ("evals",)}, True),
        ({"inboxes": ("nightly", "other")}, False),
        ({"files": ("*.jsonl",)}, True),
        ({"files": ("b*", "c*")}, False),
        ({"events": ("file.*",)}, True),
        ({"events": ("upload.*", "target.held")}, False),
        ({"level": "info"}, True),
        ({"level": "warning"}, False),
        ({"inboxes": ("evals",), "events": ("upload.*",)}, False),
    ],
)
def test_what_is_asked_for(wanted: dict[str, Any], taken: bool) -> None:  # noqa: FBT001
    """All conditions hold together; several of one kind are alternatives."""
    assert bool(shown(event(), **wanted)) == taken


def test_events_about_no_file_are_not_asked_for_by_file() -> None:
    """Nor are those about no inbox by an inbox."""
    line = json.dumps({"timestamp": STAMP, "level": "error", "event": "target.held"}).encode()
    assert shown(line, files=("*.jsonl",)) == shown(line, inboxes=("evals",)) == []


def test_an_unknown_level_is_important() -> None:
    """A newer version may have one."""
    assert shown(event(level="alarm"), level="error")


def test_colour() -> None:
    """Where it is wanted, also for the day."""
    (found,) = wanted_of([event()], Wanted())
    day, row = LogPage(colour=True, zone=UTC).rows(found)
    assert (day, "\x1b[32m" in row) == (f"\x1b[2m{DAY}\x1b[0m", True)


HOSTILE = "\x1b[2J\r\n\u202e\udcff"


def test_nothing_in_a_log_steers_the_terminal() -> None:
    """Neither in an event, in its keys and lists, nor in a line that is none."""
    odd = {"detail": HOSTILE, "problems": [HOSTILE, [HOSTILE], {HOSTILE: HOSTILE}], HOSTILE: HOSTILE}
    rows = shown(
        event("config.rejected", **odd), event("x" + HOSTILE, **odd), HOSTILE.encode("utf-8", "surrogateescape")
    )
    assert rows
    assert all(printable(row) == row for row in rows)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda it: st.lists(it, max_size=3) | st.dictionaries(st.text(max_size=3), it, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*EVENTS, "file.new"]), st.dictionaries(st.sampled_from([*KEYS, "detail"]), values))
def test_any_values_make_lines(name: str, keys: dict[str, Any]) -> None:
    """Of whatever type they are."""
    rows = shown(event(name, **keys))
    assert len(rows) == 2
    assert all(printable(line) == line for row in rows for line in row.splitlines())


@given(st.lists(st.binary(max_size=100)))
def test_any_bytes_make_lines(given_lines: list[bytes]) -> None:
    """At most one for each."""
    rows = shown(*given_lines)
    assert len(rows) <= len(given_lines)
    assert all(printable(row) == row for row in rows)


class TestReading:
    def test_a_stream(self) -> None:
        """Line for line; the last needs no end, and no line is too long for memory."""
        stream = io.BytesIO(b"a\n" + b"x" * LONGEST_LINE + b"y\nz")
        assert [len(line) for line in lines(stream)] == [2, LONGEST_LINE, 2, 1]

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        (tmp_path / "log").write_bytes(b"1\n2\n")
        return tmp_path / "log"

    @pytest.fixture
    def tail(self, path: Path) -> Iterator[Tail]:
        with closing(Tail(path)) as tail:
            yield tail

    def test_a_file_that_grows(self, path: Path, tail: Tail) -> None:
        """A line is shown when it is finished, and once."""
        assert list(tail.fresh()) == [b"1\n", b"2\n"]
        with path.open("ab") as log:
            log.write(b"3")
            log.flush()
            assert list(tail.fresh()) == []
            log.write(b"3\n4\n5")
        assert list(tail.fresh()) == [b"33\n", b"4\n"]
        assert list(tail.whole()) == [b"5"]

    def test_a_file_that_is_put_away(self, path: Path, tail: Tail) -> None:
        """What is still written into the old one is shown before what comes in the new one."""
        assert len(list(tail.fresh())) == 2
        with path.open("ab") as old:
            path.rename(path.with_suffix(".1"))
            assert list(tail.fresh()) == []
            path.touch()
            old.write(b"3\nunfinished")
            old.flush()
            assert list(tail.fresh()) == [b"3\n"]
            path.write_bytes(b"4\n")
            assert list(tail.fresh()) == [b"unfinished", b"4\n"]
        assert list(tail.whole()) == []

    def test_a_file_that_is_cut_short(self, path: Path, tail: Tail) -> None:
        """It is read from its new beginning."""
        assert len(list(tail.fresh())) == 2
        os.truncate(path, 0)
        assert list(tail.fresh()) == []
        with path.open("ab") as log:
            log.write(b"3\n")
        assert list(tail.fresh()) == [b"3\n"]
        assert list(tail.whole()) == []

    def test_a_long_line_comes_in_pieces(self, path: Path, tail: Tail) -> None:
        """Memory does not grow with it."""
        path.write_bytes(b"x" * (LONGEST_LINE + 5))
        assert [len(line) for line in tail.fresh()] == [LONGEST_LINE]
        assert [len(line) for line in tail.whole()] == [5]

"""A log in JSON as it is shown to people: only what they ask for, and nothing in it steers their terminal.

What comes through here may have been written by anybody: by a newer version, by systemd between two events, by
a disk that was full. A line that is no event is shown as it is, made printable, unless something is asked for.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from sfwatch import console
from sfwatch.logs import LEVELS, printable

Event = Mapping[str, Any]

LONGEST_LINE = 1024 * 1024
"""Bytes of a line; what is longer is no event, and is shown in pieces."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events are asked for: these inboxes, files and names like these, this level and above."""

    inboxes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    level: str = "debug"

    @property
    def is_everything(self) -> bool:
        """Whether nothing is asked for in particular."""
        return self == Wanted()

    def takes(self, event: Event) -> bool:
        """Whether this event is one of them. What no level is known of is important."""
        return (
            (not self.inboxes or event.get("inbox") in self.inboxes)
            and _is_like(event.get("file"), self.files)
            and _is_like(event["event"], self.events)
            and LEVELS.get(event["level"], LEVELS["critical"]) >= LEVELS[self.level]
        )


def _is_like(name: Any, patterns: tuple[str, ...]) -> bool:
    return not patterns or any(fnmatchcase(str(name or ""), pattern) for pattern in patterns)


def wanted_of(lines: Iterable[bytes], wanted: Wanted) -> Iterator[Event | str]:
    """What is to be shown of these lines: events, and text that is none."""
    for line in lines:
        text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
        event = _event(text)
        if event is not None and wanted.takes(event):
            yield event
        elif event is None and wanted.is_everything and text:
            yield printable(text)


@dataclass(slots=True)
class LogPage:
    """Shows events as the console does, under a heading for each day."""

    colour: bool
    zone: tzinfo | None = None
    _day: str = ""

    def rows(self, event: Event | str) -> Iterator[str]:
        """The rows of one event."""
        if isinstance(event, str):
            yield event
            return
        day = f"{datetime.fromisoformat(event['timestamp']).astimezone(self.zone):%A, %-d %B %Y}"
        if day != self._day:
            self._day = day
            yield console.painter(colour=self.colour)("2", day)
        yield console.line(event, colour=self.colour, zone=self.zone)


def _event(text: str) -> Event | None:
    """The event that a line holds, made harmless, or None if it holds none."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in _NEEDED):
            return None
        datetime.fromisoformat(value["timestamp"]).astimezone()
    except (ValueError, OverflowError, RecursionError):
        return None
    return {printable(key): _harmless(item, keeps_lines=key == "traceback") for key, item in value.items()}


_NEEDED = ("timestamp", "level", "event")


def _harmless(value: Any, *, keeps_lines: bool = False) -> Any:
    match value:
        case str() if keeps_lines:
            return "\n".join(printable(line) for line in value.splitlines())
        case str():
            return printable(value)
        case list() | dict():
            return [printable(str(item)) for item in value]
        case _:
            return value


# ---- reading ----


def lines(stream: BinaryIO) -> Iterator[bytes]:
    """All lines of a stream, each as soon as it has come."""
    return iter(lambda: stream.readline(LONGEST_LINE), b"")


class Tail:
    """A log file that grows, is cut short, or is put away and begun anew under the same name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        self._begun = b""

    def fresh(self) -> Iterator[bytes]:
        """The lines that were finished since the last call."""
        yield from self._finished()
        if self._is_replaced():
            yield from self._finished()  # what was still written into the old one
            yield from self._rest()
            self._file.close()
            self._file = self._path.open("rb")
            yield from self._finished()
        elif os.fstat(self._file.fileno()).st_size < self._file.tell():
            yield from self._rest()
            self._file.seek(0)
            yield from self._finished()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def whole(self) -> Iterator[bytes]:
        """All lines up to here; the last one may have no end."""
        yield from self.fresh()
        yield from self._rest()

    def _finished(self) -> Iterator[bytes]:
        for piece in lines(self._file):
            self._begun += piece
            if piece.endswith(b"\n") or len(self._begun) >= LONGEST_LINE:
                yield from self._rest()

    def _rest(self) -> Iterator[bytes]:
        begun, self._begun = self._begun, b""
        if begun:
            yield begun

    def _is_replaced(self) -> bool:
        """Whether another file has the name, and something in it: until then the old one is written to."""
        try:
            there = self._path.stat()
        except OSError:
            return False  # between two names: it is looked for again
        return not os.path.samestat(there, os.fstat(self._file.fileno())) and there.st_size > 0

"""`sfwatch once` for a person who watches it: bars while files go out, and at the end what became of each.

All of it is made from the log, which any program could follow, and from how far each upload is. Events are
taken in from any thread, and lines go out under one lock: the bars are drawn by a thread of their own.
"""

import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from threading import Lock
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sfwatch import console, logs
from sfwatch.job import Job

Event = Mapping[str, Any]

_SHOWN_BY_BARS = frozenset({"upload.started", "upload.progress", "upload.accepted"})
_WHY_IT_WAITS = frozenset(
    {"file.waiting", "file.stuck", "file.changed", "upload.deferred", "upload.unknown", "upload.undecided"}
)
_RATE_OVER_S = 5.0
_REFRESHES_PER_S = 8
_BAR_CELLS = 24
_MOST_REASONS = 20


class Fate(StrEnum):
    """What has become of a file so far."""

    DONE = "done"
    FAILED = "failed"
    WAITING = "waiting"


@dataclass(slots=True)
class Seen:
    """One file: `size` in bytes, `why` it failed or waits, if anything was said."""

    inbox: str
    name: str
    size: int = 0
    fate: Fate = Fate.WAITING
    why: str = ""


@dataclass(slots=True)
class Fates:
    """What the log has said about the files."""

    files: dict[tuple[str, str], Seen] = field(default_factory=dict)
    counts: Counter[Fate] = field(default_factory=Counter)
    bytes: Counter[Fate] = field(default_factory=Counter)
    holds: dict[str, str] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """Take in one event."""
        match event["event"]:
            case "target.held" | "storage.held":
                self.holds[_place(event)] = _reason(event)
            case "target.resumed" | "storage.resumed":
                self.holds.pop(_place(event), None)
            case "file.vanished" | "file.ignored":
                self._count(self.files.pop((event["inbox"], event["file"]), None), -1)
            case name if {"inbox", "file"} <= event.keys():
                self._take_file(name, event)

    def _take_file(self, name: str, event: Event) -> None:
        key = event["inbox"], event["file"]
        self._count(self.files.get(key), -1)
        seen = self.files.setdefault(key, Seen(*key))
        seen.size = event.get("size", seen.size)
        match name:
            case "file.done":
                seen.fate, seen.why = Fate.DONE, ""
            case "file.failed":
                seen.fate, seen.why = Fate.FAILED, _reason(event)
            case _ if name in _WHY_IT_WAITS:
                seen.why = _reason(event)
        self._count(seen, 1)

    def _count(self, seen: Seen | None, times: int) -> None:
        """Keep the sums: there may be 100,000 files, and the bars are drawn eight times a second."""
        if seen is not None:
            self.counts[seen.fate] += times
            self.bytes[seen.fate] += times * seen.size


def _place(event: Event) -> str:
    return str(event.get("target") or event.get("path"))


def _reason(event: Event) -> str:
    line = f"line {event['line']}" if "line" in event else None
    return ": ".join(str(part) for part in (event.get("reason"), line, event.get("detail")) if part)


@dataclass(slots=True)
class Speed:
    """Bytes a second over the last seconds."""

    samples: deque[tuple[float, int]] = field(default_factory=deque)

    def at(self, now: float, sent: int) -> float:
        """Return the speed, given what was sent until now."""
        self.samples.append((now, sent))
        while now - self.samples[0][0] > _RATE_OVER_S:
            self.samples.popleft()
        began, before = self.samples[0]
        return max(0.0, (sent - before) / (now - began)) if now > began else 0.0


class Screen(io.TextIOBase):
    """Standard output; what can't be written is gone, and holds up no upload."""

    def write(self, text: str) -> int:
        """Write it at once: nothing is left to be written at the end of the process."""
        data = text.encode("utf-8", "backslashreplace")
        with suppress(OSError):
            while data:
                data = data[os.write(1, data) :]
        return len(text)

    def isatty(self) -> bool:
        """Whether a person is looking."""
        return os.isatty(1)

    def fileno(self) -> int:
        """For its width."""
        return 1


def page(level: str, environ: Mapping[str, str]) -> "OncePage":
    """Return the page for standard output as it is: a terminal, or something that takes lines."""
    screen = Screen()
    colour = console.wants_colour(environ, terminal=screen.isatty())
    terminal = Console(
        file=screen,  # type: ignore[arg-type]  # as much of a stream as rich needs
        force_terminal=screen.isatty(),
        color_system="standard" if colour else None,
        highlight=False,
    )
    return OncePage(terminal, level=level, bars=screen.isatty() and not terminal.is_dumb_terminal)


class OncePage:
    """Shows a run: `bars` on a terminal that can, else the lines of the log alone; and a table at its end."""

    def __init__(self, terminal: Console, *, level: str, bars: bool) -> None:
        self.fates = Fates()
        self._terminal = terminal
        self._level = logs.LEVELS[level]
        self._bars = bars
        self._jobs: Callable[[], Collection[Job]] = tuple
        self._clock: Callable[[], float] = float
        self._lock = Lock()
        self._speed = Speed()
        self._live = Live(
            console=terminal,
            get_renderable=self._drawn,
            refresh_per_second=_REFRESHES_PER_S,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def log(self) -> logs.EventLog:
        """Return the log that this page is made from."""
        return logs.event_log(self._write, level="debug")

    def watch(self, jobs: Callable[[], Collection[Job]], clock: Callable[[], float]) -> None:
        """Learn where to see what is under way, and by which clock."""
        self._jobs, self._clock = jobs, clock

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw bars meanwhile."""
        if not self._bars:
            yield
            return
        with self._live:
            yield

    def leave(self, status: int) -> NoReturn:
        """End the process, and leave the terminal as it was."""
        self._live.stop()
        self.print_end()
        os._exit(status)

    def _write(self, line: str) -> None:
        event = json.loads(line)
        with self._lock:
            self.fates.take(event)
        if logs.LEVELS[event["level"]] < self._level or (self._bars and event["event"] in _SHOWN_BY_BARS):
            return
        row = console.line(event, colour=self._terminal.color_system is not None)
        self._terminal.print(Text.from_ansi(row), soft_wrap=True)

    # ---- the bars ----

    def _drawn(self) -> Table:
        going = [job for job in self._jobs() if job.progress.started_at is not None]
        with self._lock:
            counts, sizes = self.fates.counts.copy(), self.fates.bytes.copy()
            keys = [(job.inbox.name, logs.printable(job.name)) for job in going]
            seen = [self.fates.files.get(key, Seen(*key)) for key in keys]
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, overflow="ellipsis")
        if not counts.total():
            return grid
        now = self._clock()
        sent = sizes[Fate.DONE] + sizes[Fate.FAILED] + sum(job.progress.sent for job in going)
        title = f"{counts[Fate.DONE] + counts[Fate.FAILED]:,} of {console.count(counts.total(), 'file')}"
        grid.add_row(Text(title, "bold"), *_bar(sent, sizes.total(), self._speed.at(now, sent)))
        for job, it in zip(going, seen, strict=True):
            passed = now - (job.progress.started_at or now)
            speed = job.progress.sent / passed if passed else 0.0
            grid.add_row(Text(f"{it.inbox}/{it.name}"), *_bar(job.progress.sent, it.size, speed))
        return grid

    # ---- the end ----

    def print_end(self) -> None:
        """Print the table of all files, and the reasons of those that are not done."""
        self._terminal.print(self._table())
        rest = [seen for seen in self.fates.files.values() if seen.fate is not Fate.DONE]
        for seen in rest[:_MOST_REASONS]:
            style = "red" if seen.fate is Fate.FAILED else "yellow"
            said = Text.assemble((f" {seen.fate:<8}", style), f" {seen.inbox}/{seen.name}  {seen.why}")
            self._terminal.print(said, soft_wrap=True)
        if rest[_MOST_REASONS:]:
            self._terminal.print(f" … and {len(rest) - _MOST_REASONS:,} more, each with its reason in the log")
        for place, why in self.fates.holds.items():
            self._terminal.print(Text.assemble((" held    ", "red"), f" {place}  {why}"), soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 1))
        table.add_column("inbox")
        for title in ("done", "failed", "waiting", "uploaded"):
            table.add_column(title, justify="right")
        by_inbox: dict[str, list[Seen]] = {}
        for seen in self.fates.files.values():
            by_inbox.setdefault(seen.inbox, []).append(seen)
        for inbox, theirs in by_inbox.items():
            table.add_row(Text(inbox), *_sums(theirs))
        if len(by_inbox) != 1:
            table.add_row(Text("all", "bold"), *_sums(self.fates.files.values()))
        return table


def _bar(sent: int, size: int, speed: float) -> tuple[ProgressBar, Text, Text, Text]:
    bar = ProgressBar(total=max(size, 1), completed=min(sent, size), width=_BAR_CELLS)
    left = console.span(max(1.0, (size - sent) / speed)) + " left" if speed and sent < size else ""
    amount = f"{console.size(sent)} of {console.size(size)}"
    return bar, Text(amount), Text(console.rate(speed) if speed else ""), Text(left)


def _sums(files: Collection[Seen]) -> tuple[str, ...]:
    fates = Counter(seen.fate for seen in files)
    uploaded = sum(seen.size for seen in files if seen.fate is Fate.DONE)
    return (*(f"{fates[fate]:,}" for fate in Fate), console.size(uploaded))

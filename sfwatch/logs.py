"""Every event and key that the log can hold is listed here, once; nothing else can be said.

An event is said with `log("file.done", file=…)`: its level belongs to it and is looked up here, an event or
key that is not listed is a bug and raises. The README's table is tested against these lists, both ways.
Each line is one JSON object, at most 32 KiB (journald cuts longer ones), safe against names with control
characters, and printable where a name is not valid UTF-8 (`file_b64` then holds the bytes).
"""

import base64
import importlib
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, KeysView, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

from sfwatch import console
from sfwatch.settings import Log

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

_FILE = "inbox file size"
_END = f"{_FILE} attempts target path total_s repeated"

_EVENTS: Mapping[str, tuple[str, str]] = {
    "daemon.started": ("info", "version pid config state_dir inboxes"),
    "daemon.ready": ("info", "files total_s"),
    "daemon.stopping": ("info", "signal under_way grace_s"),
    "daemon.stopped": ("info", "done failed waiting"),
    "config.loaded": ("info", "config inboxes needs_restart"),
    "config.rejected": ("error", "config problems"),
    "config.warning": ("warning", "detail"),
    "journal.set_aside": ("error", "path reason detail"),
    "journal.orphaned": ("warning", "path waiting detail"),
    "claim.foreign": ("warning", "inbox instance waiting detail"),
    "folder.created": ("info", "inbox path"),
    "inbox.watched": ("info", "inbox path mode fs_type interval_s trusted detail"),
    "inbox.lost": ("error", "inbox path reason detail"),
    "inbox.found": ("info", "inbox path"),
    "inbox.released": ("info", "inbox path"),
    "inbox.overflowed": ("warning", "inbox"),
    "inbox.others": ("info", "inbox others"),
    "inbox.skipped": ("warning", "inbox path reason detail"),
    "file.seen": ("debug", _FILE),
    "file.ignored": ("info", f"{_FILE} reason detail"),
    "file.waiting": ("info", f"{_FILE} reason detail"),
    "file.stuck": ("warning", f"{_FILE} reason detail writers waited_s"),
    "file.settled": ("debug", f"{_FILE} settled_by waited_s"),
    "file.changed": ("warning", f"{_FILE} attempt detail orphans"),
    "file.warning": ("warning", f"{_FILE} reason detail line"),
    "file.vanished": ("warning", f"{_FILE} detail"),
    "upload.started": ("info", f"{_FILE} attempt target remote_name sha256 lines"),
    "upload.progress": ("info", f"{_FILE} attempt sent bytes_per_s"),
    "upload.stuck": ("error", f"{_FILE} sent detail"),
    "upload.accepted": (
        "info",
        f"{_FILE} attempt target file_id trace_id http_status duration_s bytes_per_s",
    ),
    "upload.deferred": (
        "warning",
        f"{_FILE} attempt target reason http_status code detail trace_id retry_in_s",
    ),
    "upload.unknown": ("warning", f"{_FILE} attempt target reason http_status detail trace_id retry_in_s"),
    "upload.recovered": ("warning", f"{_FILE} attempt target file_id orphans"),
    "upload.resent": ("warning", f"{_FILE} attempt target detail"),
    "upload.undecided": ("warning", f"{_FILE} attempt target reason detail retry_in_s candidates"),
    "upload.mismatch": ("warning", f"{_FILE} attempt target file_id trace_id detail"),
    "file.done": (
        "info",
        f"{_END} file_id trace_id sidecar sha256 lines recovered same_as detail",
    ),
    "file.failed": (
        "error",
        f"{_END} trace_id http_status reason detail line report",
    ),
    "target.held": ("error", "target reason detail waiting probe_in_s"),
    "target.resumed": ("info", "target reason waiting held_s"),
    "storage.held": ("error", "path reason detail waiting probe_in_s"),
    "storage.resumed": ("info", "path reason waiting held_s"),
    "internal.error": ("critical", "inbox file detail traceback"),
}

KEYS: Mapping[str, str] = {
    "attempt": "which try of this file it is, from 1",
    "attempts": "how many tries there were",
    "bytes_per_s": "speed of the upload in bytes per second",
    "candidates": "ids in the service's listing that may be this upload",
    "code": "the service's own code in the answer's body",
    "config": "the configuration file",
    "detail": "a sentence for people",
    "done": "files done since the start",
    "duration_s": "how long the request took",
    "failed": "files failed since the start",
    "file": "the file's name, relative to its inbox",
    "file_b64": "the name's bytes in base64, where they are not valid UTF-8",
    "file_id": "the id that the service gave",
    "files": "how many files the first look found",
    "fs_type": "the filesystem's type",
    "grace_s": "how long the work under way may go on",
    "held_s": "how long it was held",
    "http_status": "the answer's HTTP status",
    "inbox": "the inbox's name",
    "inboxes": "the inboxes' names",
    "instance": "the claims folder, named by the id of the instance that made it",
    "interval_s": "seconds between two full looks at the inbox",
    "line": "line number in the file, from 1",
    "lines": "lines of the file that are not blank",
    "mode": "how the inbox is watched: inotify or polling",
    "needs_restart": "keys that were changed too, but count only after a restart",
    "orphans": "ids at the service that belong to no file of ours",
    "others": "names in the inbox that sfwatch does not take",
    "path": "a file or folder",
    "pid": "the daemon's process id",
    "probe_in_s": "seconds until it is tried again",
    "problems": "what is wrong with the configuration, each with its path and line",
    "reason": "why, as a short code",
    "recovered": "true if the id was found in the service's listing after a lost answer",
    "remote_name": "the name under which the file was sent",
    "repeated": "true if this may have been said before a crash",
    "report": "the report's path",
    "retry_in_s": "seconds until the next try",
    "same_as": "the id of an earlier upload of the same bytes",
    "sent": "bytes of the file sent so far",
    "settled_by": "what decided that the file is whole: renamed, lease, at_rest, quiet or marker",
    "sha256": "SHA-256 of the bytes that went out",
    "sidecar": "the sidecar's path",
    "signal": "the signal that ended it",
    "size": "the file's size in bytes",
    "state_dir": "the folder of the journal",
    "target": "the service's address and where the key comes from",
    "total_s": "seconds from the first sight to the end",
    "trace_id": "the service's trace id: its support asks for it",
    "traceback": "where in the code it happened",
    "trusted": "whether the kernel's word on writers is proof here",
    "under_way": "files being worked on",
    "version": "sfwatch's version",
    "waited_s": "seconds since the file was first seen",
    "waiting": "how many files are neither done nor failed",
    "writers": "ids of the processes that have the file open for writing, where they can be seen",
}


@dataclass(frozen=True, slots=True)
class Event:
    """What is known of an event before it happens."""

    level: str
    keys: KeysView[str]  # ordered: a dict's


EVENTS: Mapping[str, Event] = {
    name: Event(level, dict.fromkeys(keys.split()).keys()) for name, (level, keys) in _EVENTS.items()
}
ALWAYS = ("timestamp", "level", "event")
TERMINAL = frozenset({"file.done", "file.failed", "file.vanished"})


class UnlistedEventError(Exception):
    """An event or key that `EVENTS` does not list: a bug."""


class EventLog:
    """Says events. Handed to everybody who has something to say, with what is known bound to it."""

    __slots__ = ("_logger",)

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def bind(self, **keys: Any) -> "EventLog":
        """Return a log that adds *keys* to each event that lists them."""
        return EventLog(self._logger.bind(**keys))

    def __call__(self, event: str, *, level: str | None = None, **keys: Any) -> None:
        """Log *event* at its level, or another; None values are left out. Raise UnlistedEventError."""
        listed = EVENTS.get(event)
        if listed is None or not keys.keys() <= listed.keys:
            raise UnlistedEventError(f"{event}: {sorted(keys.keys() - (listed.keys if listed else set()))}")
        getattr(self._logger, level or listed.level)(event, **keys)


def event_log(
    write: Callable[[str], None],
    *,
    level: str = "info",
    form: Callable[[Mapping[str, Any]], str] | None = None,
) -> EventLog:
    """Return a log whose lines go to *write*, in the *form* given, else as JSON."""
    structlog = _structlog()
    rendered = form or json_line
    logger = structlog.wrap_logger(
        _Lines(write),
        processors=[lambda _logger, level, said: rendered(_event(said, level))],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=False,
    )
    return EventLog(logger.bind())


def _structlog() -> ModuleType:
    """Load structlog, not before a log is wanted, and without what it would load for a console of its own.

    That is rich, if it is installed: 60 ms of a start, and 5 MB for as long as the daemon runs.
    """
    missing = "rich" not in sys.modules
    if missing:
        sys.modules["rich"] = None  # type: ignore[assignment]  # how Python itself marks what can't be imported
    try:
        return importlib.import_module("structlog")
    finally:
        if missing:
            del sys.modules["rich"]


class _Lines:
    """What structlog calls with a finished line, whatever the level."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.debug = self.info = self.warning = self.error = self.critical = write


class Output:
    """Writes whole lines to a descriptor; a full disk or a closed pipe costs lines, never the delivery."""

    def __init__(self, log: Log, *, stdout: int = 1) -> None:
        self._path = log.file
        self._stdout = stdout
        self._lock = threading.Lock()  # lines of different threads must not mix
        self._fd = stdout
        self._torn = False
        self.reopen()

    def reopen(self) -> None:
        """Open the log file anew (it may have been rotated). Raises OSError and keeps the old one."""
        if self._path is None:
            return
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        with self._lock:
            old, self._fd, self._torn = self._fd, fd, False
        if old != self._stdout:
            os.close(old)

    def is_terminal(self) -> bool:
        """Whether a person is looking."""
        return os.isatty(self._fd)

    def write(self, line: str) -> None:
        """Write one line. What cannot be written is gone: there is nowhere to say so."""
        data = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if self._torn:  # part of a line went out before the disk was full: it must not spoil this one
                data = b"\n" + data
            whole = len(data)
            while data:
                try:
                    data = data[os.write(self._fd, data) :]
                except OSError:
                    self._torn = self._torn or len(data) < whole
                    return
            self._torn = False


def start(log: Log, output: Output) -> EventLog:
    """Return the log that the settings ask for."""
    terminal = output.is_terminal()
    if log.format == "json" or (log.format == "auto" and not terminal):
        return event_log(output.write, level=log.level)
    colour = console.wants_colour(os.environ, terminal=terminal)
    return event_log(output.write, level=log.level, form=lambda event: console.line(event, colour=colour))


# What follows turns an event into a line.

MAX_LINE = 32 * 1024
_MAX_TEXT = 4096  # the longest path
_MAX_ITEMS = 50
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return *text* with control characters, bidi controls and undecodable bytes escaped."""
    return text if text.isprintable() else _UNPRINTABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    point = ord(match.group())
    if 0xDC80 <= point <= 0xDCFF:  # a byte that os.fsdecode could not decode
        return f"\\x{point - 0xDC00:02x}"
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}"


def is_utf8(text: str) -> bool:
    """Return whether *text* can be written: a name whose bytes could not be decoded can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _event(said: Mapping[str, Any], level: str) -> dict[str, Any]:
    """Return what was said as its line holds it, in the order of the list: lines of an event look alike."""
    name = said["event"]
    listed = EVENTS[name]
    stamp = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    event = {"timestamp": stamp, "level": level, "event": name}
    for key in listed.keys:
        value = said.get(key)
        if value is not None:
            event[key] = _lines(value) if key == "traceback" else _bounded(value)
    file = said.get("file")
    if "file" in event and isinstance(file, str) and not is_utf8(file):
        event["file_b64"] = base64.b64encode(os.fsencode(file)).decode()
    return event


def _bounded(value: Any) -> Any:
    """Return *value* as JSON can hold it, of bounded length and harmless on a terminal."""
    match value:
        case bool() | int() | None:
            return value
        case float() if math.isfinite(value):
            return round(value, 6)
        case list() | tuple():
            return [_bounded(item) for item in value[:_MAX_ITEMS]]
        case _:
            text = str(value)
            return printable(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "…")


def _lines(traceback: str) -> str:
    """A traceback stays in lines, and is cut at its beginning: the end says what happened."""
    cut = traceback if len(traceback) <= _MAX_TEXT else "…" + traceback[-_MAX_TEXT:]
    return "\n".join(printable(line) for line in cut.splitlines())


def json_line(event: Mapping[str, Any]) -> str:
    """Return the event as JSON of at most MAX_LINE bytes: texts are cut as short as it takes, names last."""
    line = _JSON.encode(event)
    for limit, kept in _CUTS:
        if len(line.encode()) <= MAX_LINE:
            return line
        line = _JSON.encode({key: value if key in kept else _cut(value, limit) for key, value in event.items()})
    return line


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_NAMES = frozenset({"inbox", "file", "file_b64"})
_CUTS = ((1000, _NAMES), (250, _NAMES), (60, _NAMES), (60, frozenset({"file_b64"})))


def _cut(value: Any, limit: int) -> Any:
    """Cut a text to *limit* characters, a list to as many items as have that together."""
    match value:
        case str() if len(value) > limit:
            return value[:limit] + "…"
        case list():
            items = [_cut(item, limit // 4) for item in value]
            longest = max([1, *(len(str(item)) for item in items)])
            return items[: max(1, limit // longest)]
        case _:
            return value

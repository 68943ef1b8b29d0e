"""An event for a person at a terminal: time, event, file, the few facts that matter, and the sentence last.

Which facts matter is said once for each event (`_FACTS`), how a key reads once for all events (`_WORDS`); what
is left out stands in the JSON log. Units are people's: `1.2 MB` (powers of ten, as in the settings), `0.4 s`,
`3 min`. Text is taken as it is: the log has escaped whatever could move a cursor or turn the writing around.
"""

import unicodedata
from collections.abc import Callable, Mapping
from datetime import datetime, tzinfo
from typing import Any

Event = Mapping[str, Any]

_EVENT_CELLS = 17
_PLACE_CELLS = 24
_RATE_FROM_BYTES = 1_000_000
"""The speed of a smaller upload says nothing: it is all waiting."""

_DIM, _BOLD = "2", "1"
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}

_PLACES = ("target", "path")
"""What an event is about that is about no inbox."""

_FACTS: Mapping[str, str] = {
    "daemon.started": "version config inboxes state_dir",
    "daemon.ready": "files total_s",
    "daemon.stopping": "signal under_way grace_s",
    "daemon.stopped": "done failed waiting",
    "config.loaded": "config inboxes",
    "config.rejected": "config problems",
    "config.warning": "",
    "journal.set_aside": "reason",
    "journal.orphaned": "waiting",
    "claim.foreign": "instance waiting",
    "folder.created": "path",
    "inbox.watched": "mode interval_s",
    "inbox.lost": "reason",
    "inbox.found": "path",
    "inbox.released": "path",
    "inbox.overflowed": "",
    "inbox.others": "others",
    "inbox.skipped": "path reason",
    "file.seen": "size",
    "file.ignored": "reason",
    "file.waiting": "reason",
    "file.stuck": "reason waited_s",
    "file.settled": "settled_by waited_s",
    "file.changed": "orphans",
    "file.warning": "line",
    "file.vanished": "",
    "upload.started": "size lines attempt remote_name",
    "upload.progress": "sent bytes_per_s",
    "upload.stuck": "sent",
    "upload.accepted": "file_id duration_s bytes_per_s",
    "upload.deferred": "reason http_status attempt retry_in_s trace_id",
    "upload.unknown": "reason http_status attempt retry_in_s trace_id",
    "upload.recovered": "file_id orphans",
    "upload.resent": "attempt",
    "upload.undecided": "reason candidates retry_in_s",
    "upload.mismatch": "file_id trace_id",
    "file.done": "file_id lines size total_s path recovered same_as repeated",
    "file.failed": "reason line http_status path trace_id repeated",
    "target.held": "reason waiting probe_in_s",
    "target.resumed": "held_s waiting",
    "storage.held": "reason waiting probe_in_s",
    "storage.resumed": "held_s waiting",
    "internal.error": "",
}

_SENTENCES = {"inbox.overflowed": "the kernel dropped some news of it: a full look follows"}
"""For events that bring no sentence and would be a riddle without one."""


def line(event: Event, *, colour: bool, zone: tzinfo | None = None) -> str:
    """Render an event as the JSON log has it; its times are shown in *zone*, None for the machine's own.

    One line, and below it the traceback of an `internal.error`.
    """
    paint = painter(colour=colour)
    name = event["event"]
    facts = f" {paint(_DIM, '·')} ".join(_facts(event))
    sentence = str(event.get("detail") or _SENTENCES.get(name, ""))
    place = _place(event)
    columns = [
        paint(_DIM, _time(event["timestamp"], zone)),
        paint(_COLOURS.get(event["level"], _BOLD), name) + _gap(name, _EVENT_CELLS),
        paint(_BOLD, place) + _gap(place, _PLACE_CELLS) if place else "",
        facts,
        sentence,
    ]
    return "  ".join(column for column in columns if column).rstrip() + _traceback(event, paint)


def wants_colour(environ: Mapping[str, str], *, terminal: bool) -> bool:
    """Whether to paint: on a terminal that can, unless its user asks not to (https://no-color.org)."""
    return terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def painter(*, colour: bool) -> Callable[[str, str], str]:
    """Return what paints a text in a colour (its ANSI code), or leaves it as it is."""
    return _painted if colour else _plain


def size(count: float) -> str:
    """Return a number of bytes as people say it: `999 B`, `1.2 MB`."""
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{_digits(value)} {unit}"


def span(seconds: float) -> str:
    """Return a time as people say it: `4 ms`, `0.4 s`, `35 s`, `3 min`, `2 h`, `12 days`."""
    if seconds < 0.0995:
        return f"{_digits(seconds * 1000)} ms"
    if seconds < 90:
        return f"{_digits(seconds)} s"
    if seconds < 90 * 60:
        return f"{_digits(seconds / 60)} min"
    if seconds < 36 * 3600:
        return f"{_digits(seconds / 3600)} h"
    return f"{_digits(seconds / 86400)} days"


def rate(bytes_per_s: float) -> str:
    """Return a speed as people say it: `35 MB/s`."""
    return f"{size(bytes_per_s)}/s"


def count(number: int, noun: str) -> str:
    """Return `1 line`, `12 lines`, `5,000 lines`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _digits(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


# The columns.


def _time(stamp: str, zone: tzinfo | None) -> str:
    return datetime.fromisoformat(stamp).astimezone(zone).strftime("%H:%M:%S")


def _place(event: Event) -> str:
    if "inbox" in event:
        return "/".join(str(event[key]) for key in ("inbox", "file") if key in event)
    return next((str(event[key]) for key in _PLACES if key in event), "")


def _facts(event: Event) -> list[str]:
    wanted = _FACTS.get(event["event"])
    if wanted is None:  # said by a newer version
        return [f"{key}={value}" for key, value in event.items() if key not in _SHOWN_ELSEWHERE]
    facts = [_fact(key, event) for key in wanted.split() if key in event]
    return [fact for fact in facts if fact]


_SHOWN_ELSEWHERE = ("timestamp", "level", "event", "inbox", "file", "file_b64", "detail", "traceback", *_PLACES)


def _fact(key: str, event: Event) -> str:
    """Say one key in words; a value of an unexpected type must not end the daemon that says it."""
    try:
        return _WORDS[key](event[key], event)
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return f"{key}={event[key]}"


def _traceback(event: Event, paint: Callable[[str, str], str]) -> str:
    """Indent each line, so that none can be taken for an event's."""
    return "".join(f"\n  {paint(_DIM, '|')} {text}" for text in str(event.get("traceback", "")).splitlines())


def _painted(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m"


def _plain(_code: str, text: str) -> str:
    return text


def _gap(text: str, cells: int) -> str:
    """Return the spaces up to the next column; Chinese characters take two cells each."""
    taken = sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
    return " " * (cells - taken)


# The words of each key.

_Words = Callable[[Any, Event], str]


def _said(form: str) -> _Words:
    return lambda value, _: form.format(value)


def _counted(noun: str) -> _Words:
    return lambda value, _: count(value, noun)


def _after(form: str) -> _Words:
    return lambda value, _: form.format(span(value))


def _listed(form: str, separator: str = ", ") -> _Words:
    return lambda value, _: form.format(separator.join(str(item) for item in value)) if value else ""


def _if_true(words: str) -> _Words:
    return lambda value, _: words if value else ""


def _sent(sent: int, event: Event) -> str:
    whole = event.get("size") or 0
    if sent > whole:
        return size(sent)
    return f"{size(sent)} of {size(whole)} ({sent * 100 // max(whole, 1)} %)"


def _speed(bytes_per_s: float, event: Event) -> str:
    return rate(bytes_per_s) if event.get("size", 0) >= _RATE_FROM_BYTES else ""


def _remote_name(name: str, event: Event) -> str:
    return f"as {name}" if name != str(event.get("file")).rsplit("/", 1)[-1] else ""


def _interval(seconds: float, event: Event) -> str:
    return f"a look every {span(seconds)}" if event.get("mode") != "inotify" else ""


def _path(path: str, event: Event) -> str:
    """Return a file's path from done or failed on, any other in full."""
    if "file" not in event:
        return path
    depth = str(event["file"]).count("/") + 2
    return "/".join(path.split("/")[-depth:])


_WORDS: Mapping[str, _Words] = {
    "attempt": lambda value, _: f"try {value}" if value > 1 else "",
    "bytes_per_s": _speed,
    "candidates": _listed("may be {}", " or "),
    "config": _said("{}"),
    "done": _said("{} done"),
    "duration_s": _after("in {}"),
    "failed": _said("{} failed"),
    "file_id": _said("{}"),
    "files": lambda value, _: f"{count(value, 'file')} found",
    "grace_s": _after("at most {} more"),
    "held_s": _after("held for {}"),
    "http_status": _said("HTTP {}"),
    "inboxes": _listed("inboxes: {}"),
    "instance": _said("claimed by {}"),
    "interval_s": _interval,
    "line": _said("line {}"),
    "lines": _counted("line"),
    "mode": _said("{}"),
    "orphans": _listed("orphans at the service: {}"),
    "others": lambda value, _: f"{count(value, 'other name')} there",
    "path": _path,
    "probe_in_s": _after("next try in {}"),
    "problems": _listed("{}", "; "),
    "reason": _said("{}"),
    "recovered": _if_true("found in the listing"),
    "remote_name": _remote_name,
    "repeated": _if_true("perhaps said before"),
    "retry_in_s": _after("next try in {}"),
    "same_as": _said("same bytes as {}"),
    "sent": _sent,
    "settled_by": _said("by {}"),
    "signal": _said("{}"),
    "size": lambda value, _: size(value),
    "state_dir": _said("state in {}"),
    "total_s": _after("{}"),
    "trace_id": _said("trace {}"),
    "under_way": _said("{} under way"),
    "version": _said("sfwatch {}"),
    "waited_s": _after("after {}"),
    "waiting": _said("{} waiting"),
}

"""A lost answer is settled by the listing: adopt what can only be ours, resend only what provably is not there.

The service has no idempotency key, so an upload whose answer was lost can be recognised by what is listed
alone: name, size, lines and time of creation. An entry matches if nothing that it tells contradicts, and it
tells name, size and time. An entry that leaves one of them out, and could be ours, proves nothing either
way: it neither matches nor lets an absence count.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfwatch.verdict import http_date, listed_entries, read_json, readable_id, whole_number

ALLOWANCE_S = 5.0
"""Beyond the measured skew: creation times are whole seconds, and a clock may be stepped a little."""

ALLOWANCE_UNMEASURED_S = 300.0


@dataclass(frozen=True, slots=True)
class Listed:
    """One entry of the listing. None: not told, or not readable. `created_at`: seconds since the epoch.

    `id` is "" where the entry has no readable one: it can't be adopted, but counts in the listing's length.
    """

    id: str
    bytes: int | None
    created_at: float | None
    filename: str | None
    purpose: str | None
    line_count: int | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Lost:
    """A file whose uploads ended without a clear answer.

    `windows`: start and end of each such attempt on our wall clock, in seconds since the epoch.
    """

    remote_name: str
    size: int
    lines: int | None
    windows: tuple[tuple[float, float], ...]
    purpose: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """`entry` is ours. `orphans` are ids of further uploads of the same file, of use to nobody."""

    entry: Listed
    orphans: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Absent:
    """The service has no such file: it may be sent again."""


@dataclass(frozen=True, slots=True)
class NotYet:
    """The listing proves nothing.

    `full`: as long as its limit, so ask with a larger one. `same_length`: no longer than with the smaller
    limit, so the service bounds it by itself. `newest_missing`: an upload known to be there isn't shown.
    `unreadable_entry`: one could be ours but does not tell enough.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Undecidable:
    """More entries match than this file had attempts: somebody else's are among them, and nobody can tell."""

    candidates: tuple[str, ...]


def read_listing(body: bytes) -> tuple[Listed, ...] | None:
    """The entries of a listing's body (`data.data[]` or `data[]`); None if it can't be read as one."""
    document = read_json(body)
    entries = listed_entries(document) if isinstance(document, dict) else None
    return None if entries is None else tuple(_listed(entry) for entry in entries)


def skew_s(date_header: str | None, *, wall: float) -> float | None:
    """Seconds by which the service's clock is ahead of ours, by its `Date` header received at `wall`."""
    theirs = http_date(date_header)
    return None if theirs is None else theirs - wall


def allowance_s(skew: float | None) -> float:
    """Seconds by which a creation time may lie outside the window of the attempts."""
    return ALLOWANCE_UNMEASURED_S if skew is None else abs(skew) + ALLOWANCE_S


def match(
    lost: Lost,
    listing: Sequence[Listed],
    *,
    limit: int,
    smaller: tuple[int, int] | None,
    known_ids: Collection[str],
    newest_known: str | None,
    allowance_s: float,
) -> Found | Absent | NotYet | Undecidable:
    """Which entry of `listing`, asked for with `limit`, is the lost upload.

    `smaller`: limit and length of an earlier, shorter listing. `known_ids`: accepted for other files, or
    orphaned. `newest_known`: the id accepted last before the lost attempts, which must be shown.
    """
    strangers = [entry for entry in _distinct(listing) if entry.id not in known_ids]
    ours = sorted((e for e in strangers if _is_ours(e, lost, allowance_s)), key=_age)
    if len(ours) > len(lost.windows):
        return Undecidable(tuple(entry.id for entry in ours))
    if ours:
        # A full listing may hide more: most likely our own other attempts, which are orphans, seen or not.
        # Asking for more could only turn a find into a doubt that somebody else's same name and size raises.
        return Found(ours[0], tuple(entry.id for entry in ours[1:]))
    doubt = _doubt(listing, limit=limit, smaller=smaller, newest_known=newest_known)
    if doubt is None and any(_could_be_ours(entry, lost, allowance_s) for entry in strangers):
        doubt = NotYet("unreadable_entry")
    return doubt or Absent()


def _age(entry: Listed) -> tuple[float, str]:
    return (entry.created_at or 0.0, entry.id)


def _doubt(
    listing: Sequence[Listed], *, limit: int, smaller: tuple[int, int] | None, newest_known: str | None
) -> NotYet | None:
    """Why an absence from this listing does not count."""
    if len(listing) >= limit:
        return NotYet("full")
    if smaller is not None and smaller[1] >= smaller[0] and len(listing) <= smaller[1]:
        return NotYet("same_length")
    if newest_known is not None and all(entry.id != newest_known for entry in listing):
        return NotYet("newest_missing")
    return None


def _distinct(listing: Sequence[Listed]) -> list[Listed]:
    """Each id once (a listing that changes while it is made may repeat one); all of those without one."""
    by_id = {entry.id: entry for entry in listing if entry.id}
    return [*by_id.values(), *(entry for entry in listing if not entry.id)]


def _is_ours(entry: Listed, lost: Lost, allowance_s: float) -> bool:
    told = entry.id and None not in (entry.filename, entry.bytes, entry.created_at)
    return bool(told) and _could_be_ours(entry, lost, allowance_s)


def _could_be_ours(entry: Listed, lost: Lost, allowance_s: float) -> bool:
    """Nothing that the entry tells contradicts."""
    pairs = (
        (entry.filename, lost.remote_name),
        (entry.bytes, lost.size),
        (entry.line_count, lost.lines),
        (entry.purpose, lost.purpose),
    )
    agrees = all(None in pair or pair[0] == pair[1] for pair in pairs)
    return agrees and _in_window(entry.created_at, lost.windows, allowance_s)


def _in_window(created_at: float | None, windows: Sequence[tuple[float, float]], allowance_s: float) -> bool:
    """One window over all attempts: a late copy of the first may be stored while the second is sent."""
    if not windows or created_at is None:
        return bool(windows)
    earliest, latest = min(start for start, _ in windows), max(end for _, end in windows)
    return earliest - allowance_s <= created_at <= latest + allowance_s


def _listed(entry: Any) -> Listed:
    raw = entry if isinstance(entry, dict) else {}
    return Listed(
        id=readable_id(raw.get("id")) or "",
        bytes=whole_number(raw.get("bytes")),
        created_at=_created_at(raw),
        filename=_text(raw.get("filename")),
        purpose=_text(raw.get("purpose")),
        line_count=whole_number(raw.get("line_count")) or None,  # 0: not counted yet, no empty file is sent
        raw=raw,
    )


def _created_at(raw: Mapping[str, Any]) -> float | None:
    """The upload's answer says createdAt, the listing created_at."""
    value = raw.get("createdAt") if raw.get("created_at") is None else raw["created_at"]
    if isinstance(value, float) and math.isfinite(value):
        return value
    number = whole_number(value)
    return None if number is None else float(number)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None

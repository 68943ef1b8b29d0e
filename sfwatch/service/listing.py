"""A lost answer is settled by the listing: what has its tag is adopted, what is provably absent is sent again.

Pages are asked for by a `Cursor`; `see` takes from each what matters and keeps no more; `read` says what that
proves of one file. A listing may be short, late, in any order or change between two pages: an entry counts
at once, an absence only by a proof.
"""

import enum
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sfwatch.verdict import listed_entries, read_json, readable_id, whole_number

LIMITS = (100, 1_000, 10_000)
"""The larger two are for a listing that cannot be paged."""

PAGES_MAX = 500
RESTARTS_MAX = 3

ORDER_MIN = 8
"""So many different times must have been read in order: of a few entries any order is chance."""

_TAG = re.compile("(?<![0-9a-f])[0-9a-f]{12}(?![0-9a-f])", re.IGNORECASE)


class KnownUpload(Protocol):
    """An upload that the journal knows. `first_sent` and `accepted` are numbers of one counter; None: never."""

    @property
    def target(self) -> str | None: ...
    @property
    def tag(self) -> str | None: ...
    @property
    def first_sent(self) -> int | None: ...
    @property
    def accepted(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the listing. None: not told, or not readable. `created`: seconds since the epoch."""

    id: str | None
    size: int | None
    created: float | None
    name: str | None
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Page:
    entries: tuple[Entry, ...]
    has_more: bool | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """A file whose uploads ended without a clear answer.

    `first_sent` and `last_sent` are the journal's numbers of its first and last unsettled attempt. Of attempts
    that this journal did not see: 0, and the counter as it stood when they were found.
    `newest_before`: the id accepted last at this target before the first. `tagged`: its name carries its tag.
    """

    tag: str
    size: int
    first_sent: int
    last_sent: int
    newest_before: str | None
    tagged: bool = True


# ── pages ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_page(body: bytes) -> Page | None:
    """The entries of a listing's body (`data.data[]` or `data[]`); None if it can't be read as one."""
    document = read_json(body)
    entries = listed_entries(document) if isinstance(document, dict) else None
    if entries is None:
        return None
    told = [part.get("has_more") for part in (document, document["data"]) if isinstance(part, dict)]
    has_more = next((value for value in told if isinstance(value, bool)), None)
    return Page(tuple(_entry(entry if isinstance(entry, dict) else {}) for entry in entries), has_more)


def _entry(raw: Mapping[str, Any]) -> Entry:
    size, name = whole_number(raw.get("bytes")), raw.get("filename")
    return Entry(
        id=readable_id(raw.get("id")),
        size=size if size and size > 0 else None,  # 0: not counted yet, no empty file is sent
        created=_created(raw),
        name=name if isinstance(name, str) and name else None,
        raw=raw,
    )


def _created(raw: Mapping[str, Any]) -> float | None:
    """The upload's answer says createdAt, the listing created_at."""
    value = raw.get("createdAt") if raw.get("created_at") is None else raw["created_at"]
    if isinstance(value, float) and math.isfinite(value):
        return value
    number = whole_number(value)
    return None if number is None else float(number)


def tag_in(name: str | None) -> str | None:
    """The last group of exactly 12 hex digits in a listed name."""
    tags = _TAG.findall(name or "")
    return str(tags[-1]).lower() if tags else None


class End(enum.Enum):
    """How the reading of a listing ended: WHOLE, read to its end. Everything else leaves it OPEN."""

    WHOLE = enum.auto()
    OPEN = enum.auto()


@dataclass(frozen=True, slots=True)
class Cursor:
    """The next request is `limit` and `after`. Each page has to begin with the `last` id of the one before."""

    limits: tuple[int, ...] = LIMITS
    after: str | None = None
    first: str | None = None
    last: str | None = None  # None with `after`: the page before had one entry only
    unpaged: bool = False
    restarts: int = 0
    pages: int = 1

    @property
    def limit(self) -> int:
        return self.limits[0]


def next_page(cursor: Cursor, page: Page) -> tuple[tuple[Entry, ...], Cursor | End, bool]:
    """What is new in `page`, the answer to `cursor`; what to ask next; whether that begins again."""
    entries, ids = page.entries, [entry.id for entry in page.entries]
    if cursor.unpaged:
        return _unpaged(cursor, page)
    if cursor.first is not None and cursor.first in ids:  # the first page again: `after` is ignored
        larger = Cursor(cursor.limits[1:], unpaged=True, pages=cursor.pages + 1)
        return entries, _within_bounds(larger), True
    if cursor.last is not None and ids[:1] != [cursor.last]:
        again = Cursor(cursor.limits, restarts=cursor.restarts + 1, pages=cursor.pages + 1)
        return entries, _within_bounds(again), True
    fresh = entries if cursor.last is None else entries[1:]
    if not fresh:
        if cursor.last is not None or page.has_more is False:
            return fresh, End.WHOLE, False
        # Nothing after the only entry ever shown: the service may answer any `after` so.
        worked = cursor.after is None or cursor.after != cursor.first
        return fresh, End.WHOLE if worked and page.has_more is None else End.OPEN, False
    return fresh, _onward(cursor, ids), False


def _unpaged(cursor: Cursor, page: Page) -> tuple[tuple[Entry, ...], Cursor | End, bool]:
    """One page is all that can be had; one that may have been cut short by the service proves nothing."""
    if len(page.entries) < cursor.limit:
        return page.entries, End.WHOLE if page.has_more is False else End.OPEN, False
    if len(cursor.limits) == 1:
        return page.entries, End.OPEN, False
    return page.entries, replace(cursor, limits=cursor.limits[1:], pages=cursor.pages + 1), True


def _onward(cursor: Cursor, ids: list[str | None]) -> Cursor | End:
    """Ask for what comes after the last id but one, so that the next page shows that nothing is left out."""
    if None in ids[-2:]:
        return End.OPEN
    last = ids[-1] if len(ids) > 1 else None
    first = cursor.first or next(filter(None, ids))
    return _within_bounds(replace(cursor, after=ids[-2:][0], first=first, last=last, pages=cursor.pages + 1))


def _within_bounds(cursor: Cursor) -> Cursor | End:
    return End.OPEN if cursor.pages > PAGES_MAX or cursor.restarts > RESTARTS_MAX else cursor


# ── what was seen ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Shown:
    """Which uploads of ours a listing has shown since it was begun, as far as it matters for a proof.

    `passed`: two that were created at different times were accepted up to this number. `oldest`: number and
    time of the one accepted first.
    """

    passed: float = math.inf
    oldest: tuple[int, float] | None = None
    latest_sent: int = 0
    wanted: set[str | None] = field(default_factory=set)

    def note(self, upload: tuple[int, float]) -> None:
        """Take in the number and time of one that was listed in order."""
        oldest, self.oldest = self.oldest, min(self.oldest or upload, upload)
        if oldest is not None and oldest[1] != upload[1]:
            self.passed = min(self.passed, max(oldest[0], upload[0]))


@dataclass(slots=True)
class Seen:
    """What one look-up for the `lost` files (by tag) of a target has seen so far. Only `see` changes it."""

    target: str
    lost: Mapping[str, Lost]
    matches: dict[str, dict[str, Entry]] = field(default_factory=dict)
    wrong_sizes: dict[str, dict[str, None]] = field(default_factory=dict)  # in the order seen
    doubtful: set[str] = field(default_factory=set)  # tags of entries without size or id
    strangers: set[int | None] = field(default_factory=set)  # sizes of entries that no row knows
    nameless: set[int | None] = field(default_factory=set)  # of these: without a readable name
    by_tag: Shown = field(default_factory=Shown)  # our uploads under their own tag
    by_id: Shown = field(default_factory=Shown)  # our uploads under whatever name
    in_order: bool = True
    times: int = 0  # different ones, as long as they are in order
    created: float = math.inf  # of the entry before


def see(
    seen: Seen, fresh: Iterable[Entry], known: Mapping[str, KnownUpload], *, restarted: bool = False
) -> None:
    """Take in what `next_page` found new. `known`: what the journal knows at this address of these ids.

    `restarted`: these entries do not continue what was read before. They may match, but they are no witness.
    """
    sizes = {None, *(lost.size for lost in seen.lost.values())}
    wanted = {lost.newest_before for lost in seen.lost.values()}
    for entry in fresh:
        upload = known.get(entry.id) if entry.id is not None else None
        tag = tag_in(entry.name)
        if upload is None:
            _see_stranger(seen, entry, tag, sizes)
        if restarted:
            continue
        in_order = _see_time(seen, entry.created)
        if upload is not None and upload.target == seen.target and upload.accepted is not None:
            for shown in (seen.by_id, seen.by_tag) if tag and tag == upload.tag else (seen.by_id,):
                shown.latest_sent = max(shown.latest_sent, upload.first_sent or 0)
                shown.wanted |= wanted & {entry.id}
                if in_order:
                    shown.note((upload.accepted, seen.created))
    if restarted:
        seen.by_tag, seen.by_id = Shown(), Shown()
        seen.in_order, seen.times, seen.created = True, 0, math.inf


def _see_time(seen: Seen, created: float | None) -> bool:
    """Whether the creation times have never increased so far. An entry that tells none ends the order."""
    seen.in_order = seen.in_order and created is not None and created <= seen.created
    if seen.in_order and created is not None and created < seen.created:
        seen.times, seen.created = seen.times + 1, created
    return seen.in_order


def _see_stranger(seen: Seen, entry: Entry, tag: str | None, sizes: set[int | None]) -> None:
    """Note an entry that no row knows."""
    seen.strangers |= sizes & {entry.size}
    if entry.name is None:
        seen.nameless |= sizes & {entry.size}
    lost = seen.lost.get(tag) if tag is not None else None
    if lost is None or not lost.tagged:
        return
    if entry.id is None or entry.size is None:
        seen.doubtful.add(lost.tag)
    elif entry.size == lost.size:
        seen.matches.setdefault(lost.tag, {}).setdefault(entry.id, entry)
    else:
        seen.wrong_sizes.setdefault(lost.tag, {})[entry.id] = None


# ── what it proves ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Found:
    """`entry` is ours. `orphans` are ids of further uploads of the same file, of use to nobody."""

    entry: Entry
    orphans: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Absent:
    """The service has no such file. `proof`: "order" or "whole"."""

    proof: str


@dataclass(frozen=True, slots=True)
class Unproven:
    """Not in a listing read to its end; but no upload of ours is known that it could have shown."""


@dataclass(frozen=True, slots=True)
class SizeDiffers:
    """Only entries of another size have its tag."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inconclusive:
    """Nothing is proved. `reason` is a key of `recovery.WHY_UNDECIDED`.

    unreadable_entry: one that no row knows does not tell whether it is the file. For an untagged file that is
    any such entry of its size.
    """

    reason: str


Reading = Found | Absent | Unproven | SizeDiffers | Inconclusive


def read(lost: Lost, seen: Seen, end: End, *, names_kept: bool, knows_any: bool) -> Reading:
    """What the listing says of one file; asked after each page. While more are to come, `end` is OPEN.

    `names_kept`: the service is not known to rewrite names. `knows_any`: the journal knows uploads accepted at
    this address.
    """
    matches = seen.matches.get(lost.tag)
    if matches:
        newest = max(matches.values(), key=lambda entry: -math.inf if entry.created is None else entry.created)
        return Found(newest, tuple(other for other in matches if other != newest.id))
    if lost.tag in seen.wrong_sizes:
        return SizeDiffers(tuple(seen.wrong_sizes[lost.tag]))
    if not names_kept:
        return Inconclusive("names_rewritten")
    # An untagged file is absent if no stranger's entry has its size: there names play no part.
    sizes, shown = (seen.nameless, seen.by_tag) if lost.tagged else (seen.strangers, seen.by_id)
    if lost.tag in seen.doubtful or sizes & {lost.size, None}:
        return Inconclusive("unreadable_entry")
    if seen.times >= ORDER_MIN and shown.passed <= lost.first_sent:
        return Absent("order")
    if end is End.OPEN:
        return Inconclusive("partial_listing")
    if lost.newest_before in shown.wanted or shown.latest_sent > lost.last_sent:
        return Absent("whole")
    return Unproven() if lost.tagged and not knows_any else Inconclusive("nothing_known_shown")


def earliest_s(size: int, reconcile_window_s: float) -> float:
    """Seconds from the end of the last attempt until an absence may count: a second for each 10 MB stored."""
    return reconcile_window_s + size / 10_000_000

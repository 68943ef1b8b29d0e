"""Which files are whole, and when to look at the others again: kernel first, then rest, then the tail.

A file is taken when nothing speaks against it any more. The kernel's "busy" is always true; its "free" is
proof on local filesystems only (`Rules.trusted`), and means that nobody writes now, not that nobody will. So
a file that is free must also end like a finished one and have been *seen* at rest for a while. Rest is what
we observed on the monotonic clock, never an age computed from the file's own times: copies set those back,
and clocks put them ahead. The one exception is a file that lay there when the program began.

Everything here is a pure function of what was seen before, what is seen now, and `now`.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from sfwatch.files import Fingerprint, Lease

EMPTY_TOLD_AFTER_S = 60.0
"""Seconds that an empty file may lie there untold: browsers and scanners put down empty placeholders."""

STUCK_AFTER_S = 600.0
"""Seconds of writing after which somebody should know: it is open, or has changed again and again."""

BUSY_LOOK_S = (1.0, 5.0)
"""Shortest and longest pause between looks at a file that is written to; its closing mostly rings sooner.

One that ends inside a line is written to as well, as far as anybody can tell. Where nothing rings, it would
else be met again only when its longest rest is over.
"""

HINDERED_LOOK_S = (10.0, 60.0)
"""The same for a file that waits for somebody's deed: more bytes, a marker, the right to read it."""


class Tail(StrEnum):
    """How a file ends."""

    EMPTY = "empty"
    GOOD = "good"
    NO_NEWLINE = "no_newline"  # the last line parses, only its newline is missing
    UNPARSED = "unparsed"
    HOLE = "hole"  # allocated or stretched, but not yet filled
    NUL = "nul"  # ends in NUL bytes that were really written


@dataclass(frozen=True, slots=True)
class Sighting:
    """One look at one file. `tail` is None when the file was busy: what it ends in then says nothing.

    `age_s` is the wall clock minus the later of mtime and ctime, None if that lies in the future.
    """

    fingerprint: Fingerprint
    lease: Lease
    tail: Tail | None
    marker: bool = False
    moved_in: bool = False
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A look that failed; `detail` names owner and mode, and what to do. `size`: bytes, None if unknown."""

    detail: str
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """What an inbox asks of its files. `trusted`: here "free" is proof."""

    settle_s: float
    settle_unproven_s: float
    unparsed_s: float = 30.0
    trusted: bool = True
    needs_marker: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a file from all looks so far. `reason` is the waiting reason that was told last."""

    first_at: float
    fingerprint: Fingerprint | None
    unchanged_since: float
    busy_since: float | None = None
    written_since: float | None = None  # since when nothing but writing keeps it from being taken
    reason: str | None = None
    stuck_told: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """The file is whole. `by`: renamed, lease, at_rest, quiet or marker."""

    by: str
    waited_s: float
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not yet. `reason` and `stuck` are set only at the look at which they are to be told.

    That is once for each change of reason, and once for a time of writing.
    """

    reason: str | None
    look_at: float
    stuck: bool = False


def observe(
    previous: Observed | None, sighting: Sighting | Unreadable, rules: Rules, now: float, *, at_start: bool
) -> tuple[Observed, Settled | Waiting]:
    """Take one look into account: the new knowledge, and whether the file is whole.

    `now` is monotonic, in seconds. `at_start` is true for looks of the program's first full look only.
    """
    seen = _note(previous, sighting, rules, now)
    hindrance = "unreadable" if isinstance(sighting, Unreadable) else _hindrance(sighting, rules)
    seen = _note_writing(seen, hindrance, now)
    if isinstance(sighting, Unreadable) or hindrance is not None:
        return _wait(seen, hindrance, math.inf, rules, now)
    by, due = _due(seen, sighting, rules, now, at_start=at_start)
    if now >= due:
        return seen, Settled(by, now - seen.first_at, sighting.fingerprint)
    reason = "incomplete" if sighting.tail in (Tail.UNPARSED, Tail.NUL) else None
    return _wait(seen, reason, due, rules, now)


def _note(previous: Observed | None, sighting: Sighting | Unreadable, rules: Rules, now: float) -> Observed:
    fingerprint = None if isinstance(sighting, Unreadable) else sighting.fingerprint
    if previous is None:
        previous = Observed(first_at=now, fingerprint=fingerprint, unchanged_since=now)
    busy = isinstance(sighting, Sighting) and sighting.lease is Lease.BUSY
    # Being open for writing counts as a change: a second store to a mapped page alters none of the numbers.
    rested = previous.busy_since is None and not busy and _unchanged(previous.fingerprint, fingerprint, rules)
    return replace(
        previous,
        fingerprint=fingerprint,
        unchanged_since=previous.unchanged_since if rested else now,
        busy_since=(now if previous.busy_since is None else previous.busy_since) if busy else None,
    )


def _note_writing(seen: Observed, hindrance: str | None, now: float) -> Observed:
    """A file that nothing else holds up would have been taken long ago if it had ever been left alone."""
    if hindrance not in (None, "being_written"):
        return replace(seen, written_since=None, stuck_told=False)
    return replace(seen, written_since=now if seen.written_since is None else seen.written_since)


def _is_stuck(seen: Observed, now: float) -> bool:
    """Whether it was written to for too long, and still is: what rests is only on its way."""
    if seen.written_since is None or seen.stuck_told:
        return False
    return now - seen.written_since >= STUCK_AFTER_S > now - seen.unchanged_since


def _unchanged(before: Fingerprint | None, after: Fingerprint | None, rules: Rules) -> bool:
    """Whether two looks show the same file, untouched.

    The change time counts, though a mere chmod alters it: of a writer that sets its mtime back it is the only
    trace. Network filesystems invent change times and inode numbers, so there only size and mtime count.
    """
    if before is None or after is None or rules.trusted:
        return before == after
    return (before.size, before.mtime_ns) == (after.size, after.mtime_ns)


def _hindrance(sighting: Sighting, rules: Rules) -> str | None:
    """What keeps the file from being taken however long it rests.

    A marker overrules every other wait, but not these: the bytes of a file that is open for writing, empty or
    full of holes are not the whole file, whatever its producer believes. Who marks a file and closes it only
    then loses nothing: the close rings.
    """
    if rules.needs_marker and not sighting.marker:
        return "no_marker"
    if sighting.lease is Lease.BUSY:
        return "being_written"
    if sighting.tail is Tail.EMPTY:
        return "empty"
    return "hole" if sighting.tail is Tail.HOLE else None


def _due(seen: Observed, sighting: Sighting, rules: Rules, now: float, *, at_start: bool) -> tuple[str, float]:
    """By what an unhindered file settles, and when."""
    if rules.needs_marker:
        return "marker", now
    if not (rules.trusted and sighting.lease is Lease.FREE and sighting.tail is Tail.GOOD):
        return "quiet", seen.unchanged_since + _unproven_s(sighting, rules)
    if sighting.moved_in:
        return "renamed", now
    if at_start and sighting.age_s is not None and sighting.age_s >= rules.settle_s:
        return "at_rest", now
    return "lease", seen.unchanged_since + rules.settle_s


def _unproven_s(sighting: Sighting, rules: Rules) -> float:
    longest = max(rules.settle_s, rules.settle_unproven_s)
    whole = sighting.tail in (Tail.GOOD, Tail.NO_NEWLINE)
    return longest if whole else max(rules.unparsed_s, longest)


def _wait(seen: Observed, reason: str | None, due: float, rules: Rules, now: float) -> tuple[Observed, Waiting]:
    """Wait for `due`, which may be never. A reason is told once it has lasted a little."""
    since = seen.unchanged_since if seen.busy_since is None else seen.busy_since
    tell_at = since + (EMPTY_TOLD_AFTER_S if reason == "empty" else rules.settle_s)
    told = reason if reason != seen.reason and now >= tell_at else None
    stuck = _is_stuck(seen, now)
    look_at = min(due, now + _pause_s(reason, now - since))
    if reason is not None and now < tell_at:
        look_at = min(look_at, tell_at)
    after = replace(seen, reason=told or seen.reason, stuck_told=seen.stuck_told or stuck)
    return after, Waiting(told, look_at, stuck)


def _pause_s(reason: str | None, held_s: float) -> float:
    if reason is None:
        return math.inf
    shortest, longest = BUSY_LOOK_S if reason in ("being_written", "incomplete") else HINDERED_LOOK_S
    return min(longest, max(shortest, held_s / 4))

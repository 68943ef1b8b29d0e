"""When a file is whole: the rule by table, and what must hold for every history by property."""

import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sfwatch.files import Fingerprint, Lease
from sfwatch.settle import (
    EMPTY_TOLD_AFTER_S,
    STUCK_AFTER_S,
    Observed,
    Rules,
    Settled,
    Sighting,
    Tail,
    Unreadable,
    Waiting,
    observe,
)

RULES = Rules(settle_s=2.0, settle_unproven_s=10.0)
UNTRUSTED = replace(RULES, trusted=False)
MARKED = replace(RULES, needs_marker=True)
FILE = Fingerprint(dev=1, ino=2, size=30, mtime_ns=4, ctime_ns=5)
GOOD = Sighting(FILE, Lease.FREE, Tail.GOOD)
BUSY = Sighting(FILE, Lease.BUSY, None)
FORBIDDEN = Unreadable("owner 5, mode 0600")

Look = tuple[float, Sighting | Unreadable]


def history(rules: Rules, *looks: Look, at_start: bool = False) -> list[Settled | Waiting]:
    """What each of some looks came to."""
    seen: Observed | None = None
    results = []
    for now, sighting in looks:
        seen, result = observe(seen, sighting, rules, now, at_start=at_start)
        results.append(result)
    return results


def settled(by: str, waited_s: float, fingerprint: Fingerprint = FILE) -> Settled:
    return Settled(by, waited_s, fingerprint)


@pytest.mark.parametrize(
    ("rules", "sighting", "by", "after_s"),
    [
        (RULES, GOOD, "lease", 2.0),
        (RULES, replace(GOOD, lease=Lease.UNPROVEN), "quiet", 10.0),
        (RULES, replace(GOOD, lease=Lease.UNPROVEN, moved_in=True), "quiet", 10.0),
        (RULES, replace(GOOD, tail=Tail.NO_NEWLINE), "quiet", 10.0),
        (RULES, replace(GOOD, tail=Tail.NO_NEWLINE, moved_in=True), "quiet", 10.0),
        (RULES, replace(GOOD, tail=Tail.UNPARSED), "quiet", 30.0),
        (RULES, replace(GOOD, tail=Tail.UNPARSED, moved_in=True), "quiet", 30.0),
        (RULES, replace(GOOD, tail=Tail.NUL), "quiet", 30.0),
        (UNTRUSTED, GOOD, "quiet", 10.0),
        (UNTRUSTED, replace(GOOD, moved_in=True), "quiet", 10.0),
        (UNTRUSTED, replace(GOOD, tail=Tail.UNPARSED), "quiet", 30.0),
        (replace(RULES, settle_unproven_s=60.0), replace(GOOD, tail=Tail.UNPARSED), "quiet", 60.0),
        (replace(RULES, settle_s=20.0), replace(GOOD, lease=Lease.UNPROVEN), "quiet", 20.0),
    ],
)
def test_settles_after_rest(rules: Rules, sighting: Sighting, by: str, after_s: float) -> None:
    """A file at rest settles exactly when its time is over, the longer the less is proven of it."""
    early, late = history(rules, (100.0, sighting), (100.0 + after_s, sighting))
    assert isinstance(early, Waiting)
    assert early.look_at <= 100.0 + after_s
    assert late == settled(by, after_s)
    just_before = history(rules, (100.0, sighting), (100.0 + after_s - 0.01, sighting))[-1]
    assert isinstance(just_before, Waiting)
    assert just_before.look_at == 100.0 + after_s


@pytest.mark.parametrize(
    ("rules", "sighting", "at_start", "by"),
    [
        (RULES, replace(GOOD, moved_in=True), False, "renamed"),
        (RULES, replace(GOOD, age_s=2.0), True, "at_rest"),
        (MARKED, replace(GOOD, marker=True), False, "marker"),
        (MARKED, replace(GOOD, marker=True, tail=Tail.UNPARSED), False, "marker"),
        (MARKED, replace(GOOD, marker=True, tail=Tail.NO_NEWLINE), False, "marker"),
        (MARKED, replace(GOOD, marker=True, tail=Tail.NUL), False, "marker"),
        (MARKED, replace(GOOD, marker=True, lease=Lease.UNPROVEN), False, "marker"),
        (replace(MARKED, trusted=False), replace(GOOD, marker=True), False, "marker"),
    ],
)
def test_settles_at_once(rules: Rules, sighting: Sighting, at_start: bool, by: str) -> None:  # noqa: FBT001
    """What was renamed in whole, lay there at the start, or is marked as done is taken at the first look."""
    assert history(rules, (7.0, sighting), at_start=at_start) == [settled(by, 0.0)]


@pytest.mark.parametrize(
    ("rules", "sighting", "at_start"),
    [
        (RULES, replace(GOOD, age_s=3600.0), False),
        (RULES, replace(GOOD, age_s=1.9), True),
        (RULES, replace(GOOD, age_s=None), True),
        (RULES, replace(GOOD, age_s=3600.0, tail=Tail.UNPARSED), True),
        (RULES, replace(GOOD, age_s=3600.0, lease=Lease.UNPROVEN), True),
        (UNTRUSTED, replace(GOOD, age_s=3600.0), True),
        (RULES, replace(GOOD, marker=True), False),
        (RULES, replace(BUSY, moved_in=True, age_s=3600.0), True),
    ],
)
def test_does_not_settle_at_once(rules: Rules, sighting: Sighting, at_start: bool) -> None:  # noqa: FBT001
    """An old mtime proves nothing but at the start, and there only with the kernel's word and a good tail."""
    (result,) = history(rules, (7.0, sighting), at_start=at_start)
    assert isinstance(result, Waiting)


@pytest.mark.parametrize(
    ("rules", "sighting", "reason", "told_after_s"),
    [
        (RULES, BUSY, "being_written", 2.0),
        (RULES, replace(GOOD, tail=Tail.EMPTY), "empty", EMPTY_TOLD_AFTER_S),
        (RULES, replace(GOOD, tail=Tail.HOLE), "hole", 2.0),
        (RULES, replace(GOOD, tail=Tail.HOLE, moved_in=True), "hole", 2.0),
        (RULES, FORBIDDEN, "unreadable", 2.0),
        (MARKED, GOOD, "no_marker", 2.0),
        (MARKED, replace(GOOD, moved_in=True), "no_marker", 2.0),
        (MARKED, replace(GOOD, marker=True, tail=Tail.EMPTY), "empty", EMPTY_TOLD_AFTER_S),
        (MARKED, replace(GOOD, marker=True, tail=Tail.HOLE), "hole", 2.0),
        (MARKED, replace(BUSY, marker=True), "being_written", 2.0),
        (RULES, replace(GOOD, tail=Tail.UNPARSED), "incomplete", 2.0),
        (RULES, replace(GOOD, tail=Tail.NUL), "incomplete", 2.0),
    ],
)
def test_tells_why_it_waits(
    rules: Rules, sighting: Sighting | Unreadable, reason: str, told_after_s: float
) -> None:
    """A reason is told once it has lasted a little, at a look that comes by then, and once."""
    first, before, then, after = history(
        rules, *((100.0 + s, sighting) for s in (0.0, told_after_s - 0.1, told_after_s, told_after_s + 1))
    )
    assert [r.reason for r in (first, before, then, after) if isinstance(r, Waiting)] == [
        None,
        None,
        reason,
        None,
    ]
    assert isinstance(before, Waiting)
    assert before.look_at <= 100.0 + told_after_s


def test_hindered_files_wait_without_limit() -> None:
    """Neither the empty, the written to, the one with holes nor the unmarked is ever taken by mere patience."""
    for rules, sighting in (
        (RULES, BUSY),
        (RULES, replace(GOOD, tail=Tail.EMPTY)),
        (RULES, replace(GOOD, tail=Tail.HOLE)),
        (MARKED, GOOD),
    ):
        assert all(isinstance(r, Waiting) for r in history(rules, (0.0, sighting), (1e9, sighting)))


def test_stuck_is_told_once_after_ten_minutes_of_writing() -> None:
    """Once for a file, unless it waited for something else in between."""
    times = (0.0, STUCK_AFTER_S - 1, STUCK_AFTER_S, STUCK_AFTER_S + 1)
    first = history(RULES, *((t, BUSY) for t in times), (2 * STUCK_AFTER_S, GOOD), (3 * STUCK_AFTER_S, BUSY))
    assert [r.stuck for r in first if isinstance(r, Waiting)] == [False, False, True, False, False, False]
    start = 2 * STUCK_AFTER_S
    again = history(
        RULES, *((t, BUSY) for t in times), (start - 1, FORBIDDEN), *((start + t, BUSY) for t in times)
    )
    stuck = [r.stuck for r in again if isinstance(r, Waiting)]
    assert stuck == [False, False, True, False, False, False, False, True, False]


@pytest.mark.parametrize("lease", [Lease.FREE, Lease.UNPROVEN])
def test_what_changes_for_ten_minutes_is_stuck_though_nobody_is_seen_to_write(lease: Lease) -> None:
    """Appended to and closed again and again, or written to by another host: it must not wait untold."""
    rules = replace(RULES, settle_unproven_s=60.0)
    sizes = (replace(GOOD, lease=lease, fingerprint=replace(FILE, size=size)) for size in range(1000))
    results = history(rules, *((float(now), sighting) for now, sighting in enumerate(sizes)))
    assert [now for now, r in enumerate(results) if isinstance(r, Waiting) and r.stuck] == [STUCK_AFTER_S]


def test_a_long_rest_is_nothing_stuck() -> None:
    """Settings may ask for an hour of it."""
    rules = replace(RULES, settle_s=3600.0)
    results = history(rules, *((float(now), GOOD) for now in range(0, 3600, 100)))
    assert not any(r.stuck for r in results if isinstance(r, Waiting))


def test_a_writer_that_comes_back_restarts_the_rest() -> None:
    """Rest counts from the first look that finds the writer gone, though no number of the file changed."""
    *_, early, late = history(RULES, (0.0, GOOD), (1.0, BUSY), (9.0, GOOD), (11.0, GOOD))
    assert isinstance(early, Waiting)
    assert early.look_at == 11.0
    assert late == settled("lease", 11.0)


@pytest.mark.parametrize("field", ["dev", "ino", "size", "mtime_ns", "ctime_ns"])
def test_any_change_restarts_the_rest(field: str) -> None:
    """Every number counts, ctime too: it is the only trace of a writer that sets the mtime back."""
    changed = replace(GOOD, fingerprint=replace(FILE, **{field: 99}))
    result, last = history(RULES, (0.0, GOOD), (1.9, changed), (3.9, changed))[1:]
    assert isinstance(result, Waiting)
    assert result.look_at == 3.9
    assert last == settled("lease", 3.9, changed.fingerprint)


@pytest.mark.parametrize(
    ("field", "restarts"),
    [("dev", False), ("ino", False), ("ctime_ns", False), ("size", True), ("mtime_ns", True)],
)
def test_untrusted_filesystems_invent_inodes_and_ctimes(field: str, restarts: bool) -> None:  # noqa: FBT001
    """Where the kernel's word is no proof, only size and mtime say that a file changed."""
    changed = replace(GOOD, fingerprint=replace(FILE, **{field: 99}))
    result = history(UNTRUSTED, (0.0, GOOD), (9.0, changed), (10.0, changed))[-1]
    assert isinstance(result, Waiting) == restarts


def test_a_change_of_reason_is_told_and_a_return_too() -> None:
    """Reasons are told when they change, not at each look."""
    unparsed = replace(GOOD, tail=Tail.UNPARSED)
    looks = [(0.0, BUSY), (2.0, BUSY), (3.0, unparsed), (5.0, unparsed), (6.0, BUSY), (8.0, BUSY), (9.0, BUSY)]
    told = [r.reason for r in history(RULES, *looks) if isinstance(r, Waiting)]
    assert told == [None, "being_written", None, "incomplete", None, "being_written", None]


def test_what_becomes_readable_starts_its_rest_then() -> None:
    """Time spent unreadable is no observed rest."""
    result = history(RULES, (0.0, FORBIDDEN), (50.0, GOOD))[-1]
    assert isinstance(result, Waiting)
    assert result.look_at == 52.0


def test_a_busy_file_is_looked_at_more_and_more_rarely() -> None:
    """The pause grows from a second to five: the closing of the file rings anyway."""
    results = history(RULES, *((float(now), BUSY) for now in (0, 1, 8, 20, 300)))
    pauses = [
        r.look_at - now for r, now in zip(results, (0, 1, 8, 20, 300), strict=True) if isinstance(r, Waiting)
    ]
    assert pauses == [1.0, 1.0, 2.0, 5.0, 5.0]


rules_of_inboxes = st.builds(
    Rules,
    settle_s=st.sampled_from([0.0, 0.3, 2.0, 20.0]),
    settle_unproven_s=st.sampled_from([0.0, 10.0, 60.0]),
    trusted=st.booleans(),
    needs_marker=st.booleans(),
)
leases = st.sampled_from(Lease)
tails = st.sampled_from(Tail)


@pytest.mark.parametrize("tail", [Tail.UNPARSED, Tail.NUL])
def test_what_ends_inside_a_line_is_looked_at_like_what_is_written_to(tail: Tail) -> None:
    """Where nothing rings, a copy is met again soon, not only when the longest rest is over."""
    cut = replace(GOOD, tail=tail)
    results = history(UNTRUSTED, *((float(at), cut) for at in (0, 1, 8, 20, 29)))
    looks = [result.look_at for result in results if isinstance(result, Waiting)]
    assert looks == [1.0, 2.0, 10.0, 25.0, 30.0]


@given(
    rules=rules_of_inboxes,
    tail=st.sampled_from([Tail.GOOD, Tail.NO_NEWLINE, Tail.UNPARSED, Tail.NUL]),
    lease=st.sampled_from([Lease.FREE, Lease.UNPROVEN]),
    start=st.floats(0, 1e9),
)
def test_a_file_at_rest_settles_by_following_look_at(
    rules: Rules, tail: Tail, lease: Lease, start: float
) -> None:
    """Looking only when told to, a few looks are enough, however the clock's digits fall."""
    sighting = Sighting(FILE, lease, tail, marker=True)
    now, seen = start, None
    for _ in range(25):
        seen, result = observe(seen, sighting, rules, now, at_start=False)
        if isinstance(result, Settled):
            return
        assert result.look_at > now
        now = result.look_at
    pytest.fail("it never settled")


@dataclass
class Disk:
    """What really lies there, told apart from what was observed of it."""

    fingerprint: Fingerprint
    lease: Lease
    tail: Tail
    marker: bool = False
    readable: bool = True


class AnyHistory(RuleBasedStateMachine):
    """A file, a clock and looks at any time: what may be taken, and when."""

    @initialize(rules=rules_of_inboxes, lease=leases, tail=tails)
    def begin(self, rules: Rules, lease: Lease, tail: Tail) -> None:
        self.inbox_rules = rules
        self.now = 1000.0
        self.disk = Disk(FILE, lease, tail)
        self.seen: Observed | None = None
        self.result: Settled | Waiting | None = None
        self.touched_at = self.now  # the latest instant at which a look could have seen a change or a writer
        self.told: list[str] = []

    @rule(seconds=st.floats(0, 700))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.result = None

    @rule(size=st.integers(0, 3), ctime_ns=st.integers(0, 3))
    def somebody_writes(self, size: int, ctime_ns: int) -> None:
        self.disk.fingerprint = replace(FILE, size=size, ctime_ns=ctime_ns)
        self.result = None

    @rule(lease=leases, tail=tails, marker=st.booleans(), readable=st.booleans())
    def something_else_changes(self, lease: Lease, tail: Tail, *, marker: bool, readable: bool) -> None:
        self.disk = Disk(self.disk.fingerprint, lease, tail, marker, readable)
        self.result = None

    @rule(moved_in=st.booleans())
    def look(self, *, moved_in: bool) -> None:
        before, disk = self.seen, self.disk
        tail = None if disk.lease is Lease.BUSY else disk.tail
        sighting = (
            Sighting(disk.fingerprint, disk.lease, tail, disk.marker, moved_in) if disk.readable else FORBIDDEN
        )
        self.seen, self.result = observe(before, sighting, self.inbox_rules, self.now, at_start=False)
        self.moved_in = moved_in
        if before is None or self.changed_since(before):
            self.touched_at = self.now
        if isinstance(self.result, Waiting) and self.result.reason is not None:
            self.told.append(self.result.reason)

    @rule()
    def look_when_told(self) -> None:
        if isinstance(self.result, Waiting):
            self.now = self.result.look_at
            self.look(moved_in=False)

    def changed_since(self, before: Observed) -> bool:
        written_to = before.busy_since is not None or self.disk.lease is Lease.BUSY
        if written_to or before.fingerprint is None or not self.disk.readable:
            return True
        if self.inbox_rules.trusted:
            return before.fingerprint != self.disk.fingerprint
        return before.fingerprint.size != self.disk.fingerprint.size

    @invariant()
    def what_is_not_whole_is_never_taken(self) -> None:
        if isinstance(self.result, Settled):
            assert self.disk.readable
            assert self.disk.lease is not Lease.BUSY
            assert self.disk.tail not in (Tail.EMPTY, Tail.HOLE)
            assert self.disk.marker or not self.inbox_rules.needs_marker
            assert self.result.fingerprint == self.disk.fingerprint
            assert 0 <= self.result.waited_s < math.inf

    @invariant()
    def each_way_to_settle_has_its_condition(self) -> None:
        if not isinstance(self.result, Settled):
            return
        proven = self.inbox_rules.trusted and self.disk.lease is Lease.FREE and self.disk.tail is Tail.GOOD
        rested = self.now - self.touched_at
        assert {
            "marker": self.inbox_rules.needs_marker,
            "renamed": proven and self.moved_in,
            "lease": proven and rested >= self.inbox_rules.settle_s - 1e-6,
            "quiet": not proven and rested >= self.inbox_rules.settle_unproven_s - 1e-6,
        }[self.result.by]

    @invariant()
    def a_waiting_file_is_looked_at_again(self) -> None:
        if isinstance(self.result, Waiting):
            assert self.now < self.result.look_at <= self.now + 60.0

    @invariant()
    def no_reason_is_told_twice_in_a_row(self) -> None:
        assert all(one != other for one, other in zip(self.told, self.told[1:], strict=False))


TestAnyHistory = AnyHistory.TestCase

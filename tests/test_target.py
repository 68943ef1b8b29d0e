"""When a host and key are held, probed and resumed: by scenes, by a simulated outage, and by random walks."""

import math
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sfwatch.target import (
    Stage,
    Target,
    after_accepted,
    after_account_fault,
    after_not_now,
    after_other,
    after_probe,
    after_rate_limited,
    after_refused,
    after_unknown,
    forget_tried,
    forgotten,
    held_reason,
    look_started,
    may_look,
    may_try,
    next_at,
    probing,
    refused_alike,
    refuses_all,
    reloaded,
    room,
    started,
    wants_probe,
)

FRESH = Target(concurrency=4)


def fault(t: Target, file: str | None, now: float = 0.0) -> Target:
    return after_account_fault(t, file, "unauthorized", "key is invalid", now, 0.0)


def not_now(t: Target, file: str, *, unreachable: bool = False, retry_after_s: float | None = None) -> Target:
    return after_not_now(t, file, "closed", 0.0, 0.0, unreachable=unreachable, retry_after_s=retry_after_s)


def unknown(t: Target, file: str) -> Target:
    return after_unknown(t, file, "502", 0.0, 0.0)


def refused(
    t: Target, file: str, words: str = "400", *, suspect: bool = False, untried: bool = False
) -> Target:
    return after_refused(t, file, words, 0.0, 0.0, suspect=suspect, untried=untried)


def limited(t: Target, file: str | None = "a", now: float = 0.0, retry_after_s: float | None = None) -> Target:
    return after_rate_limited(t, file, now, retry_after_s)


def probed(t: Target, *, passed: bool, now: float = 0.0) -> Target:
    return after_probe(probing(t), passed=passed, detail="still", now=now, luck=0.0)


def trying(t: Target, file: str) -> Target:
    return started(probed(t, passed=True), file, 1.0)


def stage(t: Target) -> Stage | None:
    return t.hold.stage if t.hold else None


def pause(t: Target) -> float:
    assert t.hold is not None
    return t.hold.pause_s


# ── room and intervals ─────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_target_takes_as_many_as_configured() -> None:
    """Nothing is held against a target that was never tried."""
    assert [room(FRESH, under_way, 0.0) for under_way in (0, 3, 4, 9)] == [4, 1, 0, 0]
    assert room(FRESH, 0, 0.0, looking=True) == 4
    assert next_at(FRESH) is None


def test_rate_limits_double_the_interval_and_acceptances_shorten_it() -> None:
    """From 0.25 s to the longest pause; below 0.1 s it ends. Retry-After puts off the next start alone."""
    t, seen = FRESH, list[float]()
    for _ in range(12):
        t = limited(t)
        seen.append(t.interval_s)
    assert seen == [min(0.25 * 2**n, 300.0) for n in range(12)]
    for retry_after_s, next_start in ((0.1, 0.25), (60.0, 60.0), (1e9, 300.0)):
        asked = limited(FRESH, retry_after_s=retry_after_s)
        assert (asked.interval_s, asked.next_start) == (0.25, next_start)
    quick = after_accepted(limited(FRESH), "b", 0.0)
    assert quick.interval_s == pytest.approx(0.225)
    for _ in range(8):
        quick = after_accepted(quick, "b", 0.0)
    assert (quick.interval_s, room(quick, 0, 0.0)) == (0.0, 4)
    assert (held_reason(limited(limited(limited(FRESH, "a"), "b"), "c")), t.failing) == (None, ())


def test_in_an_interval_one_request_goes_at_a_time() -> None:
    """Starts of any kind, uploads and look-ups in turn, lie an interval apart."""
    t = limited(FRESH, now=10.0, retry_after_s=2.0)
    assert (room(t, 0, 11.9), room(t, 0, 12.0), next_at(t, 11.9), next_at(t, 12.0)) == (0, 1, 12.0, None)
    assert (room(t, 1, 12.0), room(t, 0, 12.0, looking=True)) == (0, 0)
    assert may_look(t, 12.0, looking=False, uploading=0)
    assert not may_look(t, 11.9, looking=False, uploading=0)
    assert not may_look(t, 12.0, looking=False, uploading=1)
    assert not may_look(t, 12.0, looking=True, uploading=0)
    for after, looked in ((started(t, "b", 12.5), False), (look_started(t, 12.5), True)):
        assert (after.next_start, after.looked_last, room(after, 0, 12.7)) == (12.75, looked, 0)


def test_in_an_interval_a_hold_asks_with_files() -> None:
    """A probe would take the place of the file: after the pause a trial is due."""
    t = limited(fault(FRESH, "a"), "s")
    assert (next_at(t), wants_probe(t, 0.5), room(t, 0, 0.4), room(t, 0, 0.5)) == (0.5, False, 0, 1)
    assert may_look(t, 0.5, looking=False, uploading=0)
    assert stage(started(t, "b", 0.5)) is Stage.TRYING


def test_a_rate_limit_does_not_lengthen_a_hold() -> None:
    """That of a trial or a probe tells nothing of what the hold is for: the next trial is due."""
    held = fault(FRESH, "a")
    asked = after_probe(limited(probing(held), None), passed=True, detail="", now=0.0, luck=0.0)
    for t in (limited(trying(held, "b"), "b"), asked):
        assert (stage(t), pause(t), t.interval_s, t.asking) == (Stage.TRIAL_DUE, 0.5, 0.25, False)
        assert (room(t, 0, 1.0), room(t, 1, 1.0)) == (1, 0)


def test_a_reload_keeps_the_interval_within_the_new_bound() -> None:
    """The service has not been reloaded."""
    t = limited(replace(FRESH, interval_s=10.0), now=5.0, retry_after_s=60.0)
    again = reloaded(t, 6.0, concurrency=8, first_s=1.0, longest_s=9.0)
    assert (t.interval_s, again.interval_s, again.next_start, again.concurrency) == (20.0, 9.0, 65.0, 8)


def test_look_ups_are_not_stopped_by_a_hold() -> None:
    """But in its pauses the probe is the look-up."""
    held = fault(FRESH, "a")
    due = probed(held, passed=True)
    states = (FRESH, held, probing(held), due, started(due, "b", 1.0))
    may = [may_look(t, 0.4, looking=False, uploading=3) for t in states]
    assert may == [True, False, False, True, True]
    assert not may_look(FRESH, 0.0, looking=True, uploading=0)


# ── beginning to hold ──────────────────────────────────────────────────────────────────────────────────────


def test_an_account_fault_holds_at_once() -> None:
    """No other file is tried with a key that the service does not accept."""
    held = fault(FRESH, "a", now=100.0)
    assert (held_reason(held), stage(held), room(held, 0, 1e9)) == ("unauthorized", Stage.WAITING, 0)
    assert next_at(held) == 100.5


def test_no_key_holds_without_a_file() -> None:
    """The fault need not be met by a file: without a key none is tried."""
    assert held_reason(fault(FRESH, None)) == "unauthorized"
    assert after_accepted(fault(FRESH, None), "a", 0.0).charged == frozenset()


def test_a_failed_connect_holds_at_once() -> None:
    """Where no connection comes about, none would for the next file."""
    assert held_reason(not_now(FRESH, "a", unreachable=True)) == "unreachable"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ("ab", None),
        ("aaa", None),
        ("aaaaaa", None),
        ("aab", "overloaded"),
        ("abc", "overloaded"),
        ("aaaab", "overloaded"),
    ],
)
def test_three_failures_in_a_row_of_two_files_hold(files: str, reason: str | None) -> None:
    """One file that fails for ever is that file's matter; several are the target's."""
    t = FRESH
    for file in files:
        t = not_now(t, file)
    assert held_reason(t) == reason


def test_an_acceptance_or_a_refusal_breaks_the_row() -> None:
    """A service that accepts, or looks into a file, is not overloaded."""
    two = not_now(not_now(FRESH, "a"), "b")
    assert held_reason(not_now(after_accepted(two, "x", 0.0), "c")) is None
    assert held_reason(not_now(refused(two, "x"), "c")) is None
    assert held_reason(not_now(two, "c")) == "overloaded"


def test_lost_answers_in_a_row_hold() -> None:
    """A proxy that answers 502 to everything must not be sent every file whole."""
    t = unknown(unknown(FRESH, "a"), "b")
    assert held_reason(t) is None
    assert held_reason(unknown(t, "c")) == "no_answers"
    assert held_reason(not_now(t, "c")) == "overloaded"


def test_three_files_refused_alike_hold() -> None:
    """In the same words, none accepted between: then it may be the account, and nothing is rejected in bulk."""
    t = refused(refused(after_accepted(FRESH, "x", 0.0), "a"), "b")
    assert [held_reason(refused(t, *more)) for more in (("b",), ("c", "413"))] == [None, None]
    assert held_reason(refused(after_accepted(t, "x", 0.0), "c")) is None
    held = refused(t, "c")
    assert held_reason(held) == "refuses_all"
    assert (refuses_all(held, "400"), refuses_all(held, "413")) == (True, False)
    assert (refused_alike(held, "400"), refused_alike(held, "413")) == (3, 0)
    assert [may_try(held, file) for file in "abcd"] == [False, False, False, True]


def test_suspects_do_not_hold() -> None:
    """Files that were refused so before the last acceptance tell nothing new, however many."""
    t = FRESH
    for number in range(100):
        t = refused(t, f"{number}", suspect=True)
    t = refused(refused(t, "a"), "b")
    assert (held_reason(t), refused_alike(t, "400")) == (None, 32)
    assert held_reason(refused(t, "c")) == "refuses_all"


def test_refused_trials_prolong_a_hold() -> None:
    """Once three files were refused, in whatever words, each probe costs one file's trial."""
    t = refused(refused(refused(FRESH, "a"), "b"), "c")
    for n in range(2, 12):
        t = refused(trying(t, f"{n}"), f"{n}", f"400 {n}", suspect=n % 2 == 0, untried=n < 9)
        assert (stage(t), held_reason(t)) == (Stage.WAITING, "refuses_all")
        assert pause(t) == min(2 ** (n - 1), 60 if n < 9 else 300) / 2


# ── ending a hold ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_hold_goes_through_probe_and_trial() -> None:
    """Pause, one probe, one file, and its acceptance ends it."""
    held = fault(FRESH, "a", now=0.0)
    assert (wants_probe(held, 0.4), wants_probe(held, 0.5)) == (False, True)
    asked = probing(held)
    assert (stage(asked), wants_probe(asked, 9.0), room(asked, 0, 9.0), next_at(asked)) == (
        Stage.PROBING, False, 0, None,
    )  # fmt: skip
    due = after_probe(asked, passed=True, detail="", now=1.0, luck=0.0)
    assert (stage(due), room(due, 0, 1.9), next_at(due, 1.9)) == (Stage.TRIAL_DUE, 0, 2.0)
    assert (room(due, 0, 2.0), room(due, 4, 2.0), next_at(due, 2.0)) == (1, 0, None)
    tried = started(due, "b", 2.0)
    assert (stage(tried), room(tried, 0, 2.0), next_at(tried)) == (Stage.TRYING, 0, None)
    free = after_accepted(tried, "b", 2.0)
    assert (free.hold, room(free, 0, 2.0)) == (None, 4)


def test_pauses_grow_until_an_acceptance() -> None:
    """Each failed probe or trial doubles the pause up to the longest; the next hold begins small."""
    t = fault(FRESH, "a")
    pauses = [pause(t)]
    for _ in range(12):
        t = probed(t, passed=False)
        pauses.append(pause(t))
    assert pauses == [min(2.0**n, 300.0) / 2 for n in range(13)]
    t = fault(trying(t, "b"), "b")
    assert pause(t) == 150.0
    assert pause(fault(after_accepted(t, "c", 0.0), "d")) == 0.5


def test_a_failed_trial_waits_longer() -> None:
    """An empty balance lets listings pass: a trial's failure of any kind goes back to waiting."""
    t = trying(fault(FRESH, "a"), "b")
    for failed in (fault(t, "b"), not_now(t, "b"), not_now(t, "b", unreachable=True), unknown(t, "b")):
        assert (stage(failed), pause(failed)) == (Stage.WAITING, 1.0)
        assert not may_try(failed, "b")


def test_one_outage_has_one_reason() -> None:
    """From its beginning to its end; the detail is that of the latest probe or trial."""
    t = not_now(trying(fault(FRESH, "a"), "b"), "b", unreachable=True)
    assert t.hold is not None
    assert (t.hold.reason, t.hold.detail) == ("unauthorized", "closed")
    t = probed(t, passed=False)
    assert t.hold is not None
    assert (t.hold.reason, t.hold.detail) == ("unauthorized", "still")


def test_retry_after_prolongs_a_hold() -> None:
    """The service's wish is honoured by probes too."""
    assert pause(not_now(FRESH, "a", unreachable=True, retry_after_s=60.0)) == 60.0
    t = after_probe(probing(fault(FRESH, "a")), passed=False, detail="", now=0.0, luck=0.0, retry_after_s=1e9)
    assert pause(t) == 300.0


def test_a_trial_that_says_nothing_passes_its_turn_on() -> None:
    """Refused for itself, or changed on the way: the next file tries at once."""
    t = trying(fault(FRESH, "a"), "b")
    for passed_on in (after_other(t, "b", 0.0), refused(t, "b")):
        assert (stage(passed_on), may_try(passed_on, "b"), may_try(passed_on, "c")) == (
            Stage.TRIAL_DUE,
            False,
            True,
        )


def test_all_may_try_again_when_all_have_tried() -> None:
    """A hold outlasts its files' trials: they begin anew."""
    t = fault(trying(fault(FRESH, "a"), "a"), "a")
    assert not may_try(t, "a")
    assert may_try(forget_tried(t), "a")
    assert may_try(FRESH, "a")
    assert forget_tried(FRESH) == FRESH


def test_stragglers_failures_change_nothing() -> None:
    """Files under way when the hold began fail for the same cause: no longer pause, no trial lost."""
    for t in (
        fault(FRESH, "a"),
        probing(fault(FRESH, "a")),
        probed(fault(FRESH, "a"), passed=True),
        trying(fault(FRESH, "a"), "b"),
    ):
        for late in (
            fault(t, "s"),
            not_now(t, "s", unreachable=True),
            unknown(t, "s"),
            after_other(t, "s", 0.0),
        ):
            assert late.hold == t.hold
        assert refused(t, "s").hold == t.hold


def test_a_stragglers_acceptance_ends_the_hold() -> None:
    """The service takes files: nothing more is asked."""
    t = after_accepted(trying(fault(FRESH, "a"), "b"), "s", 0.0)
    assert t.hold is None
    assert fault(t, "b").hold is not None


def test_a_late_probe_changes_nothing() -> None:
    """A probe's answer after the hold ended is of no interest."""
    free = after_accepted(fault(FRESH, "a"), "s", 0.0)
    late = after_accepted(probing(fault(FRESH, "a")), "s", 0.0)
    assert after_probe(late, passed=False, detail="", now=0.0, luck=0.0) == free
    assert probing(free) == free


def test_a_hold_waits_for_the_probe_of_the_one_before() -> None:
    """An acceptance ended the hold while its probe was out, and the target fails anew: one question is out."""
    asked = probing(fault(FRESH, "a", now=100.0))
    again = fault(after_accepted(asked, "b", 100.0), "c", now=100.0)
    assert not wants_probe(again, 200.0)
    assert next_at(again, 200.0) is None
    back = after_probe(again, passed=True, detail="", now=200.0, luck=0.0)
    assert back.hold == again.hold, "the answer is older than this hold"
    assert wants_probe(back, 200.0)


def test_a_reload_probes_at_once() -> None:
    """New settings may mend what was wrong."""
    held = fault(FRESH, "a", now=100.0)
    assert wants_probe(reloaded(held, 100.0, concurrency=4, first_s=1.0, longest_s=300.0), 100.0)


# ── charging a file ────────────────────────────────────────────────────────────────────────────────────────


def test_a_disproved_fault_is_charged_to_its_file() -> None:
    """Another file was accepted: the refused one alone can't stop the others again."""
    t = after_accepted(fault(FRESH, "bad"), "good", 0.0)
    assert t.charged == {"bad"}
    assert fault(t, "bad").hold is None
    assert fault(fault(t, "bad"), "bad").hold is None


def test_a_charged_file_holds_together_with_another() -> None:
    """Two different files refused without an acceptance between are no single file's fault."""
    t = after_accepted(fault(fault(FRESH, "bad"), "worse"), "good", 0.0)
    assert t.charged == {"bad", "worse"}
    assert held_reason(fault(fault(t, "bad"), "worse")) == "unauthorized"
    assert held_reason(fault(fault(t, "bad"), "new")) == "unauthorized"


def test_an_own_acceptance_clears_a_file() -> None:
    """The charge was an assumption; it ends when the file is accepted, or gone."""
    t = after_accepted(fault(FRESH, "a"), "b", 0.0)
    assert after_accepted(t, "a", 0.0).charged == frozenset()
    assert forgotten(t, "a").charged == frozenset()
    assert held_reason(fault(forgotten(t, "a"), "a")) == "unauthorized"


# ── outages ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("luck", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("listing_works", [False, True])
def test_a_long_outage_costs_few_requests(luck: float, listing_works: bool) -> None:  # noqa: FBT001
    """A day of refusals with any number of waiting files: at most 35 probes in the first hour, 24 in others."""
    t, now, probes = fault(FRESH, "first"), 0.0, []
    while now < 86_400:
        now = next_at(t, now) or math.inf
        assert wants_probe(t, now)
        probes.append(now)
        t = after_probe(probing(t), passed=listing_works, detail="", now=now, luck=luck)
        if listing_works:
            file, now = f"file-{len(probes)}", now + 1.0
            t = after_account_fault(started(t, file, now), file, "balance", "empty", now, luck)
    hours = [sum(hour * 3600 <= at < (hour + 1) * 3600 for at in probes) for hour in range(24)]
    assert hours[0] <= 35
    assert max(hours[1:]) <= 24
    assert min(hours) >= 11


class Walk(RuleBasedStateMachine):
    """Any order of starts, ends, probes and waits, with a daemon that does what the target allows."""

    def __init__(self) -> None:
        super().__init__()
        self.t = Target(concurrency=3, longest_s=60.0)
        self.now = 1000.0
        self.under_way: set[int] = set()
        self.trials: set[int] = set()
        self.probe_out = self.looking = False

    def end(self, t: Target, file: int) -> None:
        self.under_way.discard(file)
        self.trials.discard(file)
        self.t = t

    def one(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.under_way)))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def room(self) -> int:
        return room(self.t, len(self.under_way), self.now, looking=self.looking)

    @precondition(lambda self: self.room() > 0)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        file = data.draw(st.integers(0, 5))
        if file in self.under_way:
            return
        assert not self.t.interval_s or not (self.under_way or self.looking or self.probe_out)
        if not may_try(self.t, file):
            self.t = forget_tried(self.t)
        if self.t.hold:
            self.trials = {file}
        self.under_way.add(file)
        self.t = started(self.t, file, self.now)

    @rule(limited=st.booleans())
    def look(self, limited: bool) -> None:  # noqa: FBT001
        if self.looking:
            self.looking = False
            self.t = after_rate_limited(self.t, None, self.now, 3.0) if limited else self.t
        elif may_look(self.t, self.now, looking=False, uploading=len(self.under_way)):
            assert not self.t.interval_s or not (self.under_way or self.probe_out)
            self.looking = True
            self.t = look_started(self.t, self.now)

    @precondition(lambda self: wants_probe(self.t, self.now))
    @rule()
    def probe(self) -> None:
        assert not self.probe_out
        self.probe_out = True
        self.t = probing(self.t)

    @precondition(lambda self: self.probe_out)
    @rule(passed=st.booleans(), luck=st.floats(0, 0.99))
    def probe_ends(self, passed: bool, luck: float) -> None:  # noqa: FBT001
        self.probe_out = False
        self.t = after_probe(self.t, passed=passed, detail="", now=self.now, luck=luck)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def accepted(self, data: st.DataObject) -> None:
        file = self.one(data)
        self.end(after_accepted(self.t, file, self.now), file)
        assert self.t.hold is None
        self.trials = set()

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), luck=st.floats(0, 0.99))
    def account_fault(self, data: st.DataObject, luck: float) -> None:
        file = self.one(data)
        charged = file in self.t.charged
        self.end(after_account_fault(self.t, file, "unauthorized", "", self.now, luck), file)
        assert charged or self.t.hold is not None

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(), luck=st.floats(0, 0.99), unreachable=st.booleans(), retry=st.none() | st.floats(0, 1e6)
    )
    def fails_not_now(self, data: st.DataObject, luck: float, unreachable: bool, retry: float | None) -> None:  # noqa: FBT001
        file = self.one(data)
        t = after_not_now(self.t, file, "", self.now, luck, unreachable=unreachable, retry_after_s=retry)
        self.end(t, file)
        assert t.hold is not None or not unreachable

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), retry=st.none() | st.floats(0, 1e6))
    def rate_limited(self, data: st.DataObject, retry: float | None) -> None:
        file, held = self.one(data), held_reason(self.t)
        self.end(after_rate_limited(self.t, file, self.now, retry), file)
        assert held_reason(self.t) == held

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(),
        how=st.sampled_from(["unknown", "refused", "other", "gone"]),
        words=st.sampled_from("xy"),
        suspect=st.booleans(),
    )
    def ends_otherwise(self, data: st.DataObject, how: str, words: str, suspect: bool) -> None:  # noqa: FBT001
        file, held = self.one(data), held_reason(self.t)
        t = {
            "unknown": after_unknown(self.t, file, "", self.now, 0.5),
            "refused": after_refused(self.t, file, words, self.now, 0.5, suspect=suspect, untried=True),
            "other": after_other(self.t, file, self.now),
            "gone": forgotten(after_other(self.t, file, self.now), file),
        }[how]
        self.end(t, file)
        assert t.hold is not None or held is None, "only an acceptance ends a hold"
        assert held in {None, held_reason(t)}, "one outage has one reason"

    @rule()
    def reload(self) -> None:
        self.t = reloaded(self.t, self.now, concurrency=3, first_s=1.0, longest_s=60.0)

    @invariant()
    def starts_are_bounded(self) -> None:
        """No more uploads than configured, and an interval within its bounds."""
        assert len(self.under_way) <= 3
        assert self.room() + len(self.under_way) <= 3
        assert self.t.interval_s == 0 or 0.1 <= self.t.interval_s <= 60.0

    @invariant()
    def a_held_target_has_one_question_out(self) -> None:
        """One trial or one probe, never both, and nothing else starts."""
        assert len(self.trials) <= 1
        if self.t.hold is None:
            return
        assert (self.t.hold.stage is Stage.TRYING) == (self.t.hold.trial is not None)
        assert self.room() <= 1
        assert self.t.hold.stage is not Stage.TRYING or self.t.hold.trial in self.under_way
        assert 0.5 <= self.t.hold.pause_s <= 60.0

    @invariant()
    def something_goes_on(self) -> None:
        """There is a deadline, an answer awaited, or room for a file: no state is the end."""
        deadline = next_at(self.t, self.now)
        waits_for_answer = self.probe_out or self.looking or bool(self.under_way)
        assert deadline is not None or waits_for_answer or self.room() > 0
        if deadline is not None and deadline <= self.now:
            assert wants_probe(self.t, self.now), "a deadline in the past has something to do"

    @invariant()
    def memory_is_bounded(self) -> None:
        """Nothing grows with the length of an outage."""
        assert len(self.t.failing) <= 3
        assert max(len(self.t.refused), len(self.t.faulted)) <= 32


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_values_are_never_changed() -> None:
    """Every transition makes a new value; the old one is as it was."""
    before = replace(FRESH)
    fault(FRESH, "a")
    limited(FRESH)
    assert before == FRESH

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
    after_refused,
    after_unknown,
    forget_tried,
    forgotten,
    held_reason,
    may_try,
    next_at,
    probing,
    refuses_all,
    reloaded,
    room,
    started,
    wants_probe,
)

FRESH = Target(concurrency=4)


def fault(t: Target, file: str | None, now: float = 0.0) -> Target:
    return after_account_fault(t, file, "unauthorized", "key is invalid", now, 0.0)


def not_now(
    t: Target,
    file: str,
    now: float = 0.0,
    *,
    unreachable: bool = False,
    slows: bool = False,
    retry_after_s: float | None = None,
) -> Target:
    return after_not_now(
        t, file, "reset", "closed", now, 0.0, unreachable=unreachable, slows=slows, retry_after_s=retry_after_s
    )


def unknown(t: Target, file: str, now: float = 0.0) -> Target:
    return after_unknown(t, file, "server_error", "502", now, 0.0)


def probed(t: Target, *, passed: bool, now: float = 0.0) -> Target:
    return after_probe(probing(t), passed=passed, reason="unauthorized", detail="still", now=now, luck=0.0)


def trying(t: Target, file: str) -> Target:
    return started(probed(t, passed=True), file, 0.0)


def stage(t: Target) -> Stage | None:
    return t.hold.stage if t.hold else None


def pause(t: Target) -> float:
    assert t.hold is not None
    return t.hold.pause_s


# ── room and pace ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_fresh_target_takes_as_many_as_configured() -> None:
    """Nothing is held against a target that was never tried."""
    assert [room(FRESH, under_way, 0.0) for under_way in (0, 3, 4, 9)] == [4, 1, 0, 0]
    assert next_at(FRESH) is None


def test_a_rate_limit_halves_the_pace_and_acceptances_restore_it() -> None:
    """Down by half, never below one; up by about one a round, never above the concurrency."""
    slow = not_now(FRESH, "a", slows=True)
    assert slow.pace == 2
    slow = not_now(not_now(slow, "a", slows=True), "a", slows=True)
    assert slow.pace == 1
    quick = slow
    for _ in range(20):
        quick = after_accepted(quick, "a", 0.0)
    assert quick.pace == 4
    assert after_accepted(slow, "a", 0.0).pace == 2


def test_retry_after_of_a_rate_limit_stops_new_uploads() -> None:
    """Nothing starts before the time that the service asked for, within the longest pause."""
    slow = not_now(FRESH, "a", now=10.0, slows=True, retry_after_s=60.0)
    assert (room(slow, 0, 69.9), room(slow, 0, 70.0)) == (0, 2)
    assert next_at(slow, 10.0) == 70.0
    assert next_at(slow, 70.0) is None
    assert not_now(FRESH, "a", now=10.0, slows=True, retry_after_s=1e9).not_before == 310.0


def test_the_pace_stays_within_new_settings() -> None:
    """A reload changes the bound; a target that was never slowed uses the whole of it."""
    assert reloaded(FRESH, 0.0, concurrency=8, first_s=1, longest_s=9).pace == 8
    assert reloaded(not_now(FRESH, "a", slows=True), 0.0, concurrency=8, first_s=1, longest_s=9).pace == 2
    assert reloaded(FRESH, 0.0, concurrency=2, first_s=1, longest_s=9).pace == 2


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
    assert held_reason(not_now(after_refused(two, "x", "400", 0.0), "c")) is None
    assert held_reason(not_now(two, "c")) == "overloaded"


def test_lost_answers_in_a_row_hold() -> None:
    """A proxy that answers 502 to everything must not be sent every file whole."""
    t = unknown(unknown(FRESH, "a"), "b")
    assert held_reason(t) is None
    assert held_reason(unknown(t, "c")) == "no_answers"
    assert held_reason(not_now(t, "c")) == "overloaded"


def test_three_files_refused_alike_hold() -> None:
    """Before the first acceptance it may be the request's fault: nothing is condemned in bulk."""
    t = after_refused(after_refused(FRESH, "a", "400", 0.0), "b", "400", 0.0)
    assert held_reason(after_refused(t, "b", "400", 0.0)) is None
    assert held_reason(after_refused(t, "c", "413", 0.0)) is None
    held = after_refused(t, "c", "400", 0.0)
    assert held_reason(held) == "refuses_all"
    assert refuses_all(held, "400")
    assert not refuses_all(held, "413")
    assert [file for file, _ in held.refused] == ["a", "b", "c"]
    assert [may_try(held, file) for file in "abcd"] == [False, False, False, True]


def test_a_refused_trial_prolongs_a_hold_for_refusals() -> None:
    """While everything is refused, each probe costs one more file's trial, not the whole folder's."""
    t = FRESH
    for file in "abc":
        t = after_refused(t, file, "400", 0.0)
    again = after_refused(trying(t, "d"), "d", "400", 5.0)
    assert (stage(again), held_reason(again)) == (Stage.WAITING, "refuses_all")
    assert pause(again) > pause(t)


def test_refusals_after_an_acceptance_never_hold() -> None:
    """A service that accepts files may refuse any number of others."""
    t = after_accepted(FRESH, "x", 0.0)
    for number in range(100):
        t = after_refused(t, number, "400", 0.0)
    assert t.hold is None
    assert t.refused == ()


# ── ending a hold ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_hold_goes_through_probe_and_trial() -> None:
    """Pause, one probe, one file, and its acceptance ends it."""
    held = fault(FRESH, "a", now=0.0)
    assert (wants_probe(held, 0.4), wants_probe(held, 0.5)) == (False, True)
    asked = probing(held)
    assert (stage(asked), wants_probe(asked, 9.0), room(asked, 0, 9.0), next_at(asked)) == (
        Stage.PROBING, False, 0, None,
    )  # fmt: skip
    due = after_probe(asked, passed=True, reason="", detail="", now=1.0, luck=0.0)
    assert (stage(due), room(due, 0, 1.0), room(due, 4, 1.0)) == (Stage.TRIAL_DUE, 1, 0)
    tried = started(due, "b", 1.0)
    assert (stage(tried), room(tried, 0, 1.0), next_at(tried)) == (Stage.TRYING, 0, None)
    free = after_accepted(tried, "b", 2.0)
    assert (free.hold, free.accepted, room(free, 0, 2.0)) == (None, 1, 4)


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
    assert held_reason(unknown(t, "b")) == "server_error"


def test_retry_after_prolongs_a_hold() -> None:
    """The service's wish is honoured by probes too."""
    assert pause(not_now(FRESH, "a", unreachable=True, retry_after_s=60.0)) == 60.0
    t = after_probe(
        probing(fault(FRESH, "a")), passed=False, reason="r", detail="", now=0, luck=0, retry_after_s=1e9
    )
    assert pause(t) == 300.0


def test_a_trial_that_says_nothing_passes_its_turn_on() -> None:
    """Refused for itself, or changed on the way: the next file tries at once."""
    t = trying(fault(FRESH, "a"), "b")
    for passed_on in (after_other(t, "b", 0.0), after_refused(t, "b", "400", 0.0)):
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
        assert after_refused(t, "s", "400", 0.0).hold == t.hold


def test_a_stragglers_acceptance_ends_the_hold() -> None:
    """The service takes files: nothing more is asked."""
    t = after_accepted(trying(fault(FRESH, "a"), "b"), "s", 0.0)
    assert t.hold is None
    assert fault(t, "b").hold is not None


def test_a_late_probe_changes_nothing() -> None:
    """A probe's answer after the hold ended is of no interest."""
    free = after_accepted(fault(FRESH, "a"), "s", 0.0)
    late = after_accepted(probing(fault(FRESH, "a")), "s", 0.0)
    assert after_probe(late, passed=False, reason="r", detail="", now=0.0, luck=0.0) == free
    assert probing(free) == free


def test_a_hold_waits_for_the_probe_of_the_one_before() -> None:
    """An acceptance ended the hold while its probe was out, and the target fails anew: one question is out."""
    asked = probing(fault(FRESH, "a", now=100.0))
    again = fault(after_accepted(asked, "b", 100.0), "c", now=100.0)
    assert not wants_probe(again, 200.0)
    assert next_at(again, 200.0) is None
    back = after_probe(again, passed=True, reason="", detail="", now=200.0, luck=0.0)
    assert back.hold == again.hold, "the answer is older than this hold"
    assert wants_probe(back, 200.0)


def test_a_reload_probes_at_once() -> None:
    """New settings may mend what was wrong."""
    held = fault(FRESH, "a", now=100.0)
    assert wants_probe(reloaded(held, 100.0, concurrency=4, first_s=1.0, longest_s=300.0), 100.0)
    assert (
        reloaded(after_accepted(FRESH, "a", 0.0), 0.0, concurrency=4, first_s=1.0, longest_s=9.0).accepted == 0
    )


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
        t = after_probe(probing(t), passed=listing_works, reason="unauthorized", detail="", now=now, luck=luck)
        if listing_works:
            file = f"file-{len(probes)}"
            t = after_account_fault(started(t, file, now), file, "balance", "empty", now, luck)
    hours = [sum(hour * 3600 <= at < (hour + 1) * 3600 for at in probes) for hour in range(24)]
    assert hours[0] <= 35
    assert max(hours[1:]) <= 24
    assert min(hours) >= 12


class Walk(RuleBasedStateMachine):
    """Any order of starts, ends, probes and waits, with a daemon that does what the target allows."""

    def __init__(self) -> None:
        super().__init__()
        self.t = Target(concurrency=3, longest_s=60.0)
        self.now = 1000.0
        self.under_way: set[int] = set()
        self.trials: set[int] = set()
        self.probe_out = False
        self.next_file = 0

    def end(self, t: Target, file: int) -> None:
        self.under_way.discard(file)
        self.trials.discard(file)
        self.t = t

    def one(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.under_way)))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: room(self.t, len(self.under_way), self.now) > 0)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        file = data.draw(st.integers(0, 5))
        if file in self.under_way:
            return
        if not may_try(self.t, file):
            self.t = forget_tried(self.t)
        if self.t.hold:
            self.trials = {file}
        self.under_way.add(file)
        self.t = started(self.t, file, self.now)

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
        self.t = after_probe(self.t, passed=passed, reason="r", detail="", now=self.now, luck=luck)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def accepted(self, data: st.DataObject) -> None:
        file = self.one(data)
        self.end(after_accepted(self.t, file, self.now), file)
        assert self.t.hold is None
        assert self.t.accepted > 0
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
        data=st.data(),
        luck=st.floats(0, 0.99),
        unreachable=st.booleans(),
        slows=st.booleans(),
        retry=st.none() | st.floats(0, 1e6),
    )
    def fails_not_now(
        self,
        data: st.DataObject,
        luck: float,
        unreachable: bool,  # noqa: FBT001
        slows: bool,  # noqa: FBT001
        retry: float | None,
    ) -> None:
        file, pace = self.one(data), self.t.pace
        t = after_not_now(
            self.t, file, "r", "", self.now, luck, unreachable=unreachable, slows=slows, retry_after_s=retry
        )
        self.end(t, file)
        assert t.hold is not None or not unreachable
        assert t.pace == (max(1, pace / 2) if slows else pace)

    @precondition(lambda self: self.under_way)
    @rule(
        data=st.data(),
        how=st.sampled_from(["unknown", "refused", "other", "gone"]),
        alike=st.sampled_from("xy"),
    )
    def ends_otherwise(self, data: st.DataObject, how: str, alike: str) -> None:
        file = self.one(data)
        held = held_reason(self.t)
        t = {
            "unknown": after_unknown(self.t, file, "server_error", "", self.now, 0.5),
            "refused": after_refused(self.t, file, alike, self.now),
            "other": after_other(self.t, file, self.now),
            "gone": forgotten(after_other(self.t, file, self.now), file),
        }[how]
        self.end(t, file)
        assert t.hold is not None or held is None, "only an acceptance ends a hold"

    @rule()
    def reload(self) -> None:
        self.t = reloaded(self.t, self.now, concurrency=3, first_s=1.0, longest_s=60.0)

    @invariant()
    def pace_is_bounded(self) -> None:
        """One to the concurrency, and no more uploads than that."""
        assert 1 <= self.t.pace <= 3
        assert len(self.under_way) <= 3
        assert room(self.t, len(self.under_way), self.now) + len(self.under_way) <= 3

    @invariant()
    def a_held_target_has_one_question_out(self) -> None:
        """One trial or one probe, never both, and nothing else starts."""
        assert len(self.trials) <= 1
        if self.t.hold is None:
            return
        assert (self.t.hold.stage is Stage.TRYING) == (self.t.hold.trial is not None)
        assert room(self.t, 0, self.now) <= 1
        assert self.t.hold.stage is not Stage.TRYING or self.t.hold.trial in self.under_way
        assert 0.5 <= self.t.hold.pause_s <= 60.0

    @invariant()
    def something_goes_on(self) -> None:
        """There is a deadline, an answer awaited, or room for a file: no state is the end."""
        deadline = next_at(self.t, self.now)
        waits_for_answer = self.probe_out or bool(self.under_way)
        assert deadline is not None or waits_for_answer or room(self.t, len(self.under_way), self.now) > 0
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
    not_now(FRESH, "a", slows=True)
    assert before == FRESH

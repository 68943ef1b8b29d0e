"""Who is rejected and who waits when refusals may be the account's: one slot against a hostile service.

A file is good or bad. In spans of time the account refuses everything, in the very words of a bad file. The
decisions are those of the real functions; here is only what a daemon does with them. Times are seconds.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sfwatch import target as rules
from sfwatch.delivery import evidence
from sfwatch.delivery.evidence import Evidence
from sfwatch.target import Target
from sfwatch.verdict import Blame, Verdict, words

HOUR = 3600


@dataclass(eq=False)
class File:
    inbox: str
    size: float
    bad: bool
    seen_at: int
    due: float = 0.0
    tried_at: float | None = None
    evidence: Evidence = field(default_factory=Evidence)
    end: str = "waits"


Arrivals = Callable[[int, random.Random], list[File]]


@dataclass
class Scenario:
    arrive: Arrivals
    limited: Callable[[int, random.Random], bool] = lambda t, chance: False
    message: Callable[[random.Random], str] = lambda chance: "bad request"
    says_rate: bool = False
    hours: int = 4


def each(seconds: int, bad: Callable[[int], bool] = lambda t: False) -> Arrivals:
    return lambda t, chance: [File("a", chance.random(), bad(t), t)] if t % seconds == 0 else []


def small_bad_ones_and_good_ones(t: int, chance: random.Random) -> list[File]:
    bad = [File("a", chance.random() / 10, True, t) for _ in range(200 if t == 600 else 0)]
    return bad + ([File("b", 1 + chance.random(), False, t)] if t % 300 == 0 else [])


class Bucket:
    """One request passes each `seconds`; those that are refused do not count."""

    def __init__(self, seconds: int) -> None:
        self.seconds, self.passed_at = seconds, 0

    def __call__(self, t: int, chance: random.Random) -> bool:
        if 0 <= t - self.passed_at < self.seconds:
            return True
        self.passed_at = t
        return False


SCENARIOS = {
    "an account's limit of 10 min, a file a minute": Scenario(each(60), lambda t, _: 3600 <= t < 4200),
    "the same with 2 files in it": Scenario(each(300), lambda t, _: 3600 <= t < 4200),
    "a limit of 2 h, with a request id in its words": Scenario(
        each(60), lambda t, _: 3600 <= t < 10800, lambda chance: f"no (request {chance.randrange(10**9):x})"
    ),
    "a limit of 2 h, a file an hour": Scenario(each(HOUR), lambda t, _: 3000 <= t < 10200, hours=8),
    "a limit of 10 min in each hour": Scenario(each(20), lambda t, _: t % HOUR < 600),
    "one request each 30 s passes": Scenario(each(40), lambda t, _: t % 30 > 8),
    "12 files each 5 min, one request each 10 s passes, and the words say so": Scenario(
        lambda t, chance: [f for _ in range(12) for f in each(300)(t, chance)], Bucket(10), says_rate=True
    ),
    "every third file bad": Scenario(each(20, lambda t: t // 20 % 3 == 0)),
    "every third file bad, and a limit": Scenario(
        each(20, lambda t: t // 20 % 3 == 0), lambda t, _: 3600 <= t < 7200
    ),
    "200 small bad ones in an inbox, a good one each 5 min in another": Scenario(small_bad_ones_and_good_ones),
    "one bad file, nothing else": Scenario(lambda t, _: [File("a", 1, True, t)] if t == 60 else []),
}


class Daemon:
    """One slot; a request takes a second."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.chance = random.Random(seed)
        self.target = Target(1)
        self.files: list[File] = []
        self.open: list[File] = []
        self.accepted = 0
        self.posts = self.holds = self.turn = 0

    def run(self) -> None:
        for t in range(self.scenario.hours * HOUR):
            arrived = self.scenario.arrive(t, self.chance)
            self.files += arrived
            self.open += arrived
            if rules.wants_probe(self.target, t):
                self.target = rules.after_probe(
                    rules.probing(self.target), passed=True, detail="", now=t, luck=0.5
                )
            if rules.room(self.target, 0, t):
                due = [file for file in self.open if file.due <= t]
                if due:
                    self.send(self.next_of(due), t)

    def next_of(self, due: list[File]) -> File:
        if self.target.hold is None:
            return min(due, key=lambda file: (file.due, file.seen_at))
        untried = [file for file in due if rules.may_try(self.target, file)]
        if not untried:
            self.target = rules.forget_tried(self.target)
        boxes = sorted({file.inbox for file in untried or due})
        self.turn += 1
        box = boxes[self.turn % len(boxes)]
        return min((file for file in untried or due if file.inbox == box), key=lambda file: file.size)

    def send(self, file: File, t: int) -> None:
        self.posts += 1
        self.target = rules.started(self.target, file, t)
        if file.tried_at is not None and self.target.hold is None:
            file.evidence = replace(file.evidence, served_s=file.evidence.served_s + t - file.tried_at)
        file.tried_at = t
        if file.bad or self.scenario.limited(t, self.chance):
            if self.scenario.says_rate and not file.bad:
                self.target = rules.after_rate_limited(self.target, file, t, None)
            else:
                self.refused(file, t)
            return
        file.end = "accepted"
        self.open.remove(file)
        self.accepted += 1
        self.target = rules.after_accepted(self.target, file, t)
        for other in self.open:
            if other.evidence.refusals:
                other.due = min(other.due, t + evidence.retry_in_s(other.evidence, self.accepted, 1.0))

    def refused(self, file: File, t: int) -> None:
        message = self.scenario.message(self.chance)
        said = words(Verdict(Blame.DOUBTED, "refused", "", http_status=400, message=message))
        file.evidence = evidence.refused(file.evidence, said, self.accepted)
        suspect = file.evidence.refusals > 1
        untried = any(
            other is not file and other.due <= t and rules.may_try(self.target, other) for other in self.open
        )
        held = rules.held_reason(self.target)
        self.target = rules.after_refused(
            self.target, file, said, t, self.chance.random(), suspect=suspect, untried=untried
        )
        if evidence.is_proved(file.evidence):
            file.end = "rejected"
            self.open.remove(file)
        elif rules.held_reason(self.target) == rules.REFUSES_ALL:
            self.holds += held is None
            for other in self.open:  # back in their inboxes: the hold has pauses enough
                other.due = 0.0
        else:
            file.due = t + evidence.retry_in_s(file.evidence, self.accepted, 1.0)

    def count(self, *, bad: bool, end: str, until: float = 1e9) -> int:
        return sum(file.bad == bad and file.end == end and file.seen_at < until for file in self.files)


@pytest.mark.parametrize("name", SCENARIOS)
def test_refusals(name: str) -> None:
    """No good file is rejected, none waits for ever, and each bad file among accepted ones is rejected."""
    scenario = SCENARIOS[name]
    long_ago = scenario.hours * HOUR - HOUR // 2
    for seed in range(6):
        daemon = Daemon(scenario, seed)
        daemon.run()
        assert daemon.count(bad=False, end="rejected") == 0
        assert daemon.count(bad=False, end="waits", until=long_ago) == 0
        assert daemon.count(bad=True, end="accepted") == 0
        assert (daemon.count(bad=True, end="waits", until=long_ago) == 0) == (daemon.accepted > 0)
        assert daemon.posts <= 3 * len(daemon.files) + 12 * daemon.holds + 12


def test_a_service_that_refuses_at_random_is_believed_at_the_third_time() -> None:
    """What no rule can tell apart: every second request refused in the same words, which speak of no limit."""
    daemon = Daemon(Scenario(each(20), lambda t, chance: chance.random() < 0.5), 0)
    daemon.run()
    assert 0 < daemon.count(bad=False, end="rejected") <= len(daemon.files) / 6

"""What failures make of a file and of its target, through the loop: evidence, rate limits and patience."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import Loop

from sfwatch import retry
from sfwatch import target as rules
from sfwatch.journal import State
from sfwatch.settings import Uploads
from sfwatch.standin import Behaviour, End, Listing, StandIn, answering, reply

REFUSAL = {"code": 20999, "message": "rejected", "data": None}
DOUBTFUL = answering(400, REFUSAL)
CLEAR = answering(400, {"code": 20071, "message": "line 2 is not valid", "data": None})
BALANCE = answering(403, {"code": 30001, "message": "balance is insufficient"})
BUSY = answering(503, {"code": 50505, "message": "busy"})
SLOW = answering(429, {"code": 50603, "message": "slow"})
LOST = Behaviour(stores=False, end=End.RESET)

Make = Callable[..., Loop]


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Make]:
    """Loops that are started, and whose promises are checked at the end."""
    made: list[Loop] = []
    with StandIn() as service:

        def make(**settings: Any) -> Loop:
            made.append(Loop(tmp_path, service, **settings))
            return made[-1].start()

        yield make
        for loop in made:
            loop.close()


def always(loop: Loop, behaviour: Behaviour, name: str = "bad.jsonl") -> None:
    """This file meets it whenever it is sent; it is dropped and sent once."""
    loop.service.script.extend([replace(behaviour, filename=name)] * 500)
    loop.drop("a", name)
    loop.look().run(3)


def accept(loop: Loop, name: str, *, within_s: float = 3.0) -> None:
    """Another file is accepted."""
    loop.drop("a", name)
    loop.look().run(within_s)
    assert name in loop.done("a")


def held(loop: Loop) -> str | None:
    (service,) = loop.daemon.services.values()
    return rules.held_reason(service.state)


# Whose fault a refusal is.


def test_a_doubted_file_is_rejected_at_the_third_refusal_with_others_accepted_between(make: Make) -> None:
    """It is sent again a minute after each acceptance; alone it waits longer and longer, and nothing counts."""
    loop = make()
    always(loop, DOUBTFUL)
    loop.run(500)
    assert (loop.posts(), loop.claims("a")) == (4, ["bad.jsonl"])
    for name in ("x.jsonl", "y.jsonl"):
        assert loop.failed("a") == []
        accept(loop, name)
        sent = loop.posts()
        loop.run(57)
        assert loop.posts() == sent
        loop.run(3)
        assert loop.posts() == sent + 1
    assert loop.failed("a") == ["bad.jsonl"]
    report = loop.report("a", "bad.jsonl")
    assert (report["reason"], report["code"]) == ("refused", 20999)
    assert loop.said("target.held") == []
    assert [e["reason"] for e in loop.said("file.waiting", file="bad.jsonl")] == ["doubted"]


def test_a_doubted_file_that_is_alone_waits_and_is_reported_once(make: Make) -> None:
    """Time proves nothing; after ten minutes the log quotes the answer."""
    loop = make()
    always(loop, DOUBTFUL)
    loop.run(6 * 3600)
    assert loop.claims("a") == ["bad.jsonl"]
    (stuck,) = loop.said("file.stuck")
    assert stuck["reason"] == "doubted"
    assert "rejected" in stuck["detail"]
    assert stuck["waited_s"] >= 600
    loop.service.script.clear()
    loop.run(3700)
    assert loop.done("a") == ["bad.jsonl"]


def test_evidence_survives_a_restart(make: Make) -> None:
    """The refused file is looked up first, and its refusals count on."""
    loop = make()
    always(loop, DOUBTFUL)
    accept(loop, "x.jsonl")
    loop.run(70)
    loop.restart().run(10)
    row = loop.row("a", "bad.jsonl")
    assert row is not None
    assert (row.state, row.refusals) == (State.DOUBTED, 2)
    accept(loop, "y.jsonl")
    loop.run(70)
    assert loop.failed("a") == ["bad.jsonl"]


def test_three_files_refused_in_the_same_words_hold_the_target(make: Make) -> None:
    """All go back with their evidence; one tries in each pause, at most a minute long while one is untried."""
    loop = make(names=("a", "b"), uploads=Uploads(concurrency=1))
    loop.service.always = DOUBTFUL
    for i in range(4):
        loop.drop("a", f"{i}.jsonl", lines=1 + i)
        loop.drop("b", f"{i}.jsonl", lines=9 - i)
    loop.look().run(2.5)
    assert held(loop) == "refuses_all"
    assert loop.posts() == 3
    assert loop.claims("a") == loop.claims("b") == []
    rows = [row for inbox in "ab" for i in range(4) if (row := loop.row(inbox, f"{i}.jsonl"))]
    assert [(row.state, row.refusals) for row in rows] == [(State.WAITING, 1)] * 3
    assert {row.refused_words for row in rows} == {"HTTP 400, code 20999: rejected"}
    loop.run(5 * 61)
    assert loop.posts() >= 8
    assert len({(e["inbox"], e["file"]) for e in loop.said("upload.started")}) == 8
    assert {e["level"] for e in loop.said("upload.started")[3:]} == {"debug"}
    loop.service.always = Behaviour()
    loop.run(310)
    assert (len(loop.done("a")), len(loop.done("b"))) == (4, 4)
    assert len(loop.said("target.held")) == len(loop.said("target.resumed", reason="refuses_all")) == 1


def test_a_listing_refused_in_the_same_words_is_the_keys_fault(make: Make) -> None:
    """One file is enough to know, and it is in its inbox again."""
    loop = make()
    loop.service.always, loop.service.listing = DOUBTFUL, Listing(answer=reply(400, REFUSAL))
    loop.drop("a", "x.jsonl")
    loop.look().run(2.5)
    assert (held(loop), loop.waiting_in("a"), loop.posts()) == ("unauthorized", ["x.jsonl"], 1)
    loop.service.always, loop.service.listing = Behaviour(), Listing()
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]


def test_a_clear_refusal_rejects_at_once_but_not_the_third_file_in_a_row(make: Make) -> None:
    """A code that speaks of the file is believed of two; all that follow may be the account's."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.service.always = CLEAR
    for i in range(5):
        loop.drop("a", f"{i}.jsonl")
    loop.look().run(600)
    assert loop.failed("a") == ["0.jsonl", "1.jsonl"]
    assert held(loop) == "refuses_all"
    loop.service.always = Behaviour()
    loop.run(310)
    assert loop.done("a") == ["2.jsonl", "3.jsonl", "4.jsonl"]


def test_a_resend_that_is_refused_is_looked_up_no_more(make: Make) -> None:
    """The service has nothing of it: it is doubted like any other."""
    loop = make()
    accept(loop, "good.jsonl")
    loop.service.script.extend([LOST, *[DOUBTFUL] * 9])
    loop.drop("a", "x.jsonl")
    loop.look().run(40)
    row = loop.row("a", "x.jsonl")
    assert row is not None
    assert (row.state, row.refusals, row.unproved, loop.posts()) == (State.DOUBTED, 1, 0, 3)
    listings = loop.listings()
    loop.run(100)
    assert (loop.posts(), loop.listings()) == (4, listings + 1)  # it asks whether listings are refused too
    assert loop.claims("a") == ["x.jsonl"]


# Rate limits.


def test_a_rate_limit_sets_an_interval_for_all_and_no_file_waits_by_itself(make: Make) -> None:
    """It begins with a quarter of a second and doubles; then one goes at a time, an interval apart."""
    loop = make(uploads=Uploads(concurrency=3, poison_after=1, give_up_after_s=0.1))
    loop.service.script.extend([SLOW] * 3)
    starts: list[float] = []
    loop.on_say("upload.started", lambda: starts.append(loop.now))
    for i in range(4):
        loop.drop("a", f"{i}.jsonl")
    loop.look().run(2)
    (service,) = loop.daemon.services.values()
    assert service.state.interval_s == 1.0
    assert {loop.entry("a", f"{i}.jsonl").failures for i in range(4)} == {0}
    loop.run(10)
    assert len(loop.done("a")) == 4
    assert [at - starts[0] for at in starts] == pytest.approx([0, 0, 0, 1, 2, 2.9, 3.71])
    assert [e["retry_in_s"] for e in loop.said("upload.deferred")] == [0.25, 0.5, 1.0]
    assert loop.said("target.held") == []


# Patience.


def test_poison_needs_acceptances_between_and_an_hour_of_pauses(make: Make) -> None:
    """Refusals for the account's sake that others disprove are charged to the file."""
    loop = make(uploads=Uploads(concurrency=1, poison_after=3))
    always(loop, BALANCE)
    assert held(loop) == "balance"
    for i in range(8):
        accept(loop, f"{i}.jsonl", within_s=10)
        loop.run(400)
    row = loop.row("a", "bad.jsonl")
    assert row is not None
    assert row.suspicions > 3
    assert 2400 < row.served_s < 3600
    assert loop.failed("a") == []
    loop.run(1000)
    assert loop.report("a", "bad.jsonl")["reason"] == "keeps_failing"
    assert len(loop.said("target.held")) == 1


def test_an_hour_of_failures_with_no_file_accepted_is_no_poison(make: Make) -> None:
    """An outage condemns nothing."""
    loop = make(uploads=Uploads(concurrency=1, poison_after=3))
    always(loop, BALANCE)
    accept(loop, "x.jsonl", within_s=10)
    loop.run(2 * 3600)
    row = loop.row("a", "bad.jsonl")
    assert row is not None
    assert row.served_s > 3600
    assert row.suspicions < 3
    assert loop.waiting_in("a") == ["bad.jsonl"]


def test_giving_up_counts_neither_holds_nor_downtime(make: Make) -> None:
    """But every pause between two attempts of a process."""
    loop = make(uploads=Uploads(give_up_after_s=100.0))
    always(loop, BUSY)
    loop.run(40)
    loop.service.key = "another"
    deferred = loop.said("upload.deferred")
    loop.run(86400)
    assert loop.said("upload.deferred") == deferred
    assert held(loop) == "unauthorized"
    loop.die()
    loop.service.key = None
    loop.now += 86400
    loop.start().run(30)
    assert loop.waiting_in("a") == ["bad.jsonl"]
    loop.run(200)
    assert loop.report("a", "bad.jsonl")["reason"] == "gave_up"


def test_a_pause_before_a_lost_answer_counts_once(make: Make) -> None:
    """Each pause ends with one attempt, however that ends."""
    loop = make(luck=0.999999)
    loop.service.script.extend([BUSY, BUSY, LOST, BUSY])
    starts: list[float] = []
    served: list[float] = []

    def note() -> None:
        row = loop.row("a", "x.jsonl")
        assert row is not None
        starts.append(loop.now)
        served.append(row.served_s)

    loop.on_say("upload.started", note)
    loop.drop("a", "x.jsonl")
    loop.look().run(100)
    assert len(starts) == 5
    assert served == pytest.approx([at - starts[0] for at in starts])
    assert loop.done("a") == ["x.jsonl"]


def test_a_request_to_send_a_doubted_file_again_is_done_at_once_and_kept_for_nothing_else(make: Make) -> None:
    """It must not send the file a second time when its answer is lost some day."""
    loop = make(uploads=Uploads(resend_limit=0))
    always(loop, DOUBTFUL)
    posts = loop.posts()
    state_dir = loop.settings().state_dir
    retry.request(state_dir, "a", "bad.jsonl")
    loop.look().run(1)
    assert loop.posts() == posts + 1
    assert retry.requests(state_dir) == []
    loop.service.script.clear()
    loop.service.listing = Listing(answer=reply(404, "404 page not found"))
    loop.service.always = LOST
    loop.run(24 * 3600)
    assert loop.posts() == posts + 2
    assert loop.said("upload.resent") == []

"""Look-ups beside all else that goes on: holds, intervals, full slots, slow listings, other purposes, reloads.

A look-up takes time, and what it was begun for may have changed when it ends. `Loop.close` checks after each
test that every file lies in one place, with the id of its own bytes, and was stored once.
"""

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from loop import Loop, Pool
from test_lost_answers import LOST, NOT_STORED, lose, sidecar, somebody_elses, told

from sfwatch.journal import SqliteJournal
from sfwatch.settings import Api, Config, RemoteName, Uploads
from sfwatch.standin import Listing, StandIn, Stored, answering, reply
from sfwatch.upstream import Plan, Service
from sfwatch.work import ask_listing, work

REFUSED_KEY = answering(401, {"code": 0, "message": "no"})
BUSY = {"code": 50603, "message": "busy"}
X = "x.jsonl"


class Choosy(Pool):
    """Holds back the work that these functions do, and does all other work at once."""

    chosen: frozenset[Callable[..., Any]] = frozenset()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.holds = fn in self.chosen
        return super().submit(fn, *args, **kwargs)


class ByPurpose(StandIn):
    """A service whose listing has the purpose that was asked for only, sorted by the time of creation."""

    before_listing: Callable[[], None] = staticmethod(lambda: None)

    def listed(self, limit: int, after: str | None = None) -> tuple[list[Stored], bool]:
        self.before_listing()
        purpose = purpose_in(self.requests[-1].path)
        everything = self.stored
        self.stored = sorted((f for f in everything if f.purpose == purpose), key=lambda f: f.created_at)
        try:
            return super().listed(limit, after)
        finally:
            self.stored = everything


@dataclass
class Busy(Loop):
    """A loop whose inboxes have purposes of their own, and in which a worker's sleep takes time."""

    service: ByPurpose
    pool: Choosy = field(default_factory=Choosy)
    purposes: dict[str, str] = field(default_factory=dict)

    def settings(self) -> Config:
        config = super().settings()
        inboxes = [replace(i, purpose=self.purposes.get(i.name, "batch")) for i in config.inboxes]
        return replace(config, inboxes=tuple(inboxes))

    def plans(self, config: Config, journal: SqliteJournal) -> tuple[Plan, ...]:
        plans = super().plans(config, journal)
        return tuple(replace(plan, tools=replace(plan.tools, sleep=self.pass_time)) for plan in plans)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Busy]:
    with ByPurpose() as service, closing(Busy(tmp_path, service)) as loop:
        yield loop


def purpose_in(path: str) -> str:
    return parse_qs(urlsplit(path).query)["purpose"][0]


def target(loop: Busy) -> Service:
    (service,) = loop.daemon.services.values()
    return service


def upload(loop: Busy, name: str, seconds: float = 10) -> None:
    loop.drop("a", name)
    loop.look().run(seconds)


def under_way(loop: Busy, name: str) -> Callable[[], Any]:
    """Drop a file, and return the work on it, which is held back."""
    upload(loop, name, 2.5)
    (job,) = loop.pool.held
    loop.pool.held.clear()
    return job


def begin_look_up(loop: Busy) -> Callable[[], Any]:
    """Let a look-up go out, and return the work on it, which is held back."""
    loop.pool.chosen = frozenset({ask_listing})
    loop.run(8)
    (look_up,) = loop.pool.held
    loop.pool.held.clear()
    return look_up


def test_a_hold_that_ended_while_its_probe_was_out_hinders_no_later_probe(loop: Busy) -> None:
    """The probe is a look-up. It fails after the hold has ended; the next look-ups and probes go out."""
    loop.start()
    lose(loop, NOT_STORED["500"])
    loop.pool.chosen = frozenset({work})
    accepted = under_way(loop, "s.jsonl")
    loop.service.script.append(replace(REFUSED_KEY, filename="z.jsonl"))
    under_way(loop, "z.jsonl")()
    loop.settle_down()
    assert len(loop.said("target.held")) == 1
    probe = begin_look_up(loop)
    accepted()
    loop.settle_down()
    assert len(loop.said("target.resumed")) == 1
    loop.service.listing = Listing(answer=reply(500, "oops"))
    probe()
    loop.settle_down()
    loop.service.listing = Listing()
    loop.pool.chosen = frozenset()
    loop.run(120)
    assert loop.done("a") == ["s.jsonl", X, "z.jsonl"]
    loop.service.script.append(REFUSED_KEY)
    upload(loop, "v.jsonl", 60)
    assert len(loop.said("target.held")) == len(loop.said("target.resumed")) == 2


def test_a_listing_that_fails_holds_no_uploads_up(loop: Busy) -> None:
    """A status 500 of the listing says nothing of uploads: only the file that needs the listing waits."""
    loop.start()
    lose(loop, NOT_STORED["500"])
    loop.service.listing = Listing(answer=reply(500, "oops"))
    loop.run(600)
    upload(loop, "v.jsonl")
    assert loop.done("a") == ["v.jsonl"]
    assert loop.said("target.held") == []


def test_the_loop_sleeps_while_a_look_up_is_out_and_a_pause_is_over(loop: Busy) -> None:
    """The probe waits for the look-up, whose end wakes the loop. `Loop.run` fails if the loop spins."""
    loop.start()
    lose(loop, NOT_STORED["500"])
    look_up = begin_look_up(loop)
    loop.service.script.append(REFUSED_KEY)
    upload(loop, "z.jsonl", 60)
    (held,) = loop.said("target.held")
    assert held["probe_in_s"] < 50
    look_up()
    loop.pool.chosen = frozenset()
    loop.run(120)
    assert loop.done("a") == [X, "z.jsonl"]


def test_files_of_different_purposes_are_looked_up_in_turn(loop: Busy) -> None:
    """One look-up asks for one purpose. Neither waits for ever, and there are pauses between."""
    loop.names, loop.purposes = ("a", "b"), {"b": "fine-tune"}
    (loop.root / "b").mkdir()
    loop.start()
    for inbox in ("a", "b"):
        loop.service.script.append(NOT_STORED["500"])
        loop.drop(inbox, f"{inbox}.jsonl")
    loop.look().run(60)
    asked = [purpose_in(seen.path) for seen in loop.service.requests if seen.method == "GET"]
    assert all(2 <= asked.count(purpose) <= 10 for purpose in ("batch", "fine-tune"))
    assert (loop.done("a"), loop.done("b")) == (["a.jsonl"], ["b.jsonl"])


def test_a_lost_upload_is_looked_up_by_the_purpose_that_it_was_sent_with(loop: Busy) -> None:
    """The purpose of its inbox has changed since: a listing by the new one could not show it."""
    loop.start()
    upload(loop, "w.jsonl")
    lose(loop, LOST["reset"])
    loop.purposes = {"a": "fine-tune"}
    loop.signal(signal.SIGHUP).run(3)
    upload(loop, "v.jsonl", 100)
    assert [stored.purpose for stored in loop.service.stored] == ["batch", "batch", "fine-tune"]
    assert told(loop) == {"unknown": 1, "recovered": 1}


def test_a_proof_that_grew_old_while_the_file_waited_for_a_slot_is_taken_again(loop: Busy) -> None:
    """There is one slot, and each upload takes longer than a proof holds: the file goes in its turn."""
    loop.uploads = Uploads(concurrency=1)
    loop.start()
    upload(loop, "w.jsonl")
    lose(loop, NOT_STORED["500"])
    loop.pool.chosen = frozenset({work})
    for number in range(12):
        loop.drop("a", f"{number:02}.jsonl")
    loop.look()
    for _ in range(6):
        loop.run(100)
        loop.pool.release(len(loop.pool.held))
        loop.settle_down()
    assert X in loop.done("a")
    assert told(loop) == {"unknown": 1, "resent": 1}


def test_a_listing_that_takes_longer_than_a_proof_holds_proves_no_absence(loop: Busy) -> None:
    """The file waits, and `upload.undecided` says why; a quicker listing decides."""
    loop.start()
    upload(loop, "w.jsonl")
    lose(loop, NOT_STORED["500"])
    loop.service.before_listing = lambda: loop.pass_time(61)
    loop.run(3000)
    assert loop.posts() == 2
    assert loop.listings() < 20
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["slow_listing"]
    loop.service.before_listing = lambda: None
    loop.run(600)
    assert told(loop) == {"unknown": 1, "undecided": 1, "resent": 1}


def test_a_clock_that_was_set_back_hides_no_upload_in_a_listing_of_few_pages(loop: Busy) -> None:
    """The file is listed behind older ones: the listing is read to its end, whatever its order proves."""
    loop.service.listing = Listing(longest=8, lag_s=-60)
    loop.start()
    for number in range(14):
        upload(loop, f"{number:02}.jsonl", 5)
    loop.service.clock = lambda: loop.wall() - 60
    lose(loop, LOST["reset"])
    loop.run(200)
    assert told(loop) == {"unknown": 1, "recovered": 1}


def test_uploads_and_look_ups_take_turns_in_an_interval(loop: Busy) -> None:
    """The service limits the rate of listings alone, and asks for long pauses: uploads go all the same."""
    loop.start()
    lose(loop, NOT_STORED["500"])
    loop.service.listing = Listing(answer=reply(429, BUSY, {"Retry-After": "300"}))
    loop.run(3600)
    before = len(loop.service.requests)
    for number in range(3):
        loop.drop("a", f"{number}.jsonl")
    loop.look().run(3600)
    methods = [seen.method for seen in loop.service.requests[before:]]
    assert methods[:6] in (["POST", "GET"] * 3, ["GET", "POST"] * 3)
    assert len(loop.done("a")) == 3


def test_a_look_up_of_many_pages_in_an_interval_ends_after_a_minute(loop: Busy) -> None:
    """It pauses before each page, and uploads wait for it. What it has not read proves nothing."""
    loop.start()
    lose(loop, NOT_STORED["500"])
    others = (somebody_elses(loop, name="o.jsonl", number=n, age_s=1e4 - n) for n in range(5000))
    loop.service.stored += others
    target(loop).state = replace(target(loop).state, interval_s=25.0)
    loop.run(10)
    assert 3 <= loop.listings() <= 6
    upload(loop, "v.jsonl", 300)
    assert loop.done("a") == ["v.jsonl"]


def test_an_inbox_that_goes_to_another_target_takes_nothing_from_a_look_up_of_the_old(loop: Busy) -> None:
    """The configuration has the old target no more: the file waits until the inbox goes back there."""
    loop.start()
    lose(loop, LOST["reset"])
    look_up = begin_look_up(loop)
    with StandIn() as other:
        loop.api = Api(base_url=other.base_url)
        loop.signal(signal.SIGHUP)
        look_up()
        loop.pool.chosen = frozenset()
        loop.run(120)
        assert loop.claims("a") == [X]
        assert [e["reason"] for e in loop.said("upload.undecided")] == ["other_target"]
        assert other.stored == []
        loop.api = None
        loop.signal(signal.SIGHUP).run(600)
    assert loop.done("a") == [X]
    assert sidecar(loop)["sfwatch"]["endpoint"].startswith(loop.service.base_url)


def test_an_untagged_claim_of_version_1_without_a_row_is_undecided(loop: Busy) -> None:
    """It was sent under its own name, and the journal is lost: that no upload has its tag proves nothing."""
    loop.uploads = Uploads(remote_name=RemoteName.ORIGINAL)
    loop.start()
    lose(loop, LOST["reset"])
    ours, instance = loop.claims_folder("a"), loop.daemon.journal.id
    loop.die()
    around = loop.inbox_of("a") / ".sfwatch"
    (around / ours).rename(around / instance)
    (around / f"{ours}.owner").unlink()
    loop.uploads, loop.config = Uploads(), {"state_dir": loop.root / "another"}
    loop.start().run(5)
    upload(loop, "v.jsonl", 3600)
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["no_tag"]
    assert (loop.done("a"), loop.claims("a")) == (["v.jsonl"], [X])

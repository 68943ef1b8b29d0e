"""The loop: files of all kinds through a whole daemon, and what it does when something is in the way."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import Loop

from sfwatch.settings import Uploads
from sfwatch.standin import Behaviour, StandIn, answering

Make = Callable[..., Loop]

BUSY = answering(503, {"code": 50505, "message": "busy"})
BALANCE = answering(403, {"code": 30001, "message": "balance is insufficient"})


@pytest.fixture(name="service")
def _service() -> Iterator[StandIn]:
    with StandIn() as service:
        yield service


@pytest.fixture(name="make")
def _make(tmp_path: Path, service: StandIn) -> Iterator[Make]:
    """Loops that are started, and whose promises are checked at the end."""
    made: list[Loop] = []

    def make(*names: str, started: bool = True, **settings: Any) -> Loop:
        loop = Loop(tmp_path, service, names=names or ("a",), **settings)
        made.append(loop)
        return loop.start() if started else loop

    yield make
    for loop in made:
        loop.close()


# A file's way.


def test_a_dropped_file_is_settled_uploaded_recorded_and_filed_away(make: Make) -> None:
    """A file that lies still for two seconds is uploaded once and lies in done with its sidecar."""
    loop = make()
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    assert loop.done("a") == ["x.jsonl"]
    assert [e["settled_by"] for e in loop.said("file.settled")] == ["lease"]
    assert len(loop.said("file.done", inbox="a", file="x.jsonl")) == 1


def test_what_lay_there_at_the_start_is_taken_at_once_and_a_rename_into_the_inbox_as_well(make: Make) -> None:
    """Neither waits for the time that a file written in place has to rest."""
    loop = make(started=False)
    old = loop.drop("a", "old.jsonl")
    os.utime(old, (loop.wall() - 60, loop.wall() - 60))
    loop.now += 60
    loop.start()
    loop.drop("a", "moved.jsonl")
    loop.ring("a", "moved.jsonl", moved_in=True)
    assert loop.done("a") == ["moved.jsonl", "old.jsonl"]
    assert {e["file"]: e["settled_by"] for e in loop.said("file.settled")} == {
        "old.jsonl": "at_rest",
        "moved.jsonl": "renamed",
    }


def test_a_later_ring_voids_that_a_file_was_renamed_in(make: Make) -> None:
    """Who writes to a file after renaming it in is not done with it: it has to rest like any other."""
    loop = make(inbox={"settle_s": 2.0})
    path = loop.drop("a", "x.jsonl")
    with path.open("a"):
        loop.ring("a", "x.jsonl", moved_in=True)
    loop.ring("a", "x.jsonl")
    assert loop.done("a") == []
    loop.run(3)
    assert loop.done("a") == ["x.jsonl"]


def test_a_file_with_findings_is_filed_under_failed_and_holds_up_no_other(make: Make) -> None:
    """A bad file in one inbox fails alone; the others of both inboxes are done."""
    loop = make("a", "b")
    loop.drop("a", "bad.jsonl", "{}\n")
    loop.drop("a", "good.jsonl")
    loop.drop("b", "good.jsonl")
    loop.look().run(5)
    assert (loop.done("a"), loop.failed("a"), loop.done("b")) == (["good.jsonl"], ["bad.jsonl"], ["good.jsonl"])
    assert loop.posts() == 2


def test_a_missing_inbox_and_a_held_target_do_not_stop_an_inbox_with_a_key_of_its_own(make: Make) -> None:
    """What another target or another folder suffers from is not this inbox's."""
    loop = make("a", "b", "c")
    shutil.rmtree(loop.inbox_of("a"))
    loop.drop("b", "x.jsonl")
    loop.look().run(3)
    assert loop.done("b") == ["x.jsonl"]
    assert len(loop.said("inbox.lost")) == 1


def test_files_go_oldest_first_and_then_by_name(make: Make) -> None:
    """The order in which files of an inbox were seen is the order in which they go out."""
    loop = make(uploads=Uploads(concurrency=1))
    for name in ("c.jsonl", "a.jsonl"):
        loop.drop("a", name)
    loop.look()
    loop.pool.holds = True
    loop.run(1)
    loop.drop("a", "b.jsonl")
    loop.look().run(5)
    while loop.pool.held:
        loop.pool.release()
        loop.settle_down()
    assert [e["file"] for e in loop.said("file.done")] == ["a.jsonl", "c.jsonl", "b.jsonl"]


def test_concurrency_is_never_exceeded_and_one_slot_is_left_to_the_other_inbox(make: Make) -> None:
    """A thousand files in one inbox take all slots but one; the other inbox's only file goes at once."""
    loop = make("a", "b", uploads=Uploads(concurrency=4))
    for i in range(12):
        loop.drop("a", f"{i:02}.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    assert len(loop.pool.held) == 3
    loop.drop("b", "x.jsonl")
    loop.look().run(3)
    assert len(loop.pool.held) == 4
    loop.pool.release(4)
    loop.settle_down()
    assert loop.done("b") == ["x.jsonl"]
    while loop.pool.held:
        loop.pool.release()
        loop.settle_down()
    assert loop.pool.most == 4
    assert len(loop.done("a")) == 12


def test_inboxes_take_turns(make: Make) -> None:
    """With one slot, files of two full inboxes go out alternately."""
    loop = make("a", "b", uploads=Uploads(concurrency=1))
    for i in range(3):
        loop.drop("a", f"a{i}.jsonl")
        loop.drop("b", f"b{i}.jsonl")
    loop.look().run(3)
    order = [e["inbox"] for e in loop.said("upload.started")]
    assert sorted(order[:2]) == sorted(order[2:4]) == sorted(order[4:]) == ["a", "b"]


def test_the_same_remote_name_is_never_under_way_twice(make: Make) -> None:
    """Two inboxes with a file of one name: the second waits for the first, nothing else does."""
    loop = make("a", "b", uploads=Uploads(concurrency=4))
    loop.drop("a", "same.jsonl")
    loop.drop("b", "same.jsonl")
    loop.drop("b", "other.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    assert len(loop.pool.held) == 2
    loop.pool.release(2)
    loop.settle_down()
    assert len(loop.pool.held) == 1
    loop.pool.release()
    loop.settle_down()
    assert loop.done("a") + loop.done("b") == ["same.jsonl", "other.jsonl", "same.jsonl"]


# Not now.


def test_a_file_that_fails_for_now_is_back_in_its_inbox_and_waits_longer_each_time(make: Make) -> None:
    """The pauses double, drawn between half and whole by luck; every try is counted."""
    loop = make(luck=0.0)
    for _ in range(4):
        loop.service.script.append(BUSY)
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    assert loop.waiting_in("a") == ["x.jsonl"]
    assert loop.claims("a") == []
    loop.run(60)
    deferred = loop.said("upload.deferred")
    assert [e["retry_in_s"] for e in deferred] == [0.5, 1.0, 2.0, 4.0]
    assert [e["attempt"] for e in deferred] == [1, 2, 3, 4]
    assert loop.said("file.done")[0]["attempts"] == 5


def test_jitter_comes_from_the_luck_that_was_handed_in(make: Make) -> None:
    """With more luck the same failure waits longer."""
    loop = make(luck=0.999999)
    loop.service.script.append(BUSY)
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    assert loop.said("upload.deferred")[0]["retry_in_s"] == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize(("asked", "waited"), [("20", 20.0), ("86400", 300.0)])
def test_retry_after_is_honoured_as_far_as_the_longest_retry(make: Make, asked: str, waited: float) -> None:
    """A service may ask for a pause, but not for one longer than `longest_retry`."""
    loop = make()
    loop.service.script.append(answering(429, {"code": 50603, "message": "slow"}, {"Retry-After": asked}))
    loop.drop("a", "x.jsonl")
    loop.look().run(waited)
    assert loop.said("upload.deferred")[0]["retry_in_s"] == waited
    assert loop.posts() == 1
    loop.run(4)
    assert loop.done("a") == ["x.jsonl"]


def test_a_rate_limit_lowers_the_pace_of_all(make: Make) -> None:
    """After a 429 fewer files are under way at once; acceptances raise that again."""
    loop = make(uploads=Uploads(concurrency=4))
    for i in range(8):
        loop.drop("a", f"{i}.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    assert len(loop.pool.held) == 4
    loop.service.script.append(answering(429, {"code": 50603, "message": "slow"}))
    loop.pool.release(4)
    loop.settle_down()
    assert 1 <= len(loop.pool.held) < 4
    loop.pool.holds = False
    while loop.pool.held:
        loop.pool.release()
    loop.run(10)
    assert len(loop.done("a")) == 8


def test_a_file_that_fails_for_too_long_is_given_up_if_that_is_asked_for(make: Make) -> None:
    """`give_up_after` counts from the first try; before that the file is never condemned."""
    loop = make(uploads=Uploads(give_up_after_s=100.0, poison_after=0))
    loop.service.always = BUSY
    loop.drop("a", "x.jsonl")
    loop.look().run(90)
    assert loop.failed("a") == []
    loop.run(200)
    assert loop.failed("a") == ["x.jsonl"]
    assert loop.report("a", "x.jsonl")["reason"] == "gave_up"


def test_time_in_a_hold_does_not_count_for_giving_up(make: Make) -> None:
    """A key that was expired for a day costs no file its patience, also one that was tried when it expired."""
    loop = make(uploads=Uploads(give_up_after_s=100.0))
    loop.drop("a", "x.jsonl")
    loop.service.key = "another"
    loop.look().run(86400)
    loop.service.key = None
    loop.service.script.append(BUSY)
    loop.run(1200)
    assert loop.failed("a") == []
    assert loop.done("a") == ["x.jsonl"]


def test_a_file_that_fails_while_others_are_accepted_is_poison(make: Make) -> None:
    """After `poison_after` failures, and three or more other files accepted meanwhile."""
    loop = make(uploads=Uploads(poison_after=4))
    busy = replace(BUSY, filename="x.jsonl")
    loop.service.script.extend([busy] * 50)
    loop.drop("a", "x.jsonl")
    loop.look().run(100)
    assert loop.failed("a") == []
    for i in range(3):
        loop.drop("a", f"good{i}.jsonl")
    loop.look().run(900)
    assert loop.failed("a") == ["x.jsonl"]
    assert loop.report("a", "x.jsonl")["reason"] == "keeps_failing"
    assert len(loop.done("a")) == 3


def test_an_outage_alone_condemns_no_file_and_neither_do_trials_in_a_hold(make: Make) -> None:
    """Tries that failed for the account are no failures of the file, however many they were."""
    loop = make(uploads=Uploads(poison_after=4))
    loop.drop("a", "x.jsonl")
    loop.service.always = BALANCE
    loop.look().run(4000)
    assert loop.posts() > 8
    loop.service.always = Behaviour()
    busy = replace(BUSY, filename="x.jsonl")
    loop.service.script.extend([busy] * 2)
    for i in range(5):
        loop.drop("a", f"good{i}.jsonl")
    loop.look().run(2000)
    assert loop.failed("a") == []
    assert len(loop.done("a")) == 6

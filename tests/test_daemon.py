"""The loop: files of all kinds through a whole daemon, and what it does when something is in the way."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, Loop
from servers import closed_port

from sfwatch.settings import Api, OnUnknown, Uploads
from sfwatch.standin import (
    Behaviour,
    End,
    Listing,
    StandIn,
    answering,
    reply,
    storing_then_resetting,
)

Make = Callable[..., Loop]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts")

BUSY = answering(503, {"code": 50505, "message": "busy"})
BALANCE = answering(403, {"code": 30001, "message": "balance is insufficient"})


@pytest.fixture(name="service")
def _service() -> Iterator[StandIn]:
    with StandIn() as service:
        yield service


@pytest.fixture(name="tiny")
def _tiny(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Folders on small filesystems of their own (32 MiB), one mount for each."""
    mounted: list[Path] = []

    def mount(name: str) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", path], check=True)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(name="make")
def _make(tmp_path: Path, service: StandIn, tiny: Callable[[str], Path]) -> Iterator[Make]:
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


# The target is held.


def with_key_file(tmp_path: Path, service: StandIn, key: str) -> Api:
    (tmp_path / "key").write_text(f"{key}\n")
    (tmp_path / "key").chmod(0o600)
    return Api(base_url=service.base_url, key_file=tmp_path / "key")


def test_an_expired_key_is_said_once_and_a_mended_one_ends_it(
    make: Make, tmp_path: Path, service: StandIn
) -> None:
    """One file meets the 401; then only listings ask, more and more seldom, until the key file is mended."""
    service.key = KEY
    loop = make(api=with_key_file(tmp_path, service, "sk-expired"), uploads=Uploads(concurrency=2))
    for i in range(20):
        loop.drop("a", f"{i:02}.jsonl")
    loop.look().run(3600)
    assert len(loop.waiting_in("a")) == 20
    assert loop.claims("a") == []
    assert loop.posts() <= 2
    assert 10 <= loop.listings() <= 30
    assert loop.said("upload.deferred") == loop.said("file.failed") == []
    (tmp_path / "key").write_text(KEY + "\n")
    loop.pool.holds = True
    loop.run(300)
    while loop.daemon.services and loop.pool.held and not loop.said("target.resumed"):
        assert len(loop.pool.held) == 1  # the probe, then one trial
        loop.pool.release()
        loop.settle_down()
    loop.pool.holds = False
    while loop.pool.held:
        loop.pool.release()
    loop.run(10)
    assert len(loop.done("a")) == 20
    assert len(loop.said("target.held", reason="unauthorized")) == len(loop.said("target.held")) == 1
    assert len(loop.said("target.resumed")) == 1


def test_an_empty_balance_lets_one_file_try_in_each_pause(make: Make) -> None:
    """Listings work with an empty balance, uploads do not: each pause costs one upload, not one a file."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.service.always = BALANCE
    for i in range(30):
        loop.drop("a", f"{i:02}.jsonl", lines=1 + i % 3)
    loop.look().run(3600)
    assert 10 <= loop.posts() <= 25
    assert len(loop.waiting_in("a")) == 30
    loop.service.always = Behaviour()
    loop.run(320)
    assert len(loop.done("a")) == 30
    assert len(loop.said("target.held")) == len(loop.said("target.resumed")) == 1


def test_no_key_at_all_holds_the_target_and_sends_nothing(make: Make, tmp_path: Path) -> None:
    """A missing key file is an outage, not a fault of files; it ends when the file is there."""
    loop = make(started=False)
    loop.api = with_key_file(tmp_path, loop.service, KEY)
    (tmp_path / "key").unlink()
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(600)
    assert len(loop.said("target.held", reason="no_key")) == 1
    assert loop.service.requests == []
    (tmp_path / "key").write_text(KEY + "\n")
    loop.run(300)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("target.resumed")) == 1


def test_an_unreachable_service_holds_at_once(make: Make) -> None:
    """One refused connection is enough: the other files are not tried, and all go when it is back."""
    with closed_port() as port:
        loop = make(started=False, uploads=Uploads(concurrency=1))
        there = loop.service.base_url
        loop.api = Api(base_url=f"http://127.0.0.1:{port}/v1")
        loop.start()
        for i in range(5):
            loop.drop("a", f"{i}.jsonl")
        loop.look().run(1000)
        assert len(loop.said("target.held", reason="unreachable")) == 1
        assert len(loop.said("upload.started")) == 1
        assert len(loop.waiting_in("a")) == 5
    loop.api = Api(base_url=there)
    loop.restart().run(10)
    assert len(loop.done("a")) == 5


def test_three_refusals_alike_with_none_accepted_are_the_targets_fault(make: Make) -> None:
    """The third file, and each after it, goes back into the inbox; the hold ends when one is accepted."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.service.always = answering(400, {"code": 20012, "message": "purpose must be batch", "data": None})
    for i in range(8):
        loop.drop("a", f"{i}.jsonl")
    loop.look().run(600)
    assert len(loop.said("target.held", reason="refuses_all")) == 1
    assert len(loop.failed("a")) == 2
    assert len(loop.waiting_in("a")) == 6
    loop.service.always = Behaviour()
    loop.run(400)
    assert len(loop.done("a")) == 6
    assert len(loop.said("target.resumed")) == 1


def test_a_key_that_only_one_file_meets_does_not_hold_the_others_again(make: Make) -> None:
    """A 403 that another file's acceptance disproves is charged to the file, which then waits by itself."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.service.script.extend([replace(BALANCE, filename="odd.jsonl")] * 6)
    loop.drop("a", "odd.jsonl")
    loop.drop("a", "x.jsonl", lines=3)
    loop.look().run(100)
    loop.drop("a", "y.jsonl")
    loop.look().run(900)
    assert loop.done("a") == ["odd.jsonl", "x.jsonl", "y.jsonl"]
    assert len(loop.said("target.held")) == len(loop.said("target.resumed")) == 1


# Lost answers.


def test_a_lost_answer_is_found_in_the_listing_and_others_go_on_meanwhile(make: Make) -> None:
    """The file stays claimed; its id comes from the listing, and it is not sent again."""
    loop = make()
    loop.service.script.append(replace(storing_then_resetting(), filename="x.jsonl"))
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(2.1)
    assert loop.done("a") == ["y.jsonl"]
    assert loop.claims("a") == ["x.jsonl"]
    loop.run(60)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("upload.unknown")) == len(loop.said("upload.recovered")) == 1


def test_a_lost_upload_that_is_not_listed_is_sent_again_when_its_window_is_over(make: Make) -> None:
    """Not before `reconcile_window`: listings lag behind."""
    loop = make(uploads=Uploads(reconcile_window_s=30.0))
    loop.service.script.append(Behaviour(stores=False, end=End.RESET))
    loop.drop("a", "x.jsonl")
    loop.look().run(30)
    assert loop.posts() == 1
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 2
    assert len(loop.said("upload.resent")) == 1


def test_what_nobody_can_tell_is_said_once_and_looked_up_now_and_then(make: Make) -> None:
    """Without a listing and with `on_unknown: hold` the file stays claimed; it is not sent again."""
    loop = make(uploads=Uploads(on_unknown=OnUnknown.HOLD))
    loop.service.listing = Listing(answer=reply(404, "no such thing"))
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(4000)
    assert loop.posts() == 1
    assert loop.claims("a") == ["x.jsonl"]
    assert len(loop.said("upload.undecided")) == 1
    loop.service.listing = Listing()
    loop.run(600)
    assert loop.done("a") == ["x.jsonl"]


def test_a_newcomer_under_the_name_of_a_file_under_way_is_taken_afterwards(make: Make) -> None:
    """While the first of the name is being cleared up the second waits, and says so once; then it is done."""
    loop = make()
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = Listing(lag_s=20)
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    loop.drop("a", "x.jsonl")
    loop.ring("a", "x.jsonl", moved_in=True)
    loop.look().run(5)
    assert loop.waiting_in("a") == ["x.jsonl"]
    assert len(loop.said("file.waiting", reason="namesake")) == 1
    loop.run(60)
    assert len(loop.done("a")) == 2
    assert len(loop.said("upload.undecided")) == 0


def test_lost_answers_of_all_files_hold_the_target_and_a_resent_file_ends_that(make: Make) -> None:
    """Also when no other file is there to prove that the service accepts again."""
    loop = make(uploads=Uploads(concurrency=3))
    for i in range(3):
        loop.drop("a", f"{i}.jsonl")
    loop.service.script.extend([Behaviour(stores=False, end=End.RESET)] * 3)
    loop.look().run(400)
    assert len(loop.done("a")) == 3
    assert len(loop.said("target.held", reason="no_answers")) == len(loop.said("target.resumed")) == 1


# Storage.


def fill(folder: Path, *, leave: int = 0) -> Path:
    """Take what room there is on the folder's filesystem."""
    ballast = folder / "ballast"
    space = os.statvfs(folder)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - leave)
    return ballast


@needs_root
def test_a_full_done_folder_is_said_once_and_costs_no_second_upload(
    make: Make, tiny: Callable[[str], Path]
) -> None:
    """What was accepted before waits for its sidecar; nothing is sent while there is no room."""
    done = tiny("full/done")
    loop = make(inbox={"done": done})
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(3)
    loop.pool.holds = False
    ballast = fill(done)
    while loop.pool.held:
        loop.pool.release()
    loop.run(1000)
    assert loop.posts() == 0
    assert len(loop.said("storage.held")) == 1
    ballast.unlink()
    loop.run(300)
    assert sorted(p.name for p in done.glob("*.jsonl")) == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("storage.held", path=str(done))) == len(loop.said("storage.held")) == 1
    assert len(loop.said("storage.resumed", path=str(done))) == 1
    loop.done_elsewhere["a"] = done


@needs_root
def test_a_done_folder_that_fills_up_during_the_upload_keeps_the_answer(
    make: Make, tiny: Callable[[str], Path]
) -> None:
    """The file is accepted, then there is no room for sidecar and move: exactly one upload all the same."""
    done = tiny("full/done")
    loop = make(inbox={"done": done})
    loop.done_elsewhere["a"] = done
    ballast: list[Path] = []
    loop.on_say("upload.accepted", lambda: ballast.append(fill(done)))
    loop.drop("a", "x.jsonl", lines=200)
    loop.drop("a", "later.jsonl")
    loop.look().run(1000)
    assert loop.claims("a") == ["x.jsonl"] or loop.claims("a") == ["later.jsonl"]
    assert loop.posts() == 1
    loop.on_say("upload.accepted", lambda: None)
    ballast[0].unlink()
    loop.run(300)
    assert sorted(p.name for p in done.glob("*.jsonl")) == ["later.jsonl", "x.jsonl"]
    assert loop.posts() == 2
    assert len(loop.said("storage.held")) == len(loop.said("storage.resumed")) == 1


@needs_root
def test_state_and_done_full_together_both_end(make: Make, tiny: Callable[[str], Path]) -> None:
    """A try that frees one folder and fails at the other does not stand in the way of the next try."""
    state, done = tiny("small/state"), tiny("small/done")
    loop = make(inbox={"done": done}, config={"state_dir": state})
    loop.done_elsewhere["a"] = done
    ballast = [fill(done, leave=1 << 20)]
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    ballast.append(fill(state, leave=1 << 20))
    loop.drop("a", "y.jsonl")
    loop.look().run(100)
    for file in ballast:
        file.unlink()
        loop.run(100)
    loop.run(700)
    assert sorted(p.name for p in done.glob("*.jsonl")) == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("storage.held")) == len(loop.said("storage.resumed")) == 2


@needs_root
def test_a_file_that_vanishes_while_the_state_folder_is_full_ends_nothing(
    make: Make, tiny: Callable[[str], Path]
) -> None:
    """What the journal cannot forget now does no harm; the daemon goes on."""
    state = tiny("small/state")
    loop = make(config={"state_dir": state})
    loop.service.always = BUSY
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    fill(state)
    for _ in range(64):  # whatever room is left in pages of the journal
        with contextlib.suppress(OSError):
            loop.daemon.journal.saw_folder("x" * 4096 + str(_))
    loop.withdraw("a", "x.jsonl")
    loop.look()
    assert len(loop.said("file.vanished")) == 1


@needs_root
def test_a_storage_hold_that_nobody_waits_for_does_not_spin(make: Make, tiny: Callable[[str], Path]) -> None:
    """The file that met the full disk is taken away: nothing is to be tried, so the loop sleeps."""
    done = tiny("full/done")
    loop = make(inbox={"done": done})
    fill(done)
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    assert len(loop.said("storage.held")) == 1
    loop.withdraw("a", "x.jsonl")
    loop.look().run(100)


def test_a_missing_failed_folder_holds_only_its_inbox_and_is_not_made_anew(make: Make) -> None:
    """It may be an unmounted mount point: what lies under one would be hidden later."""
    loop = make("a", "b")
    (loop.root / "a" / "failed").rmdir()
    for name in ("a", "b"):
        loop.drop(name, "bad.jsonl", f'{{"{name}": 1}}\n')
        loop.drop(name, "good.jsonl")
    loop.look().run(600)
    assert (loop.done("b"), loop.failed("b")) == (["good.jsonl"], ["bad.jsonl"])
    assert not (loop.root / "a" / "failed").exists()
    (loop.root / "a" / "failed").mkdir()
    loop.run(300)
    assert (loop.done("a"), loop.failed("a")) == (["good.jsonl"], ["bad.jsonl"])
    assert len(loop.said("storage.held")) == len(loop.said("storage.resumed")) == 1


# Inboxes that go and come.


def test_an_inbox_that_is_deleted_and_made_anew(make: Make) -> None:
    """One event for each; what is dropped into the new one is taken."""
    loop = make()
    shutil.rmtree(loop.inbox_of("a"))
    loop.run(300)
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["missing"]
    assert not loop.inbox_of("a").exists()
    loop.drop("a", "x.jsonl")
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("inbox.lost")) == len(loop.said("inbox.found")) == 1


def test_an_inbox_that_is_replaced_by_a_rename(make: Make) -> None:
    """Between two looks, never missing: it is said all the same, since events of the old one ended."""
    loop = make()
    loop.inbox_of("a").rename(loop.root / "a" / "old")
    loop.inbox_of("a").mkdir()
    loop.drop("a", "x.jsonl")
    loop.run(40)
    assert loop.done("a") == ["x.jsonl"]
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["replaced"]
    assert len(loop.said("inbox.found")) == 1


def test_a_file_in_place_of_the_inbox_is_a_lost_inbox(make: Make) -> None:
    """It is left alone, and looked at until a folder is there again."""
    loop = make()
    loop.inbox_of("a").rmdir()
    loop.inbox_of("a").write_text("I am no folder")
    loop.look().run(60)
    loop.inbox_of("a").unlink()
    loop.inbox_of("a").mkdir()
    loop.run(60)
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["no_folder"]
    assert len(loop.said("inbox.found")) == 1


@needs_root
def test_an_inbox_whose_filesystem_is_unmounted_and_mounted_again(
    make: Make, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The empty mount point is another folder; the claims on the filesystem are adopted when it is back."""
    image = tmp_path / "image"
    inbox = tmp_path / "a" / "inbox"
    inbox.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, inbox], check=True)
    try:
        loop = make()
        loop.service.script.append(storing_then_resetting())
        loop.service.listing = Listing(lag_s=20)
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        assert loop.claims("a") == ["x.jsonl"]
        subprocess.run(["umount", "-l", inbox], check=True)
        loop.run(120)
        assert loop.posts() == 1
        subprocess.run(["mount", "-o", "loop", image, inbox], check=True)
        loop.run(400)
        assert loop.done("a") == ["x.jsonl"]
        assert loop.posts() == 1
        loop.close()
    finally:
        subprocess.run(["umount", "-l", inbox], check=True)


def test_an_upload_under_way_while_its_inbox_is_moved_away_ends_when_it_is_back(make: Make) -> None:
    """The answer is in the journal; the claim comes back with the inbox, and then the file is filed away."""
    loop = make()
    away = loop.root / "away"
    loop.on_say("upload.accepted", lambda: loop.inbox_of("a").rename(away))
    loop.drop("a", "x.jsonl")
    loop.look().run(100)
    assert len(loop.said("inbox.lost")) == 1
    assert loop.said("file.done") == []
    away.rename(loop.inbox_of("a"))
    loop.run(100)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("inbox.found")) == 1


def test_an_inbox_that_was_never_there_is_made_and_a_known_one_is_not(make: Make) -> None:
    """Only the first start ever makes folders; later a missing one may be a mount that is late."""
    loop = make()
    assert sorted(Path(e["path"]).name for e in loop.said("folder.created")) == ["done", "failed", "inbox"]
    shutil.rmtree(loop.inbox_of("a"))
    loop.restart().run(30)
    assert not loop.inbox_of("a").exists()
    assert len(loop.said("inbox.lost")) == 1


@pytest.mark.parametrize("kind", ["file", "open"])
def test_an_unsafe_folder_of_claims_stops_only_its_inbox_until_it_is_mended(make: Make, kind: str) -> None:
    """It is said once with what to do; the other inbox works on, and this one does when it is mended."""
    loop = make("a", "b", started=False)
    loop.inbox_of("a").mkdir()
    ours = loop.inbox_of("a") / ".sfwatch"
    if kind == "file":
        ours.write_text("")
    else:
        ours.mkdir(mode=0o777)
        ours.chmod(0o777)
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.drop("b", "x.jsonl")
    loop.look().run(60)
    assert loop.done("b") == ["x.jsonl"]
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["unsafe"]
    if kind == "file":
        ours.unlink()
    else:
        ours.chmod(0o700)
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("inbox.found")) == 1


@needs_root
def test_an_inbox_that_cannot_be_written_to_costs_one_try_for_all_its_files(make: Make) -> None:
    """A hundred files in a read-only inbox: it is tried now and then, not once for each of them."""
    loop = make("a", "b")
    inbox = loop.inbox_of("a")
    for i in range(100):
        loop.drop("a", f"{i}.jsonl")
    subprocess.run(["mount", "--bind", inbox, inbox], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", inbox], check=True)
    try:
        loop.drop("b", "x.jsonl")
        loop.look().run(60)
        assert loop.done("b") == ["x.jsonl"]
        assert len(loop.said("file.waiting")) + len(loop.said("storage.held")) == 1
    finally:
        subprocess.run(["umount", inbox], check=True)
    loop.run(400)
    assert len(loop.done("a")) == 100

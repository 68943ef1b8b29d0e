"""The loop: files of all kinds through a whole daemon, and what it does when something is in the way."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loop import KEY, Loop, digest, line
from servers import closed_port

from sfwatch import arrive, claim, retry
from sfwatch.journal import Delivery, State
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


def test_only_the_first_look_of_the_start_believes_a_files_own_times(make: Make) -> None:
    """A file that comes just after the start has to rest as observed: a clock that jumps makes nothing old."""
    loop = make(started=False)
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.look()
    loop.started += 3600
    loop.run(1.9)
    assert loop.done("a") == []
    loop.look().run(1)
    assert [e["settled_by"] for e in loop.said("file.settled")] == ["lease"]


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
    loop = make("a", "b", uploads=Uploads(concurrency=3))
    for i in range(12):
        loop.drop("a", f"{i:02}.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    assert len(loop.pool.held) == 2
    loop.drop("b", "x.jsonl")
    loop.look().run(3)
    assert len(loop.pool.held) == 3
    loop.pool.release(3)
    loop.settle_down()
    assert loop.done("b") == ["x.jsonl"]
    while loop.pool.held:
        loop.pool.release()
        loop.settle_down()
    assert loop.pool.most == 3
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
    assert loop.said("target.held")[0]["detail"].endswith(f"; a new key in {tmp_path / 'key'} counts at once")
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


def test_one_look_up_serves_all_unknown_files(make: Make) -> None:
    """They wait together, and each gets its own id."""
    loop = make(uploads=Uploads(concurrency=4))
    for name in ("x.jsonl", "y.jsonl"):
        loop.service.script.append(replace(storing_then_resetting(), filename=name))
        loop.drop("a", name)
    loop.service.listing = Listing(lag_s=20)
    loop.look().run(20)
    looks = {loop.entry("a", name).looks for name in ("x.jsonl", "y.jsonl")}
    assert looks == {loop.listings()}
    loop.run(40)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("upload.recovered")) == 2


def test_an_absent_file_is_sent_again_after_the_window_and_two_look_ups(make: Make) -> None:
    """A listing that can't be read is none of them, however late it is."""
    loop = make()
    loop.drop("a", "good.jsonl")
    loop.look().run(3)
    loop.service.script.append(Behaviour(stores=False, end=End.RESET))
    loop.service.listing = Listing(answer=reply(200, "no listing"))
    loop.drop("a", "x.jsonl")
    loop.look().run(100)
    loop.service.listing = Listing()
    entry = loop.entry("a", "x.jsonl")
    loop.run(entry.due_at - loop.now)
    assert (entry.readings, loop.posts()) == (1, 2)
    loop.run(entry.due_at - loop.now)
    assert loop.done("a") == ["good.jsonl", "x.jsonl"]
    assert (entry.readings, loop.posts()) == (2, 3)
    assert len(loop.said("upload.resent")) == 1


def undecided(loop: Loop) -> None:
    """A file is sent, its answer is lost, and there is no listing that could tell."""
    loop.service.listing = Listing(answer=reply(404, "no such thing"))
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(100)
    assert loop.claims("a") == ["x.jsonl"]
    assert len(loop.said("upload.undecided")) == 1


def test_an_undecided_file_is_looked_up_again_after_an_acceptance(make: Make) -> None:
    """That may be what the listing had to show; else it is looked up every `longest_retry`."""
    loop = make(uploads=Uploads(on_unknown=OnUnknown.HOLD, longest_retry_s=3600.0))
    undecided(loop)
    loop.service.listing = Listing()
    loop.run(1000)
    assert loop.claims("a") == ["x.jsonl"]
    loop.drop("a", "y.jsonl")
    loop.look().run(3)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert len(loop.said("upload.recovered")) == 1


def test_a_request_to_resend_an_undecided_file_is_used_up_once(make: Make) -> None:
    """Also where the process ends before it can forget the request: the row knows it."""
    loop = make(uploads=Uploads(on_unknown=OnUnknown.HOLD))
    undecided(loop)
    state_dir = loop.daemon.config.state_dir
    retry.request(state_dir, "a", "x.jsonl")
    (request,) = retry.requests(state_dir)
    text = request.file.read_bytes()
    loop.service.script.append(storing_then_resetting())
    loop.look().run(100)
    assert (loop.posts(), retry.requests(state_dir)) == (2, [])
    row = loop.row("a", "x.jsonl")
    assert row is not None
    assert (row.state, row.resend_request) == (State.UNKNOWN, request.id)
    request.file.write_bytes(text)
    loop.restart().run(1000)
    assert (loop.posts(), retry.requests(state_dir)) == (2, [])
    retry.request(state_dir, "a", "x.jsonl")
    loop.look().run(100)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 3
    loop.twice = 2


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
    loop.look().run(10)
    loop.drop("a", "later.jsonl")
    loop.look().run(1000)
    assert loop.claims("a") == ["x.jsonl"]
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


# What is not taken, and why.


def test_what_is_no_regular_file_is_said_once_and_never_opened(make: Make, tmp_path: Path) -> None:
    """A symlink, a FIFO, a folder and a socket: one event each; a writer of the FIFO finds no reader."""
    loop = make()
    inbox = loop.inbox_of("a")
    secret = tmp_path / "secret"
    secret.write_text(line(1))
    (inbox / "link.jsonl").symlink_to(secret)
    os.mkfifo(inbox / "fifo.jsonl")
    (inbox / "folder.jsonl").mkdir()
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(str(inbox / "socket.jsonl"))
        loop.look().run(300)
    with pytest.raises(OSError, match="No such device or address"):  # ENXIO: no reader has it open
        os.open(inbox / "fifo.jsonl", os.O_WRONLY | os.O_NONBLOCK)
    assert {e["file"]: e["reason"] for e in loop.said("file.ignored")} == {
        "link.jsonl": "symlink",
        "fifo.jsonl": "fifo",
        "folder.jsonl": "folder",
        "socket.jsonl": "socket",
    }
    assert len(loop.said("file.ignored")) == 4
    assert loop.posts() == 0


def test_a_symlink_that_is_replaced_by_a_file_is_taken_and_one_that_goes_is_nobodys_loss(make: Make) -> None:
    """What was ignored has no terminal event of its own."""
    loop = make()
    inbox = loop.inbox_of("a")
    for name in ("x.jsonl", "y.jsonl"):
        (inbox / name).symlink_to("/nowhere")
    loop.look()
    (inbox / "x.jsonl").unlink()
    (inbox / "y.jsonl").unlink()
    loop.drop("a", "x.jsonl")
    loop.ring("a", "y.jsonl").look().run(5)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.said("file.vanished") == []


def test_other_names_are_counted_when_their_number_changes(make: Make) -> None:
    """One event for each change, none for each name."""
    loop = make()
    for name in ("notes.txt", ".hidden.jsonl", "x.jsonl.part"):
        (loop.inbox_of("a") / name).write_text("")
    loop.look().look().run(100)
    assert [e["others"] for e in loop.said("inbox.others")] == [3]


def test_a_file_that_is_taken_away_before_its_turn_has_vanished(make: Make) -> None:
    """Said once, whether it was settling or waiting for its turn."""
    loop = make()
    loop.service.always = BALANCE
    loop.drop("a", "settling.jsonl")
    loop.look()
    loop.withdraw("a", "settling.jsonl")
    for name in ("first.jsonl", "waiting.jsonl"):
        loop.drop("a", name)
    loop.look().run(30)
    for name in ("first.jsonl", "waiting.jsonl"):
        loop.withdraw("a", name)
    loop.look().run(100)
    assert len(loop.said("file.vanished")) == 3


def test_a_name_that_was_only_rung_for_was_no_file(make: Make) -> None:
    """A file that was renamed on at once, as temporary ones are: nothing is said of its first name."""
    loop = make()
    loop.ring("a", "was-here.jsonl").run(30)
    assert loop.said("file.vanished") == loop.said("file.seen") == []


def test_an_empty_file_waits_and_is_taken_once_it_is_filled(make: Make) -> None:
    """It is said once, after a minute; never uploaded empty."""
    loop = make()
    path = loop.drop("a", "x.jsonl", "")
    loop.look().run(300)
    assert [e["reason"] for e in loop.said("file.waiting")] == ["empty"]
    del loop.dropped[digest(path)]
    path.write_text(line(1))
    loop.look().run(70)
    assert loop.done("a") == ["x.jsonl"]


def test_a_file_that_is_open_for_writing_waits_and_is_stuck_after_ten_minutes(make: Make) -> None:
    """Each is said once; when the writer closes, it is taken."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    with path.open("a"):
        loop.look().run(1000)
        assert loop.posts() == 0
        assert [e["reason"] for e in loop.said("file.waiting")] == ["being_written"]
        assert len(loop.said("file.stuck")) == 1
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]


def test_our_own_giving_back_is_no_arrival_by_rename(make: Make) -> None:
    """The ring of a file that goes back neither settles it at once nor makes a second file of it."""
    loop = make()
    loop.service.script.append(BUSY)
    loop.on_say("upload.started", lambda: loop.daemon.mailbox.put(arrive.Rang("a", "x.jsonl", moved_in=True)))
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    loop.ring("a", "x.jsonl", moved_in=True).run(30)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("file.settled")) == 1


def test_a_file_that_changes_after_it_settled_goes_back_and_settles_anew(make: Make) -> None:
    """Nothing of it is sent before; what is sent in the end is what lies in done."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.pool.holds = True
    path = loop.drop("a", "x.jsonl")
    loop.look().run(3)
    del loop.dropped[digest(path)]
    path.write_text(line(1) + line(2))
    loop.pool.holds = False
    loop.pool.release()
    loop.run(5)
    assert loop.done("a") == ["x.jsonl"]
    assert len(loop.said("file.changed")) == 1


# Starting again.


def lost_answer(loop: Loop) -> Delivery:
    """A file whose answer is lost: claimed, its row in the journal."""
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = Listing(lag_s=10)
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    row = loop.row("a", "x.jsonl")
    assert row is not None
    assert row.state is State.UNKNOWN
    return row


@pytest.mark.parametrize("state", [State.SENDING, State.UNKNOWN])
def test_an_attempt_that_a_crash_cut_off_is_looked_up_and_not_sent_again(make: Make, state: State) -> None:
    """Whatever had become of it: what the listing shows is adopted."""
    loop = make()
    row = lost_answer(loop)
    loop.daemon.journal.save(replace(row, state=state))
    loop.restart().run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert len(loop.said("upload.recovered")) == 1


def test_an_attempt_that_never_arrived_is_sent_again_after_a_crash(make: Make) -> None:
    """When the window for looking is over, and not before."""
    loop = make()
    lost_answer(loop)
    loop.service.stored.clear()
    loop.restart().run(29)
    assert loop.posts() == 1
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 2


@pytest.mark.parametrize(("content", "folder"), [(None, "done"), ("{}\n", "failed")])
def test_an_accepted_or_refused_file_is_only_filed_away_after_a_crash(
    make: Make, content: str | None, folder: str
) -> None:
    """The answer was durable before: nothing is sent again, nothing is checked again."""
    loop = make()
    (loop.root / "a" / folder).rmdir()
    loop.drop("a", "x.jsonl", content)
    if content is None:
        loop.on_say("upload.accepted", lambda: None)
        (loop.root / "a" / folder).mkdir()
        loop.on_say("upload.accepted", (loop.root / "a" / folder).rmdir)
    else:
        (loop.root / "a" / folder).mkdir()
        loop.on_say("file.settled", lambda: None)
        loop.daemon.config.inboxes[0].failed.rmdir()
        loop.service.always = BUSY
    loop.look().run(3)
    posts = loop.posts()
    loop.die()
    (loop.root / "a" / folder).mkdir(exist_ok=True)
    loop.start().run(5)
    assert [p.name for p in (loop.root / "a" / folder).glob("*.jsonl")] == ["x.jsonl"]
    assert loop.posts() == posts


def own_folder(loop: Loop) -> str:
    """Our claims folder, as it is made for the first file that is claimed."""
    journal, state_dir = loop.daemon.journal, str(loop.daemon.config.state_dir)
    owner = claim.Owner(journal.machine, state_dir, journal.id)
    return claim.own_folder(loop.inbox_of("a"), journal.instance, owner)


def test_a_claim_without_a_row_was_not_sent(make: Make) -> None:
    """A crash between claim and first byte: after one look-up it settles again, and goes out once."""
    loop = make()
    loop.drop("a", "x.jsonl")
    claim.take(loop.inbox_of("a"), own_folder(loop), "x.jsonl")
    loop.restart().run(5)
    assert loop.done("a") == ["x.jsonl"]
    assert (loop.listings(), loop.posts()) == (1, 1)


def test_a_power_cut_that_undid_the_claim_loses_and_doubles_nothing(make: Make) -> None:
    """The row says sending, the file lies in the inbox: it is looked up, and its bytes are not sent twice."""
    loop = make()
    lost_answer(loop)
    claim.give_back(loop.inbox_of("a"), loop.claims_folder("a"), "x.jsonl")
    loop.restart().run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1


def test_a_crash_after_the_move_repeats_the_event_and_says_so(make: Make) -> None:
    """The row was not finished: the end of the file is said again, as repeated."""
    loop = make()
    loop.drop("a", "x.jsonl")
    rows: list[Delivery | None] = []
    loop.on_say("file.done", lambda: rows.append(loop.row("a", "x.jsonl")))
    loop.look().run(3)
    loop.on_say("file.done", lambda: None)
    assert rows[0] is not None
    loop.daemon.journal.save(rows[0])
    loop.restart().run(3)
    assert [e.get("repeated") for e in loop.said("file.done")] == [None, True]
    assert loop.posts() == 1


def test_the_claims_of_a_dead_instance_are_adopted_as_unknown(make: Make) -> None:
    """They may have been sent: they are looked up first, and sent only when the window is over."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    theirs = loop.inbox_of("a") / ".sfwatch" / "0123456789abcdef-0a1b2c"
    theirs.mkdir(parents=True, mode=0o700)
    theirs.parent.chmod(0o700)
    path.rename(theirs / "x.jsonl")
    loop.restart().run(5)
    assert loop.posts() == 0
    assert loop.listings() > 0
    loop.run(40)
    assert loop.done("a") == ["x.jsonl"]


def test_the_claims_of_a_living_instance_are_left_alone_and_said_once(make: Make) -> None:
    """Its lock is held: its files are its own."""
    loop = make()
    theirs = loop.inbox_of("a") / ".sfwatch" / "0123456789abcdef-0a1b2c"
    theirs.mkdir(parents=True, mode=0o700)
    theirs.parent.chmod(0o700)
    (theirs / "x.jsonl").write_text(line(1))
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        loop.restart().run(600)
    finally:
        os.close(lock)
    assert (theirs / "x.jsonl").exists()
    assert [e["waiting"] for e in loop.said("claim.foreign")] == [1]
    (theirs / "x.jsonl").unlink()


def test_a_damaged_journal_makes_every_claim_unknown(make: Make) -> None:
    """What it knew is lost, so each claim may have been sent: the listing tells, and no file is sent twice."""
    loop = make()
    lost_answer(loop)
    loop.die()
    for path in (loop.root / "state").glob("journal.sqlite3*"):
        path.write_bytes(b"This is not a database, and it is long enough to show that." * 100)
    loop.start().run(60)
    assert len(loop.said("journal.set_aside")) == 1
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1


def test_rows_of_an_inbox_that_is_configured_no_more_are_told_once(make: Make) -> None:
    """They stay in the journal, and the other inbox works on."""
    loop = make("a", "b")
    lost_answer(loop)
    loop.names = ("b",)
    loop.restart()
    loop.drop("b", "y.jsonl")
    loop.look().run(30)
    assert [e["waiting"] for e in loop.said("journal.orphaned")] == [1]
    assert loop.done("b") == ["y.jsonl"]
    loop.names = ("a", "b")
    loop.restart().run(60)
    assert loop.done("a") == ["x.jsonl"]


def test_adopted_claims_are_locked_while_they_wait(make: Make) -> None:
    """Another instance that starts now must not take them for those of a dead one."""
    loop = make()
    lost_answer(loop)
    ours = claim.claims_folder(loop.inbox_of("a"), loop.claims_folder("a"))
    loop.die()
    loop.pool.holds = True
    loop.start()
    theirs = os.open(ours, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
    loop.pool.holds = False
    loop.pool.release()
    loop.run(60)
    fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing is claimed any more
    os.close(theirs)


# Stopping, and bugs.


def test_a_stop_lets_what_is_under_way_end_and_takes_nothing_new(make: Make) -> None:
    """The file of a worker is done, the others stay in their inbox."""
    loop = make(uploads=Uploads(concurrency=1))
    for name in ("x.jsonl", "y.jsonl"):
        loop.drop("a", name)
    loop.pool.holds = True
    loop.look().run(3)
    loop.signal(signal.SIGTERM)
    assert not loop.daemon.over()
    loop.pool.release()
    loop.settle_down()
    assert loop.daemon.over()
    assert (loop.done("a"), loop.waiting_in("a")) == (["x.jsonl"], ["y.jsonl"])


def test_after_the_grace_uploads_are_broken_off_and_their_files_go_back(make: Make) -> None:
    """What was not sent whole is back in the inbox under its name."""
    loop = make(config={"stop_grace_s": 30.0})
    loop.drop("a", "x.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    loop.signal(signal.SIGTERM).run(31)
    assert loop.aborted
    loop.pool.release()
    loop.settle_down()
    assert loop.daemon.over()
    assert loop.waiting_in("a") == ["x.jsonl"]
    assert loop.claims("a") == []


def test_a_second_signal_leaves_at_once(make: Make) -> None:
    """Safe, too: the next start goes on with what lies claimed."""
    loop = make()
    loop.drop("a", "x.jsonl")
    loop.pool.holds = True
    loop.look().run(3)
    loop.signal(signal.SIGTERM).signal(signal.SIGTERM)
    assert loop.daemon.over()
    loop.pool.holds = False
    loop.restart().run(10)
    assert loop.done("a") == ["x.jsonl"]


def test_a_probe_under_way_is_known_at_the_end(make: Make) -> None:
    """Python waits for pool threads at exit: a listing that hangs must not delay the end by minutes."""
    loop = make()
    loop.service.always = BALANCE
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    loop.pool.holds = True
    loop.run(10)
    assert loop.daemon.probing == 1
    loop.pool.release()
    loop.settle_down()
    assert loop.daemon.probing == 0


def test_a_bug_in_a_worker_is_said_with_its_traceback_and_the_others_go_on(make: Make) -> None:
    """One file meets it: critical, no secret in it; the file stays, and is tried again much later."""
    loop = make()

    def poison() -> None:
        if loop.lines[-1]["file"] == "x.jsonl":
            raise ZeroDivisionError("poisoned")

    loop.on_say("upload.started", poison)
    loop.drop("a", "x.jsonl")
    loop.drop("a", "y.jsonl")
    loop.look().run(10)
    assert loop.done("a") == ["y.jsonl"]
    (said,) = loop.said("internal.error")
    assert said["level"] == "critical"
    assert "ZeroDivisionError" in said["traceback"]
    assert KEY not in said["traceback"]
    loop.on_say("upload.started", lambda: None)
    loop.run(400)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]


def test_a_bug_in_the_midst_of_an_attempt_does_not_undo_that_it_began(make: Make) -> None:
    """What the journal says by then counts: that attempt may have been stored, and is one of `resend_limit`."""
    loop = make(uploads=Uploads(resend_limit=1))
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.service.script.append(storing_then_resetting())

    def poison() -> None:
        if loop.lines[-1]["attempt"] == 2:
            raise ZeroDivisionError("poisoned")

    loop.on_say("upload.started", poison)
    loop.drop("a", "x.jsonl")
    loop.look().run(1000)
    assert len(loop.said("internal.error")) == 1
    loop.on_say("upload.started", lambda: None)
    loop.run(1000)
    assert len(loop.said("upload.started")) == 2
    assert loop.said("upload.undecided")


def test_many_waiting_files_cost_no_work_while_they_wait(make: Make) -> None:
    """Of a thousand files behind a hold none is touched until it ends, however often the loop turns."""
    loop = make()
    loop.service.always = BALANCE
    for i in range(500):
        loop.drop("a", f"{i:04}.jsonl")
    loop.look().run(120)
    assert loop.posts() < 14
    assert len(loop.said("upload.started")) == loop.posts()
    assert len(loop.daemon.table) == 500


# Whatever happens.


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_service_and_the_clock_do_no_file_is_lost_doubled_or_told_twice(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A walk through drops, faults, crashes and time; when the service is well again every file is done."""
    odd = [
        BUSY,
        BALANCE,
        answering(429, {"code": 50603, "message": "slow"}, {"Retry-After": "7"}),
        answering(500, "oops"),
        storing_then_resetting(),
        Behaviour(stores=False, end=End.RESET),
        Behaviour(stores=False, end=End.RESET, reads=10),
        Behaviour(),
    ]
    with StandIn() as service:
        loop = Loop(
            tmp_path_factory.mktemp("walk"), service, ("a", "b"), uploads=Uploads(poison_after=0)
        ).start()
        for step in range(data.draw(st.integers(1, 12))):
            match data.draw(st.sampled_from(["drop", "fault", "time", "crash", "look"])):
                case "drop":
                    loop.drop(data.draw(st.sampled_from("ab")), f"{data.draw(st.integers(0, 3))}-{step}.jsonl")
                case "fault":
                    service.script.append(data.draw(st.sampled_from(odd)))
                case "time":
                    loop.run(data.draw(st.sampled_from([0.5, 3.0, 40.0])))
                case "crash":
                    loop.restart()
                case _:
                    loop.look()
        service.script.clear()
        loop.look().run(1200)
        if loop.said("upload.undecided"):  # an acceptance after it is what the listing has to show
            loop.drop("a", "late.jsonl")
            loop.look().run(600)
        assert loop.waiting_in("a") == loop.waiting_in("b") == []
        assert len(loop.done("a")) + len(loop.done("b")) == sum(loop.drops.values())
        loop.close()

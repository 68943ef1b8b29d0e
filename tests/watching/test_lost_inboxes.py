"""Inboxes that are lost and found, by the clock of the loop: nothing has vanished, and each is said once."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from loop import Loop
from world import needs_root, tmpfs

from sfwatch import arrive
from sfwatch.standin import Behaviour, End, storing_then_resetting

Make = Callable[..., Loop]


@needs_root
def test_a_file_has_not_vanished_that_is_taken_just_as_its_inbox_is_covered(make: Make) -> None:
    """A worker finds the bare mount point before the main thread does: the file waits, and is done later."""
    loop = make()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    with tmpfs(loop.inbox_of("a"), "16m"):
        loop.pool.release()
        loop.pool.holds = False
        loop.run(60)
        assert loop.said("file.vanished") == []
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["replaced", "replaced"]


def _forget(loop: Loop, name: str) -> None:
    """Somebody removes the folder of claims by hand, with this file in it."""
    shutil.rmtree(loop.inbox_of("a") / ".sfwatch")
    loop.dropped = {sha256: key for sha256, key in loop.dropped.items() if key != ("a", name)}


def test_a_claim_that_was_removed_by_hand_while_its_answer_was_lost_still_gets_its_id(make: Make) -> None:
    """The inbox is the same as ever, so the file itself is gone: its upload is found and recorded."""
    loop = make()
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    assert loop.claims("a") == ["x.jsonl"]
    _forget(loop, "x.jsonl")
    loop.run(300)
    (done,) = loop.said("file.done")
    assert "taken away" in done["detail"]
    assert Path(done["sidecar"]).exists()


def test_a_claim_that_was_removed_by_hand_and_never_arrived_has_vanished(make: Make) -> None:
    """Nothing is left to send again; it ends with that."""
    loop = make()
    loop.service.script.append(Behaviour(stores=False, end=End.RESET))
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    _forget(loop, "x.jsonl")
    loop.run(300)
    assert len(loop.said("file.vanished")) == 1
    assert loop.posts() == 1
    assert loop.row("a", "x.jsonl") is None


@needs_root
def test_a_start_with_another_disk_in_the_inboxs_place_gives_nothing_up(make: Make) -> None:
    """The claim is not there, and neither is its disk: the file waits and says so once, and goes on later."""
    loop = make()
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", "x.jsonl")
    loop.look().run(2.1)
    with tmpfs(loop.inbox_of("a"), "32m"):
        loop.restart().run(300)
        assert [e["reason"] for e in loop.said("file.waiting")] == ["inbox_away"]
        assert loop.said("file.done") == []
    loop.run(300)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1


def test_an_inbox_that_is_lost_for_one_reason_and_then_another_is_lost_once(make: Make) -> None:
    """Missing, then no folder, then back: one event when it begins and one when it ends."""
    loop = make()
    loop.inbox_of("a").rmdir()
    loop.look().run(30)
    loop.inbox_of("a").write_text("I am no folder")
    loop.run(30)
    loop.inbox_of("a").unlink()
    loop.inbox_of("a").mkdir()
    loop.drop("a", "x.jsonl")
    loop.run(30)
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["missing"]
    assert len(loop.said("inbox.found")) == 1
    assert loop.done("a") == ["x.jsonl"]


def test_a_doorbell_that_breaks_is_said_once_and_everything_is_looked_at(make: Make) -> None:
    """A bug in its thread costs rings: the next look finds what did not ring, and nothing is started anew."""
    loop = make(names=("a", "b"))
    loop.run(10)
    loop.drop("a", "x.jsonl")
    loop.drop("b", "y.jsonl")
    loop.daemon.mailbox.put(arrive.Broken(ZeroDivisionError("a bug")))
    loop.run(3)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.done("b") == ["y.jsonl"]
    (error,) = loop.said("internal.error")
    assert "ZeroDivisionError" in error["detail"]
    assert [e["inbox"] for e in loop.said("inbox.overflowed")] == ["a", "b"]


def test_a_kernel_that_will_not_be_read_is_no_bug(make: Make) -> None:
    """It is said as lost events, which it is, and everything is looked at."""
    loop = make()
    loop.drop("a", "x.jsonl")
    loop.daemon.mailbox.put(arrive.Broken(OSError(errno.EIO, "Input/output error")))
    loop.run(3)
    assert loop.done("a") == ["x.jsonl"]
    assert not loop.said("internal.error")
    assert [e["inbox"] for e in loop.said("inbox.overflowed")] == ["a"]


def test_a_doorbell_that_breaks_again_and_again_does_not_make_the_loop_spin(make: Make) -> None:
    """Rings ask for one look a second at most; lost events are said once until then."""
    loop = make()
    looks = set()
    for _ in range(100):
        loop.daemon.mailbox.put(arrive.Overflowed("a"))
        loop.daemon.mailbox.put(arrive.WatchEnded("a", "the thread that reads it failed"))
        loop.run(0.1)
        looks.add(loop.daemon.inboxes.watched["a"].looked_at)
    assert len(looks) in range(9, 12)
    assert len(loop.said("inbox.overflowed")) in range(9, 13)

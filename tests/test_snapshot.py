"""What the daemon publishes of itself: in every state, seldom, and only what has changed."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, Loop

from sfwatch import snapshot, status
from sfwatch.standin import StandIn, answering
from sfwatch.status import Status

BUSY = answering(503, {"code": 50505, "message": "busy"})
BALANCE = answering(402, {"code": 30001, "message": "Sorry, your account balance is insufficient"})
Make = Callable[..., Loop]


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Make]:
    made = []
    with StandIn() as service:

        def make(*names: str, **changes: Any) -> Loop:
            made.append(Loop(tmp_path, service, names or ("a",), **changes))
            return made[-1]

        yield make
        for loop in made:
            loop.close()


def path(loop: Loop) -> Path:
    return loop.root / "state" / "status.json"


def published(loop: Loop) -> Status:
    """What somebody reads a second later."""
    loop.run(snapshot.PAUSE_S)
    assert KEY not in path(loop).read_text()
    return status.read(path(loop))


def only(loop: Loop) -> status.Waiting:
    (group,) = published(loop).waiting
    return group


class TestWhatItSays:
    def test_an_idle_daemon(self, make: Make) -> None:
        """Its process, its inboxes and how they are watched; nothing waits, all is well."""
        loop = make("a", "b").start()
        told = published(loop)
        assert (told.state, told.pid, status.is_running(told)) == ("running", os.getpid(), True)
        assert [(inbox.name, inbox.mode, inbox.trusted) for inbox in told.inboxes] == [
            ("a", "inotify", True),
            ("b", "inotify", True),
        ]
        assert told.started_at.timestamp() == pytest.approx(loop.wall() - 1, abs=0.01)
        assert (told.waiting, told.under_way, told.last_done) == ((), (), None)
        assert status.healthy(told)

    def test_a_file_that_is_done(self, make: Make) -> None:
        """It counts, with its bytes, and is the last one that was done."""
        loop = make().start()
        size = loop.drop("a", "x.jsonl").stat().st_size
        loop.look().run(3)
        told = published(loop)
        assert (told.totals.done, told.totals.bytes) == (1, size)
        assert told.last_done is not None
        assert (told.last_done.inbox, told.last_done.file) == ("a", "x.jsonl")
        assert told.waiting == ()

    def test_a_file_that_failed(self, make: Make) -> None:
        """It counts by its reason."""
        loop = make().start()
        loop.drop("a", "x.jsonl", "no json\n")
        loop.look().run(31)
        told = published(loop)
        assert (told.totals.failed, told.totals.reasons) == (1, {"not_json": 1})
        assert told.last_failed is not None
        assert told.last_failed.file == "x.jsonl"

    def test_a_file_under_way(self, make: Make) -> None:
        """Its step, and while it is sent, how far it is and how fast."""
        loop = make().start()
        loop.pool.holds = True
        size = loop.drop("a", "x.jsonl").stat().st_size
        loop.look().run(3)
        (file,) = published(loop).under_way
        assert (file.inbox, file.file, file.step, file.size, file.attempt) == (
            "a",
            "x.jsonl",
            "checking",
            size,
            1,
        )
        assert published(loop).inboxes[0].under_way == 1
        progress = loop.daemon.under_way["a", "x.jsonl"].progress
        progress.start(loop.now)
        loop.run(9)
        progress.sent, progress.moved_at = 50, loop.now
        (file,) = published(loop).under_way
        assert (file.step, file.sent, file.bytes_per_s) == ("uploading", 50, 5)
        progress.end()
        assert published(loop).under_way[0].step == "filing"
        loop.pool.release()

    def test_files_that_wait(self, make: Make) -> None:
        """In groups by reason, with age, size and name."""
        loop = make().start()
        loop.drop("a", "settles.jsonl")
        loop.drop("a", "empty.jsonl", "")
        with loop.drop("a", "busy.jsonl", "{").open("a"):
            loop.look().run(1.5)
            told = published(loop)
        groups = {group.reason: [file.file for file in group.oldest] for group in told.waiting}
        assert groups["empty"] == ["empty.jsonl"]
        assert groups["being_written"] == ["busy.jsonl"]
        assert told.inboxes[0].waiting == 2
        assert status.healthy(told)
        loop.withdraw("a", "empty.jsonl")
        loop.withdraw("a", "busy.jsonl")
        loop.look()

    def test_a_held_target(self, make: Make) -> None:
        """Reason, since when, and when it is asked next; its files wait as held."""
        loop = make()
        loop.service.always = BALANCE
        loop.start()
        loop.drop("a", "x.jsonl")
        loop.drop("a", "y.jsonl")
        loop.look().run(3)
        told = published(loop)
        (target,) = told.targets
        assert (target.reason, target.inboxes) == ("balance", ("a",))
        assert target.since is not None
        assert target.next_probe_at is not None
        assert target.next_probe_at > told.published_at
        assert [(group.reason, group.files) for group in told.waiting] == [("held", 2)]
        assert not status.healthy(told)

    def test_a_file_that_is_tried_again(self, make: Make) -> None:
        """Its attempts, what the last one ended with, and when the next is due."""
        loop = make()
        loop.service.script.extend([BUSY, BUSY])
        loop.start()
        loop.drop("a", "x.jsonl")
        loop.look().run(2)
        group = only(loop)
        assert (group.reason, group.files) == ("retry", 1)
        (file,) = group.oldest
        assert file.attempts >= 1
        assert file.detail is not None
        assert "overloaded" in file.detail
        assert file.retry_at is not None
        loop.run(30)

    def test_a_lost_inbox(self, make: Make) -> None:
        """Why it is not there, as in the event."""
        loop = make().start()
        loop.inbox_of("a").rmdir()
        loop.run(31)
        (inbox,) = published(loop).inboxes
        assert inbox.lost is not None
        assert inbox.lost.reason == "missing"
        assert not status.healthy(published(loop))

    def test_a_folder_that_takes_nothing(self, make: Make) -> None:
        """It is named, and the files that need it are held."""
        loop = make().start()
        (loop.root / "a" / "done").rmdir()
        (loop.root / "a" / "done").touch()
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        told = published(loop)
        (folder,) = told.folders
        assert (folder.path, folder.reason) == (str(loop.root / "a" / "done"), "missing")
        assert [group.reason for group in told.waiting] == ["held"]
        (loop.root / "a" / "done").unlink()
        (loop.root / "a" / "done").mkdir()
        loop.run(30)

    def test_names_steer_no_terminal(self, make: Make) -> None:
        """What is no printable UTF-8 is escaped."""
        loop = make().start()
        name = os.fsdecode(b"\xff\x1b[2J.jsonl")
        loop.drop("a", name, "")
        loop.look().run(1)
        assert only(loop).oldest[0].file == "\\xff\\x1b[2J.jsonl"

    def test_many_files(self, make: Make) -> None:
        """All are counted, only the oldest are named."""
        loop = make().start()
        for number in range(50):
            loop.drop("a", f"{number:02}.jsonl")
        loop.look()
        group = only(loop)
        assert (group.files, len(group.oldest)) == (50, status.NAMED)
        loop.run(3)

    def test_an_orderly_end(self, make: Make) -> None:
        """The last word is that it has ended."""
        loop = make().start()
        loop.signal(signal.SIGTERM)
        loop.daemon.run()
        assert status.read(path(loop)).state == "stopped"


class TestHowOften:
    def test_an_idle_daemon_writes_nothing(self, make: Make) -> None:
        """However long nothing happens, and however often it looks."""
        loop = make().start()
        loop.run(2)
        before = path(loop).stat()
        loop.run(3600)
        after = path(loop).stat()
        assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)

    def test_an_idle_daemon_is_not_woken(self, make: Make) -> None:
        """Only by its looks, and once more after each at most."""
        loop = make().start()
        loop.run(60)
        wakes = 0
        end = loop.now + 300
        while loop.now < end:
            loop.now += loop.daemon._timeout()
            loop.settle_down()
            wakes += 1
        assert wakes <= 2 * 300 / 30 + 2

    def test_a_change_is_seen_within_the_pause(self, make: Make) -> None:
        """Though nothing else wakes the loop."""
        loop = make().start()
        loop.run(10)
        loop.drop("a", "x.jsonl", "")
        loop.look()
        loop.ring("a", "x.jsonl")
        assert loop.daemon._timeout() <= snapshot.PAUSE_S
        assert only(loop).files == 1

    def test_it_is_written_anew_at_another_place(self, make: Make, tmp_path: Path) -> None:
        """The runtime folder comes before the state folder."""
        (tmp_path / "run").mkdir()
        loop = make(environ={"SILICONFLOW_API_KEY": KEY, "RUNTIME_DIRECTORY": str(tmp_path / "run")}).start()
        loop.run(1)
        assert status.read(tmp_path / "run" / "status.json").state == "running"
        assert not path(loop).exists()


class TestWhatGoesWrong:
    def test_it_can_not_be_written(self, make: Make, tmp_path: Path) -> None:
        """It is said once, files are uploaded all the same, and it is written when it can be."""
        loop = make(config={"status_file": tmp_path / "nowhere" / "s.json"}).start()
        loop.drop("a", "x.jsonl")
        loop.look().run(60)
        assert loop.done("a") == ["x.jsonl"]
        (said,) = [e for e in loop.said("config.warning") if "s.json" in e["detail"]]
        assert "No such file" in said["detail"]
        (tmp_path / "nowhere").mkdir()
        loop.run(60)
        assert status.read(tmp_path / "nowhere" / "s.json").totals.done == 1

    def test_what_a_crash_left_is_swept(self, make: Make) -> None:
        """Half-written ones of our own form, at the next start."""
        loop = make().start()
        (loop.root / "state" / ".sfwatch-01234567.tmp").touch()
        loop.restart()
        assert not (loop.root / "state" / ".sfwatch-01234567.tmp").exists()

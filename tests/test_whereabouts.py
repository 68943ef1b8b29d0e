"""Why is my file not taken, what became of it? One sentence for each file, whatever its state."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from loop import Loop

from sfwatch import status, stock, whereabouts
from sfwatch.standin import StandIn, answering, storing_then_resetting
from sfwatch.whereabouts import Answer

BUSY = answering(503, {"code": 50505, "message": "busy"})
BALANCE = answering(403, {"code": 30001, "message": "balance is insufficient"})


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service:
        loop = Loop(tmp_path, service, ("a", "b"))
        yield loop.start()
        loop.close()


def ask(loop: Loop, name: str | Path, *, running: bool = True) -> Answer:
    loop.run(1)
    published = status.read(loop.root / "state" / "status.json") if running else None
    now = datetime.fromtimestamp(loop.wall(), UTC)
    answer = whereabouts.find(str(name), loop.settings(), published, now=now)
    assert answer.sentence.isprintable()
    return answer


class TestFilesThatWait:
    def test_an_empty_one(self, loop: Loop) -> None:
        """By its path and by its name; nothing is wrong with it."""
        path = loop.drop("a", "x.jsonl", "")
        loop.look()
        for name in (path, "x.jsonl"):
            answer = ask(loop, name)
            assert (answer.state, answer.reason, answer.exit_status) == ("waiting", "empty", 0)
            assert answer.sentence.startswith("a/x.jsonl has waited for ")
            assert "it is empty" in answer.sentence

    def test_one_that_is_written_to(self, loop: Loop) -> None:
        """The kernel knows."""
        with loop.drop("a", "x.jsonl").open("a"):
            loop.look().run(5)
            answer = ask(loop, "x.jsonl")
        assert (answer.reason, answer.exit_status) == ("being_written", 0)
        assert "a process has it open for writing" in answer.sentence
        loop.run(60)

    def test_one_that_just_came(self, loop: Loop) -> None:
        """The daemon has said nothing of it yet."""
        path = loop.inbox_of("a") / "new.jsonl"
        loop.run(2)
        loop.drop("a", "new.jsonl", "")
        now = datetime.fromtimestamp(loop.wall(), UTC)
        published = status.read(loop.root / "state" / "status.json")
        answer = whereabouts.find(str(path), loop.settings(), published, now=now)
        assert (answer.state, answer.reason) == ("waiting", "settling")
        assert "(2 s where the kernel says that nobody writes to it, else 10 s)" in answer.sentence

    def test_a_held_one(self, loop: Loop) -> None:
        """Its target's trouble is told, which it shares with all others, named or not."""
        loop.service.always = BALANCE
        for number in range(30):
            loop.drop("a", f"{number:02}.jsonl")
        loop.look().run(3)
        for name in ("00.jsonl", "29.jsonl"):
            answer = ask(loop, name)
            assert (answer.state, answer.reason, answer.exit_status) == ("waiting", "held", 1)
            assert "(balance)" in answer.sentence
            assert "top it up" in answer.sentence

    def test_a_folder_takes_nothing(self, loop: Loop) -> None:
        """What is wrong with the folder, and what to do."""
        (loop.root / "a" / "done").rmdir()
        (loop.root / "a" / "done").touch()
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        answer = ask(loop, "x.jsonl")
        assert answer.reason == "held"
        assert f"{loop.root / 'a' / 'done'} does not take files" in answer.sentence
        (loop.root / "a" / "done").unlink()
        (loop.root / "a" / "done").mkdir()
        loop.run(60)

    def test_one_that_is_tried_again(self, loop: Loop) -> None:
        """What went wrong, how often it was tried, and when it is tried next."""
        loop.service.script.extend([BUSY, BUSY])
        loop.drop("a", "x.jsonl")
        loop.look().run(2)
        answer = ask(loop, "x.jsonl")
        assert (answer.reason, answer.exit_status) == ("retry", 1)
        assert "overloaded" in answer.sentence
        assert "tries so far: " in answer.sentence
        assert "next try in " in answer.sentence
        loop.run(60)

    def test_a_lost_answer(self, loop: Loop) -> None:
        """It is looked for in the listing."""
        loop.service.listing = type(loop.service.listing)(lag_s=20.0)
        loop.service.script.append(storing_then_resetting())
        loop.drop("a", "x.jsonl")
        loop.look().run(2)
        answer = ask(loop, "x.jsonl")
        assert (answer.state, answer.reason, answer.exit_status) == ("waiting", "looking_up", 0)
        loop.run(120)

    def test_a_namesake_is_under_way(self, loop: Loop) -> None:
        """The newcomer waits for it."""
        loop.pool.holds = True
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        answer = ask(loop, "x.jsonl")
        assert answer.reason == "namesake"
        loop.pool.holds = False
        loop.pool.release()

    def test_what_the_daemon_said_of_it(self, loop: Loop) -> None:
        """The sentence of the event is given again: it names owner, mode and remedy."""
        loop.drop("a", "x.jsonl", "")
        loop.look()
        loop.daemon.inboxes.tell(loop.entry("a", "x.jsonl"), "unreadable", "owner 7, mode 0600; chmod g+r")
        answer = ask(loop, "x.jsonl")
        assert (answer.reason, answer.exit_status) == ("unreadable", 1)
        assert answer.sentence.endswith(": owner 7, mode 0600; chmod g+r")

    def test_no_daemon_runs(self, loop: Loop) -> None:
        """That is why, and nothing else."""
        path = loop.drop("a", "x.jsonl", "")
        answer = ask(loop, path, running=False)
        assert (answer.state, answer.reason, answer.exit_status) == ("waiting", "not_running", 3)
        assert answer.sentence == "a/x.jsonl waits: sfwatch is not running"


class TestFilesUnderWay:
    def test_it_is_sent(self, loop: Loop) -> None:
        """How much of it is out."""
        loop.pool.holds = True
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        job = loop.daemon.under_way["a", "x.jsonl"]
        job.progress.start(loop.now)
        job.progress.sent = 40
        hidden = loop.inbox_of("a") / ".hidden"
        (loop.inbox_of("a") / "x.jsonl").rename(hidden)  # as a worker's claim does
        answer = ask(loop, "x.jsonl")
        assert (answer.state, answer.reason, answer.exit_status) == ("under_way", "uploading", 0)
        assert "40 B of 85 B are out" in answer.sentence
        hidden.rename(loop.inbox_of("a") / "x.jsonl")
        loop.pool.holds = False
        loop.pool.release()
        loop.run(60)

    def test_it_is_doubted_and_no_daemon_runs(self, loop: Loop) -> None:
        """It lies among the claims, where nobody looks: the journal says so, in both forms of the status."""
        loop.service.script.append(answering(400, {"code": 1, "message": "no"}))
        loop.drop("a", "x.jsonl")
        loop.look().run(2)
        loop.die()
        found = whereabouts.find("x.jsonl", loop.settings(), None, now=datetime.now(UTC))
        assert (found.state, found.reason, found.exit_status) == ("under_way", "doubted", 3)
        groups = stock.take(loop.settings(), now=datetime.now(UTC)).waiting
        assert [(group.reason, group.files) for group in groups] == [("doubted", 1)]
        loop.start().run(120)

    def test_it_is_claimed_and_no_daemon_runs(self, loop: Loop) -> None:
        """The journal knows; so does the path among the claims."""
        loop.service.listing = type(loop.service.listing)(lag_s=20.0)
        loop.service.script.append(storing_then_resetting())
        loop.drop("a", "x.jsonl")
        loop.look().run(2)
        (claimed,) = (loop.inbox_of("a") / ".sfwatch").glob("*/x.jsonl")
        loop.die()
        for name in ("x.jsonl", str(claimed)):
            found = whereabouts.find(name, loop.settings(), None, now=datetime.now(UTC))
            assert (found.state, found.reason, found.exit_status) == ("under_way", "looking_up", 3)
            assert "sfwatch is not running" in found.sentence
        loop.start().run(120)


class TestFilesThatAreNeverTaken:
    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("x.txt", "does not match *.jsonl"),
            (".x.jsonl", "begins with a dot"),
            ("x.jsonl.part", "ends as those of unfinished files do"),
        ],
    )
    def test_by_its_name(self, loop: Loop, name: str, why: str) -> None:
        """What is in its way, so that it can be renamed."""
        path = loop.inbox_of("a") / name
        path.touch()
        answer = ask(loop, path)
        assert (answer.state, answer.reason, answer.exit_status) == ("not_taken", "no_match", 1)
        assert why in answer.sentence
        path.unlink()

    def test_by_its_kind(self, loop: Loop) -> None:
        """A link is not followed, wherever it leads."""
        path = loop.inbox_of("a") / "x.jsonl"
        path.symlink_to("/etc/passwd")
        answer = ask(loop, path)
        assert (answer.state, answer.reason) == ("not_taken", "symlink")
        assert "it is a symlink, not a regular file" in answer.sentence
        path.unlink()

    def test_in_a_sub_folder(self, loop: Loop) -> None:
        """Of an inbox that is not recursive."""
        path = loop.drop("a", "sub/x.jsonl")
        answer = ask(loop, path)
        assert answer.state == "not_taken"
        assert "not recursive" in answer.sentence
        loop.withdraw("a", "sub/x.jsonl")
        loop.drops.clear()

    def test_in_no_inbox(self, loop: Loop) -> None:
        """The inboxes are named."""
        answer = ask(loop, "/etc/passwd")
        assert (answer.state, answer.reason, answer.exit_status) == ("not_taken", "no_inbox", 1)
        assert str(loop.inbox_of("a")) in answer.sentence

    def test_nobody_knows_it(self, loop: Loop) -> None:
        """It may never have been there."""
        answer = ask(loop, "nope.jsonl")
        assert (answer.state, answer.exit_status) == ("unknown", 1)
        answer = ask(loop, loop.inbox_of("b") / "nope.jsonl")
        assert "inbox, done or failed of b, " in answer.sentence


class TestFilesThatCameToTheirEnd:
    def test_done(self, loop: Loop) -> None:
        """Its id and its sidecar; by its name, its place in done, its old place, and its sidecar."""
        path = loop.drop("a", "x.jsonl")
        loop.look().run(3)
        done = loop.root / "a" / "done" / "x.jsonl"
        sidecar = Path(f"{done}.fileid.json")
        for name in ("x.jsonl", path, done, sidecar):
            answer = ask(loop, name)
            assert (answer.state, answer.exit_status) == ("done", 0)
            assert answer.file_id == json.loads(sidecar.read_text())["id"]
            assert (answer.path, answer.beside) == (str(done), str(sidecar))
            assert f" as {answer.file_id}; " in answer.sentence

    def test_failed_for_one_of_its_lines(self, loop: Loop) -> None:
        """The first line at fault is named."""
        loop.drop("b", "x.jsonl", "{}\n")
        loop.look().run(3)
        assert "(custom_id_missing): line 1: " in ask(loop, "x.jsonl").sentence

    def test_failed(self, loop: Loop) -> None:
        """What was wrong with it, and what to do."""
        loop.drop("b", "x.jsonl", "\ufeff{}\n")
        loop.look().run(3)
        answer = ask(loop, "x.jsonl")
        assert (answer.state, answer.reason, answer.exit_status) == ("failed", "bom", 1)
        assert "without a byte order mark" in answer.sentence
        assert f"See {loop.root}/b/failed/x.jsonl.error.json" in answer.sentence
        assert ask(loop, loop.root / "b" / "failed" / "x.jsonl").state == "failed"

    def test_the_latest_counts(self, loop: Loop) -> None:
        """Dropped twice, it was filed under another name the second time."""
        for _ in range(2):
            loop.drop("a", "x.jsonl")
            loop.look().run(3)
        answer = ask(loop, "x.jsonl")
        assert answer.path is not None
        assert answer.path != str(loop.root / "a" / "done" / "x.jsonl")
        assert ask(loop, answer.path).path == answer.path

    def test_it_lies_in_its_inbox_again(self, loop: Loop) -> None:
        """What waits now comes before what was done once."""
        loop.drop("a", "x.jsonl")
        loop.look().run(3)
        loop.drop("a", "x.jsonl", "")
        loop.look()
        assert ask(loop, "x.jsonl").state == "waiting"

    def test_a_name_that_had_to_be_shortened(self, loop: Loop) -> None:
        """Its sidecar knows what it was called."""
        name = "ä" * 120 + ".jsonl"
        loop.drop("a", name)
        loop.look().run(3)
        assert ask(loop, name).state == "done"

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"sfwatch": 3}', '{"sfwatch": {}}', "[" * 100_000])
    def test_a_document_that_makes_no_sense(self, loop: Loop, text: str) -> None:
        """It is passed over: anybody may have put it there."""
        (loop.root / "a" / "done" / "x.jsonl.fileid.json").write_text(text)
        assert ask(loop, "x.jsonl").state == "unknown"

    def test_names_steer_no_terminal(self, loop: Loop) -> None:
        """Not in any answer."""
        name = os.fsdecode(b"\xff\x1b[2J.jsonl")
        loop.drop("a", name, "")
        loop.look()
        answer = ask(loop, name)
        assert answer.state == "waiting"
        assert "\\xff\\x1b[2J.jsonl" in answer.sentence

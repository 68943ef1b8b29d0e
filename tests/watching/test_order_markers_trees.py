"""Who goes first, files that wait for a marker, and whole trees: through the loop, on a clock moved by hand."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from loop import Loop, digest, line
from program import a_world
from world import needs_root, tmpfs

from sfwatch import arrive
from sfwatch.settings import Uploads
from sfwatch.standin import Behaviour, End, answering, untagged

Make = Callable[..., Loop]


def sent(loop: Loop) -> list[str]:
    """The names under which files were sent, in their order."""
    return [untagged(stored.filename) for stored in loop.service.stored]


# Order.


def test_oldest_first_as_observed_whatever_the_files_own_times_say(make: Make) -> None:
    """Copies keep their times: only when we saw a file counts, and then its name."""
    loop = make(uploads=Uploads(concurrency=1))
    loop.pool.holds = True
    for name, age in (("c", 1e9), ("a", 0.0), ("b", -1e6)):
        path = loop.drop("a", f"{name}.jsonl")
        os.utime(path, (loop.wall() - age, loop.wall() - age))
        if name != "b":
            loop.look().run(0.1)
    loop.look().run(3)
    while loop.pool.held:
        loop.pool.release()
        loop.settle_down()
    assert sent(loop) == ["c.jsonl", "a.jsonl", "b.jsonl"]


def test_many_new_files_in_one_inbox_do_not_delay_what_is_seen_in_another(make: Make) -> None:
    """They are looked at in turns: the one is through before the many have all been looked at."""
    loop = make(names=("a", "b"))
    for number in range(400):
        loop.drop("a", f"{number:03d}.jsonl")
    loop.drop("b", "x.jsonl")
    loop.daemon.inboxes.look_soon(loop.now)
    loop.daemon.mailbox.put(arrive.Rang("b", "x.jsonl", moved_in=True))
    loop.daemon.tick(loop.now)
    loop.daemon._receive(0)
    loop.daemon.tick(loop.now)
    assert len(loop.said("file.seen", inbox="a")) < 400
    assert loop.done("b") == ["x.jsonl"]


def test_a_big_file_holds_up_no_more_than_its_own_slot(make: Make) -> None:
    """While it goes out, the others go beside it, `concurrency` less one at a time."""
    loop = make(uploads=Uploads(concurrency=3))
    loop.pool.holds = True
    loop.drop("a", "0-big.jsonl", lines=1000)
    for number in range(6):
        loop.drop("a", f"{number + 1}.jsonl")
    loop.look().run(3)
    big = loop.pool.held.popleft()
    most = 0
    while loop.pool.held:
        most = max(most, len(loop.pool.held))
        loop.pool.release()
        loop.settle_down()
    assert most == 2
    assert sent(loop) == [f"{number + 1}.jsonl" for number in range(6)]
    big()
    loop.settle_down()
    assert len(loop.done("a")) == 7


def test_a_full_inbox_leaves_a_slot_to_another_and_they_take_turns(make: Make) -> None:
    """A thousand files in one do not keep the only file of the other waiting, not even for one upload."""
    loop = make(names=("a", "b"), uploads=Uploads(concurrency=2))
    loop.pool.holds = True
    for number in range(20):
        loop.drop("a", f"{number:02d}.jsonl")
    loop.look().run(3)
    assert len(loop.pool.held) == 1
    loop.drop("b", "x.jsonl")
    loop.look().run(3)
    assert len(loop.pool.held) == 2
    loop.pool.held.rotate(-1)
    loop.pool.release()
    loop.settle_down()
    assert loop.done("b") == ["x.jsonl"]
    while loop.pool.held:
        loop.pool.release()
        loop.settle_down()
    assert len(loop.done("a")) == 20


# Markers.


def test_a_file_waits_for_its_marker_and_both_go_along(make: Make) -> None:
    """Whichever comes first; the reason is said once; a marker alone is nobody's file and no other name."""
    loop = make(inbox={"settle_marker": ".ok"})
    loop.drop("a", "x.jsonl")
    (loop.inbox_of("a") / "y.jsonl.ok").touch()
    loop.look().run(200)
    assert [(e["file"], e["reason"]) for e in loop.said("file.waiting")] == [("x.jsonl", "no_marker")]
    assert loop.said("inbox.others") == []
    (loop.inbox_of("a") / "x.jsonl.ok").touch()
    loop.ring("a", "x.jsonl.ok")
    loop.drop("a", "y.jsonl")
    loop.ring("a", "y.jsonl")
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert {e["settled_by"] for e in loop.said("file.settled")} == {"marker"}
    assert (loop.root / "a" / "done" / "x.jsonl.ok").exists()
    assert loop.waiting_in("a") == []


def test_a_marked_file_is_taken_at_once_though_its_last_line_is_not_whole(make: Make) -> None:
    """The producer's word counts for everything but what is plain: open for writing, empty, or a hole."""
    loop = make(inbox={"settle_marker": ".ok", "check": "none"})
    loop.drop("a", "cut.jsonl", '{"custom_id": "1"')
    (loop.inbox_of("a") / "empty.jsonl").touch()
    busy = loop.drop("a", "open.jsonl")
    for name in ("cut", "empty", "open"):
        (loop.inbox_of("a") / f"{name}.jsonl.ok").touch()
    with busy.open("ab"):
        loop.look().run(300)
        assert loop.done("a") == ["cut.jsonl"]
        told = {(e["file"], e["reason"]) for e in loop.said("file.waiting")}
        assert told == {("empty.jsonl", "empty"), ("open.jsonl", "being_written")}
    loop.ring("a", "open.jsonl")
    assert loop.done("a") == ["cut.jsonl", "open.jsonl"]


def test_a_newcomer_with_a_marker_of_its_own_waits_for_its_namesake(make: Make) -> None:
    """Each goes with its own marker, and neither is mixed up."""
    loop = make(inbox={"settle_marker": ".ok"})
    loop.pool.holds = True
    first, second = "x.jsonl", "x.jsonl"
    loop.drop("a", first)
    marker = loop.inbox_of("a") / "x.jsonl.ok"
    marker.write_text("first")
    loop.look()
    loop.service.script.append(Behaviour(stores=False, end=End.RESET))
    loop.pool.release()
    loop.settle_down()
    assert loop.claims("a") == ["x.jsonl", "x.jsonl.ok"]
    loop.drop("a", second)
    marker.write_text("second")
    loop.pool.holds = False
    loop.look().run(300)
    markers = sorted(path.read_text() for path in (loop.root / "a" / "done").glob("*.ok"))
    assert len(loop.done("a")) == 2
    assert markers == ["first", "second"]
    for path in (loop.root / "a" / "done").glob("*.jsonl"):
        assert path.with_name(f"{path.name}.ok").exists()


def test_a_marker_that_goes_again_before_the_file_was_taken(make: Make) -> None:
    """The producer takes its word back: the file waits again, and says so."""
    loop = make(inbox={"settle_marker": ".ok"})
    path = loop.drop("a", "x.jsonl")
    marker = loop.inbox_of("a") / "x.jsonl.ok"
    with path.open("ab"):
        marker.touch()
        loop.look().run(10)
        marker.unlink()
    loop.look().run(100)
    assert loop.done("a") == []
    assert [e["reason"] for e in loop.said("file.waiting")] == ["being_written", "no_marker"]
    marker.touch()
    loop.look().run(100)
    assert loop.done("a") == ["x.jsonl"]


def test_a_file_that_fails_for_now_takes_its_marker_back_and_goes_again(make: Make) -> None:
    """Without it, it would wait for ever."""
    loop = make(inbox={"settle_marker": ".ok"})
    loop.service.script.append(answering(503, {"code": 50505, "message": "busy"}))
    loop.drop("a", "x.jsonl")
    (loop.inbox_of("a") / "x.jsonl.ok").touch()
    loop.look()
    assert loop.waiting_in("a") == ["x.jsonl", "x.jsonl.ok"]
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert (loop.root / "a" / "done" / "x.jsonl.ok").exists()


def test_a_lone_claimed_marker_goes_back_after_a_crash(make: Make) -> None:
    """The marker is claimed before its file; a crash in between leaves nothing behind."""
    loop = make(inbox={"settle_marker": ".ok"})
    claims = loop.inbox_of("a") / ".sfwatch" / loop.daemon.journal.instance
    claims.mkdir(parents=True, mode=0o700)
    claims.parent.chmod(0o700)
    loop.drop("a", "x.jsonl")
    (claims / "x.jsonl.ok").touch()
    loop.restart().run(10)
    assert loop.done("a") == ["x.jsonl"]
    assert (loop.root / "a" / "done" / "x.jsonl.ok").exists()


# Trees.


def below(folder: Path) -> list[str]:
    """All files below a folder, by relative path, without ours."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".sfwatch" not in path.parts)
    return sorted(str(path.relative_to(folder)) for path in paths if path.suffix != ".json")


def test_a_tree_keeps_its_paths_in_done_and_failed(make: Make) -> None:
    """Names are relative in every event; empty folders are left; hidden ones and our own are not entered."""
    loop = make(inbox={"recursive": True})
    loop.drop("a", "one/two/x.jsonl")
    loop.drop("a", "one/bad.jsonl", "no json\n")
    loop.drop("a", "top.jsonl")
    hidden = loop.inbox_of("a") / ".hidden"
    hidden.mkdir()
    (hidden / "x.jsonl").write_text("nobody's\n")
    loop.look().run(60)
    assert below(loop.root / "a" / "done") == ["one/two/x.jsonl", "top.jsonl"]
    assert below(loop.root / "a" / "failed") == ["one/bad.jsonl"]
    assert {e["file"] for e in loop.said("file.done")} == {"one/two/x.jsonl", "top.jsonl"}
    assert below(loop.inbox_of("a")) == [".hidden/x.jsonl"]
    assert (loop.inbox_of("a") / "one" / "two").is_dir()
    assert [p.name for p in loop.inbox_of("a").rglob(".sfwatch")] == [".sfwatch"]


def test_the_same_name_in_two_folders_is_two_files(make: Make) -> None:
    """Each has its own id and its own place."""
    loop = make(inbox={"recursive": True})
    loop.drop("a", "one/x.jsonl")
    loop.drop("a", "two/x.jsonl")
    loop.look().run(60)
    done = loop.root / "a" / "done"
    assert below(done) == ["one/x.jsonl", "two/x.jsonl"]
    ids = {json.loads((done / name / "x.jsonl.fileid.json").read_text())["id"] for name in ("one", "two")}
    assert len(ids) == 2


def test_markers_in_a_tree_lie_beside_their_files(make: Make) -> None:
    """A marker of the same name in another folder says nothing."""
    loop = make(inbox={"recursive": True, "settle_marker": ".ok"})
    loop.drop("a", "one/x.jsonl")
    loop.drop("a", "two/x.jsonl")
    (loop.inbox_of("a") / "one" / "x.jsonl.ok").touch()
    loop.look().run(60)
    assert below(loop.root / "a" / "done") == ["one/x.jsonl", "one/x.jsonl.ok"]
    (loop.inbox_of("a") / "two" / "x.jsonl.ok").touch()
    loop.ring("a", "two/x.jsonl.ok").run(60)
    assert below(loop.root / "a" / "done")[2:] == ["two/x.jsonl", "two/x.jsonl.ok"]


def test_a_folder_that_is_removed_with_its_files_and_one_that_is_renamed(make: Make) -> None:
    """What was removed has vanished, once; what was renamed is found under its new name."""
    loop = make(inbox={"recursive": True, "settle_marker": ".ok"})
    for name in ("gone/x.jsonl", "old/y.jsonl"):
        loop.drop("a", name)
    loop.look().run(20)
    loop.dropped = {sha256: key for sha256, key in loop.dropped.items() if key[1] != "gone/x.jsonl"}
    shutil.rmtree(loop.inbox_of("a") / "gone")
    (loop.inbox_of("a") / "old").rename(loop.inbox_of("a") / "new")
    (loop.inbox_of("a") / "new" / "y.jsonl.ok").touch()
    loop.drops["a", "new/y.jsonl"] += 1
    loop.look().run(60)
    assert below(loop.root / "a" / "done") == ["new/y.jsonl", "new/y.jsonl.ok"]
    assert sorted(e["file"] for e in loop.said("file.vanished")) == ["gone/x.jsonl", "old/y.jsonl"]


def test_a_file_whose_folder_is_removed_while_it_is_under_way_comes_back_into_a_new_one(make: Make) -> None:
    """Its claim does not lie in that folder; given back, it gets the folder made anew."""
    loop = make(inbox={"recursive": True})
    loop.service.script.append(answering(503, {"code": 50505, "message": "busy"}))
    loop.drop("a", "sub/x.jsonl")
    loop.on_say("upload.started", lambda: shutil.rmtree(loop.inbox_of("a") / "sub", ignore_errors=True))
    loop.look().run(100)
    assert below(loop.root / "a" / "done") == ["sub/x.jsonl"]


@needs_root
def test_a_tree_does_not_cross_a_mount_and_says_so_once(make: Make) -> None:
    """What is mounted in it is an inbox of its own, or nobody's."""
    loop = make(inbox={"recursive": True})
    with tmpfs(loop.inbox_of("a") / "disk", "1m") as disk:
        (disk / "x.jsonl").write_text("{}\n")
        loop.look().run(100)
        assert [(Path(e["path"]).name, e["reason"]) for e in loop.said("inbox.skipped")] == [
            ("disk", "mount_point")
        ]
    assert loop.said("file.seen") == []


def test_a_link_to_a_folder_is_not_entered(make: Make, tmp_path: Path) -> None:
    """Secrets of the host are nobody's batch."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jsonl").write_text("{}\n")
    loop = make(inbox={"recursive": True})
    (loop.inbox_of("a") / "link").symlink_to(tmp_path / "secret")
    (loop.inbox_of("a") / "loop").symlink_to(loop.inbox_of("a"))
    loop.look().run(100)
    assert loop.said("file.seen") == []
    assert [e["others"] for e in loop.said("inbox.others")] == [2]


def test_names_of_full_length_in_a_tree_fit_with_their_sidecars(make: Make) -> None:
    """Folder and file of 255 bytes each."""
    loop = make(inbox={"recursive": True})
    folder, name = "d" * 255, "n" * 249 + ".jsonl"
    path = loop.drop("a", f"{folder}/{name}")
    sha256 = digest(path)
    loop.look().run(60)
    (done,) = (loop.root / "a" / "done" / folder).glob("*.jsonl")
    assert digest(done) == sha256
    assert done.with_name(f"{done.name}.fileid.json").exists()


def test_a_tree_that_is_copied_in_while_it_is_watched_is_done_to_the_last_file(tmp_path: Path) -> None:
    """With a real doorbell: folders that come with files in them are looked at."""
    with a_world(tmp_path) as world:
        world.configure(inbox={"recursive": True})
        program = world.start()
        source = tmp_path / "source"
        for number in range(60):
            name = f"{number % 4}/{number % 12}/{number}.jsonl"
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(line(number))
            world.dropped.append(("a", f"tree/{name}"))
        subprocess.run(["cp", "-r", source, tmp_path / "a" / "inbox" / "tree"], check=True)
        program.until(lambda: len(program.said("file.done")) == 60)
        assert program.end() == 0
        assert len(world.service.stored) == 60
        assert len(below(tmp_path / "a" / "done")) == 60

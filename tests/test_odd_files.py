"""Files that cannot be moved, that have several names or very long ones: none holds up another, none loops."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loop import Loop, digest, line
from somebody import SOMEBODY, root_again, somebody
from world import needs_root

from sfwatch.standin import StandIn

Make = Callable[..., Loop]


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Make]:
    """Loops that are started, and whose promises are checked at the end."""
    with StandIn() as service:
        made: list[Loop] = []

        def make(root: Path = tmp_path, **settings: Any) -> Loop:
            made.append(Loop(root, service, **settings))
            return made[-1].start()

        yield make
        for loop in made:
            loop.close()


def give_up_checking_places(loop: Loop, path: Path) -> None:
    """Of a file that has several names, which the check of places takes for several files."""
    del loop.dropped[digest(path)]


# Several names of one file.


def test_a_further_name_of_a_done_file_is_done_once_more_and_no_oftener(make: Make) -> None:
    """A hard link to done/x.jsonl under its name: rename(2) would do nothing there and call it a success."""
    loop = make()
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    done = loop.root / "a" / "done" / "x.jsonl"
    (loop.inbox_of("a") / "x.jsonl").hardlink_to(done)
    loop.drops["a", "x.jsonl"] += 1
    loop.twice = 1
    loop.look().run(86_400)
    first, second = loop.done("a")
    assert (loop.root / "a" / "done" / first).samefile(loop.root / "a" / "done" / second)
    assert loop.waiting_in("a") == loop.claims("a") == []
    assert loop.said("file.done")[1]["same_as"] == loop.said("file.done")[0]["file_id"]
    give_up_checking_places(loop, done)


def test_two_names_of_one_file_in_the_inbox_are_two_files(make: Make) -> None:
    """Claiming the one changes the other's ctime, which costs that one a rest and nothing else."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    path.with_name("y.jsonl").hardlink_to(path)
    loop.drops["a", "y.jsonl"] += 1
    loop.twice = 1
    give_up_checking_places(loop, path)
    loop.look().run(60)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]
    assert loop.posts() == 2


@pytest.mark.parametrize("stem", ["n" * 249, "\u00e9" * 124])
def test_the_longest_name_again_and_again(make: Make, stem: str) -> None:
    """Four drops of it: each gets a name of its own in done that has room for the sidecar's beside it."""
    loop = make()
    for _ in range(4):
        loop.drop("a", f"{stem}.jsonl")
        loop.look().run(10)
    assert len(loop.done("a")) == 4
    assert max(len(os.fsencode(path.name)) for path in (loop.root / "a" / "done").iterdir()) <= 255


# Files that cannot be moved.


@needs_root
@pytest.mark.parametrize("attribute", ["i", "a"])
def test_a_pinned_file_waits_unsent_and_holds_up_nobody(make: Make, attribute: str) -> None:
    """It is readable, yet nobody can move it. That is said once; when it is let go it is done."""
    loop = make()
    pinned = loop.drop("a", "x.jsonl")
    subprocess.run(["chattr", f"+{attribute}", pinned], check=True)
    try:
        loop.drop("a", "y.jsonl")
        loop.look().run(7200)
        assert loop.done("a") == ["y.jsonl"]
        assert loop.posts() == 1
        (waiting,) = loop.said("file.waiting")
        assert (waiting["file"], waiting["reason"]) == ("x.jsonl", "cannot_move")
        assert "chattr -i -a" in waiting["detail"]
    finally:
        subprocess.run(["chattr", f"-{attribute}", pinned], check=True)
    loop.run(600)
    assert loop.done("a") == ["x.jsonl", "y.jsonl"]


@needs_root
def test_a_strangers_file_in_a_strangers_sticky_folder_waits_unsent(make: Make) -> None:
    """It may be read and not moved. Ours in there is done; so is the other once the folder belongs to us."""
    with somebody() as root:
        inbox = root / "a" / "inbox"
        with root_again():
            inbox.mkdir(parents=True)
            inbox.chmod(0o1777)
            inbox.parent.chmod(0o777)
        loop = make(root)
        strange = loop.drop("a", "x.jsonl")
        loop.drop("a", "y.jsonl")
        with root_again():
            os.chown(strange, 0, 0)
        loop.look().run(3600)
        assert loop.done("a") == ["y.jsonl"]
        assert loop.posts() == 1
        assert [(e["file"], e["reason"]) for e in loop.said("file.waiting")] == [("x.jsonl", "cannot_move")]
        by = {e["file"]: e["settled_by"] for e in loop.said("file.settled")}
        assert by == {
            "x.jsonl": "quiet",
            "y.jsonl": "lease",
        }  # of our own files the kernel tells without a right
        with root_again():
            os.chown(inbox, SOMEBODY, SOMEBODY)
        loop.run(600)
        assert loop.done("a") == ["x.jsonl", "y.jsonl"]
        loop.close()


@needs_root
def test_a_file_that_turns_unreadable_while_it_rests_says_so(make: Make) -> None:
    """Its owner closes it to us before it has settled; once it is readable its rest begins anew."""
    with somebody() as root:
        loop = make(root)
        path = loop.drop("a", "x.jsonl")
        loop.drop("a", "y.jsonl")
        loop.look().run(1)
        with root_again():
            os.chown(path, 0, 0)
            path.chmod(0o600)
        loop.run(3600)
        assert loop.done("a") == ["y.jsonl"]
        (waiting,) = loop.said("file.waiting")
        assert waiting["reason"] == "unreadable"
        assert "owner 0" in waiting["detail"]
        with root_again():
            path.chmod(0o644)
        loop.run(120)
        assert loop.done("a") == ["x.jsonl", "y.jsonl"]
        loop.close()


@needs_root
def test_a_folder_that_is_closed_for_a_moment_only_is_looked_at_again_soon(make: Make) -> None:
    """As rsync makes each: first with mode 0700, then with its own. Nothing rings, and nothing is said."""
    with somebody() as root:
        loop = make(root, inbox={"recursive": True})
        tree = loop.inbox_of("a") / "tree"
        tree.mkdir(mode=0)
        loop.look().run(0.5)
        tree.chmod(0o700)
        loop.drop("a", "tree/x.jsonl")
        loop.run(5)
        assert (root / "a" / "done" / "tree" / "x.jsonl").is_file()
        assert loop.said("inbox.skipped") == []
        loop.die()


# Writers that never come to an end.


def test_a_file_that_is_replaced_by_a_shorter_one_all_the_time_is_taken_when_that_ends(make: Make) -> None:
    """Each new version begins its rest; only the last one is uploaded."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    for number in range(30, 0, -1):
        del loop.dropped[digest(path)]
        path.with_name(".new").write_text("".join(line(i) for i in range(number)))
        path.with_name(".new").rename(path)
        loop.dropped[digest(path)] = ("a", "x.jsonl")
        loop.look().run(1.5)
    loop.run(10)
    assert loop.posts() == 1
    assert loop.done("a") == ["x.jsonl"]


def test_a_look_that_takes_long_shortens_no_rest(make: Make) -> None:
    """A folder of a million names takes seconds to list: what is written meanwhile rests from then on."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    del loop.dropped[digest(path)]
    (loop.inbox_of("a") / "note.txt").touch()
    times = []

    def in_the_midst_of_the_look() -> None:
        loop.now += 1.5
        path.write_text(line(7))
        loop.dropped[digest(path)] = ("a", "x.jsonl")
        times.append(loop.now)

    loop.on_say("inbox.others", in_the_midst_of_the_look)
    loop.on_say("file.settled", lambda: times.append(loop.now))
    loop.look().run(20)
    written_at, settled_at = times
    assert settled_at - written_at >= 2.0


def test_a_file_that_is_appended_to_for_ever_is_said_to_be_stuck(make: Make) -> None:
    """Opened, written and closed every second: nobody is ever seen with it, yet it must not wait untold."""
    loop = make()
    path = loop.drop("a", "x.jsonl")
    for number in range(700):
        del loop.dropped[digest(path)]
        with path.open("a") as file:
            file.write(line(number + 1))
        loop.dropped[digest(path)] = ("a", "x.jsonl")
        loop.ring("a", "x.jsonl").run(1)
    assert loop.posts() == 0
    (stuck,) = loop.said("file.stuck")
    assert 600 <= stuck["waited_s"] < 610
    loop.run(10)
    assert loop.done("a") == ["x.jsonl"]

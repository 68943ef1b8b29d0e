"""A running program through all that takes events away: every file ends, each loss is said once."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from loop import line
from program import Program, World, a_world
from world import needs_root, wait_for

FULL = os.environ.get("SFWATCH_BURST") == "full"
QUEUE = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


def inbox_of(world: World, name: str = "a") -> Path:
    return world.root / name / "inbox"


def goes_through(world: World, program: Program, *names: str) -> None:
    """Drop a file under each name, and wait until all that were ever dropped are done."""
    for name in names:
        world.drop("a", name)
    program.until(lambda: len(program.said("file.done")) == len(world.dropped))


def ends_well(world: World, program: Program, *, lost: int = 1, overflowed: int = 0) -> list[str]:
    """One process from beginning to end, every file done once; why inboxes were lost."""
    assert program.end() == 0
    world.check()
    said = [e["event"] for e in program.said()]
    assert said.count("daemon.started") == 1
    assert said.count("inbox.lost") == said.count("inbox.found") == lost
    assert said.count("inbox.overflowed") == overflowed
    return [e["reason"] for e in program.said("inbox.lost")]


# Bursts.


def burst(world: World, inbox: str, count: int) -> None:
    """Drop many small files as fast as can be, a fifth of them by renaming."""
    folder = inbox_of(world, inbox)
    for number in range(count):
        name = f"{number:05d}.jsonl"
        path = folder / (f"{name}.part" if number % 5 == 0 else name)
        path.write_text(line(number, text=inbox))
        if path.name != name:
            path.rename(folder / name)
        world.dropped.append((inbox, name))


def count_done(world: World) -> int:
    return sum(
        entry.name.endswith(".jsonl") for name in "ab" for entry in os.scandir(world.root / name / "done")
    )


@pytest.mark.timeout(2000)
def test_a_burst_while_the_process_is_stopped(world: World) -> None:
    """The kernel's queue runs over before the last files come: a look finds them.

    In full: 20,000 files.
    """
    world.configure(log={"level": "info"}, uploads={"concurrency": 8})
    program = world.start()
    program.process.send_signal(signal.SIGSTOP)
    for number in range(0 if FULL else QUEUE):
        (inbox_of(world) / f"{number}.txt").touch()
    burst(world, "a", 20_000 if FULL else 300)
    program.process.send_signal(signal.SIGCONT)
    program.until(lambda: count_done(world) == len(world.dropped), within_s=1800, every_s=0.5)
    program.until(lambda: len(program.said("file.done")) == len(world.dropped), every_s=0.5)
    # The queue is the process's, not the inbox's: each inbox may have lost some, and is looked at.
    assert [e["inbox"] for e in program.said("inbox.overflowed")] == ["a", "b"]
    ends_well(world, program, lost=0, overflowed=2)


WRITING = """
import pathlib, sys
for number in range(int(sys.argv[2])):
    text = '{"custom_id": "request", "body": {"messages": [{"role": "user", "content": "%d"}]}}\\n' % number
    pathlib.Path(sys.argv[1], f"{number}.jsonl").write_text(text)
"""


@pytest.mark.timeout(3000)
def test_a_burst_while_it_works(world: World) -> None:
    """Into two inboxes, as fast as two writers can; in full 60,000 files."""
    world.configure(log={"level": "info"}, uploads={"concurrency": 8})
    program = world.start()
    each = 30_000 if FULL else 600
    with (
        subprocess.Popen([sys.executable, "-c", WRITING, inbox_of(world, "a"), str(each)]),
        subprocess.Popen([sys.executable, "-c", WRITING, inbox_of(world, "b"), str(each)]),
    ):
        pass
    program.until(lambda: count_done(world) == 2 * each, within_s=2800, every_s=0.5)
    program.until(lambda: len(program.said("file.done")) == 2 * each, every_s=1.0)
    assert len(world.service.stored) == 2 * each
    assert program.end() == 0
    assert program.said("inbox.lost") == []


# Inboxes that go and come.


def test_an_inbox_that_is_deleted_and_made_again(world: World) -> None:
    """It is not made by the program; what is dropped into the new one is taken."""
    program = world.start()
    goes_through(world, program, "x.jsonl")
    shutil.rmtree(inbox_of(world))
    program.until(lambda: program.said("inbox.lost"))
    inbox_of(world).mkdir()
    goes_through(world, program, "y.jsonl", "z.jsonl")
    assert ends_well(world, program) == ["missing"]


def test_an_inbox_that_is_renamed_away_and_comes_back(world: World) -> None:
    """What lay in it has not vanished."""
    program = world.start()
    held = world.drop("a", "held.jsonl")
    with held.open("ab"):
        program.until(lambda: program.said("file.waiting"))
        inbox_of(world).rename(world.root / "away")
        program.until(lambda: program.said("inbox.lost"))
        (world.root / "away").rename(inbox_of(world))
        program.until(lambda: program.said("inbox.found"))
    goes_through(world, program, "y.jsonl")
    assert ends_well(world, program) == ["missing"]


def test_an_inbox_that_is_renamed_away_and_replaced_at_once(world: World) -> None:
    """It was never missing, as far as anybody saw."""
    program = world.start()
    goes_through(world, program, "x.jsonl")
    inbox_of(world).with_name("new").mkdir()
    inbox_of(world).rename(world.root / "away")
    inbox_of(world).with_name("new").rename(inbox_of(world))
    goes_through(world, program, "y.jsonl")
    assert len(ends_well(world, program)) == 1


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Path:
    """A disk's worth of ext4 in a file."""
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    return image


def unmount(at: Path) -> None:
    """Not lazily: once the last file is dealt with, nothing of ours may be in the way."""
    wait_for(lambda: subprocess.run(["umount", at], check=False, capture_output=True).returncode == 0)


def mount(disk: Path, at: Path) -> None:
    at.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-o", "loop", disk, at], check=True)


def lost_in_the_status(world: World) -> str | None:
    """Why the first inbox is lost, in the status file."""
    lost = json.loads((world.root / "state" / "status.json").read_bytes())["inboxes"][0]["lost"]
    return None if lost is None else str(lost["reason"])


@needs_root
def test_an_inbox_whose_disk_is_unmounted_and_mounted_again(world: World, disk: Path) -> None:
    """Nothing of ours keeps it from being unmounted; what is dropped below meanwhile is taken, too."""
    mount(disk, inbox_of(world))
    try:
        program = world.start()
        goes_through(world, program, "x.jsonl")
        unmount(inbox_of(world))
        program.until(lambda: program.said("inbox.lost"))
        program.until(lambda: lost_in_the_status(world) == "unmounted")
        goes_through(world, program, "below.jsonl")
        mount(disk, inbox_of(world))
        program.process.send_signal(signal.SIGUSR1)
        program.until(lambda: program.said("inbox.found") and lost_in_the_status(world) is None)
        goes_through(world, program, "y.jsonl")
        assert ends_well(world, program) == ["unmounted"]
    finally:
        subprocess.run(["umount", "-l", inbox_of(world)], check=True)


@needs_root
def test_an_inbox_below_the_top_of_a_disk_that_is_unmounted_and_mounted_again(world: World, disk: Path) -> None:
    """Its folder is not there without the disk, and is not made."""
    mount(disk, world.root / "a")
    try:
        program = world.start()
        goes_through(world, program, "x.jsonl")
        unmount(world.root / "a")
        program.until(lambda: program.said("inbox.lost"))
        assert not inbox_of(world).exists()
        mount(disk, world.root / "a")
        program.until(lambda: program.said("inbox.found"))
        goes_through(world, program, "y.jsonl")
        assert ends_well(world, program) == ["missing"]
    finally:
        subprocess.run(["umount", "-l", world.root / "a"], check=True)


@needs_root
def test_an_inbox_that_is_mounted_over(world: World, disk: Path) -> None:
    """The kernel tells nobody; the next look sees it, and takes what lies on the new disk."""
    program = world.start()
    goes_through(world, program, "x.jsonl")
    mount(disk, inbox_of(world))
    try:
        program.process.send_signal(signal.SIGUSR1)
        program.until(lambda: program.said("inbox.found"))
        goes_through(world, program, "y.jsonl")
        assert ends_well(world, program) == ["replaced"]
    finally:
        subprocess.run(["umount", "-l", inbox_of(world)], check=True)


@needs_root
def test_an_inbox_that_is_made_unreadable_and_readable(world: World) -> None:
    """Root without its override of permissions is a user like others; what came meanwhile is taken."""
    program = world.start("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    goes_through(world, program, "x.jsonl")
    inbox_of(world).chmod(0)
    program.process.send_signal(signal.SIGUSR1)
    program.until(lambda: program.said("inbox.lost"))
    world.drop("a", "y.jsonl")
    inbox_of(world).chmod(0o770)
    goes_through(world, program, "z.jsonl")
    assert ends_well(world, program) == ["unreadable"]


def test_an_inbox_behind_a_symbolic_link_that_is_changed(world: World) -> None:
    """The folder is what is watched; a link that leads to another folder leads to another inbox."""
    for name in ("one", "two"):
        (world.root / name).mkdir()
    inbox_of(world).symlink_to(world.root / "one")
    program = world.start()
    goes_through(world, program, "x.jsonl")
    (world.root / "link").symlink_to(world.root / "two")
    (world.root / "link").rename(inbox_of(world))
    program.process.send_signal(signal.SIGUSR1)
    program.until(lambda: program.said("inbox.found"))
    goes_through(world, program, "y.jsonl")
    assert ends_well(world, program) == ["replaced"]


# Where nothing rings.


NAMESPACE = ("unshare", "--user", "--map-root-user")


@pytest.mark.parametrize("what", ["instances", "watches"])
def test_without_inotify_the_inboxes_are_polled_until_it_is_to_be_had(world: World, what: str) -> None:
    """The event names the sysctl and its value. The limit is that of its own namespace."""
    if subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("a limit can be lowered for nobody else only where user namespaces are to be had")
    limit = f"/proc/sys/user/max_inotify_{what}"
    program = world.start(*NAMESPACE, "sh", "-c", f'echo 0 > {limit} && exec "$@"', "sh")
    watched = program.said("inbox.watched")
    assert [e["mode"] for e in watched] == ["polling", "polling"]
    value = Path(f"/proc/sys/fs/inotify/max_user_{what}").read_text().strip()
    assert all(f"fs.inotify.max_user_{what} is {value}" in e["detail"] for e in watched)
    goes_through(world, program, "x.jsonl", "y.jsonl")
    inside = ["nsenter", "--user", "--preserve-credentials", "--target", str(program.process.pid)]
    subprocess.run([*inside, "sh", "-c", f"echo 100 > {limit}"], check=True)
    program.until(lambda: [e["mode"] for e in program.said("inbox.watched")][2:] == ["inotify", "inotify"])
    goes_through(world, program, "z.jsonl")
    ends_well(world, program, lost=0)


BREAKING = """
import os, pathlib, runpy, sys
read, broken = os.read, pathlib.Path(sys.argv[1])
def breaking(fd, size):
    data = read(fd, size)
    if broken.exists() and os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:inotify":
        broken.unlink()
        raise ZeroDivisionError("the divisor is on fire")
    return data
os.read = breaking
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_doorbell_that_breaks_is_replaced(world: World) -> None:
    """Its thread ends by an error that nobody expects, events in its hands: the file is found all the same."""
    broken = world.root / "broken"
    program = world.start(sys.executable, "-c", BREAKING, str(broken))
    goes_through(world, program, "x.jsonl")
    broken.touch()
    goes_through(world, program, "y.jsonl")
    goes_through(world, program, "z.jsonl")
    (error,) = program.said("internal.error")
    assert "on fire" in error["detail"]
    assert "Traceback" in error["traceback"]
    ends_well(world, program, lost=0, overflowed=2)

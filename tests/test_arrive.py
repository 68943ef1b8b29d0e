"""Rings, looks and sights, with a real kernel: real folders, mounts, limits and writers.

Nothing is waited for but rings. That something does *not* ring is shown by the sentinel that rings after it.
"""

import errno
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from watchdog.observers.inotify_c import InotifyConstants

from sfwatch import arrive
from sfwatch.arrive import Broken, Doorbell, FoldersChanged, Overflowed, Rang, WatchEnded
from sfwatch.files import Lease, NotRegular
from sfwatch.settings import Inbox, Proof
from sfwatch.settle import Sighting, Tail, Unreadable

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and other users' files need root")

LINE = b'{"custom_id": "a"}\n'
SENTINEL = "sentinel.jsonl"
AnyRing = Rang | FoldersChanged | Overflowed | WatchEnded | Broken


@pytest.fixture(autouse=True)
def _ignore_sigio() -> Iterator[None]:
    """As the program does: a writer that opens during a lease probe raises SIGIO, which kills by default."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "inbox"
    path.mkdir()
    return path


class Porch:
    """A doorbell and all that it rang."""

    def __init__(self) -> None:
        self.mailbox: queue.SimpleQueue[AnyRing] = queue.SimpleQueue()
        self.doorbell = Doorbell(self.mailbox.put)

    def watch(self, path: Path, name: str = "in", *, recursive: bool = False) -> None:
        assert self.doorbell.watch(name, path, recursive=recursive) is None

    def next(self) -> AnyRing:
        return self.mailbox.get(timeout=5)

    def until(self, last: AnyRing) -> list[AnyRing]:
        """All rings up to the first that equals `last`, without it."""
        rings: list[AnyRing] = []
        while (ring := self.next()) != last:
            rings.append(ring)
        return rings

    def until_sentinel(self, folder: Path) -> list[AnyRing]:
        """All rings up to now."""
        (folder / SENTINEL).touch()
        rings = self.until(Rang("in", SENTINEL, moved_in=False))
        assert self.next() == Rang("in", SENTINEL, moved_in=False)  # its closing
        (folder / SENTINEL).unlink()
        return rings


@pytest.fixture
def porch() -> Iterator[Porch]:
    porch = Porch()
    yield porch
    porch.doorbell.close()


def inbox(path: Path, **settings: object) -> Inbox:
    defaults: dict[str, object] = {"name": "in", "done": path.parent / "done", "failed": path.parent / "failed"}
    return Inbox(path=path, **{**defaults, **settings})  # type: ignore[arg-type]


@contextmanager
def mounted(where: Path, *arguments: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "--quiet", "--lazy", where], check=False)


def python(code: str, *arguments: Path | str, under: tuple[str, ...] = ()) -> Any:
    """What a Python of its own, started by `under`, prints as JSON."""
    command = [*under, sys.executable, "-W", "error", "-c", code, *arguments]
    answer = subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert not answer.stderr
    return json.loads(answer.stdout)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def rang(name: str, *, moved_in: bool = False) -> Rang:
    return Rang("in", name, moved_in)


# The doorbell


def test_a_written_file_rings(porch: Porch, folder: Path) -> None:
    """Creation and closing both ring; each may be the only one that a file ever gets."""
    porch.watch(folder)
    (folder / "x.jsonl").write_bytes(LINE)
    assert porch.until_sentinel(folder) == [rang("x.jsonl"), rang("x.jsonl")]


def test_a_renamed_file_rings_as_moved_in(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """From outside and from a temporary name inside alike."""
    porch.watch(folder)
    (tmp_path / "a").touch()
    (tmp_path / "a").rename(folder / "x.jsonl")
    (folder / ".upload").touch()
    (folder / ".upload").rename(folder / "y.jsonl")
    moved = [rang("x.jsonl", moved_in=True), rang("y.jsonl", moved_in=True)]
    assert porch.until_sentinel(folder) == moved


def test_a_linked_file_rings(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """A hard link gives its creation only, and is not renamed in: its writer may hold the other name."""
    porch.watch(folder)
    (tmp_path / "a").touch()
    (folder / "x.jsonl").hardlink_to(tmp_path / "a")
    assert porch.until_sentinel(folder) == [rang("x.jsonl")]


def test_an_unnamed_file_rings_when_it_gets_its_name(porch: Porch, folder: Path) -> None:
    """O_TMPFILE and link: the name rings; the closing comes under a name that never existed, or not at all."""
    porch.watch(folder)
    fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY)
    os.write(fd, LINE)
    above = os.open(folder, os.O_PATH)
    os.link(f"/proc/self/fd/{fd}", "x.jsonl", dst_dir_fd=above, follow_symlinks=True)
    os.close(above)
    os.close(fd)
    assert rang("x.jsonl") in porch.until_sentinel(folder)


def test_what_we_do_ourselves_does_not_ring(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """Looking, probing, reading, moving out and deleting are silent; so nothing can ring for ever."""
    for name in ("x.jsonl", "y.jsonl"):
        (folder / name).write_bytes(LINE)
    porch.watch(folder)
    assert isinstance(arrive.sight(inbox(folder), "x.jsonl", wall=0.0, moved_in=False), Sighting)
    arrive.look(inbox(folder))
    (folder / "x.jsonl").rename(tmp_path / "x.jsonl")
    (folder / "y.jsonl").unlink()
    assert porch.until_sentinel(folder) == []


def test_moving_out_does_not_delay_the_next_ring(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """A removal from the folder is not even among the events that the kernel is asked for."""
    removals = InotifyConstants.IN_MOVED_FROM | InotifyConstants.IN_DELETE
    assert not arrive._MASK & removals


def test_hidden_names_do_not_ring(porch: Porch, folder: Path) -> None:
    """Neither our own claims nor other programs' temporary names wake anybody."""
    porch.watch(folder)
    (folder / ".sfwatch").mkdir()
    (folder / ".sfwatch" / "x.jsonl").touch()
    (folder / ".x.jsonl.Ab12").touch()
    assert porch.until_sentinel(folder) == []


@pytest.mark.parametrize(
    "raw", [b"latin-\xe4.jsonl", b"new\nline.jsonl", b"n" * 249 + b".jsonl", b"-x \t*.jsonl"]
)
def test_odd_names_ring_as_they_are(porch: Porch, folder: Path, raw: bytes) -> None:
    """Any bytes that the kernel takes for a name come through, and are found by a look under the same name."""
    porch.watch(folder)
    name = os.fsdecode(raw)
    (folder / name).write_bytes(LINE)
    assert porch.next() == rang(name)
    assert arrive.look(inbox(folder)).names == [name]
    sighting = arrive.sight(inbox(folder), name, wall=0.0, moved_in=False)
    assert isinstance(sighting, Sighting)
    assert sighting.tail is Tail.GOOD


def test_links_fifos_and_folders_ring(porch: Porch, folder: Path) -> None:
    """They are for the look to refuse, with a reason."""
    porch.watch(folder)
    (folder / "link.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "folder.jsonl").mkdir()
    expected = [rang(name) for name in ("link.jsonl", "fifo.jsonl", "folder.jsonl")]
    assert porch.until_sentinel(folder) == expected


def test_an_inbox_behind_a_symbolic_link_rings(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """The folder is watched, not the link."""
    (tmp_path / "link").symlink_to(folder)
    porch.watch(tmp_path / "link")
    assert porch.until_sentinel(folder) == []


def test_watching_twice_changes_nothing(porch: Porch, folder: Path) -> None:
    """So it may be done before every look."""
    porch.watch(folder)
    porch.watch(folder)
    assert porch.doorbell.healthy("in")
    assert porch.until_sentinel(folder) == []


def test_one_thread_serves_all_inboxes(porch: Porch, tmp_path: Path) -> None:
    """A thread and an inotify instance in all, not for each folder; the instance is not left to children."""
    before = threading.active_count()
    for number in range(50):
        (tmp_path / str(number)).mkdir()
        porch.watch(tmp_path / str(number), str(number))
    assert threading.active_count() == before + 1
    (tmp_path / "49" / "x.jsonl").touch()
    assert porch.next() == Rang("49", "x.jsonl", moved_in=False)
    assert porch.doorbell._reader is not None
    assert not os.get_inheritable(porch.doorbell._reader._inotify_fd)


def test_an_unwatched_inbox_is_silent(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """Unwatching ends the rings of that inbox alone; of an inbox that isn't watched it does nothing."""
    (tmp_path / "other").mkdir()
    porch.watch(tmp_path / "other", "other")
    porch.watch(folder)
    porch.doorbell.unwatch("other")
    porch.doorbell.unwatch("other")
    (tmp_path / "other" / "x.jsonl").touch()
    assert not porch.doorbell.healthy("other")
    assert porch.doorbell.healthy("in")
    assert porch.until_sentinel(folder) == []


def test_closing_leaves_nothing_behind(folder: Path) -> None:
    """No thread, no descriptor and no ring; closing again does nothing."""
    before = open_files(), threading.active_count()
    porch = Porch()
    porch.watch(folder)
    porch.doorbell.close()
    porch.doorbell.close()
    (folder / "x.jsonl").touch()
    assert porch.mailbox.empty()
    assert not porch.doorbell.healthy("in")
    assert (open_files(), threading.active_count()) == before


# What ends a watch


def assert_watched_anew(porch: Porch, folder: Path) -> None:
    assert not porch.doorbell.healthy("in")
    porch.watch(folder)
    assert porch.doorbell.healthy("in")
    assert porch.until_sentinel(folder) == []


def test_a_deleted_inbox_is_told(porch: Porch, folder: Path) -> None:
    """Once; and the folder that takes its place can be watched."""
    porch.watch(folder)
    folder.rmdir()
    assert porch.next() == WatchEnded("in", "it was deleted")
    folder.mkdir()
    assert_watched_anew(porch, folder)


def test_a_renamed_inbox_is_told(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """What happens in the folder that went away rings no more, what happens in the new one does."""
    porch.watch(folder)
    folder.rename(tmp_path / "away")
    assert porch.next() == WatchEnded("in", "it was renamed or moved away")
    folder.mkdir()
    (tmp_path / "away" / "x.jsonl").touch()
    assert_watched_anew(porch, folder)


@as_root
def test_an_unmounted_inbox_is_told(porch: Porch, folder: Path) -> None:
    """The empty mount point that is left looks like an idle inbox otherwise."""
    with mounted(folder, "-t", "tmpfs", "tmpfs"):
        porch.watch(folder)
        subprocess.run(["umount", folder], check=True)
        assert porch.next() == WatchEnded("in", "its filesystem was unmounted")
    with mounted(folder, "-t", "tmpfs", "tmpfs"):
        assert_watched_anew(porch, folder)
        porch.doorbell.close()


def test_a_missing_inbox_is_refused_in_words(porch: Porch, tmp_path: Path) -> None:
    """Not by an exception; and what can't be watched is not healthy."""
    answer = porch.doorbell.watch("in", tmp_path / "none", recursive=False)
    assert answer == f"{tmp_path}/none: it can't be watched: No such file or directory"
    assert not porch.doorbell.healthy("in")


def test_a_file_is_no_inbox(porch: Porch, tmp_path: Path) -> None:
    """Only folders are watched."""
    (tmp_path / "x").touch()
    answer = porch.doorbell.watch("in", tmp_path / "x", recursive=False)
    assert answer == f"{tmp_path}/x: it can't be watched: Not a directory"


def test_lost_events_are_told(folder: Path) -> None:
    """The kernel's queue runs over while the reader is held up; then each inbox must be looked at."""
    rings: queue.SimpleQueue[AnyRing] = queue.SimpleQueue()
    go_on = threading.Event()

    def slow_ring(ring: AnyRing) -> None:
        rings.put(ring)
        go_on.wait(60)

    doorbell = Doorbell(slow_ring)
    doorbell.watch("in", folder, recursive=False)
    (folder / "a").write_bytes(LINE)
    assert rings.get(timeout=5) == rang("a")  # the reader stands still from here on
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for _ in range(limit // 2 + 2):  # alternately, since the kernel merges equal events
        (folder / "a").write_bytes(LINE)
        (folder / "b").write_bytes(LINE)
    go_on.set()
    while (ring := rings.get(timeout=5)) != Overflowed("in"):
        assert isinstance(ring, Rang)
    (folder / SENTINEL).touch()
    while rings.get(timeout=5) != rang(SENTINEL):
        pass
    doorbell.close()


def test_a_reader_that_fails_says_so_and_is_replaced(folder: Path, tmp_path: Path) -> None:
    """Its error is not swallowed: the thread ends, no inbox is healthy, `watch` mends each."""
    porch = Porch()
    failing = True

    def ring(ring: AnyRing) -> None:
        if failing and isinstance(ring, Rang):
            raise ZeroDivisionError
        porch.mailbox.put(ring)

    porch.doorbell = Doorbell(ring)
    (tmp_path / "other").mkdir()
    porch.watch(tmp_path / "other", "other")
    porch.watch(folder)
    reader = porch.doorbell._reader
    assert reader is not None
    (folder / "x.jsonl").touch()
    broken = porch.next()
    assert isinstance(broken, Broken)
    assert isinstance(broken.bug, ZeroDivisionError)
    ended = [porch.next(), porch.next()]
    assert [ring.inbox for ring in ended if isinstance(ring, WatchEnded)] == ["other", "in"]
    reader.join(5)
    failing = False
    assert_watched_anew(porch, folder)
    assert not porch.doorbell.healthy("other")
    porch.doorbell.unwatch("other")
    assert porch.doorbell.healthy("in")
    porch.doorbell.close()


def test_a_reader_that_fails_frees_its_descriptors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user has 128 inotify instances: each one that is lost is missed."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    before = open_files()
    doorbell = Doorbell(lambda _: 1 / 0)  # type: ignore[arg-type]
    doorbell.watch("in", folder, recursive=False)
    reader = doorbell._reader
    assert reader is not None
    (folder / "x.jsonl").touch()
    reader.join(5)
    doorbell.close()
    assert open_files() == before


WATCH_SOME = """
import json, sys
from pathlib import Path
from sfwatch.arrive import Doorbell
doorbell = Doorbell(lambda ring: None)
answers = [doorbell.watch(path, Path(path), recursive=len(sys.argv) == 2) for path in sys.argv[1:]]
print(json.dumps([answers, [doorbell.healthy(path) for path in sys.argv[1:]]]))
doorbell.close()
"""


def limited(what: str, number: int) -> tuple[str, ...]:
    """In a user namespace of its own, where a limit can be lowered for nobody else."""
    script = f'echo {number} > /proc/sys/user/{what} && exec "$@"'
    command = ("unshare", "--user", "--map-root-user", "sh", "-c", script, "sh")
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("user namespaces are not to be had here")
    return command


def test_the_limit_of_watches_is_named(tmp_path: Path) -> None:
    """ENOSPC reads like a full disk; what is meant is a sysctl. The inboxes before it are watched."""
    folders = [tmp_path / name for name in "abc"]
    for path in folders:
        path.mkdir()
    answers, healthy = python(WATCH_SOME, *folders, under=limited("max_inotify_watches", 2))
    assert answers[:2] == [None, None]
    assert "fs.inotify.max_user_watches is " in answers[2]
    assert healthy == [True, True, False]


def test_a_tree_beyond_the_limit_is_watched_in_part(tmp_path: Path) -> None:
    """And it is said."""
    for name in "abcdef":
        (tmp_path / name).mkdir()
    answers, healthy = python(WATCH_SOME, tmp_path, under=limited("max_inotify_watches", 3))
    assert "fs.inotify.max_user_watches is " in answers[0]
    assert healthy == [True]


def test_the_limit_of_instances_is_named(folder: Path) -> None:
    """It is shared with all programs of the user."""
    under = limited("max_inotify_instances", 0)
    answers, healthy = python(WATCH_SOME, folder, under=under)
    assert "fs.inotify.max_user_instances is " in answers[0]
    assert healthy == [False]


LESS_POWERFUL = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-lease")
STRANGER = 54321


@as_root
def test_an_inbox_closed_to_us_is_refused(folder: Path) -> None:
    """The library passes over EACCES and believes that it watches."""
    folder.chmod(0)
    os.chown(folder, STRANGER, STRANGER)
    answers, healthy = python(WATCH_SOME, folder, folder.parent, under=LESS_POWERFUL)
    assert answers == [f"{folder}: it can't be watched: Permission denied", None]
    assert healthy == [False, True]


# Trees


def test_a_tree_rings_with_relative_names(porch: Porch, folder: Path) -> None:
    """Sub-folders that are there are watched, hidden ones are not."""
    (folder / "a" / "b").mkdir(parents=True)
    (folder / ".h").mkdir()
    porch.watch(folder, recursive=True)
    (folder / ".h" / "x.jsonl").touch()
    (folder / "a" / "b" / "x.jsonl").touch()
    (folder / "a" / "y.jsonl").touch()
    assert set(porch.until_sentinel(folder)) == {rang("a/b/x.jsonl"), rang("a/y.jsonl")}


def test_new_folders_are_told_once_and_watched_with_the_next_watch(porch: Porch, folder: Path) -> None:
    """A thousand new folders are one ring; `watch` before the look arms them."""
    porch.watch(folder, recursive=True)
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    assert porch.until_sentinel(folder) == [FoldersChanged("in")]
    assert porch.doorbell.healthy("in")
    porch.watch(folder, recursive=True)
    (folder / "a" / "x.jsonl").touch()
    (folder / "c").mkdir()
    assert set(porch.until_sentinel(folder)) == {rang("a/x.jsonl"), FoldersChanged("in")}


def test_a_moved_folder_is_watched_under_its_new_name(porch: Porch, folder: Path) -> None:
    """What lies below it too."""
    (folder / "a" / "b").mkdir(parents=True)
    porch.watch(folder, recursive=True)
    (folder / "a").rename(folder / "z")
    assert porch.until_sentinel(folder) == [FoldersChanged("in")]
    assert not porch.doorbell.healthy("in")
    porch.watch(folder, recursive=True)
    assert porch.doorbell.healthy("in")
    (folder / "z" / "b" / "x.jsonl").touch()
    assert set(porch.until_sentinel(folder)) == {rang("z/b/x.jsonl")}


def test_folders_that_come_and_go_end_nothing(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """The order of moves and removals that kills the reader of watchdog's own observer."""
    (folder / "s").mkdir()
    porch.watch(folder, recursive=True)
    (folder / "s").rename(tmp_path / "s")
    (folder / "s").mkdir()
    (folder / "s").rmdir()
    shutil.rmtree(tmp_path / "s")
    assert porch.until_sentinel(folder) == [FoldersChanged("in")]
    porch.watch(folder, recursive=True)
    assert porch.doorbell.healthy("in")
    assert porch.until_sentinel(folder) == []


@as_root
def test_one_folder_under_two_paths_rings_for_both(porch: Porch, folder: Path, tmp_path: Path) -> None:
    """The kernel has one watch for a folder however it is reached."""
    with mounted(tmp_path / "bind", "--bind", str(folder)):
        porch.watch(folder)
        porch.watch(tmp_path / "bind", "bind")
        (folder / "x.jsonl").touch()
        assert {porch.next(), porch.next()} == {rang("x.jsonl"), Rang("bind", "x.jsonl", moved_in=False)}
        porch.doorbell.unwatch("bind")
        assert porch.doorbell.healthy("in")


# Looks


def test_a_look_tells_candidates_from_others(folder: Path) -> None:
    """What matches is listed whatever it is; our own folders and markers are nobody's others."""
    for name in ("a.jsonl", "B.JSONL", "c.txt", ".d.jsonl", "e.jsonl.part", "a.jsonl.ok"):
        (folder / name).touch()
    for name in ("f.jsonl", ".sfwatch", "done", "else"):
        (folder / name).mkdir()
    seen = arrive.look(inbox(folder, done=folder / "done", settle_marker=".ok"))
    assert sorted(seen.names) == ["B.JSONL", "a.jsonl", "f.jsonl"]
    assert seen.others == len(["c.txt", ".d.jsonl", "e.jsonl.part", "else"])


def test_a_look_compares_with_what_is_known(folder: Path) -> None:
    """What is known and there is not told again: a hundred thousand may be waiting."""
    for name in ("new.jsonl", "known.jsonl", "parked.txt", "other.txt"):
        (folder / name).touch()
    assert arrive.look(inbox(folder)).missing is None
    seen = arrive.look(inbox(folder), {"known.jsonl", "parked.txt", "gone.jsonl"})
    assert (seen.names, seen.missing, seen.others) == (["new.jsonl"], {"gone.jsonl"}, 1)


def test_a_look_at_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """It is never an empty inbox."""
    for recursive in (False, True):
        with pytest.raises(FileNotFoundError):
            arrive.look(inbox(tmp_path / "none", recursive=recursive))


def test_a_look_at_a_tree(folder: Path, tmp_path: Path) -> None:
    """Names are relative; hidden folders and our own are left out, and no link is followed."""
    for name in ("a/b", ".sfwatch/i", ".hidden", "a/.sfwatch", "done", "x.jsonl"):
        (folder / name).mkdir(parents=True)
        (folder / name / "f.jsonl").touch()
    (folder / "a" / "link").symlink_to(tmp_path)
    (folder / "link.jsonl").symlink_to(folder)
    (folder / "other").touch()
    seen = arrive.look(inbox(folder, recursive=True, done=folder / "done"))
    assert sorted(seen.names) == ["a/b/f.jsonl", "link.jsonl", "x.jsonl/f.jsonl"]
    assert (seen.others, seen.crossed, seen.unreadable) == (2, (), ())


@as_root
def test_a_look_at_a_tree_stays_on_its_mount(folder: Path, tmp_path: Path) -> None:
    """A bind mount has the same device number and is another mount all the same."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jsonl").touch()
    with mounted(folder / "bind", "--bind", str(tmp_path / "elsewhere")):
        seen = arrive.look(inbox(folder, recursive=True))
    assert (seen.names, seen.crossed) == ([], ("bind",))


def test_a_deep_tree_is_looked_at_to_its_end(folder: Path) -> None:
    """Deeper than Python's stack; what no path can name any more is told as unreadable."""
    names = ["d"] * 2500
    fd = os.open(folder, os.O_PATH)
    for name in names:
        os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_PATH, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    seen = arrive.look(inbox(folder, recursive=True))
    assert len(seen.crossed) + len(seen.unreadable) == 1
    subprocess.run(["rm", "-r", folder], check=True)


LOOK = """
import json, sys
from pathlib import Path
from sfwatch.arrive import look
from sfwatch.settings import Inbox
path = Path(sys.argv[1])
seen = look(Inbox(path=path, name="in", done=path, failed=path, recursive=True))
print(json.dumps([seen.names, seen.unreadable]))
"""


@as_root
def test_a_sub_folder_closed_to_us_is_told(folder: Path) -> None:
    """The rest of the tree is seen all the same."""
    (folder / "closed").mkdir(mode=0)
    os.chown(folder / "closed", STRANGER, STRANGER)
    (folder / "x.jsonl").touch()
    assert python(LOOK, folder, under=LESS_POWERFUL) == [["x.jsonl"], ["closed"]]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("x.jsonl", True),
        ("X.JsonL", True),
        ("a/b/x.jsonl", True),
        ("ü\n.jsonl", True),
        ("\udce4.jsonl", True),
        (".x.jsonl", False),
        ("a/.b/x.jsonl", False),
        (".sfwatch/i/x.jsonl", False),
        ("x.json", False),
        ("x.jsonl.filepart", False),
        ("x.jsonl~", False),
        ("x.jsonl.fileid.json", False),
        ("x.jsonl.error.json", False),
        ("", False),
    ],
)
def test_candidates_by_default(tmp_path: Path, name: str, wanted: bool) -> None:  # noqa: FBT001
    """Names that end in .jsonl in any letter case, unless hidden."""
    assert arrive.candidate(name, inbox(tmp_path)) == wanted


@pytest.mark.parametrize(
    "suffix", [*arrive.TEMPORARY_SUFFIXES, *arrive.OWN_SUFFIXES, ".OK", ".PART", ".Error.json"]
)
def test_no_pattern_takes_unfinished_files_or_our_own(tmp_path: Path, suffix: str) -> None:
    """Not even one that takes everything."""
    takes_all = inbox(tmp_path, match=("*", "*.ok"), settle_marker=".ok")
    assert arrive.candidate("x.jsonl", takes_all)
    assert not arrive.candidate("x.jsonl" + suffix, takes_all)


def test_several_patterns(tmp_path: Path) -> None:
    """Any of them will do; they are matched with the last component."""
    two = inbox(tmp_path, match=("batch-[0-9]*.TXT", "*.jsonl"))
    assert arrive.candidate("a/BATCH-7.txt", two)
    assert arrive.candidate("x.jsonl", two)
    assert not arrive.candidate("batch-a.txt", two)


def test_a_marker_rings_for_its_file(tmp_path: Path) -> None:
    """A ring is about a file, or about nothing that anybody takes."""
    marked = inbox(tmp_path, settle_marker=".ok")
    assert arrive.subject("a/x.jsonl.ok", marked) == "a/x.jsonl"
    assert arrive.subject("x.jsonl", marked) == "x.jsonl"
    assert arrive.subject("x.txt.ok", marked) is None
    assert arrive.subject("x.jsonl.ok", inbox(tmp_path)) is None


# Sights


def sight(folder: Path, name: str = "x.jsonl", **settings: object) -> Sighting | Unreadable:
    return arrive.sight(inbox(folder, **settings), name, wall=2e9, moved_in=False)


def sighted(folder: Path, name: str = "x.jsonl", **settings: object) -> Sighting:
    sighting = sight(folder, name, **settings)
    assert isinstance(sighting, Sighting)
    return sighting


LONG = b'{"custom_id": "' + b"a" * arrive.TAIL_BYTES + b'"}'


@pytest.mark.parametrize(
    ("content", "tail"),
    [
        (b"", Tail.EMPTY),
        (LINE, Tail.GOOD),
        (LINE * 10_000, Tail.GOOD),
        (LINE + b"\n \r\n\n", Tail.GOOD),
        (LINE[:-1] + b"\r\n", Tail.GOOD),
        (LINE + LINE[:-1], Tail.NO_NEWLINE),
        (LINE[:-1] + b"  ", Tail.NO_NEWLINE),
        (LINE + LINE[:-2], Tail.UNPARSED),
        (LINE + b'{"custom_id": "b\n', Tail.UNPARSED),
        (LINE + b"\xff\xfe\n", Tail.UNPARSED),
        (LINE + b"[" * 60_000 + b"\n", Tail.UNPARSED),
        (b"\n\n", Tail.UNPARSED),
        (b'{"a": "\\ud800", "b": 1e999}\n', Tail.GOOD),
        (LINE + b"\0", Tail.NUL),
        (LINE + b"\0" * 5000, Tail.NUL),
        (LINE + LONG + b"\n", Tail.GOOD),
        (LINE + LONG, Tail.UNPARSED),
        (LINE + LONG[:-1] + b"\n", Tail.UNPARSED),
        (LINE + b"\n" * (arrive.TAIL_BYTES + 1), Tail.UNPARSED),
    ],
)
def test_tails(folder: Path, content: bytes, tail: Tail) -> None:
    """What is judged is the last line, as both decoders read it, its newline, and NUL bytes at the end."""
    (folder / "x.jsonl").write_bytes(content)
    seen = sighted(folder)
    assert (seen.tail, seen.lease, seen.fingerprint.size) == (tail, Lease.FREE, len(content))


def test_a_file_that_is_not_filled_yet_has_a_hole(folder: Path) -> None:
    """Stretched or allocated in advance, and even if its end is written already."""
    with (folder / "x.jsonl").open("wb") as file:
        file.write(LINE)
        file.seek(1 << 20)
        file.write(LINE)
    assert sighted(folder).tail is Tail.HOLE
    with (folder / "x.jsonl").open("wb") as file:
        file.write(LINE)
        os.posix_fallocate(file.fileno(), 0, 1 << 20)
    assert sighted(folder).tail is Tail.HOLE


def test_a_file_that_shrinks_under_the_eyes_is_judged_by_what_is_left(folder: Path) -> None:
    """The next look sees that it changed; this one must not fail."""
    (folder / "x.jsonl").write_bytes(LINE)
    fd = os.open(folder / "x.jsonl", os.O_RDONLY)
    os.truncate(folder / "x.jsonl", 0)
    assert arrive.read_tail(fd, len(LINE)) is not Tail.GOOD
    os.close(fd)


def test_a_writer_makes_the_file_busy(folder: Path) -> None:
    """By whatever name it holds the file; how the file ends is not asked then."""
    (folder / "x.jsonl").write_bytes(LINE)
    (folder / "elsewhere").hardlink_to(folder / "x.jsonl")
    with (folder / "elsewhere").open("ab"):
        seen = sighted(folder)
        assert (seen.lease, seen.tail) == (Lease.BUSY, None)
    assert sighted(folder).lease is Lease.FREE


SIGHT = """
import json, sys
from pathlib import Path
from sfwatch.arrive import sight
from sfwatch.settings import Inbox
path = Path(sys.argv[1])
seen = sight(Inbox(path=path, name="in", done=path, failed=path), "x.jsonl", wall=0.0, moved_in=False)
print(json.dumps(getattr(seen, "detail", None) or [seen.lease, seen.tail]))
"""


@as_root
def test_without_the_right_to_ask_nothing_is_proven(folder: Path) -> None:
    """Another user's file, without CAP_LEASE: read it may be, but the kernel doesn't say who writes."""
    (folder / "x.jsonl").write_bytes(LINE)
    (folder / "x.jsonl").chmod(0o644)
    os.chown(folder / "x.jsonl", STRANGER, STRANGER)
    assert python(SIGHT, folder, under=LESS_POWERFUL) == ["unproven", "good"]
    assert sighted(folder).lease is Lease.FREE


@as_root
def test_a_forbidden_file_is_described_with_its_remedy(folder: Path) -> None:
    """Owner, mode and what to do: Python's tempfile and a rename yield such files."""
    path = folder / "x.jsonl"
    path.write_bytes(LINE)
    path.chmod(0o600)
    os.chown(path, STRANGER, 0)
    detail = f"{path}: owner {STRANGER}, group 0, mode 0600: user 0 may not read it; chmod g+r"
    assert python(SIGHT, folder, under=LESS_POWERFUL) == detail
    path.chmod(0o640)
    os.chown(path, STRANGER, STRANGER)
    answer = python(SIGHT, folder, under=LESS_POWERFUL)
    assert str(answer).endswith("let its group be one of 0 (chgrp)")
    path.chmod(0o600)
    answer = python(SIGHT, folder, under=LESS_POWERFUL)
    assert str(answer).endswith("let its group be one of 0 (chgrp) and chmod g+r")


@as_root
def test_a_lease_that_somebody_holds_makes_the_file_unreadable_for_now(folder: Path) -> None:
    """EAGAIN and its like pass: no error of the program, and no verdict on the file."""
    import fcntl

    (folder / "x.jsonl").write_bytes(LINE)
    fd = os.open(folder / "x.jsonl", os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        assert sight(folder) == Unreadable(f"{folder}/x.jsonl: {os.strerror(errno.EAGAIN)}", size=len(LINE))
    finally:
        os.close(fd)


def test_what_is_no_regular_file_is_never_opened(folder: Path, tmp_path: Path) -> None:
    """A FIFO's writer stays blocked, a link is not followed, not even one on the way."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jsonl").write_bytes(LINE)
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "folder.jsonl").mkdir()
    (folder / "link.jsonl").symlink_to(tmp_path / "secret" / "x.jsonl")
    (folder / "dangling.jsonl").symlink_to("nowhere")
    (folder / "way").symlink_to(tmp_path / "secret")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.jsonl"))
        kinds = {}
        for name in ("fifo", "folder", "link", "dangling", "socket", "way/x"):
            with pytest.raises(NotRegular) as raised:
                sight(folder, f"{name}.jsonl")
            kinds[name] = raised.value.kind
    assert kinds == {
        "fifo": "fifo",
        "folder": "folder",
        "link": "symlink",
        "dangling": "symlink",
        "socket": "socket",
        "way/x": "symlink",
    }


def test_what_is_gone_is_gone(folder: Path) -> None:
    """The file, its folder or the whole inbox."""
    for path, name in ((folder, "x.jsonl"), (folder, "a/x.jsonl"), (folder / "none", "x.jsonl")):
        with pytest.raises(FileNotFoundError):
            sight(path, name)


def test_markers(folder: Path) -> None:
    """The marker is the name with the suffix, whatever lies there; a name too long for it has none."""
    (folder / "a").mkdir()
    (folder / "a" / "x.jsonl").write_bytes(LINE)
    assert not sighted(folder, "a/x.jsonl", settle_marker=".ok").marker
    (folder / "a" / "x.jsonl.ok").touch()
    assert sighted(folder, "a/x.jsonl", settle_marker=".ok").marker
    assert not sighted(folder, "a/x.jsonl").marker
    longest = "n" * 249 + ".jsonl"
    (folder / longest).write_bytes(LINE)
    assert not sighted(folder, longest, settle_marker=".ok").marker


def test_age_is_that_of_the_later_time_and_never_negative(folder: Path) -> None:
    """A copy keeps its old mtime, but not its ctime; a time in the future is no age."""
    path = folder / "x.jsonl"
    path.write_bytes(LINE)
    os.utime(path, (0, 0))
    changed = path.stat().st_ctime_ns / 1e9
    for wall, age in ((changed + 5, 5.0), (changed - 5, None)):
        seen = arrive.sight(inbox(folder), "x.jsonl", wall=wall, moved_in=True)
        assert isinstance(seen, Sighting)
        assert seen.moved_in
        assert seen.age_s == (None if age is None else pytest.approx(age, abs=1e-3))


def test_an_inbox_behind_a_symbolic_link_is_looked_at(folder: Path, tmp_path: Path) -> None:
    """The path that was configured may lead through links; what lies in the inbox may not."""
    (folder / "x.jsonl").write_bytes(LINE)
    (tmp_path / "link").symlink_to(folder)
    for recursive in (False, True):
        assert arrive.look(inbox(tmp_path / "link", recursive=recursive)).names == ["x.jsonl"]
    assert sighted(tmp_path / "link").tail is Tail.GOOD


# How far the kernel is trusted


@as_root
def test_local_filesystems_are_trusted_unless_forbidden(folder: Path) -> None:
    """A tmpfs is local; `proof: never` keeps the rings and takes away the trust."""
    with mounted(folder, "-t", "tmpfs", "tmpfs"):
        auto = arrive.watch_mode(folder, proof=Proof.AUTO)
        never = arrive.watch_mode(folder, proof=Proof.NEVER)
    assert (auto.mode, auto.fs_type, auto.trusted) == ("inotify", "tmpfs", True)
    assert (never.mode, never.fs_type, never.trusted) == ("inotify", "tmpfs", False)
    assert "proof: never" in never.why


@pytest.mark.parametrize("proof", Proof)
def test_unknown_filesystems_are_polled(proof: Proof) -> None:
    """Whatever is not known to be local is treated as remote."""
    mode = arrive.watch_mode(Path("/proc"), proof=proof)
    assert (mode.mode, mode.fs_type, mode.trusted) == ("polling", "proc", False)
    assert mode.why.startswith("proc: ")

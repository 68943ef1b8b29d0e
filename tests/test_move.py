"""A move overwrites nothing and moves only the file that was sent."""

import hashlib
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from sfwatch import files, move

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away or to mount")

CONTENT = b'{"custom_id": "1"}\n' * 100_000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Scene:
    """A file that was sent, its folder, and the folder that it is to go to."""

    source: Path
    target: Path
    fd: int
    how: str

    def move(self, dst: str = "x.jsonl", sha256: str = DIGEST) -> move.Moved:
        with files.folder(self.source) as source, files.folder(self.target) as target:
            return move.move(source, "x.jsonl", target, dst, fd=self.fd, sha256=sha256)

    def finish(self) -> bool:
        with files.folder(self.source) as source, files.folder(self.target) as target:
            return move.finish(source, "x.jsonl", target, "x.jsonl", fd=self.fd, sha256=DIGEST)


@pytest.fixture(name="scene", params=["rename", "copy"])
def _scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    """Both within one filesystem and between two."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        yield from scene(request.param, tmp_path, Path(elsewhere))


@pytest.fixture(name="across")
def _across(tmp_path: Path) -> Iterator[Scene]:
    """Between two filesystems."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        yield from scene("copy", tmp_path, Path(elsewhere))


def scene(how: str, here: Path, elsewhere: Path) -> Iterator[Scene]:
    source, target = here / "source", elsewhere if how == "copy" else here / "target"
    for folder in (source, target):
        folder.mkdir(exist_ok=True)
    (source / "x.jsonl").write_bytes(CONTENT)
    with files.regular(str(source / "x.jsonl")) as fd:
        before = names(Path("/proc/self/fd"))
        yield Scene(source, target, fd, how)
        assert names(Path("/proc/self/fd")) == before


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_mount_namespace(script: str, *, cwd: Path) -> str:
    return subprocess.check_output(["unshare", "-m", sys.executable, "-c", script], cwd=cwd, text=True)


class TestMove:
    def test_the_file_is_there_and_no_longer_here(self, scene: Scene) -> None:
        """Whole, and nothing else with it."""
        assert scene.move() == move.Moved(scene.how)
        assert (names(scene.source), names(scene.target)) == ([], ["x.jsonl"])
        assert (scene.target / "x.jsonl").read_bytes() == CONTENT

    def test_mode_and_time_go_along(self, scene: Scene) -> None:
        """To the nanosecond; of the mode only the permissions."""
        path = scene.source / "x.jsonl"
        path.chmod(0o604)
        os.utime(path, ns=(1, 1_234_567_891_123_456_789))
        scene.move()
        st = (scene.target / "x.jsonl").stat()
        assert (stat.S_IMODE(st.st_mode), st.st_mtime_ns) == (0o604, 1_234_567_891_123_456_789)

    def test_attributes_go_along_where_they_can(self, scene: Scene) -> None:
        """What the target's filesystem has no room or no way for holds nothing up."""
        with suppress(OSError):
            os.setxattr(scene.source / "x.jsonl", "user.origin", b"tests")
        expected = os.listxattr(scene.source / "x.jsonl") if takes_attributes(scene.target) else []
        scene.move()
        assert os.listxattr(scene.target / "x.jsonl") == expected

    @needs_root
    def test_the_owner_goes_along_where_it_may(self, scene: Scene) -> None:
        """Root may give files away."""
        os.chown(scene.source / "x.jsonl", 4242, 4343)
        scene.move()
        st = (scene.target / "x.jsonl").stat()
        assert (st.st_uid, st.st_gid) == (4242, 4343)

    @needs_root
    def test_a_copy_is_never_setuid(self, across: Scene) -> None:
        """Though the source was."""
        (across.source / "x.jsonl").chmod(0o6755)
        across.move()
        assert stat.S_IMODE((across.target / "x.jsonl").stat().st_mode) == 0o755

    def test_a_taken_name_is_never_overwritten(self, scene: Scene) -> None:
        """Both stay as they were, and no temporary is left."""
        (scene.target / "x.jsonl").write_text("other")
        with pytest.raises(FileExistsError):
            scene.move()
        assert (scene.target / "x.jsonl").read_text() == "other"
        assert (scene.source / "x.jsonl").read_bytes() == CONTENT
        assert names(scene.target) == ["x.jsonl"]

    def test_a_link_to_the_file_itself_is_a_taken_name(self, tmp_path: Path) -> None:
        """Where rename(2) would do nothing and call it a success."""
        for here in scene("rename", tmp_path, tmp_path):
            (here.target / "x.jsonl").hardlink_to(here.source / "x.jsonl")
            with pytest.raises(FileExistsError):
                here.move()

    def test_a_link_at_the_target_is_not_written_through(self, scene: Scene, tmp_path: Path) -> None:
        """A dangling one neither."""
        (scene.target / "x.jsonl").symlink_to(tmp_path / "victim")
        with pytest.raises(FileExistsError):
            scene.move()
        assert not (tmp_path / "victim").exists()
        assert names(scene.source) == ["x.jsonl"]

    def test_what_is_gone_is_said_to_be_gone(self, scene: Scene) -> None:
        """And nothing appears at the target, though the file could still be read."""
        (scene.source / "x.jsonl").unlink()
        with pytest.raises(FileNotFoundError):
            scene.move()
        assert names(scene.target) == []

    @pytest.mark.parametrize("newcomer", ["another file", "longer", "symlink", "folder"])
    def test_a_newcomer_of_the_name_is_not_moved(self, scene: Scene, newcomer: str) -> None:
        """It was never sent: it stays where it is."""
        path = scene.source / "x.jsonl"
        path.rename(scene.source / "sent")
        replace_with(newcomer, path)
        with pytest.raises(move.SourceChanged):
            scene.move()
        assert (names(scene.source), names(scene.target)) == (["sent", "x.jsonl"], [])

    def test_another_inode_of_the_same_bytes_is_the_file_that_was_sent(self, scene: Scene) -> None:
        """Some network filesystems number a file anew with each rename; its bytes prove it."""
        path = scene.source / "x.jsonl"
        path.unlink()
        (scene.source / "placeholder").write_text("so that the inode number is not used again")
        path.write_bytes(CONTENT)
        scene.move()
        assert (scene.target / "x.jsonl").read_bytes() == CONTENT

    def test_a_target_that_is_gone(self, scene: Scene) -> None:
        """A folder removed under our hands costs nothing."""
        with files.folder(scene.source) as source, files.folder(scene.target) as target:
            scene.target.rmdir()
            with pytest.raises(FileNotFoundError):
                move.move(source, "x.jsonl", target, "x.jsonl", fd=scene.fd, sha256=DIGEST)
        assert (scene.source / "x.jsonl").read_bytes() == CONTENT
        scene.target.mkdir()

    def test_an_undecodable_name(self, scene: Scene) -> None:
        """Is moved by its bytes."""
        scene.move(os.fsdecode(b"\xff\xfe.jsonl"))
        assert names(scene.target) == ["\udcff\udcfe.jsonl"]

    def test_the_longest_name(self, scene: Scene) -> None:
        """255 bytes leave no room for a longer temporary name: it has a short one of its own."""
        scene.move("n" * 255)
        assert names(scene.target) == ["n" * 255]


def takes_attributes(folder: Path) -> bool:
    probe = folder / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.origin", b"tests")
    except OSError:
        return False
    finally:
        probe.unlink()
    return True


def replace_with(what: str, path: Path) -> None:
    makers: dict[str, Callable[[], object]] = {
        "another file": lambda: path.write_bytes(CONTENT[:-2] + b"]\n"),
        "longer": lambda: path.write_bytes(CONTENT + b"{}\n"),
        "symlink": lambda: path.symlink_to("sent"),
        "folder": path.mkdir,
    }
    makers[what]()


class TestSwapped:
    """A replacement in the instant between the look and the rename, which `_require_moved` finds afterwards."""

    def test_the_newcomer_is_put_back(self, tmp_path: Path) -> None:
        """What came to the target in place of the file goes back to where it was taken from."""
        for here in scene("rename", tmp_path, tmp_path):
            (here.source / "x.jsonl").unlink()
            (here.target / "x.jsonl").write_text("newcomer")
            with pytest.raises(move.SourceChanged):
                require_moved(here)
            assert (here.source / "x.jsonl").read_text() == "newcomer"
            assert names(here.target) == []

    def test_two_newcomers_are_both_kept(self, tmp_path: Path) -> None:
        """If the name is taken again, what came to the target stays there, and the error says so."""
        for here in scene("rename", tmp_path, tmp_path):
            (here.source / "x.jsonl").write_text("second")
            (here.target / "x.jsonl").write_text("first")
            with pytest.raises(move.SourceChanged, match="lies in the target"):
                require_moved(here)
            assert (here.source / "x.jsonl").read_text() == "second"
            assert (here.target / "x.jsonl").read_text() == "first"


def require_moved(here: Scene) -> None:
    with files.folder(here.source) as source, files.folder(here.target) as target:
        move._require_moved(source, "x.jsonl", target, "x.jsonl", sent=os.fstat(here.fd), sha256=DIGEST)


class TestCopy:
    def test_a_full_disk_leaves_the_source_alone(self, across: Scene) -> None:
        """Nothing of the copy is left."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 2, hard))
        try:
            with pytest.raises(OSError, match="too large"):
                across.move()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (across.source / "x.jsonl").read_bytes() == CONTENT
        assert names(across.target) == []

    def test_a_file_written_to_since_is_not_filed_away(self, across: Scene) -> None:
        """The same inode with other bytes is not what was sent: it stays, and no copy of it appears."""
        with (across.source / "x.jsonl").open("r+b") as writer:
            writer.write(b"!")
        with pytest.raises(move.SourceChanged):
            across.move()
        assert (names(across.source), names(across.target)) == (["x.jsonl"], [])

    def test_what_reads_back_otherwise_is_not_published(self, across: Scene, tmp_path: Path) -> None:
        """A disk that stores other bytes than it was given is an error, and told as one."""
        (tmp_path / "bad").write_bytes(b"bad")
        with files.regular(str(tmp_path / "bad")) as fd, pytest.raises(OSError, match="reads back otherwise"):
            move._require_faithful(fd, DIGEST)

    def test_the_position_of_the_open_file_does_not_matter(self, across: Scene) -> None:
        """It was read to its end while it was sent."""
        os.lseek(across.fd, 0, os.SEEK_END)
        across.move()
        assert (across.target / "x.jsonl").read_bytes() == CONTENT

    def test_a_newcomer_during_the_copy_stays(self, across: Scene) -> None:
        """The file that was sent is in the target; the newcomer of its name is not removed in its stead."""
        (across.source / "x.jsonl").rename(across.source / "sent")
        (across.source / "x.jsonl").write_text("newcomer")
        with files.folder(across.source) as source, files.folder(across.target) as target:
            move._copy(source, "x.jsonl", target, "x.jsonl", fd=across.fd, sha256=DIGEST)
        assert (across.source / "x.jsonl").read_text() == "newcomer"
        assert (across.target / "x.jsonl").read_bytes() == CONTENT

    @needs_root
    def test_no_space_left(self, tmp_path: Path) -> None:
        """On a target that is too small: the source whole, the target empty."""
        script = PRELUDE + (
            "mount('-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', 'target')\n"
            "print(attempt(), os.listdir('target'), os.listdir('source'))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path) == "ENOSPC [] ['x.jsonl']\n"

    @needs_root
    def test_two_mounts_of_one_filesystem(self, tmp_path: Path) -> None:
        """Though the numbers of `stat` are the same, it takes a copy; and it is made."""
        script = PRELUDE + (
            "mount('--bind', 'target', 'target')\n"
            "assert os.stat('source').st_dev == os.stat('target').st_dev\n"
            "print(attempt(), os.listdir('target'), os.listdir('source'))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path) == "copy ['x.jsonl'] []\n"

    @needs_root
    def test_a_read_only_target(self, tmp_path: Path) -> None:
        """Costs nothing."""
        script = PRELUDE + (
            "mount('--bind', 'target', 'target'); mount('-o', 'remount,ro,bind', 'target')\n"
            "print(attempt(), os.listdir('target'), os.listdir('source'))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path) == "EROFS [] ['x.jsonl']\n"

    @needs_root
    def test_a_source_that_cannot_be_removed(self, tmp_path: Path) -> None:
        """The copy is taken back, so that the file is in one place and not in two."""
        script = PRELUDE + (
            "mount('-t', 'tmpfs', 'tmpfs', 'target')\n"
            "mount('--bind', 'source', 'source'); mount('-o', 'remount,ro,bind', 'source')\n"
            "fd = os.open('source/x.jsonl', os.O_RDONLY)\n"
            "print(attempt(), os.listdir('target'), os.listdir('source'))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path) == "EROFS [] ['x.jsonl']\n"


PRELUDE = """
import errno, hashlib, os, subprocess
from sfwatch import files, move
content = bytes(1_000_000)
for folder in ("source", "target"):
    os.mkdir(folder)
with open("source/x.jsonl", "wb") as file:
    file.write(content)
fd = os.open("source/x.jsonl", os.O_RDONLY)
def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)
def attempt():
    with files.folder("source") as source, files.folder("target") as target:
        try:
            sha256 = hashlib.sha256(content).hexdigest()
            return move.move(source, "x.jsonl", target, "x.jsonl", fd=fd, sha256=sha256).how
        except OSError as error:
            return errno.errorcode[error.errno]
"""


class TestFinish:
    def test_a_copy_whose_source_was_not_yet_removed(self, across: Scene) -> None:
        """The source goes, the copy stays."""
        (across.target / "x.jsonl").write_bytes(CONTENT)
        assert across.finish()
        assert (names(across.source), names(across.target)) == ([], ["x.jsonl"])

    def test_a_link_whose_other_name_was_not_yet_removed(self, tmp_path: Path) -> None:
        """As a crash leaves it where renaming goes by links."""
        for here in scene("rename", tmp_path, tmp_path):
            (here.target / "x.jsonl").hardlink_to(here.source / "x.jsonl")
            assert here.finish()
            assert (names(here.source), names(here.target)) == ([], ["x.jsonl"])

    @pytest.mark.parametrize("newcomer", ["another file", "longer", "symlink", "folder"])
    def test_anything_else_at_the_target_leaves_the_source(self, scene: Scene, newcomer: str) -> None:
        """Only the whole file under the very digest ends a move."""
        replace_with(newcomer, scene.target / "x.jsonl")
        assert not scene.finish()
        assert names(scene.source) == ["x.jsonl"]

    def test_nothing_at_the_target(self, scene: Scene) -> None:
        """The move has to be made anew."""
        assert not scene.finish()
        assert names(scene.source) == ["x.jsonl"]

    def test_a_newcomer_at_the_source_stays(self, across: Scene) -> None:
        """It was never sent."""
        (across.target / "x.jsonl").write_bytes(CONTENT)
        (across.source / "x.jsonl").rename(across.source / "sent")
        (across.source / "x.jsonl").write_text("newcomer")
        assert across.finish()
        assert names(across.source) == ["sent", "x.jsonl"]


def test_one_file_in_one_place_after_a_kill_at_any_call(tmp_path: Path) -> None:
    """Killed before each call of a copy: the source is whole until the target is, under its own name."""
    for call in ("write", "fsync", "renameat2", "unlinkat"):
        for count in (1, 2, 3):
            here = tmp_path / f"{call}{count}"
            here.mkdir()
            with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
                kill_a_copy(here, Path(elsewhere), call, count)


def kill_a_copy(here: Path, elsewhere: Path, call: str, count: int) -> None:
    (here / "x.jsonl").write_bytes(CONTENT)
    command = [sys.executable, "-c", KILLED, str(here), str(elsewhere), DIGEST, call, str(count)]
    subprocess.run(command, check=False)
    whole = [path for path in (here / "x.jsonl", elsewhere / "x.jsonl") if path.exists()]
    assert {move_digest(path) for path in whole} == {DIGEST}
    with files.folder(elsewhere) as target:
        files.sweep_temporaries(target)
    assert set(names(elsewhere)) <= {"x.jsonl"}


def move_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


KILLED = """
import os, signal, sys
from sfwatch import files, move
here, elsewhere, DIGEST, call, count = sys.argv[1:]
left = int(count)
def dying(real):
    def wrapper(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return wrapper
place, name = {"write": (os, "write"), "fsync": (os, "fsync"), "unlinkat": (os, "unlink"),
               "renameat2": (files, "_renameat2")}[call]
setattr(place, name, dying(getattr(place, name)))
with files.folder(here) as source, files.folder(elsewhere) as target:
    fd = files.open_regular("x.jsonl", dir_fd=source)
    move.move(source, "x.jsonl", target, "x.jsonl", fd=fd, sha256=digest)
"""

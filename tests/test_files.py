"""Reaching files without following, replacing or half publishing."""

import itertools
import os
import resource
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from sfwatch import files

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else or to mount")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(name="there")
def _there(tmp_path: Path) -> Iterator[int]:
    with files.folder(tmp_path) as fd:
        yield fd


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    before = names(Path("/proc/self/fd"))
    yield
    assert names(Path("/proc/self/fd")) == before


@pytest.fixture(name="elsewhere")
def _elsewhere() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a full disk: the kernel refuses to let a file grow further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_mount_namespace(script: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-m", sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)


class TestFingerprint:
    def test_a_rename_or_chmod_is_no_other_content(self, tmp_path: Path) -> None:
        """Only ctime differs after a rename and a chmod: the content is the same."""
        path = tmp_path / "a"
        path.write_text("x")
        before = files.Fingerprint.of(path.stat())
        path.chmod(0o600)
        path = path.rename(tmp_path / "b")
        assert files.Fingerprint.of(path.stat()).same_content(before)

    def test_an_overwrite_of_the_same_length_is_other_content(self, tmp_path: Path) -> None:
        """The time of the last change tells, though the size does not."""
        path = tmp_path / "a"
        path.write_text("x")
        before = files.Fingerprint.of(path.stat())
        path.write_text("y")
        os.utime(path, ns=(0, before.mtime_ns + 1))
        assert not files.Fingerprint.of(path.stat()).same_content(before)

    def test_a_replacement_is_other_content(self, tmp_path: Path) -> None:
        """A file of the same size and time under the same name is another file."""
        path, other = tmp_path / "a", tmp_path / "b"
        for each in (path, other):
            each.write_text("x")
            os.utime(each, ns=(0, 0))
        before = files.Fingerprint.of(path.stat())
        other.replace(path)
        assert not files.Fingerprint.of(path.stat()).same_content(before)


class TestLease:
    def test_free_while_nobody_writes(self, tmp_path: Path, there: int) -> None:
        """Readers don't count."""
        (tmp_path / "a").write_text("x")
        with files.regular("a", dir_fd=there) as fd, (tmp_path / "a").open():
            assert files.probe_lease(fd) is files.Lease.FREE

    def test_busy_while_somebody_has_it_open_for_writing(self, tmp_path: Path, there: int) -> None:
        """Even one who never writes."""
        (tmp_path / "a").write_text("x")
        with files.regular("a", dir_fd=there) as fd:
            with (tmp_path / "a").open("a"):
                assert files.probe_lease(fd) is files.Lease.BUSY
            assert files.probe_lease(fd) is files.Lease.FREE

    def test_busy_through_another_link(self, tmp_path: Path, there: int) -> None:
        """A writer by another name of the same file is seen."""
        (tmp_path / "a").write_text("x")
        (tmp_path / "b").hardlink_to(tmp_path / "a")
        with files.regular("a", dir_fd=there) as fd, (tmp_path / "b").open("a"):
            assert files.probe_lease(fd) is files.Lease.BUSY

    def test_the_lease_is_given_back_at_once(self, tmp_path: Path, there: int) -> None:
        """A probed file can be opened for writing without waiting."""
        (tmp_path / "a").write_text("x")
        with files.regular("a", dir_fd=there) as fd:
            files.probe_lease(fd)
            os.close(os.open(tmp_path / "a", os.O_WRONLY | os.O_NONBLOCK))

    def test_unproven_where_there_are_no_leases(self, tmp_path: Path) -> None:
        """A folder has none, as have files on some filesystems: the kernel can't say."""
        with files.folder(tmp_path) as fd:
            assert files.probe_lease(fd) is files.Lease.UNPROVEN

    @needs_root
    def test_unproven_for_somebody_elses_file(self, tmp_path: Path) -> None:
        """Without CAP_LEASE only a file's owner is told."""
        (tmp_path / "a").write_text("x")
        tmp_path.chmod(0o755)
        script = (
            "import os; from sfwatch import files; os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
            "print(files.probe_lease(os.open('a', os.O_RDONLY)))"
        )
        told = subprocess.check_output([sys.executable, "-c", script], cwd=tmp_path, text=True)
        assert told == "unproven\n"


class TestOpenRegular:
    def test_opens_a_regular_file_for_reading_only(self, tmp_path: Path, there: int) -> None:
        """What is opened reads, does not write, and is not inherited by children."""
        (tmp_path / "a").write_bytes(b"x")
        with files.regular("a", dir_fd=there) as fd:
            assert os.read(fd, 9) == b"x"
            assert not os.get_inheritable(fd)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(fd, b"y")

    @pytest.mark.parametrize("kind", ["symlink", "fifo", "socket", "device", "folder"])
    def test_names_whatever_else_it_is(self, tmp_path: Path, kind: str) -> None:
        """Nothing but a regular file is opened, and the error says what it was."""
        path = tmp_path / "odd.jsonl"
        with made(kind, path) as odd, pytest.raises(files.NotRegular) as caught:
            files.open_regular(str(odd))
        assert caught.value.kind == kind

    @pytest.mark.parametrize("target", ["whole.jsonl", "nowhere", "odd.jsonl"])
    def test_no_link_is_followed(self, tmp_path: Path, there: int, target: str) -> None:
        """Whether it leads to a file, nowhere or to itself."""
        (tmp_path / "whole.jsonl").write_text("{}\n")
        (tmp_path / "odd.jsonl").symlink_to(target)
        with pytest.raises(files.NotRegular) as caught:
            files.open_regular("odd.jsonl", dir_fd=there)
        assert caught.value.kind == "symlink"

    def test_a_fifo_is_not_touched(self, tmp_path: Path, there: int) -> None:
        """A writer that waits for a reader of a FIFO waits on: it still finds no reader."""
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(files.NotRegular):
            files.open_regular("fifo", dir_fd=there)
        with pytest.raises(OSError, match="No such device or address"):
            os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK)

    def test_no_component_of_a_relative_name_is_followed(self, tmp_path: Path, there: int) -> None:
        """A link in place of a sub-folder leads nowhere."""
        (tmp_path / "real").mkdir()
        (tmp_path / "real/a").write_text("x")
        (tmp_path / "link").symlink_to("real")
        os.close(files.open_regular("real/a", dir_fd=there))
        with pytest.raises(files.NotRegular) as caught:
            files.open_regular("link/a", dir_fd=there)
        assert caught.value.kind == "symlink"

    def test_a_file_in_place_of_a_sub_folder_means_that_the_name_is_gone(
        self, tmp_path: Path, there: int
    ) -> None:
        """As if the file had been removed."""
        (tmp_path / "a").write_text("x")
        with pytest.raises(FileNotFoundError):
            files.open_regular("a/b", dir_fd=there)

    @pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../b", "/etc/passwd", "a//b", "a/", "a\0b"])
    def test_a_name_that_leads_out_is_refused(self, there: int, name: str) -> None:
        """Names from documents that others may have written can't leave the folder."""
        with pytest.raises(ValueError, match="no plain name"):
            files.open_regular(name, dir_fd=there)

    def test_undecodable_names_are_as_good_as_any(self, tmp_path: Path, there: int) -> None:
        """A name that is not UTF-8 is opened by its bytes."""
        name = os.fsdecode(b"caf\xe9.jsonl")
        files.publish(there, name, b"x")
        os.close(files.open_regular(name, dir_fd=there))
        assert names(tmp_path) == ["caf\udce9.jsonl"]


@contextmanager
def made(kind: str, path: Path) -> Iterator[Path]:
    match kind:
        case "symlink":
            path.symlink_to("/etc/passwd")
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path = Path("/dev/null")
        case "socket":
            with closing(socket.socket(socket.AF_UNIX)) as server, files.folder(path.parent) as fd:
                server.bind(f"/proc/self/fd/{fd}/{path.name}")  # its own path may be too long for a socket
    yield path


class TestFolders:
    def test_a_link_to_a_folder_is_not_opened(self, tmp_path: Path) -> None:
        """The last component is not followed."""
        (tmp_path / "link").symlink_to(".")
        with pytest.raises(NotADirectoryError):
            files.open_folder(tmp_path / "link")

    def test_missing_folders_are_made_with_the_mode_wanted(self, tmp_path: Path, there: int) -> None:
        """Whatever the umask; a folder that is there keeps its own."""
        (tmp_path / "a").mkdir(mode=0o700)
        before = os.umask(0o077)
        try:
            with files.below(there, ["a", "b", "c"], make=0o755):
                pass
        finally:
            os.umask(before)
        modes = [stat.S_IMODE((tmp_path / each).stat().st_mode) for each in ("a", "a/b", "a/b/c")]
        assert modes == [0o700, 0o755, 0o755]

    def test_made_folders_keep_the_group_that_they_inherit(self, tmp_path: Path, there: int) -> None:
        """The setgid bit of the folder around stays on."""
        tmp_path.chmod(0o2770)
        with files.below(there, ["a"], make=0o750):
            pass
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o2750

    def test_nothing_is_made_behind_a_link(self, tmp_path: Path, there: int) -> None:
        """A link in place of a folder ends the way."""
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        with pytest.raises(files.NotRegular), files.below(there, ["link", "new"], make=0o700):
            raise AssertionError("unreachable")
        assert names(tmp_path / "real") == []

    def test_a_file_in_the_way_is_no_folder(self, tmp_path: Path, there: int) -> None:
        """It is neither replaced nor waited for."""
        (tmp_path / "a").write_text("x")
        with pytest.raises(FileNotFoundError), files.below(there, ["a"], make=0o700):
            raise AssertionError("unreachable")

    def test_depth_costs_no_descriptors(self, tmp_path: Path, there: int) -> None:
        """A tree deeper than the limit of open files is walked."""
        with files.below(there, ["d"] * 1500, make=0o700), files.below(there, ["d"] * 1500):
            pass
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)


def by_kernel(src: str, dst: str, src_dir_fd: int, dst_dir_fd: int) -> None:
    files.rename_noreplace(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)


RENAMES = {
    "kernel": by_kernel,
    "link": files._rename_by_link,
    "placeholder": files._rename_over_placeholder,
}


@pytest.mark.parametrize("how", RENAMES)
class TestRenameNoreplace:
    def test_moves(self, tmp_path: Path, there: int, how: str) -> None:
        """The file has its new name and not its old one."""
        (tmp_path / "a").write_text("x")
        RENAMES[how]("a", "b", there, there)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b": "x"}

    def test_never_replaces(self, tmp_path: Path, there: int, how: str) -> None:
        """Both files are as they were."""
        (tmp_path / "a").write_text("x")
        (tmp_path / "b").write_text("y")
        with pytest.raises(FileExistsError):
            RENAMES[how]("a", "b", there, there)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "x", "b": "y"}

    def test_two_links_to_one_file_are_no_success(self, tmp_path: Path, there: int, how: str) -> None:
        """Plain rename does nothing there and calls it done."""
        (tmp_path / "a").write_text("x")
        (tmp_path / "b").hardlink_to(tmp_path / "a")
        with pytest.raises(FileExistsError):
            RENAMES[how]("a", "b", there, there)
        assert names(tmp_path) == ["a", "b"]

    def test_a_dangling_link_is_a_taken_name(self, tmp_path: Path, there: int, how: str) -> None:
        """Nothing is written through it."""
        (tmp_path / "a").write_text("x")
        (tmp_path / "b").symlink_to("nowhere")
        with pytest.raises(FileExistsError):
            RENAMES[how]("a", "b", there, there)
        assert names(tmp_path) == ["a", "b"]

    def test_what_is_gone_is_gone(self, tmp_path: Path, there: int, how: str) -> None:
        """And leaves nothing behind at the target."""
        with pytest.raises(FileNotFoundError):
            RENAMES[how]("a", "b", there, there)
        assert names(tmp_path) == []

    def test_another_filesystem_is_said_to_be_one(
        self, tmp_path: Path, there: int, elsewhere: Path, how: str
    ) -> None:
        """EXDEV comes through, and nothing is left at the target."""
        (tmp_path / "a").write_text("x")
        with files.folder(elsewhere) as other, pytest.raises(OSError, match="cross-device"):
            RENAMES[how]("a", "b", there, other)
        assert (names(tmp_path), names(elsewhere)) == (["a"], [])


class TestRenameNames:
    @pytest.mark.parametrize("bad", ["../a", "", "..", "a/b", "a\0b"])
    def test_only_plain_names_are_renamed(self, tmp_path: Path, there: int, bad: str) -> None:
        """Neither source nor target can lie outside the two folders."""
        (tmp_path / "a").write_text("x")
        for src, dst in ((bad, "b"), ("a", bad)):
            with pytest.raises(ValueError, match="no plain name"):
                files.rename_noreplace(src, dst, src_dir_fd=there, dst_dir_fd=there)

    def test_a_c_library_without_the_call(
        self, tmp_path: Path, there: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As on a filesystem that refuses the flag, it goes by link and unlink."""
        monkeypatch.setattr(files, "_LIBC", object())
        (tmp_path / "a").write_text("x")
        (tmp_path / "b").write_text("y")
        with pytest.raises(FileExistsError):
            files.rename_noreplace("a", "b", src_dir_fd=there, dst_dir_fd=there)
        files.rename_noreplace("a", "c", src_dir_fd=there, dst_dir_fd=there)
        assert names(tmp_path) == ["b", "c"]

    def test_four_processes_and_one_name(self, tmp_path: Path) -> None:
        """Of all files that are moved to the same names none is lost, whoever wins."""
        script = (
            "import os, sys; from sfwatch import files\n"
            "a, b = files.open_folder(sys.argv[1]), files.open_folder('target')\n"
            "for name in sorted(os.listdir(a), key=int):\n"
            "    for tried in range(99):\n"
            "        try: files.rename_noreplace(name, f'{name}.{tried}', src_dir_fd=a, dst_dir_fd=b); break\n"
            "        except FileExistsError: pass\n"
        )
        (tmp_path / "target").mkdir()
        for source in "abcd":
            (tmp_path / source).mkdir()
            for name in range(50):
                (tmp_path / source / str(name)).write_text(f"{source} {name}")
        movers = [subprocess.Popen([sys.executable, "-c", script, each], cwd=tmp_path) for each in "abcd"]
        assert [mover.wait() for mover in movers] == [0] * 4
        kept = {path.read_text() for path in (tmp_path / "target").iterdir()}
        assert kept == {f"{source} {name}" for source in "abcd" for name in range(50)}


class TestPublish:
    def test_a_published_file_is_whole_and_alone(self, tmp_path: Path, there: int) -> None:
        """With the mode wanted, whatever the umask, and no temporary beside it."""
        before = os.umask(0o077)
        try:
            files.publish(there, "a", b"x" * 3_000_000)
        finally:
            os.umask(before)
        assert names(tmp_path) == ["a"]
        assert (tmp_path / "a").stat().st_size == 3_000_000
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640

    def test_a_taken_name_stays_as_it_is(self, tmp_path: Path, there: int) -> None:
        """And the temporary goes."""
        (tmp_path / "a").write_text("x")
        with pytest.raises(FileExistsError):
            files.publish(there, "a", b"y")
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "x"}

    def test_a_full_disk_leaves_nothing(self, tmp_path: Path, there: int) -> None:
        """No half of a file, under no name."""
        with largest_file(1000), pytest.raises(OSError, match="too large"):
            files.publish(there, "a", b"x" * 5000)
        assert names(tmp_path) == []

    @needs_root
    def test_it_belongs_to_the_folders_group(self, tmp_path: Path, there: int) -> None:
        """Who may read the folder may read the document."""
        os.chown(tmp_path, -1, 4242)
        files.publish(there, "a", b"x")
        assert (tmp_path / "a").stat().st_gid == 4242

    @needs_root
    def test_no_space_left(self, tmp_path: Path) -> None:
        """On a filesystem that is full the error says so, and the name stays free."""
        script = (
            "import os, subprocess; from sfwatch import files\n"
            "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', '.'], check=True)\n"
            "here = files.open_folder(os.getcwd())\n"
            "try: files.publish(here, 'a', bytes(500_000))\n"
            "except OSError as error: print(error.errno, os.listdir(here))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path).stdout == "28 []\n"


class TestSweep:
    def test_only_our_own_form_is_swept(self, tmp_path: Path, there: int) -> None:
        """Names that only look like it, and whatever is no regular file, stay."""
        likely = [
            ".sfwatch-0123abcd.tmp",
            ".sfwatch-0123abcd.tmp2",
            ".sfwatch-0123ABCD.tmp",
            ".sfwatch-",
            "a.tmp",
        ]
        for name in likely:
            (tmp_path / name).write_text("x")
        (tmp_path / ".sfwatch-00000000.tmp").symlink_to("a.tmp")
        (tmp_path / ".sfwatch-00000001.tmp").mkdir()
        os.mkfifo(tmp_path / ".sfwatch-00000002.tmp")
        assert files.sweep_temporaries(there) == 1
        kept = {".sfwatch-00000000.tmp", ".sfwatch-00000001.tmp", ".sfwatch-00000002.tmp", *likely[1:]}
        assert set(names(tmp_path)) == kept

    def test_one_that_is_being_written_stays(self, tmp_path: Path, there: int) -> None:
        """Another process may be about to publish it."""
        with files.temporary(there) as (_, name):
            assert files.sweep_temporaries(there) == 0
            assert names(tmp_path) == [name]
        assert files.sweep_temporaries(there) == 1

    @needs_root
    def test_somebody_elses_stays(self, tmp_path: Path, there: int) -> None:
        """Only files of our own user are ours to remove."""
        path = tmp_path / ".sfwatch-0123abcd.tmp"
        path.write_text("x")
        os.chown(path, 4242, 4242)
        assert files.sweep_temporaries(there) == 0
        assert path.exists()

    def test_a_temporary_takes_the_next_free_number(
        self, tmp_path: Path, there: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another daemon or a crash may have left one behind; after the last number comes the first."""
        monkeypatch.setattr(files, "_NUMBERS", itertools.count(2**32 - 1))
        (tmp_path / ".sfwatch-ffffffff.tmp").write_text("theirs")
        with files.temporary(there) as (_, name):
            assert name == ".sfwatch-00000000.tmp"
        assert (tmp_path / ".sfwatch-ffffffff.tmp").read_text() == "theirs"

    def test_a_temporary_goes_with_an_error(self, tmp_path: Path, there: int) -> None:
        """Even when the program is told to stop."""
        with pytest.raises(KeyboardInterrupt), files.temporary(there):
            raise KeyboardInterrupt
        assert names(tmp_path) == []


class TestMounts:
    def test_the_type_of_a_known_filesystem(self) -> None:
        """/dev/shm is a tmpfs, /proc is none that could hold an inbox."""
        assert files.mount_of(Path("/dev/shm")).fs_type == "tmpfs"
        assert files.mount_of(Path("/proc")).fs_type not in files.LOCAL_FILESYSTEMS

    def test_a_folder_keeps_its_identity(self, tmp_path: Path) -> None:
        """Whatever is put into it."""
        before = files.identity(tmp_path)
        (tmp_path / "a").write_text("x")
        assert files.identity(tmp_path) == before

    def test_a_replaced_folder_is_another(self, tmp_path: Path) -> None:
        """Though its path is the same."""
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        before = files.identity(inbox)
        inbox.rename(tmp_path / "old")
        inbox.mkdir()
        assert files.identity(inbox) != before

    def test_a_missing_folder_or_a_file_has_none(self, tmp_path: Path) -> None:
        """Both are OSErrors."""
        (tmp_path / "a").write_text("x")
        for name, error in (("a", NotADirectoryError), ("b", FileNotFoundError)):
            with pytest.raises(error):
                files.identity(tmp_path / name)

    @needs_root
    def test_a_mount_over_a_folder_is_seen(self, tmp_path: Path) -> None:
        """Also a bind mount of the very same folder, where no number of `stat` changes."""
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import files\n"
            "here, seen = Path('in\\rbox').absolute(), []; here.mkdir(); seen.append(files.identity(here))\n"
            "subprocess.run(['mount', '--bind', here, here], check=True); seen.append(files.identity(here))\n"
            "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', here], check=True)\n"
            "seen.append(files.identity(here)); print(len(set(seen)), files.mount_of(here).fs_type)\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path).stdout == "3 tmpfs\n"

"""Claims: out of everybody's reach, and back."""

import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sfwatch import claim, files

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else or to mount")

INSTANCE = "0123abcd"
ME = f"{INSTANCE}-0a1b2c"
OTHER = "89abcdef-0a1b2c"
OWNER = claim.Owner(machine="here", state_dir="/var/lib/sfwatch", journal="one")


@pytest.fixture(name="inbox")
def _inbox(tmp_path: Path) -> Path:
    path = tmp_path / "inbox"
    path.mkdir()
    path.chmod(0o3770)
    make(path, ME)
    return path


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    before = names(Path("/proc/self/fd"))
    yield
    assert names(Path("/proc/self/fd")) == before


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def drop(inbox: Path, name: str = "x.jsonl", content: str = "{}\n") -> Path:
    path = inbox / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def make(inbox: Path, folder: str, owner: claim.Owner | None = OWNER) -> str:
    """A claims folder under a known name."""
    path = claim.claims_folder(inbox, folder)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700)
    if owner is not None:
        claim.write_owner(inbox, folder, owner)
    return folder


def mine(inbox: Path) -> Path:
    return claim.claims_folder(inbox, ME)


def as_somebody(script: str, *, cwd: Path) -> str:
    """What a script prints that runs without any right but a stranger's."""
    become = "import os; from pathlib import Path; from sfwatch import claim, files\n"
    become += "os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3)\n"
    cwd.chmod(0o755)
    return subprocess.check_output([sys.executable, "-c", become + script], cwd=cwd, text=True)


ODD: dict[str, Callable[[Path], object]] = {
    "symlink": lambda path: path.symlink_to("/etc/passwd"),
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
}

MAKE = f"""
os.mkdir("inbox/.sfwatch", 0o700); os.mkdir("inbox/.sfwatch/{ME}", 0o700)
"""
TAKE = f"""
try: claim.take(Path("inbox"), "{ME}", "x.jsonl"); print("taken")
except claim.ClaimError as error: print(error)
"""


class TestOwnFolder:
    def test_it_is_made_once(self, tmp_path: Path) -> None:
        """Private, its owner beside it; it is found again, by a daemon with another journal as well."""
        folder = claim.own_folder(tmp_path, INSTANCE, OWNER)
        assert claim.is_ours(folder, INSTANCE)
        assert folder != INSTANCE
        assert claim.own_folder(tmp_path, INSTANCE, replace(OWNER, journal="two")) == folder
        assert claim.owner_of(tmp_path, folder) == OWNER
        assert names(tmp_path / ".sfwatch") == [folder, f"{folder}.owner"]
        modes = [stat.S_IMODE(path.stat().st_mode) & 0o777 for path in (tmp_path / ".sfwatch").iterdir()]
        assert sorted([*modes, (tmp_path / ".sfwatch").stat().st_mode & 0o777]) == [0o600, 0o700, 0o700]

    def test_of_several_the_first_by_name(self, inbox: Path) -> None:
        """A power cut may leave one that was never used."""
        make(inbox, f"{INSTANCE}-000000")
        assert claim.own_folder(inbox, INSTANCE, OWNER) == f"{INSTANCE}-000000"

    @pytest.mark.parametrize(
        "owner", [None, replace(OWNER, machine="there"), replace(OWNER, state_dir="/copy")], ids=str
    )
    def test_another_owner(self, tmp_path: Path, owner: claim.Owner | None) -> None:
        """The state folder was copied with its instance: what the other one claimed is left alone."""
        theirs = make(tmp_path, ME, owner)
        assert claim.own_folder(tmp_path, INSTANCE, OWNER) != theirs
        assert claim.owner_of(tmp_path, theirs) == owner

    def test_a_machine_without_an_id(self, tmp_path: Path) -> None:
        """Makes no folder at each start, for its name is our instance's; see TestForeign for others'."""
        nameless = replace(OWNER, machine=None)
        assert claim.own_folder(tmp_path, INSTANCE, nameless) == claim.own_folder(tmp_path, INSTANCE, nameless)

    def test_the_folder_of_the_first_version(self, inbox: Path) -> None:
        """Is ours, but gets no new claims, whatever says that it may."""
        shutil.rmtree(mine(inbox))
        make(inbox, INSTANCE)
        assert claim.is_ours(INSTANCE, INSTANCE)
        assert claim.own_folder(inbox, INSTANCE, OWNER) != INSTANCE

    @pytest.mark.parametrize("folder", [OTHER, f"{ME}.owner", f"{ME}0", f"{INSTANCE}-", f"{INSTANCE}4-0a1b2c"])
    def test_names_that_are_not_ours(self, folder: str) -> None:
        """Only our instance, and that with six digits."""
        assert not claim.is_ours(folder, INSTANCE)

    def test_an_inbox_that_is_gone(self, tmp_path: Path) -> None:
        """Is never made."""
        with pytest.raises(FileNotFoundError):
            claim.own_folder(tmp_path / "inbox", INSTANCE, OWNER)
        assert names(tmp_path) == []

    def test_an_inbox_reached_through_a_link(self, inbox: Path, tmp_path: Path) -> None:
        """The inbox's own path is the administrator's: it may be a link."""
        (tmp_path / "link").symlink_to(inbox)
        drop(inbox)
        claim.take(tmp_path / "link", claim.own_folder(tmp_path / "link", INSTANCE, OWNER), "x.jsonl")
        assert claim.claimed(inbox, ME) == ["x.jsonl"]

    @pytest.mark.parametrize("where", [".sfwatch", f".sfwatch/{ME}"])
    def test_a_folder_open_to_others_is_not_safe(self, inbox: Path, where: str) -> None:
        """The error names it, its mode, and what to do."""
        (inbox / where).chmod(0o750)
        for attempt in ATTEMPTS:
            with pytest.raises(claim.ClaimError) as caught:
                attempt(inbox)
            assert caught.value.reason == "unsafe"
            assert str(inbox / where) in caught.value.detail
            assert "mode 0750" in caught.value.detail
            assert "chmod 0700" in caught.value.detail

    @pytest.mark.parametrize("where", [".sfwatch", f".sfwatch/{ME}"])
    @pytest.mark.parametrize("what", ["symlink", "dangling", "file", "fifo"])
    def test_something_else_in_its_place_is_not_safe(
        self, inbox: Path, tmp_path: Path, where: str, what: str
    ) -> None:
        """A link, even to a folder of ours, a file, a FIFO: it is neither followed nor removed."""
        (tmp_path / "ours").mkdir(mode=0o700)
        drop(inbox)
        shutil.rmtree(inbox / where)
        makers: dict[str, Callable[[Path], object]] = {
            "symlink": lambda path: path.symlink_to(tmp_path / "ours"),
            "dangling": lambda path: path.symlink_to("nowhere"),
            "file": Path.touch,
            "fifo": os.mkfifo,
        }
        makers[what](inbox / where)
        for attempt in ATTEMPTS:
            with pytest.raises(claim.ClaimError) as caught:
                attempt(inbox)
            assert caught.value.reason == "unsafe"
        assert (inbox / "x.jsonl").exists()
        assert names(tmp_path / "ours") == []

    @needs_root
    def test_somebody_elses_folder_is_not_safe(self, inbox: Path) -> None:
        """Who made it first could reach into it, even if root looks at it."""
        os.chown(inbox / ".sfwatch", 4242, 4242)
        for attempt in ATTEMPTS:
            with pytest.raises(claim.ClaimError, match=r"unsafe.*uid 4242"):
                attempt(inbox)

    @needs_root
    def test_an_inbox_that_is_not_ours_to_write_to(self, tmp_path: Path) -> None:
        """The error names owner and mode, and what to do."""
        (tmp_path / "inbox").mkdir(mode=0o755)
        told = as_somebody(
            TAKE.replace("claim.take", "claim.own_folder").replace('"x.jsonl"', repr(None)), cwd=tmp_path
        )
        assert told.startswith("cannot_move")
        assert "mode 0755" in told
        assert "chmod g+wx" in told


ATTEMPTS: list[Callable[[Path], object]] = [
    lambda inbox: claim.own_folder(inbox, INSTANCE, OWNER),
    lambda inbox: claim.take(inbox, ME, "x.jsonl"),
    lambda inbox: claim.lock(inbox, ME),
]


class TestOwner:
    def test_it_is_replaced_as_a_whole(self, inbox: Path, tmp_path: Path) -> None:
        """A link in its place is replaced, not followed; no temporary is left."""
        (tmp_path / "victim").write_text("theirs")
        (inbox / f".sfwatch/{ME}.owner").unlink()
        (inbox / f".sfwatch/{ME}.owner").symlink_to(tmp_path / "victim")
        assert claim.owner_of(inbox, ME) is None
        claim.write_owner(inbox, ME, replace(OWNER, journal=None))
        assert claim.owner_of(inbox, ME) == replace(OWNER, journal=None)
        assert (tmp_path / "victim").read_text() == "theirs"
        assert names(inbox / ".sfwatch") == [ME, f"{ME}.owner"]

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[" * 2**17, "[]", '"x"', "{}", "\0", '{"machine": "m", "state_dir": "/s"}'),
            '{"machine": 1, "state_dir": "/s", "journal": null}',
            '{"machine": "m", "state_dir": null, "journal": null}',
            '{"machine": "m", "state_dir": "/s", "journal": null, "adopted_by": 1}',
        ],
    )
    def test_nonsense_is_no_owner(self, inbox: Path, text: str) -> None:
        """Whatever a damaged disk makes of it."""
        (inbox / f".sfwatch/{ME}.owner").write_text(text)
        assert claim.owner_of(inbox, ME) is None

    @needs_root
    def test_somebody_elses_word_does_not_count(self, inbox: Path) -> None:
        """Only our own user's."""
        os.chown(inbox / f".sfwatch/{ME}.owner", 4242, 4242)
        assert claim.owner_of(inbox, ME) is None

    @pytest.mark.parametrize("kind", ["fifo", "folder"])
    def test_what_is_no_file_is_not_opened(self, inbox: Path, kind: str) -> None:
        """A pipe would hold us up."""
        (inbox / f".sfwatch/{ME}.owner").unlink()
        ODD[kind](inbox / f".sfwatch/{ME}.owner")
        assert claim.owner_of(inbox, ME) is None

    def test_its_form(self, inbox: Path) -> None:
        """Other versions read it; a name that is no UTF-8 comes back as it was."""
        owner = claim.Owner(None, os.fsdecode(b"/\xff"), None)
        claim.write_owner(inbox, ME, owner)
        text = (inbox / f".sfwatch/{ME}.owner").read_text()
        assert json.loads(text) == {
            "machine": None,
            "state_dir": owner.state_dir,
            "journal": None,
            "adopted_by": None,
        }
        assert claim.owner_of(inbox, ME) == owner

    def test_one_without_the_adopter(self, inbox: Path) -> None:
        """Where nothing is said of an adoption, there was none."""
        text = '{"machine": "m", "state_dir": "/s", "journal": null}'
        (inbox / f".sfwatch/{ME}.owner").write_text(text)
        assert claim.owner_of(inbox, ME) == claim.Owner("m", "/s", None, None)


class TestTake:
    def test_a_claimed_file_is_out_of_reach(self, inbox: Path) -> None:
        """It is no longer in the inbox but whole in our folder, under its name."""
        inode = drop(inbox).stat().st_ino
        claim.take(inbox, ME, "x.jsonl")
        assert names(inbox) == [".sfwatch"]
        assert (mine(inbox) / "x.jsonl").stat().st_ino == inode
        assert (mine(inbox) / "x.jsonl").read_text() == "{}\n"

    @pytest.mark.parametrize("gone", [".sfwatch", f".sfwatch/{ME}"])
    def test_without_the_claims_folder(self, inbox: Path, gone: str) -> None:
        """It may be the bare folder below a mount: nothing is made there, nothing is taken."""
        drop(inbox)
        shutil.rmtree(inbox / gone)
        with pytest.raises(claim.ClaimError, match=f"inbox_away.*{ME}"):
            claim.take(inbox, ME, "x.jsonl")
        with pytest.raises(FileNotFoundError):
            claim.lock(inbox, ME)
        assert not (inbox / gone).exists()
        assert (inbox / "x.jsonl").exists()

    def test_sub_folders_are_kept(self, inbox: Path) -> None:
        """The relative path stays, the folders in the inbox too, and those of the claim are private."""
        drop(inbox, "a/b/x.jsonl")
        claim.take(inbox, ME, "a/b/x.jsonl")
        assert claim.claimed(inbox, ME) == ["a/b/x.jsonl"]
        assert names(inbox / "a/b") == []
        assert stat.S_IMODE((mine(inbox) / "a/b").stat().st_mode) & 0o777 == 0o700

    @pytest.mark.parametrize("name", ["n" * 249 + ".jsonl", os.fsdecode(b"\xff.jsonl"), "a\nb.jsonl"])
    def test_any_name(self, inbox: Path, name: str) -> None:
        """The longest, one that is no UTF-8, one with a line break."""
        drop(inbox, name)
        claim.take(inbox, ME, name)
        assert claim.claimed(inbox, ME) == [name]

    def test_a_file_that_is_gone(self, inbox: Path) -> None:
        """Or whose folder is, or whose folder is a file now: it vanished."""
        drop(inbox, "file")
        for name in ("x.jsonl", "a/x.jsonl", "file/x.jsonl"):
            with pytest.raises(FileNotFoundError):
                claim.take(inbox, ME, name)
        assert claim.claimed(inbox, ME) == []

    def test_a_namesake_under_way(self, inbox: Path) -> None:
        """The newcomer waits where it is; the earlier one is not replaced."""
        drop(inbox, content="first")
        claim.take(inbox, ME, "x.jsonl")
        drop(inbox, content="second")
        with pytest.raises(claim.ClaimError) as caught:
            claim.take(inbox, ME, "x.jsonl")
        assert caught.value.reason == "namesake"
        assert (inbox / "x.jsonl").read_text() == "second"
        assert (mine(inbox) / "x.jsonl").read_text() == "first"

    def test_a_folder_named_like_a_file_under_way(self, inbox: Path) -> None:
        """What lies in it waits for the file."""
        drop(mine(inbox), "a.jsonl")
        drop(inbox, "a.jsonl/x.jsonl")
        with pytest.raises(claim.ClaimError) as caught:
            claim.take(inbox, ME, "a.jsonl/x.jsonl")
        assert caught.value.reason == "namesake"
        assert "'a.jsonl' is still under way" in caught.value.detail
        assert (inbox / "a.jsonl/x.jsonl").exists()

    def test_a_file_named_like_a_folder_of_claims(self, inbox: Path) -> None:
        """It waits while the folder holds claims, and takes an empty one's place."""
        drop(inbox, "a.jsonl")
        drop(mine(inbox), "a.jsonl/b/x.jsonl")
        with pytest.raises(claim.ClaimError) as caught:
            claim.take(inbox, ME, "a.jsonl")
        assert caught.value.reason == "namesake"
        (mine(inbox) / "a.jsonl/b/x.jsonl").unlink()
        claim.take(inbox, ME, "a.jsonl")
        assert claim.claimed(inbox, ME) == ["a.jsonl"]

    @pytest.mark.parametrize("kind", ODD)
    def test_only_regular_files(self, inbox: Path, kind: str) -> None:
        """Anything else stays where it is."""
        ODD[kind](inbox / "x.jsonl")
        with pytest.raises(files.NotRegular) as caught:
            claim.take(inbox, ME, "x.jsonl")
        assert caught.value.kind == kind
        assert names(inbox) == [".sfwatch", "x.jsonl"]
        assert names(mine(inbox)) == []

    def test_no_link_on_the_way_is_followed(self, inbox: Path, tmp_path: Path) -> None:
        """A file outside the inbox can't be taken through a linked folder."""
        victim = drop(tmp_path / "outside")
        (inbox / "a").symlink_to(tmp_path / "outside")
        with pytest.raises(files.NotRegular) as caught:
            claim.take(inbox, ME, "a/x.jsonl")
        assert caught.value.kind == "symlink"
        assert victim.exists()

    @pytest.mark.parametrize("name", ["../x.jsonl", "/etc/passwd", "a/../../x", f".sfwatch/{ME}/x.jsonl", ""])
    def test_no_name_leads_out_of_the_inbox(self, inbox: Path, name: str) -> None:
        """Nor into the claims themselves."""
        drop(inbox.parent)
        with pytest.raises(ValueError, match=r"no plain name|folder of claims"):
            claim.take(inbox, ME, name)
        assert (inbox.parent / "x.jsonl").exists()

    def test_a_hard_link_elsewhere_does_not_matter(self, inbox: Path, tmp_path: Path) -> None:
        """Only the name in the inbox is moved."""
        (tmp_path / "elsewhere").hardlink_to(drop(inbox))
        claim.take(inbox, ME, "x.jsonl")
        assert (tmp_path / "elsewhere").exists()
        assert claim.claimed(inbox, ME) == ["x.jsonl"]

    def test_of_many_at_once_each_file_goes_to_one(self, inbox: Path) -> None:
        """Four processes that claim the same files: each is had once, none is lost."""
        script = (
            "import sys; from pathlib import Path; from sfwatch import claim\n"
            "for number in range(60):\n"
            "    try: claim.take(Path(sys.argv[1]), sys.argv[2], f'a/{number}.jsonl'); print(number)\n"
            "    except FileNotFoundError: pass\n"
        )
        for number in range(60):
            drop(inbox, f"a/{number}.jsonl", str(number))
        takers = [
            subprocess.Popen(
                [sys.executable, "-c", script, inbox, make(inbox, str(each))], stdout=subprocess.PIPE, text=True
            )
            for each in range(4)
        ]
        taken = [int(line) for taker in takers for line in taker.communicate()[0].split()]
        assert sorted(taken) == list(range(60))
        held = [name for claimed in claim.folders(inbox).values() for name in claimed]
        assert sorted(held) == sorted(f"a/{n}.jsonl" for n in range(60))


class TestSwapped:
    """What is put in a file's place between the look and the rename, which `_return_swapped` gives back."""

    def test_it_goes_back(self, inbox: Path) -> None:
        """Under the name that it had."""
        (inbox / "x.jsonl").symlink_to("/etc/passwd")
        swapped(inbox)
        assert (inbox / "x.jsonl").is_symlink()
        assert names(mine(inbox)) == []

    def test_it_goes_back_under_another_name_if_need_be(self, inbox: Path) -> None:
        """Nothing of anybody's is lost, and our folder holds none of it."""
        with files.folder(inbox) as source, files.folder(mine(inbox)) as target:
            drop(mine(inbox), "x.jsonl/theirs")
            drop(inbox)
            claim._return_swapped(source, "x.jsonl", target)
        assert names(mine(inbox)) == []
        [returned] = inbox.glob("sfwatch-returned-*")
        assert names(returned) == ["theirs"]


def swapped(inbox: Path) -> None:
    with files.folder(inbox) as source, files.folder(mine(inbox)) as target, pytest.raises(files.NotRegular):
        claim._rename(source, "x.jsonl", target)


class TestCannotMove:
    @needs_root
    def test_a_sub_folder_that_cannot_be_entered(self, tmp_path: Path) -> None:
        """The error names it."""
        (tmp_path / "inbox/a").mkdir(parents=True)
        (tmp_path / "inbox/a").chmod(0o700)
        drop(tmp_path / "inbox", "a/x.jsonl")
        (tmp_path / "inbox").chmod(0o777)
        told = as_somebody(MAKE + TAKE.replace('"x.jsonl"', '"a/x.jsonl"'), cwd=tmp_path)
        assert told == "cannot_move: 'inbox/a' can't be opened: let our group read and enter it\n"

    @needs_root
    def test_a_sticky_folder_of_somebody_else(self, tmp_path: Path) -> None:
        """The error names owners, modes, and the way out."""
        (tmp_path / "inbox").mkdir()
        (tmp_path / "inbox").chmod(0o1777)
        drop(tmp_path / "inbox")
        told = as_somebody(MAKE + TAKE, cwd=tmp_path)
        assert told.startswith("cannot_move")
        assert "root, uid 0, mode 0644" in told
        assert "mode 1777" in told
        assert "sticky" in told
        assert (tmp_path / "inbox/x.jsonl").exists()

    @needs_root
    @pytest.mark.parametrize("flag", ["i", "a"])
    @pytest.mark.parametrize("what", ["file", "folder"])
    def test_an_immutable_file_or_folder(self, tmp_path: Path, flag: str, what: str) -> None:
        """Not even root may move it; the error says how to undo that."""
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import claim\n"
            "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', '.'], check=True); here = Path('.').absolute()\n"
            "os.chdir(here); os.mkdir('a'); Path('a/x.jsonl').write_text('x')\n"
            "me = claim.own_folder(here, 'me', claim.Owner(None, '', None))\n"
            f"subprocess.run(['chattr', '+{flag}', {'a/x.jsonl' if what == 'file' else 'a'!r}], check=True)\n"
            "try: claim.take(here, me, 'a/x.jsonl')\n"
            "except claim.ClaimError as error: print(error)\n"
            "assert Path('a/x.jsonl').exists() and claim.claimed(here, me) == []\n"
        )
        told = in_mount_namespace(script, cwd=tmp_path)
        assert told.startswith("cannot_move")
        assert f"the {what} is immutable or append-only" in told

    @needs_root
    def test_a_read_only_inbox(self, inbox: Path) -> None:
        """The error says that it is mounted so."""
        drop(inbox)
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import claim\n"
            "inbox = Path('inbox').absolute()\n"
            "for options in (['--bind', inbox], ['-o', 'remount,ro,bind']):\n"
            "    subprocess.run(['mount', *options, inbox], check=True)\n"
        )
        told = in_mount_namespace(script + TAKE, cwd=inbox.parent)
        assert told.startswith("cannot_move")
        assert "read-only" in told

    @needs_root
    def test_a_mount_inside_the_inbox(self, inbox: Path) -> None:
        """A claim is a rename and can't cross it: the error says so."""
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import claim\n"
            "os.mkdir('inbox/a'); subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', 'inbox/a'], check=True)\n"
            "Path('inbox/a/x.jsonl').write_text('x')\n"
        )
        told = in_mount_namespace(script + TAKE.replace('"x.jsonl"', '"a/x.jsonl"'), cwd=inbox.parent)
        assert told.startswith("cannot_move")
        assert "another filesystem is mounted" in told

    @needs_root
    def test_a_full_disk_is_no_fault_of_the_file(self, tmp_path: Path) -> None:
        """ENOSPC comes through as it is, and the file stays."""
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import claim\n"
            "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'nr_inodes=6', 'tmpfs', '.'], check=True)\n"
            "here = Path('.').absolute(); os.chdir(here); os.makedirs('inbox/a'); Path('inbox/a/x').touch()\n"
            "try: claim.own_folder(here / 'inbox', 'me', claim.Owner(None, '', None))\n"
            "except OSError as error: print(error.errno, os.listdir('inbox/.sfwatch'))\n"
            "os.mkdir('inbox/.sfwatch/me', 0o700)\n"
            "try: claim.take(here / 'inbox', 'me', 'a/x')\n"
            "except OSError as error: print(error.errno, os.listdir('inbox/a'))\n"
        )
        assert in_mount_namespace(script, cwd=tmp_path) == "28 []\n28 ['x']\n"


def in_mount_namespace(script: str, *, cwd: Path) -> str:
    return subprocess.check_output(["unshare", "-m", sys.executable, "-c", script], cwd=cwd, text=True)


class TestOpenClaimed:
    def test_it_reads(self, inbox: Path) -> None:
        """Also in a sub-folder."""
        drop(inbox, "a/x.jsonl")
        claim.take(inbox, ME, "a/x.jsonl")
        fd = claim.open_claimed(inbox, ME, "a/x.jsonl")
        assert os.read(fd, 9) == b"{}\n"
        os.close(fd)

    def test_as_it_is_taken(self, inbox: Path) -> None:
        """The folders for claims are opened once for both."""
        drop(inbox, "a/x.jsonl")
        fd = claim.take_and_open(inbox, ME, "a/x.jsonl")
        assert fd is not None
        assert os.read(fd, 9) == b"{}\n"
        os.close(fd)
        assert names(inbox / "a") == []

    def test_one_that_cannot_be_opened_is_taken_all_the_same(self, inbox: Path) -> None:
        """Somebody holds a lease on it, for example; what keeps it is said when it is opened again."""
        drop(inbox)
        before = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            with (inbox / "x.jsonl").open() as theirs:
                fcntl.fcntl(theirs, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                assert claim.take_and_open(inbox, ME, "x.jsonl") is None
                with pytest.raises(BlockingIOError):
                    claim.open_claimed(inbox, ME, "x.jsonl")
        finally:
            signal.signal(signal.SIGIO, before)
        assert names(mine(inbox)) == ["x.jsonl"]

    @pytest.mark.parametrize("kind", ODD)
    def test_nothing_else_is_ever_opened(self, inbox: Path, kind: str) -> None:
        """Whatever has put it there: no link is followed, no writer of a pipe let go on."""
        ODD[kind](mine(inbox) / "x.jsonl")
        with pytest.raises(files.NotRegular, match=kind):
            claim.open_claimed(inbox, ME, "x.jsonl")

    def test_what_is_not_claimed(self, inbox: Path) -> None:
        """Is not there, with or without folders for claims."""
        for folder in (ME, "unheard-of"):
            with pytest.raises(FileNotFoundError):
                claim.open_claimed(inbox, folder, "x.jsonl")

    def test_a_folder_that_is_not_safe(self, inbox: Path) -> None:
        """What others could have put there is not read."""
        drop(mine(inbox))
        (inbox / ".sfwatch").chmod(0o777)
        with pytest.raises(claim.ClaimError, match="unsafe"):
            claim.open_claimed(inbox, ME, "x.jsonl")


class TestPlace:
    def test_where_a_claimed_file_is_moved_from(self, inbox: Path) -> None:
        """Its folder, and its name in there."""
        drop(inbox, "a/x.jsonl")
        claim.take(inbox, ME, "a/x.jsonl")
        with claim.place(inbox, ME, "a/x.jsonl") as (fd, base):
            assert files.exists(base, dir_fd=fd)
            assert base == "x.jsonl"

    def test_no_link_on_the_way_is_followed(self, inbox: Path, tmp_path: Path) -> None:
        """Folders of claims that somebody put a link in place of are not ours."""
        (inbox / ".sfwatch").rename(tmp_path / "moved")
        (inbox / ".sfwatch").symlink_to(tmp_path / "moved")
        with pytest.raises(claim.ClaimError, match="unsafe"), claim.place(inbox, ME, "x.jsonl"):
            raise AssertionError("unreachable")


class TestGiveBack:
    def test_it_is_as_before(self, inbox: Path) -> None:
        """The same file under the same name."""
        inode = drop(inbox, "a/x.jsonl").stat().st_ino
        claim.take(inbox, ME, "a/x.jsonl")
        claim.give_back(inbox, ME, "a/x.jsonl")
        assert (inbox / "a/x.jsonl").stat().st_ino == inode
        assert claim.claimed(inbox, ME) == []

    def test_a_newcomer_is_not_replaced(self, inbox: Path) -> None:
        """The file stays claimed until the name is free."""
        drop(inbox, content="first")
        claim.take(inbox, ME, "x.jsonl")
        drop(inbox, content="second")
        with pytest.raises(FileExistsError):
            claim.give_back(inbox, ME, "x.jsonl")
        assert (inbox / "x.jsonl").read_text() == "second"
        assert (mine(inbox) / "x.jsonl").read_text() == "first"

    def test_a_sub_folder_that_was_removed(self, inbox: Path) -> None:
        """Is made anew, with the permissions of the inbox, so that its droppers can go on."""
        drop(inbox, "a/b/x.jsonl")
        claim.take(inbox, ME, "a/b/x.jsonl")
        shutil.rmtree(inbox / "a")
        claim.give_back(inbox, ME, "a/b/x.jsonl")
        assert (inbox / "a/b/x.jsonl").exists()
        assert stat.S_IMODE((inbox / "a/b").stat().st_mode) & 0o777 == 0o770

    @pytest.mark.parametrize("what", ["symlink", "file"])
    def test_something_else_where_its_folder_was(self, inbox: Path, tmp_path: Path, what: str) -> None:
        """Is neither followed nor replaced; the file stays claimed."""
        drop(inbox, "a/x.jsonl")
        claim.take(inbox, ME, "a/x.jsonl")
        (inbox / "a").rmdir()
        if what == "symlink":
            (inbox / "a").symlink_to(tmp_path)
        else:
            (inbox / "a").touch()
        with pytest.raises(FileExistsError):
            claim.give_back(inbox, ME, "a/x.jsonl")
        assert claim.claimed(inbox, ME) == ["a/x.jsonl"]
        assert not (tmp_path / "x.jsonl").exists()

    def test_what_is_not_claimed(self, inbox: Path) -> None:
        """Can't be given back."""
        with pytest.raises(FileNotFoundError):
            claim.give_back(inbox, ME, "a/x.jsonl")
        assert not (inbox / "a").exists()


class TestListing:
    def test_no_folder_no_claims(self, tmp_path: Path, inbox: Path) -> None:
        """And none is made by asking."""
        assert (claim.claimed(tmp_path, ME), claim.folders(tmp_path)) == ([], {})
        assert names(tmp_path) == ["inbox"]
        assert claim.claimed(inbox, OTHER) == []

    def test_an_inbox_that_is_gone_is_no_empty_one(self, tmp_path: Path) -> None:
        """It is an error, lest its claims are taken for finished."""
        with pytest.raises(FileNotFoundError):
            claim.claimed(tmp_path / "gone", ME)
        with pytest.raises(FileNotFoundError):
            claim.folders(tmp_path / "gone")

    def test_only_regular_files(self, inbox: Path) -> None:
        """In sub-folders too; links are neither listed nor followed."""
        drop(mine(inbox), "b/c/x.jsonl")
        drop(mine(inbox), "a.jsonl")
        (mine(inbox) / "link").symlink_to("b")
        os.mkfifo(mine(inbox) / "fifo")
        assert claim.claimed(inbox, ME) == ["a.jsonl", "b/c/x.jsonl"]

    def test_every_claims_folder(self, inbox: Path) -> None:
        """Also one that holds nothing, or was left by the first version; nothing else that lies there."""
        for folder in (OTHER, INSTANCE):
            make(inbox, folder)
        drop(inbox)
        claim.take(inbox, OTHER, "x.jsonl")
        for name in ("b.jsonl", "a/c.jsonl"):
            drop(mine(inbox), name)
        (inbox / ".sfwatch/stray").touch()
        (inbox / ".sfwatch/link").symlink_to(mine(inbox))
        assert claim.folders(inbox) == {ME: ["a/c.jsonl", "b.jsonl"], OTHER: ["x.jsonl"], INSTANCE: []}

    def test_one_that_is_open_to_others_is_told(self, inbox: Path) -> None:
        """It does not count, and is not passed over: claims may be in it."""
        claim.claims_folder(inbox, make(inbox, OTHER)).chmod(0o711)
        with pytest.raises(claim.ClaimError, match=f"unsafe.*{OTHER}.*mode 0711"):
            claim.folders(inbox)

    def test_empty_folders_are_discarded(self, inbox: Path) -> None:
        """Those within with those around them; what holds a claim stays, as does our own folder."""
        drop(mine(inbox), "a/b/x.jsonl")
        (mine(inbox) / "a/c/d").mkdir(parents=True)
        (mine(inbox) / "e").mkdir()
        claim.discard_empty_folders(inbox, ME)
        assert sorted(str(path.relative_to(mine(inbox))) for path in mine(inbox).rglob("*")) == [
            "a",
            "a/b",
            "a/b/x.jsonl",
        ]

    def test_discarding_never_fails(self, tmp_path: Path, inbox: Path) -> None:
        """It is only tidying."""
        claim.discard_empty_folders(tmp_path / "gone", ME)
        (inbox / ".sfwatch").chmod(0o777)
        claim.discard_empty_folders(inbox, ME)

    def test_taking_while_somebody_tidies(self, inbox: Path) -> None:
        """A folder for claims that is discarded under a taker's hands costs it nothing."""
        script = (
            "import sys; from pathlib import Path; from sfwatch import claim\n"
            "while sys.stdin.read(1) != '.': claim.discard_empty_folders(Path(sys.argv[1]), sys.argv[2])\n"
        )
        command = [sys.executable, "-c", script, str(inbox), ME]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as tidier:
            assert tidier.stdin is not None
            for number in range(100):
                tidier.stdin.write("go on ")
                tidier.stdin.flush()
                drop(inbox, f"a/b/{number}.jsonl")
                claim.take(inbox, ME, f"a/b/{number}.jsonl")
                (mine(inbox) / f"a/b/{number}.jsonl").unlink()
            tidier.communicate(".")
        assert tidier.returncode == 0
        assert names(inbox / "a/b") == []


class TestLock:
    def test_it_is_held_once(self, inbox: Path) -> None:
        """And is free again as soon as it is closed."""
        held = claim.lock(inbox, ME)
        with pytest.raises(BlockingIOError):
            claim.lock(inbox, ME)
        os.close(held)
        os.close(claim.lock(inbox, ME))

    def test_claims_do_not_disturb_it(self, inbox: Path) -> None:
        """Taking, opening and giving back leave it held."""
        held = claim.lock(inbox, ME)
        drop(inbox)
        claim.take(inbox, ME, "x.jsonl")
        os.close(claim.open_claimed(inbox, ME, "x.jsonl"))
        claim.give_back(inbox, ME, "x.jsonl")
        with pytest.raises(BlockingIOError):
            claim.lock(inbox, ME)
        assert not os.get_inheritable(held)
        os.close(held)

    def test_the_shell_sees_it(self, inbox: Path) -> None:
        """It is a plain flock on the claims folder."""
        held = claim.lock(inbox, ME)
        with files.folder(mine(inbox)) as fd, pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(held)


def lock_foreign(inbox: Path, *former: str) -> None:
    os.close(claim.lock_foreign(inbox, OTHER, ours=OWNER, instance="me", former=former))


class TestForeign:
    def test_where_locks_tell_all(self, inbox: Path) -> None:
        """On a local filesystem a free lock is enough, whoever the owner is; the claims stay where they are."""
        make(inbox, OTHER, None)
        drop(inbox)
        claim.take(inbox, OTHER, "x.jsonl")
        held = claim.lock_foreign(inbox, OTHER, ours=OWNER, instance="me", former=())
        with pytest.raises(BlockingIOError):
            claim.lock(inbox, OTHER)
        os.close(held)
        assert claim.folders(inbox) == {ME: [], OTHER: ["x.jsonl"]}

    def test_one_that_is_not_there(self, inbox: Path) -> None:
        """Is not made."""
        with pytest.raises(FileNotFoundError):
            lock_foreign(inbox, "89abcdef")
        assert names(inbox / ".sfwatch") == [ME, f"{ME}.owner"]

    @pytest.mark.parametrize("former", [(), ("89abcdef",)])
    def test_one_that_is_worked_on(self, inbox: Path, former: tuple[str, ...]) -> None:
        """As its lock says, until its process ends, however that ends: the kernel lets go."""
        make(inbox, OTHER)
        script = (
            "import os, sys; from pathlib import Path; from sfwatch import claim\n"
            "claim.lock(Path(sys.argv[1]), sys.argv[2]); print('held', flush=True); sys.stdin.read()\n"
        )
        command = [sys.executable, "-c", script, str(inbox), OTHER]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(claim.ClaimError, match=f"foreign: another process .*{OTHER}"):
                lock_foreign(inbox, *former)
            holder.kill()
        lock_foreign(inbox, *former)

    @needs_root
    def test_where_locks_do_not_reach(self, tmp_path: Path) -> None:
        """Another machine may be at work, unless it was ourselves; the error says what a person can do."""
        script = (
            "import os, subprocess; from pathlib import Path; from sfwatch import claim\n"
            "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', '.'], check=True); os.chdir(os.getcwd())\n"
            "for name in ('lower', 'upper', 'work', 'in box'): os.mkdir(name)\n"
            "options = 'lowerdir=lower,upperdir=upper,workdir=work'\n"
            "subprocess.run(['mount', '-t', 'overlay', '-o', options, 'overlay', 'in box'], check=True)\n"
            "inbox, ours = Path('in box'), claim.Owner('m', '/s', 'j')\n"
            "def attempt(owner, former=(), *, folder, ours=ours):\n"
            "    if owner: claim.write_owner(inbox, folder, owner)\n"
            "    else: os.unlink(f'in box/.sfwatch/{folder}.owner')\n"
            "    who = {'ours': ours, 'instance': 'me', 'former': former}\n"
            "    try: os.close(claim.lock_foreign(inbox, folder, **who)); print('ours')\n"
            "    except claim.ClaimError as error: print(error)\n"
            "theirs = claim.own_folder(inbox, 'other', ours)\n"
            "attempt(claim.Owner('m', '/s', 'another'), folder=theirs)\n"
            "attempt(claim.Owner('m', '/t', 'j'), folder=theirs)\n"
            "attempt(claim.Owner('n', '/s', 'j'), folder=theirs); attempt(None, folder=theirs)\n"
            "attempt(claim.Owner('n', '/s', None), ('other',), folder=theirs)\n"
            "for no in (None, ''):\n"
            "    attempt(claim.Owner(no, '/s', 'j'), folder=theirs, ours=claim.Owner(no, '/s', 'j'))\n"
            "attempt(claim.Owner('n', '/t', None, 'me'), folder=theirs)\n"
            "attempt(claim.Owner(None, '/t', None, 'me'), folder=theirs, ours=claim.Owner(None, '/s', 'j'))\n"
            "attempt(claim.Owner('n', '/t', None, 'he'), folder=theirs)\n"
            "os.mkdir('in box/.sfwatch/other', 0o700); claim.write_owner(inbox, 'other', ours)\n"
            "attempt(None, ('other',), folder='other')\n"
            "claim.write_owner(inbox, 'other', ours); attempt(None, ('oth',), folder='other')\n"
        )
        told = in_mount_namespace(script, cwd=tmp_path).splitlines()
        by_owner = ["ours", "foreign", "foreign", "foreign", "foreign", "foreign", "foreign"]
        by_a_persons_word, by_former_instances = ["ours", "ours", "foreign"], ["ours", "foreign"]
        assert [line.partition(":")[0] for line in told] == by_owner + by_a_persons_word + by_former_instances
        assert "on overlay that can't be seen" in told[1]
        assert "with state_dir /t" in told[1]
        assert "run: sfwatch adopt 'in box/.sfwatch/other-" in told[1]
        assert "not known" in told[3]

"""Folders are real, and so are the other users, the mounts and the service (on loopback)."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import claim, preflight, trial, users
from sfwatch.files import Lease
from sfwatch.notes import Level, Note
from sfwatch.settings import ROOM_BYTES, Config, Inbox, Log, Proof

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="other users and mounts take root")

STRANGER = 54321
OTHER = 54322
KEY = "sk-very-secret-0123456789"
GOOD = b'{"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}}\n'


def an_inbox(path: Path, **settings: object) -> Inbox:
    defaults: dict[str, object] = {"name": "in", "done": path.parent / "done", "failed": path.parent / "failed"}
    return Inbox(path=path, **{**defaults, **settings})  # type: ignore[arg-type]


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    """An inbox as it should be, with done and failed beside it."""
    for name in ("inbox", "done", "failed"):
        (tmp_path / name).mkdir()
    return an_inbox(tmp_path / "inbox")


@pytest.fixture
def public(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder that every user can reach, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="sfwatch-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def claims_of(inbox: Inbox) -> str:
    """The claims folder of a daemon there."""
    return claim.own_folder(inbox.path, "0123456789abcdef", claim.Owner("m", "/var/lib/sfwatch", "j"))


def tree(top: Path) -> dict[str, tuple[int, int, int, int]]:
    """All that is below a folder, with what a check could have changed of it."""
    found = {}
    for path in [top, *top.rglob("*")]:
        seen = path.lstat()
        found[str(path)] = (seen.st_ino, seen.st_mode, seen.st_uid, 0 if path.is_dir() else seen.st_size)
    return found


def worst(notes: list[Note]) -> dict[str, str]:
    """The texts of all that is not well, by what they are about."""
    return {note.about: note.text for note in notes if note.level is not Level.OK}


def texts(notes: list[Note], about: str) -> list[str]:
    return [note.text for note in notes if note.about == about]


def as_other(code: str, *arguments: Path) -> Any:
    """What `code` leaves in `answer`, run by a user without any right.

    All modules are loaded first: that user may not be able to reach them.
    """
    script = (
        "import encodings.ascii, json, os, sys\nfrom pathlib import Path\n"
        "from sfwatch import arrive, claim, files, preflight, settings\n"
        "here = Path(sys.argv[1])\n"
        "def inbox(): return settings.Inbox(here / 'inbox', 'in', here / 'done', here / 'failed')\n"
        "def said(notes): return [[n.level, n.about, n.text] for n in notes]\n"
        f"os.setgroups([])\nos.setresgid(*[{STRANGER}] * 3)\nos.setresuid(*[{STRANGER}] * 3)\n"
        f"{code}\nprint(json.dumps(answer))\n"
    )
    return python(script, *arguments)


def python(script: str, *arguments: Path, under: tuple[str, ...] = ()) -> Any:
    command = [*under, sys.executable, "-W", "error", "-c", script, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd="/")
    assert (ended.returncode, ended.stderr) == (0, "")
    return json.loads(ended.stdout)


class TestTheWayOfAFile:
    def test_all_is_well(self, inbox: Inbox) -> None:
        """A file can go every step, each folder is named, and what is left behind is nothing."""
        before = tree(inbox.path.parent)
        notes = preflight.folders(inbox)
        assert worst(notes) == {}
        assert "files can be made, claimed and given back" in texts(notes, f"inbox {inbox.path}")
        assert texts(notes, f"done {inbox.done}") == ["takes files, by rename"]
        assert texts(notes, f"failed {inbox.failed}") == ["takes files, by rename"]
        assert tree(inbox.path.parent) == before

    def test_a_daemon_is_at_work_there(self, inbox: Inbox) -> None:
        """Its folder of claims is used and neither removed nor changed, nor is what lies there."""
        (inbox.path / "x.jsonl").write_bytes(GOOD)
        claim.take(inbox.path, claims_of(inbox), "x.jsonl")
        before = tree(inbox.path.parent)
        assert worst(preflight.folders(inbox)) == {}
        assert tree(inbox.path.parent) == before

    def test_no_descriptor_stays_open(self, inbox: Inbox) -> None:
        """One on an inbox would hide its deletion."""
        descriptors = Path("/proc/self/fd")
        before = sorted(descriptors.iterdir())
        preflight.folders(inbox)
        preflight.watches([inbox])
        assert sorted(descriptors.iterdir()) == before

    def test_no_instance_takes_the_probe_for_claims(self, inbox: Inbox) -> None:
        """A daemon that starts meanwhile would adopt what another instance has left."""
        (inbox.path / "x.jsonl").write_bytes(GOOD)
        folder = claims_of(inbox)
        claim.take(inbox.path, folder, "x.jsonl")
        (inbox.path / ".sfwatch" / ".sfwatch-01234567.tmp").touch()
        assert claim.folders(inbox.path) == {folder: ["x.jsonl"]}

    def test_the_folder_of_claims_is_open_to_others(self, inbox: Inbox) -> None:
        """It is said with what to do, and nothing is moved."""
        (inbox.path / ".sfwatch").mkdir(mode=0o755)
        before = tree(inbox.path.parent)
        assert "chmod 0700" in worst(preflight.folders(inbox))[f"inbox {inbox.path}"]
        assert tree(inbox.path.parent) == before

    @pytest.mark.parametrize("role", ["inbox", "done", "failed"])
    def test_a_file_has_the_place_of_a_folder(self, inbox: Inbox, role: str) -> None:
        """It is named, and the other folders are looked at all the same."""
        path = inbox.path.parent / role
        path.rmdir()
        path.write_text("in the way")
        before = tree(inbox.path.parent)
        assert list(worst(preflight.folders(inbox))) == [f"{role} {path}"]
        assert "is a file, not a folder" in worst(preflight.folders(inbox))[f"{role} {path}"]
        assert tree(inbox.path.parent) == before

    @as_root
    @pytest.mark.parametrize("role", ["inbox", "done"])
    def test_chattr(self, inbox: Inbox, role: str) -> None:
        """In an append-only folder nothing is tried: what is made there could not be removed again."""
        path = inbox.path.parent / role
        before = tree(inbox.path.parent)
        subprocess.run(["chattr", "+a", path], check=True)
        try:
            notes = preflight.folders(inbox)
        finally:
            subprocess.run(["chattr", "-a", path], check=True)
        assert f"chattr -i -a {path}" in worst(notes)[f"{role} {path}"]
        assert tree(inbox.path.parent) == before

    def test_a_link_leads_to_the_folder(self, inbox: Inbox, tmp_path: Path) -> None:
        """The configured path is the administrator's own and may be a link."""
        link = tmp_path / "link"
        link.symlink_to(inbox.path)
        assert worst(preflight.folders(an_inbox(link))) == {}

    @as_root
    @pytest.mark.parametrize("role", ["inbox", "done", "failed"])
    def test_a_folder_is_read_only(self, inbox: Inbox, tmp_path: Path, role: str) -> None:
        """It is named with what to do; what was made elsewhere on the way is gone."""
        notes = self.mounted(
            tmp_path, f"mount('--bind', '{role}', '{role}'); mount('-o', 'remount,ro,bind', '{role}')"
        )
        (about, text), *others = [(about, text) for level, about, text in notes if level != "ok"]
        assert about == f"{role} {tmp_path / role}"
        assert "Read-only file system; its filesystem is mounted read-only: mount it read-write" in text
        assert others == []

    @as_root
    def test_done_is_on_another_filesystem(self, inbox: Inbox, tmp_path: Path) -> None:
        """That is no fault: it is said that files are copied, and that copying works."""
        notes = self.mounted(tmp_path, "mount('-t', 'tmpfs', 'tmpfs', 'done')")
        (text,) = [text for _, about, text in notes if about == f"done {inbox.done}"]
        assert "rename gives EXDEV" in text
        assert [level for level, *_ in notes if level != "ok"] == []

    @as_root
    def test_done_is_on_another_filesystem_and_full(self, inbox: Inbox, tmp_path: Path) -> None:
        """No room for one file, nor for what is asked before each upload."""
        notes = self.mounted(tmp_path, "mount('-t', 'tmpfs', '-o', 'nr_inodes=1,size=8k', 'tmpfs', 'done')")
        said = [text for level, about, text in notes if about == f"done {inbox.done}" and level == "finding"]
        assert len(said) == 2
        assert "its filesystem is full: make room" in said[0]
        assert "only 8,192 bytes are free" in said[1]

    @as_root
    def test_a_network_filesystem_would_be_polled(self, inbox: Inbox, tmp_path: Path) -> None:
        """How an inbox is watched is said; here for a filesystem of which nobody knows who writes to it."""
        notes = self.mounted(
            tmp_path, "mount('-t', 'overlay', '-o', 'lowerdir=inbox:done', 'overlay', 'inbox')"
        )
        assert any("polling: overlay" in text for _, about, text in notes if about.startswith("inbox "))

    def mounted(self, here: Path, mounting: str) -> list[list[str]]:
        """What is found after some mounting in a namespace of our own; that no trace is left, too."""
        script = (
            "import json, os, subprocess, sys\nfrom pathlib import Path\n"
            "from sfwatch import preflight, settings\n"
            "here = Path(sys.argv[1]); os.chdir(here)\n"
            "def mount(*arguments): subprocess.run(['mount', *arguments], check=True)\n"
            "def tree(): return sorted((str(p), p.lstat().st_ino) for p in here.rglob('*'))\n"
            f"{mounting}\n"
            "before = tree()\n"
            "notes = preflight.folders(settings.Inbox(here / 'inbox', 'in', here / 'done', here / 'failed'))\n"
            "assert tree() == before\n"
            "print(json.dumps([[n.level, n.about, n.text] for n in notes]))\n"
        )
        answer: list[list[str]] = python(script, here, under=("unshare", "-m"))
        return answer


class TestMissingFolders:
    def test_they_would_be_made(self, tmp_path: Path) -> None:
        """None is made by the check. The inbox has a warning: its name may be misspelt."""
        notes = preflight.folders(an_inbox(tmp_path / "inbox"))
        assert [note.level for note in notes] == [Level.WARNING, Level.OK, Level.OK]
        assert notes[0].text.startswith("is not there: it would be made at the first start (misspelt?")
        assert all("it is made at the first start" in note.text for note in notes[1:])
        assert list(tmp_path.iterdir()) == []

    def test_done_in_a_missing_inbox(self, tmp_path: Path) -> None:
        """It is made after the inbox."""
        inbox = an_inbox(tmp_path / "inbox", done=tmp_path / "inbox" / "done")
        assert list(worst(preflight.folders(inbox))) == [f"inbox {inbox.path}"]

    def test_nor_is_the_folder_around_them(self, tmp_path: Path) -> None:
        """The daemon makes no parents, since they may be mount points: the command to make them is given."""
        inbox = an_inbox(tmp_path / "a b" / "inbox")
        text = worst(preflight.folders(inbox))[f"inbox {inbox.path}"]
        assert f"install -d -m 3770 -o {users.user(os.geteuid())} '{inbox.path}'" in text

    def test_the_others_are_tried_without_an_inbox(self, inbox: Inbox) -> None:
        """Done and failed can be written to, whatever is with the inbox."""
        inbox.path.rmdir()
        notes = preflight.folders(inbox)
        assert texts(notes, f"done {inbox.done}") == ["takes files"]
        assert list(inbox.done.iterdir()) == []

    def test_a_link_that_leads_nowhere(self, tmp_path: Path) -> None:
        """Nothing can be made in its place."""
        (tmp_path / "inbox").symlink_to("nowhere")
        text = worst(preflight.folders(an_inbox(tmp_path / "inbox")))[f"inbox {tmp_path / 'inbox'}"]
        assert "a link that leads nowhere" in text

    @as_root
    def test_they_can_not_be_made(self, public: Path) -> None:
        """Who the folder around them belongs to, and what to do."""
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        assert {level for level, *_ in answer} == {"finding"}
        assert f"install -d -m 3770 -o {STRANGER} {public}/inbox" in answer[0][2]
        assert f"can't be made in {public}: Permission denied" in answer[0][2]


class TestOwners:
    @pytest.mark.parametrize(
        ("owner", "mode", "euid", "level"),
        [
            (1, 0o3770, 1, None),
            (1, 0o700, 1, None),
            (1, 0o755, 1, None),
            (1, 0o770, 1, Level.WARNING),
            (1, 0o777, 1, Level.WARNING),
            (2, 0o1777, 1, Level.FINDING),
            (2, 0o3770, 1, Level.FINDING),
            (2, 0o770, 1, Level.FINDING),
            (2, 0o777, 0, Level.FINDING),
            (2, 0o3770, 0, Level.WARNING),
            (2, 0o755, 0, Level.WARNING),
        ],
    )
    def test_traps(self, owner: int, mode: int, euid: int, level: Level | None) -> None:
        """An inbox is safe if it is ours, and sticky where others may write."""
        danger = preflight.trap(owner, mode, euid=euid)
        assert (danger[0] if danger else None) is level

    @given(owner=st.integers(0, 3), mode=st.integers(0, 0o7777), euid=st.integers(0, 3))
    def test_only_our_own_are_safe(self, owner: int, mode: int, euid: int) -> None:
        """No mode makes up for a stranger's folder; the sticky bit makes up for every mode of ours."""
        danger = preflight.trap(owner, mode, euid=euid)
        assert danger is not None or owner == euid
        assert danger is None or owner != euid or not mode & stat.S_ISVTX

    @as_root
    def test_a_sticky_inbox_of_somebody_else(self, public: Path) -> None:
        """Our own file could be claimed there, a dropped one could not: what to do is said."""
        before = self.folders(public, owner=OTHER, mode=0o1777)
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        (text,) = [text for level, about, text in answer if level == "finding" and about.startswith("inbox")]
        assert "sticky" in text
        assert f"chown {STRANGER} {public}/inbox && chmod 3770 {public}/inbox" in text
        assert tree(public) == before

    @as_root
    def test_an_inbox_that_we_may_not_write_to(self, public: Path) -> None:
        """Owner, mode, who we are, and the command that mends it."""
        before = self.folders(public, owner=OTHER, mode=0o755)
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        text = next(text for level, about, text in answer if level == "finding")
        assert "Permission denied; it belongs to uid 54322, mode 0755, and this is uid 54321: chown" in text
        assert tree(public) == before

    @as_root
    def test_a_done_that_we_may_not_write_to(self, public: Path) -> None:
        """It alone is named; the file that went out to prove it is gone."""
        self.folders(public, owner=STRANGER, mode=0o3770)
        os.chown(public / "done", OTHER, OTHER)
        (public / "done").chmod(0o755)
        before = tree(public)
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        assert [about for level, about, _ in answer if level != "ok"] == [f"done {public / 'done'}"]
        assert tree(public) == before

    @as_root
    def test_a_folder_of_claims_of_somebody_else(self, public: Path) -> None:
        """Whoever made it reads what is dropped: nothing is moved into it."""
        self.folders(public, owner=STRANGER, mode=0o3770)
        (public / "inbox" / ".sfwatch").mkdir(mode=0o777)
        before = tree(public)
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        (text,) = [text for level, about, text in answer if level == "finding"]
        assert "belongs to root, uid 0" in text
        assert tree(public) == before

    @as_root
    def test_without_the_capability_strangers_files_rest(self, public: Path) -> None:
        """The shell of the service's user lacks CAP_LEASE, which the service has: that is no fault."""
        self.folders(public, owner=STRANGER, mode=0o3770)
        answer = as_other("answer = said(preflight.folders(inbox()))", public)
        assert {level for level, *_ in answer} == {"ok"}
        assert any("takes CAP_LEASE" in text and "rest for 10 s" in text for _, _, text in answer)

    def folders(self, here: Path, *, owner: int, mode: int) -> dict[str, tuple[int, int, int, int]]:
        for name in ("inbox", "done", "failed"):
            (here / name).mkdir()
            os.chown(here / name, owner, owner)
        (here / "inbox").chmod(mode)
        return tree(here)


class TestLeases:
    STATUS = "Name:\tcat\nCapPrm:\t0000000000000000\nCapEff:\t{}\nCapBnd:\t000001ffffffffff\n"
    WHOLE = "         0          0 4294967295\n"

    @pytest.mark.parametrize(
        ("effective", "uid_map", "may"),
        [
            ("000001ffffffffff", WHOLE, True),
            ("0000000010000000", WHOLE, True),
            ("000001ffefffffff", WHOLE, False),
            ("0000000000000000", WHOLE, False),
            ("000001ffffffffff", "         0       1000          1\n", False),
        ],
    )
    def test_the_capability_counts_in_the_initial_namespace(
        self,
        effective: str,
        uid_map: str,
        may: bool,  # noqa: FBT001
    ) -> None:
        """In a user namespace root has every capability, and this one has no effect."""
        assert trial.may_lease(self.STATUS.format(effective), uid_map) is may

    def test_what_it_is_worth(self) -> None:
        """Each answer of the kernel has its sentence; two of them name how long files rest."""
        said = {trial.vouching(lease, for_others=o, rest_s=7.5) for lease in Lease for o in (False, True)}
        assert len(said) == 3
        assert sum("7.5 s" in text for text in said) == 2

    def test_no_word_where_it_is_not_trusted(self, inbox: Inbox) -> None:
        """With proof: never the kernel is not asked."""
        inbox = an_inbox(inbox.path, proof=Proof.NEVER)
        assert not any("writes" in text for text in texts(preflight.folders(inbox), f"inbox {inbox.path}"))


class TestStateFolder:
    def test_it_is_ours(self, tmp_path: Path) -> None:
        """A file is made and taken away again."""
        tmp_path.chmod(0o700)
        assert [note.text for note in preflight.state_folder(tmp_path)] == ["can be written"]
        assert list(tmp_path.iterdir()) == []

    def test_it_would_be_made(self, tmp_path: Path) -> None:
        """With its parents, unlike the inboxes; but not by the check."""
        (note,) = preflight.state_folder(tmp_path / "a" / "b")
        assert (note.level, list(tmp_path.iterdir())) == (Level.OK, [])

    def test_it_is_a_file(self, tmp_path: Path) -> None:
        """What stands in the way is to be moved."""
        (tmp_path / "state").touch()
        (note,) = preflight.state_folder(tmp_path / "state")
        assert note.level is Level.FINDING
        assert "something else has its place" in note.text

    @pytest.mark.parametrize("name", ["state/below", "link"])
    def test_it_can_not_be_there(self, tmp_path: Path, name: str) -> None:
        """Below a file, or where a link leads nowhere: no right of any user would help."""
        (tmp_path / "state").touch()
        (tmp_path / "link").symlink_to("nowhere")
        (note,) = preflight.state_folder(tmp_path / name)
        assert note.level is Level.FINDING

    def test_nobody_makes_folders_there(self) -> None:
        """It is tried: the bits of /proc tell root that it may write there."""
        (note,) = preflight.state_folder(Path("/proc/sfwatch/state"))
        assert note.level is Level.FINDING if os.geteuid() == 0 else Level.NO_PERMISSION
        assert "can't be made in /proc" in note.text
        assert note.text.endswith("set state_dir" if os.geteuid() else "; set another state_dir")

    def test_others_may_write_to_it(self, tmp_path: Path) -> None:
        """A warning: they could make a journal of their own there."""
        tmp_path.chmod(0o777)
        assert [note.level for note in preflight.state_folder(tmp_path)] == [Level.OK, Level.WARNING]

    @as_root
    def test_it_is_anothers(self, tmp_path: Path) -> None:
        """The command is given as its owner has to run it, and nothing else is looked at."""
        os.chown(tmp_path, 1, 1)
        config = Config((an_inbox(tmp_path / "nowhere" / "inbox"),), state_dir=tmp_path)
        (note,) = preflight.installation(
            config, {}, online=False, wall=float, command=["/x/sfwatch", "check", "-c", "a b"]
        )
        assert note.level is Level.NO_PERMISSION
        owner = users.user(1)
        assert note.text == f"belongs to {owner}; run: runuser -u {owner} -- /x/sfwatch check -c 'a b'"

    def test_an_owner_without_a_name(self) -> None:
        """It is taken by its number: runuser takes names only."""
        assert (
            users.as_user(STRANGER, ["sfwatch", "check"])
            == f"setpriv --reuid {STRANGER} --clear-groups -- sfwatch check"
        )

    @as_root
    def test_it_can_not_be_made(self, public: Path) -> None:
        """Where, by whom, and the command that makes it."""
        answer = as_other("answer = said(preflight.state_folder(here / 'a' / 'b'))", public)
        assert [level for level, *_ in answer] == ["no_permission"]
        assert f"can't be made in {public}: Permission denied; install -d -m 0700" in answer[0][2]


class TestRoom:
    @pytest.mark.parametrize(
        ("free", "inodes", "said"),
        [
            (ROOM_BYTES, 1, None),
            (ROOM_BYTES, None, None),
            (ROOM_BYTES - 1, 1, "only 16,777,215 bytes are free"),
            (ROOM_BYTES, 0, "no inode is free"),
        ],
    )
    def test_bounds(self, free: int, inodes: int | None, said: str | None) -> None:
        """What is asked for before each upload, and one inode where they are counted."""
        text = preflight.too_little(free, inodes)
        assert text is None if said is None else text is not None and said in text


class TestInotify:
    def test_room(self, inbox: Inbox) -> None:
        """Armed once, as the daemon does it."""
        assert [note.level for note in preflight.watches([inbox])] == [Level.OK]

    def test_nothing_to_watch_yet(self, tmp_path: Path) -> None:
        """Missing inboxes have notes of their own."""
        assert preflight.watches([an_inbox(tmp_path / "inbox")]) == []

    def test_no_room(self, inbox: Inbox) -> None:
        """The limit is named, and what becomes of files; they come in late, but they do."""
        script = (
            "import json, sys; from pathlib import Path; from sfwatch import preflight, settings\n"
            "inbox = settings.Inbox(Path(sys.argv[1]), 'in', Path('/d'), Path('/f'))\n"
            "print(json.dumps([[n.level, n.text] for n in preflight.watches([inbox])]))\n"
        )
        limited = ("unshare", "--user", "--map-root-user", "sh", "-c")
        under = (*limited, 'echo 0 > /proc/sys/user/max_inotify_instances && exec "$@"', "sh")
        ((level, text),) = python(script, inbox.path, under=under)
        assert level == "warning"
        assert "fs.inotify.max_user_instances" in text
        assert "poll_interval" in text


def test_files_beside(tmp_path: Path) -> None:
    """The folder of each file that the configuration names must be there; which key it is is said."""
    config = Config((), log=Log(file=tmp_path / "no" / "log"), metrics_file=tmp_path / "metrics.prom")
    assert list(worst(preflight.beside(config))) == [f"log.file {tmp_path / 'no' / 'log'}"]

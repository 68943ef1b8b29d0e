"""Filing away: from any half-state to one file and one sidecar, and never back to the service."""

import errno
import json
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from world import TARGET, World, a_world, batch, fill, needs_root, sha256, tmpfs

from sfwatch import claim, files
from sfwatch.job import BackInInbox, Done, Failed, InboxGone, NoStorage, NotTaken, Outcome, Task
from sfwatch.journal import Delivery, State, address

X = "x.jsonl"
SIDECAR = f"{X}.fileid.json"
DATA = batch()
ID = "file-filed"


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world
        assert world.service.requests == []  # whatever happens here, nothing is asked or sent


def accepted(world: World, name: str = X, data: bytes = DATA, **facts: Any) -> Delivery:
    """A file whose answer is durable, and nothing else is done yet."""
    path = world.drop(name, data)
    path.chmod(0o640)
    world.claim(name)
    answer = {"data": {"id": ID, "object": "file", "bytes": len(data)}, "recovered": False, "same_as": None}
    facts = {"answer": answer, "file_id": ID, "settled_by": "lease"} | facts
    return world.row(name, State.ACCEPTED, **facts)


def refused(world: World, name: str = X, data: bytes = DATA) -> Delivery:
    world.drop(name, data)
    world.claim(name)
    report = {"reason": "not_json", "detail": "line 1", "line": 1, "failed_at": "2026-01-01T00:00:00Z"}
    return world.row(name, State.REFUSED, report=report)


def is_filed(world: World, name: str = X, data: bytes = DATA, *, as_name: str | None = None) -> None:
    """Exactly one file, under one name, with its sidecar; nothing claimed, nothing open in the journal."""
    as_name = as_name or name
    assert (world.inbox.done / as_name).read_bytes() == data
    assert world.sidecar(as_name)["id"] == ID
    assert world.sidecar(as_name)["sfwatch"]["sha256"] == sha256(data)
    assert not (world.inbox.path / name).exists()
    assert world.claimed() == []
    assert world.journal.under_way() == []
    assert set(world.journal.known(address(TARGET), [ID])) == {ID}
    copies = [path for path in world.root.rglob("*") if path.is_file() and path.read_bytes() == data]
    assert copies == [world.inbox.done / as_name]
    assert not [name for name in world.names(world.root) if name.endswith(".tmp")]


# The order of things.


def test_the_sidecar_is_there_before_the_file(world: World) -> None:
    """Whoever waits for the file in done finds its sidecar, whole."""
    accepted(world)
    process, seen = watching(world.inbox.done)
    assert isinstance(world.deliver(X), Done)
    assert seen(process, 2) == [SIDECAR, X]
    is_filed(world)


def watching(folder: Path) -> tuple[int, Callable[[int, int], list[str]]]:
    """The names that appear in a folder by a rename, in their order, as the kernel tells them."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_CLOEXEC)
    moved_to = 0x80
    assert libc.inotify_add_watch(fd, os.fsencode(folder), moved_to) >= 0

    def seen(fd: int, count: int) -> list[str]:
        names: list[str] = []
        while len(names) < count:
            events = os.read(fd, 4096)
            while events:
                length = int.from_bytes(events[12:16], "little")
                names.append(os.fsdecode(events[16 : 16 + length].rstrip(b"\0")))
                events = events[16 + length :]
        os.close(fd)
        return names

    return fd, seen


def test_a_name_is_in_the_journal_before_it_is_taken(world: World) -> None:
    """The target's name is durable before the sidecar is published, so that a crash finds it again."""
    known = accepted(world)
    (world.inbox.done / X).write_bytes(b"somebody's")
    outcome = world.deliver(X)
    assert isinstance(outcome, Done)
    rows = world.journal
    assert rows.find(known.inbox, X) is None
    path = Path(world.event("file.done")["path"])
    assert path.name != X
    assert path.read_bytes() == DATA


def test_documents_are_for_the_group_and_files_keep_their_mode(world: World) -> None:
    """Sidecars are 0640 whatever the umask; the file keeps mode and time."""
    known = accepted(world)
    before = os.umask(0o077)
    try:
        assert isinstance(world.deliver(X), Done)
    finally:
        os.umask(before)
    assert stat.S_IMODE((world.inbox.done / SIDECAR).stat().st_mode) == 0o640
    done = (world.inbox.done / X).stat()
    assert (stat.S_IMODE(done.st_mode), done.st_mtime_ns) == (0o640, known.mtime_ns)


# Names that are taken.

TAKEN: list[tuple[str, ...]] = [(X,), (SIDECAR,), (X, SIDECAR)]


@pytest.mark.parametrize("taken", TAKEN)
def test_a_taken_name_is_passed_over(world: World, taken: tuple[str, ...]) -> None:
    """File, sidecar or both are somebody's: ours gets the time into its name, and theirs stay as they were."""
    for name in taken:
        (world.inbox.done / name).write_text(f"somebody's {name}")
    accepted(world)
    assert isinstance(world.deliver(X), Done)
    for name in taken:
        assert (world.inbox.done / name).read_text() == f"somebody's {name}"
    name = Path(world.event("file.done")["path"]).name
    assert name.startswith("x.2")
    assert name.endswith("Z.jsonl")
    is_filed(world, as_name=name)


def test_many_of_one_name_in_one_second_are_all_kept(world: World) -> None:
    """The same name again and again: every file gets a name of its own, with its own sidecar."""
    for number in range(4):
        data = batch(word=f"{number}")
        answer = {"data": {"id": f"file-{number}"}, "same_as": None}
        accepted(world, data=data, answer=answer, file_id=f"file-{number}")
        assert isinstance(world.deliver(X), Done)
    names = [name for name in world.names(world.inbox.done) if name.endswith(".jsonl")]
    assert len(names) == 4
    ids = {world.sidecar(name)["id"]: (world.inbox.done / name).read_bytes() for name in names}
    assert ids == {f"file-{number}": batch(word=f"{number}") for number in range(4)}


HOSTILE: dict[str, Callable[[Path], object]] = {
    "symlink": lambda path: path.symlink_to("/etc/hostname"),
    "dangling": lambda path: path.symlink_to("/nowhere/at/all"),
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "socket": lambda path: _socket(path),  # noqa: PLW0108 - it is defined below
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", [X, SIDECAR])
def test_what_lies_in_done_is_neither_followed_nor_replaced(world: World, name: str, kind: str) -> None:
    """A link, pipe, socket or folder at the file's or the sidecar's name is stepped around."""
    path = world.inbox.done / name
    HOSTILE[kind](path)
    before = path.lstat()
    accepted(world)
    assert isinstance(world.deliver(X), Done)
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    filed = Path(world.event("file.done")["path"])
    assert filed != world.inbox.done / X
    assert filed.read_bytes() == DATA


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"sfwatch": 1}', b'{"sfwatch": {"sha256": "ab"}}'])
def test_a_strangers_sidecar_is_not_taken_for_ours(world: World, content: bytes) -> None:
    """The name was ours to choose, and somebody put another sidecar there before we did: theirs stays."""
    (world.inbox.done / SIDECAR).write_bytes(content)
    accepted(world, target_name=X)
    assert isinstance(world.deliver(X), Done)
    assert (world.inbox.done / SIDECAR).read_bytes() == content
    is_filed(world, as_name=Path(world.event("file.done")["path"]).name)


def test_a_sidecar_of_the_same_bytes_from_an_earlier_upload_stays(world: World) -> None:
    """Same name and same bytes as a file that was done and taken away since: its sidecar is not overwritten."""
    accepted(world, answer={"data": {"id": "file-earlier"}, "same_as": None}, file_id="file-earlier")
    assert isinstance(world.deliver(X), Done)
    (world.inbox.done / X).unlink()  # a consumer took the file and left the sidecar
    earlier = (world.inbox.done / SIDECAR).read_bytes()
    accepted(world)
    assert isinstance(world.deliver(X), Done)
    assert (world.inbox.done / SIDECAR).read_bytes() == earlier
    is_filed(world, as_name=Path(world.events("file.done")[-1]["path"]).name)


@pytest.mark.parametrize("name", ["a/b/x.jsonl", "a/x"])
def test_a_file_keeps_its_sub_folders(world: World, name: str) -> None:
    """What came from a sub-folder goes into the same one of done; ours among the claims is tidied away."""
    accepted(world, name)
    assert isinstance(world.deliver(name), Done)
    is_filed(world, name)
    assert list(world.claims.iterdir()) == []


@pytest.mark.parametrize("kind", ["symlink", "file"])
def test_a_sub_folder_of_done_that_leads_elsewhere_is_not_entered(world: World, kind: str) -> None:
    """A link (or a file) in place of a sub-folder of done holds the file, and nothing is written through it."""
    elsewhere = world.root / "elsewhere"
    elsewhere.mkdir()
    if kind == "symlink":
        (world.inbox.done / "sub").symlink_to(elsewhere)
    else:
        (world.inbox.done / "sub").write_text("a file")
    accepted(world, f"sub/{X}")
    outcome = world.deliver(f"sub/{X}")
    assert isinstance(outcome, NotTaken | NoStorage)
    assert outcome.claimed
    assert list(elsewhere.iterdir()) == []
    assert world.claimed() == [f"sub/{X}"]
    (world.inbox.done / "sub").unlink()
    assert isinstance(world.deliver(f"sub/{X}"), Done)
    is_filed(world, f"sub/{X}")


NAMES = [os.fsdecode(b"caf\xe9\xff.jsonl"), "a\n\x1b[31m\"'.jsonl", "\u202ehtml.jsonl", "-rf.jsonl", " .jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_filed_under_itself(world: World, name: str) -> None:
    """Undecodable bytes, control characters, bidi marks: the name on the disk is the one that was dropped."""
    accepted(world, name, remote_name="r")
    assert isinstance(world.deliver(name), Done)
    is_filed(world, name)
    assert "\x1b" not in (world.inbox.done / f"{name}.fileid.json").read_text(errors="replace")


@pytest.mark.parametrize(
    "name", ["é" * 124 + ".jsonl", os.fsdecode(b"\xff" * 249 + b".jsonl"), "x" * 250 + ".json"]
)
def test_a_name_too_long_for_its_sidecar_is_shortened(world: World, name: str) -> None:
    """255 bytes leave no room for the suffix: the name is cut, and carries a digest of the whole one."""
    accepted(world, name, remote_name="r")
    assert isinstance(world.deliver(name), Done)
    (filed,) = [path for path in world.inbox.done.iterdir() if not path.name.endswith(".fileid.json")]
    assert len(os.fsencode(filed.name)) < len(os.fsencode(name))
    is_filed(world, name, as_name=filed.name)


# Crashes.


def test_after_a_crash_behind_the_answer_sidecar_and_move_follow(world: World) -> None:
    """The answer is durable and nothing else happened: both are made up for, and the event is no repetition."""
    accepted(world)
    world.reopen()
    assert isinstance(world.deliver(X), Done)
    is_filed(world)
    assert "repeated" not in world.event("file.done")


def crash_at_the_end(world: World) -> None:
    """Let everything happen up to the last row; the process dies before that is durable."""
    before = world.known(X)

    def die() -> None:
        raise Died

    world.when["file.done"] = die
    with pytest.raises(Died):
        world.deliver(X)
    named = world.known(X)
    assert (named.row, named.state) == (before.row, State.ACCEPTED)
    world.reopen()


class Died(BaseException):
    """The process ends here."""


def test_after_a_crash_behind_the_sidecar_it_is_taken_up_again(world: World) -> None:
    """The sidecar lies there, the file does not: the same name is used, and there is no second sidecar."""
    accepted(world)
    crash_at_the_end(world)
    sidecar = (world.inbox.done / SIDECAR).read_bytes()
    (world.inbox.done / X).rename(world.claims / X)  # the move had not happened yet
    assert isinstance(world.deliver(X), Done)
    is_filed(world)
    assert world.names(world.inbox.done) == [X, SIDECAR]
    assert json.loads(sidecar)["id"] == ID


def test_after_a_crash_behind_the_move_the_event_is_repeated(world: World) -> None:
    """File and sidecar lie there, the row says `accepted`: it is finished, and said again as a repetition."""
    accepted(world)
    crash_at_the_end(world)
    assert world.deliver(X) == Done(len(DATA))
    is_filed(world)
    first, second = world.events("file.done")
    assert "repeated" not in first
    assert second["repeated"] is True
    assert second["path"] == first["path"]


def test_after_a_crash_behind_the_move_a_newcomer_is_left_alone(world: World) -> None:
    """A new file of the name lies in the inbox by now: the old row is finished, the new file not touched."""
    accepted(world)
    crash_at_the_end(world)
    newcomer = world.drop(X, batch(word="newcomer")).lstat()
    assert world.deliver(X) == Done(len(DATA))
    assert world.events("file.done")[-1]["repeated"] is True
    assert (world.inbox.path / X).lstat() == newcomer
    assert world.journal.under_way() == []


def test_a_done_file_that_was_consumed_at_once_is_not_missed(world: World) -> None:
    """Consumers may take file and sidecar before the row is finished: nothing is sent, the row still ends."""
    accepted(world)
    crash_at_the_end(world)
    (world.inbox.done / X).unlink()
    assert isinstance(world.deliver(X), Done)
    assert world.journal.under_way() == []
    assert world.sidecar(X)["id"] == ID


def test_a_claim_that_a_power_cut_undid_is_taken_again(world: World) -> None:
    """Accepted, and the file is back in its inbox: it is filed from there, not sent again."""
    accepted(world)
    (world.claims / X).rename(world.inbox.path / X)
    world.reopen()
    assert isinstance(world.deliver(X), Done)
    is_filed(world)


def test_another_file_in_place_of_an_undone_claim_is_not_filed(world: World) -> None:
    """The claim is gone and the name in the inbox is another file's: that one never gets this sidecar."""
    accepted(world)
    (world.claims / X).unlink()
    newcomer = world.drop(X, batch(word="newcomer")).lstat()
    assert isinstance(world.deliver(X), Done)
    assert "taken away" in world.event("file.done")["detail"]
    assert (world.inbox.path / X).lstat() == newcomer
    assert world.names(world.inbox.done) == [SIDECAR]


def test_a_file_that_was_taken_away_leaves_its_sidecar(world: World) -> None:
    """The id is worth money even without the file: the sidecar is written, and the event tells."""
    accepted(world)
    (world.claims / X).unlink()
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == ID
    assert "taken away" in world.event("file.done")["detail"]
    assert world.journal.under_way() == []


def test_a_missing_inbox_is_waited_for(world: World) -> None:
    """Unmounted with the claim on it: the row stays until the inbox is back, and no file is declared lost."""
    known = accepted(world)
    away = world.root / "away"
    world.inbox.path.rename(away)
    outcome = world.deliver(X, settled=None)
    assert isinstance(outcome, InboxGone)
    assert world.known(X) == known
    assert world.names(world.inbox.done) == []
    away.rename(world.inbox.path)
    assert isinstance(world.deliver(X), Done)
    is_filed(world)


def test_a_changed_file_is_not_filed_under_the_old_answer(world: World) -> None:
    """Somebody wrote to the claim by another link after the answer: it goes back, and the id is nobody's."""
    accepted(world)
    (world.claims / X).write_bytes(batch(word="changed"))
    outcome: Outcome = world.deliver(X)
    if isinstance(outcome, NotTaken):
        assert outcome.claimed
        outcome = world.deliver(X, task=Task.GIVE_BACK)
    assert outcome == BackInInbox()
    assert (world.inbox.path / X).read_bytes() == batch(word="changed")
    assert world.names(world.inbox.done) == []
    assert world.event("file.changed")["orphans"] == [ID]
    assert set(world.journal.known(address(TARGET), [ID])) == {ID}


def test_a_touched_file_is_still_the_same(world: World) -> None:
    """Another time on the same bytes changes nothing: it is filed, not sent a second time."""
    accepted(world)
    os.utime(world.claims / X, ns=(1, 1))
    assert isinstance(world.deliver(X), Done)
    is_filed(world)


# From one filesystem to another.


@contextmanager
def elsewhere(root: Path, folder: str = "done", size: str = "20m") -> Iterator[World]:
    with tmpfs(root / folder, size), a_world(root) as world:
        yield world
        assert world.service.requests == []


@needs_root
def test_a_done_on_another_disk_gets_a_whole_copy(tmp_path: Path) -> None:
    """The copy has the bytes, the time and the mode; the source is gone only then."""
    with elsewhere(tmp_path) as world:
        known = accepted(world)
        assert isinstance(world.deliver(X), Done)
        is_filed(world)
        done = (world.inbox.done / X).stat()
        assert (done.st_mtime_ns, stat.S_IMODE(done.st_mode)) == (known.mtime_ns, 0o640)


@needs_root
def test_a_copy_that_a_crash_left_in_both_places_is_ended(tmp_path: Path) -> None:
    """Published, and the source not yet removed: the same target is used, and one file is left."""
    with elsewhere(tmp_path) as world:
        known = accepted(world)
        crash_at_the_end(world)
        copied = world.inbox.done / X
        (world.claims / X).write_bytes(DATA)
        os.utime(world.claims / X, ns=(known.mtime_ns, known.mtime_ns))
        assert isinstance(world.deliver(X), Done)
        assert copied.exists()
        is_filed(world)
        assert world.names(world.inbox.done) == [X, SIDECAR]


@needs_root
def test_a_copy_that_a_crash_cut_off_is_made_anew(tmp_path: Path) -> None:
    """A half-written temporary is no file of anybody's: the copy is made again, whole."""
    with elsewhere(tmp_path) as world:
        accepted(world, target_name=X)
        (world.inbox.done / ".sfwatch-0123abcd.tmp").write_bytes(DATA[:50])
        with files.folder(world.inbox.done) as fd:
            assert files.sweep_temporaries(fd) == 1
        assert isinstance(world.deliver(X), Done)
        is_filed(world)


@needs_root
def test_a_disk_that_fills_up_during_the_copy_costs_nothing(tmp_path: Path) -> None:
    """The move fails as often as the disk is full; the file stays whole in its claim, the answer known."""
    data = b"x" * 3_000_000 + b"\n"
    with elsewhere(tmp_path) as world:
        accepted(world, data=data)
        ballast = fill(world.inbox.done)
        os.truncate(ballast, ballast.stat().st_size - 2_000_000)  # room for the sidecar, not for the file
        for _ in range(2):
            outcome = world.deliver(X)
            assert isinstance(outcome, NoStorage)
            assert (outcome.folder, outcome.reason) == (str(world.inbox.done), "no_space")
            assert outcome.claimed
            assert outcome.known is not None
            assert outcome.known.state is State.ACCEPTED
            assert (world.claims / X).read_bytes() == data
            assert set(world.names(world.inbox.done)) <= {"ballast", SIDECAR}
            kept = outcome.known
        ballast.unlink()
        assert isinstance(world.deliver(X, known=kept), Done)
        is_filed(world, data=data)


# Folders that do not take it.


@needs_root
def test_a_done_that_is_full_holds_the_file(tmp_path: Path) -> None:
    """No room for even the sidecar: the answer is kept, and the folder named."""
    with elsewhere(tmp_path, size="1m") as world:
        accepted(world)
        ballast = fill(world.inbox.done)
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        assert outcome.reason == "no_space"
        assert world.known(X).state is State.ACCEPTED
        ballast.unlink()
        assert isinstance(world.deliver(X, known=outcome.known), Done)
        is_filed(world)


@needs_root
def test_a_read_only_done_holds_the_file(tmp_path: Path) -> None:
    """EROFS is the folder's fault, and ends when it is mounted again."""
    with elsewhere(tmp_path) as world:
        accepted(world)
        subprocess.run(["mount", "-o", "remount,ro", world.inbox.done], check=True)
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        assert (outcome.folder, outcome.reason, outcome.claimed) == (str(world.inbox.done), "read_only", True)
        subprocess.run(["mount", "-o", "remount,rw", world.inbox.done], check=True)
        assert isinstance(world.deliver(X), Done)
        is_filed(world)


def test_a_missing_done_is_not_made_by_guesswork(world: World) -> None:
    """It may be an unmounted disk: the file waits in its claim, the answer in the journal."""
    accepted(world)
    world.inbox.done.rmdir()
    outcome = world.deliver(X)
    assert isinstance(outcome, NoStorage)
    assert (outcome.reason, outcome.claimed) == ("missing", True)
    assert not world.inbox.done.exists()
    world.inbox.done.mkdir()
    assert isinstance(world.deliver(X), Done)
    is_filed(world)


def test_a_done_that_is_a_file_holds_the_file(world: World) -> None:
    """Something else stands where done should be: nothing is lost, nothing overwritten."""
    accepted(world)
    world.inbox.done.rmdir()
    world.inbox.done.write_text("not a folder")
    outcome = world.deliver(X)
    assert isinstance(outcome, NoStorage)
    assert outcome.claimed
    assert world.inbox.done.read_text() == "not a folder"
    world.inbox.done.unlink()
    world.inbox.done.mkdir()
    assert isinstance(world.deliver(X), Done)


def test_a_done_that_is_a_link_to_a_folder_is_the_administrators(world: World) -> None:
    """The folder itself may be a link: its path is the administrator's choice."""
    real = world.root / "real"
    real.mkdir()
    world.inbox.done.rmdir()
    world.inbox.done.symlink_to(real)
    accepted(world)
    assert isinstance(world.deliver(X), Done)
    assert sorted(path.name for path in real.iterdir()) == [X, SIDECAR]


# Failed.


def test_a_refused_file_is_reported(world: World) -> None:
    """The report is there before the file, both in failed, and done stays empty."""
    refused(world)
    assert world.deliver(X) == Failed("not_json")
    assert world.names(world.inbox.failed) == [X, f"{X}.error.json"]
    assert world.names(world.inbox.done) == []
    assert world.report(X)["sha256"] == sha256(DATA)
    assert world.journal.under_way() == []
    assert world.event("file.failed")["line"] == 1


def test_a_refused_file_of_a_taken_name_keeps_its_report_beside_it(world: World) -> None:
    """An earlier failure of the name is neither overwritten nor mixed up with this one."""
    for _ in range(2):
        refused(world)
        assert world.deliver(X) == Failed("not_json")
    names = world.names(world.inbox.failed)
    assert len(names) == 4
    assert all(f"{name}.error.json" in names for name in names if name.endswith(".jsonl"))


def test_a_refusal_is_resumed_after_a_crash(world: World) -> None:
    """`refused` is as durable as `accepted`: only report and move are left."""
    refused(world)
    world.reopen()
    assert world.deliver(X) == Failed("not_json")
    assert world.places(X) == ["failed"]


def test_a_failed_folder_that_is_missing_holds_the_file(world: World) -> None:
    """The verdict waits in the journal, the file in its claim."""
    refused(world)
    world.inbox.failed.rmdir()
    outcome = world.deliver(X)
    assert isinstance(outcome, NoStorage)
    assert (outcome.folder, outcome.claimed) == (str(world.inbox.failed), True)
    world.inbox.failed.mkdir()
    assert world.deliver(X) == Failed("not_json")


# Markers, and what lies beside.


@pytest.mark.parametrize("taken", [False, True])
def test_a_marker_lies_beside_its_file(world: World, taken: bool) -> None:  # noqa: FBT001
    """It takes the name that the file got; a marker that can't be moved holds nothing up."""
    world.set_inbox(settle_marker=".ok")
    world.drop(f"{X}.ok", b"")
    world.claim(f"{X}.ok")
    accepted(world, marker=".ok")
    if taken:
        (world.inbox.done / f"{X}.ok").write_text("somebody's")
    assert isinstance(world.deliver(X), Done)
    assert world.names(world.inbox.done) == [X, SIDECAR, f"{X}.ok"]
    assert world.claimed() == ([f"{X}.ok"] if taken else [])
    if taken:
        assert (world.inbox.done / f"{X}.ok").read_text() == "somebody's"


def test_the_same_numbers_are_not_enough_to_call_it_done(world: World) -> None:
    """A name that was only chosen is not ours yet: a stranger's file there is not taken for the moved one."""
    known = accepted(world, target_name=X)
    (world.claims / X).unlink()
    stranger = world.inbox.done / X
    stranger.write_bytes(b"y" * known.size)
    os.utime(stranger, ns=(known.mtime_ns, known.mtime_ns))
    assert isinstance(world.deliver(X), Done)
    assert stranger.read_bytes() == b"y" * known.size
    done = world.event("file.done")
    assert Path(done["sidecar"]).exists()
    assert json.loads(Path(done["sidecar"]).read_bytes())["id"] == ID


def test_an_error_of_the_disk_has_a_name(world: World) -> None:
    """Every errno that a folder may answer with becomes a short code that scripts can rely on."""
    from sfwatch.filing import STORAGE_REASONS, StorageError

    assert StorageError("/x", OSError(errno.EIO, "Input/output error")).reason == "io_error"
    assert {StorageError("/x", OSError(number, "")).reason for number in STORAGE_REASONS} == {
        "no_space",
        "quota",
        "read_only",
        "no_permission",
        "missing",
    }
    outcome = StorageError("/x", OSError(errno.EDQUOT, "Disk quota exceeded")).outcome(claimed=True)
    assert (outcome.folder, outcome.reason, outcome.claimed) == ("/x", "quota", True)
    assert "Disk quota exceeded" in outcome.detail


def test_an_unsafe_folder_for_claims_keeps_the_answer(world: World) -> None:
    """`.sfwatch` was opened to others: nothing is moved from there, and mending it is enough."""
    known = accepted(world)
    (world.inbox.path / claim.FOLDER).chmod(0o755)
    outcome = world.deliver(X)
    assert isinstance(outcome, NotTaken)
    assert (outcome.reason, outcome.claimed) == ("unsafe", True)
    assert world.known(X) == known
    (world.inbox.path / claim.FOLDER).chmod(0o700)
    assert isinstance(world.deliver(X), Done)
    is_filed(world)


def test_an_answer_with_odd_values_makes_a_readable_sidecar(world: World) -> None:
    """Whatever the service sent beside the id: the sidecar is JSON for everybody."""
    data = {"id": ID, "text": "\ud800\x1b[31m", "deep": [[[None]]], "sfwatch": "mine", "big": 10**30}
    accepted(world, answer={"data": data, "same_as": None})
    assert isinstance(world.deliver(X), Done)
    text = (world.inbox.done / SIDECAR).read_text()
    assert json.loads(text)["id"] == ID
    assert isinstance(json.loads(text)["sfwatch"], dict)
    assert "\x1b" not in text


def test_finishing_twice_is_finishing_once(world: World) -> None:
    """A file that was filed by what is still in somebody's memory is filed once."""
    known = accepted(world)
    assert isinstance(world.deliver(X), Done)
    assert isinstance(world.deliver(X, settled=None, known=replace(known, target_name=X)), Done)
    assert world.names(world.inbox.done) == [X, SIDECAR]
    assert world.journal.under_way() == []


@pytest.mark.parametrize("taken", [X, SIDECAR])
def test_the_sidecar_of_a_file_that_was_taken_away_gets_a_name_of_its_own(world: World, taken: str) -> None:
    """The name that was chosen is somebody's by now, and our file is gone: its id is published all the same."""
    accepted(world, target_name=X)
    (world.claims / X).unlink()
    (world.inbox.done / taken).write_text("somebody's")
    assert isinstance(world.deliver(X), Done)
    assert (world.inbox.done / taken).read_text() == "somebody's"
    assert json.loads(Path(world.event("file.done")["sidecar"]).read_bytes())["id"] == ID


def test_a_done_file_that_was_changed_at_once_gets_no_second_sidecar(world: World) -> None:
    """Somebody edits the file in done before the row is finished: it is done all the same, once."""
    accepted(world)
    crash_at_the_end(world)
    (world.inbox.done / X).write_bytes(b"edited")
    assert isinstance(world.deliver(X), Done)
    assert world.names(world.inbox.done) == [X, SIDECAR]
    assert world.journal.under_way() == []

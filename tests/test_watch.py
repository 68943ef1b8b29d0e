"""One inbox as it is watched: which folder it is, how it rings, and why it is lost."""

import errno
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sfwatch import arrive, watch
from sfwatch.settings import Config, Inbox, Proof


@pytest.fixture(name="inbox")
def _inbox(tmp_path: Path) -> Inbox:
    path = tmp_path / "inbox"
    path.mkdir()
    return Inbox(path=path, name="a", done=tmp_path / "done", failed=tmp_path / "failed")


@pytest.fixture(name="doorbell")
def _doorbell() -> Iterator[arrive.Doorbell]:
    rings: queue.SimpleQueue[object] = queue.SimpleQueue()
    bell = arrive.Doorbell(rings.put)
    yield bell
    bell.close()


def test_the_first_look_and_the_first_at_another_folder_say_that_it_changed(
    inbox: Inbox, doorbell: arrive.Doorbell
) -> None:
    """Between them the folder is the same, and stays armed."""
    it = watch.watched(inbox)
    assert [watch.look(it, doorbell).changed for _ in range(3)] == [True, False, False]
    inbox.path.rename(inbox.path.with_name("old"))
    inbox.path.mkdir()
    assert [watch.look(it, doorbell).changed for _ in range(2)] == [True, False]
    assert doorbell.healthy("a")


def test_an_inbox_that_is_lost_and_the_same_again_has_changed(inbox: Inbox, doorbell: arrive.Doorbell) -> None:
    """What lies claimed in it has to be adopted anew; while it is lost nothing of it is held open."""
    it = watch.watched(inbox)
    watch.look(it, doorbell)
    watch.lose(it, doorbell)
    assert not doorbell.healthy("a")
    assert watch.look(it, doorbell).changed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(errno.ENOENT, "x"), "missing"),
        (PermissionError(errno.EACCES, "x"), "unreadable"),
        (NotADirectoryError(errno.ENOTDIR, "x"), "no_folder"),
        (OSError(errno.ESTALE, "Stale file handle"), "io_error"),
    ],
)
def test_why_an_inbox_is_lost_is_a_code_and_a_sentence_with_its_path(error: OSError, reason: str) -> None:
    """A person reads which folder, and what is wrong with it."""
    inbox = Inbox(Path("/srv/in"), "in", done=Path("/srv/done"), failed=Path("/srv/failed"))
    code, sentence = watch.why_lost(watch.watched(inbox), error)
    assert code == reason
    assert "/srv/in" in sentence


def test_a_file_in_place_of_the_inbox_raises(inbox: Inbox, doorbell: arrive.Doorbell) -> None:
    """It is no empty inbox."""
    inbox.path.rmdir()
    inbox.path.write_text("")
    with pytest.raises(NotADirectoryError):
        watch.look(watch.watched(inbox), doorbell)


def test_where_nothing_rings_looks_are_frequent(inbox: Inbox, doorbell: arrive.Doorbell) -> None:
    """Also where the doorbell could not be armed, and before anything is known."""
    config = Config(inboxes=(inbox,), scan_interval_s=30.0, poll_interval_s=5.0)
    it = watch.watched(inbox)
    assert watch.interval_s(it, config, rings=True) == 5.0
    watch.look(it, doorbell)
    assert watch.interval_s(it, config, rings=True) == 30.0
    assert watch.interval_s(it, config, rings=False) == 5.0


def test_the_kernels_word_is_not_trusted_where_the_settings_say_so(
    inbox: Inbox, doorbell: arrive.Doorbell
) -> None:
    """For folders that are exported by NFS or SMB."""
    it = watch.watched(replace(inbox, proof=Proof.NEVER))
    assert not it.rules.trusted
    watch.look(it, doorbell)
    assert not it.rules.trusted


def test_looks_that_take_long_are_further_apart(inbox: Inbox, doorbell: arrive.Doorbell) -> None:
    """A million names cost a second a look; rings may ask for one a little sooner than the clock."""
    config = Config(inboxes=(inbox,), scan_interval_s=30.0, poll_interval_s=5.0)
    it = watch.watched(inbox)
    watch.look(it, doorbell)
    it.looked_at, it.look_s = 100.0, 0.01
    assert watch.interval_s(it, config, rings=True) == 30.0
    assert watch.soon(it, 100.5) == 101.0
    it.look_s = 2.0
    assert watch.interval_s(it, config, rings=True) == 100.0
    assert watch.soon(it, 100.5) == 120.0
    assert watch.soon(it, 200.0) == 200.0

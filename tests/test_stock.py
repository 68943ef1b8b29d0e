"""What is seen while no daemon runs, and that nothing is made or changed by looking."""

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from loop import Loop

from sfwatch import journal, stock
from sfwatch.journal import JournalError, State
from sfwatch.standin import StandIn, answering, storing_then_resetting

NOW = datetime(2026, 11, 22, 20, 1, 12, tzinfo=UTC)


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service:
        loop = Loop(tmp_path, service)
        yield loop
        loop.close()


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that is below a folder, and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def test_it_never_ran(loop: Loop) -> None:
    """The folders are looked at, and nothing is made."""
    before = tree(loop.root)
    seen = stock.take(loop.settings(), now=NOW)
    assert (seen.state, seen.pid, seen.waiting, seen.last_done) == ("stopped", 0, (), None)
    assert seen.inboxes[0].lost is not None
    assert tree(loop.root) == before


def test_after_an_orderly_end(loop: Loop) -> None:
    """What lies in the inbox with its age, and what was done last."""
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.look().run(3)
    loop.die()
    loop.drop("a", "late.jsonl")
    os.mkfifo(loop.inbox_of("a") / "fifo.jsonl")
    before = tree(loop.root)
    seen = stock.take(loop.settings(), now=NOW)
    (group,) = seen.waiting
    assert (group.reason, group.files, group.oldest[0].file) == ("not_running", 1, "late.jsonl")
    assert seen.last_done is not None
    assert (seen.last_done.inbox, seen.last_done.file) == ("a", "x.jsonl")
    assert seen.inboxes[0].waiting == 1
    assert tree(loop.root) == before


def test_after_a_crash(loop: Loop, tmp_path: Path) -> None:
    """What the journal's own log holds is read too, and neither is changed."""
    loop.service.script.append(storing_then_resetting())
    loop.start()
    loop.drop("a", "lost.jsonl")
    loop.drop("a", "tried.jsonl")
    loop.service.script.append(answering(503, {"code": 50505, "message": "busy"}))
    loop.look().run(2.1)
    crashed = tmp_path / "crashed"
    shutil.copytree(tmp_path / "state", crashed)
    assert (crashed / "journal.sqlite3-wal").stat().st_size > 0
    before = tree(crashed)
    seen = journal.glance(crashed)
    assert {row.name: row.state for row in seen.under_way} == {
        "lost.jsonl": State.UNKNOWN,
        "tried.jsonl": State.WAITING,
    }
    loop.config = {"state_dir": crashed}
    groups = {group.reason: group for group in stock.take(loop.settings(), now=NOW).waiting}
    assert groups["looking_up"].oldest[0].file == "lost.jsonl"
    assert groups["not_running"].oldest[0].attempts == 1
    assert tree(crashed) == before
    loop.run(60)


def test_a_damaged_journal(loop: Loop) -> None:
    """It is said, and left as it is: the daemon sets it aside when it starts."""
    loop.start().die()
    (loop.root / "state" / "journal.sqlite3").write_bytes(b"no database" * 1000)
    before = tree(loop.root)
    with pytest.raises(JournalError, match="can't be read"):
        stock.take(loop.settings(), now=NOW)
    assert tree(loop.root) == before


def test_a_newer_journal(loop: Loop) -> None:
    """It is not guessed at."""
    loop.start().die()
    import sqlite3

    with sqlite3.connect(loop.root / "state" / "journal.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(JournalError, match="schema 99"):
        journal.glance(loop.root / "state")
    with sqlite3.connect(loop.root / "state" / "journal.sqlite3") as database:
        database.execute("PRAGMA user_version = 1")
    database.close()


def test_many_files(loop: Loop) -> None:
    """All count, the oldest are named."""
    loop.start().die()
    for number in range(30):
        path = loop.drop("a", f"{number:02}.jsonl")
        os.utime(path, (0, 0))
    (group,) = stock.take(loop.settings(), now=NOW).waiting
    assert (group.files, len(group.oldest), group.oldest[0].file) == (30, 20, "00.jsonl")
    loop.start().run(3)

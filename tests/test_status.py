"""The document of the status: written whole, found where it lies, and read with distrust."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sfwatch import status
from sfwatch.settings import Config, Inbox
from sfwatch.status import Status, UnusableError

WHEN = datetime(2026, 11, 22, 20, 1, 12, 345000, tzinfo=UTC)


def made(state_dir: Path = Path("/var/lib/sfwatch"), **changes: object) -> Status:
    """A document of this very process."""
    document = Status(
        schema=status.SCHEMA,
        version="0",
        state="running",
        pid=os.getpid(),
        process=status.process_of(os.getpid()) or "",
        started_at=WHEN,
        published_at=WHEN,
        config=None,
        state_dir=str(state_dir),
    )
    return replace(document, **changes)  # type: ignore[arg-type]


def settings(tmp_path: Path, **changes: object) -> Config:
    inbox = Inbox(tmp_path / "inbox", "inbox", tmp_path / "done", tmp_path / "failed")
    return replace(Config(inboxes=(inbox,), state_dir=tmp_path / "state"), **changes)  # type: ignore[arg-type]


class TestWritingAndReading:
    def test_a_time_without_a_zone_is_no_time(self, tmp_path: Path) -> None:
        """It can't be compared with any other: the document is damaged."""
        status.write(tmp_path / "s.json", made(started_at=WHEN.replace(tzinfo=None)))
        with pytest.raises(UnusableError):
            status.read(tmp_path / "s.json")

    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        """All of it, times to the millisecond; owner and group may read it, nothing lies beside it."""
        waiting = status.Waiting("a", "empty", 1, (status.WaitingFile("x.jsonl", 0, WHEN),))
        document = made(waiting=(waiting,), totals=status.Totals(1, 2, 3, {"bom": 2}))
        status.write(tmp_path / "s.json", document)
        assert status.read(tmp_path / "s.json") == document
        assert (tmp_path / "s.json").stat().st_mode & 0o777 == 0o640
        assert list(tmp_path.iterdir()) == [tmp_path / "s.json"]

    def test_it_is_replaced(self, tmp_path: Path) -> None:
        """A link in its place is replaced, not followed."""
        (tmp_path / "other").write_text("kept")
        (tmp_path / "s.json").symlink_to("other")
        status.write(tmp_path / "s.json", made())
        status.write(tmp_path / "s.json", made(version="1"))
        assert status.read(tmp_path / "s.json").version == "1"
        assert (tmp_path / "other").read_text() == "kept"

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"schema": "x"}', '{"schema": 1}', "\xff", "1e999", "[" * 100_000]
    )
    def test_damaged(self, tmp_path: Path, text: str) -> None:
        """It is said so, with its path."""
        (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(UnusableError, match=r"s\.json is damaged"):
            status.read(tmp_path / "s.json")

    def test_of_a_newer_version(self, tmp_path: Path) -> None:
        """Nothing in it is guessed."""
        (tmp_path / "s.json").write_text(json.dumps({"schema": 2, "new": True}))
        with pytest.raises(UnusableError, match=r"newer sfwatch \(schema 2, known here: 1\)"):
            status.read(tmp_path / "s.json")

    def test_fields_that_are_new_are_passed_over(self, tmp_path: Path) -> None:
        """A later version of the same schema may add some."""
        status.write(tmp_path / "s.json", made())
        document = json.loads((tmp_path / "s.json").read_text())
        (tmp_path / "s.json").write_text(json.dumps(document | {"more": 1}))
        assert status.read(tmp_path / "s.json") == made()

    def test_it_steers_no_terminal(self, tmp_path: Path) -> None:
        """Whoever wrote it."""
        group = status.Waiting("a", "\x1b[2Jempty", 1)
        status.write(tmp_path / "s.json", made(version="\x1b[2J", waiting=(group,)))
        found = status.read(tmp_path / "s.json")
        assert (found.version, found.waiting[0].reason) == ("\\x1b[2J", "\\x1b[2Jempty")

    def test_a_fifo(self, tmp_path: Path) -> None:
        """It is not waited for."""
        os.mkfifo(tmp_path / "s.json")
        with pytest.raises(UnusableError, match="is a fifo"):
            status.read(tmp_path / "s.json")

    def test_no_file_is_too_big_to_be_refused(self, tmp_path: Path) -> None:
        """Only so much of it is read."""
        with (tmp_path / "s.json").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(UnusableError, match="damaged"):
            status.read(tmp_path / "s.json")

    def test_the_same_but_for_when(self) -> None:
        """Two documents are compared without the time at which they were published."""
        later = datetime(2027, 1, 1, tzinfo=UTC)
        assert status.same(made(published_at=later), made())
        assert not status.same(made(version="1"), made())
        assert not status.same(made(), None)


class TestWhereItLies:
    def test_by_the_settings(self, tmp_path: Path) -> None:
        """The key of its own, else systemd's folder, else the state folder."""
        named = settings(tmp_path, status_file=tmp_path / "named.json")
        environ = {"RUNTIME_DIRECTORY": "/run/a:/run/b"}
        assert status.path(named, environ) == tmp_path / "named.json"
        assert status.path(settings(tmp_path), environ) == Path("/run/a/status.json")
        assert status.path(settings(tmp_path), {}) == tmp_path / "state" / "status.json"

    def test_who_asks_has_not_the_units_environment(self) -> None:
        """What the unit's folders are called follows from the state folder."""
        config = settings(Path("/x"), state_dir=Path("/var/lib/sfwatch/evals"))
        found = [str(place) for place in status.places(config, {})]
        assert "/run/sfwatch/evals/status.json" in found
        assert "/run/sfwatch/status.json" in found

    def test_nothing_there(self, tmp_path: Path) -> None:
        """None, whatever the reason."""
        assert status.find(settings(tmp_path), {}) is None

    def test_anothers(self, tmp_path: Path) -> None:
        """What a daemon with other settings published is not taken for this one's."""
        status.write(tmp_path / "status.json", made(tmp_path / "other", config="/elsewhere.yaml"))
        environ = {"RUNTIME_DIRECTORY": str(tmp_path)}
        config = settings(tmp_path)
        assert status.find(config, environ) is None
        found = status.find(replace(config, source=Path("/elsewhere.yaml")), environ)
        assert found is not None

    def test_a_running_one_is_preferred(self, tmp_path: Path) -> None:
        """To one that is newer and of a process that has ended."""
        (tmp_path / "state").mkdir()
        dead = made(tmp_path / "state", pid=2**22 + 1, published_at=datetime(2027, 1, 1, tzinfo=UTC))
        alive = made(tmp_path / "state")
        status.write(tmp_path / "state" / "status.json", alive)
        status.write(tmp_path / "status.json", dead)
        assert status.find(settings(tmp_path), {"RUNTIME_DIRECTORY": str(tmp_path)}) == alive

    def test_a_damaged_one(self, tmp_path: Path) -> None:
        """It is said only if there is no other."""
        (tmp_path / "status.json").write_text("{")
        environ = {"RUNTIME_DIRECTORY": str(tmp_path)}
        with pytest.raises(UnusableError):
            status.find(settings(tmp_path), environ)
        (tmp_path / "state").mkdir()
        status.write(tmp_path / "state" / "status.json", made(tmp_path / "state"))
        assert status.find(settings(tmp_path), environ) is not None


class TestTheProcess:
    def test_it_runs(self) -> None:
        """This one does."""
        assert status.is_running(made())

    def test_it_has_ended(self) -> None:
        """A number that no process has."""
        assert not status.is_running(made(pid=2**22 + 1))
        assert not status.is_running(made(pid=2**70))

    def test_another_has_its_number(self) -> None:
        """One that was started at another time, or after a restart of the machine."""
        boot, _, ticks = made().process.partition("/")
        assert not status.is_running(made(process=f"{boot}/{int(ticks) + 1}"))
        assert not status.is_running(made(process=f"x/{ticks}"))

    def test_it_ended_orderly(self) -> None:
        """Then it says so itself, while the process still cleans up."""
        assert not status.is_running(made(state="stopped"))

    def test_its_name_may_hold_anything(self) -> None:
        """Also what the fields of /proc are told apart by."""
        code = (
            "import ctypes, os; from sfwatch import status;"
            "before = status.process_of(os.getpid());"
            "ctypes.CDLL(None).prctl(15, b') R 1 (', 0, 0, 0);"
            "assert before == status.process_of(os.getpid())"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestHealth:
    def test_nothing_is_wrong(self) -> None:
        """Files that settle, or that somebody still writes to, are no trouble."""
        assert status.healthy(made())
        groups = [status.Waiting("a", reason, 1) for reason in ("settling", "being_written", "empty", "queued")]
        assert status.healthy(made(waiting=tuple(groups)))

    @pytest.mark.parametrize("reason", sorted(status.TROUBLE))
    def test_a_file_in_trouble(self, reason: str) -> None:
        """Each of these reasons has words, and is trouble."""
        assert reason in status.REASONS
        assert not status.healthy(made(waiting=(status.Waiting("a", reason, 1),)))

    def test_holds_and_losses(self) -> None:
        """A held target or folder, an inbox that is not there, one that lets nothing be claimed."""
        lost = status.Inbox("a", "/a", "/d", "/f", lost=status.Lost("missing", "it is not there"))
        refused = status.Inbox("a", "/a", "/d", "/f", refused="no")
        assert not status.healthy(made(inboxes=(lost,)))
        assert not status.healthy(made(inboxes=(refused,)))
        assert not status.healthy(made(targets=(status.Target("t", reason="no_key"),)))
        assert not status.healthy(made(folders=(status.Folder("/f", "no_space", "full", WHEN, WHEN),)))

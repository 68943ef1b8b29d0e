"""The program as it runs: a process, real signals, a notify socket, real inotify, a service on loopback."""

import os
import signal
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from loop import KEY, digest
from program import PATIENCE_S, World, a_world

from sfwatch.journal import SqliteJournal
from sfwatch.standin import storing_then_stalling, taking_its_time
from sfwatch.status import holder


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


def test_fifty_files_in_two_inboxes_and_a_clean_end(world: World) -> None:
    """Written in place and renamed in; systemd hears that it is ready and that it stops; status 0."""
    program = world.start()
    for i in range(25):
        world.drop("a", f"{i:02}.jsonl", lines=1 + i)
        world.drop("b", f"{i:02}.jsonl.part").rename(world.root / "b" / "inbox" / f"{i:02}.jsonl")
        world.dropped[-1] = ("b", f"{i:02}.jsonl")
    program.until(lambda: len(world.done()) == 50)
    program.until(lambda: len(program.said("file.done")) == 50)
    assert program.end() == 0
    assert any("STOPPING=1" in told for told in program.told)
    assert {e["settled_by"] for e in program.said("file.settled")} == {"lease", "renamed"}
    assert program.said()[-1]["event"] == "daemon.stopped"
    world.check()


def test_sigterm_in_mid_upload_waits_for_it_and_takes_nothing_new(world: World) -> None:
    """The upload under way is done; what came later lies in the inbox and is done by the next start."""
    world.configure(uploads={"concurrency": 1})
    world.service.script.append(taking_its_time(1.0))
    program = world.start()
    world.drop("a", "x.jsonl")
    program.until(lambda: program.said("upload.started"))
    world.drop("a", "y.jsonl")
    assert program.end() == 0
    assert [p.name for p in world.done()] == ["x.jsonl"]
    second = world.start()
    second.until(lambda: second.said("file.done"))
    assert second.end() == 0
    world.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_while_the_answer_is_awaited_costs_no_second_upload(world: World, number: int) -> None:
    """The grace is over, or the process is killed; the next start finds the id in the listing."""
    world.configure(stop_grace="300ms")
    world.service.script.append(storing_then_stalling())
    program = world.start()
    world.drop("a", "x.jsonl")
    program.until(lambda: world.service.stored)
    program.end(number)
    world.service.script.clear()
    second = world.start()
    second.until(lambda: second.said("file.done"))
    assert second.end() == 0
    assert len(second.said("upload.recovered")) == 1
    world.check()


def test_killed_again_and_again_each_file_is_uploaded_once(world: World) -> None:
    """Six kills at different moments of thirty uploads."""
    world.configure(uploads={"concurrency": 2, "reconcile_window": "1s", "first_retry": "100ms"})
    world.service.always = taking_its_time(0.02)
    (world.root / "a" / "inbox").mkdir()
    for i in range(30):
        world.drop("a", f"{i:02}.jsonl")
    for kill in range(6):
        program = world.start()
        enough = 3 * kill + 1
        program.until(lambda enough=enough: len(world.done()) >= enough)  # type: ignore[misc]
        program.end(signal.SIGKILL)
    program = world.start()
    program.until(lambda: len(world.done()) == 30 and not list(world.root.glob("a/inbox/.sfwatch/*/*")))
    assert program.end() == 0
    sent = Counter(stored.sha256 for stored in world.service.stored)
    assert sent == Counter(digest(path) for path in world.done())


def test_an_inbox_that_is_replaced_is_watched_again_within_moments(world: World) -> None:
    """The kernel tells of it; nobody waits for the next full look."""
    program = world.start()
    inbox = world.root / "a" / "inbox"
    inbox.rename(world.root / "a" / "old")
    inbox.mkdir()
    world.drop("a", "x.jsonl")
    program.until(lambda: program.said("file.done"))
    assert len(program.said("inbox.lost")) == len(program.said("inbox.found")) == 1
    world.drop("a", "y.jsonl")
    program.until(lambda: len(program.said("file.done")) == 2)
    assert program.end() == 0
    world.check()


def test_sigusr1_looks_at_once_and_a_second_sigterm_leaves_at_once(world: World) -> None:
    """The second signal does not wait for the upload; the file is not lost by that."""
    world.service.script.append(storing_then_stalling())
    program = world.start()
    (world.root / "a" / "inbox" / "note.txt").write_text("")
    program.process.send_signal(signal.SIGUSR1)
    program.until(lambda: program.said("inbox.others"))
    world.drop("a", "x.jsonl")
    program.until(lambda: world.service.stored)
    program.process.send_signal(signal.SIGTERM)
    program.until(lambda: program.said("daemon.stopping"))
    began = time.monotonic()
    assert program.end() == 128 + signal.SIGTERM
    assert time.monotonic() - began < PATIENCE_S / 2
    second = world.start()
    second.until(lambda: second.said("file.done"))
    assert second.end() == 0
    world.check()


def test_a_probe_that_hangs_does_not_delay_the_end(world: World) -> None:
    """The service accepts connections and says nothing: a stop ends the process all the same."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        api = {"base_url": f"http://127.0.0.1:{port}/v1", "key_file": str(world.root / "key")}
        world.configure(api=api, stop_grace="300ms", uploads={"first_retry": "100ms"})
        program = world.start()
        (world.root / "key").unlink()
        path = world.drop("a", "x.jsonl")
        program.until(lambda: program.said("target.held"))
        (world.root / "key").write_text(KEY)
        (world.root / "key").chmod(0o600)
        connection, _ = silent.accept()
        assert program.end() == 0
        connection.close()
    assert path.exists()


def test_a_changed_configuration_is_taken_up_at_sighup(world: World) -> None:
    """A bad one is refused and the old one counts; a good one counts at once, also for what lies there."""
    program = world.start()
    sound = (world.root / "sfwatch.yaml").read_text()
    (world.root / "sfwatch.yaml").write_text(sound.replace('"name": "b"', '"nam": "b"'))
    program.process.send_signal(signal.SIGHUP)
    program.until(lambda: program.said("config.rejected"))
    assert "nam" in str(program.said("config.rejected")[0]["problems"])
    world.configure(inbox={"match": ["*.ndjson"]})
    path = world.drop("a", "x.ndjson")
    program.process.send_signal(signal.SIGHUP)
    program.until(lambda: program.said("file.done"))
    assert not path.exists()
    assert len(program.said("config.loaded")) == 2
    assert program.end() == 0


def test_a_sighup_during_the_start_is_taken_up_after_it(world: World) -> None:
    """Also one that comes before there is any handler for it: the journal is still being opened, here."""
    state = world.root / "state"
    state.mkdir(mode=0o700)
    with closing(sqlite3.connect(state / "journal.sqlite3", isolation_level=None)) as busy:
        busy.execute("BEGIN EXCLUSIVE")

        program = world.start(ready=False)
        program.until(lambda: holder(state))
        program.process.send_signal(signal.SIGHUP)
        busy.execute("ROLLBACK")
    program.hear("READY=1")
    program.until(lambda: len(program.said("config.loaded")) == 2)
    assert program.end() == 0


def test_a_rotated_log_file_is_opened_anew_at_sighup(world: World) -> None:
    """As logrotate asks for it; what is said after goes into the new file."""
    log = world.root / "sfwatch.log"
    world.configure(log={"file": str(log)})
    program = world.start()
    log.rename(world.root / "sfwatch.log.1")
    program.process.send_signal(signal.SIGHUP)
    program.until(lambda: log.exists() and "config.loaded" in log.read_text())
    assert program.end() == 0


def test_a_journal_that_is_damaged_at_work_is_left_for_a_new_one(world: World) -> None:
    """The program ends, as systemd should start it anew; the next one sets the journal aside and goes on."""
    world.configure(uploads={"reconcile_window": "1s"})
    (world.root / "state").mkdir(mode=0o700)
    with closing(SqliteJournal(world.root / "state", stamp="x")) as journal:
        for number in range(60):  # more than is kept in memory
            journal.saw_folder(f"/{number:0>100000}")
    program = world.start()
    database = world.root / "state" / "journal.sqlite3"
    size = database.stat().st_size
    with database.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    path = world.drop("a", "x.jsonl")
    program.process.wait(20)
    assert program.process.returncode == 70
    assert program.said("internal.error")
    program = world.start()
    assert program.said("journal.set_aside")
    program.until(lambda: not path.exists() and program.said("file.done"))
    assert program.end() == 0


def test_an_idle_program_sleeps(world: World) -> None:
    """Next to no processor time while there is nothing to do."""
    program = world.start()
    ticks = Path(f"/proc/{program.process.pid}/stat")

    def used() -> int:
        fields = ticks.read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    time.sleep(0.3)
    before = used()
    time.sleep(1.0)
    assert used() - before <= 3
    assert program.end() == 0

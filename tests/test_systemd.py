"""What systemd is told, when, and that it is never waited for."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from loop import KEY, Loop

from sfwatch import systemd
from sfwatch.job import Progress
from sfwatch.settings import Api
from sfwatch.standin import StandIn

API = Api(connect_timeout_s=10, read_timeout_s=300)


class Systemd:
    """The service manager's end of the channel."""

    def __init__(self, path: Path) -> None:
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind(str(path))
        self.channel.setblocking(False)
        self.environ = {"NOTIFY_SOCKET": str(path)}

    def heard(self) -> list[str]:
        """Return what was said since the last time, a datagram an item."""
        said = []
        while True:
            try:
                said.append(self.channel.recv(4096).decode())
            except BlockingIOError:
                return said


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[Systemd]:
    manager = Systemd(tmp_path / "notify")
    yield manager
    manager.channel.close()


@pytest.fixture(name="loop")
def _loop(tmp_path: Path, manager: Systemd) -> Iterator[Loop]:
    """A daemon that was told to report within 30 s."""
    watchdog = {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    environ = {"SILICONFLOW_API_KEY": KEY, **manager.environ, **watchdog}
    with StandIn() as service:
        loop = Loop(tmp_path, service, environ=environ)
        yield loop
        loop.close()


# --- the channel -----------------------------------------------------------------------------------------


def test_lines_arrive_in_one_datagram(manager: Systemd) -> None:
    """As sd_notify(3) has it: one state a line."""
    systemd.notify(manager.environ, "READY=1", "STATUS=Watching.")
    assert manager.heard() == ["READY=1\nSTATUS=Watching."]


def test_an_abstract_socket_is_reached() -> None:
    """An address that begins with @ has no file."""
    name = f"sfwatch-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0{name}")
        channel.settimeout(5)
        systemd.notify({"NOTIFY_SOCKET": f"@{name}"}, "READY=1")
        assert channel.recv(1000) == b"READY=1"


def test_a_manager_that_does_not_read_stops_nobody(manager: Systemd) -> None:
    """Its queue is full: what cannot be sent at once is not sent."""
    for _ in range(5000):
        systemd.notify(manager.environ, "STATUS=" + "x" * 1000)


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    """Neither outside systemd nor after its socket went is that an error."""
    systemd.notify(environ, "READY=1")


@pytest.mark.parametrize(
    ("environ", "within_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),  # meant for our parent
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_whether_there_is_a_watchdog(environ: dict[str, str], within_s: float | None) -> None:
    """As sd_watchdog_enabled(3) has it."""
    assert systemd.watchdog_s(environ) == within_s


# --- the watchdog ----------------------------------------------------------------------------------------


def fed(loop: Loop, manager: Systemd, seconds: int) -> int:
    """Let time go by; return how often the watchdog was fed."""
    said: list[str] = []
    for _ in range(seconds):  # a channel that is not read holds ten datagrams
        loop.run(1)
        said += manager.heard()
    return said.count("WATCHDOG=1")


def test_an_idle_daemon_feeds_the_watchdog(loop: Loop, manager: Systemd) -> None:
    """Three times as often as it must, and the loop wakes for it."""
    loop.start()
    manager.heard()
    assert fed(loop, manager, 60) == 6


def test_an_upload_that_hangs_starves_it(loop: Loop, manager: Systemd) -> None:
    """It is said once; when the upload is back after all, the watchdog is fed again."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.look().run(5)
    [job] = loop.daemon.under_way.values()
    job.progress.start(loop.now)
    job.progress.moved_at = loop.now
    manager.heard()
    assert fed(loop, manager, 329) == 33
    assert not loop.said("upload.stuck")
    assert fed(loop, manager, 100) == 0
    assert [e["file"] for e in loop.said("upload.stuck")] == ["x.jsonl"]
    loop.pool.release()
    assert fed(loop, manager, 60) == 6


def test_the_name_of_an_upload_that_hangs_steers_nobody(loop: Loop, manager: Systemd) -> None:
    """It comes from whoever dropped the file: undecodable bytes and control characters are escaped."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x\udcff\x1b[2J.jsonl")
    loop.look().run(5)
    [job] = loop.daemon.under_way.values()
    job.progress.start(loop.now - 1000)
    manager.heard()
    loop.run(2)
    assert any(r"stuck: x\xff\x1b[2J.jsonl" in said for said in manager.heard())
    loop.pool.release()
    loop.settle_down()
    assert len(loop.service.stored) == 1
    loop.lines[:] = []  # its name is another one there
    loop.drops.clear()


def test_while_bytes_move_nothing_is_overdue() -> None:
    """However long it takes: the read timeout counts from the last byte, and then the worker gets its time."""
    progress = Progress()
    progress.start(0)
    for now in range(0, 5000, 250):
        progress.moved_at = float(now)
        assert not progress.is_overdue(API, now + 329.9)
        assert progress.is_overdue(API, now + 330)


def test_connecting_takes_its_time() -> None:
    """A slow resolver and ten addresses that do not answer are no reason to start anew."""
    progress = Progress()
    progress.start(1000)
    assert not progress.is_overdue(API, 1000 + 60 + 100 + 29)
    assert progress.is_overdue(API, 1000 + 60 + 100 + 30)


def test_between_uploads_nothing_is_overdue() -> None:
    """A check, a move or a look into the listing is no upload."""
    progress = Progress()
    assert not progress.is_overdue(API, 1e9)
    progress.start(0)
    progress.end()
    assert not progress.is_overdue(API, 1e9)


# --- the status line -------------------------------------------------------------------------------------


def test_the_status_line_counts(loop: Loop, manager: Systemd) -> None:
    """What is under way, waiting, done and failed, in one line."""
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.drop("a", "bad.jsonl", "{}\n")
    loop.drop("a", "empty.jsonl", "")
    loop.look().run(10)
    said = manager.heard()
    assert said[0] == "READY=1"
    lines = [line for line in said if line.startswith("STATUS")]
    assert lines[0] == "STATUS=Watching 1 inbox; 0 under way, 0 waiting, 0 done, 0 failed"
    assert lines[-1] == "STATUS=Watching 1 inbox; 0 under way, 1 waiting, 1 done, 1 failed"


def test_the_status_line_names_what_is_held(loop: Loop, manager: Systemd) -> None:
    """A held target, with its reason."""
    loop.service.key = "another"
    loop.start()
    loop.drop("a", "x.jsonl")
    loop.look().run(10)
    [said] = [line for line in manager.heard() if "; held: 127.0.0.1" in line]
    assert said.endswith(" (unauthorized)")


def test_the_status_line_names_what_hangs(loop: Loop, manager: Systemd) -> None:
    """An inbox that is not there, and an upload that is overdue."""
    loop.start()
    loop.pool.holds = True
    loop.drop("a", "x.jsonl")
    loop.look().run(5)
    [job] = loop.daemon.under_way.values()
    job.progress.start(loop.now - 1000)
    away = loop.inbox_of("a").rename(loop.root / "away")
    manager.heard()
    loop.look()
    said = manager.heard()
    away.rename(loop.inbox_of("a"))
    loop.run(10)
    loop.pool.release()
    assert said == [
        "STATUS=Watching 1 inbox; 1 under way, 0 waiting, 0 done, 0 failed; not there: a; stuck: x.jsonl"
    ]


def test_a_burst_is_told_once_a_second(loop: Loop, manager: Systemd) -> None:
    """Each file changes the line; it is sent when a second is over, the last one surely."""
    loop.start()
    manager.heard()
    for n in range(50):
        loop.drop("a", f"{n}.jsonl")
        loop.look()
    assert sum("STATUS" in said for said in manager.heard()) <= 1
    loop.run(1)
    assert [said for said in manager.heard() if "STATUS" in said] == [
        "STATUS=Watching 1 inbox; 0 under way, 50 waiting, 0 done, 0 failed"
    ]


def test_the_end_may_take_the_grace(loop: Loop, manager: Systemd) -> None:
    """However long `stop_grace` is, systemd waits for it and a little longer."""
    loop.start()
    manager.heard()
    loop.signal(signal.SIGTERM)
    [said] = manager.heard()
    assert said.split("\n")[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=40000000"]

"""What systemd is told, and that it is never waited for."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfwatch import systemd


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        yield channel


def test_lines_arrive_in_one_datagram(manager: socket.socket) -> None:
    """As sd_notify(3) has it: one state a line."""
    systemd.notify({"NOTIFY_SOCKET": manager.getsockname()}, "READY=1", "STATUS=Watching.")
    assert manager.recv(1000) == b"READY=1\nSTATUS=Watching."


def test_an_abstract_socket_is_reached() -> None:
    """An address that begins with @ has no file."""
    name = f"sfwatch-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"\0{name}")
        channel.settimeout(5)
        systemd.notify({"NOTIFY_SOCKET": f"@{name}"}, "READY=1")
        assert channel.recv(1000) == b"READY=1"


def test_a_manager_that_does_not_read_stops_nobody(manager: socket.socket) -> None:
    """Its queue is full: what cannot be sent at once is not sent."""
    for _ in range(5000):
        systemd.notify({"NOTIFY_SOCKET": manager.getsockname()}, "STATUS=" + "x" * 1000)


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_manager_nothing_happens(environ: dict[str, str]) -> None:
    """Neither outside systemd nor after its socket went is that an error."""
    systemd.notify(environ, "READY=1")

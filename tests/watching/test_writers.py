"""Who writes: a file that is written to for ten minutes is told with the process, where that can be seen."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from loop import Loop

from sfwatch import arrive
from sfwatch.files import Fingerprint
from sfwatch.standin import StandIn


@pytest.fixture(name="sigio_ignored")
def _sigio() -> Iterator[None]:
    """As the program does: whoever opens a file that we hold a lease on raises SIGIO, which would kill."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


def test_a_stuck_file_names_its_writers_but_no_readers(tmp_path: Path) -> None:
    """Two programs append to it and one reads it; the two are named, once."""
    with StandIn() as service:
        loop = Loop(tmp_path, service).start()
        path = loop.drop("a", "x.jsonl")
        inside = subprocess.PIPE
        with (
            path.open("ab") as out,
            subprocess.Popen(["cat"], stdin=inside, stdout=out) as one,
            subprocess.Popen(["cat"], stdin=inside, stdout=out) as other,
            path.open("rb") as source,
            subprocess.Popen(["tail", "-f", "/dev/stdin"], stdin=source, stdout=subprocess.DEVNULL) as reader,
        ):
            out.close()
            loop.look().run(700)
            reader.kill()
            for process in (one, other):
                assert process.stdin is not None
                process.stdin.close()
        (stuck,) = loop.said("file.stuck")
        assert stuck["writers"] == sorted([one.pid, other.pid])
        assert str(one.pid) in stuck["detail"]
        loop.run(100)
        assert loop.done("a") == ["x.jsonl"]
        loop.close()


def test_where_nobody_writes_nobody_is_named(tmp_path: Path) -> None:
    """Nor is this process, which looks at the file itself."""
    path = tmp_path / "x"
    with path.open("wb") as out:
        assert arrive.writers(Fingerprint.of(os.fstat(out.fileno()))) == []


@pytest.mark.usefixtures("sigio_ignored")
def test_an_unreadable_file_has_a_size_in_what_is_said_of_it(tmp_path: Path) -> None:
    """Who reads the event sees whether it is worth a chmod."""
    with StandIn() as service:
        loop = Loop(tmp_path, service).start()
        path = loop.drop("a", "x.jsonl")
        holder = os.open(path, os.O_RDWR)
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        loop.look().run(20)
        (waiting,) = loop.said("file.waiting")
        assert waiting["reason"] == "unreadable"
        assert waiting["size"] == path.stat().st_size
        os.close(holder)
        loop.run(100)
        loop.close()

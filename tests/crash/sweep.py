"""One delivery that can be made to fail or die at its k-th call, and a look at what is left of it.

The daemon runs in a process of its own that the fork server makes (`forks.py`), with `faults.c` preloaded. The
service is here in the tests' own process: it outlives every crash, so it is the witness of what was uploaded.

By default a sweep takes a fixed sample of the points; with SFWATCH_SWEEP=full it takes every one.
"""

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import world

from sfwatch.settings import Api, Config, Inbox, Log, Uploads
from sfwatch.standin import Behaviour, StandIn, Stored, answering, storing_then_resetting

FULL = os.environ.get("SFWATCH_SWEEP") == "full"
HERE = Path(__file__).parent

OTHERS = {"SILICONFLOW_API_KEY": world.KEY, "PYTHONDONTWRITEBYTECODE": "1"}


class Fault(IntEnum):
    """What happens at the call, as `faults.c` numbers it."""

    FAIL = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    FAIL_AFTER = 3  # the call is made, and reported as failed


@dataclass(frozen=True, slots=True)
class Ended:
    """How one run of the daemon ended: its exit status (a signal's number below zero), and its calls."""

    status: int
    calls: int
    at: str


def library(folder: Path) -> Path:
    """Compile the library to be preloaded."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.fail("the crash tests need a C compiler: apt-get install gcc libc6-dev (or set CC)")
    made = folder / "faults.so"
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *options, "-o", made, HERE / "faults.c", "-ldl"], check=True)
    return made


class Forks:
    """The fork server, from this end."""

    def __init__(self, preload: Path) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._process = subprocess.Popen(
            [sys.executable, HERE / "forks.py", str(theirs.fileno())],
            env={**os.environ, **OTHERS, "LD_PRELOAD": str(preload)},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def run(self, config: Config, *, drain_s: float, point: int = 0, fault: int = 0, error: int = 0) -> Ended:
        """Run a daemon until it has nothing left to do (or is stopped by what goes wrong at that point)."""
        self.start(config, drain_s=drain_s, point=point, fault=fault, error=error)
        return self.wait()

    def start(self, config: Config, *, drain_s: float, point: int = 0, fault: int = 0, error: int = 0) -> int:
        """Begin such a run, and return the process's id."""
        self._connection.send((config, drain_s, point, int(fault), error))
        return int(self._connection.recv())

    def wait(self) -> Ended:
        """Return how the run that was begun has ended."""
        return Ended(*self._connection.recv())

    def close(self) -> None:
        """End the fork server."""
        self._connection.close()
        self._process.wait(timeout=60)


class Witness(StandIn):
    """The service, which can be waited for: after a crash of its client it may still be storing."""

    one_by_one = True
    """Whether there is never more than one upload at a time."""

    def asked(self) -> bool:
        """Whether anybody came but us."""
        return any(request.path.startswith("/v1/") for request in self.requests)

    def settle_down(self) -> None:
        """Return when all that any client has sent is taken in; every client must have ended."""
        with socket.create_connection(
            ("127.0.0.1", self._server.server_port)
        ) as last:  # accepted after all the others
            last.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while last.recv(4096):
                pass
        for thread in list(self._server._threads or ()):  # type: ignore[attr-defined]
            thread.join()

    def listed(self, limit: int, after: str | None = None) -> tuple[list[Stored], bool]:
        """A listing that lags behind nothing: what is still coming in on other connections is waited for."""
        with contextlib.suppress(AssertionError):  # there may be a connection on which nothing comes
            world.wait_for(lambda: not self.one_by_one or len(self._server.open) <= 1, within_s=1.0)
        return super().listed(limit, after)

    def begin_anew(self, script: tuple[Behaviour, ...], always: Behaviour) -> None:
        """No uploads and no requests yet, and this is what will be met."""
        self.stored.clear()
        self.requests.clear()
        self.script.clear()
        self.script.extend(script)
        self.always = always


NAME = "requests of today.jsonl"
BAD = b"not JSON\n" + world.batch()


@dataclass(frozen=True, slots=True)
class Scenario:
    """One file, what the service does with it, and where it must end whatever goes wrong."""

    name: str
    data: bytes = field(default_factory=world.batch)
    script: tuple[Behaviour, ...] = ()
    always: Behaviour = field(default_factory=Behaviour)
    fails: bool = False
    across: bool = False
    file: str = NAME
    inbox: Callable[[Inbox], Inbox] = lambda inbox: inbox

    @property
    def uploads(self) -> int:
        return 0 if self.fails else 1


REFUSAL = {"code": 20012, "message": "invalid file", "data": None}

SCENARIOS = (
    Scenario("good"),
    Scenario("bad", data=BAD, fails=True),
    Scenario("across filesystems", across=True),
    Scenario("refused by the service", always=answering(400, REFUSAL), fails=True),
    Scenario("stored, answer lost", script=(storing_then_resetting(),)),
    Scenario("not stored, answer lost", script=(answering(502, b"<html>Bad gateway</html>"),)),
    Scenario("not now at first", script=(answering(429, "slow down"),)),
    Scenario(
        "in a sub-folder, with a marker",
        file="team/a/requests.jsonl",
        inbox=lambda inbox: replace(inbox, recursive=True, settle_marker=".ok"),
    ),
)


@dataclass
class Stage:
    """The folders of one point of a sweep, and all that may go on in them."""

    root: Path
    done: Path
    service: Witness
    forks: Forks
    scenario: Scenario
    failed: str = ""
    """The call that failed instead of killing: it may cost a line of the log, and keep a marker behind."""

    @property
    def config(self) -> Config:
        """Quick in everything, so that a point takes some ten milliseconds."""
        api = Api(base_url=self.service.base_url, allow_plain_http=True, read_timeout_s=5.0)
        inbox = Inbox(
            path=self.root / "inbox",
            name="inbox",
            done=self.done,
            failed=self.root / "failed",
            settle_s=0.0,
            settle_unproven_s=0.0,
            api=api,
        )
        uploads = Uploads(
            concurrency=1, first_retry_s=0.005, longest_retry_s=0.05, reconcile_window_s=0.0, poison_after=1000
        )
        return Config(
            inboxes=(self.scenario.inbox(inbox),),
            uploads=uploads,
            scan_interval_s=1.0,
            poll_interval_s=0.05,
            state_dir=self.root / "state",
            log=Log(level="debug", format="json", file=self.root / "log"),
        )

    def set(self) -> None:
        """Make everything anew, with the file in its inbox."""
        for folder in (self.root, self.done):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        (self.root / "failed").mkdir()
        file = self._dropped()
        file.parent.mkdir(parents=True)
        file.write_bytes(self.scenario.data)
        marker = self.config.inboxes[0].settle_marker
        if marker is not None:
            file.with_name(file.name + marker).touch()
        self.service.begin_anew(self.scenario.script, self.scenario.always)
        self.failed = ""

    def _dropped(self) -> Path:
        return self.root / "inbox" / self.scenario.file

    def run(self, *, drain_s: float, point: int = 0, fault: int = 0, error: int = 0) -> Ended:
        """Run the daemon once, and wait until the service has taken in what it sent."""
        ended = self.forks.run(self.config, drain_s=drain_s, point=point, fault=fault, error=error)
        self.service.settle_down()
        return ended

    # What is left.

    def copies(self) -> list[str]:
        """Where the file's bytes lie, whole, under its own name."""
        named = {path for top in (self.root, self.done) for path in top.rglob(Path(self.scenario.file).name)}
        return sorted(str(path) for path in named if path.read_bytes() == self.scenario.data)

    def events(self) -> list[dict[str, Any]]:
        """What all runs have said; a line that a full disk has cut short is left out."""
        log = self.root / "log"
        lines = log.read_bytes().split(b"\n") if log.exists() else []
        return [json.loads(line) for line in lines if line.startswith(b"{") and line.endswith(b"}")]

    def lost(self) -> Iterator[str]:
        """What is wrong right after a crash: the file must be there, and in one place.

        While it moves between two filesystems, and only then, there may be a second whole copy of it.
        """
        copies = self.copies()
        most = 2 if self.scenario.across else 1
        if not 1 <= len(copies) <= most:
            yield f"{len(copies)} copies: {copies}"
        if len(self.service.stored) > 1:
            yield f"{len(self.service.stored)} uploads"

    def wrong(self) -> Iterator[str]:
        """What is wrong in the end: one place, one document beside it, one upload, nothing left over."""
        target, suffix = (self.root / "failed", "error") if self.scenario.fails else (self.done, "fileid")
        file = target / self.scenario.file
        if self.copies() != [str(file)]:
            yield f"the file lies in {self.copies()}, not in {file}"
        if len(self.service.stored) != self.scenario.uploads:
            yield f"{len(self.service.stored)} uploads"
        yield from self._wrong_document(file.with_name(f"{file.name}.{suffix}.json"))
        yield from self._left_over(file, suffix)
        yield from self._wrong_events()

    def _wrong_document(self, path: Path) -> Iterator[str]:
        if not path.exists():
            yield f"{path.name} is missing"
            return
        document = json.loads(path.read_bytes())
        facts = document if self.scenario.fails else document["sfwatch"]
        if facts["sha256"] != world.sha256(self.scenario.data):
            yield f"the digest in {path.name} is {facts['sha256']}"
        stored = [(s.id, s.sha256) for s in self.service.stored]
        if not self.scenario.fails and stored != [(document["id"], facts["sha256"])]:
            yield f"the id in {path.name} is {document['id']}, stored are {stored}"

    def _left_over(self, file: Path, suffix: str) -> Iterator[str]:
        marker = self.config.inboxes[0].settle_marker
        wanted = {file, file.with_name(f"{file.name}.{suffix}.json")}
        if marker is not None:
            beside, behind = (path.with_name(path.name + marker) for path in (file, self._dropped()))
            wanted.add(behind if self.failed and behind.exists() else beside)
        folders = (self.root / "inbox", self.root / "failed", self.done)
        there = {path for folder in folders for path in folder.rglob("*") if not path.is_dir()}
        there = {path for path in there if path.parent.name != ".sfwatch" or path.suffix != ".owner"}  # stays
        if there != wanted:
            yield f"too much: {sorted(map(str, there - wanted))}, missing: {sorted(map(str, wanted - there))}"
        try:
            journal = sqlite3.connect(f"file:{self.root}/state/journal.sqlite3?mode=ro", uri=True)
            with contextlib.closing(journal):
                (rows,) = journal.execute("SELECT count(*) FROM delivery WHERE finished_at IS NULL").fetchone()
        except sqlite3.Error as error:
            yield f"there is no journal: {error}"
            return
        if rows:
            yield f"{rows} rows of the journal are not finished"

    def _wrong_events(self) -> Iterator[str]:
        events = self.events()
        wanted = "file.failed" if self.scenario.fails else "file.done"
        ends = [e for e in events if e["event"] in ("file.done", "file.failed", "file.vanished")]
        unheard = self.failed == "write" and not ends
        if not unheard and {e["event"] for e in ends} != {wanted}:
            yield f"the ends said are {[e['event'] for e in ends]}"
        if sum("repeated" not in e for e in ends) > 1:
            yield "its end was said twice, and not as repeated"
        for bug in (e for e in events if e["event"] == "internal.error"):
            yield f"internal.error: {bug.get('detail')}\n{bug.get('traceback')}"


@contextmanager
def stage(scenario: Scenario, forks: Forks, disk: Path) -> Iterator[Stage]:
    """Folders in memory, where a sync costs nothing; only the other filesystem is on the disk."""
    memory = Path("/dev/shm")
    base = memory / f"sfwatch-{os.getpid()}" if memory.is_dir() else disk / "memory"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if scenario.across and base.stat().st_dev == disk.stat().st_dev:
            pytest.skip("there is no second filesystem: /dev/shm is missing")
        with Witness(key=world.KEY) as service:
            done = disk / "done" if scenario.across else base / "folders" / "done"
            yield Stage(base / "folders", done, service, forks, scenario)
    finally:
        shutil.rmtree(base)


def points(calls: int, *, every: int) -> range:
    """All points of a sweep over so many calls, or a sample that is the same every time."""
    return range(1, calls + 1, 1 if FULL else every)


def said(wrong: list[str]) -> str:
    """What went wrong, as the message of a failed test: the first of it is enough to begin with."""
    return "\n".join([f"{len(wrong)} wrong:", *wrong[:15]])

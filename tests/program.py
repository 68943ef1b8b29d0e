"""The program as a process, and a small world for it: two inboxes, a service on loopback, a notify socket."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, digest, line

from sfwatch.logs import ALWAYS, EVENTS, TERMINAL
from sfwatch.standin import StandIn

PATIENCE_S = 20.0


@dataclass
class Program:
    """A running `sfwatch run`, and what it has said to its log and to systemd."""

    process: subprocess.Popen[bytes]
    log: Path
    manager: socket.socket
    stderr: Path
    told: list[str] = field(default_factory=list)

    def said(self, event: str | None = None) -> list[dict[str, Any]]:
        *whole, _ = self.log.read_bytes().split(b"\n")
        events = [json.loads(text) for text in whole]
        return [e for e in events if event in (None, e["event"])]

    def until(self, there: Callable[[], Any], *, within_s: float = PATIENCE_S, every_s: float = 0.01) -> None:
        """Wait until something is so; fail with the log's end if it never is."""
        end = time.monotonic() + within_s
        while not there():
            if time.monotonic() > end or self.process.poll() is not None:
                pytest.fail(self.log.read_text()[-20_000:] + self.stderr.read_text())
            time.sleep(every_s)

    def hear(self, what: str) -> None:
        self.manager.settimeout(0.2)

        def heard() -> bool:
            with contextlib.suppress(TimeoutError):
                self.told.append(self.manager.recv(4096).decode())
            return any(what in text for text in self.told)

        self.until(heard)

    def end(self, number: int = signal.SIGTERM) -> int:
        self._listen()  # a channel that is not read holds ten datagrams
        self.process.send_signal(number)
        status = self.process.wait(PATIENCE_S)
        self._listen()
        return status

    def _listen(self) -> None:
        """Take in all that was said to systemd."""
        self.manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.append(self.manager.recv(4096).decode())


@contextlib.contextmanager
def started(command: list[str], folder: Path) -> Iterator[Program]:
    """A daemon that this command starts, until the end of the block; what it says lies in *folder*."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(folder / "notify"))
    (folder / "notify").chmod(0o777)
    environ = {"PATH": os.environ["PATH"], "PYTHONWARNINGS": "error", "NOTIFY_SOCKET": str(folder / "notify")}
    with (folder / "log").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environ, cwd="/")
    program = Program(process, folder / "log", manager, folder / "stderr")
    try:
        program.hear("READY=1")
        yield program
    finally:
        manager.close()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


@dataclass
class World:
    """Folders, a service, and the programs that were started on them."""

    root: Path
    service: StandIn
    programs: list[Program] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def configure(self, *, inbox: Mapping[str, Any] | None = None, **more: Any) -> None:
        """Write the configuration; *inbox* goes into both inboxes."""
        resting = {"settle": "200ms", "settle_unproven": "400ms", **(inbox or {})}
        inboxes = [{"path": str(self.root / n / "inbox"), "name": n, **resting} for n in "ab"]
        (self.root / "key").write_text(KEY)
        (self.root / "key").chmod(0o600)
        api = {"base_url": self.service.base_url, "key_file": str(self.root / "key")}
        settings = {"api": api, "inboxes": inboxes, "state_dir": str(self.root / "state"), **more}
        settings = {"log": {"level": "debug"}, "scan_interval": "20s", "poll_interval": "300ms"} | settings
        (self.root / "sfwatch.yaml").write_text(json.dumps(settings))
        for name in "ab":
            (self.root / name).mkdir(exist_ok=True)

    def start(self, *under: str, ready: bool = True) -> Program:
        """Start the program, as the last words of the command *under* if there is one."""
        number = len(self.programs)
        manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        manager.bind(str(self.root / f"notify-{number}"))
        log, stderr = self.root / f"log-{number}", self.root / f"stderr-{number}"
        with log.open("wb") as out, stderr.open("wb") as err:
            process = subprocess.Popen(
                [*under, Path(sys.executable).with_name("sfwatch"), "run", "-c", self.root / "sfwatch.yaml"],
                stdout=out,
                stderr=err,
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONWARNINGS": "error",
                    "NOTIFY_SOCKET": manager.getsockname(),
                },
            )
        program = Program(process, log, manager, stderr)
        self.programs.append(program)
        if ready:
            program.hear("READY=1")
        return program

    def drop(self, inbox: str, name: str, *, lines: int = 1) -> Path:
        path = self.root / inbox / "inbox" / name
        path.write_text("".join(line(i, text=f"{inbox}/{name}") for i in range(lines)))
        self.dropped.append((inbox, name))
        return path

    def done(self) -> list[Path]:
        return sorted(self.root.glob("*/done/*.jsonl"))

    def check(self) -> None:
        """Every file is done once, was uploaded once, and has one terminal event; every line is as listed."""
        events = [e for program in self.programs for e in program.said()]
        for e in events:
            assert set(e) <= {*EVENTS[e["event"]].keys, *ALWAYS, "file_b64"}, e
        ended = [(e["inbox"], e["file"]) for e in events if e["event"] in TERMINAL and not e.get("repeated")]
        assert sorted(ended) == sorted(self.dropped)
        sent = Counter(stored.sha256 for stored in self.service.stored)
        assert sent == Counter(digest(path) for path in self.done())
        ids: dict[str, set[str]] = {}
        for stored in self.service.stored:
            ids.setdefault(stored.sha256, set()).add(stored.id)
        for path in self.done():
            sidecar = json.loads(path.with_name(path.name + ".fileid.json").read_text())
            assert sidecar["id"] in ids[digest(path)]
        for program in self.programs:
            assert KEY not in program.log.read_text()
            assert program.stderr.read_text() == ""


@contextlib.contextmanager
def a_world(root: Path) -> Iterator[World]:
    """A world below *root*; at its end every program that still runs is killed."""
    with StandIn(key=KEY) as service:
        world = World(root, service)
        world.configure()
        try:
            yield world
        finally:
            for program in world.programs:
                program.manager.close()
                with contextlib.suppress(ProcessLookupError):
                    program.process.kill()
                program.process.wait()

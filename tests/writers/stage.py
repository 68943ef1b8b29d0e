"""Where a writer of the matrix works: its inbox, the lines that it writes, and the programs that write them.

A stage keeps count of what was written, so that it can be compared with what was uploaded. It belongs to one
thread; while that is "somebody else", the files that it makes itself are that user's, too (setfsuid works by
thread), as are those of the programs that it starts.
"""

import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SETTLE_S = 1.0
STALL_S = 2.5
"""How long a writer pauses that is not finished: longer than `SETTLE_S`, shorter than a rest without proof."""

GAP_S = 0.3
"""A pause shorter than `SETTLE_S`."""

LINE_BYTES = 1021
"""A prime: no program that writes in blocks stops at the end of a line by chance."""

_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Role:
    """As whom the daemon runs and as whom its droppers write; None: as whoever runs the tests."""

    name: str
    daemon: int | None = None
    writer: int | None = None
    may_ask: bool = True
    """Whether the kernel tells this daemon who writes to a file of the droppers."""

    @property
    def rest_s(self) -> float:
        """How long a whole file must rest."""
        return SETTLE_S if self.may_ask else 10.0


@dataclass(frozen=True)
class Help:
    """What all writers share: a web server that stalls, and an SSH server."""

    url: str
    pages: dict[str, bytes]
    ssh: Sequence[str | Path]
    ssh_port: int


@dataclass
class Stage:
    """One writer's place. `aside` is on the inbox's filesystem, `elsewhere` is on another one."""

    tag: str
    role: Role
    root: Path
    elsewhere: Path
    help: Help
    written: list[bytes] = field(default_factory=list)
    versions: list[list[bytes]] = field(default_factory=list)
    """What was complete at some time before `written`: whoever writes anew may have it taken, too."""

    longest_gap_s: float = 0.0
    ended_at: float = 0.0
    _changed_at: float | None = None

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def aside(self) -> Path:
        return self.root / "aside"

    @property
    def x(self) -> Path:
        """The file that most writers write."""
        return self.inbox / "x.jsonl"

    # What is written.

    def lines(self, count: int) -> bytes:
        """Return the next lines; the caller writes them all."""
        new = [self._line(len(self.written) + number) for number in range(count)]
        self.written += new
        return b"".join(new)

    def anew(self, count: int) -> bytes:
        """Return lines that are to take the place of all lines so far."""
        self.versions.append(self.written)
        start = sum(map(len, self.versions))
        self.written = [self._line(start + number) for number in range(count)]
        return b"".join(self.written)

    def _line(self, number: int) -> bytes:
        def encoded(text: str) -> bytes:
            body = {"messages": [{"role": "user", "content": text}], "model": "m"}
            return json.dumps({"custom_id": f"{self.tag}/{number:04}", "body": body}).encode() + b"\n"

        return encoded("x" * (LINE_BYTES - len(encoded(""))))

    def source(self, count: int = 400, *, folder: Path | None = None, name: str = "source") -> Path:
        """Return a whole file outside the inbox."""
        path = (folder or self.aside) / name
        path.write_bytes(self.lines(count))
        return path

    def tree(self) -> Path:
        """Return a folder outside the inbox with twelve files, each in a folder of its own two levels down.

        Whoever is to take files out of these folders must be allowed to write to them.
        """
        for number in range(12):
            folder = self.aside / "tree" / f"{number % 3}" / f"{number}"
            folder.mkdir(parents=True)
            for made in (folder, folder.parent, folder.parent.parent):
                made.chmod(0o775)
            self.source(3, folder=folder, name="x.jsonl")
        return self.aside / "tree"

    def served(self, count: int = 40) -> str:
        """Return the address of a file that the web server sends in two halves, with a stall between."""
        self.help.pages[f"/{self.tag}/x.jsonl"] = self.lines(count)
        return f"{self.help.url}/{self.tag}/x.jsonl"

    def append(self, count: int = 1) -> None:
        """Open, append, close."""
        with self.changing(), self.x.open("ab") as file:
            file.write(self.lines(count))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A block that changes the file: between two of them it rests for `longest_gap_s` at the longest.

        A busy machine makes pauses longer than they were meant to be.
        """
        began = time.monotonic()
        yield
        if self._changed_at is not None:
            self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - self._changed_at)
        self._changed_at = began

    # With what it is written.

    def start(self, *command: str | Path, stdin: int | None = subprocess.DEVNULL) -> "subprocess.Popen[bytes]":
        """Start a program as the writer, in a process group of its own."""
        writer = self.role.writer
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.aside,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin", "HOME": "/nonexistent", "LC_ALL": "C"},
            umask=0o002,
            start_new_session=True,
            user=writer,
            group=writer,
            extra_groups=None if writer is None else [],
        )

    def run(self, *command: str | Path) -> None:
        """Run a program to its end."""
        self.finish(self.start(*command))

    def finish(self, process: "subprocess.Popen[bytes]") -> None:
        """Wait for a program that must succeed."""
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said.decode()

    def piped(self, *command: str | Path, data: bytes) -> None:
        """Run a program whose input comes in two halves, with a stall between."""
        process = self.start(*command, stdin=subprocess.PIPE)
        assert process.stdin is not None
        half = len(data) // 2
        process.stdin.write(data[:half])
        process.stdin.flush()
        time.sleep(STALL_S)
        process.stdin.write(data[half:])
        self.finish(process)

    def stalled(self, *command: str | Path) -> None:
        """Run a program and stop it in the middle of its work for a while."""
        process = self.start(*command)
        self.when_half_there()
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(STALL_S)
        os.killpg(process.pid, signal.SIGCONT)
        self.finish(process)

    def when_half_there(self) -> None:
        """Wait until a part of the file lies in the inbox, under whatever name."""
        end = time.monotonic() + 30
        while not any(path.is_file() and path.stat().st_size for path in self._all_names()):
            assert time.monotonic() < end, "it never began"
            time.sleep(0.005)

    def _all_names(self) -> list[Path]:
        return [self.inbox / name for name in os.listdir(self.inbox)]  # noqa: PTH208 (hidden ones, too)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """For the block this thread makes files as the writer."""
        writer = self.role.writer
        if writer is None:
            yield
            return
        _LIBC.setfsgid(writer)
        _LIBC.setfsuid(writer)
        try:
            yield
        finally:
            _LIBC.setfsuid(0)
            _LIBC.setfsgid(0)

"""An installation of sfwatch, known by its command line alone: `$SFWATCH`, or the one beside this Python.

Nothing here or in the tests beside it imports sfwatch, and the configuration holds only keys that 0.1.0 knows,
so that the same tests run against any version.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAM = os.environ.get("SFWATCH") or str(Path(sys.executable).with_name("sfwatch"))
PATIENCE_S = 30.0
KEY = "sk-strangersstrangersstrangers"


def batch(word: str, *, lines: int = 2) -> bytes:
    """A batch file; those of words of one length are of one size."""
    body = {"model": "m", "messages": [{"role": "user", "content": word}]}
    return b"".join(json.dumps({"custom_id": f"r-{n}", "body": body}).encode() + b"\n" for n in range(lines))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Daemon:
    """A running `sfwatch run`."""

    process: subprocess.Popen[bytes]
    log: Path
    stderr: Path

    def said(self, event: str, **keys: Any) -> list[dict[str, Any]]:
        *whole, _ = self.log.read_bytes().split(b"\n")
        events = [json.loads(text) for text in whole]
        return [e for e in events if e["event"] == event and e.items() >= keys.items()]

    def until(self, there: Callable[[], Any], *, within_s: float = PATIENCE_S) -> None:
        """Wait until something is so; fail with the log's end if it never is."""
        end = time.monotonic() + within_s
        while not there():
            if time.monotonic() > end or self.process.poll() is not None:
                pytest.fail(f"it never came to that\n{self.log.read_text()[-15_000:]}{self.stderr.read_text()}")
            time.sleep(0.02)


@dataclass
class Site:
    """A state folder and its inboxes, below one folder, with the configuration that names them."""

    root: Path
    port: int
    daemons: list[Daemon] = field(default_factory=list)

    def configure(
        self, *inboxes: str, keys: Mapping[str, str] | None = None, **uploads: str | int | bool
    ) -> None:
        """Write the configuration; *keys* gives inboxes a key_file with that key, the others take the usual."""
        written = []
        for name in inboxes:
            (self.root / name / "inbox").mkdir(parents=True, exist_ok=True)
            entry = {"path": str(self.root / name / "inbox"), "name": name, "settle": "100ms"}
            written.append(entry | ({"api": {"key_file": self._key(name, keys[name])}} if keys else {}))
        api = {"base_url": f"http://127.0.0.1:{self.port}/v1", "read_timeout": "20s"}
        quick = {"first_retry": "100ms", "longest_retry": "1s", "reconcile_window": "500ms"}
        settings = {"api": api, "inboxes": written, "uploads": {**quick, **uploads}, "log": {"level": "debug"}}
        settings |= {"state_dir": str(self.root / "state"), "scan_interval": "2s"}
        (self.root / "sfwatch.yaml").write_text(json.dumps(settings))

    def _key(self, name: str, key: str) -> str:
        path = self.root / f"key-{name}"
        path.write_text(key)
        path.chmod(0o600)
        return str(path)

    # The command line.

    def start(self, environ: Mapping[str, str] | None = None) -> Daemon:
        """Start the daemon, and wait until it is ready."""
        number = len(self.daemons)
        log, stderr = self.root / f"log-{number}", self.root / f"stderr-{number}"
        with log.open("wb") as out, stderr.open("wb") as err:
            command = [PROGRAM, "run", "-c", str(self.root / "sfwatch.yaml")]
            process = subprocess.Popen(command, stdout=out, stderr=err, env=self._environ(environ), cwd="/")
        daemon = Daemon(process, log, stderr)
        self.daemons.append(daemon)
        daemon.until(lambda: daemon.said("daemon.ready"))
        return daemon

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run another command to its end."""
        words = [PROGRAM, *command, "-c", str(self.root / "sfwatch.yaml")]
        return subprocess.run(
            words, env=self._environ(None), cwd="/", capture_output=True, text=True, check=False, timeout=90
        )

    def _environ(self, more: Mapping[str, str] | None) -> dict[str, str]:
        usual = {"PATH": os.environ["PATH"], "HOME": str(self.root), "SILICONFLOW_API_KEY": KEY}
        return {**usual, **(more or {})}

    # The folders.

    def drop(self, name: str, content: bytes, *, inbox: str = "a") -> str:
        """Put a file into an inbox, whole; return its digest."""
        made = self.root / name
        made.write_bytes(content)
        made.rename(self.root / inbox / "inbox" / name)
        return digest(content)

    def done(self, inbox: str = "a") -> dict[str, str]:
        """Each file in done, with the id that its sidecar has."""
        folder = self.root / inbox / "done"
        return {
            path.name: json.loads((folder / f"{path.name}.fileid.json").read_text())["id"]
            for path in folder.glob("*.jsonl")
        }

    def failed(self, inbox: str = "a") -> list[str]:
        return sorted(path.name for path in (self.root / inbox / "failed").glob("*.jsonl"))


@contextlib.contextmanager
def a_site(root: Path, port: int) -> Iterator[Site]:
    """A site with one inbox, `a`; its daemons end with the block."""
    root.mkdir(parents=True, exist_ok=True)
    site = Site(root, port)
    site.configure("a")
    try:
        yield site
    finally:
        for daemon in site.daemons:
            with contextlib.suppress(ProcessLookupError):
                daemon.process.kill()
            daemon.process.wait()

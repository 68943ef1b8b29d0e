"""A real systemd to run commands in (`box.sh`), and what they say."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from programs import need

HERE = Path(__file__).parent
SOURCE = HERE.parent.parent
PATIENCE_S = 60.0


@dataclass
class Box:
    """systemd as process 1 over a throw-away copy of this machine's root."""

    folder: Path

    def run(self, command: str, *, check: bool = True, **options: Any) -> str:
        """Run a line of shell as root; return what it said."""
        ran = subprocess.run(self._inside(command), capture_output=True, text=True, check=False, **options)
        if check and ran.returncode:
            pytest.fail(f"{command}\nended with {ran.returncode}:\n{ran.stdout}{ran.stderr}\n{self.journal()}")
        return str(ran.stdout + ran.stderr)

    def start(self, command: str) -> "subprocess.Popen[bytes]":
        """Begin a line of shell as root, and do not wait for it."""
        return subprocess.Popen(self._inside(command))

    def _inside(self, command: str) -> list[str]:
        return [str(HERE / "box.sh"), "in", str(self.folder), "bash", "-c", command]

    def write(self, path: str, text: str, mode: str = "0644") -> None:
        self.run(f"install -D -m {mode} /dev/stdin {path}", input=text)

    def show(self, unit: str, name: str) -> str:
        return self.run(f"systemctl show {unit} -P {name}").strip()

    def log(self, event: str | None = None, *, unit: str = "sfwatch", **keys: Any) -> list[dict[str, Any]]:
        """Return what sfwatch has said, as the operator page reads it."""
        said = self.run(f"journalctl -t sfwatch -u {unit} -o cat", check=False)
        events = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        return [e for e in events if event in (None, e["event"]) and e.items() >= keys.items()]

    def journal(self) -> str:
        return self.run("journalctl --no-pager -n 60", check=False)

    def until(self, there: Callable[[], Any], *, within_s: float = PATIENCE_S, every_s: float = 0.1) -> None:
        """Wait until something is so; fail with the journal's end if it never is."""
        end = time.monotonic() + within_s
        while not there():
            if time.monotonic() > end:
                pytest.fail(f"it never came to that\n{self.journal()}")
            time.sleep(every_s)


@contextmanager
def box(folder: Path) -> Iterator[Box]:
    """A box for the block; a machine that cannot have one skips, and says why."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount and to start a systemd")
    need("systemctl", "nsenter", "/usr/bin/python3")
    up = subprocess.run([HERE / "box.sh", "up", folder, SOURCE], capture_output=True, text=True, check=False)
    try:
        if up.returncode:
            pytest.skip(f"no systemd can be started here: {up.stdout}{up.stderr}")
        yield Box(folder)
    finally:
        subprocess.run([HERE / "box.sh", "down", folder], capture_output=True, check=False)


def page(heading: str) -> list[list[str]]:
    """Return the commands of a section of the README, block by block, as somebody would type them."""
    section = (SOURCE / "README.md").read_text().partition(f" {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", section, re.DOTALL)
    return [re.findall(r"^# ((?:.*(?:\\|\|)\n)*.*)$", block, re.MULTILINE) for block in blocks]

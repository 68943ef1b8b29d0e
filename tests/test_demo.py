"""The demo, as a person starts it: a subprocess, with a terminal or a pipe, and Ctrl-C."""

import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sfwatch import demo
from sfwatch.check import Checked, check
from sfwatch.settings import Check

COMMAND = (sys.executable, "-c", "from sfwatch.cli import main; main()", "demo")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
GIVE_UP_S = 60.0


def environ(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment, with a place of its own for throw-away folders."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    proxies = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NO_COLOR"}
    ours = {key: value for key, value in os.environ.items() if key.upper() not in proxies}
    return {**ours, "TMPDIR": str(tmp_path / "tmp"), "TERM": "xterm", **more}


def once(tmp_path: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--once"],
        env=environ(tmp_path, **more),
        capture_output=True,
        text=True,
        timeout=GIVE_UP_S,
        check=False,
    )


def checked(data: bytes, path: Path) -> Checked:
    path.write_bytes(data)
    with path.open("rb") as file:
        return check(file.fileno(), len(data), level=Check.BATCH, max_bytes=10**9, max_lines=5000)


def test_the_sample_has_nothing_to_find_in_it(tmp_path: Path) -> None:
    """It is what a batch file should be like, without so much as a warning."""
    found = checked(demo.sample(), tmp_path / "sample.jsonl")
    assert (found.lines, found.findings, found.warnings) == (12, (), ())


def test_the_broken_sample_has_the_mistakes_that_are_told(tmp_path: Path) -> None:
    """An answer at the end, and an id used twice."""
    found = checked(demo.broken(), tmp_path / "broken.jsonl").findings
    assert [(f.line, f.reason) for f in found] == [(2, "last_role_not_user"), (3, "custom_id_repeated")]


def test_once_shows_the_sample_and_its_id_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Piped, it has no colours; it ends well, and its folder is gone."""
    shown = once(tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    sidecar = json.loads(shown.stdout[shown.stdout.index("\n{") : shown.stdout.index("\n}") + 2])
    assert sidecar["id"].startswith("file-")
    assert sidecar["sfwatch"]["lines"] == 12
    assert re.search(rf"file\.done +inbox/sample\.jsonl +{sidecar['id']} ", shown.stdout)
    assert "1 file uploaded" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert demo._KEY not in shown.stdout  # made up, but people learn from a demo what may be shown
    assert not list((tmp_path / "tmp").iterdir())


def test_a_proxy_of_the_environment_is_not_asked(tmp_path: Path) -> None:
    """The stand-in is on this machine, whatever stands between it and the world."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
    nobody = dict.fromkeys(names, "http://127.0.0.1:9")
    assert once(tmp_path, **nobody, NO_PROXY="example.org", REQUESTS_CA_BUNDLE="/nowhere").returncode == 0


def test_a_place_that_cannot_be_written_to_is_said_plainly(tmp_path: Path) -> None:
    """No traceback: what is wrong, and what to do."""
    # A TMPDIR that cannot be used falls back to /tmp: only the list of places can be replaced.
    script = (
        "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere'];"
        "from sfwatch.cli import main; main()"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script, "demo"], capture_output=True, text=True, timeout=GIVE_UP_S, check=False
    )
    assert shown.returncode == 73
    assert len(shown.stderr.splitlines()) == 1
    assert "Set TMPDIR" in shown.stderr


class Person:
    """Somebody who looks at the demo's terminal."""

    def __init__(self, process: subprocess.Popen[bytes], terminal: int) -> None:
        self.process = process
        self.terminal = terminal
        self.seen = ""

    def sees(self, pattern: str) -> re.Match[str]:
        """Wait until it stands there."""
        deadline = time.monotonic() + GIVE_UP_S
        while not (found := re.search(pattern, ESCAPES.sub("", self.seen))):
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.terminal], [], [], left)[0], f"{pattern} is not in:\n{self.seen}"
            self.seen += os.read(self.terminal, 65536).decode().replace("\r\n", "\n")
        return found

    def folder(self) -> Path:
        return Path(self.sees(r"cp yours\.jsonl (/\S+)/inbox/\n").group(1))


@contextmanager
def started(tmp_path: Path, **more: str) -> Iterator[Person]:
    """The demo on a terminal of its own."""
    ours, theirs = os.openpty()
    with subprocess.Popen(
        COMMAND,
        env=environ(tmp_path, **more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        try:
            yield Person(process, ours)
        finally:
            process.kill()
            os.close(ours)


def asked(person: Person, command: str) -> str:
    """What a command prints that the demo proposes, typed as it stands there."""
    arguments = shlex.split(person.sees(rf"sfwatch ({command} -c .*)\n").group(1))
    ended = subprocess.run([*COMMAND[:-1], *arguments], capture_output=True, text=True, check=False)
    return ended.stdout + ended.stderr


def test_a_person_drops_a_file_and_leaves_with_ctrl_c(tmp_path: Path) -> None:
    """The sample, a file with mistakes and its report, one's own file; then nothing is left, and status 0."""
    with started(tmp_path) as person:
        folder = person.folder()
        person.sees(r"file\.failed +inbox/broken\.jsonl")
        person.sees(r'line 3: custom_id "a" is also used in line 1')
        (folder / "inbox" / "问题.jsonl").write_bytes(demo.sample())
        person.sees(r"file\.done +inbox/问题\.jsonl +file-\w+ · 12 lines · .* · done/问题\.jsonl")
        sidecar = json.loads((folder / "done" / "问题.jsonl.fileid.json").read_text("utf-8"))
        assert sidecar["id"] in person.seen
        assert "(last_role_not_user): line 2: " in asked(person, "status")
        (folder / "failed" / "broken.jsonl").write_bytes(demo.sample())
        assert "is back in its inbox" in asked(person, "retry")
        person.sees(r"file\.done +inbox/broken\.jsonl")
        person.process.send_signal(signal.SIGINT)
        person.sees("3 files uploaded, 1 refused")
        assert person.process.wait(GIVE_UP_S) == 0
        assert "\x1b[32mfile.done\x1b[0m" in person.seen
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_the_demo_and_its_folder(tmp_path: Path, number: signal.Signals) -> None:
    """Nothing is left behind by those who just close the window."""
    with started(tmp_path, NO_COLOR="1") as person:
        person.folder()
        assert "\x1b" not in person.seen
        person.process.send_signal(number)
        person.sees("Goodbye")
        assert person.process.wait(GIVE_UP_S) == 0
    assert not list((tmp_path / "tmp").iterdir())


def test_a_reader_that_goes_away_does_not_matter(tmp_path: Path) -> None:
    """`sfwatch demo --once | head -1` ends as it would have ended."""
    with subprocess.Popen([*COMMAND, "--once"], env=environ(tmp_path), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"sfwatch ")
        process.stdout.close()
        assert process.wait(GIVE_UP_S) == 0
    assert not list((tmp_path / "tmp").iterdir())

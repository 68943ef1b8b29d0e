"""`sfwatch status` as a person or a script meets it: the page, its exit statuses, JSON, and `--watch`."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from loop import KEY, Loop
from program import World
from rich.console import Console
from test_status import made

from sfwatch import status, status_page
from sfwatch.standin import StandIn, answering
from sfwatch.status_page import Seen

NOW = datetime(2026, 11, 22, 23, 1, 12, tzinfo=UTC)
MAIN = [sys.executable, "-c", "from sfwatch.cli import main; main()"]


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service:
        loop = Loop(tmp_path, service)
        (tmp_path / "sfwatch.yaml").write_text(
            json.dumps(
                {
                    "api": {"base_url": service.base_url},
                    "inboxes": [{"path": str(tmp_path / "a" / "inbox"), "name": "a"}],
                    "state_dir": str(tmp_path / "state"),
                }
            )
        )
        yield loop.start()
        loop.close()


def sfwatch(loop: Loop, *arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run the command as a user does."""
    environ = {"PATH": os.environ["PATH"], "COLUMNS": "80", "SILICONFLOW_API_KEY": KEY}
    command = [*MAIN, "status", "-c", str(loop.root / "sfwatch.yaml"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, **options)  # type: ignore[call-overload]
    assert KEY not in ended.stdout + ended.stderr
    return ended  # type: ignore[no-any-return]


def path(loop: Loop) -> Path:
    return loop.root / "state" / "status.json"


def pretend(loop: Loop, **changes: object) -> None:
    """Let what was published be of another process, or otherwise."""
    status.write(path(loop), replace(status.read(path(loop)), **changes))  # type: ignore[arg-type]


def shown(seen: Seen, width: int = 80) -> str:
    console = Console(width=width, highlight=False, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(status_page.page(seen, NOW))
    return captured.get()


class TestExitStatuses:
    def test_all_is_well(self, loop: Loop) -> None:
        """0, and the page says that it runs."""
        loop.run(1)
        ended = sfwatch(loop)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert re.match(r"sfwatch \S+ is running \(process \d+, started \d+ s ago\)\n", ended.stdout)

    def test_something_is_held(self, loop: Loop) -> None:
        """1, and what is held comes before all the rest."""
        loop.service.always = answering(403, {"code": 30001, "message": "balance is insufficient"})
        loop.drop("a", "x.jsonl")
        loop.look().run(4)
        ended = sfwatch(loop)
        assert ended.returncode == 1
        assert ended.stdout.index("is held (balance)") < ended.stdout.index("waiting")

    def test_it_was_killed(self, loop: Loop) -> None:
        """3; what was published last is told from what is so."""
        loop.drop("a", "x.jsonl", "")
        loop.run(1)
        pretend(loop, pid=2**22 + 1)
        loop.die()
        ended = sfwatch(loop)
        assert ended.returncode == 3
        assert ended.stdout.startswith("sfwatch is not running: it was killed")
        assert re.search(r"not running +1 ", ended.stdout)

    def test_it_ended(self, loop: Loop) -> None:
        """3, with how long ago."""
        loop.run(1)
        pretend(loop, state="stopped")
        loop.die()
        ended = sfwatch(loop)
        assert ended.returncode == 3
        assert ended.stdout.startswith("sfwatch is not running: it ended ")

    def test_it_never_ran(self, tmp_path: Path) -> None:
        """3, and nothing is made by asking."""
        (tmp_path / "sfwatch.yaml").write_text(f"state_dir: state\ninboxes: [{{path: {tmp_path}/a/inbox}}]\n")
        command = [*MAIN, "status", "-c", str(tmp_path / "sfwatch.yaml")]
        environ = {**os.environ, "COLUMNS": "80"}
        ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
        assert ended.returncode == 3
        assert "is not there" not in ended.stdout
        assert re.search(r"inbox +0 +0 +lost", ended.stdout)
        assert [p.name for p in tmp_path.iterdir()] == ["sfwatch.yaml"]

    @pytest.mark.parametrize(("text", "word"), [("{", "is damaged"), ('{"schema": 7}', "newer sfwatch")])
    def test_it_can_not_be_read(self, loop: Loop, text: str, word: str) -> None:
        """Running it is all the same, as the lock tells, and what is wrong is said: 1. Not running: 3."""
        path(loop).write_text(text)
        ended = sfwatch(loop)
        assert ended.returncode == 1
        assert f"process {os.getpid()} works with" in " ".join(ended.stdout.split())
        assert word in " ".join(ended.stdout.split())
        loop.die()
        ended = sfwatch(loop)
        assert ended.returncode == 3
        assert word in " ".join(ended.stdout.split())

    def test_a_bad_configuration(self, loop: Loop) -> None:
        """78, as everywhere."""
        (loop.root / "sfwatch.yaml").write_text("inboxes: {}\n")
        assert sfwatch(loop).returncode == 78

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
    def test_another_user(self, loop: Loop, tmp_path: Path) -> None:
        """Sees what was published for the group; the journal stays the owner's."""
        loop.run(1)
        public = tmp_path / "public"
        public.mkdir()
        os.chown(public, 0, 1)
        document = status.read(path(loop))
        status.write(public / "s.json", document)
        assert (public / "s.json").stat().st_gid == 1
        settings = replace(loop.settings(), status_file=public / "s.json")
        with somebody_else(tmp_path):
            seen = status_page.look(settings, {}, now=NOW)
            assert (seen.running, seen.exit_status) == (True, 0)
        status.write(public / "s.json", replace(document, pid=2**22 + 1))
        with somebody_else(tmp_path):
            seen = status_page.look(settings, {}, now=NOW)
        assert (seen.running, seen.exit_status, seen.status is not None) == (False, 3, True)
        assert "the journal: Permission denied" in str(seen.note)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
    def test_a_user_who_may_see_nothing(
        self, loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Is not told that no daemon runs, which he can't know; but still what became of a file."""
        loop.drop("a", "x.jsonl")
        waiting = loop.drop("a", "y.jsonl", "")
        loop.look().run(10)
        settings = loop.settings()
        for folder in (settings.inboxes[0].path, settings.inboxes[0].done, settings.inboxes[0].failed):
            folder.chmod(0o755)
        (settings.inboxes[0].done / "x.jsonl.fileid.json").chmod(0o644)
        with somebody_else(tmp_path):
            with pytest.raises(PermissionError):
                status_page.look(settings, {}, now=NOW)
            with pytest.raises(PermissionError):
                status_page.answer([str(waiting)], settings, {}, as_json=False, out=print)
            assert status_page.answer(["x.jsonl"], settings, {}, as_json=False, out=print) == 0
        assert "was uploaded" in capsys.readouterr().out


@contextmanager
def somebody_else(folder: Path) -> Iterator[None]:
    """A user of group 1, for whom the way to this folder is open."""
    for above in (folder, *folder.parents):
        if above.stat().st_uid == os.geteuid():
            above.chmod(above.stat().st_mode | 0o011)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(1)
    os.seteuid(2)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class TestThePage:
    def busy(self) -> Seen:
        """As much as there can be at once, with names as long as they come."""
        name = "n" * 200 + ".jsonl"
        old = NOW - timedelta(hours=3)
        files = tuple(status.WaitingFile(f"{n}{name}", 10, old) for n in range(20))
        document = made(
            inboxes=(
                status.Inbox(
                    "evals", "/srv/sfwatch/evals/inbox", "/d", "/f", "inotify", "ext4", waiting=100_000
                ),
                status.Inbox("nightly", "/x" * 60, "/d", "/f", lost=status.Lost("missing", "/x is not there")),
            ),
            targets=(
                status.Target(
                    "api.example/v1 (file /k)", ("evals",), 0, 4, None, "balance", "top it up", old, NOW
                ),
            ),
            folders=(status.Folder("/srv/done", "no_space", "full", old, NOW + timedelta(minutes=2)),),
            under_way=tuple(
                status.UnderWay(
                    "evals", f"{n}-{name}", 957_006_038, "uploading", old, 1, 312_000_000, 45_000_000
                )
                for n in range(20)
            ),
            waiting=(
                status.Waiting("evals", "held", 100_000, files),
                status.Waiting("nightly", "being_written", 1, files[:1]),
            ),
            totals=status.Totals(1234, 3, 3_400_000_000, {"not_json": 2, "refused": 1}),
            last_done=status.Ended("evals", name, NOW - timedelta(minutes=3)),
            started_at=NOW - timedelta(days=3),
        )
        return Seen(running=True, status=document)

    def test_it_fits_80_columns(self) -> None:
        """And a narrower terminal, with everything that matters."""
        for width in (80, 60):
            text = shown(self.busy(), width)
            assert max(map(len, text.splitlines())) <= width
        text = shown(self.busy())
        for word in ("100,000", "32", "45 MB/s", "14 s", "3 h", "2 min", "3 days", "1,234 done (3.4 GB)"):
            assert word in text, word
        assert "3 failed (2 not_json, 1 refused)" in text
        assert "… and 8 more" in text
        assert "api.example/v1 (file /k) is held (balance): top it up; for 3 h, being asked" in " ".join(
            text.split()
        )

    def test_it_steers_no_terminal(self) -> None:
        """What looks like rich's own markup is only text."""
        document = made(inboxes=(status.Inbox("[red]a[/red]", "/[bold]i", "/d", "/f"),))
        assert "[red]a[/red]" in shown(Seen(running=True, status=document))

    def test_a_group_that_names_no_file(self) -> None:
        """No daemon writes one, but somebody may who can write to the folder of `status_file`."""
        document = made(waiting=(status.Waiting("a", "empty", 3),))
        assert "a/?" in shown(Seen(running=True, status=document))

    def test_nothing_to_say(self) -> None:
        """Neither runs anything, nor was anything published."""
        assert shown(Seen(running=False, status=None, note="why")) == "sfwatch is not running: why\n"


class TestAsJson:
    def test_the_whole(self, loop: Loop) -> None:
        """The document as it was published, and whether a daemon runs."""
        loop.run(1)
        said = json.loads(sfwatch(loop, "--json").stdout)
        assert said["status"] == json.loads(path(loop).read_text())
        assert (said["running"], said["exit_status"], said["note"]) == (True, 0, None)

    def test_one_file(self, loop: Loop) -> None:
        """An answer for each, with what scripts want to know."""
        loop.drop("a", "x.jsonl")
        loop.look().run(4)
        ended = sfwatch(loop, "--json", "x.jsonl", "nope.jsonl")
        done, unknown = json.loads(ended.stdout)
        assert (done["state"], done["file_id"], done["exit_status"]) == ("done", loop.service.stored[0].id, 0)
        assert (unknown["state"], ended.returncode) == ("unknown", 1)

    def test_one_sentence(self, loop: Loop) -> None:
        """Without --json, a line a file."""
        loop.drop("a", "x.jsonl", "")
        loop.look().run(1)
        ended = sfwatch(loop, "x.jsonl")
        assert (ended.returncode, ended.stdout.count("\n")) == (0, 1)
        assert ended.stdout.startswith("a/x.jsonl has waited for ")


class TestWatch:
    def test_it_needs_a_terminal(self, loop: Loop) -> None:
        """And no files."""
        assert sfwatch(loop, "--watch").returncode == 64

    def test_it_keeps_up_and_ends_cleanly(self, loop: Loop) -> None:
        """Until Ctrl-C: no traceback, the cursor is back, and the exit status is that of the last page."""
        loop.run(1)
        ours, theirs = pty.openpty()
        command = [*MAIN, "status", "-c", str(loop.root / "sfwatch.yaml"), "--watch"]
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"}
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environ) as process:
            os.close(theirs)
            said = until(ours, b"0 done")
            loop.drop("a", "x.jsonl")
            loop.look().run(4)
            said += until(ours, b"1 done")
            process.send_signal(signal.SIGINT)
            said += rest(ours)
            assert process.wait(30) == 0
        os.close(ours)
        assert b"Traceback" not in said
        assert said.rstrip().endswith(b"\x1b[?25h")


def until(terminal: int, word: bytes) -> bytes:
    said = b""
    end = time.monotonic() + 30
    while word not in re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", said):
        assert time.monotonic() < end, said
        said += os.read(terminal, 65536)
    return said


def rest(terminal: int) -> bytes:
    said = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return said
        if not part:
            return said
        said += part


class TestARealDaemon:
    @pytest.fixture(name="world")
    def _world(self, tmp_path: Path) -> Iterator[World]:
        with StandIn() as service:
            world = World(tmp_path, service)
            world.configure(metrics_file=str(tmp_path / "sfwatch.prom"))
            yield world
            for program in world.programs:
                program.process.kill()
                program.process.wait()
                program.manager.close()

    def ask(self, world: World, *arguments: str) -> tuple[int, str]:
        command = [*MAIN, "status", "-c", str(world.root / "sfwatch.yaml"), *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.stderr, KEY in ended.stdout) == ("", False)
        return ended.returncode, ended.stdout

    def test_from_its_start_to_its_end(self, world: World) -> None:
        """It runs, does a file, is killed, runs again, and ends: each is told as what it is."""
        assert self.ask(world)[0] == 3
        program = world.start()
        world.drop("a", "x.jsonl")
        program.until(lambda: program.said("file.done"))
        program.until(lambda: "1 done" in self.ask(world)[1], every_s=0.2)
        assert self.ask(world)[0] == 0
        assert " was uploaded " in self.ask(world, "x.jsonl")[1]
        program.process.kill()
        program.process.wait()
        status_of_dead, said = self.ask(world)
        assert status_of_dead == 3
        assert "it was killed" in said
        program = world.start()
        assert self.ask(world)[0] == 0
        assert program.end() == 0
        status_of_ended, said = self.ask(world)
        assert status_of_ended == 3
        assert "it ended " in said
        assert "sfwatch_up 0.0" in (world.root / "sfwatch.prom").read_text()

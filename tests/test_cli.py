"""The commands as people and scripts meet them: words, exit statuses, and what goes to which stream."""

import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sfwatch import __version__, cli
from sfwatch.standin import StandIn, answering

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")

KEY = "sk-very-secret-0123456789"
MAIN = (sys.executable, "-c", "from sfwatch.cli import main; main()")
GOOD = '{"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}}\n'
BAD = '{"custom_id": "b", "body": {"model": "m", "messages": [{"role": "assistant", "content": "x"}]}}\n'


@pytest.fixture
def service() -> Iterator[StandIn]:
    with StandIn(key=KEY) as stand_in:
        yield stand_in


@pytest.fixture
def here(tmp_path: Path, service: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, an inbox, and a key in the environment; the working directory."""
    (tmp_path / "inbox").mkdir()
    (tmp_path / "sfwatch.yaml").write_text(
        f"api: {{base_url: '{service.base_url}'}}\n"
        "inboxes: [{path: inbox, settle: 20ms, settle_unproven: 50ms}]\nstate_dir: state\n"
    )
    (tmp_path / "sfwatch.yaml").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    for name in ("SFWATCH_CONFIG", "CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "RUNTIME_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SILICONFLOW_API_KEY", KEY)
    return tmp_path


BARE = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
"""Before a command: root without the right to read everything."""


def sfwatch(*arguments: str, under: tuple[str, ...] = (), **given: Any) -> subprocess.CompletedProcess[str]:
    """Run as a process of its own."""
    return subprocess.run(
        [*under, *MAIN, *arguments], capture_output=True, text=True, check=False, timeout=60, **given
    )


def check(*arguments: str, stdin: str | None = None) -> Result:
    """Run `sfwatch check` in this process."""
    return CliRunner().invoke(cli.commands, ["check", *arguments], input=stdin, catch_exceptions=False)


def spoil(config: Path) -> None:
    """Two mistakes, so that both must be told."""
    config.write_text("inboxes:\n  - path: inbox\n    settle: 5\n    purpos: batch\n")


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def tree(top: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_ino) for path in top.rglob("*"))


class TestTheCommandLine:
    def test_as_a_module(self) -> None:
        """For those who have a Python and no PATH."""
        module = [sys.executable, "-m", "sfwatch", "--version"]
        told = subprocess.run(module, capture_output=True, text=True, check=True).stdout
        assert told == f"sfwatch, version {__version__}\n"

    def test_version(self) -> None:
        """On standard output."""
        assert sfwatch("--version").stdout == f"sfwatch, version {__version__}\n"

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nope"],
            ["run", "--nope"],
            ["run", "x"],
            ["once", "--wait", "5"],
            ["check", "--config-only", "x"],
            ["log", "nope"],
            ["log", "."],
            ["log", "-f"],
            ["log", "--level", "loud"],
        ],
    )
    def test_usage(self, arguments: list[str]) -> None:
        """Mistakes on the command line end with 64 and one message, without a traceback."""
        ended = sfwatch(*arguments, stdin=subprocess.DEVNULL)
        assert (ended.returncode, ended.stdout) == (64, "")
        assert ended.stderr.startswith("sfwatch")
        assert ended.stderr.endswith(" --help\n")
        assert len(ended.stderr.splitlines()) == 1

    def test_a_slip(self) -> None:
        """What is wrong, where, and what was probably meant."""
        said = "sfwatch once: No such option '--wiat'. Did you mean '--wait'? See sfwatch once --help\n"
        assert sfwatch("once", "--wiat", "3s").stderr == said
        assert sfwatch("chek").stderr.startswith("sfwatch: No such command 'chek'. Did you mean 'check'? See ")

    def test_nothing_at_all(self) -> None:
        """All that `--help` says, and still the status of a mistake: a script has lost its arguments."""
        ended = sfwatch()
        assert (ended.returncode, ended.stderr) == (64, sfwatch("--help").stdout)

    def test_one_sentence_follows_another(self) -> None:
        """What comes after a message of our own is set off from it."""
        assert sfwatch("retry").stderr.endswith("or --reason CODE. See sfwatch retry --help\n")

    def test_help_fits_a_terminal(self) -> None:
        """80 columns hold it, and no command's summary breaks off."""
        for command in ("", *cli.commands.commands):
            text = sfwatch(*command.split(), "--help").stdout
            assert max(map(len, text.splitlines())) <= 80
            assert "..." not in text.partition("\nCommands:")[2]

    def test_help_keeps_its_examples(self) -> None:
        """Each on a line of its own, and no markup to be seen."""
        said = sfwatch("--help").stdout
        assert "\n  Try it, without a key and without a network:\n      sfwatch demo\n" in said
        assert "\\b" not in said
        assert "\b" not in said

    def test_each_command_has_help(self) -> None:
        """Its first line says what it does."""
        for name, command in cli.commands.commands.items():
            result = CliRunner().invoke(cli.commands, [name, "--help"])
            assert result.exit_code == 0
            assert (command.help or "nothing").split()[:5] == result.output.split("\n\n")[1].split()[:5]

    def test_help_is_quick(self) -> None:
        """Nothing is loaded for it that only the daemon needs."""
        script = "import sys, sfwatch.cli; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert not {"structlog", "rich", "requests", "sqlite3", "watchdog", "msgspec"} & {
            *loaded.stdout.split()
        }

    def test_a_mistake_is_seen(self, here: Path) -> None:
        """On a terminal what it is about is red."""
        spoil(here / "sfwatch.yaml")
        assert "\x1b[31msfwatch.yaml:\x1b[0m inboxes[0].settle (line 3): " in on_a_terminal("once", stderr=True)


class TestShellCompletion:
    @pytest.mark.parametrize(
        ("begun", "offered"),
        [
            (["ch"], ["plain,check"]),
            (["log", "--event", "target."], ["plain,target.held", "plain,target.resumed"]),
            (["log", "--level", "e"], ["plain,error"]),
            (["check", "--on"], ["plain,--online"]),
        ],
    )
    def test_what_is_offered(self, begun: list[str], offered: list[str]) -> None:
        """Commands, options and values."""
        words = {"COMP_WORDS": " ".join(["sfwatch", *begun]), "COMP_CWORD": str(len(begun))}
        ended = sfwatch(env={**os.environ, **words, "_SFWATCH_COMPLETE": "bash_complete"})
        assert ended.stdout.split() == offered

    def test_in_a_shell(self, tmp_path: Path) -> None:
        """The line that the README gives makes bash know the commands."""
        (tmp_path / "sfwatch").write_text(f'#!/bin/sh\nexec {shlex.join(MAIN)} "$@"\n')
        (tmp_path / "sfwatch").chmod(0o755)
        line = 'eval "$(_SFWATCH_COMPLETE=bash_source sfwatch)"'
        assert line in (Path(__file__).parent.parent / "README.md").read_text()
        script = (
            f'{line}; COMP_WORDS=(sfwatch de); COMP_CWORD=1; _sfwatch_completion sfwatch; echo "$COMPREPLY"'
        )
        path = f"{tmp_path}:{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
        )
        assert (ended.stdout, ended.stderr) == ("demo\n", "")


class TestBadConfigurations:
    @pytest.mark.parametrize("command", ["run", "once"])
    def test_every_problem_is_told(self, here: Path, command: str) -> None:
        """On stderr with path and line for people; in one event on stdout for the log. The status is 78."""
        spoil(here / "sfwatch.yaml")
        ended = sfwatch(command)
        assert ended.returncode == 78
        told = sorted(line.split(": ")[1] for line in ended.stderr.splitlines())
        assert told == ["inboxes[0].purpos (line 4)", "inboxes[0].settle (line 3)"]
        (event,) = events(ended.stdout)
        assert (event["event"], event["config"], len(event["problems"])) == (
            "config.rejected",
            "sfwatch.yaml",
            2,
        )

    def test_in_the_journal(self, here: Path) -> None:
        """Where stderr goes into the log as well, that has the event alone: each of its lines is JSON."""
        spoil(here / "sfwatch.yaml")
        read, write = os.pipe()
        it = os.fstat(write)
        environ = {**os.environ, "JOURNAL_STREAM": f"{it.st_dev}:{it.st_ino}"}
        ended = subprocess.run([*MAIN, "run"], stdout=write, stderr=write, env=environ, check=False, timeout=60)
        os.close(write)
        with os.fdopen(read) as log:
            assert [event["event"] for event in events(log.read())] == ["config.rejected"]
        assert ended.returncode == 78

    def test_before_a_reload(self, here: Path) -> None:
        """`check --config-only` says the same, since its output goes into the same log."""
        spoil(here / "sfwatch.yaml")
        mine, daemons = sfwatch("check", "--config-only"), sfwatch("run")
        assert (mine.returncode, mine.stderr) == (78, daemons.stderr)
        assert events(mine.stdout)[0]["event"] == "config.rejected"

    def test_a_missing_one(self, here: Path) -> None:
        """Is a bad one."""
        assert sfwatch("run", "-c", "nope.yaml").returncode == 78
        assert check("-c", "nope.yaml").output == (
            "!!  nope.yaml: does not exist: make it, or name another with -c\n"
        )

    @as_root
    @pytest.mark.parametrize("command", ["run", "once", "check"])
    def test_one_that_may_not_be_read(self, command: str) -> None:
        """77, with owner and mode; an event for the log where that is read by machines."""
        folder = Path(tempfile.mkdtemp(prefix="sfwatch-test-"))
        try:
            (folder / "c.yaml").touch(mode=0o600)
            os.chown(folder / "c.yaml", 1, 1)
            ended = sfwatch(command, "-c", str(folder / "c.yaml"), under=BARE)
        finally:
            shutil.rmtree(folder)
        said = ended.stdout if command == "check" else ended.stderr
        assert (ended.returncode, "Traceback" in ended.stderr) == (77, False)
        assert "it belongs to uid 1, gid 1, mode 0600; chgrp 0 " in said
        if command != "check":
            assert events(ended.stdout)[0]["event"] == "config.rejected"


class TestOutputThatCanNotBeWritten:
    @pytest.mark.parametrize("arguments", [["x.jsonl"], ["--json"], [], ["-c", "nope.yaml", "--config-only"]])
    def test_full(self, here: Path, arguments: list[str]) -> None:
        """One sentence and 73, whatever was to be said."""
        (here / "x.jsonl").write_text(GOOD)
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [*MAIN, "check", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert ended.returncode == 73
        assert ended.stderr == "sfwatch: standard output can't be written: No space left on device\n"

    @pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["log", "x.log"]])
    def test_full_for_any_command(self, here: Path, arguments: list[str]) -> None:
        """The same where the text is not our own."""
        (here / "x.log").write_text("x\n")
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                [*MAIN, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert ended.returncode == 73
        assert ended.stderr == "sfwatch: standard output can't be written: No space left on device\n"

    def test_a_reader_who_has_enough(self, here: Path) -> None:
        """Is no error: no word, and the status of a program that a closed pipe ended."""
        (here / "x.jsonl").write_text("x\n" * 99)
        ours, theirs = os.pipe()
        os.close(ours)
        ended = subprocess.run(
            [*MAIN, "check", "x.jsonl"], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False
        )
        os.close(theirs)
        assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


class TestRunAndOnce:
    def test_all_done(self, here: Path, service: StandIn) -> None:
        """0, and every line of the log is JSON."""
        (here / "inbox" / "x.jsonl").write_text(GOOD)
        ended = sfwatch("once")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert [event["event"] for event in events(ended.stdout)].count("file.done") == 1
        assert len(service.stored) == 1

    def test_on_a_terminal(self, here: Path) -> None:
        """Lines and bars while it works, and a table at the end."""
        (here / "inbox" / "x.jsonl").write_text(GOOD)
        (here / "inbox" / "y.jsonl").write_text(BAD)
        said = on_a_terminal("once", NO_COLOR="1")
        assert "file.done" in said
        assert "━━━" in said
        *_, title, sums, failed = said.splitlines()
        assert title.split()[-5:] == ["inbox", "done", "failed", "waiting", "uploaded"]
        assert sums.split() == ["inbox", "1", "1", "0", "91", "B"]
        assert failed.startswith(" failed   inbox/y.jsonl  last_role_not_user: line 1: ")

    def test_lines_for_people_in_a_pipe(self, here: Path) -> None:
        """Plain ones, without bars; the table stands below them. JSON has no table."""
        with (here / "sfwatch.yaml").open("a") as file:
            file.write("log: {format: console}\n")
        (here / "inbox" / "x.jsonl").write_text(GOOD)
        ended = sfwatch("once")
        assert (ended.returncode, "\x1b" in ended.stdout, "━" in ended.stdout) == (0, False, False)
        assert ended.stdout.splitlines()[-1].split() == ["inbox", "1", "0", "0", "91", "B"]

    def test_a_reader_who_has_enough(self, here: Path, service: StandIn) -> None:
        """Costs lines, never an upload."""
        with (here / "sfwatch.yaml").open("a") as file:
            file.write("log: {format: console}\n")
        (here / "inbox" / "x.jsonl").write_text(GOOD)
        ours, theirs = os.pipe()
        os.close(ours)
        ended = subprocess.run([*MAIN, "once"], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
        os.close(theirs)
        assert (ended.returncode, ended.stderr, len(service.stored)) == (0, "", 1)

    def test_nothing_there(self, here: Path) -> None:
        """0 as well."""
        assert sfwatch("once").returncode == 0

    def test_one_failed(self, here: Path) -> None:
        """1, though another one had to wait."""
        (here / "inbox" / "x.jsonl").write_text(BAD)
        (here / "inbox" / "empty.jsonl").touch()
        assert sfwatch("once", "--wait", "1s").returncode == 1

    def test_one_had_to_wait(self, here: Path, service: StandIn) -> None:
        """75 after the wait, and the file lies in the inbox."""
        service.always = answering(503, {"code": 50505, "message": "Model service overloaded."})
        (here / "inbox" / "x.jsonl").write_text(GOOD)
        assert sfwatch("once", "--wait", "500ms").returncode == 75
        assert (here / "inbox" / "x.jsonl").read_text() == GOOD

    def test_a_second_daemon(self, here: Path) -> None:
        """75 and one sentence; the first one goes on, and ends well when told to."""
        with subprocess.Popen([*MAIN, "run"], stdout=subprocess.PIPE, text=True) as first:
            assert first.stdout is not None
            while json.loads(first.stdout.readline())["event"] != "daemon.ready":
                pass
            second = sfwatch("run")
            first.send_signal(signal.SIGTERM)
            assert events(first.stdout.read())[-1]["event"] == "daemon.stopped"
        assert (first.returncode, second.returncode, second.stdout) == (0, 75, "")
        assert "another sfwatch works with the state folder" in second.stderr

    @as_root
    @pytest.mark.parametrize("command", ["run", "once"])
    def test_anothers_state(self, here: Path, command: str) -> None:
        """77 and the command to run instead; nothing is made there."""
        (here / "state").mkdir()
        os.chown(here / "state", 1, 1)
        ended = sfwatch(command)
        assert (ended.returncode, ended.stdout) == (77, "")
        assert f"; run: runuser -u daemon -- sfwatch {command}\n" in ended.stderr
        assert list((here / "state").iterdir()) == []

    @as_root
    def test_the_program_is_named_as_it_was_called(self, here: Path) -> None:
        """With its path, since it may be on nobody's PATH."""
        (here / "state").mkdir()
        os.chown(here / "state", 1, 1)
        (here / "bin").mkdir()
        (here / "bin" / "sfwatch").write_text(f"#!{sys.executable}\nfrom sfwatch.cli import main\nmain()\n")
        (here / "bin" / "sfwatch").chmod(0o755)
        for command in ("run", "check"):
            ended = subprocess.run(
                ["bin/sfwatch", command], capture_output=True, text=True, check=False, timeout=60
            )
            expected = f"run: runuser -u daemon -- {here}/bin/sfwatch {command}\n"
            assert expected in ended.stdout + ended.stderr

    def test_a_state_folder_that_can_not_be(self, here: Path) -> None:
        """73, and what has its place."""
        (here / "state").touch()
        ended = sfwatch("run")
        assert ended.returncode == 73
        assert f"the state folder {here / 'state'} can't be used" in ended.stderr

    def test_a_log_file_that_can_not_be(self, here: Path) -> None:
        """73, and its path."""
        with (here / "sfwatch.yaml").open("a") as file:
            file.write("log: {file: nowhere/log}\n")
        ended = sfwatch("run")
        assert (ended.returncode, ended.stdout) == (73, "")
        assert str(here / "nowhere" / "log") in ended.stderr


class TestCheckOfTheInstallation:
    def test_all_is_well(self, here: Path) -> None:
        """0, a line for each thing, the key in none of them, and nothing left behind."""
        before = tree(here)
        result = check()
        assert result.exit_code == 0
        assert all(line.startswith("ok  ") for line in result.output.splitlines())
        assert KEY not in result.output
        assert tree(here) == before

    def test_the_configuration_alone(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Needs neither key nor folders, and says nothing where nobody is looking."""
        (here / "inbox").rmdir()
        monkeypatch.delenv("SILICONFLOW_API_KEY")
        result = check("--config-only")
        assert (result.exit_code, result.output) == (0, "")

    def test_the_configuration_is_bad(self, here: Path) -> None:
        """Every problem with path and line; the folders are not looked at."""
        spoil(here / "sfwatch.yaml")
        result = check()
        assert result.exit_code == 78
        assert len(result.output.splitlines()) == 2
        assert "!!  sfwatch.yaml: inboxes[0].settle (line 3): " in result.output

    def test_there_is_none(self, here: Path) -> None:
        """What the smallest one looks like."""
        (here / "sfwatch.yaml").unlink()
        result = check()
        assert (result.exit_code, "smallest file that works" in result.output) == (78, True)

    def test_no_key(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A finding."""
        monkeypatch.delenv("SILICONFLOW_API_KEY")
        result = check()
        assert result.exit_code == 1
        assert "!!  key of 127.0.0.1" in result.output

    def test_a_warning_is_no_finding(self, here: Path) -> None:
        """It is marked as what it is, and the status stays 0."""
        (here / "inbox").chmod(0o777)
        result = check()
        assert result.exit_code == 0
        assert f"!   warning: inbox {here / 'inbox'}: others may write" in result.output

    @as_root
    def test_another_user(self, here: Path) -> None:
        """77, which outweighs what the files show; what was asked for is repeated in the command to run."""
        (here / "state").mkdir()
        os.chown(here / "state", 1, 1)
        (here / "x.jsonl").write_text(BAD)
        ended = sfwatch("check", "-c", "sfwatch.yaml", "x.jsonl")
        assert ended.returncode == 77
        assert "; run: runuser -u daemon -- sfwatch check -c sfwatch.yaml x.jsonl\n" in ended.stdout
        assert "x.jsonl:1: body.messages" in ended.stdout

    def test_online(self, here: Path, service: StandIn) -> None:
        """One listing and no upload."""
        result = check("--online")
        assert result.exit_code == 0
        assert [seen.method for seen in service.requests] == ["GET"]

    def test_online_later(self, here: Path, service: StandIn) -> None:
        """69 if the service is at fault and all the rest is well; a finding outweighs it."""
        service.listing = type(service.listing)(answer=answering(500, "busy").answer)
        assert check("--online").exit_code == 69
        (here / "failed").touch()
        assert check("--online").exit_code == 1

    def test_as_json(self, here: Path) -> None:
        """One object, with the status in it."""
        (here / "x.jsonl").write_text(BAD)
        result = check("-c", "sfwatch.yaml", "--json", "x.jsonl", "nope.jsonl")
        said = json.loads(result.output)
        assert (said["status"], said["version"], result.exit_code) == (1, __version__, 1)
        assert said["config"] == {"path": "sfwatch.yaml", "problems": []}
        assert {"level", "about", "text"} == set(said["checks"][0])
        assert said["files"][0]["findings"][0]["reason"] == "last_role_not_user"
        assert said["files"][1] == {"file": "nope.jsonl", "problem": "is not there: correct the name"}

    def test_a_bad_configuration_as_json(self, here: Path) -> None:
        """The problems are in the same object."""
        spoil(here / "sfwatch.yaml")
        for arguments in (["--json"], ["--json", "--config-only"]):
            said = json.loads(check(*arguments).output)
            assert (said["status"], len(said["config"]["problems"])) == (78, 2)


class TestCheckOfFiles:
    @pytest.fixture(autouse=True)
    def alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A folder without a configuration."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("SFWATCH_CONFIG", raising=False)

    def test_a_good_one(self) -> None:
        """One line, without a configuration and a key."""
        Path("x.jsonl").write_text(GOOD)
        result = check("x.jsonl")
        assert (result.exit_code, result.output) == (0, "ok  x.jsonl: 91 B, 1 line; model m (1)\n")

    def test_a_bad_one(self) -> None:
        """Each finding with its line as compilers say it, warnings marked, and a sum at the end."""
        Path("x.jsonl").write_text(GOOD + BAD + "\n" + "{")
        result = check("x.jsonl")
        assert result.exit_code == 1
        finding, other, blank, newline, total = result.output.splitlines()
        assert finding == 'x.jsonl:2: body.messages must end with a user message (got "assistant")'
        assert other.startswith("x.jsonl:4: not JSON")
        assert blank == "x.jsonl:3: warning: is blank"
        assert newline.startswith("x.jsonl:4: warning: is the last one")
        assert total.startswith("!!  x.jsonl: 189 B, 3 lines; model m (1); 2 findings (1 ")
        assert total.endswith("; 2 warnings")

    def test_many_findings(self) -> None:
        """All of them, up to a bound for what nobody reads; the rest is counted, also by kind."""
        Path("x.jsonl").write_text("x\n" * 4_999)
        assert len(check("x.jsonl").output.splitlines()) == 5_001  # … near the limit, and the sum
        Path("x.jsonl").write_text("x\n" * 12_345)
        *_, bound, total = check("x.jsonl").output.splitlines()
        assert bound == "x.jsonl: … and 2,346 findings more"
        assert total.endswith("12,346 findings (12,345 not_json, 1 too_many_lines)")

    def test_several(self) -> None:
        """All are looked at; one that is not there is a finding that stops nothing."""
        Path("x.jsonl").write_text(GOOD)
        result = check("nope.jsonl", ".", "x.jsonl")
        assert result.exit_code == 1
        assert [line[:4] for line in result.output.splitlines()] == ["!!  ", "!!  ", "ok  ", "!!  "]
        assert result.output.splitlines()[-1] == "!!  3 files: 2 not sound"

    def test_a_fifo(self) -> None:
        """It is not waited for."""
        os.mkfifo("x.jsonl")
        ended = sfwatch("check", "x.jsonl")
        assert (ended.returncode, "is a fifo" in ended.stdout) == (1, True)

    def test_standard_input(self) -> None:
        """It has a name in the lines, and counts as the others do."""
        assert check("-", stdin=GOOD).exit_code == 0
        assert check("-", stdin=BAD).output.startswith("stdin:1: ")
        assert "closed" in sfwatch("check", "-", preexec_fn=lambda: os.close(0)).stdout

    def test_odd_names(self) -> None:
        """Nothing in a name steers a terminal, and what can't be decoded is no error, not even in ASCII."""
        name = os.fsdecode(b"a\xff\x1b[31m\xc3\xa4.jsonl")
        Path(name).write_text(GOOD)
        for arguments in (["check", name], ["check", "--json", name]):
            ended = sfwatch(*arguments, env={**os.environ, "PYTHONIOENCODING": "ascii"})
            assert (ended.returncode, ended.stderr, "\x1b" in ended.stdout) == (0, "", False)

    def test_the_limits_of_a_configuration(self) -> None:
        """The first inbox's count; but the installation is not looked at for the sake of a file."""
        Path("c.yaml").write_text("inboxes: [{path: nowhere/inbox, max_lines: 1}]\n")
        Path("x.jsonl").write_text(GOOD + GOOD.replace('"a"', '"b"'))
        result = CliRunner().invoke(cli.commands, ["check", "x.jsonl"], env={"SFWATCH_CONFIG": "c.yaml"})
        first, *_ = result.output.splitlines()
        assert (result.exit_code, first) == (
            1,
            "x.jsonl: the file has 2 lines, at most 1 are allowed: split it",
        )
        assert "inbox" not in result.output

    def test_a_configuration_that_can_not_be_used(self) -> None:
        """A file is checked all the same, and it is said by which limits."""
        Path("c.yaml").write_text("inboxes: {}\n")
        Path("x.jsonl").write_text(GOOD)
        result = CliRunner().invoke(cli.commands, ["check", "x.jsonl"], env={"SFWATCH_CONFIG": "c.yaml"})
        warning, fine = result.output.splitlines()
        assert warning.startswith("!   warning: c.yaml: can't be used, so the default limits count: ")
        assert (result.exit_code, fine[:2]) == (0, "ok")

    def test_colour(self) -> None:
        """On a terminal only."""
        Path("x.jsonl").write_text(GOOD)
        assert "\x1b[32mok" in on_a_terminal("check", "x.jsonl")
        assert "\x1b" not in on_a_terminal("check", "x.jsonl", NO_COLOR="1")
        assert "\x1b" not in sfwatch("check", "x.jsonl").stdout

    def test_the_place_is_shown(self) -> None:
        """On a terminal only, below the finding, with carets; JSON gives the column instead."""
        Path("x.jsonl").write_text(BAD)
        shown = on_a_terminal("check", "x.jsonl", NO_COLOR="1").splitlines()
        assert shown[1][shown[2].index("^") : shown[2].rindex("^") + 1] == '"assistant"'
        assert "^" not in sfwatch("check", "x.jsonl").stdout
        said = json.loads(check("--json", "x.jsonl").output)
        (finding,) = said["files"][0]["findings"]
        assert BAD[finding["column"] - 1 :].startswith('"assistant"')


class TestLog:
    LINES = (
        '{"timestamp": "2026-11-22T20:01:12Z", "level": "info", "event": "inbox.found", "inbox": "a"}\n'
        '{"timestamp": "2026-11-22T20:01:13Z", "level": "error", "event": "target.held", "target": "t"}\n'
        "Stopped sfwatch.service\n"
    )

    def test_a_file(self, tmp_path: Path) -> None:
        """One row an event, below its day, and what is none as it is."""
        (tmp_path / "log").write_text(self.LINES)
        day, found, held, stopped = sfwatch("log", str(tmp_path / "log")).stdout.splitlines()
        assert "2026" in day
        assert ("inbox.found" in found, "target.held" in held) == (True, True)
        assert stopped == "Stopped sfwatch.service"

    def test_a_pipe(self) -> None:
        """The same, and only what is asked for."""
        ended = sfwatch("log", "--level", "error", input=self.LINES)
        assert (ended.returncode, len(ended.stdout.splitlines())) == (0, 2)
        ended = sfwatch("log", "-n", "1", "--event", "*.*", input=self.LINES)
        assert ended.stdout.splitlines()[1].endswith("target.held        t")

    def test_a_pipe_with_a_name(self) -> None:
        """What a shell makes of <(…)."""
        script = f"{shlex.join(MAIN)} log --level error <(printf %s {shlex.quote(self.LINES)})"
        ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr, len(ended.stdout.splitlines())) == (0, "", 2)

    def test_following(self, tmp_path: Path) -> None:
        """What comes later is shown as it comes, also from the file that takes the place of the first."""
        log = tmp_path / "log"
        log.write_text(self.LINES)
        command = [*MAIN, "log", "-f", "-n", "1", "--event", "*", str(log)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            shown = [process.stdout.readline() for _ in range(2)]
            log.rename(tmp_path / "log.1")
            log.write_text(self.LINES.splitlines()[0].replace("found", "lost") + "\n")
            shown.append(process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        assert ["target.held" in shown[1], "inbox.lost" in shown[2]] == [True, True]


def on_a_terminal(*arguments: str, stderr: bool = False, **more: str) -> str:
    """What a terminal gets to see."""
    ours, theirs = pty.openpty()
    environ = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "COLUMNS"}}
    environ |= {"TERM": "xterm", **more}
    errors = theirs if stderr else None
    with subprocess.Popen([*MAIN, *arguments], stdout=theirs, stderr=errors, env=environ) as process:
        os.close(theirs)
        said = b"".join(_until_closed(ours))
        process.wait(timeout=60)
    os.close(ours)
    return said.decode()


def _until_closed(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            yield os.read(terminal, 65536)
        except OSError:  # nobody has the other side open any more
            return


@as_root
def test_a_reader_who_may_read_nothing() -> None:
    """Without the right to read a file, a check of it ends as any other: no traceback."""
    folder = Path(tempfile.mkdtemp(prefix="sfwatch-test-"))
    try:
        folder.chmod(0o755)
        (folder / "x.jsonl").write_text(GOOD)
        (folder / "x.jsonl").chmod(0)
        os.chown(folder / "x.jsonl", 1, 1)
        ended = sfwatch("check", str(folder / "x.jsonl"), under=BARE)
    finally:
        shutil.rmtree(folder)
    assert (ended.returncode, ended.stderr) == (1, "")
    assert "may not be read by root" in ended.stdout

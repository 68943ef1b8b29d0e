"""The commands: what was asked for on the command line is handed on, and what came of it is printed.

Everything that comes from a file or a service is made printable first: nothing of it may steer a terminal.
"""

import errno
import io
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

import click

from sfwatch import __version__, config, logs
from sfwatch.settings import Config

if TYPE_CHECKING:  # most commands start without the modules behind it
    from sfwatch.check import Checked
    from sfwatch.preflight import FileReport, Note

OK, FINDINGS, USAGE, UNAVAILABLE, INTERNAL, CANNOT_CREATE, TRY_AGAIN, NO_PERMISSION, BAD_CONFIG = (
    0,
    1,
    64,
    69,
    70,
    73,
    75,
    77,
    78,
)
"""Exit statuses, after sysexits.h."""

_CONFIG = click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path, readable=False),  # what can't be read is told with all other faults
    help="The configuration. Default: $SFWATCH_CONFIG, ./sfwatch.yaml, /etc/sfwatch/sfwatch.yaml.",
)


def main() -> NoReturn:
    """Run the command line; usage errors end with 64, as sysexits.h has it."""
    # First of all: a writer that meets the lease probe at the wrong moment makes the kernel send SIGIO, and its
    # default action would end the process.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # terminals that know no … are no error
    try:
        commands.main(standalone_mode=False)
    except click.UsageError as error:
        error.show()
        sys.exit(USAGE)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    sys.exit(OK)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sfwatch")
def commands() -> None:
    """Drop JSONL batch files into a folder: they are checked, uploaded, recorded and filed away.

    \b
    Try it, without a key and without a network:
        sfwatch demo

    \b
    Run it:
        sfwatch check -c sfwatch.yaml
        sfwatch run -c sfwatch.yaml
    """  # noqa: D301 - the backspace itself is what keeps click from filling the lines


@commands.command()
@_CONFIG
def run(path: Path | None) -> None:
    """Watch the inboxes and upload what arrives, until told to stop."""
    sys.exit(_work(_settings(path), drain_s=None))


@commands.command()
@_CONFIG
@click.option(
    "--wait", default="60s", show_default=True, help="How long each file gets to settle and to be taken."
)
def once(path: Path | None, wait: str) -> None:
    """Work off what is there now, and end: 0 all done, 1 some failed, 75 some had to wait."""
    try:
        drain_s = config.seconds(wait)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--wait") from None
    sys.exit(_work(_settings(path), drain_s=drain_s))


@commands.command()
@_CONFIG
@click.option("--config-only", is_flag=True, help="Look at the configuration and nothing else.")
@click.option("--online", is_flag=True, help="Ask the service for one listing: whether it takes the key.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument("names", metavar="[JSONL]...", nargs=-1)
def check(path: Path | None, names: tuple[str, ...], *, config_only: bool, online: bool, as_json: bool) -> None:
    """Look at everything that uploads need, or at batch files. Nothing is uploaded.

    Without arguments: the configuration, the folders (a file goes the way of all files in each), and the key.
    With JSONL files: these alone (- is standard input); add -c or --online to look at all the rest as well.
    """
    if config_only and (online or names):
        raise click.UsageError("--config-only looks at nothing else: leave out --online and the files")
    if config_only and not as_json:
        _settings(path)
        if sys.stdout.isatty():  # systemctl reload runs this: its log is for events
            _out("ok  the configuration is sound")
        sys.exit(OK)
    report = _ReportAsJson() if as_json else _ReportAsText()
    everything = bool(path or online or not names)
    settings = _looked_at(path, report, everything=everything)
    if everything and not config_only:
        _preflight(settings, report, online=online)
    _batch_files(names, settings, report)
    sys.exit(report.end())


@commands.command()
@click.option("--once", "ends", is_flag=True, help="End after the sample file.")
def demo(*, ends: bool) -> None:
    """Try it: a throw-away inbox and a local stand-in for the service. No key, no network."""
    from sfwatch import demo as it  # noqa: PLC0415 - as above

    sys.exit(it.run(once=ends))


def _settings(path: Path | None) -> Config:
    """Read the configuration, or say all that is wrong with it and end."""
    try:
        return config.read(config.find(path, os.environ), environ=os.environ)
    except config.ConfigError as error:
        if not sys.stdout.isatty():
            problems = [str(problem) for problem in error.problems]
            log = logs.event_log(_out)  # before any log is set up
            log("config.rejected", config=error.source, problems=problems)
        for problem in error.problems:
            click.echo(logs.printable(f"{error.source or 'sfwatch'}: {problem}"), err=True)
        sys.exit(NO_PERMISSION if error.forbidden else BAD_CONFIG)


def _work(settings: Config, *, drain_s: float | None) -> int:
    from sfwatch import app, journal, preflight  # noqa: PLC0415 - other commands start without these modules

    owner = preflight.foreign_owner(settings.state_dir)
    if owner is not None:  # what another user writes there would be closed to the owner
        run_as = preflight.as_user(owner, _command())
        _end(NO_PERMISSION, f"{settings.state_dir} belongs to {preflight.user(owner)}; run: {run_as}")
    try:
        output = logs.Output(settings.log)
    except OSError as error:
        _end(CANNOT_CREATE, f"the log file {settings.log.file} cannot be opened: {error.strerror}")
    log = logs.start(settings.log, output)
    try:
        return app.run(settings, log=log, environ=os.environ, drain_s=drain_s)
    except journal.StateInUseError as error:
        _end(TRY_AGAIN, str(error))
    except journal.JournalError as error:
        _end(INTERNAL, str(error))
    except OSError as error:
        _end(*_state_fault(settings.state_dir, error))


def _state_fault(state_dir: Path, error: OSError) -> tuple[int, str]:
    """Say what is wrong with the state folder."""
    what = f"the state folder {state_dir} can't be used: {error.strerror or error} ({error.filename})"
    if isinstance(error, PermissionError):
        return NO_PERMISSION, f"{what}: let {_me()} make and write it, or set another state_dir"
    return CANNOT_CREATE, f"{what}: mend it, or set another state_dir"


def _me() -> str:
    from sfwatch import preflight  # noqa: PLC0415 - as above

    return preflight.user(os.geteuid())


def _command() -> list[str]:
    """How this was called, fit to be called so by somebody else, whose PATH may be another."""
    program = os.path.abspath(sys.argv[0]) if "/" in sys.argv[0] else "sfwatch"  # noqa: PTH100 - links stay
    return [program, *sys.argv[1:]]


def _out(text: str) -> None:
    """Print a line; if that can't be done, say so and end, quietly where the reader has had enough."""
    try:
        click.echo(text)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try again at its end
        if error.errno == errno.EPIPE:
            sys.exit(128 + signal.SIGPIPE)
        _end(CANNOT_CREATE, f"standard output can't be written: {error.strerror}")


def _end(status: int, message: str) -> NoReturn:
    click.echo(f"sfwatch: {logs.printable(message)}", err=True)
    sys.exit(status)


# ---- check: what is looked at ----


def _looked_at(path: Path | None, report: "_Report", *, everything: bool) -> Config | None:
    """Read the configuration; without `everything` only for its limits, and the defaults do as well."""
    from sfwatch.preflight import Level, Note  # noqa: PLC0415 - as above

    try:
        settings = config.read(config.find(path, os.environ), environ=os.environ)
    except config.ConfigError as error:
        if everything:
            report.rejected(error)
            sys.exit(report.end())
        if error.source is not None:
            text = f"can't be used, so the default limits count: {error.problems[0]}"
            report.note(Note(Level.WARNING, str(error.source), text))
        return None
    report.config = str(settings.source)
    if everything:
        report.note(Note(Level.OK, "configuration", str(settings.source)))
    return settings


def _preflight(settings: Config | None, report: "_Report", *, online: bool) -> None:
    from sfwatch import preflight  # noqa: PLC0415 - as above

    if settings is None:
        return
    for note in preflight.installation(settings, os.environ, online=online, wall=_wall, command=_command()):
        report.note(note)


def _wall() -> float:
    return datetime.now(UTC).timestamp()


def _batch_files(names: Iterable[str], settings: Config | None, report: "_Report") -> None:
    from sfwatch import preflight  # noqa: PLC0415 - as above

    bounds = preflight.limits(settings)
    for name in names:
        report.file(preflight.batch_file(name, bounds, _stdin()))


def _stdin() -> BinaryIO | None:
    return sys.stdin.buffer if sys.stdin is not None else None


# ---- check: how it is said ----

_MARKS = {"ok": ("ok", "green"), "warning": ("!", "yellow")}
_FAULT = ("!!", "red")
_SHOWN_MODELS = 3


class _Report:
    """What was found so far, and the exit status that it makes."""

    def __init__(self) -> None:
        self.config: str | None = None
        self.levels: set[str] = set()

    def rejected(self, error: config.ConfigError) -> None:
        """Take up what is wrong with the configuration."""
        self.levels.add("no_permission" if error.forbidden else "config")
        self.config = str(error.source) if error.source else None

    def note(self, note: "Note") -> None:
        """Take up one thing about the installation."""
        self.levels.add(note.level)

    def file(self, file: "FileReport") -> None:
        """Take up one batch file."""
        if file.checked is None or file.checked.findings:
            self.levels.add("finding")

    def end(self) -> int:
        """Return the exit status: what must be mended first outweighs the rest."""
        ranked = {
            "config": BAD_CONFIG,
            "no_permission": NO_PERMISSION,
            "finding": FINDINGS,
            "unavailable": UNAVAILABLE,
        }
        return next((status for level, status in ranked.items() if level in self.levels), OK)


class _ReportAsText(_Report):
    """One line a thing, as soon as it is known."""

    def rejected(self, error: config.ConfigError) -> None:
        super().rejected(error)
        for problem in error.problems:
            _say("!!", "red", f"{error.source or 'configuration'}: {problem}")

    def note(self, note: "Note") -> None:
        super().note(note)
        mark, colour = _MARKS.get(note.level, _FAULT)
        warning = "warning: " if note.level == "warning" else ""
        _say(mark, colour, f"{warning}{note.about}: {note.text}")

    def file(self, file: "FileReport") -> None:
        super().file(file)
        name = "stdin" if file.name == "-" else file.name
        if file.checked is None:
            _say("!!", "red", f"{name}: {file.problem}")
            return
        for line in _findings(name, file.checked):
            _out(logs.printable(line))
        mark, colour = _FAULT if file.checked.findings else _MARKS["ok"]
        _say(mark, colour, f"{name}: {_summary(file.checked)}")


class _ReportAsJson(_Report):
    """One object at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._problems: list[str] = []
        self._notes: list[dict[str, Any]] = []
        self._files: list[dict[str, Any]] = []

    def rejected(self, error: config.ConfigError) -> None:
        super().rejected(error)
        self._problems = [str(problem) for problem in error.problems]

    def note(self, note: "Note") -> None:
        super().note(note)
        self._notes.append(asdict(note))

    def file(self, file: "FileReport") -> None:
        super().file(file)
        checked = asdict(file.checked) if file.checked else {}
        self._files.append({"file": file.name, "problem": file.problem, **checked})

    def end(self) -> int:
        status = super().end()
        configuration = {"path": self.config, "problems": self._problems}
        document = {
            "status": status,
            "version": __version__,
            "config": configuration,
            "checks": self._notes,
            "files": self._files,
        }
        _out(json.dumps(document))  # in ASCII, which also has room for undecodable names
        return status


def _say(mark: str, colour: str, text: str) -> None:
    _out(f"{click.style(f'{mark:<2}', fg=colour)}  {logs.printable(text)}")


def _findings(name: str, checked: "Checked") -> Iterator[str]:
    """One line each, in the form that editors and compilers share."""
    for finding in checked.findings:
        yield f"{_place(name, finding.line)}: {finding.detail}"
    if checked.more:
        yield f"{name}: … and {checked.more:,} more"
    for warning in checked.warnings:
        detail = warning.detail.removeprefix(f"line {warning.line} ")
        yield f"{_place(name, warning.line)}: warning: {detail}"


def _place(name: str, line: int | None) -> str:
    return f"{name}:{line}" if line else name


def _summary(checked: "Checked") -> str:
    parts = [f"{checked.size:,} bytes, {_counted(checked.lines, 'line')}"]
    if checked.models:
        parts.append(_models(checked.models.items()))
    kinds = Counter(finding.reason for finding in checked.findings)
    if kinds:
        told = [f"{times:,} {reason}" for reason, times in kinds.most_common()]
        told += [f"{checked.more:,} more"] if checked.more else []
        parts.append(f"{_counted(kinds.total() + checked.more, 'finding')} ({', '.join(told)})")
    if checked.warnings:
        parts.append(_counted(len(checked.warnings), "warning"))
    return "; ".join(parts)


def _models(models: Iterable[tuple[str, int]]) -> str:
    shown = [f"{model} ({lines:,})" for model, lines in models]
    more = ", …" if len(shown) > _SHOWN_MODELS else ""
    return f"{'model' if len(shown) == 1 else 'models'} {', '.join(shown[:_SHOWN_MODELS])}{more}"


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"

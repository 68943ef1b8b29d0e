"""The commands."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from sfwatch import __version__, config, logs
from sfwatch.settings import Config

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
    type=click.Path(path_type=Path),
    help="The configuration. Default: $SFWATCH_CONFIG, ./sfwatch.yaml, /etc/sfwatch/sfwatch.yaml.",
)


def main() -> NoReturn:
    """Run the command line; usage errors end with 64, as sysexits.h has it."""
    # First of all: a writer that meets the lease probe at the wrong moment makes the kernel send SIGIO, and its
    # default action would end the process.
    signal.signal(signal.SIGIO, signal.SIG_IGN)
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
    r"""Drop JSONL batch files into a folder: they are checked, uploaded, recorded and filed away.

    \b
    Try it, without a key and without a network:
        sfwatch demo
    \b
    Run it:
        sfwatch check -c sfwatch.yaml
        sfwatch run -c sfwatch.yaml
    """


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
            log = logs.event_log(lambda line: print(line, flush=True))  # noqa: T201 - before any log is set up
            log("config.rejected", config=error.source, problems=problems)
        for problem in error.problems:
            click.echo(f"{error.source or 'sfwatch'}: {problem}", err=True)
        sys.exit(BAD_CONFIG)


def _work(settings: Config, *, drain_s: float | None) -> int:
    from sfwatch import app, journal  # noqa: PLC0415 - other commands start without the daemon's modules

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
    """Say what is wrong with the state folder, and who could use it."""
    if not isinstance(error, PermissionError):
        return (
            CANNOT_CREATE,
            f"{error.filename or state_dir}: {error.strerror}: mend it, or set state_dir",
        )
    try:
        owner = state_dir.owner()
    except (OSError, KeyError):
        return NO_PERMISSION, f"the state folder {state_dir} cannot be made: make it, or set another state_dir"
    command = " ".join(["sfwatch", *sys.argv[1:]])
    return NO_PERMISSION, f"{state_dir} belongs to {owner}; run: runuser -u {owner} -- {command}"


def _end(status: int, message: str) -> NoReturn:
    click.echo(f"sfwatch: {message}", err=True)
    sys.exit(status)

"""The commands: what was asked for on the command line is handed on, and what came of it is printed.

What is printed by hand is made printable first: nothing that comes from elsewhere may steer a terminal.
"""

import io
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sfwatch import __version__, config, logs
from sfwatch.exits import FINDINGS, OK, USAGE
from sfwatch.launch import command_line, once_page_for, read_settings, require_owner, state_fault, work
from sfwatch.settings import Config
from sfwatch.terminal import complain, end, has_colour, out, stdin, unwritable
from sfwatch.values import seconds

if TYPE_CHECKING:  # most commands start without the modules behind it
    from click.shell_completion import CompletionItem

    from sfwatch.check_page import Page
    from sfwatch.log_page import Event, LogPage
    from sfwatch.retry import Failed

_LOOK_S = 0.2
"""How often a log is looked at that is followed."""
_LAST = 10
"""Events that are shown at first of a log that is followed."""

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
        commands.main(prog_name="sfwatch", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(USAGE)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "sfwatch"
        message = error.format_message()
        stop = "" if message.endswith((".", "?", "!")) else "."
        complain(command, f"{message}{stop} See {command} --help")
        sys.exit(USAGE)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        unwritable(error)  # `--help` into a full disk
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
        sfwatch check -c sfwatch.yaml        is all there that uploads need?
        sfwatch run -c sfwatch.yaml          the daemon, until Ctrl-C
        sfwatch once -c sfwatch.yaml         what is there now, for cron

    \b
    Look:
        sfwatch check requests.jsonl         would the service take this file?
        sfwatch status                       what is the daemon doing?
        sfwatch status requests.jsonl        why is this file not taken?
        journalctl -t sfwatch -o cat | sfwatch log --level warning
    """  # noqa: D301 - the backspace itself is what keeps click from filling the lines


@commands.command()
@_CONFIG
def run(path: Path | None) -> None:
    """Watch the inboxes and upload what arrives, until told to stop."""
    sys.exit(work(read_settings(path), drain_s=None))


@commands.command(short_help="Work off what is there now, and end.")
@_CONFIG
@click.option(
    "--wait", default="60s", show_default=True, help="How long each file gets to settle and to be taken."
)
def once(path: Path | None, wait: str) -> None:
    """Work off what is there now, and end: 0 all done, 1 some failed, 75 some had to wait."""
    try:
        drain_s = seconds(wait)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--wait") from None
    settings = read_settings(path)
    page = once_page_for(settings)
    status = work(settings, drain_s=drain_s, page=page)
    if page is not None:
        page.print_end()
    sys.exit(status)


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
        read_settings(path)
        if sys.stdout.isatty():  # systemctl reload runs this: its log is for events
            out("ok  the configuration is sound")
        sys.exit(OK)
    page = _check_page(as_json=as_json)
    everything = bool(path or online or not names)
    settings = _looked_at(path, page, everything=everything)
    if everything and not config_only:
        _preflight(settings, page, online=online)
    _batch_files(names, settings, page)
    sys.exit(page.end())


def _events(_context: click.Context, _parameter: click.Parameter, begun: str) -> "list[CompletionItem]":
    from click.shell_completion import CompletionItem  # noqa: PLC0415 - as above

    return [CompletionItem(name) for name in logs.EVENTS if name.startswith(begun)]


@commands.command(short_help="Show a log in JSON as the console shows it.")
@click.option("--inbox", "inboxes", multiple=True, metavar="NAME", help="Only about this inbox. Repeatable.")
@click.option(
    "--file", "files", multiple=True, metavar="PATTERN", help="Only about files like 'evals-*'. Repeatable."
)
@click.option(
    "--event",
    "events",
    multiple=True,
    metavar="PATTERN",
    shell_complete=_events,
    help="Only events like 'upload.*'. Repeatable.",
)
@click.option(
    "--level",
    type=click.Choice(list(logs.LEVELS)),
    default="debug",
    help="Only from this level on: warning, error.",
)
@click.option(
    "-n", "--last", type=click.IntRange(min=1), help=f"Only the last so many (with --follow: {_LAST})."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written later, until Ctrl-C.")
@click.argument(
    "path", metavar="[FILE]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def log(path: Path | None, *, last: int | None, follow: bool, **wanted: Any) -> None:
    """Show a log in JSON as the console shows it, from a file or from a pipe.

    \b
        journalctl -t sfwatch -o cat --since today | sfwatch log
        sfwatch log --event 'file.*' --event 'target.*' sfwatch.jsonl
        sfwatch log -f --level warning /var/log/sfwatch/sfwatch.jsonl

    All conditions hold together; several of one kind are alternatives. A file that is followed may be rotated.
    """  # noqa: D301 - as above
    from sfwatch.log_page import LogPage, Tail, Wanted, lines, wanted_of  # noqa: PLC0415 - as above

    page = LogPage(colour=has_colour())
    pick = partial(wanted_of, wanted=Wanted(**wanted))
    if path is not None and path.is_file():
        with closing(Tail(path)) as tail:
            _show(pick(tail.fresh() if follow else tail.whole()), page, last or (_LAST if follow else None))
            while follow:
                threading.Event().wait(_LOOK_S)
                _show(pick(tail.fresh()), page, None)
        return
    piped = path.open("rb") if path is not None else stdin()
    if follow:
        raise click.UsageError("--follow takes a FILE: what comes from a pipe is shown as it comes")
    if piped is None or piped.isatty():
        raise click.UsageError("name a log file, or pipe one in: journalctl -t sfwatch -o cat | sfwatch log")
    _show(pick(lines(piped)), page, last)


@commands.command(short_help="Put failed files back into their inbox.")
@_CONFIG
@click.option("--all", "all_of_them", is_flag=True, help="Every failed file that has a report.")
@click.option("--reason", metavar="CODE", help="Only those that failed for this reason, as in their reports.")
@click.option("--inbox", metavar="NAME", help="Where files go whose report names no inbox.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
def retry(
    path: Path | None, names: tuple[str, ...], *, all_of_them: bool, reason: str | None, inbox: str | None
) -> None:
    """Put failed files back into their inbox; or send uploads again whose outcome stays unknown.

    A file whose claims folder is lost (the status says inbox_away) is given up.

    A NAME is that of a file in a failed folder, a path to it, or the name under which it was dropped. The
    reports are kept in .sfwatch-history beside where they were. It works with a running daemon and without.

    \b
    Examples:
        sfwatch retry requests.jsonl
        sfwatch retry --reason gave_up
        sfwatch retry --all
    """  # noqa: D301 - as above
    if bool(names) == (all_of_them or reason is not None):
        raise click.UsageError("name files, or say --all or --reason CODE")
    settings = read_settings(path)
    require_owner(settings)
    sys.exit(_retry(settings, names, reason, inbox))


@commands.command(short_help="Take over the claims of a daemon that is gone for good.")
@_CONFIG
@click.argument("folder", type=click.Path(path_type=Path))
def adopt(path: Path | None, folder: Path) -> None:
    """Take over the files that another daemon claimed, now that it is gone for good.

    FOLDER is the path of a claims folder, as the event claim.foreign names it. Only you can know that its
    daemon is dead: on a network filesystem it may run on another machine, and both would upload the same files.

    Nothing is moved. The daemon takes over at its next scan, or at its start; it looks for each file in the
    service's listing before it sends it.

    \b
    Example:
        sfwatch adopt /srv/sfwatch/inbox/.sfwatch/0123456789abcdef-0a1b2c
    """  # noqa: D301 - as above
    from sfwatch.commands import adopt as it  # noqa: PLC0415 - as above

    settings = read_settings(path)
    require_owner(settings)
    try:
        out(logs.printable(it.adopt(settings, folder)))
    except it.NotAdoptedError as why:
        end(FINDINGS, str(why))
    except OSError as error:
        end(*state_fault(settings.state_dir, error))


@commands.command(short_help="Show what the daemon does; say why a FILE is not taken.")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--watch", "stays", is_flag=True, help="Keep the page up to date until Ctrl-C.")
@click.argument("files", metavar="[FILE]...", nargs=-1)
def status(path: Path | None, files: tuple[str, ...], *, as_json: bool, stays: bool) -> None:
    """Show what the daemon is doing; or say of a FILE why it is not taken, or what became of it.

    A FILE is a path, or the name that it was dropped under. Ends with 0 if all is well, 1 if something is held
    or failing, 3 if no daemon runs, 77 if this user may not see whether one does.
    """
    from sfwatch import status_page  # noqa: PLC0415 - as above

    if stays and (files or as_json or not sys.stdout.isatty()):
        raise click.UsageError("--watch shows one page on a terminal: leave out --json and the files")
    settings = read_settings(path)
    try:
        if stays:
            sys.exit(status_page.watch(settings, os.environ))
        if files:
            sys.exit(status_page.answer(files, settings, os.environ, as_json=as_json, out=out))
        sys.exit(status_page.show(settings, os.environ, as_json=as_json, out=out))
    except PermissionError as error:
        require_owner(settings)
        end(*state_fault(settings.state_dir, error))


@commands.command()
@click.option("--once", "ends", is_flag=True, help="End after the sample file.")
def demo(*, ends: bool) -> None:
    """Try it: a throw-away inbox and a local stand-in for the service. No key, no network."""
    from sfwatch import demo as it  # noqa: PLC0415 - as above

    sys.exit(it.run(once=ends))


def _retry(settings: Config, names: tuple[str, ...], reason: str | None, inbox: str | None) -> int:
    from sfwatch import retry as it  # noqa: PLC0415 - as above

    status = OK
    files: list[str | Failed] = [*names] or [*it.everything(settings, reason)]
    if not files:
        folders = ", ".join(dict.fromkeys(str(inbox.failed) for inbox in settings.inboxes))
        out(logs.printable(f"nothing to retry: no such file lies in {folders} with a report"))
    for what in files:
        try:
            out(logs.printable(_retried(settings, what, inbox)))
        except it.NotRetriedError as why:
            status = FINDINGS
            complain("sfwatch", str(why))
    return status


def _retried(settings: Config, what: "str | Failed", inbox: str | None) -> str:
    from sfwatch import retry as it  # noqa: PLC0415 - as above

    failed = it.named(settings, what) if isinstance(what, str) else what
    if failed is not None:
        return f"{it.put_back(settings, failed, inbox=inbox)}  is back in its inbox"
    held = it.claimed(settings, str(what))
    if len(held) != 1:
        why = "is claimed in several inboxes: name it by its path" if held else "is in no failed folder"
        raise it.NotRetriedError(f"{what} {why}")
    try:
        it.request(settings.state_dir, *held[0])
    except OSError as error:
        end(*state_fault(settings.state_dir, error))
    return (
        f"{what}  is in progress: at its next scan the daemon sends it again if its outcome is unknown then, or"
        " gives it up if its claims folder is missing"
    )


# ---- log ----


def _show(found: "Iterable[Event | str]", page: "LogPage", last: int | None) -> None:
    for event in found if last is None else deque(found, maxlen=last):
        for row in page.rows(event):
            out(row)


# ---- check ----


def _check_page(*, as_json: bool) -> "Page":
    from sfwatch.check_page import JsonPage, TextPage  # noqa: PLC0415 - as above

    if as_json:
        return JsonPage(out)
    cells = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return TextPage(out, colour=has_colour(), cells=cells)


def _looked_at(path: Path | None, page: "Page", *, everything: bool) -> Config | None:
    """Read the configuration; without `everything` only for its limits, and the defaults do as well."""
    from sfwatch.notes import Level, Note  # noqa: PLC0415 - as above

    try:
        settings = config.read(config.find(path, os.environ), environ=os.environ)
    except config.ConfigError as error:
        if everything:
            page.rejected(error)
            sys.exit(page.end())
        if error.source is not None:
            text = f"can't be used, so the default limits count: {error.problems[0]}"
            page.note(Note(Level.WARNING, str(error.source), text))
        return None
    page.config = str(settings.source)
    if everything:
        page.note(Note(Level.OK, "configuration", str(settings.source)))
    return settings


def _preflight(settings: Config | None, page: "Page", *, online: bool) -> None:
    from sfwatch import preflight  # noqa: PLC0415 - as above

    if settings is None:
        return
    for note in preflight.installation(settings, os.environ, online=online, wall=_wall, command=command_line()):
        page.note(note)


def _wall() -> float:
    return datetime.now(UTC).timestamp()


def _batch_files(names: Iterable[str], settings: Config | None, page: "Page") -> None:
    from sfwatch import lint  # noqa: PLC0415 - as above

    bounds = lint.limits(settings)
    for name in names:
        page.file(lint.batch_file(name, bounds, stdin(), page.wanted))

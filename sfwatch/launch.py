"""From the command line to the daemon: settings, log, and whatever fails on the way ends with a sentence."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sfwatch import config, logs
from sfwatch.exits import BAD_CONFIG, CANNOT_CREATE, INTERNAL, NO_PERMISSION, TRY_AGAIN
from sfwatch.settings import Config
from sfwatch.terminal import complain, end, out
from sfwatch.users import as_user, foreign_owner, user

if TYPE_CHECKING:  # other commands start without it
    from sfwatch.once_page import OncePage


def read_settings(path: Path | None) -> Config:
    """Read the configuration, or say all that is wrong with it and end."""
    try:
        return config.read(config.find(path, os.environ), environ=os.environ)
    except config.ConfigError as error:
        if not sys.stdout.isatty():
            problems = [str(problem) for problem in error.problems]
            log = logs.event_log(out)  # before any log is set up
            log("config.rejected", config=error.source, problems=problems)
        for problem in () if _errors_go_to_the_journal() else error.problems:
            complain(str(error.source or "sfwatch"), str(problem))
        sys.exit(NO_PERMISSION if error.forbidden else BAD_CONFIG)


def _errors_go_to_the_journal() -> bool:
    """Whether systemd writes them where the event is (see systemd.exec(5)): that log is JSON alone."""
    journal = os.environ.get("JOURNAL_STREAM")
    if not journal:
        return False
    stderr = os.fstat(2)
    return journal == f"{stderr.st_dev}:{stderr.st_ino}"


def once_page_for(settings: Config) -> "OncePage | None":
    """What shows a run to people; None where its log is for programs."""
    terminal = sys.stdout.isatty()
    if settings.log.file is not None or settings.log.format == "json":
        return None
    if settings.log.format == "auto" and not terminal:
        return None
    from sfwatch import once_page  # noqa: PLC0415 - as above

    return once_page.page(settings.log.level, os.environ)


def work(settings: Config, *, drain_s: float | None, page: "OncePage | None" = None) -> int:
    # Their default would end the process; they wait until `app.signals` turns them into mail.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1))
    from sfwatch import app, journal  # noqa: PLC0415 - other commands start without these modules

    require_owner(settings)
    try:
        output = logs.Output(settings.log)
    except OSError as error:
        end(CANNOT_CREATE, f"the log file {settings.log.file} cannot be opened: {error.strerror}")
    log = page.log() if page else logs.start(settings.log, output)
    # On a terminal SIGHUP says that it was closed, and what ends by itself has no use for other settings.
    reread = None
    if settings.source is not None and drain_s is None and not output.is_terminal():
        reread = partial(_reread, settings.source, output, log)
    run = partial(app.run, settings, log=log, environ=os.environ, drain_s=drain_s)
    try:
        if page is None:
            return run(reread=reread)
        with page.shown():
            return run(watch=page.watch, leave=page.leave)
    except journal.StateInUseError as error:
        end(TRY_AGAIN, str(error))
    except journal.JournalError as error:
        end(INTERNAL, str(error))
    except OSError as error:
        end(*state_fault(settings.state_dir, error))


def require_owner(settings: Config) -> None:
    """End unless this is the state folder's owner: what another user writes there would be closed to it."""
    owner = foreign_owner(settings.state_dir)
    if owner is not None:
        run_as = as_user(owner, command_line())
        end(NO_PERMISSION, f"{settings.state_dir} belongs to {user(owner)}; run: {run_as}")


def _reread(path: Path, output: logs.Output, log: logs.EventLog) -> Config:
    """Read the configuration anew, and open the log file anew: it may have been rotated."""
    try:
        output.reopen()
    except OSError as error:
        log("config.warning", detail=f"the log file can't be opened again, the old one is kept: {error}")
    return config.read(path, environ=os.environ)


def state_fault(state_dir: Path, error: OSError) -> tuple[int, str]:
    """Say what is wrong with the state folder."""
    what = f"the state folder {state_dir} can't be used: {error.strerror or error} ({error.filename})"
    if isinstance(error, PermissionError):
        return NO_PERMISSION, f"{what}: let {user(os.geteuid())} make and write it, or set another state_dir"
    return CANNOT_CREATE, f"{what}: put that right, or set another state_dir"


def command_line() -> list[str]:
    """How this was called, fit to be called so by somebody else, whose PATH may be another."""
    program = os.path.abspath(sys.argv[0]) if "/" in sys.argv[0] else "sfwatch"  # noqa: PTH100 - links stay
    return [program, *sys.argv[1:]]

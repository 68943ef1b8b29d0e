"""The only place where parts are made and joined."""

import os
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from types import FrameType
from urllib.parse import urlsplit

from sfwatch import __version__, arrive, cores, files, key
from sfwatch.config import ConfigError
from sfwatch.core import Mailbox, Signalled
from sfwatch.daemon import Daemon
from sfwatch.exits import FINDINGS, INTERNAL, OK, TRY_AGAIN
from sfwatch.job import Job, Tools
from sfwatch.journal import SqliteJournal
from sfwatch.logs import EventLog
from sfwatch.reload import Fresh, Rejected
from sfwatch.settings import Api, Config, Inbox
from sfwatch.upload import Client, Pace
from sfwatch.upstream import FILING, Plan
from sfwatch.work import traceback_of

SPARE_WORKERS = 2
"""Workers beside those that upload: for moves that a full disk has kept waiting, and for probes."""

FIXED_KEYS = ("state_dir", "log")
"""Keys that SIGHUP leaves as they were: what they name is open as long as the process lives."""

Reread = Callable[[], Config]
"""Reads the configuration anew. Raises ConfigError."""


@contextmanager
def daemon(
    config: Config, *, log: EventLog, environ: Mapping[str, str], reread: Reread | None = None
) -> Iterator[Daemon]:
    """Make a daemon for these settings; its journal and doorbell are closed at the end.

    `reread` reads the settings anew at SIGHUP; without it that signal ends the program, as on a terminal.

    Raises JournalError (another daemon is at work there) and OSError if the state folder cannot be used.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    journal = SqliteJournal(config.state_dir, stamp=stamp)
    try:
        mailbox: Mailbox = queue.SimpleQueue()
        doorbell = arrive.Doorbell(mailbox.put)
        stop = threading.Event()  # set once: every worker looks at it between two blocks
        plans = _plans(config, journal, log, environ, stop)
        _say_first(config, journal, log, environ)
        try:
            yield Daemon(
                config=config,
                plans=plans,
                journal=journal,
                doorbell=doorbell,
                mailbox=mailbox,
                pool=_pool(config, plans),
                log=log,
                environ=environ,
                clock=time.monotonic,
                wall=time.time,
                luck=random.random,
                abort=stop.set,
                reread=reread and partial(_reread, reread, config, journal, log, environ, stop),
            )
        finally:
            doorbell.close()
    finally:
        journal.close()


def target_name(api: Api, environ: Mapping[str, str]) -> str:
    """Return what events call a target: its address, and where the key comes from."""
    address = urlsplit(api.base_url)
    return f"{address.netloc}{address.path} ({key.source(api, environ)})"


def _plans(
    config: Config,
    journal: SqliteJournal,
    log: EventLog,
    environ: Mapping[str, str],
    stop: threading.Event,
) -> tuple[Plan, ...]:
    pace = Pace(config.uploads.max_rate) if config.uploads.max_rate is not None else None
    return tuple(
        Plan(
            tools=Tools(
                target=name,
                client=Client(
                    theirs[0].api,
                    connections=config.uploads.concurrency,
                    user_agent=f"sfwatch/{__version__}",
                ),
                journal=journal,
                uploads=config.uploads,
                state_dir=str(config.state_dir),
                log=log.bind(target=name),
                environ=environ,
                clock=time.monotonic,
                wall=time.time,
                stop=stop.is_set,
                sleep=stop.wait,
                pace=pace,
                gate=threading.Semaphore(config.uploads.concurrency),
            ),
            inboxes=tuple(inbox.name for inbox in theirs),
        )
        for name, theirs in _inboxes_by_target(config, environ).items()
    )


def _inboxes_by_target(config: Config, environ: Mapping[str, str]) -> dict[str, list[Inbox]]:
    """Inboxes with the same `api` settings go to one target; a name that two would share is told apart."""
    by_api: dict[Api, list[Inbox]] = {}
    for inbox in config.inboxes:
        by_api.setdefault(inbox.api, []).append(inbox)
    named: dict[str, list[Inbox]] = {}
    for api, theirs in by_api.items():
        name = target_name(api, environ)
        named[f"{name} of {theirs[0].name}" if name in named else name] = theirs
    return named


def _pool(config: Config, plans: Sequence[Plan]) -> Executor:
    workers = FILING * config.uploads.concurrency * len(plans) + SPARE_WORKERS
    return ThreadPoolExecutor(workers, thread_name_prefix="worker")


def _reread(
    reread: Reread,
    before: Config,
    journal: SqliteJournal,
    log: EventLog,
    environ: Mapping[str, str],
    stop: threading.Event,
) -> Fresh | Rejected:
    """Read the settings anew and make ready what they ask for; some keys take a restart."""
    try:
        wanted = reread()
    except ConfigError as error:
        return Rejected(tuple(str(problem) for problem in error.problems))
    kept = {name: getattr(before, name) for name in FIXED_KEYS}
    needs_restart = tuple(name for name, value in kept.items() if getattr(wanted, name) != value)
    config = replace(wanted, **kept)
    plans = _plans(config, journal, log, environ, stop)
    _warn_of_keys(config, log, environ)
    return Fresh(config, plans, _pool(config, plans), needs_restart)


def _say_first(config: Config, journal: SqliteJournal, log: EventLog, environ: Mapping[str, str]) -> None:
    aside = journal.set_aside
    if aside is not None:
        detail = (
            f"it is {aside.reason} ({aside.detail}) and lies as {aside.path} now; a new one was begun."
            " Files that were under way are looked up in the service's listing; tries are counted from zero"
        )
        log("journal.set_aside", path=aside.path, reason=aside.reason, detail=detail)
    _warn_of_keys(config, log, environ)


def _warn_of_keys(config: Config, log: EventLog, environ: Mapping[str, str]) -> None:
    for warning in {text for inbox in config.inboxes for text in key.warnings(inbox.api, environ)}:
        log("config.warning", detail=warning)


@contextmanager
def signals(mailbox: Mailbox) -> Iterator[None]:
    """Turn signals into mail, and nothing else; restore what was before.

    Python runs handlers in the main thread, between two of its instructions. One that comes just before that
    thread falls asleep over its mailbox would be seen only when something else wakes it; so the numbers go
    through a pipe that the interpreter writes to at once, and another thread reads.
    """
    # SIGHUP comes when a terminal closes; its default action would end the process without any grace.
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, _nothing) for number in wanted}
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    forward = threading.Thread(target=_forward, args=(reader, mailbox), name="signals", daemon=True)
    forward.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        files.close(writer)
        forward.join()
        files.close(reader)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Handle a signal: its number is on its way through the pipe already."""


def _forward(reader: int, mailbox: Mailbox) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            mailbox.put(Signalled(number))


def run(
    config: Config,
    *,
    log: EventLog,
    environ: Mapping[str, str],
    drain_s: float | None = None,
    reread: Reread | None = None,
    watch: Callable[[Callable[[], Collection[Job]], Callable[[], float]], object] | None = None,
    leave: Callable[[int], object] = os._exit,
) -> int:
    """Run the daemon until it is told to stop, or until nothing is left to do; return the exit status.

    `watch` is handed what tells, at any time and in any thread, which jobs are under way, and their clock.
    `leave` ends the process if a worker is still stuck in an upload after the grace: Python would wait for it.
    """
    with cores.one(), daemon(config, log=log, environ=environ, reread=reread) as it:
        if watch is not None:
            watch(lambda: tuple(it.under_way.values()), it.clock)  # one call into C: no thread comes between
        with signals(it.mailbox):
            try:
                it.start()
                if drain_s is not None:
                    it.drain_until = it.clock() + drain_s
                it.run()
            except Exception as bug:  # noqa: BLE001 - the border of the loop: said, and systemd starts it anew
                log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=traceback_of(bug))
                leave(INTERNAL)
                return INTERNAL
        status = exit_status(it) if drain_s is not None else OK
        if it.leave_at_once:
            status = 128 + (it.stop_signal or 0)
        if it.busy or it.probing:
            leave(status)
        it.pool.shutdown(wait=False)
    return status


def exit_status(it: Daemon) -> int:
    """Return what `once` ends with: 1 if a file failed, 75 if one had to wait, 0 if all are done."""
    if it.counts.failed:
        return FINDINGS
    out_of_reach = any(w.lost or w.foreign_told for w in it.inboxes.watched.values())
    return TRY_AGAIN if it.unfinished() or out_of_reach else OK

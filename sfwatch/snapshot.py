"""The status is built from what the main thread knows, and published seldom enough to cost next to nothing.

A snapshot goes through every file once (100,000 of them in some 20 ms) and is made after a turn of the loop, at
most once a second, and the less often the longer it takes. What it says is published only if it differs from
what was said last: times in it are moments, not ages, so that nothing in it changes while nothing happens.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

from sfwatch import __version__, files, status, tally
from sfwatch.inboxes import Inboxes
from sfwatch.job import Deferred, Job, Task
from sfwatch.journal import State
from sfwatch.logs import EventLog, printable
from sfwatch.settings import Config
from sfwatch.storage import Storage
from sfwatch.table import Entry, Key, Stage
from sfwatch.upstream import Service
from sfwatch.watch import Watched

PAUSE_S = 1.0
"""The shortest time between two snapshots."""

SHARE = 50
"""A snapshot may take the fiftieth part of the time: a long one is followed by a long pause."""

METRICS_PAUSE_S = 15.0
"""The shortest time between two writings of the metrics; they are collected about as often."""

_LONGEST_TEXT = 1000


@dataclass(frozen=True, slots=True)
class View:
    """What the main thread knows, at one moment; it is only read. `state` is that of the document."""

    state: str
    config: Config
    services: Mapping[str, Service]
    inboxes: Inboxes
    storage: Storage
    under_way: Mapping[Key, Job]
    tally: tally.Tally
    started_at: float


@dataclass(slots=True)
class Publisher:
    """Publishes status and metrics; `due_at` is when it wants to be called although nothing happens."""

    log: EventLog
    environ: Mapping[str, str]
    clock: Callable[[], float]
    wall: Callable[[], float]
    in_state_folder: Callable[[Callable[[], object]], object]  # runs what touches it in the journal's thread
    due_at: float | None = None
    _process: str = field(default_factory=lambda: status.process_of(os.getpid()) or "")
    _ahead_s: float = 0.0  # of the wall clock; kept as long as it is about right, or all times would tremble
    _next_at: float = 0.0
    _metrics_at: float = 0.0
    _path: Path | None = None
    _last: status.Status | None = None
    _last_metrics: bytes | None = None
    _told: dict[Path, str] = field(default_factory=dict)

    def publish(self, view: View, now: float, *, at_once: bool = False) -> None:
        """Publish what has changed, unless it is too early: then ask to be called again."""
        if now < self._next_at and not at_once:
            self.due_at = self._next_at
            return
        if abs(self.wall() - self.clock() - self._ahead_s) > 1.0:
            self._ahead_s = self.wall() - self.clock()
        snapshot = build(view, now, self._ahead_s, self._process)
        self._next_at = now + max(PAUSE_S, SHARE * (self.clock() - now))
        self.due_at = self._next_at if view.under_way else None
        path = status.path(view.config, self.environ)
        if path != self._path or not status.same(snapshot, self._last):
            within = path.parent == view.config.state_dir
            written = self._write(path, lambda: status.write(path, snapshot), within=within)
            self._path, self._last = path, snapshot if written else None
        if view.config.metrics_file is None:
            return
        if now >= self._metrics_at or at_once:
            self._metrics_at = now + METRICS_PAUSE_S
            self._publish_metrics(view.config.metrics_file, snapshot, view.tally)
        elif self.due_at is None:
            self.due_at = self._metrics_at

    def _publish_metrics(self, path: Path, snapshot: status.Status, counted: tally.Tally) -> None:
        from sfwatch import metrics  # noqa: PLC0415 - it needs an extra

        text = metrics.render(snapshot, counted)
        if text != self._last_metrics:
            written = self._write(path, lambda: files.put(path, text, mode=0o644))
            self._last_metrics = text if written else None

    def _write(self, path: Path, write: Callable[[], None], *, within: bool = False) -> bool:
        """Write a file; one that cannot be written is no reason to upload nothing: it is reported, once."""

        def swept_and_written() -> None:
            if path not in self._told:
                self._told[path] = ""
                with files.folder(os.path.realpath(path.parent)) as fd:
                    files.sweep_temporaries(fd)  # what a crash left half-written
            write()

        try:
            if within:
                self.in_state_folder(swept_and_written)
            else:
                swept_and_written()
        except OSError as error:
            why = f"{path} can't be written: {error.strerror or error}; files are uploaded all the same"
            if self._told[path] != why:
                self._told[path] = why
                self.log("config.warning", detail=why)
            return False
        self._told[path] = ""
        return True


# ---- building ----


def build(view: View, now: float, ahead_s: float, process: str) -> status.Status:
    """Return the document of this moment; `ahead_s` is what the wall clock is ahead of the monotonic one."""
    watched = view.inboxes.watched
    waiting = tuple(chain.from_iterable(_waiting(view, w, now, ahead_s) for w in watched.values()))
    counts: Counter[str] = Counter()
    for group in waiting:
        counts[group.inbox] += group.files
    return status.Status(
        schema=status.SCHEMA,
        version=__version__,
        state=view.state,
        pid=os.getpid(),
        process=process,
        started_at=_moment(view.started_at + ahead_s),
        published_at=_moment(now + ahead_s),
        config=_text(os.path.abspath(view.config.source)) if view.config.source else None,  # noqa: PTH100
        state_dir=_text(view.config.state_dir),
        inboxes=tuple(_inbox(view, w, counts[name]) for name, w in watched.items()),
        targets=tuple(_target(service, ahead_s) for service in view.services.values()),
        folders=tuple(_folders(view.storage, ahead_s)),
        under_way=tuple(_under_way(view, now, ahead_s)),
        waiting=waiting,
        totals=_totals(view.tally),
        last_done=_ended(view.tally.last_done),
        last_failed=_ended(view.tally.last_failed),
    )


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(round(at, 3), UTC)


def _text(value: object) -> str:
    text = str(value)
    return printable(text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…")


def _maybe(value: object) -> str | None:
    return None if value is None else _text(value)


def _inbox(view: View, w: Watched, waiting: int) -> status.Inbox:
    inbox, mode, lost = w.inbox, w.mode, w.lost or w.bare
    rings = mode is not None and w.told in (None, mode.why)
    return status.Inbox(
        name=_text(inbox.name),
        path=_text(inbox.path),
        done=_text(inbox.done),
        failed=_text(inbox.failed),
        mode=None if mode is None else mode.mode if rings else "polling",
        fs_type=None if mode is None else _text(mode.fs_type),
        trusted=None if mode is None else mode.trusted,
        detail=_maybe(w.told),
        lost=None if lost is None else status.Lost(lost[0], _text(lost[1])),
        refused=_maybe(w.refused),
        waiting=waiting,
        under_way=sum(key[0] == inbox.name for key in view.under_way),
        others=w.others,
    )


def _target(service: Service, ahead_s: float) -> status.Target:
    state, hold = service.state, service.state.hold
    return status.Target(
        name=_text(service.name),
        inboxes=tuple(sorted(map(_text, service.inboxes))),
        under_way=len(service.under_way),
        pace=1 if state.interval_s else state.concurrency,
        interval_s=round(state.interval_s, 3) or None,
        reason=None if hold is None else hold.reason,
        detail=None if hold is None else _text(hold.detail),
        since=None if hold is None else _moment(hold.since + ahead_s),
        next_probe_at=None if hold is None else _moment(hold.probe_at + ahead_s),
    )


def _folders(storage: Storage, ahead_s: float) -> Iterator[status.Folder]:
    for path, hold in storage.holds.items():
        since, next_try_at = _moment(hold.since + ahead_s), _moment(hold.probe_at + ahead_s)
        yield status.Folder(_text(path), hold.reason, _text(hold.detail), since, next_try_at)


def _under_way(view: View, now: float, ahead_s: float) -> Iterator[status.UnderWay]:
    for key, job in list(view.under_way.items()):
        entry = view.inboxes.table.get(key)
        if entry is None:
            continue
        progress = job.progress
        began, sent = progress.started_at, progress.sent
        spent_s = 0.0 if began is None else now - began
        yield status.UnderWay(
            inbox=_text(key[0]),
            file=_text(key[1]),
            size=entry.size or (job.known.size if job.known else 0),
            step=_step(job),
            since=_moment((job.seen_at if began is None else began) + ahead_s),
            attempt=_attempts(entry) + 1,
            sent=sent,
            bytes_per_s=round(sent / spent_s) if spent_s > 0 and sent else None,
        )


def _step(job: Job) -> str:
    if job.progress.started_at is not None:
        return "uploading"
    known = job.known
    if job.progress.sent or job.task is Task.CONDEMN:
        return "filing"
    if known is None or known.state in (State.WAITING, State.DOUBTED):  # it is read again before it is sent
        return "checking"
    return "looking_up" if known.state in (State.SENDING, State.UNKNOWN) else "filing"


def _waiting(view: View, w: Watched, now: float, ahead_s: float) -> Iterator[status.Waiting]:
    """The files of an inbox in groups by their reason. The table has the oldest first, or nearly so."""
    ready = _reason_when_ready(view, w, now)
    counts: dict[str, int] = {}
    oldest: dict[str, list[Entry]] = {}
    settling, parked, under_way, is_ready = Stage.SETTLING, Stage.PARKED, Stage.UNDER_WAY, Stage.READY
    for entry in view.inboxes.table.names(w.inbox.name).values():
        stage = entry.stage
        if stage is is_ready:
            reason = "looking_up" if entry.unknown_since is not None and entry.resend is None else ready
        elif stage is settling:
            reason = entry.reason or ("settling" if entry.size or not entry.seen else "empty")
        elif stage is parked or stage is under_way:
            continue
        else:
            reason = _reason_of_waiting(entry)
        count = counts.get(reason, 0)
        counts[reason] = count + 1
        if count < status.NAMED:
            oldest.setdefault(reason, []).append(entry)
    for reason, count in counts.items():
        named = tuple(_waiting_file(entry, reason, ahead_s) for entry in oldest[reason])
        yield status.Waiting(_text(w.inbox.name), reason, count, named)


def _reason_when_ready(view: View, w: Watched, now: float) -> str:
    """Why a file that is whole does not go at once; nearly always the same for all of an inbox."""
    if w.refused is not None and now < w.refused_until:
        return "cannot_move"
    inbox = w.inbox
    needed = {str(folder) for folder in (view.config.state_dir, inbox.path, inbox.done, inbox.failed)}
    targets = (service for service in view.services.values() if inbox.name in service.inboxes)
    held = any(service.state.hold is not None for service in targets)
    return "held" if held or needed & view.storage.holds.keys() else "queued"


def _reason_of_waiting(entry: Entry) -> str:
    """Why a file waits that a worker had before."""
    lost = entry.known is not None and entry.known.state in (State.SENDING, State.UNKNOWN)
    if entry.ended is not None and not lost:
        return "retry"
    return entry.reason or ("looking_up" if lost else "retry")


def _waiting_file(entry: Entry, reason: str, ahead_s: float) -> status.WaitingFile:
    detail = entry.detail if entry.reason == reason else None
    if reason == "retry" and entry.ended is not None:
        detail = entry.ended.verdict.detail
    return status.WaitingFile(
        file=_text(entry.name),
        size=entry.size,
        since=_moment(entry.seen_at + ahead_s),
        detail=_maybe(detail),
        attempts=_attempts(entry),
        retry_at=_moment(entry.due_at + ahead_s) if entry.stage is Stage.WAITING else None,
    )


def _attempts(entry: Entry) -> int:
    if entry.ended is not None:
        return entry.ended.attempt if isinstance(entry.ended, Deferred) else entry.ended.known.attempts
    return entry.known.attempts if entry.known is not None else 0


def _totals(all_of_them: tally.Tally) -> status.Totals:
    reasons: Counter[str] = Counter()
    for inbox in all_of_them.inboxes.values():
        reasons.update(inbox.failed)
    sent = sum(inbox.sent_bytes for inbox in all_of_them.inboxes.values())
    return status.Totals(all_of_them.done, all_of_them.failed, sent, dict(reasons))


def _ended(ended: tally.Ended | None) -> status.Ended | None:
    return None if ended is None else status.Ended(_text(ended.inbox), _text(ended.name), _moment(ended.at))

"""The loop: wake, collect what the workers say, look, hand out, sleep until the next thing is due.

One thread owns the table and decides; it blocks on its mailbox only. Workers, the doorbell and signals put one
item into the mailbox and do nothing else here. Whatever the events say, every inbox is looked at regularly:
the folders are the truth, and everything in this process can be rebuilt by looking.
"""

import contextlib
import os
import queue
import signal
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from sfwatch import __version__, arrive, claim, files, settle, systemd, watch
from sfwatch import target as rules
from sfwatch.deliver import deliver, probe
from sfwatch.filing import StorageError, storage
from sfwatch.job import (
    BackInInbox,
    Condemned,
    Crashed,
    Deferred,
    Done,
    Failed,
    Gone,
    Ignored,
    InboxGone,
    Job,
    LookAgain,
    NoStorage,
    NotTaken,
    Outcome,
    Refused,
    Task,
    Tools,
    Undecided,
    Unknown,
)
from sfwatch.journal import Delivery, Journal, State
from sfwatch.logs import EventLog
from sfwatch.service import Service
from sfwatch.settings import Config, RemoteName
from sfwatch.settle import Settled
from sfwatch.table import Entry, Key, Stage, Table
from sfwatch.verdict import Blame, Reason, Verdict, backoff_s, remote_name
from sfwatch.watch import Watched

MAIL_AT_ONCE = 500
DUE_AT_ONCE = 100
"""Bounds on the work of one turn of the loop, so that no backlog keeps it from its mailbox."""

DOUBT = 10
"""How many times `first_retry` a refusal is doubted while nothing was accepted yet.

If the settings are at fault, other files are refused alike within that time.
"""

PRUNE_S = 86400.0
"""How often finished files that are old enough are forgotten."""

OTHERS_ACCEPTED = 3
"""Other files that a target must have accepted before a file that keeps failing is called poison."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker is back."""

    key: Key
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe of a held target came back."""

    target: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Signalled:
    """The process got a signal."""

    number: int


Mail = (
    Finished | Probed | Signalled | arrive.Rang | arrive.FoldersChanged | arrive.Overflowed | arrive.WatchEnded
)
Mailbox = queue.SimpleQueue[Mail]


@dataclass(slots=True)
class StorageHold:
    """A folder that does not take files: nothing that needs it is begun, but for one try at a time."""

    reason: str
    since: float
    pause_s: float
    probe_at: float
    trial: Key | None = None


@dataclass(slots=True)
class Counts:
    """What has become of the files since the start."""

    done: int = 0
    failed: int = 0


@dataclass(slots=True)
class Daemon:
    """The main thread's knowledge, and what it works with. Everything outside is handed in."""

    config: Config
    services: dict[str, Service]
    service_of: Mapping[str, Service]
    journal: Journal
    doorbell: arrive.Doorbell
    mailbox: Mailbox
    pool: Executor
    log: EventLog
    environ: Mapping[str, str]
    clock: Callable[[], float]
    wall: Callable[[], float]
    luck: Callable[[], float]
    abort: Callable[[], None]
    table: Table = field(default_factory=Table)
    watched: dict[str, Watched] = field(default_factory=dict)
    storage: dict[str, StorageHold] = field(default_factory=dict)
    local: deque[Key] = field(default_factory=deque)
    counts: Counts = field(default_factory=Counts)
    started_at: float = 0.0
    ticked_at: float = 0.0
    ready: bool = False
    stop_at: float | None = None
    stop_signal: int | None = None
    leave_at_once: bool = False
    working: int = 0
    probing: int = 0
    drain_until: float | None = None
    prune_at: float = 0.0

    # The loop.

    def start(self) -> None:
        """Make what may be made, and say that it begins."""
        self.started_at = self.clock()
        self.log(
            "daemon.started",
            version=__version__,
            pid=os.getpid(),
            config=self.config.source,
            state_dir=self.config.state_dir,
            inboxes=[inbox.name for inbox in self.config.inboxes],
        )
        self.watched = {inbox.name: watch.watched(inbox) for inbox in self.config.inboxes}
        for inbox in self.config.inboxes:
            for folder in (inbox.path, inbox.done, inbox.failed):
                with contextlib.suppress(OSError):  # a journal that cannot be asked is held at the first file
                    self._make_folder(inbox.name, str(folder))
        with contextlib.suppress(OSError):
            self._tell_orphaned_rows()

    def run(self) -> None:
        """Turn until told to stop, or, when draining, until nothing is left to do."""
        while not self.over():
            self.turn()
        self.log("daemon.stopped", done=self.counts.done, failed=self.counts.failed, waiting=len(self.table))

    def turn(self) -> None:
        """Wait for the next thing to do, and do what is due."""
        self._receive(self._timeout())
        self.tick(self.clock())

    def tick(self, now: float) -> None:
        """Do all that is due at *now*, without waiting for anything."""
        self.ticked_at = now
        if self.stop_at is None:
            self._look_where_due(now)
            self._advance_due(now)
            self._probe_where_due(now)
            self._prune_where_due(now)
            if self.drain_until is None or now < self.drain_until:
                self._hand_out(now)
        elif now >= self.stop_at:
            self.abort()
        if not self.ready and all(w.looked or w.lost for w in self.watched.values()):
            self.ready = True
            self.log("daemon.ready", files=len(self.table), total_s=round(now - self.started_at, 3))
            systemd.notify(self.environ, "READY=1", "STATUS=Watching.")

    def over(self) -> bool:
        """Whether the loop has nothing more to do."""
        if self.leave_at_once:
            return True
        if self.stop_at is not None:
            late = self.clock() >= self.stop_at + 2.0  # time enough to break off and give back
            return late or not self.busy
        return self.drain_until is not None and self.ready and self._drained()

    def _drained(self) -> bool:
        if self.busy:
            return False
        return self.clock() >= (self.drain_until or 0.0) or not self.unfinished()

    def unfinished(self) -> int:
        """Return how many files are neither done, failed nor ignored."""
        return sum(entry.stage is not Stage.PARKED for entry in self.table.entries())

    @property
    def busy(self) -> bool:
        """Whether any worker has a file."""
        return self.working > 0

    def _timeout(self) -> float:
        now = self.clock()
        times = [w.next_look for w in self.watched.values()]
        times += [at for at in (self.table.next_due(), self.stop_at) if at is not None]
        # What was past at the last tick waits for something else to happen: a worker, or a file.
        ahead = [hold.probe_at for hold in self.storage.values()] + [self.drain_until or 0.0]
        ahead += [w.refused_until for w in self.watched.values()]
        times += [at for at in ahead if at > self.ticked_at]
        for service in self.services.values():
            at = rules.next_at(service.state, self.ticked_at)
            if at is not None:
                times.append(at)
        if self.stop_at is not None:
            times = [max(self.stop_at, now + 0.1)]
        return max(0.0, min(times) - now)

    def _receive(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._read(self.mailbox.get(timeout=timeout_s) if timeout_s else self.mailbox.get_nowait())
            for _ in range(MAIL_AT_ONCE):
                self._read(self.mailbox.get_nowait())

    def _read(self, mail: Mail) -> None:
        now = self.clock()
        match mail:
            case Finished():
                self._on_finished(mail.key, mail.outcome, now)
            case Probed():
                self._on_probed(mail, now)
            case Signalled():
                self._on_signal(mail.number, now)
            case arrive.Rang():
                self._on_ring(mail, now)
            case arrive.Overflowed():
                self._on_overflow(mail, now)
            case arrive.FoldersChanged() | arrive.WatchEnded():
                self.watched[mail.inbox].next_look = now

    # Arriving.

    def _on_ring(self, ring: arrive.Rang, now: float) -> None:
        w = self.watched[ring.inbox]
        name = arrive.subject(ring.name, w.inbox)
        if name is None:
            return
        entry = self.table.get((ring.inbox, name))
        if entry is None:
            entry = self.table.add((ring.inbox, name), now)
        if entry.claimed or entry.stage is Stage.UNDER_WAY:
            entry.newcomer = True
        elif entry.stage in (Stage.SETTLING, Stage.PARKED):
            entry.moved_in = ring.moved_in and name == ring.name and not entry.given_back
            if entry.stage is Stage.PARKED or entry.due_at > now:
                self.table.settle(entry, now)

    def _on_overflow(self, mail: arrive.Overflowed, now: float) -> None:
        for w in self.watched.values():
            if mail.inbox in (None, w.inbox.name):
                self.log("inbox.overflowed", inbox=w.inbox.name)
                w.next_look = now
                for entry in self.table.names(w.inbox.name).values():
                    entry.moved_in = False  # an event that would have voided it may be among the lost

    def _note_seen(self, entry: Entry) -> None:
        if not entry.seen:
            entry.seen = True
            self.log("file.seen", inbox=entry.inbox, file=entry.name)

    # Looking.

    def _look_where_due(self, now: float) -> None:
        for w in self.watched.values():
            if now >= w.next_look:
                self._look(w, now)

    def _look(self, w: Watched, now: float) -> None:
        try:
            seen = watch.look(w, self.doorbell)
            if seen.changed:
                self._found(w, now)
            elif w.foreign_told:  # their daemon may have ended meanwhile
                self._adopt(w, now)
        except OSError as error:
            self._lost(w, watch.why_lost(w.inbox.path, error), now)
            return
        except claim.ClaimError as error:
            self._lost(w, (error.reason, error.detail), now)
            return
        except files.NotRegular as odd:
            self._lost(w, ("unsafe", f"a {odd.kind} stands where sfwatch keeps its claims"), now)
            return
        except StorageError as error:
            self._hold_storage(error.folder, error.reason, error.detail, now)
            w.identity = None  # found again at the next look, and only then complete
            w.next_look = now + self.config.poll_interval_s
            return
        self._tell_mode(w, seen)
        self._tell_skipped(w, seen.look)
        self._reconcile(w, seen.look, now)
        w.looked = True
        w.next_look = now + watch.interval_s(w, self.config, rings=seen.refusal is None)

    def _found(self, w: Watched, now: float) -> None:
        """The inbox is there, for the first time or again: adopt what lies claimed in it."""
        with storage(self.config.state_dir):
            self.journal.saw_folder(str(w.inbox.path))
        if w.looked:
            self._forget_files(w)  # those of the folder that was there before have not vanished
        self._drop_lock(w)  # it is on that folder, too
        self._adopt(w, now)
        if w.lost is not None:
            self.log("inbox.found", inbox=w.inbox.name, path=w.inbox.path)
            w.lost = None
        elif w.looked:  # replaced between two looks, without ever having been missing
            detail = f"{w.inbox.path} is another folder now; it is watched from here on"
            self.log("inbox.lost", inbox=w.inbox.name, path=w.inbox.path, reason="replaced", detail=detail)
            self.log("inbox.found", inbox=w.inbox.name, path=w.inbox.path)

    def _lost(self, w: Watched, why: tuple[str, str], now: float) -> None:
        watch.lose(w, self.doorbell)
        w.next_look = now + self.config.poll_interval_s
        w.looked = False
        reason, detail = why
        if w.lost is not None and w.lost[0] == reason:
            return
        w.lost = (reason, detail)
        self.log("inbox.lost", inbox=w.inbox.name, path=w.inbox.path, reason=reason, detail=detail)
        self._forget_files(w)

    def _forget_files(self, w: Watched) -> None:
        """What is in a lost inbox is seen anew when it is back; what could not be written down is kept."""
        for entry in list(self.table.names(w.inbox.name).values()):
            if entry.stage is not Stage.UNDER_WAY and entry.known is None:
                self.table.remove(entry)
                w.claims.discard(entry.name)
        self._unlock(w)

    def _tell_mode(self, w: Watched, seen: watch.Seen) -> None:
        mode = w.mode
        if mode is None:
            return
        effective = mode.mode if seen.refusal is None else "polling"
        detail = seen.refusal or mode.why
        if w.told == detail:
            return
        w.told = detail
        self.log(
            "inbox.watched",
            inbox=w.inbox.name,
            path=w.inbox.path,
            mode=effective,
            fs_type=mode.fs_type,
            interval_s=watch.interval_s(w, self.config, rings=seen.refusal is None),
            trusted=mode.trusted,
            detail=detail,
        )

    def _tell_skipped(self, w: Watched, look: arrive.Look) -> None:
        """Say once which sub-folders are left out."""
        skipped = {(folder, "mount_point") for folder in look.crossed}
        skipped |= {(folder, "unreadable") for folder in look.unreadable}
        for folder, reason in sorted(skipped - w.skipped):
            path = w.inbox.path / folder
            self.log(
                "inbox.skipped", inbox=w.inbox.name, path=path, reason=reason, detail=SKIPPED_DETAIL[reason]
            )
        w.skipped = skipped

    def _reconcile(self, w: Watched, look: arrive.Look, now: float) -> None:
        """Bring the table into line with the folder."""
        known = self.table.names(w.inbox.name)
        present = set(look.names)
        for name in sorted(present - known.keys()):
            self.table.add((w.inbox.name, name), now)
        for name in [name for name in known if name not in present]:
            self._missing(known[name])
        for name, entry in known.items():
            if entry.stage is Stage.PARKED:
                self.table.settle(entry, now)
            elif name in present and (entry.claimed or entry.stage is Stage.UNDER_WAY):
                entry.newcomer = True
                self._tell_namesake(entry)
        if look.others != w.others:
            w.others = look.others
            self.log("inbox.others", inbox=w.inbox.name, others=look.others)

    def _missing(self, entry: Entry) -> None:
        if entry.claimed or entry.stage is Stage.UNDER_WAY:
            return
        if entry.seen and entry.stage is not Stage.PARKED:
            self._vanished(entry)
        self.table.remove(entry)

    def _vanished(self, entry: Entry) -> None:
        detail = "it was taken away before it was uploaded"
        self.log("file.vanished", inbox=entry.inbox, file=entry.name, detail=detail)
        if entry.held_mark is not None:  # it was tried: the journal may know it
            with contextlib.suppress(OSError):  # a row too many does no harm: it speaks of this very file only
                known = self.journal.find(str(self.watched[entry.inbox].inbox.path), entry.name)
                if known is not None and known.state is State.WAITING:
                    self.journal.forget(known)

    # Adopting what a crash, or a lost inbox, left claimed.

    def _adopt(self, w: Watched, now: float) -> None:
        inbox, instance = w.inbox, self.journal.instance
        for folder in (inbox.done, inbox.failed):
            with contextlib.suppress(OSError), files.folder(folder) as fd:
                files.sweep_temporaries(fd)
        if w.lock is None and (claim.claimed(inbox.path, instance) or claim.foreign(inbox.path, instance)):
            w.lock = claim.lock(inbox.path, instance)
        unknown = self._adopt_foreign(w)
        with storage(self.config.state_dir):
            rows = {d.name: d for d in self.journal.under_way() if d.inbox == str(inbox.path)}
        claimed = [name for name in claim.claimed(inbox.path, instance) if self._is_file(w, name, rows)]
        for name in claimed:
            since = unknown.get(name)
            known = rows.pop(name, None) or (self._unheard_of(w, name, since) if since is not None else None)
            self._resume(w, name, known, now, home=w.identity)
        for name, known in rows.items():
            if known.state is not State.WAITING:
                self._resume(w, name, known, now, home=None)
        self._unlock(w)

    def _is_file(self, w: Watched, name: str, rows: Mapping[str, Delivery]) -> bool:
        """Whether a claim is a file's; a lone marker goes back, unless its file has gone ahead."""
        marker = w.inbox.settle_marker
        if marker is None or not name.endswith(marker):
            return True
        instance = self.journal.instance
        file = name.removesuffix(marker)
        known = rows.get(file)
        ahead = known is not None and known.state in (State.ACCEPTED, State.REFUSED)
        if not ahead and file not in claim.claimed(w.inbox.path, instance):
            with contextlib.suppress(OSError):
                claim.give_back(w.inbox.path, instance, name)
        return False

    def _adopt_foreign(self, w: Watched) -> dict[str, float]:
        """Take over the claims of instances that have ended: the names, and since when each was claimed."""
        instance = self.journal.instance
        adopted: dict[str, float] = {}
        for other, names in claim.foreign(w.inbox.path, instance).items():
            former = other in self.journal.former
            try:
                adopted |= claim.adopt_foreign(w.inbox.path, instance, other, former=former)
                w.foreign_told.discard(other)
            except claim.ClaimError as error:
                if other not in w.foreign_told:
                    w.foreign_told.add(other)
                    self.log(
                        "claim.foreign",
                        inbox=w.inbox.name,
                        instance=other,
                        waiting=len(names),
                        detail=error.detail,
                    )
        return adopted

    def _unheard_of(self, w: Watched, name: str, since: float) -> Delivery:
        """A claim of which no journal tells: it may have been sent at any time since it was claimed."""
        fd = claim.open_claimed(w.inbox.path, self.journal.instance, name)
        try:
            st = os.fstat(fd)
        finally:
            files.close(fd)
        return Delivery(
            inbox=str(w.inbox.path),
            name=name,
            state=State.UNKNOWN,
            dev=st.st_dev,
            ino=st.st_ino,
            size=st.st_size,
            mtime_ns=st.st_mtime_ns,
            attempts=1,
            windows=((since, self.wall()),),
        )

    def _resume(
        self, w: Watched, name: str, known: Delivery | None, now: float, *, home: files.Identity | None
    ) -> None:
        """Go on with a file that is under way; `home` is the inbox if its claim lies there."""
        w.claims.add(name)
        entry = self.table.get((w.inbox.name, name))
        if entry is not None and (entry.stage is Stage.UNDER_WAY or entry.known is not None):
            entry.home = home or entry.home
            return
        entry = self.table.add((w.inbox.name, name), now)
        self._note_seen(entry)
        entry.claimed = True
        entry.home = home
        entry.known = known
        entry.lost_at = now if known is not None else None
        self._queue(entry)

    # Settling.

    def _advance_due(self, now: float) -> None:
        for _ in range(DUE_AT_ONCE):
            entry = self.table.pop_due(now)
            if entry is None:
                return
            if entry.stage is Stage.SETTLING:
                self._settle(entry, now)
            else:
                self._queue(entry)

    def _settle(self, entry: Entry, now: float) -> None:
        w = self.watched[entry.inbox]
        if w.lost is not None:
            self.table.remove(entry)
            return
        try:
            sighting = arrive.sight(w.inbox, entry.name, wall=self.wall(), moved_in=entry.moved_in)
        except FileNotFoundError:
            self._not_found(entry, w, now)
            return
        except files.NotRegular as odd:
            self._park(entry, odd.kind)
            return
        self._note_seen(entry)
        if isinstance(sighting, settle.Sighting):
            entry.size = sighting.fingerprint.size
        first = entry.observed is None and not entry.given_back
        at_start = first and entry.seen_at <= self.started_at + 1.0
        entry.observed, decision = settle.observe(entry.observed, sighting, w.rules, now, at_start=at_start)
        if isinstance(decision, Settled):
            self._settled(entry, decision)
            return
        detail = sighting.detail if isinstance(sighting, settle.Unreadable) else None
        self._tell_waiting(entry, decision, now, detail)
        self.table.settle(entry, decision.look_at)

    def _not_found(self, entry: Entry, w: Watched, now: float) -> None:
        """A file is gone only if its inbox is still there: else the next look tells, and it is due at once."""
        if watch.is_still_there(w):
            self._missing(entry)
            return
        w.next_look = now
        self.table.settle(entry, now + self.config.poll_interval_s)

    def _settled(self, entry: Entry, settled: Settled) -> None:
        entry.settled = settled
        entry.observed = None
        entry.reason = None
        self.log(
            "file.settled",
            inbox=entry.inbox,
            file=entry.name,
            size=entry.size,
            settled_by=settled.by,
            waited_s=round(settled.waited_s, 3),
        )
        self._queue(entry)

    def _tell_waiting(self, entry: Entry, waiting: settle.Waiting, now: float, detail: str | None) -> None:
        if waiting.reason is not None:
            self._tell(entry, waiting.reason, detail)
        if waiting.stuck:
            self.log(
                "file.stuck",
                inbox=entry.inbox,
                file=entry.name,
                size=entry.size,
                reason="being_written",
                detail="a process has had it open for writing all the time",
                waited_s=round(now - entry.seen_at, 3),
            )

    def _tell(self, entry: Entry, reason: str, detail: str | None) -> None:
        """Say why a file waits, once for each change of the reason."""
        if entry.reason != reason:
            entry.reason = reason
            self.log(
                "file.waiting",
                inbox=entry.inbox,
                file=entry.name,
                size=entry.size,
                reason=reason,
                detail=detail or WAITING_DETAIL.get(reason),
            )

    def _tell_namesake(self, entry: Entry) -> None:
        """Say once that a newcomer waits; a file that is only just being claimed is no newcomer."""
        if entry.stage is not Stage.UNDER_WAY and not entry.namesake_told:
            entry.namesake_told = True
            detail = "an earlier file of its name is still under way"
            self.log("file.waiting", inbox=entry.inbox, file=entry.name, reason="namesake", detail=detail)

    def _park(self, entry: Entry, kind: str) -> None:
        entry.stage = Stage.PARKED
        entry.observed = None
        entry.seen = False
        if entry.reason != kind:
            entry.reason = kind
            detail = f"it is a {kind}, not a regular file: it is neither opened nor followed"
            self.log("file.ignored", inbox=entry.inbox, file=entry.name, reason=kind, detail=detail)

    # Handing out.

    def _queue(self, entry: Entry) -> None:
        """Put a file where the next worker finds it: those that need nothing of the service go ahead."""
        if not entry.claimed and entry.settled is None:
            # A crash left it claimed, and it went back since: nothing is known of it as it lies there.
            entry.task = Task.DELIVER
            self.table.settle(entry, self.clock())
        elif _needs_service(entry):
            self.table.ready(entry)
        else:
            entry.stage = Stage.READY
            self.local.append(entry.key)

    def _hand_out(self, now: float) -> None:
        for _ in range(len(self.local)):
            entry = self.table.get(self.local.popleft())
            if entry is None or entry.stage is not Stage.READY or self._is_away(entry, now):
                continue
            if self._locked(self.watched[entry.inbox], entry, now) and self._storage_ready(entry, now):
                self._submit(entry, now)
            else:
                self.local.append(entry.key)
        for service in self.services.values():
            while self._hand_out_next(service, now):
                pass

    def _hand_out_next(self, service: Service, now: float) -> bool:
        """Start the next file of this service; its inboxes take turns."""
        for _ in range(len(service.inboxes)):
            inbox = service.inboxes[0]
            service.inboxes.rotate(-1)
            w = self.watched[inbox]
            if w.lost is not None or now < w.refused_until or not service.room_for(inbox, now):
                continue
            entry = self._next_of(service, inbox)
            if entry is None or self._is_away(entry, now):
                continue
            if not self._locked(w, entry, now) or not self._storage_ready(entry, now):
                self.table.ready(entry)
                continue
            self._submit(entry, now)
            return True
        return False

    def _is_away(self, entry: Entry, now: float) -> bool:
        """Put a file off whose claim lies in an inbox that is not there now.

        Another folder may be in its place, a bare mount point perhaps: what is not in that one is not gone.
        """
        w = self.watched[entry.inbox]
        away = entry.claimed and (w.lost is not None or entry.home not in (None, w.identity))
        if away:
            self.table.wait(entry, now + self.config.poll_interval_s)
        return away

    def _next_of(self, service: Service, inbox: str) -> Entry | None:
        if service.state.hold is not None:
            return self._trial_of(service, inbox)
        while (entry := self.table.pop_ready(inbox)) is not None:
            if not service.blocks(entry.key, self._remote_name(entry)):
                return entry
        return None

    def _trial_of(self, service: Service, inbox: str) -> Entry | None:
        """The smallest file that waits and has not been the trial of this hold yet."""
        waiting = [e for e in self.table.names(inbox).values() if e.stage is Stage.READY and _needs_service(e)]
        untried = [e for e in waiting if rules.may_try(service.state, e.key)]
        if waiting and not untried:
            service.state = rules.forget_tried(service.state)
        return min(untried or waiting, key=lambda e: (e.size, e.seen_at, e.name), default=None)

    def _remote_name(self, entry: Entry) -> str | None:
        if self.config.uploads.remote_name is RemoteName.TAGGED:
            return None
        return remote_name(entry.name, tag=None)

    def _submit(self, entry: Entry, now: float) -> None:
        w = self.watched[entry.inbox]
        service = self.service_of[entry.inbox]
        if _needs_service(entry):
            service.start(entry.key, self._remote_name(entry), now)
        entry.stage = Stage.UNDER_WAY
        entry.home = entry.home if entry.claimed else w.identity
        w.claims.add(entry.name)
        job = Job(
            task=entry.task,
            inbox=w.inbox,
            name=entry.name,
            seen_at=entry.seen_at,
            settled=None if entry.claimed else entry.settled,
            known=entry.known,
            looked_s=now - entry.lost_at if entry.lost_at is not None else 0.0,
            held_s=service.held_s(now) - entry.held_mark if entry.held_mark is not None else 0.0,
            condemned=entry.condemned,
            insist=entry.insist,
        )
        self.working += 1
        self.pool.submit(work, job, service.tools, entry.key, self.mailbox.put)

    def _locked(self, w: Watched, entry: Entry, now: float) -> bool:
        """Show other instances that our claims are alive, for as long as there are any.

        An inbox that does not even let us do that is tried again later, once for all its files.
        """
        if w.lock is not None:
            return True
        if now < w.refused_until:
            return False
        try:
            w.lock = claim.lock(w.inbox.path, self.journal.instance)
        except (OSError, claim.ClaimError) as error:
            w.refused_until = now + self.config.poll_interval_s
            if w.refused != str(error):
                w.refused = str(error)
                self._tell(entry, "cannot_move", str(error))
            return False
        w.refused = None
        return True

    def _unlock(self, w: Watched) -> None:
        if not w.claims:
            self._drop_lock(w)

    def _drop_lock(self, w: Watched) -> None:
        if w.lock is not None:
            files.close(w.lock)
            w.lock = None

    # What came of it.

    def _on_finished(self, key: Key, outcome: Outcome, now: float) -> None:
        self.working -= 1
        entry = self.table.get(key)
        service = self.service_of[key[0]]
        went_out = key in service.under_way
        for blocked in service.end(key):
            other = self.table.get(blocked)
            if other is not None and other.stage is Stage.READY:
                self.table.ready(other)
        if entry is None:
            return
        self._end_storage_trial(key, outcome, now)
        entry.task = Task.DELIVER
        if went_out:
            self._tell_target(service, entry, outcome, now)
        self._after(service, entry, outcome, now)
        if isinstance(outcome, Done | Failed | Gone):
            service.state = rules.forgotten(service.state, entry.key)
        w = self.watched[entry.inbox]
        if not entry.claimed and entry.stage is not Stage.UNDER_WAY:
            w.claims.discard(entry.name)
            self._unlock(w)

    def _tell_target(self, service: Service, entry: Entry, outcome: Outcome, now: float) -> None:
        """What an outcome says of the target, whatever becomes of the file."""
        state, luck = service.state, self.luck()
        match outcome:
            case Done(recovered=False):  # one that was found in a listing proves nothing of now
                state = rules.after_accepted(state, entry.key, now)
            case NoStorage(known=known) if known is not None and known.state is State.ACCEPTED:
                state = rules.after_accepted(state, entry.key, now)
            case Deferred(verdict=v) if v.blame is Blame.ACCOUNT:
                file = None if v.reason == "no_key" and state.hold is None else entry.key
                state = rules.after_account_fault(state, file, v.reason, v.detail, now, luck)
            case Deferred(verdict=v) if v.reason != Reason.ABORTED:
                state = rules.after_not_now(
                    state,
                    entry.key,
                    v.reason,
                    v.detail,
                    now,
                    luck,
                    unreachable=v.unreachable,
                    slows=v.slows_target,
                    retry_after_s=v.retry_after_s,
                )
            case Unknown(verdict=v):
                state = rules.after_unknown(state, entry.key, v.reason, v.detail, now, luck)
            case Refused(verdict=v):
                state = rules.after_refused(state, entry.key, _alike(v), now, luck)
            case _:
                state = rules.after_other(state, entry.key, now)
        service.change(state, now, waiting=self._waiting(service))

    def _waiting(self, service: Service) -> int:
        return sum(len(self.table.names(inbox)) for inbox in service.inboxes)

    def _after(  # noqa: C901, PLR0912 - one line for each outcome
        self, service: Service, entry: Entry, outcome: Outcome, now: float
    ) -> None:
        match outcome:
            case Done():
                self.counts.done += 1
                self._leave(entry, now)
            case Failed():
                self.counts.failed += 1
                self._leave(entry, now)
            case Gone():
                self._vanished(entry)
                self._leave(entry, now)
            case BackInInbox():
                self._leave(entry, now, given_back=True)
            case Ignored():
                entry.claimed = False
                self._park(entry, outcome.kind)
            case NotTaken():
                self._not_taken(entry, outcome, now)
            case Deferred():
                self._deferred(service, entry, outcome, now)
            case Refused():
                self._refused(service, entry, outcome, now)
            case Unknown():
                self._unknown(service, entry, outcome, now)
            case LookAgain():
                self._look_again(entry, outcome, now)
            case Undecided():
                self._undecided(service, entry, outcome, now)
            case NoStorage():
                self._no_storage(entry, outcome, now)
            case InboxGone():
                self._inbox_gone(entry, outcome, now)
            case Crashed():
                self._crashed(entry, outcome, now)

    def _leave(self, entry: Entry, now: float, *, given_back: bool = False) -> None:
        """The file is no longer under way; whoever came under its name meanwhile is looked at next.

        It may have been nobody: the ring of our own giving back, or a look before the file was claimed.
        """
        self.table.remove(entry)
        if given_back or entry.newcomer:
            fresh = self.table.add(entry.key, now)
            fresh.given_back = fresh.seen = given_back
        entry.claimed = False
        entry.stage = Stage.PARKED

    def _not_taken(self, entry: Entry, outcome: NotTaken, now: float) -> None:
        self._tell(entry, outcome.reason, outcome.detail)
        entry.looks += 1
        entry.claimed = outcome.claimed
        entry.known = None  # the journal's word counts
        if (
            outcome.claimed and outcome.reason != "namesake"
        ):  # then it goes on from the claim: the name is taken
            entry.task = Task.GIVE_BACK
        self.table.wait(entry, now + self._pause_s(entry.looks, None))

    def _pause_s(self, failures: int, retry_after_s: float | None) -> float:
        uploads = self.config.uploads
        return backoff_s(
            failures,
            first_s=uploads.first_retry_s,
            longest_s=uploads.longest_retry_s,
            luck=self.luck(),
            retry_after_s=retry_after_s,
        )

    def _deferred(self, service: Service, entry: Entry, outcome: Deferred, now: float) -> None:
        verdict = outcome.verdict
        entry.claimed = outcome.claimed
        entry.known = outcome.known
        entry.given_back = True
        if verdict.reason != "no_key":  # then nothing was tried
            entry.held_mark = service.held_s(now)
        account = verdict.blame is Blame.ACCOUNT and entry.key not in service.state.charged
        if account or self.stop_at is not None:
            self._queue(entry)  # the hold stands in its way, or the end of the process
            return
        if verdict.reason == Reason.ABORTED:  # broken off by ourselves, since it could not be read on
            entry.looks += 1
            self.table.wait(entry, now + self._pause_s(entry.looks, None))
            return
        entry.failures += 1
        if entry.accepted_mark is None:
            entry.accepted_mark = service.state.accepted
        condemned = self._given_up(service, entry, outcome)
        if condemned is not None:
            self._condemn(entry, condemned)
            return
        retry_in_s = self._pause_s(entry.failures, verdict.retry_after_s)
        self._say_outcome("upload.deferred", service, entry, verdict, outcome.attempt, retry_in_s)
        self.table.wait(entry, now + retry_in_s)

    def _given_up(self, service: Service, entry: Entry, outcome: Deferred) -> Condemned | None:
        """Whether a file that keeps failing is at fault itself, or has used up its time."""
        uploads = self.config.uploads
        if outcome.known is not None and outcome.known.state is State.UNKNOWN:
            return None  # the service may have it
        others = service.state.accepted - (entry.accepted_mark or 0)
        # Only tries that failed "not now" count: what the account suffered from is not the file's.
        if uploads.poison_after and entry.failures >= uploads.poison_after and others >= OTHERS_ACCEPTED:
            detail = (
                f"it failed {entry.failures} times while the service accepted {others} other files;"
                f" the last time: {outcome.verdict.detail}"
            )
            return Condemned("keeps_failing", detail, outcome.verdict)
        if uploads.give_up_after_s is None or outcome.first_attempt_at is None:
            return None
        spent_s = self.wall() - outcome.first_attempt_at - outcome.held_s
        if spent_s < uploads.give_up_after_s:
            return None
        detail = f"it could not be uploaded in {round(spent_s)} s; the last time: {outcome.verdict.detail}"
        return Condemned("gave_up", detail, outcome.verdict)

    def _say_outcome(
        self, event: str, service: Service, entry: Entry, verdict: Verdict, attempt: int, retry_in_s: float
    ) -> None:
        said: dict[str, Any] = {"code": verdict.code} if event == "upload.deferred" else {}
        service.tools.log(
            event,
            inbox=entry.inbox,
            file=entry.name,
            size=entry.size,
            attempt=attempt,
            reason=verdict.reason,
            http_status=verdict.http_status,
            detail=verdict.detail,
            trace_id=verdict.trace_id,
            retry_in_s=round(retry_in_s, 3),
            **said,
        )

    def _refused(self, service: Service, entry: Entry, outcome: Refused, now: float) -> None:
        """The service refuses this file: its own fault, unless it refuses every file alike."""
        entry.claimed = True
        entry.known = outcome.known  # not as before this attempt: a lost upload would be sent again for ever
        verdict = outcome.verdict
        condemned = Condemned("refused", verdict.detail, verdict)
        if rules.refuses_all(service.state, _alike(verdict)):
            for other in [entry, *self._doubted(service)]:
                other.task = Task.GIVE_BACK
                self._queue(other)
        elif service.state.accepted:
            self._condemn(entry, condemned)
        else:
            entry.task = Task.CONDEMN
            entry.condemned = condemned
            self.table.wait(entry, now + DOUBT * self.config.uploads.first_retry_s)

    def _doubted(self, service: Service) -> list[Entry]:
        """Files whose refusal is not believed yet."""
        entries = [entry for inbox in service.inboxes for entry in self.table.names(inbox).values()]
        return [entry for entry in entries if entry.stage is Stage.WAITING and entry.task is Task.CONDEMN]

    def _condemn(self, entry: Entry, condemned: Condemned) -> None:
        entry.task = Task.CONDEMN
        entry.condemned = condemned
        self._queue(entry)

    def _unknown(self, service: Service, entry: Entry, outcome: Unknown, now: float) -> None:
        entry.claimed = True
        entry.known = outcome.known
        entry.lost_at = now
        entry.looks = 1
        entry.failures += 1
        retry_in_s = self._pause_s(entry.failures, outcome.verdict.retry_after_s)
        self._say_outcome("upload.unknown", service, entry, outcome.verdict, outcome.known.attempts, retry_in_s)
        self.table.wait(entry, now + retry_in_s)

    def _look_again(self, entry: Entry, outcome: LookAgain, now: float) -> None:
        """Look more and more seldom, and once when the time for looking is over."""
        entry.claimed = True
        entry.known = outcome.known
        entry.looks += 1
        entry.lost_at = now if entry.lost_at is None else entry.lost_at
        over_at = entry.lost_at + self.config.uploads.reconcile_window_s + 0.01  # floats may fall short of it
        at = now + self._pause_s(entry.looks, None)
        self.table.wait(entry, min(at, over_at) if now < over_at else at)

    def _undecided(self, service: Service, entry: Entry, outcome: Undecided, now: float) -> None:
        entry.claimed = True
        entry.known = outcome.known
        entry.insist = False
        retry_in_s = self.config.uploads.longest_retry_s
        if entry.reason != "unknown_outcome":
            entry.reason = "unknown_outcome"
            service.tools.log(
                "upload.undecided",
                inbox=entry.inbox,
                file=entry.name,
                size=outcome.known.size,
                attempt=outcome.known.attempts,
                reason=outcome.reason,
                detail=outcome.detail,
                candidates=list(outcome.candidates) or None,
                retry_in_s=retry_in_s,
            )
        self.table.wait(entry, now + retry_in_s)

    def _inbox_gone(self, entry: Entry, outcome: InboxGone, now: float) -> None:
        entry.known = outcome.known or entry.known
        entry.claimed = entry.claimed or entry.known is not None
        self.watched[entry.inbox].next_look = now
        self.table.wait(entry, now + self.config.poll_interval_s)

    def _crashed(self, entry: Entry, outcome: Crashed, now: float) -> None:
        self.log(
            "internal.error",
            inbox=entry.inbox,
            file=entry.name,
            detail=outcome.detail,
            traceback=outcome.traceback,
        )
        w = self.watched[entry.inbox]
        with contextlib.suppress(OSError, claim.ClaimError):
            entry.claimed = entry.name in claim.claimed(w.inbox.path, self.journal.instance)
        self.table.wait(entry, now + self.config.uploads.longest_retry_s)

    # Folders that do not take files.

    def _no_storage(self, entry: Entry, outcome: NoStorage, now: float) -> None:
        entry.claimed = outcome.claimed
        entry.known = outcome.known  # None: the journal's word counts
        self._queue(entry)
        hold = self.storage.get(outcome.folder)
        if hold is None:
            self._hold_storage(outcome.folder, outcome.reason, outcome.detail, now)
        elif hold.trial == entry.key:  # stragglers of before the hold do not lengthen it
            self._pause_storage(hold, now)

    def _hold_storage(self, folder: str, reason: str, detail: str, now: float) -> None:
        if folder in self.storage:
            return
        hold = self.storage[folder] = StorageHold(reason, now, 0.0, now)
        self._pause_storage(hold, now)
        self.log(
            "storage.held",
            path=folder,
            reason=reason,
            detail=detail,
            waiting=sum(self._needs(entry, folder) for entry in self.table.entries()),
            probe_in_s=round(hold.pause_s, 3),
        )

    def _pause_storage(self, hold: StorageHold, now: float) -> None:
        uploads = self.config.uploads
        hold.trial = None
        hold.pause_s = min(max(uploads.first_retry_s, hold.pause_s * 2), uploads.longest_retry_s)
        hold.probe_at = now + hold.pause_s

    def _needs(self, entry: Entry, folder: str) -> bool:
        inbox = self.watched[entry.inbox].inbox
        needs = {str(self.config.state_dir), str(inbox.path)}
        if not _is_refused(entry):
            needs.add(str(inbox.done))
        if _is_refused(entry) or _needs_service(entry):
            needs.add(str(inbox.failed))
        return folder in needs

    def _storage_ready(self, entry: Entry, now: float) -> bool:
        """Whether every folder that this file needs takes files, or it may be the one to try."""
        holds = [hold for folder, hold in self.storage.items() if self._needs(entry, folder)]
        if any(hold.trial is not None or now < hold.probe_at for hold in holds):
            return False
        for hold in holds:
            hold.trial = entry.key
        return True

    def _end_storage_trial(self, key: Key, outcome: Outcome, now: float) -> None:
        """A try that came past the folder ends its hold; one that ended before it proves nothing."""
        for folder, hold in list(self.storage.items()):
            if hold.trial != key or (isinstance(outcome, NoStorage) and outcome.folder == folder):
                continue
            hold.trial = None
            hold.probe_at = now + hold.pause_s
            if _proves_storage(outcome):
                del self.storage[folder]
                waiting = sum(self._needs(e, folder) for e in self.table.entries())
                held_s = round(now - hold.since, 3)
                self.log("storage.resumed", path=folder, reason=hold.reason, waiting=waiting, held_s=held_s)

    def _prune_where_due(self, now: float) -> None:
        if now < self.prune_at:
            return
        self.prune_at = now + PRUNE_S
        with contextlib.suppress(OSError):  # a disk that is full is said where a file needs it
            self.journal.prune(self.wall() - self.config.history_days * 86400)

    # Probing held targets.

    def _probe_where_due(self, now: float) -> None:
        for service in self.services.values():
            if rules.wants_probe(service.state, now):
                service.state = rules.probing(service.state)
                inbox = self.watched[service.inboxes[0]].inbox
                self.probing += 1
                self.pool.submit(ask, service.tools, inbox, self.mailbox.put)

    def _on_probed(self, mail: Probed, now: float) -> None:
        self.probing -= 1
        service = self.services[mail.target]
        verdict = mail.verdict
        state = rules.after_probe(
            service.state,
            passed=verdict.blame is Blame.ACCEPTED,
            reason=verdict.reason,
            detail=verdict.detail,
            now=now,
            luck=self.luck(),
            retry_after_s=verdict.retry_after_s,
        )
        service.change(state, now, waiting=self._waiting(service))

    # Stopping, folders.

    def _on_signal(self, number: int, now: float) -> None:
        if number == signal.SIGUSR1:
            for w in self.watched.values():
                w.next_look = now
            return
        if self.stop_at is not None:
            self.leave_at_once = True
            return
        self.stop_at = now + self.config.stop_grace_s
        self.stop_signal = number
        systemd.notify(self.environ, "STOPPING=1")
        self.log(
            "daemon.stopping",
            signal=signal.Signals(number).name,
            under_way=self.working,
            grace_s=self.config.stop_grace_s,
        )

    def _make_folder(self, inbox: str, path: str) -> None:
        """Make a folder that was never there; a known one that is missing is lost, not new."""
        if os.path.isdir(path):  # noqa: PTH112
            self.journal.saw_folder(path)
            return
        if self.journal.folder_seen(path):
            return
        with contextlib.suppress(OSError):
            os.mkdir(path, 0o770)  # noqa: PTH102 - its parent must be there: it may be a mount point
            self.journal.saw_folder(path)
            self.log("folder.created", inbox=inbox, path=path)

    def _tell_orphaned_rows(self) -> None:
        paths = {str(inbox.path) for inbox in self.config.inboxes}
        orphaned: dict[str, int] = {}
        for known in self.journal.under_way():
            if known.inbox not in paths:
                orphaned[known.inbox] = orphaned.get(known.inbox, 0) + 1
        for path, waiting in orphaned.items():
            detail = "files of this inbox are still under way, but it is not in the configuration any more"
            self.log("journal.orphaned", path=path, waiting=waiting, detail=detail)


WAITING_DETAIL = {
    "empty": "it is empty: it is taken once something is in it",
    "being_written": "a process has it open for writing",
    "incomplete": "its last line is not whole JSON: it is taken if nothing more comes",
    "hole": "space was reserved for it that is not filled yet",
    "no_marker": "it is taken as soon as its marker is there",
}


SKIPPED_DETAIL = {
    "mount_point": "something is mounted there: name it as an inbox of its own",
    "unreadable": "it may not be read by this user: give it r and x there",
}


def _needs_service(entry: Entry) -> bool:
    known = entry.known
    answered = known is not None and (known.finished_at or known.state in (State.ACCEPTED, State.REFUSED))
    return entry.task is Task.DELIVER and not answered


def _is_refused(entry: Entry) -> bool:
    known = entry.known
    return entry.task is Task.CONDEMN or (known is not None and known.state is State.REFUSED)


def _proves_storage(outcome: Outcome) -> bool:
    """Whether every folder that the file needs was written to, or at least seen to have room."""
    match outcome:
        case Done() | Failed() | Refused() | Unknown():
            return True
        case Deferred(verdict=verdict):
            return verdict.reason != "no_key"
        case _:
            return False


def _alike(verdict: Verdict) -> str:
    return f"HTTP {verdict.http_status}, code {verdict.code}"


# What runs in a worker's thread: the one border at which a bug becomes an event.


def work(job: Job, tools: Tools, key: Key, put: Callable[[Finished], None]) -> None:
    """Do one job, and put its outcome into the mailbox whatever happens."""
    tools = replace(tools, log=tools.log.bind(inbox=job.inbox.name, file=job.name))
    try:
        outcome = deliver(job, tools)
    except Exception as bug:  # noqa: BLE001 - said as internal.error by the main thread
        outcome = Crashed(f"{type(bug).__name__}: {bug}", _traceback(bug))
    put(Finished(key, outcome))


def ask(tools: Tools, inbox: Any, put: Callable[[Probed], None]) -> None:
    """Probe a held target, and put the answer into the mailbox whatever happens."""
    try:
        verdict = probe(inbox, tools)
    except Exception as bug:  # noqa: BLE001
        tools.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=_traceback(bug))
        verdict = Verdict(Blame.NOT_NOW, "internal_error", "the probe itself failed")
    put(Probed(tools.target, verdict))


def _traceback(bug: Exception) -> str:
    """Where it happened; no values of variables, which may be secret."""
    return "".join(traceback.format_exception(bug, limit=20))

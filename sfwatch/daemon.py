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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from sfwatch import __version__, arrive, claim, retry, systemd, watch
from sfwatch import target as rules
from sfwatch.deliver import deliver
from sfwatch.inboxes import Inboxes
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
from sfwatch.journal import Journal, JournalDamagedError, State
from sfwatch.key import renewal
from sfwatch.logs import EventLog
from sfwatch.lost import probe
from sfwatch.service import Plan, Service, begin
from sfwatch.settings import Api, Config, RemoteName
from sfwatch.snapshot import Publisher, View
from sfwatch.storage import Storage
from sfwatch.table import Entry, Key, Stage, Table
from sfwatch.tally import Tally
from sfwatch.verdict import Blame, Reason, Verdict, backoff_s, remote_name

MAIL_AT_ONCE = 5000
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


@dataclass(frozen=True, slots=True)
class Fresh:
    """A configuration that was read anew and found sound. `needs_restart`: keys whose change waits for that."""

    config: Config
    plans: tuple[Plan, ...]
    pool: Executor
    needs_restart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A configuration that was read anew and can't be used."""

    problems: tuple[str, ...]


Mail = (
    Finished
    | JournalDamagedError
    | Probed
    | Signalled
    | arrive.Rang
    | arrive.FoldersChanged
    | arrive.Overflowed
    | arrive.WatchEnded
    | arrive.Broken
)
Mailbox = queue.SimpleQueue[Mail]


@dataclass(slots=True)
class Daemon:
    """The main thread's knowledge, and what it works with. Everything outside is handed in."""

    config: Config
    plans: InitVar[Iterable[Plan]]
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
    reread: Callable[[], Fresh | Rejected] | None = None
    services: dict[str, Service] = field(default_factory=dict)
    service_of: dict[str, Service] = field(default_factory=dict)
    target_of: dict[str, str] = field(default_factory=dict)
    table: Table = field(default_factory=Table)
    inboxes: Inboxes = field(init=False)
    storage: Storage = field(init=False)
    publisher: Publisher = field(init=False)
    lifeline: systemd.Lifeline = field(init=False)
    local: deque[Key] = field(default_factory=deque)
    counts: Tally = field(default_factory=Tally)
    started_at: float = 0.0
    ticked_at: float = 0.0
    ready: bool = False
    stop_at: float | None = None
    stop_signal: int | None = None
    leave_at_once: bool = False
    under_way: dict[Key, Job] = field(default_factory=dict)
    overdue: set[Key] = field(default_factory=set)
    probing: int = 0
    drain_until: float | None = None
    prune_at: float = 0.0
    wishes_at: float = 0.0

    def __post_init__(self, plans: Iterable[Plan]) -> None:
        """Join the parts that share the table."""
        for plan in plans:
            service = self.services[plan.tools.target] = begin(plan.tools, plan.inboxes)
            self.service_of.update(dict.fromkeys(plan.inboxes, service))
        self.lifeline = systemd.Lifeline(self.environ)
        self.publisher = Publisher(self.log, self.environ, self.clock, self.wall)
        self.storage = Storage(self.log, self.config.uploads, self._needing)
        self.inboxes = Inboxes(
            config=self.config,
            table=self.table,
            storage=self.storage,
            journal=self.journal,
            doorbell=self.doorbell,
            log=self.log,
            clock=self.clock,
            wall=self.wall,
            queue=self._queue,
        )

    # The loop.

    def start(self) -> None:
        """Make what may be made, and say that it begins."""
        self.started_at = self.clock()
        names = [inbox.name for inbox in self.config.inboxes]
        self.log(
            "daemon.started",
            version=__version__,
            pid=os.getpid(),
            config=self.config.source,
            state_dir=self.config.state_dir,
            inboxes=names,
        )
        self.log("config.loaded", config=self.config.source, inboxes=names)
        self.inboxes.start(self.started_at)

    def run(self) -> None:
        """Turn until told to stop, or, when draining, until nothing is left to do."""
        while not self.over():
            self.turn()
        if self.drain_until is not None:
            self.inboxes.tell_unfinished()
        self.publisher.publish(self._view(ended=True), self.clock(), at_once=True)
        waiting = self.unfinished()
        self.log("daemon.stopped", done=self.counts.done, failed=self.counts.failed, waiting=waiting)

    def turn(self) -> None:
        """Wait for the next thing to do, and do what is due."""
        self._receive(self._timeout())
        self.tick(self.clock())

    def tick(self, now: float) -> None:
        """Do all that is due at *now*, without waiting for anything."""
        self.ticked_at = now
        if self.stop_at is None:
            self._let_go_where_done(now)
            self.inboxes.look_where_due(now)
            self._advance_due(now)
            self._probe_where_due(now)
            self._grant_wishes_where_due(now)
            self._prune_where_due(now)
            if self.drain_until is None or now < self.drain_until:
                self._hand_out(now)
        elif now >= self.stop_at:
            self.abort()
        if not self.ready and all(w.looked or w.lost for w in self.inboxes.watched.values()):
            self.ready = True
            self.log("daemon.ready", files=len(self.table), total_s=round(now - self.started_at, 3))
            systemd.notify(self.environ, "READY=1")
        self._tell_systemd(now)
        self.publisher.publish(self._view(), now)

    def _view(self, *, ended: bool = False) -> View:
        """What the status and the metrics are made from."""
        running = "stopping" if self.stop_at is not None else "running" if self.ready else "starting"
        return View(
            state="stopped" if ended else running,
            config=self.config,
            services=self.services,
            inboxes=self.inboxes,
            storage=self.storage,
            under_way=self.under_way,
            tally=self.counts,
            started_at=self.started_at,
        )

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
        return bool(self.under_way)

    def _timeout(self) -> float:
        now = self.clock()
        times = [w.next_look for w in self.inboxes.watched.values()]
        due = (self.table.next_due(), self.stop_at, self.publisher.due_at, self.lifeline.next_at())
        times += [at for at in due if at is not None]
        # What was past at the last tick waits for something else to happen: a worker, or a file.
        ahead = [*self.storage.due(), self.drain_until or 0.0]
        ahead += [w.refused_until for w in self.inboxes.watched.values()]
        times += [at for at in ahead if at > self.ticked_at]
        for service in self.services.values():
            at = rules.next_at(service.state, self.ticked_at)
            if at is not None:
                times.append(at)
        if self.stop_at is not None:
            times = [max(at, now + 0.1) for at in (self.stop_at, self.publisher.due_at) if at is not None]
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
                self.inboxes.rang(mail, now)
            case JournalDamagedError():
                raise mail  # nothing can be done without it: a restart sets it aside
            case arrive.Overflowed():
                self.inboxes.overflowed(mail.inbox, now)
            case arrive.Broken():
                self._on_broken(mail.bug, now)
            case arrive.FoldersChanged() | arrive.WatchEnded():
                self.inboxes.look_at(mail.inbox, now)

    def _on_broken(self, bug: Exception, now: float) -> None:
        """The doorbell's thread has ended: the next look begins another, and finds what did not ring."""
        self.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=_traceback(bug))
        for inbox in self.inboxes.watched:
            self.inboxes.overflowed(inbox, now)

    # What is due.

    def _advance_due(self, now: float) -> None:
        for _ in range(DUE_AT_ONCE):
            entry = self.table.pop_due(now)
            if entry is None:
                return
            if entry.stage is Stage.SETTLING:
                # Not `now`: the look before it may have taken long, and rest counts from when it was seen.
                self.inboxes.consider(entry, self.clock())
            else:
                self._queue(entry)

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
            if self.inboxes.locked(self.inboxes.watched[entry.inbox], entry, now) and self.storage.ready(
                self._folders(entry), entry.key, now
            ):
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
            w = self.inboxes.watched[inbox]
            if w.lost is not None or now < w.refused_until or not service.room_for(inbox, now):
                continue
            entry = self._next_of(service, inbox)
            if entry is None or self._is_away(entry, now):
                continue
            if not self.inboxes.locked(w, entry, now) or not self.storage.ready(
                self._folders(entry), entry.key, now
            ):
                if service.state.hold is None:  # a trial has kept its place
                    self.table.ready(entry)
                continue
            self._submit(entry, now)
            return True
        return False

    def _is_away(self, entry: Entry, now: float) -> bool:
        """Put a file off whose claim lies in an inbox that is not there now.

        Another folder may be in its place, a bare mount point perhaps: what is not in that one is not gone.
        """
        w = self.inboxes.watched[entry.inbox]
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
        w = self.inboxes.watched[entry.inbox]
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
            held_s=max(0.0, service.held_s(now) - entry.held_mark) if entry.held_mark is not None else 0.0,
            condemned=entry.condemned,
            insist=entry.insist,
            home=entry.home,
        )
        self.under_way[entry.key] = job
        self.pool.submit(work, job, service.tools, entry.key, self.mailbox.put)

    # What came of it.

    def _on_finished(self, key: Key, outcome: Outcome, now: float) -> None:
        del self.under_way[key]
        entry = self.table.get(key)
        sent_to = next((it for it in self.services.values() if key in it.under_way), None)
        service = sent_to or self.service_of[key[0]]  # its inbox may go to another target by now
        for blocked in service.end(key, settled=_is_settled(outcome)):
            other = self.table.get(blocked)
            if other is not None and other.stage is Stage.READY:
                self.table.ready(other)
        if entry is None:
            return
        refused = outcome.folder if isinstance(outcome, NoStorage) else None
        self.storage.end_trial(key, now, proved=_proves_storage(outcome), refused=refused)
        entry.task = Task.DELIVER
        if sent_to is not None:
            self._tell_target(service, entry, outcome, now)
        self._after(service, entry, outcome, now)
        if isinstance(outcome, Done | Failed | Gone):
            service.state = rules.forgotten(service.state, entry.key)
        w = self.inboxes.watched[entry.inbox]
        if not entry.claimed and entry.stage is not Stage.UNDER_WAY:
            w.claims.discard(entry.name)
            self.inboxes.unlock(w)
        if w.leaving:
            self.inboxes.forget_unclaimed(w)

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
                api = self.inboxes.watched[entry.inbox].inbox.api
                detail = _with_renewal(v, api).detail
                state = rules.after_account_fault(state, file, v.reason, detail, now, luck)
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
                self._note_done(entry, outcome, now)
                self._leave(entry, now)
            case Failed():
                self.counts.note_failed(entry.inbox, entry.name, reason=outcome.reason, at=self.wall())
                self._leave(entry, now)
            case Gone():
                self.inboxes.vanished(entry)
                self._leave(entry, now)
            case BackInInbox():
                self._leave(entry, now, given_back=True)
            case Ignored():
                entry.claimed = False
                self.inboxes.park(entry, outcome.kind)
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

    def _note_done(self, entry: Entry, outcome: Done, now: float) -> None:
        seconds = now - entry.seen_at
        self.counts.note_done(entry.inbox, entry.name, size=outcome.size, seconds=seconds, at=self.wall())

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
        self.inboxes.tell(entry, outcome.reason, outcome.detail)
        entry.looks += 1
        entry.claimed = outcome.claimed
        entry.known = None  # the journal's word counts
        entry.ended = None
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
        entry.ended = outcome
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
        entry.ended = outcome
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
        entry.ended = None
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
        w = self.inboxes.watched[entry.inbox]
        w.next_look = now
        if watch.is_still_there(w):  # then no event of the inbox says what the file waits for
            detail = "the folder that it was claimed in is not there: another one lies or is mounted there"
            self.inboxes.tell(entry, "inbox_away", detail)
        self.table.wait(entry, now + self.config.poll_interval_s)

    def _crashed(self, entry: Entry, outcome: Crashed, now: float) -> None:
        self.log(
            "internal.error",
            inbox=entry.inbox,
            file=entry.name,
            detail=outcome.detail,
            traceback=outcome.traceback,
        )
        w = self.inboxes.watched[entry.inbox]
        with contextlib.suppress(OSError, claim.ClaimError):
            entry.claimed = entry.name in claim.claimed(w.inbox.path, self.journal.instance)
        self.table.wait(entry, now + self.config.uploads.longest_retry_s)

    def _no_storage(self, entry: Entry, outcome: NoStorage, now: float) -> None:
        entry.claimed = outcome.claimed
        entry.known = outcome.known  # None: the journal's word counts
        self._queue(entry)
        self.storage.refused(outcome.folder, outcome.reason, outcome.detail, now, by=entry.key)

    def _may_store(self, entry: Entry, now: float) -> bool:
        return self.storage.ready(self._folders(entry), entry.key, now)

    def _folders(self, entry: Entry) -> set[str]:
        """The folders that have to take files before this file can go on."""
        inbox = self.inboxes.watched[entry.inbox].inbox
        folders = {str(self.config.state_dir), str(inbox.path)}
        if not _is_refused(entry):
            folders.add(str(inbox.done))
        if _is_refused(entry) or _needs_service(entry):
            folders.add(str(inbox.failed))
        return folders

    def _needing(self, folder: str) -> int:
        return sum(folder in self._folders(entry) for entry in self.table.entries())

    def _grant_wishes_where_due(self, now: float) -> None:
        """Send lost uploads again that a person wants sent again, once it is plain that nobody can tell."""
        if now < self.wishes_at:
            return
        self.wishes_at = now + self.config.scan_interval_s  # the looks at the inboxes wake the loop for it
        for wish in retry.wishes(self.config.state_dir):
            w, entry = self.inboxes.watched.get(wish.inbox), self.table.get((wish.inbox, wish.name))
            undecided = entry is not None and entry.claimed and entry.reason == "unknown_outcome"
            if entry is not None and undecided and entry.stage is Stage.WAITING:
                if retry.taken_back(wish):  # first: it must not be sent again a second time for one wish
                    entry.insist = True
                    self._queue(entry)
            elif (w is None or w.looked) and (entry is None or not entry.claimed):
                retry.taken_back(wish)

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
                inbox = self.inboxes.watched[service.inboxes[0]].inbox
                self.probing += 1
                self.pool.submit(ask, service.tools, inbox, self.mailbox.put)

    def _on_probed(self, mail: Probed, now: float) -> None:
        self.probing -= 1
        service = self.services[mail.target]  # a target is kept as long as a probe is out
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

    # What systemd is told.

    def _tell_systemd(self, now: float) -> None:
        """Starve the watchdog if an upload hangs in something that no timeout ends: a restart frees it."""
        overdue = {k for k, job in self.under_way.items() if job.progress.is_overdue(job.inbox.api, now)}
        for key in overdue - self.overdue:
            inbox, file = key
            entry, sent = self.table.get(key), self.under_way[key].progress.sent
            size = entry.size if entry else None
            detail = "its timeouts are over and it is not back; under systemd the watchdog restarts sfwatch"
            self.log("upload.stuck", inbox=inbox, file=file, size=size, sent=sent, detail=detail)
        self.overdue = overdue
        if self.stop_at is None:
            self.lifeline.tell(now, self._status_line, alive=not overdue)

    def _status_line(self) -> str:
        if not self.ready:
            return "Taking the first look."
        under_way = len(self.under_way)
        waiting = self.unfinished() - under_way
        inboxes = len(self.config.inboxes)
        line = f"Watching {inboxes} inbox{'' if inboxes == 1 else 'es'}; {under_way} under way"
        line += f", {waiting} waiting, {self.counts.done} done, {self.counts.failed} failed"
        held = [f"{it.name} ({it.state.hold.reason})" for it in self.services.values() if it.state.hold]
        held += [f"{folder} ({hold.reason})" for folder, hold in self.storage.holds.items()]
        troubles = {
            "held": held,
            "not there": [name for name, w in self.inboxes.watched.items() if w.lost],
            "stuck": [name for _, name in self.overdue],
        }
        return line + "".join(f"; {word}: {', '.join(which)}" for word, which in troubles.items() if which)

    # A configuration that has changed.

    def _reload(self, fresh: Fresh | Rejected, now: float) -> None:
        """Go on with other settings; what is under way ends as it began. Bad ones change nothing."""
        if isinstance(fresh, Rejected):
            self.log("config.rejected", config=self.config.source, problems=list(fresh.problems))
            return
        self.config = fresh.config
        former, self.pool = self.pool, fresh.pool
        if former is not fresh.pool:
            former.shutdown(wait=False)  # it ends when it has done what it was given
        self._take_plans(fresh.plans, now)
        self.storage.reload(fresh.config.uploads, now)
        self.inboxes.reload(fresh.config, now)
        self._regroup()
        names = [inbox.name for inbox in fresh.config.inboxes]
        needs_restart = list(fresh.needs_restart) or None
        self.log("config.loaded", config=self.config.source, inboxes=names, needs_restart=needs_restart)

    def _take_plans(self, plans: Iterable[Plan], now: float) -> None:
        self.target_of = {inbox: plan.tools.target for plan in plans for inbox in plan.inboxes}
        for plan in plans:
            service = self.services.get(plan.tools.target)
            if service is None:
                self.services[plan.tools.target] = begin(plan.tools)
            else:
                service.reload(plan.tools, now, waiting=self._waiting(service))

    def _regroup(self) -> None:
        """Let each inbox go to the target that it is meant for; one that is let go of stays where it was."""
        for inbox, target in self.target_of.items():
            w = self.inboxes.watched.get(inbox)
            before, after = self.service_of.get(inbox), self.services[target]
            if w is None or w.leaving or before is after:
                continue
            after.inboxes.append(inbox)
            self.service_of[inbox] = after
            if before is not None:
                self._part(inbox, before, after)

    def _part(self, inbox: str, before: Service, after: Service | None) -> None:
        lost, waited = before.give_up(inbox)
        if after is not None:
            after.unsettled.update(lost)
        for key in waited:
            entry = self.table.get(key)
            if entry is not None and entry.stage is Stage.READY:
                self.table.ready(entry)

    def _let_go_where_done(self, now: float) -> None:
        """Forget inboxes that are not wanted any more once nothing of theirs is under way, and such targets."""
        for inbox in self.inboxes.release():
            self._part(inbox, self.service_of.pop(inbox), None)
            self.inboxes.take_up(now)  # one of its name may have waited for that
            self._regroup()
        for service in [it for it in self.services.values() if it.is_idle()]:
            service.tools.client.close()
            del self.services[service.name]

    # Stopping.

    def _on_signal(self, number: int, now: float) -> None:
        if number == signal.SIGUSR1:
            self.wishes_at = now
            self.inboxes.look_soon(now)
            return
        if number == signal.SIGHUP and self.reread is not None:
            if self.stop_at is None:
                self._reload(self.reread(), now)
            return
        if self.stop_at is not None:
            self.leave_at_once = True
            return
        self.stop_at = now + self.config.stop_grace_s
        self.stop_signal = number
        systemd.stopping(self.environ, self.config.stop_grace_s)
        self.log(
            "daemon.stopping",
            signal=signal.Signals(number).name,
            under_way=len(self.under_way),
            grace_s=self.config.stop_grace_s,
        )


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


def _is_settled(outcome: Outcome) -> bool:
    """Whether it is known what became of the attempt."""
    match outcome:
        case Unknown() | LookAgain() | Undecided():
            return False
        case Deferred(known=known):
            return known is None or known.state is not State.UNKNOWN
        case _:
            return True


def _alike(verdict: Verdict) -> str:
    return f"HTTP {verdict.http_status}, code {verdict.code}"


# What runs in a worker's thread: the one border at which a bug becomes an event.


def work(job: Job, tools: Tools, key: Key, put: Callable[[Finished | JournalDamagedError], None]) -> None:
    """Do one job, and put its outcome into the mailbox whatever happens."""
    tools = replace(tools, log=tools.log.bind(inbox=job.inbox.name, file=job.name))
    try:
        outcome = deliver(job, tools)
    except JournalDamagedError as damage:
        put(damage)
        return
    except Exception as bug:  # noqa: BLE001 - said as internal.error by the main thread
        outcome = Crashed(f"{type(bug).__name__}: {bug}", _traceback(bug))
    put(Finished(key, outcome))


def ask(tools: Tools, inbox: Any, put: Callable[[Probed], None]) -> None:
    """Probe a held target, and put the answer into the mailbox whatever happens."""
    try:
        verdict = _with_renewal(probe(inbox, tools), inbox.api)
    except Exception as bug:  # noqa: BLE001
        tools.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=_traceback(bug))
        verdict = Verdict(Blame.NOT_NOW, "internal_error", "the probe itself failed")
    put(Probed(tools.target, verdict))


def _with_renewal(verdict: Verdict, api: Api) -> Verdict:
    """A key that is refused is renewed in one of three places, and not in all of them does it count at once."""
    if verdict.reason != Reason.UNAUTHORIZED:
        return verdict
    return replace(verdict, detail=f"{verdict.detail}; {renewal(api)}")


def _traceback(bug: Exception) -> str:
    """Where it happened; no values of variables, which may be secret."""
    return "".join(traceback.format_exception(bug, limit=20))

"""The loop: wake, collect what the workers say, look, hand out, sleep until the next thing is due.

One thread owns the table and decides; it blocks on its mailbox only. Workers, the doorbell and signals put one
item into the mailbox and do nothing else here. Whatever the events say, every inbox is looked at regularly:
the folders are the truth, and everything in this process can be rebuilt by looking.
"""

import contextlib
import os
import queue
import signal
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, field, replace
from functools import partial

from sfwatch import __version__, arrive, handout, outcomes, reload, systemd
from sfwatch import target as rules
from sfwatch.core import Core, Mail, Signalled
from sfwatch.inboxes import Inboxes
from sfwatch.job import Resend
from sfwatch.journal import JournalDamagedError
from sfwatch.logs import printable
from sfwatch.reload import Fresh, Rejected
from sfwatch.retry import ResendRequest
from sfwatch.snapshot import Publisher, View
from sfwatch.storage import Storage
from sfwatch.table import Key, Stage
from sfwatch.upstream import Plan, begin
from sfwatch.verdict import Blame
from sfwatch.work import Accepted, Finished, LookedUp, Probed, Requests, ask, read_requests, traceback_of

MAIL_AT_ONCE = 5000
DUE_AT_ONCE = 100
"""Bounds on the work of one turn of the loop, so that no backlog keeps it from its mailbox."""

PRUNE_S = 86400.0
"""How often finished files that are old enough are forgotten."""


@dataclass(slots=True, kw_only=True)
class Daemon(Core):
    """The loop, with what only it has to know."""

    plans: InitVar[Iterable[Plan]]
    doorbell: arrive.Doorbell
    abort: Callable[[], None]
    reread: Callable[[], Fresh | Rejected] | None = None
    publisher: Publisher = field(init=False)
    lifeline: systemd.Lifeline = field(init=False)
    started_at: float = 0.0
    ticked_at: float = 0.0
    ready: bool = False
    stop_signal: int | None = None
    leave_at_once: bool = False
    hung_up: bool = False  # SIGHUP came: the settings are to be read anew
    overdue: set[Key] = field(default_factory=set)
    drain_until: float | None = None
    prune_at: float = 0.0
    requests_at: float = 0.0

    def __post_init__(self, plans: Iterable[Plan]) -> None:
        """Join the parts that share the table."""
        for plan in plans:
            service = self.services[plan.tools.target] = begin(plan.tools, plan.inboxes)
            self.service_of.update(dict.fromkeys(plan.inboxes, service))
        self.lifeline = systemd.Lifeline(self.environ)
        self.publisher = Publisher(self.log, self.environ, self.clock, self.wall, self.journal.call)
        self.storage = Storage(self.log, self.config.uploads, partial(handout.needing, self))
        self.inboxes = Inboxes(
            config=self.config,
            table=self.table,
            storage=self.storage,
            journal=self.journal,
            doorbell=self.doorbell,
            log=self.log,
            clock=self.clock,
            wall=self.wall,
            queue=partial(handout.queue, self),
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
            self._reload_where_asked(now)
            reload.let_go_where_done(self, now)
            self.inboxes.look_where_due(now)
            self._advance_due(now)
            self._probe_where_due(now)
            self._read_requests_where_due(now)
            self._prune_where_due(now)
            if self.drain_until is None or now < self.drain_until:
                handout.hand_out(self, now)
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
            asking = service.state.asking or service.looking  # a probe waits for a look-up that is out
            at = rules.next_at(replace(service.state, asking=asking), self.ticked_at)
            if at is not None and service.inboxes:
                times.append(at)
        if self.stop_at is not None:
            times = [max(at, now + 0.1) for at in (self.stop_at, self.publisher.due_at) if at is not None]
        return max(0.0, min(times) - now)

    def _receive(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._read(self.mailbox.get(timeout=timeout_s) if timeout_s else self.mailbox.get_nowait())
            for _ in range(MAIL_AT_ONCE):
                self._read(self.mailbox.get_nowait())

    def _read(self, mail: Mail) -> None:  # noqa: C901 - one case for each kind of message
        now = self.clock()
        match mail:
            case Accepted():
                outcomes.accepted(self, mail.key)
            case Finished():
                outcomes.finished(self, mail.key, mail.outcome, now)
            case Probed():
                self._on_probed(mail, now)
            case LookedUp():
                self.probing -= 1
                outcomes.looked_up(self, mail, now)
            case Requests():
                self._resend_where_asked(mail)
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
        if not isinstance(bug, OSError):  # that is the kernel's, and only costs what did not ring
            self.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=traceback_of(bug))
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
                handout.queue(self, entry)

    # What people have asked for.

    def _read_requests_where_due(self, now: float) -> None:
        if now >= self.requests_at:
            self.requests_at = now + self.config.scan_interval_s  # the scans of the inboxes wake the loop
            self.pool.submit(read_requests, self.journal, self.config.state_dir, self.mailbox.put)

    def _resend_where_asked(self, mail: Requests) -> None:
        """Send an undecided upload again that a person wants sent again; give one up whose claim is lost."""
        for request in mail.requests:
            w, entry = self.inboxes.watched.get(request.inbox), self.table.get((request.inbox, request.name))
            known = entry.known if entry is not None else None
            if known is not None and known.resend_request == request.id:
                self._forget_request(request)  # it was done, and the process ended before this
            elif entry is not None and entry.claimed:
                if entry.stage is not Stage.WAITING:
                    continue
                if entry.reason == "unknown_outcome":
                    entry.resend = Resend("it was asked for", request=request.id, file=request.file)
                    handout.queue(self, entry)
                elif entry.reason == "inbox_away" and w is not None:
                    # This inbox is the file's, and the file is not in it. The request stays until its end.
                    entry.home = w.identity
                    handout.queue(self, entry)
                elif entry.unknown_since is None:  # it must not wait for an answer that is lost some day
                    self._forget_request(request)
                    if entry.reason == "doubted":
                        self.table.wait(entry, self.clock())
            elif w is None or w.looked:
                self._forget_request(request)

    def _forget_request(self, request: ResendRequest) -> None:
        with contextlib.suppress(OSError):
            self.journal.call(lambda: request.file.unlink(missing_ok=True))

    def _prune_where_due(self, now: float) -> None:
        if now < self.prune_at:
            return
        self.prune_at = now + PRUNE_S
        with contextlib.suppress(OSError):  # a disk that is full is said where a file needs it
            self.journal.prune(self.wall() - self.config.history_days * 86400)

    # Probing held targets.

    def _probe_where_due(self, now: float) -> None:
        for service in self.services.values():
            if service.inboxes and rules.wants_probe(service.state, now) and not service.looking:
                service.state = rules.probing(service.state)
                unknown = handout.unknown_files(self, service)
                if unknown and handout.start_look_up(self, service, unknown, now):
                    continue  # a look-up shows as well whether the service answers
                inbox = self.inboxes.watched[service.inboxes[0]].inbox
                self.probing += 1
                self.pool.submit(ask, service.tools, inbox, self.mailbox.put)

    def _on_probed(self, mail: Probed, now: float) -> None:
        self.probing -= 1
        service = self.services[mail.target]  # a target is kept as long as a probe is out
        verdict = mail.verdict
        state = service.state
        if verdict.rate_limited:
            state = rules.after_rate_limited(state, None, now, verdict.retry_after_s)
        state = rules.after_probe(
            state,
            passed=verdict.blame is Blame.ACCEPTED or verdict.rate_limited,
            detail=verdict.detail,
            now=now,
            luck=self.luck(),
            retry_after_s=verdict.retry_after_s,
        )
        service.change(state, now, waiting=self.waiting(service))

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
            "stuck": [printable(name) for _, name in self.overdue],
        }
        return line + "".join(f"; {word}: {', '.join(which)}" for word, which in troubles.items() if which)

    # A configuration that has changed.

    def _reload_where_asked(self, now: float) -> None:
        if self.hung_up and self.reread is not None:
            reload.reload(self, self.reread(), now)
        self.hung_up = False

    # Stopping.

    def _on_signal(self, number: int, now: float) -> None:
        if number == signal.SIGUSR1:
            self.requests_at = now
            self.inboxes.look_soon(now)
            return
        if number == signal.SIGHUP and self.reread is not None:
            self.hung_up = True  # once in this turn, however often it is asked for
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

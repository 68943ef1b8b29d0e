"""What came of a job: the file's next step, and what it tells of its target and of the folders it needs.

Nothing is decided by a worker. Each outcome ends in one of these: the file is done with, it waits, it is queued
again with another task, or it is back in its inbox.
"""

import contextlib
from typing import Any

from sfwatch import claim, handout, watch
from sfwatch import target as rules
from sfwatch.core import Core
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
    Undecided,
    Unknown,
)
from sfwatch.journal import State
from sfwatch.table import Entry, Key, Stage
from sfwatch.upstream import Service
from sfwatch.verdict import Blame, Reason, Verdict, backoff_s
from sfwatch.work import with_renewal

DOUBT = 10
"""How many times `first_retry` a refusal is doubted while nothing was accepted yet.

If the settings are at fault, other files are refused alike within that time.
"""

OTHERS_ACCEPTED = 3
"""Other files that a target must have accepted before a file that keeps failing is called poison."""


def accepted(core: Core, key: Key) -> None:
    """The service has taken a file: the next one may go out while this one is filed away."""
    service = _sent_to(core, key)
    if service is not None:
        service.accepted.add(key)


def finished(core: Core, key: Key, outcome: Outcome, now: float) -> None:
    """Take in what a worker answered."""
    job = core.under_way.pop(key)
    entry = core.table.get(key)
    sent_to = _sent_to(core, key)
    service = sent_to or core.service_of[key[0]]  # its inbox may go to another target by now
    for blocked in service.end(key, settled=_is_settled(outcome)):
        other = core.table.get(blocked)
        if other is not None and other.stage is Stage.READY:
            core.table.ready(other)
    if entry is None:
        return
    refused = outcome.folder if isinstance(outcome, NoStorage) else None
    core.storage.end_trial(key, now, proved=_proves_storage(outcome), refused=refused)
    entry.task = Task.DELIVER
    entry.insist = entry.insist and not _may_have_been_sent(job, outcome)
    if sent_to is not None:
        _tell_target(core, service, entry, outcome, now)
    _after(core, service, entry, outcome, now)
    if isinstance(outcome, Done | Failed | Gone):
        service.state = rules.forgotten(service.state, entry.key)
    w = core.inboxes.watched[entry.inbox]
    if not entry.claimed and entry.stage is not Stage.UNDER_WAY:
        w.claims.discard(entry.name)
        core.inboxes.unlock(w)
    if w.leaving:
        core.inboxes.forget_unclaimed(w)


def _sent_to(core: Core, key: Key) -> Service | None:
    """The target that a file under way goes to; None if its job needs nothing of one."""
    return next((it for it in core.services.values() if key in it.under_way), None)


def _tell_target(core: Core, service: Service, entry: Entry, outcome: Outcome, now: float) -> None:
    """What an outcome says of the target, whatever becomes of the file."""
    state, luck = service.state, core.luck()
    match outcome:
        case Done(recovered=False):  # one that was found in a listing proves nothing of now
            state = rules.after_accepted(state, entry.key, now)
        case NoStorage(known=known) if known is not None and known.state is State.ACCEPTED:
            state = rules.after_accepted(state, entry.key, now)
        case Deferred(verdict=v) if v.blame is Blame.ACCOUNT:
            file = None if v.reason == "no_key" and state.hold is None else entry.key
            api = core.inboxes.watched[entry.inbox].inbox.api
            detail = with_renewal(v, api).detail
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
    service.change(state, now, waiting=core.waiting(service))


def _after(  # noqa: C901, PLR0912 - one line for each outcome
    core: Core, service: Service, entry: Entry, outcome: Outcome, now: float
) -> None:
    match outcome:
        case Done():
            _note_done(core, entry, outcome, now)
            _leave(core, entry, now)
        case Failed():
            core.counts.note_failed(entry.inbox, entry.name, reason=outcome.reason, at=core.wall())
            _leave(core, entry, now)
        case Gone():
            core.inboxes.vanished(entry)
            _leave(core, entry, now)
        case BackInInbox():
            _leave(core, entry, now, given_back=True)
        case Ignored():
            entry.claimed = False
            core.inboxes.park(entry, outcome.kind)
        case NotTaken():
            _not_taken(core, entry, outcome, now)
        case Deferred():
            _deferred(core, service, entry, outcome, now)
        case Refused():
            _refused(core, service, entry, outcome, now)
        case Unknown():
            _unknown(core, service, entry, outcome, now)
        case LookAgain():
            _look_again(core, entry, outcome, now)
        case Undecided():
            _undecided(core, service, entry, outcome, now)
        case NoStorage():
            _no_storage(core, entry, outcome, now)
        case InboxGone():
            _inbox_gone(core, entry, outcome, now)
        case Crashed():
            _crashed(core, entry, outcome, now)


def _note_done(core: Core, entry: Entry, outcome: Done, now: float) -> None:
    seconds = now - entry.seen_at
    core.counts.note_done(entry.inbox, entry.name, size=outcome.size, seconds=seconds, at=core.wall())


def _leave(core: Core, entry: Entry, now: float, *, given_back: bool = False) -> None:
    """The file is no longer under way; whoever came under its name meanwhile is looked at next.

    It may have been nobody: the ring of our own giving back, or a look before the file was claimed.
    """
    core.table.remove(entry)
    if given_back or entry.newcomer:
        fresh = core.table.add(entry.key, now)
        fresh.given_back = fresh.seen = given_back
    entry.claimed = False
    entry.stage = Stage.PARKED


def _not_taken(core: Core, entry: Entry, outcome: NotTaken, now: float) -> None:
    core.inboxes.tell(entry, outcome.reason, outcome.detail)
    entry.looks += 1
    entry.claimed = outcome.claimed
    entry.known = None  # the journal's word counts
    entry.ended = None
    if outcome.claimed and outcome.reason != "namesake":  # then it goes on from the claim: the name is taken
        entry.task = Task.GIVE_BACK
    core.table.wait(entry, now + _pause_s(core, entry.looks, None))


def _pause_s(core: Core, failures: int, retry_after_s: float | None) -> float:
    uploads = core.config.uploads
    return backoff_s(
        failures,
        first_s=uploads.first_retry_s,
        longest_s=uploads.longest_retry_s,
        luck=core.luck(),
        retry_after_s=retry_after_s,
    )


def _deferred(core: Core, service: Service, entry: Entry, outcome: Deferred, now: float) -> None:
    verdict = outcome.verdict
    entry.claimed = outcome.claimed
    entry.known = outcome.known
    entry.ended = outcome
    entry.given_back = True
    if verdict.reason != "no_key":  # then nothing was tried
        entry.held_mark = service.held_s(now)
    account = verdict.blame is Blame.ACCOUNT and entry.key not in service.state.charged
    if account or core.stop_at is not None:
        handout.queue(core, entry)  # the hold stands in its way, or the end of the process
        return
    if verdict.reason == Reason.ABORTED:  # broken off by ourselves, since it could not be read on
        entry.looks += 1
        core.table.wait(entry, now + _pause_s(core, entry.looks, None))
        return
    entry.failures += 1
    if entry.accepted_mark is None:
        entry.accepted_mark = service.state.accepted
    condemned = _given_up(core, service, entry, outcome)
    if condemned is not None:
        _condemn(core, entry, condemned)
        return
    retry_in_s = _pause_s(core, entry.failures, verdict.retry_after_s)
    _say_outcome("upload.deferred", service, entry, verdict, outcome.attempt, retry_in_s)
    core.table.wait(entry, now + retry_in_s)


def _given_up(core: Core, service: Service, entry: Entry, outcome: Deferred) -> Condemned | None:
    """Whether a file that keeps failing is at fault itself, or has used up its time."""
    uploads = core.config.uploads
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
    spent_s = core.wall() - outcome.first_attempt_at - outcome.held_s
    if spent_s < uploads.give_up_after_s:
        return None
    detail = f"it could not be uploaded in {round(spent_s)} s; the last time: {outcome.verdict.detail}"
    return Condemned("gave_up", detail, outcome.verdict)


def _say_outcome(
    event: str, service: Service, entry: Entry, verdict: Verdict, attempt: int, retry_in_s: float
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


def _refused(core: Core, service: Service, entry: Entry, outcome: Refused, now: float) -> None:
    """The service refuses this file: its own fault, unless it refuses every file alike."""
    entry.claimed = True
    entry.known = outcome.known  # not as before this attempt: a lost upload would be sent again for ever
    verdict = outcome.verdict
    condemned = Condemned("refused", verdict.detail, verdict)
    if rules.refuses_all(service.state, _alike(verdict)):
        for other in [entry, *handout.doubted(core, service.inboxes)]:
            handout.give_back(core, other)
    elif service.state.accepted:
        _condemn(core, entry, condemned)
    else:
        entry.task = Task.CONDEMN
        entry.condemned = condemned
        core.table.wait(entry, now + DOUBT * core.config.uploads.first_retry_s)


def _condemn(core: Core, entry: Entry, condemned: Condemned) -> None:
    entry.task = Task.CONDEMN
    entry.condemned = condemned
    handout.queue(core, entry)


def _unknown(core: Core, service: Service, entry: Entry, outcome: Unknown, now: float) -> None:
    entry.claimed = True
    entry.known = outcome.known
    entry.ended = outcome
    entry.reason = None  # whatever it waited for before
    entry.lost_at = now
    entry.looks = 1
    entry.failures += 1
    retry_in_s = _pause_s(core, entry.failures, outcome.verdict.retry_after_s)
    _say_outcome("upload.unknown", service, entry, outcome.verdict, outcome.known.attempts, retry_in_s)
    core.table.wait(entry, now + retry_in_s)


def _look_again(core: Core, entry: Entry, outcome: LookAgain, now: float) -> None:
    """Look more and more seldom, and once when the time for looking is over."""
    entry.claimed = True
    entry.known = outcome.known
    entry.looks += 1
    entry.lost_at = now if entry.lost_at is None else entry.lost_at
    over_at = entry.lost_at + core.config.uploads.reconcile_window_s + 0.01  # floats may fall short of it
    at = now + _pause_s(core, entry.looks, None)
    core.table.wait(entry, min(at, over_at) if now < over_at else at)


def _undecided(core: Core, service: Service, entry: Entry, outcome: Undecided, now: float) -> None:
    entry.claimed = True
    entry.known = outcome.known
    entry.ended = None
    entry.insist = False
    retry_in_s = core.config.uploads.longest_retry_s
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
    core.table.wait(entry, now + retry_in_s)


def _inbox_gone(core: Core, entry: Entry, outcome: InboxGone, now: float) -> None:
    entry.known = outcome.known or entry.known
    entry.claimed = entry.claimed or entry.known is not None
    w = core.inboxes.watched[entry.inbox]
    w.next_look = now
    if watch.is_still_there(w):  # then no event of the inbox says what the file waits for
        detail = "the folder that it was claimed in is not there: another one lies or is mounted there"
        core.inboxes.tell(entry, "inbox_away", detail)
    core.table.wait(entry, now + core.config.poll_interval_s)


def _crashed(core: Core, entry: Entry, outcome: Crashed, now: float) -> None:
    core.log(
        "internal.error",
        inbox=entry.inbox,
        file=entry.name,
        detail=outcome.detail,
        traceback=outcome.traceback,
    )
    w = core.inboxes.watched[entry.inbox]
    with contextlib.suppress(OSError, claim.ClaimError):
        entry.claimed = entry.name in claim.claimed(w.inbox.path, core.journal.instance)
    entry.known = None  # an attempt may have begun since: the journal's word counts
    core.table.wait(entry, now + core.config.uploads.longest_retry_s)


def _no_storage(core: Core, entry: Entry, outcome: NoStorage, now: float) -> None:
    entry.claimed = outcome.claimed
    entry.known = outcome.known  # None: the journal's word counts
    handout.queue(core, entry)
    core.storage.refused(outcome.folder, outcome.reason, outcome.detail, now, by=entry.key)


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


def _may_have_been_sent(job: Job, outcome: Outcome) -> bool:
    """Whether the wish that a lost upload be sent again was granted: it is not granted a second time."""
    match outcome:
        case Unknown() | Crashed():
            return True
        case NoStorage(known=known):
            return known is None or job.known is None or known.attempts > job.known.attempts
        case _:
            return False


def _alike(verdict: Verdict) -> str:
    return f"HTTP {verdict.http_status}, code {verdict.code}"

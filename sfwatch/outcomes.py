"""What came of a job: the file's next step, and what it tells of its target and of the folders it needs.

Nothing is decided by a worker. Each outcome ends in one of these: the file is done with, it waits, it is queued
again with another task, or it is back in its inbox.
"""

import contextlib
from dataclasses import replace
from typing import Any

from sfwatch import claim, handout, watch
from sfwatch import target as rules
from sfwatch.core import Core
from sfwatch.delivery import evidence, recovery
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
    NeedsLookUp,
    NoStorage,
    NotTaken,
    Outcome,
    Refused,
    Resend,
    Task,
    Undecided,
    Unknown,
)
from sfwatch.journal import Delivery, State
from sfwatch.service import listing
from sfwatch.table import Entry, Key, Stage
from sfwatch.upstream import Service
from sfwatch.verdict import Blame, Reason, Verdict, backoff_s, words
from sfwatch.work import LookedUp, with_renewal

STUCK_S = 600.0
"""When it is reported that a file which nothing proves wrong is still refused."""

_LISTING: Key = ("", "")
"""What a failed listing counts as where failures of different files are counted."""


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
    service.end(key)
    if entry is None:
        return
    refused = outcome.folder if isinstance(outcome, NoStorage) else None
    core.storage.end_trial(key, now, proved=_proves_storage(outcome), refused=refused)
    # A claim that was found again stays one until it is known what became of it.
    resumes = job.task is Task.RESUME and isinstance(outcome, NotTaken | NoStorage | InboxGone | Crashed)
    entry.task = Task.RESUME if resumes else Task.DELIVER
    entry.found = entry.resend = None
    if sent_to is not None:
        _tell_target(core, service, entry, outcome, now)
    _after(core, service, entry, outcome, now)
    if isinstance(outcome, Done | Failed | Gone):
        service.state = rules.forgotten(service.state, entry.key)
    w = core.inboxes.watched[entry.inbox]
    if not isinstance(outcome, InboxGone):
        core.inboxes.found_claims(w, job.claims)
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
        # One that was found in a listing proves nothing of now.
        case Done(recovered=False) | NoStorage(known=Delivery(state=State.ACCEPTED)):
            state = rules.after_accepted(state, entry.key, now)
            _after_acceptance(core, service, now)
        case Refused(verdict=v, known=known) | Unknown(verdict=v, known=known) if _is_refusal(v):
            suspect = known.refusals > 1  # it was refused in these words before the last acceptance
            untried = handout.has_untried(core, service)
            state = rules.after_refused(state, entry.key, words(v), now, luck, suspect=suspect, untried=untried)
        case Deferred(verdict=v) | Unknown(verdict=v):
            state = _after_verdict(core, state, entry, v, now)
        case _:
            state = rules.after_other(state, entry.key, now)
    service.change(state, now, waiting=core.waiting(service))


def _is_refusal(verdict: Verdict) -> bool:
    """Whether it refuses the file, of which an earlier attempt may have been stored all the same."""
    return verdict.blame in (Blame.FILE, Blame.DOUBTED)


def _after_verdict(core: Core, state: rules.Target, entry: Entry, v: Verdict, now: float) -> rules.Target:
    """What an attempt that was not accepted says of the target."""
    luck = core.luck()
    if v.rate_limited:
        return rules.after_rate_limited(state, entry.key, now, v.retry_after_s)
    if v.blame is Blame.UNKNOWN:
        return rules.after_unknown(state, entry.key, v.detail, now, luck)
    if v.blame is Blame.ACCOUNT:
        file = None if v.reason == "no_key" and state.hold is None else entry.key
        detail = with_renewal(v, core.inboxes.watched[entry.inbox].inbox.api).detail
        return rules.after_account_fault(state, file, v.reason, detail, now, luck)
    if v.blame is Blame.NOT_NOW and v.reason != Reason.ABORTED:
        return rules.after_not_now(
            state,
            entry.key,
            v.detail,
            now,
            luck,
            unreachable=v.unreachable,
            retry_after_s=v.retry_after_s,
        )
    return rules.after_other(state, entry.key, now)


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
            if not outcome.quiet:
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
        case NeedsLookUp():
            _needs_look_up(core, entry, outcome, now)
        case Undecided():
            entry.known = outcome.known
            _undecided(core, service, entry, outcome.reason, outcome.detail, (), now)
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
    if outcome.reason == "inbox_away" and not outcome.claimed:
        core.inboxes.forget_claims_folder(core.inboxes.watched[entry.inbox])
    entry.looks += 1
    entry.claimed = outcome.claimed
    entry.known = None  # the journal's word counts
    entry.ended = None
    # If the name is taken it goes on from the claim. A claim that was found again may have been sent before.
    if outcome.claimed and outcome.reason != "namesake" and entry.task is not Task.RESUME:
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
    entry.known = outcome.known if outcome.claimed else None  # else the journal's word counts
    entry.unknown_since = None  # the service has nothing of it
    entry.ended = outcome
    entry.given_back = True
    if verdict.reason != "no_key":  # then nothing was tried
        entry.ended_at, entry.held_mark = now, service.held_s(now)
    account = verdict.blame is Blame.ACCOUNT and entry.key not in service.state.charged
    if account or core.stop_at is not None:
        handout.queue(core, entry)  # the hold stands in its way, or the end of the process
        return
    if verdict.reason == Reason.ABORTED:  # broken off by ourselves, since it could not be read on
        entry.looks += 1
        core.table.wait(entry, now + _pause_s(core, entry.looks, None))
        return
    if outcome.known is not None:
        condemned = _given_up(core, outcome.known, verdict)
        if condemned is not None:
            _condemn(core, entry, condemned)
            return
    if verdict.rate_limited:  # the target's interval is its pause
        pause_s = max(0.0, service.state.next_start - now)
        _say_outcome("upload.deferred", service, entry, verdict, outcome.attempt, pause_s)
        handout.queue(core, entry)
        return
    entry.failures += 1
    retry_in_s = _pause_s(core, entry.failures, verdict.retry_after_s)
    _say_outcome("upload.deferred", service, entry, verdict, outcome.attempt, retry_in_s)
    core.table.wait(entry, now + retry_in_s)


def _given_up(core: Core, known: Delivery, verdict: Verdict) -> Condemned | None:
    """Whether a file that keeps failing is at fault itself, or has used up its time."""
    uploads = core.config.uploads
    if evidence.is_poison(known, uploads.poison_after):
        detail = (
            f"it failed {known.suspicions} times in ways that can be its own fault, and the service accepted"
            f" another file between each two; the last time: {verdict.detail}"
        )
        return Condemned("keeps_failing", detail, verdict)
    if evidence.has_given_up(known, uploads.give_up_after_s):
        detail = (
            f"it could not be uploaded in {round(known.served_s)} s of retries; the last time: {verdict.detail}"
        )
        return Condemned("gave_up", detail, verdict)
    return None


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
    """The service refuses this file: the file's own fault, or (that is doubted) the account's."""
    verdict, known = outcome.verdict, outcome.known
    entry.claimed, entry.known, entry.ended, entry.unknown_since = True, known, None, None
    entry.ended_at, entry.held_mark = now, service.held_s(now)
    condemned = Condemned("refused", verdict.detail, verdict)
    # The third file in a row that is refused with one code may be refused for the account's sake.
    clear = verdict.blame is Blame.FILE and rules.refused_alike(service.state, words(verdict)) < rules.IN_A_ROW
    if known.state is State.UNKNOWN and not clear:
        _unknown(core, service, entry, Unknown(verdict, known), now)
        return
    if rules.held_reason(service.state) == rules.REFUSES_ALL and not clear:
        handout.release_doubted(core, service)
        handout.give_back(core, entry)
        return
    if clear or evidence.is_proved(known):
        _condemn(core, entry, condemned)
        return
    given_up = _given_up(core, known, verdict)
    if given_up is not None:
        _condemn(core, entry, given_up)
        return
    accepted = known.refused_after  # none was accepted since: that comes with `_after_acceptance`
    retry_in_s = evidence.retry_in_s(known, accepted, core.config.uploads.first_retry_s)
    _say_outcome("upload.deferred", service, entry, verdict, known.attempts, retry_in_s)
    detail = (
        f"{verdict.detail}; this may be the account's fault, so the file waits: it is sent again after another"
        " file was accepted, else after longer and longer pauses"
    )
    if entry.refused_since is None:
        entry.refused_since = now
    elif now - entry.refused_since >= STUCK_S and entry.reason == "doubted" and not entry.stuck_told:
        entry.stuck_told = True
        core.inboxes.tell_stuck(entry, "doubted", detail, now - entry.refused_since)
    core.inboxes.tell(entry, "doubted", detail)
    service.doubted.add(entry.key)
    core.table.wait(entry, now + retry_in_s)


def _after_acceptance(core: Core, service: Service, now: float) -> None:
    """An acceptance is news of the account: doubted files get another try, undecided ones another look-up."""
    soon = now + evidence.SHORTEST_PAUSE * core.config.uploads.first_retry_s
    for key in service.doubted:
        entry = core.table.get(key)
        if entry is not None and entry.stage is Stage.WAITING and entry.due_at > soon:
            core.table.wait(entry, soon)
    for key in service.undecided:
        entry = core.table.get(key)
        if entry is not None and entry.stage is Stage.WAITING:
            at = max(now, entry.looked_at + core.config.uploads.reconcile_window_s)
            if entry.due_at > at:
                core.table.wait(entry, at)


def _condemn(core: Core, entry: Entry, condemned: Condemned) -> None:
    entry.task = Task.CONDEMN
    entry.condemned = condemned
    handout.queue(core, entry)


def _unknown(core: Core, service: Service, entry: Entry, outcome: Unknown, now: float) -> None:
    entry.claimed = True
    entry.known = outcome.known
    entry.ended = outcome
    entry.reason = None  # whatever it waited for before
    entry.unknown_since = entry.ended_at = now
    entry.held_mark = service.held_s(now)
    entry.looks = entry.readings = 0
    entry.failures += 1
    retry_in_s = _pause_s(core, entry.failures, outcome.verdict.retry_after_s)
    if outcome.verdict.blame is Blame.UNKNOWN:
        _say_outcome("upload.unknown", service, entry, outcome.verdict, outcome.attempt, retry_in_s)
    else:  # an earlier attempt may have been stored though this one was not
        _say_outcome("upload.deferred", service, entry, outcome.verdict, outcome.attempt, retry_in_s)
    core.table.wait(entry, now + retry_in_s)


def _needs_look_up(core: Core, entry: Entry, outcome: NeedsLookUp, now: float) -> None:
    entry.claimed = True
    entry.known = outcome.known
    if entry.unknown_since is None:
        entry.unknown_since = now
        entry.looks = entry.readings = 0
    handout.queue(core, entry)


def looked_up(core: Core, mail: LookedUp, now: float) -> None:
    """Take in what a look-up says of the target, and of each of its files."""
    service = core.services[mail.target]  # a target is kept as long as a look-up is out
    service.looking = False
    _tell_target_of_listing(core, service, mail.result.fault, now)
    for tag, key in mail.asked.items():
        entry = core.table.get(key)
        if entry is None or entry.stage is Stage.UNDER_WAY or not handout.needs_look_up(entry):
            continue
        if core.service_of.get(key[0]) is not service:  # its inbox goes to another target by now
            handout.queue(core, entry)
            continue
        known = entry.known
        if known is None or known.tag != tag:
            continue
        reading = mail.result.readings.get(tag)
        entry.looks += 1
        if reading is None:
            core.table.wait(entry, now + _pause_s(core, entry.looks, None))
            continue
        entry.looked_at = mail.began
        entry.readings += 1
        _after_reading(core, service, entry, reading, mail.began, now)
    fault = mail.result.fault
    if fault is None:
        service.listing_fault = None
    elif mail.asked and service.state.hold is None and service.listing_fault != fault.reason:
        service.listing_fault = fault.reason
        entry = core.table.get(next(iter(mail.asked.values())))
        if entry is not None and entry.known is not None:
            _say_outcome("upload.deferred", service, entry, fault, entry.known.attempts, entry.due_at - now)


def _tell_target_of_listing(core: Core, service: Service, fault: Verdict | None, now: float) -> None:
    state, luck = service.state, core.luck()
    if state.hold is None:  # the hold that it was the probe of has ended meanwhile
        state = replace(state, asking=False)
    if fault is None or fault.rate_limited:
        if fault is not None:
            state = rules.after_rate_limited(state, None, now, fault.retry_after_s)
        state = rules.after_probe(state, passed=True, detail="", now=now, luck=luck)
    elif state.hold is not None:
        state = rules.after_probe(
            state,
            passed=False,
            detail=fault.detail,
            now=now,
            luck=luck,
            retry_after_s=fault.retry_after_s,
        )
    elif fault.blame is Blame.ACCOUNT:
        state = rules.after_account_fault(state, None, fault.reason, fault.detail, now, luck)
    elif fault.unreachable:  # else it says nothing of uploads: only the files wait that need the listing
        state = rules.after_not_now(
            state, _LISTING, fault.detail, now, luck, unreachable=True, retry_after_s=fault.retry_after_s
        )
    service.change(state, now, waiting=core.waiting(service))


def _after_reading(
    core: Core, service: Service, entry: Entry, reading: recovery.Reading, began: float, now: float
) -> None:
    known, uploads = entry.known, core.config.uploads
    assert known is not None  # noqa: S101 - only such files are looked up
    assert entry.unknown_since is not None  # noqa: S101
    over_at = entry.unknown_since + listing.earliest_s(known.size, uploads.reconcile_window_s)
    ripe = began >= over_at and entry.readings >= 2
    step = recovery.next_step(reading, known, uploads, ripe=ripe, until=began + recovery.PROOF_S)
    if isinstance(step, Resend) and now - began > recovery.PROOF_S:
        step = recovery.Wait(recovery.WHY_UNDECIDED["slow_listing"], "slow_listing")
    if known.state in (State.WAITING, State.DOUBTED) and not isinstance(step, listing.Found):
        # A claim that was found again, of which the service has nothing: it settles again.
        entry.known = None
        handout.give_back(core, entry)
        return
    match step:
        case listing.Found():
            entry.found = step
            handout.queue(core, entry)
        case Resend():
            entry.resend = step
            handout.queue(core, entry)
        case recovery.Wait(held=None):
            at = now + _pause_s(core, entry.looks, None)
            over_at += 0.01  # floats may fall short of it
            core.table.wait(entry, min(at, over_at) if now < over_at else at)
        case recovery.Wait(held=str(reason)):
            _undecided(core, service, entry, reason, step.detail, step.candidates, now)


def _undecided(
    core: Core,
    service: Service,
    entry: Entry,
    reason: str,
    detail: str,
    candidates: tuple[str, ...],
    now: float,
) -> None:
    entry.claimed = True
    entry.ended = None
    if entry.unknown_since is None:
        entry.unknown_since = now
    retry_in_s = core.config.uploads.longest_retry_s
    service.undecided.add(entry.key)
    if entry.reason != "unknown_outcome" and entry.known is not None:
        entry.reason = "unknown_outcome"
        entry.detail = detail
        service.tools.log(
            "upload.undecided",
            inbox=entry.inbox,
            file=entry.name,
            size=entry.known.size,
            attempt=entry.known.attempts,
            reason=reason,
            detail=detail,
            candidates=list(candidates) or None,
            retry_in_s=retry_in_s,
        )
    core.table.wait(entry, now + retry_in_s)


def _inbox_gone(core: Core, entry: Entry, outcome: InboxGone, now: float) -> None:
    entry.known = outcome.known or entry.known
    entry.claimed = entry.claimed or entry.known is not None
    w = core.inboxes.watched[entry.inbox]
    w.next_look = now
    if watch.is_still_there(w):  # then no event of the inbox says what the file waits for
        core.inboxes.lost_claims(w, entry)
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
        held = claim.folders(w.inbox.path).items()
        entry.claims = next((folder for folder, names in held if entry.name in names), entry.claims)
        entry.claimed = any(entry.name in names for _, names in held)
    entry.known = entry.unknown_since = None  # an attempt may have begun since: the journal's word counts
    entry.looks = 0
    core.table.wait(entry, now + core.config.uploads.longest_retry_s)


def _no_storage(core: Core, entry: Entry, outcome: NoStorage, now: float) -> None:
    entry.claimed = outcome.claimed
    entry.known = outcome.known  # None: the journal's word counts
    if entry.unknown_since is not None:  # a further attempt may have ended just now
        entry.unknown_since, entry.looks = now, 0
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

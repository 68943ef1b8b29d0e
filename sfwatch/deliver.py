"""One file from claim to done; safe to kill anywhere and to run again.

What the journal knows of the file decides where to begin:

    nothing, waiting      claim (`taken.py`), check, send (`send.py`)
    sending, unknown      look it up before anything is sent again (`delivery/recovery.py`)
    accepted, refused     only the sidecar or report and the move are left (`filing.py`)

Every end is one of the outcomes of `job.py`; deciding what follows from it is not done here.
"""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

from sfwatch import check, claim, files, filing, key
from sfwatch.delivery import recovery
from sfwatch.filing import StorageError, save, storage
from sfwatch.job import (
    BackInInbox,
    Ignored,
    Job,
    NotTaken,
    Outcome,
    Task,
    Tools,
)
from sfwatch.journal import Delivery, IdKnownError, State
from sfwatch.send import no_key, save_accepted, send
from sfwatch.settings import Check
from sfwatch.taken import (
    Held,
    UnreadableError,
    changed,
    give_back,
    gone,
    is_claimed,
    opened,
    read_and_check,
    reading,
    room,
    stopped,
    take,
)


def deliver(job: Job, tools: Tools) -> Outcome:
    """Take one file one step: as far as it goes now. Raises nothing but bugs."""
    try:
        known = _known(job, tools)
    except StorageError as error:
        return error.outcome(claimed=is_claimed(job), known=job.known)
    try:
        return _go_on(job, tools, known)
    except StorageError as error:
        return stopped(job, tools, error)
    except claim.ClaimError as error:
        return NotTaken(error.reason, error.detail, claimed=is_claimed(job))
    except files.NotRegular as error:
        return Ignored(error.kind)
    except FileNotFoundError:
        return gone(job, tools)
    except OSError as error:  # of a folder that is only read, or a descriptor that is only closed
        return stopped(job, tools, StorageError(str(job.inbox.path), error))


def _go_on(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    if known is not None and known.finished_at is not None:  # only its row was still to be finished
        return filing.finished_outcome(known)
    if known is not None and known.state in (State.ACCEPTED, State.REFUSED):
        return filing.file_away(job, tools, known)
    unknown = (
        known is not None and known.state in (State.SENDING, State.UNKNOWN) and job.task is not Task.CONDEMN
    )
    if known is not None and job.found is not None:
        return recovery.take_over(job, tools, known, job.found)
    try:
        if known is not None and unknown and job.resend is not None:
            return recovery.resend(job, tools, known, job.resend)
        if unknown or job.task is Task.RESUME:
            return recovery.resume(job, tools, known)
        if job.task is Task.GIVE_BACK:
            if known is not None and known.state is State.DOUBTED:
                save(tools, replace(known, state=State.WAITING))
            return give_back(job, tools) or BackInInbox()
        return _begin(job, tools, known)
    except UnreadableError as error:
        stays = unknown or job.task is Task.RESUME
        back = None if stays else give_back(job, tools)
        return back or NotTaken("unreadable", str(error), claimed=stays)


def _known(job: Job, tools: Tools) -> Delivery | None:
    """What is known of the file: what could not be written down last time is written down now."""
    if job.known is not None:
        with suppress(IdKnownError):  # then the journal's word counts
            return save_accepted(tools, job.known)
    with storage(tools.state_dir):
        return tools.journal.find(str(job.inbox.path), job.name)


def _begin(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    if job.task is Task.DELIVER:
        try:
            secret = key.read(job.inbox.api, tools.environ)
        except key.NoKey as missing:
            return no_key(missing, claimed=is_claimed(job))
        no_room = room(job, tools)
        if no_room is not None:
            return no_room
    fd = take(job) if job.settled is not None else None
    with opened(job, tools, known, fd) as held:
        if held is None:
            return changed(job, tools, "it was changed or opened for writing after it had settled")
        is_another = known is not None and held.known.row != known.row
        if is_another and (job.task is Task.CONDEMN or job.settled is None):  # else it has settled again
            back = changed(job, tools, "it was changed after it had been tried")
            if not (isinstance(back, NotTaken) and back.reason == "namesake"):
                return back
            # Its name is taken: it goes on from the claim, as the file that it is now.
        if job.task is Task.CONDEMN and not is_another:
            return _condemn(job, tools, held)
        if job.task is Task.CONDEMN:
            return NotTaken("namesake", "a new file of its name has come meanwhile", claimed=True)
        return _check_and_send(job, tools, held, secret)


def _check_and_send(job: Job, tools: Tools, held: Held, secret: "key.Key") -> Outcome:
    try:
        checked = read_and_check(job, tools, held, job.inbox.check)
    except check.ShortRead:
        return changed(job, tools, "it became shorter while it was read")
    except check.Stopped:
        return give_back(job, tools) or BackInInbox()
    known = replace(held.known, sha256=checked.sha256, lines=checked.lines)
    if checked.findings:
        return filing.refuse(job, tools, known, filing.findings_report(checked))
    _warn(tools, checked)
    with reading(job):
        # Whoever dropped it may not have synced it: no sidecar may survive a power cut that its file does not.
        os.fdatasync(held.fd)
    return send(job, tools, replace(held, known=known), secret)


def _warn(tools: Tools, checked: check.Checked) -> None:
    if checked.warnings:
        tools.log(
            "file.warning",
            size=checked.size,
            reason=",".join(warning.reason for warning in checked.warnings),
            detail="; ".join(warning.detail for warning in checked.warnings),
            line=checked.warnings[0].line,
        )


def _condemn(job: Job, tools: Tools, held: Held) -> Outcome:
    """File under failed what the main thread has decided to give up."""
    condemned = job.condemned
    assert condemned is not None  # noqa: S101 - such a job always says why
    known = held.known
    if known.sha256 is None:
        checked = read_and_check(job, tools, held, Check.NONE)
        known = replace(known, sha256=checked.sha256, lines=checked.lines)
    verdict = condemned.verdict
    facts: dict[str, Any] = {"reason": condemned.reason, "detail": condemned.detail}
    if verdict is not None:
        facts |= {
            "http_status": verdict.http_status,
            "code": verdict.code,
            "message": verdict.message,
            "trace_id": verdict.trace_id,
        }
    return filing.refuse(job, tools, known, facts)

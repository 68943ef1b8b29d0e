"""One file from claim to done, read top to bottom; safe to kill anywhere and to run again.

What the journal knows of the file decides where to begin:

    nothing, waiting      claim, check, write `sending` down, send, write the outcome down
    sending, unknown      look the file up in the service's listing before anything is sent again
    accepted, refused     only the sidecar or report and the move are left (`filing.py`)

A file goes back into its inbox only when the service provably has nothing of it, and only after that is written
down. Every end is one of the outcomes of `job.py`; deciding what follows from it is not done here.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sfwatch import check, claim, files, filing, key, reconcile
from sfwatch.filing import StorageError, save, storage
from sfwatch.job import (
    BackInInbox,
    Deferred,
    Gone,
    Ignored,
    InboxGone,
    Job,
    LookAgain,
    NotTaken,
    Outcome,
    Refused,
    Task,
    Tools,
    Undecided,
    Unknown,
)
from sfwatch.journal import AttemptOpenError, Delivery, IdKnownError, State
from sfwatch.settings import ROOM_BYTES, Check, Inbox, OnUnknown, RemoteName
from sfwatch.verdict import Attempt, Blame, Verdict, judge, judge_listing, remote_name

PROGRESS_S = 10.0
"""How often a long upload says how far it is."""


def deliver(job: Job, tools: Tools) -> Outcome:
    """Take one file one step: as far as it goes now. Raises nothing but bugs."""
    try:
        known = _known(job, tools)
    except StorageError as error:
        return error.outcome(claimed=_is_claimed(job, tools), known=job.known)
    try:
        return _go_on(job, tools, known)
    except StorageError as error:
        return _stopped(job, tools, error)
    except claim.ClaimError as error:
        return NotTaken(error.reason, error.detail, claimed=_is_claimed(job, tools))
    except files.NotRegular as error:
        return Ignored(error.kind)
    except FileNotFoundError:
        return _gone(job, tools)
    except OSError as error:  # of a folder that is only read, or a descriptor that is only closed
        return _stopped(job, tools, StorageError(str(job.inbox.path), error))


def _go_on(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    if known is not None and known.finished_at is not None:  # only its row was still to be finished
        return filing.finished_outcome(known)
    if known is not None and known.state in (State.ACCEPTED, State.REFUSED):
        return filing.file_away(job, tools, known)
    unknown = known is not None and known.state in (State.SENDING, State.UNKNOWN)
    try:
        if known is not None and unknown:
            return _clear_up(job, tools, known)
        if job.task is Task.GIVE_BACK:
            return _give_back(job, tools) or BackInInbox()
        return _begin(job, tools, known)
    except _UnreadableError as error:
        back = None if unknown else _give_back(job, tools)
        return back or NotTaken("unreadable", str(error), claimed=unknown)


class _UnreadableError(Exception):
    """One file cannot be opened or read, whatever the rest of its disk does."""

    def __init__(self, job: Job, error: OSError) -> None:
        super().__init__(f"{job.inbox.path / job.name} can't be read: {error.strerror or error}")


@contextmanager
def _reading(job: Job) -> Iterator[None]:
    """A fault in reading one file is that file's: a hold on its inbox would stop all the others."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _UnreadableError(job, error) from error


def _stopped(job: Job, tools: Tools, error: StorageError) -> Outcome:
    """What was known when the job began may be overtaken: from now on the journal's word counts."""
    known = None
    with suppress(OSError):
        known = tools.journal.find(str(job.inbox.path), job.name)
    return error.outcome(claimed=_is_claimed(job, tools), known=known)


def _is_claimed(job: Job, tools: Tools) -> bool:
    """Whether our claims hold this very file: an earlier one of its name does not count.

    sshfs gives a file another number with each rename, hence size and time.
    """
    try:
        fd = claim.open_claimed(job.inbox.path, tools.journal.instance, job.name)
    except FileNotFoundError:
        return False
    except (OSError, claim.ClaimError, files.NotRegular):
        return job.settled is None
    held = files.Fingerprint.of(os.fstat(fd))
    files.close(fd)
    wanted = job.settled.fingerprint if job.settled else held
    return held.ino == wanted.ino or (held.size, held.mtime_ns) == (wanted.size, wanted.mtime_ns)


def _known(job: Job, tools: Tools) -> Delivery | None:
    """What is known of the file: what could not be written down last time is written down now."""
    if job.known is not None:
        return save(tools, job.known)
    with storage(tools.state_dir):
        return tools.journal.find(str(job.inbox.path), job.name)


def _gone(job: Job, tools: Tools) -> Outcome:
    """Tell a file that somebody took from an inbox that is away: a mount point is a folder, too."""
    resumed = job.settled is None
    claims = claim.claims_folder(job.inbox.path, tools.journal.instance)
    with storage(tools.state_dir):
        known = tools.journal.find(str(job.inbox.path), job.name)
    if filing.is_away(job, known if resumed else None) or (resumed and not claims.is_dir()):
        return InboxGone(job.known)
    if known is not None:
        with storage(tools.state_dir):
            tools.journal.forget(known)
    return Gone()


# A file that nothing is known of, or that was tried before and went back.


@dataclass(frozen=True, slots=True)
class _Held:
    """A claimed file, open, as it was when it was opened."""

    fd: int
    before: files.Fingerprint
    known: Delivery


def _begin(job: Job, tools: Tools, known: Delivery | None) -> Outcome:
    if job.task is Task.DELIVER:
        try:
            secret = key.read(job.inbox.api, tools.environ)
        except key.NoKey as missing:
            return _no_key(job, tools, missing, known)
        no_room = _room(job, tools)
        if no_room is not None:
            return no_room
    if job.settled is not None:
        _claim(job, tools)
    with _opened(job, tools, known) as held:
        if held is None:
            return _changed(job, tools, "it was changed or opened for writing after it had settled")
        if job.task is Task.CONDEMN:
            if known is not None and held.known.row != known.row:
                return _changed(job, tools, "it was changed after it had been refused")
            return _condemn(job, tools, held)
        return _check_and_send(job, tools, held, secret)


def _no_key(job: Job, tools: Tools, missing: "key.NoKey", known: Delivery | None) -> Deferred:
    verdict = Verdict(Blame.ACCOUNT, "no_key", str(missing))
    attempts, first = (known.attempts, known.first_attempt_at) if known else (0, None)
    return Deferred(verdict, attempts, first, 0.0, filing.is_claimed(job, tools), None)


def _room(job: Job, tools: Tools) -> Outcome | None:
    """Room for journal, sidecar and move is made sure of before anything is sent."""
    for folder in (tools.state_dir, str(job.inbox.path), str(job.inbox.done), str(job.inbox.failed)):
        with storage(folder):
            space = os.statvfs(folder)
            if space.f_bavail * space.f_frsize < ROOM_BYTES:
                raise OSError(errno.ENOSPC, f"less than {ROOM_BYTES // 2**20} MiB are free")
    size = job.settled.fingerprint.size if job.settled else 0
    done, inbox = job.inbox.done.stat(), job.inbox.path.stat()
    space = os.statvfs(job.inbox.done)
    free = space.f_bavail * space.f_frsize
    if done.st_dev != inbox.st_dev and free < ROOM_BYTES + size:
        return NotTaken("no_room", f"{job.inbox.done} has {free} bytes free, too few for this file of {size}")
    return None


def _claim(job: Job, tools: Tools) -> None:
    instance = tools.journal.instance
    with _inbox_storage(job):
        claim.prepare(job.inbox.path, instance)
        if job.inbox.settle_marker is not None:
            _claim_marker(job, instance)
        try:
            claim.take(job.inbox.path, instance, job.name)
        except BaseException:
            if job.inbox.settle_marker is not None and not filing.is_claimed(job, tools):
                _give_back_marker(job, instance)  # without it the file would never settle again
            raise


def _claim_marker(job: Job, instance: str) -> None:
    marker = job.name + (job.inbox.settle_marker or "")
    try:
        claim.take(job.inbox.path, instance, marker)
    except (FileNotFoundError, files.NotRegular, claim.ClaimError):
        return  # the file is what counts; it was whole when it settled


@contextmanager
def _inbox_storage(job: Job) -> Iterator[None]:
    """A disk that is full or read-only is the inbox's fault; a name that is missing or taken is not."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except OSError as error:
        raise StorageError(str(job.inbox.path), error) from error


@contextmanager
def _opened(job: Job, tools: Tools, known: Delivery | None) -> Iterator[_Held | None]:
    """The claimed file, or None if it is not the file that settled, or somebody writes to it."""
    with _reading(job):
        fd = claim.open_claimed(job.inbox.path, tools.journal.instance, job.name)
    try:
        if files.probe_lease(fd) is files.Lease.BUSY:
            yield None
            return
        before = files.Fingerprint.of(os.fstat(fd))
        settled = job.settled.fingerprint if job.settled else before
        if (before.size, before.mtime_ns) != (settled.size, settled.mtime_ns):
            yield None
            return
        yield _Held(fd, before, _delivery(job, tools, before, known))
    finally:
        files.close(fd)


def _delivery(job: Job, tools: Tools, seen: files.Fingerprint, known: Delivery | None) -> Delivery:
    """What is known of this very file; what is known of an earlier one of its name does not count."""
    if known is not None and (known.ino, known.size, known.mtime_ns) == (seen.ino, seen.size, seen.mtime_ns):
        held_s = known.held_s + job.held_s
        return replace(known, target=tools.target, held_s=held_s, target_name=None)
    return Delivery(
        inbox=str(job.inbox.path),
        name=job.name,
        state=State.WAITING,
        dev=seen.dev,
        ino=seen.ino,
        size=seen.size,
        mtime_ns=seen.mtime_ns,
        settled_by=job.settled.by if job.settled else None,
        target=tools.target,
        marker=job.inbox.settle_marker,
    )


def _check_and_send(job: Job, tools: Tools, held: _Held, secret: "key.Key") -> Outcome:
    try:
        checked = _checked(job, tools, held, job.inbox.check)
    except check.ShortRead:
        return _changed(job, tools, "it became shorter while it was read")
    except check.Stopped:
        return _give_back(job, tools) or BackInInbox()
    known = replace(held.known, sha256=checked.sha256, lines=checked.lines)
    if checked.findings:
        return _refuse(job, tools, known, _findings_report(checked))
    _warn(tools, checked)
    with _reading(job):
        # Whoever dropped it may not have synced it: no sidecar may survive a power cut that its file does not.
        os.fdatasync(held.fd)
    return _send(job, tools, replace(held, known=known), secret)


def _checked(job: Job, tools: Tools, held: _Held, level: Check) -> check.Checked:
    with _reading(job):
        return check.check(
            held.fd,
            held.before.size,
            level=level,
            max_bytes=job.inbox.max_bytes,
            max_lines=job.inbox.max_lines,
            stop=tools.stop,
        )


def _warn(tools: Tools, checked: check.Checked) -> None:
    if checked.warnings:
        tools.log(
            "file.warning",
            size=checked.size,
            reason=",".join(warning.reason for warning in checked.warnings),
            detail="; ".join(warning.detail for warning in checked.warnings),
            line=checked.warnings[0].line,
        )


def _send(job: Job, tools: Tools, held: _Held, secret: "key.Key") -> Outcome:
    began = tools.wall()
    try:
        known = save(tools, _sending(job, tools, held.known, began))
    except AttemptOpenError:
        detail = "a file of the same name is being uploaded to the same place"
        if held.known.state is State.UNKNOWN:
            return LookAgain(held.known, detail)
        return _give_back(job, tools) or NotTaken("namesake", detail)
    except StorageError:
        if held.known.state is State.UNKNOWN:  # an earlier attempt may have been stored: it stays claimed
            raise
        back = _give_back(job, tools)
        if back is not None:
            return back
        raise
    tools.log(
        "upload.started",
        size=known.size,
        attempt=known.attempts,
        remote_name=known.remote_name,
        sha256=known.sha256,
        lines=known.lines,
    )
    attempt = tools.client.send(
        held.fd,
        known.size,
        remote_name=known.remote_name or "",
        purpose=job.inbox.purpose,
        key=secret.reveal(),
        progress=_progress(tools, known),
        stop=tools.stop,
        max_rate=tools.pace,
        approve=lambda sha256: sha256 == known.sha256,
    )
    return _conclude(job, tools, replace(held, known=known), attempt, before=held.known)


def _sending(job: Job, tools: Tools, known: Delivery, began: float) -> Delivery:
    """The row that says: from now on the service may have it. Its window is open until the outcome is known."""
    tagged = tools.uploads.remote_name is RemoteName.TAGGED
    tag = (known.sha256 or "")[:12] if tagged else None
    return replace(
        known,
        state=State.SENDING,
        remote_name=remote_name(job.name, tag=tag),
        attempts=known.attempts + 1,
        first_attempt_at=known.first_attempt_at or began,
        windows=(*known.windows, (began, began)),
    )


def _progress(tools: Tools, known: Delivery) -> Any:
    started = said = tools.clock()

    def progress(sent: int) -> None:
        nonlocal said
        now = tools.clock()
        if now - said >= PROGRESS_S:
            said = now
            speed = round(sent / (now - started))
            tools.log("upload.progress", size=known.size, attempt=known.attempts, sent=sent, bytes_per_s=speed)

    return progress


def _conclude(job: Job, tools: Tools, held: _Held, attempt: Attempt, *, before: Delivery) -> Outcome:
    """Write down how the attempt ended, and only then act on it."""
    reached = tools.client.resolved
    verdict = judge(attempt, host=tools.client.host, reached_before=reached, wall=tools.wall())
    known = held.known
    match verdict.blame:
        case Blame.ACCEPTED:
            if not _was_sent(held, attempt):
                return _orphan(job, tools, known, before, verdict)
            return _accept(job, tools, known, verdict, attempt)
        case Blame.UNKNOWN:
            ended = (*known.windows[:-1], (known.windows[-1][0], tools.wall()))
            known = replace(known, state=State.UNKNOWN, windows=ended)
            return _saved(tools, known) or Unknown(verdict, known)
        case _ if not before.windows and not _was_sent(held, attempt):
            save(tools, replace(before, row=known.row))
            return _changed(job, tools, attempt.detail or "it was changed while it was sent")
        case Blame.FILE:
            known = replace(known, state=State.WAITING, windows=before.windows)
            return _saved(tools, known) or Refused(verdict, known)
        case _:
            # An earlier attempt may still have been stored: then the file stays out of its inbox.
            state = State.UNKNOWN if before.windows else State.WAITING
            known = replace(known, state=state, windows=before.windows)
            return _saved(tools, known) or _defer(job, tools, known, verdict)


def _saved(tools: Tools, known: Delivery) -> Outcome | None:
    """Make an outcome durable; if the state folder does not take it, it stays in memory with the claim."""
    try:
        save(tools, known)
    except StorageError as error:
        return error.outcome(claimed=True, known=known)
    return None


def _was_sent(held: _Held, attempt: Attempt) -> bool:
    """Whether what went out is what was checked, and what lies there now."""
    after = files.Fingerprint.of(os.fstat(held.fd))
    unchanged = held.before.same_content(after) and files.probe_lease(held.fd) is not files.Lease.BUSY
    return unchanged and attempt.sha256 in (None, held.known.sha256)


def _defer(job: Job, tools: Tools, known: Delivery, verdict: Verdict) -> Outcome:
    if known.state is State.UNKNOWN:
        return _deferred(verdict, known, claimed=True)
    back = _give_back(job, tools)
    if back is None or isinstance(back, NotTaken):
        return _deferred(verdict, known, claimed=back is not None)
    return back


def _deferred(verdict: Verdict, known: Delivery, *, claimed: bool) -> Deferred:
    return Deferred(
        verdict, known.attempts, known.first_attempt_at, known.held_s, claimed, known if claimed else None
    )


# Accepted.


def _accept(job: Job, tools: Tools, known: Delivery, verdict: Verdict, attempt: Attempt) -> Outcome:
    answer = _answer(job, tools, known, verdict, duration_s=attempt.duration_s, recovered=False)
    _say_accepted(tools, known, verdict, attempt)
    known = replace(known, state=State.ACCEPTED, answer=answer, file_id=answer["data"]["id"])
    try:
        known = save(tools, known)
    except IdKnownError:  # a service that knows the bytes already may answer with the id that they have
        known = replace(known, file_id=None)
    except StorageError as error:
        return error.outcome(claimed=True, known=known)
    return filing.file_away(job, tools, known)


def _answer(
    job: Job, tools: Tools, known: Delivery, verdict: Verdict, *, duration_s: float | None, recovered: bool
) -> dict[str, Any]:
    at = datetime.fromtimestamp(tools.wall(), UTC)
    return {
        "data": _shallow(dict(verdict.data or {})),
        "endpoint": f"{job.inbox.api.base_url}/files",
        "http_status": verdict.http_status,
        "code": verdict.code,
        "message": verdict.message,
        "trace_id": verdict.trace_id,
        "recovered": recovered,
        "same_as": _same_as(tools, known),
        "uploaded_at": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z",
        "duration_s": round(duration_s, 3) if duration_s is not None else None,
    }


def _same_as(tools: Tools, known: Delivery) -> str | None:
    """An earlier upload of the same bytes. Nice to know: an answer is not lost for it."""
    try:
        return tools.journal.earlier(known.sha256 or "", tools.target)
    except OSError:
        return None


def _shallow(value: Any, depth: int = 20) -> Any:
    """What the service said, as deep as can be written down by anybody; no service nests its answers so."""
    if depth == 0 and isinstance(value, dict | list):
        return "…"
    if isinstance(value, dict):
        return {name: _shallow(item, depth - 1) for name, item in value.items()}
    return [_shallow(item, depth - 1) for item in value] if isinstance(value, list) else value


def _say_accepted(tools: Tools, known: Delivery, verdict: Verdict, attempt: Attempt) -> None:
    data = verdict.data or {}
    common = {
        "size": known.size,
        "attempt": known.attempts,
        "file_id": data.get("id"),
        "trace_id": verdict.trace_id,
    }
    tools.log(
        "upload.accepted",
        http_status=verdict.http_status,
        duration_s=round(attempt.duration_s, 3),
        bytes_per_s=round(known.size / attempt.duration_s) if attempt.duration_s else None,
        **common,
    )
    sent = {"filename": known.remote_name, "bytes": known.size}
    odd = {name: data[name] for name in sent if name in data and data[name] != sent[name]}
    if odd:
        said = ", ".join(f"{name} {value!r} instead of {sent[name]!r}" for name, value in odd.items())
        tools.log("upload.mismatch", detail=f"the service answered with {said}", **common)


def _orphan(job: Job, tools: Tools, known: Delivery, before: Delivery, verdict: Verdict) -> Outcome:
    """Bytes were accepted that are not this file's: their id is nobody's, and the file settles anew."""
    orphan = str((verdict.data or {})["id"])
    try:
        save(tools, replace(known, state=State.FAILED, file_id=orphan, finished_at=tools.wall()))
    except IdKnownError:
        save(tools, replace(before, row=known.row))
    detail = f"it was changed while it was sent; the service keeps an upload of it as {orphan}"
    return _changed(job, tools, detail, orphans=[orphan])


# Giving back, condemning.


def _changed(job: Job, tools: Tools, detail: str, *, orphans: list[str] | None = None) -> Outcome:
    tools.log("file.changed", detail=detail, orphans=orphans)
    return _give_back(job, tools) or BackInInbox()


def _give_back(job: Job, tools: Tools) -> Outcome | None:
    """Return None when the file is back in its inbox, else the outcome that says why it is not."""
    instance = tools.journal.instance
    try:
        with _inbox_storage(job):
            claim.give_back(job.inbox.path, instance, job.name)
            if job.inbox.settle_marker is not None:
                _give_back_marker(job, instance)
    except FileExistsError:
        return NotTaken("namesake", "a new file of its name has come meanwhile", claimed=True)
    except claim.ClaimError as error:
        return NotTaken(error.reason, error.detail, claimed=True)
    except FileNotFoundError:
        return _gone(job, tools)
    except StorageError as error:
        return _stopped(job, tools, error)
    return None


def _give_back_marker(job: Job, instance: str) -> None:
    marker = job.name + (job.inbox.settle_marker or "")
    try:
        claim.give_back(job.inbox.path, instance, marker)
    except (FileNotFoundError, FileExistsError):
        return  # there was none, or there is a new one: both say the same


def _condemn(job: Job, tools: Tools, held: _Held) -> Outcome:
    """File under failed what the main thread has decided to give up."""
    condemned = job.condemned
    assert condemned is not None  # noqa: S101 - such a job always says why
    known = held.known
    if known.sha256 is None:
        checked = _checked(job, tools, held, Check.NONE)
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
    return _refuse(job, tools, known, facts)


def _findings_report(checked: check.Checked) -> dict[str, Any]:
    first = checked.findings[0]
    return {
        "reason": first.reason,
        "detail": first.detail,
        "line": first.line,
        "findings": [{"line": f.line, "reason": f.reason, "detail": f.detail} for f in checked.findings],
        "more_findings": checked.more,
    }


def _refuse(job: Job, tools: Tools, known: Delivery, report: dict[str, Any]) -> Outcome:
    """The file is at fault: that is durable before its report is published."""
    at = datetime.fromtimestamp(tools.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    refused = replace(known, state=State.REFUSED, report={**report, "failed_at": at})
    try:
        refused = save(tools, refused)
    except StorageError as error:
        return error.outcome(claimed=True, known=refused)
    return filing.file_away(job, tools, refused)


# An answer was lost.


def _clear_up(job: Job, tools: Tools, known: Delivery) -> Outcome:
    """Look the upload up before anything is sent again."""
    try:
        secret = key.read(job.inbox.api, tools.environ)
    except key.NoKey as missing:
        return _no_key(job, tools, missing, known)
    ready = _ready_to_look_up(job, tools, known)
    if not isinstance(ready, Delivery):
        return ready
    known = ready
    if not job.insist and known.target and _host(known.target) != _host(tools.target):
        detail = f"it was sent to {known.target}, which is not in the configuration any more"
        return Undecided(known, "other_target", detail)
    if not filing.is_what_was_sent(job, tools, known):
        return _settle_anew(job, tools, known, secret)
    if job.insist:
        return _resend(job, tools, known, secret, "it was asked for")
    return _decided(job, tools, known, secret, _look_up(job, tools, known, secret))


def _host(target: str) -> str:
    """The address in a target's name: another key may well belong to the same account."""
    return target.partition(" ")[0]


def _decided(job: Job, tools: Tools, known: Delivery, secret: "key.Key", reading: "Reading") -> Outcome:
    match reading:
        case Verdict():
            return _deferred(reading, known, claimed=True)
        case reconcile.Found():
            return _recover(job, tools, known, reading)
        case reconcile.Undecidable():
            detail = "the service lists more uploads like this one than were tried"
            return Undecided(known, "several_matches", detail, reading.candidates)
        case reconcile.Absent() if job.looked_s < tools.uploads.reconcile_window_s:
            return LookAgain(known, "the service does not list it yet")
        case reconcile.Absent() if _may_resend(tools, known):
            return _resend(job, tools, known, secret, "the service does not list it")
        case reconcile.Absent():
            detail = "the service lists none of the uploads so far, so that this one's absence tells nothing"
            return Undecided(known, "nothing_listed", detail)
        case reconcile.NotYet():
            return _without_listing(job, tools, known, secret, reading.reason)


def _may_resend(tools: Tools, known: Delivery) -> bool:
    """An absence counts where the listing was seen to show what was accepted; else only so many times."""
    with storage(tools.state_dir):
        shows = tools.journal.newest(tools.target) is not None
    return shows or known.resent < tools.uploads.resend_limit


def _ready_to_look_up(job: Job, tools: Tools, known: Delivery) -> Delivery | Outcome:
    """Claim it again if a power cut undid that, and complete what is known of it."""
    if not filing.is_claimed(job, tools):
        if filing.lies_in_inbox(job, known):
            _claim(job, tools)
        elif filing.is_away(job, known):
            return InboxGone(known)
    known = _with_window(tools, known)
    if known.sha256 is not None:
        return known
    detail = "it cannot be read to its end now, and without its digest nothing can be told"
    return _with_digest(job, tools, known) or LookAgain(known, detail)


def _with_window(tools: Tools, known: Delivery) -> Delivery:
    """Close the window of an attempt that a crash cut off."""
    if known.state is not State.SENDING:
        return known
    windows = (*known.windows[:-1], (known.windows[-1][0], tools.wall()))
    return save(tools, replace(known, state=State.UNKNOWN, windows=windows))


def _with_digest(job: Job, tools: Tools, known: Delivery) -> Delivery | None:
    """Look into a claim that only its folder told of; None if that can't be done now."""
    with _opened(job, tools, known) as held, suppress(check.ShortRead, check.Stopped, AttemptOpenError):
        if held is None:
            return None
        checked = _checked(job, tools, held, Check.NONE)
        tagged = tools.uploads.remote_name is RemoteName.TAGGED
        remote = remote_name(job.name, tag=checked.sha256[:12] if tagged else None)
        filled = replace(known, sha256=checked.sha256, lines=checked.lines, remote_name=remote)
        return save(tools, replace(filled, target=tools.target))
    return None


def _settle_anew(job: Job, tools: Tools, known: Delivery, secret: "key.Key") -> Outcome:
    """The claimed file is another one than that whose answer was lost: that upload is nobody's."""
    reading = _look_up(job, tools, known, secret)
    orphan = reading.entry.id if isinstance(reading, reconcile.Found) else None
    save(tools, replace(known, state=State.FAILED, file_id=orphan, finished_at=tools.wall()))
    detail = "it was changed after it had been sent; nobody's is what the service may have of it"
    return _changed(job, tools, detail, orphans=[orphan] if orphan else None)


Reading = reconcile.Found | reconcile.Absent | reconcile.NotYet | reconcile.Undecidable | Verdict


def _look_up(job: Job, tools: Tools, known: Delivery, secret: "key.Key") -> Reading:
    """Ask for listings of growing length until one decides."""
    reading: Reading = reconcile.NotYet("full")
    smaller: tuple[int, int] | None = None
    with storage(tools.state_dir):
        newest = tools.journal.newest(tools.target)  # before the listing is made, which then must show it
    for limit in (100, 1000, 10000):
        attempt = tools.client.list_files(purpose=job.inbox.purpose, limit=limit, key=secret.reveal())
        verdict = _judge_listing(tools, attempt)
        if verdict.blame is not Blame.ACCEPTED:
            return verdict
        answer = attempt.answer
        listing = reconcile.read_listing(answer.body) if answer and verdict.data is not None else None
        if answer is None or listing is None:
            return reconcile.NotYet("no_listing")
        reading = _match(
            job, tools, known, listing, limit=limit, smaller=smaller, newest=newest, date=answer.date
        )
        if not isinstance(reading, reconcile.NotYet) or reading.reason != "full":
            return reading
        smaller = (limit, len(listing))
    return reading


def probe(inbox: Inbox, tools: Tools) -> Verdict:
    """Ask a held target for a listing, with the key read anew: it costs nothing."""
    try:
        secret = key.read(inbox.api, tools.environ)
    except key.NoKey as missing:
        return Verdict(Blame.ACCOUNT, "no_key", str(missing))
    attempt = tools.client.list_files(purpose=inbox.purpose, limit=1, key=secret.reveal())
    return _judge_listing(tools, attempt)


def _judge_listing(tools: Tools, attempt: Attempt) -> Verdict:
    client = tools.client
    return judge_listing(attempt, host=client.host, reached_before=client.resolved, wall=tools.wall())


def _match(
    job: Job,
    tools: Tools,
    known: Delivery,
    listing: tuple[reconcile.Listed, ...],
    *,
    limit: int,
    smaller: tuple[int, int] | None,
    newest: str | None,
    date: str | None,
) -> Reading:
    lost = reconcile.Lost(known.remote_name or "", known.size, known.lines, known.windows, job.inbox.purpose)
    skew = reconcile.skew_s(date, wall=tools.wall())
    with storage(tools.state_dir):
        known_ids = tools.journal.known(tools.target, [entry.id for entry in listing])
    return reconcile.match(
        lost,
        listing,
        limit=limit,
        smaller=smaller,
        known_ids=known_ids,
        newest_known=newest,
        allowance_s=reconcile.allowance_s(skew),
    )


def _recover(job: Job, tools: Tools, known: Delivery, found: reconcile.Found) -> Outcome:
    verdict = Verdict(Blame.ACCEPTED, "recovered", "", data=found.entry.raw)
    answer = _answer(job, tools, known, verdict, duration_s=None, recovered=True)
    accepted = replace(known, state=State.ACCEPTED, answer=answer, file_id=found.entry.id)
    try:
        accepted = save(tools, accepted)
    except IdKnownError:
        return LookAgain(known, "its id was given to another file meanwhile")
    except StorageError as error:
        return error.outcome(claimed=True, known=accepted)
    _remember_orphans(tools, known, found.orphans)
    tools.log(
        "upload.recovered",
        size=known.size,
        attempt=known.attempts,
        file_id=found.entry.id,
        orphans=list(found.orphans) or None,
    )
    return filing.file_away(job, tools, accepted)


def _remember_orphans(tools: Tools, known: Delivery, orphans: tuple[str, ...]) -> None:
    """No other lost upload may take these ids for its own."""
    nobodys = replace(known, row=None, state=State.FAILED, finished_at=tools.wall())
    for orphan in orphans:
        with suppress(IdKnownError):
            save(tools, replace(nobodys, file_id=orphan))


def _without_listing(job: Job, tools: Tools, known: Delivery, secret: "key.Key", reason: str) -> Outcome:
    """Send it again where no listing is to be had; one that is stale or never whole proves no absence."""
    detail = "the service gives no listing that could tell what became of it"
    if job.looked_s < tools.uploads.reconcile_window_s:
        return LookAgain(known, detail)
    may_resend = reason == "no_listing" and tools.uploads.on_unknown is OnUnknown.RESEND
    if may_resend and known.resent < tools.uploads.resend_limit:
        return _resend(job, tools, known, secret, detail)
    return Undecided(known, reason, detail)


def _resend(job: Job, tools: Tools, known: Delivery, secret: "key.Key", detail: str) -> Outcome:
    _room(job, tools)
    with _opened(job, tools, known) as held:
        if held is None:
            return Undecided(known, "changed", "it was changed after it had been sent")
        tools.log("upload.resent", size=known.size, attempt=known.attempts + 1, detail=detail)
        return _send(job, tools, replace(held, known=replace(known, resent=known.resent + 1)), secret)

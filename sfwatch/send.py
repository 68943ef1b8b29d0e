"""One attempt: `sending` is durable before the first byte goes out, the outcome before it has effects.

Whose fault a failure is, `verdict.py` says. Here it is written down and turned into an outcome of `job.py`.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sfwatch import files, filing, key
from sfwatch.filing import StorageError, save
from sfwatch.job import (
    BackInInbox,
    Deferred,
    Job,
    LookAgain,
    NotTaken,
    Outcome,
    Refused,
    Tools,
    Unknown,
)
from sfwatch.journal import AttemptOpenError, Delivery, IdKnownError, State
from sfwatch.settings import RemoteName
from sfwatch.taken import Held, changed, give_back
from sfwatch.verdict import Attempt, Blame, Verdict, judge, remote_name

PROGRESS_S = 10.0
"""How often a long upload says how far it is."""


def no_key(job: Job, tools: Tools, missing: "key.NoKey", known: Delivery | None) -> Deferred:
    verdict = Verdict(Blame.ACCOUNT, "no_key", str(missing))
    attempts, first = (known.attempts, known.first_attempt_at) if known else (0, None)
    return Deferred(verdict, attempts, first, 0.0, filing.is_claimed(job, tools), None)


def send(job: Job, tools: Tools, held: Held, secret: "key.Key") -> Outcome:
    with tools.gate:
        if tools.stop() and held.known.state is not State.UNKNOWN:  # it may have waited here until the end
            return give_back(job, tools) or BackInInbox()
        known = _announced(job, tools, held)
        if not isinstance(known, Delivery):
            return known
        attempt = _attempt(job, tools, held.fd, known, secret)
    return _conclude(job, tools, replace(held, known=known), attempt, before=held.known)


def _announced(job: Job, tools: Tools, held: Held) -> Delivery | Outcome:
    """Write down that the file is about to be sent; else what hinders it."""
    try:
        return save(tools, _sending(job, tools, held.known, tools.wall()))
    except AttemptOpenError:
        detail = "a file of the same name is being uploaded to the same place"
        if held.known.state is State.UNKNOWN:
            return LookAgain(held.known, detail)
        return give_back(job, tools) or NotTaken("namesake", detail)
    except StorageError:
        if held.known.state is State.UNKNOWN:  # an earlier attempt may have been stored: it stays claimed
            raise
        back = give_back(job, tools)
        if back is not None:
            return back
        raise


def _attempt(job: Job, tools: Tools, fd: int, known: Delivery, secret: "key.Key") -> Attempt:
    tools.log(
        "upload.started",
        size=known.size,
        attempt=known.attempts,
        remote_name=known.remote_name,
        sha256=known.sha256,
        lines=known.lines,
    )
    job.progress.start(tools.clock())
    attempt = tools.client.send(
        fd,
        known.size,
        remote_name=known.remote_name or "",
        purpose=job.inbox.purpose,
        key=secret.reveal(),
        progress=_progress(job, tools, known),
        stop=tools.stop,
        max_rate=tools.pace,
        approve=lambda sha256: sha256 == known.sha256,
        moved=_moved(job, tools),
    )
    job.progress.end()
    return attempt


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


def _moved(job: Job, tools: Tools) -> Callable[[], None]:
    def moved() -> None:
        job.progress.moved_at = tools.clock()

    return moved


def _progress(job: Job, tools: Tools, known: Delivery) -> Callable[[int], None]:
    started = said = tools.clock()

    def progress(sent: int) -> None:
        nonlocal said
        job.progress.sent = sent
        now = tools.clock()
        if now - said >= PROGRESS_S:
            said = now
            speed = round(sent / (now - started))
            tools.log("upload.progress", size=known.size, attempt=known.attempts, sent=sent, bytes_per_s=speed)

    return progress


def _conclude(job: Job, tools: Tools, held: Held, attempt: Attempt, *, before: Delivery) -> Outcome:
    """Write down how the attempt ended, and only then act on it."""
    reached = tools.client.resolved
    verdict = judge(attempt, host=tools.client.host, reached_before=reached, wall=tools.wall())
    known = held.known
    match verdict.blame:
        case Blame.ACCEPTED:
            if not _was_sent(held, attempt):
                return _orphan(job, tools, known, before, verdict)
            return _accept(job, tools, replace(held, known=known), verdict, attempt)
        case Blame.UNKNOWN:
            ended = (*known.windows[:-1], (known.windows[-1][0], tools.wall()))
            known = replace(known, state=State.UNKNOWN, windows=ended)
            return _saved(tools, known) or Unknown(verdict, known)
        case _ if not before.windows and not _was_sent(held, attempt):
            save(tools, replace(before, row=known.row))
            return changed(job, tools, attempt.detail or "it was changed while it was sent")
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


def _was_sent(held: Held, attempt: Attempt) -> bool:
    """Whether what went out is what was checked, and what lies there now."""
    after = files.Fingerprint.of(os.fstat(held.fd))
    unchanged = held.before.same_content(after) and files.probe_lease(held.fd) is not files.Lease.BUSY
    return unchanged and attempt.sha256 in (None, held.known.sha256)


def _defer(job: Job, tools: Tools, known: Delivery, verdict: Verdict) -> Outcome:
    if known.state is State.UNKNOWN:
        return deferred(verdict, known, claimed=True)
    back = give_back(job, tools)
    if back is None or isinstance(back, NotTaken):
        return deferred(verdict, known, claimed=back is not None)
    return back


def deferred(verdict: Verdict, known: Delivery, *, claimed: bool) -> Deferred:
    return Deferred(
        verdict, known.attempts, known.first_attempt_at, known.held_s, claimed, known if claimed else None
    )


def _accept(job: Job, tools: Tools, held: Held, verdict: Verdict, attempt: Attempt) -> Outcome:
    tools.accepted()
    known = held.known
    answer = answered(job, tools, verdict, duration_s=attempt.duration_s, recovered=False)
    _say_accepted(tools, known, verdict, attempt)
    known = replace(
        known,
        state=State.ACCEPTED,
        answer=answer,
        file_id=answer["data"]["id"],
        target_name=filing.likely_name(job),
    )
    try:
        known = save_accepted(tools, known)
    except StorageError as error:
        return error.outcome(claimed=True, known=known)
    return filing.file_away(job, tools, known, fd=held.fd)


def save_accepted(tools: Tools, known: Delivery) -> Delivery:
    """A service that knows the bytes already may answer with the id that they have: then the row has none.

    Raises IdKnownError for an id out of a listing: there it is another file's, and tells nothing of this one.
    """
    try:
        return save(tools, known)
    except IdKnownError:
        if (known.answer or {}).get("recovered"):
            raise
        return save(tools, replace(known, file_id=None))


def answered(
    job: Job, tools: Tools, verdict: Verdict, *, duration_s: float | None, recovered: bool
) -> dict[str, Any]:
    """What is kept of an acceptance; `same_as` comes to it when the journal writes it down."""
    at = datetime.fromtimestamp(tools.wall(), UTC)
    return {
        "data": _shallow(dict(verdict.data or {})),
        "endpoint": f"{job.inbox.api.base_url}/files",
        "http_status": verdict.http_status,
        "code": verdict.code,
        "message": verdict.message,
        "trace_id": verdict.trace_id,
        "recovered": recovered,
        "uploaded_at": at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z",
        "duration_s": round(duration_s, 3) if duration_s is not None else None,
    }


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
    return changed(job, tools, detail, orphans=[orphan])

"""One attempt: `sending` is durable before the first byte goes out, the outcome before it has effects.

Whose fault a failure is, `verdict.py` says. Here it is written down and turned into an outcome of `job.py`.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from sfwatch import files, filing, key
from sfwatch.delivery import evidence
from sfwatch.filing import StorageError, save, storage
from sfwatch.job import (
    BackInInbox,
    Deferred,
    Job,
    NeedsLookUp,
    NotTaken,
    Outcome,
    Refused,
    Tools,
    Unknown,
)
from sfwatch.journal import Delivery, IdKnownError, State, address
from sfwatch.service import listing
from sfwatch.settings import RemoteName
from sfwatch.taken import Held, changed, give_back
from sfwatch.verdict import (
    Attempt,
    Blame,
    Reason,
    Verdict,
    judge,
    judge_listing,
    remote_name,
    tag_of,
    words,
)

PROGRESS_S = 10.0
"""How often a long upload says how far it is."""


def no_key(missing: "key.NoKey", *, claimed: bool) -> Deferred:
    return Deferred(Verdict(Blame.ACCOUNT, "no_key", str(missing)), claimed, None)


def send(
    job: Job, tools: Tools, held: Held, secret: "key.Key", *, still_absent: Callable[[], bool] = lambda: False
) -> Outcome:
    """One attempt, from its row to its outcome. `still_absent` looks again where a proof has grown too old."""
    resend = job.resend
    with tools.gate:
        unknown = held.known.state is State.UNKNOWN
        if tools.stop() and not unknown:  # it may have waited here until the end
            return give_back(job, tools) or BackInInbox()
        is_old = resend is not None and resend.until is not None and tools.clock() > resend.until
        if is_old and not still_absent():
            return NeedsLookUp(held.known)
        try:
            known = save(tools, _sending(job, tools, held.known))
        except StorageError:
            if unknown:  # an earlier attempt may have been stored: it stays claimed
                raise
            back = give_back(job, tools)
            if back is not None:
                return back
            raise
        if resend is not None:
            tools.log("upload.resent", size=known.size, attempt=known.attempts, detail=resend.detail)
            request = resend.file
            if request is not None:  # the row says that it is used up
                with suppress(OSError):
                    tools.journal.call(lambda: request.unlink(missing_ok=True))
        attempt = _attempt(job, tools, held.fd, known, secret)
    return _conclude(job, tools, replace(held, known=known), attempt, secret, before=held.known)


def _attempt(job: Job, tools: Tools, fd: int, known: Delivery, secret: "key.Key") -> Attempt:
    tools.log(
        "upload.started",
        level="debug" if job.trial else None,
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


def _sending(job: Job, tools: Tools, known: Delivery) -> Delivery:
    """The row that announces an attempt: from now on the service may have the file under this name.

    Tag and name hold for every later attempt and look-up of this file, whatever the settings say by then.
    """
    resend = job.resend
    unproved = 0 if resend is not None and resend.proved else known.unproved
    tag, name = known.tag, known.remote_name
    if tag is None or name is None:
        tag = tag_of(job.claims, job.name, known.mtime_ns, known.sha256 or "")
        name = remote_name(job.name, tag=tag if tools.uploads.remote_name is RemoteName.TAGGED else None)
    return replace(
        known,
        state=State.SENDING,
        tag=tag,
        remote_name=name,
        purpose=job.inbox.purpose,
        attempts=known.attempts + 1,
        unproved=unproved + 1,
        first_sent=known.first_sent if known.state is State.UNKNOWN else None,
        resends=known.resends + 1
        if resend is not None and not (resend.proved or resend.request)
        else known.resends,
        resend_request=resend.request if resend is not None and resend.request else known.resend_request,
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


def _conclude(
    job: Job, tools: Tools, held: Held, attempt: Attempt, secret: "key.Key", *, before: Delivery
) -> Outcome:
    """Write down how the attempt ended, and only then act on it."""
    client, known = tools.client, held.known
    verdict = judge(attempt, host=client.host, reached_before=client.resolved, wall=tools.wall())
    if verdict.blame is Blame.DOUBTED:
        verdict = _reconsidered(job, tools, known, verdict, secret)
    if verdict.blame is Blame.ACCEPTED:
        if not _was_sent(held, attempt):
            return _orphan(job, tools, known, verdict)
        return _accept(job, tools, held, verdict, attempt)
    if verdict.blame is Blame.UNKNOWN:
        known = replace(known, state=State.UNKNOWN)
        return _saved(tools, known) or Unknown(verdict, known)
    # The service has nothing of this attempt, but it may have an earlier one: then the file stays out of its
    # inbox until that is looked up. A resend that was refused counts: without proof another one is of no use.
    refused = verdict.blame in (Blame.FILE, Blame.DOUBTED)
    resends = known.resends if refused else before.resends
    known = replace(known, unproved=known.unproved - 1, resends=resends)
    known = _with_evidence(job, tools, known, verdict)
    if known.unproved:
        known = replace(known, state=State.UNKNOWN)
        clear = verdict.blame is Blame.FILE  # the same bytes were refused then, too
        return _saved(tools, known) or (Refused(verdict, known) if clear else Unknown(verdict, known))
    if not _was_sent(held, attempt):
        save(tools, replace(before, row=known.row, unproved=0, state=State.WAITING))
        return changed(job, tools, attempt.detail or "it was changed while it was sent")
    if refused:
        known = replace(known, state=State.DOUBTED)
        return _saved(tools, known) or Refused(verdict, known)
    known = replace(known, state=State.WAITING)
    return _saved(tools, known) or _defer(job, tools, known, verdict)


def list_files(
    tools: Tools, secret: "key.Key", *, purpose: str, limit: int, after: str | None = None
) -> tuple[Attempt, Verdict]:
    """Ask for a page of the service's listing, and judge the answer."""
    client = tools.client
    asked = client.list_files(purpose=purpose, limit=limit, after=after, key=secret.reveal())
    return asked, judge_listing(asked, host=client.host, reached_before=client.resolved, wall=tools.wall())


def _reconsidered(job: Job, tools: Tools, known: Delivery, verdict: Verdict, secret: "key.Key") -> Verdict:
    """Whether a refusal that may be the account's is plainly the file's, or plainly the account's."""
    if verdict.http_status == 413:
        with storage(tools.state_dir):
            if known.size > tools.journal.largest_accepted(tools.target):
                return replace(verdict, blame=Blame.FILE)
    _, listed = list_files(tools, secret, purpose=job.inbox.purpose, limit=1)
    if words(listed) != words(verdict):
        return verdict
    detail = (
        f"{tools.client.host} refuses a listing of files in the same words: {verdict.message or verdict.detail}"
    )
    return replace(
        verdict, blame=Blame.ACCOUNT, reason=Reason.UNAUTHORIZED, detail=f"{detail}; check base_url and the key"
    )


def _with_evidence(job: Job, tools: Tools, known: Delivery, verdict: Verdict) -> Delivery:
    """What this failure proves of the file itself; kept in its row."""
    refused = verdict.blame in (Blame.FILE, Blame.DOUBTED)
    suspect = verdict.could_be_the_file or (verdict.blame is Blame.ACCOUNT and job.charged)
    if not (refused or suspect):
        return known
    with storage(tools.state_dir):
        accepted = tools.journal.last_accepted(tools.target)
    if not refused:
        return evidence.suspected(known, accepted)
    said = words(verdict)
    known = evidence.refused(known, said, accepted)
    if evidence.is_proved(known):
        with storage(tools.state_dir):
            if tools.journal.disproves(tools.target, said):
                return replace(known, refusals=1)
    return known


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
    back = give_back(job, tools)
    if back is None or isinstance(back, NotTaken):
        return Deferred(verdict, claimed=back is not None, known=known)
    return back


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
    if known.file_id is not None:  # else the service has equal bytes once only: the name is another upload's
        _note_name(tools, known, answer["data"])
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


def save_orphan(tools: Tools, known: Delivery, orphan: str | None) -> None:
    """Finish the row as an upload that is no file's; an id that is another upload's already stays there."""
    known = replace(known, state=State.ORPHAN, finished_at=tools.wall())
    try:
        save(tools, replace(known, file_id=orphan))
    except IdKnownError:
        save(tools, known)


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
    common: dict[str, Any] = {
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
    if "bytes" in data and data["bytes"] != known.size:
        detail = f"the service says that it has {data['bytes']} bytes of {known.size}"
        tools.log("upload.mismatch", detail=detail, **common)


def _note_name(tools: Tools, known: Delivery, data: Mapping[str, Any]) -> None:
    """Remember whether this service keeps our tag: without it no listing proves that an upload is absent."""
    named = data.get("filename")
    if known.tag is None or known.tag not in (known.remote_name or "") or not isinstance(named, str):
        return
    where, kept = address(tools.target), listing.tag_in(named) == known.tag
    with suppress(OSError):
        if kept == tools.journal.names_kept(where):
            return
        tools.journal.note_names(where, kept=kept)
    if not kept:
        detail = (
            f"the service calls the file {named!r} instead of {known.remote_name!r}: where a name loses its"
            " tag, an upload whose answer is lost can be found only by its tag, and is never taken for absent"
        )
        tools.log(
            "upload.mismatch", size=known.size, attempt=known.attempts, file_id=data.get("id"), detail=detail
        )


def _orphan(job: Job, tools: Tools, known: Delivery, verdict: Verdict) -> Outcome:
    """Bytes were accepted that are not this file's any more: the upload is an orphan."""
    orphan = str((verdict.data or {})["id"])
    save_orphan(tools, known, orphan)
    detail = f"it was changed while it was sent; the service keeps an upload of it as {orphan}"
    return changed(job, tools, detail, orphans=[orphan])

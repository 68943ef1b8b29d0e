"""Once the answer is durable, only this is left: publish the sidecar or report, then move the file beside it.

Nothing here talks to the service, and every step may be done again: it ends in one file and one sidecar however
often a crash or a full disk interrupts it. The target's name is in the journal before the sidecar is published,
the sidecar is durable before the file appears beside it, and the row is finished last.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sfwatch import __version__, check, claim, files, move, record
from sfwatch.job import Done, Failed, InboxGone, Job, NoStorage, NotTaken, Outcome, Tools
from sfwatch.journal import Delivery, State
from sfwatch.verdict import tag_of

_TRIES = 20

STORAGE_REASONS = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "quota",
    errno.EROFS: "read_only",
    errno.EACCES: "no_permission",
    errno.EPERM: "no_permission",
    errno.ENOENT: "missing",
    errno.ENOTDIR: "missing",
    errno.EFBIG: "no_space",
}
"""Short codes for what keeps a folder from taking a file; anything else is `io_error`."""


_REMEDIES = {
    "no_space": "free some space there",
    "quota": "free some space there, or raise the quota of this user",
    "read_only": "make it writable; under systemd, ReadWritePaths= has to name it or its parent",
    "no_permission": "give this user r, w and x there",
    "missing": "make it, or mount what belongs there",
}


class StorageError(Exception):
    """A folder does not take what must be written there."""

    def __init__(self, folder: str, error: OSError) -> None:
        super().__init__(f"{folder}: {error.strerror or error}")
        self.folder = folder
        self.reason = STORAGE_REASONS.get(error.errno or 0, "io_error")
        remedy = _REMEDIES.get(self.reason, "see what is wrong with its disk")
        self.detail = f"{folder} does not take files: {error.strerror or error}; {remedy}"

    def outcome(self, *, claimed: bool, known: Delivery | None = None) -> NoStorage:
        """Say it as the outcome of a job."""
        return NoStorage(self.folder, self.reason, self.detail, claimed, known)


@contextmanager
def storage(folder: Path | str) -> Iterator[None]:
    """Name the folder that any OSError within is the fault of."""
    try:
        yield
    except OSError as error:
        raise StorageError(str(folder), error) from error


def save(tools: Tools, known: Delivery) -> Delivery:
    """Make *known* durable. Raise StorageError if the state folder does not take it."""
    try:
        return tools.journal.save(known)
    except OSError as error:
        raise StorageError(tools.state_dir, error) from error


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a file goes to, and the document beside it."""

    folder: Path
    suffix: str
    state: State
    document: bytes


def findings_report(checked: check.Checked) -> dict[str, Any]:
    first = checked.findings[0]
    return {
        "reason": first.reason,
        "detail": first.detail,
        "line": first.line,
        "findings": [{"line": f.line, "reason": f.reason, "detail": f.detail} for f in checked.findings],
        "more_findings": checked.more,
    }


def refuse(job: Job, tools: Tools, known: Delivery, report: dict[str, Any]) -> Outcome:
    """The file is at fault: that is durable before its report is published."""
    at = datetime.fromtimestamp(tools.wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    tag = known.tag or tag_of(job.claims, job.name, known.mtime_ns, known.sha256 or "")
    refused = replace(known, state=State.REFUSED, tag=tag, report={**report, "failed_at": at})
    try:
        refused = save(tools, refused)
    except StorageError as error:
        return error.outcome(claimed=True, known=refused)
    return file_away(job, tools, refused)


def file_away(
    job: Job, tools: Tools, known: Delivery, *, fd: int | None = None, repeated: bool = False
) -> Outcome:
    """File under done or failed a file whose answer (or refusal) is in the journal.

    `fd` is the file, if it is still open from its sending; then this is the first try. `repeated`: it was done
    before, and a power cut has undone it.
    """
    ending = _ending(job, known)
    try:
        with _claimed(job, known) if fd is None else nullcontext(fd) as source:
            if not _is_the_same(source, known):
                return _not_what_was_sent(tools, known)
            known = _publish_and_move(job, tools, known, ending, source, first=fd is not None)
    except FileNotFoundError:
        return _without_its_file(job, tools, known, ending)
    except StorageError as error:
        return error.outcome(claimed=True, known=_as_written(job, tools))
    except claim.ClaimError as error:
        return NotTaken(error.reason, error.detail, claimed=True)
    except files.NotRegular as odd:
        return NotTaken("cannot_move", f"a {odd.kind} stands in the way in {ending.folder}", claimed=True)
    except move.SourceChanged:
        return _not_what_was_sent(tools, known)
    return _finished(job, tools, known, ending, repeated=repeated)


def _as_written(job: Job, tools: Tools) -> Delivery | None:
    """What the journal knows by now: the target's name may have been chosen just before the fault."""
    with suppress(OSError):
        return tools.journal.find(str(job.inbox.path), job.name)
    return None


def _not_what_was_sent(tools: Tools, known: Delivery) -> Outcome:
    """Somebody wrote to the claimed file by another link: its upload is an orphan, the file goes back."""
    orphans = [known.file_id] if known.file_id else None
    detail = "the file changed after it was sent; the uploaded copy stays at the service as an orphan"
    tools.log("file.changed", size=known.size, attempt=known.attempts, detail=detail, orphans=orphans)
    try:
        save(tools, replace(known, state=State.ORPHAN, finished_at=tools.wall()))
    except StorageError as error:
        return error.outcome(claimed=True, known=known)
    return NotTaken("being_written", detail, claimed=True)


@contextmanager
def _claimed(job: Job, known: Delivery) -> Iterator[int]:
    """The claimed file, open. A power cut may have undone the claim: then it is taken again."""
    if not is_claimed(job) and lies_in_inbox(job, known):
        with storage(job.inbox.path):
            claim.take(job.inbox.path, job.claims, job.name)
    fd = claim.open_claimed(job.inbox.path, job.claims, job.name)
    try:
        yield fd
    finally:
        files.close(fd)


def is_claimed(job: Job) -> bool:
    """Whether this file lies in its claims folder."""
    try:
        files.close(claim.open_claimed(job.inbox.path, job.claims, job.name))
    except FileNotFoundError:
        return False
    return True


def is_what_was_sent(job: Job, known: Delivery) -> bool:
    """Whether the claimed file is still the one that the journal speaks of; a file that is gone is no other."""
    try:
        fd = claim.open_claimed(job.inbox.path, job.claims, job.name)
    except FileNotFoundError:
        return True
    try:
        return _is_the_same(fd, known)
    finally:
        files.close(fd)


def _is_the_same(fd: int, known: Delivery) -> bool:
    """By its numbers, or else by its bytes: a touch alone changes nothing."""
    st = os.fstat(fd)
    numbers = (st.st_size, st.st_mtime_ns) == (known.size, known.mtime_ns)
    return numbers or (st.st_size == known.size and move.digest(fd) == known.sha256)


def is_away(job: Job) -> bool:
    """Whether the file's inbox is not there, but another folder in its place perhaps: a bare mount point.

    After a restart the inbox is known again by the claims folder, which has a name of its own.
    """
    try:
        there = files.identity(job.inbox.path)
    except OSError:
        return True
    if job.home is not None:
        return there != job.home
    return not os.path.isdir(claim.claims_folder(job.inbox.path, job.claims))  # noqa: PTH112


def lies_in_inbox(job: Job, known: Delivery) -> bool:
    """Whether a power cut undid the claim: the file lies in the inbox again, with its size, time and bytes."""
    try:
        with (
            files.folder(os.path.realpath(job.inbox.path)) as top,
            files.parent(top, job.name) as (folder, base),
        ):
            with files.regular(base, dir_fd=folder) as fd:
                st = os.fstat(fd)
                same = (st.st_size, st.st_mtime_ns) == (known.size, known.mtime_ns)
                return same and known.sha256 in (None, move.digest(fd))
    except (FileNotFoundError, NotADirectoryError, files.NotRegular):
        return False


def likely_name(job: Job) -> str | None:
    """Return the name in done that a file gets if it is free: it becomes durable together with the answer.

    Nobody looks whether it is: publishing the sidecar tells, and one that is taken costs writing a row more.
    """
    base = files.parts(job.name)[-1]
    return base if record.fits_anywhere(base) else None


def _publish_and_move(
    job: Job, tools: Tools, known: Delivery, ending: Ending, fd: int, *, first: bool
) -> Delivery:
    with claim.place(job.inbox.path, job.claims, job.name) as (source, base):
        files.lstat(base, dir_fd=source)  # what is gone is told before anything is published
        with storage(ending.folder), _target(job, ending.folder) as target:
            if known.target_name is not None and not first:  # what an earlier try left half-written goes
                files.sweep_temporaries(target)
            known = _place(tools, known, ending, target, source, base, fd)
            _move_marker(known, source, target, base)
    if base != job.name:
        claim.discard_empty_folders(job.inbox.path, job.claims)
    return known


@contextmanager
def _target(job: Job, folder: Path) -> Iterator[int]:
    """The folder that the file belongs into, open; of a tree, the same sub-folder as in its inbox.

    What stands in the way of a sub-folder is this file's bad luck, not the fault of all of done.
    """
    *folders, _ = files.parts(job.name)
    with files.trusted_folder(folder) as top, _sub_folder(top, folder, folders) as target:
        yield target


def _sub_folder(top: int, folder: Path, folders: list[str]) -> files.Opened[int]:
    try:
        return files.below(top, folders, make=0o770)
    except OSError as error:
        if not folders or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        detail = f"{folder.joinpath(*folders)} can be no folder for it: {error.strerror}"
        raise claim.ClaimError("cannot_move", detail) from error


def _place(
    tools: Tools, known: Delivery, ending: Ending, target: int, source: int, base: str, fd: int
) -> Delivery:
    """Reserve a name by its sidecar and move the file to it; a name that was taken meanwhile is passed over."""
    sha256 = known.sha256 or ""
    for _ in range(_TRIES):
        if known.target_name is None:
            known = _with_name(tools, known, ending, target, base)
        name = known.target_name or base
        try:
            record.reserve(target, name, ending.suffix, ending.document, sha256=sha256)
        except FileExistsError:
            ours = record.is_our_own(target, name + ending.suffix, sha256, ending.document)
            if ours and move.finish(source, base, target, name, fd=fd, sha256=sha256):
                return known
            known = replace(known, target_name=None)
            continue
        try:
            move.move(source, base, target, name, fd=fd, sha256=sha256)
        except (FileExistsError, move.SourceChanged) as odd:
            record.unreserve(target, name, ending.suffix, ending.document, sha256=sha256)
            if isinstance(odd, move.SourceChanged):
                raise
            known = replace(known, target_name=None)
            continue
        return known
    raise OSError(errno.EEXIST, "every name tried was taken by somebody else at once", str(ending.folder))


def _with_name(tools: Tools, known: Delivery, ending: Ending, target: int, base: str) -> Delivery:
    return save(tools, replace(known, target_name=_chosen(tools, target, base, ending.suffix)))


def _chosen(tools: Tools, target: int, base: str, suffix: str) -> str:
    return record.choose_name(target, base, suffix, at=datetime.fromtimestamp(tools.wall(), UTC))


def _move_marker(known: Delivery, source: int, target: int, base: str) -> None:
    """The producer's marker goes along; it is no file of its own and holds nothing up."""
    if known.marker is None:
        return
    with suppress(OSError, files.NotRegular):
        marker = base + known.marker
        with files.regular(marker, dir_fd=source) as fd:
            beside = f"{known.target_name}{known.marker}"
            move.move(source, marker, target, beside, fd=fd, sha256=move.digest(fd))


def _send_marker_after(job: Job, known: Delivery, target: int, base: str) -> None:
    """A crash came between the moves of the file and of its marker."""
    files.sweep_temporaries(target)
    with suppress(FileNotFoundError, files.NotRegular, claim.ClaimError):
        with claim.place(job.inbox.path, job.claims, job.name) as (source, _):
            _move_marker(known, source, target, base)
    claim.discard_empty_folders(job.inbox.path, job.claims)


def _without_its_file(job: Job, tools: Tools, known: Delivery, ending: Ending) -> Outcome:
    """The claim is empty: the file was moved before a crash, or somebody took it; or the inbox is away."""
    if is_away(job):
        return InboxGone(known)
    base = files.parts(job.name)[-1]
    try:
        with storage(ending.folder), _target(job, ending.folder) as target:
            if known.target_name and _is_there(target, known.target_name, known, ending):
                _send_marker_after(job, known, target, base)
                return _finished(job, tools, known, ending, repeated=True)
            known = _published_alone(tools, known, ending, target, base)
    except StorageError as error:
        return error.outcome(claimed=True, known=known)
    except (claim.ClaimError, files.NotRegular) as odd:
        return NotTaken("cannot_move", str(odd), claimed=True)
    return _finished(job, tools, known, ending, detail="the file itself was taken away while it was under way")


def _is_there(folder: int, name: str, known: Delivery, ending: Ending) -> bool:
    """Whether the file was moved to this name before: the name alone may have been somebody else's by then."""
    if not record.is_our_own(folder, name + ending.suffix, known.sha256 or "", ending.document):
        return False
    try:
        with files.regular(name, dir_fd=folder) as fd:
            return os.fstat(fd).st_size == known.size and move.digest(fd) == known.sha256
    except (FileNotFoundError, files.NotRegular):
        return False


def _published_alone(tools: Tools, known: Delivery, ending: Ending, target: int, base: str) -> Delivery:
    """The sidecar of a file that is not there any more, under another name if its own was taken meanwhile."""
    sha256 = known.sha256 or ""
    for _ in range(_TRIES):
        if known.target_name is None:
            known = _with_name(tools, known, ending, target, base)
        name = known.target_name or base
        if record.is_our_own(target, name + ending.suffix, sha256, ending.document):
            return known
        with suppress(FileExistsError):
            record.reserve(target, name, ending.suffix, ending.document, sha256=sha256)
            return known
        known = replace(known, target_name=None)
    raise OSError(errno.EEXIST, "every name tried was taken by somebody else at once", str(ending.folder))


def _finished(
    job: Job,
    tools: Tools,
    known: Delivery,
    ending: Ending,
    *,
    repeated: bool = False,
    detail: str | None = None,
) -> Outcome:
    """Say it, then finish the row: a crash in between repeats the event, it never omits it."""
    path = "/".join([str(ending.folder), *files.parts(job.name)[:-1], known.target_name or ""])
    said: dict[str, Any] = {
        "path": path,
        "attempts": known.attempts,
        "total_s": round(tools.clock() - job.seen_at, 3),
        "repeated": repeated or None,
    }
    beside = f"{path}{ending.suffix}"
    if known.state is State.ACCEPTED:
        _say_done(tools, known, beside, detail=detail, **said)
    else:
        _say_failed(tools, known, beside, **said)
    finished = replace(known, state=ending.state, finished_at=tools.wall())
    try:
        save(tools, finished)
    except StorageError as error:
        return error.outcome(claimed=True, known=finished)
    return finished_outcome(finished)


def finished_outcome(known: Delivery) -> Outcome:
    """Return what became of a file whose row is finished."""
    if known.state is State.FAILED:
        return Failed((known.report or {}).get("reason", ""))
    return Done(known.size, recovered=bool((known.answer or {}).get("recovered")))


def _say_done(tools: Tools, known: Delivery, sidecar: str, **said: Any) -> None:
    answer = known.answer or {}
    tools.log(
        "file.done",
        size=known.size,
        file_id=known.file_id or answer["data"]["id"],
        trace_id=answer.get("trace_id"),
        sidecar=sidecar,
        sha256=known.sha256,
        lines=known.lines,
        recovered=answer.get("recovered") or None,
        same_as=answer.get("same_as"),
        **said,
    )


def _say_failed(tools: Tools, known: Delivery, report: str, **said: Any) -> None:
    facts = known.report or {}
    tools.log(
        "file.failed",
        size=known.size,
        report=report,
        **{key: facts.get(key) for key in ("reason", "detail", "line", "http_status", "trace_id")},
        **said,
    )


def _ending(job: Job, known: Delivery) -> Ending:
    if known.state is State.REFUSED:
        facts = {**(known.report or {}), "sha256": known.sha256, "size": known.size, "attempts": known.attempts}
        document = record.report(**facts, inbox=job.inbox.name, original_name=job.name, version=__version__)
        return Ending(job.inbox.failed, record.REPORT, State.FAILED, document)
    return Ending(job.inbox.done, record.SIDECAR, State.DONE, _sidecar(job, known))


def _sidecar(job: Job, known: Delivery) -> bytes:
    answer = dict(known.answer or {})
    data = answer.pop("data")
    facts = {
        "sha256": known.sha256,
        "size": known.size,
        "lines": known.lines,
        "inbox": job.inbox.name,
        "original_name": job.name,
        **answer,
        "attempts": known.attempts,
        "settled_by": known.settled_by,
        "version": __version__,
    }
    return record.sidecar(data=data, facts=facts)

"""A file in our hands: claimed, opened as the file that settled, read, and given back if it must go back.

A file goes back into its inbox only when the service provably has nothing of it, which callers have to know.
Faults are told apart by whom they hold up: one file that cannot be read holds up nobody else, a disk that
takes no files holds up its inbox.
"""

import errno
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from sfwatch import check, claim, files, filing
from sfwatch.filing import StorageError, storage
from sfwatch.job import (
    BackInInbox,
    Gone,
    InboxGone,
    Job,
    NotTaken,
    Outcome,
    Task,
    Tools,
)
from sfwatch.journal import Delivery, State
from sfwatch.settings import ROOM_BYTES, Check

_ROOM_FOR_S = 1.0


class UnreadableError(Exception):
    """One file cannot be opened or read, whatever the rest of its disk does."""

    def __init__(self, job: Job, error: OSError) -> None:
        super().__init__(f"{job.inbox.path / job.name} can't be read: {error.strerror or error}")


@contextmanager
def reading(job: Job) -> Iterator[None]:
    """A fault in reading one file is that file's: a hold on its inbox would stop all the others."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(job, error) from error


def is_claimed(job: Job) -> bool:
    """Whether our claims hold this very file: an earlier one of its name does not count.

    sshfs gives a file another number with each rename, hence size and time.
    """
    try:
        fd = claim.open_claimed(job.inbox.path, job.claims, job.name)
    except FileNotFoundError:
        return False
    except (OSError, claim.ClaimError, files.NotRegular):
        return job.settled is None
    held = files.Fingerprint.of(os.fstat(fd))
    files.close(fd)
    wanted = job.settled.fingerprint if job.settled else held
    return held.ino == wanted.ino or (held.size, held.mtime_ns) == (wanted.size, wanted.mtime_ns)


def stopped(job: Job, tools: Tools, error: StorageError) -> Outcome:
    """What was known when the job began may be overtaken: from now on the journal's word counts."""
    known = None
    with suppress(OSError):
        known = tools.journal.find(str(job.inbox.path), job.name)
    return error.outcome(claimed=is_claimed(job), known=known)


def gone(job: Job, tools: Tools) -> Outcome:
    """Tell a file that somebody took from an inbox that is away: a mount point is a folder, too."""
    with storage(tools.state_dir):
        known = tools.journal.find(str(job.inbox.path), job.name)
    if filing.is_away(job):
        return InboxGone(job.known)
    if known is not None:
        with storage(tools.state_dir):
            tools.journal.forget(known)
    return Gone(quiet=job.task is Task.RESUME and known is None)


@dataclass(frozen=True, slots=True)
class Held:
    """A claimed file, open, as it was when it was opened."""

    fd: int
    before: files.Fingerprint
    known: Delivery


def room(job: Job, tools: Tools) -> Outcome | None:
    """Room for journal, sidecar and move is made sure of before anything is sent; asked for once a second."""
    now = tools.clock()
    asked_at, free = tools.room.get(job.inbox.path, (-math.inf, None))
    if now - asked_at >= _ROOM_FOR_S:
        free = _free(job, tools)
        tools.room[job.inbox.path] = (now, free)
    size = job.settled.fingerprint.size if job.settled else 0
    if free is None or free >= ROOM_BYTES + size:
        return None
    return NotTaken("no_room", f"{job.inbox.done} has {free} bytes free, too few for this file of {size}")


def _free(job: Job, tools: Tools) -> int | None:
    """The bytes that are free in done if that is on another disk than the inbox. Raises StorageError."""
    for folder in (tools.state_dir, str(job.inbox.path), str(job.inbox.failed), str(job.inbox.done)):
        with storage(folder):
            if folder == tools.state_dir:
                free = tools.journal.free_bytes()
            else:
                space = os.statvfs(folder)
                free = space.f_bavail * space.f_frsize
            if free < ROOM_BYTES:
                raise OSError(errno.ENOSPC, f"less than {ROOM_BYTES // 2**20} MiB are free")
    return None if job.inbox.done.stat().st_dev == job.inbox.path.stat().st_dev else free


def take(job: Job) -> int | None:
    """Claim the file; return it open for `opened` to close, or None: then `opened` tells why it can't be."""
    with _inbox_storage(job):
        if job.inbox.settle_marker is not None:
            _claim_marker(job)
        try:
            return claim.take_and_open(job.inbox.path, job.claims, job.name)
        except BaseException:
            if job.inbox.settle_marker is not None and not filing.is_claimed(job):
                _give_back_marker(job)  # without it the file would never settle again
            raise


def _claim_marker(job: Job) -> None:
    marker = job.name + (job.inbox.settle_marker or "")
    try:
        claim.take(job.inbox.path, job.claims, marker)
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
def opened(job: Job, tools: Tools, known: Delivery | None, fd: int | None = None) -> Iterator[Held | None]:
    """The claimed file, or None if it is not the file that settled, or somebody writes to it.

    `fd` is the file if it is open already; closed it is in any case.
    """
    if fd is None:
        with reading(job):
            fd = claim.open_claimed(job.inbox.path, job.claims, job.name)
    try:
        if files.probe_lease(fd) is files.Lease.BUSY:
            yield None
            return
        before = files.Fingerprint.of(os.fstat(fd))
        settled = job.settled.fingerprint if job.settled else before
        if (before.size, before.mtime_ns) != (settled.size, settled.mtime_ns):
            yield None
            return
        yield Held(fd, before, _delivery(job, tools, before, known))
    finally:
        files.close(fd)


def _delivery(job: Job, tools: Tools, seen: files.Fingerprint, known: Delivery | None) -> Delivery:
    """What is known of this very file; what is known of an earlier one of its name does not count."""
    if known is not None and (known.ino, known.size, known.mtime_ns) == (seen.ino, seen.size, seen.mtime_ns):
        served_s = known.served_s + job.served_s
        return replace(known, target=tools.target, claims=job.claims, served_s=served_s, target_name=None)
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
        claims=job.claims,
        marker=job.inbox.settle_marker,
    )


def read_and_check(job: Job, tools: Tools, held: Held, level: Check) -> check.Checked:
    with reading(job):
        return check.check(
            held.fd,
            held.before.size,
            level=level,
            max_bytes=job.inbox.max_bytes,
            max_lines=job.inbox.max_lines,
            stop=tools.stop,
        )


def changed(job: Job, tools: Tools, detail: str, *, orphans: list[str] | None = None) -> Outcome:
    tools.log("file.changed", detail=detail, orphans=orphans)
    return give_back(job, tools) or BackInInbox()


def give_back(job: Job, tools: Tools) -> Outcome | None:
    """Return None when the file is back in its inbox, else the outcome that says why it is not."""
    try:
        with _inbox_storage(job):
            claim.give_back(job.inbox.path, job.claims, job.name)
            if job.inbox.settle_marker is not None:
                _give_back_marker(job)
    except FileExistsError:
        return NotTaken("namesake", "a new file of its name has come meanwhile", claimed=True)
    except claim.ClaimError as error:
        return NotTaken(error.reason, error.detail, claimed=True)
    except FileNotFoundError:
        return gone(job, tools)
    except StorageError as error:
        return stopped(job, tools, error)
    return None


def _give_back_marker(job: Job) -> None:
    marker = job.name + (job.inbox.settle_marker or "")
    try:
        claim.give_back(job.inbox.path, job.claims, marker)
    except (FileNotFoundError, FileExistsError):
        return  # there was none, or there is a new one: both say the same

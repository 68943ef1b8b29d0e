"""What a crash, a lost inbox or another instance left claimed is found again, with all that is known of it.

The claims themselves are the truth; the journal only says what is known about them. A claim of ours of which it
knows nothing was never sent: the journal is written first. It may know it under another path, though: a folder
can be moved with all that is in it. Of a claim that another instance left behind nothing is known, so it may
have been sent at any time since it was claimed, and is looked up before anything is sent.
"""

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sfwatch import arrive, claim, files
from sfwatch.filing import storage
from sfwatch.journal import Delivery, Journal, State
from sfwatch.logs import EventLog
from sfwatch.settings import Inbox
from sfwatch.watch import Watched


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that is under way. `claimed`: its claim is there; else a power cut may have undone it."""

    name: str
    known: Delivery | None
    claimed: bool


def leftovers(
    w: Watched, journal: Journal, *, paths: Collection[str], state_dir: Path, log: EventLog, now: float
) -> list[Leftover]:
    """Take over what lies claimed in an inbox, and return it; `now` is the wall clock's, `paths` all inboxes'.

    The lock on the claims is taken if there are any. Raises OSError, ClaimError and NotRegular for the inbox's
    faults, StorageError for the state folder's.
    """
    inbox, instance = w.inbox, journal.instance
    _sweep(inbox)
    if w.lock is None and (claim.claimed(inbox.path, instance) or claim.foreign(inbox.path, instance)):
        w.lock = claim.lock(inbox.path, instance)
    _adopt_foreign(w, journal, state_dir, log, now)
    with storage(state_dir):
        under_way = journal.under_way()
    rows = {d.name: d for d in under_way if d.inbox == str(inbox.path)}
    homeless = [d for d in under_way if d.inbox not in paths and d.name not in rows]
    rows |= _moved_here(inbox, journal, homeless, state_dir)
    return [*_claimed(inbox, instance, rows), *_unclaimed(rows)]


def _moved_here(
    inbox: Inbox, journal: Journal, homeless: Collection[Delivery], state_dir: Path
) -> dict[str, Delivery]:
    """The rows of claims that were written while the inbox had another path: they are its own from now on."""
    claimed = claim.claimed(inbox.path, journal.instance) if homeless else []
    moved = {}
    for known in homeless:
        if known.name in claimed and known.name not in moved and _is_of(inbox, journal.instance, known):
            with storage(state_dir):
                moved[known.name] = journal.save(replace(known, inbox=str(inbox.path)))
    return moved


def _is_of(inbox: Inbox, instance: str, known: Delivery) -> bool:
    """Whether the claim of that name is the file of this row; a copy on another disk has the same time."""
    with claim.place(inbox.path, instance, known.name) as (folder, base):
        st = files.lstat(base, dir_fd=folder)
    return (st.st_size, st.st_mtime_ns) == (known.size, known.mtime_ns)


def _sweep(inbox: Inbox) -> None:
    """Remove what a crash left half-written beside the files; what cannot be removed does no harm."""
    for folder in (inbox.done, inbox.failed):
        with contextlib.suppress(OSError), files.folder(os.path.realpath(folder)) as fd:
            files.sweep_temporaries(fd)


def _claimed(inbox: Inbox, instance: str, rows: dict[str, Delivery]) -> Iterator[Leftover]:
    known = dict(rows)
    for name in claim.claimed(inbox.path, instance):
        if _is_file(inbox, instance, name, known):
            yield Leftover(name, rows.pop(name, None), claimed=True)


def _unclaimed(rows: Mapping[str, Delivery]) -> Iterator[Leftover]:
    """Rows whose claim is not there. Those that wait went back to their inbox, where they are seen anyway."""
    for name, known in rows.items():
        if known.state is not State.WAITING:
            yield Leftover(name, known, claimed=False)


def _is_file(inbox: Inbox, instance: str, name: str, rows: Mapping[str, Delivery]) -> bool:
    """Whether a claim is a file's, not a marker's, and the settings take it or it may have been sent.

    What is neither goes back, but for the marker of a file that is claimed, or has gone ahead.
    """
    if name in rows or arrive.candidate(name, inbox):
        return True
    theirs = (known.name for known in rows.values() if known.marker and name == known.name + known.marker)
    file = next(theirs, name.removesuffix(inbox.settle_marker or ""))
    known = rows.get(file)
    ahead = known is not None and known.state in (State.ACCEPTED, State.REFUSED)
    if file == name or not (ahead or file in claim.claimed(inbox.path, instance)):
        with contextlib.suppress(OSError):
            claim.give_back(inbox.path, instance, name)
    return False


def _adopt_foreign(w: Watched, journal: Journal, state_dir: Path, log: EventLog, now: float) -> None:
    """Take over the claims of instances that have ended."""
    inbox, instance = w.inbox, journal.instance

    def note(name: str, st: os.stat_result) -> None:
        if inbox.settle_marker is not None and name.endswith(inbox.settle_marker):
            return  # a marker is never sent
        with storage(state_dir):
            _note_unheard_of(journal, inbox, name, st, now)

    for other, names in claim.foreign(inbox.path, instance).items():
        former = other in journal.former
        try:
            claim.adopt_foreign(inbox.path, instance, other, former=former, note=note)
            w.foreign_told.discard(other)
        except claim.ClaimError as error:
            if other not in w.foreign_told:
                w.foreign_told.add(other)
                waiting = len(names)
                log("claim.foreign", inbox=inbox.name, instance=other, waiting=waiting, detail=error.detail)


def _note_unheard_of(journal: Journal, inbox: Inbox, name: str, st: os.stat_result, now: float) -> None:
    """Write down, before the claim is ours, what it tells: since its last rename it may have been sent."""
    unheard_of = Delivery(
        inbox=str(inbox.path),
        name=name,
        state=State.UNKNOWN,
        dev=st.st_dev,
        ino=st.st_ino,
        size=st.st_size,
        mtime_ns=st.st_mtime_ns,
        attempts=1,
        windows=((st.st_ctime, now),),
    )
    known = journal.find(unheard_of.inbox, name)
    if known is None or known.state is State.WAITING:
        journal.save(unheard_of)

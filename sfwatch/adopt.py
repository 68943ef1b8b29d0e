"""What a crash, a lost inbox or another instance left claimed is found again, with all that is known of it.

The claims are the truth, and their listing is a hint: a job finds out what each is (`delivery.recovery`), and
nothing is sent before one look-up. A claim stays in its claims folder. Those of another instance are worked on
there, once it is certain that nobody else does.
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
    """A file in progress. `claimed`: its claim is there; else a power cut may have undone it.

    `is_past_known`: its claims folder began with our journal, so that a claim without a row was never sent.
    """

    name: str
    known: Delivery | None
    claims: str
    claimed: bool
    is_past_known: bool


def own(journal: Journal, state_dir: Path) -> claim.Owner:
    """What the claims folders of this daemon say of their owner."""
    return claim.Owner(journal.machine, str(state_dir), journal.id)


def leftovers(
    w: Watched, journal: Journal, *, paths: Collection[str], state_dir: Path, log: EventLog
) -> list[Leftover]:
    """Return what is in progress in an inbox, claims and rows; `paths` are those of all inboxes.

    Locks each claims folder that it takes files from. Rows that wait for a retry go to `w.waiting_rows`. Raises
    OSError, ClaimError and NotRegular for the inbox's faults, StorageError for the state folder's.
    """
    inbox, instance = w.inbox, journal.instance
    _sweep(inbox)
    w.relist = False
    w.foreign.clear()
    held = claim.folders(inbox.path)
    with storage(state_dir):
        in_progress = journal.under_way()
    rows = {row.name: row for row in in_progress if row.inbox == str(inbox.path)}
    homeless = [row for row in in_progress if row.inbox not in paths and row.name not in rows]
    rows |= _moved_here(inbox, journal, homeless, held, state_dir)
    ours = own(journal, state_dir)
    found: dict[str, Leftover] = {}
    for folder, names in held.items():
        if not names or not _locked(w, journal, folder, ours, len(names), log):
            continue
        owner = claim.owner_of(inbox.path, folder)
        is_past_known = (folder if owner is None else owner.journal) == journal.id
        for name in names:
            row = rows.get(name)
            known = None if row is None or row.claims not in (None, folder) else row  # else another claim's
            elsewhere = row is not None and known is None and row.state is not State.WAITING
            if name in found or elsewhere:  # a name that is in progress elsewhere in the inbox waits
                w.relist = True
            elif _is_file(inbox, folder, name, rows, names):
                found[name] = Leftover(name, known, folder, claimed=True, is_past_known=is_past_known)
    unfound = [row for name, row in rows.items() if name not in found]
    w.waiting_rows, unclaimed = _without_claims(unfound, journal, held)
    found |= unclaimed
    w.foreign_told &= {folder for folder, names in held.items() if names}
    named = (folder for folder in sorted(held) if folder.startswith(f"{instance}-"))
    w.claims_folder = next((folder for folder in named if _is_owned(inbox, folder, ours)), None)
    return list(found.values())


def _without_claims(
    rows: Collection[Delivery], journal: Journal, held: Collection[str]
) -> tuple[list[Delivery], dict[str, Leftover]]:
    """The rows of files that may have vanished from their inbox, and those of files that are in progress.

    Where the claims folder of a row is missing, this may be another inbox, as the folder below a mount is: no
    file has vanished from that one.
    """
    waiting: list[Delivery] = []
    unclaimed: dict[str, Leftover] = {}
    for row in rows:
        folder = row.claims or journal.id  # an earlier version named its folder so
        if folder in held and row.state in (State.WAITING, State.DOUBTED):
            waiting.append(row)
        elif row.state is not State.WAITING:
            unclaimed[row.name] = Leftover(row.name, row, folder, claimed=False, is_past_known=True)
    return waiting, unclaimed


def _is_owned(inbox: Inbox, folder: str, ours: claim.Owner) -> bool:
    owner = claim.owner_of(inbox.path, folder)
    return owner is not None and owner.is_same_daemon(ours)


def _locked(w: Watched, journal: Journal, folder: str, ours: claim.Owner, waiting: int, log: EventLog) -> bool:
    """Whether we hold the lock of a claims folder; that another process does is reported once."""
    if folder in w.locks:
        return True
    path = w.inbox.path
    try:
        if claim.is_ours(folder, journal.instance):
            w.locks[folder] = claim.lock(path, folder)
        else:
            w.locks[folder] = claim.lock_foreign(
                path, folder, ours=ours, instance=journal.instance, former=journal.former
            )
    except BlockingIOError:
        detail = "another process works on these claims"
    except claim.ClaimError as error:
        if error.reason != "foreign":
            raise
        detail = error.detail
    else:
        w.foreign_told.discard(folder)
        return True
    w.foreign.add(folder)
    if folder not in w.foreign_told:
        w.foreign_told.add(folder)
        log("claim.foreign", inbox=w.inbox.name, instance=folder, waiting=waiting, detail=detail)
    return False


def _moved_here(
    inbox: Inbox,
    journal: Journal,
    homeless: Collection[Delivery],
    held: Mapping[str, list[str]],
    state_dir: Path,
) -> dict[str, Delivery]:
    """The rows of claims that were written while the inbox had another path: they are its own from now on."""
    moved: dict[str, Delivery] = {}
    for row in homeless:
        folder = row.claims or journal.id
        if row.name in held.get(folder, ()) and row.name not in moved and _is_of(inbox, folder, row):
            with storage(state_dir):
                moved[row.name] = journal.save(replace(row, inbox=str(inbox.path)))
    return moved


def _is_of(inbox: Inbox, folder: str, row: Delivery) -> bool:
    """Whether the claim of that name is the file of this row; a copy on another disk has the same time."""
    with claim.place(inbox.path, folder, row.name) as (fd, base):
        st = files.lstat(base, dir_fd=fd)
    return (st.st_size, st.st_mtime_ns) == (row.size, row.mtime_ns)


def _sweep(inbox: Inbox) -> None:
    """Remove what a crash left half-written beside the files; what cannot be removed does no harm."""
    for folder in (inbox.done, inbox.failed):
        with contextlib.suppress(OSError), files.folder(os.path.realpath(folder)) as fd:
            files.sweep_temporaries(fd)


def _is_file(
    inbox: Inbox, folder: str, name: str, rows: Mapping[str, Delivery], names: Collection[str]
) -> bool:
    """Whether a claim is a file's, not a marker's, and the settings take it or it may have been sent.

    What is neither is released, but for the marker of a file that is claimed, or has gone ahead.
    """
    if name in rows or arrive.candidate(name, inbox):
        return True
    theirs = (row.name for row in rows.values() if row.marker and name == row.name + row.marker)
    file = next(theirs, name.removesuffix(inbox.settle_marker or ""))
    row = rows.get(file)
    ahead = row is not None and row.state in (State.ACCEPTED, State.REFUSED)
    if file == name or not (ahead or file in names):
        with contextlib.suppress(OSError):
            claim.give_back(inbox.path, folder, name)
    return False


def vanished(w: Watched) -> Iterator[Delivery]:
    """The rows that wait for a retry whose file is neither claimed nor in its inbox any more."""
    for row in w.waiting_rows:
        try:
            os.lstat(w.inbox.path / row.name)
        except (FileNotFoundError, NotADirectoryError):
            yield row
        except OSError:
            continue

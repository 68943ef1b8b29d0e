"""What is in the inboxes, seen and told: which are there, which files came or went, and which are whole.

Events only make the next look come sooner; the look decides. All that is found is put into the table; a file
that is whole is handed to `queue`, and what becomes of it then is not decided here.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sfwatch import adopt, arrive, claim, files, settle, watch
from sfwatch.filing import StorageError, storage
from sfwatch.job import Task
from sfwatch.journal import Journal, State
from sfwatch.logs import EventLog
from sfwatch.settings import Config, Inbox
from sfwatch.settle import Settled
from sfwatch.storage import Storage
from sfwatch.table import Entry, Stage, Table
from sfwatch.watch import Watched

WAITING_DETAIL = {
    "empty": "it is empty: it is taken once something is in it",
    "being_written": "a process has it open for writing",
    "incomplete": "its last line is not whole JSON: it is taken if nothing more comes for half a minute",
    "hole": "space was reserved for it that is not filled yet",
    "no_marker": "it is taken as soon as its marker is there",
    "settling": "it has not rested for long enough yet",
    "retry": "it waits for its next try",
}

SKIPPED_DETAIL = {
    "mount_point": "something is mounted there: name it as an inbox of its own",
    "unreadable": "it may not be read by this user: give it r and x there",
}


FOREIGN_DETAIL = "another daemon works, or may work, on the files that were claimed there: see `claim.foreign`"


@dataclass(slots=True)
class Inboxes:
    """The inboxes of one daemon, and what it works with. Owned by the main thread."""

    config: Config
    table: Table
    storage: Storage
    journal: Journal
    doorbell: arrive.Doorbell
    log: EventLog
    clock: Callable[[], float]
    wall: Callable[[], float]
    queue: Callable[[Entry], None]
    started_at: float = 0.0
    watched: dict[str, Watched] = field(default_factory=dict)

    def start(self, now: float) -> None:
        """Make the folders that may be made, and begin with every inbox."""
        self.started_at = now
        self.take_up(now)
        self._tell_orphaned_rows()

    def take_up(self, now: float) -> None:
        """Begin with every inbox of the settings that is not watched yet, by its former name neither."""
        for inbox in self.config.inboxes:
            if inbox.name in self.watched or any(w.inbox.path == inbox.path for w in self.watched.values()):
                continue
            w = self.watched[inbox.name] = watch.watched(inbox)
            w.next_look = now
            self._make_folders(inbox)

    def _make_folders(self, inbox: Inbox) -> None:
        for folder in (inbox.path, inbox.done, inbox.failed):
            self._make_folder(inbox.name, str(folder))

    def reload(self, config: Config, now: float) -> None:
        """Take over other settings. One that is gone from them is let go of once its claims are dealt with."""
        self.config = config
        wanted = {inbox.name: inbox for inbox in config.inboxes}
        for w in self.watched.values():
            inbox = wanted.get(w.inbox.name)
            w.leaving = inbox is None or inbox.path != w.inbox.path
            w.next_look = now
            w.relist = True
            if w.leaving:
                self.forget_unclaimed(w)
            elif inbox is not None and inbox != w.inbox:
                self._change(w, inbox)
        self.take_up(now)
        self._tell_orphaned_rows()

    def _change(self, w: Watched, inbox: Inbox) -> None:
        """Go on with other settings for an inbox: what lies in it is seen anew by their light."""
        self.forget_unclaimed(w)
        self._make_folders(inbox)
        watch.change(w, inbox, self.doorbell)

    def forget_unclaimed(self, w: Watched) -> None:
        """Forget the files that lie in the inbox itself; no worker has any of them.

        What could not be written down is kept, even if nobody can see now whether it is claimed.
        """
        for entry in list(self.table.names(w.inbox.name).values()):
            if entry.stage is not Stage.UNDER_WAY and not entry.claimed and entry.known is None:
                self.table.remove(entry)
                w.claims.discard(entry.name)
        self.unlock(w)

    def release(self) -> list[str]:
        """Forget the inboxes that are to be let go of and of which nothing is under way; return their names."""
        done = [w for w in self.watched.values() if w.leaving and self._may_go(w)]
        for w in done:
            for entry in list(self.table.names(w.inbox.name).values()):
                self.table.remove(entry)
            self.doorbell.unwatch(w.inbox.name)
            self._drop_lock(w)
            del self.watched[w.inbox.name]
            self.log("inbox.released", inbox=w.inbox.name, path=w.inbox.path)
        return [w.inbox.name for w in done]

    def _may_go(self, w: Watched) -> bool:
        """Whether no worker has a file of it, and none is claimed that could still come to its end there.

        An inbox that is lost, or whose folder or name is another's in the settings, is not waited for: what is
        claimed and written down is found again under the folder's other name, or once the settings name it.
        """
        entries = self.table.names(w.inbox.name).values()
        if any(entry.stage is Stage.UNDER_WAY or _goes_back_now(entry) for entry in entries):
            return False
        replaced = any(w.inbox.name == it.name or w.inbox.path == it.path for it in self.config.inboxes)
        return not entries or (
            (replaced or w.lost is not None) and all(self._is_written_down(w, entry) for entry in entries)
        )

    def _is_written_down(self, w: Watched, entry: Entry) -> bool:
        """Whether the journal knows what the table does: a full disk may have kept an answer from it."""
        if entry.known is None:
            return True
        with contextlib.suppress(OSError):
            written = self.journal.find(str(w.inbox.path), entry.name)
            return written is not None and written.state is entry.known.state
        return False

    def look_at(self, inbox: str, now: float) -> None:
        """Let an inbox be looked at soon, if it is still watched: something rang."""
        w = self.watched.get(inbox)
        if w is not None:
            w.next_look = min(w.next_look, watch.soon(w, now))

    def look_soon(self, now: float) -> None:
        """Let every inbox be looked at in this turn."""
        for w in self.watched.values():
            w.next_look = now

    def _make_folder(self, inbox: str, path: str) -> None:
        """Make a folder that was never there; a known one that is missing is lost, not new."""
        if os.path.isdir(path):  # noqa: PTH112
            with contextlib.suppress(OSError):  # of a state folder that is full: said when the inbox is found
                self.journal.saw_folder(path)
            return
        if self.journal.folder_seen(path):
            return
        try:
            os.mkdir(path, 0o770)  # noqa: PTH102 - its parent must be there: it may be a mount point
            self.journal.saw_folder(path)
            self.log("folder.created", inbox=inbox, path=path)
        except OSError as error:  # that it is missing is said where it is needed, and why it could not be made
            self.watched[inbox].unmade = error.strerror

    def _tell_orphaned_rows(self) -> None:
        paths = {str(inbox.path) for inbox in self.config.inboxes}
        orphaned: dict[str, int] = {}
        for known in self.journal.under_way():
            if known.inbox not in paths:
                orphaned[known.inbox] = orphaned.get(known.inbox, 0) + 1
        for path, waiting in orphaned.items():
            detail = "files of this inbox are still under way, but it is not in the configuration any more"
            self.log("journal.orphaned", path=path, waiting=waiting, detail=detail)

    def look_where_due(self, now: float) -> None:
        for w in self.watched.values():
            if now >= w.next_look:
                began = self.clock()
                self._look(w, now)
                w.overflowed = False
                w.looked_at = self.clock()
                w.look_s = w.looked_at - began
                if w.newly_closed and w.lost is None:
                    w.next_look = min(w.next_look, watch.soon(w, w.looked_at))

    def _look(self, w: Watched, now: float) -> None:
        try:
            # What may be adopted after the look can't be compared with it.
            known = None if w.foreign_told or w.relist else self.table.names(w.inbox.name)
            seen = watch.look(w, self.doorbell, known)
            if seen.changed:
                self._found(w, now, bare=seen.bare)
            elif w.foreign_told or w.relist:  # their daemon may have ended meanwhile
                self._adopt(w, now)
        except OSError as error:
            self._lost(w, watch.why_lost(w, error), now)
            return
        except claim.ClaimError as error:
            self._lost(w, (error.reason, error.detail), now)
            return
        except files.NotRegular as odd:
            self._lost(w, ("unsafe", f"a {odd.kind} stands where sfwatch keeps its claims"), now)
            return
        except StorageError as error:
            self.storage.refused(error.folder, error.reason, error.detail, now)
            w.identity = None  # found again at the next look, and only then complete
            w.next_look = now + self.config.poll_interval_s
            return
        self._tell_mode(w, seen)
        self._tell_skipped(w, seen.look)
        self._reconcile(w, seen.look, now)
        if w.waiting_rows:
            self._finish_vanished(w)
        w.looked = True
        w.next_look = now + watch.interval_s(w, self.config, rings=seen.refusal is None)

    def _found(self, w: Watched, now: float, *, bare: bool) -> None:
        """The inbox is there, for the first time or again: adopt what lies claimed in it."""
        with storage(self.config.state_dir):
            self.journal.saw_folder(str(w.inbox.path))
        if w.looked:
            self._forget_files(w)  # those of the folder that was there before have not vanished
        self._drop_lock(w)  # it is on that folder, too
        self._adopt(w, now)
        self._tell_found(w, bare=bare)
        w.lost = None

    def _tell_found(self, w: Watched, *, bare: bool) -> None:
        """One event when an inbox is lost and one when it is back; one that never was missing gets both."""
        path = w.inbox.path
        if bare:
            w.bare = (
                "unmounted",
                f"the filesystem of {path} was unmounted; what comes into the folder below is taken",
            )
            reason, detail = w.bare
            self.log("inbox.lost", inbox=w.inbox.name, path=path, reason=reason, detail=detail)
            return
        back = w.lost is not None or w.bare is not None
        w.bare = None
        if w.looked and not back:
            detail = f"{path} is another folder now; it is watched from here on"
            self.log("inbox.lost", inbox=w.inbox.name, path=path, reason="replaced", detail=detail)
        if w.looked or back:
            self.log("inbox.found", inbox=w.inbox.name, path=path)

    def _lost(self, w: Watched, why: tuple[str, str], now: float) -> None:
        watch.lose(w, self.doorbell)
        w.next_look = now + self.config.poll_interval_s
        w.looked = False
        before, w.lost = w.lost, why
        if before is None and w.bare is None:  # said once, whatever becomes of it while it is lost
            reason, detail = why
            self.log("inbox.lost", inbox=w.inbox.name, path=w.inbox.path, reason=reason, detail=detail)
            self._forget_files(w)

    def _forget_files(self, w: Watched) -> None:
        """What is in a lost inbox is seen anew when it is back; what could not be written down is kept."""
        for entry in list(self.table.names(w.inbox.name).values()):
            if entry.stage is not Stage.UNDER_WAY and entry.known is None:
                self.table.remove(entry)
                w.claims.discard(entry.name)
        self.unlock(w)

    def _tell_mode(self, w: Watched, seen: watch.Seen) -> None:
        mode = w.mode
        if mode is None:
            return
        effective = mode.mode if seen.refusal is None else "polling"
        detail = seen.refusal or mode.why
        if w.told == detail:
            return
        w.told = detail
        self.log(
            "inbox.watched",
            inbox=w.inbox.name,
            path=w.inbox.path,
            mode=effective,
            fs_type=mode.fs_type,
            interval_s=watch.interval_s(w, self.config, rings=seen.refusal is None),
            trusted=mode.trusted,
            detail=detail,
        )

    def _tell_skipped(self, w: Watched, look: arrive.Look) -> None:
        """Say once which sub-folders are left out.

        One that cannot be read may just have been made: rsync opens a folder to others only after that, which
        does not ring. So it is looked at again soon, and said if it is closed to us still.
        """
        closed = {(folder, "unreadable") for folder in look.unreadable}
        w.newly_closed = closed - w.newly_closed - w.skipped
        skipped = {(folder, "mount_point") for folder in look.crossed} | closed - w.newly_closed
        for folder, reason in sorted(skipped - w.skipped):
            path = w.inbox.path / folder
            self.log(
                "inbox.skipped", inbox=w.inbox.name, path=path, reason=reason, detail=SKIPPED_DETAIL[reason]
            )
        w.skipped = skipped

    def _reconcile(self, w: Watched, look: arrive.Look, now: float) -> None:
        """Bring the table into line with the folder."""
        if w.leaving:
            return
        known = self.table.names(w.inbox.name)
        names = set(look.names)
        missing = known.keys() - names if look.missing is None else look.missing
        for name in sorted(missing):
            self._missing(known[name])
        for name in sorted(names - known.keys()):
            self.table.add((w.inbox.name, name), now)
        for name, entry in known.items():
            if entry.stage is Stage.PARKED:
                self.table.settle(entry, now)
            elif name not in missing and (entry.claimed or entry.stage is Stage.UNDER_WAY):
                entry.newcomer = True
                self._tell_namesake(entry)
        if look.others != w.others:
            w.others = look.others
            self.log("inbox.others", inbox=w.inbox.name, others=look.others)

    def _missing(self, entry: Entry) -> None:
        if entry.claimed or entry.stage is Stage.UNDER_WAY:
            return
        is_ours = arrive.subject(entry.name, self.watched[entry.inbox].inbox) is not None  # else: let lie
        if entry.seen and entry.stage is not Stage.PARKED and is_ours:
            self.vanished(entry)
        self.table.remove(entry)

    def vanished(self, entry: Entry) -> None:
        """Report a file that was taken away; its row, if it waited for a retry, is finished with it."""
        w = self.watched[entry.inbox]
        w.waiting_rows = [row for row in w.waiting_rows if row.name != entry.name]
        with contextlib.suppress(OSError):
            row = self.journal.find(str(w.inbox.path), entry.name)
            if row is not None and row.state in (State.WAITING, State.DOUBTED):
                self.journal.forget(row)
        detail = "it was taken away before it was uploaded"
        self.log("file.vanished", inbox=entry.inbox, file=entry.name, detail=detail)

    def rang(self, ring: arrive.Rang, now: float) -> None:
        w = self.watched.get(ring.inbox)
        name = arrive.subject(ring.name, w.inbox) if w is not None and not w.leaving else None
        if name is None:
            return
        entry = self.table.get((ring.inbox, name))
        if entry is None:
            entry = self.table.add((ring.inbox, name), now)
        if entry.claimed or entry.stage is Stage.UNDER_WAY:
            entry.newcomer = True
        elif entry.stage in (Stage.SETTLING, Stage.PARKED):
            entry.moved_in = ring.moved_in and name == ring.name and not entry.given_back
            if entry.stage is Stage.PARKED or entry.due_at > now:
                self.table.settle(entry, now)

    def overflowed(self, inbox: str, now: float) -> None:
        """Look soon, since events were lost. Said once until then: a long burst loses some again and again."""
        w = self.watched.get(inbox)
        if w is None:
            return
        if not w.overflowed:
            w.overflowed = True
            self.log("inbox.overflowed", inbox=inbox)
        for entry in self.table.names(inbox).values():
            entry.moved_in = False  # an event that would have voided it may be among the lost
        self.look_at(inbox, now)

    def _note_seen(self, entry: Entry) -> None:
        if not entry.seen:
            entry.seen = True
            self.log("file.seen", inbox=entry.inbox, file=entry.name)

    def _adopt(self, w: Watched, now: float) -> None:
        paths = {
            str(inbox.path) for inbox in (*self.config.inboxes, *(it.inbox for it in self.watched.values()))
        }
        found = adopt.leftovers(w, self.journal, paths=paths, state_dir=self.config.state_dir, log=self.log)
        for leftover in found:
            self._resume(w, leftover, now)
        self.unlock(w)

    def _resume(self, w: Watched, leftover: adopt.Leftover, now: float) -> None:
        """Go on with a file in progress."""
        home = w.identity if leftover.claimed else None  # the inbox, if its claim lies there
        w.claims.add(leftover.name)
        entry = self.table.get((w.inbox.name, leftover.name))
        if entry is not None and (entry.stage is Stage.UNDER_WAY or entry.known is not None or entry.claimed):
            entry.home = home or entry.home
            return
        entry = self.table.add((w.inbox.name, leftover.name), now)
        self._note_seen(entry)
        entry.claimed = True
        entry.claims, entry.is_past_known = leftover.claims, leftover.is_past_known
        entry.home = home
        entry.known = leftover.known
        entry.task = Task.RESUME
        self.queue(entry)

    def _finish_vanished(self, w: Watched) -> None:
        """A file that waited for its retry was taken away while nobody looked."""
        for row in adopt.vanished(w):
            entry = self.table.get((w.inbox.name, row.name))
            if entry is None:
                self.log("file.vanished", inbox=w.inbox.name, file=row.name, size=row.size)
                with contextlib.suppress(OSError):
                    self.journal.forget(row)
        w.waiting_rows = []

    def lost_claims(self, w: Watched, entry: Entry) -> None:
        """The inbox is there, but not the claims folder of this file. Reported once for each folder."""
        path = claim.claims_folder(w.inbox.path, entry.claims or "")
        detail = (
            f"{path} is missing, where files in progress were claimed: bring it back;"
            " `sfwatch retry NAME` gives a file up that is lost"
        )
        if entry.claims is not None and entry.claims not in w.missing_claims:
            w.missing_claims.add(entry.claims)
            self.log("inbox.lost", inbox=w.inbox.name, path=w.inbox.path, reason="replaced", detail=detail)
        self.tell(entry, "inbox_away", detail)

    def forget_claims_folder(self, w: Watched) -> None:
        """Our claims folder was removed: another one is made for the next file that is claimed."""
        lock = w.locks.pop(w.claims_folder or "", None)
        if lock is not None:
            files.close(lock)
        w.claims_folder = None

    def found_claims(self, w: Watched, folder: str) -> None:
        if folder in w.missing_claims:
            w.missing_claims.discard(folder)
            self.log("inbox.found", inbox=w.inbox.name, path=w.inbox.path)

    def consider(self, entry: Entry, now: float) -> None:
        """Look at one file: whole, not yet, gone, or nothing to take."""
        w = self.watched[entry.inbox]
        if w.lost is not None:
            self.table.remove(entry)
            return
        try:
            sighting = arrive.sight(w.inbox, entry.name, wall=self.wall(), moved_in=entry.moved_in)
        except FileNotFoundError:
            self._not_found(entry, w, now)
            return
        except files.NotRegular as odd:
            self.park(entry, odd.kind)
            return
        self._note_seen(entry)
        size = sighting.size if isinstance(sighting, settle.Unreadable) else sighting.fingerprint.size
        entry.size = entry.size if size is None else size
        first = entry.observed is None and not entry.given_back
        at_start = first and entry.seen_at <= self.started_at + 1.0
        entry.observed, decision = settle.observe(entry.observed, sighting, w.rules, now, at_start=at_start)
        if isinstance(decision, Settled):
            self._settled(entry, decision)
            return
        detail = sighting.detail if isinstance(sighting, settle.Unreadable) else None
        self._tell_waiting(entry, decision, now, detail)
        self.table.settle(entry, decision.look_at)

    def _not_found(self, entry: Entry, w: Watched, now: float) -> None:
        """A file is gone only if its inbox is still there: else the next look tells, and it is due at once."""
        if watch.is_still_there(w):
            self._missing(entry)
            return
        w.next_look = now
        self.table.settle(entry, now + self.config.poll_interval_s)

    def _settled(self, entry: Entry, settled: Settled) -> None:
        entry.settled = settled
        entry.observed = None
        entry.reason = None
        self.log(
            "file.settled",
            inbox=entry.inbox,
            file=entry.name,
            size=entry.size,
            settled_by=settled.by,
            waited_s=round(settled.waited_s, 3),
        )
        self.queue(entry)

    def _tell_waiting(self, entry: Entry, waiting: settle.Waiting, now: float, detail: str | None) -> None:
        if waiting.reason is not None:
            self.tell(entry, waiting.reason, detail)
        if waiting.stuck:
            fingerprint = entry.observed.fingerprint if entry.observed is not None else None
            writers = arrive.writers(fingerprint) if fingerprint is not None else []
            pids = ", ".join(str(pid) for pid in writers)
            seen = (
                f"process {pids} had it open for writing" if writers else "it was open for writing, or changed,"
            )
            self.tell_stuck(entry, "being_written", f"{seen} all the time", now - entry.seen_at, writers)

    def tell_stuck(
        self, entry: Entry, reason: str, detail: str, waited_s: float, writers: Sequence[int] = ()
    ) -> None:
        """Report that a file does not get on, and why; the caller does so once."""
        self.log(
            "file.stuck",
            inbox=entry.inbox,
            file=entry.name,
            size=entry.size,
            reason=reason,
            detail=detail,
            writers=list(writers) or None,
            waited_s=round(waited_s, 3),
        )

    def tell(self, entry: Entry, reason: str, detail: str | None) -> None:
        """Say why a file waits, once for each change of the reason."""
        if entry.reason != reason:
            entry.reason = reason
            entry.detail = detail
            self.log(
                "file.waiting",
                inbox=entry.inbox,
                file=entry.name,
                size=entry.size,
                reason=reason,
                detail=detail or WAITING_DETAIL.get(reason),
            )

    def tell_unfinished(self) -> None:
        """Say of each file that is left why it is, as far as that was not said yet."""
        for entry in self.table.entries():
            if entry.stage is not Stage.PARKED and entry.reason is None and entry.seen:
                looked_at = entry.stage is Stage.SETTLING
                reason = "empty" if looked_at and entry.size == 0 else "settling" if looked_at else "retry"
                self.tell(entry, reason, None)

    def _tell_namesake(self, entry: Entry) -> None:
        """Say once that a newcomer waits; a file that is only just being claimed is no newcomer."""
        if entry.stage is not Stage.UNDER_WAY and not entry.namesake_told:
            entry.namesake_told = True
            detail = "an earlier file of its name is still under way"
            self.log("file.waiting", inbox=entry.inbox, file=entry.name, reason="namesake", detail=detail)

    def park(self, entry: Entry, kind: str) -> None:
        entry.stage = Stage.PARKED
        entry.observed = None
        entry.seen = False
        if entry.reason != kind:
            entry.reason = kind
            detail = f"it is a {kind}, not a regular file: it is neither opened nor followed"
            self.log("file.ignored", inbox=entry.inbox, file=entry.name, reason=kind, detail=detail)

    def locked(self, w: Watched, entry: Entry, now: float) -> bool:
        """Show other instances that our claims are alive, for as long as there are any.

        An inbox that does not even let us do that is tried again later, once for all its files.
        """
        folder = entry.claims if entry.claimed else w.claims_folder
        if folder in w.locks or (entry.claimed and folder is None):
            return True
        if entry.claimed and folder in w.foreign:  # each look tries whether they may be adopted now
            self.tell(entry, "foreign", FOREIGN_DETAIL)
            return False
        if now < w.refused_until:
            return False
        try:
            if folder is None:
                own = adopt.own(self.journal, self.config.state_dir)
                folder = w.claims_folder = claim.own_folder(w.inbox.path, self.journal.instance, own)
            w.locks[folder] = claim.lock(w.inbox.path, folder)
        except FileNotFoundError:
            if entry.claimed:  # its claims folder is missing: its job reports that
                return True
            w.claims_folder = None  # somebody removed it: another one is made for the next file
            return False
        except (OSError, claim.ClaimError) as error:
            w.refused_until = now + self.config.poll_interval_s
            held = isinstance(error, BlockingIOError)
            reason, detail = ("foreign", FOREIGN_DETAIL) if held else ("cannot_move", str(error))
            if w.refused != detail:
                w.refused = detail
                self.tell(entry, reason, detail)
            return False
        w.refused = None
        return True

    def unlock(self, w: Watched) -> None:
        if not w.claims:
            self._drop_lock(w)

    def _drop_lock(self, w: Watched) -> None:
        for lock in w.locks.values():
            files.close(lock)
        w.locks.clear()


def _goes_back_now(entry: Entry) -> bool:
    return entry.stage is Stage.READY and entry.task is Task.GIVE_BACK

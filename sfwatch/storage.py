"""A folder that takes no files holds up all that need it; one file at a time tries whether it does again.

Disks fill up, are remounted read-only, lose permissions. Then nothing is begun that needs the folder, since
what the service has accepted could not be recorded or moved. Told once when it begins and once when it ends.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from sfwatch.logs import EventLog
from sfwatch.settings import Uploads
from sfwatch.table import Key


@dataclass(slots=True)
class Hold:
    """Why and since when a folder is held; `trial` is the file that tries it now. Times are monotonic."""

    reason: str
    detail: str
    since: float
    pause_s: float = 0.0
    probe_at: float = 0.0
    trial: Key | None = None


@dataclass(slots=True)
class Storage:
    """The folders that take no files now. `count` tells how many files need a folder."""

    log: EventLog
    uploads: Uploads
    count: Callable[[str], int]
    holds: dict[str, Hold] = field(default_factory=dict)

    def refused(self, folder: str, reason: str, detail: str, now: float, *, by: Key | None = None) -> None:
        """Note that a folder did not take what the file *by* needed written there."""
        hold = self.holds.get(folder)
        if hold is not None:
            if by is not None and hold.trial == by:  # stragglers of before the hold do not lengthen it
                self._pause(hold, now)
            return
        hold = self.holds[folder] = Hold(reason, detail, now)
        self._pause(hold, now)
        self.log(
            "storage.held",
            path=folder,
            reason=reason,
            detail=detail,
            waiting=self.count(folder),
            probe_in_s=round(hold.pause_s, 3),
        )

    def ready(self, folders: Collection[str], key: Key, now: float) -> bool:
        """Return whether all these folders take files, or this file may try those that did not."""
        holds = [hold for folder, hold in self.holds.items() if folder in folders]
        if any(hold.trial is not None or now < hold.probe_at for hold in holds):
            return False
        for hold in holds:
            hold.trial = key
        return True

    def end_trial(self, key: Key, now: float, *, proved: bool, refused: str | None) -> None:
        """Note how the try of this file ended; one that ended before it came to the folder proves nothing."""
        for folder, hold in list(self.holds.items()):
            if hold.trial != key or folder == refused:
                continue
            hold.trial = None
            hold.probe_at = now + hold.pause_s
            if proved:
                self._end(folder, now)

    def keep(self, needed: Collection[str], now: float) -> None:
        """End the holds of all other folders: nothing goes there any more, so that no file would try them."""
        for folder in [folder for folder in self.holds if folder not in needed]:
            self._end(folder, now)

    def _end(self, folder: str, now: float) -> None:
        hold = self.holds.pop(folder)
        held_s = round(now - hold.since, 3)
        waiting = self.count(folder)
        self.log("storage.resumed", path=folder, reason=hold.reason, waiting=waiting, held_s=held_s)

    def reload(self, uploads: Uploads, now: float) -> None:
        """Take over other settings; who reloads may have mended a folder, so each is tried at once."""
        self.uploads = uploads
        for hold in self.holds.values():
            hold.probe_at = min(hold.probe_at, now)

    def due(self) -> list[float]:
        """Return when each held folder may be tried again."""
        return [hold.probe_at for hold in self.holds.values()]

    def _pause(self, hold: Hold, now: float) -> None:
        hold.trial = None
        hold.pause_s = min(max(self.uploads.first_retry_s, hold.pause_s * 2), self.uploads.longest_retry_s)
        hold.probe_at = now + hold.pause_s

"""All that the main thread knows and works with: one record, which the loop and its parts share.

Only the main thread touches it. Workers, the doorbell and signals know nothing of it but the mailbox.
"""

import queue
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field

from sfwatch import arrive
from sfwatch.inboxes import Inboxes
from sfwatch.job import Job
from sfwatch.journal import Journal, JournalDamagedError
from sfwatch.logs import EventLog
from sfwatch.settings import Config
from sfwatch.storage import Storage
from sfwatch.table import Key, Table
from sfwatch.tally import Tally
from sfwatch.upstream import Service
from sfwatch.work import Accepted, Finished, LookedUp, Probed, Requests


@dataclass(frozen=True, slots=True)
class Signalled:
    """The process got a signal."""

    number: int


Mail = (
    Accepted
    | Finished
    | JournalDamagedError
    | LookedUp
    | Probed
    | Requests
    | Signalled
    | arrive.Rang
    | arrive.FoldersChanged
    | arrive.Overflowed
    | arrive.WatchEnded
    | arrive.Broken
)
Mailbox = queue.SimpleQueue[Mail]


@dataclass(slots=True, kw_only=True)
class Core:
    """Everything outside is handed in. `local`: files that need nothing of a service, in their order."""

    config: Config
    journal: Journal
    mailbox: Mailbox
    pool: Executor
    log: EventLog
    environ: Mapping[str, str]
    clock: Callable[[], float]
    wall: Callable[[], float]
    luck: Callable[[], float]
    services: dict[str, Service] = field(default_factory=dict)
    service_of: dict[str, Service] = field(default_factory=dict)
    target_of: dict[str, str] = field(default_factory=dict)
    table: Table = field(default_factory=Table)
    inboxes: Inboxes = field(init=False)
    storage: Storage = field(init=False)
    local: deque[Key] = field(default_factory=deque)
    under_way: dict[Key, Job] = field(default_factory=dict)
    probing: int = 0  # probes and look-ups that are out
    counts: Tally = field(default_factory=Tally)
    stop_at: float | None = None

    def waiting(self, service: Service) -> int:
        """Return how many files are there for a target."""
        return sum(len(self.table.names(inbox)) for inbox in service.inboxes)

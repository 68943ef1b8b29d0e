"""All that the process knows of the files it sees: one table, owned by the main thread.

The table only keeps: which files there are, at which stage each is, when it is due and who goes next (the one
seen first, then by name). It is rebuilt by looking after every start, and asks for no work that grows with the
number of files that merely wait.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from sfwatch.files import Identity
from sfwatch.job import Condemned, Deferred, Resend, Task, Unknown
from sfwatch.journal import Delivery
from sfwatch.service.listing import Found
from sfwatch.settle import Observed, Settled

Key = tuple[str, str]
"""An inbox's name and a file's name relative to it."""


class Stage(StrEnum):
    """Where a file stands, as far as the main thread is concerned."""

    SETTLING = "settling"  # is it whole? looked at when due
    READY = "ready"  # whole, and next in its inbox's turn
    UNDER_WAY = "under_way"  # a worker has it
    WAITING = "waiting"  # tried; due again later
    PARKED = "parked"  # not ours to take, as long as it stays what it is


@dataclass(slots=True)
class Entry:
    """One file. Times are monotonic seconds; `due_at` counts while it is settling or waiting."""

    key: Key
    seen_at: float
    stage: Stage = Stage.SETTLING
    due_at: float = 0.0
    observed: Observed | None = None
    settled: Settled | None = None
    task: Task = Task.DELIVER
    condemned: Condemned | None = None
    ended: Deferred | Unknown | None = None  # how its last try ended, for the status
    known: Delivery | None = None
    claimed: bool = False
    home: Identity | None = None  # the inbox that it is claimed in; another folder may be in its place now
    moved_in: bool = False
    given_back: bool = False  # our own rename rang for it: that proves nothing
    newcomer: bool = False  # something may have come under its name while it was claimed
    namesake_told: bool = False
    seen: bool = False  # it was more than a name, once: a file that was only rung for cannot vanish
    claims: str | None = None  # the claims folder that it is in; None: its inbox's own
    is_past_known: bool = True  # that folder began with our journal: a claim in it without a row was never sent
    found: Found | None = None
    resend: Resend | None = None
    reason: str | None = None  # the waiting reason that was told last
    detail: str | None = None  # … and the sentence with it
    failures: int = 0
    looks: int = 0
    unknown_since: float | None = None  # its outcome is unknown: it waits for look-ups
    looked_at: float = 0.0
    readings: int = 0  # look-ups since then that could be read
    ended_at: float | None = None  # when its last attempt ended, and for how long its target had been held then
    held_mark: float = 0.0
    stuck_told: bool = False
    refused_since: float | None = None  # it is doubted since then
    size: int = 0

    @property
    def inbox(self) -> str:
        return self.key[0]

    @property
    def name(self) -> str:
        return self.key[1]

    def __lt__(self, other: "Entry") -> bool:
        """The order in which files go; they stand in their queues themselves, since very many may wait."""
        return (self.seen_at, self.name) < (other.seen_at, other.name)


@dataclass(slots=True)
class Table:
    """The files by inbox and name, and for each inbox a clock's worth of due times and a queue.

    The inboxes take turns in what is due as well: thousands of new files in one do not keep another waiting.
    """

    _entries: dict[str, dict[str, Entry]] = field(default_factory=dict)
    _due: dict[str, list[tuple[float, int, Entry]]] = field(default_factory=dict)
    _ready: dict[str, list[Entry]] = field(default_factory=dict)
    _turns: deque[str] = field(default_factory=deque)
    _count: Iterator[int] = field(default_factory=itertools.count)

    def get(self, key: Key) -> Entry | None:
        """Return the entry of this file, if it has one."""
        return self._entries.get(key[0], {}).get(key[1])

    def names(self, inbox: str) -> dict[str, Entry]:
        """Return the files of an inbox by their names."""
        return self._entries.setdefault(inbox, {})

    def entries(self) -> Iterator[Entry]:
        """Go through all files."""
        for names in self._entries.values():
            yield from names.values()

    def __len__(self) -> int:
        return sum(len(names) for names in self._entries.values())

    def add(self, key: Key, now: float) -> Entry:
        """Begin with a file that was not known; it is due at once."""
        entry = Entry(key, seen_at=now)
        self.names(key[0])[key[1]] = entry
        self.settle(entry, now)
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget a file."""
        names = self._entries.get(entry.inbox, {})
        if names.get(entry.name) is entry:
            del names[entry.name]

    def settle(self, entry: Entry, at: float) -> None:
        """Look at a file (again) at this time, to see whether it is whole."""
        self._later(entry, Stage.SETTLING, at)

    def wait(self, entry: Entry, at: float) -> None:
        """Try a file again at this time."""
        self._later(entry, Stage.WAITING, at)

    def _later(self, entry: Entry, stage: Stage, at: float) -> None:
        entry.stage = stage
        entry.due_at = at
        if entry.inbox not in self._due:
            self._due[entry.inbox] = []
            self._turns.append(entry.inbox)
        heapq.heappush(self._due[entry.inbox], (at, next(self._count), entry))

    def ready(self, entry: Entry) -> None:
        """Put a file into its inbox's queue."""
        entry.stage = Stage.READY
        heapq.heappush(self._ready.setdefault(entry.inbox, []), entry)

    def pop_due(self, now: float) -> Entry | None:
        """Take out the next file whose time has come."""
        for _ in range(len(self._turns)):
            inbox = self._turns[0]
            self._turns.rotate(-1)
            due = self._due[inbox]
            while due and due[0][0] <= now:
                at, _, entry = heapq.heappop(due)
                if entry.due_at == at and entry.stage in (Stage.SETTLING, Stage.WAITING) and self._has(entry):
                    return entry
        return None

    def next_due(self) -> float | None:
        """Return when the next file is due (it may turn out to be none)."""
        return min((due[0][0] for due in self._due.values() if due), default=None)

    def pop_ready(self, inbox: str) -> Entry | None:
        """Take the file out of this inbox's queue that was seen first."""
        queue = self._ready.get(inbox, [])
        while queue:
            entry = heapq.heappop(queue)
            if entry.stage is Stage.READY and self._has(entry):
                return entry
        return None

    def _has(self, entry: Entry) -> bool:
        """Whether it is not forgotten, or replaced by a file that came later under its name."""
        return self.get(entry.key) is entry

"""What has become of the files since the start: counted when it happens, read by the status and the metrics.

Owned by the main thread. Nothing is decided from these numbers but the exit status of `once`.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
"""Upper bounds of the histogram of durations; beyond the last is one more bucket."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A file that came to its end, and when (seconds since the epoch)."""

    inbox: str
    name: str
    at: float


@dataclass(slots=True)
class InboxTally:
    """The files of one inbox. `durations` counts the done ones by bucket, from first sight to the end."""

    done: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    seconds: float = 0.0
    durations: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    last_done_at: float | None = None


@dataclass(slots=True)
class Tally:
    """All inboxes, those that are not configured any more as well."""

    inboxes: dict[str, InboxTally] = field(default_factory=dict)
    last_done: Ended | None = None
    last_failed: Ended | None = None

    @property
    def done(self) -> int:
        """Files done."""
        return sum(inbox.done for inbox in self.inboxes.values())

    @property
    def failed(self) -> int:
        """Files failed."""
        return sum(inbox.failed.total() for inbox in self.inboxes.values())

    def of(self, inbox: str) -> InboxTally:
        """Return the tally of an inbox."""
        return self.inboxes.setdefault(inbox, InboxTally())

    def note_done(self, inbox: str, name: str, *, size: int, seconds: float, at: float) -> None:
        """A file is done."""
        tally = self.of(inbox)
        tally.done += 1
        tally.sent_bytes += size
        tally.seconds += seconds
        tally.durations[bisect_left(BUCKETS_S, seconds)] += 1
        tally.last_done_at = at
        self.last_done = Ended(inbox, name, at)

    def note_failed(self, inbox: str, name: str, *, reason: str, at: float) -> None:
        """A file has failed."""
        self.of(inbox).failed[reason] += 1
        self.last_failed = Ended(inbox, name, at)


def cumulated(durations: list[int]) -> Iterator[int]:
    """Yield for each bucket how many are in it or below, as Prometheus counts."""
    total = 0
    for count in durations:
        total += count
        yield total

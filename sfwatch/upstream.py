"""One target as the main thread sees it: its state, what is under way to it, and whose turn is next.

The rules of holding and pacing are in `target.py`; here they are applied, and a hold is said once when it
begins and once when it ends.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from sfwatch import target as rules
from sfwatch.job import Tools
from sfwatch.table import Key
from sfwatch.target import Target


@dataclass(frozen=True, slots=True)
class Plan:
    """One target as the settings have it: what its uploads work with, and the inboxes that go there."""

    tools: Tools
    inboxes: tuple[str, ...]


FILING = 2
"""So many times `concurrency` may be under way, since what is accepted has only to be filed away."""

AHEAD = 4
"""One file for so many uploads at once is claimed and checked ahead, while nothing holds uploads up."""


@dataclass(slots=True)
class Service:
    """A host with a key, and the inboxes whose files go there, in turn."""

    tools: Tools
    state: Target
    inboxes: deque[str]
    under_way: set[Key] = field(default_factory=set)
    accepted: set[Key] = field(default_factory=set)  # of these: they hold nobody up but the workers
    look_ups: dict[Key, None] = field(default_factory=dict)  # due for the next look-up, in their order
    looking: bool = False
    undecided: set[Key] = field(default_factory=set)
    doubted: set[Key] = field(default_factory=set)
    listing_fault: str | None = None  # why the listing could not be read, as it was reported last
    held_before_s: float = 0.0

    @property
    def name(self) -> str:
        return self.tools.target

    def held_s(self, now: float) -> float:
        """Return for how many seconds this target has been held since the start, all holds together."""
        return self.held_before_s + (now - self.state.hold.since if self.state.hold else 0.0)

    def change(self, after: Target, now: float, *, waiting: int) -> None:
        """Take over a new state, and say when a hold begins or ends."""
        before, self.state = self.state, after
        if before.hold is None and after.hold is not None:
            self.tools.log(
                "target.held",
                reason=after.hold.reason,
                detail=after.hold.detail,
                waiting=waiting,
                probe_in_s=round(after.hold.probe_at - now, 3),
            )
        elif before.hold is not None and after.hold is None:
            held_s = now - before.hold.since
            self.held_before_s += held_s
            self.tools.log(
                "target.resumed", reason=before.hold.reason, waiting=waiting, held_s=round(held_s, 3)
            )

    def room_for(self, inbox: str, now: float) -> bool:
        """Return whether a file of this inbox may start; one slot is left to the other inboxes."""
        most = self.state.concurrency
        ahead = most // AHEAD if self.state.hold is None and not self.state.interval_s else 0
        uploading = self.under_way - self.accepted
        free = rules.room(self.state, len(uploading) - ahead, now, looking=self.looking)
        if free < 1 or len(self.under_way) >= FILING * most:
            return False
        reserved = 1 if len(self.inboxes) > 1 and most > 1 else 0
        return sum(key[0] == inbox for key in uploading) < most + ahead - reserved

    def start(self, key: Key, now: float) -> None:
        """Note that this file goes out."""
        self.under_way.add(key)
        self.state = rules.started(self.state, key, now)

    def end(self, key: Key) -> None:
        """Note that this file is back."""
        self.accepted.discard(key)
        self.under_way.discard(key)
        self.undecided.discard(key)
        self.doubted.discard(key)

    def reload(self, tools: Tools, now: float, *, waiting: int) -> None:
        """Take over new settings: what is under way ends with the old ones, a held target is asked at once."""
        self.tools.client.close()
        self.tools = tools
        uploads = tools.uploads
        state = rules.reloaded(
            self.state,
            now,
            concurrency=uploads.concurrency,
            first_s=uploads.first_retry_s,
            longest_s=uploads.longest_retry_s,
        )
        self.change(state, now, waiting=waiting)

    def is_idle(self) -> bool:
        """Return whether nothing goes there any more, and nothing is awaited from there."""
        return not (self.inboxes or self.under_way or self.state.asking or self.looking)


def begin(tools: Tools, inboxes: Iterable[str] = ()) -> Service:
    """Return a target of which nothing is known yet."""
    uploads = tools.uploads
    state = Target(uploads.concurrency, first_s=uploads.first_retry_s, longest_s=uploads.longest_retry_s)
    return Service(tools, state, deque(inboxes))

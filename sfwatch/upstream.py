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
    under_way: dict[Key, str | None] = field(default_factory=dict)
    accepted: set[Key] = field(default_factory=set)  # of these: they hold nobody up but the workers
    blocked: dict[str, list[Key]] = field(default_factory=dict)
    unsettled: dict[str, Key] = field(default_factory=dict)  # remote names of lost uploads, and whose they are
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
        most, uploading = self.state.concurrency, self.under_way.keys() - self.accepted
        ahead = most // AHEAD if self.state.hold is None and self.state.pace >= most else 0
        if rules.room(self.state, len(uploading) - ahead, now) < 1 or len(self.under_way) >= FILING * most:
            return False
        reserved = 1 if len(self.inboxes) > 1 and most > 1 else 0
        return sum(key[0] == inbox for key in uploading) < most + ahead - reserved

    def start(self, key: Key, remote_name: str | None, now: float) -> None:
        """Note that this file goes out."""
        self.under_way[key] = remote_name
        self.state = rules.started(self.state, key, now)

    def end(self, key: Key, *, settled: bool = True) -> list[Key]:
        """Note that this file is back; return the files that waited for its remote name.

        The name stays taken until it is `settled` what became of the attempt.
        """
        self.accepted.discard(key)
        remote_name = self.under_way.pop(key, None)
        if remote_name is None:
            return []
        if not settled:
            self.unsettled[remote_name] = key
            return []
        if self.unsettled.get(remote_name) == key:
            del self.unsettled[remote_name]
        return self.blocked.pop(remote_name, [])

    def blocks(self, key: Key, remote_name: str | None) -> bool:
        """Set a file aside whose remote name is in use: two attempts of one name cannot be told apart."""
        if remote_name is None:
            return False
        if remote_name not in self.under_way.values() and self.unsettled.get(remote_name, key) == key:
            return False
        self.blocked.setdefault(remote_name, []).append(key)
        return True

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

    def give_up(self, inbox: str) -> tuple[dict[str, Key], list[Key]]:
        """Let an inbox go: return the names of its lost uploads, and the files that waited for any name."""
        self.inboxes.remove(inbox)
        lost = {name: key for name, key in self.unsettled.items() if key[0] == inbox}
        for name in lost:
            del self.unsettled[name]
        waited = [key for keys in self.blocked.values() for key in keys]
        self.blocked.clear()  # they are set aside again if they still have to be
        return lost, waited

    def is_idle(self) -> bool:
        """Return whether nothing goes there any more, and nothing is awaited from there."""
        return not (self.inboxes or self.under_way or self.state.asking)


def begin(tools: Tools, inboxes: Iterable[str] = ()) -> Service:
    """Return a target of which nothing is known yet."""
    uploads = tools.uploads
    state = Target(uploads.concurrency, first_s=uploads.first_retry_s, longest_s=uploads.longest_retry_s)
    return Service(tools, state, deque(inboxes))

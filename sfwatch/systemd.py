"""Tells systemd how we are, and never waits for it: what cannot be sent at once is not sent."""

import contextlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

STATUS_S = 1.0
"""The status line is sent no oftener: a burst of files changes it with each of them."""

SPARE_S = 10.0
"""What an end may take beyond its grace: breaking off, giving back, closing the journal."""


def notify(environ: Mapping[str, str], *state: str) -> None:
    """Send lines such as READY=1 or STATUS=… to the service manager, if there is one (see sd_notify(3))."""
    address = environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A manager that is not there, or does not read, is no fault of ours and nothing that we could mend.
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        # Without MSG_DONTWAIT a manager that does not read would stop the daemon for good.
        channel.sendto("\n".join(state).encode(), socket.MSG_DONTWAIT, address)


def stopping(environ: Mapping[str, str], grace_s: float) -> None:
    """Say that the end has begun, and how long it may take; `stop_grace` may exceed the unit's timeout."""
    extended = f"EXTEND_TIMEOUT_USEC={round((grace_s + SPARE_S) * 1e6)}"
    notify(environ, "STOPPING=1", extended, "STATUS=Stopping: what is under way may still end.")


def watchdog_s(environ: Mapping[str, str]) -> float | None:
    """Return within how many seconds systemd wants to hear of this process, if it does."""
    usec = environ.get("WATCHDOG_USEC", "")
    ours = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
    return int(usec) / 1e6 if usec.isdecimal() and ours and int(usec) else None


@dataclass(slots=True)
class Lifeline:
    """The watchdog is fed three times as often as it must be, and a changed status line is sent soon."""

    environ: Mapping[str, str]
    status: str = ""
    status_at: float = 0.0  # when it may be sent again
    stale: bool = False  # something may have changed since
    feed_at: float = 0.0
    feed_every_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        """Find out whether systemd wants to hear of us."""
        within_s = watchdog_s(self.environ)
        self.feed_every_s = within_s / 3 if within_s else None

    def next_at(self) -> float | None:
        """Return when there is something to say though nothing happens."""
        times = [self.feed_at] if self.feed_every_s else []
        return min([*times, self.status_at] if self.stale else times, default=None)

    def tell(self, now: float, line: Callable[[], str], *, alive: bool) -> None:
        """Say what is due at *now*. The watchdog gets nothing unless all that should move does."""
        if not self.environ.get("NOTIFY_SOCKET"):
            return
        if self.feed_every_s and now >= self.feed_at:
            self.feed_at = now + self.feed_every_s
            if alive:
                notify(self.environ, "WATCHDOG=1")
        self.stale = now < self.status_at
        if not self.stale:
            self._send_status(line(), now)

    def _send_status(self, line: str, now: float) -> None:
        if line != self.status:
            self.status, self.status_at = line, now + STATUS_S
            notify(self.environ, f"STATUS={' '.join(line.split())}")

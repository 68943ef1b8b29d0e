"""Tells systemd how we are, and never waits for it: what cannot be sent at once is not sent."""

import contextlib
import socket
from collections.abc import Mapping


def notify(environ: Mapping[str, str], *state: str) -> None:
    """Send lines such as READY=1 or STATUS=… to the service manager, if there is one (see sd_notify(3))."""
    address = environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        # Without MSG_DONTWAIT a manager that does not read would stop the daemon for good.
        channel.sendto("\n".join(state).encode(), socket.MSG_DONTWAIT, address)

"""A fork server: it has everything imported, and each order makes one daemon in a process of its own.

Run as a script with `faults.c` preloaded and the number of a socket; see `Forks` in `sweep.py` for the other
end. An order says what is to go wrong at which call; the answers are
its process id, and then how it ended and at which call.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

# The command line imports what it needs when it needs it; here that must be before the first fork.
import structlog  # noqa: F401

from sfwatch import app, launch  # noqa: F401

TIMEOUT_S = 30
"""How long a daemon may take before it counts as hung: SIGALRM ends it."""

PAGE = struct.Struct("i60s")
"""The page of `faults.c`: how many calls there were, and the name of the one that was hit."""


def serve(orders: Connection) -> None:
    """Take orders until the other end is closed."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # as the command line does it, for the lease probe
    page = mmap.mmap(-1, mmap.PAGESIZE)
    while True:
        try:
            order = orders.recv()
        except EOFError:
            return
        page[: PAGE.size] = bytes(PAGE.size)
        status = _forked(order, page, orders)
        count, name = PAGE.unpack(page[: PAGE.size])
        orders.send((status, count, name.rstrip(b"\0").decode()))


def _forked(order: Any, page: mmap.mmap, orders: Connection) -> int:
    child = os.fork()
    if child == 0:
        _run(order, page)
    orders.send(child)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _run(order: Any, page: mmap.mmap) -> NoReturn:
    """What `sfwatch once` does when it has read its configuration."""
    config, drain_s, point, mode, error = order
    signal.alarm(TIMEOUT_S)
    status = 99
    try:
        _arm(page, point, mode, error)
        status = launch.work(config, drain_s=drain_s)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - a forked child never returns
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _arm(page: mmap.mmap, point: int, mode: int, error: int) -> None:
    shared = ctypes.addressof(ctypes.c_char.from_buffer(page))
    ctypes.CDLL(None).faults_arm(ctypes.c_void_p(shared), point, mode, error)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))

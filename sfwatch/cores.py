"""The daemon's threads share one processor core; only the work on a large file spreads over all.

Threads of one interpreter take turns at its lock, and each system call gives it up for a moment. If they may
run on several cores, each such moment wakes a thread elsewhere that finds the lock taken again: with 16 workers
on two cores that was half of a small file's processor time. On one core, who gives the lock up mostly has it
back before anybody else runs. A large file is read, hashed and encrypted without the lock.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sfwatch.form import BLOCK

LARGE = BLOCK
"""Bytes from which on more cores are worth it: what is smaller is sent in one piece."""

_ALL = os.sched_getaffinity(0)


@contextmanager
def one() -> Iterator[None]:
    """Let this thread, and all that it begins, share one core; which one, the process id says."""
    with _on({sorted(_ALL)[os.getpid() % len(_ALL)]}):
        yield


@contextmanager
def for_file(size: int | None) -> Iterator[None]:
    """Let this thread run on all cores while it works on a large file, or one of which that is not known."""
    if size is not None and size <= LARGE:
        yield
        return
    with _on(_ALL):
        yield


@contextmanager
def _on(cores: set[int]) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    _move_to(cores)
    try:
        yield
    finally:
        _move_to(before)


def _move_to(cores: set[int]) -> None:
    """Some sandboxes forbid it: then all stays as it was, only slower."""
    with suppress(OSError):
        os.sched_setaffinity(0, cores)

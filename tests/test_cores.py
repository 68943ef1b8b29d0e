"""On which cores the daemon's threads run."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from sfwatch import cores

ALL = os.sched_getaffinity(0)


@pytest.fixture(autouse=True)
def _all_as_before() -> Iterator[None]:
    yield
    assert os.sched_getaffinity(0) == ALL


def test_threads_share_one_core() -> None:
    """That is so for every thread that is begun meanwhile, and no longer than that."""
    with cores.one():
        assert len(os.sched_getaffinity(0)) == 1
        assert in_a_thread() == os.sched_getaffinity(0)


def in_a_thread() -> set[int]:
    seen: set[int] = set()
    thread = threading.Thread(target=lambda: seen.update(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    return seen


@pytest.mark.parametrize(
    ("size", "spread"), [(0, False), (cores.LARGE, False), (cores.LARGE + 1, True), (None, True)]
)
def test_a_large_file_may_have_all_cores(size: int | None, *, spread: bool) -> None:
    """So may one of which nobody knows yet how large it is, and whatever threads its work begins."""
    with cores.one():
        one = os.sched_getaffinity(0)
        with cores.for_file(size):
            assert in_a_thread() == os.sched_getaffinity(0) == (ALL if spread else one)
        assert os.sched_getaffinity(0) == one


def test_where_it_is_forbidden_all_goes_on() -> None:
    """A sandbox that refuses the system call, as systemd's can, costs speed only."""
    forbid = (
        "import os; from sfwatch import cores\ndef no(*_): raise PermissionError\nos.sched_setaffinity = no\n"
    )
    use = "with cores.one(), cores.for_file(None): print('done')"
    said = subprocess.run([sys.executable, "-c", forbid + use], check=True, capture_output=True, text=True)
    assert said.stdout == "done\n"

"""Every call of a delivery fails once, as a full, broken or read-only disk or a signal makes it fail."""

import errno
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash.sweep import SCENARIOS, Fault, Forks, Scenario, Stage, points, said, stage

EVERY = 43
FAULTS = (
    (Fault.FAIL, errno.ENOSPC),
    (Fault.FAIL, errno.EIO),
    (Fault.FAIL, errno.EINTR),
    (Fault.FAIL, errno.EROFS),
    (Fault.FAIL_AFTER, errno.EIO),
)
"""The last is a network disk's: the call was carried out, and its answer was lost."""

NEVER_CARRIED_OUT = "send"
"""A socket's send that fails has sent nothing: no kernel reports it so and sends all the same."""

ENDS = frozenset({0, 1, 75})
"""All done, one failed, one had to wait."""

CANNOT_START = 73
"""The state folder cannot be used: said before anything was touched, and the service manager tries again."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: _name(*fault))
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_an_error_at_any_call_costs_no_file_and_no_second_upload(
    scenario: Scenario, fault: tuple[Fault, int], forks: Forks, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """The process lives, nothing good is condemned, and the delivery ends in the same run or in the next."""
    swept: Counter[str] = Counter()
    wrong: list[str] = []
    with stage(scenario, forks, tmp_path) as it:
        it.set()
        calls = it.run(drain_s=10.0).calls
        for point in points(calls, every=EVERY):
            wrong += [f"{at}: {what}" for at, what in _failed_once(it, point, fault, swept)]
    tell(
        f"error sweep, {scenario.name}, {_name(*fault)}: {swept.total()} points of {calls} calls,"
        f" {swept['later']} ended in the second run"
    )
    assert swept.total() > calls // EVERY // 2
    assert not wrong, said(wrong)


def _name(how: Fault, error: int) -> str:
    return errno.errorcode[error] + " afterwards" * (how is Fault.FAIL_AFTER)


def _failed_once(
    it: Stage, point: int, fault: tuple[Fault, int], swept: Counter[str]
) -> Iterator[tuple[str, str]]:
    it.set()
    ended = it.run(drain_s=5.0, point=point, fault=fault[0], error=fault[1])
    if not ended.at or (fault[0] is Fault.FAIL_AFTER and ended.at == NEVER_CARRIED_OUT):
        return
    it.failed = ended.at
    at = f"{ended.at}, call {point}"
    yield from ((at, what) for what in it.lost())
    if ended.status not in ENDS and not (ended.status == CANNOT_START and not it.service.asked()):
        yield at, f"the status is {ended.status}"
    unfinished = list(it.wrong())
    swept["later" if unfinished else "same"] += 1
    if not unfinished:
        return
    again = it.run(drain_s=10.0)
    if again.status not in (0, 1):
        yield at, f"the second run ended with {again.status}"
    yield from ((at, what) for what in it.wrong())

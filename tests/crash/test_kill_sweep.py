"""The process is killed just before and just after every call of a delivery; then it is started again."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash.sweep import SCENARIOS, Fault, Forks, Scenario, Stage, points, said, stage

EVERY = 11
KILLED = -signal.SIGKILL
BEYOND = 40
"""Points behind the last one that is known: two runs need not make the same number of calls."""


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_killed_anywhere_a_delivery_ends_as_if_nothing_had_happened(
    scenario: Scenario, forks: Forks, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """After the restart the file is in one place, with one document beside it, and was stored once."""
    swept, wrong = 0, []
    with stage(scenario, forks, tmp_path) as it:
        calls = _calls(it)
        for fault in (Fault.KILL_BEFORE, Fault.KILL_AFTER):
            for point in points(calls + BEYOND, every=EVERY):
                found = _killed_and_restarted(it, point, fault)
                if found is None:
                    break
                swept += 1
                wrong += found
    tell(f"kill sweep, {scenario.name}: {swept} points of {calls} calls")
    assert swept > calls // EVERY
    assert not wrong, said(wrong)


def _calls(it: Stage) -> int:
    """How many calls a delivery makes that nothing happens to; it must be right in itself."""
    it.set()
    ended = it.run(drain_s=10.0)
    assert ended.status == int(it.scenario.fails), it.events()
    assert list(it.wrong()) == []
    return ended.calls


def _killed_and_restarted(it: Stage, point: int, fault: Fault) -> list[str] | None:
    """What is wrong after it; None if the delivery made fewer calls than that."""
    it.set()
    ended = it.run(drain_s=10.0, point=point, fault=fault)
    if not ended.at:
        return None
    return [f"{fault.name} {ended.at}, call {point}: {what}" for what in _found(it, ended.status)]


def _found(it: Stage, status: int) -> Iterator[str]:
    if status != KILLED:
        yield f"it was not killed, its status is {status}"
    yield from it.lost()
    again = it.run(drain_s=10.0)
    if again.status not in (0, 1):
        yield f"the restart ended with {again.status}"
    yield from it.wrong()

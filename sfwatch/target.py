"""A target that takes nothing is asked by one small probe at a time, until it accepts a file again.

A target is a host with a key. What becomes of one upload tells something about all the others: an expired
key, an empty balance or an outage would meet each of a hundred thousand waiting files. So after a fault that
is not one file's own, the target is *held*: no upload begins, and the hold goes through these stages:

    stage        what happens                          goes to
    WAITING      a growing pause                       PROBING    at `probe_at`
    PROBING      one listing, with the key read anew   TRIAL_DUE  it passed
                                                       WAITING    it failed; longer pause
    TRIAL_DUE    one file may go                       TRYING     it went
    TRYING       that one file is under way            (no hold)  accepted
                                                       WAITING    refused for the account, not now, or unknown;
                                                                  longer pause
                                                       TRIAL_DUE  refused for itself, or said nothing; next file

A probe that passes is no end: listings work with an empty balance. An acceptance ends the hold at any stage,
also that of a file that was under way when it began, and nothing else does. Other files that were under way
then change nothing more: their failures are of the same time as the hold's.

Not held, a target has a pace: the uploads at once that the service tolerates. A rate limit halves it (never
below one), acceptances raise it by about one for each round of uploads (never above `concurrency`).

Every function here takes a `Target` and returns another. Times are monotonic seconds; `luck` is in [0, 1).
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from enum import StrEnum

from sfwatch.verdict import backoff_s

IN_A_ROW = 3
"""Failures in a row, or files refused alike, that make it the target's."""

REMEMBERED = 32
"""Files remembered for what they have in common; a longer memory would change no decision."""

REFUSES_ALL = "refuses_all"
UNREACHABLE = "unreachable"
OVERLOADED = "overloaded"
NO_ANSWERS = "no_answers"


class Stage(StrEnum):
    """How far a hold is on its way to an end."""

    WAITING = "waiting"
    PROBING = "probing"
    TRIAL_DUE = "trial_due"
    TRYING = "trying"


@dataclass(frozen=True, slots=True)
class Hold:
    """Why and since when a target is held, and what ends it.

    `reason` and `detail` are those of the latest probe or trial. `pause_s` is the present pause, which ends
    at `probe_at`; `failures` are the pauses so far. `tried`: files that had their trial in this hold.
    """

    reason: str
    detail: str
    since: float
    pause_s: float
    probe_at: float
    stage: Stage = Stage.WAITING
    tried: frozenset[Hashable] = frozenset()
    trial: Hashable | None = None
    failures: int = 1


@dataclass(frozen=True, slots=True)
class Target:
    """What is known of a host with a key.

    `failing`: the latest files that failed "not now" or unclearly, no acceptance or refusal between.
    `faulted`: files that met an account-like refusal since the last acceptance. `charged`: files whose
    account-like refusal another file's acceptance disproved; such a file alone can't hold the target.
    `refused`: files refused for themselves, and with which words, before the first acceptance.
    `asking`: a probe is out, that of an earlier hold perhaps: it may outlast the hold that it was for.
    """

    concurrency: int
    first_s: float = 1.0
    longest_s: float = 300.0
    hold: Hold | None = None
    pace: float = math.inf  # made 1 … concurrency below
    not_before: float = 0.0
    failing: tuple[Hashable, ...] = ()
    refused: tuple[tuple[Hashable, str], ...] = ()
    asking: bool = False
    accepted: int = 0
    charged: frozenset[Hashable] = frozenset()
    faulted: tuple[Hashable, ...] = ()

    def __post_init__(self) -> None:
        """Keep the pace within its bounds, whatever made this value."""
        object.__setattr__(self, "pace", max(1.0, min(self.pace, float(self.concurrency))))


# ── what an upload's end tells ─────────────────────────────────────────────────────────────────────────────


def after_accepted(t: Target, file: Hashable, now: float) -> Target:  # noqa: ARG001 — as all transitions
    """End any hold, raise the pace, and charge those whom this acceptance disproves.

    A file's own acceptance clears it. The charge is an assumption (the key may have been renewed just now),
    but a mild one: another file's fault still holds the target.
    """
    return replace(
        t,
        hold=None,
        pace=t.pace + 1 / t.pace,
        failing=(),
        refused=(),
        faulted=(),
        accepted=t.accepted + 1,
        charged=(t.charged | frozenset(t.faulted)) - {file},
    )


def after_account_fault(
    t: Target, file: Hashable | None, reason: str, detail: str, now: float, luck: float
) -> Target:
    """Hold the target, or if this was the hold's trial, make the pause longer.

    `file` is None where no file was tried (no key). A charged file holds the target only together with
    another that met such a fault since the last acceptance.
    """
    others = [other for other in t.faulted if other != file]
    faulted = others if file is None else [*others, file]
    told = replace(t, faulted=tuple(faulted[-REMEMBERED:]))
    if t.hold is None and file in t.charged and not others:
        return told
    return _failed(told, file, reason, detail, now=now, luck=luck)


def after_not_now(
    t: Target,
    file: Hashable,
    reason: str,
    detail: str,
    now: float,
    luck: float,
    *,
    unreachable: bool,
    slows: bool,
    retry_after_s: float | None,
) -> Target:
    """Count a failure that is nobody's fault; slow down at a rate limit; hold when it is everybody's.

    A failed connect or lookup (`unreachable`) holds at once; else three such in a row, of two files or more.
    """
    told = _slowed(t, now, retry_after_s) if slows else t
    told = replace(told, failing=(*told.failing, file)[-IN_A_ROW:])
    if _is_trial(told, file):
        return _failed(told, file, reason, detail, now=now, luck=luck, retry_after_s=retry_after_s)
    if unreachable or _fails_for_all(told):
        why = UNREACHABLE if unreachable else OVERLOADED
        return _failed(told, file, why, detail, now=now, luck=luck, retry_after_s=retry_after_s)
    return told


def after_unknown(t: Target, file: Hashable, reason: str, detail: str, now: float, luck: float) -> Target:
    """Count a lost answer: files that all end so would each be sent whole in an outage of 502s.

    Three in a row, together with "not now", of two files or more hold the target (`no_answers`).
    """
    told = replace(t, failing=(*t.failing, file)[-IN_A_ROW:])
    if _is_trial(told, file):
        return _failed(told, file, reason, detail, now=now, luck=luck)
    if _fails_for_all(told):
        return _failed(told, file, NO_ANSWERS, detail, now=now, luck=luck)
    return told


def after_refused(t: Target, file: Hashable, alike: str, now: float, luck: float = 0.5) -> Target:
    """Note that the service refused this file for itself, and hold when it so refuses everything.

    `alike` is what the refusal has in common with others (status and code). Three different files refused
    alike, none accepted since the start, hold the target; `refuses_all` then says that they go back, and
    each later one too. A trial refused otherwise passes its turn on.
    """
    told = forgotten(t, file)
    if told.accepted == 0:
        told = replace(told, refused=(*told.refused, (file, alike))[-REMEMBERED:])
    if not refuses_all(told, alike):
        return after_other(replace(told, failing=()), file, now)
    return _failed(told, file, REFUSES_ALL, f"every file so far was refused alike: {alike}", now=now, luck=luck)


def refuses_all(t: Target, alike: str) -> bool:
    """Whether so many files were refused alike, and none accepted, that it can't be their own fault."""
    return len({file for file, words in t.refused if words == alike}) >= IN_A_ROW


def after_other(t: Target, file: Hashable, now: float) -> Target:  # noqa: ARG001 — as all transitions
    """The attempt ended for reasons that say nothing of the target: its trial's turn passes on."""
    if t.hold is None or not _is_trial(t, file):
        return t
    return replace(t, hold=replace(t.hold, stage=Stage.TRIAL_DUE, trial=None))


def forgotten(t: Target, file: Hashable) -> Target:
    """This file is gone for good: nothing is held against it. Call it at each terminal event."""
    return replace(
        t,
        failing=tuple(other for other in t.failing if other != file),
        faulted=tuple(other for other in t.faulted if other != file),
        charged=t.charged - {file},
    )


def reloaded(t: Target, now: float, *, concurrency: int, first_s: float, longest_s: float) -> Target:
    """New settings: grudges are void, and a held target is probed at once."""
    hold = replace(t.hold, probe_at=min(t.hold.probe_at, now)) if t.hold else None
    fresh = Target(concurrency, first_s, longest_s, hold=hold, not_before=t.not_before, asking=t.asking)
    return replace(fresh, pace=t.pace if t.pace < t.concurrency else math.inf)


# ── what may be done now ───────────────────────────────────────────────────────────────────────────────────


def room(t: Target, under_way: int, now: float) -> int:
    """How many uploads may be started now, with `under_way` of this target's running."""
    if now < t.not_before:
        return 0
    if t.hold is None:
        return max(0, math.floor(t.pace) - under_way)
    return 1 if t.hold.stage is Stage.TRIAL_DUE and under_way < t.concurrency else 0


def may_try(t: Target, file: Hashable) -> bool:
    """Whether `file` may be the next trial. When no due file may, call `forget_tried`."""
    return t.hold is None or file not in t.hold.tried


def forget_tried(t: Target) -> Target:
    """All had their trial in this hold: begin again with the smallest."""
    return replace(t, hold=replace(t.hold, tried=frozenset())) if t.hold else t


def started(t: Target, file: Hashable, now: float) -> Target:  # noqa: ARG001 — as all transitions
    """A file goes out; while a trial is due, it is the trial."""
    if t.hold is None or t.hold.stage is not Stage.TRIAL_DUE:
        return t
    return replace(t, hold=replace(t.hold, stage=Stage.TRYING, trial=file, tried=t.hold.tried | {file}))


def wants_probe(t: Target, now: float) -> bool:
    """Whether the pause is over, and no earlier probe still out."""
    return t.hold is not None and t.hold.stage is Stage.WAITING and now >= t.hold.probe_at and not t.asking


def probing(t: Target) -> Target:
    """A probe goes out."""
    if t.hold is None or t.hold.stage is not Stage.WAITING:
        return t
    return replace(t, hold=replace(t.hold, stage=Stage.PROBING), asking=True)


def after_probe(
    t: Target,
    *,
    passed: bool,
    reason: str,
    detail: str,
    now: float,
    luck: float,
    retry_after_s: float | None = None,
) -> Target:
    """A probe came back; one that passed lets a file try. It tells nothing if its hold has ended meanwhile."""
    told = replace(t, asking=False)
    if told.hold is None or told.hold.stage is not Stage.PROBING:
        return told
    if passed:
        return replace(told, hold=replace(told.hold, stage=Stage.TRIAL_DUE))
    return _paused_longer(told, told.hold, reason, detail, now=now, luck=luck, retry_after_s=retry_after_s)


def next_at(t: Target, now: float = 0.0) -> float | None:
    """When something becomes due by itself; None while a probe, a trial or a file's arrival is awaited.

    Pass `now`: the end of a rate limit's wait is then told only as long as it lies ahead.
    """
    if t.hold is not None and t.hold.stage is Stage.WAITING:
        return None if t.asking else t.hold.probe_at
    starts = t.hold is None or t.hold.stage is Stage.TRIAL_DUE
    return t.not_before if starts and t.not_before > now else None


def held_reason(t: Target) -> str | None:
    """Why the target is held; None if it is not."""
    return t.hold.reason if t.hold else None


# ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────


def _is_trial(t: Target, file: Hashable | None) -> bool:
    return t.hold is not None and t.hold.stage is Stage.TRYING and t.hold.trial == file


def _fails_for_all(t: Target) -> bool:
    """A single file that fails again and again says little of the target: it may be the file that is odd."""
    return len(t.failing) == IN_A_ROW and len(set(t.failing)) > 1


def _slowed(t: Target, now: float, retry_after_s: float | None) -> Target:
    until = now + min(retry_after_s or 0.0, t.longest_s)
    return replace(t, pace=t.pace / 2, not_before=max(t.not_before, until))


def _failed(
    t: Target,
    file: Hashable | None,
    reason: str,
    detail: str,
    *,
    now: float,
    luck: float,
    retry_after_s: float | None = None,
) -> Target:
    """Begin a hold, or lengthen the one whose trial this was; a straggler's failure changes nothing."""
    if t.hold is None:
        fresh = Hold(
            reason, detail, since=now, pause_s=0.0, probe_at=now, failures=0, tried=_refused_files(t, reason)
        )
        return _paused_longer(t, fresh, reason, detail, now=now, luck=luck, retry_after_s=retry_after_s)
    if _is_trial(t, file):
        return _paused_longer(t, t.hold, reason, detail, now=now, luck=luck, retry_after_s=retry_after_s)
    return t


def _refused_files(t: Target, reason: str) -> frozenset[Hashable]:
    """Files that are known to be refused have their trial behind them: another one may show more."""
    return frozenset(file for file, _ in t.refused) if reason == REFUSES_ALL else frozenset()


def _paused_longer(
    t: Target,
    hold: Hold,
    reason: str,
    detail: str,
    *,
    now: float,
    luck: float,
    retry_after_s: float | None,
) -> Target:
    failures = hold.failures + 1
    pause_s = backoff_s(
        failures, first_s=t.first_s, longest_s=t.longest_s, luck=luck, retry_after_s=retry_after_s
    )
    longer = replace(
        hold,
        reason=reason,
        detail=detail,
        stage=Stage.WAITING,
        trial=None,
        failures=failures,
        pause_s=pause_s,
        probe_at=now + pause_s,
    )
    return replace(t, hold=longer)

"""A target that takes nothing is asked by one small probe at a time, until it accepts a file again.

A target is a host with a key. What becomes of one upload tells something about all the others: an expired
key, an empty balance or an outage would meet each of a hundred thousand waiting files. So after a fault that
is not one file's own, the target is *held*: no upload begins, and the hold goes through these stages:

    stage        what happens                          goes to
    WAITING      a growing pause                       PROBING    at `probe_at`
    PROBING      one listing, with the key read again   TRIAL_DUE  it passed; a short pause before the file
                                                       WAITING    it failed; longer pause
    TRIAL_DUE    one file may go                       TRYING     it went
    TRYING       that one file is under way            (no hold)  accepted
                                                       WAITING    refused for the account, not now, or unknown;
                                                                  longer pause
                                                       TRIAL_DUE  rate limited, or said nothing; next file

A probe that passes is no end: listings work with an empty balance. An acceptance ends the hold at any stage,
also that of a file that was under way when it began, and nothing else does. Other files that were under way
then change nothing more: their failures are of the same time as the hold's.

A rate limit holds nothing. It gives the target an *interval* between the starts of requests of any kind: each
further one doubles it, each acceptance takes a tenth off. In it one request is under way at a time, uploads and
look-ups in turn, and there is no probe, which would take the place of a file.

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
"""Files remembered for what they have in common."""

FIRST_INTERVAL_S = 0.25
SHORTEST_INTERVAL_S = 0.1
UNTRIED_PAUSES = 60  # so many first pauses are the longest one while all is refused and a file is untried

REFUSES_ALL = "refuses_all"


class Stage(StrEnum):
    """How far a hold is on its way to an end."""

    WAITING = "waiting"
    PROBING = "probing"
    TRIAL_DUE = "trial_due"
    TRYING = "trying"


@dataclass(frozen=True, slots=True)
class Hold:
    """Why and since when a target is held, and what ends it.

    `reason` is that of its beginning, `detail` that of the latest probe or trial. `pause_s` is the present
    pause, which ends at `probe_at`; `failures` are the pauses so far. No file tries before `trial_at`.
    `tried`: files that had their trial in this hold.
    """

    reason: str
    detail: str
    since: float
    pause_s: float
    probe_at: float
    trial_at: float = 0.0
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
    `refused`: files refused since the last acceptance, with which words, and whether they are suspects: refused
    with these words before that acceptance as well. `asking`: a probe is out, that of an earlier hold perhaps.
    `interval_s`: 0 if the rate is not limited; else nothing starts before `next_start`, and a due look-up goes
    first unless `looked_last`.
    """

    concurrency: int
    first_s: float = 1.0
    longest_s: float = 300.0
    hold: Hold | None = None
    interval_s: float = 0.0
    next_start: float = 0.0
    looked_last: bool = False
    failing: tuple[Hashable, ...] = ()
    refused: tuple[tuple[Hashable, str, bool], ...] = ()
    asking: bool = False
    charged: frozenset[Hashable] = frozenset()
    faulted: tuple[Hashable, ...] = ()


# ── what an upload's end tells ─────────────────────────────────────────────────────────────────────────────


def after_accepted(t: Target, file: Hashable, now: float) -> Target:  # noqa: ARG001 — as all transitions
    """End any hold, shorten the interval, and charge those whom this acceptance disproves.

    A file's own acceptance clears it. The charge is an assumption (the key may have been renewed just now),
    but a mild one: another file's fault still holds the target.
    """
    shorter = t.interval_s * 0.9
    return replace(
        t,
        hold=None,
        interval_s=shorter if shorter >= SHORTEST_INTERVAL_S else 0.0,
        failing=(),
        refused=(),
        faulted=(),
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
    return _failed(told, file, reason, detail, now, luck)


def after_not_now(
    t: Target,
    file: Hashable,
    detail: str,
    now: float,
    luck: float,
    *,
    unreachable: bool,
    retry_after_s: float | None,
) -> Target:
    """Count a failure that is nobody's fault; hold when it is everybody's. Not for rate limits.

    A failed connect or lookup (`unreachable`) holds at once; else three such in a row, of two files or more.
    """
    told = replace(t, failing=(*t.failing, file)[-IN_A_ROW:])
    if not (_is_trial(told, file) or unreachable or _fails_for_all(told)):
        return told
    why = "unreachable" if unreachable else "overloaded"
    return _failed(told, file, why, detail, now, luck, retry_after_s)


def after_rate_limited(t: Target, file: Hashable | None, now: float, retry_after_s: float | None) -> Target:
    """Begin or double the interval; `file` is None for a listing. A hold's next trial is due after it.

    After a probe's rate limit call `after_probe` as well, as if it had passed.
    """
    interval_s = min(max(FIRST_INTERVAL_S, 2 * t.interval_s), t.longest_s)
    pause_s = min(max(interval_s, retry_after_s or 0.0), t.longest_s)  # Retry-After is for the next one alone
    return replace(after_other(t, file, now), interval_s=interval_s, next_start=now + pause_s)


def after_unknown(t: Target, file: Hashable, detail: str, now: float, luck: float) -> Target:
    """Count a lost answer: files that all end so would each be sent whole in an outage of 502s.

    Three in a row, together with "not now", of two files or more hold the target (`no_answers`).
    """
    told = replace(t, failing=(*t.failing, file)[-IN_A_ROW:])
    if _is_trial(told, file) or _fails_for_all(told):
        return _failed(told, file, "no_answers", detail, now, luck)
    return told


def after_refused(
    t: Target, file: Hashable, words: str, now: float, luck: float, *, suspect: bool, untried: bool
) -> Target:
    """Note with which words the service refused this file, and hold when it so refuses everything.

    `suspect`: refused with these words before the last acceptance too, it tells nothing new of the target.
    `untried`: another due file is untried in this hold. A hold's first refused trials pass their turn on; once
    three files were refused, whatever the words, pauses come between.
    """
    others = [one for one in t.refused if one[0] != file]
    told = replace(t, failing=(), refused=(*others, (file, words, suspect))[-REMEMBERED:])
    enough = _is_trial(told, file) and len(told.refused) >= IN_A_ROW
    if not enough and not refuses_all(told, words):
        return after_other(told, file, now)
    detail = f"files are refused, and none was accepted between: {words}"
    most = UNTRIED_PAUSES * t.first_s if untried and held_reason(t) in {None, REFUSES_ALL} else t.longest_s
    return _failed(told, file, REFUSES_ALL, detail, now, luck, longest_s=most)


def refuses_all(t: Target, words: str) -> bool:
    """Whether three files that are no suspects were refused so, and none was accepted between."""
    return sum(said == words and not suspect for _, said, suspect in t.refused) >= IN_A_ROW


def refused_alike(t: Target, words: str) -> int:
    """How many different files were refused with these words since the last acceptance."""
    return sum(said == words for _, said, _ in t.refused)


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
    """New settings: what files are charged with is forgotten, and a held target is probed at once."""
    hold = replace(t.hold, probe_at=min(t.hold.probe_at, now)) if t.hold else None
    interval_s = min(t.interval_s, longest_s)
    return Target(concurrency, first_s, longest_s, hold, interval_s, t.next_start, asking=t.asking)


# ── what may be done now ───────────────────────────────────────────────────────────────────────────────────


def room(t: Target, under_way: int, now: float, *, looking: bool = False) -> int:
    """How many uploads may be started now, with `under_way` of this target's running, or a look-up out."""
    most = t.concurrency if t.hold is None else 1 if _trial_due(t, now) else 0
    if t.interval_s:
        return min(most, 1) if now >= t.next_start and under_way < 1 and not looking and not t.asking else 0
    return min(most, max(0, t.concurrency - under_way))


def may_look(t: Target, now: float, *, looking: bool, uploading: int) -> bool:
    """Whether a look-up may begin now: one at a time, and in a hold's pauses only the probe, which is one."""
    if looking or t.asking or (t.interval_s and (now < t.next_start or uploading)):
        return False
    return t.hold is None or t.hold.stage in {Stage.TRIAL_DUE, Stage.TRYING} or _trial_due(t, now)


def may_try(t: Target, file: Hashable) -> bool:
    """Whether `file` may be the next trial. When no due file may, call `forget_tried`."""
    return t.hold is None or file not in t.hold.tried


def forget_tried(t: Target) -> Target:
    """All had their trial in this hold: begin again with the smallest."""
    return replace(t, hold=replace(t.hold, tried=frozenset())) if t.hold else t


def started(t: Target, file: Hashable, now: float) -> Target:
    """A file goes out; while a trial is due, it is the trial."""
    told = replace(t, next_start=now + t.interval_s, looked_last=False)
    if t.hold is None or not _trial_due(t, now):
        return told
    return replace(told, hold=replace(t.hold, stage=Stage.TRYING, trial=file, tried=t.hold.tried | {file}))


def look_started(t: Target, now: float) -> Target:
    """A look-up goes out that is no probe."""
    return replace(t, next_start=now + t.interval_s, looked_last=True)


def wants_probe(t: Target, now: float) -> bool:
    """Whether the pause is over, and no earlier probe still out."""
    waits = t.hold is not None and t.hold.stage is Stage.WAITING and now >= t.hold.probe_at
    return waits and not t.interval_s and not t.asking


def probing(t: Target) -> Target:
    """A probe goes out."""
    if t.hold is None or t.hold.stage is not Stage.WAITING:
        return t
    return replace(t, hold=replace(t.hold, stage=Stage.PROBING), asking=True)


def after_probe(
    t: Target, *, passed: bool, detail: str, now: float, luck: float, retry_after_s: float | None = None
) -> Target:
    """A probe came back: one that passed lets a file try, a little later, since rate limits count it too."""
    told = replace(t, asking=False)
    if told.hold is None or told.hold.stage is not Stage.PROBING:
        return told
    if passed:
        return replace(told, hold=replace(told.hold, stage=Stage.TRIAL_DUE, trial_at=now + t.first_s))
    return _paused_longer(told, told.hold, detail, now, luck, retry_after_s, t.longest_s)


def next_at(t: Target, now: float = 0.0) -> float | None:
    """When something becomes due by itself, not before `now` unless it is a probe; None where one waits."""
    due_at = t.next_start if t.interval_s else 0.0
    if t.hold is not None:
        waits = t.hold.stage is Stage.WAITING
        if t.hold.stage in {Stage.PROBING, Stage.TRYING} or (waits and t.asking):
            return None
        if waits and not t.interval_s:
            return t.hold.probe_at
        due_at = max(due_at, t.hold.probe_at if waits else t.hold.trial_at)
    return due_at if due_at > now else None


def held_reason(t: Target) -> str | None:
    """Why the target is held; None if it is not."""
    return t.hold.reason if t.hold else None


# ── inside ─────────────────────────────────────────────────────────────────────────────────────────────────


def _trial_due(t: Target, now: float) -> bool:
    """In an interval a pause is not followed by a probe, but by the trial."""
    if t.hold is None or t.hold.stage is not Stage.WAITING:
        return t.hold is not None and t.hold.stage is Stage.TRIAL_DUE and now >= t.hold.trial_at
    return t.interval_s > 0 and now >= t.hold.probe_at


def _is_trial(t: Target, file: Hashable | None) -> bool:
    return t.hold is not None and t.hold.stage is Stage.TRYING and t.hold.trial == file


def _fails_for_all(t: Target) -> bool:
    """A single file that fails again and again says little of the target: it may be the file that is odd."""
    return len(t.failing) == IN_A_ROW and len(set(t.failing)) > 1


def _failed(
    t: Target,
    file: Hashable | None,
    reason: str,
    detail: str,
    now: float,
    luck: float,
    retry_after_s: float | None = None,
    longest_s: float = math.inf,
) -> Target:
    """Begin a hold, or lengthen the one whose trial this was; a straggler's failure changes nothing."""
    if t.hold is not None and not _is_trial(t, file):
        return t
    # Files that are known to be refused have their trial behind them: another one may show more.
    tried = frozenset(one for one, *_ in t.refused) if reason == REFUSES_ALL else frozenset()
    hold = t.hold or Hold(reason, detail, since=now, pause_s=0.0, probe_at=now, failures=0, tried=tried)
    return _paused_longer(t, hold, detail, now, luck, retry_after_s, longest_s)


def _paused_longer(
    t: Target, hold: Hold, detail: str, now: float, luck: float, retry_after_s: float | None, longest_s: float
) -> Target:
    n, most = hold.failures + 1, min(t.longest_s, longest_s)
    pause_s = backoff_s(n, first_s=t.first_s, longest_s=most, luck=luck, retry_after_s=retry_after_s)
    longer = replace(hold, detail=detail, failures=n, pause_s=pause_s, probe_at=now + pause_s)
    return replace(t, hold=replace(longer, stage=Stage.WAITING, trial=None))

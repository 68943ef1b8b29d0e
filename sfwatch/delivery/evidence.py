"""What a file's own failures prove of the file.

One refusal proves nothing: it may be the account's. A further one counts only if its words are the same, and if
another file of the target was accepted since the last one that counted. Time alone proves nothing either.

`accepted` is the journal's number of the target's last acceptance. All times are seconds of pauses that were
served, without holds and downtime, so that no clock takes part.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

PROOF = 3
"""Refusals in the same words, another file accepted between each two, that reject a file."""

SHORTEST_PAUSE = 60
LONGEST_PAUSE = 3600
"""Pauses of a doubted file, counted in first pauses (`first_retry`)."""

POISON_S = 3600.0
"""A file is called poison only after an hour of pauses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is kept in the file's row, so that it survives release, holds and restarts.

    `refusals`: that count, all with `refused_words`, the last one after the acceptance `refused_after`.
    `suspicions`: failures that could be the file's, the last one after `suspected_after`.
    """

    refusals: int = 0
    refused_words: str | None = None
    refused_after: int = 0
    suspicions: int = 0
    suspected_after: int = 0
    served_s: float = 0.0


E = TypeVar("E", bound=Evidence)


def refused(e: E, words: str, accepted: int) -> E:
    """Count a refusal; other words than before begin at one."""
    if words != e.refused_words:
        return replace(e, refusals=1, refused_words=words, refused_after=accepted)
    if accepted <= e.refused_after:
        return e
    return replace(e, refusals=e.refusals + 1, refused_after=accepted)


def is_proved(e: Evidence) -> bool:
    """Whether the service refuses this file and not all files."""
    return e.refusals >= PROOF


def retry_in_s(e: Evidence, accepted: int, first_s: float) -> float:
    """The pause before a doubted file is tried again.

    It is short once another file was accepted since the refusal: call it then too. Else pauses double, since
    each is as long as all those before it.
    """
    shortest = SHORTEST_PAUSE * first_s
    return shortest if accepted > e.refused_after else min(shortest + e.served_s, LONGEST_PAUSE * first_s)


def suspected(e: E, accepted: int) -> E:
    """Count a failure that could be the file's."""
    if e.suspicions and accepted <= e.suspected_after:
        return e
    return replace(e, suspicions=e.suspicions + 1, suspected_after=accepted)


def is_poison(e: Evidence, poison_after: int) -> bool:
    """Whether it fails so often among accepted files, and for so long, that it is the file; 0 is never."""
    return 0 < poison_after <= e.suspicions and e.served_s >= POISON_S


def has_given_up(e: Evidence, give_up_after_s: float | None) -> bool:
    """Whether all the time is used up that a file may wait for its next try."""
    return give_up_after_s is not None and e.served_s >= give_up_after_s

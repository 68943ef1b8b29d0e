"""How it stands with one thing that `sfwatch check` has looked at, and what to do about it."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    WARNING = "warning"
    FINDING = "finding"
    UNAVAILABLE = "unavailable"
    NO_PERMISSION = "no_permission"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that was looked at: `about` names it, `text` says how it is and, if not well, what to do."""

    level: Level
    about: str
    text: str

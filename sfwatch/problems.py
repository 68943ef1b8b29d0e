"""What is wrong with a configuration: each thing with its path and line, and all of them at once."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where (`inboxes[1].settle`, "" for the whole file), and what to do about it."""

    path: str
    line: int | None
    text: str

    def __str__(self) -> str:
        line = f"line {self.line}" if self.line else ""
        where = f"{self.path} ({line})" if self.path and line else self.path or line
        return f"{where}: {self.text}" if where else self.text


class ConfigError(Exception):
    """The configuration can't be used; `problems` says all that is wrong with it.

    `forbidden`: it is there, and this user may not read it.
    """

    def __init__(
        self, problems: Iterable[Problem], source: Path | None = None, *, forbidden: bool = False
    ) -> None:
        self.problems = tuple(problems)
        self.source = source
        self.forbidden = forbidden
        super().__init__(
            "\n".join([f"{source or 'configuration'}:", *(f"  {problem}" for problem in self.problems)])
        )


@dataclass(frozen=True, slots=True)
class Notes:
    """What was found on the way: problems, and the line in which each key stands."""

    base: Path
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, text: str, *, line: int | None = None) -> None:
        self.problems.append(Problem(path, line or self.line(path), text))

    def line(self, path: str) -> int | None:
        """The line of a key, or of the nearest thing around it that was written down."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path)

    def place(self, path: str) -> str:
        line = self.line(path)
        return f"{path} (line {line})" if line else path

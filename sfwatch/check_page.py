"""What `sfwatch check` has found: one line a thing, as compilers say it, or all of it as one JSON object.

Everything that comes from a file is made printable first: nothing of it may steer a terminal.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from sfwatch import __version__, exits
from sfwatch.check import Checked, Finding, Wanted
from sfwatch.config import ConfigError
from sfwatch.console import count, painter, size
from sfwatch.excerpt import Excerpt, excerpt
from sfwatch.lint import MOST_FINDINGS, STDIN, FileReport
from sfwatch.logs import printable
from sfwatch.notes import Level, Note

_GREEN, _YELLOW, _RED, _BOLD, _DIM = "32", "33", "31", "1", "2"
_MARKS = {Level.OK: ("ok", _GREEN), Level.WARNING: ("!", _YELLOW)}
_FAULT = ("!!", _RED)
_INDENT = 4
_NARROWEST = 20
_SHOWN_MODELS = 3
_STATUSES = {
    "config": exits.BAD_CONFIG,
    Level.NO_PERMISSION: exits.NO_PERMISSION,
    Level.FINDING: exits.FINDINGS,
    Level.UNAVAILABLE: exits.UNAVAILABLE,
}
"""What must be mended first outweighs the rest."""


class Page:
    """What was found so far, and the exit status that it makes."""

    wanted = Wanted(most=MOST_FINDINGS)
    """What is asked of the findings in batch files."""

    def __init__(self, out: Callable[[str], None]) -> None:
        self.out = out
        self.config: str | None = None
        self.levels: set[str] = set()

    def rejected(self, error: ConfigError) -> None:
        """Take up what is wrong with the configuration."""
        self.levels.add(Level.NO_PERMISSION if error.forbidden else "config")
        self.config = str(error.source) if error.source else None

    def note(self, note: Note) -> None:
        """Take up one thing about the installation."""
        self.levels.add(note.level)

    def file(self, file: FileReport) -> None:
        """Take up one batch file."""
        if not file.is_sound:
            self.levels.add(Level.FINDING)

    def end(self) -> int:
        """Return the exit status."""
        return next((status for level, status in _STATUSES.items() if level in self.levels), exits.OK)


class TextPage(Page):
    """One line a thing, as soon as it is known; on a terminal `cells` wide with the place in the line."""

    def __init__(self, out: Callable[[str], None], *, colour: bool, cells: int | None) -> None:
        super().__init__(out)
        self._paint = painter(colour=colour)
        self._sound: Counter[bool] = Counter()
        if cells is not None:
            show = partial(excerpt, cells=max(cells - _INDENT - 1, _NARROWEST))
            self.wanted = Wanted(most=MOST_FINDINGS, show=show)

    def rejected(self, error: ConfigError) -> None:
        super().rejected(error)
        for problem in error.problems:
            self._say(*_FAULT, f"{error.source or 'configuration'}: {problem}")

    def note(self, note: Note) -> None:
        super().note(note)
        warning = "warning: " if note.level == Level.WARNING else ""
        self._say(*_MARKS.get(note.level, _FAULT), f"{warning}{note.about}: {note.text}")

    def file(self, file: FileReport) -> None:
        super().file(file)
        self._sound[file.is_sound] += 1
        name = "stdin" if file.name == STDIN else file.name
        if file.checked is None:
            self._say(*_FAULT, f"{name}: {file.problem}")
            return
        for row in self._rows(name, file.checked):
            self.out(row)
        mark = _MARKS[Level.OK] if file.is_sound else _FAULT
        self._say(*mark, f"{name}: {_summary(file.checked)}")

    def end(self) -> int:
        files = self._sound.total()
        if files > 1:
            self._say(*(_FAULT if self._sound[False] else _MARKS[Level.OK]), _total(files, self._sound[False]))
        return super().end()

    def _say(self, mark: str, colour: str, text: str) -> None:
        self.out(f"{self._paint(colour, f'{mark:<2}')}  {printable(text)}")

    def _rows(self, name: str, checked: Checked) -> Iterator[str]:
        for finding in checked.findings:
            yield f"{self._place(name, finding.line)} {printable(finding.detail)}"
            if finding.excerpt:
                yield from self._excerpt(finding.excerpt)
        if checked.more:
            yield f"{self._place(name, None)} … and {count(checked.more, 'finding')} more"
        for warning in checked.warnings:
            detail = warning.detail.removeprefix(f"line {warning.line} ")
            said = f"{self._paint(_YELLOW, 'warning:')} {printable(detail)}"
            yield f"{self._place(name, warning.line)} {said}"

    def _place(self, name: str, line: int | None) -> str:
        return self._paint(_BOLD, printable(f"{name}:{line}:" if line else f"{name}:"))

    def _excerpt(self, shown: Excerpt) -> Iterator[str]:
        yield " " * _INDENT + self._paint(_DIM, shown.text)
        yield " " * (_INDENT + shown.start) + self._paint(_RED, "^" * shown.width)


class JsonPage(Page):
    """One object at the end."""

    wanted = Wanted(most=MOST_FINDINGS, show=partial(excerpt, cells=_NARROWEST))

    def __init__(self, out: Callable[[str], None]) -> None:
        super().__init__(out)
        self._problems: list[str] = []
        self._notes: list[dict[str, Any]] = []
        self._files: list[dict[str, Any]] = []

    def rejected(self, error: ConfigError) -> None:
        super().rejected(error)
        self._problems = [str(problem) for problem in error.problems]

    def note(self, note: Note) -> None:
        super().note(note)
        self._notes.append(asdict(note))

    def file(self, file: FileReport) -> None:
        super().file(file)
        checked = _checked_as_json(file.checked) if file.checked else {}
        self._files.append({"file": file.name, "problem": file.problem, **checked})

    def end(self) -> int:
        status = super().end()
        document = {
            "status": status,
            "version": __version__,
            "config": {"path": self.config, "problems": self._problems},
            "checks": self._notes,
            "files": self._files,
        }
        self.out(json.dumps(document))  # in ASCII, which also has room for undecodable names
        return status


def _checked_as_json(checked: Checked) -> dict[str, Any]:
    return asdict(checked) | {
        "findings": [_finding_as_json(finding) for finding in checked.findings],
        "warnings": [_finding_as_json(warning) for warning in checked.warnings],
    }


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    column = finding.excerpt.column if finding.excerpt else None
    return {"line": finding.line, "column": column, "reason": finding.reason, "detail": finding.detail}


# ---- sums ----


def _summary(checked: Checked) -> str:
    parts = [f"{size(checked.size)}, {count(checked.lines, 'line')}"]
    if checked.models:
        parts.append(_models(checked.models))
    if checked.kinds:
        told = ", ".join(f"{times:,} {reason}" for reason, times in checked.kinds.items())
        parts.append(f"{count(sum(checked.kinds.values()), 'finding')} ({told})")
    if checked.warnings:
        parts.append(count(len(checked.warnings), "warning"))
    return "; ".join(parts)


def _models(models: Mapping[str, int]) -> str:
    shown = [f"{model} ({lines:,})" for model, lines in models.items()]
    more = ", …" if len(shown) > _SHOWN_MODELS else ""
    return f"{'model' if len(shown) == 1 else 'models'} {', '.join(shown[:_SHOWN_MODELS])}{more}"


def _total(files: int, faulty: int) -> str:
    return f"{count(files, 'file')}: " + (f"{faulty:,} not sound" if faulty else "all sound")

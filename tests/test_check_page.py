"""What `sfwatch check` prints, and the status that it ends with."""

import json
from pathlib import Path
from typing import Any

import pytest

from sfwatch import exits
from sfwatch.check import Checked, Finding
from sfwatch.check_page import JsonPage, TextPage
from sfwatch.config import ConfigError, Problem
from sfwatch.excerpt import Excerpt
from sfwatch.lint import FileReport
from sfwatch.notes import Level, Note

EXCERPT = Excerpt('…"role": "judge"}…', 9, 7, 45)
FINDING = Finding(17, "role_invalid", "body.messages[0].role must be one of them", EXCERPT)
WARNING = Finding(3, "blank_lines", "line 3 is blank")
SOUND = FileReport("good.jsonl", Checked("0" * 64, 1_234_567, 12, models={"m": 7, "n": 5}))
FAULTY = FileReport(
    "bad.jsonl",
    Checked("0" * 64, 999, 1, (FINDING,), 2, {"role_invalid": 2, "not_json": 1}, (WARNING,), {}),
)


def text_page(printed: list[str], *, colour: bool = False) -> TextPage:
    return TextPage(printed.append, colour=colour, cells=80)


def test_a_sound_file_takes_one_line() -> None:
    """Its size, its lines and the models that they ask for."""
    printed: list[str] = []
    text_page(printed).file(SOUND)
    assert printed == ["ok  good.jsonl: 1.2 MB, 12 lines; models m (7), n (5)"]


def test_findings_stand_above_their_sum() -> None:
    """Each with its place and the carets below it; then the warnings, then the sum by kinds."""
    printed: list[str] = []
    text_page(printed).file(FAULTY)
    assert printed == [
        "bad.jsonl:17: body.messages[0].role must be one of them",
        '    …"role": "judge"}…',
        "             ^^^^^^^",
        "bad.jsonl: … and 2 findings more",
        "bad.jsonl:3: warning: is blank",
        "!!  bad.jsonl: 999 B, 1 line; 3 findings (2 role_invalid, 1 not_json); 1 warning",
    ]


def test_several_files_are_summed_up() -> None:
    """One file needs no sum of sums."""
    printed: list[str] = []
    page = text_page(printed)
    page.file(SOUND)
    assert (page.end(), len(printed)) == (exits.OK, 1)
    page.file(SOUND)
    assert (page.end(), printed[-1]) == (exits.OK, "ok  2 files: all sound")
    page.file(FileReport("nope", problem="is not there"))
    assert (page.end(), printed[-1]) == (exits.FINDINGS, "!!  3 files: 1 not sound")


def test_colour_changes_nothing_but_the_colour() -> None:
    """Without the escapes it is the same text."""
    plain: list[str] = []
    painted: list[str] = []
    text_page(plain).file(FAULTY)
    text_page(painted, colour=True).file(FAULTY)
    for code in ("0", "1", "2", "31", "32", "33"):
        painted = [row.replace(f"\x1b[{code}m", "") for row in painted]
    assert painted == plain


@pytest.mark.parametrize(
    ("levels", "status"),
    [
        ([], exits.OK),
        ([Level.OK, Level.WARNING], exits.OK),
        ([Level.UNAVAILABLE], exits.UNAVAILABLE),
        ([Level.UNAVAILABLE, Level.FINDING], exits.FINDINGS),
        ([Level.FINDING, Level.NO_PERMISSION], exits.NO_PERMISSION),
    ],
)
def test_what_must_be_mended_first_makes_the_status(levels: list[Level], status: int) -> None:
    """A finding outweighs a service that is away, missing rights outweigh both."""
    page = text_page([])
    for level in levels:
        page.note(Note(level, "x", "y"))
    assert page.end() == status


def test_a_bad_configuration_outweighs_all() -> None:
    """Each of its problems is a line; where it may not be read, rights are missing."""
    printed: list[str] = []
    page = text_page(printed)
    page.file(FAULTY)
    page.rejected(ConfigError([Problem("a", 3, "bad"), Problem("b", 4, "worse")], Path("x.yaml")))
    assert page.end() == exits.BAD_CONFIG
    assert printed[-2:] == ["!!  x.yaml: a (line 3): bad", "!!  x.yaml: b (line 4): worse"]
    page = text_page(printed)
    page.rejected(ConfigError([Problem("", None, "may not be read")], forbidden=True))
    assert page.end() == exits.NO_PERMISSION


def test_as_json() -> None:
    """One object with everything that is known, columns included."""
    printed: list[str] = []
    page = JsonPage(printed.append)
    page.note(Note(Level.OK, "x", "y"))
    page.file(FAULTY)
    assert page.end() == exits.FINDINGS
    said: dict[str, Any] = json.loads("".join(printed))
    (file,) = said["files"]
    assert file["findings"] == [
        {"line": 17, "column": 45, "reason": "role_invalid", "detail": FINDING.detail},
    ]
    assert file["warnings"] == [
        {"line": 3, "column": None, "reason": "blank_lines", "detail": "line 3 is blank"},
    ]
    assert (file["kinds"], file["more"]) == ({"role_invalid": 2, "not_json": 1}, 2)
    assert said["checks"] == [{"level": "ok", "about": "x", "text": "y"}]

"""Keys that are sound each alone, but not together: folders in each other's way, names that are taken."""

from pathlib import Path

import pytest
from configuration import SMALLEST, inbox, parse, problems


def two(first: str, second: str, more: str = "") -> str:
    rest = "done: /d, failed: /f"
    return f"inboxes:\n  - {{name: a, {rest}, {first}}}\n  - {{name: b, {rest}, {second}}}\n{more}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            two("path: /srv/x", "path: /srv/x"),
            ["inboxes[1].path (line 3): is the same folder as inboxes[0].path (line 2)"],
        ),
        (two("path: /srv/x", "path: /srv/y/../x/"), ["inboxes[1].path (line 3): is the same folder"]),
        (
            two("path: /srv/x", "path: /srv/x/y/z"),
            ["inboxes[1].path (line 3): lies inside inboxes[0].path (line 2)"],
        ),
        (
            two("path: /srv/x/y", "path: /srv/x"),
            ["inboxes[0].path (line 2): lies inside inboxes[1].path (line 3)"],
        ),
        (
            inbox("done: /srv/sfwatch/inbox"),
            ["inboxes[0].done (line 3): lies where inboxes[0].path (line 2) looks"],
        ),
        (
            inbox("failed: /srv/sfwatch/inbox"),
            ["inboxes[0].failed (line 3): lies where inboxes[0].path (line 2) looks"],
        ),
        (
            two("path: /a", "path: /b", "state_dir: /a"),
            ["state_dir (line 4): lies where inboxes[0].path (line 2) looks"],
        ),
        (
            two("path: /a", "path: /d"),
            ["inboxes[0].done (line 2): lies where inboxes[1].path", "inboxes[1].done"],
        ),
        (
            "inboxes: [{path: /a}, {path: /c, recursive: true, done: /c/d, failed: /x}]",
            ["inboxes[1].done (line 1): lies where inboxes[1].path (line 1) looks"],
        ),
        (inbox("failed: /srv/sfwatch/done"), ["inboxes[0].failed (line 3): is the same folder as done"]),
        (inbox("done: /srv/sfwatch/inbox/.sfwatch/x"), ["inboxes[0].done (line 3): lies in a .sfwatch folder"]),
        ("inboxes: [{path: /srv/inbox/.sfwatch}]", ["inboxes[0].path (line 1): lies in a .sfwatch folder"]),
        (
            "inboxes: [{path: /srv/done}]",
            ["inboxes[0].done (line 1): lies where inboxes[0].path (line 1) looks"],
        ),
        ("inboxes: [{path: /}]", ["inboxes[0].path (line 1): / can't be an inbox"]),
        (SMALLEST + "log: {file: /srv/sfwatch/inbox/log.jsonl}", ["log.file (line 3): lies where"]),
        (SMALLEST + "metrics_file: /srv/sfwatch/inbox/x.prom", ["metrics_file (line 3): lies where"]),
    ],
)
def test_folders_that_are_refused(text: str, told: list[str]) -> None:
    """Inboxes that overlap, and folders to write to that an inbox looks into, are refused with both lines."""
    found = problems(text)
    assert len(found) == len(told)
    assert all(problem.startswith(start) for problem, start in zip(found, told, strict=True)), found


@pytest.mark.parametrize(
    "text",
    [
        two("path: /srv/x", "path: /srv/xy"),
        inbox("done: /srv/sfwatch/inbox/done"),
        inbox("failed: /srv/sfwatch/done/failed"),
        inbox("done: ../done"),
        SMALLEST + "state_dir: /srv/sfwatch/inbox/state",
    ],
)
def test_folders_that_are_taken(text: str) -> None:
    """Neighbours may share done and failed, and an inbox that is not recursive may hold them."""
    assert parse(text).inboxes


def test_links_do_not_hide_an_overlap() -> None:
    """Folders are compared by where they really lead."""
    text = two("path: /srv/x", "path: /link/y")
    assert parse(text).inboxes
    (problem,) = problems(text, realpath=lambda path: Path(str(path).replace("/link/", "/srv/x/")))
    assert problem.startswith("inboxes[1].path (line 3): lies inside inboxes[0].path (line 2)")


def test_two_inboxes_with_one_name_are_told_both() -> None:
    """Folders that are called alike need a name, and the problem says so."""
    text = "inboxes:\n  - path: /srv/a/inbox\n  - path: /srv/b/inbox\n"
    (problem,) = problems(text)
    assert problem == (
        "inboxes[1].name (line 3): has the same name as inboxes[0] (line 2): give one of them another `name`"
    )

"""Batch files that are only looked at: what is said of them, and of what can't be read."""

import os
from pathlib import Path

import pytest

from sfwatch.check import MAX_FINDINGS, Wanted
from sfwatch.lint import batch_file, limits
from sfwatch.settings import Check, Config, Inbox

GOOD = b'{"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}}\n'
BOUNDS = limits(None)
USUAL = Wanted()


def test_a_good_one(tmp_path: Path) -> None:
    """It is read once, and not changed."""
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    report = batch_file(str(tmp_path / "x.jsonl"), BOUNDS, None, USUAL)
    assert report.checked is not None
    assert (report.checked.lines, report.checked.findings, report.checked.models) == (1, (), {"m": 1})


def test_findings_beyond_the_bound(tmp_path: Path) -> None:
    """They are counted."""
    (tmp_path / "x.jsonl").write_bytes(b"x\n" * (MAX_FINDINGS + 7))
    report = batch_file(str(tmp_path / "x.jsonl"), BOUNDS, None, USUAL)
    assert report.checked is not None
    assert (len(report.checked.findings), report.checked.more) == (MAX_FINDINGS, 7)


def test_a_link(tmp_path: Path) -> None:
    """The name is the caller's own: it is followed, unlike in an inbox."""
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    (tmp_path / "link").symlink_to("x.jsonl")
    assert batch_file(str(tmp_path / "link"), BOUNDS, None, USUAL).checked is not None


def test_what_is_no_file(tmp_path: Path) -> None:
    """Each is said, and none is waited for: opening a FIFO would hang."""
    os.mkfifo(tmp_path / "x.jsonl")
    names = {"x.jsonl": "is a fifo", "": "is a folder", "nope": "is not there", "nope/x": "is not there"}
    for name, said in names.items():
        report = batch_file(str(tmp_path / name), BOUNDS, None, USUAL)
        assert report.problem is not None
        assert report.problem.startswith(said)


@pytest.mark.parametrize("name", ["/dev/null", "x" * 300, "a/\udcff"])
def test_odd_names(name: str) -> None:
    """They are problems of theirs, not errors of ours."""
    assert batch_file(name, BOUNDS, None, USUAL).problem


def test_standard_input(tmp_path: Path) -> None:
    """`-`; closed, it is a problem as any other."""
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    with (tmp_path / "x.jsonl").open("rb") as stream:
        assert batch_file("-", BOUNDS, stream, USUAL).checked is not None
    assert batch_file("-", BOUNDS, None, USUAL).problem == "can't be read: standard input is closed"


def test_whose_limits(tmp_path: Path) -> None:
    """The first inbox's; but who asks for a check gets one."""
    first = Inbox(tmp_path / "a", "a", tmp_path / "done", tmp_path / "failed", max_lines=3, check=Check.NONE)
    second = Inbox(tmp_path / "b", "b", tmp_path / "done", tmp_path / "failed")
    bounds = limits(Config((first, second)))
    assert (bounds.max_lines, bounds.check) == (3, Check.BATCH)


@pytest.mark.parametrize(("lines", "warned"), [(89, []), (90, ["nearly_too_many_lines"]), (101, [])])
def test_nearing_a_limit(tmp_path: Path, lines: int, warned: list[str]) -> None:
    """From nine tenths on it is a warning; beyond the limit there is a finding instead."""
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" * lines)
    bounds = Inbox(tmp_path, "a", tmp_path, tmp_path, check=Check.JSONL, max_lines=100)
    report = batch_file(str(tmp_path / "x.jsonl"), bounds, None, USUAL)
    assert report.checked is not None
    assert [warning.reason for warning in report.checked.warnings] == warned
    assert report.is_sound == (lines <= 100)


@pytest.mark.parametrize(("limit", "warned"), [(0, []), (60, ["nearly_too_big"]), (70, [])])
def test_nearing_the_largest_size(tmp_path: Path, limit: int, warned: list[str]) -> None:
    """A limit of 0 is none, so it is never near."""
    (tmp_path / "x.jsonl").write_bytes(b"{}\n" * 20)
    bounds = Inbox(tmp_path, "a", tmp_path, tmp_path, check=Check.JSONL, max_bytes=limit, max_lines=0)
    report = batch_file(str(tmp_path / "x.jsonl"), bounds, None, USUAL)
    assert report.checked is not None
    assert [warning.reason for warning in report.checked.warnings] == warned

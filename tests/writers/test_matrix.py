"""Real writers: every line that one wrote is uploaded exactly once, in one piece, whatever its program does.

All of them write beside each other, as three pairs of users: daemon and writers root; an ordinary user with
CAP_LEASE (what the unit grants) and files of somebody else; the same without that right, where only rest
decides. Then each writer has a test of its own.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from loop import KEY
from programs import need
from writers.run import ROLES, Matrix, Result, two_filesystems
from writers.scenes import SCENES, Ends

from sfwatch.standin import StandIn

pytestmark = pytest.mark.timeout(600)

Results = dict[tuple[str, str], Result]

PROGRAMS = ("scp", "sftp", "sshd", "ssh-keygen", "rsync", "curl", "wget", "tar", "vim", "logrotate", "strace")


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Everything is done here, once."""
    need(*PROGRAMS, "fallocate", "dd", "split", "sed")
    with two_filesystems() as (home, elsewhere):
        (home / "kept").mkdir()
        with StandIn(key=KEY, keep=home / "kept") as service:
            yield Matrix(home, elsewhere, service).run()


@pytest.mark.parametrize("role", [role.name for role in ROLES])
@pytest.mark.parametrize("name", SCENES)
def test_writer(results: Results, name: str, role: str) -> None:
    """Every line exactly once and whole; done holds what was uploaded; the inbox is empty."""
    result = results[role, name]
    if result.error is not None:
        raise result.error
    assert result.left == []
    assert sorted(result.done) == sorted(result.uploads)
    EXPECTED[result.scene.ends](result)


def as_one(result: Result) -> None:
    assert result.uploads == [b"".join(result.stage.written)]
    assert result.failed == []


def in_parts(result: Result) -> None:
    uploaded = Counter(line for upload in result.uploads for line in upload.splitlines(keepends=True))
    assert uploaded == Counter(result.stage.written)
    assert result.failed == []


def as_one_if_quick(result: Result) -> None:
    in_parts(result)
    if result.stage.longest_gap_s < result.role.rest_s:
        as_one(result)


def newest(result: Result) -> None:
    if result.stage.longest_gap_s < result.role.rest_s:
        as_one(result)
    versions = [b"".join(version) for version in (*result.stage.versions, result.stage.written)]
    assert versions[-1] in result.uploads
    assert set(result.uploads) <= set(versions)
    assert max(Counter(result.uploads).values()) == 1


def failed(result: Result) -> None:
    assert result.uploads == []
    assert result.failed == ["x.jsonl"]
    assert [e["reason"] for e in result.said("file.failed")] == ["not_json"]


EXPECTED: dict[Ends, Callable[[Result], None]] = {
    Ends.AS_ONE: as_one,
    Ends.IN_PARTS: in_parts,
    Ends.AS_ONE_IF_QUICK: as_one_if_quick,
    Ends.NEWEST: newest,
    Ends.FAILED: failed,
}


@pytest.mark.parametrize("role", [role.name for role in ROLES if role.writer is not None])
def test_what_a_file_waited_for_is_said(results: Results, role: str) -> None:
    """Nobody but its owner may read it: one event says so, and whose it is, and what helps."""
    (waiting,) = results[role, "renamed_and_private"].said("file.waiting")
    assert waiting["reason"] == "unreadable"
    assert "chmod g+r" in waiting["detail"]


def test_the_table(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """The README has a row for each writer; with SFWATCH_TABLE set, the rows are printed as they came out."""
    rows = [
        f"| {scene.title} | {' | '.join(told(results[role.name, name]) for role in ROLES)} |"
        for name, scene in SCENES.items()
    ]
    if "SFWATCH_TABLE" in os.environ:
        with capsys.disabled():
            print("", *rows, sep="\n")  # noqa: T201
    assert [row.split(" | ")[0] for row in table_of_the_readme()] == [row.split(" | ")[0] for row in rows]


def table_of_the_readme() -> list[str]:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    return text.partition("### Writers, tried")[2].partition("|---|")[2].partition("\n\n")[0].splitlines()[1:]


def told(result: Result) -> str:
    """What became of a writer's lines, what decided, and how long after the writer's end that was."""
    if not result.uploads:
        return f"failed: {', '.join(e['reason'] for e in result.said('file.failed'))}"
    count = len(result.uploads)
    settled = result.said("file.settled")
    by = Counter(e["settled_by"] for e in settled).most_common(1)[0][0]
    after = datetime.fromisoformat(settled[-1]["timestamp"]).timestamp() - result.stage.ended_at
    return f"{f'{count} parts' if count > 1 else 'one'}, {by}, {max(after, 0):.1f} s"

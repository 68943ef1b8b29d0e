"""What a person sees of `sfwatch once`: sums from the log, bars, and a table with reasons."""

import io
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfwatch.job import Job, Progress, Task
from sfwatch.once_page import Fate, Fates, OncePage, Speed
from sfwatch.settings import Inbox

EVALS = Inbox(Path("/in"), "evals", Path("/done"), Path("/failed"))
A: dict[str, Any] = {"inbox": "evals", "file": "a.jsonl", "size": 1000}
B: dict[str, Any] = {"inbox": "evals", "file": "b.jsonl", "size": 3000}


def fates(*events: dict[str, Any]) -> Fates:
    found = Fates()
    for event in events:
        found.take(event)
    return found


def said(event: str, **keys: Any) -> dict[str, Any]:
    return {"event": event, **keys}


def page(paper: io.StringIO, *, bars: bool = False, level: str = "info") -> OncePage:
    terminal = Console(file=paper, width=100, color_system=None, force_terminal=bars)
    return OncePage(terminal, level=level, bars=bars)


class TestFates:
    def test_files_are_counted_by_their_fate(self) -> None:
        """And their bytes; a file waits until it is done or failed."""
        found = fates(said("file.seen", **A), said("file.seen", **B), said("file.done", **A))
        assert found.counts == {Fate.DONE: 1, Fate.WAITING: 1}
        assert found.bytes == {Fate.DONE: 1000, Fate.WAITING: 3000}

    def test_a_file_that_grows(self) -> None:
        """Its last size counts, once."""
        found = fates(said("file.seen", **A), said("file.settled", **A | {"size": 5000}))
        assert (found.counts.total(), found.bytes.total()) == (1, 5000)

    @pytest.mark.parametrize("name", ["file.vanished", "file.ignored"])
    def test_what_is_not_there_any_more(self, name: str) -> None:
        """It is no file of ours."""
        found = fates(said("file.seen", **A), said(name, **A), said(name, **B))
        assert (found.counts.total(), found.bytes.total(), found.files) == (0, 0, {})

    def test_why(self) -> None:
        """The last thing that was said of it."""
        found = fates(
            said("file.waiting", reason="being_written", detail="pid 7 writes", **A),
            said("upload.deferred", reason="overloaded", detail="HTTP 503", **A),
            said("file.failed", reason="not_json", line=3, detail="line 3 is no JSON", **B),
        )
        assert [(seen.fate, seen.why) for seen in found.files.values()] == [
            (Fate.WAITING, "overloaded: HTTP 503"),
            (Fate.FAILED, "not_json: line 3: line 3 is no JSON"),
        ]

    def test_what_is_held(self) -> None:
        """Until it is resumed."""
        found = fates(
            said("target.held", target="t", reason="no_key", detail="there is none"),
            said("storage.held", path="/done", reason="full", detail="no room"),
            said("storage.resumed", path="/done", held_s=3.0),
        )
        assert found.holds == {"t": "no_key: there is none"}

    def test_events_about_no_file(self) -> None:
        """They count for nothing."""
        assert fates(said("daemon.ready", files=7), said("inbox.found", inbox="evals", path="/in")).files == {}


def test_speed_is_that_of_the_last_seconds() -> None:
    """Not that of the whole run."""
    speed = Speed()
    assert speed.at(0.0, 0) == 0.0
    assert speed.at(1.0, 100) == 100.0
    assert [speed.at(float(now), 100) for now in (5, 6, 20)] == [20.0, 0.0, 0.0]


def test_lines_and_a_table_where_nobody_looks() -> None:
    """As much as the level asks for, and no bars."""
    paper = io.StringIO()
    it = page(paper)
    with it.shown():
        log = it.log()
        log("file.seen", **A)
        log("upload.started", **A, attempt=1)
        log("file.done", **A, file_id="file-1")
        log("file.failed", **B, reason="not_json", line=3, detail="broken")
    it.print_end()
    events = [line.split()[1] for line in paper.getvalue().splitlines()[:3]]
    assert events == ["upload.started", "file.done", "file.failed"]
    assert paper.getvalue().splitlines()[3:] == [
        " inbox   done   failed   waiting   uploaded  ",
        " evals      1        1         0       1 KB  ",
        " failed   evals/b.jsonl  not_json: line 3: broken",
    ]


def test_several_inboxes_are_summed_up() -> None:
    """So are none."""
    paper = io.StringIO()
    it = page(paper)
    it.print_end()
    assert paper.getvalue().splitlines()[1].split() == ["all", "0", "0", "0", "0", "B"]
    for inbox in ("one", "two"):
        it.fates.take(said("file.done", inbox=inbox, file="a", size=500))
    it.print_end()
    assert paper.getvalue().splitlines()[-1].split() == ["all", "2", "0", "0", "1", "KB"]


def test_reasons_are_bounded() -> None:
    """The log has them all."""
    paper = io.StringIO()
    it = page(paper)
    for number in range(25):
        it.fates.take(
            said("file.waiting", inbox="evals", file=f"{number}", reason="empty", detail="it is empty")
        )
    it.fates.take(said("target.held", target="t", reason="no_key", detail="there is none"))
    it.print_end()
    *_, more, held = paper.getvalue().splitlines()
    assert more == " … and 5 more, each with its reason in the log"
    assert held == " held     t  no_key: there is none"


def test_bars() -> None:
    """One for all files and one for each that is under way; what they say is not said in lines as well."""
    paper = io.StringIO()
    it = page(paper, bars=True)
    job = Job(Task.DELIVER, EVALS, "b.jsonl", 0.0, "claims", progress=Progress(sent=1500, started_at=10.0))
    idle = Job(Task.DELIVER, EVALS, "c.jsonl", 0.0, "claims")
    it.watch(lambda: (job, idle), lambda: 20.0)
    log = it.log()
    log("file.seen", **A)
    with it.shown():
        log("file.done", **A)
        log("upload.started", **B, attempt=1)
    shown = paper.getvalue()
    assert "upload.started" not in shown
    assert "file.done" in shown
    assert "1 of 2 files" in shown
    assert "2.5 KB of 4 KB" in shown
    assert "evals/b.jsonl" in shown
    assert "1.5 KB of 3 KB" in shown
    assert "150 B/s" in shown
    assert "10 s left" in shown
    assert "c.jsonl" not in shown


def test_events_may_come_from_any_thread() -> None:
    """None is lost."""
    it = page(io.StringIO())
    log = it.log()

    def work(number: int) -> None:
        for at in range(50):
            log("file.seen", inbox="evals", file=f"{number}-{at}", size=1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert it.fates.counts == {Fate.WAITING: 200}

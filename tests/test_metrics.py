"""The metrics: in Prometheus' form, complete from the start, written seldom and whole."""

import os
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from loop import KEY, Loop
from prometheus_client.parser import text_string_to_metric_families
from test_status import made

from sfwatch import metrics, snapshot, status
from sfwatch.standin import StandIn
from sfwatch.tally import Tally

WHEN = datetime(2026, 11, 22, 20, 1, 12, tzinfo=UTC)


@pytest.fixture(name="promtool", scope="module")
def _promtool() -> str:
    if shutil.which("promtool") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        # Without its recommendations, and without a server that starts.
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", "prometheus"]):
            subprocess.run(["apt-get", "-q", *command], check=True, capture_output=True, env=environ)
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("needs promtool, of Debian's package prometheus, and no root to install it")
    return found


def busy() -> tuple[status.Status, Tally]:
    """A document and a tally in which every metric has something to say."""
    inbox = status.Inbox('odd "name"\\', "/i", "/d", "/f", lost=status.Lost("missing", "gone"), under_way=3)
    file = status.WaitingFile("x.jsonl", 5, WHEN)
    document = made(
        inboxes=(inbox,),
        waiting=(status.Waiting(inbox.name, "held", 7, (file,)),),
        targets=(status.Target("host (key)", reason="no_key"),),
        folders=(status.Folder("/d", "no_space", "full", WHEN, WHEN),),
    )
    tally = Tally()
    tally.note_done(inbox.name, "x.jsonl", size=10, seconds=3.0, at=1000.0)
    tally.note_failed(inbox.name, "y.jsonl", reason="bom", at=1001.0)
    return document, tally


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Every sample by its name and its labels."""
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_promtool_has_nothing_to_say(promtool: str) -> None:
    """Names, types, units and help texts are as Prometheus wants them, whatever the inboxes are called."""
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.render(*busy()), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_what_they_say() -> None:
    """Files by result and reason, bytes, durations, and what is so now."""
    found = samples(metrics.render(*busy()))
    inbox = 'inbox=odd "name"\\'
    assert found["sfwatch_files_total", f"{inbox},reason=,result=done"] == 1
    assert found["sfwatch_files_total", f"{inbox},reason=bom,result=failed"] == 1
    assert found["sfwatch_done_bytes_total", inbox] == 10
    assert found["sfwatch_file_duration_seconds_bucket", f"{inbox},le=2.5"] == 0
    assert found["sfwatch_file_duration_seconds_bucket", f"{inbox},le=5.0"] == 1
    assert found["sfwatch_file_duration_seconds_count", inbox] == 1
    assert found["sfwatch_file_duration_seconds_sum", inbox] == 3
    assert found["sfwatch_last_success_timestamp_seconds", inbox] == 1000
    assert found["sfwatch_waiting_files", f"{inbox},reason=held"] == 7
    assert found["sfwatch_oldest_waiting_timestamp_seconds", inbox] == WHEN.timestamp()
    assert found["sfwatch_under_way_files", inbox] == 3
    assert found["sfwatch_inbox_lost", inbox] == 1
    assert found["sfwatch_target_held", "target=host (key)"] == 1
    assert found["sfwatch_folder_held", "path=/d"] == 1
    assert found["sfwatch_up", ""] == 1


def test_all_is_there_from_the_start() -> None:
    """Each reason at zero, since a counter that appears at one looks as if it had never grown."""
    document = made(inboxes=(status.Inbox("a", "/i", "/d", "/f"),))
    found = samples(metrics.render(document, Tally()))
    assert found["sfwatch_files_total", "inbox=a,reason=refused,result=failed"] == 0
    assert found["sfwatch_waiting_files", "inbox=a,reason=unreadable"] == 0
    assert found["sfwatch_last_success_timestamp_seconds", "inbox=a"] == 0
    assert ("sfwatch_oldest_waiting_timestamp_seconds", "inbox=a") not in found
    assert samples(metrics.render(made(state="stopped"), Tally()))["sfwatch_up", ""] == 0


class TestTheFile:
    def test_it_is_written(self, tmp_path: Path) -> None:
        """At the start, readable for all, beside nothing; then not before the pause is over."""
        (tmp_path / "node").mkdir()
        file = tmp_path / "node" / "sfwatch.prom"
        with StandIn() as service:
            loop = Loop(tmp_path, service, config={"metrics_file": file}).start()
            assert file.stat().st_mode & 0o777 == 0o644
            assert list(file.parent.iterdir()) == [file]
            loop.drop("a", "x.jsonl")
            loop.look().run(5)
            done = ("sfwatch_files_total", "inbox=a,reason=,result=done")
            assert samples(file.read_bytes())[done] == 0
            loop.run(snapshot.METRICS_PAUSE_S)
            assert samples(file.read_bytes())[done] == 1
            assert KEY.encode() not in file.read_bytes()
            loop.close()

    def test_it_is_left_alone_while_nothing_happens(self, tmp_path: Path) -> None:
        """No clock runs in it."""
        file = tmp_path / "sfwatch.prom"
        with StandIn() as service:
            loop = Loop(tmp_path, service, config={"metrics_file": file}).start()
            loop.run(60)
            before = file.stat()
            loop.run(3600)
            assert file.stat().st_mtime_ns == before.st_mtime_ns
            loop.close()

    def test_the_end(self, tmp_path: Path) -> None:
        """The last word is written at once."""
        file = tmp_path / "sfwatch.prom"
        with StandIn() as service:
            loop = Loop(tmp_path, service, config={"metrics_file": file}).start()
            loop.signal(15)
            loop.daemon.run()
            assert samples(file.read_bytes())["sfwatch_up", ""] == 0
            loop.close()

"""Every kind of filesystem: how it is watched is said, and files go through to done there, once and whole.

One daemon has three inboxes on each filesystem: done is on the same one, or on another one, or the inbox is
written to behind this machine's back. All of them work beside each other.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from filesystems.volumes import KINDS, Volume
from loop import KEY
from program import started
from programs import need
from world import batch, needs_root, wait_for

from sfwatch.standin import Behaviour, StandIn, storing_then_stalling

pytestmark = [needs_root, pytest.mark.timeout(600)]

POLL_S = 0.5
UNPROVEN_S = 3.0
STALL_S = 1.5
PATIENCE_S = 60.0

NAMES = [
    b"plain.jsonl",
    "caf\u00e9.jsonl".encode(),
    "cafe\u0301.jsonl".encode(),
    b"caf\xe9.jsonl",
    b"two\nlines.jsonl",
    b"Plain.JSONL",
    b"-rf *.jsonl",
    b"n" * 249 + b".jsonl",
]
"""The same letters composed, decomposed and in Latin-1 are three files; so are two that differ by case only."""


@dataclass
class Run:
    """An inbox, what was dropped into it, and what became of that."""

    name: str
    inbox: Path
    done: Path
    writes_to: Path
    dropped: dict[bytes, bytes] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def drop_all(self) -> None:
        """One file of each name, renamed in; one that is written in place and stalls inside a line."""
        for raw in NAMES:
            self.dropped[raw] = batch(2, word=f"{self.name} {raw!r}")
            made = self.writes_to / ".made"
            made.write_bytes(self.dropped[raw])
            made.rename(self.writes_to / os.fsdecode(raw))
        data = self.dropped[b"slow.jsonl"] = batch(20, word=f"{self.name} slow")
        with (self.writes_to / "slow.jsonl").open("wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            time.sleep(STALL_S)
            file.write(data[len(data) // 2 :])

    def left(self) -> list[str]:
        """What still lies in the inbox, claims included; seen from behind, since sshfs keeps old lists."""
        there = [path for path in self.writes_to.rglob("*") if not path.is_dir()]
        return [
            path.name for path in there if path.parent.name != ".sfwatch" or path.suffix != ".owner"
        ]  # stays


@dataclass
class Results:
    """What all of them came to."""

    runs: dict[tuple[str, str], Run]
    uploads: Counter[str]
    events: list[dict[str, Any]]


VARIANTS = ("same", "across", "behind")
CASES = [
    (kind, variant)
    for kind in KINDS
    for variant in VARIANTS
    if variant != "behind" or kind in ("bindfs", "sshfs")
]


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """A folder with a short path: that of a socket must be short."""
    with tempfile.TemporaryDirectory(prefix="sfwatch-volumes-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def volumes(top: Path) -> Iterator[dict[str, Volume]]:
    """One of each kind."""
    for kind in KINDS.values():
        need(*kind.programs)
    with contextlib.ExitStack() as stack:
        mounted = {}
        for name, kind in KINDS.items():
            (top / name).mkdir()
            mounted[name] = stack.enter_context(kind.mount(top / name))
        yield mounted


@pytest.fixture(scope="module")
def results(top: Path, volumes: dict[str, Volume]) -> Results:
    """Everything is done here, once."""
    runs = {case: _prepare(top, volumes, *case) for case in CASES}
    with StandIn(key=KEY) as service:
        with started(_command(top, service, list(runs.values())), top) as program:
            with ThreadPoolExecutor(len(runs)) as pool:
                list(pool.map(_perform, runs.values()))
            assert program.end() == 0
        return Results(runs, Counter(stored.sha256 for stored in service.stored), program.said())


def _prepare(top: Path, volumes: dict[str, Volume], kind: str, variant: str) -> Run:
    volume = volumes[kind]
    other = volumes["ext4" if kind != "ext4" else "tmpfs"]
    inbox = volume.mounted / variant / "inbox"
    done = (other if variant == "across" else volume).mounted / f"done-{kind}-{variant}"
    for folder in (inbox, done):
        folder.mkdir(parents=True)
    behind = volume.behind / variant / "inbox" if variant == "behind" and volume.behind is not None else inbox
    return Run(f"{kind}-{variant}", inbox, done, behind)


def _command(top: Path, service: StandIn, runs: list[Run]) -> list[str]:
    (top / "key").write_text(KEY)
    (top / "key").chmod(0o600)
    settings = {
        "api": {"base_url": service.base_url, "key_file": str(top / "key")},
        "inboxes": [
            {
                "path": str(run.inbox),
                "name": run.name,
                "done": str(run.done),
                "failed": str(run.done) + "-failed",
            }
            | {"settle": "1s", "settle_unproven": f"{UNPROVEN_S}s"}
            for run in runs
        ],
        "state_dir": str(top / "state"),
        "poll_interval": f"{POLL_S}s",
        "uploads": {"concurrency": 2 * len(runs)},
        "log": {"level": "debug"},
    }
    (top / "sfwatch.yaml").write_text(json.dumps(settings))
    return [str(Path(sys.executable).with_name("sfwatch")), "run", "-c", str(top / "sfwatch.yaml")]


def _perform(run: Run) -> None:
    run.drop_all()
    end = time.monotonic() + PATIENCE_S
    while run.left() and time.monotonic() < end:
        time.sleep(0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_how_an_inbox_is_watched_is_said(results: Results, kind: str) -> None:
    """By inotify and at long intervals where every writer goes through this kernel, else by looking often."""
    it = KINDS[kind]
    for variant in ("same", "across"):
        (said,) = (
            e for e in results.events if (e["event"], e.get("inbox")) == ("inbox.watched", f"{kind}-{variant}")
        )
        assert said["fs_type"] in it.fs_types
        assert (said["mode"], said["trusted"]) == (("inotify", True) if it.local else ("polling", False))
        assert said["interval_s"] == (30.0 if it.local else POLL_S)


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_file_goes_through(results: Results, kind: str, variant: str) -> None:
    """Whole and once, under its own name, or a shorter one if its sidecar's has no room; the id beside it."""
    run = results.runs[kind, variant]
    assert run.left() == []
    for raw, data in run.dropped.items():
        digest = hashlib.sha256(data).hexdigest()
        assert results.uploads[digest] == 1, raw
        found = [path for path in run.done.glob("*") if path.read_bytes() == data]
        assert [os.fsencode(path.name) for path in found] == [raw] or len(raw) == 255
        sidecar = json.loads(found[0].with_name(f"{found[0].name}.fileid.json").read_bytes())
        assert sidecar["sfwatch"]["sha256"] == digest
    assert len(list(run.done.iterdir())) == 2 * len(run.dropped)
    ended = [e for e in results.events if e["event"] == "file.done" and e["inbox"] == run.name]
    assert len(ended) == len(run.dropped)


def test_nothing_is_settled_without_proof_where_there_is_none(results: Results) -> None:
    """On a filesystem that others can write behind only rest counts; on a local one the kernel's word does."""
    by = Counter(
        (KINDS[e["inbox"].split("-")[0]].local, e["settled_by"])
        for e in results.events
        if e["event"] == "file.settled"
    )
    assert set(by) == {(True, "renamed"), (True, "lease"), (False, "quiet")}


def test_killed_in_mid_upload_on_all_of_them(volumes: dict[str, Volume], tmp_path: Path) -> None:
    """All was stored and nobody told: each claim is found again, its upload adopted, nothing sent twice."""
    runs = [_prepare(tmp_path, volumes, kind, "killed") for kind in KINDS]
    with StandIn(key=KEY) as service:
        service.always = storing_then_stalling()
        command = _command(tmp_path, service, runs)
        with started(command, _folder(tmp_path / "first")) as program:
            for run in runs:
                (run.inbox / f"{run.name}.jsonl").write_bytes(batch(2, word=run.name))
            program.until(lambda: len(service.stored) == len(runs))
            program.end(signal.SIGKILL)
        service.always = Behaviour()
        with started(command, _folder(tmp_path / "second")) as program:
            program.until(lambda: len(program.said("file.done")) == len(runs))
            assert program.end() == 0
        assert len(program.said("upload.recovered")) == len(service.stored) == len(runs)
    for run in runs:
        assert run.left() == []
        assert (run.done / f"{run.name}.jsonl").read_bytes() == batch(2, word=run.name)


def test_a_filesystem_whose_process_dies_is_lost_and_found(tmp_path: Path) -> None:
    """ENOTCONN at every call until it is mounted again: that is said once, and files go through as before."""
    need("bindfs")
    (tmp_path / "behind" / "inbox").mkdir(parents=True)
    (tmp_path / "done").mkdir()
    run = Run("mortal", tmp_path / "mounted" / "inbox", tmp_path / "done", tmp_path / "behind" / "inbox")
    with StandIn(key=KEY) as service, contextlib.ExitStack() as stack:
        first = stack.enter_context(served_bindfs(tmp_path))
        with started(_command(tmp_path, service, [run]), _folder(tmp_path / "said")) as program:
            first.kill()
            program.until(lambda: program.said("inbox.lost"))
            (run.writes_to / "x.jsonl").write_bytes(batch())
            subprocess.run(["umount", "-l", tmp_path / "mounted"], check=True)
            stack.enter_context(served_bindfs(tmp_path))
            program.until(lambda: program.said("file.done"))
            assert program.end() == 0
    lost = program.said("inbox.lost")
    # Unmounted, its folder is missing: another reason is another event.
    assert [e["reason"] for e in lost] in (["io_error"], ["io_error", "missing"])
    assert len(program.said("inbox.found")) == len(service.stored) == 1


@contextlib.contextmanager
def served_bindfs(folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A bindfs that can be killed; it shows `folder`/behind."""
    mounted = folder / "mounted"
    mounted.mkdir(exist_ok=True)
    with subprocess.Popen(["bindfs", "-f", folder / "behind", mounted]) as process:
        try:
            wait_for(lambda: os.path.ismount(mounted))
            yield process
        finally:
            process.kill()
            subprocess.run(["umount", "-l", mounted], check=False, capture_output=True)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path

"""A small world to deliver in: real folders, a real service on loopback, and a clock that is turned by hand.

Nothing in it stands in for a module of ours. What happens "meanwhile" is done at an exact moment instead of
after a sleep: `when[event]` runs as soon as that event is said, `when_stored` while the service stores a file
(the whole body is there, its answer is not yet on the way).
"""

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sfwatch import claim, files, logs
from sfwatch.deliver import deliver
from sfwatch.delivery import recovery
from sfwatch.job import Job, Outcome, Task, Tools
from sfwatch.journal import Delivery, Journal, SqliteJournal, State
from sfwatch.service.listing import Found
from sfwatch.settings import Api, Config, Inbox, Uploads
from sfwatch.settle import Settled
from sfwatch.standin import StandIn
from sfwatch.upload import Client
from sfwatch.verdict import remote_name, tag_of

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount or to be somebody else")

KEY = "sk-worldworldworldworldworldworld"
"""What no log line, sidecar, report or exception may ever hold."""

TARGET = "stand-in (environment SILICONFLOW_API_KEY)"
STAMP = "20260101T000000Z"


def batch(lines: int = 3, *, word: str = "hello") -> bytes:
    """A batch input of which a check says nothing, not even a warning."""
    body = {"model": "m", "messages": [{"role": "user", "content": word}]}
    requests = ({"custom_id": f"request-{number}", "body": body} for number in range(lines))
    return b"".join(json.dumps(request).encode() + b"\n" for request in requests)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A filesystem of its own, as small as is wanted, mounted at *path* for the block."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(folder: Path) -> Path:
    """Fill the filesystem that *folder* is on to its last byte; remove the file returned to make room."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def wait_for(holds: Callable[[], object], *, within_s: float = 20.0) -> None:
    """Wait for another thread or process; only a bug makes it fail."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)


@dataclass
class World:
    """One inbox, one target, one journal, one service. Everything may be changed between two deliveries."""

    root: Path
    inbox: Inbox
    service: StandIn
    journal: Journal
    client: Client
    now: float
    uploads: Uploads = field(default_factory=Uploads)
    environ: dict[str, str] = field(default_factory=lambda: {"SILICONFLOW_API_KEY": KEY})
    target: str = TARGET
    stopping: bool = False
    lines: list[str] = field(default_factory=list)
    when: dict[str, Callable[[], object]] = field(default_factory=dict)
    when_stored: Callable[[], object] | None = None
    claims_names: dict[Path, str] = field(default_factory=dict)

    # What lies where.

    @property
    def state_dir(self) -> Path:
        return self.root / "state"

    @property
    def claims_name(self) -> str:
        """Our claims folder: made when it is first asked for, and known from then on."""
        path = self.inbox.path
        if path not in self.claims_names:
            own = claim.Owner(self.journal.machine, str(self.state_dir), self.journal.id)
            self.claims_names[path] = claim.own_folder(path, self.journal.instance, own)
        return self.claims_names[path]

    @property
    def claims(self) -> Path:
        return claim.claims_folder(self.inbox.path, self.claims_name)

    def drop(self, name: str, data: bytes | None = None, *, into: Path | None = None) -> Path:
        """Put a file into the inbox, whole, as a producer does that renames."""
        path = (into or self.inbox.path) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(batch() if data is None else data)
        return path

    def names(self, folder: Path) -> list[str]:
        """The relative paths of all that is no folder, without our own folder of claims."""
        found = (
            path.relative_to(folder) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
        )
        return sorted(str(path) for path in found if path.parts[0] != claim.FOLDER)

    def claimed(self) -> list[str]:
        """The names of the files that we hold."""
        return claim.folders(self.inbox.path)[self.claims_name]

    def places(self, name: str) -> list[str]:
        """Every folder that holds a file of this name: there should be one, always."""
        held = {"inbox": self.inbox.path, "claims": self.claims, "done": self.inbox.done}
        held["failed"] = self.inbox.failed
        return [place for place, folder in held.items() if os.path.lexists(folder / name)]

    def sidecar(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.inbox.done / f"{name}.fileid.json").read_bytes())
        return content

    def report(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.inbox.failed / f"{name}.error.json").read_bytes())
        return content

    def known(self, name: str) -> Delivery:
        """What the journal knows of a file that is not finished."""
        found = self.journal.find(str(self.inbox.path), name)
        assert found is not None, f"the journal knows nothing of {name!r}"
        return found

    # What was said.

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """All events so far, or those of this name."""
        said = [json.loads(line) for line in self.lines]
        return [event for event in said if name in (None, event["event"])]

    def event(self, name: str) -> dict[str, Any]:
        """The one event of this name."""
        (only,) = self.events(name)
        return only

    def said(self) -> list[str]:
        """The names of all events so far."""
        return [event["event"] for event in self.events()]

    def _write(self, line: str) -> None:
        self.lines.append(line)
        self.when.pop(json.loads(line)["event"], _nothing)()

    # Delivering.

    def tools(self, **changes: Any) -> Tools:
        tools = Tools(
            target=self.target,
            client=self.client,
            journal=self.journal,
            uploads=self.uploads,
            state_dir=str(self.state_dir),
            log=logs.event_log(self._write, level="debug"),
            environ=self.environ,
            clock=lambda: self.now,
            wall=lambda: self.now,
            stop=lambda: self.stopping,
            sleep=lambda _: None,
        )
        return replace(tools, **changes)

    def settled(self, name: str) -> Settled | None:
        """What settling found, if the file lies in the inbox; None for one that is claimed."""
        path = self.inbox.path / name
        if not os.path.lexists(path):
            return None
        return Settled("lease", 0.0, files.Fingerprint.of(path.lstat()))

    def job(self, name: str, **changes: Any) -> Job:
        """The job that the main thread would give for a file as it lies there now."""
        job = Job(
            Task.DELIVER,
            self.inbox,
            name,
            seen_at=self.now,
            claims=self.claims_name,
            settled=self.settled(name),
        )
        return replace(job, **changes)

    def deliver(self, job: Job | str, **changes: Any) -> Outcome:
        """One step for one file; *changes* are the job's, but for those that are the tools'."""
        tools = self.tools(**{name: changes.pop(name) for name in ("gate", "accepted") if name in changes})
        job = self.job(job, **changes) if isinstance(job, str) else replace(job, **changes)
        return deliver(
            job, replace(tools, log=tools.log.bind(inbox=job.inbox.name, file=job.name, target=TARGET))
        )

    def look(self, name: str, *, ripe: bool = False) -> Outcome | recovery.Wait:
        """Look up a file, and do what follows from it, as the main thread would. `ripe`: an absence counts."""
        known = self.known(name)
        tag = known.tag or ""
        reading = recovery.look_up(self.inbox, self.tools(), {tag: known}, 0.0).readings[tag]
        step = recovery.next_step(reading, known, self.uploads, ripe=ripe, until=self.now + recovery.PROOF_S)
        if isinstance(step, recovery.Wait):
            return step
        found, resend = (step, None) if isinstance(step, Found) else (None, step)
        return self.deliver(name, settled=None, known=known, found=found, resend=resend)

    def row(self, name: str, state: State, **facts: Any) -> Delivery:
        """Write down what is known of a file, as an earlier process would have done."""
        path = next(p for p in (self.claims / name, self.inbox.path / name, self.root / name) if p.exists())
        st = path.lstat()
        known = Delivery(
            inbox=str(self.inbox.path),
            name=name,
            state=state,
            dev=st.st_dev,
            ino=st.st_ino,
            size=st.st_size,
            mtime_ns=st.st_mtime_ns,
            sha256=sha256(path.read_bytes()),
            lines=path.read_bytes().count(b"\n"),
            target=self.target,
            claims=self.claims_name,
            attempts=1,
            unproved=1 if state in (State.SENDING, State.UNKNOWN) else 0,
        )
        tag = tag_of(known.claims or "", name, known.mtime_ns, known.sha256 or "")
        known = replace(known, tag=tag, remote_name=remote_name(name, tag=tag))
        if state is State.UNKNOWN:
            known = self.journal.save(replace(known, state=State.SENDING))
        return self.journal.save(replace(known, state=state, **facts))

    def claim(self, name: str) -> None:
        """Claim a file, as an earlier process would have done."""
        claim.take(self.inbox.path, self.claims_name, name)

    def reopen(self) -> None:
        """Close the journal and open it again, as a restart does."""
        self.journal.close()
        self.journal = SqliteJournal(self.state_dir, stamp=STAMP)

    def set_inbox(self, **changes: Any) -> None:
        self.inbox = replace(self.inbox, **changes)

    def set_uploads(self, **changes: Any) -> None:
        self.uploads = replace(self.uploads, **changes)

    def config(self, **changes: Any) -> Config:
        """The settings that a daemon of this world has."""
        return replace(Config(inboxes=(self.inbox,), uploads=self.uploads, state_dir=self.state_dir), **changes)

    def _service_clock(self) -> float:
        happens, self.when_stored = self.when_stored, None
        if happens is not None:
            happens()
        return self.now


def _nothing() -> None:
    pass


@contextmanager
def a_world(root: Path, **api: Any) -> Iterator[World]:
    """A world below *root*; *api* are the settings of its target beyond the address.

    At its end the key must stand nowhere: in no line of the log and in no file that was written.
    """
    for folder in ("inbox", "done", "failed"):
        (root / folder).mkdir(exist_ok=True)
    with ExitStack() as stack:
        service = stack.enter_context(StandIn(key=KEY))
        settings = Api(base_url=service.base_url, allow_plain_http=True, **{"read_timeout_s": 20.0} | api)
        inbox = Inbox(
            path=root / "inbox", name="inbox", done=root / "done", failed=root / "failed", api=settings
        )
        client = Client(settings, connections=4, user_agent="sfwatch/test")
        stack.callback(client.close)
        journal = SqliteJournal(root / "state", stamp=STAMP)
        world = World(root, inbox, service, journal, client, now=float(int(time.time())))
        service.clock = world._service_clock
        try:
            yield world
        finally:
            world.journal.close()
        assert KEY not in "\n".join(world.lines)
        assert not [path for path in root.rglob("*") if _holds_the_key(path)]


def _holds_the_key(path: Path) -> bool:
    return path.is_file() and path.stat().st_size < 2**26 and KEY.encode() in path.read_bytes()


def in_threads(*works: Callable[[], object]) -> None:
    """Run each in a thread of its own, all at the same moment, and wait for them."""
    together = threading.Barrier(len(works))

    def run(work: Callable[[], object]) -> None:
        together.wait()
        work()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

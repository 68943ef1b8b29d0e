"""The whole loop without threads: real folders, journal and service on loopback, and a clock moved by hand.

Workers run at once where they are handed out, or when a test lets them (`pool.held`). The doorbell is mute: a
test rings by hand. Whatever a test does, `Loop.close` checks afterwards that every file is in exactly one
place, was uploaded at most once, and has exactly one terminal event, and that the loop sleeps when it has
nothing to do.
"""

import hashlib
import json
import os
import queue
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from sfwatch import app, arrive, claim
from sfwatch.core import Mailbox, Signalled
from sfwatch.daemon import Daemon
from sfwatch.journal import Delivery, SqliteJournal
from sfwatch.logs import ALWAYS, EVENTS, TERMINAL, EventLog, event_log
from sfwatch.reload import Fresh, Rejected
from sfwatch.settings import Api, Config, Inbox, Uploads
from sfwatch.standin import StandIn
from sfwatch.table import Entry
from sfwatch.upstream import Plan
from sfwatch.work import read_requests

KEY = "sk-very-secret-0123456789"
TURNS = 20_000
"""More turns than any test needs at one instant: a loop that still wants another one spins."""


class Pool(Executor):
    """Does the work at once in the calling thread, or holds it back until it is released.

    What people have asked for is read at once in either case: that is no work on a file.
    """

    def __init__(self) -> None:
        self.holds = False
        self.held: deque[Callable[[], Any]] = deque()
        self.most = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.holds and fn is not read_requests:
            self.held.append(lambda: fn(*args, **kwargs))
            self.most = max(self.most, len(self.held))
        else:
            fn(*args, **kwargs)
        return Future()

    def release(self, n: int = 1) -> None:
        """Do the *n* jobs that were handed out first."""
        for _ in range(n):
            self.held.popleft()()


class Mute(arrive.Doorbell):
    """A doorbell that is armed and never rings of itself."""

    def watch(self, name: str, path: Path, *, recursive: bool) -> str | None:
        return None


def line(number: int, *, text: str = "hi") -> str:
    """One request of a batch input."""
    body = {"messages": [{"role": "user", "content": text}]}
    return json.dumps({"custom_id": f"request-{number}", "body": body}) + "\n"


@dataclass
class Loop:
    """A daemon on folders below *root*, and everything it works with."""

    root: Path
    service: StandIn
    names: tuple[str, ...] = ("a",)
    uploads: Uploads = field(default_factory=Uploads)
    api: Api | None = None
    environ: dict[str, str] = field(default_factory=lambda: {"SILICONFLOW_API_KEY": KEY})
    inbox: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    now: float = 1000.0
    luck: float = 0.5
    lines: list[dict[str, Any]] = field(default_factory=list)
    drops: Counter[tuple[str, str]] = field(default_factory=Counter)
    dropped: dict[str, tuple[str, str]] = field(default_factory=dict)
    pool: Pool = field(default_factory=Pool)
    aborted: bool = False
    twice: int = 0
    """Uploads beyond the first of the same bytes that a test expects."""

    done_elsewhere: dict[str, Path] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    hooks: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.started = time.time() - self.now
        self.service.clock = self.wall
        self._daemon: Daemon | None = None
        for name in self.names:
            (self.root / name).mkdir(exist_ok=True)

    # The daemon.

    @property
    def daemon(self) -> Daemon:
        assert self._daemon is not None
        return self._daemon

    def wall(self) -> float:
        return self.started + self.now

    def settings(self) -> Config:
        api = self.api or Api(base_url=self.service.base_url)
        inboxes = [
            Inbox(
                path=self.root / name / "inbox",
                name=name,
                done=self.root / name / "done",
                failed=self.root / name / "failed",
                api=api,
            )
            for name in self.names
        ]
        return Config(
            inboxes=tuple(replace(inbox, **self.inbox) for inbox in inboxes),
            uploads=self.uploads,
            **{"state_dir": self.root / "state", **self.config},
        )

    def log(self) -> EventLog:
        return event_log(self._said, level="debug")

    def _said(self, text: str) -> None:
        assert KEY not in text
        said = json.loads(text)
        assert said.keys() <= {*EVENTS[said["event"]].keys, *ALWAYS, "file_b64"}, said
        self.lines.append(said)
        self.hooks.get(said["event"], lambda: None)()

    def on_say(self, event: str, do: Callable[[], Any]) -> None:
        """Do something at the moment at which an event is said, in the midst of the work."""
        self.hooks[event] = do

    def start(self) -> "Loop":
        """Start a daemon, as a process would."""
        config, log = self.settings(), self.log()
        self.aborted = False
        self.pool.held.clear()
        journal = SqliteJournal(config.state_dir, stamp="20261122T200112Z")
        mailbox: Mailbox = queue.SimpleQueue()
        app._say_first(config, journal, log, self.environ)
        self._daemon = Daemon(
            config=config,
            plans=self.plans(config, journal),
            journal=journal,
            doorbell=Mute(mailbox.put),
            mailbox=mailbox,
            pool=self.pool,
            log=log,
            environ=self.environ,
            clock=lambda: self.now,
            wall=self.wall,
            luck=lambda: self.luck,
            abort=self.abort,
            reread=self.reread,
        )
        self.daemon.start()
        self.settle_down()
        return self

    def plans(self, config: Config, journal: SqliteJournal) -> tuple[Plan, ...]:
        plans = app._plans(config, journal, self.log(), self.environ, threading.Event())
        clocks: dict[str, Any] = {
            "clock": lambda: self.now,
            "wall": self.wall,
            "sleep": lambda _: None,
            "stop": lambda: self.aborted,
        }
        return tuple(replace(plan, tools=replace(plan.tools, **clocks)) for plan in plans)

    def reread(self) -> Fresh | Rejected:
        if self.problems:
            return Rejected(self.problems)
        config = self.settings()
        return Fresh(config, self.plans(config, self.daemon.journal), self.pool)

    def abort(self) -> None:
        self.aborted = True

    def die(self) -> None:
        """End the process without a word: what it held in memory is gone."""
        for watched in self.daemon.inboxes.watched.values():
            for lock in watched.locks.values():
                os.close(lock)
        for service in self.daemon.services.values():
            service.tools.client.close()
        self.daemon.journal.close()
        self._daemon = None

    def restart(self) -> "Loop":
        self.die()
        return self.start()

    # Time.

    def settle_down(self) -> None:
        """Do all that can be done at this instant. Fails if the loop would spin without doing anything."""
        for _ in range(TURNS):
            self.daemon._receive(0)
            self.daemon.tick(self.now)
            if self.daemon.mailbox.empty() and self.daemon._timeout() > 0:
                return
        raise AssertionError("the loop spins: it has nothing to do and wants another turn at once")

    def run(self, seconds: float) -> "Loop":
        """Let time go by, waking only when the loop asks for it."""
        end = self.now + seconds
        self.settle_down()
        while (timeout := self.daemon._timeout()) and self.now + timeout <= end:
            self.now += timeout
            self.settle_down()
        self.now = end
        self.settle_down()
        return self

    def look(self) -> "Loop":
        """Look at all inboxes now, as SIGUSR1 asks for."""
        return self.signal(signal.SIGUSR1)

    def signal(self, number: int) -> "Loop":
        self.daemon.mailbox.put(Signalled(number))
        self.settle_down()
        return self

    def ring(self, inbox: str, name: str, *, moved_in: bool = False) -> "Loop":
        self.daemon.mailbox.put(arrive.Rang(inbox, name, moved_in))
        self.settle_down()
        return self

    # Files.

    def drop(self, inbox: str, name: str, content: str | None = None, *, lines: int = 1) -> Path:
        """Put a file into an inbox; every one has bytes of its own."""
        path = self.inbox_of(inbox) / name
        number = sum(self.drops.values())
        text = "".join(line(i, text=f"{number}") for i in range(lines)) if content is None else content
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        self.drops[inbox, name] += 1
        self.dropped[digest(path)] = (inbox, name)
        return path

    def withdraw(self, inbox: str, name: str) -> None:
        """Take a file out of its inbox again: it need not be found anywhere later."""
        path = self.inbox_of(inbox) / name
        del self.dropped[digest(path)]
        path.unlink()

    def inbox_of(self, name: str) -> Path:
        return self.root / name / "inbox"

    def claims(self, name: str) -> list[str]:
        path = self.inbox_of(name)
        if not path.is_dir():
            return []
        return sorted(each for names in claim.folders(path).values() for each in names)

    def claims_folder(self, name: str) -> str:
        """The name of our claims folder in this inbox."""
        folder = self.daemon.inboxes.watched[name].claims_folder
        assert folder is not None
        return folder

    def claim(self, inbox: str, name: str) -> None:
        """Claim a file, as a process does that is killed right after that."""
        journal, path = self.daemon.journal, self.inbox_of(inbox)
        owner = claim.Owner(journal.machine, str(self.daemon.config.state_dir), journal.id)
        claim.take(path, claim.own_folder(path, journal.instance, owner), name)

    def waiting_in(self, name: str) -> list[str]:
        return sorted(p.name for p in self.inbox_of(name).iterdir() if p.name != ".sfwatch")

    def done(self, name: str) -> list[str]:
        return sorted(p.name for p in (self.root / name / "done").iterdir() if p.suffix == ".jsonl")

    def failed(self, name: str) -> list[str]:
        return sorted(p.name for p in (self.root / name / "failed").iterdir() if p.suffix == ".jsonl")

    def report(self, inbox: str, name: str) -> dict[str, Any]:
        text = (self.root / inbox / "failed" / f"{name}.error.json").read_text()
        return cast("dict[str, Any]", json.loads(text))

    def row(self, inbox: str, name: str) -> Delivery | None:
        return self.daemon.journal.find(str(self.inbox_of(inbox)), name)

    def entry(self, inbox: str, name: str) -> Entry:
        entry = self.daemon.table.get((inbox, name))
        assert entry is not None
        return entry

    # What was said and sent.

    def said(self, event: str, **keys: Any) -> list[dict[str, Any]]:
        assert event in EVENTS
        return [e for e in self.lines if e["event"] == event and e.items() >= keys.items()]

    def posts(self) -> int:
        return sum(seen.method == "POST" for seen in self.service.requests)

    def listings(self) -> int:
        return sum(seen.method == "GET" for seen in self.service.requests)

    # The promises.

    def close(self) -> None:
        """Check the promises over all that has happened, and end."""
        try:
            if self._daemon is not None:
                self.settle_down()
                self.check()
        finally:
            if self._daemon is not None:
                self.die()

    def check(self) -> None:
        self._check_places()
        self._check_events()

    def _check_places(self) -> None:
        places = Counter(digest(path) for path in self._files())
        for sha256, key in self.dropped.items():
            assert places[sha256] == 1, f"{key} lies in {places[sha256]} places"
        sent = Counter(stored.sha256 for stored in self.service.stored)
        assert sum(n - 1 for n in sent.values()) == self.twice, "uploads of the same bytes"
        for path in self.root.glob("*/done/**/*.jsonl"):
            sidecar = json.loads(path.with_name(f"{path.name}.fileid.json").read_text())
            ids = [s.id for s in self.service.stored if s.sha256 == digest(path)]
            assert sidecar["id"] in ids, f"{path.name} has another file's id"
            assert sidecar["sfwatch"]["sha256"] == digest(path)
        for path in self.root.glob("*/failed/**/*.jsonl"):
            assert json.loads(path.with_name(f"{path.name}.error.json").read_text())["sha256"] == digest(path)

    def _check_events(self) -> None:
        said = [e for e in self.lines if e["event"] in TERMINAL]
        surely = Counter((e["inbox"], e["file"]) for e in said if not e.get("repeated"))
        perhaps = Counter((e["inbox"], e["file"]) for e in said)
        here = Counter((p.relative_to(self.root).parts[0], p.name) for p in self._files(ended=False))
        for key in self.drops.keys() | perhaps.keys():
            ended = self.drops[key] - here[key]
            assert surely[key] <= ended <= perhaps[key], f"{key}: {ended} ended, {perhaps[key]} terminal events"

    def _files(self, *, ended: bool = True) -> Iterator[Path]:
        wanted = ("inbox", "done", "failed") if ended else ("inbox",)
        for name in self.names:
            for folder in wanted:
                there = self.root / name / folder
                if folder == "done":
                    there = self.done_elsewhere.get(name, there)
                for path in there.rglob("*"):
                    regular = path.is_file() and not path.is_symlink()
                    if regular and not path.name.endswith((".json", "ballast")):
                        yield path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

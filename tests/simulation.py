"""A simulated world: the whole daemon, on a clock, a service and a doorbell that are moved by hand.

Real are the daemon with all its parts, the journal's database and all folders (on a tmpfs where there is one,
for speed). Played are only things outside: time, luck, the service, its users, the end of the process, and a
disk that does not take the journal. Workers do their jobs between two turns of the loop, in any order that is
wanted, and a job may take its time, lose its answer, or be the last thing that the process does.

The world keeps books: which bytes users have dropped and not taken away again, and what the service has
stored. `World.check` compares them with what lies in the folders; it holds between any two steps.
"""

import contextlib
import errno
import gc
import hashlib
import json
import os
import queue
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from types import FrameType
from typing import Any

from loop import Mute, Pool

import sfwatch
from sfwatch import app, arrive
from sfwatch.core import Mailbox, Signalled
from sfwatch.daemon import Daemon
from sfwatch.delivery.states import FileState, may_follow
from sfwatch.journal import Delivery, SqliteJournal, State
from sfwatch.logs import event_log
from sfwatch.reload import Fresh
from sfwatch.settings import Api, Config, Inbox, RemoteName, Uploads
from sfwatch.standin import Reply, Stored, reply
from sfwatch.table import Stage
from sfwatch.upstream import Plan
from sfwatch.verdict import Answer, Attempt, Trouble

KEY = "sk-simulated-0123456789"
BEGIN = 2_000_000_000.0
"""The wall clock at the begin, ahead of any real one: then no file's real change time lies in its future."""

HONEST_LAG_S = 20.0
"""A listing that shows a file this late still tells in time for `reconcile_window`."""

HELD_REQUESTS = 5 * (9 + 24)
"""Requests in any hour of a hold: nine growing pauses, then at most 24 of half the longest each, and in each of
them a probe, a trial, and the look-up of a trial whose answer was lost; a look-up reads at least two pages."""

TURNS = 3_000
"""More turns than any moment needs: a loop that wants another one has nothing to do and spins."""

OURS = os.path.dirname(sfwatch.__file__)  # noqa: PTH120 - compared with the names that frames carry


class Crash(BaseException):
    """The process ends here: nothing above is asked, and nothing more is said."""


# ── the service ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Manner:
    """How a request is treated. `answer` None stands for the service's own.

    `arrives` False: the connection ends before the body is out. `stores`: what came whole is kept. `crash`
    ends sfwatch's own process before or after that.
    """

    stores: bool = True
    answer: Reply | None = None
    trouble: Trouble | None = None
    arrives: bool = True
    takes_s: float = 0.1
    crash: str | None = None


def troubled(trouble: Trouble, *, stores: bool = False, arrives: bool = True, takes_s: float = 0.1) -> Manner:
    return Manner(stores=stores, trouble=trouble, arrives=arrives, takes_s=takes_s)


def answering(
    status: int, body: Any = None, *, stores: bool = False, headers: Mapping[str, str] | None = None
) -> Manner:
    return Manner(stores=stores, answer=reply(status, body, headers))


HONEST = Manner()

NOT_STORED: Mapping[str, Manner] = {
    "401": answering(401, "Api key is invalid"),
    "402": answering(402, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    "403": answering(403, "Forbidden"),
    "403 balance": answering(403, {"code": 30001, "message": "Sorry, your account balance is insufficient"}),
    "403 rate limit": answering(403, "RPM limit exceeded. Please complete identity verification."),
    "404": answering(404, "404 page not found"),
    "302": answering(302, b"", headers={"Location": "https://elsewhere.example/v1/files"}),
    "400 of billing": answering(400, {"code": 20012, "message": "billing hard limit has been reached"}),
    "400 of the account": answering(
        400, {"code": 71234, "message": "this account may not upload", "data": None}
    ),
    "413 of a proxy": answering(413, b"<html><title>413 Request Entity Too Large</title></html>"),
    "429": answering(429, {"message": "Request was rejected due to rate limiting.", "data": None}),
    "429 and when": answering(429, {"message": "TPM limit reached."}, headers={"Retry-After": "120"}),
    "500": answering(500, "oops"),
    "502": answering(502, b"<html><title>502 Bad Gateway</title></html>"),
    "503 50505": answering(503, {"code": 50505, "message": "Model service overloaded.", "data": "string"}),
    "503 50508": answering(503, {"code": 50508, "message": "System is too busy now.", "data": None}),
    "503 50603": answering(503, {"code": 50603, "message": "System is too busy now.", "data": None}),
    "504": answering(504, {"code": 50501, "message": "Model service timeout.", "data": None}),
    "certificate": troubled(Trouble.CERTIFICATE, arrives=False),
    "no name": troubled(Trouble.RESOLVE, arrives=False),
    "no connection": troubled(Trouble.CONNECT, arrives=False, takes_s=10.0),
    "proxy": troubled(Trouble.PROXY, arrives=False),
    "reset before the body": troubled(Trouble.RESET, arrives=False),
    "reset after the body": troubled(Trouble.RESET),
    "silence": troubled(Trouble.STALLED, takes_s=300.0),
}
"""After none of these has the service anything."""

STORED: Mapping[str, Manner] = {
    "stored, reset": troubled(Trouble.RESET, stores=True),
    "stored, silence": troubled(Trouble.STALLED, stores=True, takes_s=300.0),
    "stored, cut": troubled(Trouble.CUT, stores=True),
    "stored, 500": answering(500, "oops", stores=True),
    "stored, 502": answering(502, b"<html><title>502 Bad Gateway</title></html>", stores=True),
    "stored, 504": answering(504, "string", stores=True),
    "stored, unreadable": answering(200, b'{"code": 20000, "data": {"id": "fi', stores=True),
    "stored, no id": answering(200, {"code": 20000, "message": "Ok", "status": True, "data": {}}, stores=True),
}
"""After each of these it has the file, and nobody was told."""

BROKEN_OFF = troubled(Trouble.ABORTED, arrives=False)
REFUSES = answering(400, {"code": 20071, "message": "bad line", "data": None})
"""The one answer that condemns a file."""


@dataclass
class Remote:
    """The service, called instead of `upload.Client`. Its clock may be `skew_s` ahead."""

    clock: Callable[[], float]
    elapse: Callable[[float], None]
    held_since: Callable[[], float | None]
    post: Manner = HONEST
    get: Manner = HONEST
    script: deque[Manner] = field(default_factory=deque)
    usual_lag_s: float = 0.0
    lag_s: float = 0.0
    page: int = 10_000  # entries in one answer
    most: int = 10_000  # a larger limit is refused
    after: str = "honoured"  # honoured, ignored, empty
    has_more: str = "told"  # told, untold, always
    order: str = "newest"  # newest, oldest, odd
    names: str = "kept"  # kept, rewritten, cut, cut in the listing
    shows: bool = True
    skew_s: float = 0.0
    key: str = KEY
    stored: list[Stored] = field(default_factory=list)
    requests: list[tuple[str, float]] = field(default_factory=list)
    in_hold: list[tuple[float, float]] = field(default_factory=list)  # of each request: the hold's begin, now
    refused: Counter[str] = field(default_factory=Counter)
    later: Counter[str] = field(default_factory=Counter)
    others: set[str] = field(default_factory=set)  # uploads of another instance
    meanwhile: Callable[[], object] | None = None
    host: str = "api.siliconflow.example"
    resolved: bool = False

    def heal(self) -> None:
        """Be as the documentation says, from now on."""
        self.post = self.get = HONEST
        self.script.clear()
        self.lag_s, self.page, self.most, self.shows = self.usual_lag_s, 10_000, 10_000, True
        self.after, self.has_more, self.order, self.key = "honoured", "told", "newest", KEY

    def store_for_another(self, name: str, data: bytes) -> None:
        """What another instance of sfwatch uploads to this account."""
        tag = digest(f"{len(self.stored)}".encode())[:12]
        self._store(f"{name.removesuffix('.jsonl')}-{tag}.jsonl", "batch", data, digest(data))
        self.others.add(self.stored[-1].id)

    def send(
        self,
        fd: int,
        size: int,
        *,
        remote_name: str,
        purpose: str,
        key: str,
        approve: Callable[[str], bool],
        **_: Any,
    ) -> Attempt:
        manner = self.script.popleft() if self.script else self.post
        self._begins("POST", manner)
        data = self._read(fd, size) if manner.arrives else b""
        sha256 = digest(data)
        if manner.crash == "before":
            raise Crash
        if manner.arrives and not approve(sha256):
            return self._attempt(BROKEN_OFF, None, len(data), None)
        own = None
        if manner.arrives and self.key != key:
            manner = NOT_STORED["401"]
        elif manner.arrives and manner.stores:
            own = self._store(remote_name, purpose, data, sha256)
        self._count(manner, sha256)
        if manner.crash == "after":
            raise Crash
        self.elapse(manner.takes_s)
        return self._attempt(manner, own, len(data), sha256)

    def list_files(self, *, purpose: str, limit: int, key: str, after: str | None = None) -> Attempt:
        self._begins("GET", self.get)
        self.elapse(self.get.takes_s)
        manner = NOT_STORED["401"] if self.get.arrives and key != self.key else self.get
        if not self.shows and manner.answer is None:
            manner = NOT_STORED["404"]
        if limit > self.most and manner.answer is None and manner.trouble is None:
            manner = answering(400, {"code": 20015, "message": f"limit is at most {self.most}", "data": None})
        return self._attempt(manner, self._listing(limit, after, manner), 0, None)

    def close(self) -> None:
        """Have nothing to close."""

    def _begins(self, method: str, manner: Manner) -> None:
        self.requests.append((method, self.clock()))
        since = self.held_since()
        if since is not None:
            self.in_hold.append((since, self.clock()))
        self.resolved |= manner.trouble is not Trouble.RESOLVE

    def _read(self, fd: int, size: int) -> bytes:
        """Read as the wire does: not all at one moment."""
        begin = os.pread(fd, size // 2, 0)
        happens, self.meanwhile = self.meanwhile, None
        if happens is not None:
            happens()
        return begin + os.pread(fd, size - len(begin), len(begin))

    def _count(self, manner: Manner, sha256: str) -> None:
        if manner is REFUSES:
            self.refused[sha256] += 1
        elif manner is not HONEST:
            self.later[sha256] += 1

    def _store(self, name: str, purpose: str, data: bytes, sha256: str) -> Reply:
        at = self.clock() + self.skew_s
        number, lines = len(self.stored) + 1, data.count(b"\n")
        if self.names != "cut in the listing":
            name = self._named(name)
        stored = Stored(f"file-{number}", name, purpose, len(data), sha256, lines, int(at), self.clock())
        self.stored.append(stored)
        data_ = {"id": stored.id, "object": "file", "bytes": len(data), "createdAt": int(at)}
        data_ |= {"filename": name, "purpose": purpose}
        return reply(200, {"code": 20000, "message": "Ok", "status": True, "data": data_})

    def _listing(self, limit: int, after: str | None, manner: Manner) -> Reply:
        now = self.clock()
        shown = [f for f in self.stored if f.at <= now - self.lag_s]
        if self.order == "newest":
            shown.reverse()
        elif self.order == "odd":
            shown.sort(key=lambda f: digest(f.id.encode()))
        ids = [f.id for f in shown]
        begin = ids.index(after) + 1 if after in ids and self.after != "ignored" else 0
        page = shown[begin : begin + min(limit, self.page)]
        if begin and self.after == "empty":
            page = []
        entries = [
            {
                "id": f.id,
                "bytes": f.bytes,
                "created_at": f.created_at,
                "filename": self._named(f.filename) if self.names == "cut in the listing" else f.filename,
                "purpose": f.purpose,
                "line_count": f.lines,
            }
            for f in page
        ]
        more = {"told": begin + len(page) < len(shown), "untold": None, "always": True}[self.has_more]
        document = {"data": entries, "object": "file"} | ({} if more is None else {"has_more": more})
        return reply(200, {"code": 20000, "status": True, "data": document})

    def _named(self, name: str) -> str:
        if self.names == "rewritten":
            return "".join(c if c.isascii() and c != " " else "_" for c in name)
        return name[:9] if self.names in ("cut", "cut in the listing") else name

    def _attempt(self, manner: Manner, own: Reply | None, sent: int, sha256: str | None) -> Attempt:
        said = manner.answer or own
        answer = None if said is None or manner.trouble is not None else self._answer(said)
        return Attempt(
            sent_all=manner.arrives,
            sent=sent,
            sha256=sha256 if manner.arrives else None,
            answer=answer,
            trouble=manner.trouble,
            detail="",
            duration_s=manner.takes_s,
        )

    def _answer(self, said: Reply) -> Answer:
        headers = dict(said.headers)
        return Answer(
            status=said.status,
            body=said.body,
            retry_after=headers.get("Retry-After"),
            date=formatdate(self.clock() + self.skew_s, usegmt=True),
            location=headers.get("Location"),
        )


# ── what lies around the daemon ────────────────────────────────────────────────────────────────────────────


class Queue(Pool):
    """Jobs wait here until the world lets one be done."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = True


_STATES = {State.REFUSED: "REJECTED"}


class Disk(SqliteJournal):
    """The journal on a disk that may be full."""

    full = False

    def save(self, delivery: Delivery) -> Delivery:
        """Write a row, and see that the table of states knows the change."""
        self._require_room()
        before = self._state_of_row(delivery.row)
        after = FileState[_STATES.get(delivery.state, delivery.state.name)]
        born = delivery.row is None and after is FileState.ORPHAN  # a further upload that a listing showed
        assert born or before is after or may_follow(before, after), (
            f"{before} to {after} is not in the table of states"
        )
        return super().save(delivery)

    def _state_of_row(self, row: int | None) -> FileState:
        found = self._select("SELECT state FROM delivery WHERE id = ?", row) if row is not None else []
        state = State(found[0][0]) if found else None
        return FileState.SETTLING if state is None else FileState[_STATES.get(state, state.name)]

    def forget(self, delivery: Delivery) -> None:
        self._require_room()
        super().forget(delivery)

    def _require_room(self) -> None:
        if Disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def good(number: int, lines: int = 1) -> bytes:
    """A batch input that nothing is wrong with; few sizes, so that names and sizes repeat."""
    body = {"messages": [{"role": "user", "content": f"{number:06}"}]}
    return b"".join(
        json.dumps({"custom_id": f"{number:06}-{i}", "body": body}).encode() + b"\n" for i in range(lines)
    )


def bad(number: int) -> bytes:
    return f"no JSON at all {number}\n".encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Fuse:
    """The process ends when so many lines of sfwatch have been run, from an event on if one is named."""

    lines: int
    event: str | None = None

    def hear(self, event: str) -> None:
        """Begin to count at the event that was waited for."""
        if event == self.event:
            self.event = None

    def trace(self, frame: FrameType, event: str, _arg: Any) -> Any:
        """Count, as Python's trace function. A commit happens or does not: none is cut off within."""
        if (
            not frame.f_code.co_filename.startswith(OURS)
            or frame.f_code.co_filename == sfwatch.journal.__file__
        ):
            return None
        if event == "line" and self.event is None:
            self.lines -= 1
            if self.lines <= 0:
                sys.settrace(None)
                raise Crash
        return self.trace

    @contextlib.contextmanager
    def burning(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(before)


# ── the world ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class World:
    """A daemon and all that is around it. `names` are its inboxes."""

    names: tuple[str, ...] = ("a",)
    uploads: Uploads = field(default_factory=Uploads)
    scan_interval_s: float = 300.0

    def __post_init__(self) -> None:
        memory = Path("/dev/shm")
        self.root = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.now = 1000.0
        self.luck = 0.5
        self.clock_s = 0.0
        self.was_rolled_back = False
        self.remote = Remote(self.true_time, self.elapse, self.held_since)
        self.pool = Queue()
        self.workers_rest = False
        self.environ = {"SILICONFLOW_API_KEY": KEY}
        self.events: list[dict[str, Any]] = []
        self.contents: dict[str, bytes] = {}
        self.is_good: dict[str, bool] = {}
        self.owed: Counter[str] = Counter()  # copies of these bytes that must lie somewhere
        self.removed: Counter[tuple[str, str]] = Counter()
        self.changed: Counter[str] = Counter()  # bytes that were altered while they were sent
        self.writers: list[int] = []
        self.away: dict[Path, Path] = {}
        self.fuse: Fuse | None = None
        self.crashes = 0
        self.drops = 0
        self.configured = self.names
        self.daemon: Daemon | None = None
        Disk.full = False
        for name in self.names:
            (self.root / name).mkdir()
        (self.root / "outside").mkdir()

    def wall(self) -> float:
        """What our own clock says; it may be stepped."""
        return BEGIN + self.now + self.clock_s

    def true_time(self) -> float:
        return BEGIN + self.now

    def elapse(self, seconds: float) -> None:
        self.now += seconds

    def held_since(self) -> float | None:
        """Return since when uploads are held."""
        if self.daemon is None:
            return None
        holds = [service.state.hold for service in self.daemon.services.values()]
        return next((hold.since for hold in holds if hold is not None), None)

    def close(self) -> None:
        """Leave nothing behind."""
        for fd in self.writers:
            os.close(fd)
        self.die()
        Disk.full = False
        shutil.rmtree(self.root)

    # The process.

    def config(self) -> Config:
        folders = {name: self.root / name for name in self.configured}
        return Config(
            inboxes=tuple(
                Inbox(path / "inbox", name, path / "done", path / "failed", api=Api())
                for name, path in folders.items()
            ),
            uploads=self.uploads,
            state_dir=self.root / "state",
            scan_interval_s=self.scan_interval_s,
        )

    def start(self) -> None:
        """Start a daemon, as a process would."""
        config, log = self.config(), event_log(self._said, level="debug")
        full, Disk.full = Disk.full, False
        journal = Disk(config.state_dir, stamp="20330518T033320Z")
        mailbox: Mailbox = queue.SimpleQueue()
        self.daemon = Daemon(
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
            abort=lambda: None,
            reread=self.reread,
        )
        self.remote.resolved = False
        self.daemon.start()
        Disk.full = full
        self.settle_down()

    def plans(self, config: Config, journal: SqliteJournal) -> list[Plan]:
        outside: dict[str, Any] = {
            "client": self.remote,
            "clock": lambda: self.now,
            "wall": self.wall,
            "sleep": self.elapse,
        }
        plans = app._plans(
            config, journal, event_log(self._said, level="debug"), self.environ, threading.Event()
        )
        return [replace(plan, tools=replace(plan.tools, **outside)) for plan in plans]

    def reread(self) -> Fresh:
        assert self.daemon is not None
        config = self.config()
        return Fresh(config, tuple(self.plans(config, self.daemon.journal)), self.pool)

    def reload(self, configured: tuple[str, ...], uploads: Uploads) -> None:
        """Change the configuration, and tell the daemon of it."""
        self.configured, self.uploads = configured, uploads
        assert self.daemon is not None
        self.daemon.mailbox.put(Signalled(signal.SIGHUP))
        self.settle_down()

    def die(self) -> None:
        """End the process without a word: what it held in memory is gone, the kernel closes its files."""
        daemon, self.daemon = self.daemon, None
        self.pool.held.clear()
        if daemon is not None:
            daemon.journal.close()
        self._close_files()

    def _close_files(self) -> None:
        for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - they are numbers
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
                if path.startswith(f"{self.root}/") and int(name) not in self.writers:
                    os.close(int(name))

    def restart(self) -> None:
        self.die()
        self.start()

    def lose_state(self) -> None:
        """The state folder is gone at the next start; with it, which folders were there before."""
        if self.away or self.configured != self.names:
            return
        self.die()
        shutil.rmtree(self.root / "state")
        self.start()

    def back_up_state(self) -> None:
        self.die()
        shutil.rmtree(self.root / "backup", ignore_errors=True)
        shutil.copytree(self.root / "state", self.root / "backup")
        self.start()

    def restore_state(self) -> None:
        """The state folder is as it was some time ago."""
        if (self.root / "backup").is_dir() and not self.away:
            self.die()
            self.was_rolled_back = True
            remote = self.remote
            remote.lag_s = remote.usual_lag_s = 0.0
            remote.page, remote.after, remote.has_more, remote.shows = 10_000, "honoured", "told", True
            shutil.rmtree(self.root / "state")
            shutil.copytree(self.root / "backup", self.root / "state")
            self.start()

    def _said(self, text: str) -> None:
        assert KEY not in text
        said = json.loads(text)
        self.events.append(said)
        if self.fuse is not None:
            self.fuse.hear(said["event"])
        assert said["event"] != "internal.error", said

    def said(self, event: str, **keys: Any) -> list[dict[str, Any]]:
        return [e for e in self.events if e["event"] == event and e.items() >= keys.items()]

    # Time.

    def settle_down(self) -> None:
        """Do all that can be done at this moment."""
        self._alive(self._turn_until_idle)

    def one_job(self, which: int) -> None:
        """Do one of the jobs that were handed out, and nothing else."""
        self._alive(lambda: self.work(which))

    def _alive(self, do: Callable[[], None]) -> None:
        """Do something; if the process ends meanwhile, start another one."""
        try:
            with self.fuse.burning() if self.fuse else contextlib.nullcontext():
                do()
        except Crash as crash:
            crash.__traceback__ = None  # what its frames have open would be closed later, by number
            gc.collect()
            self.fuse = None
            self.crashes += 1
        else:
            return
        self.restart()

    def _turn_until_idle(self) -> None:
        """Turn until the loop wants to sleep, or until the jobs themselves have taken an hour."""
        begin = moment = self.now
        turns = 0
        while self.turn() and self.now < begin + 3600.0:
            turns = turns + 1 if self.now == moment else 0
            moment = self.now
            assert turns < TURNS, "the loop spins: it has nothing to do and wants another turn at once"

    def turn(self) -> bool:
        """Turn the loop once, and do one job; return whether there is more to do now."""
        daemon = self.daemon
        assert daemon is not None
        daemon._receive(0)
        daemon.tick(self.now)
        if self.pool.held and not self.workers_rest:
            self.work()
            return True
        return not daemon.mailbox.empty() or daemon._timeout() <= 0

    def work(self, which: int = 0) -> None:
        """Do one of the jobs that were handed out, whatever comes of it."""
        self.pool.held.rotate(-(which % len(self.pool.held)))
        self.pool.release()

    def run(self, seconds: float) -> None:
        """Let time go by, waking only when the loop asks for it."""
        end = self.now + seconds
        self.settle_down()
        while self.now + (timeout := self._timeout()) <= end:
            self.now += timeout
            self.settle_down()
        self.now = max(self.now, end)
        self.settle_down()

    def _timeout(self) -> float:
        assert self.daemon is not None
        return self.daemon._timeout()

    # Users.

    def folder(self, inbox: str, name: str = "inbox") -> Path:
        return self.root / inbox / name

    def waiting(self) -> list[Path]:
        """The files that lie in the inboxes under their names."""
        found = (path for inbox in self.names for path in self.folder(inbox).glob("*.jsonl"))
        return sorted(path for path in found if path.is_file())

    def drop(
        self, inbox: str, name: str, data: bytes, *, fine: bool, renamed: bool, rings: bool = True
    ) -> None:
        """Put a file into an inbox, over one of its name if there is one."""
        folder = self.folder(inbox)
        if not folder.is_dir():
            return
        self.drops += 1
        path = self.root / "outside" / "fresh" if renamed else folder / name
        self._forget(folder / name)
        path.write_bytes(data)
        self._touch(path)
        if renamed:
            path.rename(folder / name)
        self._owe(data, fine=fine)
        if rings:
            self.ring(inbox, name, moved_in=renamed)

    def fresh(self, *, fine: bool = True, lines: int = 1) -> bytes:
        """Bytes that nobody has dropped yet."""
        number = len(self.is_good)
        return good(number, lines) if fine else bad(number)

    def rewrite(self, path: Path, data: bytes, *, fine: bool) -> None:
        """Write other bytes into a file that waits."""
        self._forget(path)
        path.write_bytes(data)
        self._touch(path)
        self._owe(data, fine=fine)
        self.ring(path.parts[-3], path.name)

    def remove(self, path: Path) -> None:
        self._forget(path)
        path.unlink()
        self.removed[path.parts[-3], path.name] += 1

    def open_to_append(self, path: Path) -> None:
        """Begin to write to a file, and let others wait for the rest."""
        self.writers.append(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC))

    def append(self, fd: int, data: bytes) -> None:
        """Write on, wherever the file lies by now; if it lies nowhere any more, nobody will know."""
        if os.fstat(fd).st_nlink == 0:
            return
        before = self._content(fd)
        os.write(fd, data)
        self._touch(fd)
        self.owed[digest(before)] -= 1
        self.changed[digest(before)] += 1
        lines = (before + data).splitlines()
        distinct = len(set(lines)) == len(lines)  # else an id stands in it twice
        self._owe(before + data, fine=self.is_good[digest(before)] and data.startswith(b"{") and distinct)

    def stop_writing(self) -> None:
        """Close all files that are written to; inotify tells."""
        for fd in self.writers:
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115
            os.close(fd)
            if path.parent.name == "inbox":
                self.ring(path.parts[-3], path.name)
        self.writers.clear()

    def ring(self, inbox: str, name: str, *, moved_in: bool = False) -> None:
        if self.daemon is not None:
            self.daemon.mailbox.put(arrive.Rang(inbox, name, moved_in))

    def take_away(self, path: Path, *, put_a_file: bool) -> None:
        """Move a folder out of the way, as an unmount does; or worse, put a file where it was."""
        if path in self.away or not path.is_dir():
            return
        self.away[path] = path.with_name(f"{path.name} away")
        path.rename(self.away[path])
        if put_a_file:
            path.write_bytes(b"in the way")

    def bring_back(self) -> None:
        for path, aside in self.away.items():
            if path.is_file():
                path.unlink()
            if path.is_dir():
                raise AssertionError(f"{path} was made anew while it was away")
            aside.rename(path)
        self.away.clear()

    def _owe(self, data: bytes, *, fine: bool) -> None:
        self.contents[digest(data)] = data
        self.is_good[digest(data)] = fine
        self.owed[digest(data)] += 1

    def _forget(self, path: Path) -> None:
        if path.exists():
            self.owed[digest(path.read_bytes())] -= 1

    def _touch(self, path: Path | int) -> None:
        """Give the file the world's time; two writes are never of the same one."""
        self.now += 0.001
        os.utime(path, (self.true_time(), self.true_time()))

    def _content(self, fd: int) -> bytes:
        return os.pread(fd, 1 << 20, 0)

    # The promises.

    def check(self) -> None:
        """Check all that holds at any moment."""
        files = list(self._files())
        self._check_places(files)
        self._check_ends(files)
        self._check_uploads(files)
        self._check_events()
        self._check_requests()

    def _files(self) -> Iterator[tuple[Path, str]]:
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.endswith(".jsonl"):
                    path = Path(folder, name)
                    yield path, digest(path.read_bytes())

    def _check_places(self, files: list[tuple[Path, str]]) -> None:
        there = Counter(sha256 for _, sha256 in files)
        owed = +self.owed
        assert there == owed, f"missing: {owed - there}, too many: {there - owed}, of {files}"

    def _check_ends(self, files: list[tuple[Path, str]]) -> None:
        by_id = {stored.id: stored for stored in self.remote.stored}
        ids: Counter[str] = Counter()
        for path, sha256 in files:
            folder = path.parent.name.removesuffix(" away")
            if folder == "done":
                sidecar = json.loads(path.with_name(f"{path.name}.fileid.json").read_text())
                assert sidecar["sfwatch"]["sha256"] == sha256, path
                assert by_id[sidecar["id"]].sha256 == sha256, path
                assert sidecar["id"] not in self.remote.others, (
                    f"{path} has the id of another instance's upload"
                )
                ids[sidecar["id"]] += 1
            elif folder == "failed":
                self._check_failed(path, sha256)
        assert all(n == 1 for n in ids.values()), f"two files of one id: {ids}"

    def _check_failed(self, path: Path, sha256: str) -> None:
        report = json.loads(path.with_name(f"{path.name}.error.json").read_text())
        assert report["sha256"] == sha256, path
        if report["reason"] == "refused":
            assert self.remote.refused[sha256], f"{path} was never refused"
        elif report["reason"] == "keeps_failing":
            assert self.remote.later[sha256] >= self.uploads.poison_after, path
        else:
            assert not self.is_good[sha256], f"{path} is condemned for {report['reason']}, and is good"

    def _check_uploads(self, files: list[tuple[Path, str]]) -> None:
        """One upload for each file that was accepted; more only where one was sent again without a proof."""
        kept = Counter(sha256 for path, sha256 in files if path.parent.name.startswith("done"))
        held = Counter(sha256 for path, sha256 in files if ".sfwatch" in path.parts)
        ours = [stored for stored in self.remote.stored if stored.id not in self.remote.others]
        doubles = 0
        for sha256, stored in Counter(stored.sha256 for stored in ours).items():
            doubles += max(0, stored - kept[sha256] - held[sha256] - self.changed[sha256])
            assert self.is_good.get(sha256, True), f"a file with findings was uploaded: {sha256[:8]}"
        unproved = [e for e in self.said("upload.resent") if e["detail"] != "the service does not list it"]
        assert doubles <= len(unproved), f"{doubles} second uploads, {len(unproved)} that were allowed"

    def _check_events(self) -> None:
        ended = [e for e in self.events if e["event"] in ("file.done", "file.failed")]
        once = Counter(e["path"] for e in ended if not e.get("repeated"))
        assert all(n == 1 for n in once.values()), f"ended twice: {once}"
        gone = Counter((e["inbox"], e["file"]) for e in self.said("file.vanished"))
        # A state folder of some time ago may still wait for a file that has ended since.
        assert gone <= self.removed or self.was_rolled_back, f"vanished: {gone}, removed: {self.removed}"

    def _check_requests(self) -> None:
        """A hold asks seldom; beyond that each file may be cleared up, in the trial's turn."""
        if not self.remote.in_hold:
            return
        since, now = self.remote.in_hold[-1]
        lately = sum(hold == since and at > now - 3600.0 for hold, at in self.remote.in_hold[-1000:])
        assert lately <= HELD_REQUESTS + 20 * self.drops, f"{lately} requests within an hour of a hold"

    # The end.

    def heal(self) -> None:
        """Mend all that is broken."""
        self.remote.heal()
        self.remote.meanwhile = None
        self.environ["SILICONFLOW_API_KEY"] = KEY
        self.stop_writing()
        self.bring_back()
        self.fuse = None
        self.workers_rest = False
        Disk.full = False
        if self.configured != self.names:
            self.reload(self.names, self.uploads)

    def finish(self, *, hours: int = 4) -> None:
        """Heal all, wait until nothing is left to do, and check what must be true then."""
        self.heal()
        for number in range(hours * 6):
            self.run(600.0)
            self.check()
            if not self.unfinished():
                break
            if number % 3 == 1 and self.said(
                "upload.undecided"
            ):  # an acceptance is news: it can be what a listing has to show
                self.drop(self.names[0], f"late {number}.jsonl", self.fresh(), fine=True, renamed=True)
        self.check_rest()

    def unfinished(self) -> list[str]:
        """Where files lie that have not ended."""
        ends = ("done", "failed")
        return sorted(str(p.relative_to(self.root)) for p, _ in self._files() if p.parent.name not in ends)

    def check_rest(self) -> None:
        """Check what must be true when all is well and nothing moves any more."""
        daemon = self.daemon
        assert daemon is not None
        left = [path for path in self.unfinished() if not self._undecidable(path)]
        assert not left, f"{left} never ended"
        assert all(s.state.hold is None for s in daemon.services.values() if not self._idle(s.inboxes))
        said = {e["path"] for e in self.events if e["event"] in ("file.done", "file.failed")}
        for path, _ in self._files():
            assert path.parent.name == "inbox" or ".sfwatch" in path.parts or str(path) in said, path
        self._check_folders()

    def _undecidable(self, path: str) -> bool:
        """Whether no listing can say what became of a file: its upload may have no tag there."""
        untagged = self.uploads.remote_name is RemoteName.ORIGINAL or self.remote.names.startswith("cut")
        return untagged and bool(self.said("upload.undecided", file=Path(path).name))

    def _idle(self, inboxes: Any) -> bool:
        """A hold without a file that could try lasts."""
        assert self.daemon is not None
        entries = (e for inbox in inboxes for e in self.daemon.table.names(inbox).values())
        return all(entry.stage is Stage.PARKED for entry in entries)

    def _check_folders(self) -> None:
        """Neither temporaries, nor sidecars or reports without their files."""
        for folder, _, names in os.walk(self.root):
            for name in names:
                assert not name.endswith(".tmp") or "state" in folder, f"{folder}/{name}"
                for suffix in (".fileid.json", ".error.json"):
                    # A journal of some time ago writes the sidecar again of a file that was done since.
                    if name.endswith(suffix) and not self.was_rolled_back:
                        assert name.removesuffix(suffix) in names, f"{folder}/{name} is alone"

"""What the daemon is doing, as one document: published whole, and read as something that may be old or damaged.

The daemon publishes it when something has changed; while nothing happens it stays as it is. Whether the daemon
runs is therefore not told by the document's age but by its process: the pid, and what tells that process from
a later one of the same number. Every text in it is printable, whatever a name or an answer held.

The classes here are the whole of the form (`SCHEMA`); the README's table is tested against them.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec

from sfwatch import files
from sfwatch.logs import printable
from sfwatch.settings import Config

SCHEMA = 1
NAME = "status.json"
MOST_BYTES = 16 * 1024 * 1024
NAMED = 20
"""Waiting files that are named, for each inbox and reason: the oldest."""

REASONS: Mapping[str, str] = {
    "settling": "it has not rested for long enough yet",
    "being_written": "a process has it open for writing",
    "empty": "it is empty: it is taken once something is in it",
    "incomplete": "its last line is not whole JSON: it is taken if nothing more comes for half a minute",
    "hole": "space was reserved for it that is not filled yet",
    "unreadable": "the daemon may not read it: chmod g+r",
    "no_marker": "its marker is not there yet",
    "namesake": "an earlier file of its name is still under way",
    "cannot_move": "its folder does not let the daemon move it",
    "inbox_away": "the folder that it was claimed in is not there",
    "unsafe": "the folder for files under way is not the daemon's alone",
    "foreign": "another instance of sfwatch has it, or had it",
    "no_room": "there is no room for it where it has to go",
    "queued": "it is whole, and waits for its turn",
    "held": "it is whole, but its target or a folder that it needs takes nothing now",
    "retry": "its last try failed for a reason that may pass",
    "looking_up": "the answer to its upload was lost: it is looked for in the service's listing",
    "unknown_outcome": "it is unknown whether the service has it: it is looked up from time to time",
    "filing": "its answer is there: only its sidecar or report and its move are left",
    "doubted": "the service refused it, which may be the account's fault: it is sent again",
    "not_running": "sfwatch is not running",
}
"""Why a file waits. Those that no event says: `queued held looking_up filing not_running`."""

TROUBLE = frozenset(
    {
        "unreadable",
        "cannot_move",
        "inbox_away",
        "unsafe",
        "foreign",
        "no_room",
        "held",
        "retry",
        "unknown_outcome",
        "doubted",
    }
)
"""Reasons that make the status unhealthy; the others pass, or are the business of whoever drops files."""


Moment = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time that can be compared: one without a zone was not written by a daemon."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an inbox is not there."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Inbox:
    """An inbox and how it is watched; `mode` and what follows are null until it was looked at."""

    name: str
    path: str
    done: str
    failed: str
    mode: str | None = None
    fs_type: str | None = None
    trusted: bool | None = None
    detail: str | None = None
    lost: Lost | None = None
    refused: str | None = None
    waiting: int = 0
    under_way: int = 0
    others: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A host with a key. `reason` and what follows are null unless it is held."""

    name: str
    inboxes: tuple[str, ...] = ()
    under_way: int = 0
    pace: int = 0
    interval_s: float | None = None
    reason: str | None = None
    detail: str | None = None
    since: Moment | None = None
    next_probe_at: Moment | None = None


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that takes no files."""

    path: str
    reason: str
    detail: str
    since: Moment
    next_try_at: Moment


@dataclass(frozen=True, slots=True)
class UnderWay:
    """A file that a worker has. `step`: checking, uploading, looking_up or filing."""

    inbox: str
    file: str
    size: int
    step: str
    since: Moment
    attempt: int = 1
    sent: int = 0
    bytes_per_s: int | None = None


@dataclass(frozen=True, slots=True)
class WaitingFile:
    """A file that waits, by name."""

    file: str
    size: int
    since: Moment
    detail: str | None = None
    attempts: int = 0
    retry_at: Moment | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """The files of one inbox that wait for one reason; the oldest of them by name."""

    inbox: str
    reason: str
    files: int
    oldest: tuple[WaitingFile, ...] = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """A file that came to its end."""

    inbox: str
    file: str
    at: Moment


@dataclass(frozen=True, slots=True)
class Totals:
    """What has become of the files since the start; `reasons` are those of the failed ones."""

    done: int = 0
    failed: int = 0
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Status:
    """The document. `state`: starting, running, stopping, or stopped after an orderly end.

    `process` tells the process from a later one with the same `pid`.
    """

    schema: int
    version: str
    state: str
    pid: int
    process: str
    started_at: Moment
    published_at: Moment
    config: str | None
    state_dir: str
    inboxes: tuple[Inbox, ...] = ()
    targets: tuple[Target, ...] = ()
    folders: tuple[Folder, ...] = ()
    under_way: tuple[UnderWay, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    totals: Totals = field(default_factory=Totals)
    last_done: Ended | None = None
    last_failed: Ended | None = None


@dataclass(frozen=True, slots=True)
class _Head:
    schema: int


class UnusableError(Exception):
    """There is a document, and it says nothing that we understand; the text says why, and what to do."""


def healthy(status: Status) -> bool:
    """Whether nothing is held, lost or failing."""
    held = any(target.reason for target in status.targets) or bool(status.folders)
    hindered = any(inbox.lost or inbox.refused for inbox in status.inboxes)
    return not (held or hindered or any(group.reason in TROUBLE for group in status.waiting))


# ---- where it lies ----


def path(config: Config, environ: Mapping[str, str]) -> Path:
    """Return where a daemon with these settings and this environment publishes it."""
    if config.status_file is not None:
        return config.status_file
    runtime = environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return Path(runtime if runtime.startswith("/") else config.state_dir, NAME)


def places(config: Config, environ: Mapping[str, str]) -> Iterator[Path]:
    """Yield where the document of a daemon with these settings may lie.

    Who asks has not the environment of the unit: systemd's folders are guessed from the state folder, and
    for a user who may not write there, from the usual one.
    """
    yield path(config, environ)
    if config.status_file is None:
        for folder in (config.state_dir, Config(inboxes=()).state_dir):
            if folder.is_relative_to("/var/lib"):
                yield Path("/run", folder.relative_to("/var/lib"), NAME)
            yield folder / NAME


def find(config: Config, environ: Mapping[str, str]) -> Status | None:
    """Return the document of the daemon with these settings: of several that of a running one, else the newest.

    None if there is none that this user may read. Raises UnusableError if there is one that cannot be used.
    """
    found = []
    unusable = None
    for place in dict.fromkeys(places(config, environ)):
        try:
            status = read(place)
        except UnusableError as error:
            unusable = unusable or error
        except OSError:  # not there, or not for this user
            continue
        else:
            if _belongs(status, config):
                found.append(status)
    if not found and unusable is not None:
        raise unusable
    return max(found, key=lambda status: (is_running(status), status.published_at), default=None)


def _belongs(status: Status, config: Config) -> bool:
    """Whether it is of a daemon with these settings; another one may use the same folder under /run."""
    ours = None if config.source is None else os.path.abspath(config.source)  # noqa: PTH100 - links stay
    return status.state_dir == str(config.state_dir) or (ours is not None and status.config == ours)


# ---- writing and reading ----


def write(target: Path, status: Status) -> None:
    """Publish it at this path, for owner and group. Raises OSError."""
    files.put(target, msgspec.json.encode(status), mode=0o640)


def read(source: Path) -> Status:
    """Return the document at this path. Raises OSError and UnusableError."""
    try:
        with files.regular(str(source)) as fd:
            data = _read_all(fd)
    except files.NotRegular as odd:
        raise UnusableError(f"{source} is a {odd.kind}, no status file") from None
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.schema > SCHEMA:
            text = f"{source} is of a newer sfwatch (schema {head.schema}, known here: {SCHEMA}): use that one"
            raise UnusableError(text)
        return msgspec.convert(_harmless(msgspec.json.decode(data)), type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        text = f"{source} is damaged ({error}): the daemon publishes it again when something changes"
        raise UnusableError(text) from None


def _harmless(value: Any) -> Any:
    """The same with printable texts only: somebody else may have written it."""
    match value:
        case str():
            return printable(value)
        case list():
            return [_harmless(item) for item in value]
        case dict():
            return {printable(name): _harmless(item) for name, item in value.items()}
        case _:
            return value


def _read_all(fd: int) -> bytes:
    parts: list[bytes] = []
    while sum(map(len, parts)) < MOST_BYTES and (part := os.read(fd, MOST_BYTES)):
        parts.append(part)
    return b"".join(parts)


def same(one: Status, other: Status | None) -> bool:
    """Whether two documents say the same, but for when."""
    return other is not None and replace(one, published_at=other.published_at) == other


# ---- the process ----


def process_of(pid: int) -> str | None:
    """Return what tells this process from any other that has or had its number; None if there is none.

    When it was started (field 22 of proc_pid_stat(5), after the name, which may hold anything) in which boot.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return f"{boot}/{int(stat.rpartition(b')')[2].split()[19])}"


def is_running(status: Status) -> bool:
    """Whether the daemon that published it is still there.

    Where /proc hides the processes of others (hidepid), that there is one of that number has to do.
    """
    if status.state == "stopped":
        return False
    process = process_of(status.pid)
    return process == status.process if process is not None else _is_hidden(status.pid)


def _is_hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def holder(state_dir: Path) -> int | None:
    """Return the process that works with this state folder by its lock, whether it publishes anything or not.

    From proc_locks(5): to try the lock would keep a daemon from starting at that moment. None also if this
    user may not look into the folder.
    """
    try:
        st = (state_dir / "lock").stat()
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return None
    place = f"{os.major(st.st_dev):02x}:{os.minor(st.st_dev):02x}:{st.st_ino}"
    for line in locks.splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == place:
            return int(fields[4])
    return None

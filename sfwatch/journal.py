"""What must survive the process: attempts, answers, and where their files were going.

The folders say what there is to do, the journal only what is known about it: a lost journal costs certainty,
never a file. One row stands for one file from its first attempt on; `save` makes it what it is told and returns
when that is durable. There is no thread for it: whoever wants something and finds nobody committing commits for
all who want something at that moment, in one transaction with one sync of the disk, and then hands on to one of
those who came meanwhile. So a worker alone waits for nobody but the disk.

What is in a column is not in `facts`, which is JSON. A row is written over only where it changed: each index
that a step need not touch is a page less to write.

*Instance* is the random name of this state folder; claims lie in folders of that name. A journal that had to
be set aside makes the instance a *former* one: of its claims nothing is known, so each may have been uploaded.
"""

import contextlib
import errno
import fcntl
import json
import operator
import os
import re
import secrets
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

from sfwatch import files

SCHEMA = 1
_DATABASE = "journal.sqlite3"


class State(StrEnum):
    """How far a file has come, as far as it must be known after a crash."""

    WAITING = "waiting"  # tried before; the service has nothing of it; it is back in its inbox
    SENDING = "sending"  # an attempt has begun, its outcome is not written yet
    UNKNOWN = "unknown"  # an attempt ended without a clear answer
    ACCEPTED = "accepted"  # sidecar and move are left
    REFUSED = "refused"  # report and move are left
    DONE = "done"
    FAILED = "failed"


OPEN = (State.WAITING, State.SENDING, State.UNKNOWN, State.ACCEPTED, State.REFUSED)


@dataclass(frozen=True, slots=True)
class Delivery:
    """All that is known of one file on its way. Times are seconds since the epoch, `held_s` seconds."""

    inbox: str
    name: str
    state: State
    dev: int
    ino: int
    size: int
    mtime_ns: int
    row: int | None = None
    settled_by: str | None = None
    sha256: str | None = None
    lines: int | None = None
    target: str | None = None
    remote_name: str | None = None
    attempts: int = 0
    first_attempt_at: float | None = None
    held_s: float = 0.0
    windows: tuple[tuple[float, float], ...] = ()
    answer: dict[str, Any] | None = None
    file_id: str | None = None
    report: dict[str, Any] | None = None
    marker: str | None = None
    target_name: str | None = None
    finished_at: float | None = None

    @property
    def resent(self) -> int:
        """How many tries since the first lost one may have been stored too; refused ones leave no window."""
        return max(0, len(self.windows) - 1)


def address(target: str | None) -> str:
    """Return where a target is: its name goes on with where the key comes from."""
    return (target or "").partition(" ")[0]


class JournalError(Exception):
    """The journal cannot be used at all; the text says what to do."""


class StateInUseError(JournalError):
    """Another daemon works with this state folder."""


class JournalDamagedError(JournalError):
    """The journal was sound when it was opened and is not any more: a restart sets it aside."""


class AttemptOpenError(Exception):
    """Another attempt under this remote name at this target is not settled yet."""


class IdKnownError(Exception):
    """The journal knows this file id as another upload's."""


class Journal(Protocol):
    """What the rest of sfwatch asks of a journal; a shared database could stand behind it one day.

    `save` and `forget` raise OSError (ENOSPC, EIO, EROFS, …) when the state folder does not take them.
    To an answer that does not have it yet `save` adds `same_as`: an earlier upload of the same bytes.
    """

    @property
    def instance(self) -> str: ...
    @property
    def former(self) -> Sequence[str]: ...
    def find(self, inbox: str, name: str) -> Delivery | None: ...
    def under_way(self) -> list[Delivery]: ...
    def save(self, delivery: Delivery) -> Delivery: ...
    def forget(self, delivery: Delivery) -> None: ...
    def known(self, target: str, ids: Collection[str]) -> frozenset[str]: ...
    def newest(self, target: str) -> str | None: ...
    def folder_seen(self, path: str) -> bool: ...
    def saw_folder(self, path: str) -> None: ...
    def prune(self, before: float) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class SetAside:
    """A journal that could not be read, and where it lies now."""

    path: str
    reason: str
    detail: str


_CREATE = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE folder (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE delivery (
  id INTEGER PRIMARY KEY,
  inbox BLOB NOT NULL,
  name BLOB NOT NULL,
  state TEXT NOT NULL,
  target TEXT,
  remote_name TEXT,
  sha256 TEXT,
  file_id TEXT,
  finished_at REAL,
  facts TEXT NOT NULL
);
CREATE UNIQUE INDEX open_file ON delivery (inbox, name) WHERE finished_at IS NULL;
CREATE UNIQUE INDEX open_attempt ON delivery (target, remote_name) WHERE state IN ('sending', 'unknown');
CREATE UNIQUE INDEX file_id ON delivery (file_id, target) WHERE file_id IS NOT NULL;
CREATE INDEX same_bytes ON delivery (sha256) WHERE file_id IS NOT NULL;
CREATE INDEX finished ON delivery (finished_at) WHERE finished_at IS NOT NULL;
"""

T = TypeVar("T")
_Name = tuple[str, str]
_Row = tuple[Any, ...]


class SqliteJournal:
    """The journal in one SQLite database (WAL, every commit synced) in *state_dir*.

    Holds a kernel lock on the folder as long as it is open. Raises StateInUseError if another daemon has it,
    OSError or JournalError if the folder cannot be used.
    """

    def __init__(self, state_dir: Path, *, stamp: str) -> None:
        self.set_aside: SetAside | None = None
        self._folder = state_dir
        self._lock = _lock(state_dir)
        with contextlib.ExitStack() as undo:
            undo.callback(files.close, self._lock)
            self._database = self._open(stamp)
            undo.callback(self._database.close)
            try:
                self.instance, self.former = self._identify()
                self._open_names = _open_names(self._database)
            except sqlite3.Error as error:
                raise _storage_error(error, state_dir) from None
            undo.pop_all()
        self._desk = threading.Lock()  # for what stands below; never held while anything is done
        self._closed = False
        self._led = False
        self._wishes: list[_Wish] = []
        # Of each row of the transaction: which file's open row it was before, and which file's it is.
        self._turned: list[tuple[_Name | None, _Name | None]] = []

    def find(self, inbox: str, name: str) -> Delivery | None:
        """Return what is known of the file *name* of the inbox at path *inbox*, unless it is finished."""
        if self._closed:
            raise self._too_late()
        if name not in self._open_names.get(inbox, ()):  # as for nearly every file: it was never tried
            return None
        rows = self._ask(
            f"{_SELECT} WHERE inbox = ? AND name = ? AND finished_at IS NULL",
            (os.fsencode(inbox), os.fsencode(name)),
        )
        return _delivery(rows[0]) if rows else None

    def under_way(self) -> list[Delivery]:
        """Return every file that is not finished, the oldest first."""
        return [_delivery(row) for row in self._ask(_UNDER_WAY, ())]

    def save(self, delivery: Delivery) -> Delivery:
        """Make *delivery* durable and return it with its row, and its answer with `same_as`.

        Raises AttemptOpenError and IdKnownError where another row stands against it, and OSError.
        """
        if delivery.answer is None or "same_as" in delivery.answer:
            return self._write(lambda database: self._put(database, delivery))
        try:
            return self._write(lambda database: self._put(database, _compared(database, delivery)))
        except (OSError, JournalDamagedError):  # nice to know: an answer is not lost for it
            return self.save(_same_as(delivery, None))

    def forget(self, delivery: Delivery) -> None:
        """Remove the row: nothing of this file is to be remembered."""
        self._write(lambda database: self._remove(database, delivery.row))

    def known(self, target: str, ids: Collection[str]) -> frozenset[str]:
        """Return those of *ids* that the journal knows as uploads to *target* or another of its address.

        Another key, or the same from another place, may well belong to the same account.
        """
        rows = self._ask(
            "SELECT file_id, target FROM delivery WHERE file_id IN (SELECT value FROM json_each(?))",
            (json.dumps(list(ids)),),
        )
        return frozenset(file_id for file_id, theirs in rows if address(theirs) == address(target))

    def newest(self, target: str) -> str | None:
        """Return the id accepted last at *target*."""
        rows = self._ask(
            "SELECT file_id FROM delivery WHERE target = ? AND file_id IS NOT NULL ORDER BY id DESC LIMIT 1",
            (target,),
        )
        return rows[0][0] if rows else None

    def folder_seen(self, path: str) -> bool:
        """Return whether this folder has been there before: if it is missing now, it is lost, not new."""
        return bool(self._ask("SELECT 1 FROM folder WHERE path = ?", (os.fsencode(path),)))

    def saw_folder(self, path: str) -> None:
        """Remember that this folder was there."""
        if not self.folder_seen(path):
            values = (os.fsencode(path),)
            self._write(
                lambda database: _run(database, "INSERT OR IGNORE INTO folder (path) VALUES (?)", values)
            )

    def prune(self, before: float) -> None:
        """Forget the files that were finished before this time."""
        self._write(lambda database: _run(database, "DELETE FROM delivery WHERE finished_at < ?", (before,)))

    def close(self) -> None:
        """Write what is left and let go of the folder; who comes later gets a JournalError."""
        with self._desk:
            if self._closed:
                return
            self._closed = True
            last = self._queued(_Wish(lambda _: None))
        with contextlib.suppress(OSError, JournalError):  # all that it is for is to come last
            self._settled(last)
        self._database.close()
        with contextlib.suppress(OSError):
            files.close(self._lock)

    # What is done within a transaction.

    def _put(self, database: sqlite3.Connection, delivery: Delivery) -> Delivery:
        """Write the row. What is refused has changed nothing: the others of its transaction go on."""
        values = _values(delivery)
        before = _written(database, delivery.row)
        try:
            if before is None:
                delivery = replace(delivery, row=_insert(database, values))
            else:
                _update(database, delivery.row, before, values)
        except sqlite3.IntegrityError as conflict:
            if "remote_name" in str(conflict):
                raise AttemptOpenError(delivery.remote_name) from None
            if "file_id" in str(conflict):
                raise IdKnownError(delivery.file_id) from None
            raise JournalError(f"{delivery.name!r} is under way already ({conflict})") from None
        is_open = delivery.finished_at is None
        self._turned.append((_open_name(before), (delivery.inbox, delivery.name) if is_open else None))
        return delivery

    def _remove(self, database: sqlite3.Connection, row: int | None) -> None:
        self._turned.append((_open_name(_written(database, row)), None))
        _run(database, "DELETE FROM delivery WHERE id = ?", (row,))

    # Whoever finds nobody committing leads: he commits for all.

    def _ask(self, query: str, values: tuple[Any, ...]) -> list[Any]:
        return self._write(lambda database: database.execute(query, values).fetchall())

    def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._desk:
            if self._closed:
                raise self._too_late()
            wish = self._queued(_Wish(work))
        result: T = self._settled(wish)
        return result

    def _too_late(self) -> JournalError:
        return JournalError(f"the journal in {self._folder} is closed")

    def _queued(self, wish: "_Wish") -> "_Wish":
        self._wishes.append(wish)
        if not self._led:
            self._led = wish.leads = True
            wish.wake()
        return wish

    def _settled(self, wish: "_Wish") -> Any:
        wish.wait()  # always: the lead may be handed to a wish before its worker comes to this
        if wish.leads:
            self._lead()
        if isinstance(wish.answer, Exception):
            raise wish.answer
        return wish.answer

    def _lead(self) -> None:
        """Commit once for all who wait, and hand on: nobody is kept at it for others."""
        with self._desk:
            wishes, self._wishes = self._wishes, []
        try:
            self._commit(wishes)
        finally:
            with self._desk:
                self._led = bool(self._wishes)
                if self._led:
                    self._wishes[0].leads = True
                    self._wishes[0].wake()
            for wish in wishes:
                wish.wake()

    def _commit(self, wishes: "list[_Wish]") -> None:
        self._turned.clear()
        try:
            with _transaction(self._database):
                answers = [wish.fulfil(self._database) for wish in wishes]
        except sqlite3.Error as error:
            if len(wishes) > 1:  # one that the disk does not take must not fail the others, which may only read
                for wish in wishes:
                    self._commit([wish])
            else:
                wishes[0].answer = _storage_error(error, self._folder)
            return
        for before, after in self._turned:
            if after is not None:
                self._open_names[after[0]].add(after[1])
            if before is not None and before != after:
                self._open_names[before[0]].discard(before[1])
        for wish, answer in zip(wishes, answers, strict=True):
            wish.answer = answer

    # Opening.

    def _open(self, stamp: str) -> sqlite3.Connection:
        path = self._folder / _DATABASE
        try:
            return _open(path)
        except _UnusableError as unusable:
            self.set_aside = _set_aside(path, unusable, stamp)
            return _open(path)

    def _identify(self) -> tuple[str, tuple[str, ...]]:
        file = self._folder / "instance"
        ours = _read_instance(file)
        known = self._database.execute("SELECT value FROM meta WHERE key = 'instance'").fetchone()
        if known is not None:
            if ours != known[0]:
                _write_instance(file, known[0])
            return known[0], _former(self._database)
        instance = secrets.token_hex(8)
        with _transaction(self._database):
            self._database.execute("INSERT INTO meta VALUES ('instance', ?)", (instance,))
            self._database.execute(
                "INSERT INTO meta VALUES ('former', ?)", (json.dumps([ours] if ours else []),)
            )
        _write_instance(file, instance)
        return instance, _former(self._database)


class _Wish:
    """Something that a worker wants from the database, and the place for its answer.

    A lock that is taken twice is all that the waiting needs. It is let go of once for each wait, by whoever has
    settled the wish or hands the lead to it; no signal's handler may raise in a thread that waits here.
    """

    __slots__ = ("_awake", "_work", "answer", "leads")

    def __init__(self, work: Callable[[sqlite3.Connection], Any]) -> None:
        self.leads = False
        self.answer: Any = JournalError("the commit was broken off")
        self._work = work
        self._awake = threading.Lock()
        self._awake.acquire()

    def fulfil(self, database: sqlite3.Connection) -> Any:
        """Do the work; one wish that cannot be granted does not spoil the others of its transaction."""
        try:
            return self._work(database)
        except sqlite3.Error:
            raise
        except Exception as refused:  # noqa: BLE001 - it is raised again where the worker waits
            return refused

    def wake(self) -> None:
        """Let the worker go on."""
        self._awake.release()

    def wait(self) -> None:
        """Return once there is an answer, or when it is this worker's turn to commit."""
        self._awake.acquire()


_COLUMNS = ("inbox", "name", "state", "target", "remote_name", "sha256", "file_id", "finished_at", "facts")
_SELECT = f"SELECT id, {', '.join(_COLUMNS)} FROM delivery"  # noqa: S608 - no input in it
_UNDER_WAY = f"{_SELECT} INDEXED BY open_file WHERE finished_at IS NULL ORDER BY id"
_LAST = f"{_SELECT} WHERE state = ? AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 1"
_WRITTEN = f"SELECT {', '.join(_COLUMNS)} FROM delivery WHERE id = ?"  # noqa: S608
_INSERT = f"INSERT INTO delivery ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


def _compared(database: sqlite3.Connection, delivery: Delivery) -> Delivery:
    """Look for an earlier upload of the same bytes to the same target."""
    row = database.execute(
        "SELECT file_id FROM delivery WHERE sha256 = ? AND target = ? AND file_id IS NOT NULL"
        " ORDER BY id DESC LIMIT 1",
        (delivery.sha256, delivery.target),
    ).fetchone()
    return _same_as(delivery, row and row[0])


def _same_as(delivery: Delivery, earlier: str | None) -> Delivery:
    return replace(delivery, answer={**(delivery.answer or {}), "same_as": earlier})


def _written(database: sqlite3.Connection, row: int | None) -> _Row | None:
    if row is None:
        return None
    written: _Row | None = database.execute(_WRITTEN, (row,)).fetchone()
    return written


def _update(database: sqlite3.Connection, row: int | None, before: _Row, after: _Row) -> None:
    changed = {column: new for column, old, new in zip(_COLUMNS, before, after, strict=True) if old != new}
    if changed:
        settings = ", ".join(f"{column} = ?" for column in changed)
        _run(database, f"UPDATE delivery SET {settings} WHERE id = ?", (*changed.values(), row))  # noqa: S608


# Rows that wait are never finished; only because it is said does the index of open files serve.
_FORGET_TRIED = (
    "DELETE FROM delivery WHERE inbox = ? AND name = ? AND finished_at IS NULL AND state = 'waiting'"
)


def _insert(database: sqlite3.Connection, values: _Row) -> int:
    """A file that was tried before and is another one now starts anew."""
    with contextlib.suppress(sqlite3.IntegrityError):  # it changed nothing
        return database.execute(_INSERT, values).lastrowid or 0
    database.execute("SAVEPOINT tried_before")
    try:
        _run(database, _FORGET_TRIED, values[:2])
        row = database.execute(_INSERT, values).lastrowid
    except sqlite3.IntegrityError:
        database.execute("ROLLBACK TO tried_before")
        database.execute("RELEASE tried_before")
        raise
    database.execute("RELEASE tried_before")
    return row or 0


_FACTS = tuple(known.name for known in fields(Delivery) if known.name not in ("row", *_COLUMNS))
_facts_of = operator.attrgetter(*_FACTS)  # `asdict` copies each value deeply, which takes far longer


def _values(delivery: Delivery) -> _Row:
    facts = zip(_FACTS, _facts_of(delivery), strict=True)
    return (
        os.fsencode(delivery.inbox),
        os.fsencode(delivery.name),
        delivery.state,
        delivery.target,
        delivery.remote_name,
        delivery.sha256,
        delivery.file_id,
        delivery.finished_at,
        _json({name: value for name, value in facts if value is not None}),
    )


_json = json.JSONEncoder(separators=(",", ":")).encode


def _delivery(row: tuple[Any, ...]) -> Delivery:
    """Read a row. The first version had the columns in the facts as well."""
    known = dict(json.loads(row[-1]))
    known.update(zip(("row", *_COLUMNS[:-1]), row[:-1], strict=True))
    known["inbox"], known["name"] = os.fsdecode(known["inbox"]), os.fsdecode(known["name"])
    known["state"] = State(known["state"])
    known["windows"] = tuple((start, end) for start, end in known["windows"])
    return Delivery(**known)


def _open_name(row: _Row | None) -> _Name | None:
    """Which file's open row this is; that of none if it is finished."""
    if row is None or row[_COLUMNS.index("finished_at")] is not None:
        return None
    return os.fsdecode(row[0]), os.fsdecode(row[1])


def _open_names(database: sqlite3.Connection) -> defaultdict[str, set[str]]:
    """Return the names with an open row, for each inbox: by hand what would be asked for each new file."""
    names: defaultdict[str, set[str]] = defaultdict(set)
    for inbox, name in database.execute("SELECT inbox, name FROM delivery WHERE finished_at IS NULL"):
        names[os.fsdecode(inbox)].add(os.fsdecode(name))
    return names


def _run(database: sqlite3.Connection, statement: str, values: tuple[Any, ...]) -> None:
    database.execute(statement, values)


@dataclass(frozen=True, slots=True)
class Glance:
    """What a journal says to somebody who only reads it."""

    under_way: tuple[Delivery, ...]
    last_done: Delivery | None
    last_failed: Delivery | None


def glance(state_dir: Path) -> Glance:
    """Read a journal that no daemon works with, without changing or making anything.

    Raises OSError if it is not there or not for this user, JournalError if it cannot be understood.
    """
    path = state_dir / _DATABASE
    files.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    # What a crash left in the log beside it is read, too; an orderly end leaves none, and nothing to lock.
    log = path.with_name(path.name + "-wal")
    how = "mode=ro&readonly_shm=1" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True)) as database:
            (schema,) = database.execute("PRAGMA user_version").fetchone()
            if schema != SCHEMA:
                raise JournalError(f"the journal in {state_dir} has schema {schema}, known here is {SCHEMA}")
            unfinished = database.execute(_UNDER_WAY).fetchall()
            ended = [database.execute(_LAST, (state,)).fetchone() for state in (State.DONE, State.FAILED)]
            done, failed = (None if row is None else _delivery(row) for row in ended)
            return Glance(tuple(map(_delivery, unfinished)), done, failed)
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise JournalError(f"the journal in {state_dir} can't be read: {error}") from None


class _UnusableError(Exception):
    """The database's file is there and cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _open(path: Path) -> sqlite3.Connection:
    """Open or make the database. Raise _UnusableError for a damaged or newer one, OSError for disk faults."""
    files.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    with contextlib.ExitStack() as undo:
        try:
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            undo.callback(database.close)
            _prepare(database)
        except sqlite3.Error as error:
            if _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise _UnusableError("damaged", str(error)) from None
            raise _storage_error(error, path.parent) from None
        undo.pop_all()
    return database


def _prepare(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    (schema,) = database.execute("PRAGMA user_version").fetchone()
    if schema > SCHEMA:
        raise _UnusableError("newer", f"its schema is {schema}, this version of sfwatch knows {SCHEMA}")
    (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if sound != "ok":
        raise _UnusableError("damaged", str(sound))
    if schema == 0:
        with _transaction(database):
            for statement in filter(str.strip, _CREATE.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA}")
    _require_sense(database)


def _require_sense(database: sqlite3.Connection) -> None:
    """What a start will read must be readable: a database can be sound and its text damaged all the same."""
    try:
        for row in database.execute(_UNDER_WAY):
            _delivery(row)
        known = database.execute("SELECT value FROM meta WHERE key = 'instance'").fetchone()
        if known is not None and (not _INSTANCE.fullmatch(known[0]) or None in _former(database)):
            raise _UnusableError("damaged", "its instance is no instance")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _UnusableError("damaged", f"a row makes no sense: {error!r}") from None
    except sqlite3.Error as error:
        if _code(error) != sqlite3.SQLITE_ERROR:
            raise
        raise _UnusableError("damaged", str(error)) from None  # no such table, no UTF-8


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite may have done it by itself
            database.execute("ROLLBACK")
        raise


def _set_aside(path: Path, unusable: _UnusableError, stamp: str) -> SetAside:
    stem = f"journal.{unusable.reason}-{stamp}"
    aside = path.with_name(f"{stem}.sqlite3")
    while os.path.lexists(aside):
        aside = path.with_name(f"{stem}.{secrets.token_hex(2)}.sqlite3")
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    return SetAside(str(aside), unusable.reason, str(unusable))


_FAULTS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,  # whatever it was: that we may open it was tried before
}


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary code; errors that Python's module makes up itself carry none."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _storage_error(error: sqlite3.Error, folder: Path) -> Exception:
    """Return what the disk said, as the OSError that any other write would have raised."""
    code = _code(error)
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, *_FAULTS):
        number = _FAULTS.get(code, errno.EIO)
        return OSError(number, f"{os.strerror(number)} ({error})", str(folder))
    return JournalDamagedError(f"the journal in {folder} failed: {error}")


def _lock(state_dir: Path) -> int:
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        files.close(fd)
        raise StateInUseError(
            f"another sfwatch works with the state folder {state_dir}: stop it, or give this one a state_dir"
            " of its own"
        ) from None
    return fd


def _former(database: sqlite3.Connection) -> tuple[str, ...]:
    (former,) = database.execute("SELECT value FROM meta WHERE key = 'former'").fetchone()
    return tuple(json.loads(former))


def _read_instance(file: Path) -> str | None:
    try:
        text = file.read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return text if _INSTANCE.fullmatch(text) else None


_INSTANCE = re.compile("[0-9a-f]{16}")


def _write_instance(file: Path, instance: str) -> None:
    fresh = file.with_name("instance.new")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.write(instance + "\n")
        stream.flush()
        os.fsync(fd)
    fresh.replace(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(folder)
    files.close(folder)

"""What must survive the process: attempts, answers, and where their files were going.

The folders say what there is to do, the journal only what is known about it: a lost journal costs certainty,
never a file. One row stands for one file from its first attempt on; `save` makes it what it is told and returns
when that is durable. One thread owns the database and is the only one to touch the state folder. The others put
requests into a queue and wait; all that wait at that moment share one transaction with one sync.

What is in a column is not in `facts`, which is JSON. A row is written over only where it changed: each index
that a step need not touch is a page less to write.

*Numbers* say what came before what, since clocks cannot: one counter numbers the beginnings of attempts and the
acceptances. *Instance* is the random name of this state folder on this machine; folders of claims are named by
it. It stands in a file of its own, so that it outlives a lost journal; `id` tells one journal from the next.
"""

import contextlib
import errno
import fcntl
import json
import os
import queue
import secrets
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from sfwatch import files
from sfwatch.delivery import identity
from sfwatch.delivery.evidence import Evidence

SCHEMA = 2
_DATABASE = "journal.sqlite3"


class State(StrEnum):
    """How far a file has come, as far as it must be known after a crash."""

    WAITING = "waiting"  # tried before; the service has nothing of it; it is back in its inbox
    SENDING = "sending"  # an attempt has begun, its outcome is not written yet
    UNKNOWN = "unknown"  # an attempt ended without a clear answer
    DOUBTED = "doubted"  # refused, which is not believed yet; the service has nothing of it; still claimed
    ACCEPTED = "accepted"  # sidecar and move are left
    REFUSED = "refused"  # report and move are left
    DONE = "done"
    FAILED = "failed"
    ORPHAN = "orphan"  # an upload of ours that is no file's


OPEN = (State.WAITING, State.SENDING, State.UNKNOWN, State.DOUBTED, State.ACCEPTED, State.REFUSED)


@dataclass(frozen=True, slots=True)
class Delivery(Evidence):
    """All that is known of one file on its way. `finished_at` is seconds since the epoch, `*_s` are seconds."""

    inbox: str
    name: str
    state: State
    dev: int
    ino: int
    size: int
    mtime_ns: int
    row: int | None = None
    claims: str | None = None  # the claims folder, in `.sfwatch`, that the file is or was claimed in
    tag: str | None = None
    settled_by: str | None = None
    sha256: str | None = None
    lines: int | None = None
    target: str | None = None
    remote_name: str | None = None
    purpose: str | None = None
    attempts: int = 0
    unproved: int = 0  # attempts that the service may have stored
    resends: int = 0  # those without proof that the one before was not stored
    resend_request: str | None = None  # the person's request that the last attempt used up
    first_sent: int | None = None  # the journal's own numbers, see `save`
    last_sent: int | None = None
    accepted: int | None = None
    answer: dict[str, Any] | None = None
    file_id: str | None = None
    report: dict[str, Any] | None = None
    marker: str | None = None
    target_name: str | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class KnownUpload:
    """What the journal knows of an upload that it has the id of.

    `first_sent`: of the attempt that stored it; where no answer said which one did, of the first.
    """

    row: int
    target: str | None
    tag: str | None
    first_sent: int | None
    accepted: int | None


def address(target: str | None) -> str:
    """Return where a target is: its name goes on with where the key comes from."""
    return (target or "").partition(" ")[0]


class JournalError(Exception):
    """The journal cannot be used at all; the text says what to do."""


class StateInUseError(JournalError):
    """Another daemon works with this state folder."""


class JournalDamagedError(JournalError):
    """The journal was sound when it was opened and cannot be used any more: it takes a restart."""


class IdKnownError(Exception):
    """The journal knows this file id as another upload's."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """A journal that could not be read, and where it lies now."""

    path: str
    reason: str
    detail: str


# What each schema makes of the one before. Schema 1 had no numbers: the ids of its rows take their place. Its
# facts told the times of each attempt that the service may have stored.
_STEPS = (
    """
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
CREATE INDEX same_bytes ON delivery (sha256) WHERE file_id IS NOT NULL;
CREATE INDEX finished ON delivery (finished_at) WHERE finished_at IS NOT NULL;
""",
    """
DROP INDEX IF EXISTS open_attempt;
DROP INDEX IF EXISTS file_id;
ALTER TABLE delivery ADD COLUMN address TEXT;
ALTER TABLE delivery ADD COLUMN tag TEXT;
ALTER TABLE delivery ADD COLUMN size INTEGER;
ALTER TABLE delivery ADD COLUMN first_sent INTEGER;
ALTER TABLE delivery ADD COLUMN last_sent INTEGER;
ALTER TABLE delivery ADD COLUMN accepted INTEGER;
ALTER TABLE delivery ADD COLUMN answered INTEGER;
UPDATE delivery SET
  address = address_of(target),
  size = json_extract(facts, '$.size'),
  accepted = CASE WHEN file_id IS NOT NULL THEN id END,
  answered = json_type(facts, '$.answer') IS 'object' AND json_extract(facts, '$.answer.recovered') IS NOT 1,
  facts = json_set(facts, '$.unproved', coalesce(json_array_length(facts, '$.windows'), 0));
UPDATE delivery SET first_sent = id, last_sent = id WHERE json_extract(facts, '$.unproved') > 0;
UPDATE delivery SET file_id = NULL WHERE file_id IS NOT NULL
  AND id NOT IN (SELECT max(id) FROM delivery WHERE file_id IS NOT NULL GROUP BY file_id, address);
CREATE UNIQUE INDEX file_id ON delivery (file_id, address) WHERE file_id IS NOT NULL;
CREATE INDEX finished_tag ON delivery (tag) WHERE finished_at IS NOT NULL;
CREATE INDEX accepted ON delivery (address, target, accepted, size) WHERE accepted IS NOT NULL;
CREATE INDEX accepted_there ON delivery (address, accepted) WHERE accepted IS NOT NULL;
CREATE TABLE changes_names (address TEXT PRIMARY KEY) WITHOUT ROWID;
UPDATE meta SET key = 'id' WHERE key = 'instance';
DELETE FROM meta WHERE key = 'former';
INSERT OR IGNORE INTO meta VALUES ('id', lower(hex(randomblob(8))));
""",
)

T = TypeVar("T")
_Row = tuple[Any, ...]
_Work = Callable[[sqlite3.Connection], Any]


class _Request(NamedTuple):
    """Something that the journal's thread is asked to do, within a transaction or beside the database."""

    work: _Work
    answer: Future[Any]
    beside: bool


class SqliteJournal:
    """The journal in one SQLite database (WAL, every commit synced) in *state_dir*.

    Holds a kernel lock on the folder as long as it is open. Raises StateInUseError if another daemon has it,
    OSError or JournalError if the folder cannot be used. Once it is closed every call raises JournalError.
    """

    id: str
    instance: str
    former: Sequence[str]
    machine: str | None

    def __init__(self, state_dir: Path, *, stamp: str, machine_id: Path = identity.MACHINE_ID) -> None:
        self.set_aside: SetAside | None = None
        self._folder = state_dir
        self._renaming: set[str] | None = None
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # after the last request nobody puts another one
        self._ended: str | None = None
        self._bug: BaseException | None = None
        opened: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(stamp, machine_id, opened), name="journal", daemon=True
        )
        self._thread.start()
        failure = opened.exception()
        if failure is not None:
            self._thread.join()
            raise failure

    def find(self, inbox: str, name: str) -> Delivery | None:
        """Return what is known of the file *name* of the inbox at path *inbox*, unless it is finished."""
        rows = self._select(
            f"{_SELECT} WHERE inbox = ? AND name = ? AND finished_at IS NULL",
            os.fsencode(inbox),
            os.fsencode(name),
        )
        return _delivery(rows[0]) if rows else None

    def under_way(self) -> list[Delivery]:
        """Return every file that is not finished, the oldest first."""
        return [_delivery(row) for row in self._select(_UNDER_WAY)]

    def finished(self, tag: str) -> Delivery | None:
        """Return the newest finished file with this tag."""
        rows = self._select(
            f"{_SELECT} WHERE tag = ? AND finished_at IS NOT NULL AND state != ? ORDER BY id DESC LIMIT 1",
            tag,
            State.ORPHAN,
        )
        return _delivery(rows[0]) if rows else None

    def save(self, delivery: Delivery) -> Delivery:
        """Make *delivery* durable and return it with its row and numbers, and its answer with `same_as`.

        A row that turns SENDING gets the next number as `last_sent`, and as `first_sent` if it has none; one
        that is ACCEPTED gets it as `accepted` if it has none. `same_as`: an earlier upload of the same bytes.
        Raises IdKnownError where another upload to this address has this id, and as `forget` OSError (ENOSPC,
        EIO, EROFS, …) when the state folder does not take it.
        """
        return self._ask(lambda database: self._put(database, delivery))

    def forget(self, delivery: Delivery) -> None:
        """Remove the row: nothing of this file is to be remembered."""
        self._execute("DELETE FROM delivery WHERE id = ?", delivery.row)

    def prune(self, before: float) -> None:
        """Forget the files that were finished before this time."""
        self._execute("DELETE FROM delivery WHERE finished_at < ?", before)

    def number(self) -> int:
        """Return the greatest number that was given so far: of an attempt or an acceptance."""
        return self._ask(lambda _: self._last_number)

    def known(self, address: str, ids: Collection[str]) -> dict[str, KnownUpload]:
        """Return what is known of those of *ids* that are uploads to this address.

        Another key, or the same from another place, may well belong to the same account.
        """
        rows = self._select(
            "SELECT file_id, id, target, tag, CASE WHEN answered THEN last_sent ELSE first_sent END, accepted"
            " FROM delivery"
            " WHERE file_id IN (SELECT value FROM json_each(?)) AND address = ?",
            json.dumps(list(ids)),
            address,
        )
        return {file_id: KnownUpload(*upload) for file_id, *upload in rows}

    def knows_any(self, address: str) -> bool:
        """Return whether any upload was accepted at this address."""
        query = "SELECT 1 FROM delivery WHERE address = ? AND accepted IS NOT NULL LIMIT 1"
        return bool(self._select(query, address))

    def accepted_before(self, target: str, number: int) -> str | None:
        """Return the id of the upload that was accepted last at this target, up to this number.

        Where there is none, of one with another key (or the same from another place) at this address.
        """
        query = "SELECT file_id FROM delivery WHERE address = ? AND accepted <= ? AND file_id IS NOT NULL"
        last = " ORDER BY accepted DESC LIMIT 1"
        rows = self._select(f"{query} AND target = ?{last}", address(target), number, target)
        rows = rows or self._select(query + last, address(target), number)
        return rows[0][0] if rows else None

    def last_accepted(self, target: str) -> int:
        """Return the number of this target's last acceptance that was answered, not found in a listing."""
        return self._of_accepted("accepted", target, "AND answered ORDER BY accepted DESC LIMIT 1") or 0

    def largest_accepted(self, target: str) -> int:
        """Return how many bytes the largest file had that this target accepted."""
        return self._of_accepted("max(size)", target, "") or 0

    def disproves(self, target: str, refused_words: str) -> bool:
        """Return whether a file was refused in these words and accepted later: they are not its fault."""
        query = "AND json_extract(facts, '$.refused_words') = ? LIMIT 1"
        return self._of_accepted("1", target, query, refused_words) is not None

    def names_kept(self, address: str) -> bool:
        """Return whether the service there keeps the names of uploads, for all that is known."""
        if self._renaming is None:  # asked for after each acceptance
            self._renaming = {where for (where,) in self._select("SELECT address FROM changes_names")}
        return address not in self._renaming

    def note_names(self, address: str, *, kept: bool) -> None:
        """Remember whether the service there keeps the names of uploads."""
        self._renaming = None
        if kept:
            self._execute("DELETE FROM changes_names WHERE address = ?", address)
        else:
            self._execute("INSERT OR IGNORE INTO changes_names VALUES (?)", address)

    def folder_seen(self, path: str) -> bool:
        """Return whether this folder has been there before: if it is missing now, it is lost, not new."""
        return bool(self._select("SELECT 1 FROM folder WHERE path = ?", os.fsencode(path)))

    def saw_folder(self, path: str) -> None:
        """Remember that this folder was there."""
        self._execute("INSERT OR IGNORE INTO folder VALUES (?)", os.fsencode(path))

    def free_bytes(self) -> int:
        """Return how much more the state folder's filesystem takes from us."""
        space = self.call(lambda: os.statvfs(self._folder))
        return space.f_bavail * space.f_frsize

    def call(self, work: Callable[[], T]) -> T:
        """Do something that touches the state folder, in the journal's thread; it must not ask the journal."""
        return self._ask(lambda _: work(), beside=True)

    def close(self) -> None:
        """Write what is asked for already and release the folder; a later call raises JournalError."""
        with self._gate:
            if self._ended is None:
                self._ended = f"the journal in {self._folder} is closed"
                self._requests.put(None)
        self._thread.join()

    # What callers do.

    def _ask(self, work: Callable[[sqlite3.Connection], T], *, beside: bool = False) -> T:
        answer: Future[T] = Future()
        with self._gate:
            if self._ended is not None:
                raise self._end()
            self._requests.put(_Request(work, answer, beside))
        return answer.result()

    def _select(self, query: str, *values: object) -> list[_Row]:
        return self._ask(lambda database: database.execute(query, values).fetchall())

    def _execute(self, statement: str, *values: object) -> None:
        self._select(statement, *values)

    def _of_accepted(self, column: str, target: str, rest: str, *values: object) -> Any:
        query = (
            f"SELECT {column} FROM delivery WHERE address = ? AND target = ? AND accepted IS NOT NULL {rest}"  # noqa: S608
        )
        rows = self._select(query, address(target), target, *values)
        return rows[0][0] if rows else None

    def _end(self) -> JournalError:
        if self._bug is None:
            return JournalError(self._ended)
        error = JournalDamagedError(self._ended)
        error.__cause__ = self._bug
        return error

    # What the thread does.

    def _serve(self, stamp: str, machine_id: Path, opened: Future[None]) -> None:
        requests: list[_Request] = []
        try:
            with contextlib.ExitStack() as held:
                database = self._open(held, stamp, machine_id)
                opened.set_result(None)
                while requests := self._next_requests():
                    for request in requests:
                        if request.beside:
                            _done(request, database)()
                    if together := [request for request in requests if not request.beside]:
                        self._commit(database, together)
        except BaseException as bug:  # noqa: BLE001 - it is raised where somebody waits
            if not opened.done():
                opened.set_exception(bug)
                return
            with self._gate:
                self._bug = bug
                self._ended = f"the journal's thread in {self._folder} failed: {bug!r}"
            while not self._requests.empty():
                requests += filter(None, [self._requests.get()])
            for request in requests:
                if not request.answer.done():
                    request.answer.set_exception(self._end())

    def _next_requests(self) -> list[_Request]:
        """Wait for a request and return all that are there then; none is the end."""
        requests = []
        while (request := self._requests.get()) is not None:
            requests.append(request)
            if self._requests.empty():
                return requests
        if requests:
            self._requests.put(None)  # the end comes after these
        return requests

    def _commit(self, database: sqlite3.Connection, requests: list[_Request]) -> None:
        try:
            with _transaction(database):
                tell = [_done(request, database) for request in requests]
        except sqlite3.Error as error:
            if len(requests) == 1:
                requests[0].answer.set_exception(_storage_error(error, self._folder))
                return
            for request in requests:  # one that the disk does not take must not fail those that only read
                self._commit(database, [request])
        else:
            for told in tell:
                told()

    def _put(self, database: sqlite3.Connection, delivery: Delivery) -> Delivery:
        before = database.execute(_WRITTEN, (delivery.row,)).fetchone()
        if delivery.state is State.SENDING and (before is None or before[_STATE] != State.SENDING):
            number = self._next_number()
            delivery = replace(delivery, first_sent=delivery.first_sent or number, last_sent=number)
        if delivery.state is State.ACCEPTED and delivery.accepted is None:
            delivery = replace(delivery, accepted=self._next_number())
        if delivery.answer is not None and "same_as" not in delivery.answer:
            earlier = database.execute(_SAME_BYTES, (delivery.sha256, delivery.target)).fetchone()
            delivery = replace(delivery, answer={**delivery.answer, "same_as": earlier and earlier[0]})
        values = _values(delivery)
        try:
            if before is None:
                if delivery.finished_at is None:  # a file that was tried before and is another one starts again
                    database.execute(_FORGET_TRIED, values[:2])
                return replace(delivery, row=database.execute(_INSERT, values).lastrowid)
            pairs = zip(_COLUMNS, before, values, strict=True)
            if changed := {column: new for column, old, new in pairs if old != new}:
                update = f"UPDATE delivery SET {' = ?, '.join(changed)} = ? WHERE id = ?"  # noqa: S608
                database.execute(update, (*changed.values(), delivery.row))
        except sqlite3.IntegrityError as conflict:
            if "file_id" in str(conflict):
                raise IdKnownError(delivery.file_id) from None
            raise JournalError(f"{delivery.name!r} is under way already ({conflict})") from None
        return delivery

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number

    def _open(self, held: contextlib.ExitStack, stamp: str, machine_id: Path) -> sqlite3.Connection:
        held.callback(files.close, _lock(self._folder))
        self.machine = identity.machine_id(machine_id)
        path = self._folder / _DATABASE
        try:
            database, self.id, last = _open(path, self.machine)
        except _UnusableError as unusable:
            self.set_aside = _set_aside(path, unusable, stamp)
            database, self.id, last = _open(path, self.machine)
        held.callback(database.close)
        self._last_number = last
        self.instance, _, self.former = identity.establish(self._folder, self.machine)
        return database


Journal = SqliteJournal


def _done(request: _Request, database: sqlite3.Connection) -> Callable[[], None]:
    """Do what is asked and return how to tell so; what is refused leaves the others' changes in place."""
    database.execute("SAVEPOINT request")
    try:
        tell = partial(request.answer.set_result, request.work(database))
    except sqlite3.Error:
        raise
    except Exception as refused:  # noqa: BLE001 - it is raised again where the caller waits
        database.execute("ROLLBACK TO request")
        tell = partial(request.answer.set_exception, refused)
    database.execute("RELEASE request")
    return tell


_PLAIN = (
    *("state", "target", "remote_name", "tag", "sha256", "file_id"),
    *("first_sent", "last_sent", "accepted", "size", "finished_at"),
)
_COLUMNS = ("inbox", "name", *_PLAIN, "address", "answered", "facts")
_STATE = _COLUMNS.index("state")
_SELECT = f"SELECT id, {', '.join(_COLUMNS)} FROM delivery"  # noqa: S608 - no input in it
_UNDER_WAY = f"{_SELECT} INDEXED BY open_file WHERE finished_at IS NULL ORDER BY id"
_LAST = f"{_SELECT} WHERE state = ? AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 1"
_WRITTEN = f"SELECT {', '.join(_COLUMNS)} FROM delivery WHERE id = ?"  # noqa: S608
_INSERT = f"INSERT INTO delivery ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608
_LAST_NUMBER = (
    "SELECT coalesce(max(max(coalesce(last_sent, 0), coalesce(accepted, 0), coalesce(first_sent, 0))), 0)"
    " FROM delivery"
)
# Of these the service has nothing. They are never finished: only because it is said does the index serve.
_FORGET_TRIED = (
    "DELETE FROM delivery WHERE inbox = ? AND name = ? AND finished_at IS NULL"
    " AND state IN ('waiting', 'doubted')"
)
_SAME_BYTES = """SELECT file_id FROM delivery WHERE sha256 = ? AND target = ? AND file_id IS NOT NULL
  ORDER BY id DESC LIMIT 1"""
_FACTS = tuple(known.name for known in fields(Delivery) if known.name not in ("row", *_COLUMNS))


def _values(delivery: Delivery) -> _Row:
    facts = {name: value for name in _FACTS if (value := getattr(delivery, name)) is not None}
    return (
        os.fsencode(delivery.inbox),
        os.fsencode(delivery.name),
        *(getattr(delivery, column) for column in _PLAIN),
        address(delivery.target),
        delivery.answer is not None and not delivery.answer.get("recovered"),
        json.dumps(facts, separators=(",", ":")),
    )


def _delivery(row: _Row) -> Delivery:
    """Read a row; what schema 1 had in its facts and this one has not is left out."""
    facts = json.loads(row[-1])
    known = {name: facts[name] for name in _FACTS if name in facts}
    known.update(zip(("row", "inbox", "name", *_PLAIN), row, strict=False))
    known["inbox"], known["name"] = os.fsdecode(known["inbox"]), os.fsdecode(known["name"])
    known["state"] = State(known["state"])
    return Delivery(**known)


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
                raise JournalError(
                    f"the journal in {state_dir} has schema {schema}, this version of sfwatch reads {SCHEMA};"
                    " an older one is brought up to date when the daemon starts"
                )
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


def _open(path: Path, machine: str | None) -> tuple[sqlite3.Connection, str, int]:
    """Open or make the database, and return its id and its last number, too.

    Raises _UnusableError for a damaged or newer one, OSError for disk faults.
    """
    files.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    with contextlib.ExitStack() as undo:
        try:
            database = sqlite3.connect(path, isolation_level=None, timeout=10)
            undo.callback(database.close)
            name, last = _prepare(database, path.parent, machine)
        except sqlite3.Error as error:
            if _code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
                raise _storage_error(error, path.parent) from None
            raise _UnusableError("damaged", str(error)) from None  # also: no such table, no JSON, no UTF-8
        except (ValueError, TypeError, KeyError) as error:
            raise _UnusableError("damaged", f"a row makes no sense: {error!r}") from None
        undo.pop_all()
    return database, name, last


def _prepare(database: sqlite3.Connection, folder: Path, machine: str | None) -> tuple[str, int]:
    """Read all that a start will read, too: a database can be sound and its text damaged all the same."""
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    (schema,) = database.execute("PRAGMA user_version").fetchone()
    if schema > SCHEMA:
        raise _UnusableError("newer", f"its schema is {schema}, this version of sfwatch knows {SCHEMA}")
    (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if sound != "ok":
        raise _UnusableError("damaged", str(sound))
    if schema == 1:  # the instance stood in the journal
        said = dict(database.execute("SELECT key, value FROM meta WHERE key IN ('instance', 'former')"))
        if said:
            identity.write(folder, identity.checked(said["instance"], machine, json.loads(said["former"])))
    if schema < SCHEMA:
        database.create_function("address_of", 1, address)
        with _transaction(database):
            for statement in ";".join(_STEPS[schema:]).split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {SCHEMA}")
    for row in database.execute(_UNDER_WAY):
        _delivery(row)
    (name,) = database.execute("SELECT value FROM meta WHERE key = 'id'").fetchone()
    (last,) = database.execute(_LAST_NUMBER).fetchone()
    return name, int(last)


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

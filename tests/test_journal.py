"""The journal: durable when `save` returns, private, never shared, and set aside when it can't be read."""

import errno
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import pytest
from world import STAMP, fill, in_threads, needs_root, tmpfs, wait_for

from sfwatch.journal import (
    OPEN,
    AttemptOpenError,
    Delivery,
    IdKnownError,
    JournalError,
    SqliteJournal,
    State,
    StateInUseError,
    glance,
)

INBOX = "/srv/inbox"
TARGET = "api.example (environment)"


def a_file(name: str = "a.jsonl", state: State = State.SENDING, **facts: object) -> Delivery:
    known = Delivery(
        inbox=INBOX,
        name=name,
        state=state,
        dev=1,
        ino=2,
        size=3,
        mtime_ns=4,
        target=TARGET,
        remote_name=name,
        sha256="ab" * 32,
    )
    return replace(known, **facts)  # type: ignore[arg-type]


@contextmanager
def opened(folder: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(folder, stamp=STAMP)
    try:
        yield journal
    finally:
        journal.close()


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture(name="journal")
def _journal(folder: Path) -> Iterator[SqliteJournal]:
    with opened(folder) as journal:
        yield journal


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208
    yield
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (before, threads)  # noqa: PTH208


FULL = a_file(
    state=State.ACCEPTED,
    settled_by="lease",
    lines=7,
    attempts=3,
    first_attempt_at=1700000000.25,
    held_s=12.5,
    windows=((1.5, 2.5), (3.5, 4.5)),
    answer={"data": {"id": "file-x", "bytes": 3, "deep": [1, None, "é\u2028"]}, "same_as": None},
    file_id="file-x",
    report={"reason": "refused", "findings": [{"line": 1}]},
    marker=".ok",
    target_name="a.20260101T000000Z.jsonl",
)


def test_everything_is_there_again_after_a_restart(folder: Path) -> None:
    """Whatever is known of a file is the same after the journal was closed and opened."""
    with opened(folder) as journal:
        saved = journal.save(FULL)
    with opened(folder) as journal:
        assert journal.find(INBOX, "a.jsonl") == saved
        assert saved == replace(FULL, row=saved.row)
        assert journal.under_way() == [saved]


def test_what_save_returned_for_outlives_the_process(folder: Path) -> None:
    """A process that dies in the instant in which `save` returns has lost nothing."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            SqliteJournal(folder, stamp=STAMP).save(FULL)
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with opened(folder) as journal:
        assert journal.find(INBOX, "a.jsonl") == replace(FULL, row=1)


def test_a_row_is_written_over_as_a_whole(journal: SqliteJournal) -> None:
    """Saving a row again replaces all of it, and finishing it makes the name free for the next file."""
    first = journal.save(a_file())
    later = journal.save(replace(first, state=State.UNKNOWN, attempts=2, windows=((1.0, 2.0),)))
    assert later.row == first.row
    assert journal.find(INBOX, "a.jsonl") == later
    journal.save(replace(later, state=State.DONE, finished_at=5.0))
    assert journal.find(INBOX, "a.jsonl") is None
    assert journal.under_way() == []
    assert journal.save(a_file()).row != first.row


def test_each_inbox_has_names_of_its_own(journal: SqliteJournal) -> None:
    """The same name in two inboxes is two files."""
    journal.save(a_file(remote_name="x"))
    journal.save(a_file(remote_name="y", inbox="/srv/other", size=99))
    found = journal.find("/srv/other", "a.jsonl")
    assert found is not None
    assert found.size == 99


@pytest.mark.parametrize("state", OPEN)
def test_every_file_that_is_not_finished_is_under_way(journal: SqliteJournal, state: State) -> None:
    """A start finds every half-state, the oldest first."""
    names = ["b.jsonl", "a.jsonl"]
    for name in names:
        journal.save(a_file(name, state))
    assert [(known.name, known.state) for known in journal.under_way()] == [(name, state) for name in names]


@pytest.mark.parametrize(
    "name", [os.fsdecode(b"caf\xe9\xff.jsonl"), "a\nb'\"\x1b.jsonl", "\u202e.jsonl", "é/é"]
)
def test_any_name_that_linux_allows_comes_back_as_it_was(folder: Path, name: str) -> None:
    """Names are bytes: undecodable ones and those with quotes or newlines are found again unchanged."""
    with opened(folder) as journal:
        journal.save(a_file(name, inbox=os.fsdecode(b"/srv/\xff"), remote_name="x"))
    with opened(folder) as journal:
        found = journal.find(os.fsdecode(b"/srv/\xff"), name)
        assert found is not None
        assert (found.inbox, found.name) == (os.fsdecode(b"/srv/\xff"), name)


def test_names_that_look_alike_are_different_files(journal: SqliteJournal) -> None:
    """Composed and decomposed letters are two names, as they are on the disk."""
    journal.save(a_file("\u00e9.jsonl", remote_name="x"))
    assert journal.find(INBOX, "e\u0301.jsonl") is None


def test_a_file_that_waits_is_replaced_by_another_of_its_name(journal: SqliteJournal) -> None:
    """What was known of a file that went back does not stand in the way of the next one of its name."""
    journal.save(a_file(state=State.WAITING, attempts=9))
    fresh = journal.save(a_file(state=State.SENDING, ino=77))
    assert journal.under_way() == [fresh]


@pytest.mark.parametrize("state", [State.SENDING, State.UNKNOWN])
def test_one_attempt_at_most_is_open_for_a_remote_name(journal: SqliteJournal, state: State) -> None:
    """Two uploads that a listing could not tell apart are never under way at the same time."""
    first = journal.save(a_file("x/a.jsonl", state, remote_name="a.jsonl"))
    other = a_file("y/a.jsonl", State.SENDING, remote_name="a.jsonl")
    with pytest.raises(AttemptOpenError):
        journal.save(other)
    assert journal.find(INBOX, "y/a.jsonl") is None
    journal.save(replace(other, target="another"))
    journal.save(replace(first, state=State.ACCEPTED, file_id="file-1"))
    journal.save(replace(other, name="z/a.jsonl"))


def test_an_id_belongs_to_one_upload(journal: SqliteJournal) -> None:
    """An id that the journal knows at a target is never given to a second file there, finished or not."""
    journal.save(a_file(state=State.DONE, file_id="file-1", finished_at=1.0))
    second = journal.save(a_file("b.jsonl"))
    with pytest.raises(IdKnownError):
        journal.save(replace(second, state=State.ACCEPTED, file_id="file-1"))
    assert journal.find(INBOX, "b.jsonl") == second
    journal.save(replace(second, state=State.ACCEPTED, file_id="file-1", target="another"))


def test_what_is_known_of_ids_counts_for_their_target_only(journal: SqliteJournal) -> None:
    """`known`, `newest` and `same_as` speak of one target: another service has other files.

    An id is known with whatever key it was uploaded, since two may belong to one account.
    """
    journal.save(a_file("a", State.DONE, file_id="file-1", finished_at=1.0))
    journal.save(a_file("b", State.DONE, file_id="file-2", finished_at=2.0, target="another"))
    journal.save(a_file("c", State.ACCEPTED, file_id="file-3", sha256="cd" * 32))
    assert journal.known(TARGET, ["file-1", "file-2", "file-3", "file-4", "'"]) == {"file-1", "file-3"}
    assert journal.known("api.example (file /key)", ["file-1", "file-2"]) == {"file-1"}
    assert journal.known(TARGET, []) == frozenset()
    assert journal.newest(TARGET) == "file-3"
    assert journal.newest("nobody") is None
    assert same_as(journal.save(an_answer("d", "file-4"))) == "file-1"
    assert same_as(journal.save(an_answer("e", "file-5", target="another"))) == "file-2"
    assert same_as(journal.save(an_answer("f", "file-6", sha256="ef" * 32))) is None


def an_answer(name: str, file_id: str, **facts: object) -> Delivery:
    return a_file(name, State.ACCEPTED, file_id=file_id, answer={"data": {"id": file_id}}, **facts)


def same_as(known: Delivery) -> object:
    assert known.answer is not None
    return known.answer["same_as"]


def test_an_answer_is_compared_once(journal: SqliteJournal) -> None:
    """The upload is never the same as itself, nor as a later one, however often its row is written."""
    first = journal.save(an_answer("a", "file-1"))
    second = journal.save(an_answer("b", "file-2"))
    assert (same_as(first), same_as(second)) == (None, "file-1")
    for known in (first, second):
        assert journal.save(replace(known, target_name="x")) == replace(known, target_name="x")
        assert journal.find(INBOX, known.name) == replace(known, target_name="x")


def test_an_id_that_is_known_already_is_what_the_bytes_are_the_same_as(journal: SqliteJournal) -> None:
    """A service may answer with the id that it gave to the same bytes before."""
    journal.save(an_answer("a", "file-1"))
    again = an_answer("b", "file-1")
    with pytest.raises(IdKnownError):
        journal.save(again)
    assert journal.find(INBOX, "b") is None
    assert same_as(journal.save(replace(again, file_id=None))) == "file-1"


def test_an_answer_is_not_lost_because_it_cannot_be_compared(journal: SqliteJournal) -> None:
    """A history that can't be read costs `same_as`, not the acceptance."""
    journal.save(an_answer("a", "file-1"))
    first_time = iter([sqlite3.SQLITE_DENY])

    def once(action: int, _table: str | None, column: str | None, *_: object) -> int:
        reads = action == sqlite3.SQLITE_READ and column == "sha256"
        return next(first_time, sqlite3.SQLITE_OK) if reads else sqlite3.SQLITE_OK

    journal._write(lambda database: database.set_authorizer(once))
    known = journal.save(an_answer("b", "file-2"))
    assert not list(first_time)
    assert same_as(known) is None
    assert journal.find(INBOX, "b") == known


def test_eight_workers_write_at_once(folder: Path) -> None:
    """What many workers save at the same moment is all there, each under a row of its own."""
    with opened(folder) as journal:

        def work(worker: int) -> list[Delivery]:
            rows = [journal.save(a_file(f"{worker}-{n}.jsonl")) for n in range(25)]
            return [journal.save(replace(row, state=State.UNKNOWN)) for row in rows]

        with ThreadPoolExecutor(8) as pool:
            saved = [row for rows in pool.map(work, range(8)) for row in rows]
    with opened(folder) as journal:
        assert len({row.row for row in saved}) == 200
        assert sorted(journal.under_way(), key=lambda d: d.name) == sorted(saved, key=lambda d: d.name)


def test_one_refused_wish_does_not_spoil_the_others(journal: SqliteJournal) -> None:
    """In one transaction, what stands against another row is refused and all the rest is durable."""
    journal.save(a_file("open", remote_name="open"))
    journal.save(a_file("done", State.DONE, file_id="file-1", finished_at=1.0))
    refused: list[type[Exception]] = []

    def wish(delivery: Delivery) -> Callable[[], None]:
        def save() -> None:
            try:
                journal.save(delivery)
            except (AttemptOpenError, IdKnownError) as error:
                refused.append(type(error))

        return save

    wishes = [a_file(f"good-{n}") for n in range(5)]
    wishes += [a_file("bad-1", remote_name="open"), a_file("bad-2", State.ACCEPTED, file_id="file-1")]
    with committed_together(journal, *map(wish, wishes)):
        pass
    assert sorted(error.__name__ for error in refused) == ["AttemptOpenError", "IdKnownError"]
    assert {known.name for known in journal.under_way()} == {"open", *(f"good-{n}" for n in range(5))}


@contextmanager
def committed_together(journal: SqliteJournal, *works: Callable[[], object]) -> Iterator[threading.Thread]:
    """Somebody is at the disk for the block, and these come meanwhile."""
    begun, go = threading.Event(), threading.Event()

    def wait(_: sqlite3.Connection) -> None:
        begun.set()
        go.wait()

    slow = threading.Thread(target=journal._write, args=(wait,))
    slow.start()
    begun.wait()
    threads = [threading.Thread(target=work) for work in works]
    for count, thread in enumerate(threads, 1):
        thread.start()
        wait_for(partial(_waiting, journal, count))
    yield slow
    go.set()
    for thread in [slow, *threads]:
        thread.join()


def _waiting(journal: SqliteJournal, count: int) -> bool:
    return len(journal._wishes) == count


def traced(journal: SqliteJournal, *works: Callable[[], object]) -> list[str]:
    """Return the statements that the database is given for these, one work after the other."""
    statements: list[str] = []
    journal._write(lambda database: database.set_trace_callback(statements.append))
    for work in works:
        work()
    journal._write(lambda database: database.set_trace_callback(None))
    return [text for text in statements[1:-1] if "BEGIN" not in text]  # the last BEGIN is that of the end


def test_a_worker_alone_commits_by_itself(journal: SqliteJournal) -> None:
    """No other thread has a hand in it, so that nobody waits for another's turn."""
    before = threading.active_count()
    assert journal._write(lambda _: threading.get_ident()) == threading.get_ident()
    journal.save(a_file())
    assert threading.active_count() == before


def test_what_comes_while_another_commits_is_committed_together(journal: SqliteJournal) -> None:
    """Fifteen that wait for one at the disk cost one commit more, not fifteen; the second of all does it."""
    workers: list[int] = []

    def save(number: int) -> Callable[[], object]:
        def put(database: sqlite3.Connection) -> None:
            workers.append(threading.get_ident())
            journal._put(database, a_file(f"{number}.jsonl"))

        return lambda: journal._write(put)

    def all_at_once() -> None:
        with committed_together(journal, *(save(number) for number in range(15))):
            pass

    statements = traced(journal, all_at_once)
    assert statements.count("COMMIT") == 2
    assert len(workers) == 15
    assert len(set(workers)) == 1
    assert len(journal.under_way()) == 15
    one_by_one = traced(journal, *(lambda n=n: journal.save(a_file(f"alone-{n}")) for n in range(15)))
    assert one_by_one.count("COMMIT") == 15


def test_nobody_is_kept_committing_for_others(journal: SqliteJournal) -> None:
    """After one round the next in the queue leads, and the first goes on while that one is at the disk."""
    at_work, go = threading.Event(), threading.Event()

    def also_wait(_: sqlite3.Connection) -> None:
        at_work.set()
        go.wait()

    following = threading.Thread(target=journal._write, args=(also_wait,))
    with committed_together(journal) as first:
        following.start()
        wait_for(lambda: journal._wishes)
    assert not first.is_alive()  # it came back although the next wish is not granted yet
    at_work.wait()
    assert following.is_alive()
    go.set()
    following.join()


def test_who_is_handed_the_lead_before_he_waits_hangs_nobody(journal: SqliteJournal) -> None:
    """A thread may be interrupted just before it waits: what it is told meanwhile counts, once."""
    begun, go = threading.Event(), threading.Event()
    answers: list[object] = []

    def slow(_: sqlite3.Connection) -> None:
        begun.set()
        go.wait()

    first = threading.Thread(target=journal._write, args=(slow,))

    def interrupt(frame: FrameType, event: str, _: object) -> None:
        if (event, frame.f_code.co_name) == ("call", "_settled"):
            go.set()
            first.join()  # it has handed the lead on

    def second() -> None:
        sys.setprofile(interrupt)
        answers.append(journal.save(a_file()).name)

    first.start()
    begun.wait()
    in_threads(second)
    assert answers == ["a.jsonl"]
    journal.save(a_file("b.jsonl"))


def test_a_commit_that_is_broken_off_hangs_nobody(journal: SqliteJournal) -> None:
    """If the thread that commits for others is ended, all are told so, nothing is written, and it goes on."""
    ends: list[BaseException] = []

    def end(_: sqlite3.Connection) -> None:
        raise SystemExit

    def noted(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except (JournalError, SystemExit) as error:
                ends.append(error)

        return run

    works = (lambda: journal.save(a_file("a")), lambda: journal.save(a_file("b")), lambda: journal._write(end))
    with committed_together(journal, *map(noted, works)):
        pass
    assert sorted(map(repr, ends)) == ["JournalError('the commit was broken off')"] * 2 + ["SystemExit()"]
    assert journal.under_way() == []
    journal.save(a_file())
    assert len(journal.under_way()) == 1


def test_closing_while_many_write_loses_nothing(folder: Path) -> None:
    """Whoever was told that his row is durable finds it again; all others are told that it is too late."""
    saved: list[Delivery] = []
    late: list[JournalError] = []
    journal = SqliteJournal(folder, stamp=STAMP)

    def work(worker: int) -> None:
        try:
            for number in range(100_000):
                saved.append(journal.save(a_file(f"{worker}-{number}")))  # noqa: PERF401 - all append to it
        except JournalError as error:
            late.append(error)

    def close() -> None:
        wait_for(lambda: len(saved) > 50)
        journal.close()
        journal.close()

    in_threads(close, *(lambda worker=worker: work(worker) for worker in range(8)))
    assert [str(error) for error in late] == [f"the journal in {folder} is closed"] * 8
    with pytest.raises(JournalError):
        journal.find(INBOX, "0-0")
    with opened(folder) as again:
        assert sorted(again.under_way(), key=lambda d: d.row or 0) == sorted(saved, key=lambda d: d.row or 0)


@needs_root
def test_a_disk_that_fills_up_under_many_writers_tells_each_the_truth(tmp_path: Path) -> None:
    """Rows too big for the room left are refused, each to its own writer; what was taken is there."""
    saved: list[Delivery] = []
    refused: list[OSError] = []
    with tmpfs(tmp_path / "state", "2m") as folder:
        with opened(folder) as journal:

            def work(worker: int) -> None:
                for number in range(20):
                    big = a_file(f"{worker}-{number}", report={"detail": "x" * 20_000 * (worker % 2)})
                    try:
                        saved.append(journal.save(big))
                    except OSError as error:
                        refused.append(error)

            in_threads(*(lambda worker=worker: work(worker) for worker in range(8)))
            assert {error.errno for error in refused} == {errno.ENOSPC}
            assert sum(known.report == {"detail": ""} for known in saved) > 0
            assert sorted(known.name for known in journal.under_way()) == sorted(known.name for known in saved)
            assert all(journal.find(INBOX, known.name) == known for known in saved)
        with opened(folder) as again:
            assert sorted(known.row or 0 for known in again.under_way()) == sorted(d.row or 0 for d in saved)


# What costs nothing.


def test_a_file_that_was_never_tried_is_not_looked_for(folder: Path) -> None:
    """Which files have an open row is known without the database: most have none."""
    with opened(folder) as journal:
        tried = journal.save(a_file("tried", State.WAITING, remote_name="x"))
        ended = journal.save(a_file("ended"))
        journal.save(replace(ended, state=State.DONE, finished_at=1.0))
        journal.save(replace(ended, row=None, state=State.FAILED, finished_at=2.0, file_id="file-orphan"))
        moved = journal.save(replace(journal.save(a_file("moved")), inbox="/srv/elsewhere"))
        journal.forget(journal.save(a_file("forgotten")))
        with pytest.raises(AttemptOpenError):
            journal.save(a_file("refused", remote_name="moved"))
        nobodys = replace(tried, row=None, state=State.FAILED, finished_at=3.0, file_id="file-nobodys")
        journal.save(nobodys)  # of the same name, and finished from the beginning
    with opened(folder) as journal:
        unknown = ["never", "ended", "moved", "forgotten", "refused"]
        assert traced(journal, *(lambda n=n: journal.find(INBOX, n) for n in unknown)) == []
        assert [journal.find(INBOX, name) for name in unknown] == [None] * 5
        assert journal.find(INBOX, "tried") == tried
        assert journal.find("/srv/elsewhere", "moved") == moved


def test_the_open_names_follow_what_is_committed(journal: SqliteJournal) -> None:
    """A name is open from its commit on, through every change of its row, and only as long as that is open."""
    known = journal.save(a_file())
    assert journal.find(INBOX, "a.jsonl") == known
    known = journal.save(replace(known, state=State.UNKNOWN))
    assert journal.find(INBOX, "a.jsonl") == known
    moved = journal.save(replace(known, inbox="/srv/elsewhere"))
    assert journal.find(INBOX, "a.jsonl") is None
    assert journal.find("/srv/elsewhere", "a.jsonl") == moved
    done = journal.save(replace(moved, state=State.DONE, finished_at=1.0))
    assert traced(journal, lambda: journal.find("/srv/elsewhere", "a.jsonl")) == []
    again = journal.save(replace(a_file(), inbox="/srv/elsewhere"))
    journal.save(done)  # its end is written again: that is not the end of the next of its name
    assert journal.find("/srv/elsewhere", "a.jsonl") == again
    journal.forget(done)
    assert journal.find("/srv/elsewhere", "a.jsonl") == again
    journal.forget(again)
    names = ((INBOX, "a.jsonl"), ("/srv/elsewhere", "a.jsonl"))
    assert traced(journal, *(partial(journal.find, *name) for name in names)) == []


def test_who_only_asks_writes_nothing(folder: Path, journal: SqliteJournal) -> None:
    """Nothing reaches the database's log, so that there is nothing to be synced."""
    journal.save(FULL)
    journal.saw_folder(INBOX)
    before = (folder / "journal.sqlite3-wal").read_bytes()
    assert journal.find(INBOX, "a.jsonl")
    assert journal.known(TARGET, ["file-x"])
    assert journal.newest(TARGET)
    assert journal.folder_seen(INBOX)
    assert journal.under_way()
    journal.saw_folder(INBOX)
    assert (folder / "journal.sqlite3-wal").read_bytes() == before
    journal.save(a_file("b.jsonl"))
    assert (folder / "journal.sqlite3-wal").read_bytes() != before


def test_each_step_of_a_delivery_writes_what_it_changes(journal: SqliteJournal) -> None:
    """One statement puts the row in; a later one names what changed, so that the other indexes rest."""
    rows: list[Delivery] = []

    def step(**facts: object) -> Callable[[], None]:
        return lambda: rows.append(journal.save(replace(rows[-1], **facts)))  # type: ignore[arg-type]

    statements = traced(
        journal,
        lambda: rows.append(journal.save(a_file())),
        step(state=State.ACCEPTED, answer={"data": {"id": "file-1"}}, file_id="file-1"),
        step(state=State.DONE, finished_at=5.0),
        step(),
    )
    changes = [text for text in statements if not text.startswith(("SELECT", "COMMIT"))]
    assert [text.split("(")[0].split("WHERE")[0] for text in changes[:1]] == ["INSERT INTO delivery "]
    sets = [text.partition(" SET ")[2].partition(" WHERE ")[0] for text in changes[1:]]
    assert [[part.split(" = ")[0] for part in text.split(", ")] for text in sets] == [
        ["state", "file_id", "facts"],
        ["state", "finished_at"],
    ]


def test_rows_that_hold_their_columns_twice_are_understood(folder: Path) -> None:
    """The first journals had what stands in a column in `facts` as well; they are opened as they are."""
    with opened(folder) as journal:
        saved = journal.save(FULL)
    facts = {name: getattr(FULL, name) for name in FULL.__slots__ if name != "row"}
    with sqlite3.connect(folder / "journal.sqlite3") as database:
        database.execute("UPDATE delivery SET facts = ?", (json.dumps(facts),))
    database.close()
    with opened(folder) as journal:
        assert journal.set_aside is None
        assert journal.find(INBOX, "a.jsonl") == saved
        later = journal.save(replace(saved, state=State.DONE, finished_at=9.0))
        assert journal.under_way() == []
        assert journal._ask("SELECT facts FROM delivery", ()) != [(json.dumps(facts),)]
    assert glance(folder).last_done == later


def test_a_second_row_for_a_file_under_way_is_refused_alone(journal: SqliteJournal) -> None:
    """A bug that would give one file two open rows is told to its own caller; the journal goes on."""
    journal.save(a_file())
    outcomes: list[object] = []

    def twice() -> None:
        try:
            journal.save(a_file(remote_name="x"))
        except Exception as error:  # noqa: BLE001
            outcomes.append(error)

    in_threads(twice, lambda: outcomes.append(journal.save(a_file("b.jsonl"))))
    assert sorted(isinstance(outcome, Delivery) for outcome in outcomes) == [False, True]
    assert [known.name for known in journal.under_way()] == ["a.jsonl", "b.jsonl"]


def test_save_never_returns_for_a_row_that_is_gone(journal: SqliteJournal) -> None:
    """A row that was forgotten meanwhile is written anew: what `save` returned for is there."""
    saved = journal.save(a_file())
    journal.forget(saved)
    again = journal.save(replace(saved, state=State.ACCEPTED))
    assert journal.find(INBOX, "a.jsonl") == again


def test_what_is_forgotten_is_gone(journal: SqliteJournal) -> None:
    """Forgetting a row frees its name and its remote name."""
    journal.forget(journal.save(a_file()))
    assert journal.under_way() == []
    journal.save(a_file("other", remote_name="a.jsonl"))


def test_old_history_is_pruned_and_nothing_else(journal: SqliteJournal) -> None:
    """Only files finished before the given time go; those under way stay however old they are."""
    journal.save(a_file("old", State.DONE, file_id="file-1", finished_at=10.0))
    journal.save(a_file("new", State.FAILED, file_id="file-2", finished_at=20.0))
    journal.save(a_file("open", first_attempt_at=1.0))
    journal.prune(before=20.0)
    assert journal.known(TARGET, ["file-1", "file-2"]) == {"file-2"}
    assert [known.name for known in journal.under_way()] == ["open"]


def test_folders_are_remembered(folder: Path) -> None:
    """A folder that was there once is known for good, whatever bytes its path has."""
    path = os.fsdecode(b"/srv/\xffdone")
    with opened(folder) as journal:
        assert not journal.folder_seen(path)
        journal.saw_folder(path)
        journal.saw_folder(path)
    with opened(folder) as journal:
        assert journal.folder_seen(path)
        assert not journal.folder_seen("/srv")


# Who may use it.


def test_everything_is_private(folder: Path) -> None:
    """The folder is 0700 and all that lies in it 0600, whatever the umask; also while it is in use."""
    before = os.umask(0)
    try:
        with opened(folder) as journal:
            journal.save(a_file())
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600}, modes


OPENS = (
    "import sys; from pathlib import Path; from sfwatch.journal import *\n"
    "try: journal = SqliteJournal(Path(sys.argv[1]), stamp='x')\n"
    "except StateInUseError as error: print(error); sys.exit(3)\n"
)


def _process(folder: Path, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPENS + script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_second_daemon_is_refused(folder: Path, journal: SqliteJournal) -> None:
    """Another process gets a clear error that names the folder, and the first goes on undisturbed."""
    with _process(folder, "print('got in')") as other:
        said, _ = other.communicate()
    assert other.returncode == 3
    assert str(folder) in said
    assert "state_dir" in said
    with pytest.raises(StateInUseError):
        SqliteJournal(folder, stamp=STAMP)
    journal.save(a_file())


def test_the_lock_dies_with_its_holder(folder: Path) -> None:
    """After `kill -9` the next daemon starts at once, and finds what was saved."""
    script = "journal.save(Delivery('/srv/inbox', 'a', State.SENDING, 1, 2, 3, 4))\n"
    script += "print('saved', flush=True); input()"
    with _process(folder, script) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "saved\n"
        with pytest.raises(StateInUseError):
            SqliteJournal(folder, stamp=STAMP)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with opened(folder) as journal:
            assert [known.name for known in journal.under_way()] == ["a"]


def test_closing_lets_go_of_the_folder(folder: Path) -> None:
    """Once closed, the journal holds neither lock nor descriptor nor thread, and the next may open."""
    with opened(folder) as journal:
        journal.save(a_file())
    with opened(folder) as journal:
        assert len(journal.under_way()) == 1


def test_a_worker_that_comes_too_late_is_told(folder: Path) -> None:
    """A worker that saves after the journal was closed gets an error; it must not wait for ever."""
    with opened(folder) as journal:
        pass
    outcomes: list[object] = []

    def late() -> None:
        try:
            journal.save(a_file())
        except JournalError as error:
            outcomes.append(error)

    thread = threading.Thread(target=late, daemon=True)
    thread.start()
    thread.join(5)
    assert len(outcomes) == 1


# A journal that can't be read.


def _begun(folder: Path, files: int = 40) -> str:
    with opened(folder) as journal:
        for number in range(files):
            journal.save(a_file(f"{number}.jsonl", report={"detail": "filler " * 100}))
        return journal.instance


def _garbage(path: Path) -> None:
    path.write_bytes(b"this is no database at all\n" * 500)


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _bad_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xde\xad\xbe\xef" * 2048)


def _bad_text(path: Path) -> None:
    """One flipped bit in what a row says, which leaves the database's own structure whole."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'{"dev":1,', b'{"dev" 1,'))


def _bad_encoding(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"filler", b"fill\xff\xfe"))


def _lost_state(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b".jsonlsending", b".jsonlsendong"))


def _no_facts(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("UPDATE delivery SET facts = '[7]'")
    database.close()


def _no_tables(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE meta")
    database.close()


DAMAGE = (_garbage, _cut_off, _bad_page, _bad_text, _bad_encoding, _lost_state, _no_facts, _no_tables)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_set_aside(folder: Path, damage: Callable[[Path], None]) -> None:
    """It is kept under a telling name, a new one is begun, and the old instance's claims are doubtful."""
    former = _begun(folder)
    path = folder / "journal.sqlite3"
    damage(path)
    damaged = path.read_bytes()
    with opened(folder) as journal:
        aside = journal.set_aside
        assert aside is not None
        assert aside.reason == "damaged"
        assert Path(aside.path).name == f"journal.damaged-{STAMP}.sqlite3"
        assert Path(aside.path).read_bytes() == damaged
        assert aside.detail
        assert journal.under_way() == []
        assert journal.instance != former
        assert list(journal.former) == [former]
        journal.save(a_file())
    with opened(folder) as journal:
        assert journal.set_aside is None
        assert len(journal.under_way()) == 1
        assert list(journal.former) == [former]


@pytest.mark.parametrize("damage", [_garbage, _cut_off, _bad_text, _bad_encoding, _lost_state, _no_facts])
def test_who_only_reads_a_damaged_journal_is_told(folder: Path, damage: Callable[[Path], None]) -> None:
    """Rows that make no sense are no bug of whoever looks at them."""
    _begun(folder)
    damage(folder / "journal.sqlite3")
    with pytest.raises(JournalError):
        glance(folder)


def test_a_newer_journal_is_set_aside(folder: Path) -> None:
    """A journal of a later version is left as it is for that version, and says which it was."""
    _begun(folder)
    with sqlite3.connect(folder / "journal.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with opened(folder) as journal:
        assert journal.set_aside is not None
        assert journal.set_aside.reason == "newer"
        assert "99" in journal.set_aside.detail
        assert "journal.newer-" in journal.set_aside.path
        assert journal.under_way() == []


def test_two_journals_set_aside_in_one_second_are_both_kept(folder: Path) -> None:
    """What was set aside is somebody's evidence: a second one does not take its place."""
    for word in (b"one", b"two"):
        _begun(folder, 1)
        (folder / "journal.sqlite3").write_bytes(word * 1000)
        with opened(folder):
            pass
    kept = {path.read_bytes() for path in folder.glob("journal.damaged-*.sqlite3")}
    assert kept == {b"one" * 1000, b"two" * 1000}


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: os.truncate(path, 0)])
def test_a_lost_journal_makes_its_instance_a_former_one(folder: Path, lose: Callable[[Path], None]) -> None:
    """Without the journal nobody knows what became of the old claims; its own file still names it."""
    former = _begun(folder)
    lose(folder / "journal.sqlite3")
    with opened(folder) as journal:
        assert journal.instance != former
        assert list(journal.former) == [former]
    with opened(folder) as again:
        assert (again.instance, list(again.former)) == (journal.instance, [former])


def test_every_lost_journal_is_remembered(folder: Path) -> None:
    """Claims of an instance that was given up stay doubtful even if the next journal is lost, too."""
    first = _begun(folder, 1)
    (folder / "journal.sqlite3").unlink()
    second = _begun(folder, 1)
    assert second != first
    (folder / "journal.sqlite3").unlink()
    with opened(folder) as journal:
        assert second in journal.former


@pytest.mark.parametrize("content", [None, "", "../../etc\n", "zz\n", "\udcff"])
def test_the_journal_restores_its_instance(folder: Path, content: str | None) -> None:
    """The instance stands in the journal; its file beside it is for the day on which the journal is lost."""
    instance = _begun(folder, 1)
    file = folder / "instance"
    if content is None:
        file.unlink()
    else:
        file.write_text(content, errors="surrogateescape")
    with opened(folder) as journal:
        assert journal.instance == instance
        assert list(journal.former) == []
    assert file.read_text() == f"{instance}\n"


def test_a_link_in_place_of_the_journal_is_not_followed(folder: Path, tmp_path: Path) -> None:
    """Nobody makes us write into a file of his choice."""
    folder.mkdir(mode=0o700)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / "journal.sqlite3").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        SqliteJournal(folder, stamp=STAMP)
    (folder / "journal.sqlite3").unlink()
    assert victim.read_text() == "mine"
    with opened(folder):
        pass


def test_a_folder_that_cannot_be_opened_keeps_no_lock(folder: Path) -> None:
    """A start that failed for the disk's fault can be tried again in the same process."""
    folder.mkdir(mode=0o700)
    (folder / "journal.sqlite3").mkdir()
    with pytest.raises(OSError, match=r"journal\.sqlite3"):
        SqliteJournal(folder, stamp=STAMP)
    (folder / "journal.sqlite3").rmdir()
    with opened(folder):
        pass


# A disk that is full.


@needs_root
def test_a_full_disk_is_said_as_such_and_forgotten_when_it_has_room(tmp_path: Path) -> None:
    """`save` raises ENOSPC, what was saved before stays, and the next one works once there is room."""
    with tmpfs(tmp_path / "state", "400k") as folder, opened(folder) as journal:
        first = journal.save(a_file(report={"detail": "x" * 3000}))
        ballast = fill(folder)
        kept = _save_until_refused(journal, first)
        with pytest.raises(OSError, match=str(folder)) as refused:
            journal.save(replace(FULL, name="b.jsonl", report={"detail": "x" * 100_000}))
        assert refused.value.errno == errno.ENOSPC
        assert journal.find(INBOX, "a.jsonl") == kept
        ballast.unlink()
        last = journal.save(replace(kept, state=State.UNKNOWN))
        assert journal.under_way() == [last]
    # (the mount is gone, and the journal with it)


def _save_until_refused(journal: SqliteJournal, known: Delivery) -> Delivery:
    """Use up the pages that the log holds already; then every write needs a new one."""
    for attempts in range(200):
        try:
            known = journal.save(replace(known, attempts=attempts))
        except OSError:
            return known
    raise AssertionError("the disk was never full")


@needs_root
def test_a_full_disk_at_the_start_is_an_os_error(tmp_path: Path) -> None:
    """A state folder without room is the disk's fault: an OSError, no damaged journal set aside."""
    with tmpfs(tmp_path / "state", "64k") as folder:
        ballast = fill(folder)
        with pytest.raises(OSError, match=r".") as refused:
            SqliteJournal(folder, stamp=STAMP)
        assert refused.value.errno == errno.ENOSPC
        assert not list(folder.glob("journal.damaged*"))
        ballast.unlink()


def test_no_step_of_a_delivery_reads_through_the_history(journal: SqliteJournal) -> None:
    """Years of finished files must not make the next one dearer: each statement finds its rows by an index."""
    statements: list[str] = []
    journal._write(lambda database: database.set_trace_callback(statements.append))
    known = journal.save(a_file())
    journal.find(INBOX, known.name)
    known = journal.save(replace(known, state=State.ACCEPTED, file_id="file-1", answer={}))
    journal.known(TARGET, ["file-1"])
    journal.save(replace(known, state=State.DONE, finished_at=1.0))
    journal.under_way()
    journal.prune(0.0)
    journal._write(lambda database: database.set_trace_callback(None))
    asked = [text for text in statements if text.startswith(("SELECT", "DELETE", "UPDATE"))]
    assert len(asked) >= 8
    for text in asked:
        plan = journal._ask(f"EXPLAIN QUERY PLAN {text}", ())
        scans = [row[3] for row in plan if row[3].startswith("SCAN") and "INDEX" not in row[3]]
        assert [scan for scan in scans if "delivery" in scan] == [], text

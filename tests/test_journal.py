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
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from world import STAMP, fill, in_threads, needs_root, tmpfs, wait_for

from sfwatch.journal import (
    OPEN,
    Delivery,
    IdKnownError,
    JournalDamagedError,
    JournalError,
    KnownUpload,
    SqliteJournal,
    State,
    StateInUseError,
    glance,
)

INBOX = "/srv/inbox"
TARGET = "api.example (environment)"
ADDRESS = "api.example"
NAME = "0123456789abcdef"
OTHER = "fedcba9876543210"


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


def an_answer(name: str, file_id: str | None, **facts: object) -> Delivery:
    facts = {"answer": {"data": {}, "recovered": False}, **facts}
    return a_file(name, State.ACCEPTED, file_id=file_id, **facts)


def database(folder: Path) -> closing[sqlite3.Connection]:
    return closing(sqlite3.connect(folder / "journal.sqlite3", isolation_level=None))


@contextmanager
def opened(folder: Path, **more: Path) -> Iterator[SqliteJournal]:
    journal = SqliteJournal(folder, stamp=STAMP, **more)
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
    claims="0123456789abcdef-012345",
    tag="0123456789ab",
    unproved=2,
    resends=1,
    resend_request="r-1",
    first_sent=4,
    last_sent=6,
    accepted=9,
    served_s=12.5,
    refusals=2,
    refused_words="400 bad",
    refused_after=3,
    suspicions=1,
    suspected_after=2,
    answer={"data": {"id": "file-x", "bytes": 3, "deep": [1, None, "é\u2028"]}, "same_as": None},
    file_id="file-x",
    report={"reason": "refused", "findings": [{"line": 1}]},
    marker=".ok",
    target_name="a.20260101T000000Z.jsonl",
)


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
        assert journal.under_way() == [replace(FULL, row=1)]
        assert journal.find("/srv/other", "a.jsonl") is None
        assert journal.save(a_file("b")).last_sent == 10


def test_a_row_is_written_over_as_a_whole(journal: SqliteJournal) -> None:
    """Saving a row again replaces all of it, and finishing it makes the name free for the next file."""
    first = journal.save(a_file())
    later = journal.save(replace(first, state=State.UNKNOWN, attempts=2, unproved=1))
    assert later.row == first.row
    assert journal.find(INBOX, "a.jsonl") == later
    journal.save(replace(later, state=State.DONE, finished_at=5.0))
    assert journal.find(INBOX, "a.jsonl") is None
    assert journal.under_way() == []
    assert journal.save(a_file()).row != first.row


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


def test_a_file_that_waits_is_replaced_by_another_of_its_name(journal: SqliteJournal) -> None:
    """What was known of a file that went back does not stand in the way of the next one of its name."""
    journal.save(a_file(state=State.WAITING, attempts=9))
    fresh = journal.save(a_file(state=State.SENDING, ino=77))
    assert journal.under_way() == [fresh]


def test_an_id_belongs_to_one_upload(journal: SqliteJournal) -> None:
    """An id that is known at an address is never given to a second file there, whatever the key."""
    journal.save(a_file(state=State.DONE, file_id="file-1", finished_at=1.0))
    second = journal.save(a_file("b.jsonl"))
    for target in (TARGET, f"{ADDRESS} (file /key)"):
        with pytest.raises(IdKnownError):
            journal.save(replace(second, state=State.ACCEPTED, file_id="file-1", target=target))
    assert journal.find(INBOX, "b.jsonl") == second
    journal.save(replace(second, state=State.ACCEPTED, file_id="file-1", target="another"))


def test_a_refused_id_leaves_what_the_row_would_have_replaced(journal: SqliteJournal) -> None:
    """A request that is refused has changed nothing, though it had begun to."""
    journal.save(a_file("done", State.DONE, file_id="file-1", finished_at=1.0))
    waiting = journal.save(a_file(state=State.WAITING))
    with pytest.raises(IdKnownError):
        journal.save(an_answer("a.jsonl", "file-1"))
    assert journal.find(INBOX, "a.jsonl") == waiting


def same_as(known: Delivery) -> object:
    assert known.answer is not None
    return known.answer["same_as"]


def test_an_answer_is_compared_once(journal: SqliteJournal) -> None:
    """`same_as` is an earlier upload of the same bytes to this target; later writes leave it as it is."""
    first = journal.save(an_answer("a", "file-1"))
    second = journal.save(an_answer("b", "file-2"))
    assert (same_as(first), same_as(second)) == (None, "file-1")
    for known in (first, second):
        assert journal.save(replace(known, target_name="x")) == replace(known, target_name="x")
        assert journal.find(INBOX, known.name) == replace(known, target_name="x")
    again = an_answer("c", "file-1")
    with pytest.raises(IdKnownError):  # a service may answer with the id that it gave to these bytes before
        journal.save(again)
    assert same_as(journal.save(replace(again, file_id=None, sha256="cd" * 32))) is None
    assert same_as(journal.save(an_answer("d", "file-4", target="another"))) is None
    assert same_as(journal.save(replace(again, name="e", file_id=None))) == "file-2"


# Numbers, and what is asked of the history.


def test_each_beginning_and_each_acceptance_has_its_number(folder: Path) -> None:
    """One counter numbers them in their order, also across a restart; other steps take none."""
    with opened(folder) as journal:
        a = journal.save(a_file("a"))
        b = journal.save(a_file("b"))
        assert [(known.first_sent, known.last_sent) for known in (a, b)] == [(1, 1), (2, 2)]
        assert journal.save(replace(a, attempts=2)) == replace(a, attempts=2)
        a = journal.save(replace(a, state=State.UNKNOWN))
        a = journal.save(replace(a, state=State.SENDING))
        assert (a.first_sent, a.last_sent) == (1, 3)
        waiting = journal.save(replace(b, state=State.WAITING))
        assert (waiting.first_sent, waiting.last_sent, waiting.accepted) == (2, 2, None)
    with opened(folder) as journal:
        a = journal.save(replace(a, state=State.ACCEPTED))
        assert (a.first_sent, a.last_sent, a.accepted) == (1, 3, 4)
        assert journal.save(replace(a, target_name="x")).accepted == 4
        assert journal.save(replace(a, state=State.DONE, finished_at=1.0)).accepted == 4
        orphan = journal.save(replace(b, row=None, state=State.ORPHAN, finished_at=1.0, file_id="file-o"))
        assert orphan.accepted is None
        b = journal.save(replace(waiting, state=State.SENDING))
        assert (b.first_sent, b.last_sent) == (2, 5)


def test_known_ids_are_those_of_the_address(journal: SqliteJournal) -> None:
    """An id is known with whatever key it was uploaded, as two may belong to one account, and in any state."""
    assert not journal.knows_any(ADDRESS)
    orphan = a_file("o", State.ORPHAN, file_id="file-o", finished_at=1.0, tag="0123456789ab", first_sent=7)
    orphan = journal.save(orphan)
    assert not journal.knows_any(ADDRESS)
    key = f"{ADDRESS} (file /key)"
    a = journal.save(an_answer("a", "file-a", target=key))
    journal.save(an_answer("b", "file-b", target="another"))
    assert journal.known(ADDRESS, ["file-a", "file-b", "file-o", "file-x", "'"]) == {
        "file-a": KnownUpload(a.row or 0, key, None, None, 1),
        "file-o": KnownUpload(orphan.row or 0, TARGET, "0123456789ab", 7, None),
    }
    assert journal.known(ADDRESS, []) == {}
    assert (journal.knows_any(ADDRESS), journal.knows_any("nobody")) == (True, False)


def test_what_was_accepted_at_a_target(journal: SqliteJournal) -> None:
    """The last before a number, the last that was answered, the largest; other keys' uploads do not count."""
    assert (journal.accepted_before(TARGET, 9), journal.last_accepted(TARGET)) == (None, 0)
    assert journal.largest_accepted(TARGET) == 0
    journal.save(an_answer("a", "file-1", size=70))  # 1
    journal.save(an_answer("b", "file-2", target=f"{ADDRESS} (file /key)", size=900))  # 2
    known = journal.save(an_answer("c", "file-3"))  # 3
    journal.save(replace(known, state=State.DONE, finished_at=1.0))
    journal.save(an_answer("d", None))  # 4: its id is another row's
    journal.save(an_answer("e", "file-5", answer={"recovered": True}))  # 5
    journal.save(a_file("f", size=1000))
    before = [journal.accepted_before(TARGET, number) for number in range(7)]
    assert before == [None, "file-1", "file-1", "file-3", "file-3", "file-5", "file-5"]
    assert journal.last_accepted(TARGET) == 4
    assert journal.largest_accepted(TARGET) == 70


def test_the_newest_finished_file_of_a_tag(journal: SqliteJournal) -> None:
    """Open rows do not count, nor do orphans, which are no file's."""
    tag = "0123456789ab"
    assert journal.finished(tag) is None
    journal.save(a_file(state=State.FAILED, finished_at=9.0, tag=tag))
    newest = journal.save(a_file(state=State.DONE, finished_at=3.0, tag=tag))
    journal.save(a_file(state=State.ORPHAN, finished_at=9.0, tag=tag))
    journal.save(a_file(tag=tag))
    journal.save(a_file("b", State.DONE, finished_at=9.0, tag="f" * 12))
    assert journal.finished(tag) == newest


def test_a_service_that_changes_names_is_remembered(folder: Path) -> None:
    """For its address, until it is seen to keep one."""
    with opened(folder) as journal:
        assert journal.names_kept(ADDRESS)
        journal.note_names(ADDRESS, kept=True)
        for _ in range(2):
            journal.note_names(ADDRESS, kept=False)
    with opened(folder) as journal:
        assert (journal.names_kept(ADDRESS), journal.names_kept("other")) == (False, True)
        journal.note_names(ADDRESS, kept=True)
        assert journal.names_kept(ADDRESS)


# One thread, and many who wait for it.


@contextmanager
def committed_together(journal: SqliteJournal, *works: Callable[[], object]) -> Iterator[None]:
    """The journal's thread is kept busy until all these wait for it."""
    go = threading.Event()
    threads = [threading.Thread(target=journal.call, args=(go.wait,))]
    threads += [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
        if thread is threads[0]:
            wait_for(journal._requests.empty)
    wait_for(lambda: journal._requests.qsize() == len(works))
    yield
    go.set()
    for thread in threads:
        thread.join()


def traced(journal: SqliteJournal, *works: Callable[[], object]) -> list[str]:
    """Return the statements that the database is given for these, one work after the other."""
    statements: list[str] = []
    journal._ask(lambda database: database.set_trace_callback(statements.append), beside=True)
    for work in works:
        work()
    journal._ask(lambda database: database.set_trace_callback(None), beside=True)
    return [text for text in statements if not text.startswith(("BEGIN", "SAVEPOINT", "RELEASE", "ROLLBACK"))]


def test_what_comes_while_the_disk_is_busy_is_committed_together(journal: SqliteJournal) -> None:
    """Fifteen that wait cost one commit, not fifteen; a bad one among them is refused alone."""
    journal.save(a_file("done", State.DONE, file_id="file-1", finished_at=1.0))
    journal.save(a_file("open"))
    outcomes: list[str] = []

    def saving(delivery: Delivery) -> Callable[[], None]:
        def save() -> None:
            try:
                outcomes.append(journal.save(delivery).name)
            except (IdKnownError, JournalError) as error:
                outcomes.append(type(error).__name__)

        return save

    good = [f"good-{number}" for number in range(15)]
    wanted = [a_file(name) for name in good]
    wanted[3:3] = [a_file("bad", State.ACCEPTED, file_id="file-1"), a_file("open")]

    def all_at_once() -> None:
        with committed_together(journal, *map(saving, wanted)):
            pass

    assert traced(journal, all_at_once).count("COMMIT") == 1
    assert sorted(outcomes) == sorted([*good, "IdKnownError", "JournalError"])
    assert {known.name for known in journal.under_way()} == {"open", *good}


def test_a_request_that_breaks_the_transaction_fails_alone(journal: SqliteJournal) -> None:
    """What SQLite itself refuses undoes all; the others are then done one by one."""
    failed: list[Exception] = []

    def broken() -> None:
        try:
            journal._execute("SELECT * FROM nothing")
        except JournalDamagedError as error:
            failed.append(error)

    with committed_together(
        journal, lambda: journal.save(a_file("a")), broken, lambda: journal.save(a_file("b"))
    ):
        pass
    assert len(failed) == 1
    assert {known.name for known in journal.under_way()} == {"a", "b"}


def test_one_thread_does_all_that_touches_the_state_folder(folder: Path, journal: SqliteJournal) -> None:
    """Others' work there is done by it as well, and its errors are theirs."""
    threads = {journal.call(threading.get_ident), journal._ask(lambda _: threading.get_ident())}
    assert threads == {journal._thread.ident}
    with pytest.raises(FileNotFoundError):
        journal.call((folder / "missing").read_text)
    space = os.statvfs(folder)
    assert abs(journal.free_bytes() - space.f_bavail * space.f_frsize) < 2**30


def test_a_bug_in_the_thread_leaves_nobody_waiting(folder: Path) -> None:
    """All who wait and all who come later are told, nothing is half written, and the folder is free."""
    told: list[BaseException | None] = []

    def end() -> None:
        raise SystemExit("a bug")

    def asking(work: Callable[[], object]) -> Callable[[], None]:
        def ask() -> None:
            try:
                work()
            except JournalDamagedError as error:
                told.append(error.__cause__)

        return ask

    with opened(folder) as journal:
        works = (
            lambda: journal.save(a_file("a")),
            lambda: journal.call(end),
            lambda: journal.save(a_file("b")),
        )
        with committed_together(journal, *map(asking, works)):
            pass
        asking(journal.under_way)()
        assert [repr(cause) for cause in told] == ["SystemExit('a bug')"] * 4
    with opened(folder) as journal:
        assert journal.under_way() == []


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


def test_who_only_asks_writes_nothing(folder: Path, journal: SqliteJournal) -> None:
    """Nothing reaches the database's log, so that there is nothing to be synced."""
    journal.save(FULL)
    journal.saw_folder(INBOX)
    before = (folder / "journal.sqlite3-wal").read_bytes()
    assert journal.find(INBOX, "a.jsonl")
    assert journal.known(ADDRESS, ["file-x"])
    assert journal.last_accepted(TARGET)
    journal.note_names(ADDRESS, kept=True)
    assert journal.folder_seen(INBOX)
    assert journal.under_way()
    journal.saw_folder(INBOX)
    assert (folder / "journal.sqlite3-wal").read_bytes() == before
    journal.save(a_file("b.jsonl"))
    assert (folder / "journal.sqlite3-wal").read_bytes() != before


def test_save_never_returns_for_a_row_that_is_gone(journal: SqliteJournal) -> None:
    """A row that was forgotten meanwhile is written anew: what `save` returned for is there."""
    saved = journal.save(a_file())
    journal.forget(saved)
    assert journal.under_way() == []
    again = journal.save(replace(saved, state=State.ACCEPTED))
    assert journal.find(INBOX, "a.jsonl") == again


def test_old_history_is_pruned_and_nothing_else(journal: SqliteJournal) -> None:
    """Only files finished before the given time go; those under way stay however old they are."""
    journal.save(a_file("old", State.DONE, file_id="file-1", finished_at=10.0))
    journal.save(a_file("new", State.FAILED, file_id="file-2", finished_at=20.0))
    journal.save(a_file("open"))
    journal.prune(before=20.0)
    assert list(journal.known(ADDRESS, ["file-1", "file-2"])) == ["file-2"]
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


def test_a_worker_that_comes_too_late_is_told(folder: Path) -> None:
    """Who asks a closed journal for anything gets an error; closing it again is no matter."""
    with opened(folder) as journal:
        pass
    journal.close()
    for ask in (lambda: journal.save(a_file()), journal.under_way, journal.free_bytes):
        with pytest.raises(JournalError, match="closed"):
            ask()


# A journal that can't be read.


def _begun(folder: Path, files: int = 40) -> tuple[str, str]:
    """Return the instance, and the id of the journal."""
    with opened(folder) as journal:
        for number in range(files):
            journal.save(a_file(f"{number}.jsonl", report={"detail": "filler " * 100}))
        return journal.instance, journal.id


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
    path.write_bytes(content.replace(b'"dev":1,', b'"dev" 1,'))


def _bad_encoding(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"filler", b"fill\xff\xfe"))


def _lost_state(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b".jsonlsending", b".jsonlsendong"))


def _no_facts(path: Path) -> None:
    with database(path.parent) as damaged:
        damaged.execute("UPDATE delivery SET facts = '[7]'")


def _no_tables(path: Path) -> None:
    with database(path.parent) as damaged:
        damaged.execute("DROP TABLE meta")


DAMAGE = (_garbage, _cut_off, _bad_page, _bad_text, _bad_encoding, _lost_state, _no_facts, _no_tables)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_journal_is_set_aside(folder: Path, damage: Callable[[Path], None]) -> None:
    """It is kept under a telling name, and a new one is begun, which says that it is another."""
    instance, name = _begun(folder)
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
        assert (journal.instance, list(journal.former)) == (instance, [])
        assert journal.id != name
        journal.save(a_file())
    with opened(folder) as journal:
        assert journal.set_aside is None
        assert len(journal.under_way()) == 1


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
    with database(folder) as newer:
        newer.execute("PRAGMA user_version = 99")
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
def test_a_lost_journal_is_another_one_of_the_same_instance(folder: Path, lose: Callable[[Path], None]) -> None:
    """The claims folders are ours still; its id says that it is not what they began with."""
    instance, name = _begun(folder)
    lose(folder / "journal.sqlite3")
    with opened(folder) as journal:
        assert (journal.instance, list(journal.former)) == (instance, [])
        assert journal.id != name
    with opened(folder) as again:
        assert (again.instance, again.id) == (instance, journal.id)


# Which state folder, on which machine.


@pytest.fixture(name="machine_id")
def _machine_id(tmp_path: Path) -> Path:
    file = tmp_path / "machine-id"
    file.write_text("a" * 32 + "\n")
    return file


def test_the_state_folder_on_another_machine_is_another_instance(folder: Path, machine_id: Path) -> None:
    """A copy must not take the original's claims for its own: the original may still run there."""
    with opened(folder, machine_id=machine_id) as first:
        said = json.loads((folder / "instance").read_text())
        assert said == {"instance": first.instance, "machine": "a" * 32, "former": []}
        assert first.machine == "a" * 32
    machine_id.write_text("b" * 32)
    for _ in range(2):
        with opened(folder, machine_id=machine_id) as second:
            assert (list(second.former), second.id) == ([], first.id)
    machine_id.write_text("c" * 32)
    with opened(folder, machine_id=machine_id) as third:
        assert list(third.former) == []
        assert len({first.instance, second.instance, third.instance}) == 3


@pytest.mark.parametrize("unknown", ["", "uninitialized\n"])
def test_a_machine_without_an_id_is_no_other_one(folder: Path, machine_id: Path, unknown: str) -> None:
    """Nothing is concluded from what is not known; the id is noted once there is one."""
    known = machine_id.read_text()
    machine_id.write_text(unknown)
    with opened(folder, machine_id=machine_id) as first:
        assert first.machine is None
        assert json.loads((folder / "instance").read_text())["machine"] is None
    machine_id.write_text(known)
    with opened(folder, machine_id=machine_id) as second:
        assert (second.instance, second.machine) == (first.instance, "a" * 32)
    machine_id.unlink()
    with opened(folder, machine_id=machine_id) as third:
        assert third.instance == first.instance
    assert json.loads((folder / "instance").read_text())["machine"] == "a" * 32


def test_the_line_of_the_first_version_is_read(folder: Path, machine_id: Path) -> None:
    """It names the instance alone, which was of this machine."""
    folder.mkdir(mode=0o700)
    (folder / "instance").write_text(f"{NAME}\n")
    with opened(folder, machine_id=machine_id) as journal:
        assert journal.instance == NAME
    said = json.loads((folder / "instance").read_text())
    assert said == {"instance": NAME, "machine": "a" * 32, "former": []}


@pytest.mark.parametrize(
    "content",
    [
        *("", "../../etc\n", "zz\n", "\udcff", "{", "[]", "{}"),
        '{"instance": "../../etc", "machine": null, "former": []}',
        f'{{"instance": "{NAME}", "machine": null, "former": ["../x"]}}',
        f'{{"instance": "{NAME}", "machine": null, "former": null}}',
    ],
)
def test_a_file_that_names_no_instance_is_made_anew(folder: Path, content: str) -> None:
    """Folders are named by it, so that nothing else is taken for an instance."""
    _, name = _begun(folder, 1)
    (folder / "instance").write_text(content, errors="surrogateescape")
    with opened(folder) as journal:
        assert len(journal.instance) == 16
        assert journal.instance != NAME
        assert journal.id == name
    with opened(folder) as again:
        assert again.instance == journal.instance


# A journal of schema 1.

_SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE folder (path BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE delivery (
  id INTEGER PRIMARY KEY, inbox BLOB NOT NULL, name BLOB NOT NULL, state TEXT NOT NULL, target TEXT,
  remote_name TEXT, sha256 TEXT, file_id TEXT, finished_at REAL, facts TEXT NOT NULL
);
CREATE UNIQUE INDEX open_file ON delivery (inbox, name) WHERE finished_at IS NULL;
CREATE UNIQUE INDEX open_attempt ON delivery (target, remote_name) WHERE state IN ('sending', 'unknown');
CREATE UNIQUE INDEX file_id ON delivery (file_id, target) WHERE file_id IS NOT NULL;
CREATE INDEX same_bytes ON delivery (sha256) WHERE file_id IS NOT NULL;
CREATE INDEX finished ON delivery (finished_at) WHERE finished_at IS NOT NULL;
PRAGMA user_version = 1;
"""


def _of_schema_1(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    facts: dict[str, object] = {"dev": 1, "ino": 2, "size": 3, "mtime_ns": 4, "attempts": 2, "name": "a"}
    facts |= {"held_s": 1.5, "first_attempt_at": 9.0, "windows": []}
    lost = {**facts, "windows": [[1.0, 2.0], [3.0, 4.0]]}
    done = {**facts, "size": 70, "answer": {"data": {}, "recovered": False, "same_as": None}}
    found = {**done, "answer": {"data": {}, "recovered": True, "same_as": None}}
    key = f"{ADDRESS} (file /key)"
    rows = (
        (1, b"w\xff", "waiting", TARGET, None, None, facts),
        (2, b"s", "sending", TARGET, None, None, lost),
        (3, b"d", "done", TARGET, "file-1", 5.0, done),
        (4, b"d", "done", key, "file-1", 6.0, done),
        (5, b"r", "accepted", TARGET, "file-2", None, found),
        (6, b"o", "failed", TARGET, "file-o", 7.0, facts),
        (7, b"n", "failed", None, None, 8.0, facts),
    )
    with database(folder) as old:
        old.executescript(_SCHEMA_1)
        old.execute("INSERT INTO folder VALUES (?)", (INBOX.encode(),))
        old.execute("INSERT INTO meta VALUES ('instance', ?), ('former', ?)", (NAME, json.dumps([OTHER])))
        for row, name, state, target, file_id, finished_at, known in rows:
            values = (row, INBOX.encode(), name, state, target, None, "ab", file_id, finished_at)
            old.execute(f"INSERT INTO delivery VALUES ({'?,' * 9}?)", (*values, json.dumps(known)))


def test_a_journal_of_schema_1_is_brought_up_to_date(folder: Path, machine_id: Path) -> None:
    """Nothing that is still of use is lost; the places of its rows stand for the numbers that it had not."""
    _of_schema_1(folder)
    with pytest.raises(JournalError, match="schema 1"):
        glance(folder)
    with opened(folder, machine_id=machine_id) as journal:
        assert journal.set_aside is None
        assert (journal.id, journal.instance, list(journal.former)) == (NAME, NAME, [OTHER])
        assert journal.folder_seen(INBOX)
        waiting, sending, accepted = journal.under_way()
        expected = a_file(
            os.fsdecode(b"w\xff"), State.WAITING, row=1, attempts=2, sha256="ab", remote_name=None
        )
        assert waiting == expected
        sent = {"unproved": 2, "first_sent": 2, "last_sent": 2}
        assert sending == replace(expected, name="s", state=State.SENDING, row=2, **sent)  # type: ignore[arg-type]
        assert (accepted.accepted, accepted.file_id, accepted.first_sent) == (5, "file-2", None)
        assert {name: known.row for name, known in journal.known(ADDRESS, ["file-1", "file-2"]).items()} == {
            "file-1": 4,
            "file-2": 5,
        }
        assert journal.accepted_before(TARGET, 4) == "file-1"  # of the other key: row 3 has its id no more
        assert (journal.last_accepted(TARGET), journal.largest_accepted(TARGET)) == (3, 70)
        assert journal.save(a_file("new")).last_sent == 7
        again = journal.save(replace(sending, state=State.UNKNOWN))
    with opened(folder, machine_id=machine_id) as journal:
        assert (journal.id, journal.instance, list(journal.former)) == (NAME, NAME, [OTHER])
        assert again in journal.under_way()
    with database(folder) as now:
        assert now.execute("SELECT key, value FROM meta").fetchall() == [("id", NAME)]
        (facts,) = now.execute("SELECT facts FROM delivery WHERE id = 2").fetchone()
        assert not {"windows", "held_s", "first_attempt_at"} & set(json.loads(facts))
    last = glance(folder).last_failed
    assert last is not None
    assert last.name == "n"


def test_a_migration_that_fails_leaves_the_journal_as_it_was(folder: Path) -> None:
    """It is set aside unchanged where a row makes no sense; the instance goes on."""
    _of_schema_1(folder)
    with database(folder) as old:
        old.execute("UPDATE delivery SET facts = 'nonsense' WHERE id = 3")
    with opened(folder) as journal:
        assert journal.set_aside is not None
        assert (journal.instance, list(journal.former)) == (NAME, [OTHER])
        assert journal.id != NAME
    with closing(sqlite3.connect(journal.set_aside.path)) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
        assert kept.execute("SELECT count(*) FROM meta").fetchone() == (2,)


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

    def steps() -> None:
        known = journal.save(a_file())
        journal.find(INBOX, known.name)
        known = journal.save(replace(known, state=State.ACCEPTED, file_id="file-1", answer={}))
        journal.known(ADDRESS, ["file-1"])
        journal.knows_any(ADDRESS)
        journal.accepted_before(TARGET, 5)
        journal.last_accepted(TARGET)
        journal.largest_accepted(TARGET)
        journal.save(replace(known, state=State.DONE, finished_at=1.0))
        journal.finished("0123456789ab")
        journal.under_way()
        journal.prune(0.0)

    statements = traced(journal, steps)
    asked = [text for text in statements if text.startswith(("SELECT", "DELETE", "UPDATE"))]
    assert len(asked) >= 14
    for text in asked:
        plan = journal._select(f"EXPLAIN QUERY PLAN {text}")
        scans = [row[3] for row in plan if row[3].startswith("SCAN") and "INDEX" not in row[3]]
        assert [scan for scan in scans if "delivery" in scan] == [], text

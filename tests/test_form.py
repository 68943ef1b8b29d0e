"""The form of a file, as two foreign parsers read it, and what ends it before its end. No network."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from uploads import BIG, SMALL, Files, as_python_multipart_reads, as_werkzeug_reads, pattern

from sfwatch.form import BLOCK, SLICE_S, BrokenOff, Form, Pace, Reins
from sfwatch.verdict import remote_name

NO_REINS = Reins()


def form_of(
    fd: int,
    size: int | None = None,
    *,
    purpose: str = "batch",
    name: str = "requests.jsonl",
    reins: Reins = NO_REINS,
) -> Form:
    size = os.fstat(fd).st_size if size is None else size
    return Form(fd, size, purpose=purpose, remote_name=name, reins=reins)


def pour(form: Form, body: bytearray) -> None:
    for piece in form:
        body += piece


def taken_out(form: Form) -> tuple[bytes, bytes]:
    """What goes out: the head of a request that has this body, and the body."""
    body = bytearray()
    pour(form, body)
    return f"Content-Type: {form.content_type}\r\n\r\n".encode(), bytes(body)


def broken_off(form: Form) -> tuple[str, bytes]:
    """Why the form broke off, and what went out of it."""
    body = bytearray()
    with closing(form), pytest.raises(BrokenOff) as caught:
        pour(form, body)
    return str(caught.value), bytes(body)


# --- what goes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 4 * BLOCK, 9 * BLOCK, BIG])
def test_every_size_goes_out_whole(size: int, file_of: Files) -> None:
    """Whatever the size, the length is told before, and the digest is that of the very bytes."""
    form = form_of(file_of(size))
    assert (form.sent, form.sent_all, form.sha256) == (0, False, None)
    told = len(form)
    head, body = taken_out(form)
    assert len(body) == told
    assert as_werkzeug_reads(head, body) == ([("purpose", "batch")], "requests.jsonl", pattern(size))
    assert (form.sent, form.sent_all) == (size, True)
    assert form.sha256 == hashlib.sha256(pattern(size)).hexdigest()


NAMES = [
    b"plain.jsonl",
    b"with space.jsonl",
    b'quo"te.jsonl',
    b"back\\slash.jsonl",
    b"new\r\nline.jsonl",
    b'x.jsonl"\r\nX-Injected: 1\r\n\r\nbody',
    "请求 – ünïcode 🎉.jsonl".encode(),
    b"latin-\xe9.jsonl",
    "two\u2028lines\u0085.jsonl".encode(),
    "no\u00a0break\u200b.jsonl".encode(),
    b"percent%22;semi=colon;.jsonl",
    b"'single'.JSONL",
    b"tab\there.jsonl",
    b"x" * 255,
]


@pytest.mark.parametrize("raw", NAMES, ids=ascii)
def test_parsers_read_the_same_name(raw: bytes, file_of: Files) -> None:
    """Whatever a file is called, two foreign parsers read the name that we mean, and the same bytes."""
    name = remote_name(os.fsdecode(raw), tag=None)
    head, body = taken_out(form_of(file_of(SMALL), name=name))
    expected = ([("purpose", "batch")], name, SMALL)
    assert as_werkzeug_reads(head, body) == expected
    assert as_python_multipart_reads(head, body) == expected


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("form") / "small.jsonl"
    path.write_bytes(SMALL)
    with path.open("rb") as opened:
        yield opened.fileno()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(raw=st.binary(min_size=1, max_size=255).filter(lambda raw: b"\0" not in raw and b"/" not in raw))
def test_any_file_name_can_be_sent(raw: bytes, small: int) -> None:
    """No name that a file can have breaks the form."""
    name = remote_name(os.fsdecode(raw), tag=None)
    head, body = taken_out(form_of(small, name=name))
    expected = ([("purpose", "batch")], name, SMALL)
    assert as_werkzeug_reads(head, body) == expected
    assert as_python_multipart_reads(head, body) == expected


@pytest.mark.parametrize("bad", ['a"b', "a\r\nb", "a\\b", "a\nb", "a\x7fb", "a\udce9b", "a\0b"], ids=ascii)
def test_nothing_can_be_slipped_into_the_form(bad: str, small: int) -> None:
    """There is no form with a name or purpose that could end a header."""
    with pytest.raises(ValueError, match="does not fit"):
        form_of(small, name=bad)
    with pytest.raises(ValueError, match="does not fit"):
        form_of(small, purpose=bad)


def test_progress_is_told_block_by_block(file_of: Files) -> None:
    """The bytes that are out grow to the whole size, a block at a time."""
    told: list[int] = []
    taken_out(form_of(file_of(BIG), reins=Reins(progress=told.append)))
    assert told == [*range(BLOCK, BIG, BLOCK), BIG]


def test_waiting_for_a_turn_is_no_standstill(file_of: Files) -> None:
    """Under `max_rate` bytes wait on purpose: whoever looks is told so all the time."""
    moved: list[bool] = []
    pace = Pace(BLOCK / (4 * SLICE_S))
    taken_out(form_of(file_of(2 * BLOCK), reins=Reins(pace=pace, moved=lambda: moved.append(True))))
    assert len(moved) >= 3


def test_a_file_that_grows_is_sent_as_it_was(tmp_path: Path) -> None:
    """What is appended while the file goes out is left for the next time."""
    path = tmp_path / "growing.jsonl"
    path.write_bytes(pattern(BIG))
    with path.open("ab", buffering=0) as writer, path.open("rb") as reader:

        def grow(_sent: int) -> None:
            writer.write(b"more\n")

        form = form_of(reader.fileno(), reins=Reins(progress=grow))
        head, body = taken_out(form)
    assert path.stat().st_size > BIG
    assert as_werkzeug_reads(head, body)[2] == pattern(BIG)
    assert form.sha256 == hashlib.sha256(pattern(BIG)).hexdigest()


# --- what ends it before its end -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, BLOCK, 3 * BLOCK + 1])
def test_a_file_that_shrinks_is_broken_off(left: int, tmp_path: Path) -> None:
    """A file that became shorter is never padded, and never ends like a whole one."""
    path = tmp_path / "shrinking.jsonl"
    path.write_bytes(pattern(BIG))
    with path.open("rb") as reader:
        form = form_of(reader.fileno(), reins=Reins(progress=lambda _: os.truncate(path, left)))
        why, body = broken_off(form)
    assert why == "the file became shorter while it was sent"
    assert not body.endswith(b"--\r\n")
    assert (form.sent_all, form.sha256) == (False, None)


@pytest.mark.parametrize("size", [10, BLOCK, BIG])
def test_a_file_that_is_shorter_from_the_start(size: int, file_of: Files) -> None:
    """A size beyond the file's end is noticed, however small the file."""
    form = form_of(file_of(size), size + 1)
    assert broken_off(form)[0] == "the file became shorter while it was sent"
    assert not form.sent_all


@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_that_cannot_be_read(size: int, tmp_path: Path) -> None:
    """An error of the disk is told as one."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert broken_off(form_of(fd, size))[0] == "the file cannot be read: Is a directory"
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_stop_breaks_off_before_the_last_byte(size: int, file_of: Files) -> None:
    """Once stop says so no more of the file goes out."""
    form = form_of(file_of(size), reins=Reins(stop=lambda: True))
    why, body = broken_off(form)
    assert why == "the upload was broken off on request"
    assert not body.endswith(b"--\r\n")
    assert (form.sent, form.sent_all, form.sha256) == (0, False, None)


def test_stop_in_the_middle(file_of: Files) -> None:
    """The bytes that are out when stop comes are counted."""
    form = form_of(file_of(BIG), reins=Reins(stop=lambda: form.sent >= 2 * BLOCK))
    broken_off(form)
    assert (form.sent, form.sent_all) == (2 * BLOCK, False)


def test_stop_after_the_last_block_still_counts(file_of: Files) -> None:
    """The closing delimiter is held back as long as there is a reason not to send it."""
    form = form_of(file_of(BIG), reins=Reins(stop=lambda: form.sent == BIG))
    _, body = broken_off(form)
    assert not body.endswith(b"--\r\n")
    assert (form.sent, form.sent_all, form.sha256) == (BIG, False, None)


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_approval_comes_before_the_end(size: int, file_of: Files) -> None:
    """Who refuses the digest is sure that nobody has a whole form."""
    asked: list[str] = []

    def approve(sha256: str) -> bool:
        asked.append(sha256)
        return False

    form = form_of(file_of(size), reins=Reins(approve=approve))
    why, body = broken_off(form)
    assert why == "the file is not what it was when it was checked"
    assert asked == [hashlib.sha256(pattern(size)).hexdigest()]
    assert not form.sent_all
    assert not body.endswith(b"--\r\n")


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_approved_files_go_through(size: int, file_of: Files) -> None:
    """Approval is asked for once, and the approved digest is that of the form."""
    asked: list[str] = []

    def approve(sha256: str) -> bool:
        asked.append(sha256)
        return True

    form = form_of(file_of(size), reins=Reins(approve=approve))
    taken_out(form)
    assert form.sent_all
    assert asked == [form.sha256]


# --- pace ------------------------------------------------------------------------------------------------


def test_pace_spreads_bytes() -> None:
    """Each reservation waits for those before it; rest is not saved up."""
    now = [100.0]
    pace = Pace(1000, clock=lambda: now[0])
    assert [pace.reserve(500), pace.reserve(500), pace.reserve(1000)] == [0.0, 0.5, 1.0]
    now[0] = 101.0
    assert pace.reserve(0) == 1.0
    now[0] = 200.0
    assert [pace.reserve(1000), pace.reserve(1)] == [0.0, 1.0]


def test_pace_is_kept_and_can_be_stopped(file_of: Files) -> None:
    """A form that waits for its turn hears stop."""
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 6

    form = form_of(file_of(BIG), reins=Reins(pace=Pace(1000), stop=stop))
    assert broken_off(form)[0] == "the upload was broken off on request"
    assert form.sent == BLOCK

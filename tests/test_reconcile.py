"""Which listed entry is the upload whose answer was lost, and when an absence counts."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch.reconcile import (
    Absent,
    Found,
    Listed,
    Lost,
    NotYet,
    Undecidable,
    allowance_s,
    match,
    read_listing,
    skew_s,
)

LOST = Lost("a.jsonl", 806, 2, windows=((1000.0, 1010.0),), purpose="batch")
OURS = Listed("file-1", 806, 1005.0, "a.jsonl", "batch", 2, raw={})


def found(
    *listing: Listed,
    lost: Lost = LOST,
    limit: int = 10,
    smaller: tuple[int, int] | None = None,
    known: frozenset[str] = frozenset(),
    newest: str | None = None,
    allowance: float = 5.0,
) -> Found | Absent | NotYet | Undecidable:
    return match(
        lost,
        listing,
        limit=limit,
        smaller=smaller,
        known_ids=known,
        newest_known=newest,
        allowance_s=allowance,
    )


def other(number: int) -> Listed:
    return replace(OURS, id=f"other-{number}", filename=f"other-{number}.jsonl")


# ── matching ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "entry",
    [
        OURS,
        replace(OURS, line_count=None),
        replace(OURS, purpose=None),
        replace(OURS, created_at=995.0),
        replace(OURS, created_at=1015.0),
    ],
)
def test_what_agrees_is_ours(entry: Listed) -> None:
    """Name, size and time agree, and lines and purpose where they are told: adopted."""
    assert found(other(1), entry) == Found(entry, ())


@pytest.mark.parametrize(
    "entry",
    [
        replace(OURS, filename="b.jsonl"),
        replace(OURS, bytes=807),
        replace(OURS, line_count=3),
        replace(OURS, purpose="fine-tune"),
        replace(OURS, created_at=994.9),
        replace(OURS, created_at=1015.1),
    ],
)
def test_what_contradicts_is_not_ours(entry: Listed) -> None:
    """One thing that disagrees is enough: the file is absent."""
    assert found(entry) == Absent()


def test_lines_that_we_do_not_know_decide_nothing() -> None:
    """A file that was not counted may match any number of lines."""
    assert found(OURS, lost=replace(LOST, lines=None)) == Found(OURS, ())


def test_a_known_id_is_another_files() -> None:
    """An id that the journal knows was accepted for another file."""
    assert found(OURS, known=frozenset({"file-1"})) == Absent()


@pytest.mark.parametrize("created_at", [998.0, 1500.0, 2008.0])
def test_the_window_spans_all_attempts(created_at: float) -> None:
    """From the earliest start to the latest end: an early copy may be stored late."""
    lost = replace(LOST, windows=((2000.0, 2005.0), (1000.0, 1010.0)))
    assert found(replace(OURS, created_at=created_at), lost=lost) == Found(
        replace(OURS, created_at=created_at), ()
    )


def test_the_oldest_of_several_attempts_is_adopted() -> None:
    """Two attempts, two entries: the older is ours, the younger an orphan that is named."""
    younger = replace(OURS, id="file-0", created_at=1009.0)
    lost = replace(LOST, windows=(*LOST.windows, (1008.0, 1010.0)))
    assert found(younger, OURS, lost=lost) == Found(OURS, ("file-0",))


def test_more_entries_than_attempts_cannot_be_decided() -> None:
    """Somebody else sent the same name and size: no entry is surely ours."""
    younger = replace(OURS, id="file-0", created_at=1009.0)
    assert found(younger, OURS) == Undecidable(("file-1", "file-0"))


def test_an_id_listed_twice_is_one_entry() -> None:
    """A listing that changes while it is paged repeats entries."""
    assert found(OURS, OURS) == Found(OURS, ())


def test_a_match_in_a_full_listing_is_ours() -> None:
    """What a longer listing could show more of are orphans of ours."""
    assert found(OURS, limit=1) == Found(OURS, ())


# ── absence ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_listing_shows_an_absence() -> None:
    """Nothing listed, nothing known to be there: the file may be sent again."""
    assert found() == Absent()


def test_a_full_listing_shows_no_absence() -> None:
    """As many entries as asked for: the file may be behind them."""
    assert found(*map(other, range(10))) == NotYet("full")
    assert found(*map(other, range(11))) == NotYet("full")


def test_a_listing_that_does_not_grow_shows_no_absence() -> None:
    """The service gave ten of ten and ten of a hundred: it bounds listings by itself."""
    assert found(*map(other, range(10)), limit=100, smaller=(10, 10)) == NotYet("same_length")
    assert found(*map(other, range(11)), limit=100, smaller=(10, 10)) == Absent()
    assert found(*map(other, range(9)), limit=100, smaller=(10, 9)) == Absent()


def test_the_newest_known_upload_must_be_shown() -> None:
    """A listing that lags behind what was accepted before proves nothing."""
    assert found(other(1), newest="other-2") == NotYet("newest_missing")
    assert found(other(1), newest="other-1", known=frozenset({"other-1"})) == Absent()


@pytest.mark.parametrize(
    "entry",
    [
        replace(OURS, created_at=None),
        replace(OURS, bytes=None),
        replace(OURS, filename=None),
        replace(OURS, id=""),
    ],
)
def test_an_entry_that_tells_too_little_proves_nothing(entry: Listed) -> None:
    """It could be ours: it can't be adopted, and the file can't be called absent."""
    assert found(entry) == NotYet("unreadable_entry")


def test_an_entry_that_tells_little_but_disagrees_is_no_doubt() -> None:
    """Without a time, but of another size: surely not ours."""
    assert found(replace(OURS, created_at=None, bytes=1)) == Absent()


# ── properties ─────────────────────────────────────────────────────────────────────────────────────────────

entries = st.builds(
    Listed,
    id=st.sampled_from(["", "f1", "f2", "f3", "f4"]),
    bytes=st.sampled_from([806, 806, 807, None]),
    created_at=st.sampled_from([1000.0, 1005.0, 5000.0, None]),
    filename=st.sampled_from(["a.jsonl", "a.jsonl", "b.jsonl", None]),
    purpose=st.sampled_from(["batch", None]),
    line_count=st.sampled_from([2, 2, 3, None]),
    raw=st.just({}),
)
windows = st.lists(st.sampled_from([(1000.0, 1001.0), (1004.0, 1009.0)]), max_size=3).map(tuple)


@given(
    st.lists(entries, max_size=6),
    windows,
    st.integers(1, 8),
    st.none() | st.tuples(st.integers(1, 4), st.integers(0, 4)),
    st.frozensets(st.sampled_from(["f1", "f2", "f3"])),
    st.none() | st.sampled_from(["f1", "f2"]),
)
def test_whatever_is_listed(
    listing: list[Listed],
    spans: tuple[tuple[float, float], ...],
    limit: int,
    smaller: tuple[int, int] | None,
    known: frozenset[str],
    newest: str | None,
) -> None:
    """Only an unknown id that agrees is adopted; too many are undecided; absence needs a whole listing."""
    lost = replace(LOST, windows=spans)
    result = found(*listing, lost=lost, limit=limit, smaller=smaller, known=known, newest=newest)
    match result:
        case Found(entry, orphans):
            ids = {entry.id, *orphans}
            assert not ids & known
            assert len(ids) == 1 + len(orphans) <= len(spans)
            assert (entry.filename, entry.bytes) == ("a.jsonl", 806)
            assert entry.created_at is not None
        case Undecidable(candidates):
            assert len(set(candidates)) == len(candidates) > len(spans)
            assert not set(candidates) & known
        case Absent():
            assert len(listing) < limit
            assert newest is None or newest in {entry.id for entry in listing}
        case NotYet(reason):
            assert reason in {"full", "same_length", "newest_missing", "unreadable_entry"}


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────

RAW: dict[str, Any] = {
    "id": "file-1",
    "bytes": 806,
    "created_at": 1005,
    "filename": "a.jsonl",
    "purpose": "batch",
    "line_count": 2,
}


@pytest.mark.parametrize(
    "document", [{"code": 20000, "data": {"data": [RAW], "object": "file"}}, {"data": [RAW]}]
)
def test_both_shapes_of_a_listing_are_read(document: Any) -> None:
    """SiliconFlow wraps the list, OpenAI-compatible gateways do not."""
    assert read_listing(json.dumps(document).encode()) == (replace(OURS, raw=RAW),)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"created_at": None, "createdAt": 7}, "created_at", 7.0),
        ({"created_at": "1741777570"}, "created_at", 1741777570.0),
        ({"created_at": 7.5}, "created_at", 7.5),
        ({"created_at": "yesterday"}, "created_at", None),
        ({"created_at": True}, "created_at", None),
        ({"bytes": "806"}, "bytes", 806),
        ({"bytes": 806.0}, "bytes", 806),
        ({"bytes": None}, "bytes", None),
        ({"line_count": 0}, "line_count", None),
        ({"filename": 3}, "filename", None),
        ({"id": 3}, "id", ""),
    ],
)
def test_entries_are_read_with_care(change: dict[str, Any], field: str, value: object) -> None:
    """What makes no sense counts as not told; no lines yet counted is not told either."""
    listing = read_listing(json.dumps({"data": [{**RAW, **change}]}).encode())
    assert listing is not None
    assert getattr(listing[0], field) == value


def test_entries_that_are_none_count_in_the_length() -> None:
    """A full listing stays full, even if one of its entries can't be read."""
    listing = read_listing(json.dumps({"data": [RAW, None, "x", {}]}).encode())
    assert listing is not None
    assert [entry.id for entry in listing] == ["file-1", "", "", ""]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"data": {}}', b"<html>", b"\xff", b'{"data": ' + b"[" * 100_000]
)
def test_what_is_no_listing_is_none(body: bytes) -> None:
    """An unreadable listing is told apart from an empty one."""
    assert read_listing(body) is None
    assert read_listing(b'{"data": []}') == ()


@given(st.binary(max_size=100))
def test_reading_never_raises(body: bytes) -> None:
    """Whatever comes is a listing or is none."""
    assert read_listing(body) is None or isinstance(read_listing(body), tuple)


# ── clocks ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_skew_is_measured_by_the_date_header() -> None:
    """The service's clock less ours; None where it does not tell."""
    assert skew_s("Tue, 11 Mar 2025 09:30:26 GMT", wall=1_741_685_396.0) == 30.0
    assert skew_s(None, wall=0.0) is None
    assert skew_s("today", wall=0.0) is None


def test_allowance() -> None:
    """The skew and five seconds, or five minutes if it was not measured."""
    assert (allowance_s(-30.0), allowance_s(0.0), allowance_s(None)) == (35.0, 5.0, 300.0)

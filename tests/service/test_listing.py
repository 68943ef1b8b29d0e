"""What a listing proves: page by page, entry by entry."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch.service.listing import (
    ORDER_MIN,
    PAGES_MAX,
    Absent,
    Cursor,
    End,
    Entry,
    Found,
    Inconclusive,
    Lost,
    Page,
    Reading,
    Seen,
    SizeDiffers,
    Unproven,
    earliest_s,
    next_page,
    read,
    read_page,
    see,
)

TAG, OTHER = "0123456789ab", "ba9876543210"
LIMITS = (5, 20, 80)


@dataclass(frozen=True)
class Known:
    target: str = "t"
    tag: str | None = OTHER
    first_sent: int | None = 1
    accepted: int | None = 2


def page(ids: Sequence[str], has_more: bool | None = None) -> Page:  # noqa: FBT001
    return Page(tuple(Entry(it or None, 1, 1.0, "x.jsonl", {}) for it in ids), has_more)


# ── reading a page ─────────────────────────────────────────────────────────────────────────────────────────

ENTRY = {"id": "file-1", "bytes": 806, "created_at": 1741777570, "filename": "a.jsonl"}


@pytest.mark.parametrize(
    "document", [{"data": {"data": [ENTRY], "object": "file"}, "code": 20000}, {"data": [ENTRY]}]
)
def test_both_forms_of_a_listing_are_read(document: Any) -> None:
    """As SiliconFlow answers, and as OpenAI does."""
    assert read_page(json.dumps(document).encode()) == Page(
        (Entry("file-1", 806, 1741777570.0, "a.jsonl", ENTRY),), None
    )


@pytest.mark.parametrize("body", [b"", b"[]", b'"Invalid token"', b"{}", b'{"data": {}}', b'{"data": "x"}'])
def test_what_is_no_listing_is_none(body: bytes) -> None:
    assert read_page(body) is None


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, (None, None, None, None)),
        ("file-1", (None, None, None, None)),
        ({"id": "", "bytes": 0, "created_at": "x", "filename": ""}, (None, None, None, None)),
        ({"id": 7, "bytes": -1, "createdAt": 5.5, "filename": 8}, (None, None, 5.5, None)),
        ({"id": "f", "bytes": "806", "createdAt": "7", "filename": "a"}, ("f", 806, 7.0, "a")),
        ({"bytes": True, "created_at": None, "createdAt": 9}, (None, None, 9.0, None)),
    ],
)
def test_what_an_entry_does_not_tell_is_none(entry: Any, told: tuple[Any, ...]) -> None:
    """A size of 0 is one that the service has not counted yet."""
    read_it = read_page(json.dumps({"data": [entry]}).encode())
    assert read_it is not None
    [it] = read_it.entries
    assert (it.id, it.size, it.created, it.name) == told


@pytest.mark.parametrize(
    ("document", "has_more"),
    [
        ({"data": [], "has_more": True}, True),
        ({"data": [], "has_more": False}, False),
        ({"data": {"data": [], "has_more": True}}, True),
        ({"data": {"data": [], "has_more": False}, "has_more": "no"}, False),
        ({"data": [], "has_more": 1}, None),
        ({"data": {"data": []}}, None),
    ],
)
def test_has_more_is_a_boolean_or_not_told(document: Any, has_more: bool | None) -> None:  # noqa: FBT001
    read_it = read_page(json.dumps(document).encode())
    assert read_it is not None
    assert read_it.has_more is has_more


# ── paging ─────────────────────────────────────────────────────────────────────────────────────────────────


def walk(*pages: Page, cursor: Cursor | None = None) -> tuple[list[str | None], Cursor | End, int]:
    """The fresh ids of all pages, what comes next, and how often it began anew."""
    step: Cursor | End = cursor or Cursor(LIMITS)
    ids: list[str | None] = []
    restarts = 0
    for it in pages:
        assert isinstance(step, Cursor)
        fresh, step, restarted = next_page(step, it)
        ids += [entry.id for entry in fresh]
        restarts += restarted
    return ids, step, restarts


def test_the_first_request() -> None:
    assert (Cursor().limit, Cursor().after) == (100, None)


def test_the_next_page_begins_with_the_last_entry() -> None:
    """Asked for after the last but one; only the last again is the end, whatever `has_more` says."""
    _, step, _ = walk(page("abc"))
    assert isinstance(step, Cursor)
    assert (step.limit, step.after) == (5, "b")
    ids, step, _ = walk(page("abc"), page("cd"))
    assert isinstance(step, Cursor)
    assert (ids, step.after) == ([*"abcd"], "c")
    assert walk(page("abc"), page("cd"), page("d", has_more=True)) == ([*"abcd"], End.WHOLE, 0)


@pytest.mark.parametrize(("has_more", "end"), [(None, End.WHOLE), (False, End.WHOLE), (True, End.OPEN)])
def test_an_empty_listing(has_more: bool | None, end: End) -> None:  # noqa: FBT001
    assert walk(page("", has_more)) == ([], end, 0)


@pytest.mark.parametrize(("has_more", "end"), [(None, End.OPEN), (False, End.WHOLE), (True, End.OPEN)])
def test_an_empty_page_after_the_only_entry(has_more: bool | None, end: End) -> None:  # noqa: FBT001
    """One that shows one entry a page and answers every `after` with nothing has to say that it is all."""
    assert walk(page("a"), page("", has_more)) == (["a"], end, 0)


@pytest.mark.parametrize(("has_more", "end"), [(None, End.WHOLE), (False, End.WHOLE), (True, End.OPEN)])
def test_an_empty_page_after_pages_of_one_entry(has_more: bool | None, end: End) -> None:  # noqa: FBT001
    """There `after` has shown that it works: an empty page is the end, unless it says that there is more."""
    assert walk(page("a"), page("b"), page("", has_more)) == (["a", "b"], end, 0)


def test_pages_of_one_entry() -> None:
    ids, step, _ = walk(page("a"), page("b"), page("c"))
    assert isinstance(step, Cursor)
    assert (ids, step.after) == ([*"abc"], "c")
    assert walk(page("a"), page("b"), page(""))[1] is End.WHOLE


@pytest.mark.parametrize("second", ["", "d", "dc"])
def test_without_overlap_it_begins_anew_three_times(second: str) -> None:
    """What lies between may have been left out."""
    pages = [page("abc"), page(second)]
    _, step, restarts = walk(*pages * 3)
    assert isinstance(step, Cursor)
    assert (step.limit, step.after, restarts) == (5, None, 3)
    assert walk(*pages * 4)[1] is End.OPEN


@pytest.mark.parametrize("again", ["abc", "xab"])
def test_where_after_is_ignored_one_larger_page_is_asked_for(again: str) -> None:
    """The first page again, whether something was uploaded meanwhile or not."""
    _, step, restarts = walk(page("abc"), page(again))
    assert isinstance(step, Cursor)
    assert (step.limit, step.after, restarts) == (20, None, 1)
    assert walk(page("a"), page("a"))[1] == replace(step, pages=3)


@pytest.mark.parametrize(("has_more", "end"), [(None, End.OPEN), (False, End.WHOLE), (True, End.OPEN)])
def test_one_page_is_whole_only_if_the_service_says_so(has_more: bool | None, end: End) -> None:  # noqa: FBT001
    """Shorter than its limit, and no more: a service that bounds its pages would not say that."""
    first = [page("abc"), page("abc")]
    assert walk(*first, page("abcd", has_more))[1] is end
    full = page([str(number) for number in range(20)], has_more=False)
    _, step, restarts = walk(*first, full)
    assert isinstance(step, Cursor)
    assert (step.limit, step.after, restarts) == (80, None, 2)
    assert walk(*first, full, page("abcd", has_more))[1] is end
    longest = page([str(number) for number in range(80)], has_more=False)
    assert walk(*first, full, longest)[1] is End.OPEN


@pytest.mark.parametrize("ids", [["a", "b", ""], ["a", "", "c"], [""]])
def test_an_entry_without_an_id_where_one_is_needed(ids: list[str]) -> None:
    assert walk(page(ids))[1] is End.OPEN


def test_an_entry_without_an_id_elsewhere() -> None:
    ids, step, _ = walk(page(["", "b", "c"]), page(["c", "", "e", "f"]))
    assert isinstance(step, Cursor)
    assert (ids, step.after) == ([None, "b", "c", None, "e", "f"], "e")
    assert walk(page(["", "b", "c"]), page(["", "b", "c"]))[2] == 1


def test_the_number_of_pages_is_bounded() -> None:
    """Those before a new beginning count too."""
    step: Cursor | End = Cursor()
    for number in range(PAGES_MAX):
        assert isinstance(step, Cursor)
        _, step, _ = next_page(step, page([f"f{number}", f"f{number + 1}"]))
    assert step is End.OPEN
    at_the_end = Cursor(after="a", first="a", last="b", pages=PAGES_MAX)
    assert next_page(at_the_end, page("ab"))[1] is End.OPEN
    assert next_page(at_the_end, page("c"))[1] is End.OPEN
    assert next_page(at_the_end, page("b"))[1] is End.WHOLE


@dataclass
class Server:
    """A listing that changes between two requests: entries go, and new ones turn up anywhere."""

    ids: list[str]
    cap: int
    more: str
    after: str

    def page(self, cursor: Cursor) -> Page:
        start = 0
        if cursor.after is not None and self.after != "ignored":
            if cursor.after in self.ids:
                start = self.ids.index(cursor.after) + 1
            elif self.after == "empty":
                start = len(self.ids)
        end = start + min(cursor.limit, self.cap)
        more = len(self.ids) > end or self.more == "always"
        return page(self.ids[start:end], None if self.more == "none" else more)


changes = st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=3)


@given(
    st.integers(0, 24),
    st.sampled_from([2, 3, 4, 7, 99]),
    st.sampled_from(["yes", "none", "always"]),
    st.sampled_from(["honoured", "empty", "ignored"]),
    st.lists(changes, max_size=30),
)
def test_whole_is_said_only_of_what_was_read_whole(
    length: int, cap: int, more: str, after: str, history: list[list[tuple[bool, int]]]
) -> None:
    """Each entry that was there all the time was read, whatever happened between the pages."""
    server = Server([f"f{number}" for number in range(length)], cap, more, after)
    always, read_ids, new = set(server.ids), set[str | None](), 0
    step: Cursor | End = Cursor(LIMITS)
    while isinstance(step, Cursor):
        fresh, step, restarted = next_page(step, server.page(step))
        read_ids = set() if restarted else read_ids | {entry.id for entry in fresh}
        always = set(server.ids) if restarted else always & set(server.ids)
        if step is End.WHOLE:
            assert always <= read_ids
        for goes, where in history.pop() if history else []:
            if goes and server.ids:
                del server.ids[where % len(server.ids)]
            elif not goes:
                new += 1
                server.ids.insert(where % (len(server.ids) + 1), f"n{new}")


@pytest.mark.parametrize("cap", [1, 2, 3, 99])
@pytest.mark.parametrize("more", ["yes", "none"])
@given(length=st.integers(0, 24))
def test_a_listing_that_keeps_still_is_read_whole(cap: int, more: str, length: int) -> None:
    """But one of a single entry that does not say that it is all: `after` could not show that it works."""
    server, step = Server([f"f{number}" for number in range(length)], cap, more, "honoured"), Cursor(LIMITS)
    ids: list[str | None] = []
    onward: Cursor | End = step
    while isinstance(onward, Cursor):
        fresh, onward, _ = next_page(onward, server.page(onward))
        ids += [entry.id for entry in fresh]
    whole = length != 1 or more != "none"
    assert (onward, ids) == (End.WHOLE if whole else End.OPEN, server.ids)


# ── matching ───────────────────────────────────────────────────────────────────────────────────────────────

LOST = Lost(TAG, 806, first_sent=10, last_sent=12, newest_before="w")
OURS = Entry("f1", 806, 50.0, f"a-{TAG}.jsonl", {})
WITNESS = Entry("w", 7, 40.0, f"b-{OTHER}.jsonl", {})


def reading(
    *entries: Entry,
    lost: Lost = LOST,
    end: End = End.WHOLE,
    known: dict[str, Known] | None = None,
    names_kept: bool = True,
    knows_any: bool = True,
) -> Reading:
    seen = Seen("t", {lost.tag: lost})
    see(seen, entries, {"w": Known()} if known is None else known)
    return read(lost, seen, end, names_kept=names_kept, knows_any=knows_any)


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize(
    "name",
    [
        f"{TAG}.jsonl",
        f"a-{TAG.upper()}.jsonl",
        f"{OTHER}-{TAG}.jsonl",
        f"{OTHER}-{TAG}",
        f"a-{TAG}-{OTHER}0.jsonl",
        f"a-{TAG}-{OTHER[1:]}.jsonl",
    ],
)
def test_the_tag_is_the_last_group_of_twelve_digits(name: str, end: End) -> None:
    """A match counts at once, however the reading goes on."""
    entry = replace(OURS, name=name)
    assert reading(WITNESS, entry, end=end, names_kept=False) == Found(entry, ())


@pytest.mark.parametrize("name", [f"{TAG}-{OTHER}.jsonl", f"{TAG}0.jsonl", f"f{TAG}.jsonl", TAG[:11], "é", "a"])
def test_other_names_do_not_match(name: str) -> None:
    assert reading(WITNESS, replace(OURS, name=name)) == Absent("whole")


@pytest.mark.parametrize("known", [Known(), Known(tag=TAG), Known(target="u", tag=TAG), Known(accepted=None)])
def test_an_id_that_stands_in_another_row_is_that_ones(known: Known) -> None:
    """Of whatever target at this address, and in whatever state."""
    assert reading(WITNESS, OURS, known={"w": Known(), "f1": known}) == Absent("whole")


def test_the_newest_of_several_is_adopted() -> None:
    """The others are orphans; where times are equal or not told, the one listed first."""
    newer, untold = replace(OURS, id="f2", created=60.0), replace(OURS, id="f3", created=None)
    assert reading(OURS, untold, newer) == Found(newer, ("f1", "f3"))
    assert reading(replace(OURS, id="f4"), OURS, OURS) == Found(replace(OURS, id="f4"), ("f1",))


def test_its_tag_with_another_size() -> None:
    """It decides nothing, unless another entry matches."""
    other = replace(OURS, id="f2", size=807)
    assert reading(WITNESS, other, replace(other, id="f3")) == SizeDiffers(("f2", "f3"))
    assert reading(other, OURS) == Found(OURS, ())


@pytest.mark.parametrize("entry", [replace(OURS, size=None), replace(OURS, id=None)])
def test_its_tag_with_too_little_told(entry: Entry) -> None:
    """It can't be adopted, and the file can't be called absent."""
    assert reading(WITNESS, entry) == Inconclusive("unreadable_entry")
    assert reading(entry, known={}, knows_any=False) == Inconclusive("unreadable_entry")


# ── absence ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [806, None])
def test_an_unknown_entry_without_a_name_could_be_ours(size: int | None) -> None:
    nameless = Entry("x", size, 45.0, None, {})
    assert reading(WITNESS, nameless) == Inconclusive("unreadable_entry")
    assert reading(WITNESS, nameless, known={"w": Known(), "x": Known()}) == Absent("whole")
    assert reading(WITNESS, replace(nameless, size=805)) == Absent("whole")


@pytest.mark.parametrize(
    ("known", "proved"),
    [
        (Known(), True),
        (Known(accepted=None), False),
        (Known(target="u"), False),
        (Known(tag=TAG), False),
        (Known(tag=None), False),
    ],
)
def test_a_whole_listing_has_to_show_what_was_accepted_before(known: Known, proved: bool) -> None:  # noqa: FBT001
    """At this target, and under its own tag; else the names or the account may be others."""
    expected = Absent("whole") if proved else Inconclusive("nothing_known_shown")
    assert reading(WITNESS, known={"w": known}) == expected


def test_a_whole_listing_may_show_a_later_upload_instead() -> None:
    """One whose first attempt began after this file's last."""
    other = replace(WITNESS, id="l")
    assert reading(other, known={"l": Known(first_sent=13, accepted=14)}) == Absent("whole")
    assert reading(other, known={"l": Known(first_sent=12)}) == Inconclusive("nothing_known_shown")
    assert reading(other, known={"l": Known(first_sent=None)}) == Inconclusive("nothing_known_shown")


def test_without_a_proof() -> None:
    """Not whole; names that are rewritten; nothing known that could be shown."""
    assert reading(WITNESS, end=End.OPEN) == Inconclusive("partial_listing")
    assert reading(WITNESS, names_kept=False) == Inconclusive("names_rewritten")
    assert reading() == Inconclusive("nothing_known_shown")
    assert reading(knows_any=False) == Unproven()
    assert reading(end=End.OPEN, knows_any=False) == Inconclusive("partial_listing")
    assert reading(names_kept=False, knows_any=False) == Inconclusive("names_rewritten")


STRANGERS = [Entry(f"s{at}", 5, float(at), "s.jsonl", {}) for at in range(100, 92, -1)]
PASSED = {"w": Known(accepted=9), "v": Known(accepted=10)}
OLDER = replace(WITNESS, id="v", created=39.0)


def by_order(*entries: Entry, known: dict[str, Known] | None = None) -> Reading:
    return reading(*entries, end=End.OPEN, known=known or PASSED)


def test_newest_first_and_two_earlier_uploads_passed() -> None:
    """No end is needed: what is newer than those would have been shown before them."""
    assert by_order(*STRANGERS, WITNESS, OLDER) == Absent("order")
    assert by_order(*STRANGERS, WITNESS, OLDER, replace(WITNESS, id="z", created=None)) == Absent("order")


@pytest.mark.parametrize(
    "entries",
    [
        (*STRANGERS, WITNESS),
        (*STRANGERS, WITNESS, replace(OLDER, created=40.0)),
        (*STRANGERS, OLDER, WITNESS),
        (*STRANGERS, replace(OURS, name="x", created=None), WITNESS, OLDER),
        (*STRANGERS, WITNESS, replace(OLDER, name="v.jsonl")),
        (*STRANGERS[: ORDER_MIN - 3], WITNESS, OLDER),
        (*[replace(entry, created=100.0) for entry in STRANGERS], WITNESS, OLDER),
    ],
    ids=["one", "same time", "order breaks", "no time", "no tag", "too few", "too few times"],
)
def test_what_is_no_proof_by_order(entries: tuple[Entry, ...]) -> None:
    """Of a few entries any order is chance: a service may list by id."""
    assert by_order(*entries) == Inconclusive("partial_listing")


def test_both_were_accepted_before_the_first_attempt() -> None:
    late = PASSED | {"v": Known(accepted=11)}
    assert by_order(*STRANGERS, WITNESS, OLDER, known=late) == Inconclusive("partial_listing")
    third = replace(OLDER, id="u", created=38.0)
    assert by_order(*STRANGERS, WITNESS, OLDER, third, known=late | {"u": Known(accepted=3)}) == Absent("order")


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 4)), unique_by=lambda it: it[0]), st.integers(0, 12)
)
def test_two_of_different_times_are_found_in_any_order(uploads: list[tuple[int, int]], before: int) -> None:
    """As if all had been kept and looked at."""
    uploads.sort(key=lambda it: -it[1])
    entries = [replace(WITNESS, id=str(number), created=float(at)) for number, at in uploads]
    known = {str(number): Known(accepted=number) for number, _ in uploads}
    times = {at for number, at in uploads if number <= before}
    result = reading(*STRANGERS, *entries, lost=replace(LOST, first_sent=before), end=End.OPEN, known=known)
    assert result == (Absent("order") if len(times) > 1 else Inconclusive("partial_listing"))


def test_a_new_beginning_forgets_the_witnesses_and_keeps_the_matches() -> None:
    seen = Seen("t", {TAG: LOST})
    see(seen, [*STRANGERS, WITNESS], PASSED)
    see(seen, [OLDER, OURS], PASSED, restarted=True)
    assert isinstance(read(LOST, seen, End.OPEN, names_kept=True, knows_any=True), Found)
    seen.matches.clear()
    for end, reason in ((End.OPEN, "partial_listing"), (End.WHOLE, "nothing_known_shown")):
        assert read(LOST, seen, end, names_kept=True, knows_any=True) == Inconclusive(reason)
    see(seen, [*STRANGERS, WITNESS, OLDER], PASSED)
    assert read(LOST, seen, End.OPEN, names_kept=True, knows_any=True) == Absent("order")


def test_one_listing_serves_many_files() -> None:
    other = Lost(OTHER, 9, 1, 1, None)
    seen = Seen("t", {TAG: LOST, OTHER: other})
    see(seen, [OURS, replace(OURS, id="f2", name=f"{OTHER}.jsonl", size=9)], {})
    for lost, expected in ((LOST, "f1"), (other, "f2")):
        found = read(lost, seen, End.OPEN, names_kept=True, knows_any=True)
        assert isinstance(found, Found)
        assert found.entry.id == expected


# ── untagged ───────────────────────────────────────────────────────────────────────────────────────────────

UNTAGGED = replace(LOST, tagged=False)


def test_an_untagged_file_is_never_found() -> None:
    """Likeness is no match, and an unknown entry of its size, or of none, could be it."""
    for entry in (OURS, replace(OURS, name="a.jsonl"), replace(OURS, size=None)):
        assert reading(WITNESS, entry, lost=UNTAGGED) == Inconclusive("unreadable_entry")


def test_an_untagged_file_is_absent_by_the_same_proof() -> None:
    """The names play no part in it: those of our uploads need no tag."""
    stranger, plain = replace(OURS, size=807, name=None), replace(WITNESS, name="b.jsonl")
    for known in (Known(tag=None), Known()):
        assert reading(stranger, plain, lost=UNTAGGED, known={"w": known}) == Absent("whole")
    assert reading(stranger, plain, lost=UNTAGGED, end=End.OPEN) == Inconclusive("partial_listing")


def test_an_untagged_file_is_not_sent_again_without_proof() -> None:
    assert reading(lost=UNTAGGED, knows_any=False) == Inconclusive("nothing_known_shown")


# ── time ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_large_files_are_waited_for_longer() -> None:
    assert earliest_s(1_000_000_000, 30.0) == 130.0

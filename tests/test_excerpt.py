"""The place of a finding in its line, as it is shown on a terminal."""

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch.excerpt import Excerpt, Place, excerpt
from sfwatch.findings import explain
from sfwatch.logs import printable

LONG = "x" * 500


def line(**changes: Any) -> bytes:
    request = {"custom_id": "a", "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}}
    return json.dumps(request | changes).encode() + b"\n"


def marked(found: Excerpt) -> str:
    """What stands above the carets, where each character takes one cell."""
    return found.text[found.start : found.start + found.width]


PLACES: dict[str, tuple[bytes, Place, str]] = {
    "a value": (line(), ("custom_id",), '"a"'),
    "a value far down": (line(), ("body", "messages", 0, "role"), '"user"'),
    "what has an inside": (line(), ("body",), "{"),
    "an item": (line(tools=[1, [2], 34]), ("tools", 2), "34"),
    "the whole line": (line(), (), "{"),
    "the last of two": (b'{"a": 1, "a": 2}', ("a",), "2"),
    "an escaped name": (b'{"\\u0061": 7}', ("a",), "7"),
    "behind a bom": (b'\xef\xbb\xbf {"a": 7}', ("a",), "7"),
    "any number of digits": (b'{"a": %s, "b": 7}' % (b"9" * 5000), ("b",), "7"),
    "a number of bytes": ('{"é": x}'.encode(), 7, "x"),
    "the end": (b'{"a": ', 6, ""),
    "a bad byte": (b'{"a": "\xff"}', 7, "\\xff"),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_place_is_marked(name: str) -> None:
    """A plain value is marked as a whole, what has an inside by its first character."""
    data, place, meant = PLACES[name]
    assert marked(excerpt(data, place, cells=70)) == meant


def test_a_row_holds_what_stands_around_the_place() -> None:
    """Both ends are cut, a third of the row is left for what stands before."""
    data = line(custom_id=LONG, body={"messages": [{"role": "judge", "content": LONG}]})
    found = excerpt(data, ("body", "messages", 0, "role"), cells=60)
    assert found.text.startswith("…")
    assert found.text.endswith("…")
    assert (marked(found), found.start) == ('"judge"', 21)


def test_a_long_value_is_marked_as_far_as_it_is_shown() -> None:
    """Not beyond the row."""
    found = excerpt(line(custom_id=LONG), ("custom_id",), cells=40)
    assert (len(found.text), found.start + found.width) == (40, 39)


def test_columns_count_characters_from_one() -> None:
    """As editors do."""
    assert excerpt('{"é": 1}'.encode(), ("é",), cells=40).column == 7


def test_chinese_characters_take_two_cells() -> None:
    """So that the carets stand below what is meant."""
    found = excerpt('{"名": "x"}'.encode(), ("名",), cells=40)
    assert (found.start, found.width) == (7, 3)


def test_a_value_is_not_looked_for_in_a_huge_line() -> None:
    """Its beginning is shown."""
    huge = line(custom_id="x" * 5_000_000)
    assert marked(excerpt(huge, ("body",), cells=40)) == "{"


@pytest.mark.parametrize("depth", [900, 985, 995, 100_000])
def test_what_is_nested_too_deeply_to_be_walked(depth: int) -> None:
    """The decoder that found the line sound goes a little deeper than ours: its beginning is shown."""
    deep = b'{"x": ' + b"[" * depth + b"]" * depth + b', "custom_id": "a"}'
    assert marked(excerpt(deep, ("custom_id",), cells=40)) in {"{", '"a"'}


def values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
    names = st.text(max_size=4)
    return st.recursive(plain, lambda it: st.lists(it, max_size=4) | st.dictionaries(names, it, max_size=4))


def ways(value: Any, way: Place = ()) -> list[tuple[Place, Any]]:
    """All values within a value, each with the way to it."""
    assert isinstance(way, tuple)
    found: list[tuple[Place, Any]] = [(way, value)]
    if isinstance(value, dict):
        found += [it for key, item in value.items() for it in ways(item, (*way, key))]
    if isinstance(value, list):
        found += [it for index, item in enumerate(value) for it in ways(item, (*way, index))]
    return found


@given(values(), st.booleans(), st.sampled_from([None, 1]))
def test_every_value_is_found(value: Any, ascii_only: bool, indent: int | None) -> None:  # noqa: FBT001
    """The column is where the value begins, however the line is written."""
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).replace("\n", " ")
    for way, item in ways(value):
        at = excerpt(text.encode("utf-8", "surrogatepass"), way, cells=70).column - 1
        if not any("\ud800" <= char <= "\udfff" for char in text):
            assert json.JSONDecoder().raw_decode(text, at)[0] == item


@given(st.binary(max_size=200), st.integers(min_value=10, max_value=100))
def test_any_line_makes_one_harmless_row(data: bytes, cells: int) -> None:
    """Whatever is wrong with a line: one row of at most so many cells, the carets within, all printable."""
    for breach in explain(data).breaches:
        found = excerpt(data, breach.place, cells=cells)
        taken = sum(unicodedata.east_asian_width(char) in "WF" for char in found.text)
        taken += sum(not unicodedata.combining(char) for char in found.text)
        assert printable(found.text) == found.text
        assert taken <= cells
        assert 1 <= found.width <= cells - found.start + 1


@pytest.mark.parametrize(
    ("data", "meant"),
    [
        (b'{"custom_id": 7, "body": {"messages": [{"role": "user"}]}}', "7"),
        (b'{"custom_id": "a", "body": 8}', "8"),
        (b'{"custom_id": "a", "body": {"messages": "no"}}', '"no"'),
        (b'{"custom_id": "a", "body": {"messages": [{"role": "user"}, 9]}}', "9"),
        (b'{"custom_id": "a", "body": {"messages": [{"role": "judge"}, {"role": "user"}]}}', '"judge"'),
        (b'{"custom_id": "a", "body": {"messages": [{"r": 1}, {"role": "user"}]}}', "{"),
        (b'{"custom_id": "a", "body": {"messages": [{"role": "assistant"}]}}', '"assistant"'),
        (b'{"custom_id": "a" "body": 1}', '"'),
        (b'\xef\xbb\xbf{"custom_id" 1}', "\\ufeff"),
        (b'{"custom_id": "a\x00"}', "\\x00"),
        (b'{"custom_id": "a\xff"}', "\\xff"),
    ],
)
def test_each_finding_knows_its_place(data: bytes, meant: str) -> None:
    """What the finding is about is what is marked."""
    assert marked(excerpt(data, explain(data).breaches[0].place, cells=70)) == meant

"""The place in a line where a finding lies, cut out so that it fits a row of a terminal and steers none.

A place is the way to a value from the top of the line's object (`("body", "messages", 3, "role")`), or a number
of bytes from the line's beginning where the line is no JSON. Way and line belong together: the way must have
been found in the very same line, which is walked without another look at whether it is sound.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from sfwatch.logs import printable

Place = tuple[str | int, ...] | int

_LONGEST_WALKED = 4 * 1024 * 1024
"""Bytes of the longest line in which a value is looked for; of a longer one the beginning is shown."""
_BEFORE = 3
"""The part of the row (a third) that shows what stands before the place."""
_CUT = "…"
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_decode = json.JSONDecoder(parse_int=str).raw_decode  # of any number of digits


@dataclass(frozen=True, slots=True)
class Excerpt:
    """One row of a line; what is meant takes `width` cells from cell `start` on. `column` counts from 1."""

    text: str
    start: int
    width: int
    column: int


def excerpt(line: bytes, place: Place, *, cells: int) -> Excerpt:
    """Cut the place out of the line, with as much around it as a row of so many cells holds."""
    text = line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    at, end = _span(text, line, place)
    before, cut = _last(text[:at], cells // _BEFORE)
    lead = _CUT + before if cut else before
    start = _cells(lead)
    meant, _ = _first(text[at:end], cells - start)
    row, cut = _first(text[at:], cells - start)
    if cut:
        row, _ = _first(text[at:], cells - start - 1)
    width = max(1, min(_cells(meant), _cells(row)))
    return Excerpt(lead + row + (_CUT if cut else ""), start, width, at + 1)


# ---- where it is ----


def _span(text: str, line: bytes, place: Place) -> tuple[int, int]:
    """The characters that are meant: all of a plain value, the first one of what has an inside."""
    if isinstance(place, int):
        at = len(line[:place].decode("utf-8", "surrogateescape"))
        return at, at + 1
    if len(line) > _LONGEST_WALKED:
        return 0, 1
    try:
        return _walked(text, place)
    except RecursionError:  # the decoder that found the line sound goes a little deeper than this one
        return 0, 1


def _walked(text: str, way: tuple[str | int, ...]) -> tuple[int, int]:
    at = _after_space(text, 0)
    for step in way:
        at = _item(text, at, step) if isinstance(step, int) else _member(text, at, step)
    return at, at + 1 if text[at : at + 1] in ("{", "[", "") else _end(text, at)


def _member(text: str, at: int, name: str) -> int:
    """Where the value of that name begins; of two with one name the last one counts, as it does in Python."""
    return next(value for key, value in reversed(list(_members(text, at))) if key == name)


def _members(text: str, at: int) -> Iterator[tuple[str, int]]:
    at = _after_space(text, at + 1)
    while text[at] != "}":
        key, at = _decode(text, at)
        value = _after_space(text, _after_space(text, at) + 1)
        yield key, value
        at = _next(text, _end(text, value))


def _item(text: str, at: int, index: int) -> int:
    at = _after_space(text, at + 1)
    for _ in range(index):
        at = _next(text, _end(text, at))
    return at


def _next(text: str, at: int) -> int:
    """Past the comma, if there is one, to what follows."""
    at = _after_space(text, at)
    return _after_space(text, at + 1) if text[at] == "," else at


def _end(text: str, at: int) -> int:
    return _decode(text, at)[1]


def _after_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


# ---- what fits ----


def _first(text: str, cells: int) -> tuple[str, bool]:
    """The beginning of a text, made printable, in at most so many cells; and whether anything was cut off."""
    shown: list[str] = []
    for char in text:
        piece = _shown(char)
        cells -= _cells(piece)
        if cells < 0:
            return "".join(shown), True
        shown.append(piece)
    return "".join(shown), False


def _last(text: str, cells: int) -> tuple[str, bool]:
    """The end of a text, as `_first` gives the beginning."""
    shown: list[str] = []
    for char in reversed(text[-cells:]):
        piece = _shown(char)
        cells -= _cells(piece)
        if cells < 0:
            break
        shown.insert(0, piece)
    return "".join(shown), len(shown) < len(text)


def _shown(char: str) -> str:
    """One character as a terminal may have it; what shows nothing (a BOM) is told by its number."""
    shown = printable(char)
    return shown if shown.isprintable() else shown.encode("unicode_escape").decode("ascii")


def _cells(text: str) -> int:
    """How many cells a terminal gives a text; Chinese characters take two each, accents none."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") - bool(unicodedata.combining(c)) for c in text)

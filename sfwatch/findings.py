"""What one line of a batch input breaks, said so that its author can correct it.

A request is recognised at the decoder's own speed (`recognise`, `is_json`); only a line that this refuses is
looked at again, slowly (`explain`, `explain_json`). A refusal alone condemns nothing: msgspec refuses lone
surrogates, which are JSON, so `json.loads` has the last word. It takes too much on the other side: NaN and
Infinity, and encodings other than UTF-8 when it is given bytes. msgspec in turn does not look at the bytes of
fields that it skips, so UTF-8 is checked beforehand (`is_utf8`).
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from sfwatch.excerpt import Excerpt, Place

ROLES = ("system", "user", "assistant")
QUOTED = 60
"""Characters that are quoted of a value, at most."""
MOST_VALUES = 500_000
"""Values that the slow path makes of a line, at most: 16 MiB of `[],` would fill 430 MB of memory."""

_BLANKS = b" \t\r\n"
_EXACT_DIGITS = 18


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a file; `line` counts from 1 and is None for what concerns the file as a whole.

    `excerpt` shows the place in the line where somebody asked for that.
    """

    line: int | None
    reason: str
    detail: str
    excerpt: Excerpt | None = None


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule that a line breaks: a reason code of the report, a sentence, and the place in the line."""

    reason: str
    detail: str
    place: Place = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Explained:
    """What the slow path found: the rules broken, and what of the request could be read all the same.

    Where `parsed` is False the line would have become more values than anyone wants in memory: nobody knows.
    """

    breaches: tuple[Breach, ...] = ()
    parsed: bool = True
    custom_id: str | None = None
    model: str | None = None
    odd_model: bool = False
    """There is a model, and it is no string."""


class Message(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant"]


class Body(msgspec.Struct, gc=False):
    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    model: str | None = None


class Request(msgspec.Struct, gc=False):
    """A line that keeps every rule, as far as anyone here needs it."""

    custom_id: Annotated[str, msgspec.Meta(min_length=1)]
    body: Body


decode_request = msgspec.json.Decoder(Request).decode
_decode_any = msgspec.json.Decoder(msgspec.Raw).decode


def is_utf8(line: bytes) -> bool:
    """Whether it can be decoded: msgspec does not look at all of it."""
    try:
        str(line, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def recognise(line: bytes) -> Request | None:
    """Return the request if the line, known to be UTF-8, is beyond doubt a good one, else None.

    `explain` then knows more.
    """
    try:
        request = decode_request(line)
    except (msgspec.DecodeError, RecursionError):
        return None
    return request if request.body.messages[-1].role == "user" else None


def is_json(line: bytes) -> bool:
    """Whether the line, known to be UTF-8, is beyond doubt one JSON value, else `explain_json` knows more."""
    try:
        _decode_any(line)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def is_blank(line: bytes) -> bool:
    """Whether the line holds nothing but what JSON takes for white space."""
    return not line.strip(_BLANKS)


def explain_json(line: bytes) -> Explained:
    """Say why the line is not one JSON value in UTF-8, if so."""
    if _may_be_huge(line):
        return Explained(parsed=False)
    return Explained(_parse(line)[1])


def explain(line: bytes) -> Explained:
    """Say which rules for a request the line breaks: all of them, each at its first place."""
    if _may_be_huge(line):
        return Explained(parsed=False)
    value, breaches = _parse(line)
    if value is _NOTHING:
        return Explained(breaches)
    if not isinstance(value, dict):
        wrong = Breach("not_object", f"the line must be a JSON object (got {_shown(value)})")
        return Explained((*breaches, wrong))
    found = (*breaches, *_custom_id_breaches(value), *_body_breaches(value))
    model = _model(value)
    return Explained(
        found,
        custom_id=_text_or_none(value.get("custom_id")),
        model=_text_or_none(model),
        odd_model=not isinstance(model, str | None),
    )


class Skimmed:
    """A line too long to be kept and parsed: its bytes are looked at as they pass, that is all.

    Its first and last bytes that are not blank show most lines that are no JSON.
    """

    def __init__(self) -> None:
        self.breaches: tuple[Breach, ...] = ()
        self._size = 0
        self._head = b""
        self._end = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, piece: bytes, *, last: bool = False) -> None:
        """Look at the next bytes; `last` when the line ends with them (a character may be cut off there)."""
        held = len(self._decoder.getstate()[0])
        if not self.breaches:
            self.breaches = self._look(piece, self._size - held, last=last)
        self._size += len(piece)
        if len(self._head) < len(codecs.BOM_UTF8):
            self._head = (self._head + piece).lstrip(_BLANKS)[: len(codecs.BOM_UTF8)]
        self._end = piece.rstrip(_BLANKS)[-1:] or self._end

    @property
    def blank(self) -> bool:
        """Whether there was nothing but white space."""
        return not self._head

    def misshapen(self, *, only_objects: bool) -> tuple[Breach, ...]:
        """Say why the line can't be a JSON value (`only_objects`: a request), by its two ends."""
        begin, end = self._head[:1], self._end
        if self.blank:
            return ()
        if self._head == codecs.BOM_UTF8:
            return (_BOM,)
        if begin not in _ENDS or end not in _ENDS[begin]:
            return (Breach("not_json", f"not JSON: begins with {_byte(begin)} and ends with {_byte(end)}"),)
        if only_objects and begin != b"{":
            wrong = f"the line must be a JSON object (begins with {_byte(begin)})"
            return (Breach("not_object", wrong),)
        return ()

    def _look(self, piece: bytes, held_from: int, *, last: bool) -> tuple[Breach, ...]:
        try:
            self._decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            return (_not_utf8(error.object, error.start, held_from),)
        return _nul(piece, self._size)


# --- from bytes to a value ---------------------------------------------------------------------------------

_BOM = Breach("bom", "begins with a byte order mark (EF BB BF): save the file as UTF-8 without one", 0)
_GZIP = b"\x1f\x8b"
_DIGITS = tuple(b"%d" % digit for digit in range(10))
_ENDS = {b"{": (b"}",), b"[": (b"]",), b'"': (b'"',)} | dict.fromkeys((b"-", *_DIGITS), _DIGITS)
"""What a JSON value ends with, by what it begins with; nothing else can be long."""

_NOTHING = object()
"""Stands for a line without a value; None is one (`null`)."""


def _parse(line: bytes) -> tuple[Any, tuple[Breach, ...]]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return _NOTHING, (_not_utf8(line, error.start),)
    if nul := _nul(line):
        return _NOTHING, nul
    bom = (_BOM,) if text.startswith("\ufeff") else ()
    value, fault = _load(text[len(bom) :], len(codecs.BOM_UTF8) * len(bom))
    return value, (*bom, fault) if fault else bom


def _may_be_huge(line: bytes) -> bool:
    return len(line) > MOST_VALUES and sum(map(line.count, (b",", b"[", b"{"))) > MOST_VALUES


def _load(text: str, text_from: int) -> tuple[Any, Breach | None]:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_int=_integer), None
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" at")  # some of its messages are made to be followed by a place
        fault = f"not JSON: {said[:1].lower()}{said[1:]} at character {error.pos + 1}"
        return _NOTHING, Breach("not_json", fault, text_from + len(text[: error.pos].encode()))
    except RecursionError:
        return _NOTHING, Breach("not_json", "not usable as JSON: nested too deeply", 0)
    except ValueError as error:
        return _NOTHING, Breach("not_json", f"not JSON: {error}", 0)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _integer(digits: str) -> int | float:
    """Take any number of digits: Python's own conversion refuses more than 4,300."""
    return int(digits) if len(digits) <= _EXACT_DIGITS else float(digits)


def _not_utf8(data: bytes, start: int, data_from: int = 0) -> Breach:
    at = data_from + start
    hint = (
        "; it looks like UTF-16" if at == 0 and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    )
    where = f"byte 0x{data[start]:02x} at offset {at} of the line"
    if at == 1 and data[: start + 1].endswith(_GZIP):
        return Breach("not_utf8", f"{where} is not UTF-8: it looks compressed (gzip), so unpack the file", at)
    return Breach("not_utf8", f"{where} is not UTF-8{hint}: save the file as UTF-8", at)


def _nul(data: bytes, data_from: int = 0) -> tuple[Breach, ...]:
    at = data.find(0)
    if at < 0:
        return ()
    at += data_from
    return (Breach("nul_bytes", f"NUL byte at offset {at} of the line: the file was not written whole", at),)


# --- the rules ---------------------------------------------------------------------------------------------


def _custom_id_breaches(request: dict[str, Any]) -> Iterator[Breach]:
    if "custom_id" not in request:
        yield Breach("custom_id_missing", "custom_id is missing")
    elif _text_or_none(request["custom_id"]) is None:
        got = _shown(request["custom_id"])
        yield Breach("custom_id_invalid", f"custom_id must be a non-empty string (got {got})", ("custom_id",))


def _body_breaches(request: dict[str, Any]) -> Iterator[Breach]:
    if "body" not in request:
        yield Breach("messages_missing", "body is missing")
        return
    body = request["body"]
    if not isinstance(body, dict):
        yield Breach("messages_missing", f"body must be an object (got {_shown(body)})", ("body",))
    elif "messages" not in body:
        yield Breach("messages_missing", "body.messages is missing", ("body",))
    elif not isinstance(body["messages"], list):
        got = _shown(body["messages"])
        yield Breach("messages_invalid", f"body.messages must be an array (got {got})", _MESSAGES)
    elif not body["messages"]:
        yield Breach("messages_invalid", "body.messages must not be empty", _MESSAGES)
    else:
        yield from _messages_breaches(body["messages"])


def _messages_breaches(messages: list[Any]) -> Iterator[Breach]:
    strangers = [index for index, message in enumerate(messages) if not isinstance(message, dict)]
    if strangers:
        first = strangers[0]
        fault = f"body.messages[{first}] must be an object (got {_shown(messages[first])})"
        yield Breach("messages_invalid", fault + _more(strangers), (*_MESSAGES, first))
    wrong = [i for i, message in enumerate(messages) if isinstance(message, dict) and not _has_role(message)]
    if wrong:
        fault = _role_fault(wrong[0], messages[wrong[0]])
        yield Breach("role_invalid", fault + _more(wrong), _role_place(messages, wrong[0]))
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") != "user":
        got = _shown(last["role"]) if "role" in last else "one without a role"
        fault = f"body.messages must end with a user message (got {got})"
        yield Breach("last_role_not_user", fault, _role_place(messages, len(messages) - 1))


_MESSAGES = ("body", "messages")


def _role_place(messages: list[Any], index: int) -> Place:
    return (*_MESSAGES, index, "role") if "role" in messages[index] else (*_MESSAGES, index)


def _has_role(message: dict[str, Any]) -> bool:
    return message.get("role") in ROLES


def _role_fault(index: int, message: dict[str, Any]) -> str:
    if "role" not in message:
        return f"body.messages[{index}].role is missing"
    return f"body.messages[{index}].role must be system, user or assistant (got {_shown(message['role'])})"


def _more(places: list[int]) -> str:
    return f"; {len(places) - 1} more like it in this line" if len(places) > 1 else ""


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _model(request: dict[str, Any]) -> Any:
    body = request.get("body")
    return body.get("model") if isinstance(body, dict) else None


# --- values in sentences -----------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return json.dumps(value)


def quoted(text: str) -> str:
    """Quote a text of unknown origin: on one line, nothing a terminal would obey, at most 60 characters."""
    safe = "".join(map(_printable, text[: QUOTED + 1]))
    return f'"{safe}"' if len(safe) <= QUOTED else f'"{safe[: QUOTED - 1]}…"'


def _byte(byte: bytes) -> str:
    return quoted(byte.decode()) if byte.isascii() else f"byte 0x{byte.hex()}"


def _printable(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")

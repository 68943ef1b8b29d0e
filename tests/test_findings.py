"""Which rules a line breaks, and in which words; the fast way and the slow way agree."""

import gzip
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch.findings import (
    MOST_VALUES,
    QUOTED,
    ROLES,
    Breach,
    Skimmed,
    explain,
    explain_json,
    is_blank,
    is_json,
    is_utf8,
    quoted,
    recognise,
)

USER = '{"role": "user", "content": "hi"}'
GOOD = '{"custom_id": "a", "extra": %s, "body": {"model": "m", "messages": [' + USER + "]}}"


def request(**changes: Any) -> bytes:
    """Build a good request, with some top-level fields changed, or left out where they are `...`."""
    whole = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "hi"}]}} | changes
    return json.dumps({key: value for key, value in whole.items() if value is not ...}).encode()


def messages(*all_of_them: Any) -> bytes:
    return request(body={"messages": list(all_of_them)})


CASES = {
    "array": (b"[1]", "not_object", "the line must be a JSON object (got an array)"),
    "null": (b"null", "not_object", "the line must be a JSON object (got null)"),
    "half": (b'{"a": ', "not_json", "not JSON: expecting value at character 7"),
    "text": (b"hello", "not_json", "not JSON: expecting value at character 1"),
    "cut text": (b'{"a": "b', "not_json", "not JSON: unterminated string starting at character 7"),
    "two": (b"{} {}", "not_json", "not JSON: extra data at character 4"),
    "nan": (GOOD.encode() % b"NaN", "not_json", "not JSON: NaN is no JSON value"),
    "infinity": (GOOD.encode() % b"-Infinity", "not_json", "not JSON: -Infinity is no JSON value"),
    "deep": (
        GOOD.encode() % (b"[" * 100_000 + b"]" * 100_000),
        "not_json",
        "not usable as JSON: nested too deeply",
    ),
    "no id": (request(custom_id=...), "custom_id_missing", "custom_id is missing"),
    "empty id": (
        request(custom_id=""),
        "custom_id_invalid",
        'custom_id must be a non-empty string (got "")',
    ),
    "number id": (
        request(custom_id=7),
        "custom_id_invalid",
        "custom_id must be a non-empty string (got 7)",
    ),
    "null id": (
        request(custom_id=None),
        "custom_id_invalid",
        "custom_id must be a non-empty string (got null)",
    ),
    "no body": (request(body=...), "messages_missing", "body is missing"),
    "text body": (request(body="x"), "messages_missing", 'body must be an object (got "x")'),
    "no messages": (request(body={}), "messages_missing", "body.messages is missing"),
    "object messages": (
        request(body={"messages": {}}),
        "messages_invalid",
        "body.messages must be an array (got an object)",
    ),
    "no message": (messages(), "messages_invalid", "body.messages must not be empty"),
    "text message": (
        messages("x", 1, {"role": "user"}),
        "messages_invalid",
        'body.messages[0] must be an object (got "x"); 1 more like it in this line',
    ),
    "tool": (
        messages({"role": "tool"}, {"role": "user"}),
        "role_invalid",
        'body.messages[0].role must be system, user or assistant (got "tool")',
    ),
    "no role": (messages({}, {"role": "user"}), "role_invalid", "body.messages[0].role is missing"),
    "list role": (
        messages({"role": []}, {"role": "user"}),
        "role_invalid",
        "body.messages[0].role must be system, user or assistant (got an array)",
    ),
    "assistant last": (
        messages({"role": "user"}, {"role": "assistant"}),
        "last_role_not_user",
        'body.messages must end with a user message (got "assistant")',
    ),
    "not utf-8": (
        b'{"a": "\xff"}',
        "not_utf8",
        "byte 0xff at offset 7 of the line is not UTF-8: save the file as UTF-8",
    ),
    "utf-16": (
        '{"a": 1}'.encode("utf-16"),
        "not_utf8",
        "byte 0xff at offset 0 of the line is not UTF-8; it looks like UTF-16: save the file as UTF-8",
    ),
    "gzip": (
        gzip.compress(b"{}"),
        "not_utf8",
        "byte 0x8b at offset 1 of the line is not UTF-8: it looks compressed (gzip), so unpack the file",
    ),
    "nul": (
        b'{"a": 1}\0\0',
        "nul_bytes",
        "NUL byte at offset 8 of the line: the file was not written whole",
    ),
    "bom": (
        b"\xef\xbb\xbf" + request(),
        "bom",
        "begins with a byte order mark (EF BB BF): save the file as UTF-8 without one",
    ),
}


@pytest.mark.parametrize(("line", "reason", "detail"), CASES.values(), ids=CASES.keys())
def test_each_rule_is_explained(line: bytes, reason: str, detail: str) -> None:
    """A line that breaks one rule is not recognised, and its one finding says what is wrong and where."""
    assert recognise(line) is None
    assert explain(line).breaches == (Breach(reason, detail),)


@pytest.mark.parametrize(("model", "odd"), [(7, True), ([], True), (None, False), ("m", False)])
def test_a_model_that_is_no_string(model: object, odd: bool) -> None:  # noqa: FBT001
    """It is told apart from one that is missing; neither breaks a rule."""
    user = {"role": "user", "content": "hi"}
    explained = explain(request(body={"model": model, "messages": [user]}))
    assert (explained.breaches, explained.odd_model) == ((), odd)


MISSHAPEN = [
    (b'{"a": 1}', None, None),
    (b' \t{"a": 1} \r', None, None),
    (b"[1]", "not_object", None),
    (b'"x"', "not_object", None),
    (b"12", "not_object", None),
    (b"no", "not_json", "not_json"),
    (b'{"a": 1', "not_json", "not_json"),
    (b"[1}", "not_json", "not_json"),
    (b'{"a": 1} x', "not_json", "not_json"),
    (b'{"a": 1},', "not_json", "not_json"),
    (b'\xef\xbb\xbf{"a": 1}', "bom", "bom"),
]


@pytest.mark.parametrize(("line", "request_reason", "value_reason"), MISSHAPEN)
@pytest.mark.parametrize("step", [1, 2, 100])
def test_skimmed_lines_are_judged_by_their_ends(
    line: bytes, request_reason: str | None, value_reason: str | None, step: int
) -> None:
    """What no object (or no JSON value) begins or ends with is found without parsing."""
    skimmed = Skimmed()
    for at in range(0, len(line), step):
        skimmed.add(line[at : at + step])
    skimmed.add(b"", last=True)
    found = [[breach.reason for breach in skimmed.misshapen(only_objects=only)] for only in (True, False)]
    assert found == [[reason] if reason else [] for reason in (request_reason, value_reason)]


def test_a_skimmed_line_of_blanks() -> None:
    """It is a blank one."""
    skimmed = Skimmed()
    skimmed.add(b" \t")
    skimmed.add(b"\r\n")
    assert skimmed.blank
    assert skimmed.misshapen(only_objects=True) == ()


def test_all_broken_rules_are_told() -> None:
    """A line that breaks several rules has them all found at once, each at its first place."""
    line = request(custom_id=0, body={"messages": [3, {"role": "tool"}, {}]})
    assert [breach.reason for breach in explain(line).breaches] == [
        "custom_id_invalid",
        "messages_invalid",
        "role_invalid",
        "last_role_not_user",
    ]


def test_content_is_nobodys_business() -> None:
    """Fields beyond the rules may be missing or of any type: they are passed on untouched."""
    line = request(method=7, url=None, body={"messages": [{"role": "user", "content": [1]}], "stream": True})
    assert recognise(line) is not None
    assert explain(line).breaches == ()


@pytest.mark.parametrize(
    "value",
    ['"\\ud800"', '"\\ud83d\\ud83d"', "1e999", "9" * 5000, "-" + "9" * 400, '"\\u0000"', '"\x7f\u2028\x85"'],
)
def test_odd_json_is_json(value: str) -> None:
    """Lone surrogates, huge numbers, escaped NULs and Unicode line ends are JSON, whatever a decoder takes."""
    line = (GOOD % value).encode()
    assert explain(line).breaches == ()
    assert explain_json(line).breaches == ()


def test_a_line_of_very_many_values_is_not_taken_apart() -> None:
    """What the fast way refuses is not parsed slowly where that would fill the memory."""
    many = GOOD.encode() % (b"[" + b"[]," * MOST_VALUES + b'"\\ud800"]')
    assert not explain(many).parsed
    assert not explain_json(many).parsed
    few = GOOD.encode() % (b'"' + b"x" * MOST_VALUES + b'\\ud800"')
    assert explain(few).parsed


@pytest.mark.parametrize("field", ["custom_id", "model"])
def test_lone_surrogates_in_what_is_read(field: str) -> None:
    """An id or model with a lone surrogate is taken as it is."""
    line = b'{"custom_id": "\\ud800", "body": {"model": "\\ud800", "messages": [{"role": "user"}]}}'
    assert getattr(explain(line), field) == "\ud800"


@pytest.mark.parametrize("bad", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe4\xb8"])
@pytest.mark.parametrize("place", [b'"x": "%s"', b'"%s": 1', b'"x": {"y": ["%s"]}'])
def test_invalid_utf8_in_fields_that_are_skipped(bad: bytes, place: bytes) -> None:
    """Bytes that are not UTF-8 are found in fields that the decoder skips, in keys and deep down too."""
    start = b"{" + place[: place.index(b"%s")]
    line = b"{" + place % bad + b", " + request()[1:]
    assert not is_utf8(line)
    (breach,) = explain(line).breaches
    assert breach.reason == "not_utf8"
    assert f"offset {len(start)} " in breach.detail
    assert explain_json(line).breaches == (breach,)


def test_a_repeated_key_counts_with_its_last_value() -> None:
    """Duplicate keys condemn nothing; the last one holds, as for most parsers."""
    line = b'{"custom_id": 5, "custom_id": "b", "body": {"messages": [{"role": "user"}]}}'
    assert explain(line).breaches == ()
    assert explain(line).custom_id == "b"


def test_what_is_quoted_is_bounded_and_printable() -> None:
    """Values from the file can neither flood a terminal nor command it."""
    line = request(custom_id="x", body={"messages": [{"role": "\x1b[31m\u202e\n" + "x" * 10_000}]})
    for breach in explain(line).breaches:
        assert breach.detail.isprintable()
        assert len(breach.detail) < 200
        assert "\\x1b[31m\\u202e\\n" in breach.detail


@given(st.text(st.characters()))
def test_quoted(text: str) -> None:
    """A quoted text is printable and bounded, whatever it was."""
    shown = quoted(text)
    assert shown.isprintable()
    assert len(shown) <= QUOTED + 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
roles = st.sampled_from([*ROLES, "user", "user", "tool", "", None, 3])
message_values = st.fixed_dictionaries({}, optional={"role": roles, "content": json_values}) | json_values
body_values = st.fixed_dictionaries(
    {}, optional={"messages": st.lists(message_values, max_size=3) | json_values, "model": json_values}
)
near_requests = st.fixed_dictionaries(
    {}, optional={"custom_id": st.text() | json_values, "body": body_values | json_values, "url": json_values}
)


@given(near_requests | json_values, st.booleans())
def test_fast_and_slow_agree(value: Any, ascii_only: bool) -> None:  # noqa: FBT001
    """What the fast way recognises the slow way finds nothing in; both read the same id and model."""
    line = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    fast, slow = recognise(line) if is_utf8(line) else None, explain(line)
    if fast is not None:
        assert slow.breaches == ()
        assert (fast.custom_id, fast.body.model or None) == (slow.custom_id, slow.model)
    elif slow.breaches == ():
        assert "\\u" in line.decode() or not isinstance(value["body"].get("model"), str | None)


@given(
    st.binary() | st.text(st.sampled_from('{}[]",:\\u0123eE+-.truefalsn \t\r\x00\x0b\ufeff')).map(str.encode)
)
def test_fast_json_is_json(line: bytes) -> None:
    """What passes for JSON at first sight is JSON at the second, and no bytes at all raise anything."""
    if is_utf8(line) and is_json(line) and not is_blank(line):
        assert explain_json(line).breaches == ()
    explain(line)
    recognise(line)


@given(st.binary() | st.text().map(str.encode) | st.text("a\0ü").map(str.encode), st.integers(1, 5))
def test_skimming_finds_what_a_whole_look_finds(line: bytes, step: int) -> None:
    """A line that passes in pieces is held against UTF-8 and NULs as one that is there whole.

    Where it breaks both, either may be named.
    """
    skimmed = Skimmed()
    for at in range(0, len(line), step):
        skimmed.add(line[at : at + step])
    skimmed.add(b"", last=True)
    whole = [breach for breach in explain_json(line).breaches if breach.reason in ("not_utf8", "nul_bytes")]
    assert len(skimmed.breaches) == len(whole)
    if whole and not (whole[0].reason == "not_utf8" and b"\0" in line):
        (found,) = skimmed.breaches  # what it looks like (UTF-16, gzip) takes two bytes in one piece
        assert found.reason == whole[0].reason
        assert found.detail.partition(" is not")[0] == whole[0].detail.partition(" is not")[0]

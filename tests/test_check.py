"""One reading of a file: digest, lines, findings with their line numbers, warnings, and what it costs."""

import hashlib
import io
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import check as module
from sfwatch.check import (
    MAX_FINDINGS,
    Checked,
    ShortRead,
    Stopped,
    Wanted,
    check,
    check_blocks,
    check_stream,
)
from sfwatch.excerpt import excerpt
from sfwatch.settings import Check

USER = {"role": "user", "content": "hi"}


def request(custom_id: Any = "a", model: Any = "m", **more: Any) -> bytes:
    return json.dumps({"custom_id": custom_id, "body": {"model": model, "messages": [USER], **more}}).encode()


def text(*lines: bytes) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def cut(data: bytes, step: int) -> Iterator[io.BytesIO]:
    return (io.BytesIO(data[at : at + step]) for at in range(0, len(data), step))


def checked(
    data: bytes,
    level: Check = Check.BATCH,
    *,
    max_bytes: int = 0,
    max_lines: int = 0,
    step: int = 1000,
    longest_line: int = module.LONGEST_LINE,
) -> Checked:
    return check_blocks(
        cut(data, step), level=level, max_bytes=max_bytes, max_lines=max_lines, longest_line=longest_line
    )


def reasons(result: Checked) -> list[tuple[int | None, str]]:
    return [(finding.line, finding.reason) for finding in result.findings]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("level", [Check.BATCH, Check.JSONL])
def test_characters_that_blocks_cut_apart_are_whole_and_those_that_the_end_cuts_off_are_not(
    level: Check, step: int
) -> None:
    """UTF-8 is looked at block by block; what is unsound is found in its own line, wherever blocks are cut."""
    plain = json.dumps(json.loads(request(note="敏捷é🦊")), ensure_ascii=False).encode()
    torn = plain.replace("🦊".encode(), "🦊".encode()[:3])
    other = plain.replace(b'"a"', b'"b"')
    assert reasons(checked(text(plain, other), level, step=step)) == []
    assert reasons(checked(text(plain, torn, other), level, step=step)) == [(2, "not_utf8")]
    assert reasons(checked(text(plain) + "狐".encode()[:2], level, step=step)) == [(2, "not_utf8")]


def warned(result: Checked) -> list[tuple[int | None, str]]:
    return [(warning.line, warning.reason) for warning in result.warnings]


def saved(tmp_path: Path, data: bytes) -> int:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


# --- findings ----------------------------------------------------------------------------------------------


def test_a_good_file() -> None:
    """A good file has no findings, no warnings, and its lines and models counted."""
    data = text(request("a"), request("b"))
    assert checked(data) == Checked(
        sha256=hashlib.sha256(data).hexdigest(), size=len(data), lines=2, models={"m": 2}
    )


def test_findings_name_their_lines() -> None:
    """Each finding carries the number of its line; blank lines are numbered though they don't count."""
    data = text(request("a"), b"", b"[]", b"{", request(""), request("a"))
    result = checked(data)
    assert reasons(result) == [
        (3, "not_object"),
        (4, "not_json"),
        (5, "custom_id_invalid"),
        (6, "custom_id_repeated"),
    ]
    assert result.findings[-1].detail == 'custom_id "a" is also used in line 1'
    assert result.lines == 5


@pytest.mark.parametrize("data", [b"", b"\n", b" \t\r\n\n  "])
@pytest.mark.parametrize("level", Check)
def test_an_empty_file(data: bytes, level: Check) -> None:
    """A file without a line that holds anything is refused at every level."""
    result = checked(data, level)
    assert reasons(result) == [(None, "empty")]
    assert result.lines == 0


def test_limits() -> None:
    """A file may have as many bytes and lines as allowed (blank ones are free); more is found first."""
    data = text(request("a"), b"", b"[]")
    size = len(data)
    assert reasons(checked(data, max_bytes=size, max_lines=2)) == [(3, "not_object")]
    assert reasons(checked(data, max_bytes=size - 1, max_lines=1)) == [
        (None, "too_big"),
        (None, "too_many_lines"),
        (3, "not_object"),
    ]


def test_findings_are_bounded() -> None:
    """Of many findings the first are kept and the others counted, those on the whole file among the first."""
    data = text(*[b"[]"] * (MAX_FINDINGS + 50))
    result = checked(data, max_lines=1)
    assert len(result.findings) == MAX_FINDINGS
    assert result.more == 51
    assert reasons(result)[:2] == [(None, "too_many_lines"), (1, "not_object")]


def test_all_findings_are_counted_by_kind() -> None:
    """Also those that are not kept, and those on the file as a whole."""
    result = checked(text(*[b"[]"] * (MAX_FINDINGS + 50), b"x"), max_lines=5)
    assert result.kinds == {"too_many_lines": 1, "not_object": MAX_FINDINGS + 50, "not_json": 1}
    assert sum(result.kinds.values()) == len(result.findings) + result.more


def test_findings_bring_as_much_as_is_wanted() -> None:
    """As many as one likes, each with what is made of its line while that is at hand."""
    wanted = Wanted(most=3, show=lambda line, place: excerpt(line, place, cells=40))
    data = text(request("a"), request("a", model="n"), b"[]", b"7", b"8")
    blocks = cut(data, len(data))
    result = check_blocks(blocks, level=Check.BATCH, max_bytes=0, max_lines=0, wanted=wanted)
    shown = [finding.excerpt.text for finding in result.findings if finding.excerpt]
    assert shown == ['…"custom_id": "a", "body": {"model": "n…', "[]", "7"]
    assert result.more == 1


def test_long_ids_are_compared_too() -> None:
    """Ids are compared over their whole length, however long, lone surrogates and all."""
    data = text(
        request("x" * 5000 + "1"), request("x" * 5000 + "2"), request("\ud800" * 40), request("x" * 5000 + "1")
    )
    assert reasons(checked(data)) == [(4, "custom_id_repeated")]


def test_ids_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound ids are compared with the remembered ones only, and a warning says so."""
    monkeypatch.setattr(module, "MAX_IDS", 2)
    result = checked(text(*map(request, "abccab")))
    assert reasons(result) == [(5, "custom_id_repeated"), (6, "custom_id_repeated")]
    assert warned(result) == [(3, "ids_not_compared")]


def test_an_id_counts_though_its_line_is_bad() -> None:
    """An id is taken also where the rest of its line is at fault."""
    data = text(json.dumps({"custom_id": "a"}).encode(), request("a"))
    assert reasons(checked(data)) == [(1, "messages_missing"), (2, "custom_id_repeated")]


def test_unicode_line_ends_are_data() -> None:
    """Only a newline ends a line: U+2028, U+2029, NEL, form feeds and a lone CR do not."""
    line = json.dumps({"custom_id": "a\u2028\u2029\x85", "body": {"messages": [USER]}}, ensure_ascii=False)
    assert checked(text(line.encode())).lines == 1
    assert reasons(checked(text(line.encode()))) == []
    assert checked(b"1\r2\x0c3\x0b4\x1c5\n", Check.NONE).lines == 1


def test_a_bom() -> None:
    """A byte order mark is found once, and the line behind it is checked like any other."""
    assert reasons(checked(b"\xef\xbb\xbf" + text(request("a"), request("b")))) == [(1, "bom")]
    assert reasons(checked(b"\xef\xbb\xbf" + text(request("")))) == [(1, "bom"), (1, "custom_id_invalid")]


# --- warnings ----------------------------------------------------------------------------------------------


def test_warnings_hinder_nothing() -> None:
    """What the service takes all the same is warned of once a reason, with its first line and a count."""
    crlf = request("b") + b"\r"
    data = text(request("a"), b"", crlf, request("c", None), b" ") + request("d", "n") + b"\r"
    result = checked(data)
    assert result.findings == ()
    assert warned(result) == [
        (None, "several_models"),
        (2, "blank_lines"),
        (3, "crlf"),
        (4, "model_missing"),
        (6, "no_final_newline"),
    ]
    assert result.warnings[0].detail == '2 models in one file: "m" (2), "n" (1)'
    assert result.warnings[1].detail == "line 2 is blank (and 1 more like it)"
    assert result.lines == 4


def test_a_bare_carriage_return_is_no_crlf() -> None:
    """White space before the last brace of a file without a final newline is not taken for CRLF."""
    assert warned(checked(request("a")[:-1] + b"\r}")) == [(1, "no_final_newline")]


def test_models_are_bounded() -> None:
    """Of very many models only some are counted, and long names are cut."""
    result = checked(text(*(request(str(n), f"{n}" * 1000) for n in range(10, 60))))
    assert len(result.models) == module.MAX_MODELS
    assert max(map(len, result.models)) < 200
    assert result.warnings[0].detail.startswith("20 or more models")


@pytest.mark.parametrize("step", [1, 7, 64])
def test_a_line_too_long_to_parse(step: int) -> None:
    """A line above the limit is counted, hashed and skimmed, but not parsed; the lines around it are."""
    data = text(request("a"), b'{"no": JSON }' * 50, request("a"))
    result = checked(data, step=step, longest_line=200)
    assert reasons(result) == [(3, "custom_id_repeated")]
    assert warned(result) == [(2, "line_not_parsed")]
    assert (result.lines, result.sha256) == (3, hashlib.sha256(data).hexdigest())


def test_a_line_of_too_many_values_to_parse() -> None:
    """A line that would fill the memory and that the fast decoder refuses is warned of, not condemned."""
    data = text(request("a"), b'{"x": ["\\ud800"' + b", []" * 500_000 + b"]}")
    result = checked(data, step=len(data))
    assert reasons(result) == []
    assert warned(result) == [(2, "line_not_parsed")]


@pytest.mark.parametrize(
    ("line", "level", "found"),
    [
        (b"x" * 500, Check.BATCH, ["not_json"]),
        (b"x" * 500, Check.JSONL, ["not_json"]),
        (b"[" + b"1," * 250 + b"1]", Check.BATCH, ["not_object"]),
        (b"[" + b"1," * 250 + b"1]", Check.JSONL, []),
        (b'{"a": "' + b"x" * 500, Check.BATCH, ["not_json"]),
        (b" {" + b"x" * 500 + b"}\r", Check.BATCH, []),
    ],
)
def test_the_ends_of_a_line_too_long_to_parse(line: bytes, level: Check, found: list[str]) -> None:
    """A line that can't be what it should by its first or last byte is a finding, not only a warning."""
    result = checked(text(request("a"), line), level, step=64, longest_line=200)
    assert [reason for _, reason in reasons(result)] == found
    assert (2, "line_not_parsed") in warned(result)


def test_blanks_too_long_to_parse() -> None:
    """They are a blank line like any other, and no line is counted for them."""
    for level in Check:
        result = checked(b" " * 500 + b"\n", level, step=64, longest_line=200)
        assert (result.lines, reasons(result)) == (0, [(None, "empty")])


def test_a_model_that_is_no_string() -> None:
    """The warning does not claim that there is none."""
    result = checked(text(request("a", model=7), request("b", model=None)))
    assert [warning.detail for warning in result.warnings] == [
        "line 1 has a body.model that is no string",
        "line 2 names no body.model",
    ]


@pytest.mark.parametrize(
    ("bad", "reason"), [(b"\xff", "not_utf8"), (b"\xe4\xb8", "not_utf8"), (b"\0", "nul_bytes")]
)
def test_bad_bytes_in_a_line_too_long_to_parse(bad: bytes, reason: str) -> None:
    """Bytes that no text holds are found in lines that are not parsed, with their offset."""
    result = checked(text(b"x" * 500 + bad), step=64, longest_line=200)
    assert reasons(result) == [(1, reason)]
    assert "offset 500 " in result.findings[0].detail


# --- levels ------------------------------------------------------------------------------------------------


def test_level_jsonl() -> None:
    """At `jsonl` each line is one JSON value in UTF-8, of any kind; limits and warnings hold as ever."""
    data = text(b"1", b"[]\r", b"", b'"\\ud800"', b"{", b'"\xff"', b'"' + b"x" * 300 + b'"', b"NaN") + b"null"
    result = checked(data, Check.JSONL, step=50, longest_line=200, max_lines=4)
    assert reasons(result) == [(None, "too_many_lines"), (5, "not_json"), (6, "not_utf8"), (8, "not_json")]
    assert warned(result) == [(2, "crlf"), (3, "blank_lines"), (7, "line_not_parsed"), (9, "no_final_newline")]
    assert result.lines == 8


def test_level_none() -> None:
    """At `none` nothing is found, nothing warned of and no limit holds; digest and lines are taken."""
    data = text(b"\xff\0", b"", b"{", b"x" * 500) + b"y"
    result = checked(data, Check.NONE, max_bytes=1, max_lines=1, step=50, longest_line=200)
    assert result == Checked(sha256=hashlib.sha256(data).hexdigest(), size=len(data), lines=4)


# --- any file ----------------------------------------------------------------------------------------------

message = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"])}, optional={"content": st.text()}
)
bodies = st.fixed_dictionaries(
    {"messages": st.lists(message, max_size=3).map(lambda begun: [*begun, USER])},
    optional={"model": st.text() | st.none(), "temperature": st.floats(0, 2), "stop": st.lists(st.text())},
)
files = st.lists(st.tuples(st.text(min_size=1), bodies), min_size=1, max_size=6, unique_by=lambda line: line[0])


@given(files, st.booleans(), st.integers(1, 50), st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
def test_every_valid_file_is_accepted(
    requests: list[tuple[str, dict[str, Any]]],
    ascii_only: bool,  # noqa: FBT001
    step: int,
    newline: bytes,
) -> None:
    """A file of good requests is accepted, however it is written and wherever the blocks cut it."""
    lines = [
        json.dumps({"custom_id": custom_id, "body": body}, ensure_ascii=ascii_only).encode()
        for custom_id, body in requests
    ]
    result = checked(newline.join(lines), step=step)
    assert (result.findings, result.lines) == ((), len(lines))


@given(
    st.binary()
    | st.lists(st.sampled_from([b"\n", b"\r", b" ", b"{", b"}", b"1", b"\xff", b"\0"])).map(b"".join),
    st.integers(1, 20),
    st.integers(1, 30),
    st.sampled_from(Check),
)
def test_any_bytes_at_all(data: bytes, step: int, longest_line: int, level: Check) -> None:
    """Whatever the bytes, nothing is raised, and digest, size and lines are those of the whole file."""
    result = checked(data, level, step=step, longest_line=max(step, longest_line))
    assert (result.sha256, result.size) == (hashlib.sha256(data).hexdigest(), len(data))
    plain = checked(data, level, step=len(data) or 1)
    assert plain.lines == sum(1 for line in data.split(b"\n") if line.strip(b" \t\r"))
    assert plain.sha256 == result.sha256


@given(
    st.lists(st.sampled_from([b"[]", b"", b"{", request("a"), request("a", "ü") + b"\r", b"\xff"])),
    st.integers(1, 99),
)
def test_blocks_make_no_difference(lines: list[bytes], step: int) -> None:
    """Wherever the blocks cut a file, the result is the same."""
    data = b"\n".join(lines)
    assert checked(data, step=step) == checked(data, step=len(data) or 1)


# --- reading -----------------------------------------------------------------------------------------------


def large_file() -> bytes:
    filler = "ü" * 100_000
    return text(*(request(str(n), "m", filler=filler) for n in range(30)))


def test_a_file_of_many_blocks(tmp_path: Path) -> None:
    """A file of several blocks, digested beside the parsing, gets the digest and the lines that it has."""
    data = large_file()
    fd = saved(tmp_path, data)
    result = check(fd, len(data), level=Check.BATCH, max_bytes=0, max_lines=0)
    os.close(fd)
    assert (result.sha256, result.lines, result.findings) == (hashlib.sha256(data).hexdigest(), 30, ())


def test_a_file_is_read_from_its_start_to_the_size_given(tmp_path: Path) -> None:
    """The position of the descriptor plays no part, and what was appended meanwhile is not looked at."""
    data = text(request("a"))
    fd = saved(tmp_path, data + b"appended")
    os.lseek(fd, 5, os.SEEK_SET)
    result = check(fd, len(data), level=Check.BATCH, max_bytes=0, max_lines=0)
    position = os.lseek(fd, 0, os.SEEK_CUR)
    os.close(fd)
    assert (result.sha256, result.findings, position) == (hashlib.sha256(data).hexdigest(), (), 5)


@pytest.mark.parametrize("data", [text(request()), large_file()], ids=["small", "large"])
def test_a_file_that_shrank(tmp_path: Path, data: bytes) -> None:
    """A file that ends before its size is no finding but an exception of its own."""
    fd = saved(tmp_path, data)
    with pytest.raises(ShortRead, match=f"after {len(data)} of {len(data) + 1} bytes"):
        check(fd, len(data) + 1, level=Check.BATCH, max_bytes=0, max_lines=0)
    os.close(fd)


def test_stop_is_heard_between_blocks(tmp_path: Path) -> None:
    """A check that is told to stop does so before the next block is read."""
    data = large_file()
    fd = saved(tmp_path, data)
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    with pytest.raises(Stopped, match=f"after {2 * 1024 * 1024} bytes"):
        check(fd, len(data), level=Check.BATCH, max_bytes=0, max_lines=0, stop=stop)
    os.close(fd)
    assert asked == [False, False, True]


def test_a_stream_is_checked_like_a_file() -> None:
    """A stream of unknown size yields what a file of the same bytes does."""
    data = large_file() + b"[]"
    result = check_stream(io.BytesIO(data), level=Check.BATCH, max_bytes=len(data) - 1, max_lines=0)
    assert result == checked(data, max_bytes=len(data) - 1)
    assert reasons(result) == [(None, "too_big"), (31, "not_object")]


def test_memory_does_not_grow_with_a_line() -> None:
    """A line of 64 MiB without an end is checked in a small multiple of the longest line that is kept."""
    block = "ü".encode() * (128 * 1024)
    tracemalloc.start()
    try:
        result = check_blocks(
            (io.BytesIO(block) for _ in range(256)),
            level=Check.BATCH,
            max_bytes=0,
            max_lines=0,
            longest_line=1024 * 1024,
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert warned(result) == [(1, "line_not_parsed"), (1, "no_final_newline")]
    assert reasons(result) == [(1, "not_json")]
    assert peak < 8 * 1024 * 1024

"""Sidecars and reports, and the names that they reserve."""

import base64
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sfwatch import files, record

AT = datetime(2026, 11, 22, 20, 1, 12, 345678, tzinfo=UTC)
STAMP = "20261122T200112Z"
DATA = {"id": "file-jkvytbjtow", "object": "file", "bytes": 8509, "createdAt": 1741685396, "purpose": "batch"}
SHA256 = "ab" * 32
FACTS = {"sha256": SHA256, "size": 8509, "inbox": "evals", "original_name": "requests.jsonl"}
UNDECODABLE = os.fsdecode(b"caf\xe9.jsonl")

# what a folder can really hold: any bytes but these two, up to 255 of them
file_names = (
    st.one_of(
        st.binary(min_size=1, max_size=255),
        st.text(min_size=1, max_size=255).map(lambda t: t.encode("utf-8", "replace")[:255]),
    )
    .map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"_"))
    .filter(lambda name: name not in {b".", b".."})
    .map(os.fsdecode)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters()), inner, max_size=3),
    max_leaves=10,
)


@pytest.fixture(name="there")
def _there(tmp_path: Path) -> Iterator[int]:
    with files.folder(tmp_path) as fd:
        yield fd


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def a_report(**facts: Any) -> dict[str, Any]:
    known = {
        "reason": "not_json",
        "detail": "line 17 is no JSON",
        "sha256": SHA256,
        "size": 12,
        "inbox": "evals",
        "original_name": "x.jsonl",
        "failed_at": AT,
        "version": "1",
    }
    return parsed(record.report(**{**known, **facts}))


def parsed(document: bytes) -> dict[str, Any]:
    assert document.endswith(b"}\n")
    content: dict[str, Any] = json.loads(document.decode("utf-8"), parse_constant=refuse)
    return content


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


class TestSidecar:
    def test_the_services_object_on_top_and_ours_under_one_key(self) -> None:
        """So that `jq -r .id` works."""
        content = parsed(record.sidecar(data=DATA, facts=FACTS))
        assert content == {**DATA, "sfwatch": {"schema": 1, **FACTS}}
        assert list(content) == [*DATA, "sfwatch"]

    def test_the_service_cannot_speak_for_us(self) -> None:
        """A key of our name in its object gives way to ours."""
        content = parsed(record.sidecar(data={**DATA, "sfwatch": {"sha256": "forged"}}, facts=FACTS))
        assert content["sfwatch"]["sha256"] == SHA256

    def test_it_is_read_by_people(self) -> None:
        """One key a line, letters of all scripts as they are."""
        text = record.sidecar(data={"id": "文件-é"}, facts={}).decode()
        assert text.startswith('{\n  "id": "文件-é",\n')

    @given(data=st.dictionaries(st.text(), json_values, max_size=5))
    def test_its_lines_are_broken_as_pythons_json_breaks_them(self, data: dict[str, Any]) -> None:
        """Two spaces a level, `1e+16` and not `1e16`: who compares documents as text sees no difference."""
        assume(writable(data))
        document = record.sidecar(data=data, facts=FACTS).decode()
        plain = json.dumps(json.loads(document), ensure_ascii=False, indent=2)
        assert document == escaped(plain) + "\n"

    def test_an_undecodable_name(self) -> None:
        """Is printable, with its bytes beside it."""
        ours = parsed(record.sidecar(data=DATA, facts={**FACTS, "original_name": UNDECODABLE}))["sfwatch"]
        assert ours["original_name"] == "caf\\xe9.jsonl"
        assert base64.b64decode(ours["original_name_b64"]) == b"caf\xe9.jsonl"
        assert record.original_name(ours) == UNDECODABLE

    def test_a_terminal_is_not_steered(self) -> None:
        """Control and direction characters are escaped as JSON does it, which changes no value."""
        odd = "\x1b[2J\x9b2J\x7f\u202egnp.exe\u2028"
        document = record.sidecar(data={"id": odd}, facts={})
        assert all(character.isprintable() or character == "\n" for character in document.decode())
        assert parsed(document)["id"] == odd

    @pytest.mark.parametrize(
        ("odd", "shown"),
        [
            ("a\ud800b", "a\\ud800b"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            ([1, {"a\udc80": ["\udfff", True, None, 1.5]}], [1, {"a\\x80": ["\\udfff", True, None, 1.5]}]),
            ([10**5000], [f"{10**5000:#x}"]),
            (b"bytes", "b'bytes'"),
        ],
    )
    def test_what_cannot_be_written_is_shown(self, odd: Any, shown: Any) -> None:
        """The rest of the document stays as it is."""
        content = parsed(record.sidecar(data={**DATA, "odd": odd}, facts=FACTS))
        assert content == {**DATA, "odd": shown, "sfwatch": {"schema": 1, **FACTS}}

    def test_great_depth(self) -> None:
        """Is cut off, and costs the other values nothing."""
        deep: Any = "bottom"
        for _ in range(100_000):
            deep = [deep]
        content = parsed(record.sidecar(data={**DATA, "deep": deep}, facts=FACTS))
        assert {key: content[key] for key in DATA} == DATA
        assert "nested too deeply" in json.dumps(content["deep"])
        while isinstance(deep, list):  # freed level by level: all at once is deep, too
            deep = deep[0]

    @given(data=st.dictionaries(st.text(st.characters()), json_values, max_size=5))
    def test_whatever_the_service_sends(self, data: dict[str, Any]) -> None:
        """The document is valid JSON in UTF-8, and what can be written comes back as it was."""
        content = parsed(record.sidecar(data=data, facts=FACTS))
        assert content["sfwatch"] == {"schema": 1, **FACTS}
        if writable(data):
            assert {**content, "sfwatch": None} == {**data, "sfwatch": None}


def escaped(text: str) -> str:
    """As JSON escapes it: what could move a cursor or turn the writing around."""
    risky = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
    return risky.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def writable(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return True


class TestReport:
    def test_all_that_is_known(self) -> None:
        """Key by key, in this order."""
        finding = {"line": 17, "reason": "not_json", "detail": "a comma is missing"}
        content = a_report(
            line=17,
            findings=[finding],
            more_findings=3,
            http_status=400,
            code=20071,
            message="no",
            trace_id="t",
            attempts=1,
        )
        assert content == {
            "schema": 1,
            "reason": "not_json",
            "detail": "line 17 is no JSON",
            "next_step": record.NEXT_STEPS["not_json"],
            "line": 17,
            "findings": [finding],
            "more_findings": 3,
            "http_status": 400,
            "code": 20071,
            "message": "no",
            "trace_id": "t",
            "attempts": 1,
            "sha256": SHA256,
            "size": 12,
            "inbox": "evals",
            "original_name": "x.jsonl",
            "failed_at": "2026-11-22T20:01:12.345Z",
            "version": "1",
        }

    def test_what_is_not_known_is_null(self) -> None:
        """Readers find every key; only the count of further findings is left out."""
        content = a_report(sha256=None, size=None)
        unknown = {key for key, value in content.items() if value is None}
        assert unknown == {"line", "http_status", "code", "message", "trace_id", "sha256", "size"}
        assert "more_findings" not in content

    def test_texts_are_bounded_and_harmless(self) -> None:
        """At 2,000 characters; control characters can't forge a line even after `jq -r`."""
        content = a_report(detail="x" * 3000, message="a\nb\x1b[31m\x9b\u202e\ud800", next_step="y" * 2000)
        assert (len(content["detail"]), content["detail"][-2:]) == (2000, "x…")
        assert content["message"] == "a\\x0ab\\x1b[31m\\x9b\\u202e\\ud800"
        assert content["next_step"] == "y" * 2000

    def test_findings_may_be_objects(self) -> None:
        """As a check returns them."""

        class Found:
            line = None
            reason = "empty"
            detail = "no\tlines"

        assert a_report(findings=[Found()])["findings"] == [
            {"line": None, "reason": "empty", "detail": "no\\x09lines"}
        ]

    def test_an_undecodable_name(self) -> None:
        """Comes back as it was."""
        assert record.original_name(a_report(original_name=UNDECODABLE)) == UNDECODABLE

    def test_every_reason_has_a_next_step(self) -> None:
        """And an unheard-of one a general word."""
        reasons = (
            "not_utf8 bom not_json not_object custom_id_missing custom_id_invalid custom_id_repeated"
            " messages_missing messages_invalid role_invalid last_role_not_user empty too_many_lines too_big"
            " nul_bytes refused keeps_failing gave_up"
        )
        assert sorted(record.NEXT_STEPS) == sorted(reasons.split())
        assert "sfwatch retry" in a_report(reason="unheard_of")["next_step"]

    def test_a_time_that_is_text_already(self) -> None:
        """Stays as it was kept."""
        assert a_report(failed_at="2026-11-22T20:01:12.345Z")["failed_at"] == "2026-11-22T20:01:12.345Z"


class TestOriginalName:
    @pytest.mark.parametrize("name", ["x.jsonl", "a/b/x.jsonl", "a\nb.jsonl", "文件.jsonl"])
    def test_a_plain_name(self, name: str) -> None:
        """Also in a sub-folder."""
        assert record.original_name({"original_name": name}) == name

    @pytest.mark.parametrize(
        "facts",
        [
            {},
            {"original_name": None},
            {"original_name": 7},
            {"original_name": "../../etc/cron.d/x"},
            {"original_name": "/etc/passwd"},
            {"original_name": "a\0b"},
            {"original_name": "\ud800"},
            {"original_name": "x", "original_name_b64": base64.b64encode(b"../x").decode()},
            {"original_name": "x", "original_name_b64": "?"},
            {"original_name": "x", "original_name_b64": 7},
            {"original_name": "x", "original_name_b64": "é"},
        ],
    )
    def test_a_forged_report(self, facts: dict[str, Any]) -> None:
        """Can't name anything outside an inbox."""
        with pytest.raises(ValueError, match="name"):
            record.original_name(facts)


class TestRfc3339:
    def test_it_is_utc(self) -> None:
        """Wherever the time was taken."""
        assert record.rfc3339(AT.astimezone(timezone(timedelta(hours=8)))) == "2026-11-22T20:01:12.345Z"


class TestChooseName:
    def test_its_own_name_if_that_is_free(self, there: int) -> None:
        """Nothing is added without need."""
        assert record.choose_name(there, "X.JSONL", record.SIDECAR, at=AT) == "X.JSONL"

    @pytest.mark.parametrize("taken", ["x.jsonl", "x.jsonl.fileid.json"])
    def test_the_time_if_the_name_or_its_sidecar_is_taken(self, tmp_path: Path, there: int, taken: str) -> None:
        """In UTC, before the extension, which stays as it was written."""
        (tmp_path / taken).touch()
        (tmp_path / taken.upper()).touch()
        assert record.choose_name(there, "x.jsonl", record.SIDECAR, at=AT) == f"x.{STAMP}.jsonl"
        if taken == "x.jsonl":
            assert record.choose_name(there, "X.JSONL", record.SIDECAR, at=AT) == f"X.{STAMP}.JSONL"

    def test_a_dangling_link_is_a_taken_name(self, tmp_path: Path, there: int) -> None:
        """Whatever it leads to."""
        (tmp_path / "x.jsonl").symlink_to("nowhere")
        assert record.choose_name(there, "x.jsonl", record.SIDECAR, at=AT) != "x.jsonl"

    def test_a_counter_if_even_that_is_taken(self, tmp_path: Path, there: int) -> None:
        """It counts from 1 and passes over what is taken."""
        for name in ("x.jsonl", f"x.{STAMP}.jsonl", f"x.{STAMP}.1.jsonl.error.json"):
            (tmp_path / name).touch()
        assert record.choose_name(there, "x.jsonl", record.REPORT, at=AT) == f"x.{STAMP}.2.jsonl"

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("x", f"x.{STAMP}"),
            (".jsonl", f".jsonl.{STAMP}"),
            ("a.b.jsonl", f"a.b.{STAMP}.jsonl"),
            ("x." + "e" * 40, f"x.{'e' * 40}.{STAMP}"),
        ],
    )
    def test_where_the_time_goes(self, tmp_path: Path, there: int, name: str, other: str) -> None:
        """Before the last dot; behind a name that has no extension, or none that could be one."""
        (tmp_path / name).touch()
        assert record.choose_name(there, name, record.SIDECAR, at=AT) == other

    def test_a_name_too_long_for_its_sidecar(self, there: int) -> None:
        """Is cut between characters, keeps its extension, and is told apart from its like by a digest."""
        long, other = "é" * 124 + ".jsonl", "é" * 123 + "è.jsonl"
        name = record.choose_name(there, long, record.SIDECAR, at=AT)
        assert len(os.fsencode(name + record.SIDECAR)) in {254, 255}
        assert name.startswith("é" * 100)
        assert name.endswith(".jsonl")
        assert name != record.choose_name(there, other, record.SIDECAR, at=AT)

    @given(name=file_names, taken=st.sets(st.integers(0, 5)))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
    def test_any_name(self, tmp_path: Path, there: int, name: str, taken: set[int]) -> None:
        """What is chosen is free, fits with either suffix, is the same each time, and can be made."""
        empty(tmp_path)
        candidates = record._candidates(name, AT, record._longest_name(there))
        for number, candidate in zip(range(6), candidates, strict=False):
            if number in taken:
                (tmp_path / candidate).touch()
        chosen = record.choose_name(there, name, record.SIDECAR, at=AT)
        assert chosen == record.choose_name(there, name, record.SIDECAR, at=AT)
        assert os.fsdecode(os.fsencode(chosen)) == chosen
        assert chosen not in names(tmp_path)
        for suffix in (record.SIDECAR, record.REPORT):
            assert len(os.fsencode(chosen + suffix)) <= 255
            (tmp_path / (chosen + suffix)).touch(exist_ok=False)
        (tmp_path / chosen).touch(exist_ok=False)

    @given(st.sets(file_names, min_size=2, max_size=2))
    def test_two_names_stay_two(self, pair: set[str]) -> None:
        """However long they are and wherever they differ."""
        one, other = (next(record._candidates(name, AT, 243)) for name in pair)
        assert one != other


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


class TestReserve:
    document = record.sidecar(data=DATA, facts=FACTS)

    def reserve(self, there: int, document: bytes | None = None) -> None:
        record.reserve(there, "x.jsonl", record.SIDECAR, document or self.document, sha256=SHA256)

    def test_it_is_published(self, tmp_path: Path, there: int) -> None:
        """Whole, readable for the folder's group, and alone."""
        self.reserve(there)
        assert names(tmp_path) == ["x.jsonl.fileid.json"]
        assert (tmp_path / "x.jsonl.fileid.json").read_bytes() == self.document
        assert stat.S_IMODE((tmp_path / "x.jsonl.fileid.json").stat().st_mode) == 0o640

    def test_our_own_is_continued(self, tmp_path: Path, there: int) -> None:
        """As after a crash between the sidecar and the move."""
        self.reserve(there)
        self.reserve(there)
        assert names(tmp_path) == ["x.jsonl.fileid.json"]

    def test_our_own_report_is_continued(self, there: int) -> None:
        """The digest is found in either form."""
        document = json.dumps({"schema": 1, "sha256": SHA256}).encode()
        for _ in range(2):
            record.reserve(there, "x.jsonl", record.REPORT, document, sha256=SHA256)

    def test_a_file_beside_it_means_that_it_is_done(self, tmp_path: Path, there: int) -> None:
        """The name belongs to that file, though the bytes are the same."""
        self.reserve(there)
        (tmp_path / "x.jsonl").touch()
        with pytest.raises(FileExistsError):
            self.reserve(there)

    def test_a_file_without_a_sidecar_keeps_its_name(self, tmp_path: Path, there: int) -> None:
        """No sidecar appears beside somebody else's file."""
        (tmp_path / "x.jsonl").touch()
        with pytest.raises(FileExistsError):
            self.reserve(there)
        assert names(tmp_path) == ["x.jsonl"]

    @pytest.mark.parametrize(
        "other",
        [
            b"",
            b"{",
            b"[]",
            b"\xff",
            b"[" * 100_000,
            b'{"sfwatch": []}',
            b'{"id": "file-jkvytbjtow", "sfwatch": {"sha256": "other"}}',
            b'{"id": "another", "sfwatch": {"sha256": "' + SHA256.encode() + b'"}}',
            b'{"id": [], "sfwatch": {"sha256": "' + SHA256.encode() + b'"}}',
            b'{"id": "file-jkvytbjtow"}',
            record.sidecar(data=DATA | {"id": "file-of-a-twin"}, facts=FACTS),
        ],
    )
    def test_anything_else_is_somebody_elses(self, tmp_path: Path, there: int, other: bytes) -> None:
        """Another upload's, no JSON at all, or what was put there to be read: it stays as it is."""
        (tmp_path / "x.jsonl.fileid.json").write_bytes(other)
        with pytest.raises(FileExistsError):
            self.reserve(there)
        assert (tmp_path / "x.jsonl.fileid.json").read_bytes() == other

    @pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
    def test_what_is_no_file_is_not_opened(self, tmp_path: Path, there: int, kind: str) -> None:
        """A link to a document like ours is not ours either."""
        (tmp_path / "like").write_bytes(self.document)
        path = tmp_path / "x.jsonl.fileid.json"
        makers: dict[str, Callable[[], object]] = {
            "symlink": lambda: path.symlink_to("like"),
            "fifo": lambda: os.mkfifo(path),
            "folder": path.mkdir,
        }
        makers[kind]()
        with pytest.raises(FileExistsError):
            self.reserve(there)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
    def test_a_forged_document_is_not_ours(self, tmp_path: Path, there: int) -> None:
        """Somebody else's file is not continued, unless it is ours to the last byte."""
        (tmp_path / "x.jsonl.fileid.json").write_bytes(self.document)
        os.chown(tmp_path / "x.jsonl.fileid.json", 4242, -1)
        self.reserve(there)
        (tmp_path / "x.jsonl.fileid.json").write_bytes(self.document.replace(b'"evals"', b'"other"'))
        os.chown(tmp_path / "x.jsonl.fileid.json", 4242, -1)
        with pytest.raises(FileExistsError):
            self.reserve(there)

    def test_the_longest_name_that_is_chosen_can_be_reserved(self, tmp_path: Path, there: int) -> None:
        """Its sidecar has just 255 bytes, and its temporary a short name."""
        name = record.choose_name(there, "n" * 249 + ".jsonl", record.SIDECAR, at=AT)
        record.reserve(there, name, record.SIDECAR, self.document, sha256=SHA256)
        assert names(tmp_path) == [name + record.SIDECAR]
        assert len(name + record.SIDECAR) == 255


class TestUnreserve:
    def test_our_own_goes(self, tmp_path: Path, there: int) -> None:
        """Also when somebody's file has taken the name meanwhile, which stays."""
        record.reserve(there, "x.jsonl", record.SIDECAR, TestReserve.document, sha256=SHA256)
        (tmp_path / "x.jsonl").touch()
        record.unreserve(there, "x.jsonl", record.SIDECAR, TestReserve.document, sha256=SHA256)
        assert names(tmp_path) == ["x.jsonl"]

    def test_somebody_elses_stays(self, tmp_path: Path, there: int) -> None:
        """As does nothing."""
        record.unreserve(there, "x.jsonl", record.SIDECAR, TestReserve.document, sha256=SHA256)
        (tmp_path / "x.jsonl.fileid.json").write_text('{"sfwatch": {"sha256": "other"}}')
        record.unreserve(there, "x.jsonl", record.SIDECAR, TestReserve.document, sha256=SHA256)
        assert names(tmp_path) == ["x.jsonl.fileid.json"]

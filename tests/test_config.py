"""The configuration: what it means, and that every fault in it is told at once with its place."""

import contextlib
import dataclasses
import datetime as dt
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from configuration import BASE, SMALLEST, inbox, parse, problems
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import config, settings
from sfwatch.config import ConfigError, Problem
from sfwatch.language import API, INBOX, LOG, TOP, UPLOADS, Entry, Section
from sfwatch.settings import Api, Config, Inbox, Log, Uploads

SECRET = "sk-abcdefghijklmnopqrstuvwxyz"
REFERENCE = Path(__file__).parents[1] / "config" / "sfwatch.yaml"
DEFAULT_INBOX = Inbox(
    path=Path("/srv/sfwatch/inbox"),
    name="inbox",
    done=Path("/srv/sfwatch/done"),
    failed=Path("/srv/sfwatch/failed"),
)


def attempt(text: str) -> Config | ConfigError:
    try:
        return parse(text)
    except ConfigError as error:
        return error


# ---- the whole ----


def test_the_smallest_file_works() -> None:
    """One inbox with its path is a whole configuration; everything else is at its default."""
    assert parse(SMALLEST) == Config(inboxes=(DEFAULT_INBOX,))


def test_the_reference_file_holds_the_defaults() -> None:
    """config/sfwatch.yaml means the same as the smallest file."""
    assert parse(REFERENCE.read_text()) == parse(SMALLEST)


def names(keys: tuple[Entry, ...]) -> dict[str, Any]:
    """The names of keys, and of those below them."""
    return {entry.name: names(entry.kind.keys) if isinstance(entry.kind, Section) else {} for entry in keys}


def names_in(tree: object) -> dict[str, Any]:
    """The same of a YAML document."""
    inner = tree[0] if isinstance(tree, list) and isinstance(tree[0], dict) else tree
    return {name: names_in(value) for name, value in inner.items()} if isinstance(inner, dict) else {}


def test_the_reference_file_names_every_key() -> None:
    """Every known key stands in config/sfwatch.yaml, and no other; its inbox overrides nothing of api."""
    expected = names(TOP)
    expected["inboxes"]["api"] = {}
    assert names_in(yaml.safe_load(REFERENCE.read_text())) == expected


@pytest.mark.parametrize(
    ("values", "keys", "apart"),
    [
        (Api, API, set()),
        (Inbox, INBOX, set()),
        (Uploads, UPLOADS, set()),
        (Log, LOG, set()),
        (Config, TOP, {"api"}),
    ],
)
def test_keys_and_settings_are_the_same(values: type[Any], keys: tuple[Entry, ...], apart: set[str]) -> None:
    """Every field of the settings has its key and every key its field, each with words on what it is for."""
    fields = {item.name for item in dataclasses.fields(values)} - {"source"}
    assert {entry.field for entry in keys} - apart == fields
    assert all(entry.about for entry in keys)


def test_the_source_is_kept() -> None:
    """The configuration knows which file it is from, and so does its error."""
    assert parse(SMALLEST, source=Path("x.yaml")).source == Path("x.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml:\n  inboxes: is missing") as caught:
        parse("{}", source=Path("x.yaml"))
    assert caught.value.source == Path("x.yaml")


def test_every_problem_is_told_at_once_with_path_and_line() -> None:
    """Five faults in one file are five problems, in the order of their lines."""
    text = """\
inboxes:
  - path: /srv/a
    settle: 5
    recursiv: true
  - path: ~/b
uploads:
  concurrency: 0
log: {level: loud}
"""
    assert problems(text) == [
        "inboxes[0].settle (line 3): '5' is no duration: write 5s, 5m or 5h",
        "inboxes[0].recursiv (line 4): is not known; did you mean recursive?",
        "inboxes[1].path (line 5): `~` is not expanded: write the path out, or relative to this file's folder",
        "uploads.concurrency (line 7): '0' is not a whole number, 1 to 64",
        "log.level (line 8): 'loud' is none of debug, info, warning, error",
    ]


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.b", 3, "is bad"), "a.b (line 3): is bad"),
        (Problem("a.b", None, "is bad"), "a.b: is bad"),
        (Problem("", 3, "is bad"), "line 3: is bad"),
        (Problem("", None, "is bad"), "is bad"),
    ],
)
def test_a_problem_reads_as_a_sentence(problem: Problem, text: str) -> None:
    """A problem prints where it is, as far as that is known, and what is wrong."""
    assert str(problem) == text


# ---- text that is no configuration ----


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold `key: value` lines"),
        ("# nothing\n", "must hold `key: value` lines"),
        ("~", "must hold `key: value` lines"),
        ("hello", "must hold `key: value` lines"),
        ("- path: /srv/inbox", "must hold `key: value` lines"),
        ("inboxes: [", "line 1: is not sound YAML"),
        ("a: b\nc: d: e", "line 2: is not sound YAML: mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", "line 2: is not sound YAML: expected a single document"),
        ("a:\n\tb: 1", "line 2: is not sound YAML: .*with spaces"),
        ("a: 1\nb: \0", "line 2: has a character"),
        ("a: \ud800", "line 1: has a character"),
        ("[" * 50_000, "is nested too deeply"),
        ("{a: " * 50_000, "is nested too deeply"),
        ('a: "\\UFFFFFFFF"', "is not sound YAML"),
        ("%YAML " + "9" * 5000 + ".1\n--- a", "is not sound YAML"),
        ("a: " + "x" * config.LONGEST_TEXT, "is longer than"),
        ("match: [*.jsonl]", "line 1: is not sound YAML: .*must stand in quotes"),
        ("a: &x [1]\nb: [*x, *x]", "line 2: is not sound YAML: aliases .*must stand in quotes"),
        ("a: &x [*x]", "line 1: is not sound YAML: aliases"),
    ],
)
def test_text_that_is_no_configuration(text: str, told: str) -> None:
    """Unsound YAML of every sort is one problem, with its line where there is one."""
    with pytest.raises(ConfigError, match=told) as caught:
        parse(text)
    assert len(caught.value.problems) == 1


@given(st.text(alphabet=st.characters(codec=None), max_size=200))
def test_any_text_is_a_configuration_or_a_configuration_error(text: str) -> None:
    """Arbitrary text raises nothing but `ConfigError`, and never without a problem."""
    found = attempt(text)
    assert isinstance(found, Config) or found.problems


_SNIPPETS = st.sampled_from(
    [
        *(entry.name for entry in TOP),
        "path",
        "settle",
        "~",
        "null",
        "/srv/a",
        "5",
        "5s",
        "1GB",
        "never",
        "on",
        "!x",
        "&a",
        "*a",
        "<<",
        '"\\U',
        "%YAML",
    ]
)
_MARKUP = st.sampled_from(
    [": ", ":\n  ", "\n", "\n- ", "\n  - ", "[", "]", "{", "}", ", ", "'", '"', "|\n", "? ", "\t", "---\n"]
)


@given(st.lists(_SNIPPETS | _MARKUP, max_size=40).map("".join))
def test_text_that_is_nearly_yaml_raises_nothing_else(text: str) -> None:
    """Text of YAML's own pieces in any order raises nothing but `ConfigError`."""
    found = attempt(text)
    assert isinstance(found, Config) or found.problems


_WRONG: list[object] = [
    None,
    True,
    0,
    -1,
    5,
    1.5,
    float("nan"),
    10**30,
    b"x",
    {"a": 1},
    {1, 2},
    [[]],
    ["a", None],
]
_TEXTS = ["", "a", "/", "/a", "..", "5s", "1GB", "never", "é\0\n", "2026-11-22"]
_VALUES = st.sampled_from([*_WRONG, *_TEXTS, dt.date(2026, 11, 22)])


def _sections(keys: tuple[Entry, ...]) -> st.SearchStrategy[Any]:
    def value(entry: Entry) -> st.SearchStrategy[Any]:
        if not isinstance(entry.kind, Section):
            return _VALUES
        below = _sections(entry.kind.keys)
        return _VALUES | (st.lists(below, max_size=3) if entry.kind.many else below)

    pairs = st.one_of(*(st.tuples(st.just(entry.name), value(entry)) for entry in keys))
    return st.lists(pairs, max_size=5).map(dict)


@given(_sections(TOP))
def test_any_value_under_a_known_key_raises_nothing_else(tree: dict[str, Any]) -> None:
    """Known keys with values of every wrong type raise nothing but `ConfigError`."""
    found = attempt(yaml.safe_dump(tree))
    assert isinstance(found, Config) or found.problems


# ---- keys ----


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("inbox: []\n" + SMALLEST, "inbox (line 1): is not known; did you mean inboxes?"),
        (inbox("setle: 5s"), "inboxes[0].setle (line 3): is not known; did you mean settle?"),
        ("settle: 5s\n" + SMALLEST, "settle (line 1): is not known here: it belongs under inboxes"),
        ("base_url: x\n" + SMALLEST, "base_url (line 1): is not known here: it belongs under api"),
        (
            "log: {colour: red}\n" + SMALLEST,
            "log.colour (line 1): is not known; known here: level, format, file",
        ),
        ("<<: {}\n" + SMALLEST, "<< (line 1): is not known; known here"),
        ("null: 1\n" + SMALLEST, "null (line 1): is not known; known here"),
        ("? [a]\n: 1\n" + SMALLEST, "line 1: has a key that is no plain text"),
        ("api: {key_fil: /k}\n" + SMALLEST, "api.key_fil (line 1): is not known; did you mean key_file?"),
        (f"? {'x' * 300}\n: 1\n" + SMALLEST, "(a key of 300 characters) (line 1): is not known"),
        ('"a\\e[31m": 1\n' + SMALLEST, "(a key of 6 characters) (line 1): is not known"),
    ],
)
def test_unknown_keys_are_told_with_the_nearest(text: str, told: str) -> None:
    """An unknown key is one problem that says which key was probably meant, or where it belongs."""
    (problem,) = problems(text)
    assert problem.startswith(told)


def test_a_key_that_is_given_twice_is_told_with_both_lines() -> None:
    """A repeated key is a problem, and the first value is not silently replaced."""
    text = SMALLEST + "log: {level: info}\nscan_interval: 5s\nlog: {level: debug}\n"
    assert problems(text) == ["log (line 5): is given twice: in line 3 and again in line 5"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "inboxes: is missing"),
        ("inboxes", "must hold `key: value` lines: the smallest file that works is `inboxes: [{path: "),
        (
            "inboxes\n  - path: w/inbox",
            "line 2: is not sound YAML: mapping values are not allowed here (is a colon",
        ),
        ("inboxes:", "inboxes (line 1): must be a list with at least one item"),
        ("inboxes: []", "inboxes (line 1): must be a list with at least one item"),
        (
            "inboxes: /srv/inbox",
            "inboxes (line 1): must be a list with at least one item, such as [{path: /srv/sfwatch/inbox}]",
        ),
        (
            "inboxes: {path: /srv}",
            "inboxes (line 1): must be a list with at least one item, such as [{path: /srv/sfwatch/inbox}]",
        ),
        ("inboxes:\n  - /srv/inbox", "inboxes[0] (line 2): must hold keys, such as path: /srv/sfwatch/inbox"),
        ("inboxes:\n  - name: x", "inboxes[0] (line 2): has no path"),
        ("inboxes:\n  -", "inboxes[0] (line 2): has no path"),
        ("inboxes:\n  - path:", "inboxes[0].path (line 2): has no value: write a path"),
        (SMALLEST + "uploads: 4", "uploads (line 3): must hold keys, such as concurrency: 4"),
        (SMALLEST + "uploads: [concurrency]", "uploads (line 3): must hold keys, such as concurrency: 4"),
        (SMALLEST + "api: x", "api (line 3): must hold keys, such as base_url: https://api.siliconflow.cn/v1"),
        (SMALLEST + "log: x", "log (line 3): must hold keys, such as level: info"),
    ],
)
def test_sections_of_the_wrong_shape(text: str, told: str) -> None:
    """A missing or misshapen section is one problem at its place."""
    (problem,) = problems(text)
    assert problem.startswith(told)


def test_sections_without_keys_are_at_their_defaults() -> None:
    """A section whose keys are all commented out is as good as none."""
    assert parse(SMALLEST + "    api:\nuploads:\nlog:\napi: {}\n") == parse(SMALLEST)


# ---- values ----


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("name: on", "name", "on"),
        ("name: No", "name", "No"),
        ("name: 2026", "name", "2026"),
        ("name: 010", "name", "010"),
        ("name: 1.10", "name", "1.10"),
        ("name: 2026-11-22", "name", "2026-11-22"),
        ("name: =", "name", "="),
        ('name: "null"', "name", "null"),
        ("name: ü 收件箱", "name", "ü 收件箱"),
        ("name: null", "name", "inbox"),
        ("name: ~", "name", "inbox"),
        ("done: null", "done", Path("/srv/sfwatch/done")),
        ("done: /x/../y//z/", "done", Path("/y/z")),
        ("done: //y", "done", Path("/y")),
        ("done: sent", "done", Path("/etc/sfwatch/sent")),
        ("failed: ../x", "failed", Path("/etc/x")),
        ("recursive: on", "recursive", True),
        ("recursive: Yes", "recursive", True),
        ("recursive: TRUE", "recursive", True),
        ("recursive: off", "recursive", False),
        ("settle: 1.5s", "settle_s", 1.5),
        ('settle: "250ms"', "settle_s", 0.25),
        ("settle_unproven: 3s", "settle_unproven_s", 3.0),
        ("proof: never", "proof", settings.Proof.NEVER),
        ("check: none", "check", settings.Check.NONE),
        ("max_bytes: 0", "max_bytes", 0),
        ("max_bytes: 1.5KiB", "max_bytes", 1536),
        ("max_lines: 0", "max_lines", 0),
        ("settle_marker: .ok", "settle_marker", ".ok"),
        ("settle_marker: _DONE", "settle_marker", "_DONE"),
        ("settle_marker: null", "settle_marker", None),
        ('match: ["*.jsonl", "sk-*.ndjson"]', "match", ("*.jsonl", "sk-*.ndjson")),
        ("api: {read_timeout: 2h}", "api", Api(read_timeout_s=7200.0)),
    ],
)
def test_values_mean_what_is_written(line: str, field: str, value: object) -> None:
    """Values are taken as written: YAML 1.1's on, octal and dates don't get in the way."""
    (found,) = parse(inbox(line)).inboxes
    assert getattr(found, field) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("uploads: {give_up_after: never}", Uploads()),
        ("uploads: {give_up_after: 7d}", Uploads(give_up_after_s=604800.0)),
        ("uploads: {max_rate: unlimited}", Uploads()),
        ("uploads: {max_rate: 20MB}", Uploads(max_rate=20_000_000)),
        ("uploads: {poison_after: 0}", Uploads(poison_after=0)),
        ("uploads: {on_unknown: hold}", Uploads(on_unknown=settings.OnUnknown.HOLD)),
        ("uploads: {remote_name: tagged}", Uploads(remote_name=settings.RemoteName.TAGGED)),
        ("uploads: {longest_retry: 500ms}", Uploads(longest_retry_s=0.5)),
    ],
)
def test_uploads_mean_what_is_written(text: str, value: Uploads) -> None:
    """The words never and unlimited, and the rest of the uploads section."""
    assert parse(SMALLEST + text).uploads == value


def test_a_longer_settle_lengthens_the_default_of_settle_unproven() -> None:
    """Who asks for a longer rest gets at least as long a one where nothing proves that the writer is gone."""
    (found,) = parse(inbox("settle: 1m")).inboxes
    assert (found.settle_s, found.settle_unproven_s) == (60.0, 60.0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("settle: 5", "'5' is no duration: write 5s, 5m or 5h"),
        ("settle: 100000", "'100000' is no duration: write 1ms to 1d"),
        ("settle: 1000", "'1000' is no duration: write 1000s or 1000m"),
        ("settle: 0", "'0' is no duration: write 1ms to 1d"),
        ("settle: 0.5", "'0.5' is no duration: write 0.5s, 0.5m or 0.5h"),
        ("settle: 1:30", "'1:30' is no duration: write a number and ms"),
        ("settle: 5 s", "'5 s' is no duration"),
        ("settle: 5S", "'5S' is no duration"),
        ("settle: 1e3s", "'1e3s' is no duration"),
        ("settle: .inf", "'.inf' is no duration"),
        ("settle: ٣s", "'٣s' is no duration"),
        ("settle: -5s", "'-5s' is no duration"),
        ("settle: 0s", "'0s' is out of bounds: write 1ms to 1d"),
        ("settle: 2d", "'2d' is out of bounds"),
        ("settle: [5s]", "must be a duration, 1ms to 1d, not a list and not keys"),
        ("settle: {a: 5s}", "must be a duration, 1ms to 1d, not a list and not keys"),
        ("settle:", "has no value: write a duration"),
        ("settle: !!binary 5s", "has a tag"),
        ("settle: !x 5s", "has a tag"),
        ("max_bytes: 5", "'5' is no size: write 5B"),
        ("max_bytes: 1000000", "'1000000' is no size: write 1MB"),
        ("max_bytes: 1073741824", "'1073741824' is no size: write 1GiB"),
        ("max_bytes: 1500", "'1500' is no size: write 1500B"),
        ("max_bytes: 1.5", "'1.5' is no size: write 1.5KB, 1.5MB or 1.5GB"),
        ("max_bytes: 5kb", "'5kb' is no size: write a number and B, KB"),
        ("max_bytes: -1GB", "'-1GB' is no size"),
        ("max_bytes: unlimited", "'unlimited' is no size"),
        ("max_lines: 5_000", "'5_000' is not a whole number"),
        ("max_lines: 0x10", "'0x10' is not a whole number"),
        ("max_lines: 010", "'010' is not a whole number"),
        ("max_lines: 5.0", "'5.0' is not a whole number"),
        ("max_lines: 1" + "0" * 5000, "this is not a whole number"),
        ('recursive: "true"', "must be true or false, without quotes"),
        ("recursive: 1", "must be true or false, without quotes"),
        ("recursive: y", "must be true or false, without quotes"),
        ("recursive: !!bool x", "must be true or false, without quotes"),
        ("recursive:", "has no value"),
        ("proof: off", "'off' is none of auto, never"),
        ("check: Batch", "'Batch' is none of batch, jsonl, none"),
        ("check: null", "has no value: write one of batch, jsonl, none"),
        ('name: ""', "is empty, or has control characters in it"),
        ('name: "a\\nb"', "is empty, or has control characters in it"),
        ('name: "a\\ud800"', "is empty, or has control characters in it"),
        ('done: ""', "is empty"),
        ('done: "a\\0b"', "is empty, or has control characters in it"),
        ("done: ~/done", "`~` is not expanded"),
        ("done: $HOME/done", "`$` is not expanded"),
        ("purpose: two words", "must be letters, digits"),
        ('match: "*.jsonl"', 'must be a list with at least one item, such as ["*.jsonl"]'),
        ("match: []", "must be a list with at least one item"),
        ("settle_marker: a/b", "must be an ending"),
        ("settle_marker: .jsonl", "must be an ending"),
        ("settle_marker: .JSONL", "must be an ending"),
        ("settle_marker: .fileid.json", "must be an ending"),
        ("settle_marker: .x.error.json", "must be an ending"),
        ('settle_marker: ""', "is empty"),
    ],
)
def test_values_that_are_refused(line: str, told: str) -> None:
    """A value that its key doesn't take is one problem that says what it takes."""
    (problem,) = problems(inbox(line))
    key = line.partition(":")[0]
    assert problem.startswith(f"inboxes[0].{key} (line 3): {told}")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("give_up_after: 0", "uploads.give_up_after (line 3): '0' is no duration: write never"),
        ("give_up_after: 0s", "uploads.give_up_after (line 3): '0s' is out of bounds: write never"),
        ("max_rate: 0", "uploads.max_rate (line 3): '0' is no size: write unlimited"),
        ("max_rate: 2000000", "uploads.max_rate (line 3): '2000000' is no size: write 2MB"),
    ],
)
def test_the_word_for_none_is_told(line: str, told: str) -> None:
    """Where zero would mean none, the word for none is named."""
    (problem,) = problems(f"{SMALLEST}uploads: {{{line}}}")
    assert problem.startswith(told)


@pytest.mark.parametrize("pattern", ['""', "a/b", "[x]", '"a\\tb"', "~"])
def test_patterns_that_are_refused(pattern: str) -> None:
    """A pattern must be text without a slash; the problem names which one of the list."""
    (problem,) = problems(inbox(f'match: ["*.jsonl", {pattern}]'))
    assert problem.startswith("inboxes[0].match[1] (line 3): ")


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("scan_interval: 999ms", "scan_interval"),
        ("poll_interval: 99ms", "poll_interval"),
        ("history_days: 0", "history_days"),
        ("uploads: {max_rate: 0}", "uploads.max_rate"),
        ("uploads: {max_rate: 999B}", "uploads.max_rate"),
        ("uploads: {give_up_after: 0s}", "uploads.give_up_after"),
        ("uploads: {first_retry: 6m}", "uploads.first_retry"),
        ("uploads: {concurrency: 65}", "uploads.concurrency"),
        ("api: {connect_timeout: 0s}", "api.connect_timeout"),
        ("api: {read_timeout: 30d}", "api.read_timeout"),
        ("log: {format: xml}", "log.format"),
        ("log: {file: ~/log}", "log.file"),
        ("state_dir: ~/state", "state_dir"),
    ],
)
def test_values_out_of_bounds(line: str, path: str) -> None:
    """Intervals, counts and rates have bounds, and the problem names the key."""
    (problem,) = problems(SMALLEST + line)
    assert problem.startswith(f"{path} (line 3): ")


# ---- the service's address ----


@pytest.mark.parametrize(
    ("given_url", "url"),
    [
        ("https://api.siliconflow.com/v1/", "https://api.siliconflow.com/v1"),
        ("https://api.siliconflow.com", "https://api.siliconflow.com"),
        ("https://api.siliconflow.com//", "https://api.siliconflow.com"),
        ("HTTPS://API.SiliconFlow.cn:8443/V1", "https://api.siliconflow.cn:8443/V1"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1"),
        ("http://127.9.9.9", "http://127.9.9.9"),
        ("http://[::1]:8080/v1", "http://[::1]:8080/v1"),
        ("http://localhost/v1", "http://localhost/v1"),
    ],
)
def test_addresses_that_are_taken(given_url: str, url: str) -> None:
    """Taken are https anywhere and http on this machine, without the final slash, the host in lower case."""
    (found,) = parse(f'{SMALLEST}api: {{base_url: "{given_url}"}}').inboxes
    assert found.api.base_url == url


@pytest.mark.parametrize(
    "url",
    [
        "api.siliconflow.cn/v1",
        "ftp://api.siliconflow.cn",
        "file:///etc/passwd",
        "https://",
        "https:///v1",
        "https://:443/v1",
        "https://user:pa55word@host/v1",
        "https://pa55word@host/v1",
        "https://host/v1?key=pa55word",
        "https://host/v1#pa55word",
        "https://host/v1?",
        "https://host:pa55word/v1",
        "https://host:99999/v1",
        "https://[::1/v1",
        "https://[pa55word]/v1",
        "https://ho st/v1",
        "https://höst/v1",
        "https://host\\\\pa55word/v1",
        "http://api.siliconflow.cn/v1",
        "http://10.0.0.1/v1",
        "http://127.0.0.1.pa55word.example/v1",
        "http://[2001:db8::1]/v1",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    """What is no address, holds more than that, or shows the key on the way is refused, and not quoted."""
    (problem,) = problems(f'{SMALLEST}api:\n  base_url: "{url}"')
    assert problem.startswith("api.base_url (line 4): ")
    assert "pa55word" not in problem


def test_plain_http_can_be_allowed() -> None:
    """allow_plain_http lets http:// through, for one inbox alone too."""
    assert parse(SMALLEST + "api: {base_url: 'http://gateway/v1', allow_plain_http: true}").inboxes
    assert parse(inbox("api: {base_url: 'http://gateway/v1', allow_plain_http: true}")).inboxes


def test_an_inbox_overrides_the_api() -> None:
    """Keys of an inbox's api take the place of the common ones; the others stay, and null takes one away."""
    text = """\
api: {key_file: keys/common, read_timeout: 1m}
inboxes:
  - path: /srv/a/inbox
  - path: /srv/b/inbox
    name: other
    api: {key_file: keys/other, base_url: "https://example.com/v1/"}
  - path: /srv/c/inbox
    name: third
    api: {key_file: null}
"""
    first, second, third = parse(text).inboxes
    assert first.api == Api(key_file=BASE / "keys/common", read_timeout_s=60.0)
    assert second.api == replace(first.api, key_file=BASE / "keys/other", base_url="https://example.com/v1")
    assert third.api == replace(first.api, key_file=None)


def test_an_override_is_looked_at_together_with_what_it_overrides() -> None:
    """An inbox that forbids the plain http which the common api allows is refused."""
    text = inbox("api: {allow_plain_http: false}") + "api: {base_url: 'http://x/v1', allow_plain_http: true}\n"
    (problem,) = problems(text)
    assert problem.startswith("inboxes[0].api.base_url (line 3): http://")


# ---- the key ----


@pytest.mark.parametrize(
    "name", ["api_key", "key", "token", "authorization", "secret", "API-Key", "access_token"]
)
@pytest.mark.parametrize("place", ["{}\n" + SMALLEST, "api:\n  {}\n" + SMALLEST, SMALLEST + "    {}\n"])
def test_a_key_in_the_file_is_refused_unquoted(name: str, place: str) -> None:
    """A key for the key is one problem that says where the key belongs and doesn't repeat it."""
    for value in (SECRET, "hunter2", f"[{SECRET}]", f"{{a: {SECRET}}}"):
        (problem,) = problems(place.format(f"{name}: {value}"))
        assert "does not belong in this file" in problem
        assert "siliconflow-api-key" in problem
        assert "SILICONFLOW_API_KEY" in problem
        assert value not in problem


@pytest.mark.parametrize(
    "form", ["{}", " {}", '"{}"', "Bearer {}", "'bearer {}'", "|\n        {}\n", "!!str {}"]
)
@pytest.mark.parametrize("name", ["name", "path", "purpose", "settle", "max_lines", "recursive", "check"])
def test_a_value_that_looks_like_the_key_is_refused_unquoted(name: str, form: str) -> None:
    """The key as a value of any key is refused without repeating it."""
    first = "path: /srv/inbox" if name != "path" else "name: x"
    text = f"inboxes:\n  - {first}\n    {name}: {form.format(SECRET)}"
    (problem,) = problems(text)
    assert "looks like an API key" in problem
    assert SECRET[3:] not in problem


@pytest.mark.parametrize("value", ["abcdefghijklmnopqrstuvwxyzabcdefghijklmnop", SECRET])
def test_the_key_itself_as_key_file_is_refused_unquoted(value: str) -> None:
    """Who writes the key where its file belongs is told so; else its name would be in every message."""
    (problem,) = problems(f"{SMALLEST}api: {{key_file: {value}}}")
    assert "does not belong in this file" in problem
    assert value not in problem


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}: 1\n{SMALLEST}",
        f"api:\n  {SECRET}\n{SMALLEST}",
        f"{SMALLEST}{SECRET}\n",
        f"{SECRET}",
        f"[{SECRET}]",
        f"a: *{SECRET}",
        f"a: &{SECRET} 1\nb: &{SECRET} 2",
        f"a: !{SECRET}!b 1",
        f"a: '{SECRET}",
        f'a: "{SECRET}\\q"',
        f"%TAG {SECRET} x\n---\n{SMALLEST}",
        f"a: [{SECRET}",
        f"inboxes: [{SECRET}]",
        f"inboxes: [{{path: /a, match: [{SECRET}]}}]",
        f"api: {{base_url: 'https://{SECRET}@host'}}\n{SMALLEST}",
        f"x{SECRET}: 1\nx{SECRET}: 2\n{SMALLEST}",
        f"inboxes: [{{path: /a, settle: x{SECRET}}}]",
    ],
)
def test_the_key_is_in_no_problem(text: str) -> None:
    """Wherever the key was pasted, no problem and no error text repeats it."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert SECRET[3:] not in str(caught.value)
    assert SECRET[3:] not in repr(caught.value.problems)


@given(st.text(max_size=30), st.text(max_size=30))
def test_the_key_is_in_no_problem_whatever_stands_around_it(before: str, after: str) -> None:
    """The same with arbitrary text before and behind."""
    assert SECRET[3:] not in str(attempt(f"{before}{SECRET}{after}"))


# ---- where the state lies ----


@pytest.mark.parametrize(
    ("line", "environ", "handed", "folder"),
    [
        ("state_dir: /x", {"STATE_DIRECTORY": "/y"}, {}, "/x"),
        ("state_dir: x", {}, {}, "/etc/sfwatch/x"),
        ("state_dir: null", {"STATE_DIRECTORY": "/y"}, {}, "/y"),
        ("", {"STATE_DIRECTORY": "/y:/z"}, {"writable": lambda _: False}, "/y"),
        ("", {"STATE_DIRECTORY": ""}, {}, "/var/lib/sfwatch"),
        ("", {"HOME": "/home/me"}, {"writable": lambda _: True}, "/var/lib/sfwatch"),
        ("", {"HOME": "/home/me"}, {"writable": lambda _: False, "is_root": True}, "/var/lib/sfwatch"),
        ("", {"HOME": "/home/me"}, {"writable": lambda _: False}, "/home/me/.local/state/sfwatch"),
        ("", {"HOME": "/h", "XDG_STATE_HOME": "/s"}, {"writable": lambda _: False}, "/s/sfwatch"),
        ("", {"HOME": "/h", "XDG_STATE_HOME": "s"}, {"writable": lambda _: False}, "/h/.local/state/sfwatch"),
        ("", {}, {"writable": lambda _: False}, "/var/lib/sfwatch"),
    ],
)
def test_where_the_state_lies(line: str, environ: dict[str, str], handed: dict[str, Any], folder: str) -> None:
    """The file comes first, then systemd's folder, then the system's, and a user's own where that is closed."""
    assert parse(SMALLEST + line, environ=environ, **handed).state_dir == Path(folder)


# ---- files ----


def test_a_file_is_read_and_its_folder_is_the_base(tmp_path: Path) -> None:
    """Relative paths count from the folder of the file, wherever the process runs."""
    path = tmp_path / "sub" / ".." / "sfwatch.yaml"
    (tmp_path / "sub").mkdir()
    path.write_text("inboxes: [{path: inbox}]\nstate_dir: state\n")
    found = config.read(path, environ={})
    assert found.inboxes[0].path == tmp_path / "inbox"
    assert found.state_dir == tmp_path / "state"
    assert found.source == path


def test_an_overlap_through_a_link_on_the_disk_is_found(tmp_path: Path) -> None:
    """A symbolic link to an inbox, given as a second inbox, is refused."""
    (tmp_path / "inbox").mkdir()
    (tmp_path / "other").symlink_to("inbox")
    (tmp_path / "sfwatch.yaml").write_text("inboxes: [{path: inbox}, {path: other}]\n")
    with pytest.raises(ConfigError, match="is the same folder as"):
        config.read(tmp_path / "sfwatch.yaml", environ={})


def test_the_state_of_a_file_without_a_state_folder(tmp_path: Path) -> None:
    """Read from disk, the state lies in the system's folder or, where that can't be written, in the user's."""
    (tmp_path / "sfwatch.yaml").write_text(SMALLEST)
    found = config.read(tmp_path / "sfwatch.yaml", environ={"HOME": str(tmp_path)})
    assert found.state_dir in {Path("/var/lib/sfwatch"), tmp_path / ".local/state/sfwatch"}
    assert config._is_writable(tmp_path)
    assert config._is_writable(tmp_path / "missing")
    assert not config._is_writable(tmp_path / "missing" / "below")


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    """Other encodings are a problem with the line of the first such byte."""
    path = tmp_path / "sfwatch.yaml"
    path.write_bytes(SMALLEST.encode() + b"# \xe9\n")
    with pytest.raises(ConfigError, match="line 3: is not UTF-8"):
        config.read(path, environ={})


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "does not exist"),
        (Path.mkdir, "can't be read"),
        (lambda path: path.symlink_to(path), "can't be read"),
        (lambda path: path.write_bytes(b"#" * 2_000_000), "is longer than"),
    ],
)
def test_a_file_that_can_not_be_read(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    """A missing or unreadable file is a configuration error with what to do, not a traceback."""
    make(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=told) as caught:
        config.read(tmp_path / "x.yaml", environ={})
    assert str(caught.value).startswith(f"{tmp_path}/x.yaml:")


@pytest.mark.skipif(os.geteuid() != 0, reason="the owner is changed, and root gives up its rights")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    """Owner, mode, who may not, and the command that mends it; it is told apart from other faults."""
    path = tmp_path / "x y.yaml"
    path.write_text(SMALLEST)
    path.chmod(0o600)
    os.chown(path, 54322, 54322)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o711)
    with as_user(54321), pytest.raises(ConfigError) as caught:
        config.read(path, environ={})
    assert caught.value.forbidden
    (problem,) = caught.value.problems
    assert problem.text == (
        "may not be read by uid 54321: it belongs to uid 54322, gid 54322, mode 0600;"
        f" chgrp 54321 '{path}' && chmod g+r '{path}', or name another with -c"
    )


def test_other_faults_are_no_matter_of_rights(tmp_path: Path) -> None:
    """A missing file, say."""
    with pytest.raises(ConfigError) as caught:
        config.read(tmp_path / "x.yaml", environ={})
    assert not caught.value.forbidden


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """With the rights of somebody else, for a while."""
    groups, gid = os.getgroups(), os.getegid()
    os.setgroups([])
    os.setegid(uid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


def test_the_configuration_is_found_in_order(tmp_path: Path) -> None:
    """-c, then the variable, then the working folder's, then the system's; then the places are named."""
    here, system_wide = tmp_path / "sfwatch.yaml", tmp_path / "system.yaml"
    places = {"here": here, "system_wide": system_wide}
    with pytest.raises(ConfigError, match=rf"-c or \$SFWATCH_CONFIG.*sfwatch\.yaml or {system_wide}"):
        config.find(None, {"SFWATCH_CONFIG": ""}, **places)
    system_wide.touch()
    assert config.find(None, {}, **places) == system_wide
    here.touch(mode=0o600)
    assert config.find(None, {}, **places) == here
    assert config.find(None, {"SFWATCH_CONFIG": "/x"}, **places) == Path("/x")
    assert config.find(Path("/y"), {"SFWATCH_CONFIG": "/x"}, **places) == Path("/y")


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_local_file_that_others_may_write_is_not_taken(tmp_path: Path, mode: int) -> None:
    """./sfwatch.yaml that others could write is refused, and not silently passed over."""
    here = tmp_path / "sfwatch.yaml"
    here.touch()
    here.chmod(mode)
    with pytest.raises(ConfigError, match="chmod go-w"):
        config.find(None, {}, here=here)


def test_a_local_file_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """./sfwatch.yaml that belongs to another user is refused, a link to it too."""
    stranger = Path("/etc/passwd")
    if os.geteuid() == 0:
        stranger = tmp_path / "stranger.yaml"
        stranger.touch(mode=0o600)
        os.chown(stranger, 12345, -1)
    link = tmp_path / "sfwatch.yaml"
    link.symlink_to(stranger)
    for here in (stranger, link):
        with pytest.raises(ConfigError, match="belongs to another user"):
            config.find(None, {}, here=here)


def test_a_dangling_local_link_is_told_by_reading(tmp_path: Path) -> None:
    """A link to nothing is found, and reading it says that it does not exist."""
    here = tmp_path / "sfwatch.yaml"
    here.symlink_to("missing")
    assert config.find(None, {}, here=here) == here
    with pytest.raises(ConfigError, match="does not exist"):
        config.read(here, environ={})


class TestMetrics:
    TEXT = SMALLEST + "metrics_file: /var/lib/node_exporter/sfwatch.prom\n"

    def test_what_they_need_is_there(self) -> None:
        """Then the key is as any other."""
        config = parse(self.TEXT, base=BASE, environ={}, has_metrics=lambda: True)
        assert config.metrics_file == Path("/var/lib/node_exporter/sfwatch.prom")

    def test_what_they_need_is_missing(self) -> None:
        """It is said what to install; without the key nothing is."""
        with pytest.raises(ConfigError) as caught:
            parse(self.TEXT, base=BASE, environ={}, has_metrics=lambda: False)
        (problem,) = map(str, caught.value.problems)
        assert problem.startswith("metrics_file (line 3): needs prometheus_client")
        assert "sfwatch[metrics]" in problem
        parse(SMALLEST, base=BASE, environ={}, has_metrics=lambda: False)

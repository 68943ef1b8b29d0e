"""What the log can say, and what of it gets through whatever happens outside."""

import ast
import base64
import errno
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sfwatch
from sfwatch import logs
from sfwatch.settings import Log

PACKAGE = Path(sfwatch.__file__).parent


class Lines(list[str]):
    """The lines of a log, and the events in them."""

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self]

    @property
    def only(self) -> dict[str, Any]:
        (event,) = self.events
        return event


@pytest.fixture(name="lines")
def _lines() -> Lines:
    return Lines()


@pytest.fixture(name="log")
def _log(lines: Lines) -> logs.EventLog:
    return logs.event_log(lines.append, level="debug")


# One event.


def test_an_event_is_one_json_object_with_time_level_and_name_first(log: logs.EventLog, lines: Lines) -> None:
    """Time, level and event are always there, in this order, and then what was said."""
    log("inbox.others", inbox="evals", others=3)
    event = lines.only
    assert list(event) == ["timestamp", "level", "event", "inbox", "others"]
    del event["timestamp"]
    assert event == {"level": "info", "event": "inbox.others", "inbox": "evals", "others": 3}


def test_times_are_utc_with_exactly_six_digits(log: logs.EventLog, lines: Lines) -> None:
    """RFC 3339; always of the same length, so that lines sort as text."""
    for _ in range(50):
        log("inbox.overflowed", inbox="evals")
    form = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
    stamps = [event["timestamp"] for event in lines.events]
    assert all(form.fullmatch(stamp) for stamp in stamps)
    assert stamps == sorted(stamps)


@pytest.mark.parametrize("event", logs.EVENTS)
def test_the_level_belongs_to_the_event(log: logs.EventLog, lines: Lines, event: str) -> None:
    """Who says an event does not choose how loud it is."""
    log(event)
    assert lines.only["level"] == logs.EVENTS[event].level


@pytest.mark.parametrize(
    ("event", "keys"),
    [("file.praised", {}), ("file.done", {"file_i": "x"}), ("inbox.others", {"others": 1, "size": 2})],
)
def test_what_is_not_listed_cannot_be_said(
    log: logs.EventLog, lines: Lines, event: str, keys: dict[str, Any]
) -> None:
    """An unknown event or key is a bug, and is found where it is said."""
    with pytest.raises(logs.UnlistedEventError, match=re.escape(event)):
        log(event, **keys)
    assert not lines


def test_an_unlisted_key_is_found_though_the_level_hides_its_event(lines: Lines) -> None:
    """A bug in a debug event does not wait for the day on which someone turns debugging on."""
    with pytest.raises(logs.UnlistedEventError):
        logs.event_log(lines.append, level="error")("file.seen", stars=5)


def test_what_is_not_known_is_left_out(log: logs.EventLog, lines: Lines) -> None:
    """None is no value; zero, no and nothing are."""
    log("file.done", trace_id=None, lines=0, recovered=False, sidecar="")
    assert lines.only.keys() == {"timestamp", "level", "event", "lines", "recovered", "sidecar"}


def test_bound_keys_are_said_with_the_events_that_list_them(log: logs.EventLog, lines: Lines) -> None:
    """What is known is bound once; an event that has no place for it does without."""
    bound = log.bind(target="api", inbox="evals")
    bound("upload.started", file="a.jsonl")
    bound("file.seen", file="a.jsonl")
    log("file.seen", file="a.jsonl")
    assert [sorted(event.keys() & {"target", "inbox"}) for event in lines.events] == [
        ["inbox", "target"],
        ["inbox"],
        [],
    ]


@pytest.mark.parametrize("level", logs.LEVELS)
def test_only_events_of_the_level_wanted_are_said(lines: Lines, level: str) -> None:
    """A level shows itself and whatever is louder."""
    log = logs.event_log(lines.append, level=level)
    for event in logs.EVENTS:
        log(event)
    loud = [e for e in logs.EVENTS if logs.LEVELS[logs.EVENTS[e].level] >= logs.LEVELS[level]]
    assert [event["event"] for event in lines.events] == loud


# What others put into names and answers.


def test_a_name_that_is_not_utf8_is_printable_and_whole(log: logs.EventLog, lines: Lines) -> None:
    """It is escaped for people, and its bytes are there for programs."""
    name = b"caf\xe9\xff.jsonl"
    log("file.seen", file=os.fsdecode(name))
    assert lines.only["file"] == r"caf\xe9\xff.jsonl"
    assert base64.b64decode(lines.only["file_b64"]) == name


def test_a_name_that_an_event_does_not_list_leaves_no_bytes(log: logs.EventLog, lines: Lines) -> None:
    """What is bound is said where it is listed, in no form elsewhere."""
    log.bind(file=os.fsdecode(b"caf\xe9.jsonl"))("inbox.overflowed", inbox="evals")
    assert lines.only.keys() == {"timestamp", "level", "event", "inbox"}


def test_a_name_that_is_utf8_stays_as_it_is(log: logs.EventLog, lines: Lines) -> None:
    """People read their own writing in the log; no bytes are added."""
    log("file.seen", file="问题 é 🙂.jsonl")
    assert lines.only["file"] == "问题 é 🙂.jsonl"
    assert "file_b64" not in lines.only
    assert "问题" in lines[0]


@pytest.mark.parametrize(
    ("char", "escaped"),
    [
        ("\n", r"\x0a"),
        ("\r", r"\x0d"),
        ("\x00", r"\x00"),
        ("\x1b", r"\x1b"),
        ("\x7f", r"\x7f"),
        ("\x85", r"\x85"),
        ("\x9b", r"\x9b"),
        ("\u2028", r"\u2028"),
        ("\u202e", r"\u202e"),
        ("\u2066", r"\u2066"),
        ("\u061c", r"\u061c"),
        ("\ud800", r"\ud800"),
    ],
)
def test_no_character_can_forge_a_line_or_turn_the_writing_around(char: str, escaped: str) -> None:
    """Line ends, terminal controls and bidi controls are shown, not obeyed."""
    assert logs.printable(f"a{char}b") == f"a{escaped}b"


def test_what_is_escaped_is_never_printable_to_python() -> None:
    """So a text that Python calls printable needs no look at each character, whatever Unicode it knows."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not any(char.isprintable() for char in logs._UNPRINTABLE.findall(every))


@given(st.text(st.characters(codec=None)) | st.binary().map(os.fsdecode))
def test_any_text_makes_one_line_of_json(text: str) -> None:
    """Whatever a service or a producer comes up with, one event is one line, and reads as JSON."""
    lines = Lines()
    logs.event_log(lines.append)("inbox.lost", inbox="a", reason=text, detail=text)
    assert len(lines[0].splitlines()) == 1
    assert lines.only["detail"] == lines.only["reason"]
    lines[0].encode("utf-8")


@given(st.floats(0, 1e9), st.integers(), st.booleans(), st.lists(st.text() | st.integers()))
def test_a_line_is_written_as_pythons_json_writes_it(
    total_s: float,
    count: int,
    recovered: bool,  # noqa: FBT001
    same_as: list[str | int],
) -> None:
    """With a space after each comma and colon, letters of all scripts as they are: scripts may grep for it."""
    lines = Lines()
    logs.event_log(lines.append)(
        "file.done", total_s=total_s, lines=count, recovered=recovered, same_as=same_as
    )
    assert lines[0] == json.dumps(lines.only, ensure_ascii=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": {"\n"}}, ValueError("\n"), b"\xff\n"])
def test_a_value_of_no_json_type_is_said_as_text(log: logs.EventLog, lines: Lines, value: object) -> None:
    """Nothing that is said can break the line's JSON or the program."""
    log("inbox.others", others=value)
    assert lines.only["others"] == logs.printable(str(value))


def test_paths_and_enums_are_text_and_floats_are_short(log: logs.EventLog, lines: Lines) -> None:
    """Values come as the code has them."""
    log("file.done", path=Path("/srv/done/a\n.jsonl"), total_s=0.1 + 0.2, recovered=True)
    assert lines.only["path"] == r"/srv/done/a\x0a.jsonl"
    assert lines.only["total_s"] == 0.3
    assert lines.only["recovered"] is True


def test_a_traceback_keeps_its_lines_and_its_end(log: logs.EventLog, lines: Lines) -> None:
    """Its end says what happened, so it is its beginning that is cut."""
    text = "".join(f'  File "{number}"\n' for number in range(1000)) + "KeyError: '\x1b[2J'"
    log("internal.error", traceback=text)
    *_, before, last = lines.only["traceback"].split("\n")
    assert before == '  File "999"'
    assert last == r"KeyError: '\x1b[2J'"
    assert len(lines[0].encode()) <= logs.MAX_LINE


# The length of a line.

WORST = st.sampled_from(["x", "\\", '"', "\n", "\u202e", "🙂", os.fsdecode(b"\xff")])


@given(
    event=st.sampled_from(sorted(logs.EVENTS)),
    char=WORST,
    length=st.sampled_from([10, 400, 5000]),
    items=st.sampled_from([0, 3, 60]),
)
@settings(deadline=None)
def test_no_line_is_longer_than_journald_takes(event: str, char: str, length: int, items: int) -> None:
    """Every key of every event may be huge: the line is whole JSON of at most 32 KiB, with all its keys."""
    lines = Lines()
    value: Any = [char * length] * items if items else char * length
    keys = dict.fromkeys(logs.EVENTS[event].keys - {"inbox", "file", "traceback"}, value)
    names = dict.fromkeys(logs.EVENTS[event].keys & {"file", "traceback"}, (char * length)[:4095])
    logs.event_log(lines.append, level="debug")(event, **keys, **names)
    assert len(lines[0].encode()) <= logs.MAX_LINE
    assert lines.only.keys() >= keys.keys() | names.keys()


def test_a_long_line_keeps_its_names(log: logs.EventLog, lines: Lines) -> None:
    """The longest name that Linux knows is whole in the log, whatever an answer adds to it."""
    name = "/".join(["a" * 250] * 16)
    log("file.failed", inbox="evals", file=name, detail="🙂" * 4000, path="🙂" * 4000, report="🙂" * 4000)
    assert lines.only["file"] == name
    assert lines.only["detail"].startswith("🙂")


def test_a_long_list_keeps_what_has_room(log: logs.EventLog, lines: Lines) -> None:
    """A configuration with many faults names some of them at least."""
    log("config.rejected", problems=["", *("é" * 4000 for _ in range(40))])
    assert len(lines[0].encode()) <= logs.MAX_LINE
    assert lines.only["problems"][1].startswith("éé")


# Where lines go.


def read(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_lines_are_appended_to_the_log_file(tmp_path: Path) -> None:
    """What another start wrote is kept; others cannot read it."""
    path = tmp_path / "log"
    for word in ("one", "two"):
        logs.Output(Log(file=path)).write(word)
    assert read(path) == ["one", "two"]
    assert path.stat().st_mode & 0o007 == 0


def test_a_rotated_log_file_is_made_anew(tmp_path: Path) -> None:
    """Until it is opened anew the old file is written to, wherever it has gone."""
    path, rotated = tmp_path / "log", tmp_path / "log.1"
    output = logs.Output(Log(file=path))
    output.write("one")
    path.rename(rotated)
    output.write("two")
    output.reopen()
    output.write("three")
    assert (read(rotated), read(path)) == (["one", "two"], ["three"])


def test_a_log_file_that_cannot_be_opened_anew_leaves_the_old_one(tmp_path: Path) -> None:
    """The error is for who asked; lines go on where they went."""
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "log"
    output = logs.Output(Log(file=path))
    (tmp_path / "logs").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        output.reopen()
    output.write("still here")
    assert read(tmp_path / "gone" / "log") == ["still here"]


def test_a_link_is_not_followed_to_a_log_file(tmp_path: Path) -> None:
    """Whoever can make a link in the log's folder must not choose what is appended to."""
    (tmp_path / "log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - ELOOP has no class of its own
        logs.Output(Log(file=tmp_path / "log"))
    assert caught.value.errno == errno.ELOOP


def test_reopening_standard_output_changes_nothing() -> None:
    """There is no file to open."""
    read_fd, write_fd = os.pipe()
    output = logs.Output(Log(), stdout=write_fd)
    output.reopen()
    output.write("one")
    assert os.read(read_fd, 100) == b"one\n"
    os.close(read_fd)
    os.close(write_fd)


def test_a_full_disk_costs_the_line_and_nothing_else() -> None:
    """Deliveries go on where nothing can be said any more."""
    fd = os.open("/dev/full", os.O_WRONLY)
    output = logs.Output(Log(), stdout=fd)
    output.write("lost")
    output.write("lost, too")
    os.close(fd)


def test_a_closed_pipe_costs_the_line_and_nothing_else() -> None:
    """`sfwatch run | head` goes on without its reader."""
    read_fd, write_fd = os.pipe()
    output = logs.Output(Log(), stdout=write_fd)
    os.close(read_fd)
    output.write("lost")
    os.close(write_fd)


def test_a_line_that_was_torn_does_not_spoil_the_next_one() -> None:
    """A disk that fills up takes a part of a line; the next line that fits begins at a line's beginning."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)  # a full pipe fails here as a full disk does: in the middle of a line
    output = logs.Output(Log(), stdout=write_fd)
    output.write("x" * 1_000_000)
    output.write("lost")
    got = len(os.read(read_fd, 2_000_000))
    output.write("whole")
    assert 0 < got < 1_000_000
    assert os.read(read_fd, 100) == b"\nwhole\n"
    os.close(read_fd)
    os.close(write_fd)


def test_lines_of_many_threads_do_not_mix(tmp_path: Path) -> None:
    """Each line is whole, also where it is longer than what one write takes."""
    path = tmp_path / "log"
    log = logs.event_log(logs.Output(Log(file=path)).write)

    def say(name: str) -> None:
        for _ in range(100):
            log("inbox.lost", inbox=name, detail=name * 4000)

    threads = [threading.Thread(target=say, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = [json.loads(line) for line in read(path)]
    assert Counter(event["inbox"] for event in events) == dict.fromkeys("abcd", 100)
    assert all(event["detail"] == event["inbox"] * 4000 for event in events)


@pytest.mark.parametrize("stays", ["json", "console"])
def test_the_form_is_the_one_asked_for(tmp_path: Path, stays: str) -> None:
    """JSON on a terminal, or lines for people in a file: both can be had."""
    path = tmp_path / "log"
    logs.start(Log(format=stays), output := logs.Output(Log(file=path)))("inbox.others", inbox="a", others=1)
    assert not output.is_terminal()
    assert read(path)[0].startswith("{") is (stays == "json")
    assert "\x1b" not in read(path)[0]


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_a_terminal_gets_lines_for_people(
    monkeypatch: pytest.MonkeyPatch,
    no_color: str,
    coloured: bool,  # noqa: FBT001
) -> None:
    """In colour, unless NO_COLOR is set; a file or a pipe gets JSON."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    ours, terminal = os.openpty()
    logs.start(Log(), logs.Output(Log(), stdout=terminal))("inbox.others", inbox="a", others=1)
    said = os.read(ours, 1000).decode()
    assert "inbox.others" in said
    assert not said.startswith("{")
    assert ("\x1b[" in said) is coloured
    os.close(ours)
    os.close(terminal)


def test_a_pipe_gets_json() -> None:
    """The form that programs read is the one that programs get."""
    read_fd, write_fd = os.pipe()
    logs.start(Log(), logs.Output(Log(), stdout=write_fd))("inbox.others", inbox="a", others=1)
    assert json.loads(os.read(read_fd, 1000))["others"] == 1
    os.close(read_fd)
    os.close(write_fd)


# The lists, and the code that says what they list.


def test_every_key_is_described_and_every_description_is_used() -> None:
    """`file_b64` is added by the log itself."""
    used = {key for event in logs.EVENTS.values() for key in event.keys}
    assert used | {"file_b64"} == logs.KEYS.keys()


def test_keys_are_in_the_order_of_the_alphabet() -> None:
    """They are looked up by people."""
    assert list(logs.KEYS) == sorted(logs.KEYS)


def test_events_have_known_levels_and_no_reserved_keys() -> None:
    """What every line has is never said by hand."""
    for name, event in logs.EVENTS.items():
        assert event.level in logs.LEVELS, name
        assert not event.keys & {*logs.ALWAYS, "file_b64"}, name


def test_terminal_events_are_listed() -> None:
    """Each file ends in exactly one of them."""
    assert logs.EVENTS.keys() >= logs.TERMINAL


def said_in(module: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every event that a module says by its name, to a log or to a helper that says it (`_say…`)."""
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(event)), *_]
            ) if name == "log" or (name.startswith("_say") and event in logs.EVENTS):
                yield event, node


def calls() -> list[tuple[str, str, ast.Call]]:
    return [
        (f"{module.name}:{call.lineno}", event, call)
        for module in sorted(PACKAGE.rglob("*.py"))
        for event, call in said_in(module)
    ]


def literal_keys(call: ast.Call) -> set[str]:
    """The keys that stand in the call; what comes by `**` is checked when it is said. The level is no key."""
    return {keyword.arg for keyword in call.keywords if keyword.arg not in (None, "level")}


def test_a_log_loads_no_console_of_structlogs() -> None:
    """Nothing of rich comes into the daemon; who wants it afterwards can have it."""
    script = (
        "import sys; from sfwatch import logs; logs.event_log(print); print('rich' in sys.modules); import rich"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_the_package_says_only_what_is_listed() -> None:
    """Every event in the code is listed, with keys that it lists: also those that no test comes by."""
    for place, event, call in calls():
        assert event in logs.EVENTS, place
        assert literal_keys(call) <= logs.EVENTS[event].keys, place


def test_every_event_that_is_listed_is_said_somewhere() -> None:
    """What nothing says is taken off the list, or is waited for by name."""
    said = {event for _, event, _ in calls()}
    assert logs.EVENTS.keys() == said

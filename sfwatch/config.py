"""YAML text to frozen values, or every problem at once with its path and line.

The tables `API`, `INBOX`, `UPLOADS`, `LOG` and `TOP` are the whole of the language: one entry a key, with its
form and what it is for. The defaults stand in settings.py and nowhere else. Reading goes in three steps: text
to YAML nodes (they know their lines), nodes to values by the tables, values to a `Config`, with what concerns
several keys.

Values are taken from the text as it was written, never as YAML 1.1 would read it: `name: on` is the name "on",
`name: 010` is "010", and `1:30` is no duration (YAML makes it 90).

No problem quotes a value that could be the API key: only short ones are quoted, and none of an address or path.
"""

import difflib
import importlib.util
import ipaddress
import os
import re
import shlex
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

import yaml

from sfwatch.settings import Api, Check, Config, Inbox, Log, OnUnknown, Proof, RemoteName, Uploads

SYSTEM_WIDE = Path("/etc/sfwatch/sfwatch.yaml")
LONGEST_TEXT = 256 * 1024
"""Characters of a configuration: some thousand inboxes, and no work without end for the YAML parser."""

_SMALLEST = "the smallest file that works is `inboxes: [{path: /srv/sfwatch/inbox}]`"
_ELSEWHERE = (
    "the API key does not belong in this file: put it, alone, into a file of its own and name that as "
    "api.key_file, or hand it over as the systemd credential siliconflow-api-key or in $SILICONFLOW_API_KEY"
)
_SECRET_WORDS = ("key", "token", "secret", "authorization", "bearer", "password")
_NO_METRICS = "needs prometheus_client: pip install 'sfwatch[metrics]', or leave the key out"
_OUR_FOLDER = ".sfwatch"
_OUR_SUFFIXES = (".fileid.json", ".error.json")


# ---- what goes wrong ----


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where (`inboxes[1].settle`, "" for the whole file), and what to do about it."""

    path: str
    line: int | None
    text: str

    def __str__(self) -> str:
        line = f"line {self.line}" if self.line else ""
        where = f"{self.path} ({line})" if self.path and line else self.path or line
        return f"{where}: {self.text}" if where else self.text


class ConfigError(Exception):
    """The configuration can't be used; `problems` says all that is wrong with it.

    `forbidden`: it is there, and this user may not read it.
    """

    def __init__(
        self, problems: Iterable[Problem], source: Path | None = None, *, forbidden: bool = False
    ) -> None:
        self.problems = tuple(problems)
        self.source = source
        self.forbidden = forbidden
        super().__init__(
            "\n".join([f"{source or 'configuration'}:", *(f"  {problem}" for problem in self.problems)])
        )


class Wrong(ValueError):  # noqa: N818 - of the value, not of the program
    """A value that is not what its key takes; the text says what would be."""


@dataclass(frozen=True, slots=True)
class _Notes:
    """What was found on the way: problems, and the line in which each key stands."""

    base: Path
    problems: list[Problem] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)

    def add(self, path: str, text: str, *, line: int | None = None) -> None:
        self.problems.append(Problem(path, line or self.line(path), text))

    def line(self, path: str) -> int | None:
        """The line of a key, or of the nearest thing around it that was written down."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path)

    def place(self, path: str) -> str:
        line = self.line(path)
        return f"{path} (line {line})" if line else path


# ---- values ----

_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BYTES = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,9})?)"
_DURATION = re.compile(_NUMBER + f"({'|'.join(_SECONDS)})")
_SIZE = re.compile(_NUMBER + f"({'|'.join(_BYTES)})")
_WHOLE = re.compile("0|[1-9][0-9]{0,8}")
_PURPOSE = re.compile("[A-Za-z0-9_.-]{1,64}")
_TOKEN = re.compile("[A-Za-z0-9_-]{32,}")
_YAML = "tag:yaml.org,2002:"
_PLAIN = frozenset(
    _YAML + tag for tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
)
_NULL, _FLAG = _YAML + "null", _YAML + "bool"
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def seconds(text: str) -> float:
    """Seconds of a duration such as `500ms`, `1.5s`, `2m`, `24h`, `7d`. Raises `Wrong`."""
    found = _DURATION.fullmatch(text)
    if found is None:
        bare = re.fullmatch(_NUMBER, text)
        hint = (
            f"{text}s, {text}m or {text}h" if bare else "a number and ms, s, m, h or d, such as 500ms, 5s, 2m"
        )
        raise Wrong(f"{_shown(text)} is no duration: write {hint}")
    return float(Decimal(found[1]) * _SECONDS[found[2]])


def size(text: str) -> int:
    """Bytes of a size such as `64KB` (powers of ten) or `64KiB` (powers of two). Raises `Wrong`."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise Wrong(f"{_shown(text)} is no size: write {_size_meant(text)}")
    return int(Decimal(found[1]) * _BYTES[found[2]])


def _size_meant(text: str) -> str:
    if not re.fullmatch(_NUMBER, text):
        return "a number and B, KB, MB, GB (or KiB, MiB, GiB)"
    if "." in text:
        return f"{text}KB, {text}MB or {text}GB"
    return _written_size(int(text))


def _written_size(size: int) -> str:
    """A number of bytes as it is written here: the same value in the largest unit that it is a multiple of."""
    unit = max((unit for unit in _BYTES if size % _BYTES[unit] == 0), key=_BYTES.__getitem__)
    return f"{size // _BYTES[unit]}{unit}" if size else "0B"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value looks like: `form` in words, and `read` from its text, which raises `Wrong`.

    `unit` ends the name of its field in settings.py. `empty`: null is a value (none, or the computed default).
    `schema` is the same for editors, in JSON schema: what can be said there is said, `read` has the last word.
    """

    form: str
    read: Callable[[str], Any]
    unit: str = ""
    empty: bool = False
    schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "string", "minLength": 1})


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of values of one kind."""

    kind: Kind
    example: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Keys below a key, with an example of one; `many` for a list of such."""

    keys: tuple["Entry", ...]
    example: str
    many: bool = False
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One key: its name in the YAML, its kind, and what it is for."""

    name: str
    kind: Kind | Listed | Section
    about: str

    @property
    def field(self) -> str:
        """The name of its field in settings.py."""
        return self.name + self.kind.unit


def _duration(least: str, most: str) -> Kind:
    def fits(text: str) -> bool:
        return seconds(least) <= seconds(text) <= seconds(most)

    def read(text: str) -> float:
        if re.fullmatch(_NUMBER, text):
            meant = [f"{text}{unit}" for unit in "smh" if fits(f"{text}{unit}")]
            raise Wrong(f"{_shown(text)} is no duration: write {_any_of(meant) or f'{least} to {most}'}")
        if not fits(text):
            raise Wrong(f"{_shown(text)} is out of bounds: write {least} to {most}")
        return seconds(text)

    return Kind(f"a duration, {least} to {most}", read, unit="_s", schema=_like(_DURATION))


def _like(pattern: re.Pattern[str]) -> Mapping[str, Any]:
    return {"type": "string", "pattern": f"^{pattern.pattern}$"}


def _any_of(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _whole(least: int, most: int) -> Kind:
    form = f"a whole number, {least} to {most}"

    def read(text: str) -> int:
        if not _WHOLE.fullmatch(text) or not least <= int(text) <= most:
            raise Wrong(f"{_shown(text)} is not {form}")
        return int(text)

    return Kind(form, read, schema={"type": "integer", "minimum": least, "maximum": most})


def _or_word(word: str, value: Any, kind: Kind) -> Kind:
    def read(text: str) -> Any:
        try:
            return value if text == word else kind.read(text)
        except Wrong as wrong:
            if re.fullmatch(r"0+[a-zA-Z]*", text):  # what others write for none
                raise Wrong(f"{str(wrong).partition(':')[0]}: write {word}") from None
            raise

    either = [{"enum": [0, word] if word == "0" else [word]}, kind.schema]
    return replace(kind, form=f"{word}, or {kind.form}", read=read, schema={"anyOf": either})


def _choice(words: Iterable[str], make: Callable[[str], Any] = str) -> Kind:
    known = list(words)

    def read(text: str) -> Any:
        if text not in known:
            raise Wrong(f"{_shown(text)} is none of {', '.join(known)}")
        return make(text)

    return Kind(f"one of {', '.join(known)}", read, schema={"enum": known})


def _enum(kind: type[StrEnum]) -> Kind:
    return _choice((member.value for member in kind), kind)


def _read_rate(text: str) -> int:
    rate = size(text)
    if rate < size("1KB"):
        raise Wrong(f"{_shown(text)} a second is too slow for any file: write 1KB or more, or unlimited")
    return rate


def _read_line(text: str) -> str:
    if not text.strip() or any(unicodedata.category(char) in {"Cc", "Cs", "Zl", "Zp"} for char in text):
        raise Wrong("is empty, or has control characters in it")
    return text


def _read_path(text: str) -> Path:
    _read_line(text)
    if text[0] in "~$":
        raise Wrong(f"`{text[0]}` is not expanded: write the path out, or relative to this file's folder")
    return Path(text)


def _read_key_file(text: str) -> Path:
    if _TOKEN.fullmatch(text):
        raise Wrong(f"looks like the key itself (for a file of that name write ./ before it): {_ELSEWHERE}")
    return _read_path(text)


def _read_pattern(text: str) -> str:
    if not text or "/" in _read_line(text):
        raise Wrong('must be a pattern for names, such as "*.jsonl", without /')
    return text


def _read_purpose(text: str) -> str:
    if not _PURPOSE.fullmatch(text):
        raise Wrong("must be letters, digits, and _ . - (at most 64), such as batch")
    return text


def _read_marker(text: str) -> str:
    if "/" in _read_line(text) or text.lower().endswith((".jsonl", *_OUR_SUFFIXES)):
        raise Wrong(
            f'must be an ending such as ".ok", without /, and none of .jsonl, {", ".join(_OUR_SUFFIXES)}'
        )
    return text


def _read_url(text: str) -> str:
    """An address without its final slash, host in lower case. Never quoted: it may hold a password."""
    if not re.fullmatch(r"[!-~]+", text) or set(text) & set('\\"<>^`{|}'):
        raise Wrong("has characters that no address has: write it like https://api.siliconflow.cn/v1")
    url = _split(text)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise Wrong("must begin with https:// and a host: write it like https://api.siliconflow.cn/v1")
    if "@" in url.netloc:
        raise Wrong(f"must not hold a user or password; {_ELSEWHERE}")
    if "?" in text or "#" in text:
        raise Wrong("must end with the path: no ? and no #")
    return f"{url.scheme}://{url.netloc.lower()}{url.path.rstrip('/')}"


def _split(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port  # checked only when asked for
    except ValueError:  # its text may quote the address
        raise Wrong("has a host or port that can't be: write it like https://api.siliconflow.cn/v1") from None
    return url


_PATH = Kind("a path", _read_path)
_MAYBE_PATH = replace(_PATH, empty=True)
_MAYBE_LINE = Kind("text", _read_line, empty=True)
_BOOL = Kind("true or false", lambda text: _FLAGS[text.lower()], schema={"type": "boolean"})
_SIZE_KIND = Kind("a size", size, schema=_like(_SIZE))
_RATE = Kind("a size a second, from 1KB", _read_rate, schema=_like(_SIZE))
_URL = Kind("an address", _read_url, schema={"type": "string", "pattern": "^https?://[^@?#]+$"})


# ---- the keys ----

_BASE_URL = "base_url: https://api.siliconflow.cn/v1"
API = (
    Entry("base_url", _URL, "where the service is"),
    Entry("key_file", Kind("a path", _read_key_file, empty=True), "a file that holds the key and nothing else"),
    Entry("connect_timeout", _duration("100ms", "1h"), "longest wait for a connection"),
    Entry(
        "read_timeout", _duration("100ms", "1d"), "longest wait for the answer, or for more bytes to be taken"
    ),
    Entry("ca_bundle", _MAYBE_PATH, "PEM file with the authorities to trust"),
    Entry("allow_plain_http", _BOOL, "whether http:// may be spoken beyond this machine"),
)
INBOX = (
    Entry("path", _PATH, "the folder that files are dropped into"),
    Entry("name", _MAYBE_LINE, "what logs and commands call it; default: the folder's own name"),
    Entry("done", _MAYBE_PATH, 'where accepted files go; default: "done" beside the inbox'),
    Entry("failed", _MAYBE_PATH, 'where refused files go; default: "failed" beside the inbox'),
    Entry(
        "match",
        Listed(Kind("a pattern", _read_pattern), '["*.jsonl"]'),
        "the names that are taken, letter case ignored",
    ),
    Entry("purpose", Kind("a word", _read_purpose), "sent along with each file"),
    Entry("settle", _duration("1ms", "1d"), "how long a file must rest where the kernel vouches for it"),
    Entry("settle_unproven", _duration("1ms", "1d"), "how long a file must rest where nothing vouches for it"),
    Entry("recursive", _BOOL, "take the whole subtree"),
    Entry("proof", _enum(Proof), "whether the kernel's word on writers is trusted"),
    Entry(
        "settle_marker", Kind("an ending", _read_marker, empty=True), "ending of the marker that says: whole"
    ),
    Entry("check", _enum(Check), "what is looked into before sending"),
    Entry("max_bytes", _or_word("0", 0, _SIZE_KIND), "the largest file that is sent; 0 = no limit"),
    Entry("max_lines", _whole(0, 999_999_999), "the most lines that are sent; 0 = no limit"),
    Entry("api", Section(API, _BASE_URL), "keys of api that differ for this inbox"),
)
UPLOADS = (
    Entry("concurrency", _whole(1, 64), "uploads at the same time, for each host and key"),
    Entry("first_retry", _duration("10ms", "1d"), "the first pause after a failure"),
    Entry("longest_retry", _duration("10ms", "1d"), "the longest pause after failures"),
    Entry(
        "give_up_after",
        _or_word("never", None, _duration("1ms", "3650d")),
        "when a file that has to wait is failed",
    ),
    Entry("poison_after", _whole(0, 1_000_000), "attempts after which one file alone is failed; 0 = never"),
    Entry("max_rate", _or_word("unlimited", None, _RATE), "bytes per second over all uploads"),
    Entry("on_unknown", _enum(OnUnknown), "what becomes of a lost answer that can't be cleared up"),
    Entry("reconcile_window", _duration("0s", "1d"), "how long a lost upload is looked for"),
    Entry("resend_limit", _whole(0, 1000), "how often a lost upload is sent again without a listing"),
    Entry("remote_name", _enum(RemoteName), "the name under which a file is sent"),
)
LOG = (
    Entry("level", _choice(("debug", "info", "warning", "error")), "the least important level that is logged"),
    Entry("format", _choice(("json", "console", "auto")), "how events look"),
    Entry("file", _MAYBE_PATH, "where events go; default: standard output"),
)
TOP = (
    Entry("api", Section(API, _BASE_URL), "the service"),
    Entry("inboxes", Section(INBOX, "path: /srv/sfwatch/inbox", many=True), "the folders"),
    Entry("uploads", Section(UPLOADS, "concurrency: 4"), "how hard the service is worked"),
    Entry("scan_interval", _duration("1s", "1d"), "time between full looks at every inbox"),
    Entry("poll_interval", _duration("100ms", "1d"), "the same where events can't be trusted"),
    Entry(
        "state_dir",
        _MAYBE_PATH,
        "where the journal lies; default: $STATE_DIRECTORY, else /var/lib/sfwatch, else the user's own",
    ),
    Entry("stop_grace", _duration("0s", "1d"), "how long uploads may go on after SIGTERM"),
    Entry(
        "status_file",
        _MAYBE_PATH,
        "the state in short; default: status.json in $RUNTIME_DIRECTORY, else in state_dir",
    ),
    Entry("history_days", _whole(1, 36500), "days for which finished files are remembered"),
    Entry("metrics_file", _MAYBE_PATH, "Prometheus text file for node_exporter"),
    Entry("log", Section(LOG, "level: info"), "the log"),
)


# ---- text to nodes ----


class _Loader(yaml.SafeLoader):
    """Nodes without aliases: no bombs and no endless structures, and no key has two lines."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not understood here", problem_mark=mark)
        return super().compose_node(parent, index)


def _tree(text: str, notes: _Notes) -> yaml.Node | None:
    """The top node, or None with a problem noted."""
    if len(text) > LONGEST_TEXT:
        notes.add("", f"is longer than {LONGEST_TEXT} characters: this is no configuration")
        return None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        notes.add("", f"has a character (number {error.character}) that YAML forbids", line=line)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        notes.add("", f"is not sound YAML: {_told(error)}", line=mark.line + 1 if mark else None)
    except RecursionError:
        notes.add("", "is nested too deeply")
    except (ValueError, OverflowError):  # PyYAML lets them out for numbers in escapes and directives
        notes.add("", "is not sound YAML: there is a number in an escape or directive that can't be")
    else:
        if not isinstance(node, yaml.MappingNode):
            notes.add("", f"must hold `key: value` lines: {_SMALLEST}")
            return None
        return node
    return None


def _told(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words without what they quote of the text, apart from single characters and its own terms."""
    words = ", ".join(part for part in (error.context, error.problem) if part)
    if "alias" in words:
        words += ' (a value that begins with * must stand in quotes, such as match: ["*.jsonl"])'
        return words
    if "mapping values are not allowed" in words:
        words += " (is a colon missing in the line above, as in `inboxes:`, or is a colon in a value unquoted?)"
    if r"'\t'" in words:
        words += " (indent with spaces, not with tabs)"
    return re.sub(r"""'(?!<)[^']{3,}'|"[^"]{3,}\"""", "…", words)


# ---- nodes to values ----


def _section(node: yaml.Node, path: str, keys: tuple[Entry, ...], notes: _Notes) -> dict[str, Any]:
    """The sound values below `node` by the names of their fields; what is not sound is noted and left out."""
    known = {entry.name: entry for entry in keys}
    values: dict[str, Any] = {}
    for name, child in _entries(node, path, notes):
        where = _join(path, name)
        if name not in known:
            notes.add(where, _unknown(name, list(known)))
            continue
        try:
            values[known[name].field] = _value(child, where, known[name].kind, notes)
        except Wrong as wrong:
            notes.add(where, str(wrong))
    return values


def _entries(node: yaml.Node, path: str, notes: _Notes) -> Iterator[tuple[str, yaml.Node]]:
    lines: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            notes.add(path, "has a key that is no plain text", line=line)
            continue
        where = _join(path, key.value)
        if key.value in lines:
            notes.add(where, f"is given twice: in line {lines[key.value]} and again in line {line}", line=line)
            continue
        lines[key.value] = notes.lines[where] = line
        yield key.value, child


def _value(node: yaml.Node, where: str, kind: Kind | Listed | Section, notes: _Notes) -> Any:
    if isinstance(kind, Kind):
        found = _scalar(node, kind)
        return _absolute(notes.base, found) if isinstance(found, Path) else found
    if isinstance(kind, Listed):
        return tuple(_items(node, where, lambda item, _: _scalar(item, kind.kind), kind.example, notes))
    if kind.many:
        example = f"[{{{kind.example}}}]"
        return [
            *_items(node, where, lambda item, path: (path, _below(item, path, kind, notes)), example, notes)
        ]
    return _below(node, where, kind, notes)


def _below(node: yaml.Node, where: str, kind: Section, notes: _Notes) -> dict[str, Any]:
    if node.tag == _NULL:  # a section whose keys are all commented out
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must hold keys, such as {kind.example}")
    return _section(node, where, kind.keys, notes)


def _items(
    node: yaml.Node, where: str, read: Callable[[yaml.Node, str], Any], example: str, notes: _Notes
) -> Iterator[Any]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        raise Wrong(f"must be a list with at least one item, such as {example}")
    for index, item in enumerate(node.value):
        path = f"{where}[{index}]"
        notes.lines[path] = item.start_mark.line + 1
        try:
            yield read(item, path)
        except Wrong as wrong:
            notes.add(path, str(wrong))


def _scalar(node: yaml.Node, kind: Kind) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise Wrong(f"must be {kind.form}, not a list and not keys")
    if node.tag == _NULL:
        if kind.empty:
            return None
        raise Wrong(f"has no value: write {kind.form}, or leave the key out for the default")
    if node.tag not in _PLAIN:
        raise Wrong("has a tag (!…), which is not understood here")
    if _looks_secret(node.value):
        raise Wrong(f"looks like an API key (for a name that begins with sk- write ./ before it): {_ELSEWHERE}")
    if kind is _BOOL and (node.tag != _FLAG or node.value.lower() not in _FLAGS):
        raise Wrong("must be true or false, without quotes")
    return kind.read(node.value)


def _looks_secret(text: str) -> bool:
    return bool(re.match(r"\s*(bearer\s|sk-[^*?\[]*$)", text, re.IGNORECASE))


def _shown(text: str) -> str:
    """A value in quotes if it is so short and plain that it can't be a key."""
    return repr(text) if len(text) <= 20 and "sk-" not in text.lower() else "this"


def _join(path: str, name: str) -> str:
    plain = re.fullmatch(r"[\w.<-]{1,31}", name) and "sk-" not in name.lower()
    shown = name if plain else f"(a key of {len(name)} characters)"
    return f"{path}.{shown}" if path else shown


def _unknown(name: str, known: list[str]) -> str:
    """What to say to a key that is not known here."""
    plain = re.sub("[^a-z]", "", name.lower())
    if plain in {*_SECRET_WORDS, "apikey"} or _looks_secret(name):
        return _ELSEWHERE
    sections = {"api": API, "inboxes": INBOX, "uploads": UPLOADS, "log": LOG, "the top level": TOP}
    homes = [home for home, keys in sections.items() if name in {entry.name for entry in keys}]
    if homes:
        return f"is not known here: it belongs under {' or '.join(homes)}"
    near = difflib.get_close_matches(name[:64], known, n=1)
    if near:
        return f"is not known; did you mean {near[0]}?"
    if any(word in plain for word in _SECRET_WORDS):
        return f"is not known; {_ELSEWHERE}"
    return f"is not known; known here: {', '.join(known)}"


def _absolute(base: Path, path: Path) -> Path:
    return Path("/" + os.path.normpath(base / path).lstrip("/"))  # normpath leaves two leading slashes


# ---- values to a configuration ----


def parse(
    text: str,
    *,
    base: Path,
    environ: Mapping[str, str],
    source: Path | None = None,
    is_root: bool = False,
    writable: Callable[[Path], bool] = lambda _: True,
    realpath: Callable[[Path], Path] = lambda path: path,
    has_metrics: Callable[[], bool] = lambda: True,
) -> Config:
    """Given the text of a configuration, return what it means. Raises `ConfigError` with all that is wrong.

    `base` is the absolute folder that relative paths count from. `writable` says whether the state folder of
    the system could be written to (asked only when nothing else names one), `realpath` where a path leads to,
    `has_metrics` whether what metrics need is installed.
    """
    notes = _Notes(base)
    tree = _tree(text, notes)
    values = _section(tree, "", TOP, notes) if tree else {}
    inboxes = _inboxes(values, notes) if tree else {}
    values.pop("api", None)
    values["inboxes"] = tuple(inboxes.values())
    values["state_dir"] = values.get("state_dir") or _state_dir(environ, is_root=is_root, writable=writable)
    values["uploads"] = Uploads(**values.get("uploads", {}))
    values["log"] = Log(**values.get("log", {}))
    config = Config(**values, source=source)
    _look_at_retries(config, notes)
    _look_at_folders(config, inboxes, realpath, notes)
    if config.metrics_file is not None and not has_metrics():
        notes.add("metrics_file", _NO_METRICS)
    if notes.problems:
        raise ConfigError(sorted(notes.problems, key=lambda problem: problem.line or 0), source)
    return config


def _inboxes(values: Mapping[str, Any], notes: _Notes) -> dict[str, Inbox]:
    """The inboxes by their paths in the configuration (`inboxes[0]`)."""
    if "inboxes" not in notes.lines:
        notes.add("inboxes", f"is missing: {_SMALLEST}")
    own = values.get("api", {})
    common = Api(**own)
    _look_at_address(common, own, "api", notes)
    found: dict[str, Inbox] = {}
    for where, given in values.get("inboxes", []):
        _look_at_address(replace(common, **given.get("api", {})), given.get("api", {}), f"{where}.api", notes)
        if "path" in given:
            found[where] = _inbox(given, common)
        elif f"{where}.path" not in notes.lines:
            notes.add(where, "has no path: name the folder, such as path: /srv/sfwatch/inbox")
    return found


def _inbox(given: dict[str, Any], common: Api) -> Inbox:
    path: Path = given["path"]
    inbox = Inbox(
        **given
        | {
            "name": given.get("name") or path.name,
            "done": given.get("done") or path.parent / "done",
            "failed": given.get("failed") or path.parent / "failed",
            "api": replace(common, **given.get("api", {})),
        }
    )
    if "settle_unproven_s" in given:
        return inbox
    return replace(inbox, settle_unproven_s=max(inbox.settle_s, inbox.settle_unproven_s))


def _state_dir(environ: Mapping[str, str], *, is_root: bool, writable: Callable[[Path], bool]) -> Path:
    handed = environ.get("STATE_DIRECTORY", "").split(":")[0]  # systemd: absolute, several with colons between
    if handed.startswith("/"):
        return Path(handed)
    usual = Config(inboxes=()).state_dir
    if is_root or writable(usual):
        return usual
    state_home = environ.get("XDG_STATE_HOME", "")
    if state_home.startswith("/"):  # the specification: relative ones are to be ignored
        return Path(state_home, "sfwatch")
    return Path(environ["HOME"], ".local/state/sfwatch") if environ.get("HOME", "").startswith("/") else usual


# ---- what concerns several keys ----


def _look_at_address(api: Api, own: Mapping[str, Any], where: str, notes: _Notes) -> None:
    if not own.keys() & {"base_url", "allow_plain_http"} or api.allow_plain_http:
        return
    url = urlsplit(api.base_url)
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        text = (
            "http:// would show the key to everybody on the way: write https://, or set allow_plain_http: true"
        )
        notes.add(f"{where}.base_url", text)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _look_at_retries(config: Config, notes: _Notes) -> None:
    if "uploads.first_retry" in notes.lines and config.uploads.first_retry_s > config.uploads.longest_retry_s:
        notes.add("uploads.first_retry", "is longer than longest_retry: shorten it, or lengthen the other")


def _look_at_folders(
    config: Config, inboxes: Mapping[str, Inbox], realpath: Callable[[Path], Path], notes: _Notes
) -> None:
    homes: dict[Path, str] = {}
    for where, inbox in inboxes.items():
        homes.setdefault(realpath(inbox.path), where)
    _look_at_names(inboxes, notes)
    _look_at_overlaps(inboxes, homes, realpath, notes)
    for path, folder in _written_to(config, inboxes):
        home = _would_look(realpath(folder), homes, inboxes)
        if home:
            notes.add(path, f"lies where {notes.place(f'{home}.path')} looks for files: choose another folder")
    for where, inbox in inboxes.items():
        if realpath(inbox.done) == realpath(inbox.failed):
            notes.add(f"{where}.failed", "is the same folder as done: choose another one")


def _look_at_names(inboxes: Mapping[str, Inbox], notes: _Notes) -> None:
    first: dict[str, str] = {}
    for where, inbox in inboxes.items():
        if not inbox.path.name:
            notes.add(f"{where}.path", "/ can't be an inbox: name a folder in it")
        other = first.setdefault(inbox.name, where)
        if other != where:
            text = f"has the same name as {notes.place(other)}: give one of them another `name`"
            notes.add(f"{where}.name", text)


def _look_at_overlaps(
    inboxes: Mapping[str, Inbox], homes: Mapping[Path, str], realpath: Callable[[Path], Path], notes: _Notes
) -> None:
    for where, inbox in inboxes.items():
        real = realpath(inbox.path)
        if homes[real] != where:
            notes.add(f"{where}.path", f"is the same folder as {notes.place(f'{homes[real]}.path')}")
        for parent in real.parents:
            if parent in homes:
                text = f"lies inside {notes.place(f'{homes[parent]}.path')}: no inbox may lie inside another"
                notes.add(f"{where}.path", text)
        for key, folder in (("path", inbox.path), ("done", inbox.done), ("failed", inbox.failed)):
            if _OUR_FOLDER in realpath(folder).parts:
                notes.add(f"{where}.{key}", f"lies in a {_OUR_FOLDER} folder, where files under way are kept")


def _written_to(config: Config, inboxes: Mapping[str, Inbox]) -> Iterator[tuple[str, Path]]:
    """The folders that files are put into, with the keys that say so."""
    for where, inbox in inboxes.items():
        yield f"{where}.done", inbox.done
        yield f"{where}.failed", inbox.failed
    yield "state_dir", config.state_dir
    files = {
        "status_file": config.status_file,
        "metrics_file": config.metrics_file,
        "log.file": config.log.file,
    }
    for key, file in files.items():
        if file is not None:
            yield key, file.parent


def _would_look(folder: Path, homes: Mapping[Path, str], inboxes: Mapping[str, Inbox]) -> str | None:
    """The inbox that would find what is put into `folder`."""
    if folder in homes:
        return homes[folder]
    above = (homes[parent] for parent in folder.parents if parent in homes)
    return next((home for home in above if inboxes[home].recursive), None)


# ---- files ----


def read(path: Path, *, environ: Mapping[str, str]) -> Config:
    """Given the path of a configuration file, return what it means. Raises `ConfigError`."""
    return parse(
        _read_text(path),
        base=Path(os.path.abspath(path)).parent,  # noqa: PTH100 - `..` goes as well
        environ=environ,
        source=path,
        is_root=os.geteuid() == 0,
        writable=_is_writable,
        realpath=lambda folder: Path(os.path.realpath(folder)),  # resolve() raises on loops
        has_metrics=lambda: importlib.util.find_spec("prometheus_client") is not None,
    )


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(4 * LONGEST_TEXT + 1)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = Problem("", line, "is not UTF-8: save the file as UTF-8")
    except PermissionError:
        problem = Problem(
            "", None, f"may not be read by uid {os.geteuid()}: {_standing(path)}, or name another with -c"
        )
        raise ConfigError([problem], path, forbidden=True) from None
    except FileNotFoundError:
        problem = Problem("", None, "does not exist: make it, or name another with -c")
    except OSError as error:
        problem = Problem("", None, f"can't be read ({error.strerror}): mend that, or name another with -c")
    raise ConfigError([problem], path)


def _standing(path: Path) -> str:
    """Who a file belongs to, and what would let us read it."""
    try:
        st = path.stat()
    except OSError:
        return "let it enter the folders above (chmod +x)"
    file = shlex.quote(str(path))
    whose = f"uid {st.st_uid}, gid {st.st_gid}, mode {stat.S_IMODE(st.st_mode):04o}"
    return f"it belongs to {whose}; chgrp {os.getegid()} {file} && chmod g+r {file}"


def _is_writable(folder: Path) -> bool:
    return os.access(folder if os.path.lexists(folder) else folder.parent, os.W_OK)


def find(
    given: Path | None,
    environ: Mapping[str, str],
    *,
    here: Path = Path("sfwatch.yaml"),
    system_wide: Path = SYSTEM_WIDE,
) -> Path:
    """The configuration file: `given`, `$SFWATCH_CONFIG`, `./sfwatch.yaml`, the system's. Raises `ConfigError`.

    `./sfwatch.yaml` must be the caller's own and nobody else's to write: whoever works in somebody else's
    folder would otherwise send the key to a host of that person's choice.
    """
    named = given or (Path(environ["SFWATCH_CONFIG"]) if environ.get("SFWATCH_CONFIG") else None)
    if named is not None:
        return named
    if os.path.lexists(here):
        _refuse_strangers(here)
        return here
    if os.path.lexists(system_wide):
        return system_wide
    places = f"name one with -c or $SFWATCH_CONFIG, or make ./{here.name} or {system_wide}"
    text = f"there is no configuration file: {places}; {_SMALLEST}"
    raise ConfigError([Problem("", None, text)])


def _refuse_strangers(path: Path) -> None:
    try:
        link, file = path.lstat(), path.stat()
    except OSError:
        return  # `read` says what is wrong with it
    if {link.st_uid, file.st_uid} != {os.geteuid()}:
        text = "belongs to another user, who could send your key anywhere: name it with -c if you trust it"
    elif stat.S_IMODE(file.st_mode) & 0o022:
        text = f"can be written by other users: chmod go-w {path}, or name it with -c if you trust it"
    else:
        return
    raise ConfigError([Problem("", None, text)], path)

"""YAML text to frozen values, or every problem at once with its path and line.

Reading goes in three steps: text to YAML nodes (they know their lines), nodes to values by the tables of
language.py, values to a `Config`, with what concerns several keys.

No problem quotes a value that could be the API key: only short ones are quoted, and none of an address or path.
"""

import difflib
import importlib.util
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from sfwatch.conflicts import look_at_address, look_at_folders, look_at_retries
from sfwatch.language import API, INBOX, LOG, TOP, UPLOADS, Entry, Listed, Section
from sfwatch.problems import ConfigError, Notes, Problem
from sfwatch.settings import Api, Config, Inbox, Log, Uploads
from sfwatch.values import BOOL, ELSEWHERE, FLAGS, Kind, Wrong, looks_secret

__all__ = ["LONGEST_TEXT", "SYSTEM_WIDE", "ConfigError", "Problem", "find", "parse", "read"]

SYSTEM_WIDE = Path("/etc/sfwatch/sfwatch.yaml")
LONGEST_TEXT = 256 * 1024
"""Characters of a configuration: some thousand inboxes, and no work without end for the YAML parser."""

_SMALLEST = "the smallest file that works is `inboxes: [{path: /srv/sfwatch/inbox}]`"
_SECRET_WORDS = ("key", "token", "secret", "authorization", "bearer", "password")
_NO_METRICS = "needs prometheus_client: pip install 'sfwatch[metrics]', or leave the key out"


# ---- text to nodes ----

_YAML = "tag:yaml.org,2002:"
_PLAIN = frozenset(
    _YAML + tag for tag in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")
)
_NULL, _FLAG = _YAML + "null", _YAML + "bool"


class _Loader(yaml.SafeLoader):
    """Nodes without aliases: no bombs and no endless structures, and no key has two lines."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not understood here", problem_mark=mark)
        return super().compose_node(parent, index)


def _tree(text: str, notes: Notes) -> yaml.Node | None:
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


def _section(node: yaml.Node, path: str, keys: tuple[Entry, ...], notes: Notes) -> dict[str, Any]:
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


def _entries(node: yaml.Node, path: str, notes: Notes) -> Iterator[tuple[str, yaml.Node]]:
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


def _value(node: yaml.Node, where: str, kind: Kind | Listed | Section, notes: Notes) -> Any:
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


def _below(node: yaml.Node, where: str, kind: Section, notes: Notes) -> dict[str, Any]:
    if node.tag == _NULL:  # a section whose keys are all commented out
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise Wrong(f"must hold keys, such as {kind.example}")
    return _section(node, where, kind.keys, notes)


def _items(
    node: yaml.Node, where: str, read: Callable[[yaml.Node, str], Any], example: str, notes: Notes
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
    if looks_secret(node.value):
        raise Wrong(f"looks like an API key (for a name that begins with sk- write ./ before it): {ELSEWHERE}")
    if kind is BOOL and (node.tag != _FLAG or node.value.lower() not in FLAGS):
        raise Wrong("must be true or false, without quotes")
    return kind.read(node.value)


def _join(path: str, name: str) -> str:
    plain = re.fullmatch(r"[\w.<-]{1,31}", name) and "sk-" not in name.lower()
    shown = name if plain else f"(a key of {len(name)} characters)"
    return f"{path}.{shown}" if path else shown


def _unknown(name: str, known: list[str]) -> str:
    """What to say to a key that is not known here."""
    plain = re.sub("[^a-z]", "", name.lower())
    if plain in {*_SECRET_WORDS, "apikey"} or looks_secret(name):
        return ELSEWHERE
    sections = {"api": API, "inboxes": INBOX, "uploads": UPLOADS, "log": LOG, "the top level": TOP}
    homes = [home for home, keys in sections.items() if name in {entry.name for entry in keys}]
    if homes:
        return f"is not known here: it belongs under {' or '.join(homes)}"
    near = difflib.get_close_matches(name[:64], known, n=1)
    if near:
        return f"is not known; did you mean {near[0]}?"
    if any(word in plain for word in _SECRET_WORDS):
        return f"is not known; {ELSEWHERE}"
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
    notes = Notes(base)
    tree = _tree(text, notes)
    values = _section(tree, "", TOP, notes) if tree else {}
    inboxes = _inboxes(values, notes) if tree else {}
    values.pop("api", None)
    values["inboxes"] = tuple(inboxes.values())
    values["state_dir"] = values.get("state_dir") or _state_dir(environ, is_root=is_root, writable=writable)
    values["uploads"] = Uploads(**values.get("uploads", {}))
    values["log"] = Log(**values.get("log", {}))
    config = Config(**values, source=source)
    look_at_retries(config, notes)
    look_at_folders(config, inboxes, realpath, notes)
    if config.metrics_file is not None and not has_metrics():
        notes.add("metrics_file", _NO_METRICS)
    if notes.problems:
        raise ConfigError(sorted(notes.problems, key=lambda problem: problem.line or 0), source)
    return config


def _inboxes(values: Mapping[str, Any], notes: Notes) -> dict[str, Inbox]:
    """The inboxes by their paths in the configuration (`inboxes[0]`)."""
    if "inboxes" not in notes.lines:
        notes.add("inboxes", f"is missing: {_SMALLEST}")
    own = values.get("api", {})
    common = Api(**own)
    look_at_address(common, own, "api", notes)
    found: dict[str, Inbox] = {}
    for where, given in values.get("inboxes", []):
        look_at_address(replace(common, **given.get("api", {})), given.get("api", {}), f"{where}.api", notes)
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
        problem = Problem("", None, f"can't be read ({error.strerror}): change that, or name another with -c")
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

"""Writes what else is said of the configuration: the JSON schema for editors, the README's table of keys.

Both are made from the tables in language.py, which are the language, and from config/sfwatch.yaml, which holds
the defaults; the tests fail while what lies in the repository differs. Run it with `make schema`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sfwatch.language import API, TOP, Entry, Listed, Section
from sfwatch.values import Kind

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "config" / "sfwatch.schema.json"
README = ROOT / "README.md"
HEADER = "| key | default | takes | what it is |\n|---|---|---|---|\n"

COMPUTED = frozenset({"path", "name", "done", "failed", "state_dir"})
"""Keys whose value in the sample is one among many."""


def sample() -> dict[str, Any]:
    """The sample configuration, as YAML has it."""
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "config" / "sfwatch.yaml").read_text())
    return loaded


def schema() -> dict[str, Any]:
    """The JSON schema."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "sfwatch.yaml",
        **_object(TOP, sample(), required=["inboxes"]),
    }


def _object(keys: tuple[Entry, ...], defaults: dict[str, Any], *, required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {entry.name: _property(entry, defaults.get(entry.name)) for entry in keys},
        "required": required,
        "additionalProperties": False,
    }


def _property(entry: Entry, default: Any) -> dict[str, Any]:
    return {"description": entry.about, **_form(entry.kind, default), **_default(entry, default)}


def _form(kind: Kind | Listed | Section, default: Any) -> dict[str, Any]:
    match kind:
        case Kind():
            return {"anyOf": [{"type": "null"}, dict(kind.schema)]} if kind.empty else dict(kind.schema)
        case Listed():
            return {"type": "array", "minItems": 1, "items": dict(kind.kind.schema)}
        case Section(many=True):
            return {"type": "array", "minItems": 1, "items": _object(kind.keys, default[0], required=["path"])}
        case _:
            below = _object(kind.keys, default or _defaults_of(kind), required=[])
            return below | {"type": ["object", "null"]}  # null: all keys below it are commented out


def _defaults_of(kind: Section) -> dict[str, Any]:
    return dict(sample()["api"]) if kind.keys == API else {}


def _default(entry: Entry, default: Any) -> dict[str, Any]:
    if entry.name in COMPUTED or default is None or isinstance(entry.kind, Section):
        return {}
    return {"default": default}


def table() -> str:
    """The rows of the README's table of keys."""
    return "".join(_rows(TOP, sample(), ""))


def _rows(keys: tuple[Entry, ...], defaults: dict[str, Any], above: str) -> Iterator[str]:
    for entry in keys:
        default = defaults.get(entry.name)
        name = f"{above}{entry.name}"
        match entry.kind:
            case Section(many=True) as kind:
                yield from _rows(kind.keys, default[0] if default else {}, f"{name}[].")
            case Section() as kind if above:
                yield f"| `{name}` | `{{}}` | keys of `{entry.name}` | {entry.about} |\n"
            case Section() as kind:
                yield from _rows(kind.keys, default or {}, f"{name}.")
            case Listed() as kind:
                yield _row(name, json.dumps(default), f"a list: each {kind.kind.form}", entry.about)
            case Kind() as kind:
                shown = "" if entry.name in COMPUTED or default is None else _written(default)
                yield _row(name, shown, kind.form, entry.about)


def _row(name: str, default: str, takes: str, about: str) -> str:
    return f"| `{name}` | {f'`{default}`' if default else '–'} | {takes} | {about} |\n"


def _written(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def in_readme(text: str) -> str:
    """The rows of that table as they stand in the README."""
    return text.partition(HEADER)[2].partition("\n\n")[0] + "\n"


def main() -> None:
    """Write both."""
    SCHEMA.write_text(json.dumps(schema(), indent=2) + "\n")
    text = README.read_text()
    README.write_text(re.sub(re.escape(HEADER) + r"(\|.*\n)*", lambda _: HEADER + table(), text))


if __name__ == "__main__":
    main()

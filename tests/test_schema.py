"""The JSON schema of the configuration says what the code says, and the README's table as well."""

import json
from typing import Any

import pytest
import schema
import yaml
from jsonschema import Draft7Validator

from sfwatch import config

VALIDATOR = Draft7Validator(json.loads(schema.SCHEMA.read_text()))
SMALLEST = {"inboxes": [{"path": "/srv/sfwatch/inbox"}]}


def is_valid(document: Any) -> bool:
    """Whether an editor would leave it unmarked."""
    return bool(VALIDATOR.is_valid(document))


def is_taken(document: Any) -> bool:
    """Whether the code takes it, as far as single values go."""
    try:
        config.parse(yaml.safe_dump(document), base=schema.ROOT, environ={})
    except config.ConfigError:
        return False
    return True


def test_the_schema_is_current() -> None:
    """`make schema` writes it anew."""
    assert json.loads(schema.SCHEMA.read_text()) == schema.schema()
    Draft7Validator.check_schema(schema.schema())


def test_the_readme_is_current() -> None:
    """Its table of keys has every key, with its default and what it takes; `make schema` writes it anew."""
    assert schema.in_readme(schema.README.read_text()) == schema.table()


def test_the_sample_names_the_schema_and_keeps_it() -> None:
    """Its first line is for YAML language servers; the schema lies beside it."""
    path = schema.SCHEMA.with_name("sfwatch.yaml")
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={schema.SCHEMA.name}"
    assert is_valid(schema.sample())


def test_the_smallest_configuration_is_valid() -> None:
    """And what it lacks is missed."""
    assert is_valid(SMALLEST)
    assert not is_valid({})
    assert not is_valid({"inboxes": []})
    assert not is_valid({"inboxes": [{"name": "a"}]})


@pytest.mark.parametrize("place", [[], ["api"], ["inboxes", 0], ["inboxes", 0, "api"], ["uploads"], ["log"]])
def test_unknown_keys_are_refused(place: list[Any]) -> None:
    """At every level."""
    document = schema.sample()
    assert is_valid(document)
    below = document
    for step in place:
        below = below[step]
    below["concurency"] = 4
    assert not is_valid(document)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("scan_interval", ["1s", "1.5m", "500ms"], ["5", 5, "1 s", "", None, "s"]),
        ("history_days", [1, 36500], [0, 1.5, -1]),
        ("status_file", [None, "/run/x"], [["x"], {}]),
        ("uploads", [None, {"max_rate": "20MB"}, {"max_rate": "unlimited"}], [[], {"max_rate": 20}]),
        ("api", [{"base_url": "https://h/v1"}, {}], [{"base_url": "ftp://h"}, {"base_url": "https://a@h"}]),
        ("log", [{"format": "json"}], [{"format": "xml"}, {"level": 3}]),
    ],
)
def test_values_are_held_against_their_form(key: str, good: list[Any], bad: list[Any]) -> None:
    """What the code takes is valid, what it refuses for its form is not; bounds of durations are the code's."""
    for value in good:
        document = SMALLEST | {key: value}
        assert (is_valid(document), is_taken(document) or value == "500ms") == (True, True)
    for value in bad:
        document = SMALLEST | {key: value}
        assert (is_valid(document), is_taken(document)) == (False, False)


@pytest.mark.parametrize("limit", [0, "0", "64KiB", "1GB"])
def test_a_limit_of_none(limit: Any) -> None:
    """0, as a number as well."""
    document = {"inboxes": [{"path": "/in", "max_bytes": limit}]}
    assert is_valid(document)
    assert is_taken(document)

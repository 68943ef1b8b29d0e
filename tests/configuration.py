"""Configurations for tests: what a text means, or all that is wrong with it."""

from pathlib import Path
from typing import Any

import pytest

from sfwatch import config
from sfwatch.config import ConfigError
from sfwatch.settings import Config

BASE = Path("/etc/sfwatch")
SMALLEST = "inboxes:\n  - path: /srv/sfwatch/inbox\n"


def parse(text: str, **handed: Any) -> Config:
    """What it means."""
    given: dict[str, Any] = {"base": BASE, "environ": {}}
    return config.parse(text, **given | handed)


def problems(text: str, **handed: Any) -> list[str]:
    """What is wrong with it, as it is told."""
    with pytest.raises(ConfigError) as caught:
        parse(text, **handed)
    return [str(problem) for problem in caught.value.problems]


def inbox(line: str) -> str:
    """A configuration whose one inbox has `line` in line 3."""
    return f"{SMALLEST}    {line}\n"

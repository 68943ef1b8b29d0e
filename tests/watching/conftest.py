"""The whole loop without threads, for all tests of watching."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from loop import Loop

from sfwatch.standin import StandIn


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    """Loops that are started, and whose promises are checked at the end."""
    with StandIn() as service, ExitStack() as closing:

        def make(**settings: Any) -> Loop:
            loop = Loop(tmp_path, service, **settings)
            closing.callback(loop.close)
            return loop.start()

        yield make

"""To be a user without any right for a while, in this very process."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loop import Loop

from sfwatch.standin import StandIn

SOMEBODY = 65534


@contextmanager
def somebody() -> Iterator[Path]:
    """A folder of that user's, who this process is for the block."""
    _load_all()
    root = Path(tempfile.mkdtemp(prefix="sfwatch-test-"))
    os.chown(root, SOMEBODY, SOMEBODY)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(SOMEBODY)
    os.seteuid(SOMEBODY)
    try:
        yield root
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        shutil.rmtree(root)


@contextmanager
def root_again() -> Iterator[None]:
    """Within it, for a moment, root."""
    os.seteuid(0)
    try:
        yield
    finally:
        os.seteuid(SOMEBODY)


def _load_all() -> None:
    """Let one file go through: modules that are loaded late may lie where that user may not read."""
    with tempfile.TemporaryDirectory() as root, StandIn() as service:
        loop = Loop(Path(root), service).start()
        loop.drop("a", "x.jsonl")
        loop.look().run(10)
        loop.close()

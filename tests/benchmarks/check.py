"""The check alone, with its digest, on long and on short lines, English and Chinese; the file is in memory.

The peer is the decoder itself: msgspec over the same lines, to the same type, and nothing else. What counts is
the time of the thread that checks (the digest is taken in a second one), since a shared machine gives it only
part of a core; the time on the wall stands beside it.
"""

import hashlib
import io
import os
import time
from pathlib import Path

from benchmarks import lab

from sfwatch import findings
from sfwatch.check import check
from sfwatch.settings import Check

WALL: list[float] = []


def checked(fd: int, size: int) -> float:
    """MB/s of the check as the daemon makes it."""
    began, on_the_wall = time.thread_time(), time.monotonic()
    it = check(fd, size, level=Check.BATCH, max_bytes=0, max_lines=0)
    assert not it.findings
    WALL.append(size / 1e6 / (time.monotonic() - on_the_wall))
    return size / 1e6 / (time.thread_time() - began)


def decoded(path: Path) -> float:
    """MB/s of the decoder alone: no lines to be cut, no digest, no look at what is skipped."""
    lines = io.BytesIO(path.read_bytes()).readlines()
    began = time.thread_time()
    for line in lines:
        findings.decode_request(line)
    return path.stat().st_size / 1e6 / (time.thread_time() - began)


def hashed(path: Path) -> float:
    """MB/s of SHA-256 alone."""
    data = path.read_bytes()
    began = time.thread_time()
    hashlib.sha256(data)
    return len(data) / 1e6 / (time.thread_time() - began)


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, megabytes=500, rounds=3)
    with lab.scratch(options.folder) as folder:
        for language, text in (("English", lab.ENGLISH), ("Chinese", lab.CHINESE)):
            for size in (200_000, 500):
                lines = options.megabytes * 1_000_000 // size
                path = lab.write_requests(folder / "check.jsonl", lines=lines, line_size=size, text=text)
                lab.title(f"check alone: {options.megabytes} MB, {language}, lines of {size} bytes")
                fd = os.open(path, os.O_RDONLY)
                found = lab.rounds(
                    options.rounds,
                    {
                        "sfwatch.check": lambda: checked(fd, path.stat().st_size),  # noqa: B023
                        "msgspec alone": lambda: decoded(path),  # noqa: B023
                        "SHA-256 alone": lambda: hashed(path),  # noqa: B023
                    },
                )
                os.close(fd)
                lab.tell_ratios("limits lifted, digest in a second thread", found, "MB/s of one core")
                print(f"  on the wall: {lab.middle(WALL[-options.rounds :], 0)} MB/s", flush=True)


if __name__ == "__main__":
    main()

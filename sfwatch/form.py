"""The body of an upload is made, hashed and held by its reins while it goes out: no file is too big for it.

A `Form` is the multipart body of one file, piece by piece, in constant memory. Whoever sends it asks for the
next piece when the one before is out; a helper thread reads and hashes some blocks ahead meanwhile (on a second
core the digest then costs next to no time). The file's last byte is always followed by the closing delimiter,
and that goes out only once the digest was approved: what was broken off can't be taken for a whole file.

Nothing here knows HTTP.
"""

import hashlib
import itertools
import math
import mmap
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

BLOCK = 512 * 1024
"""Bytes read, hashed and handed over at once; files up to this size go out in one piece."""

SLICE_S = 0.25
"""How soon `stop` is noticed while nothing moves."""

_AHEAD = 3  # blocks read and hashed ahead of the one that goes out: 1 is a tenth slower, 7 no quicker
_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f"\\\ud800-\udfff]')


class BrokenOff(Exception):  # noqa: N818 - often it is what was asked for
    """The body ends before its end; the text says why."""


class Pace:
    """A bound in bytes per second over all uploads together."""

    def __init__(self, bytes_per_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = -math.inf
        self._lock = threading.Lock()  # the uploads share this one number, and reserve in between each other

    def reserve(self, n: int) -> float:
        """Seconds to wait before sending `n` bytes; they count as sent from now on."""
        with self._lock:
            now = self._clock()
            starts_at = max(self._free_at, now)
            self._free_at = starts_at + n / self.bytes_per_s
        return starts_at - now


@dataclass(frozen=True, slots=True)
class Reins:
    """What the caller wants to know and to say while a file goes out."""

    progress: Callable[[int], None] | None = None
    stop: Callable[[], bool] | None = None
    pace: Pace | None = None
    approve: Callable[[str], bool] | None = None
    moved: Callable[[], None] | None = None

    def check(self) -> None:
        if self.stop and self.stop():
            raise BrokenOff("the upload was broken off on request")

    def wait_for(self, n: int) -> None:
        """Wait until `n` bytes may go out."""
        self.check()
        left = self.pace.reserve(n) if self.pace else 0.0
        while left > 0:
            time.sleep(min(left, SLICE_S))
            left -= SLICE_S
            self.check()
            self.stir()

    def require_approval(self, sha256: str) -> None:
        if self.approve and not self.approve(sha256):
            raise BrokenOff("the file is not what it was when it was checked")

    def tell(self, sent: int) -> None:
        if self.progress:
            self.progress(sent)

    def stir(self) -> None:
        """Some bytes went out, or wait for their turn: whoever looks need not worry."""
        if self.moved:
            self.moved()


class Form:
    """The multipart body, to be sent once: `purpose` first, as in all of the vendor's examples.

    A piece is valid until the next one is asked for; asking raises `BrokenOff`. Who does not come to the end
    calls `close`. Raises ValueError for a name or purpose that does not fit into a header.
    """

    def __init__(self, fd: int, size: int, *, purpose: str, remote_name: str, reins: Reins) -> None:
        boundary = os.urandom(16).hex()
        self._fd = fd
        self._size = size
        self._head = _head(boundary, purpose, remote_name)
        self._tail = f"\r\n--{boundary}--\r\n".encode("ascii")
        self._digest = hashlib.sha256()
        self._pieces = self._at_once() if size <= BLOCK else self._in_blocks()
        self.reins = reins
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.sent = 0
        self.sent_all = False

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return self._pieces

    def close(self) -> None:
        self._pieces.close()

    @property
    def sha256(self) -> str | None:
        """Digest of the file's bytes, once all are out."""
        return self._digest.hexdigest() if self.sent_all else None

    def _at_once(self) -> Generator[bytes]:
        data = self._fill(memoryview(bytearray(self._size)), 0)
        self._approve()
        self.reins.wait_for(self._size)
        yield b"".join((self._head, data, self._tail))
        self._went_out(self._size)
        self.sent_all = True

    def _in_blocks(self) -> Generator[bytes | memoryview]:
        yield self._head
        with ThreadPoolExecutor(1, thread_name_prefix="sfwatch-read-ahead") as helper:
            for block in self._blocks(helper):
                self.reins.wait_for(len(block))
                yield block
                self._went_out(len(block))
        self._approve()
        self.reins.check()
        yield self._tail
        self.sent_all = True

    def _blocks(self, helper: ThreadPoolExecutor) -> Iterator[memoryview]:
        # Anonymous mappings: reading into a bytearray of this size costs half a second a gigabyte on some
        # processors, since it does not begin on a page.
        buffers = itertools.cycle([memoryview(mmap.mmap(-1, BLOCK)) for _ in range(_AHEAD + 1)])
        ahead: deque[Future[memoryview]] = deque()
        for at in range(0, self._size, BLOCK):
            ahead.append(helper.submit(self._fill, next(buffers), at))
            if len(ahead) > _AHEAD:
                yield ahead.popleft().result()
        for block in ahead:
            yield block.result()

    def _fill(self, block: memoryview, at: int) -> memoryview:
        block = block[: self._size - at]
        filled = 0
        while filled < len(block):
            filled += self._read(block[filled:], at + filled)
        self._digest.update(block)
        return block

    def _read(self, block: memoryview, at: int) -> int:
        try:
            n = os.preadv(self._fd, [block], at)
        except OSError as error:
            raise BrokenOff(f"the file cannot be read: {error.strerror}") from error
        if n == 0:
            raise BrokenOff("the file became shorter while it was sent")
        return n

    def _approve(self) -> None:
        self.reins.require_approval(self._digest.hexdigest())

    def _went_out(self, n: int) -> None:
        self.sent += n
        self.reins.tell(self.sent)


def _head(boundary: str, purpose: str, remote_name: str) -> bytes:
    # Non-ASCII names stand there as plain UTF-8, as browsers and curl send them: RFC 2231's filename* is
    # forbidden in forms (RFC 7578, 4.2), and parsers differ over every way of quoting.
    return (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="purpose"\r\n\r\n'
        f"{_fit(purpose)}\r\n"
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="file"; filename="{_fit(remote_name)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


def _fit(text: str) -> str:
    if unfit := _UNFIT.search(text):
        raise ValueError(f"{unfit[0]!r} does not fit into a form's header, and stands in {text!r}")
    return text

"""A local stand-in for the Files API: it answers in the service's form, and misbehaves on request.

`sfwatch demo` and the tests run against it. It listens on loopback only. What a POST meets is said by
`Behaviour` values, taken in order from `StandIn.script`; without one the file is stored and accepted. What a
listing shows is said by `StandIn.listing`. Both, and the key, may be changed while it runs.

The forms of its answers are those of SiliconFlow's documentation (docs.siliconflow.cn, "upload-file" and
"get-file-list"). It is cheap: a body is read into one reused megabyte and never kept in memory.
"""

import contextlib
import hashlib
import json
import mmap
import re
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedReader
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

_BUFFER = 1024 * 1024
_HEAD_LIMIT = 64 * 1024
_WORTH_DRAINING = 1024 * 1024
_HANDSHAKE_S = 10.0


class End(StrEnum):
    """What becomes of a connection when a POST has been read as far as it is to be read."""

    ANSWER = "answer"
    RESET = "reset"
    STALL = "stall"  # says nothing until the stand-in is closed or `Behaviour.stall_s` is over


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What one POST meets. `answering`, `refusing_early` and the others below make the usual ones.

    `answer` None stands for the service's own acceptance. `reads` is how many bytes of the body are read
    before the end comes, None for all; a file is stored only if all of it was read.
    """

    stores: bool = True
    end: End = End.ANSWER
    answer: "Reply | None" = None
    reads: int | None = None
    delay_s: float = 0.0
    stall_s: float = 3600.0
    filename: str | None = None
    """Only a POST with this filename meets it; others pass over it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it stands."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """What `GET /v1/files` shows: files older than `lag_s`, at most `longest` at once; or `answer` instead.

    `pages`: it follows `after` and says has_more; else it shows the first ones whatever is asked for.
    """

    lag_s: float = 0.0
    longest: int = 10_000
    pages: bool = True
    hides: frozenset[str] = frozenset()
    answer: Reply | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that the stand-in has taken."""

    id: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    lines: int
    created_at: int
    at: float


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came in."""

    method: str
    path: str
    headers: Mapping[str, str]
    authorization: str | None


def answering(
    status: int, body: bytes | Mapping[str, Any] | str, headers: Mapping[str, str] | None = None
) -> Behaviour:
    """The file is read, not stored, and answered so; a mapping or string is sent as JSON."""
    return Behaviour(stores=False, answer=reply(status, body, headers))


def refusing_early(status: int, body: bytes | Mapping[str, Any] | str, *, after: int = 0) -> Behaviour:
    """The answer comes and the connection is closed when `after` bytes of the body are read."""
    return Behaviour(stores=False, answer=reply(status, body), reads=after)


def resetting(*, after: int) -> Behaviour:
    """The connection is reset when `after` bytes of the body are read."""
    return Behaviour(stores=False, end=End.RESET, reads=after)


def storing_then_resetting() -> Behaviour:
    """The file is stored, and nobody is told."""
    return Behaviour(end=End.RESET)


def storing_then_stalling(stall_s: float = 3600.0) -> Behaviour:
    """The file is stored, and no answer comes."""
    return Behaviour(end=End.STALL, stall_s=stall_s)


def storing_then_answering(status: int, body: bytes | Mapping[str, Any] | str) -> Behaviour:
    """The file is stored, and somebody on the way (a gateway, say) answers something else."""
    return Behaviour(answer=reply(status, body))


def taking_its_time(delay_s: float) -> Behaviour:
    """The file is stored, and accepted after a while."""
    return Behaviour(delay_s=delay_s)


def reply(
    status: int, body: bytes | Mapping[str, Any] | str, headers: Mapping[str, str] | None = None
) -> Reply:
    """An answer: bytes as they are, anything else as JSON."""
    if isinstance(body, bytes):
        return Reply(status, body, tuple((headers or {}).items()))
    as_json = {"Content-Type": "application/json; charset=utf-8"} | dict(headers or {})
    return Reply(status, json.dumps(body, ensure_ascii=False).encode(), tuple(as_json.items()))


class StandIn:
    """The service, on loopback, from `with` to the end of its block.

    `key` None takes any key. `keep` is a folder for the bytes of the files, each named by its SHA-256.
    `digest` False spares the hashing and counting, for measuring what the sender costs. `tls` serves HTTPS.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        key: str | None = None,
        script: Iterable[Behaviour] = (),
        keep: Path | None = None,
        digest: bool = True,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.key = key
        self.script = deque(script)
        self.listing = Listing()
        self.always = Behaviour()
        self.stored: list[Stored] = []
        self.requests: list[Seen] = []
        self.keep = keep
        self.digest = digest
        self.clock = clock
        self.closing = threading.Event()
        self._server = _Server(self, port, tls)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        scheme = "https" if tls else "http"
        self.base_url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()

    def hang_up(self) -> None:
        """Close every open connection, as a service does that restarts."""
        self._server.hang_up()

    def next_behaviour(self, filename: str) -> Behaviour:
        """Take what the next POST of `filename` meets off the script."""
        for behaviour in list(self.script):
            if behaviour.filename in (None, filename, untagged(filename)):
                with contextlib.suppress(ValueError):  # another connection was quicker
                    self.script.remove(behaviour)
                    return behaviour
        return self.always

    def listed(self, limit: int, after: str | None = None) -> tuple[list[Stored], bool]:
        """The files that a listing shows now, the newest first, and whether there are more."""
        shown_until = self.clock() - self.listing.lag_s
        hides = self.listing.hides
        shown = [f for f in self.stored if f.at <= shown_until and f.id not in hides][::-1]
        ids = [f.id for f in shown]
        begin = ids.index(after) + 1 if self.listing.pages and after in ids else 0
        end = begin + min(limit, self.listing.longest)
        return shown[begin:end], end < len(shown)


_TAG = re.compile(r"-[0-9a-f]{12}\.jsonl$")


def untagged(filename: str) -> str:
    """The name of an upload without the tag that sfwatch puts into it."""
    return _TAG.sub(".jsonl", filename)


@dataclass(slots=True)
class _Upload:
    """A multipart body while it is read: the small parts, and what is known of the file."""

    length: int
    boundary: bytes
    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size: int = 0
    lines: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def closing(self) -> bytes:
        return b"\r\n--" + self.boundary + b"--\r\n"


class _Malformed(Exception):  # noqa: N818 - a finding about a request
    pass


class _Reset(Exception):  # noqa: N818 - an order
    pass


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 256

    def __init__(self, stand_in: StandIn, port: int, tls: ssl.SSLContext | None) -> None:
        self.stand_in = stand_in
        self.tls = tls
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), _Handler)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError, TimeoutError):
            if self.tls:
                request.settimeout(_HANDSHAKE_S)
                request = self.tls.wrap_socket(request, server_side=True)
                request.settimeout(None)
            self._serve(request, client_address)

    def _serve(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        try:
            if not self.stand_in.closing.is_set():
                super().finish_request(request, client_address)
        finally:
            self.open.discard(request)
            request.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    rfile: BufferedReader
    connection: socket.socket

    def log_message(self, *_: Any) -> None:
        """Say nothing: what came in stands in `StandIn.requests`."""

    def do_GET(self) -> None:
        self._note()
        if not self._known():
            self._answer(_UNAUTHORIZED)
        elif self._is_files():
            self._answer(self.server.stand_in.listing.answer or self._listing())
        else:
            self._answer(_NOT_FOUND)

    def do_POST(self) -> None:
        self._note()
        length = int(self.headers.get("Content-Length") or 0)
        if not self._is_files():
            self._refuse(_NOT_FOUND, length)
        elif not self._known():
            self._refuse(_UNAUTHORIZED, length)
        else:
            self._receive(length)

    def _note(self) -> None:
        seen = Seen(self.command, self.path, dict(self.headers), self.headers.get("Authorization"))
        self.server.stand_in.requests.append(seen)

    def _is_files(self) -> bool:
        return urlsplit(self.path).path == "/v1/files"

    def _known(self) -> bool:
        key = self.server.stand_in.key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _receive(self, length: int) -> None:
        try:
            upload = _begin(self.headers, self.rfile, length)
            behaviour = self.server.stand_in.next_behaviour(upload.filename)
            self._meet(behaviour, upload)
        except _Malformed as why:
            self._answer(reply(400, {"code": 20012, "message": str(why), "data": None}), last=True)
        except _Reset:
            self._reset()

    def _meet(self, behaviour: Behaviour, upload: _Upload) -> None:
        whole = behaviour.reads is None
        with _kept(self.server.stand_in.keep if whole else None, upload) as sink:
            self._read(upload, behaviour.reads, sink)
        stored = self._store(upload) if whole and behaviour.stores else None
        self.server.stand_in.closing.wait(behaviour.delay_s)
        if behaviour.end is End.RESET:
            raise _Reset
        if behaviour.end is End.STALL:
            self.server.stand_in.closing.wait(behaviour.stall_s)
            raise _Reset
        self._answer(behaviour.answer or _accepted(stored), last=not whole)

    def _read(self, upload: _Upload, at_most: int | None, sink: Callable[[memoryview], Any]) -> None:
        size = upload.length - len(upload.closing)
        if at_most is not None:
            _pump(self.rfile, min(at_most, size), _nothing)
            return
        _pump(self.rfile, size, self._taker(upload, sink))
        if self.rfile.read(len(upload.closing)) != upload.closing:
            raise _Malformed("the body does not end with its closing delimiter")

    def _taker(self, upload: _Upload, sink: Callable[[memoryview], Any]) -> Callable[[memoryview], None]:
        inspects = self.server.stand_in.digest or self.server.stand_in.keep is not None

        def take(block: memoryview) -> None:
            upload.size += len(block)
            sink(block)
            if inspects:
                upload.digest.update(block)
                upload.lines += bytes(block).count(b"\n")

        return take

    def _store(self, upload: _Upload) -> Stored:
        stand_in = self.server.stand_in
        at = stand_in.clock()
        stored = Stored(
            id="file-" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(10)),
            filename=upload.filename,
            purpose=upload.fields.get("purpose", ""),
            bytes=upload.size,
            sha256=upload.digest.hexdigest(),
            lines=upload.lines,
            created_at=int(at),
            at=at,
        )
        stand_in.stored.append(stored)
        return stored

    def _listing(self) -> Reply:
        query = parse_qs(urlsplit(self.path).query)
        after = query.get("after", [None])[0]
        entries, more = self.server.stand_in.listed(int(query.get("limit", ["10"])[0]), after)
        data: dict[str, Any] = {"data": [_entry(stored) for stored in entries], "object": "file"}
        if self.server.stand_in.listing.pages:
            data["has_more"] = more
        return reply(200, {"code": 20000, "message": "Ok", "status": True, "data": data})

    def _refuse(self, answer: Reply, length: int) -> None:
        # A big body is not waited for: the answer goes out at once, as nginx and most gateways do it.
        if length <= _WORTH_DRAINING:
            _pump(self.rfile, length, _nothing)
            self._answer(answer)
        else:
            self._answer(answer, last=True)

    def _answer(self, answer: Reply, *, last: bool = False) -> None:
        trace = ("x-siliconcloud-trace-id", f"ti_{secrets.token_hex(12)}")
        headers = [("Date", self.date_time_string()), trace, *answer.headers]
        headers += [("Content-Length", str(len(answer.body)))] + [("Connection", "close")] * last
        lines = [f"HTTP/1.1 {answer.status} -", *(f"{name}: {value}" for name, value in headers)]
        self.connection.sendall("\r\n".join([*lines, "", ""]).encode() + answer.body)
        if last:
            self._linger()

    def _linger(self) -> None:
        """Read on for a moment: closed with bytes unread, a socket resets, and the answer may go with it."""
        self.close_connection = True
        self.connection.settimeout(1)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            _pump(self.rfile, 64 * _BUFFER, _nothing)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


_UNAUTHORIZED = reply(401, "Invalid token")
_NOT_FOUND = reply(404, "404 page not found")


def _begin(headers: Message, body: BufferedReader, length: int) -> _Upload:
    """Read the body up to the first byte of the file, which must be its last part."""
    boundary = headers.get_param("boundary")
    if headers.get_content_type() != "multipart/form-data" or not isinstance(boundary, str):
        raise _Malformed("no multipart/form-data")
    upload = _Upload(length, boundary.encode())
    while not upload.filename:
        _read_part(upload, body)
    return upload


def _read_part(upload: _Upload, body: BufferedReader) -> None:
    delimiter = _line(upload, body)
    if delimiter != b"--" + upload.boundary:
        raise _Malformed("no part named file")
    disposition = b""
    while line := _line(upload, body):
        disposition = line if line.lower().startswith(b"content-disposition:") else disposition
    name, upload.filename = _parameter(disposition, b"name"), _parameter(disposition, b"filename")
    if not upload.filename:
        upload.fields[name] = _line(upload, body).decode("utf-8", "replace")


def _line(upload: _Upload, body: BufferedReader) -> bytes:
    line = body.readline(_HEAD_LIMIT)
    if not line.endswith(b"\r\n"):
        raise _Malformed("a part does not begin as it should")
    upload.length -= len(line)
    return line[:-2]


def _parameter(disposition: bytes, name: bytes) -> str:
    found = re.search(rb"[; ]" + name + rb'="([^"]*)"', disposition)
    return found[1].decode("utf-8", "replace") if found else ""


def _pump(source: BufferedReader, size: int, take: Callable[[memoryview], Any]) -> None:
    """Hand on `size` bytes in blocks of one reused buffer, page-aligned since that is quicker."""
    buffer = memoryview(mmap.mmap(-1, _BUFFER))
    while size > 0:
        n = source.readinto1(buffer[: min(size, _BUFFER)])
        if not n:
            raise ConnectionAbortedError("the body ended early")
        take(buffer[:n])
        size -= n


def _nothing(_block: memoryview) -> None:
    pass


@contextlib.contextmanager
def _kept(folder: Path | None, upload: _Upload) -> Iterator[Callable[[memoryview], Any]]:
    if folder is None:
        yield _nothing
        return
    partial = folder / f"{secrets.token_hex(8)}.part"
    with partial.open("wb", buffering=0) as file:
        yield file.write
    partial.replace(folder / upload.digest.hexdigest())


def _accepted(stored: Stored | None) -> Reply:
    if stored is None:
        return reply(500, "nothing was stored, and no other answer was asked for")
    data = {"id": stored.id, "object": "file", "bytes": stored.bytes, "createdAt": stored.created_at}
    data |= {"filename": stored.filename, "purpose": stored.purpose}
    return reply(200, {"code": 20000, "message": "Ok", "status": True, "data": data})


def _entry(stored: Stored) -> dict[str, Any]:
    """An entry of a listing, which says `created_at` where the upload says `createdAt`."""
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": stored.created_at,
        "filename": stored.filename,
        "purpose": stored.purpose,
        "line_count": stored.lines,
    }

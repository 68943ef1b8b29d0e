"""A Files service in OpenAI's form, with the habits of other people's servers.

What it does by itself: it stores what is uploaded and lists it, the newest first. Its habits are its fields and
may be changed while it runs. `on_upload` and `on_listing` see each request and may answer in its place.
"""

import contextlib
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

LONGEST_HOLD_S = 8.0
HTML = b"<html>\r\n<head><title>Not now</title></head>\r\n<body>Not now</body>\r\n</html>\r\n"


@dataclass(frozen=True)
class Answer:
    """What is said in place of the service's own answer; bytes are HTML, anything else is JSON."""

    status: int
    body: Any = None
    stores: bool = False
    once: Callable[[], object] | None = None
    """It is said when this has come true, or after `LONGEST_HOLD_S`."""


@dataclass(frozen=True)
class Lost:
    """The connection is reset once the whole body is there."""

    stores: bool


@dataclass(frozen=True)
class Upload:
    """One upload as it came in, and the number of its request."""

    name: str
    content: bytes
    purpose: str
    number: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A file that the service has."""

    id: str
    name: str
    purpose: str
    size: int
    digest: str
    at: float


OnUpload = Callable[[Upload], Answer | Lost | None]
OnListing = Callable[[Mapping[str, str]], Answer | None]


def nothing(_: Any) -> None:
    """Leave it to the service."""


def underscores(name: str) -> str:
    """As OGX does it: blanks and what is not ASCII become `_`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)


def cut_to(characters: int) -> Callable[[str], str]:
    """Names keep so many characters."""
    return lambda name: name[:characters]


@dataclass
class Service:
    """The service on loopback, from `with` to the end of its block."""

    page: int = 10_000
    """The most files that one listing shows, whatever its limit is."""
    largest_limit: int | None = None
    """A larger limit is answered with 400."""
    renames: Callable[[str], str] = str
    """What becomes of a name."""
    ahead_s: float = 0.0
    """How far the clock is ahead of this machine's."""
    says_date_s: float | None = None
    """The same for the Date header, where somebody else (a proxy) makes it."""
    milliseconds: bool = False
    """How times of creation are told."""
    on_upload: OnUpload = nothing
    on_listing: OnListing = nothing
    stored: list[Stored] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)
    listings: int = 0
    """Requests for the first page of a listing that have been answered."""

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.hang_up()
        self._server.server_close()
        self._thread.join()

    def clock(self) -> float:
        return time.time() + self.ahead_s

    # What it has.

    def store(self, upload: Upload) -> Stored:
        with self._lock:
            number = next(self._numbers)
            name = self.renames(upload.name)
            size, digest = len(upload.content), upload.digest
            file = Stored(f"file-{number:08x}", name, upload.purpose, size, digest, self.clock())
            self.stored.append(file)
        return file

    def others_store(self, count: int, *, size: int = 77) -> None:
        """As many files of somebody else come in."""
        for number in range(count):
            content = f"{number}".rjust(size).encode()
            self.store(Upload(f"somebody-{number}.jsonl", content, "batch", 0))

    def copies(self, digest: str) -> int:
        """How often it has this file."""
        return Counter(file.digest for file in self.stored)[digest]

    def tries(self, digest: str) -> int:
        """How often it was sent this file."""
        return sum(upload.digest == digest for upload in self.uploads)

    def ids(self, digest: str) -> set[str]:
        return {file.id for file in self.stored if file.digest == digest}

    # What it says.

    def upload(self, name: str, content: bytes, purpose: str) -> Answer | Lost:
        with self._lock:
            upload = Upload(name, content, purpose, len(self.uploads))
            self.uploads.append(upload)
        meets = self.on_upload(upload) or Answer(200, stores=True)
        file = self.store(upload) if meets.stores else None
        if isinstance(meets, Lost):
            return meets
        end = time.monotonic() + LONGEST_HOLD_S
        while meets.once is not None and not meets.once() and time.monotonic() < end:
            time.sleep(0.02)
        return Answer(meets.status, self._entry(file)) if file is not None and meets.body is None else meets

    def listing(self, query: Mapping[str, str]) -> Answer:
        answer = self.on_listing(query) or self._page(query)
        self.listings += "after" not in query
        return answer

    def _page(self, query: Mapping[str, str]) -> Answer:
        limit = int(query.get("limit", "20"))
        if self.largest_limit is not None and limit > self.largest_limit:
            text = f"Invalid 'limit': {limit} is above the maximum of {self.largest_limit}."
            return Answer(400, {"error": {"message": text, "type": "invalid_request_error", "code": None}})
        with self._lock:
            files = self.stored[::-1]
        if "purpose" in query:
            files = [file for file in files if file.purpose == query["purpose"]]
        if "after" in query:
            place = next((i for i, file in enumerate(files) if file.id == query["after"]), None)
            if place is None:
                return Answer(404, {"error": {"message": "No such file.", "type": "invalid_request_error"}})
            files = files[place + 1 :]
        shown = files[: min(limit, self.page)]
        entries = [self._entry(file) for file in shown]
        ends = {"first_id": shown[0].id, "last_id": shown[-1].id} if shown else {}
        more = len(files) > len(shown)
        return Answer(200, {"object": "list", "data": entries, "has_more": more} | ends)

    def _entry(self, file: Stored) -> dict[str, Any]:
        created_at = int(file.at * 1000) if self.milliseconds else int(file.at)
        told = {"id": file.id, "object": "file", "bytes": file.size, "created_at": created_at}
        return told | {"filename": file.name, "purpose": file.purpose, "status": "processed"}


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 64

    def __init__(self, service: Service) -> None:
        self.service = service
        self.open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        try:
            with contextlib.suppress(ConnectionError):
                super().finish_request(request, client_address)
        finally:
            self.open.discard(request)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """What came in stands in the service's fields."""

    def date_time_string(self, timestamp: float | None = None) -> str:
        service = self.server.service
        says = service.ahead_s if service.says_date_s is None else service.says_date_s
        return super().date_time_string(time.time() + says if timestamp is None else timestamp)

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        self._say(self.server.service.listing(query) if address.path == "/v1/files" else _NOT_FOUND)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if urlsplit(self.path).path != "/v1/files":
            self._say(_NOT_FOUND)
            return
        answer = self.server.service.upload(*_parts(body, str(self.headers.get_param("boundary"))))
        if isinstance(answer, Lost):
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        self._say(answer)

    def _say(self, answer: Answer) -> None:
        html = isinstance(answer.body, bytes)
        body = answer.body if html else json.dumps(answer.body, ensure_ascii=False).encode()
        self.send_response(answer.status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


_NOT_FOUND = Answer(404, {"error": {"message": "Not found.", "type": "invalid_request_error"}})


def _parts(body: bytes, boundary: str) -> tuple[str, bytes, str]:
    """Name, content and purpose of an upload."""
    name, content, purpose = "", b"", ""
    for part in body.split(b"--" + boundary.encode())[1:-1]:
        head, _, value = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        value = value.removesuffix(b"\r\n")
        filename = re.search(rb'; filename="([^"]*)"', head)
        if filename:
            name, content = filename[1].decode(), value
        elif b'name="purpose"' in head:
            purpose = value.decode()
    return name, content, purpose

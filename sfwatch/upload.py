"""One file, one request, one outcome; and the listing. The only module that knows HTTP.

Nothing is tried twice here and nothing is judged: a request ends in one `Attempt` that says what went out
and what came back, and no error of the network leaves this module as an exception.

What `requests`, `urllib3` and `http.client` do behind one's back, and what is done about it here:

- `files=` builds the body in memory: `_Form` streams it from a few reused blocks instead, while a helper
  thread reads and hashes some blocks ahead (on a second core the digest then costs next to no time).
- A service may refuse early and hang up while the body is still going out: between any two writes the
  connection is looked at, and an answer that is there ends the sending and is read.
- The connect timeout stays on the socket while the body is sent: `_Connection.request` replaces it.
- Timeouts count from byte to byte, so a server that drips holds a worker for ever: `_Deadline` bounds the
  whole answer.
- `http.client` takes headers that were cut off for whole ones: `_Reply` tells.
- `~/.netrc` overrides Authorization, redirects turn POST into GET, cookies stick: requests go straight to
  the adapter, where none of that exists. Proxies and CA bundles of the environment still count.
- A CA bundle is loaded for each connection (30 ms): here there is one TLS context for each `Client`.
"""

import contextlib
import hashlib
import http.client
import io
import itertools
import math
import mmap
import os
import re
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import requests
import urllib3.connection
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH, prepend_scheme_if_needed, select_proxy

from sfwatch.settings import Api
from sfwatch.verdict import Answer, Attempt, Trouble

BLOCK = 512 * 1024
"""Bytes read, hashed and handed to the connection at once; files up to this size go out in one piece."""

ANSWER_LIMIT = 64 * 1024
"""Bytes of an upload's answer that are read."""

LISTING_LIMIT = 8 * 1024 * 1024
"""Bytes of a listing that are read."""

IDLE_S = 15.0
"""Kept connections rest no longer: servers close theirs after a minute or so, and a request that crosses
with that leaves everybody guessing whether it was served."""

SLICE_S = 0.25
"""How soon `stop` is noticed while nothing moves."""

_AHEAD = 3  # blocks read and hashed ahead of the one that goes out: 1 is a tenth slower, 7 no quicker
_HEADER_LIMIT = 1000
_NO_PROXY = "the proxy settings are of no use: what http_proxy or https_proxy says is no address of a proxy"
_TELLING = 8  # shorter "keys", as tests use them, occur in any text
_TRACE_ID = "x-siliconcloud-trace-id"
_UNFIT = re.compile(r'[\x00-\x1f\x7f-\x9f"\\\ud800-\udfff]')


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


class Client:
    """The way to one target; its connections are kept alive and shared by all threads that send.

    The key is an argument of each request and stands nowhere but in that request's Authorization header.
    Proxies, and the CA bundle if the settings name none, come from the environment as it is now.
    """

    def __init__(self, api: Api, *, connections: int, user_agent: str) -> None:
        self._api = api
        self._connections = connections
        url = api.base_url.rstrip("/") + "/files"
        self._blank_post = requests.Request("POST", url, headers={"User-Agent": user_agent}).prepare()
        self._blank_get = requests.Request("GET", url, headers={"User-Agent": user_agent}).prepare()
        self._environment = _environment(url)
        self._adapter: _Adapter | None = None
        self.host = _host(url)
        self.resolved = False

    def send(
        self,
        fd: int,
        size: int,
        *,
        remote_name: str,
        purpose: str,
        key: str,
        progress: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        max_rate: Pace | None = None,
        approve: Callable[[str], bool] | None = None,
    ) -> Attempt:
        """Send the first `size` bytes behind `fd` as one file.

        `progress` gets the file's bytes that are out so far. Once `stop` says so, the request is broken off.
        `approve` gets the digest of the bytes before the body is closed; if it says no, the request is broken
        off too, and the service can't have taken the file.

        Raises ValueError for a name, purpose or key that does not fit into a header.
        """
        began = time.monotonic()
        reins = _Reins(progress or _ignore, stop or _never, max_rate, approve or _always)
        with _Form(fd, size, purpose=purpose, remote_name=remote_name, reins=reins) as form:
            request = _with_form(_with_key(self._blank_post, key), form)
            answer, failure = self._exchange(request, ANSWER_LIMIT)
        answer = _without(key, answer)
        return Attempt(
            sent_all=form.sent_all,
            sent=form.sent,
            sha256=form.sha256 if form.sent_all else None,
            answer=answer,
            trouble=failure.trouble if failure else None,
            detail=_said(key, failure),
            duration_s=time.monotonic() - began,
        )

    def list_files(self, *, purpose: str, limit: int, key: str) -> Attempt:
        """Ask what the service has: `limit` entries at most."""
        began = time.monotonic()
        request = _with_key(self._blank_get, key)
        request.prepare_url(request.url, {"purpose": purpose, "limit": str(limit)})
        answer, failure = self._exchange(request, LISTING_LIMIT)
        answer = _without(key, answer)
        return Attempt(
            sent_all=True,
            sent=0,
            sha256=None,
            answer=answer,
            trouble=failure.trouble if failure else None,
            detail=_said(key, failure),
            duration_s=time.monotonic() - began,
        )

    def close(self) -> None:
        """Close the connections at rest; those at work close when they are done."""
        adapter, self._adapter = self._adapter, None
        if adapter:
            adapter.close()

    def _exchange(
        self, request: requests.PreparedRequest, limit: int
    ) -> tuple[Answer | None, "_Failure | None"]:
        try:
            response = self._send(request)
        except _Failure as failure:
            self._learn(failure)
            return failure.answer, failure
        self.resolved = True
        with contextlib.closing(response):
            return _read(response, limit, self.host)

    def _send(self, request: requests.PreparedRequest) -> requests.Response:
        timeouts = (self._api.connect_timeout_s, self._api.read_timeout_s)
        proxies = self._environment["proxies"]
        _require_sound(proxies, request.url or "")
        try:
            return self._pool().send(request, stream=True, timeout=timeouts, proxies=proxies)
        except requests.exceptions.InvalidURL as error:
            raise _Failure(Trouble.PROXY, _NO_PROXY) from error
        except requests.exceptions.InvalidSchema as error:
            raise _Failure(Trouble.PROXY, f"the proxy settings are of no use: {_plain(error)}") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _Failure(Trouble.CUT, f"the answer of {self.host} is no HTTP: {_plain(error)}") from error

    def _pool(self) -> "_Adapter":
        # Two threads may both make one: the one that is forgotten closes with its last connection.
        if self._adapter is None:
            terms = _Terms(self.host, self._api.read_timeout_s)
            self._adapter = _Adapter(self._connections, terms, self._tls_context())
        return self._adapter

    def _tls_context(self) -> ssl.SSLContext | None:
        if not self._api.base_url.startswith("https:"):
            return None
        bundle = self._api.ca_bundle or _bundle_of(self._environment)
        try:
            return _trusting(bundle)
        except OSError as error:
            detail = f"the CA bundle {_printable(str(bundle))} cannot be read: {_plain(error)}"
            raise _Failure(Trouble.CERTIFICATE, detail) from error

    def _learn(self, failure: "_Failure") -> None:
        if failure.trouble is Trouble.CERTIFICATE:
            self.close()  # the CA bundle is read anew for the next attempt: somebody may have mended it
        elif failure.trouble not in (Trouble.RESOLVE, Trouble.PROXY, Trouble.ABORTED):
            self.resolved = True


class _Failure(Exception):  # noqa: N818 - it ends an exchange, and is no error of ours
    """How an exchange ended, if not with a whole answer; goes no further than `Client`."""

    def __init__(self, trouble: Trouble, detail: str, answer: Answer | None = None) -> None:
        super().__init__(detail)
        self.trouble = trouble
        self.detail = detail
        self.answer = answer


# --- what goes out ---------------------------------------------------------------------------------------


def _ignore(_sent: int) -> None:
    pass


def _never() -> bool:
    return False


def _always(_sha256: str) -> bool:
    return True


class _Reins:
    """What the caller wants to know and to say while a file goes out."""

    def __init__(
        self,
        progress: Callable[[int], None],
        stop: Callable[[], bool],
        pace: Pace | None,
        approve: Callable[[str], bool],
    ) -> None:
        self.progress = progress
        self.approve = approve
        self._stop = stop
        self._pace = pace

    def check(self) -> None:
        if self._stop():
            raise _Failure(Trouble.ABORTED, "the upload was broken off on request")

    def wait_for(self, n: int) -> None:
        """Wait until `n` bytes may go out."""
        self.check()
        left = self._pace.reserve(n) if self._pace else 0.0
        while left > 0:
            time.sleep(min(left, SLICE_S))
            left -= SLICE_S
            self.check()


class _Form:
    """The multipart body, made while it is sent: `purpose` first, as in all of the vendor's examples.

    The file's last byte is always followed by the closing delimiter, so that a body that was broken off
    can't be taken for a whole one.
    """

    def __init__(self, fd: int, size: int, *, purpose: str, remote_name: str, reins: _Reins) -> None:
        boundary = os.urandom(16).hex()
        self._fd = fd
        self._size = size
        self._head = _form_head(boundary, purpose, remote_name)
        self._tail = f"\r\n--{boundary}--\r\n".encode("ascii")
        self._digest = hashlib.sha256()
        self._pieces = self._produce()
        self.reins = reins
        self.content_type = f"multipart/form-data; boundary={boundary}"
        self.sent = 0
        self.sent_all = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pieces.close()

    def __len__(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    def __iter__(self) -> Iterator[bytes | memoryview]:
        return self._pieces

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def _produce(self) -> Generator[bytes | memoryview]:
        # The connection asks for the next piece when the one before is out.
        yield from self._at_once() if self._size <= BLOCK else self._in_blocks()
        self.sent_all = True

    def _at_once(self) -> Iterator[bytes]:
        data = bytearray(self._size)
        self._fill(memoryview(data), 0)
        self._approve()
        self.reins.wait_for(self._size)
        yield b"".join((self._head, data, self._tail))
        self._went_out(self._size)

    def _in_blocks(self) -> Iterator[bytes | memoryview]:
        yield self._head
        with ThreadPoolExecutor(1, thread_name_prefix="sfwatch-read-ahead") as helper:
            for block in self._blocks(helper):
                self.reins.wait_for(len(block))
                yield block
                self._went_out(len(block))
        self._approve()
        self.reins.check()
        yield self._tail

    def _blocks(self, helper: ThreadPoolExecutor) -> Iterator[memoryview]:
        # Anonymous mappings: reading into a bytearray of this size costs half a second a gigabyte on some
        # processors, since it does not begin on a page.
        buffers = itertools.cycle([memoryview(mmap.mmap(-1, BLOCK)) for _ in range(_AHEAD + 1)])
        places = zip(buffers, range(0, self._size, BLOCK), strict=False)
        fills = (helper.submit(self._fill, buffer, at) for buffer, at in places)
        ahead = deque(itertools.islice(fills, _AHEAD))
        while ahead:
            block = ahead.popleft().result()
            ahead.extend(itertools.islice(fills, 1))
            yield block

    def _fill(self, block: memoryview, at: int) -> memoryview:
        block = block[: self._size - at]
        self._read(block, at)
        self._digest.update(block)
        return block

    def _read(self, block: memoryview, at: int) -> None:
        filled = 0
        while filled < len(block):
            n = self._read_some(block[filled:], at + filled)
            if n == 0:
                raise _Failure(Trouble.ABORTED, "the file became shorter while it was sent")
            filled += n

    def _read_some(self, block: memoryview, at: int) -> int:
        try:
            return os.preadv(self._fd, [block], at)
        except OSError as error:
            raise _Failure(Trouble.ABORTED, f"the file cannot be read: {_plain(error)}") from error

    def _approve(self) -> None:
        if not self.reins.approve(self.sha256):
            raise _Failure(Trouble.ABORTED, "the file is not what it was when it was checked")

    def _went_out(self, n: int) -> None:
        self.sent += n
        self.reins.progress(self.sent)


def _form_head(boundary: str, purpose: str, remote_name: str) -> bytes:
    # Non-ASCII names stand there as plain UTF-8, as browsers and curl send them: RFC 2231's filename* is
    # forbidden in forms (RFC 7578, 4.2), and parsers differ over every way of quoting.
    return (
        f"--{boundary}\r\n"
        'Content-Disposition: form-data; name="purpose"\r\n\r\n'
        f"{_header_text(purpose)}\r\n"
        f"--{boundary}\r\n"
        f'Content-Disposition: form-data; name="file"; filename="{_header_text(remote_name)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()


def _header_text(text: str) -> str:
    if unfit := _UNFIT.search(text):
        raise ValueError(f"{unfit[0]!r} does not fit into a form's header, and stands in {text!r}")
    return text


def _with_key(blank: requests.PreparedRequest, key: str) -> requests.PreparedRequest:
    if not (key.isascii() and key.isprintable() and key == key.strip() != ""):
        raise ValueError("the key has characters that cannot stand in a header")  # never quote it
    request = blank.copy()
    request.headers["Authorization"] = f"Bearer {key}"
    return request


def _with_form(request: requests.PreparedRequest, form: _Form) -> requests.PreparedRequest:
    request.headers["Content-Type"] = form.content_type
    request.headers["Content-Length"] = str(len(form))
    request.body = form  # type: ignore[assignment]  # requests streams anything that can be iterated over
    return request


# --- what comes back -------------------------------------------------------------------------------------


def _read(response: requests.Response, limit: int, host: str) -> tuple[Answer, _Failure | None]:
    body = bytearray()
    failure = _read_into(body, response.raw, limit, host)
    return _answer(response.status_code, response.headers, bytes(body[:limit])), failure


def _read_into(body: bytearray, raw: Any, limit: int, host: str) -> _Failure | None:
    try:
        while len(body) <= limit:
            piece = raw.read1(BLOCK, decode_content=False)
            if not piece:
                return None
            body += piece
    except urllib3.exceptions.ReadTimeoutError:
        return _Failure(Trouble.STALLED, f"{host} did not come to the end of its answer in time")
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        return _Failure(Trouble.CUT, f"the answer of {host} broke off: {_plain(error)}")
    return _Failure(Trouble.CUT, f"the answer of {host} is longer than {limit} bytes")


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    def header(name: str) -> str | None:
        value = headers.get(name)
        return None if value is None else value[:_HEADER_LIMIT]

    return Answer(
        status=status,
        body=body,
        retry_after=header("Retry-After"),
        trace_id=header(_TRACE_ID),
        date=header("Date"),
        location=header("Location"),
        content_type=header("Content-Type"),
    )


class _Deadline(io.RawIOBase):
    """The bytes of an answer, first those that were read already, and none after the deadline."""

    def __init__(self, sock: socket.socket, early: bytes, within_s: float) -> None:
        self._sock = sock
        self._wire: io.RawIOBase = sock.makefile("rb", buffering=0)
        self._early = early
        self._until = time.monotonic() + within_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._early:
            n = min(len(buffer), len(self._early))
            buffer[:n], self._early = self._early[:n], self._early[n:]
            return n
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer took too long")
        self._sock.settimeout(left)
        return self._wire.readinto(buffer)

    def close(self) -> None:
        self._wire.close()
        super().close()


class _Lines(io.BufferedReader):
    """Remembers the last line: headers end with an empty one, unless they were cut off."""

    last = b""

    def readline(self, size: int | None = -1) -> bytes:
        self.last = super().readline(size)
        return self.last


class _Reply(http.client.HTTPResponse):
    """An answer that is bounded in time, passes over all 1xx, and knows whether its headers are whole."""

    def __init__(self, sock: socket.socket, *args: Any, wire: _Deadline, last: bool, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()  # its own way of reading from the socket
        self.fp = self._lines = _Lines(wire)
        self._last = last

    def begin(self) -> None:
        super().begin()
        while http.HTTPStatus.SWITCHING_PROTOCOLS < self.status < http.HTTPStatus.OK and self.has_whole_head:
            self.headers = self.msg = None  # type: ignore[assignment]  # begin() is done once there are headers
            super().begin()  # http.client itself passes over 100 only
        if self._last:
            self.will_close = True

    @property
    def has_whole_head(self) -> bool:
        return self._lines.last in (b"\r\n", b"\n")


def _is_final(data: bytes) -> bool:
    """Whether these first bytes of an answer belong to the answer itself, not to a 1xx before it."""
    while data[9:10] == b"1":
        _, _, data = data.partition(b"\r\n\r\n")
    return len(data) > len(b"HTTP/1.1 ")


# --- the connection --------------------------------------------------------------------------------------


class _Terms:
    """What a connection has to know of its target."""

    def __init__(self, host: str, read_timeout_s: float) -> None:
        self.host = host
        self.read_timeout_s = read_timeout_s


class _Answered(Exception):  # noqa: N818 - no error: the sending is over before its end
    pass


_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class _Connection(urllib3.connection.HTTPConnection):
    """Tells at each step whose doing a failure is, and looks for an early answer while it sends."""

    def __init__(self, *args: Any, terms: _Terms, **options: Any) -> None:
        super().__init__(*args, **options)
        self._terms = terms
        self._form: _Form | None = None
        self._early = b""
        self._broken_off = False
        self._used_at = -math.inf

    @property
    def is_connected(self) -> bool:
        return super().is_connected and time.monotonic() - self._used_at < IDLE_S

    def connect(self) -> None:
        try:
            super().connect()
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise self._unconnected(error.__cause__ or error) from error

    def _unconnected(self, why: BaseException) -> _Failure:
        host = self._terms.host
        if isinstance(why, ssl.SSLCertVerificationError):
            detail = f"the certificate of {host} does not verify: {_printable(why.verify_message)}"
            return _Failure(Trouble.CERTIFICATE, detail)
        if self.proxy and not isinstance(why, ssl.SSLError):
            detail = f"the proxy {self.proxy.host} gives no connection to {host}: {_plain(why)}"
            return _Failure(Trouble.PROXY, detail)
        if isinstance(why, socket.gaierror):
            return _Failure(Trouble.RESOLVE, f"the name of {host} does not resolve: {_plain(why)}")
        return _Failure(Trouble.CONNECT, f"no connection to {host}: {_plain(why)}")

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        self._early, self._broken_off = b"", False
        if self.sock is None:
            self.connect()
        self._form = body if isinstance(body, _Form) else None
        # Else the connect timeout would hold for the body. Zero: `_push` waits itself.
        self.timeout = 0.0 if self._pushes() else self._terms.read_timeout_s
        try:
            super().request(method, url, body, headers, **options)
        except (_Answered, *_HUNG_UP):
            self._broken_off = True  # its answer, if there is one, comes next
        except TimeoutError as error:
            seconds = f"{self._terms.read_timeout_s:g} s"
            raise _Failure(Trouble.STALLED, f"{self._terms.host} took no more bytes for {seconds}") from error
        except OSError as error:
            raise self._reset(error) from error
        finally:
            self._form = None

    def _pushes(self) -> bool:
        # TLS through a TLS proxy has no real socket: it gets plain writes.
        return self._form is not None and isinstance(self.sock, socket.socket)

    def send(self, data: Any) -> None:
        if self._pushes():
            self._push(memoryview(data))
        else:
            super().send(data)

    def _push(self, data: memoryview) -> None:
        wire = select.poll()
        wire.register(self.sock, select.POLLIN | select.POLLOUT)
        while data:
            if self._wait(wire) != select.POLLOUT:
                self._look_for_answer()
            data = data[self._give(data[:BLOCK]) :]

    def _wait(self, wire: select.poll) -> int:
        until = time.monotonic() + self._terms.read_timeout_s
        while (left := until - time.monotonic()) > 0:
            self._form.reins.check()  # type: ignore[union-attr]  # there is one while it is sent
            if events := wire.poll(min(left, SLICE_S) * 1000):
                return events[0][1]
        raise TimeoutError

    def _give(self, data: memoryview) -> int:
        try:
            return self.sock.send(data)
        except _NOT_NOW:
            return 0

    def _look_for_answer(self) -> None:
        # Readable need not mean an answer: TLS 1.3 sends its session tickets at this time.
        try:
            data = self.sock.recv(ANSWER_LIMIT)
        except _NOT_NOW:
            return
        self._early += data
        if not data or _is_final(self._early) or len(self._early) > ANSWER_LIMIT:
            raise _Answered

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 itself does
        self._used_at = time.monotonic()
        self.response_class = self._new_reply  # type: ignore[assignment]  # it makes one, all the same
        host, within_s = self._terms.host, self._terms.read_timeout_s
        try:
            return self._whole(super().getresponse())
        except TimeoutError as error:
            raise _Failure(Trouble.STALLED, f"{host} gave no answer within {within_s:g} s") from error
        except OSError as error:
            raise self._reset(error) from error
        except (http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
            self._reply.close()
            raise _Failure(Trouble.CUT, f"the answer of {host} is no HTTP: {_plain(error)}") from error
        finally:
            self.response_class = http.client.HTTPResponse  # a proxy's answer to CONNECT is read by it too

    def _new_reply(self, sock: socket.socket, *args: Any, **options: Any) -> _Reply:
        wire = _Deadline(sock, self._early, self._terms.read_timeout_s)
        self._reply = _Reply(sock, *args, wire=wire, last=self._broken_off, **options)
        return self._reply

    def _whole(self, response: urllib3.HTTPResponse) -> urllib3.HTTPResponse:
        if self._reply.has_whole_head:
            return response
        detail = f"the answer of {self._terms.host} broke off within its headers"
        response.close()
        raise _Failure(Trouble.CUT, detail, _answer(response.status, response.headers, b""))

    def _reset(self, error: OSError) -> _Failure:
        detail = f"{self._terms.host} broke the connection off without an answer: {_plain(error)}"
        return _Failure(Trouble.RESET, detail)


class _TlsConnection(_Connection, urllib3.connection.HTTPSConnection):
    """The same over TLS."""


class _Adapter(HTTPAdapter):
    """Pools of our connections, with one TLS context for all of them."""

    def __init__(self, connections: int, terms: _Terms, context: ssl.SSLContext | None) -> None:
        self._classes: dict[str | None, Any] = {
            "http": partial(_Connection, terms=terms),
            "https": partial(_TlsConnection, terms=terms),
        }
        self._standard = (urllib3.connection.HTTPConnection, urllib3.connection.HTTPSConnection)
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=connections)

    def cert_verify(self, *_: Any) -> None:
        """Do nothing: the context verifies."""

    def build_connection_pool_key_attributes(self, *args: Any, **options: Any) -> Any:
        host, _ = super().build_connection_pool_key_attributes(*args, **options)
        return host, {"ssl_context": self._context} if self._context else {}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("https:"):
            options["proxy_ssl_context"] = self._context
        return super().proxy_manager_for(proxy, **options)

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        if pool.ConnectionCls in self._standard:
            pool.ConnectionCls = self._classes[pool.scheme]
        elif pool.ConnectionCls is not self._classes[pool.scheme]:
            raise requests.exceptions.InvalidSchema("SOCKS is not supported, only HTTP proxies are")
        return pool


# --- the environment, and words --------------------------------------------------------------------------


def _environment(url: str) -> dict[str, Any]:
    with requests.Session() as session:
        return dict(session.merge_environment_settings(url, {}, None, None, None))


def _require_sound(proxies: Mapping[str, str], url: str) -> None:
    """What `requests` makes of some misspelt addresses is a TypeError; what it says of others quotes them."""
    address = select_proxy(url, proxies)
    try:
        if address:
            prepend_scheme_if_needed(address, "http")  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:  # urllib3's LocationParseError is one
        raise _Failure(Trouble.PROXY, _NO_PROXY) from error


def _bundle_of(environment: Mapping[str, Any]) -> str | None:
    verify = environment["verify"]
    return verify if isinstance(verify, str) else None


def _trusting(bundle: os.PathLike[str] | str | None) -> ssl.SSLContext:
    if bundle is None:
        return ssl.create_default_context(cafile=None if _has_system_store() else DEFAULT_CA_BUNDLE_PATH)
    if Path(bundle).is_dir():
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def _has_system_store() -> bool:
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile or paths.capath)


def _host(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


def _said(key: str, failure: _Failure | None) -> str:
    """What is told of a failure; it may quote what the service said."""
    if failure is None or len(key) < _TELLING:
        return failure.detail if failure else ""
    return _writings_of(key).sub("***", failure.detail)


def _without(key: str, answer: Answer | None) -> Answer | None:
    """The answer of a service that repeats the key in it, as some gateways do, without the key."""
    if answer is None or len(key) < _TELLING:
        return answer
    hide = partial(_writings_of(key).sub, "***")
    texts = {name: getattr(answer, name) for name in ("trace_id", "location", "retry_after", "content_type")}
    told: dict[str, Any] = {name: text and hide(text) for name, text in texts.items()}
    return replace(answer, body=hide(answer.body.decode("latin-1")).encode("latin-1"), **told)


def _writings_of(key: str) -> re.Pattern[str]:
    """The key as it is, and as encoders of JSON and of addresses may write any of its characters."""
    return re.compile("".join(rf"(?:\\?{re.escape(c)}|(?:\\u00|%)(?i:{ord(c):02x}))" for c in key))


def _plain(error: BaseException) -> str:
    """What went wrong, in few printable words; a proxy's address may hold a password."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _printable(re.sub(r"//[^/@\s]*@", "//", text)[:200])


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)

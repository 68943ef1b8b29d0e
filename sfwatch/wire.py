"""At each step of an exchange it is told whose doing a failure is, and no peer holds a worker for ever.

What `urllib3` and `http.client` do not do by themselves, and where it is done here:

- A service may refuse early and hang up while the body is still going out: `Connection._push` looks for an
  answer between any two writes; one that is there ends the sending and is read.
- The connect timeout would stay on the socket while the body is sent: `Connection.request` replaces it.
- Timeouts count from byte to byte, so a server that drips never runs into one: `_Deadline` bounds all of an
  answer.
- Of interim answers (1xx) `http.client` passes over 100 only: `_Reply.begin` passes over all.
- Headers that were cut off pass for whole ones: `_Reply.has_whole_head` tells.
- A kept connection may be closed by the service just when it is used again: it is used for `IDLE_S` only.
- A CA bundle is loaded for each connection (30 ms): all connections of an `Adapter` share one TLS context.
"""

import http
import http.client
import io
import math
import re
import select
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import requests
import urllib3.connection
import urllib3.exceptions
from requests.adapters import HTTPAdapter

from sfwatch.form import BLOCK, SLICE_S, Form
from sfwatch.verdict import Answer, Trouble, printable

EARLY_LIMIT = 64 * 1024
"""Bytes that are read to find out whether they begin an answer."""

IDLE_S = 15.0
"""Kept connections rest no longer: servers close theirs after a minute or so, and a request that crosses
with that leaves everybody guessing whether it was served."""

_HEADER_LIMIT = 1000
_SAID_LIMIT = 300
_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Failure(Exception):  # noqa: N818 - it ends an exchange, and is no error of ours
    """How an exchange ended, if not with a whole answer; `answer` is the part of one that came."""

    def __init__(self, trouble: Trouble, detail: str, answer: Answer | None = None) -> None:
        super().__init__(detail)
        self.trouble = trouble
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Terms:
    """What a connection has to know of its target."""

    host: str
    read_timeout_s: float


# --- many connections ------------------------------------------------------------------------------------


class Adapter(HTTPAdapter):
    """Makes and keeps `Connection`s, directly or through an HTTP proxy. Its `send` raises `Failure`."""

    def __init__(self, connections: int, terms: Terms, context: ssl.SSLContext | None) -> None:
        self._context = context
        self._classes: dict[str | None, Any] = {
            "http": partial(Connection, terms=terms),
            "https": partial(_TlsConnection, terms=terms),
        }
        super().__init__(pool_connections=1, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):  # it would bring connections of its own
            raise requests.exceptions.InvalidSchema("no HTTP proxy")
        context = self._context
        return super().proxy_manager_for(proxy, ssl_context=context, proxy_ssl_context=context, **options)

    def cert_verify(self, *_: Any) -> None:
        """Do nothing: the context verifies."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        try:
            pool: Any = super().get_connection_with_tls_context(*args, **options)
        except (TypeError, ValueError) as error:  # whose texts may quote the proxy's password
            detail = "the proxy settings are of no use: http_proxy or https_proxy names no HTTP proxy"
            raise Failure(Trouble.PROXY, detail) from error
        pool.ConnectionCls = self._classes[pool.scheme]
        return pool


# --- one connection --------------------------------------------------------------------------------------


class _Answered(Exception):  # noqa: N818 - no error: the sending is over before its end
    pass


class Connection(urllib3.connection.HTTPConnection):
    """Sends a `Form` and looks for an early answer meanwhile. Each of its steps raises `Failure`."""

    def __init__(self, *args: Any, terms: Terms, **options: Any) -> None:
        super().__init__(*args, **options)
        self._terms = terms
        self._form: Form | None = None  # while it is sent
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

    def _unconnected(self, why: BaseException) -> Failure:
        host = self._terms.host
        if isinstance(why, ssl.SSLCertVerificationError):
            said = printable(why.verify_message, _SAID_LIMIT)
            return Failure(Trouble.CERTIFICATE, f"the certificate of {host} does not verify: {said}")
        if self.proxy and not isinstance(why, ssl.SSLError):
            detail = f"the proxy {self.proxy.host} gives no connection to {host}: {plain(why)}"
            return Failure(Trouble.PROXY, detail)
        if isinstance(why, socket.gaierror):
            return Failure(Trouble.RESOLVE, f"the name of {host} does not resolve: {plain(why)}")
        return Failure(Trouble.CONNECT, f"no connection to {host}: {plain(why)}")

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any) -> None:
        self._early, self._broken_off = b"", False
        if self.sock is None:
            self.connect()
        self._form = body if isinstance(body, Form) else None
        # Else the connect timeout would hold for the body. Zero: `_push` waits itself.
        self.timeout = 0.0 if self._pushes() else self._terms.read_timeout_s
        try:
            super().request(method, url, body, headers, **options)
        except (_Answered, *_HUNG_UP):
            self._broken_off = True  # its answer, if there is one, comes next
        except TimeoutError as error:
            detail = f"{self._terms.host} took no more bytes for {self._terms.read_timeout_s:g} s"
            raise Failure(Trouble.STALLED, detail) from error
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
            if self._form is not None:
                self._form.reins.stir()

    def _push(self, data: memoryview) -> None:
        poll = select.poll()
        poll.register(self.sock, select.POLLIN | select.POLLOUT)
        while data:
            if self._wait(poll) != select.POLLOUT:
                self._look_for_answer()
            given = self._give(data[:BLOCK])
            if given:
                self._form.reins.stir()  # type: ignore[union-attr]  # there is one while it is sent
            data = data[given:]

    def _wait(self, poll: select.poll) -> int:
        until = time.monotonic() + self._terms.read_timeout_s
        while (left := until - time.monotonic()) > 0:
            self._form.reins.check()  # type: ignore[union-attr]  # there is one while it is sent
            if events := poll.poll(min(left, SLICE_S) * 1000):
                return events[0][1]
        raise TimeoutError

    def _give(self, data: memoryview) -> int:
        try:
            return self.sock.send(data)
        except _WOULD_BLOCK:
            return 0

    def _look_for_answer(self) -> None:
        # Readable need not mean an answer: TLS 1.3 sends its session tickets at this time.
        try:
            data = self.sock.recv(EARLY_LIMIT)
        except _WOULD_BLOCK:
            return
        self._early += data
        if not data or begins_answer(self._early) or len(self._early) > EARLY_LIMIT:
            raise _Answered

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]  # as urllib3 itself does
        self._used_at = time.monotonic()
        self.response_class = self._new_reply  # type: ignore[assignment]  # it makes one, all the same
        host, within_s = self._terms.host, self._terms.read_timeout_s
        try:
            return self._whole(super().getresponse())
        except TimeoutError as error:
            raise Failure(Trouble.STALLED, f"{host} gave no answer within {within_s:g} s") from error
        except OSError as error:
            raise self._reset(error) from error
        except (http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
            raise Failure(Trouble.CUT, f"the answer of {host} is no HTTP: {plain(error)}") from error
        finally:
            self.response_class = http.client.HTTPResponse  # a proxy's answer to CONNECT is read by it too

    def _new_reply(self, sock: socket.socket, *args: Any, **options: Any) -> "_Reply":
        wire = _Deadline(sock, self._early, self._terms.read_timeout_s)
        self._reply = _Reply(sock, *args, wire=wire, last=self._broken_off, **options)
        return self._reply

    def _whole(self, response: urllib3.HTTPResponse) -> urllib3.HTTPResponse:
        if self._reply.has_whole_head:
            return response
        detail = f"the answer of {self._terms.host} broke off within its headers"
        raise Failure(Trouble.CUT, detail, _answer(response.status, response.headers, b""))

    def _reset(self, error: OSError) -> Failure:
        detail = f"{self._terms.host} broke the connection off without an answer: {plain(error)}"
        return Failure(Trouble.RESET, detail)


class _TlsConnection(Connection, urllib3.connection.HTTPSConnection):
    """The same over TLS."""


def begins_answer(data: bytes) -> bool:
    """Whether these first bytes reach into the answer itself, past any 1xx before it."""
    while data[9:10] == b"1":
        _, _, data = data.partition(b"\r\n\r\n")
    return len(data) > len(b"HTTP/1.1 ")


# --- what comes back -------------------------------------------------------------------------------------


class _Reply(http.client.HTTPResponse):
    """An answer that is bounded in time, passes over all 1xx, and knows whether its headers are whole."""

    def __init__(self, sock: socket.socket, *args: Any, wire: "_Deadline", last: bool, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()  # its own way of reading from the socket
        self.fp = self._lines = _Lines(wire)
        self._last = last

    def begin(self) -> None:
        super().begin()
        while http.HTTPStatus.SWITCHING_PROTOCOLS < self.status < http.HTTPStatus.OK and self.has_whole_head:
            self.headers = self.msg = None  # type: ignore[assignment]  # begin() is done once there are headers
            super().begin()
        if self._last:
            self.will_close = True

    @property
    def has_whole_head(self) -> bool:
        return self._lines.last in (b"\r\n", b"\n")


class _Lines(io.BufferedReader):
    """Remembers the last line: headers end with an empty one, unless they were cut off."""

    last = b""

    def readline(self, size: int | None = -1) -> bytes:
        self.last = super().readline(size)
        return self.last


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


def read_answer(response: requests.Response, limit: int, host: str) -> Answer:
    """Read the answer to its end. Raises `Failure`, with what came, if that is not within `limit` bytes."""
    body = bytearray()
    try:
        _read_into(body, response.raw, limit, host)
    except Failure as failure:
        failure.answer = _answer(response.status_code, response.headers, bytes(body[:limit]))
        raise
    return _answer(response.status_code, response.headers, bytes(body))


def _read_into(body: bytearray, raw: Any, limit: int, host: str) -> None:
    try:
        while piece := raw.read1(BLOCK, decode_content=False):
            body += piece
            if len(body) > limit:
                raise Failure(Trouble.CUT, f"the answer of {host} is longer than {limit} bytes")
    except urllib3.exceptions.ReadTimeoutError as error:
        raise Failure(Trouble.STALLED, f"{host} did not come to the end of its answer in time") from error
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
        raise Failure(Trouble.CUT, f"the answer of {host} broke off: {plain(error)}") from error


def _answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    def header(name: str) -> str | None:
        value = headers.get(name)
        return None if value is None else value[:_HEADER_LIMIT]

    return Answer(
        status=status,
        body=body,
        retry_after=header("Retry-After"),
        trace_id=header("x-siliconcloud-trace-id"),
        date=header("Date"),
        location=header("Location"),
        content_type=header("Content-Type"),
    )


def plain(error: BaseException) -> str:
    """What went wrong, in few printable words; a proxy's address may hold a password."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(re.sub(r"//[^/@\s]*@", "//", text).split()), _SAID_LIMIT)

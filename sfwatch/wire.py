"""At each step of an exchange it is told whose doing a failure is, and no peer holds a worker without end.

What `urllib3` and `http.client` do not do by themselves, and where it is done here:

- A service may refuse early and hang up while the body is still going out: `Connection._push` looks for an
  answer between any two writes; one that is there ends the sending and is read.
- Timeouts count from byte to byte, so a server that drips never runs into one: once connected, a socket does
  not block, and `Connection._wait` bounds all of an answer.
- To write a request and to read its answer takes them longer than all the rest of a small upload:
  `Connection` writes its own head, and `Incoming` reads the answer, strictly and past all interim ones (1xx).
- A kept connection may be closed by the service just when it is used again: it is used for `IDLE_S` only.
- A CA bundle is loaded for each connection (30 ms): all connections of an `Adapter` share one TLS context.
"""

import contextlib
import http.client
import math
import re
import select
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import requests
import urllib3.connection
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool

from sfwatch.form import BLOCK, SLICE_S, Form, Reins
from sfwatch.verdict import Answer, Trouble, printable

ANSWER_LIMIT = 64 * 1024
"""Bytes of an upload's answer that are read."""

LISTING_LIMIT = 8 * 1024 * 1024
"""Bytes of a listing that are read."""

IDLE_S = 15.0
"""Kept connections rest no longer: servers close theirs after a minute or so, and a request that crosses
with that leaves everybody guessing whether it was served."""

_FIELDS_LIMIT = 100
_HEADER_LIMIT = 1000
_SAID_LIMIT = 300
# No line is longer; and it is more than a TLS record, of which nothing must be left unseen by polls.
_PIECE = 64 * 1024
_HUNG_UP = (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
_WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

_TEXT = r"[^\x00-\x08\x0a-\x1f\x7f]*"
_STATUS_LINE = re.compile(rf"HTTP/1\.([0-9]) ([1-9][0-9][0-9])(?: {_TEXT})?")
_FIELD = re.compile(rf"(?:([!#-'*+.^-z|~0-9A-Z-]+)[ \t]*:|[ \t])({_TEXT})")  # else it continues the one before
_LENGTH = re.compile(r"Content-Length: ([0-9]{1,15})(?:, *\1)*")
_CHUNK = re.compile(rf"([0-9A-Fa-f]{{1,15}})[ \t]*(?:;{_TEXT})?")


class Failure(Exception):  # noqa: N818 - it ends an exchange, and is no error of ours
    """How an exchange ended, if not with a whole answer; `answer` is the part of one that came."""

    def __init__(self, trouble: Trouble, detail: str, answer: Answer | None = None) -> None:
        super().__init__(detail)
        self.trouble = trouble
        self.answer = answer


# --- many connections ------------------------------------------------------------------------------------


class Adapter(HTTPAdapter):
    """Finds the way to a target, directly or through an HTTP proxy. All on it ends in `Failure`."""

    def __init__(self, connections: int, context: ssl.SSLContext | None) -> None:
        self._context = context
        super().__init__(pool_connections=1, pool_maxsize=connections)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **options)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        if proxy.lower().startswith("socks"):  # it would bring connections of its own
            raise requests.exceptions.InvalidSchema("no HTTP proxy")
        context = self._context
        return super().proxy_manager_for(proxy, ssl_context=context, proxy_ssl_context=context, **options)

    def way_to(self, url: str, proxies: dict[str, str], **terms: Any) -> tuple[HTTPConnectionPool, str]:
        """The pool of connections for `url`, whose `urlopen` returns a `Reply`, and what to ask it for."""
        request = requests.Request("POST", url).prepare()
        try:
            pool: Any = self.get_connection_with_tls_context(request, verify=True, proxies=proxies)
        except (TypeError, ValueError) as error:  # whose texts may quote the proxy's password
            detail = "the proxy settings are of no use: http_proxy or https_proxy names no HTTP proxy"
            raise Failure(Trouble.PROXY, detail) from error
        pool.ConnectionCls = partial(_CLASSES[pool.scheme], **terms)
        return pool, self.request_url(request, proxies)


# --- one connection --------------------------------------------------------------------------------------


class _Answered(Exception):  # noqa: N818 - no error: the sending is over before its end
    pass


class Connection(urllib3.connection.HTTPConnection):
    """Sends a `Form` and looks for an early answer meanwhile. Each of its steps raises `Failure`."""

    def __init__(self, *args: Any, told_as: str, read_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._told_as = told_as
        self._read_timeout_s = read_timeout_s
        self._limit = 0
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
        self.sock.settimeout(0.0)  # `_wait` does all waiting from here on

    def _unconnected(self, why: BaseException) -> Failure:
        host = self._told_as
        if isinstance(why, ssl.SSLCertVerificationError):
            said = printable(why.verify_message, _SAID_LIMIT)
            return Failure(Trouble.CERTIFICATE, f"the certificate of {host} does not verify: {said}")
        if self.proxy and not isinstance(why, ssl.SSLError):
            detail = f"the proxy {self.proxy.host} gives no connection to {host}: {plain(why)}"
            return Failure(Trouble.PROXY, detail)
        if isinstance(why, socket.gaierror):
            return Failure(Trouble.RESOLVE, f"the name of {host} does not resolve: {plain(why)}")
        return Failure(Trouble.CONNECT, f"no connection to {host}: {plain(why)}")

    def request(self, method: str, url: str, body: Any = None, headers: Any = None, **_options: Any) -> None:
        self._early, self._broken_off = b"", False
        self._limit = LISTING_LIMIT if body is None else ANSWER_LIMIT
        if self.sock is None:
            self.connect()
        try:
            self._send(_head(method, url, headers), body)
        except (_Answered, *_HUNG_UP):
            self._broken_off = True  # its answer, if there is one, comes next
        except TimeoutError as error:
            detail = f"{self._told_as} took no more bytes for {self._read_timeout_s:g} s"
            raise Failure(Trouble.STALLED, detail) from error
        except OSError as error:
            raise self._unanswered(error, None) from error

    def _send(self, head: bytes, form: Form | None) -> None:
        reins = Reins() if form is None else form.reins
        pieces = iter(() if form is None else form)
        first = memoryview(b"".join((head, next(pieces, b""))))
        given = self._give(first[:BLOCK], reins)  # without a look: nobody answers before the first byte
        self._push(first[given:], reins)
        for piece in pieces:
            self._push(memoryview(piece), reins)

    def _push(self, data: memoryview, reins: Reins) -> None:
        moved_at = time.monotonic()
        while data:
            reins.check()
            ready = self._wait(select.POLLIN | select.POLLOUT, moved_at + self._read_timeout_s, SLICE_S)
            if ready & ~select.POLLOUT:
                self._look_for_answer()
            if ready and (given := self._give(data[:BLOCK], reins)):
                moved_at = time.monotonic()
                data = data[given:]

    def _wait(self, events: int, until: float, at_most_s: float = math.inf) -> int:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        poll = select.poll()
        poll.register(self.sock, events)
        ready = poll.poll(min(left, at_most_s) * 1000)
        return ready[0][1] if ready else 0

    def _give(self, data: memoryview, reins: Reins) -> int:
        try:
            given = self._write(data)
        except _WOULD_BLOCK:
            return 0
        reins.stir()
        return given

    def _write(self, data: memoryview) -> int:
        if isinstance(self.sock, socket.socket):
            return self.sock.send(data)
        self.sock.settimeout(self._read_timeout_s)  # TLS through a TLS proxy can't write a part
        self.sock.sendall(data)
        self.sock.settimeout(0.0)
        return len(data)

    def _look_for_answer(self) -> None:
        # Readable need not mean an answer: TLS 1.3 sends its session tickets at this time.
        try:
            data = self.sock.recv(_PIECE)
        except _WOULD_BLOCK:
            return
        self._early += data
        if not data or begins_answer(self._early) or len(self._early) > _PIECE:
            raise _Answered

    def getresponse(self) -> "Reply":  # type: ignore[override]  # as urllib3 itself does
        self._used_at = time.monotonic()
        until = self._used_at + self._read_timeout_s
        incoming = Incoming(partial(self._receive, until), self._early, self._limit)
        try:
            if not self._early:
                self._wait(select.POLLIN, until)
            incoming.read()
        except (OSError, EOFError, Unread) as error:
            raise self._unanswered(error, incoming.answer) from error
        if self._broken_off or not incoming.leaves_open:
            self.close()
        return Reply(incoming)

    def _receive(self, until: float) -> bytes:
        while time.monotonic() < until:  # also for those who never cease to send
            try:
                return self.sock.recv(_PIECE)
            except _WOULD_BLOCK:
                self._wait(select.POLLIN, until)
        raise TimeoutError

    def _unanswered(self, why: Exception, came: Answer | None) -> Failure:
        host = self._told_as
        if isinstance(why, Unread):
            return Failure(Trouble.CUT, f"the answer of {host} {plain(why)}", came)
        if isinstance(why, TimeoutError) and came:
            return Failure(Trouble.STALLED, f"{host} did not come to the end of its answer in time", came)
        if isinstance(why, TimeoutError):
            detail = f"{host} gave no answer within {self._read_timeout_s:g} s"
            return Failure(Trouble.STALLED, detail)
        if came:
            return Failure(Trouble.CUT, f"the answer of {host} broke off: {plain(why)}", came)
        return Failure(Trouble.RESET, f"{host} broke the connection off without an answer: {plain(why)}")


class _TlsConnection(Connection, urllib3.connection.HTTPSConnection):
    """The same over TLS."""


_CLASSES: dict[str | None, type[Connection]] = {"http": Connection, "https": _TlsConnection}


def _head(method: str, target: str, fields: Mapping[str, str]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", *[f"{name}: {value}" for name, value in fields.items()]]
    text = "".join(lines)
    if not (text.isascii() and text.isprintable()):
        raise ValueError("the request has characters that cannot stand in its head")  # one line is the key's
    return "\r\n".join((*lines, "", "")).encode("ascii")


# --- what comes back -------------------------------------------------------------------------------------


class Reply(urllib3.HTTPResponse):
    """An answer for `urlopen`, which is to do nothing about it, and so is shown the status only."""

    def __init__(self, incoming: "Incoming") -> None:
        super().__init__(status=incoming.status, preload_content=False)
        self.answer = incoming.answer


class Unread(Exception):  # noqa: N818 - it ends an answer, and is no error of ours
    """What hinders the reading of an answer, told as what this does."""


class Incoming:
    """An answer as it comes, from who `receive`s its bytes (none at the end) after those that `came` before.

    `read` raises `Unread`, EOFError and what `receive` raises; `answer` is then the part that came.
    """

    def __init__(self, receive: Callable[[], bytes], came: bytes, limit: int) -> None:
        self._receive = receive
        self._came = bytearray(came)
        self._limit = limit
        self._body = bytearray()
        self.leaves_open = False  # whether the connection can be used again
        self.status = 0  # until there is a head
        self._headers: dict[str, str] = {}  # by their names in lower case

    def read(self) -> None:
        """Read the whole answer, past the interim ones before it."""
        while not self.status:
            self._read_head()
        coding = self._headers.get("transfer-encoding", "identity").lower()
        if self.status in (204, 304):
            pass  # they have no body
        elif coding == "chunked":
            self.leaves_open &= "content-length" not in self._headers  # who says both may mean the other
            self._read_chunks()
        elif coding != "identity":
            raise Unread(f"is no HTTP: Transfer-Encoding: {coding}")
        elif "content-length" in self._headers:
            self._take(int(_as(_LENGTH, f"Content-Length: {self._headers['content-length']}")[1]))
        else:
            self.leaves_open = False
            with contextlib.suppress(EOFError):
                self._take(sys.maxsize)
        self.leaves_open &= not self._came

    @property
    def answer(self) -> Answer | None:
        """What came: nothing before its head was there, or broke off."""
        if not self.status:
            return None
        headers = {name: value[:_HEADER_LIMIT] for name, value in self._headers.items()}
        return Answer(
            status=self.status,
            body=bytes(self._body[: self._limit]),
            retry_after=headers.get("retry-after"),
            trace_id=headers.get("x-siliconcloud-trace-id"),
            date=headers.get("date"),
            location=headers.get("location"),
            content_type=headers.get("content-type"),
        )

    def _read_head(self) -> None:
        begun = _as(_STATUS_LINE, self._line())
        status = int(begun[2])
        try:
            self._read_fields()
        except (ConnectionError, EOFError) as error:
            self.status = status
            raise Unread("broke off within its headers") from error
        if status >= 200:
            self.status = status
        wish = self._headers.get("connection", "").lower()
        self.leaves_open = "keep-alive" in wish if begun[1] == "0" else "close" not in wish
        self.leaves_open &= "" not in self._headers

    def _read_fields(self) -> None:
        """A line that is no header is kept under no name: an answer is not lost for it, only the connection."""
        self._headers, name = {}, ""
        for _ in range(_FIELDS_LIMIT + 1):
            line = self._line()
            if not line:
                return
            field = _FIELD.fullmatch(line)
            if field is None:
                self._headers[name := ""] = line
                continue
            joint, value = ", " if field[1] else " ", field[2].strip(" \t")
            name = field[1].lower() if field[1] else name
            self._headers[name] = f"{self._headers[name]}{joint}{value}" if name in self._headers else value
        raise Unread(f"is no HTTP: it has more than {_FIELDS_LIMIT} headers")

    def _read_chunks(self) -> None:
        while size := int(_as(_CHUNK, self._line())[1], 16):
            self._take(size)
            if self._line():
                raise Unread("is no HTTP: a chunk is longer than it says")
        while self._line():
            pass  # trailers

    def _take(self, n: int) -> None:
        while n > 0:
            if not self._came:
                self._more()
            piece = self._came[:n]
            del self._came[:n]
            self._body += piece
            n -= len(piece)
            if len(self._body) > self._limit:
                raise Unread(f"is longer than {self._limit} bytes")

    def _line(self) -> str:
        while (end := self._came.find(b"\n")) < 0 and len(self._came) <= _PIECE:
            self._more()
        if not 0 <= end <= _PIECE:
            raise Unread(f"is no HTTP: it has a line of more than {_PIECE} bytes")
        line = self._came[:end].removesuffix(b"\r").decode("latin-1")
        del self._came[: end + 1]
        return line

    def _more(self) -> None:
        data = self._receive()
        if not data:
            raise EOFError("the connection was closed")
        self._came += data


def _as(form: re.Pattern[str], text: str) -> re.Match[str]:
    found = form.fullmatch(text)
    if not found:
        raise Unread(f"is no HTTP: {text}")
    return found


def begins_answer(data: bytes) -> bool:
    """Whether these first bytes reach into the answer itself, past any 1xx before it."""
    while data[9:10] == b"1":
        _, _, data = data.partition(b"\r\n\r\n")
    return len(data) > len(b"HTTP/1.1 ")


def plain(error: BaseException) -> str:
    """What went wrong, in few printable words; a proxy's address may hold a password."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(" ".join(re.sub(r"//[^/@\s]*@", "//", text).split()), _SAID_LIMIT)

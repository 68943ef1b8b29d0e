"""Servers for the tests that play exact bytes, resets and stalls; a proxy; and certificates of our own.

A server is a list of scripts, one for each connection in the order in which they come. A script is a function
of a `Wire`; when it returns, the connection is closed. What came in is kept in `Server.wires`.
"""

import contextlib
import select
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

OK_BODY = b'{"code":20000,"message":"Ok","status":true,"data":{"id":"file-abc","bytes":3,"purpose":"batch"}}'


def http(status: int, body: bytes = b"", *headers: str) -> bytes:
    """A whole answer, byte for byte."""
    lines = [f"HTTP/1.1 {status} Said So", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


OK = http(200, OK_BODY, "Content-Type: application/json")


class Wire:
    """One connection, seen from the server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.received = bytearray()

    def read(self, n: int) -> bytes:
        """Up to `n` more bytes; nothing once the client has closed."""
        data = self.sock.recv(n)
        self.received += data
        return data

    def read_head(self) -> bytes:
        """The request line and the headers, without a byte of the body (as far as it came separately)."""
        head = bytearray()
        while b"\r\n\r\n" not in head:
            data = self.read(1)
            if not data:
                raise ConnectionAbortedError
            head += data
        return bytes(head)

    def read_request(self) -> tuple[bytes, bytes]:
        """A whole request: head and body, by its Content-Length."""
        head = self.read_head()
        length = content_length(head)
        body = bytearray()
        while len(body) < length:
            data = self.read(min(1 << 16, length - len(body)))
            if not data:
                raise ConnectionAbortedError
            body += data
        return head, bytes(body)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read_to_end(self) -> None:
        """Read until the client closes, which it does too when it gives up."""
        with contextlib.suppress(OSError):
            while self.read(1 << 16):
                pass

    def wait_for_close(self) -> None:
        """Wait, without reading a byte, until the client closes or resets."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        poll.poll()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


Script = Callable[[Wire], None]


def answering(data: bytes) -> Script:
    """Read one request, say exactly this, and close."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(data)

    return script


class Server:
    """Plays its scripts, one for each connection; connections beyond them are closed at once."""

    def __init__(self, *scripts: Script, tls: ssl.SSLContext | None = None) -> None:
        self._scripts = list(scripts)
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self.port: int = self._listener.getsockname()[1]
        self.wires: list[Wire] = []
        self._came = threading.Condition()
        self.errors: list[BaseException] = []

    def url(self, host: str = "127.0.0.1") -> str:
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}/v1"

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                script = self._scripts.pop(0) if self._scripts else _nothing
                self._sockets.append(sock)
                thread = threading.Thread(target=self._play, args=(script, sock))
                self._threads.append(thread)
                thread.start()

    def _play(self, script: Script, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError), self._secured(sock) as secured:
            wire = Wire(secured)
            with self._came:
                self.wires.append(wire)
                self._came.notify_all()
            script(wire)

    def wire(self, number: int) -> Wire:
        """The connection of this number, which may still be on its way to being accepted."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.wires) > number, timeout=30)
        return self.wires[number]

    def _secured(self, sock: socket.socket) -> socket.socket:
        if self._tls is None:
            return sock
        secured = self._tls.wrap_socket(sock, server_side=True)
        self._sockets.append(secured)
        return secured


def _nothing(_wire: Wire) -> None:
    pass


class Proxy(Server):
    """An HTTP proxy: CONNECT and absolute URLs, to wherever `target` says, whatever was asked for."""

    def __init__(
        self,
        target: tuple[str, int],
        *,
        refusal: bytes | None = None,
        connections: int = 8,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(*[self._relay] * connections, tls=tls)
        self._target = target
        self._refusal = refusal
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"https://localhost:{self.port}" if self._tls else f"http://127.0.0.1:{self.port}"

    def _relay(self, wire: Wire) -> None:
        head = wire.read_head()
        line = head.split(b"\r\n", 1)[0].decode()
        self.asked.append(line)
        if self._refusal is not None:
            wire.send(self._refusal)
            wire.read_to_end()
            return
        with socket.create_connection(self._target) as onward:
            if line.startswith("CONNECT"):
                wire.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                onward.sendall(
                    head.replace(f"http://{line.split('/')[2]}".encode(), b"", 1) + _deciphered(wire.sock)
                )
            _relay_both_ways(wire.sock, onward)


def _deciphered(sock: socket.socket) -> bytes:
    """What of a TLS record lies where no select sees it, since only a part of it was read."""
    return sock.recv(sock.pending()) if isinstance(sock, ssl.SSLSocket) and sock.pending() else b""


def _relay_both_ways(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            readable, _, _ = select.select([one, other], [], [])
            for source in readable:
                data = source.recv(1 << 16)  # of TLS one record, which is never longer: none is left unseen
                if not data:
                    return
                (other if source is one else one).sendall(data)


@dataclass(frozen=True)
class Authority:
    """A certificate authority that lives in a folder, made with the openssl command."""

    folder: Path
    certificate: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "certificate", self.folder / "ca.pem")
        self._openssl(
            ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            ["-days", "30", "-subj", "/CN=sfwatch test authority", "-keyout", "ca.key", "-out", "ca.pem"],
            ["-addext", "keyUsage=critical,keyCertSign,cRLSign"],
        )

    def server_context(self, *names: str, days: str = "30") -> ssl.SSLContext:
        """What a server needs to be `names` (such as "DNS:localhost" or "IP:127.0.0.1")."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names, days=days))
        return context

    def issue(self, *names: str, days: str = "30") -> tuple[Path, Path]:
        """The files of a certificate for `names`, and of its key."""
        stem = "-".join([*(name.replace(":", "_") for name in names), days])
        (self.folder / f"{stem}.ext").write_text(
            f"subjectAltName={','.join(names)}\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"],
            ["-subj", "/CN=sfwatch test server", "-keyout", f"{stem}.key", "-out", f"{stem}.csr"],
        )
        self._openssl(
            ["x509", "-req", "-in", f"{stem}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"],
            ["-days", days, "-extfile", f"{stem}.ext", "-out", f"{stem}.pem"],
        )
        return self.folder / f"{stem}.pem", self.folder / f"{stem}.key"

    def _openssl(self, *arguments: Sequence[str]) -> None:
        command = ["openssl", *(word for words in arguments for word in words)]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port of loopback that refuses connections: it is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]

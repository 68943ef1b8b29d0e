"""A proxy that loses answers and uploads, but never a listing."""

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from enum import Enum
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What becomes of an upload; in all but the first the client's connection is reset.
Fate = Enum("Fate", ["PASSES", "ANSWER_LOST", "NOT_SENT", "HALF_SENT"])


class Lossy(ThreadingHTTPServer):
    """Before the peer at *port*. `fate` is asked with the file's number and which attempt it is, from 1."""

    daemon_threads = True

    def __init__(self, port: int, fate: Callable[[int, int], Fate]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.peer, self.fate, self.lock = port, fate, threading.Lock()
        self.attempts: Counter[int] = Counter()
        self.fates: Counter[Fate] = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that was killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Lossy

    def do_GET(self) -> None:
        self._forward(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number = int(body.partition(b"peer-")[2][:4])
        with self.server.lock:
            self.server.attempts[number] += 1
            fate = self.server.fate(number, self.server.attempts[number])
            self.server.fates[fate] += 1
        if fate is not Fate.NOT_SENT:
            self._forward(body, fate)
        if fate is not Fate.PASSES:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _forward(self, body: bytes | None, fate: Fate = Fate.PASSES) -> None:
        headers = {k: v for k, v in self.headers.items() if k.lower() not in {"connection", "host", "expect"}}
        with contextlib.closing(HTTPConnection("127.0.0.1", self.server.peer, timeout=60)) as peer:
            if body and fate is Fate.HALF_SENT:
                peer.request(self.command, self.path, body[: len(body) // 2], headers)
                return
            peer.request(self.command, self.path, body, headers)
            answer = peer.getresponse()
            said = answer.read()
        if fate is Fate.PASSES:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass

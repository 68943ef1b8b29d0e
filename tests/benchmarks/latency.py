"""From a rename into the inbox of an idle daemon to the first byte of its request at the service.

Before each arrival another file is moved out of the inbox, which costs watchdog's own observers half a second.
What it waits for is mostly the disk: claim and journal are durable before the first byte. So the same syncs are
measured beside it, in a bare loop.
"""

import json
import os
import queue
import socket
import statistics
import threading
import time
from pathlib import Path

from benchmarks import lab


class Clock:
    """A service on loopback that notes when the first byte of each request comes."""

    def __init__(self) -> None:
        self.came: queue.SimpleQueue[float] = queue.SimpleQueue()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            got = connection.recv(1 << 16)
            at = time.monotonic()
            if not got:
                return
            while b"\r\n\r\n" not in got:
                got += connection.recv(1 << 16)
            head, _, body = got.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
            size = len(body)
            while size < length:
                size += len(connection.recv(1 << 16))
            self.came.put(at)
            connection.sendall(_answer(f"file-{time.monotonic_ns()}"))


def _answer(file_id: str) -> bytes:
    data = {"id": file_id, "object": "file", "bytes": 1, "createdAt": int(time.time()), "purpose": "batch"}
    body = json.dumps({"code": 20000, "message": "Ok", "status": True, "data": data}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def arrivals(it: lab.Daemon, service: Clock, *, count: int, pause_s: float) -> list[float]:
    """Rename files in, one after the other, each when all is quiet; return the milliseconds of each."""
    outside = it.folder / "outside"
    outside.mkdir()
    took = []
    for number in range(count):
        path = outside / f"{number:04d}.jsonl"
        path.write_bytes(lab.line(number, 2000))
        moved_out = it.inbox / f"{number:04d}.txt"
        moved_out.write_bytes(b"")
        time.sleep(pause_s)
        moved_out.rename(outside / moved_out.name)
        began = time.monotonic()
        path.rename(it.inbox / path.name)
        took.append((service.came.get(timeout=30) - began) * 1000)
        it.await_event("file.done", number + 1)
    return took


def syncs(folder: Path, count: int) -> list[float]:
    """What the disk alone takes for the same promises: two folders of the claim, the file, the journal."""
    took = []
    one, other, file, log = folder / "one", folder / "other", folder / "file", folder / "log"
    one.mkdir()
    other.mkdir()
    (one / "x").write_bytes(b"x")
    folders = [os.open(path, os.O_RDONLY) for path in (one, other)]
    journal = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in range(count):
        file.write_bytes(b"x" * 2000)
        time.sleep(0.05)
        source, target = (one, other) if number % 2 == 0 else (other, one)
        began = time.monotonic()
        (source / "x").rename(target / "x")
        for fd in folders:
            os.fsync(fd)
        with file.open("rb") as dropped:
            os.fdatasync(dropped.fileno())
        os.write(journal, b"x" * 4096)
        os.fdatasync(journal)
        took.append((time.monotonic() - began) * 1000)
    for fd in (*folders, journal):
        os.close(fd)
    return took


def main() -> None:
    """Measure."""
    options = lab.arguments(__doc__, count=200, pause=0.1)
    lab.title(
        f"{options.count} files of 2 KB renamed into the inbox of an idle daemon, others moved out meanwhile"
    )
    with lab.scratch(options.folder) as folder:
        service = Clock()
        bundle = folder / "none.pem"
        to = lab.Receiver(service.url, bundle)
        with lab.daemon(folder, to, api={"base_url": service.url}) as it:
            ours = arrivals(it, service, count=options.count, pause_s=options.pause)
        (folder / "bare").mkdir()
        bare = syncs(folder / "bare", 50)
    percentile = statistics.quantiles(ours, n=20)[-1]
    print(f"  rename to first byte {lab.middle(ours, 1)} ms; 95 % within {percentile:.1f} ms")
    print(f"  the disk's share, in a bare loop {lab.middle(bare, 1)} ms")


if __name__ == "__main__":
    main()

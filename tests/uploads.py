"""What the tests of uploads share: files, forms as two foreign parsers read them, and one way to send.

The fixtures stand in `conftest.py`.
"""

import io
import os
from collections.abc import Callable
from typing import Any

import python_multipart
from servers import OK, Wire
from werkzeug.formparser import parse_form_data

from sfwatch.form import BLOCK
from sfwatch.upload import Client
from sfwatch.verdict import Attempt

KEY = "sk-not-a-real-key"
SMALL = b'{"custom_id": "1"}\n'
BIG = 5 * BLOCK + 12345
LARGE = 64 * 1024 * 1024  # more than any socket buffer takes

Clients = Callable[..., Client]
Files = Callable[[bytes | int], int]


def pattern(size: int) -> bytes:
    """Bytes of which no two blocks are alike."""
    return b"".join(b"%015d\n" % n for n in range(size // 16 + 1))[:size]


def send(client: Client, fd: int, size: int | None = None, **options: Any) -> Attempt:
    size = os.fstat(fd).st_size if size is None else size
    options = {"remote_name": "requests.jsonl", "purpose": "batch", "key": KEY} | options
    return client.send(fd, size, **options)


def content_type(head: bytes) -> str:
    line = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-type:"))
    return line.partition(b":")[2].strip().decode()


def as_werkzeug_reads(head: bytes, body: bytes) -> tuple[list[tuple[str, str]], str | None, bytes]:
    environ = {
        "wsgi.input": io.BytesIO(body),
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": content_type(head),
        "REQUEST_METHOD": "POST",
    }
    _, form, files = parse_form_data(environ)
    file = files["file"]
    assert list(files) == ["file"]
    try:
        return list(form.items()), file.filename, file.read()
    finally:
        file.close()


def as_python_multipart_reads(head: bytes, body: bytes) -> tuple[list[tuple[str, str]], str | None, bytes]:
    fields: list[tuple[str, str]] = []
    files: list[tuple[str | None, bytes]] = []

    def on_field(field: Any) -> None:
        fields.append((field.field_name.decode(), field.value.decode()))

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        assert file.field_name == b"file"
        files.append((file.file_name.decode(), file.file_object.read()))
        file.close()

    headers = {"Content-Type": content_type(head).encode(), "Content-Length": str(len(body)).encode()}
    python_multipart.parse_form(headers, io.BytesIO(body), on_field, on_file)
    assert len(files) == 1
    return fields, *files[0]


class Recorder:
    """A server script that keeps the request that it read and accepts it."""

    def __init__(self) -> None:
        self.head = b""
        self.body = b""

    def __call__(self, wire: Wire) -> None:
        while True:
            self.head, self.body = wire.read_request()
            wire.send(OK)

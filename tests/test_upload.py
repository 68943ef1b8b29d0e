"""Uploads over real sockets: what goes out, what comes back, and every way in which the two can end."""

import gc
import hashlib
import io
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import python_multipart
import urllib3.connection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import (
    OK,
    OK_BODY,
    Authority,
    Proxy,
    Script,
    Server,
    Wire,
    answering,
    closed_port,
    content_length,
    http,
)
from werkzeug.formparser import parse_form_data

from sfwatch.settings import Api
from sfwatch.standin import StandIn
from sfwatch.upload import ANSWER_LIMIT, BLOCK, Client, Pace, _is_final
from sfwatch.verdict import Attempt, Trouble, remote_name

KEY = "sk-not-a-real-key"
SMALL = b'{"custom_id": "1"}\n'
BIG = 5 * BLOCK + 12345
LARGE = 64 * 1024 * 1024  # more than any socket buffer takes


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, netrc or CA bundle of whoever runs the tests."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Every thread ends with its test, and every socket is closed."""
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) - before == set()


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def loopback_tls(authority: Authority) -> ssl.SSLContext:
    return authority.server_context("IP:127.0.0.1", "DNS:localhost")


@pytest.fixture
def clients() -> Iterator[Callable[..., Client]]:
    made = []

    def make(base_url: str, **options: Any) -> Client:
        made.append(Client(Api(base_url=base_url, **options), connections=4, user_agent="sfwatch/test"))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def file_of(tmp_path: Path) -> Iterator[Callable[[bytes | int], int]]:
    """Descriptors of files with these bytes, or with this many."""
    opened: list[int] = []

    def make(content: bytes | int) -> int:
        path = tmp_path / f"file-{len(opened)}.jsonl"
        path.write_bytes(
            b"" if content == LARGE else content if isinstance(content, bytes) else pattern(content)
        )
        if content == LARGE:
            os.truncate(path, LARGE)  # sparse: nobody looks at what is in it
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


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


# --- what goes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, BIG])
def test_every_size_arrives_whole(
    size: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Whatever the size, the receiver has the very bytes, and the digest is theirs."""
    recorder = Recorder()
    with Server(recorder) as server:
        attempt = send(clients(server.url()), file_of(size))
    fields, name, content = as_werkzeug_reads(recorder.head, recorder.body)
    assert content == pattern(size)
    assert (fields, name) == ([("purpose", "batch")], "requests.jsonl")
    assert attempt.sent_all
    assert attempt.sent == size
    assert attempt.sha256 == hashlib.sha256(pattern(size)).hexdigest()
    assert attempt.answer
    assert (attempt.answer.status, attempt.answer.body) == (200, OK_BODY)
    assert (attempt.trouble, attempt.detail) == (None, "")


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_the_request_is_plain(
    size: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """One POST to /files with a length and no chunks, named, with the key in its header only, purpose first."""
    recorder = Recorder()
    with Server(recorder) as server:
        send(clients(server.url()), file_of(size))
    head = recorder.head.decode()
    assert head.startswith("POST /v1/files HTTP/1.1\r\n")
    assert f"\r\nContent-Length: {len(recorder.body)}\r\n" in head
    assert f"\r\nAuthorization: Bearer {KEY}\r\n" in head
    assert "\r\nUser-Agent: sfwatch/test\r\n" in head
    assert "\r\nAccept-Encoding: identity\r\n" in head
    assert "chunked" not in head
    assert KEY.encode() not in recorder.body
    assert recorder.body.index(b'name="purpose"') < recorder.body.index(b'name="file"')


NAMES = [
    b"plain.jsonl",
    b"with space.jsonl",
    b'quo"te.jsonl',
    b"back\\slash.jsonl",
    b"new\r\nline.jsonl",
    b'x.jsonl"\r\nX-Injected: 1\r\n\r\nbody',
    "请求 – ünïcode 🎉.jsonl".encode(),
    b"latin-\xe9.jsonl",
    "two\u2028lines\u0085.jsonl".encode(),
    "no\u00a0break\u200b.jsonl".encode(),
    b"percent%22;semi=colon;.jsonl",
    b"'single'.JSONL",
    b"tab\there.jsonl",
    b"x" * 255,
]


@pytest.mark.parametrize("raw", NAMES, ids=ascii)
def test_parsers_read_the_same_name(
    raw: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Whatever a file is called, two foreign parsers read the name that we mean, and the same bytes."""
    name = remote_name(os.fsdecode(raw), tag=None)
    recorder = Recorder()
    with Server(recorder) as server:
        send(clients(server.url()), file_of(SMALL), remote_name=name)
    expected = ([("purpose", "batch")], name, SMALL)
    assert as_werkzeug_reads(recorder.head, recorder.body) == expected
    assert as_python_multipart_reads(recorder.head, recorder.body) == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(raw=st.binary(min_size=1, max_size=255).filter(lambda raw: b"\0" not in raw and b"/" not in raw))
def test_any_file_name_can_be_sent(
    raw: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """No name that a file can have breaks the form."""
    name = remote_name(os.fsdecode(raw), tag=None)
    recorder = Recorder()
    with Server(recorder) as server:
        client = clients(server.url())
        send(client, file_of(SMALL), remote_name=name)
        client.close()
    expected = ([("purpose", "batch")], name, SMALL)
    assert as_werkzeug_reads(recorder.head, recorder.body) == expected
    assert as_python_multipart_reads(recorder.head, recorder.body) == expected


@pytest.mark.parametrize("bad", ['a"b', "a\r\nb", "a\\b", "a\nb", "a\x7fb", "a\udce9b", "a\0b"], ids=ascii)
def test_nothing_can_be_slipped_into_the_form(
    bad: str, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A name or purpose with what could end a header is refused before anything is sent."""
    with Server() as server:
        client = clients(server.url())
        with pytest.raises(ValueError, match="does not fit"):
            send(client, file_of(SMALL), remote_name=bad)
        with pytest.raises(ValueError, match="does not fit"):
            send(client, file_of(SMALL), purpose=bad)
    assert server.wires == []


@pytest.mark.parametrize("bad", ["", "sk-1\r\nX: y", "sk-1\n", " sk-1", "schlüssel", "sk-1\0"], ids=ascii)
def test_a_key_that_fits_no_header_is_never_quoted(
    bad: str, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A key with characters that no header may have is refused, without repeating it."""
    client = clients("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="the key has characters") as caught:
        send(client, file_of(SMALL), key=bad)
    assert "sk-1" not in str(caught.value)
    assert "schl" not in str(caught.value)


def test_the_key_shows_nowhere(
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither logs at their most talkative, nor outcomes, nor the client know the key after a request."""
    caplog.set_level(logging.DEBUG)
    with Server(answering(http(401, b'"no"', "Connection: close")), answering(b"garbage\r\n\r\n")) as server:
        client = clients(server.url())
        fd = file_of(SMALL)
        attempts = [send(client, fd), send(client, fd)]
    told = [caplog.text, *capsys.readouterr(), repr(attempts), repr(client), repr(vars(client))]
    assert not any(KEY in text for text in told)
    assert not any(KEY in str(request.headers) for request in (client._blank_post, client._blank_get))


def test_progress_is_told_block_by_block(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """The bytes that are out grow to the whole size, a block at a time."""
    told: list[int] = []
    with Server(Recorder()) as server:
        send(clients(server.url()), file_of(BIG), progress=told.append)
    assert told == [*range(BLOCK, BIG, BLOCK), BIG]


def test_a_file_that_grows_is_sent_as_it_was(
    clients: Callable[..., Client], tmp_path: Path, file_of: Callable[[bytes | int], int]
) -> None:
    """What is appended while the file goes out is left for the next time."""
    recorder = Recorder()
    path = tmp_path / "growing.jsonl"
    path.write_bytes(pattern(BIG))
    with path.open("ab", buffering=0) as writer, path.open("rb") as reader, Server(recorder) as server:
        attempt = send(
            clients(server.url()), reader.fileno(), BIG, progress=lambda _: void(writer.write(b"more\n"))
        )
    assert as_werkzeug_reads(recorder.head, recorder.body)[2] == pattern(BIG)
    assert attempt.sha256 == hashlib.sha256(pattern(BIG)).hexdigest()


def void(_: object) -> None:
    pass


@pytest.mark.parametrize("left", [0, BLOCK, 3 * BLOCK + 1])
def test_a_file_that_shrinks_is_broken_off(left: int, clients: Callable[..., Client], tmp_path: Path) -> None:
    """A file that became shorter is never padded, and never ends like a whole one."""
    path = tmp_path / "shrinking.jsonl"
    path.write_bytes(pattern(BIG))
    received = Recorder()
    with path.open("rb") as reader, Server(received) as server:
        attempt = send(clients(server.url()), reader.fileno(), BIG, progress=lambda _: os.truncate(path, left))
        server.wire(0).read_to_end()
    assert attempt.trouble is Trouble.ABORTED
    assert attempt.detail == "the file became shorter while it was sent"
    assert not attempt.sent_all
    assert attempt.sha256 is None
    assert not bytes(server.wires[0].received).endswith(b"--\r\n")


@pytest.mark.parametrize("size", [10, BIG])
def test_a_file_that_is_shorter_from_the_start(
    size: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A size beyond the file's end is noticed, however small the file."""
    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(size), size + 1)
    assert (attempt.trouble, attempt.sent_all, attempt.answer) == (Trouble.ABORTED, False, None)


def test_a_file_that_cannot_be_read(clients: Callable[..., Client], tmp_path: Path) -> None:
    """An error of the disk is told as one, not as the network's."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with Server(Recorder()) as server:
            attempt = send(clients(server.url()), fd, BIG)
    finally:
        os.close(fd)
    assert (attempt.trouble, attempt.sent_all) == (Trouble.ABORTED, False)
    assert attempt.detail == "the file cannot be read: Is a directory"


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_stop_breaks_off_before_the_last_byte(
    size: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Once stop says so no more goes out, and what went out is no whole request."""
    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(size), stop=lambda: True)
    assert (attempt.trouble, attempt.sent_all, attempt.sha256) == (Trouble.ABORTED, False, None)
    assert not any(bytes(wire.received).endswith(b"--\r\n") for wire in server.wires)


def test_stop_in_the_middle(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """The bytes that are out when stop comes are counted."""
    out = [0]
    with Server(Recorder()) as server:
        attempt = send(
            clients(server.url()),
            file_of(BIG),
            progress=lambda sent: out.__setitem__(0, sent),
            stop=lambda: out[0] >= 2 * BLOCK,
        )
    assert (attempt.trouble, attempt.sent, attempt.sent_all) == (Trouble.ABORTED, 2 * BLOCK, False)


def test_stop_is_heard_while_nothing_moves(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A receiver that takes no more bytes does not keep stop waiting for the read timeout."""
    stalled = threading.Event()

    def stop() -> bool:
        return stalled.is_set()

    timer = threading.Timer(0.2, stalled.set)
    with Server(lambda wire: wire.wait_for_close()) as server:
        timer.start()
        attempt = send(clients(server.url(), read_timeout_s=100), file_of(LARGE), stop=stop)
    timer.join()
    assert (attempt.trouble, attempt.sent_all) == (Trouble.ABORTED, False)


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_approval_comes_before_the_end(
    size: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Who refuses the digest is sure that the service can't have taken the file."""
    asked: list[str] = []

    def approve(sha256: str) -> bool:
        asked.append(sha256)
        return False

    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(size), approve=approve)
    assert asked == [hashlib.sha256(pattern(size)).hexdigest()]
    assert (attempt.trouble, attempt.sent_all) == (Trouble.ABORTED, False)
    assert not any(bytes(wire.received).endswith(b"--\r\n") for wire in server.wires)


def test_approved_files_go_through(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """An approved digest is that of the attempt."""
    asked: list[str] = []

    def approve(sha256: str) -> bool:
        asked.append(sha256)
        return True

    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(BIG), approve=approve)
    assert attempt.sent_all
    assert asked == [attempt.sha256]


_MEASURE = """
import os, sys
from sfwatch.settings import Api
from sfwatch.upload import Client

def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))

url, path = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
client = Client(Api(base_url=url), connections=1, user_agent="x")
send = lambda size: client.send(fd, size, remote_name="x.jsonl", purpose="batch", key="k")
assert send(10).answer
before = peak()
assert send(os.fstat(fd).st_size).answer
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """300 MB cost less than 4 MB of memory over what a small file has cost."""
    path = tmp_path / "sparse.jsonl"
    path.touch()
    os.truncate(path, 300_000_000)
    with StandIn(digest=False) as service:
        command = [sys.executable, "-c", _MEASURE, service.base_url, str(path)]
        grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 4096


# --- connections -----------------------------------------------------------------------------------------


def test_connections_are_kept(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """Files and listings one after the other share one connection, whatever was answered."""

    def script(wire: Wire) -> None:
        for answer in (OK, http(400, b'{"code":20012}'), http(503, b""), OK, OK):
            wire.read_request()
            wire.send(answer)

    with Server(script) as server:
        client = clients(server.url())
        attempts = [send(client, file_of(SMALL)), send(client, file_of(BIG)), send(client, file_of(SMALL))]
        attempts.append(client.list_files(purpose="batch", limit=10, key=KEY))
        attempts.append(send(client, file_of(SMALL)))
    assert [attempt.answer and attempt.answer.status for attempt in attempts] == [200, 400, 503, 200, 200]
    assert len(server.wires) == 1


def test_a_connection_closed_at_rest_is_replaced(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A service that closes idle connections costs no attempt."""
    with StandIn() as service:
        client = clients(service.base_url)
        for _ in range(3):
            assert send(client, file_of(SMALL)).answer
            service.hang_up()
            settled(service)
        assert len(service.stored) == 3


def settled(service: StandIn) -> None:
    while service._server.open:
        service.closing.wait(0.001)


def test_a_connection_that_rested_long_is_not_trusted(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a service's own idle timeout can cross with a request, a new connection is made."""
    monkeypatch.setattr("sfwatch.upload.IDLE_S", 0.0)
    with Server(Recorder(), Recorder()) as server:
        client = clients(server.url())
        send(client, file_of(SMALL))
        send(client, file_of(SMALL))
    assert len(server.wires) == 2


def test_a_reset_between_two_requests(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A kept connection that breaks under the next request is told as broken; the body is not sent again."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(OK)
        wire.read_head()
        wire.reset()

    with Server(script, Recorder()) as server:
        client = clients(server.url())
        first, second = send(client, file_of(SMALL)), send(client, file_of(LARGE))
        third = send(client, file_of(SMALL))
    assert first.answer
    assert (second.trouble, second.answer, second.sent_all) == (Trouble.RESET, None, False)
    assert third.answer
    assert len(server.wires) == 2


def test_threads_share_a_client(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """Uploads at the same time do not mix, small or big."""
    sizes = [BIG, 10, BIG + 1, 11, BLOCK, 12, BIG + 2, 13]
    fds = [file_of(size) for size in sizes]
    attempts: dict[int, Attempt] = {}
    with StandIn() as service:
        client = clients(service.base_url)

        def work(n: int) -> None:
            attempts[n] = send(client, fds[n], remote_name=f"{n}.jsonl")

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(sizes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = {file.filename: (file.bytes, file.sha256) for file in service.stored}
    assert stored == {f"{n}.jsonl": (size, attempts[n].sha256) for n, size in enumerate(sizes)}


# --- early answers ---------------------------------------------------------------------------------------


def refusing(status: int, then: Callable[[Wire], None]) -> Script:
    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read(100_000)
        wire.send(http(status, b'"no"'))
        then(wire)

    return script


ENDINGS: dict[str, Script] = {
    "closes": lambda wire: None,
    "resets": lambda wire: wire.reset(),
    "reads on": lambda wire: wire.read_to_end(),
    "reads nothing more": lambda wire: wire.wait_for_close(),
}


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("status", [401, 413])
@pytest.mark.parametrize("ending", ["closes", "reads on", "reads nothing more"])
def test_an_early_refusal_is_read(
    ending: str,
    status: int,
    secure: bool,  # noqa: FBT001
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
) -> None:
    """An answer in the middle of the body ends the sending and is the outcome, whatever comes then."""
    fd = file_of(LARGE)
    with Server(refusing(status, ENDINGS[ending]), Recorder(), tls=loopback_tls if secure else None) as server:
        client = clients(server.url(), ca_bundle=authority.certificate)
        attempt = send(client, fd)
        after = send(client, fd, 10)
    assert attempt.answer
    assert (attempt.answer.status, attempt.answer.body) == (status, b'"no"')
    assert (attempt.sent_all, attempt.sha256, attempt.trouble) == (False, None, None)
    assert attempt.sent < LARGE
    assert after.answer, "the connection on which a body was broken off is not used again"
    assert len(server.wires) == 2


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_hanging_up_without_an_answer(
    ending: str,
    secure: bool,  # noqa: FBT001
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
) -> None:
    """A connection that breaks in the middle of the body leaves no doubt: the file can't have been taken."""

    def script(wire: Wire) -> None:
        wire.read_head()
        wire.read(100_000)
        ENDINGS[ending](wire)

    with Server(script, tls=loopback_tls if secure else None) as server:
        attempt = send(clients(server.url(), ca_bundle=authority.certificate), file_of(LARGE))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.RESET, None, False)
    assert attempt.detail.startswith("127.0.0.1:")


def test_interim_answers_end_nothing(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """1xx in the middle of the body or after it are no answers."""
    interim = b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"

    def script(wire: Wire) -> None:
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n" + interim[0])
        wire.read_request()
        wire.send(interim[0] + interim[1] + b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        wire.read_request()
        wire.send(OK)

    with Server(script) as server:
        client = clients(server.url())
        attempts = [send(client, file_of(LARGE)), send(client, file_of(SMALL))]
    assert [attempt.answer and attempt.answer.body for attempt in attempts] == [OK_BODY, OK_BODY]
    assert [attempt.sent_all for attempt in attempts] == [True, True]
    assert len(server.wires) == 1


@pytest.mark.parametrize(
    ("data", "final"),
    [
        (b"", False),
        (b"HTTP/1.1 ", False),
        (b"HTTP/1.1 1", False),
        (b"HTTP/1.1 100 Continue\r\n", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 1", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 4", True),
        (b"HTTP/1.1 413 No\r\n", True),
        (b"<html>garbage", True),
    ],
)
def test_what_begins_an_answer(data: bytes, final: bool) -> None:  # noqa: FBT001
    """The first digit of a status that is not 1 begins the answer, and so does anything that is no HTTP."""
    assert _is_final(data) is final


# --- answers cut short, stalled or strange ---------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_an_answer_cut_at_every_byte(
    ending: str, status: int, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """No part of an answer passes for a whole one, and none raises."""
    answer = http(status, OK_BODY, "Content-Type: application/json")
    head = answer.index(b"\r\n\r\n") + 4

    def cut_at(n: int) -> Script:
        def script(wire: Wire) -> None:
            wire.read_request()
            wire.send(answer[:n])
            ENDINGS[ending](wire)

        return script

    fd = file_of(SMALL)
    with Server(*[cut_at(n) for n in range(len(answer))]) as server:
        client = clients(server.url())
        attempts = [send(client, fd) for _ in range(len(answer))]
    assert len(server.wires) == len(answer)
    assert all(attempt.trouble in (Trouble.RESET, Trouble.CUT) for attempt in attempts)
    assert all(attempt.sent_all for attempt in attempts)
    assert all(attempt.answer is None or attempt.answer.body != OK_BODY for attempt in attempts)
    if ending == "closes":
        assert [attempt.answer.body for attempt in attempts[head:] if attempt.answer] == [
            OK_BODY[:n] for n in range(len(OK_BODY))
        ]
    assert {attempt.answer.status for attempt in attempts if attempt.answer} == {status}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
@given(
    said=st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail),
        st.binary(max_size=100).map(lambda tail: b"HTTP/1.1 200 OK\r\nContent-Length: " + tail),
        st.binary(max_size=100).map(
            lambda tail: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + tail
        ),
    )
)
def test_whatever_is_answered_there_is_an_outcome(
    said: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """No bytes of a server raise, and none of them is silent: there is an answer or a trouble."""
    with Server(answering(said)) as server:
        client = clients(server.url(), read_timeout_s=5)
        attempt = send(client, file_of(SMALL))
        client.close()
    assert attempt.sent_all
    assert attempt.answer or attempt.trouble
    assert attempt.detail.isprintable()


STRANGE = {
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello",
    "no status": b"HTTP/1.1 abc OK\r\n\r\n",
    "other protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "control characters": b"\x1b[2J\x07\r\n\r\n",
}


@pytest.mark.parametrize("said", STRANGE.values(), ids=STRANGE)
def test_strange_answers_are_cut(
    said: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """What is no HTTP is told as such, in printable characters."""
    with Server(answering(said)) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CUT, True)
    assert attempt.detail.isprintable()


def test_an_answer_of_boundless_length(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Only so much of an answer is kept; the rest is not read, and the status still counts."""
    with Server(answering(http(413, b"x" * (ANSWER_LIMIT + 1)))) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert attempt.answer
    assert (attempt.answer.status, len(attempt.answer.body)) == (413, ANSWER_LIMIT)
    assert attempt.trouble is Trouble.CUT
    assert "longer than" in attempt.detail


def test_an_answer_as_long_as_allowed(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """An answer of exactly the limit is whole."""
    with Server(answering(http(200, b"x" * ANSWER_LIMIT))) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert attempt.answer
    assert len(attempt.answer.body) == ANSWER_LIMIT
    assert attempt.trouble is None


def test_chunked_and_unbounded_answers_are_read(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """An answer may come in chunks, or end with the connection."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
    with Server(answering(chunked), answering(b"HTTP/1.0 200 OK\r\n\r\nabcde")) as server:
        client = clients(server.url())
        attempts = [send(client, file_of(SMALL)), send(client, file_of(SMALL))]
    assert [attempt.answer and attempt.answer.body for attempt in attempts] == [b"abcde", b"abcde"]
    assert [attempt.trouble for attempt in attempts] == [None, None]


def test_headers_of_interest(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """Of the headers those are kept that somebody decides by, at a bounded length."""
    headers = ("Retry-After: 7", "X-SiliconCloud-Trace-Id: ti_1", "Date: today", "Location: " + "x" * 5000)
    with Server(answering(http(429, b"", *headers, "Content-Type: text/html"))) as server:
        answer = send(clients(server.url()), file_of(SMALL)).answer
    assert answer
    assert (answer.retry_after, answer.trace_id, answer.date) == ("7", "ti_1", "today")
    assert (answer.content_type, answer.location) == ("text/html", "x" * 1000)


def redirect(wire: Wire, location: str) -> None:
    for status in (301, 302, 303, 307, 308):
        wire.read_request()
        wire.send(http(status, b"", location))


def test_a_redirect_is_an_answer(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """Nothing is sent to where a redirect points, least of all the key."""
    with Server(Recorder()) as other:
        location = f"Location: {other.url()}/files"
        with Server(lambda wire: redirect(wire, location)) as server:
            client = clients(server.url())
            answers = [send(client, file_of(SMALL)).answer for _ in range(5)]
    assert [answer and answer.status for answer in answers] == [301, 302, 303, 307, 308]
    assert {answer and answer.location for answer in answers} == {f"{other.url()}/files"}
    assert other.wires == []


def test_cookies_do_not_stick(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """A cookie of one answer is not sent with the next request."""
    with Server(answering(http(200, OK_BODY, "Set-Cookie: a=b", "Connection: close")), Recorder()) as server:
        client = clients(server.url())
        send(client, file_of(SMALL))
        send(client, file_of(SMALL))
    assert b"ookie" not in bytes(server.wires[1].received)


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nA: b\r\n"], ids=["none", "status", "head"]
)
def test_a_stall_after_the_body(
    said: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Who has the whole body and says nothing more is waited for no longer than the read timeout."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(said)
        wire.read_to_end()

    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.STALLED, None, True)


def test_a_stall_within_the_answer(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """The part of an answer that came before a stall is told."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(http(400, OK_BODY)[:-10])
        wire.read_to_end()

    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.STALLED, True)
    assert attempt.answer
    assert (attempt.answer.status, attempt.answer.body) == (400, OK_BODY[:-10])


@pytest.mark.parametrize("where", ["head", "body"])
def test_an_answer_that_drips(
    where: str, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A byte now and then does not hold a worker for ever: the whole answer has one deadline."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nX: " + b"\r\nContent-Length: 100000\r\n\r\n" * (where == "body"))
        while not gone.wait(0.05):
            wire.send(b"x")

    gone = threading.Event()
    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(SMALL))
        gone.set()
    assert (attempt.trouble, attempt.sent_all) == (Trouble.STALLED, True)


def test_a_stall_within_the_body(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """The read timeout holds for a connection that takes no more bytes; the connect timeout does not."""
    with Server(lambda wire: wire.wait_for_close()) as server:
        client = clients(server.url(), connect_timeout_s=100, read_timeout_s=0.3)
        attempt = send(client, file_of(LARGE))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.STALLED, None, False)
    assert "took no more bytes" in attempt.detail


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_slow_receiver_is_no_stall(
    secure: bool,  # noqa: FBT001
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as some bytes move the sending goes on, and they arrive in their order.

    The connect timeout is shorter than the upload; buffers are small, so that most writes go out in parts.
    """

    def script(wire: Wire) -> None:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        head = wire.read_head()
        body = bytearray()
        while len(body) < content_length(head):
            pause.wait(0.002)
            body += wire.read(1 << 16)
        received.append((head, bytes(body)))
        wire.send(OK)

    def with_a_small_buffer(connection: urllib3.connection.HTTPConnection) -> socket.socket:
        sock = connect(connection)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        return sock

    connect = urllib3.connection.HTTPConnection._new_conn
    monkeypatch.setattr(urllib3.connection.HTTPConnection, "_new_conn", with_a_small_buffer)
    pause = threading.Event()
    received: list[tuple[bytes, bytes]] = []
    with Server(script, tls=loopback_tls if secure else None) as server:
        bundle = authority.certificate
        client = clients(server.url(), ca_bundle=bundle, connect_timeout_s=0.3, read_timeout_s=10)
        attempt = send(client, file_of(2 * BIG))
    assert (attempt.trouble, attempt.sent_all, attempt.sent) == (None, True, 2 * BIG)
    assert as_werkzeug_reads(*received[0])[2] == pattern(2 * BIG)


# --- no connection ---------------------------------------------------------------------------------------


def test_a_refused_connection(clients: Callable[..., Client], file_of: Callable[[bytes | int], int]) -> None:
    """Nobody listening is told as no connection; the name has resolved."""
    with closed_port() as port:
        client = clients(f"http://127.0.0.1:{port}/v1")
        assert not client.resolved
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.CONNECT, None, False)
    assert attempt.detail == f"no connection to 127.0.0.1:{port}: Connection refused"
    assert client.resolved


def test_a_connection_that_is_not_taken(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int], loopback_tls: ssl.SSLContext
) -> None:
    """A server that takes the connection and never shakes hands is given up after the connect timeout."""
    with Server(lambda wire: wire.read_to_end()) as server:
        client = clients(f"https://127.0.0.1:{server.port}/v1", connect_timeout_s=0.3, read_timeout_s=100)
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CONNECT, False)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closes", "plain HTTP"])
def test_a_handshake_that_fails(
    said: bytes, clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """What speaks no TLS gives no connection."""

    def script(wire: Wire) -> None:
        wire.read(1)
        wire.send(said)
        if said:
            wire.read_to_end()

    with Server(script) as server:
        attempt = send(clients(f"https://127.0.0.1:{server.port}/v1"), file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.CONNECT, None, False)


def test_a_name_that_does_not_resolve(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A failed lookup is told apart, and the name counts as never resolved."""
    client = clients("http://nowhere.invalid/v1")
    attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.RESOLVE, None, False)
    assert "nowhere.invalid" in attempt.detail
    assert not client.resolved


def test_a_connection_tells_that_the_name_resolves(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """Once there was a connection, a later failure of the lookup is a passing one."""
    with Server(answering(OK)) as server:
        client = clients(server.url("localhost"))
        send(client, file_of(SMALL))
    assert client.resolved


@pytest.mark.parametrize("case", ["unknown authority", "other name", "expired"])
def test_certificates_that_do_not_verify(
    case: str,
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    """Nothing is sent to who can't prove the name, and the detail says what is wrong."""
    known = authority.certificate
    tls, says = loopback_tls, ""
    if case == "unknown authority":
        known, says = Authority(tmp_path).certificate, "unable to get local issuer|signature failure"
    elif case == "other name":
        tls, says = authority.server_context("DNS:example.org"), "mismatch"
    else:
        tls, says = authority.server_context("IP:127.0.0.1", days="0"), "expired"
    with Server(Recorder(), tls=tls) as server:
        client = clients(server.url(), ca_bundle=known)
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.CERTIFICATE, None, False)
    assert any(word in attempt.detail for word in says.split("|")), attempt.detail
    assert not any(wire.received for wire in server.wires)


def test_the_ca_bundle_of_the_environment(
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """REQUESTS_CA_BUNDLE counts if the settings name none; without either, our authority is unknown."""
    with Server(Recorder(), Recorder(), tls=loopback_tls) as server:
        without = send(clients(server.url()), file_of(SMALL))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.certificate))
        attempt = send(clients(server.url()), file_of(SMALL))
    assert without.trouble is Trouble.CERTIFICATE
    assert attempt.answer


def test_a_folder_of_authorities(
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    """A hashed folder of certificates does as a bundle."""
    command = ["openssl", "x509", "-hash", "-noout", "-in", str(authority.certificate)]
    digest = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path / "certs").mkdir()
    (tmp_path / "certs" / f"{digest}.0").write_bytes(authority.certificate.read_bytes())
    with Server(Recorder(), tls=loopback_tls) as server:
        attempt = send(clients(server.url(), ca_bundle=tmp_path / "certs"), file_of(SMALL))
    assert attempt.answer


@pytest.mark.parametrize("bad", [None, b"no certificate"], ids=["missing", "garbage"])
def test_a_ca_bundle_that_is_put_right(
    bad: bytes | None,
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    """A bundle that can't be read is an outcome like others, and is read anew by the next attempt."""
    bundle = tmp_path / "bundle.pem"
    if bad is not None:
        bundle.write_bytes(bad)
    with Server(Recorder(), tls=loopback_tls) as server:
        client = clients(server.url(), ca_bundle=bundle)
        before = send(client, file_of(SMALL))
        bundle.write_bytes(authority.certificate.read_bytes())
        after = send(client, file_of(SMALL))
    assert (before.trouble, before.sent_all) == (Trouble.CERTIFICATE, False)
    assert str(bundle) in before.detail
    assert after.answer


# --- the environment -------------------------------------------------------------------------------------


def test_netrc_does_not_replace_the_key(
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whatever a .netrc says of the host, our key is sent: with files and listings."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login mallory password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with StandIn(key=KEY) as service:
        client = clients(service.base_url)
        send(client, file_of(SMALL))
        client.list_files(purpose="batch", limit=10, key=KEY)
    assert [request.authorization for request in service.requests] == [f"Bearer {KEY}"] * 2


def test_a_proxy_of_the_environment_forwards(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain HTTP goes through http_proxy as a whole URL."""
    with StandIn() as service:
        with Proxy(address_of(service)) as proxy:
            monkeypatch.setenv("http_proxy", proxy.address)
            client = clients("http://files.example/v1")
            attempts = [send(client, file_of(size)) for size in (10, BIG)]
            client.close()
        assert [file.bytes for file in service.stored] == [10, BIG]
    assert [attempt.answer and attempt.answer.status for attempt in attempts] == [200, 200]
    assert proxy.asked == ["POST http://files.example/v1/files HTTP/1.1"]
    assert client.resolved


def address_of(service: StandIn) -> tuple[str, int]:
    return "127.0.0.1", int(service.base_url.split(":")[2].split("/")[0])


def test_a_proxy_of_the_environment_tunnels(
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """HTTPS goes through https_proxy by CONNECT, and the certificate is the service's own."""
    tls = authority.server_context("DNS:files.example")
    with StandIn(tls=tls) as service:
        with Proxy(address_of(service)) as proxy:
            monkeypatch.setenv("https_proxy", proxy.address)
            client = clients("https://files.example/v1", ca_bundle=authority.certificate)
            attempts = [send(client, file_of(size)) for size in (10, BIG)]
            client.close()
        assert [file.bytes for file in service.stored] == [10, BIG]
    assert [attempt.answer and attempt.answer.status for attempt in attempts] == [200, 200]
    assert proxy.asked == ["CONNECT files.example:443 HTTP/1.0"]


def test_no_proxy_counts(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hosts of no_proxy are reached directly."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with StandIn() as service:
        assert send(clients(service.base_url), file_of(SMALL)).answer


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there(
    scheme: str,
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A dead proxy is blamed as the proxy, and says nothing of the service's name."""
    with closed_port() as port:
        monkeypatch.setenv(f"{scheme}_proxy", f"http://me:pass@127.0.0.1:{port}")
        client = clients(f"{scheme}://files.example/v1")
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.PROXY, None, False)
    assert "Connection refused" in attempt.detail
    assert "pass" not in attempt.detail
    assert not client.resolved


def test_a_proxy_that_refuses(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal of CONNECT is the proxy's, not an answer of the service."""
    refusal = http(407, b"who are you?", "Proxy-Authenticate: Basic")
    with Proxy(("127.0.0.1", 9), refusal=refusal) as proxy:
        monkeypatch.setenv("https_proxy", proxy.address)
        client = clients("https://files.example/v1")
        attempt = send(client, file_of(SMALL))
        client.close()
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.PROXY, None, False)
    assert "407" in attempt.detail


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://"])
def test_a_proxy_that_is_of_no_use(
    proxy: str,
    clients: Callable[..., Client],
    file_of: Callable[[bytes | int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy setting that can't be followed is never passed over in silence."""
    monkeypatch.setenv("http_proxy", proxy)
    attempt = send(clients("http://files.example/v1"), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.PROXY, False)


# --- the listing -----------------------------------------------------------------------------------------


def test_the_listing_is_asked_for(clients: Callable[..., Client]) -> None:
    """A listing is one GET with purpose, limit and key."""
    with Server(answering(http(200, b'{"data":[]}', "Date: now"))) as server:
        client = clients(server.url())
        attempt = client.list_files(purpose="a b&c", limit=100, key=KEY)
    head = bytes(server.wires[0].received)
    assert head.startswith(b"GET /v1/files?purpose=a+b%26c&limit=100 HTTP/1.1\r\n")
    assert b"Bearer " + KEY.encode() in head
    assert (attempt.sent_all, attempt.sent, attempt.sha256, attempt.trouble) == (True, 0, None, None)
    assert attempt.answer
    assert (attempt.answer.body, attempt.answer.date) == (b'{"data":[]}', "now")


def test_a_listing_may_be_long(clients: Callable[..., Client]) -> None:
    """More of a listing is read than of other answers, and still not without bound."""
    with Server(
        *[answering(http(200, b"x" * size, "Connection: close")) for size in (1_000_000, 9_000_000)]
    ) as server:
        client = clients(server.url())
        attempts = [client.list_files(purpose="batch", limit=1, key=KEY) for _ in range(2)]
    assert [attempt.answer and len(attempt.answer.body) for attempt in attempts] == [1_000_000, 8 * 1024 * 1024]
    assert [attempt.trouble for attempt in attempts] == [None, Trouble.CUT]


def test_a_listing_that_fails(clients: Callable[..., Client]) -> None:
    """A listing meets the same troubles as an upload."""

    def stalling(wire: Wire) -> None:
        wire.read_request()
        wire.read_to_end()

    with Server(lambda wire: void(wire.read_request()), stalling, answering(b"?\r\n\r\n")) as server:
        client = clients(server.url(), read_timeout_s=0.3)
        troubles = [client.list_files(purpose="batch", limit=1, key=KEY).trouble for _ in range(3)]
    assert troubles == [Trouble.RESET, Trouble.STALLED, Trouble.CUT]


# --- pace ------------------------------------------------------------------------------------------------


def test_pace_spreads_bytes() -> None:
    """Each reservation waits for those before it; rest is not saved up."""
    now = [100.0]
    pace = Pace(1000, clock=lambda: now[0])
    assert [pace.reserve(500), pace.reserve(500), pace.reserve(1000)] == [0.0, 0.5, 1.0]
    now[0] = 101.0
    assert pace.reserve(0) == 1.0
    now[0] = 200.0
    assert [pace.reserve(1000), pace.reserve(1)] == [0.0, 1.0]


def test_pace_is_kept_and_can_be_stopped(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """An upload that waits for its turn hears stop."""
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 6

    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(BIG), max_rate=Pace(1000), stop=stop)
    assert (attempt.trouble, attempt.sent) == (Trouble.ABORTED, BLOCK)


def test_nothing_raises_with_a_key_in_its_frames(
    clients: Callable[..., Client], file_of: Callable[[bytes | int], int]
) -> None:
    """A callback of the caller that raises leaves through us: as it is, without the key in its traceback."""

    def broken(_sent: int) -> None:
        raise RuntimeError("a bug of the caller")

    with Server(Recorder()) as server, pytest.raises(RuntimeError, match="a bug") as caught:
        send(clients(server.url()), file_of(SMALL), progress=broken)
    assert KEY not in "".join(traceback.format_exception(caught.value))

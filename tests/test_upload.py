"""Uploads over real sockets: what goes out, what is told of what comes back, and what nobody is told."""

import hashlib
import logging
import os
import ssl
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from servers import OK, OK_BODY, Authority, Server, Wire, answering, http
from uploads import BIG, KEY, SMALL, Clients, Files, Recorder, as_werkzeug_reads, pattern, send

from sfwatch.form import BLOCK
from sfwatch.settings import Api
from sfwatch.standin import StandIn
from sfwatch.upload import Client
from sfwatch.verdict import Trouble

pytestmark = pytest.mark.usefixtures("plain_environment", "nothing_left_behind")


# --- what goes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK, BIG])
def test_every_size_arrives_whole(size: int, clients: Clients, file_of: Files) -> None:
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
def test_the_request_is_plain(size: int, clients: Clients, file_of: Files) -> None:
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


@pytest.mark.parametrize("bad", ['a"b', "a\r\nb", "a\\b", "a\nb", "a\x7fb", "a\udce9b", "a\0b"], ids=ascii)
def test_nothing_can_be_slipped_into_the_form(bad: str, clients: Clients, file_of: Files) -> None:
    """A name or purpose with what could end a header is refused before anything is sent."""
    with Server() as server:
        client = clients(server.url())
        with pytest.raises(ValueError, match="does not fit"):
            send(client, file_of(SMALL), remote_name=bad)
        with pytest.raises(ValueError, match="does not fit"):
            send(client, file_of(SMALL), purpose=bad)
    assert server.wires == []


@pytest.mark.parametrize("bad", ["", "sk-1\r\nX: y", "sk-1\n", " sk-1", "schlüssel", "sk-1\0"], ids=ascii)
def test_a_key_that_fits_no_header_is_never_quoted(bad: str, clients: Clients, file_of: Files) -> None:
    """A key with characters that no header may have is refused, without repeating it."""
    client = clients("http://127.0.0.1:9/v1")
    with pytest.raises(ValueError, match="the key has characters") as caught:
        send(client, file_of(SMALL), key=bad)
    assert "sk-1" not in str(caught.value)
    assert "schl" not in str(caught.value)


def test_nothing_can_be_slipped_into_the_head(file_of: Files) -> None:
    """Whatever of a request came to have a line end, no header is made of it."""
    with Server(Recorder()) as server:
        client = Client(Api(base_url=server.url()), connections=1, user_agent="x\r\nX-Injected: 1")
        with pytest.raises(ValueError, match="cannot stand in its head"):
            send(client, file_of(SMALL))
        client.close()
    assert not any(wire.received for wire in server.wires)


@pytest.mark.parametrize(("port", "told"), [(":80", ""), (":8080", ":8080")])
def test_the_host_is_named(
    port: str, told: str, clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service finds in Host what it is called, with its port if that is not the usual one."""
    recorder = Recorder()
    with Server(recorder) as server:
        monkeypatch.setenv("http_proxy", server.url())
        send(clients(f"http://files.example{port}/v1"), file_of(SMALL))
    assert f"\r\nHost: files.example{told}\r\n".encode() in recorder.head


def test_the_key_shows_nowhere(
    clients: Clients,
    file_of: Files,
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


def test_a_service_that_repeats_the_key(clients: Clients, file_of: Files) -> None:
    """What is kept of an answer, and what is told of one that is none, has no key in it, however written."""
    escaped = "".join(f"\\u{ord(c):04X}" for c in KEY)
    body = f'{{"plain": "{KEY}", "escaped": "{escaped}"}}'.encode()
    headers = (f"Location: /{KEY}?key=sk%2dnot%2Da-real-key", f"Retry-After: {KEY}", f"Content-Type: {KEY}")
    told = http(401, body, f"x-siliconcloud-trace-id: {KEY}", *headers, "Connection: close")
    with Server(answering(told), answering(f"who is {KEY}?\r\n\r\n".encode())) as server:
        client = clients(server.url())
        answered, garbled = [send(client, file_of(SMALL)) for _ in range(2)]
    answer = answered.answer
    assert answer
    assert answer.body == b'{"plain": "***", "escaped": "***"}'
    assert (answer.location, answer.retry_after) == ("/***?key=***", "***")
    assert (answer.content_type, answer.trace_id) == ("***", "***")
    assert "no HTTP: who is" in garbled.detail
    assert KEY not in garbled.detail


@pytest.mark.parametrize("left", [0, BLOCK, 3 * BLOCK + 1])
def test_a_file_that_shrinks_is_broken_off(left: int, clients: Clients, tmp_path: Path) -> None:
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
def test_a_file_that_is_shorter_from_the_start(size: int, clients: Clients, file_of: Files) -> None:
    """A size beyond the file's end is noticed, however small the file."""
    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(size), size + 1)
    assert (attempt.trouble, attempt.sent_all, attempt.answer) == (Trouble.ABORTED, False, None)


@pytest.mark.parametrize("size", [len(SMALL), BIG])
def test_stop_breaks_off_before_the_last_byte(size: int, clients: Clients, file_of: Files) -> None:
    """Once stop says so no more goes out, and what went out is no whole request."""
    with Server(Recorder()) as server:
        attempt = send(clients(server.url()), file_of(size), stop=lambda: True)
    assert (attempt.trouble, attempt.sent_all, attempt.sha256) == (Trouble.ABORTED, False, None)
    assert not any(bytes(wire.received).endswith(b"--\r\n") for wire in server.wires)


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


# --- what comes back -------------------------------------------------------------------------------------


def test_headers_of_interest(clients: Clients, file_of: Files) -> None:
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


def test_a_redirect_is_an_answer(clients: Clients, file_of: Files) -> None:
    """Nothing is sent to where a redirect points, least of all the key."""
    with Server(Recorder()) as other:
        location = f"Location: {other.url()}/files"
        with Server(lambda wire: redirect(wire, location)) as server:
            client = clients(server.url())
            answers = [send(client, file_of(SMALL)).answer for _ in range(5)]
    assert [answer and answer.status for answer in answers] == [301, 302, 303, 307, 308]
    assert {answer and answer.location for answer in answers} == {f"{other.url()}/files"}
    assert other.wires == []


def test_cookies_do_not_stick(clients: Clients, file_of: Files) -> None:
    """A cookie of one answer is not sent with the next request."""
    with Server(answering(http(200, OK_BODY, "Set-Cookie: a=b", "Connection: close")), Recorder()) as server:
        client = clients(server.url())
        send(client, file_of(SMALL))
        send(client, file_of(SMALL))
    assert b"ookie" not in bytes(server.wires[1].received)


def test_a_connection_tells_that_the_name_resolves(clients: Clients, file_of: Files) -> None:
    """Once there was a connection, a later failure of the lookup is a passing one."""
    with Server(answering(OK)) as server:
        client = clients(server.url("localhost"))
        send(client, file_of(SMALL))
    assert client.resolved


# --- the environment -------------------------------------------------------------------------------------


def test_the_ca_bundle_of_the_environment(
    clients: Clients,
    file_of: Files,
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
    clients: Clients,
    file_of: Files,
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
    clients: Clients,
    file_of: Files,
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


def test_netrc_does_not_replace_the_key(
    clients: Clients,
    file_of: Files,
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


def test_no_proxy_counts(clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts of no_proxy are reached directly."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with StandIn() as service:
        assert send(clients(service.base_url), file_of(SMALL)).answer


# --- the listing -----------------------------------------------------------------------------------------


def test_the_listing_is_asked_for(clients: Clients) -> None:
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


def test_a_listing_may_be_long(clients: Clients) -> None:
    """More of a listing is read than of other answers, and still not without bound."""
    with Server(
        *[answering(http(200, b"x" * size, "Connection: close")) for size in (1_000_000, 9_000_000)]
    ) as server:
        client = clients(server.url())
        attempts = [client.list_files(purpose="batch", limit=1, key=KEY) for _ in range(2)]
    assert [attempt.answer and len(attempt.answer.body) for attempt in attempts] == [1_000_000, 8 * 1024 * 1024]
    assert [attempt.trouble for attempt in attempts] == [None, Trouble.CUT]


def test_a_listing_that_fails(clients: Clients) -> None:
    """A listing meets the same troubles as an upload."""

    def stalling(wire: Wire) -> None:
        wire.read_request()
        wire.read_to_end()

    with Server(answering(b""), stalling, answering(b"?\r\n\r\n")) as server:
        client = clients(server.url(), read_timeout_s=0.3)
        troubles = [client.list_files(purpose="batch", limit=1, key=KEY).trouble for _ in range(3)]
    assert troubles == [Trouble.RESET, Trouble.STALLED, Trouble.CUT]


def test_each_write_says_that_bytes_move(clients: Clients, file_of: Files) -> None:
    """Bytes that the connection takes are told at once, not only when a whole block is out."""
    told: list[str] = []
    with Server(Recorder()) as server:
        send(
            clients(server.url()),
            file_of(BIG),
            progress=lambda _: told.append("block"),
            moved=lambda: told.append("bytes"),
        )
    assert told[:2] == ["bytes", "bytes"]  # the form's head, and the first block
    assert told.count("bytes") >= told.count("block") + 2


def test_nothing_raises_with_a_key_in_its_frames(clients: Clients, file_of: Files) -> None:
    """A callback of the caller that raises leaves through us: as it is, without the key in its traceback."""

    def broken(_sent: int) -> None:
        raise RuntimeError("a bug of the caller")

    with Server(Recorder()) as server, pytest.raises(RuntimeError, match="a bug") as caught:
        send(clients(server.url()), file_of(SMALL), progress=broken)
    assert KEY not in "".join(traceback.format_exception(caught.value))

"""Every way in which an exchange can end, over real sockets; and connections that are kept."""

import contextlib
import itertools
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
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
from uploads import BIG, KEY, LARGE, SMALL, Clients, Files, Recorder, as_werkzeug_reads, pattern, send

from sfwatch.form import BLOCK
from sfwatch.standin import StandIn
from sfwatch.verdict import Answer, Attempt, Trouble
from sfwatch.wire import ANSWER_LIMIT, Incoming, Unread, begins_answer

pytestmark = pytest.mark.usefixtures("plain_environment", "nothing_left_behind")


def test_stop_is_heard_while_nothing_moves(clients: Clients, file_of: Files) -> None:
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


# --- connections -----------------------------------------------------------------------------------------


def test_connections_are_kept(clients: Clients, file_of: Files) -> None:
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


def test_a_connection_closed_at_rest_is_replaced(clients: Clients, file_of: Files) -> None:
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
    clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a service's own idle timeout can cross with a request, a new connection is made."""
    monkeypatch.setattr("sfwatch.wire.IDLE_S", 0.0)
    with Server(Recorder(), Recorder()) as server:
        client = clients(server.url())
        send(client, file_of(SMALL))
        send(client, file_of(SMALL))
    assert len(server.wires) == 2


def test_a_reset_between_two_requests(clients: Clients, file_of: Files) -> None:
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


def test_threads_share_a_client(clients: Clients, file_of: Files) -> None:
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


def test_closing_stops_nobody(clients: Clients, file_of: Files) -> None:
    """Who is about to send when a client closes its connections gets a new one."""
    fds = [file_of(SMALL) for _ in range(3)]
    attempts: list[Attempt] = []
    with StandIn() as service:
        client = clients(service.base_url)
        threads = [
            threading.Thread(target=lambda fd=fd: attempts.extend(send(client, fd) for _ in range(30)))
            for fd in fds
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            client.close()
        for thread in threads:
            thread.join()
    assert [attempt.trouble for attempt in attempts] == [None] * 90


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
    clients: Clients,
    file_of: Files,
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
    clients: Clients,
    file_of: Files,
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


def test_interim_answers_end_nothing(clients: Clients, file_of: Files) -> None:
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


def test_interim_answers_without_end(clients: Clients, file_of: Files) -> None:
    """Who only ever announces an answer is not listened to for ever."""

    def script(wire: Wire) -> None:
        wire.read_head()
        while True:
            wire.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 100)

    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(LARGE))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.STALLED, None, False)


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
    assert begins_answer(data) is final


# --- how answers come ------------------------------------------------------------------------------------


def incoming(said: bytes, pieces: list[int] = [], came: int = 0) -> Incoming:  # noqa: B006 - only read
    """An answer of these bytes, in pieces of these lengths and a last one; `came` of them are there before."""
    ends = list(itertools.accumulate(pieces, initial=came))
    rest = iter([piece for at, end in itertools.pairwise([*ends, len(said)]) if (piece := said[at:end])])
    return Incoming(lambda: next(rest, b""), said[:came], ANSWER_LIMIT)


def in_chunks(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%X;of=%d\r\n%b\r\n" % (len(part), size, part) for part in parts)
    return b"Transfer-Encoding: Chunked\r\n\r\n" + chunks + b"0\r\nDate: never\r\n\r\n"


FRAMINGS: dict[str, Callable[[bytes], bytes]] = {
    "length": lambda body: b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
    "length twice": lambda body: b"content-length:%d \r\n" % len(body) + FRAMINGS["length"](body),
    "chunks": lambda body: in_chunks(body, 7),
    "one chunk": lambda body: in_chunks(body, 1000),
    "close": lambda body: b"\r\n" + body,
    "bare newlines": lambda body: b"Content-Length: %d\n\n%b" % (len(body), body),
}
HEADS = (
    b"HTTP/1.1 103 Early Hints\r\nDate: no\r\n\r\n"
    b"HTTP/1.1 503\r\nRetry-After:7\r\nX-SiliconCloud-Trace-Id: a\r\n b\r\n"
)


@pytest.mark.parametrize("framing", FRAMINGS)
@given(body=st.binary(max_size=100), pieces=st.lists(st.integers(1, 60)), came=st.integers(0, 60))
def test_an_answer_reads_alike_however_it_comes(
    framing: str, body: bytes, pieces: list[int], came: int
) -> None:
    """Pieces, chunks, lengths, folded or repeated headers say the same; only a close ends the connection."""
    answer = incoming(HEADS + FRAMINGS[framing](body), pieces, came)
    answer.read()
    assert answer.answer == Answer(status=503, body=body, retry_after="7", trace_id="a b")
    assert answer.leaves_open is (framing != "close")


@pytest.mark.parametrize("framing", FRAMINGS.keys() - {"close"})
def test_no_part_of_an_answer_is_whole(framing: str) -> None:
    """Whatever tells an answer's length, it is missed when the answer ends before; what came is told."""
    said = HEADS + FRAMINGS[framing](OK_BODY)
    for n in range(len(said)):
        answer = incoming(said[:n])
        with pytest.raises((EOFError, Unread)):
            answer.read()
        assert answer.answer is None or OK_BODY.startswith(answer.answer.body)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: Keep-Alive\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", False),
        (b"HTTP/1.1 204 Nothing\r\n\r\n", True),
        (b"HTTP/1.1 304 As Before\r\nContent-Length: 9\r\n\r\n", True),
    ],
)
def test_which_answers_leave_the_connection_open(said: bytes, kept: bool) -> None:  # noqa: FBT001
    """A connection is used again only after an answer whose end is beyond doubt, and with nothing after it."""
    answer = incoming(said)
    answer.read()
    assert answer.leaves_open is kept


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\nhello\r\n",
        *(
            b"HTTP/1.1 200 OK\r\nContent-Length: %b\r\n\r\n" % n
            for n in (b"", b"-1", b"+1", b"1_0", b"0x1", b"1;")
        ),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-2\r\nab\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http(said: bytes) -> None:
    """Where two readers could understand an answer differently, it is none."""
    with pytest.raises(Unread, match="is no HTTP"):
        incoming(said).read()


@pytest.mark.parametrize("odd", [b"No header", b"A: b\rContent-Length: 0", b"A: \0", b": x"])
def test_a_line_that_is_no_header_costs_the_connection_only(odd: bytes) -> None:
    """What a middlebox puts between the headers is no reason to doubt what the service said."""
    answer = incoming(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n%b\r\nRetry-After: 3\r\n\r\nok" % odd)
    answer.read()
    assert answer.answer
    assert (answer.answer.status, answer.answer.body, answer.answer.retry_after) == (200, b"ok", "3")
    assert not answer.leaves_open


def test_a_blank_before_the_colon_is_no_part_of_the_name() -> None:
    """As old servers write it."""
    answer = incoming(b"HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok")
    answer.read()
    assert answer.answer
    assert answer.answer.body == b"ok"
    assert answer.leaves_open


def test_trailers_without_end(clients: Clients, file_of: Files) -> None:
    """Who never ceases to send, and never ends, is not listened to for ever either."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        while True:
            wire.send(b"X: y\r\n" * 10_000)

    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.STALLED, True)


# --- answers cut short or strange ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_an_answer_cut_at_every_byte(ending: str, status: int, clients: Clients, file_of: Files) -> None:
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
def test_whatever_is_answered_there_is_an_outcome(said: bytes, clients: Clients, file_of: Files) -> None:
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
def test_strange_answers_are_cut(said: bytes, clients: Clients, file_of: Files) -> None:
    """What is no HTTP is told as such, in printable characters."""
    with Server(answering(said)) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CUT, True)
    assert attempt.detail.isprintable()


def test_an_answer_of_boundless_length(clients: Clients, file_of: Files) -> None:
    """Only so much of an answer is kept; the rest is not read, and the status still counts."""
    with Server(answering(http(413, b"x" * (ANSWER_LIMIT + 1)))) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert attempt.answer
    assert (attempt.answer.status, len(attempt.answer.body)) == (413, ANSWER_LIMIT)
    assert attempt.trouble is Trouble.CUT
    assert "longer than" in attempt.detail


def test_an_answer_as_long_as_allowed(clients: Clients, file_of: Files) -> None:
    """An answer of exactly the limit is whole."""
    with Server(answering(http(200, b"x" * ANSWER_LIMIT))) as server:
        attempt = send(clients(server.url()), file_of(SMALL))
    assert attempt.answer
    assert len(attempt.answer.body) == ANSWER_LIMIT
    assert attempt.trouble is None


def test_chunked_and_unbounded_answers_are_read(clients: Clients, file_of: Files) -> None:
    """An answer may come in chunks, or end with the connection."""
    head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n"
    with Server(answering(chunked), answering(b"HTTP/1.0 200 OK\r\n\r\nabcde")) as server:
        client = clients(server.url())
        attempts = [send(client, file_of(SMALL)), send(client, file_of(SMALL))]
    assert [attempt.answer and attempt.answer.body for attempt in attempts] == [b"abcde", b"abcde"]
    assert [attempt.trouble for attempt in attempts] == [None, None]


# --- stalls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nA: b\r\n"], ids=["none", "status", "head"]
)
def test_a_stall_after_the_body(said: bytes, clients: Clients, file_of: Files) -> None:
    """Who has the whole body and says nothing more is waited for no longer than the read timeout."""

    def script(wire: Wire) -> None:
        wire.read_request()
        wire.send(said)
        wire.read_to_end()

    with Server(script) as server:
        attempt = send(clients(server.url(), read_timeout_s=0.3), file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.STALLED, None, True)


def test_a_stall_within_the_answer(clients: Clients, file_of: Files) -> None:
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
def test_an_answer_that_drips(where: str, clients: Clients, file_of: Files) -> None:
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


def test_a_stall_within_the_body(clients: Clients, file_of: Files) -> None:
    """The read timeout holds for a connection that takes no more bytes; the connect timeout does not."""
    with Server(lambda wire: wire.wait_for_close()) as server:
        client = clients(server.url(), connect_timeout_s=100, read_timeout_s=0.3)
        attempt = send(client, file_of(LARGE))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.STALLED, None, False)
    assert "took no more bytes" in attempt.detail


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most writes of a client go out in parts."""

    def new_conn(connection: urllib3.connection.HTTPConnection) -> socket.socket:
        sock = connect(connection)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        return sock

    connect = urllib3.connection.HTTPConnection._new_conn
    monkeypatch.setattr(urllib3.connection.HTTPConnection, "_new_conn", new_conn)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
def test_a_slow_receiver_is_no_stall(
    secure: bool,  # noqa: FBT001
    clients: Clients,
    file_of: Files,
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    small_buffers: None,
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

    pause = threading.Event()
    received: list[tuple[bytes, bytes]] = []
    with Server(script, tls=loopback_tls if secure else None) as server:
        bundle = authority.certificate
        client = clients(server.url(), ca_bundle=bundle, connect_timeout_s=0.3, read_timeout_s=10)
        attempt = send(client, file_of(2 * BIG))
    assert (attempt.trouble, attempt.sent_all, attempt.sent) == (None, True, 2 * BIG)
    assert as_werkzeug_reads(*received[0])[2] == pattern(2 * BIG)


# --- no connection ---------------------------------------------------------------------------------------


def test_a_refused_connection(clients: Clients, file_of: Files) -> None:
    """Nobody listening is told as no connection; the name has resolved."""
    with closed_port() as port:
        client = clients(f"http://127.0.0.1:{port}/v1")
        assert not client.resolved
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.CONNECT, None, False)
    assert attempt.detail == f"no connection to 127.0.0.1:{port}: Connection refused"
    assert client.resolved


def test_a_connection_that_waits_in_a_queue(clients: Clients, file_of: Files) -> None:
    """A host that does not take the connection is given up after the connect timeout, not the read timeout."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as queue:
        for _ in range(4):  # more than the queue holds
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        attempt = send(clients(url, connect_timeout_s=0.3, read_timeout_s=1000), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CONNECT, False)


def test_a_connection_that_is_not_taken(clients: Clients, file_of: Files, loopback_tls: ssl.SSLContext) -> None:
    """A server that takes the connection and never shakes hands is given up after the connect timeout."""
    with Server(lambda wire: wire.read_to_end()) as server:
        client = clients(f"https://127.0.0.1:{server.port}/v1", connect_timeout_s=0.3, read_timeout_s=100)
        attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CONNECT, False)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closes", "plain HTTP"])
def test_a_handshake_that_fails(said: bytes, clients: Clients, file_of: Files) -> None:
    """What speaks no TLS gives no connection."""

    def script(wire: Wire) -> None:
        wire.read(1)
        wire.send(said)
        if said:
            wire.read_to_end()

    with Server(script) as server:
        attempt = send(clients(f"https://127.0.0.1:{server.port}/v1"), file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.CONNECT, None, False)


def test_a_name_that_does_not_resolve(clients: Clients, file_of: Files) -> None:
    """A failed lookup is told apart, and the name counts as never resolved."""
    client = clients("http://nowhere.invalid/v1")
    attempt = send(client, file_of(SMALL))
    assert (attempt.trouble, attempt.answer, attempt.sent_all) == (Trouble.RESOLVE, None, False)
    assert "nowhere.invalid" in attempt.detail
    assert not client.resolved


@pytest.mark.parametrize("case", ["unknown authority", "other name", "expired"])
def test_certificates_that_do_not_verify(
    case: str,
    clients: Clients,
    file_of: Files,
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


# --- proxies ---------------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_forwards(
    clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch
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
    clients: Clients,
    file_of: Files,
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


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_may_speak_tls_itself(
    scheme: str,
    clients: Clients,
    file_of: Files,
    authority: Authority,
    loopback_tls: ssl.SSLContext,
    monkeypatch: pytest.MonkeyPatch,
    small_buffers: None,
) -> None:
    """An https:// proxy forwards, and tunnels TLS within TLS, whatever the size."""
    if scheme == "http":
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))  # the system's trust counts then
    moved: list[bool] = []
    tls = authority.server_context("DNS:files.example") if scheme == "https" else None
    bundle = authority.certificate if tls else None
    with StandIn(tls=tls) as service:
        with Proxy(address_of(service), tls=loopback_tls) as proxy:
            monkeypatch.setenv(f"{scheme}_proxy", proxy.address)
            client = clients(f"{scheme}://files.example/v1", ca_bundle=bundle)
            attempts = [send(client, file_of(size), moved=lambda: moved.append(True)) for size in (10, BIG)]
            client.close()
        assert [file.bytes for file in service.stored] == [10, BIG]
    assert [attempt.answer and attempt.answer.status for attempt in attempts] == [200, 200]
    assert len(proxy.asked) == 1
    assert len(moved) > BIG // BLOCK  # no upload passes for one that hangs


def test_an_early_refusal_through_a_tunnel(
    clients: Clients, file_of: Files, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a refusal leaves of itself is not taken for the proxy's answer to the next CONNECT."""
    tls = authority.server_context("DNS:files.example")
    with Server(refusing(413, ENDINGS["reads on"]), Recorder(), tls=tls) as server:
        with Proxy(("127.0.0.1", server.port)) as proxy:
            monkeypatch.setenv("https_proxy", proxy.address)
            client = clients("https://files.example/v1", ca_bundle=authority.certificate)
            attempts = [send(client, file_of(LARGE)), send(client, file_of(SMALL))]
            client.close()
    assert [attempt.answer and attempt.answer.status for attempt in attempts] == [413, 200]
    assert len(proxy.asked) == 2


def test_a_handshake_that_fails_within_a_tunnel(
    clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy did its part: what speaks no TLS is behind it."""

    def script(wire: Wire) -> None:
        wire.send(b"no TLS\r\n")
        wire.read_to_end()

    with Server(script) as server:
        with Proxy(("127.0.0.1", server.port)) as proxy:
            monkeypatch.setenv("https_proxy", proxy.address)
            client = clients("https://files.example/v1")
            attempt = send(client, file_of(SMALL))
            client.close()
    assert (attempt.trouble, attempt.sent_all) == (Trouble.CONNECT, False)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there(
    scheme: str,
    clients: Clients,
    file_of: Files,
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


def test_a_proxy_that_refuses(clients: Clients, file_of: Files, monkeypatch: pytest.MonkeyPatch) -> None:
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
    clients: Clients,
    file_of: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy setting that can't be followed is never passed over in silence."""
    monkeypatch.setenv("http_proxy", proxy)
    attempt = send(clients("http://files.example/v1"), file_of(SMALL))
    assert (attempt.trouble, attempt.sent_all) == (Trouble.PROXY, False)

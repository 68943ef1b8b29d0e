"""The stand-in answers as the service is documented to, and misbehaves exactly as it is told."""

import hashlib
import http.client
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from sfwatch.standin import (
    Behaviour,
    Listing,
    StandIn,
    answering,
    refusing_early,
    reply,
    resetting,
    storing_then_answering,
    storing_then_resetting,
    storing_then_stalling,
    taking_its_time,
)

BOUNDARY = "xyz"


def form(content: bytes, filename: str = "a.jsonl") -> bytes:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{filename}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def connect(service: StandIn) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(service.base_url.split("/")[2], timeout=30)


def post(
    connection: http.client.HTTPConnection, body: bytes, *, path: str = "/v1/files", key: str = "k"
) -> tuple[int, Any]:
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", "Authorization": f"Bearer {key}"}
    connection.request("POST", path, body, headers)
    return answer(connection)


def get(connection: http.client.HTTPConnection, path: str, *, key: str = "k") -> tuple[int, Any]:
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
    return answer(connection)


def answer(connection: http.client.HTTPConnection) -> tuple[int, Any]:
    response = connection.getresponse()
    body = response.read()
    return response.status, json.loads(body) if body else None


LISTING = "/v1/files?purpose=batch&limit=10"


def test_a_file_is_stored_and_accepted() -> None:
    """The answer to an upload has the documented form, and the stand-in knows what it got."""
    content = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'
    with StandIn(clock=lambda: 1741685396.5) as service:
        connection = connect(service)
        connection.request("GET", "/v1/files?purpose=batch")
        assert connection.getresponse().read()
        status, body = post(connection, form(content, "ü.jsonl"))
        connection.close()
        (stored,) = service.stored
    assert status == 200
    assert stored.id.startswith("file-")
    assert body == {
        "code": 20000,
        "message": "Ok",
        "status": True,
        "data": {
            "id": stored.id,
            "object": "file",
            "bytes": len(content),
            "createdAt": 1741685396,
            "filename": "ü.jsonl",
            "purpose": "batch",
        },
    }
    assert (stored.sha256, stored.lines) == (hashlib.sha256(content).hexdigest(), 2)
    assert (stored.filename, stored.purpose, stored.bytes) == ("ü.jsonl", "batch", len(content))


def test_a_trace_id_comes_with_every_answer() -> None:
    """Each answer has an x-siliconcloud-trace-id of its own, and a Date."""
    with StandIn() as service:
        connection = connect(service)
        traces = []
        for _ in range(2):
            connection.request("GET", LISTING)
            response = connection.getresponse()
            response.read()
            assert response.getheader("Date")
            traces.append(response.getheader("x-siliconcloud-trace-id"))
        connection.close()
    assert len(set(traces)) == 2
    assert all(traces)


def test_the_listing_shows_the_newest_first() -> None:
    """A listing has the documented form, created_at instead of createdAt, and no more than its limit."""
    with StandIn() as service:
        connection = connect(service)
        for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
            post(connection, form(b"x\n", name))
        status, body = get(connection, "/v1/files?purpose=batch&limit=2")
        connection.close()
        newest = service.stored[2]
    assert (status, body["code"], body["data"]["object"]) == (200, 20000, "file")
    assert [entry["filename"] for entry in body["data"]["data"]] == ["c.jsonl", "b.jsonl"]
    assert body["data"]["data"][0] == {
        "id": newest.id,
        "object": "file",
        "bytes": 2,
        "created_at": newest.created_at,
        "filename": "c.jsonl",
        "purpose": "batch",
        "line_count": 1,
    }


def test_a_listing_shows_ten_unless_told() -> None:
    """The documented default of limit is ten."""
    with StandIn() as service:
        connection = connect(service)
        for _ in range(11):
            post(connection, form(b"x\n"))
        _, body = get(connection, "/v1/files?purpose=batch")
        connection.close()
    assert len(body["data"]["data"]) == 10


def test_listings_that_lag_hide_end_or_fail() -> None:
    """A listing may be late, leave out files, be short, or answer something else."""
    now = [1000.0]
    with StandIn(clock=lambda: now[0]) as service:
        connection = connect(service)

        def shown() -> list[str]:
            return [entry["id"] for entry in get(connection, LISTING)[1]["data"]["data"]]

        post(connection, form(b"1\n"))
        now[0] = 1003.0
        post(connection, form(b"2\n"))
        one, two = (file.id for file in service.stored)
        seen = [shown()]
        for listing in (Listing(lag_s=2.0), Listing(longest=1), Listing(hides=frozenset({two}))):
            service.listing = listing
            seen.append(shown())
        service.listing = Listing(answer=reply(404, "404 page not found"))
        failed = get(connection, LISTING)
        connection.close()
    assert seen == [[two, one], [one], [two], [one]]
    assert failed == (404, "404 page not found")


def test_a_wrong_key_is_refused_with_a_bare_string() -> None:
    """401 is a JSON string, for uploads and listings; the key can change at any time."""
    with StandIn(key="k") as service:
        connection = connect(service)
        refused = post(connection, form(b"x\n"), key="old"), get(connection, LISTING, key="old")
        service.key = "old"
        accepted = post(connection, form(b"x\n"), key="old")
        connection.close()
    assert refused == ((401, "Invalid token"), (401, "Invalid token"))
    assert accepted[0] == 200
    assert [seen.authorization for seen in service.requests] == ["Bearer old"] * 3


def test_other_paths_are_not_found() -> None:
    """There are files, and nothing else."""
    with StandIn() as service:
        connection = connect(service)
        assert post(connection, form(b"x\n"), path="/v1/file") == (404, "404 page not found")
        assert get(connection, "/") == (404, "404 page not found")
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        form(b"x\n")[:-2] + b"!!",
        form(b"x\n").replace(b'name="file"; filename="a.jsonl"', b'name="other"'),
        b"--other\r\n",
        b"",
        b"--" + BOUNDARY.encode() + b"\r\n" + b"x" * 100_000,
    ],
    ids=["no end", "no file", "other boundary", "empty", "endless line"],
)
def test_what_is_no_form_is_a_bad_request(body: bytes) -> None:
    """A body that does not parse is a 400 with a code, and nothing is stored."""
    with StandIn() as service:
        connection = connect(service)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        assert connection.sock
        connection.sock.shutdown(socket.SHUT_WR)
        status, told = answer(connection)
        connection.close()
        assert service.stored == []
    assert (status, told["code"]) == (400, 20012)


def test_bodies_are_kept_by_digest(tmp_path: Path) -> None:
    """With a folder to keep them in, the bytes lie there under their SHA-256."""
    content = bytes(range(256)) * 10_000
    with StandIn(keep=tmp_path, digest=False) as service:
        connection = connect(service)
        post(connection, form(content))
        connection.close()
    (kept,) = tmp_path.iterdir()
    assert kept.name == service.stored[0].sha256 == hashlib.sha256(content).hexdigest()
    assert kept.read_bytes() == content


def test_the_script_is_played_in_order() -> None:
    """Each POST takes the next behaviour; without one it is accepted."""
    script = [answering(503, {"code": 50505}), storing_then_answering(502, b""), taking_its_time(0.01)]
    with StandIn(script=script) as service:
        connection = connect(service)
        told = [post(connection, form(b"x\n")) for _ in range(4)]
        connection.close()
    assert [status for status, _ in told] == [503, 502, 200, 200]
    assert told[0][1] == {"code": 50505}
    assert len(service.stored) == 3


def test_a_behaviour_may_wait_for_its_file() -> None:
    """A behaviour with a filename is passed over by the others."""
    bad = Behaviour(stores=False, answer=reply(400, {"code": 20071}), filename="bad.jsonl")
    with StandIn(script=[bad]) as service:
        connection = connect(service)
        told = [post(connection, form(b"x\n", name))[0] for name in ("good.jsonl", "bad.jsonl", "bad.jsonl")]
        connection.close()
    assert told == [200, 400, 200]


def test_what_always_happens_can_be_changed() -> None:
    """`always` is met by every POST that the script says nothing about."""
    with StandIn() as service:
        service.always = answering(429, b"slow down", {"Retry-After": "1"})
        connection = connect(service)
        connection.request(
            "POST", "/v1/files", form(b"x"), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        )
        response = connection.getresponse()
        assert (response.status, response.read(), response.getheader("Retry-After")) == (429, b"slow down", "1")
        connection.close()


@pytest.mark.parametrize(
    ("behaviour", "stored"), [(storing_then_resetting(), 1), (resetting(after=0), 0), (resetting(after=1), 0)]
)
def test_resets(behaviour: Behaviour, stored: int) -> None:
    """The connection is reset, before or after the file is stored."""
    with StandIn(script=[behaviour]) as service:
        connection = connect(service)
        with pytest.raises(ConnectionError):
            post(connection, form(b"x" * 1000))
        connection.close()
        assert len(service.stored) == stored


def test_an_early_refusal_does_not_wait_for_the_body() -> None:
    """The answer comes while most of the body has not been sent."""
    with StandIn(script=[refusing_early(413, {"code": 20042}, after=10)]) as service:
        connection = connect(service)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Content-Type", f"multipart/form-data; boundary={BOUNDARY}")
        connection.putheader("Content-Length", "1000000000")
        connection.endheaders(form(b"x" * 100)[:-20])
        assert answer(connection) == (413, {"code": 20042})
        connection.close()
        assert service.stored == []


def test_a_big_body_with_a_wrong_key_is_not_waited_for() -> None:
    """A wrong key is refused before a big body is read."""
    with StandIn(key="k") as service:
        connection = connect(service)
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Content-Length", "1000000000")
        connection.endheaders()
        assert answer(connection) == (401, "Invalid token")
        connection.close()


def test_a_stall_ends_with_the_stand_in() -> None:
    """A stalled answer holds nothing up when the stand-in is closed."""
    ended: list[BaseException] = []

    def stalled() -> None:
        try:
            post(connection, form(b"x\n"))
        except ConnectionError as error:
            ended.append(error)

    with StandIn(script=[storing_then_stalling()]) as service:
        connection = connect(service)
        thread = threading.Thread(target=stalled)
        thread.start()
        while not service.stored:
            service.closing.wait(0.001)
    thread.join()
    connection.close()
    assert len(ended) == 1

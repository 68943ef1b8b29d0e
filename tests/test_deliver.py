"""One file from claim to done against a real service: not lost, not sent twice, not condemned in doubt."""

import gc
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from servers import closed_port
from world import TARGET, World, a_world, batch, fill, needs_root, sha256, tmpfs

from sfwatch import claim
from sfwatch.filing import StorageError
from sfwatch.job import (
    BackInInbox,
    Condemned,
    Deferred,
    Done,
    Failed,
    Gone,
    Ignored,
    InboxGone,
    NeedsLookUp,
    NoStorage,
    NotTaken,
    Refused,
    Task,
    Unknown,
)
from sfwatch.journal import State, address
from sfwatch.settings import Api, Check, RemoteName
from sfwatch.standin import (
    Behaviour,
    Listing,
    answering,
    refusing_early,
    reply,
    resetting,
    storing_then_answering,
    storing_then_resetting,
    storing_then_stalling,
)
from sfwatch.taken import room
from sfwatch.upload import Client
from sfwatch.verdict import Blame, remote_name, tag_of

X = "x.jsonl"
HTML = b"<html><title>oops</title></html>"
REFUSAL = {"code": 20012, "message": "line 2 is bad", "data": None}


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


@pytest.fixture(autouse=True)
def _no_leaked_descriptors() -> Iterator[None]:
    before = _descriptors()  # among them may be those of earlier tests that are not collected yet
    yield
    if _descriptors() > before:
        gc.collect()  # a response that failed is part of a cycle, and its socket with it
    assert _descriptors() <= before


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def numbers(path: Path) -> tuple[int, int, int, bytes]:
    """What must not change when a file comes back: inode, modification time, mode, bytes."""
    st = path.lstat()
    return st.st_ino, st.st_mtime_ns, st.st_mode, path.read_bytes()


def posts(world: World) -> int:
    return sum(seen.method == "POST" for seen in world.service.requests)


def is_done_once(world: World, data: bytes, name: str = X) -> None:
    """One file in one place, one sidecar with a valid id and the right digest, one upload at the service."""
    assert world.places(name) == ["done"]
    assert (world.inbox.done / name).read_bytes() == data
    assert [stored.sha256 for stored in world.service.stored] == [sha256(data)]
    assert world.sidecar(name)["id"] == world.service.stored[0].id
    assert world.sidecar(name)["sfwatch"]["sha256"] == sha256(data)
    assert world.claimed() == []
    assert world.journal.under_way() == []


# Accepted.


@pytest.mark.parametrize("taken", [X, f"{X}.fileid.json"])
def test_a_name_that_is_taken_when_the_answer_comes_is_passed_over(world: World, taken: str) -> None:
    """What lies in done stays as it is; the file is there under a name with the time in it, and its sidecar."""
    data = batch()
    world.drop(X, data)
    (world.inbox.done / taken).write_bytes(b"somebody's")
    assert isinstance(world.deliver(X), Done)
    assert (world.inbox.done / taken).read_bytes() == b"somebody's"
    name = Path(world.event("file.done")["path"]).name
    assert name != X
    assert (world.inbox.done / name).read_bytes() == data
    assert world.sidecar(name)["id"] == world.service.stored[0].id
    assert world.names(world.inbox.done) == sorted({taken, name, f"{name}.fileid.json"})
    assert world.journal.under_way() == []


def test_an_accepted_file_is_done(world: World) -> None:
    """The file lies in done, unchanged, its sidecar beside it, and the journal knows its id and its tag."""
    data = batch()
    before = numbers(world.drop(X, data))
    tag = tag_of(world.claims_name, X, before[1], sha256(data))
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, data)
    assert numbers(world.inbox.done / X) == before
    assert world.names(world.inbox.done) == [X, f"{X}.fileid.json"]
    sidecar = world.sidecar(X)
    named = remote_name(X, tag=tag)
    assert (sidecar["bytes"], sidecar["filename"], sidecar["purpose"]) == (len(data), named, "batch")
    ours = sidecar["sfwatch"]
    assert (ours["attempts"], ours["lines"], ours["original_name"]) == (1, 3, X)
    assert ours["settled_by"] == "lease"
    assert ours["recovered"] is False
    assert ours["trace_id"].startswith("ti_")
    assert world.journal.known(address(TARGET), [sidecar["id"]])[sidecar["id"]].tag == tag
    assert world.said() == ["upload.started", "upload.accepted", "file.done"]
    assert "repeated" not in world.event("file.done")


def test_only_the_upload_itself_goes_through_the_gate(world: World) -> None:
    """Who waits there has nothing written down yet; who has come through makes way before anything is filed."""
    world.drop(X)
    gate = Gate(world)
    assert isinstance(world.deliver(X, gate=gate, accepted=lambda: gate.seen.append("accepted")), Done)
    assert gate.seen == ["in", [], "out", ["upload.started"], "accepted"]


@dataclass
class Gate:
    """What had been written down when it was entered, and said when it was left."""

    world: World
    seen: list[Any] = field(default_factory=list)

    def __enter__(self) -> None:
        self.seen += ["in", self.world.journal.under_way()]

    def __exit__(self, *_: object) -> None:
        self.seen += ["out", self.world.said()]


def test_an_answer_in_openai_form_is_an_acceptance(world: World) -> None:
    """A compatible gateway answers with the file object at the top level: its id counts."""
    file = {"id": "file-gate", "object": "file", "bytes": 3, "created_at": 1, "filename": X, "purpose": "batch"}
    world.service.script.append(storing_then_answering(200, file))
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == "file-gate"
    assert world.sidecar(X)["object"] == "file"


def test_an_answer_that_names_another_size_or_loses_the_tag_is_told(world: World) -> None:
    """It is warned of; from then on no absence is believed there, until a name has its tag again."""
    data = {"id": "file-odd", "bytes": 1, "filename": "y.jsonl"}
    world.service.script.append(storing_then_answering(200, {"code": 20000, "data": data}))
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    size, name = world.events("upload.mismatch")
    assert "it has 1 bytes of" in size["detail"]
    assert "'y.jsonl'" in name["detail"]
    assert size["level"] == name["level"] == "warning"
    assert not world.journal.names_kept(address(TARGET))
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    assert world.journal.names_kept(address(TARGET))


def test_the_same_bytes_again_are_sent_again(world: World) -> None:
    """A second drop of the same bytes is a second upload that names the first; both files are kept."""
    for _ in range(2):
        world.drop(X)
        assert isinstance(world.deliver(X), Done)
    first, second = world.events("file.done")
    assert second["same_as"] == first["file_id"] != second["file_id"]
    assert len(world.names(world.inbox.done)) == 4
    assert len({stored.filename for stored in world.service.stored}) == 2


def test_an_id_that_is_known_is_written_down_before_anything_follows(world: World) -> None:
    """The acceptance is durable before its sidecar, with such an id too: a crash must not send it again."""
    rows: list[State] = []
    for name in (X, "y.jsonl"):
        world.service.script.append(storing_then_answering(200, {"id": "file-same"}))
        world.drop(name)
        world.when["file.done"] = partial(_note_state, world, name, rows)
        assert isinstance(world.deliver(name), Done)
        assert world.sidecar(name)["id"] == "file-same"
    assert rows == [State.ACCEPTED, State.ACCEPTED]


def _note_state(world: World, name: str, rows: list[State]) -> None:
    rows.append(world.known(name).state)


def test_an_id_that_is_known_may_meet_a_full_disk(world: World) -> None:
    """An acceptance that could not be written down at first is, once there is room, with such an id too."""
    world.service.script.append(storing_then_answering(200, {"id": "file-same"}))
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    world.drop("y.jsonl")
    world.claim("y.jsonl")
    kept = replace(
        world.row("y.jsonl", State.SENDING),
        state=State.ACCEPTED,
        answer={"data": {"id": "file-same"}},
        file_id="file-same",
    )
    assert isinstance(world.deliver("y.jsonl", settled=None, known=kept), Done)
    assert world.places("y.jsonl") == ["done"]
    assert world.journal.under_way() == []


def test_an_id_that_was_looked_up_and_is_another_files_by_now_is_not_taken(world: World) -> None:
    """A full disk kept what was found in a listing: whose the id became meanwhile, that file has it."""
    world.service.script.append(storing_then_answering(200, {"id": "file-same"}))
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    world.drop("y.jsonl", batch(7))
    world.claim("y.jsonl")
    lost = world.row("y.jsonl", State.UNKNOWN)
    kept = replace(
        lost,
        state=State.ACCEPTED,
        answer={"data": {"id": "file-same"}, "recovered": True},
        file_id="file-same",
    )
    assert isinstance(world.deliver("y.jsonl", settled=None, known=kept), NeedsLookUp)
    assert world.places("y.jsonl") == ["claims"]
    assert world.known("y.jsonl").state is State.UNKNOWN


@pytest.mark.parametrize(
    "name", ["a/b/x.jsonl", os.fsdecode(b"caf\xe9.jsonl"), "a\n\"b'.jsonl", "é" * 124 + ".jsonl"]
)
def test_any_name_goes_through(world: World, name: str) -> None:
    """Sub-folders, undecodable bytes, quotes, newlines and 255-byte names: each arrives, and keeps its name."""
    world.drop(name)
    assert isinstance(world.deliver(name), Done)
    assert world.places(name) in (["done"], [])  # a name too long for its sidecar is shortened
    assert len([path for path in world.names(world.inbox.done) if not path.endswith(".json")]) == 1
    assert len(world.service.stored) == 1
    assert world.claimed() == []


def test_the_tag_holds_for_every_attempt(world: World) -> None:
    """Tag and name are those of the first row, whatever the settings say by the next attempt."""
    world.service.script.append(answering(429, "slow down"))
    world.drop("sub/X.JSONL")
    assert isinstance(world.deliver("sub/X.JSONL"), Deferred)
    known = world.known("sub/X.JSONL")
    assert known.remote_name == f"X-{known.tag}.jsonl"
    world.set_uploads(remote_name=RemoteName.ORIGINAL)
    world.reopen()
    assert isinstance(world.deliver("sub/X.JSONL"), Done)
    assert [stored.filename for stored in world.service.stored] == [known.remote_name]
    assert world.names(world.inbox.done) == ["sub/X.JSONL", "sub/X.JSONL.fileid.json"]


# The file's own fault, perhaps.

DETAIL = {"detail": [{"loc": ["body", "file"], "msg": "field required"}]}
JSON_REFUSALS = [
    (400, REFUSAL, Blame.FILE),
    (422, REFUSAL, Blame.FILE),
    (413, {"code": 20042, "message": "too big"}, Blame.FILE),  # larger than all that was accepted
    (400, {"code": 99999, "message": "?"}, Blame.DOUBTED),
    (415, REFUSAL, Blame.DOUBTED),
    (422, DETAIL, Blame.DOUBTED),
]


@pytest.mark.parametrize(("status", "body", "blame"), JSON_REFUSALS)
def test_a_refused_file_waits_for_the_verdict(
    world: World, status: int, body: Mapping[str, Any], blame: Blame
) -> None:
    """The service's refusal is an outcome first: the file stays claimed, and nothing is reported yet."""
    world.service.script.append(answering(status, body))
    world.drop(X)
    outcome = world.deliver(X)
    assert isinstance(outcome, Refused)
    assert (outcome.verdict.blame, outcome.verdict.http_status) == (blame, status)
    assert world.places(X) == ["claims"]
    assert (outcome.known, outcome.known.state) == (world.known(X), State.DOUBTED)
    assert (outcome.known.refusals, outcome.known.unproved) == (1, 0)
    assert world.names(world.inbox.failed) == []


def test_a_413_of_a_size_that_was_accepted_before_is_doubted(world: World) -> None:
    """The service takes files as large as this one: then it may be something else that it refuses."""
    world.drop("larger.jsonl", batch(9))
    assert isinstance(world.deliver("larger.jsonl"), Done)
    world.service.script.append(answering(413, {"message": "too big"}))
    world.drop(X)
    outcome = world.deliver(X)
    assert isinstance(outcome, Refused)
    assert outcome.verdict.blame is Blame.DOUBTED


def test_a_refusal_in_the_words_of_the_listing_is_the_accounts(world: World) -> None:
    """Who is not even shown a list of files is refused for another reason than this file."""
    refusal = {"code": 99999, "message": "account 17 is closed"}
    world.service.script.append(answering(400, refusal))
    world.service.listing = Listing(answer=reply(400, refusal))
    world.drop(X)
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert (outcome.verdict.blame, outcome.verdict.reason) == (Blame.ACCOUNT, "unauthorized")
    assert world.places(X) == ["inbox"]
    assert world.known(X).refusals == 0


def test_three_refusals_with_acceptances_between_prove_a_fault(world: World) -> None:
    """What is counted stands in the row, goes back into the inbox with the file, and outlives a restart."""
    refusal = {"code": 99999, "message": "?"}
    world.drop(X)
    for refusals in (1, 2, 2, 3):
        world.service.script.append(answering(400, refusal))
        outcome = world.deliver(X)
        assert isinstance(outcome, Refused)
        assert outcome.known.refusals == refusals
        assert world.deliver(X, task=Task.GIVE_BACK, settled=None) == BackInInbox()
        world.reopen()
        if outcome.known.attempts != 2:  # between the second and the third nothing is accepted
            name = f"{refusals}.jsonl"
            world.drop(name, batch(word=name))
            assert isinstance(world.deliver(name), Done)


def test_a_condemned_file_is_reported(world: World) -> None:
    """Condemned for what the service said, the file lies in failed with a report that quotes it."""
    world.service.script.append(answering(400, REFUSAL))
    data = batch()
    world.drop(X, data)
    refused = world.deliver(X)
    assert isinstance(refused, Refused)
    condemned = Condemned("refused", refused.verdict.detail, refused.verdict)
    assert world.deliver(X, task=Task.CONDEMN, condemned=condemned) == Failed("refused")
    assert world.places(X) == ["failed"]
    report = world.report(X)
    assert (report["reason"], report["http_status"], report["code"]) == ("refused", 400, 20012)
    assert report["sha256"] == sha256(data)
    assert report["message"] == "line 2 is bad"
    assert world.journal.under_way() == []
    assert world.event("file.failed")["report"] == str(world.inbox.failed / f"{X}.error.json")


def test_a_refused_file_can_go_back(world: World) -> None:
    """If every file is refused alike, it is not the file's fault: it goes back as it was."""
    world.service.script.append(answering(400, REFUSAL))
    before = numbers(world.drop(X))
    assert isinstance(world.deliver(X), Refused)
    assert world.deliver(X, task=Task.GIVE_BACK) == BackInInbox()
    assert numbers(world.inbox.path / X) == before
    known = world.known(X)
    assert (known.state, known.attempts, known.refusals) == (State.WAITING, 1, 1)


def test_a_file_that_is_given_up_is_condemned_from_its_inbox(world: World) -> None:
    """A file that keeps failing is taken from the inbox once more, and lies in failed with the reason."""
    world.service.script.append(answering(429, "slow down"))
    world.drop(X)
    assert isinstance(world.deliver(X), Deferred)
    condemned = Condemned("keeps_failing", "it failed 10 times")
    assert world.deliver(X, task=Task.CONDEMN, condemned=condemned) == Failed("keeps_failing")
    assert world.places(X) == ["failed"]
    assert world.report(X)["attempts"] == 1
    assert posts(world) == 1


def test_a_mended_file_is_not_condemned_for_the_old_one(world: World) -> None:
    """The verdict is on the file that failed: one that came in its place settles anew."""
    world.service.script.append(answering(429, "slow down"))
    world.drop(X)
    world.deliver(X)
    job = world.job(X, task=Task.CONDEMN, condemned=Condemned("keeps_failing", "it failed 10 times"))
    world.drop(X, batch(word="mended"))
    assert world.deliver(job) == BackInInbox()
    assert world.places(X) == ["inbox"]


def test_a_claimed_file_that_was_changed_is_not_condemned_for_what_it_was(world: World) -> None:
    """A refusal of bytes that somebody has mended since, by a link to the claim, condemns nobody."""
    world.service.script.append(answering(400, REFUSAL))
    world.drop(X)
    assert isinstance(world.deliver(X), Refused)
    (world.claims / X).write_bytes(batch(word="mended"))
    outcome = world.deliver(X, task=Task.CONDEMN, condemned=Condemned("refused", "bad"))
    assert outcome == BackInInbox()
    assert (world.inbox.path / X).read_bytes() == batch(word="mended")
    assert isinstance(world.deliver(X), Done)  # no row is in the way of the other file
    is_done_once(world, batch(word="mended"))


def test_a_doubted_file_that_was_changed_is_another_file(world: World) -> None:
    """It goes back when its turn comes, settles anew, and nothing is held against it."""
    world.service.script.extend([answering(415, REFUSAL)] * 2)
    world.drop(X)
    assert isinstance(world.deliver(X), Refused)
    (world.claims / X).write_bytes(batch(word="mended"))
    assert world.deliver(X) == BackInInbox()
    assert posts(world) == 1
    outcome = world.deliver(X)
    assert isinstance(outcome, Refused)
    assert (outcome.known.refusals, outcome.known.attempts) == (1, 1)
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, batch(word="mended"))


FINDINGS = [
    (b'{"custom_id": "1", "body": {}}\n', "messages_missing", 1),
    (batch(1) + b"{not json}\n", "not_json", 2),
    (batch(1) + batch(1), "custom_id_repeated", 2),
    (b"\xef\xbb\xbf" + batch(1), "bom", 1),
    (batch(5001), "too_many_lines", None),
]


@pytest.mark.parametrize(("data", "reason", "line"), FINDINGS)
def test_a_file_with_findings_fails_unsent(world: World, data: bytes, reason: str, line: int | None) -> None:
    """What the local check finds is reported with its line, and nothing of the file goes out."""
    world.drop(X, data)
    assert world.deliver(X) == Failed(reason)
    report = world.report(X)
    assert report["reason"] == reason
    assert line is None or report["line"] == line
    assert (world.inbox.failed / X).read_bytes() == data
    assert world.service.requests == []
    assert world.journal.under_way() == []


@pytest.mark.parametrize(
    ("level", "data"), [(Check.NONE, b"anything \xff\n"), (Check.JSONL, b'{"any": "object"}\n{"other": 1}\n')]
)
def test_less_is_looked_into_on_request(world: World, level: Check, data: bytes) -> None:
    """`check: none` and `jsonl` take what they are told to take, and still tell digest and lines."""
    world.set_inbox(check=level)
    world.drop(X, data)
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, data)
    assert world.sidecar(X)["sfwatch"]["lines"] == data.count(b"\n")


# Not now, or the account's: the file goes back as it was.

PATIENT: list[tuple[Behaviour, Blame, str]] = [
    (answering(401, "Invalid token"), Blame.ACCOUNT, "unauthorized"),
    (answering(402, {"code": 30001, "message": "no balance"}), Blame.ACCOUNT, "balance"),
    (answering(403, {"code": 30001, "message": "no balance"}), Blame.ACCOUNT, "balance"),
    (answering(403, "Forbidden"), Blame.ACCOUNT, "forbidden"),
    (answering(404, "404 page not found"), Blame.ACCOUNT, "not_found"),
    (answering(405, b""), Blame.ACCOUNT, "method"),
    (answering(302, b"", {"Location": "http://127.0.0.1:1/files"}), Blame.ACCOUNT, "redirect"),
    (answering(400, {"code": 20067, "message": "bad purpose"}), Blame.ACCOUNT, "settings"),
    (answering(400, {"code": 20079, "message": "no file"}), Blame.ACCOUNT, "our_fault"),
    (answering(403, HTML), Blame.ACCOUNT, "intermediary"),
    (answering(400, {"code": 20012, "message": "quota exceeded"}), Blame.ACCOUNT, "balance"),
    (answering(425, b""), Blame.NOT_NOW, "too_early"),
    (answering(429, {"message": "TPM limit reached.", "data": None}), Blame.NOT_NOW, "rate_limited"),
    (answering(403, "RPM limit exceeded. Please complete"), Blame.NOT_NOW, "rate_limited"),
    (answering(503, {"code": 50505, "message": "overloaded"}), Blame.NOT_NOW, "overloaded"),
    (answering(503, {"code": 50508, "message": "too busy"}), Blame.NOT_NOW, "overloaded"),
    (answering(503, {"code": 50603, "message": "too busy"}), Blame.NOT_NOW, "overloaded"),
]


@pytest.mark.parametrize(("behaviour", "blame", "reason"), PATIENT)
def test_a_file_that_is_not_at_fault_goes_back(
    world: World, behaviour: Behaviour, blame: Blame, reason: str
) -> None:
    """Same inode, time, mode and bytes; the journal knows the attempt, and the next one succeeds."""
    data = batch()
    before = numbers(world.drop(X, data))
    world.service.script.append(behaviour)
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert (outcome.verdict.blame, outcome.verdict.reason) == (blame, reason)
    assert (outcome.claimed, outcome.attempt) == (False, 1)
    assert world.places(X) == ["inbox"]
    assert numbers(world.inbox.path / X) == before
    assert outcome.known == world.known(X)
    assert (world.known(X).state, world.known(X).unproved) == (State.WAITING, 0)
    assert world.names(world.inbox.failed) == []
    world.reopen()
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, data)
    assert world.sidecar(X)["sfwatch"]["attempts"] == 2


def test_retry_after_is_handed_on(world: World) -> None:
    """A rate limit says how long to wait and slows the target, not the file."""
    world.service.script.append(answering(429, "slow down", {"Retry-After": "17"}))
    world.drop(X)
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.verdict.retry_after_s == 17
    assert outcome.verdict.rate_limited


def test_the_key_goes_nowhere_else(world: World) -> None:
    """A redirect is not followed, so that nobody but the configured host ever sees the key."""
    with a_second_service(world) as other:
        world.service.script.append(answering(302, b"", {"Location": f"{other.service.base_url}/files"}))
        world.drop(X)
        assert isinstance(world.deliver(X), Deferred)
        assert other.service.requests == []


@contextmanager
def a_second_service(world: World) -> Iterator[World]:
    (world.root / "second").mkdir()
    with a_world(world.root / "second") as second:
        yield second


def test_a_wrong_key_is_not_repeated_anywhere(world: World) -> None:
    """A service that echoes the key it refuses can't put it into our log, journal or status."""
    key = world.environ["SILICONFLOW_API_KEY"]
    world.service.script.append(answering(401, {"message": f"Incorrect API key provided: {key}"}))
    world.drop(X)
    outcome = world.deliver(X)
    assert key not in repr(outcome)


def test_an_early_refusal_is_read(world: World) -> None:
    """A service that answers and hangs up while the body goes out is believed: not now, nothing is unknown."""
    world.set_inbox(check=Check.NONE)
    data = b"x" * 20_000_000 + b"\n"
    world.drop(X, data)
    world.service.script.append(refusing_early(401, "Invalid token", after=100_000))
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.verdict.reason == "unauthorized"
    assert world.places(X) == ["inbox"]


def test_a_reset_before_the_end_of_the_body_is_not_now(world: World) -> None:
    """A body that never went out whole can't have been stored: back to the inbox, nothing is looked up."""
    world.set_inbox(check=Check.NONE)
    world.drop(X, b"x" * 20_000_000 + b"\n")
    world.service.script.append(resetting(after=100_000))
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.verdict.reason == "reset"
    assert world.places(X) == ["inbox"]
    assert posts(world) == len(world.service.requests) == 1


def test_a_service_that_cannot_be_reached_is_not_now(world: World) -> None:
    """A refused connection is nobody's fault: the file goes back, and the target is said to be unreachable."""
    with closed_port() as port:
        api = Api(base_url=f"http://127.0.0.1:{port}/v1", allow_plain_http=True)
        world.set_inbox(api=api)
        world.client = Client(api, connections=1, user_agent="t")
        world.drop(X)
        outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.verdict.unreachable
    assert world.places(X) == ["inbox"]


def test_another_file_of_the_name_starts_anew(world: World) -> None:
    """What an earlier file of this name has been through is not held against its successor."""
    world.service.script.extend([answering(429, "slow down")] * 2)
    for word in ("one", "two"):
        world.drop(X, batch(word=word))
        outcome = world.deliver(X)
        assert isinstance(outcome, Deferred)
        assert outcome.attempt == 1
        (world.inbox.path / X).unlink()


# No key.


def test_without_a_key_nothing_is_touched(world: World) -> None:
    """No key: the file stays in its inbox under its name, and nobody is asked anything."""
    world.environ.clear()
    before = numbers(world.drop(X))
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert (outcome.verdict.blame, outcome.verdict.reason) == (Blame.ACCOUNT, "no_key")
    assert (outcome.claimed, outcome.attempt) == (False, 0)
    assert numbers(world.inbox.path / X) == before
    assert world.service.requests == []


def test_pauses_and_suspicions_outlive_a_restart(world: World) -> None:
    """Only pauses that were served add up; what is no file's fault makes none suspect."""
    world.set_inbox(check=Check.NONE)
    world.drop(X, b"x" * 20_000_000 + b"\n")
    for behaviour in (answering(429, "slow down"), resetting(after=100_000), answering(503, {"code": 50505})):
        world.service.script.append(behaviour)
        assert isinstance(world.deliver(X, served_s=10.0), Deferred)
        world.reopen()
    known = world.known(X)
    assert (known.attempts, known.suspicions) == (3, 1)
    assert known.served_s == 20.0  # there was no attempt before the first


# The answer does not say whether it was stored.

UNCLEAR: list[tuple[Behaviour, str]] = [
    (storing_then_resetting(), "reset"),
    (storing_then_answering(500, "oops"), "server_error"),
    (storing_then_answering(503, b"upstream gone"), "server_error"),
    (storing_then_answering(408, b""), "request_timeout"),
    (storing_then_answering(400, HTML), "odd_refusal"),
    (storing_then_answering(413, b"<html>nginx</html>"), "odd_refusal"),
    (storing_then_answering(200, b"\x00garbage"), "unreadable_answer"),
    (storing_then_answering(200, {"code": 20000, "status": False, "data": {"id": "file-no"}}), "odd_success"),
]


@pytest.mark.parametrize(("behaviour", "reason"), UNCLEAR)
def test_an_unclear_answer_keeps_the_file_out_of_reach(world: World, behaviour: Behaviour, reason: str) -> None:
    """It stays claimed, its row says `unknown`, and a further job sends nothing before it was looked up."""
    data = batch()
    world.drop(X, data)
    world.service.script.append(behaviour)
    outcome = world.deliver(X)
    assert isinstance(outcome, Unknown)
    assert outcome.verdict.reason == reason
    assert world.places(X) == ["claims"]
    assert (outcome.known, outcome.known.state) == (world.known(X), State.UNKNOWN)
    assert outcome.known.unproved == 1
    world.reopen()
    assert world.deliver(X) == NeedsLookUp(outcome.known)
    assert world.deliver(X, task=Task.GIVE_BACK) == NeedsLookUp(outcome.known)
    assert posts(world) == 1
    assert isinstance(world.look(X), Done)
    is_done_once(world, data)


def test_silence_after_the_body_is_unclear(tmp_path: Path) -> None:
    """A service that stores and falls silent is given up after `read_timeout`."""
    with a_world(tmp_path, read_timeout_s=0.2) as world:
        world.drop(X)
        world.service.script.append(storing_then_stalling(5.0))
        outcome = world.deliver(X)
        assert isinstance(outcome, Unknown)
        assert outcome.verdict.reason == "stalled"


# Changed, gone, taken.


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(batch(1, word="more"))


def truncate(path: Path) -> None:
    os.truncate(path, 10)


def overwrite(path: Path) -> None:
    """Same size, and the modification time put back: only the bytes tell."""
    st = path.stat()
    path.write_bytes(path.read_bytes().replace(b"hello", b"HELLO"))
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


def rewrite(path: Path) -> None:
    path.write_bytes(batch(word="other"))


CHANGES = [append, truncate, rewrite]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_sent_settles_anew(
    world: World, change: Callable[[Path], None]
) -> None:
    """What was stored is nobody's: its id is remembered as such, and the changed file is sent as a new one."""
    path = world.drop(X)
    world.when_stored = lambda: change(world.claims / X)
    assert world.deliver(X) == BackInInbox()
    orphan = world.service.stored[0].id
    assert world.event("file.changed")["orphans"] == [orphan]
    assert set(world.journal.known(address(TARGET), [orphan])) == {orphan}
    assert world.journal.under_way() == []
    assert world.names(world.inbox.done) == []
    assert world.places(X) == ["inbox"]
    path.write_bytes(batch(word="final"))
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == world.service.stored[1].id
    assert world.sidecar(X)["sfwatch"]["sha256"] == sha256(batch(word="final"))
    assert "same_as" not in world.event("file.done")


@pytest.mark.parametrize("change", [*CHANGES, overwrite])
def test_a_file_that_changed_after_the_check_is_not_completed(
    world: World, change: Callable[[Path], None]
) -> None:
    """Bytes other than those that were checked never become an upload, whatever mtime says."""
    world.drop(X)
    world.when["upload.started"] = lambda: change(world.claims / X)
    outcome = world.deliver(X)
    assert isinstance(outcome, BackInInbox | Deferred)
    assert world.places(X) == ["inbox"]
    assert [stored.sha256 for stored in world.service.stored if stored.sha256 != sha256(batch())] == []
    assert world.names(world.inbox.done) == []
    assert all(known.state is State.WAITING for known in world.journal.under_way())


ENDS = [answering(429, "slow down"), answering(401, "Invalid token"), answering(400, REFUSAL)]


@pytest.mark.parametrize("behaviour", ENDS)
def test_a_file_that_changed_is_not_judged_by_what_was_sent(world: World, behaviour: Behaviour) -> None:
    """A refusal of half-written bytes says nothing of the file: it goes back and settles anew."""
    world.drop(X)
    world.service.script.append(behaviour)
    with ExitStack() as stack:
        world.when["upload.started"] = lambda: stack.enter_context((world.claims / X).open("ab"))
        assert world.deliver(X) == BackInInbox()
    assert world.places(X) == ["inbox"]
    assert all(known.state is State.WAITING for known in world.journal.under_way())
    append(world.inbox.path / X)
    rewrite(world.inbox.path / X)
    assert isinstance(world.deliver(X), Done)


def test_a_writer_that_came_back_is_waited_for(world: World) -> None:
    """Somebody opened it for writing between settling and claim: it goes back, unread and unsent."""
    path = world.drop(X)
    with path.open("ab"):
        assert world.deliver(X) == BackInInbox()
    assert world.places(X) == ["inbox"]
    assert world.service.requests == []
    assert world.journal.under_way() == []


def test_a_file_that_changed_since_it_settled_settles_anew(world: World) -> None:
    """The claim takes what lies there now: if that is not what settled, it goes back."""
    world.drop(X)
    job = world.job(X)
    append(world.inbox.path / X)
    assert world.deliver(job) == BackInInbox()
    assert world.service.requests == []


def test_a_file_that_is_gone_is_gone(world: World) -> None:
    """Somebody took it before we did: nothing is left of it, in the journal neither."""
    world.drop(X)
    world.service.script.append(answering(429, "slow down"))
    world.deliver(X)
    job = world.job(X)
    (world.inbox.path / X).unlink()
    assert world.deliver(job) == Gone()
    assert world.journal.under_way() == []


def test_a_file_that_is_taken_away_while_it_is_sent_keeps_its_id(world: World) -> None:
    """Accepted, and the file is gone: the sidecar is written all the same, and the event says so."""
    data = batch()
    world.drop(X, data)
    world.when_stored = (world.claims / X).unlink
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == world.service.stored[0].id
    assert "taken away" in world.event("file.done")["detail"]
    assert world.names(world.inbox.done) == [f"{X}.fileid.json"]
    assert world.journal.under_way() == []


def test_an_inbox_that_is_away_takes_no_file_along(world: World) -> None:
    """An unmounted inbox is no vanished file: what is known of it is kept until the inbox is back."""
    away = world.root / "away"
    world.drop(X)
    world.service.script.append(answering(429, "slow down"))
    world.deliver(X)
    job = world.job(X)
    world.inbox.path.rename(away)
    assert isinstance(world.deliver(job), InboxGone | NoStorage)
    assert world.known(X).attempts == 1
    away.rename(world.inbox.path)
    assert isinstance(world.deliver(job), Done)


def test_an_inbox_that_goes_away_while_sending_costs_no_upload(world: World) -> None:
    """Accepted while the inbox was unmounted: the answer waits in the journal, and nothing is sent again."""
    data = batch()
    away = world.root / "away"
    world.drop(X, data)
    job = world.job(X)
    world.when_stored = lambda: world.inbox.path.rename(away)
    outcome = world.deliver(job)
    assert isinstance(outcome, InboxGone)
    assert world.known(X).state is State.ACCEPTED
    world.inbox.path.mkdir()  # the empty mount point
    assert isinstance(world.deliver(X), InboxGone)
    world.inbox.path.rmdir()
    away.rename(world.inbox.path)
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, data)


def test_a_namesake_keeps_a_deferred_file_claimed(world: World) -> None:
    """A new file of its name came meanwhile: neither is overwritten, and both are delivered in turn."""
    world.drop(X)
    world.service.script.append(answering(429, "slow down"))
    world.when["upload.started"] = lambda: world.drop(X, batch(word="newcomer"))
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.claimed
    assert outcome.known is not None
    assert world.places(X) == ["inbox", "claims"]
    assert isinstance(world.deliver(X, settled=None, known=outcome.known), Done)
    assert isinstance(world.deliver(X), Done)
    assert [stored.sha256 for stored in world.service.stored] == [
        sha256(batch()),
        sha256(batch(word="newcomer")),
    ]
    assert len(world.names(world.inbox.done)) == 4


def test_a_namesake_delays_a_give_back(world: World) -> None:
    """A claimed file goes home as soon as its name is free there, and not before."""
    before = numbers(world.drop(X))
    world.claim(X)
    world.drop(X, batch(word="newcomer"))
    outcome = world.deliver(X, settled=None, task=Task.GIVE_BACK)
    assert isinstance(outcome, NotTaken)
    assert (outcome.reason, outcome.claimed) == ("namesake", True)
    (world.inbox.path / X).unlink()
    assert world.deliver(X, settled=None, task=Task.GIVE_BACK) == BackInInbox()
    assert numbers(world.inbox.path / X) == before


def test_a_claimed_namesake_is_waited_for(world: World) -> None:
    """A newcomer of the name of a file under way stays in the inbox until that one is through."""
    world.drop(X)
    world.claim(X)
    newcomer = numbers(world.drop(X, batch(word="newcomer")))
    outcome = world.deliver(X)
    assert isinstance(outcome, NotTaken)
    assert (outcome.reason, outcome.claimed) == ("namesake", False)
    assert numbers(world.inbox.path / X) == newcomer


@pytest.mark.parametrize("kind", ["symlink", "fifo", "folder"])
def test_what_is_no_regular_file_is_left_alone(world: World, kind: str) -> None:
    """A link, a pipe or a folder under a matching name is neither moved nor read."""
    path = world.inbox.path / X
    settled = world.job(world.drop("y.jsonl").name).settled
    makes: dict[str, Callable[[], object]] = {
        "symlink": lambda: path.symlink_to("/etc/hostname"),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }
    makes[kind]()
    assert world.deliver(X, settled=settled) == Ignored(kind)
    assert os.path.lexists(path)
    assert world.service.requests == []


def test_a_folder_for_claims_that_others_can_enter_is_not_used(world: World) -> None:
    """If `.sfwatch` is open to others nothing is claimed, and the way to mend it is said."""
    world.drop(X)
    job = world.job(X)
    (world.inbox.path / claim.FOLDER).chmod(0o777)
    outcome = world.deliver(job)
    assert isinstance(outcome, NotTaken)
    assert outcome.reason == "unsafe"
    assert world.places(X) == ["inbox"]


def test_a_folder_for_claims_that_becomes_unsafe_keeps_its_files(world: World) -> None:
    """Opened to others while a file was sent: the file can't go back yet, and is known to be claimed."""
    world.drop(X)
    world.service.script.append(answering(429, "slow down"))
    outer = world.inbox.path / claim.FOLDER
    world.when["upload.started"] = lambda: outer.chmod(0o777)
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred | NotTaken)
    assert outcome.claimed
    outer.chmod(0o700)
    assert world.deliver(X, settled=None, task=Task.GIVE_BACK) == BackInInbox()
    assert world.places(X) == ["inbox"]


# Markers.

OK = f"{X}.ok"


@pytest.fixture(name="marked")
def _marked(world: World) -> World:
    world.set_inbox(settle_marker=".ok")
    world.drop(X)
    world.drop(OK, b"")
    return world


def test_a_marker_goes_along(marked: World) -> None:
    """The producer's marker lies in done beside its file."""
    assert isinstance(marked.deliver(X), Done)
    assert marked.names(marked.inbox.done) == [X, f"{X}.fileid.json", OK]
    assert marked.names(marked.inbox.path) == []


def test_a_marker_comes_back_with_its_file(marked: World) -> None:
    """Not now: file and marker are both back, so that the file settles again."""
    marked.service.script.append(answering(429, "slow down"))
    assert isinstance(marked.deliver(X), Deferred)
    assert marked.names(marked.inbox.path) == [X, OK]
    assert isinstance(marked.deliver(X), Done)


def test_a_marker_stays_if_its_file_cannot_be_taken(marked: World) -> None:
    """The file is gone when its turn comes: its marker is not left among the claims."""
    job = marked.job(X)
    (marked.inbox.path / X).rename(marked.root / "aside")
    assert marked.deliver(job) == Gone()
    assert marked.names(marked.inbox.path) == [OK]
    (marked.root / "aside").rename(marked.inbox.path / X)
    assert isinstance(marked.deliver(X), Done)
    assert marked.names(marked.inbox.done) == [X, f"{X}.fileid.json", OK]


# Stopping.


def test_a_stop_during_the_check_gives_the_file_back(world: World) -> None:
    """Nothing has been sent or written down: the file is in its inbox as it was."""
    before = numbers(world.drop(X, batch(5000)))
    world.stopping = True
    assert world.deliver(X) == BackInInbox()
    assert numbers(world.inbox.path / X) == before
    assert world.journal.under_way() == []
    assert world.service.requests == []


def test_a_stop_at_the_gate_gives_the_file_back(world: World) -> None:
    """Who has waited there for an upload to end begins none any more: nothing is sent or written down."""
    before = numbers(world.drop(X))

    class Stopping(Gate):
        def __enter__(self) -> None:
            world.stopping = True

    assert world.deliver(X, gate=Stopping(world)) == BackInInbox()
    assert numbers(world.inbox.path / X) == before
    assert world.journal.under_way() == []
    assert world.service.requests == []
    assert world.said() == []


def test_a_stop_while_sending_gives_the_file_back(world: World) -> None:
    """Broken off before the last byte: the service can't have it, the row says so, and the file is back."""
    world.set_inbox(check=Check.NONE)
    before = numbers(world.drop(X, b"x" * 20_000_000 + b"\n"))

    def stop() -> None:
        world.stopping = True

    world.when["upload.started"] = stop
    outcome = world.deliver(X)
    assert isinstance(outcome, Deferred)
    assert outcome.verdict.reason == "aborted"
    assert not outcome.claimed
    assert numbers(world.inbox.path / X) == before
    assert (world.known(X).state, world.known(X).unproved) == (State.WAITING, 0)
    assert world.service.stored == []
    world.stopping = False
    world.reopen()
    assert isinstance(world.deliver(X), Done)


def test_a_crash_between_the_row_and_the_way_back_is_mended(world: World) -> None:
    """The row says that the service has nothing of it, the file is still claimed: it is sent from there."""
    data = batch()
    world.drop(X, data)
    world.claim(X)
    world.row(X, State.WAITING)
    assert isinstance(world.deliver(X), Done)
    is_done_once(world, data)
    assert world.sidecar(X)["sfwatch"]["attempts"] == 2


# Folders that do not take files.


@contextmanager
def a_world_with_little_room(root: Path, folder: str = "state") -> Iterator[World]:
    """A world in which one folder is a small disk of its own."""
    with tmpfs(root / folder, "20m"), a_world(root) as world:
        yield world


@needs_root
@pytest.mark.parametrize("folder", ["state", "done", "failed", "inbox"])
def test_without_room_nothing_begins(tmp_path: Path, folder: str) -> None:
    """Room for journal, sidecar and move is made sure of first: nothing is claimed, nothing sent."""
    with a_world_with_little_room(tmp_path, folder) as world:
        before = numbers(world.drop(X))
        job = world.job(X)
        ballast = fill(tmp_path / folder)
        outcome = world.deliver(job)
        assert isinstance(outcome, NoStorage)
        assert (outcome.folder, outcome.reason) == (str(tmp_path / folder), "no_space")
        assert (outcome.claimed, outcome.known) == (False, None)
        assert numbers(world.inbox.path / X) == before
        assert world.service.requests == []
        ballast.unlink()
        assert isinstance(world.deliver(X), Done)


@needs_root
def test_room_is_asked_for_once_a_second(tmp_path: Path) -> None:
    """Not for each of many small files: what is known of it is never older than that."""
    with a_world_with_little_room(tmp_path, "done") as world:
        world.drop(X)
        tools = world.tools()
        assert room(world.job(X), tools) is None
        fill(tmp_path / "done")
        world.now += 0.5
        assert room(world.job(X), tools) is None
        world.now += 0.5
        with pytest.raises(StorageError, match="free"):
            room(world.job(X), tools)


@needs_root
def test_a_file_too_large_for_done_waits_alone(tmp_path: Path) -> None:
    """Where done is another disk the file itself must fit as well; smaller ones go on."""
    with a_world_with_little_room(tmp_path, "done") as world:
        world.set_inbox(check=Check.NONE)
        world.drop(X, b"x" * 6_000_000 + b"\n")
        outcome = world.deliver(X)
        assert isinstance(outcome, NotTaken)
        assert (outcome.reason, outcome.claimed) == ("no_room", False)
        world.drop("small.jsonl")
        assert isinstance(world.deliver("small.jsonl"), Done)


def test_a_missing_done_is_noticed_before_anything_is_sent(world: World) -> None:
    """A done folder that is not there (an unmounted disk) holds the file, and is not made by guesswork."""
    world.drop(X)
    world.inbox.done.rmdir()
    outcome = world.deliver(X)
    assert isinstance(outcome, NoStorage)
    assert (outcome.folder, outcome.reason) == (str(world.inbox.done), "missing")
    assert world.service.requests == []
    assert not world.inbox.done.exists()


@needs_root
def test_a_journal_without_room_lets_nothing_go_out(tmp_path: Path) -> None:
    """`sending` can't be written down: the file goes back, and not one byte of it is sent."""
    with a_world_with_little_room(tmp_path) as world:
        world.set_inbox(check=Check.JSONL)
        before = numbers(world.drop(X, b'{"a": 1}'))
        world.when["file.warning"] = lambda: fill(world.state_dir)
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        assert (outcome.folder, outcome.claimed) == (str(world.state_dir), False)
        assert numbers(world.inbox.path / X) == before
        assert posts(world) == 0


Step = tuple[str, Behaviour | None, State]
STEPS: list[Step] = [
    ("upload.accepted", None, State.ACCEPTED),
    ("upload.started", answering(429, "slow down"), State.WAITING),
    ("upload.started", answering(400, REFUSAL), State.DOUBTED),
    ("upload.started", storing_then_resetting(), State.UNKNOWN),
    ("file.done", None, State.DONE),
]


@needs_root
@pytest.mark.parametrize(("event", "behaviour", "state"), STEPS)
def test_an_outcome_that_cannot_be_written_down_is_kept(
    tmp_path: Path, event: str, behaviour: Behaviour | None, state: State
) -> None:
    """The disk of the journal is full at any step: the outcome stays in memory and the file in one place."""
    with a_world_with_little_room(tmp_path) as world:
        data = batch()
        world.drop(X, data)
        if behaviour is not None:
            world.service.script.append(behaviour)
        made: list[Path] = []
        world.when[event] = lambda: made.append(fill(world.state_dir))
        outcome = world.deliver(X)
        for _ in range(2):
            assert isinstance(outcome, NoStorage), outcome
            assert (outcome.folder, outcome.reason) == (str(world.state_dir), "no_space")
            assert outcome.known is not None
            assert outcome.known.state is state
            assert outcome.claimed is bool(world.claimed()) or world.places(X) == ["done"]
            outcome = world.deliver(X, settled=None, known=outcome.known)
        assert posts(world) == 1
        assert isinstance(outcome, NoStorage)
        made[0].unlink()
        ended: object = world.deliver(X, settled=None, known=outcome.known)
        if state is State.UNKNOWN:
            assert isinstance(ended, NeedsLookUp)
            ended = world.look(X)
        assert isinstance(ended, Done)
        is_done_once(world, data)


@needs_root
def test_a_verdict_that_cannot_be_written_down_is_kept(tmp_path: Path) -> None:
    """`refused` is durable before the report is published; without room the file waits in its claim."""
    with a_world_with_little_room(tmp_path) as world:
        world.drop(X)
        world.claim(X)
        ballast = fill(world.state_dir)
        outcome = world.deliver(X, task=Task.CONDEMN, condemned=Condemned("gave_up", "it took too long"))
        assert isinstance(outcome, NoStorage)
        assert outcome.known is not None
        assert outcome.known.state is State.REFUSED
        assert world.names(world.inbox.failed) == []
        ballast.unlink()
        assert world.deliver(X, known=outcome.known) == Failed("gave_up")
        assert world.places(X) == ["failed"]


@needs_root
def test_an_orphan_that_cannot_be_written_down_is_never_adopted(tmp_path: Path) -> None:
    """Changed while it was sent, and no room to say so: its upload is still not taken for its own."""
    with a_world_with_little_room(tmp_path) as world:
        world.drop(X)
        made: list[Path] = []

        def change() -> None:
            rewrite(world.claims / X)
            made.append(fill(world.state_dir))

        world.when_stored = change
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        made[0].unlink()
        assert isinstance(world.deliver(X, known=outcome.known), NeedsLookUp)
        assert world.look(X) == BackInInbox()
        assert world.names(world.inbox.done) == []
        assert world.event("file.changed")["orphans"] == [world.service.stored[0].id]


def test_an_inbox_mode_is_left_alone(world: World) -> None:
    """What a delivery makes in the inbox is ours alone, and nothing else is changed there."""
    world.drop("sub/x.jsonl")
    before = stat.S_IMODE(world.inbox.path.stat().st_mode)
    assert isinstance(world.deliver("sub/x.jsonl"), Done)
    assert stat.S_IMODE(world.inbox.path.stat().st_mode) == before
    assert stat.S_IMODE((world.inbox.path / claim.FOLDER).stat().st_mode) == 0o700


@needs_root
def test_done_is_said_once_however_long_the_state_folder_is_full(tmp_path: Path) -> None:
    """The row cannot be finished for a while: trying that again says nothing again."""
    with a_world_with_little_room(tmp_path) as world:
        world.drop(X, batch())
        made: list[Path] = []
        world.when["file.done"] = lambda: made.append(fill(world.state_dir))
        outcome = world.deliver(X)
        for _ in range(3):
            assert isinstance(outcome, NoStorage)
            outcome = world.deliver(X, settled=None, known=outcome.known)
        made[0].unlink()
        assert isinstance(outcome, NoStorage)
        assert isinstance(world.deliver(X, settled=None, known=outcome.known), Done)
        assert len(world.events("file.done")) == 1

"""What became of an upload, and of a claim that was found again: from the listing, or from nothing at all.

The service is the stand-in, over real sockets. What one job does stands here; whole histories through the loop
are in `test_lost_answers.py`, apart from those in which something else goes wrong meanwhile.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import Loop
from world import TARGET, World, a_world, batch, sha256

from sfwatch.delivery.recovery import NoListing, Wait, look_up, next_step, probe
from sfwatch.job import (
    BackInInbox,
    Condemned,
    Deferred,
    Done,
    Failed,
    Gone,
    NeedsLookUp,
    NotTaken,
    Resend,
    Task,
    Undecided,
    Unknown,
)
from sfwatch.journal import Delivery, State, address
from sfwatch.service.listing import (
    Absent,
    Entry,
    Found,
    Inconclusive,
    Reading,
    SizeDiffers,
    Unproven,
)
from sfwatch.settings import Api, OnUnknown, Uploads
from sfwatch.standin import (
    Behaviour,
    End,
    Listing,
    StandIn,
    answering,
    reply,
    storing_then_resetting,
)
from sfwatch.verdict import Blame

X = "x.jsonl"
NO_LISTING = Listing(answer=reply(404, "404 page not found"))
NOT_STORED = Behaviour(stores=False, end=End.RESET)


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


def posts(world: World) -> int:
    return sum(seen.method == "POST" for seen in world.service.requests)


def lose(
    world: World, behaviour: Behaviour | None = None, name: str = X, data: bytes | None = None
) -> Delivery:
    """Upload a file whose answer gets lost; by default it is stored."""
    world.drop(name, data)
    world.service.script.append(behaviour or storing_then_resetting())
    outcome = world.deliver(name)
    assert isinstance(outcome, Unknown)
    return outcome.known


def resume(world: World, **changes: Any) -> object:
    """What a start does with a claim, or a row, that it finds."""
    return world.deliver(X, task=Task.RESUME, settled=None, **changes)


def rewrite(path: Path) -> None:
    path.write_bytes(batch(word="other"))


# Looking up.


def test_one_look_up_serves_all_files_and_reads_on_until_it_knows(world: World) -> None:
    """Page after page, each begins with the last entry of the one before; the first need not be read again."""
    lost = [lose(world, name=f"{n}.jsonl", data=batch(word=f"{n}")) for n in range(2)]
    for n in range(5):
        world.drop(f"later-{n}.jsonl")
        assert isinstance(world.deliver(f"later-{n}.jsonl"), Done)
    world.service.listing = Listing(longest=3)
    before = len(world.service.requests)
    looked = look_up(world.inbox, world.tools(), {known.tag or "": known for known in lost}, 0.0)
    assert looked.fault is None
    ids = [stored.id for stored in world.service.stored]
    found = [looked.readings[known.tag or ""] for known in lost]
    assert [reading.entry.id for reading in found if isinstance(reading, Found)] == ids[:2]
    asked = [seen.path.partition("after=")[2] for seen in world.service.requests[before:]]
    assert asked == ["", ids[5], ids[3]]


def test_a_target_that_is_gone_is_not_asked_for_its_files(world: World) -> None:
    """What was sent elsewhere is no absence here; the other files are looked up all the same."""
    elsewhere = replace(lose(world), target="other.example (environment X)")
    alone = look_up(world.inbox, world.tools(), {"a": elsewhere}, 0.0)
    assert (alone.readings, posts(world)) == ({"a": Inconclusive("other_target")}, len(world.service.requests))
    here = lose(world, name="y.jsonl")
    both = look_up(world.inbox, world.tools(), {"a": elsewhere, here.tag or "": here}, 0.0)
    assert both.readings["a"] == Inconclusive("other_target")
    assert isinstance(both.readings[here.tag or ""], Found)


def limited_after_the_first_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing of two a page, in which only the first page is to be had."""
    world.service.listing = Listing(longest=2)
    listed = world.service.listed

    def once(limit: int, after: str | None = None) -> Any:
        answer = listed(limit, after)
        world.service.listing = replace(
            world.service.listing, answer=reply(429, "slow down", {"Retry-After": "7"})
        )
        return answer

    monkeypatch.setattr(world.service, "listed", once)


def test_a_rate_limit_on_a_later_page_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is asked for again after the pause that the service names; nothing is begun anew."""
    known = lose(world)
    for n in range(3):
        lose(world, name=f"{n}.jsonl")
    slept: list[float] = []

    def sleep(pause_s: float) -> None:
        slept.append(pause_s)
        world.service.listing = Listing(longest=2)

    limited_after_the_first_page(world, monkeypatch)
    looked = look_up(world.inbox, world.tools(sleep=sleep), {known.tag or "": known}, 0.0)
    assert isinstance(looked.readings[known.tag or ""], Found)
    assert looked.fault is None
    assert set(slept) == {7.0}


def test_a_rate_limit_that_stays_leaves_the_rest_open(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a page showed counts, what none showed is no absence, and the target is told."""
    older = lose(world)
    lose(world, name="between.jsonl")
    newer = lose(world, name="y.jsonl")
    limited_after_the_first_page(world, monkeypatch)
    looked = look_up(world.inbox, world.tools(), {k.tag or "": k for k in (older, newer)}, 0.0)
    assert looked.fault is not None
    assert looked.fault.rate_limited
    assert looked.readings[older.tag or ""] == Inconclusive("partial_listing")
    assert isinstance(looked.readings[newer.tag or ""], Found)


@pytest.mark.parametrize("trouble", ["no key", 401, 429, 502])
def test_a_listing_that_cannot_be_had_says_nothing(world: World, trouble: str | int) -> None:
    """The fault is the target's."""
    known = lose(world)
    if isinstance(trouble, str):
        world.environ.clear()
    else:
        world.service.listing = Listing(answer=reply(trouble, "no"))
    before = len(world.service.requests)
    looked = look_up(world.inbox, world.tools(), {known.tag or "": known}, 0.0)
    assert (looked.readings, looked.fault is not None) == ({}, True)
    assert len(world.service.requests) - before == (trouble != "no key")


def test_a_service_without_a_listing(world: World) -> None:
    """That is no fault, and no absence either."""
    known = lose(world)
    world.service.listing = NO_LISTING
    looked = look_up(world.inbox, world.tools(), {known.tag or "": known}, 0.0)
    assert (looked.readings, looked.fault) == ({known.tag: NoListing()}, None)


def test_a_probe_reads_the_key_anew(world: World, tmp_path: Path) -> None:
    """A held target is asked for a listing, with the key as it stands in its file now."""
    key_file = tmp_path / "key"
    world.set_inbox(api=replace(world.inbox.api, key_file=key_file))
    assert probe(world.inbox, world.tools()).reason == "no_key"
    key_file.write_text("sk-wrong-wrong-wrong")
    assert probe(world.inbox, world.tools()).reason == "unauthorized"
    assert world.service.key is not None
    key_file.write_text(world.service.key)
    assert probe(world.inbox, world.tools()).blame is Blame.ACCEPTED
    key_file.unlink()


# What follows: a table.

FOUND = Found(Entry("file-a", 1, 1.0, "x", {}), ())
HOLD = Uploads(on_unknown=OnUnknown.HOLD)
NEXT: list[tuple[Reading | NoListing, bool, Uploads, int, str]] = [
    (FOUND, False, Uploads(), 0, "found"),
    (Absent("whole"), False, Uploads(), 0, "wait"),
    (Absent("order"), True, Uploads(), 0, "proved"),
    (Absent("order"), True, HOLD, 9, "proved"),  # `on_unknown` is for what can't be known
    (Unproven(), False, Uploads(), 0, "wait"),
    (Unproven(), True, Uploads(), 1, "unproved"),
    (Unproven(), True, Uploads(), 2, "nothing_listed"),
    (NoListing(), True, Uploads(), 0, "unproved"),
    (NoListing(), True, Uploads(resend_limit=0), 0, "no_listing"),
    (NoListing(), True, HOLD, 0, "no_listing"),
    (SizeDiffers(("file-a",)), False, Uploads(), 0, "size_differs"),
    (Inconclusive("names_rewritten"), False, Uploads(), 0, "wait"),
    (Inconclusive("names_rewritten"), True, Uploads(), 0, "names_rewritten"),
    (Inconclusive("other_target"), False, Uploads(), 0, "other_target"),
]


@pytest.mark.parametrize(("reading", "ripe", "uploads", "resends", "then"), NEXT)
def test_what_a_reading_allows(
    reading: Reading | NoListing,
    ripe: bool,  # noqa: FBT001
    uploads: Uploads,
    resends: int,
    then: str,
) -> None:
    """A match counts at once, an absence after its time; every other doubt is held, but for two kinds."""
    known = Delivery("/in", X, State.UNKNOWN, 1, 2, 3, 4, resends=resends, target=TARGET)
    step = next_step(reading, known, uploads, ripe=ripe, until=60.0)
    if isinstance(step, Wait):
        assert (step.held or "wait") == then
        assert step.candidates == (reading.ids if isinstance(reading, SizeDiffers) else ())
    elif isinstance(step, Resend):
        assert (step.proved, step.until, step.request) == (then == "proved", 60.0, None)
        assert then in {"proved", "unproved"}
    else:
        assert (step, then) == (reading, "found")


# Claims and rows that were found again.


def test_a_claim_without_a_row_of_our_own_journal_was_never_sent(world: World) -> None:
    """One look-up, as for every claim that was found; then it settles again. Nothing is written down."""
    before = world.drop(X).lstat()
    world.claim(X)
    outcome = resume(world)
    assert isinstance(outcome, NeedsLookUp)
    assert (outcome.known.state, outcome.known.row) == (State.WAITING, None)
    assert world.journal.under_way() == []
    assert world.deliver(X, task=Task.GIVE_BACK, settled=None) == BackInInbox()
    assert (world.inbox.path / X).lstat().st_ino == before.st_ino
    assert world.service.requests == []


@pytest.mark.parametrize("is_past_known", [True, False])
def test_a_claim_whose_row_is_lost_is_found_by_its_tag(world: World, is_past_known: bool) -> None:  # noqa: FBT001
    """The tag is computed again from the claim."""
    known = lose(world)
    world.journal.forget(known)
    outcome = resume(world, is_past_known=is_past_known)
    assert isinstance(outcome, NeedsLookUp)
    assert outcome.known.tag == known.tag
    looked = look_up(world.inbox, world.tools(), {known.tag or "": outcome.known}, 0.0)
    found = looked.readings[known.tag or ""]
    assert isinstance(found, Found)
    assert isinstance(world.deliver(X, settled=None, known=outcome.known, found=found), Done)
    assert world.sidecar(X)["id"] == world.service.stored[0].id
    assert world.sidecar(X)["sfwatch"]["recovered"] is True
    assert posts(world) == 1


def test_a_claim_of_another_journal_is_unknown(world: World) -> None:
    """It may have been sent: that is written down, and an absence has to be proved."""
    world.drop(X)
    world.claim(X)
    outcome = resume(world, is_past_known=False)
    assert isinstance(outcome, NeedsLookUp)
    assert outcome.known == world.known(X)
    assert (outcome.known.state, outcome.known.unproved) == (State.UNKNOWN, 1)
    assert isinstance(world.look(X), Wait)
    assert isinstance(world.look(X, ripe=True), Done)  # there is no other upload to show: sent without proof
    assert posts(world) == 1


def test_a_claim_that_is_written_to_is_not_judged(world: World) -> None:
    """Its tag is not known yet, and neither is what became of it: it stays claimed."""
    world.drop(X)
    world.claim(X)
    with (world.claims / X).open("ab"):
        outcome = resume(world, is_past_known=False)
    assert outcome == NotTaken("being_written", "a process has the claimed file open for writing", claimed=True)
    world.stopping = True
    assert isinstance(resume(world, is_past_known=False), NotTaken)
    assert world.places(X) == ["claims"]
    assert world.service.requests == []


def test_a_row_without_a_tag_waits_for_a_person(world: World, tmp_path: Path) -> None:
    """An earlier version sent it. The request is used up with the first byte, and the new name has a tag."""
    world.drop(X)
    world.claim(X)
    known = world.row(X, State.UNKNOWN, tag=None, remote_name=X, sha256=None)
    outcome = resume(world, known=known)
    assert isinstance(outcome, Undecided)
    assert outcome.reason == "no_tag"
    assert posts(world) == 0
    request = tmp_path / "request"
    request.touch()
    asked = Resend("a person asked for it", request="r1", file=request)
    world.stopping = True
    assert isinstance(world.deliver(X, settled=None, known=known, resend=asked), NeedsLookUp)
    world.stopping = False
    assert isinstance(world.deliver(X, settled=None, known=known, resend=asked), Done)
    assert not request.exists()
    known_by = world.journal.known(address(TARGET), [world.sidecar(X)["id"]])
    (upload,) = known_by.values()
    assert upload.tag is not None
    assert upload.tag in world.service.stored[0].filename


@pytest.mark.parametrize("state", [State.SENDING, State.UNKNOWN])
def test_a_claim_that_a_power_cut_undid_is_taken_again(world: World, state: State) -> None:
    """The row is there and the file is back in its inbox: it is claimed, and looked up."""
    known = world.journal.save(replace(lose(world), state=state))
    (world.claims / X).rename(world.inbox.path / X)
    world.reopen()
    assert resume(world) == NeedsLookUp(replace(known, state=State.UNKNOWN))
    assert world.places(X) == ["claims"]
    assert isinstance(world.look(X), Done)
    assert posts(world) == 1


def test_a_newcomer_in_place_of_an_undone_claim_is_left_alone(world: World) -> None:
    """Another file has the name of a lost one: the upload is recorded, the newcomer is not touched."""
    data = batch()
    known = lose(world, data=data)
    (world.claims / X).unlink()
    newcomer = world.drop(X, batch(word="newcomer")).lstat()
    assert resume(world, known=known) == NeedsLookUp(known)
    assert isinstance(world.look(X), Done)
    assert (world.inbox.path / X).lstat() == newcomer
    assert world.names(world.inbox.done) == [f"{X}.fileid.json"]
    assert world.sidecar(X)["sfwatch"]["sha256"] == sha256(data)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("state", [State.DONE, State.FAILED])
def test_a_move_that_a_power_cut_undid_is_done_again(world: World, state: State, later: bool) -> None:  # noqa: FBT001
    """The finished row has its tag and numbers: nothing is sent, and the event is a repetition.

    A later file of its name that waits for a retry is in nobody's way.
    """
    folder, event = world.inbox.done, "file.done"
    world.drop(X)
    if state is State.DONE:
        assert isinstance(world.deliver(X), Done)
    else:
        folder, event = world.inbox.failed, "file.failed"
        assert isinstance(world.deliver(X, task=Task.CONDEMN, condemned=Condemned("gave_up", "?")), Failed)
    if later:
        world.drop(X, batch(word="later"))
        world.service.script.append(answering(429, "slow down"))
        assert isinstance(world.deliver(X), Deferred)
    sent = posts(world)
    (folder / X).rename(world.claims / X)
    world.reopen()
    assert isinstance(resume(world), Done | Failed)
    assert world.places(X) == [*(["inbox"] if later else []), folder.name]
    assert [said.get("repeated") for said in world.events(event)] == [None, True]
    assert len(world.names(folder)) == 2
    assert posts(world) == sent
    assert world.journal.under_way() == []


def test_the_same_bytes_in_another_file_are_not_the_finished_one(world: World) -> None:
    """The same name, time and bytes, but a copy: it is looked up as any claim."""
    world.drop(X)
    assert isinstance(world.deliver(X), Done)
    done = (world.inbox.done / X).stat()
    (world.claims / X).write_bytes(batch())
    os.utime(world.claims / X, ns=(done.st_mtime_ns, done.st_mtime_ns))
    assert isinstance(resume(world), NeedsLookUp)


def test_neither_claim_nor_row_is_nothing(world: World) -> None:
    """The listing of claims is a hint: such a job ends without an event."""
    assert resume(world) == Gone(quiet=True)


# Taking over, and sending again.


def test_of_several_uploads_of_one_file_the_newest_counts(world: World) -> None:
    """The others are orphans, and their ids are nobody else's."""
    known = lose(world)
    asked = Resend("a person asked for it", request="r1")
    world.service.script.append(storing_then_resetting())
    world.now += 5
    assert isinstance(world.deliver(X, settled=None, known=known, resend=asked), Unknown)
    older, newer = (stored.id for stored in world.service.stored)
    assert isinstance(world.look(X), Done)
    assert world.sidecar(X)["id"] == newer
    assert world.event("upload.recovered")["orphans"] == [older]
    assert set(world.journal.known(address(TARGET), [older, newer])) == {older, newer}


def test_a_changed_file_is_not_taken_for_what_was_sent(world: World) -> None:
    """Found, and changed since: the upload is an orphan in nobody's sidecar, and the file settles anew."""
    lose(world)
    orphan = world.service.stored[0].id
    rewrite(world.claims / X)
    assert world.look(X) == BackInInbox()
    assert world.event("file.changed")["orphans"] == [orphan]
    assert set(world.journal.known(address(TARGET), [orphan])) == {orphan}
    assert world.journal.under_way() == []
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == world.service.stored[1].id


@pytest.mark.parametrize("listing", [Listing(), NO_LISTING])
def test_a_changed_file_is_not_sent_again_as_what_it_was(world: World, listing: Listing) -> None:
    """With a proof or without one: it goes back, and nothing of it goes out before it has settled."""
    lose(world, NOT_STORED)
    rewrite(world.claims / X)
    world.service.listing = listing
    assert world.look(X, ripe=True) == BackInInbox()
    assert posts(world) == 1
    assert world.journal.under_way() == []


def test_an_upload_whose_file_is_gone_keeps_its_id(world: World) -> None:
    """Found: its sidecar is written all the same. Absent: it is gone, and that is said."""
    lose(world)
    (world.claims / X).unlink()
    assert isinstance(world.look(X), Done)
    assert world.sidecar(X)["id"] == world.service.stored[0].id
    lose(world, NOT_STORED, name="y.jsonl")
    (world.claims / "y.jsonl").unlink()
    assert world.look("y.jsonl", ripe=True) == Gone()
    assert world.journal.under_way() == []


@pytest.mark.parametrize("trouble", ["stale", "no key", "open"])
def test_nothing_is_sent_again_on_a_proof_that_does_not_hold(world: World, trouble: str) -> None:
    """Too old, no key, or a writer has come: it is looked up again, and stays claimed."""
    known = lose(world, NOT_STORED)
    proof = Resend("absent", proved=True, until=world.now - 1 if trouble == "stale" else world.now)
    if trouble == "no key":
        world.environ.clear()
    with (world.claims / X).open("ab") if trouble == "open" else (world.claims / X).open("rb"):
        assert world.deliver(X, settled=None, known=known, resend=proof) == NeedsLookUp(known)
    assert posts(world) == 1
    assert world.places(X) == ["claims"]


@pytest.mark.parametrize("proved", [True, False])
def test_a_plain_no_frees_a_file_only_if_no_earlier_attempt_is_open(world: World, proved: bool) -> None:  # noqa: FBT001
    """The first attempt may still turn up: then a later "not now" does not put the file back into reach."""
    known = lose(world, NOT_STORED)
    world.service.script.append(answering(429, "slow down"))
    outcome = world.deliver(X, settled=None, known=known, resend=Resend("?", proved=proved))
    assert isinstance(outcome, Unknown) is not proved
    assert world.places(X) == (["inbox"] if proved else ["claims"])
    now = world.known(X)
    assert (now.state, now.unproved) == ((State.WAITING, 0) if proved else (State.UNKNOWN, 1))
    assert now.resends == 0  # it was plainly not taken
    assert (now.tag, now.remote_name) == (known.tag, known.remote_name)


# Through the loop: what else may go wrong meanwhile.

Make = Callable[[], Loop]


@pytest.fixture(name="make")
def _make(tmp_path: Path) -> Iterator[Make]:
    """Loops with one file done, so that the listing has something to show; their promises are checked."""
    with StandIn() as service:
        made: list[Loop] = []

        def make() -> Loop:
            loop = Loop(tmp_path, service, api=Api(base_url=service.base_url, read_timeout_s=5.0))
            made.append(loop.start())
            loop.drop("a", "first.jsonl")
            loop.look().run(40)
            return loop

        yield make
        for loop in made:
            loop.close()


def fail_once(loop: Loop, monkeypatch: pytest.MonkeyPatch, state: State, attempt: int) -> list[Delivery]:
    """The disk of the journal is full when the row of this attempt turns into this state."""
    journal, failed = loop.daemon.journal, list[Delivery]()
    save = journal.save

    def full(delivery: Delivery) -> Delivery:
        if (delivery.state, delivery.attempts) == (state, attempt) and not failed:
            failed.append(delivery)
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(delivery)

    monkeypatch.setattr(journal, "save", full)
    return failed


def test_the_time_of_an_absence_begins_anew_though_the_row_was_not_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second attempt was stored and the listing lags: that the first was long ago proves nothing."""
    loop = make()
    loop.service.listing = Listing(lag_s=20)
    loop.service.script.extend([NOT_STORED, storing_then_resetting()])
    failed = fail_once(loop, monkeypatch, State.UNKNOWN, 2)
    loop.drop("a", X)
    loop.look().run(600)
    assert len(failed) == 1
    assert loop.done("a") == ["first.jsonl", X]
    assert len(loop.service.stored) == 2


def test_a_file_that_is_back_is_not_looked_up_any_more(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was unknown once, was refused plainly since, and meets a full disk: it has not vanished."""
    loop = make()
    loop.service.script.extend([NOT_STORED, answering(429, "slow down")])
    failed = fail_once(loop, monkeypatch, State.SENDING, 3)
    loop.drop("a", X)
    loop.look().run(600)
    assert len(failed) == 1
    assert not loop.said("file.vanished")
    assert loop.done("a") == ["first.jsonl", X]


def test_a_claim_that_may_have_been_sent_is_not_given_back_while_it_is_written(make: Make) -> None:
    """The journal was lost, and somebody has the claimed file open: a copy in the inbox would be sent twice."""
    loop = make()
    loop.service.script.append(storing_then_resetting())
    loop.drop("a", X)
    loop.look().run(0.5)
    while not loop.said("upload.unknown"):
        loop.run(0.5)
    loop.die()
    for path in (loop.root / "state").glob("journal*"):
        path.unlink()
    claimed = loop.inbox_of("a") / ".sfwatch"
    (path,) = claimed.glob(f"*/{X}")
    with path.open("ab"):
        loop.start().run(60)
        assert loop.claims("a") == [X]
    loop.run(900)
    assert loop.done("a") == ["first.jsonl", X]
    assert len(loop.service.stored) == 2

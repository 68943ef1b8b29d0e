"""Claims that are found again, in the whole daemon: whose they are, what is known of them, what is sent."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from loop import Loop
from world import STAMP, needs_root, tmpfs

from sfwatch import claim, retry
from sfwatch.commands.adopt import adopt
from sfwatch.delivery import identity
from sfwatch.journal import Delivery, SqliteJournal, State
from sfwatch.settings import OnUnknown, Uploads
from sfwatch.standin import Behaviour, Listing, StandIn, answering, storing_then_resetting

X = "x.jsonl"
Y = "y.jsonl"
BUSY = answering(503, {"code": 50505, "message": "busy"})
NOTHING_SHOWN = Listing(lag_s=1e9)


@pytest.fixture(name="loop")
def _loop(tmp_path: Path) -> Iterator[Loop]:
    with StandIn() as service, closing(Loop(tmp_path, service)) as loop:
        yield loop


def folders(loop: Loop, inbox: str = "a") -> dict[str, list[str]]:
    return claim.folders(loop.inbox_of(inbox))


def row(loop: Loop, name: str = X, inbox: str = "a") -> Delivery:
    known = loop.row(inbox, name)
    assert known is not None
    return known


def lose(loop: Loop, name: str = X, *, seconds: float = 2.1) -> str:
    """Upload a file whose answer is lost and which no listing shows yet; return its claims folder."""
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = NOTHING_SHOWN
    loop.drop("a", name)
    loop.look().run(seconds)
    assert row(loop, name).state is State.UNKNOWN
    return loop.claims_folder("a")


def become_another(loop: Loop, state_dir: str = "another") -> None:
    """End the daemon; the next one has another state folder, and is another instance."""
    loop.die()
    loop.config = {**loop.config, "state_dir": loop.root / state_dir}


def claimed_by_another(loop: Loop, name: str = X) -> str:
    """A daemon that is gone claimed a file and sent nothing of it; return its claims folder."""
    loop.start()
    loop.drop("a", name)
    loop.claim("a", name)
    folder = next(folder for folder, names in folders(loop).items() if name in names)
    become_another(loop)
    return folder


def look_ups(loop: Loop) -> int:
    """How many listings were begun; each may have several pages."""
    return sum(seen.method == "GET" and "after=" not in seen.path for seen in loop.service.requests)


# Claims of another instance.


def test_the_claims_of_another_instance_are_adopted_in_place(loop: Loop) -> None:
    """The lock is free and the disk is local: they are looked up by the tag of that claims folder, and done."""
    loop.start()
    theirs = lose(loop)
    become_another(loop)
    loop.start().run(5)
    known = row(loop)
    assert (known.state, known.claims) == (State.UNKNOWN, theirs)
    assert known.tag is not None
    assert known.tag in loop.service.stored[0].filename
    assert folders(loop) == {theirs: [X]}
    loop.service.listing = Listing()
    loop.run(60)
    assert loop.done("a") == [X]
    assert loop.posts() == 1
    assert [(e["file"], e["file_id"]) for e in loop.said("upload.recovered")] == [
        (X, loop.service.stored[0].id)
    ]
    assert loop.said("claim.foreign") == []
    assert folders(loop) == {theirs: []}
    assert claim.owner_of(loop.inbox_of("a"), theirs) is not None


@pytest.mark.parametrize("earlier", [0, 2])
def test_what_another_instance_claimed_is_absent_only_where_a_listing_proves_it(
    loop: Loop, earlier: int
) -> None:
    """It may have been sent after all that we know of: earlier uploads in a stale listing prove nothing."""
    loop.config = {"state_dir": loop.root / "another"}
    loop.uploads = Uploads(on_unknown=OnUnknown.HOLD)
    loop.start()
    for number in range(earlier):
        loop.drop("a", f"{number}.jsonl")
        loop.look().run(5)
    loop.die()
    loop.config = {}
    theirs = claimed_by_another(loop)
    loop.service.listing = Listing(hides=frozenset(stored.id for stored in loop.service.stored[-1:]))
    loop.start().run(3600)
    assert (loop.posts(), loop.claims("a")) == (earlier, [X])
    assert len(loop.said("upload.undecided")) == 1
    loop.drop("a", Y)
    loop.look().run(600)
    assert {X, Y} <= set(loop.done("a"))
    assert loop.posts() == earlier + 2
    assert folders(loop)[theirs] == []
    assert len(loop.said("upload.undecided")) == 1


def test_claims_that_another_process_works_on_are_left_to_it(loop: Loop) -> None:
    """`claim.foreign` once, however often it is looked at; adopted once the lock is free."""
    theirs = claimed_by_another(loop)
    lock = claim.lock(loop.inbox_of("a"), theirs)
    loop.start().run(3600)
    assert [(e["instance"], e["waiting"]) for e in loop.said("claim.foreign")] == [(theirs, 1)]
    assert loop.row("a", X) is None
    loop.drop("a", Y)
    loop.look().run(5)
    assert loop.done("a") == [Y]
    assert folders(loop) == {theirs: [X], loop.claims_folder("a"): []}
    os.close(lock)
    loop.drop("a", "z.jsonl")
    loop.look().run(600)
    assert loop.done("a") == [X, Y, "z.jsonl"]
    assert loop.posts() == 3
    assert len(loop.said("claim.foreign")) == 1


def test_a_name_that_is_in_progress_elsewhere_waits(loop: Loop) -> None:
    """Two instances claimed a file of the same name: the second one follows when the first is done."""
    loop.uploads = Uploads(on_unknown=OnUnknown.HOLD)
    theirs = claimed_by_another(loop)
    lock = claim.lock(loop.inbox_of("a"), theirs)
    loop.start()
    ours = lose(loop)
    os.close(lock)
    loop.restart().run(600)
    assert folders(loop) == {theirs: [X], ours: [X]}
    assert row(loop).claims == ours
    loop.on_say("file.done", lambda: ended.append(folders(loop)))
    ended: list[dict[str, list[str]]] = []
    loop.service.listing = Listing()
    loop.run(900)
    assert ended == [{theirs: [X], ours: []}]
    loop.drop("a", Y)  # an upload after theirs was found: that it is listed proves that theirs is absent
    loop.look().run(900)
    assert ended[-1] == {theirs: [], ours: []}
    assert [e["file"] for e in loop.said("upload.recovered")] == [X]
    assert loop.posts() == 3


@pytest.mark.parametrize("state", ["the same", "another"])
def test_a_copy_of_the_state_folder_on_another_machine_is_a_stranger(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """It gets a claims folder of its own, and takes what the original claimed for what anybody's is."""
    loop.start()
    ours = lose(loop)
    before = loop.daemon.journal.instance
    if state == "another":
        shutil.copytree(loop.root / "state", loop.root / "copy")
        become_another(loop, "copy")
    else:
        loop.die()
    file = loop.root / "state" / "instance"
    for folder in loop.root.glob("*/instance"):
        folder.write_text(json.dumps({**json.loads(file.read_text()), "machine": "e" * 32}))
    (loop.root / "machine-id").write_text("f" * 32)
    monkeypatch.setattr(SqliteJournal.__init__, "__kwdefaults__", {"machine_id": loop.root / "machine-id"})
    lock = claim.lock(loop.inbox_of("a"), ours)
    loop.start().run(60)
    assert loop.daemon.journal.instance != before
    assert list(loop.daemon.journal.former) == []
    assert [e["instance"] for e in loop.said("claim.foreign")] == [ours]
    loop.drop("a", Y)
    loop.look().run(5)
    assert loop.claims_folder("a") != ours
    os.close(lock)
    loop.service.listing = Listing()
    loop.run(600)
    assert loop.done("a") == [X, Y]
    assert loop.posts() == 2


@contextmanager
def overlay(loop: Loop) -> Iterator[None]:
    """Let the inbox lie on a filesystem on which locks don't show whether another machine is at work."""
    with tmpfs(loop.root / "disk", "64m") as disk:
        for name in ("lower", "upper", "work"):
            (disk / name).mkdir()
        loop.inbox_of("a").mkdir(parents=True)
        options = f"lowerdir={disk}/lower,upperdir={disk}/upper,workdir={disk}/work"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", loop.inbox_of("a")], check=True)
        try:
            yield
        finally:
            if loop._daemon is not None:
                loop.close()
                loop._daemon = None
            subprocess.run(["umount", "-l", loop.inbox_of("a")], check=True)


@needs_root
def test_where_locks_do_not_reach_a_person_has_to_say_that_a_daemon_is_dead(loop: Loop) -> None:
    """`claim.foreign` once; after `sfwatch adopt` the running daemon adopts the claims at its next scan."""
    with overlay(loop):
        loop.start()
        theirs = lose(loop, seconds=12)
        become_another(loop)
        looked_up = loop.listings()
        loop.service.listing = Listing()
        loop.start().run(3600)
        assert [(e["instance"], e["waiting"]) for e in loop.said("claim.foreign")] == [(theirs, 1)]
        assert f"sfwatch adopt {claim.claims_folder(loop.inbox_of('a'), theirs)}" in str(loop.lines)
        assert (loop.row("a", X), loop.listings()) == (None, looked_up)
        adopt(loop.settings(), claim.claims_folder(loop.inbox_of("a"), theirs))
        loop.run(120)
        assert loop.done("a") == [X]
        assert loop.posts() == 1


@needs_root
def test_where_locks_do_not_reach_the_owner_shows_that_it_was_us(loop: Loop) -> None:
    """The state folder was lost; the same machine and path of it is the same daemon."""
    if identity.machine_id() is None:
        pytest.skip("this machine has no id")
    with overlay(loop):
        loop.start()
        lose(loop, seconds=12)
        loop.die()
        shutil.rmtree(loop.root / "state")
        loop.service.listing = Listing()
        loop.start().run(120)
        assert loop.done("a") == [X]
        assert loop.posts() == 1
        assert loop.said("claim.foreign") == []


# Our own claims.


def test_another_process_that_works_on_our_own_claims_is_left_alone(loop: Loop) -> None:
    """Nothing in that folder is touched, and nothing put into it, until the lock is free."""
    loop.start()
    ours = lose(loop)
    loop.die()
    lock = claim.lock(loop.inbox_of("a"), ours)
    loop.service.listing = Listing()
    loop.start()
    loop.drop("a", Y)
    loop.look().run(3600)
    assert [(e["instance"], e["waiting"]) for e in loop.said("claim.foreign")] == [(ours, 1)]
    assert folders(loop) == {ours: [X]}
    assert loop.waiting_in("a") == [Y]
    assert sorted((e["file"], e["reason"]) for e in loop.said("file.waiting")) == [
        (X, "foreign"),
        (Y, "foreign"),
    ]
    assert (row(loop).state, loop.posts(), loop.done("a")) == (State.UNKNOWN, 1, [])
    os.close(lock)
    loop.run(600)
    assert loop.done("a") == [X, Y]
    assert loop.posts() == 2


def of_version_1(loop: Loop, known: Callable[[Delivery], Delivery]) -> str:
    """Make what a running daemon has claimed what version 0.1.0 left, its row too; return the claims folder."""
    ours = loop.claims_folder("a")
    found = row(loop)
    loop.die()
    with closing(SqliteJournal(loop.root / "state", stamp=STAMP)) as journal:
        journal.save(known(replace(found, claims=None, tag=None, remote_name=X)))
        instance = journal.id
    (loop.root / "state" / "instance").write_text(f"{instance}\n")
    around = loop.inbox_of("a") / ".sfwatch"
    (around / ours).rename(around / instance)
    (around / f"{ours}.owner").unlink()
    return instance


def test_the_claims_folder_of_version_1_is_worked_on_in_place(loop: Loop) -> None:
    """What became of an upload without a tag only a person can say; new claims get a folder of their own."""
    loop.start()
    lose(loop)
    legacy = of_version_1(loop, lambda known: known)
    loop.start().run(600)
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["no_tag"]
    claimed: list[dict[str, list[str]]] = []
    loop.on_say("upload.started", lambda: claimed.append(folders(loop)))
    loop.drop("a", Y)
    loop.look().run(5)
    assert claimed == [{legacy: [X], loop.claims_folder("a"): [Y]}]
    assert loop.claims_folder("a").startswith(f"{legacy}-")
    retry.request(loop.settings().state_dir, "a", X)
    loop.look().run(60)
    assert loop.done("a") == [X, Y]
    assert claimed[1][legacy] == [X]
    assert folders(loop) == {legacy: [], loop.claims_folder("a"): []}
    assert loop.said("claim.foreign") == []
    loop.twice = 1


def test_what_version_1_had_accepted_is_filed_away_in_place(loop: Loop) -> None:
    """Its row names no claims folder."""
    loop.start()
    lose(loop)
    (stored,) = loop.service.stored
    data = {"id": stored.id, "filename": stored.filename}
    answer = {"data": data, "recovered": False, "uploaded_at": "2026-01-01T00:00:00.000Z"}
    accepted = {"state": State.ACCEPTED, "answer": answer, "file_id": stored.id}
    of_version_1(loop, lambda known: replace(known, **accepted))  # type: ignore[arg-type]
    loop.start().run(60)
    assert loop.done("a") == [X]
    assert loop.posts() == 1


def lose_journal(loop: Loop) -> None:
    loop.die()
    for path in (loop.root / "state").glob("journal.sqlite3*"):
        path.unlink()


@pytest.mark.parametrize("sent", [False, True])
def test_after_a_lost_journal_claims_without_a_row_are_unknown(loop: Loop, sent: bool) -> None:  # noqa: FBT001
    """The instance and its claims folder are the same, but what was sent is not known: first a look-up."""
    loop.uploads = Uploads(on_unknown=OnUnknown.HOLD)
    loop.start()
    if sent:
        lose(loop)
    else:
        loop.drop("a", X)
        loop.claim("a", X)
    (ours,) = folders(loop)
    instance = loop.daemon.journal.instance
    lose_journal(loop)
    loop.service.listing = Listing()
    posts = loop.posts()
    loop.start().run(600)
    assert loop.daemon.journal.instance == instance
    assert loop.said("claim.foreign") == []
    assert loop.posts() == posts
    if not sent:
        assert (row(loop).state, row(loop).claims, loop.waiting_in("a")) == (State.UNKNOWN, ours, [])
        loop.drop("a", Y)
        loop.look().run(600)
    assert X in loop.done("a")
    assert loop.posts() == (1 if sent else 2)
    assert folders(loop) == {ours: []}


def test_a_process_that_was_killed_between_claim_and_row_had_sent_nothing(loop: Loop) -> None:
    """The journal is the one that the claims folder began with: one look-up, then it is released and sent."""
    loop.start()
    loop.drop("a", Y)
    loop.look().run(5)
    loop.drop("a", X)
    loop.claim("a", X)
    loop.restart()
    assert (look_ups(loop), loop.waiting_in("a")) == (1, [X])
    assert folders(loop) == {loop.daemon.inboxes.watched["a"].claims_folder: []}
    loop.run(60)
    assert loop.done("a") == [X, Y]
    assert (look_ups(loop), loop.posts()) == (1, 2)
    assert loop.said("upload.resent") == loop.said("upload.undecided") == []


def test_a_listing_that_can_not_be_had_does_not_hold_up_what_was_never_sent(loop: Loop) -> None:
    """The service has none: our own journal says enough."""
    loop.service.listing = Listing(answer=answering(404, {}).answer)
    loop.start()
    loop.drop("a", X)
    loop.claim("a", X)
    loop.restart().run(60)
    assert loop.done("a") == [X]
    assert loop.posts() == 1


def without_claims_folder(loop: Loop) -> str:
    """Lose an upload, and while no daemon runs the folder of claims; return the name of ours."""
    loop.start()
    ours = lose(loop)
    loop.die()
    (loop.inbox_of("a") / ".sfwatch").rename(loop.root / "away")
    loop.start()
    return ours


def test_files_of_a_claims_folder_that_is_missing_wait(loop: Loop) -> None:
    """`inbox.lost` (`replaced`) once; other files go on; one `sfwatch retry` gives the lost file up."""
    ours = without_claims_folder(loop)
    loop.dropped.clear()
    loop.drop("a", Y)
    loop.look().run(3600)
    assert loop.done("a") == [Y]
    lost = loop.said("inbox.lost")
    assert [e["reason"] for e in lost] == ["replaced"]
    assert str(claim.claims_folder(loop.inbox_of("a"), ours)) in lost[0]["detail"]
    assert loop.said("inbox.found") == []
    assert row(loop).claims == ours
    config = loop.settings()
    assert retry.claimed(config, X) == [("a", X)]
    retry.request(config.state_dir, "a", X)
    loop.look().run(300)
    assert [e["file"] for e in loop.said("file.vanished")] == [X]
    assert loop.row("a", X) is None
    assert retry.requests(config.state_dir) == []
    loop.restart().run(600)
    assert len(loop.said("file.vanished")) == len(loop.said("inbox.lost")) == 1
    assert loop.posts() == 2


def test_a_lost_file_that_is_given_up_and_was_stored_is_done(loop: Loop) -> None:
    """The listing shows its upload: there is a sidecar with its id, and no file beside it."""
    without_claims_folder(loop)
    loop.dropped.clear()
    loop.service.listing = Listing()
    retry.request(loop.settings().state_dir, "a", X)
    loop.look().run(300)
    assert [e["file_id"] for e in loop.said("file.done")] == [loop.service.stored[0].id]
    assert (loop.root / "a" / "done" / f"{X}.fileid.json").exists()
    assert retry.requests(loop.settings().state_dir) == []


def test_a_claims_folder_that_is_brought_back_goes_on(loop: Loop) -> None:
    """`inbox.found` says so; the upload is found and done."""
    without_claims_folder(loop)
    loop.run(3600)
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["replaced"]
    (loop.root / "away").rename(loop.inbox_of("a") / ".sfwatch")
    loop.service.listing = Listing()
    loop.look().run(600)
    assert loop.done("a") == [X]
    assert loop.posts() == 1
    assert len(loop.said("inbox.found")) == 1


def test_a_claims_folder_that_is_removed_under_a_running_daemon(loop: Loop) -> None:
    """The inbox is surely the same: the upload that is found then is done, its file is gone, others go on."""
    loop.start()
    lose(loop)
    shutil.rmtree(loop.inbox_of("a") / ".sfwatch")
    loop.dropped.clear()
    loop.service.listing = Listing()
    loop.drop("a", Y)
    loop.look().run(600)
    assert sorted(e["file"] for e in loop.said("file.done")) == [X, Y]
    assert loop.done("a") == [Y]
    assert loop.said("inbox.lost") == []
    assert loop.posts() == 2


# Files that wait in the inbox.


def test_a_file_that_waited_and_vanished_while_no_daemon_ran(loop: Loop) -> None:
    """`file.vanished` once: its row goes with it."""
    loop.start()
    loop.service.script.append(BUSY)
    loop.drop("a", X)
    loop.look().run(2.1)
    assert row(loop).state is State.WAITING
    loop.die()
    loop.withdraw("a", X)
    loop.start().run(60)
    assert [e["file"] for e in loop.said("file.vanished")] == [X]
    assert loop.row("a", X) is None
    loop.restart().run(60)
    assert len(loop.said("file.vanished")) == 1


def test_a_file_that_waited_and_is_there_still_has_not_vanished(loop: Loop) -> None:
    """It goes on with what was known of it."""
    loop.start()
    loop.service.script.append(BUSY)
    loop.drop("a", X)
    loop.look().run(2.1)
    loop.restart().run(60)
    assert loop.said("file.vanished") == []
    assert [e["attempts"] for e in loop.said("file.done")] == [2]


@pytest.mark.parametrize("sees", ["a running daemon", "the next daemon"])
def test_a_file_that_waited_in_an_inbox_that_is_not_mounted_has_not_vanished(loop: Loop, sees: str) -> None:
    """Another folder is in the place of its inbox, without the claims folder that the row names."""
    loop.start()
    loop.service.always = BUSY
    loop.drop("a", X)
    loop.look().run(2.1)
    if sees == "the next daemon":
        loop.die()
    away = loop.inbox_of("a").rename(loop.root / "away")
    loop.inbox_of("a").mkdir()
    if sees == "the next daemon":
        loop.start()
    loop.run(600)
    assert loop.said("file.vanished") == []
    shutil.rmtree(loop.inbox_of("a"))
    away.rename(loop.inbox_of("a"))
    loop.service.always = Behaviour()
    loop.run(1200)
    assert loop.done("a") == [X]
    assert loop.said("file.vanished") == []


def test_a_doubted_file_whose_claims_folder_is_missing_waits(loop: Loop) -> None:
    """It was refused, which proved nothing yet: `inbox.lost` (`replaced`), and `sfwatch retry` gives it up."""
    loop.start()
    loop.service.script.append(answering(400, {"code": 29999, "message": "no"}))
    loop.drop("a", X)
    loop.look().run(2.1)
    assert row(loop).state is State.DOUBTED
    loop.die()
    shutil.rmtree(loop.inbox_of("a") / ".sfwatch")
    loop.dropped.clear()
    loop.start().run(600)
    assert [e["reason"] for e in loop.said("inbox.lost")] == ["replaced"]
    assert loop.said("file.vanished") == []
    retry.request(loop.settings().state_dir, "a", X)
    loop.look().run(300)
    assert [e["file"] for e in loop.said("file.vanished")] == [X]
    assert loop.row("a", X) is None


# The claims folders themselves.


def test_each_inbox_has_one_claims_folder_that_is_never_removed(loop: Loop) -> None:
    """Made with the first claim, with its owner beside it; the same after restarts, and when it is empty."""
    loop.names = ("a", "b")
    loop.inbox = {"recursive": True}
    (loop.root / "b").mkdir()
    loop.start()
    assert folders(loop, "a") == folders(loop, "b") == {}
    seen: set[tuple[str, ...]] = set()
    for number in range(3):
        for inbox in loop.names:
            loop.drop(inbox, f"{number}.jsonl")
            loop.drop(inbox, f"sub/{number}.jsonl")
        loop.look().run(10)
        seen.add(tuple(folder for inbox in loop.names for folder in folders(loop, inbox)))
        assert loop.claims("a") == loop.claims("b") == []
        loop.restart().run(60)
    ((in_a, in_b),) = seen
    instance = loop.daemon.journal.instance
    for inbox, folder in (("a", in_a), ("b", in_b)):
        assert claim.is_ours(folder, instance)
        assert folder != instance
        owner = claim.owner_of(loop.inbox_of(inbox), folder)
        assert owner == claim.Owner(
            loop.daemon.journal.machine, str(loop.root / "state"), loop.daemon.journal.id
        )
        names = sorted(path.name for path in (loop.inbox_of(inbox) / ".sfwatch").iterdir())
        assert names == [folder, f"{folder}.owner"]
        assert list(claim.claims_folder(loop.inbox_of(inbox), folder).iterdir()) == []
    assert in_a != in_b

"""What somebody found who looked for ways to lose a file, to send it twice, or to stop the daemon."""

import fcntl
import json
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, Loop, digest, line
from servers import OK, Authority, Server
from servers import answering as saying
from somebody import SOMEBODY, somebody
from world import World, a_world, batch, fill, in_threads, needs_root, sha256, tmpfs, wait_for

from sfwatch import app, claim
from sfwatch.job import Deferred, Done, Job, NoStorage, Unknown
from sfwatch.journal import SqliteJournal, State, address
from sfwatch.logs import event_log
from sfwatch.settings import Api, Config, Inbox, Uploads
from sfwatch.standin import (
    Behaviour,
    Listing,
    StandIn,
    answering,
    reply,
    storing_then_answering,
    storing_then_resetting,
)
from sfwatch.upload import Client

Make = Callable[..., Loop]

X = "x.jsonl"
DOUBTFUL = answering(400, {"code": 71234, "message": "not now or never", "data": None})
REFUSAL = answering(400, {"code": 20012, "message": "line 2 is bad", "data": None})
DOUBTFUL = answering(400, {"code": 29999, "message": "no", "data": None})
BAD_GATEWAY = answering(502, "bad gateway")


@pytest.fixture(name="service")
def _service() -> Iterator[StandIn]:
    with StandIn() as service:
        yield service


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> Iterator[World]:
    with a_world(tmp_path) as world:
        yield world


@pytest.fixture(name="make")
def _make(tmp_path: Path, service: StandIn) -> Iterator[Make]:
    """Loops that are started, and whose promises are checked at the end."""
    made: list[Loop] = []

    def make(*names: str, root: Path = tmp_path, started: bool = True, **settings: Any) -> Loop:
        loop = Loop(root, settings.pop("service", service), names=names or ("a",), **settings)
        made.append(loop)
        return loop.start() if started else loop

    yield make
    for loop in made:
        loop.close()


@contextmanager
def ext4(image: Path, path: Path, *options: str) -> Iterator[Path]:
    """A disk of its own, mounted at *path* for the block, whose sectors are the bytes of *image*."""
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "1024", *options, image], check=True)
    path.mkdir(parents=True, exist_ok=True)
    mount(image, path)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def mount(image: Path, path: Path) -> None:
    subprocess.run(["mount", "-o", "loop", image, path], check=True)


@contextmanager
def broken(image: Path, path: Path, at: int) -> Iterator[None]:
    """For the block, the disk that *image* is cannot be read from where byte *at* of a file lies on."""
    os.sync()
    fd = os.open(path, os.O_RDONLY)
    try:
        (block,) = struct.unpack("i", fcntl.ioctl(fd, 1, struct.pack("i", at // 1024)))  # FIBMAP
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    with image.open("rb") as file:
        file.seek(block * 1024)
        lost = file.read()
    os.truncate(image, block * 1024)
    try:
        yield
    finally:
        with image.open("r+b") as file:
            file.seek(block * 1024)
            file.write(lost)


def once(config: Config, environ: dict[str, str] | None = None) -> tuple[int, list[dict[str, Any]]]:
    """The whole daemon with threads and clocks, until nothing is left to do: its status, and what it said."""
    lines: list[str] = []
    environ = environ or {"SILICONFLOW_API_KEY": KEY}
    status = app.run(config, log=event_log(lines.append), environ=environ, drain_s=20.0, leave=lambda _: None)
    return status, [json.loads(text) for text in lines]


def drive(config: Config, there: Callable[[list[dict[str, Any]]], object]) -> list[dict[str, Any]]:
    """The whole daemon with threads and clocks, until what it said is enough and no worker is under way."""
    said: list[dict[str, Any]] = []

    def hear(text: str) -> None:
        said.append(json.loads(text))

    log = event_log(hear, level="debug")
    with app.daemon(config, log=log, environ={"SILICONFLOW_API_KEY": KEY}) as it:
        it.start()
        end = it.clock() + 20.0
        while not there(said) or it.busy or it.probing:
            assert it.clock() < end, said
            it.turn()
        it.pool.shutdown()
    return said


def quick(root: Path, name: str, api: Api, **changes: Any) -> Inbox:
    """An inbox that settles at once; its folders are made."""
    paths = {folder: root / name / folder for folder in ("inbox", "done", "failed")}
    inbox = Inbox(
        path=paths["inbox"],
        name=name,
        done=paths["done"],
        failed=paths["failed"],
        settle_s=0.05,
        settle_unproven_s=0.1,
        api=api,
    )
    inbox = replace(inbox, **changes)
    for folder in (inbox.path, inbox.done, inbox.failed):
        folder.mkdir(parents=True, exist_ok=True)
    return inbox


def posts(service: StandIn) -> int:
    return sum(seen.method == "POST" for seen in service.requests)


# One done and one failed for two inboxes.


def twins(tmp_path: Path, first: StandIn, second: StandIn) -> Config:
    common = {"done": tmp_path / "done", "failed": tmp_path / "failed"}
    inboxes = (
        quick(tmp_path, "a", Api(base_url=first.base_url), **common),
        quick(tmp_path, "b", Api(base_url=second.base_url), **common),
    )
    return Config(inboxes=inboxes, uploads=Uploads(concurrency=4), state_dir=tmp_path / "state")


def test_twins_of_two_inboxes_that_share_done_and_failed_stay_two(tmp_path: Path) -> None:
    """The same names and bytes at the same time to two targets: every file, id and report is there."""
    with StandIn() as first, StandIn() as second:
        config = twins(tmp_path, first, second)
        for number in range(30):
            for inbox in config.inboxes:
                (inbox.path / f"good-{number}.jsonl").write_bytes(batch(word=f"{number}"))
                (inbox.path / f"bad-{number}.jsonl").write_text(f"{number}\n")
        status, said = once(config)
        ids = {stored.id for stored in first.stored + second.stored}
    assert status == 1
    done, failed = list((tmp_path / "done").glob("*.jsonl")), list((tmp_path / "failed").glob("*.jsonl"))
    assert (len(done), len(failed), len(ids)) == (60, 60, 60)
    sidecars = [json.loads(path.with_name(f"{path.name}.fileid.json").read_text()) for path in done]
    assert {sidecar["id"] for sidecar in sidecars} == ids
    assert [sidecar["sfwatch"]["sha256"] for sidecar in sidecars] == [digest(path) for path in done]
    reports = [json.loads(path.with_name(f"{path.name}.error.json").read_text()) for path in failed]
    assert [report["sha256"] for report in reports] == [digest(path) for path in failed]
    assert sorted((report["inbox"], report["original_name"]) for report in reports) == sorted(
        (inbox, f"bad-{number}.jsonl") for number in range(30) for inbox in "ab"
    )
    assert len([e for e in said if e["event"] in ("file.done", "file.failed")]) == 120


def test_twins_with_the_same_id_at_the_same_moment_stay_two(world: World) -> None:
    """Two targets that name an upload after its bytes: two files, each with its sidecar, in every order."""
    other = replace(world.inbox, path=world.root / "other", name="other")
    other.path.mkdir()
    own = claim.Owner(world.journal.machine, str(world.state_dir), world.journal.id)
    claims = claim.own_folder(other.path, world.journal.instance, own)
    body = {"code": 20000, "data": {"id": "file-of-these-bytes", "bytes": 3}}
    world.service.always = storing_then_answering(200, body)

    def deliver(job: Job, target: str) -> Callable[[], object]:
        from sfwatch.deliver import deliver

        tools = replace(world.tools(), target=target)
        tools = replace(tools, log=tools.log.bind(inbox=job.inbox.name, file=job.name))
        return lambda: outcomes.append(deliver(job, tools))

    outcomes: list[Any] = []
    for number in range(20):
        name = f"{number}.jsonl"
        here = world.drop(name, batch(word=name))
        there = world.drop(name, here.read_bytes(), into=other.path)
        mine = world.job(name)
        fingerprint = replace(mine.settled.fingerprint, ino=there.stat().st_ino)  # type: ignore[union-attr]
        fingerprint = replace(fingerprint, mtime_ns=there.stat().st_mtime_ns, ctime_ns=there.stat().st_ctime_ns)
        settled = replace(mine.settled, fingerprint=fingerprint)  # type: ignore[type-var]
        theirs = replace(mine, inbox=other, claims=claims, settled=settled)
        in_threads(deliver(mine, "one (key)"), deliver(theirs, "two (key)"))
    assert [type(outcome) for outcome in outcomes] == [Done] * 40
    files = list(world.inbox.done.glob("*.jsonl"))
    assert len(files) == 40
    said = [json.loads(path.with_name(f"{path.name}.fileid.json").read_text())["sfwatch"] for path in files]
    assert sorted(facts["inbox"] for facts in said) == ["inbox"] * 20 + ["other"] * 20


@pytest.mark.parametrize("theirs", ["file", "file and sidecar", "sidecar"])
@pytest.mark.parametrize("state", [State.ACCEPTED, State.REFUSED])
def test_a_name_that_was_chosen_and_then_taken_by_a_twin_is_passed_over(
    world: World, theirs: str, state: State
) -> None:
    """After a crash: what lies there under the chosen name, with the same bytes, stays somebody else's."""
    accepted = state is State.ACCEPTED
    folder = world.inbox.done if accepted else world.inbox.failed
    suffix = ".fileid.json" if accepted else ".error.json"
    data = batch()
    world.drop(X, data)
    world.claim(X)
    answer = {"data": {"id": "file-mine"}, "uploaded_at": "2026-01-01T00:00:00.000Z"}
    facts: dict[str, Any] = {"answer": answer, "file_id": "file-mine"} if accepted else {}
    facts |= (
        {}
        if accepted
        else {"report": {"reason": "refused", "detail": "d", "failed_at": "2026-01-01T00:00:00Z"}}
    )
    world.row(X, state, target_name=X, **facts)
    document = {
        "sfwatch": {"sha256": sha256(data), "uploaded_at": "2026-01-01T00:00:01.000Z"},
        "id": "file-their",
    }
    if not accepted:
        document = {"sha256": sha256(data), "inbox": "other", "original_name": X}
    if "file" in theirs:
        (folder / X).write_bytes(data)
    if "sidecar" in theirs:
        (folder / f"{X}{suffix}").write_text(json.dumps(document))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    world.deliver(X)
    assert {path: path.read_bytes() for path in before} == before
    (ours,) = [path for path in folder.glob("*.jsonl") if path.name != X]
    assert ours.read_bytes() == data
    said = json.loads(ours.with_name(ours.name + suffix).read_text())
    assert said["id"] == "file-mine" if accepted else said["inbox"] == "inbox"
    assert world.claimed() == []


@needs_root
def test_a_name_that_was_chosen_on_a_full_disk_and_then_taken_is_passed_over(world: World) -> None:
    """Done is full when the sidecar is to be written; when there is room, a twin has the chosen name."""
    with tmpfs(world.root / "small", "24m") as small:
        world.set_inbox(done=small)
        world.drop(X)
        ballast: list[Path] = []
        world.when["upload.accepted"] = lambda: ballast.append(fill(small))
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        ballast[0].unlink()
        (small / X).write_bytes(batch())
        (small / f"{X}.fileid.json").write_text(json.dumps({"id": "file-their", "sfwatch": {}}))
        assert isinstance(world.deliver(X, known=outcome.known), Done)
        sidecars = {json.loads(path.read_text())["id"] for path in small.glob("*.fileid.json")}
        assert sidecars == {"file-their", world.service.stored[0].id}
        assert len(list(small.glob("*.jsonl"))) == 2


# Answers that were lost.


@pytest.mark.parametrize("others", [0, 1])
def test_a_lost_answer_and_then_a_refusal_is_one_failed_file(make: Make, others: int) -> None:
    """502, not listed, sent again, refused: one event, and not one upload more."""
    loop = make()
    for number in range(others):
        loop.drop("a", f"{number}.jsonl")
    loop.look().run(3)
    loop.service.script.append(BAD_GATEWAY)
    loop.service.always = REFUSAL
    loop.drop("a", X)
    loop.look().run(4000)
    assert loop.failed("a") == [X]
    assert loop.posts() == others + 2
    assert len(loop.said("file.failed")) == 1


def test_a_lost_answer_and_then_a_doubtful_refusal_where_nothing_was_accepted_yet(make: Make) -> None:
    """No listing proves that the first attempt was not stored: few uploads until another file is accepted."""
    loop = make()
    loop.service.script.append(BAD_GATEWAY)
    loop.service.always = DOUBTFUL
    loop.drop("a", X)
    loop.look().run(4000)
    assert loop.failed("a") == []
    assert loop.posts() == 1 + loop.uploads.resend_limit
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["nothing_listed"]
    loop.service.always = Behaviour()
    loop.drop("a", "y.jsonl")
    loop.look().run(1000)
    assert loop.done("a") == [X, "y.jsonl"]


def test_lost_answers_and_then_refusals_of_all_are_not_sent_for_ever(make: Make) -> None:
    """Three files meet 502 and then, sent again, one refusal: few uploads; done once others are accepted."""
    loop = make()
    loop.service.script.extend([BAD_GATEWAY] * 3)
    loop.service.always = DOUBTFUL
    for name in "xyz":
        loop.drop("a", f"{name}.jsonl")
    loop.look().run(300)
    posts = loop.posts()
    loop.run(3000)
    assert loop.posts() <= posts + 20
    assert loop.posts() <= 3 * (1 + loop.uploads.resend_limit)
    loop.service.always = Behaviour()
    loop.drop("a", "w.jsonl")
    loop.look().run(1000)
    assert loop.done("a") == ["w.jsonl", "x.jsonl", "y.jsonl", "z.jsonl"]


def lose(loop: Loop) -> None:
    """A file whose upload is stored and whose answer is lost; the listing does not show it yet."""
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = Listing(lag_s=1e9)
    loop.drop("a", X)
    loop.look().run(2.1)
    row = loop.row("a", X)
    assert row is not None
    assert row.state is State.UNKNOWN


@pytest.mark.parametrize("lost", ["all", "database", "adopted"])
def test_a_lost_journal_costs_no_second_upload(make: Make, lost: str) -> None:
    """The claim tells since when the file may have been sent: an hour later its upload is found and adopted."""
    loop = make()
    lose(loop)
    loop.die()
    loop.service.listing = Listing()
    loop.now += 3600
    if lost == "database":
        for path in (loop.root / "state").glob("journal.sqlite3*"):
            path.write_bytes(b"no database, and long enough to show it" * 100)
    else:
        shutil.rmtree(loop.root / "state")
    if lost == "adopted":  # and the process ends when it has taken the claim over, before anything else
        loop.pool.holds = True
        loop.start().die()
        loop.pool.holds = False
        loop.now += 3600
    loop.start().run(120)
    assert loop.done("a") == [X]
    assert loop.posts() == 1
    assert len(loop.said("upload.recovered")) == 1


@pytest.mark.parametrize("listing", [{"data": []}, {"data": [{"object": "file"}] * 3}])
def test_a_listing_that_never_shows_anything_bounds_the_uploads(make: Make, listing: dict[str, Any]) -> None:
    """Every upload is stored and answered with 502: few uploads, one event; later the first is adopted."""
    loop = make()
    loop.service.always = storing_then_answering(502, "bad gateway")
    loop.service.listing = Listing(answer=reply(200, {"code": 20000, "data": listing}))
    loop.drop("a", X)
    loop.look().run(7200)
    uploads = loop.posts()
    assert uploads <= 1 + loop.uploads.resend_limit
    assert len(loop.said("upload.undecided")) == 1
    loop.twice = uploads - 1
    loop.service.always = Behaviour()
    loop.service.listing = Listing()
    loop.drop("a", "y.jsonl")
    loop.look().run(1200)
    assert loop.done("a") == [X, "y.jsonl"]
    assert loop.posts() == uploads + 1
    assert len(loop.said("upload.undecided")) == 1


def test_what_no_listing_showed_is_sent_on_once_one_shows_others(make: Make) -> None:
    """The uploads never arrived; an acceptance that is listed makes their absence count."""
    loop = make()
    loop.service.always = BAD_GATEWAY
    loop.drop("a", X)
    loop.look().run(7200)
    assert loop.posts() <= 1 + loop.uploads.resend_limit
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["nothing_listed"]
    loop.service.always = Behaviour()
    loop.drop("a", "y.jsonl")
    loop.look().run(1200)
    assert loop.done("a") == [X, "y.jsonl"]


def test_an_unknown_upload_stays_with_its_host(make: Make) -> None:
    """Another base_url: the file is neither looked up nor sent there; it is adopted when its host is back."""
    loop = make()
    lose(loop)
    with StandIn() as other:
        loop.api = Api(base_url=other.base_url)
        loop.restart().run(3600)
        assert other.requests == []
        assert [e["reason"] for e in loop.said("upload.undecided")] == ["other_target"]
        loop.drop("a", "y.jsonl")
        loop.look().run(10)
        loop.service.stored += other.stored
        assert [stored.filename[:2] for stored in other.stored] == ["y-"]
    loop.api = None
    loop.service.listing = Listing()
    loop.restart().run(600)
    assert loop.done("a") == [X, "y.jsonl"]
    assert len(loop.said("upload.recovered")) == 1


# Newcomers.


def newcomer(loop: Loop, name: str = X) -> Callable[[], None]:
    """Drop another file of a name, once."""
    dropped: list[Path] = []
    return lambda: dropped or dropped.append(loop.drop("a", name))  # type: ignore[func-returns-value, return-value]


def test_refused_files_that_cannot_go_back_for_a_newcomer_are_done_with_it(make: Make) -> None:
    """Everything is refused alike, and each name is taken again: in the end all are done."""
    loop = make()
    loop.service.always = DOUBTFUL
    for name in "xyz":
        loop.drop("a", f"{name}.jsonl")
    started: list[Any] = []

    def come() -> None:
        started.append(None)
        if len(started) == 3:
            for name in "xyz":
                loop.drop("a", f"{name}.jsonl", lines=2)

    loop.on_say("upload.started", come)
    loop.look().run(600)
    assert loop.failed("a") == []
    loop.service.always = Behaviour()
    loop.look().run(1200)
    assert len(loop.done("a")) == 6


def test_a_changed_file_that_cannot_go_back_for_a_newcomer_is_done_with_it(make: Make) -> None:
    """It is written to while it is sent, and its name is taken again: both are done."""
    loop = make()
    path = loop.drop("a", X, lines=2)
    del loop.dropped[digest(path)]
    drop = newcomer(loop)

    def change() -> None:
        (path,) = (p for p in loop.inbox_of("a").glob(f".sfwatch/*/{X}"))
        path.write_text(line(7) + line(8))
        loop.on_say("upload.started", lambda: None)
        drop()

    loop.on_say("upload.started", change)
    loop.look().run(600)
    assert len(loop.done("a")) == 2
    assert loop.posts() - len(loop.service.stored) <= 1


def test_a_namesake_of_an_unknown_upload_is_not_held_up(make: Make) -> None:
    """Another inbox's lost upload has the same name and size, but not the tag: each file gets its own id."""
    loop = make("b", "a")
    loop.service.script.append(storing_then_resetting())
    loop.service.listing = Listing(lag_s=25)
    loop.drop("b", X)
    loop.look().run(2.5)
    loop.drop("a", X)
    loop.look().run(5)
    assert loop.said("upload.unknown")
    assert (loop.done("a"), loop.posts()) == ([X], 2)
    newcomer(loop)()
    loop.look().run(1200)
    assert loop.done("b") == [X]
    assert len(loop.done("a")) == 2
    assert loop.posts() == 3


# Folders and files in the way.


def test_a_file_in_place_of_a_sub_folder_of_done_holds_up_one_file_only(make: Make) -> None:
    """`x` was a file and is a folder now: its files wait and say why, the others go on, nothing is held."""
    loop = make(inbox={"recursive": True, "match": ("*",)})
    loop.drop("a", "x")
    loop.look().run(3)
    done = loop.root / "a" / "done"
    assert (done / "x").is_file()
    loop.drop("a", "x/y.jsonl")
    loop.drop("a", "z.jsonl")
    loop.look().run(60)
    assert loop.done("a") == ["z.jsonl"]
    assert [(e["file"], e["reason"]) for e in loop.said("file.waiting")] == [("x/y.jsonl", "cannot_move")]
    assert loop.said("storage.held") == []
    (done / "x").rename(done / "w")
    (done / "x.fileid.json").rename(done / "w.fileid.json")
    loop.run(600)
    assert (done / "x" / "y.jsonl").is_file()
    assert loop.posts() == 3


@needs_root
def test_a_file_on_broken_sectors_holds_up_itself_only(make: Make, tmp_path: Path) -> None:
    """Its disk reports an error when it is read: it waits and says so, others are done; mended, so is it."""
    image = tmp_path / "image"
    with ext4(image, tmp_path / "a" / "inbox", "-O", "^has_journal"):
        loop = make()
        loop.drop("a", "good.jsonl")
        bad = loop.drop("a", X, lines=400)
        loop.pool.holds = True
        loop.look().run(2.5)
        with broken(image, bad, 0):
            loop.pool.holds = False
            loop.pool.release(len(loop.pool.held))
            loop.run(60)
            assert loop.done("a") == ["good.jsonl"]
            assert (X, "unreadable") in [(e["file"], e["reason"]) for e in loop.said("file.waiting")]
            assert loop.said("storage.held") == []
            assert loop.posts() == 1
        loop.look().run(600)
        assert loop.done("a") == ["good.jsonl", X]
        loop.close()
        loop.names = ()


@needs_root
def test_a_file_that_cannot_be_read_on_while_it_is_sent_is_tried_again_with_pauses(
    make: Make, tmp_path: Path
) -> None:
    """The disk breaks in the middle of an upload: no loop of uploads, and done when it is mended."""
    image = tmp_path / "image"
    with ext4(image, tmp_path / "a" / "inbox", "-O", "^has_journal"):
        loop = make()
        bad = loop.drop("a", X, "".join(line(number, text="x" * 2000) for number in range(3000)))
        faults: list[Any] = []
        do = loop.pool.submit

        def breaks() -> None:
            (claimed,) = bad.parent.glob(f".sfwatch/*/{X}")
            faults.append(broken(image, claimed, 4 << 20))
            faults[-1].__enter__()

        def submit(*args: Any, **kwargs: Any) -> Any:
            """Mend the disk after each job: the next one finds out anew in the midst of sending."""
            result = do(*args, **kwargs)
            while faults:
                faults.pop().__exit__(None, None, None)
            return result

        loop.pool.submit = submit  # type: ignore[method-assign]
        loop.on_say("upload.started", breaks)
        loop.look().run(300)
        assert 3 <= loop.posts() == len(loop.said("upload.started")) <= 12
        assert loop.service.stored == []
        assert loop.said("storage.held") == []
        loop.on_say("upload.started", lambda: None)
        loop.run(600)
        assert loop.done("a") == [X]
        loop.close()
        loop.names = ()


@needs_root
def test_a_file_that_becomes_unreadable_behind_a_hold_waits_alone(make: Make, service: StandIn) -> None:
    """It settled, the target was held, then it was closed to us: it goes back and says so, and is no bug."""
    with somebody() as root:
        loop = make(root=root)
        service.key = "sk-another"
        loop.drop("a", "a.jsonl")
        late = loop.drop("a", X, lines=20)
        loop.look().run(10)
        assert len(loop.said("target.held")) == 1
        late.chmod(0)
        service.key = KEY
        loop.run(600)
        assert loop.done("a") == ["a.jsonl"]
        assert loop.waiting_in("a") == [X]
        assert [(e["file"], e["reason"]) for e in loop.said("file.waiting")] == [(X, "unreadable")]
        assert loop.said("internal.error") == loop.said("storage.held") == []
        late.chmod(0o600)
        loop.run(600)
        assert loop.done("a") == ["a.jsonl", X]
        loop.close()
        loop._daemon = None


@needs_root
def test_sub_folders_that_are_left_out_are_said_once(make: Make) -> None:
    """A mount point and an unreadable folder, one event each, however often they are looked at."""
    with somebody() as root:
        inbox = root / "a" / "inbox"
        (inbox / "closed").mkdir(parents=True)
        (inbox / "closed").chmod(0)
        (inbox / "mounted").mkdir()
        os.seteuid(0)
        try:
            with tmpfs(inbox / "mounted", "1m"):
                os.seteuid(SOMEBODY)
                loop = make(root=root, inbox={"recursive": True})
                loop.drop("a", "open/x.jsonl")
                loop.look().run(300)
                loop.look().run(300)
                told = [(Path(e["path"]).name, e["reason"]) for e in loop.said("inbox.skipped")]
                assert told == [("mounted", "mount_point"), ("closed", "unreadable")]
                assert (root / "a" / "done" / "open" / X).is_file()
                loop.die()
                os.seteuid(0)
        finally:
            os.seteuid(SOMEBODY)


def test_once_ends_with_75_when_an_inbox_is_out_of_reach(tmp_path: Path, service: StandIn) -> None:
    """A folder on a disk that is not mounted may hold anything."""
    inbox = replace(quick(tmp_path, "a", Api(base_url=service.base_url)), path=tmp_path / "disk" / "inbox")
    status, said = once(Config(inboxes=(inbox,), state_dir=tmp_path / "state"))
    assert status == 75
    assert [e["inbox"] for e in said if e["event"] == "inbox.lost"] == ["a"]


@needs_root
def test_a_full_state_folder_when_an_inbox_is_found_ends_nothing(make: Make, tmp_path: Path) -> None:
    """It is held and said; with room again the inbox is found, adopted and worked through."""
    with tmpfs(tmp_path / "state", "24m") as state:
        loop = make("a", "b", started=False)
        shutil.rmtree(loop.root / "b")
        loop.start()
        ballast = fill(state)
        (loop.root / "b" / "inbox").mkdir(parents=True)
        (loop.root / "b" / "done").mkdir()
        (loop.root / "b" / "failed").mkdir()
        theirs = loop.inbox_of("b") / ".sfwatch" / "0123456789abcdef-0a1b2c"
        theirs.mkdir(parents=True, mode=0o700)
        theirs.parent.chmod(0o700)
        loop.drop("b", X).rename(theirs / X)
        loop.run(60)
        assert [e["path"] for e in loop.said("storage.held")] == [str(state)]
        ballast.unlink()
        loop.run(900)
        assert loop.done("b") == [X]
        loop.drop("a", "y.jsonl")
        loop.look().run(5)
        assert loop.done("a") == ["y.jsonl"]
        loop.close()
        loop._daemon = None


@needs_root
def test_a_full_state_folder_at_the_start_ends_nothing(make: Make, tmp_path: Path) -> None:
    """Inboxes that the journal never saw cannot be written down: the process goes on, and so do they later."""
    with tmpfs(tmp_path / "state", "24m") as state:
        loop = make("a", "b", started=False)
        ballast: list[Path] = []
        loop.on_say("daemon.started", lambda: ballast.append(fill(state)))
        loop.drop("a", X)
        loop.start()
        with pytest.raises(OSError, match="No space"):
            loop.daemon.journal.saw_folder("another")
        loop.run(60)
        assert loop.posts() == 0
        assert len(loop.said("storage.held")) == 1
        ballast[0].unlink()
        loop.look().run(600)
        assert loop.done("a") == [X]
        loop.close()
        loop._daemon = None


@pytest.mark.parametrize("plant", ["symlink", "fifo", "inner symlink"])
def test_what_is_planted_in_place_of_the_claims_stops_only_its_inbox(
    make: Make, tmp_path: Path, plant: str
) -> None:
    """It is said and not followed, the others work on, and this one does when it is gone."""
    loop = make("a", "b")
    loop.drop("a", "before.jsonl")
    loop.look().run(5)
    folder = loop.inbox_of("a") / ".sfwatch"
    planted = folder / loop.claims_folder("a") if plant == "inner symlink" else folder
    loop.die()
    shutil.rmtree(planted)
    (tmp_path / "elsewhere").mkdir()
    os.mkfifo(planted) if plant == "fifo" else planted.symlink_to(tmp_path / "elsewhere")
    loop.start()
    loop.drop("a", X)
    loop.drop("b", "y.jsonl")
    loop.look().run(60)
    assert loop.done("b") == ["y.jsonl"]
    assert loop.done("a") == ["before.jsonl"]
    assert list((tmp_path / "elsewhere").iterdir()) == []
    planted.unlink()
    loop.look().run(600)
    assert loop.done("a") == ["before.jsonl", X]


# The disk under the journal, and under the file.


@needs_root
def test_a_read_that_shares_its_commit_with_a_failing_write_is_answered(tmp_path: Path) -> None:
    """The disk is full: the write says so, the read of the same batch gets its answer."""
    with tmpfs(tmp_path / "state", "2m") as state:
        journal = SqliteJournal(state, stamp="20260101T000000Z")
        row = a_row(tmp_path)
        journal.save(row)
        fill(state)
        blocked, all_asked = threading.Event(), threading.Event()
        answers: dict[str, Any] = {}

        def ask(name: str, what: Callable[[], Any]) -> threading.Thread:
            def run() -> None:
                try:
                    answers[name] = what()
                except OSError as error:
                    answers[name] = error

            thread = threading.Thread(target=run)
            thread.start()
            return thread

        def block() -> bool:
            blocked.set()
            return all_asked.wait(20)

        threads = [ask("first", lambda: journal.call(block))]
        assert blocked.wait(20)  # all that is asked for now waits, and is then done at once
        big = replace(row, name="big", answer={"data": "x" * 100_000})
        threads += [ask("write", lambda: journal.save(big)), ask("read", lambda: journal.find(row.inbox, X))]
        wait_for(lambda: journal._requests.qsize() == 2)
        all_asked.set()
        for thread in threads:
            thread.join()
        assert isinstance(answers["write"], OSError)
        assert answers["read"].name == X
        assert answers["first"]
        journal.close()


def a_row(root: Path) -> Any:
    from sfwatch.journal import Delivery

    return Delivery(inbox=str(root), name=X, state=State.WAITING, dev=1, ino=2, size=3, mtime_ns=4)


@needs_root
def test_an_answer_survives_a_state_folder_that_is_full_when_it_comes(world: World) -> None:
    """Neither a read nor a write that fails then loses the id: one upload, and done once there is room."""
    world.journal.close()
    with tmpfs(world.state_dir, "24m") as state:
        world.journal = SqliteJournal(state, stamp="20260101T000000Z")
        world.drop(X)
        ballast: list[Path] = []
        world.when_stored = lambda: ballast.append(fill(state))
        outcome = world.deliver(X)
        assert isinstance(outcome, NoStorage)
        ballast[0].unlink()
        assert isinstance(world.deliver(X, known=outcome.known), Done)
        assert [stored.id for stored in world.service.stored] == [world.sidecar(X)["id"]]
        world.journal.close()
    world.journal = SqliteJournal(world.state_dir, stamp="20260101T000000Z")


@needs_root
def test_what_was_accepted_is_on_the_disk(world: World) -> None:
    """The producer synced nothing, and the power fails at the moment of acceptance: the file is whole."""
    image = world.root / "image"
    with ext4(image, world.root / "disk") as disk:
        for name in ("inbox", "done"):
            (disk / name).mkdir()
        os.sync()
        world.set_inbox(path=disk / "inbox", done=disk / "done")
        data = batch(2000)
        world.drop(X, data)

        def power_fails() -> None:
            fd = os.open(disk, os.O_RDONLY)
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))  # FS_IOC_SHUTDOWN, without a flush of anything
            os.close(fd)

        world.when["upload.accepted"] = power_fails
        outcome = world.deliver(X)
        assert not isinstance(outcome, Done)
        subprocess.run(["umount", disk], check=True)
        mount(image, disk)
        (found,) = [path for path in disk.rglob(X) if path.is_file()]
        assert found.read_bytes() == data
        world.reopen()
        assert isinstance(world.deliver(X), Done)
        assert len(world.service.stored) == 1


# Targets.


def test_two_paths_of_one_host_are_two_targets(tmp_path: Path) -> None:
    """The same host and key: each file goes to the address of its own inbox, and events tell them apart."""
    with Server(saying(OK), saying(OK)) as server:
        base = f"http://127.0.0.1:{server.port}"
        inboxes = tuple(quick(tmp_path, name, Api(base_url=f"{base}/{name}/v1")) for name in "ab")
        for inbox in inboxes:
            (inbox.path / f"{inbox.name}.jsonl").write_bytes(batch(word=inbox.name))
        status, said = once(Config(inboxes=inboxes, state_dir=tmp_path / "state"))
        requests = [bytes(wire.received) for wire in server.wires]
    assert status == 0
    for name in (b"a", b"b"):
        (request,) = [text for text in requests if text.startswith(b"POST /" + name + b"/v1/files ")]
        assert b'filename="' + name + b"-" in request
    targets = {e["file"]: e["target"] for e in said if e["event"] == "upload.accepted"}
    assert len(set(targets.values())) == 2


def test_other_terms_for_the_same_address_are_kept(tmp_path: Path) -> None:
    """Inboxes that trust other authorities, or wait less long: none decides for the others."""
    authority = Authority(tmp_path)
    with StandIn(tls=authority.server_context("IP:127.0.0.1")) as service:
        trusting = Api(base_url=service.base_url, ca_bundle=authority.certificate)
        other = quick(tmp_path, "a", replace(trusting, ca_bundle=None))
        inboxes = (
            other,
            quick(tmp_path, "b", trusting),
            quick(tmp_path, "c", replace(trusting, read_timeout_s=1)),
        )
        for inbox in inboxes:
            (inbox.path / f"{inbox.name}.jsonl").write_bytes(batch(word=inbox.name))
        config = Config(inboxes=inboxes, state_dir=tmp_path / "state")
        ends = ("target.held", "file.done")
        said = drive(config, lambda said: sum(e["event"] in ends for e in said) == 3)
    assert {stored.filename[:2] for stored in service.stored} == {"b-", "c-"}
    (held,) = [e["target"] for e in said if e["event"] == "target.held"]
    accepted = {e["target"] for e in said if e["event"] == "upload.accepted"}
    assert len({held, *accepted}) == 3


# What must not be told.

TOKEN = "corp/Zm9vYmFy+token=="
"""A key of a form that no rule for keys knows, with characters that encoders write in other ways."""

WRITINGS = [TOKEN, TOKEN.replace("/", "\\/"), TOKEN.replace("+", "\\u002B"), TOKEN.replace("/", "%2f")]


@pytest.mark.parametrize("status", [200, 400, 401, 403, 429, 302, 502])
@pytest.mark.parametrize("written", WRITINGS)
def test_a_key_that_the_service_repeats_is_told_to_nobody(make: Make, status: int, written: str) -> None:
    """In the body, the trace id or the location, as it is or escaped: it is in no event and in no file."""
    loop = make(started=False, environ={"SILICONFLOW_API_KEY": TOKEN})
    text = f'"code":20012,"message":"token {written} it is","data":{{"id":"file-x","owner":"{written}"}}'
    headers = {
        "x-siliconcloud-trace-id": written,
        "Location": f"https://x/?k={written}",
        "Retry-After": written,
    }
    body = b"{" + text.encode() + b"}"
    loop.service.script.extend([Behaviour(stores=False, answer=reply(status, body, headers))] * 2)
    loop.service.listing = Listing(answer=reply(200, body, headers))
    lines: list[str] = []

    def hear(text: str) -> None:
        lines.append(text)
        loop._said(text)

    loop.log = lambda: event_log(hear, level="debug")  # type: ignore[method-assign]
    loop.start()
    loop.drop("a", X)
    loop.look().run(60)
    assert lines
    texts = [*lines, *(path.read_text() for path in loop.root.rglob("*.json"))]
    shown = "\n".join(texts)
    assert "Zm9vYmFy" not in shown
    assert b"Zm9vYmFy" not in b"".join(path.read_bytes() for path in (loop.root / "state").iterdir())
    loop.dropped.clear()
    loop.die()


def test_a_key_in_an_answer_that_is_no_http_is_told_to_nobody(world: World) -> None:
    """What the server said instead of a status line is quoted without it."""
    world.environ["SILICONFLOW_API_KEY"] = TOKEN
    with Server(*[saying(f"you are {TOKEN}\r\n\r\n".encode())] * 2) as server:
        world.client = Client(Api(base_url=server.url()), connections=1, user_agent="sfwatch/test")
        world.drop(X)
        outcome = world.deliver(X)
        world.client.close()
    assert isinstance(outcome, Deferred | Unknown)
    assert "Zm9vYmFy" not in outcome.verdict.detail
    assert "is no HTTP" in outcome.verdict.detail


@pytest.mark.parametrize(
    "proxy",
    [
        "http://user:hunter2@127.0.0.1:1",
        "http://user:hunter2@127.0.0.1:99999",
        "http://user:hunter2@[::1",
        "http://user:hunter2@",
        "http://user:hunter2/more@127.0.0.1:1",
        "http://user:more@hunter2@127.0.0.1:1",
        "http://user:hunter2#more@127.0.0.1:1",
        "user:hunter2@127.0.0.1:1",
        "user:hunter2",
        "socks5://user:hunter2@127.0.0.1:1",
    ],
)
def test_a_proxys_password_is_told_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """However the address is misspelt: the target is held, and says that it is the proxy, no more."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, proxy)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    inbox = quick(tmp_path, "a", Api(base_url="http://service.invalid/v1"))
    (inbox.path / X).write_bytes(batch())
    config = Config(inboxes=(inbox,), state_dir=tmp_path / "state")
    said = drive(config, lambda said: any(e["event"] == "target.held" for e in said))
    assert "hunter2" not in json.dumps(said)
    (held,) = [e for e in said if e["event"] == "target.held"]
    assert "proxy" in held["detail"].lower()


# Odd answers.


DEEP = b"[" * 900 + b"]" * 900


def test_an_answer_that_nests_very_deep_is_taken_once(world: World) -> None:
    """Nine hundred levels: one upload, done, and a sidecar that can be read."""
    world.drop(X)
    body = b'{"code":20000,"data":{"id":"file-deep","deep":' + DEEP + b"}}"
    world.service.script.append(Behaviour(answer=reply(200, body)))
    assert isinstance(world.deliver(X), Done)
    assert world.sidecar(X)["id"] == "file-deep"
    assert posts(world.service) == 1


def test_a_listing_that_nests_very_deep_is_read(make: Make) -> None:
    """As deep as that, and it shows the upload whose answer was lost: that is adopted."""
    loop = make()
    lose(loop)
    (stored,) = loop.service.stored
    entry = {"id": stored.id, "filename": stored.filename, "bytes": stored.bytes}
    text = json.dumps(entry).encode()[:-1] + b',"deep":' + DEEP + b"}"
    body = b'{"code":20000,"data":{"data":[' + text + b"]}}"
    loop.service.listing = Listing(answer=reply(200, body))
    loop.run(60)
    assert loop.done("a") == [X]
    assert loop.posts() == 1


# Other instances, and time.


def test_claims_of_an_instance_that_dies_later_are_adopted(make: Make) -> None:
    """Its lock is held for an hour, then it is gone: its files go on here, without a restart."""
    loop = make()
    path = loop.drop("a", X)
    theirs = loop.inbox_of("a") / ".sfwatch" / "0123456789abcdef-0a1b2c"
    theirs.mkdir(parents=True, mode=0o700)
    theirs.parent.chmod(0o700)
    path.rename(theirs / X)
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    loop.restart().run(3600)
    assert (theirs / X).exists()
    os.close(lock)
    loop.run(120)
    assert loop.done("a") == [X]
    assert loop.posts() == 1
    assert len(loop.said("claim.foreign")) == 1


def test_finished_files_are_forgotten_while_the_daemon_runs(make: Make) -> None:
    """After `history_days`, without a restart."""
    loop = make(config={"history_days": 2, "scan_interval_s": 3600.0})
    loop.drop("a", X)
    loop.look().run(5)
    where = address(loop.daemon.services[next(iter(loop.daemon.services))].name)
    ids = [stored.id for stored in loop.service.stored]
    loop.run(86400)
    assert loop.daemon.journal.known(where, ids)
    loop.run(3 * 86400)
    assert not loop.daemon.journal.known(where, ids)

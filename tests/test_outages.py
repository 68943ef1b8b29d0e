"""Outages of every kind, for hours: nothing moves, nothing is lost, few requests go out, and all goes on after.

Two hundred files wait. The hours are the simulated world's; the daemon, its journal and the folders are real.
"""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from simulation import HELD_REQUESTS, HONEST, KEY, NOT_STORED, STORED, Disk, Manner, World

from sfwatch.upstream import AHEAD

FILES = 200
HOURS = 6


@pytest.fixture(name="world")
def _world() -> Iterator[World]:
    world = World()
    world.luck = 0.0  # the shortest pauses
    yield world
    world.close()


@dataclass(frozen=True)
class Outage:
    """How the service treats uploads and listings, and why the target is held then."""

    post: Manner
    get: Manner
    reason: str


def both(kind: str, reason: str) -> Outage:
    return Outage(NOT_STORED[kind], NOT_STORED[kind], reason)


OUTAGES = {
    "401": both("401", "unauthorized"),
    "402, and listings work": Outage(NOT_STORED["402"], HONEST, "balance"),
    "402": both("402", "balance"),
    "403 of the balance": Outage(NOT_STORED["403 balance"], HONEST, "balance"),
    "403": both("403", "forbidden"),
    "404": both("404", "not_found"),
    "302": both("302", "redirect"),
    "413 of a proxy": Outage(NOT_STORED["413 of a proxy"], HONEST, "no_answers"),
    "certificate": both("certificate", "certificate"),
    "no connection": both("no connection", "unreachable"),
    "no name": both("no name", "name_resolution"),
    "proxy": both("proxy", "unreachable"),
    "500": both("500", "no_answers"),
    "500, and listings work": Outage(NOT_STORED["500"], HONEST, "no_answers"),
    "500, stored": Outage(STORED["stored, 500"], NOT_STORED["500"], "no_answers"),
    "502": both("502", "no_answers"),
    "502, stored": Outage(STORED["stored, 502"], NOT_STORED["502"], "no_answers"),
    "503 50505": both("503 50505", "overloaded"),
    "503 50508": both("503 50508", "overloaded"),
    "503 50603": both("503 50603", "overloaded"),
    "504": both("504", "no_answers"),
    "504, stored": Outage(STORED["stored, 504"], NOT_STORED["504"], "no_answers"),
    "silence": both("silence", "no_answers"),
    "silence, stored": Outage(STORED["stored, silence"], NOT_STORED["silence"], "no_answers"),
    "reset before the body": both("reset before the body", "overloaded"),
    "reset after the body": both("reset after the body", "no_answers"),
    "reset, stored": Outage(STORED["stored, reset"], NOT_STORED["reset after the body"], "no_answers"),
}


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES.keys())
def test_an_outage_moves_no_file_costs_few_requests_and_ends(world: World, outage: Outage) -> None:
    """For six hours all stay where they are; then each is uploaded, once."""
    world.remote.post, world.remote.get = outage.post, outage.get
    wait_in(world)
    outlast(world)
    assert ended(world) == 0
    assert [e["reason"] for e in world.said("target.held")] == [outage.reason]
    assert world.said("target.resumed") == []
    recovers(world)
    assert len(world.said("target.held")) == len(world.said("target.resumed")) == 1


@pytest.mark.parametrize("get", ["limited too", "honest"])
@pytest.mark.parametrize("kind", ["403 rate limit", "429", "429 and when"])
def test_a_rate_limit_of_hours_holds_nothing_and_costs_few_requests(world: World, kind: str, get: str) -> None:
    """One request at a time goes out, after pauses that grow; no file waits longer for it than the others."""
    world.remote.post = NOT_STORED[kind]
    world.remote.get = NOT_STORED[kind] if get == "limited too" else HONEST
    wait_in(world)
    outlast(world)
    assert ended(world) == 0
    assert world.said("target.held") == []
    recovers(world)


@pytest.mark.parametrize("kind", ["no name", "no connection", "503 50505", "500", "silence"])
def test_an_outage_in_the_midst_of_work(world: World, kind: str) -> None:
    """Some files are done, some under way when it begins; a name that resolved before is an outage, too."""
    wait_in(world)
    world.workers_rest = True
    world.run(300.0)
    for _ in range(50):
        world.work()
        world.settle_down()
    world.remote.post = world.remote.get = NOT_STORED[kind]
    world.workers_rest = False
    world.remote.requests.clear()
    outlast(world)
    assert ended(world) == 2 * 50
    assert len(world.said("target.held")) == 1
    assert world.said("target.resumed") == []
    recovers(world)
    assert len(world.said("target.held")) == len(world.said("target.resumed")) == 1


@pytest.mark.parametrize("kind", STORED.keys())
def test_an_outage_of_answers_alone(world: World, kind: str) -> None:
    """Every file is stored, and no upload is ever answered; the listing tells what became of each one tried."""
    world.remote.post = STORED[kind]
    wait_in(world)
    outlast(world, bound=6 * HELD_REQUESTS)
    assert len(world.remote.stored) == len(world.said("upload.started"))
    assert world.said("file.failed") == world.said("upload.resent") == []
    assert [e["reason"] for e in world.said("target.held")] == ["no_answers"]
    recovers(world)
    assert len(world.said("target.held")) == len(world.said("target.resumed")) == 1


def test_no_key_at_all(world: World) -> None:
    """Nothing is sent, not even for a listing; a key that comes ends it."""
    del world.environ["SILICONFLOW_API_KEY"]
    wait_in(world)
    outlast(world)
    assert world.remote.requests == []
    assert [e["reason"] for e in world.said("target.held")] == ["no_key"]
    world.environ["SILICONFLOW_API_KEY"] = KEY
    recovers(world)
    assert len(world.said("target.held")) == len(world.said("target.resumed")) == 1


@pytest.mark.parametrize("folder", ["done", "failed"])
def test_a_folder_that_is_away(world: World, folder: str) -> None:
    """As an unmounted one is: no file is sent, since there is no place for it; one event, and one after."""
    wait_in(world)
    world.take_away(world.folder("a", folder), put_a_file=False)
    outlast(world)
    assert world.remote.requests == []
    assert len(world.said("storage.held")) == 1
    recovers(world)
    assert len(world.said("storage.held")) == len(world.said("storage.resumed")) == 1


def test_done_is_no_folder_any_more(world: World) -> None:
    """What was accepted before anybody knew waits for its sidecar; nothing else is sent meanwhile."""
    wait_in(world)
    world.take_away(world.folder("a", "done"), put_a_file=True)
    outlast(world)
    at_once = world.uploads.concurrency + world.uploads.concurrency // AHEAD
    assert len(world.remote.stored) == len(world.remote.requests) <= at_once
    assert len(world.said("storage.held")) == 1
    recovers(world)
    assert len(world.said("storage.held")) == len(world.said("storage.resumed")) == 1


def test_a_state_folder_that_is_full(world: World) -> None:
    """Nothing is sent that could not be written down."""
    wait_in(world)
    Disk.full = True
    outlast(world)
    assert world.remote.requests == []
    assert len(world.said("storage.held")) == 1
    recovers(world)
    assert len(world.said("storage.held")) == len(world.said("storage.resumed")) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_disk_that_is_full(world: World) -> None:
    """The folder for done files lies on a disk of its own, on which no room is left."""
    wait_in(world)
    done = world.folder("a", "done")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", done], check=True)
    try:
        ballast = Path(done, "ballast")
        ballast.write_bytes(bytes(10 * 2**20))
        outlast(world)
        assert world.remote.requests == []
        assert [e["reason"] for e in world.said("storage.held")] == ["no_space"]
        ballast.unlink()
        recovers(world)
        assert len(world.said("storage.held")) == len(world.said("storage.resumed")) == 1
    finally:
        world.die()
        subprocess.run(["umount", done], check=True)


def wait_in(world: World) -> None:
    world.start()
    for number in range(FILES):
        world.drop("a", f"{number:03}.jsonl", world.fresh(), fine=True, renamed=True)


def outlast(world: World, *, bound: int = HELD_REQUESTS) -> None:
    """Let the hours go by: no file is condemned or lost, and in none of them many requests go out."""
    world.run(HOURS * 3600.0)
    world.check()
    assert world.said("file.failed") == world.said("file.vanished") == []
    assert busiest_hour(world) <= bound


def recovers(world: World) -> None:
    """All is mended: every file is done, and was stored once."""
    world.finish()
    late = list(world.folder("a", "done").glob("late *.jsonl"))
    assert len(list(world.folder("a", "done").glob("*.jsonl"))) == FILES + len(late)
    assert len(world.remote.stored) == FILES + len(late)


def ended(world: World) -> int:
    return sum(len(list(world.folder("a", end).iterdir())) for end in ("done", "failed"))


def busiest_hour(world: World) -> int:
    """The most requests within any hour so far."""
    times = [at for _, at in world.remote.requests]
    return max((sum(at <= other < at + 3600.0 for other in times) for at in times), default=0)

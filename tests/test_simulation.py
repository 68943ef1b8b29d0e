"""The whole daemon under random histories: users, outages, lost answers, full disks, restarts and crashes.

Each history is a walk of hypothesis' state machine through the simulated world of `simulation.py`. After every
step the promises of `World.check` are checked; at its end all is mended, and then every file must have ended,
with one upload for each that was accepted.

`make test` always walks the same histories. For others, and more of them, choose a seed and a number:

    SFWATCH_SEED=17 SFWATCH_WALKS=2000 pytest tests/test_simulation.py

A history that breaks a promise is made as short as possible and printed as a program (`state = Walk()`,
`state.drop(…)`, …): the lines can be run as they are. The same seed finds it again, as long as the code of the
machine is the same.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation import HONEST, HONEST_LAG_S, KEY, NOT_STORED, REFUSES, STORED, Disk, Fuse, World

from sfwatch.settings import OnUnknown, RemoteName, Uploads

STEPS_IN_A_WALK = 50
WALKS = 300
STEPS = 10_000

TOLD = (
    "crash",
    "upload.accepted",
    "upload.deferred",
    "upload.unknown",
    "upload.recovered",
    "upload.resent",
    "upload.undecided",
    "file.done",
    "file.failed",
    "file.changed",
    "file.vanished",
    "target.held",
    "storage.held",
    "inbox.lost",
)

MANNERS = {"honest": HONEST, "refuses": REFUSES, **NOT_STORED, **STORED}

MOMENTS = [None, "upload.started", "upload.accepted", "upload.unknown", "upload.recovered", "file.done"]
"""Events after which a process may end; None: at once."""

inboxes = st.sampled_from(["a", "b"])
NAMES = ["x.jsonl", "y.jsonl", "ü z.jsonl"]
names = st.sampled_from(NAMES)
some = st.integers(min_value=0, max_value=99)
manners = st.sampled_from(sorted(MANNERS))


class Walk(RuleBasedStateMachine):
    """One history. What a step cannot do just then, it leaves."""

    steps = 0
    seen: ClassVar[Counter[str]] = Counter()  # what has happened in all walks together

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @initialize(
        concurrency=st.integers(min_value=1, max_value=4),
        luck=st.sampled_from([0.0, 0.5, 0.99]),
        remote_name=st.sampled_from(RemoteName),
        on_unknown=st.sampled_from(OnUnknown),
        skew_s=st.sampled_from([0.0, 3.0, -90.0, 3600.0]),
        lag_s=st.sampled_from([0.0, 10.0, HONEST_LAG_S]),
        uploads_named=st.sampled_from(["kept", "kept", "kept", "rewritten", "cut", "cut in the listing"]),
    )
    def begin(
        self,
        *,
        concurrency: int,
        luck: float,
        remote_name: RemoteName,
        on_unknown: OnUnknown,
        skew_s: float,
        lag_s: float,
        uploads_named: str,
    ) -> None:
        uploads = Uploads(concurrency=concurrency, remote_name=remote_name, on_unknown=on_unknown)
        self.world.close()
        self.world = World(names=("a", "b"), uploads=uploads)
        self.world.luck = luck
        self.world.remote.skew_s = skew_s
        self.world.remote.names = uploads_named
        self.world.remote.lag_s = self.world.remote.usual_lag_s = lag_s
        self.world.start()

    # Users.

    @rule(inbox=inboxes, name=names, lines=st.integers(1, 3), renamed=st.booleans(), rings=st.booleans())
    def drop(self, *, inbox: str, name: str, lines: int, renamed: bool, rings: bool) -> None:
        self.world.drop(inbox, name, self.world.fresh(lines=lines), fine=True, renamed=renamed, rings=rings)

    @rule(inbox=inboxes, name=names, renamed=st.booleans())
    def drop_bad(self, *, inbox: str, name: str, renamed: bool) -> None:
        self.world.drop(inbox, name, self.world.fresh(fine=False), fine=False, renamed=renamed)

    @precondition(lambda self: self.world.is_good)
    @rule(inbox=inboxes, name=names, which=some)
    def drop_again(self, inbox: str, name: str, which: int) -> None:
        content = sorted(self.world.contents)
        sha256 = content[which % len(content)]
        data = self.world.contents[sha256]
        self.world.drop(inbox, name, data, fine=self.world.is_good[sha256], renamed=True)

    @precondition(lambda self: self.world.waiting())
    @rule(which=some, fine=st.booleans())
    def rewrite(self, *, which: int, fine: bool) -> None:
        files = self.world.waiting()
        self.world.rewrite(files[which % len(files)], self.world.fresh(fine=fine), fine=fine)

    @precondition(lambda self: self.world.waiting())
    @rule(which=some)
    def remove(self, which: int) -> None:
        files = self.world.waiting()
        self.world.remove(files[which % len(files)])

    @precondition(lambda self: self.world.waiting() and len(self.world.writers) < 2)
    @rule(which=some)
    def open_to_append(self, which: int) -> None:
        files = self.world.waiting()
        self.world.open_to_append(files[which % len(files)])

    @precondition(lambda self: self.world.writers)
    @rule(fine=st.booleans())
    def append(self, *, fine: bool) -> None:
        self.world.append(self.world.writers[0], self.world.fresh(fine=fine))

    @precondition(lambda self: self.world.writers)
    @rule()
    def stop_writing(self) -> None:
        self.world.stop_writing()

    @rule(kinds=st.lists(st.sampled_from([*sorted(STORED), "reset after the body", "silence"]), max_size=3))
    def lost_answers(self, *, kinds: list[str]) -> None:
        self.world.remote.script.extend(MANNERS[kind] for kind in kinds)
        for name in NAMES:
            self.world.drop("a", name, self.world.fresh(), fine=True, renamed=True)
        self.world.run(0.5)

    # Time.

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.1, 11.0]))
    def little_time(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(seconds=st.sampled_from([35.0, 301.0, 3600.0]))
    def much_time(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(rest=st.booleans())
    def workers(self, *, rest: bool) -> None:
        self.world.workers_rest = rest
        self.world.settle_down()

    @precondition(lambda self: self.world.pool.held)
    @rule(which=some)
    def one_job(self, which: int) -> None:
        self.world.one_job(which)

    # The service.

    @rule(post=manners, get=manners)
    def service(self, *, post: str, get: str) -> None:
        self.world.remote.post = MANNERS[post]
        self.world.remote.get = HONEST if get in STORED or get == "refuses" else MANNERS[get]

    @rule(kind=manners)
    def next_upload(self, *, kind: str) -> None:
        self.world.remote.script.append(MANNERS[kind])

    @rule(seconds=st.sampled_from([0.0, 3.0, 40.0]))
    def service_is_well(self, *, seconds: float) -> None:
        self.world.remote.heal()
        self.world.run(seconds)

    @rule(seconds=st.sampled_from([3.0, 40.0, 400.0]))
    def all_is_well(self, *, seconds: float) -> None:
        self.world.heal()
        self.world.run(seconds)

    @rule(
        lag_s=st.sampled_from([0.0, 10.0, HONEST_LAG_S]),
        page=st.sampled_from([1, 2, 3, 10_000]),
        most=st.sampled_from([100, 10_000]),
        after=st.sampled_from(["honoured", "honoured", "ignored", "empty"]),
        has_more=st.sampled_from(["told", "untold", "always"]),
        order=st.sampled_from(["newest", "oldest", "odd"]),
    )
    def listing(self, *, lag_s: float, page: int, most: int, after: str, has_more: str, order: str) -> None:
        """Listings in pages of every manner; none of them may cost a second upload."""
        remote = self.world.remote
        if self.world.was_rolled_back:  # what was sent before is unknown: only a whole listing shows it
            return
        remote.lag_s, remote.page, remote.most = lag_s, page, most
        remote.after, remote.has_more, remote.order = after, has_more, order

    @rule(shows=st.booleans())
    def no_listing(self, *, shows: bool) -> None:
        self.world.remote.shows = shows or self.world.was_rolled_back

    @rule(seconds=st.sampled_from([-3600.0, -10.0, 10.0, 86400.0]), whose=st.sampled_from(["ours", "theirs"]))
    def clock_steps(self, *, seconds: float, whose: str) -> None:
        """No clock decides anything."""
        if whose == "ours":
            self.world.clock_s += seconds
        else:
            self.world.remote.skew_s += seconds

    @rule(key=st.sampled_from([KEY, "sk-another", None]))
    def key(self, key: str | None) -> None:
        if key is None:
            self.world.environ.pop("SILICONFLOW_API_KEY", None)
        else:
            self.world.environ["SILICONFLOW_API_KEY"] = key

    @rule(inbox=inboxes, name=names)
    def newcomer_while_sending(self, inbox: str, name: str) -> None:
        data = self.world.fresh()
        self.world.remote.meanwhile = lambda: self.world.drop(inbox, name, data, fine=True, renamed=True)

    @precondition(lambda self: self.world.writers)
    @rule()
    def append_while_sending(self) -> None:
        data, fd = self.world.fresh(), self.world.writers[0]

        def append() -> None:
            if fd in self.world.writers:
                self.world.append(fd, data)

        self.world.remote.meanwhile = append

    # Folders, disks and ends.

    @rule(inbox=inboxes, name=st.sampled_from(["done", "done", "failed", "inbox"]), put_a_file=st.booleans())
    def folder_goes_away(self, *, inbox: str, name: str, put_a_file: bool) -> None:
        self.world.take_away(self.world.folder(inbox, name), put_a_file=put_a_file)

    @rule()
    def folders_are_back(self) -> None:
        self.world.bring_back()

    @rule(
        configured=st.sampled_from([("a",), ("b",), ("a", "b")]),
        concurrency=st.integers(min_value=1, max_value=4),
    )
    def reload(self, configured: tuple[str, ...], concurrency: int) -> None:
        self.world.reload(configured, replace(self.world.uploads, concurrency=concurrency))

    @rule(full=st.booleans())
    def state_folder(self, *, full: bool) -> None:
        Disk.full = full

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @rule()
    def state_folder_is_lost(self) -> None:
        """The next instance adopts what the one before left claimed."""
        self.world.lose_state()

    @rule(restore=st.booleans())
    def state_folder_is_rolled_back(self, *, restore: bool) -> None:
        """What was sent since then is found by its tag, if names have one and the listing is whole."""
        if self.world.uploads.remote_name is not RemoteName.TAGGED or self.world.remote.names.startswith("cut"):
            return
        self.world.restore_state() if restore else self.world.back_up_state()

    @precondition(lambda self: self.world.is_good)
    @rule(name=names, which=some)
    def another_instance_uploads(self, name: str, which: int) -> None:
        """The same bytes under the same name, on the same account."""
        content = sorted(self.world.contents)
        self.world.remote.store_for_another(name, self.world.contents[content[which % len(content)]])

    @rule(when=st.sampled_from(["before", "after"]), kind=st.sampled_from(["honest", *sorted(STORED)]))
    def crash_while_sending(self, when: str, kind: str) -> None:
        self.world.remote.script.append(replace(MANNERS[kind], crash=when))

    @rule(name=names, event=st.sampled_from(MOMENTS), lines=st.integers(min_value=1, max_value=1500))
    def crash(self, *, name: str, event: str | None, lines: int) -> None:
        self.world.drop("a", name, self.world.fresh(), fine=True, renamed=True)
        self.world.fuse = Fuse(lines if event else 2 * lines, event)  # a delivery takes 3,000 or so
        self.world.run(40.0)
        self.world.fuse = None

    # The promises.

    @invariant()
    def promises(self) -> None:
        Walk.steps += 1
        self.world.check()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self.world.finish()
        finally:
            Walk.seen.update(event["event"] for event in self.world.events)
            Walk.seen["crash"] += self.world.crashes
            self.world.close()


def how_to_walk() -> tuple[type[Walk], settings]:
    """Always the same walks, or those that the environment asks for."""
    seed, walks = os.environ.get("SFWATCH_SEED"), int(os.environ.get("SFWATCH_WALKS", WALKS))
    chosen = settings(
        max_examples=walks,
        stateful_step_count=STEPS_IN_A_WALK,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        report_multiple_bugs=False,
    )
    return (Walk if seed is None else hypothesis.seed(int(seed))(Walk)), chosen


@pytest.mark.timeout(3600)
def test_no_history_breaks_a_promise(capsys: pytest.CaptureFixture[str]) -> None:
    """At least ten thousand steps of users, service, disk and time, with restarts and crashes between them."""
    walk, chosen = how_to_walk()
    Walk.steps = 0
    Walk.seen.clear()
    run_state_machine_as_test(walk, settings=chosen)
    with capsys.disabled():
        sys.stdout.write(f"\nsimulation: {Walk.steps} steps in {chosen.max_examples} walks; {told()}\n")
    if chosen.derandomize:
        assert Walk.steps >= STEPS
        assert all(Walk.seen[event] for event in TOLD), "the walks do not come past all that they are for"


def told() -> str:
    return ", ".join(f"{Walk.seen[event]} {event}" for event in TOLD)


# Histories that broke a promise once.


@pytest.fixture(name="world")
def _world() -> Iterator[World]:
    world = World()
    world.start()
    yield world
    world.close()


def test_a_file_has_not_vanished_when_its_whole_inbox_is_away(world: World) -> None:
    """It was about to be looked at; the look at the inbox itself came later."""
    world.drop("a", "x.jsonl", world.fresh(), fine=True, renamed=False)
    world.settle_down()
    world.take_away(world.folder("a"), put_a_file=False)
    world.run(10.0)
    assert world.said("file.vanished") == []
    assert len(world.said("inbox.lost")) == 1
    world.finish()
    assert len(world.said("file.done")) == 1


def test_files_have_not_vanished_when_another_folder_is_in_place_of_their_inbox(world: World) -> None:
    """A bare mount point: they are back when their folder is."""
    world.remote.post = world.remote.get = NOT_STORED["401"]
    world.drop("a", "x.jsonl", world.fresh(), fine=True, renamed=False)
    world.drop("a", "y.jsonl", world.fresh(), fine=True, renamed=True)
    world.run(10.0)
    world.take_away(world.folder("a"), put_a_file=False)
    world.folder("a").mkdir()
    world.run(700.0)
    assert world.said("file.vanished") == []
    shutil.rmtree(world.folder("a"))
    world.finish()
    assert len(world.said("file.done")) == 2

"""The power is cut at random moments of a busy run, on real ext4: what was not synced is gone."""

import fcntl
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import world
from crash.sweep import FULL, Forks, Witness, said

from sfwatch import files
from sfwatch.settings import Api, Config, Inbox, Log, Uploads
from sfwatch.standin import Behaviour

CUTS = 75 if FULL else 4
SEED = 20261122
FILES = 30
SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN of ext4 and xfs
WITHOUT_ITS_LOG = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: not even what the journal of ext4 holds in memory is written

pytestmark = [world.needs_root, pytest.mark.timeout(1800)]


class Disk:
    """A small ext4 of its own, in a file, whose power can be cut."""

    def __init__(self, image: Path, mounted: Path) -> None:
        self.image = image
        self.mounted = mounted
        mounted.mkdir()
        with image.open("wb") as file:
            file.truncate(96 * 2**20)
        _run("mkfs.ext4", "-q", image)
        self.mount()

    def mount(self) -> None:
        """Mount it: ext4 brings itself into order from its journal."""
        _run("mount", "-o", "loop", self.image, self.mounted)

    def cut(self) -> None:
        """Let nothing more reach the disk, and forget all that has not reached it yet."""
        fd = os.open(self.mounted, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_ITS_LOG))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Unmount it."""
        _run("umount", self.mounted)


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


@contextmanager
def a_disk(folder: Path, name: str) -> Iterator[Disk]:
    """A disk for the block; without loop devices, as in most containers, the test is skipped."""
    try:
        disk = Disk(folder / f"{name}.img", folder / name)
    except OSError as error:
        pytest.skip(f"no ext4 can be mounted here: {error}")
    try:
        yield disk
    finally:
        disk.unmount()


class Site:
    """The folders of one cut, and what is known of the files in them."""

    def __init__(self, top: Path, state: Path, log: Path, service: Witness) -> None:
        self.top = top
        self.state = state
        self.log = log
        self.service = service
        self.dropped = {
            f"{number:02}.jsonl": world.batch(1 + number % 5, word=f"{top} {number}") for number in range(FILES)
        }

    def make(self) -> None:
        """Drop the files as careful droppers do: synced, and the folder, too."""
        self.service.begin_anew((), Behaviour())
        for folder in ("inbox", "done", "failed"):
            (self.top / folder).mkdir(parents=True)
        self.state.mkdir(parents=True)
        for name, data in self.dropped.items():
            with (self.top / "inbox" / name).open("wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())
        for made in (self.top / "inbox", self.top, self.top.parent, self.state.parent):
            with files.folder(made) as fd:
                os.fsync(fd)

    @property
    def config(self) -> Config:
        api = Api(base_url=self.service.base_url, allow_plain_http=True, read_timeout_s=5.0)
        inbox = Inbox(
            path=self.top / "inbox",
            name="inbox",
            done=self.top / "done",
            failed=self.top / "failed",
            settle_s=0.0,
            settle_unproven_s=0.0,
            api=api,
        )
        return Config(
            inboxes=(inbox,),
            uploads=Uploads(
                concurrency=4,
                first_retry_s=0.005,
                longest_retry_s=0.1,
                reconcile_window_s=0.0,
                poison_after=1000,
            ),
            poll_interval_s=0.05,
            state_dir=self.state,
            log=Log(level="debug", format="json", file=self.log),
        )

    def wrong(self) -> Iterator[str]:
        """What is wrong in the end: each file in done with its sidecar, stored once, and nothing else."""
        done = {path.name: path for path in (self.top / "done").iterdir()}
        wanted = {name for file in self.dropped for name in (file, f"{file}.fileid.json")}
        left = [path for path in (self.top / "inbox").rglob("*") if not path.is_dir()]
        left = [path for path in left if path.parent.name != ".sfwatch" or path.suffix != ".owner"]  # it stays
        left += list((self.top / "failed").iterdir())
        if done.keys() != wanted or left:
            more, less = sorted(done.keys() - wanted), sorted(wanted - done.keys())
            yield f"too much in done: {more}, missing: {less}, left elsewhere: {list(map(str, left))}"
            return
        for name, data in self.dropped.items():
            yield from self._wrong_file(done[name], done[f"{name}.fileid.json"], data)

    def _wrong_file(self, file: Path, sidecar: Path, data: bytes) -> Iterator[str]:
        if file.read_bytes() != data:
            yield f"{file.name} has other bytes"
        document = json.loads(sidecar.read_bytes())
        stored = [(s.id, s.sha256) for s in self.service.stored if s.filename.startswith(f"{file.stem}-")]
        if stored != [(document["id"], world.sha256(data))]:
            yield f"{file.name}: its sidecar says {document['id']}, stored are {stored}"
        if document["sfwatch"]["sha256"] != world.sha256(data):
            yield f"{file.name}: its sidecar gives another digest"


@pytest.mark.parametrize("apart", [False, True], ids=["state on the same disk", "state on another disk"])
def test_after_a_power_cut_every_file_is_done_and_was_stored_once(
    *, apart: bool, forks: Forks, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    """Whatever the disk has forgotten, the next run ends what the one before had begun."""
    wrong: list[str] = []
    under_way = 0
    with ExitStack() as stack:
        service = stack.enter_context(Witness(key=world.KEY))
        service.one_by_one = False
        disk = stack.enter_context(a_disk(tmp_path, "disk"))
        other = stack.enter_context(a_disk(tmp_path, "other")) if apart else disk

        def site(name: str) -> Site:
            return Site(disk.mounted / name, other.mounted / f"state-{name}", tmp_path / "log", service)

        lasts_s = min(_lasts_s(site("first"), forks), _lasts_s(site("second"), forks))
        for number in range(CUTS):
            luck = random.Random(SEED + number)
            found = _cut(site(f"{number}"), [disk, other] if apart else [disk], forks, lasts_s, luck)
            under_way += found is not None
            wrong += [f"cut {number}: {what}" for what in found or []]
    where = "on another disk" if apart else "on the same disk"
    tell(f"power cuts, state {where}: {CUTS}, {under_way} of them with files under way")
    assert under_way >= CUTS // 2
    assert not wrong, said(wrong)


def _lasts_s(site: Site, forks: Forks) -> float:
    """How long a run takes that nothing happens to."""
    site.make()
    began = time.monotonic()
    assert forks.run(site.config, drain_s=20.0).status == 0
    lasts_s = time.monotonic() - began
    assert list(site.wrong()) == []
    return lasts_s


def _stop(pid: int) -> None:
    """Let none of its threads run on; one that waits for a disk stops before it learns what came of it."""
    with suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, signal.SIGSTOP)
        world.wait_for(lambda: all(_state(task) in "TDZ" for task in Path(f"/proc/{pid}/task").iterdir()))


def _state(task: Path) -> str:
    """From proc(5), /proc/pid/stat: T is stopped, D waits for a disk."""
    return (task / "stat").read_text().rpartition(") ")[2][0]


def _cut(site: Site, disks: list[Disk], forks: Forks, lasts_s: float, luck: random.Random) -> list[str] | None:
    """What is wrong after a cut and a second run; None if the first had ended before."""
    site.make()
    pid = forks.start(site.config, drain_s=20.0)
    uploads = luck.randrange(FILES)  # not a time: a machine that is busy now may be idle in a second
    world.wait_for(lambda: len(site.service.stored) >= uploads)
    time.sleep(luck.uniform(0.0, lasts_s / FILES))
    _stop(pid)  # nobody acts any more once the power is gone, not even on a sync that ext4 calls done then
    for disk in luck.sample(disks, len(disks)):
        disk.cut()
    with suppress(ProcessLookupError):  # it had ended before
        os.kill(pid, signal.SIGKILL)
    ended = forks.wait()
    site.service.settle_down()
    for disk in disks:
        disk.unmount()
        disk.mount()
    again = forks.run(site.config, drain_s=20.0)
    site.service.settle_down()
    wrong = list(site.wrong())
    if again.status != 0:
        wrong.append(f"the second run ended with {again.status}")
    # What the disk itself has lost of a folder that is not needed any more is no fault of the program.
    shutil.rmtree(site.top, ignore_errors=True)
    shutil.rmtree(site.state, ignore_errors=True)
    return wrong if ended.status else None  # it may have ended by itself, of what it read after the cut

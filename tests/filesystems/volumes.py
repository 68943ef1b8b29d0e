"""Filesystems of every kind that one machine can mount, each fresh and small, for as long as a block lasts."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import path_of
from sshd import ssh_server


@dataclass(frozen=True)
class Volume:
    """A mounted filesystem. `behind`: where others can write to it so that this kernel does not see them."""

    mounted: Path
    behind: Path | None = None


Mount = Callable[[Path], contextlib.AbstractContextManager[Volume]]


@dataclass(frozen=True)
class Kind:
    """A filesystem, and what sfwatch has to make of it."""

    mount: Mount
    fs_types: frozenset[str]
    """How /proc/self/mountinfo may name it."""

    local: bool
    programs: tuple[str, ...] = ()


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"it can't be mounted here: {' '.join(map(str, command))}: {done.stderr.strip()}")


@contextlib.contextmanager
def _mounted(mounted: Path, *command: str | Path) -> Iterator[None]:
    """Mount by this command; lazily unmounted at the end, whoever is still in it."""
    mounted.mkdir()
    _run(*command, mounted)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", mounted], check=True)


def _disk(kind: str, *, megabytes: int) -> Mount:
    """A filesystem in a file, by a loop device."""

    @contextlib.contextmanager
    def mount(folder: Path) -> Iterator[Volume]:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(megabytes * 2**20)
        _run(path_of(f"mkfs.{kind}"), "-q", image)
        with _mounted(folder / "mounted", "mount", "-o", "loop", image):
            yield Volume(folder / "mounted")

    return mount


@contextlib.contextmanager
def _tmpfs(folder: Path) -> Iterator[Volume]:
    with _mounted(folder / "mounted", "mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        yield Volume(folder / "mounted")


@contextlib.contextmanager
def _overlay(folder: Path) -> Iterator[Volume]:
    for name in ("lower", "upper", "work"):
        (folder / name).mkdir()
    layers = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
    with _mounted(folder / "mounted", "mount", "-t", "overlay", "-o", layers, "overlay"):
        yield Volume(folder / "mounted")


@contextlib.contextmanager
def _bindfs(folder: Path) -> Iterator[Volume]:
    (folder / "behind").mkdir()
    with _mounted(folder / "mounted", "bindfs", folder / "behind"):
        yield Volume(folder / "mounted", folder / "behind")


@contextlib.contextmanager
def _sshfs(folder: Path) -> Iterator[Volume]:
    (folder / "behind").mkdir()
    with ssh_server(folder / "ssh") as (port, options):
        more = [*options, "-o", f"IdentityFile={folder}/ssh/user", "-p", str(port)]
        more += ["-o", "dcache_timeout=2"]  # lists of names are kept for 20 s otherwise
        with _mounted(folder / "mounted", "sshfs", *more, f"root@127.0.0.1:{folder}/behind"):
            yield Volume(folder / "mounted", folder / "behind")


KINDS = {
    "ext4": Kind(_disk("ext4", megabytes=64), frozenset({"ext4"}), local=True, programs=("mkfs.ext4",)),
    "xfs": Kind(_disk("xfs", megabytes=320), frozenset({"xfs"}), local=True, programs=("mkfs.xfs",)),
    "btrfs": Kind(_disk("btrfs", megabytes=128), frozenset({"btrfs"}), local=True, programs=("mkfs.btrfs",)),
    "tmpfs": Kind(_tmpfs, frozenset({"tmpfs"}), local=True),
    "overlay": Kind(_overlay, frozenset({"overlay"}), local=False),
    "bindfs": Kind(_bindfs, frozenset({"fuse", "fuse.bindfs"}), local=False, programs=("bindfs",)),
    "sshfs": Kind(_sshfs, frozenset({"fuse.sshfs"}), local=False, programs=("sshfs", "sshd", "ssh-keygen")),
}

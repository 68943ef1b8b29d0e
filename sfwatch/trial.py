"""A file of our own goes the way that every dropped file will go, and leaves nothing behind.

It is made in the inbox, claimed, filed under done and under failed, and given back, each step a rename that
replaces nothing, with its fsync. Permission bits alone prove little (ACLs, sticky folders, read-only mounts,
chattr), so they only explain what has failed.

A daemon may be at work in the same folders. Its eyes pass over hidden names, and what is put into its
`.sfwatch` is a file, which no instance takes for another's folder of claims. A trial that was killed may leave
a file or folder named `.sfwatch-XXXXXXXX.tmp`.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sfwatch import claim, files
from sfwatch.files import Lease
from sfwatch.notes import Level, Note
from sfwatch.obstacles import PROBE, Blocked, doing, folder_of_ours, make_a_file, opened, tried
from sfwatch.settings import Inbox

_CAP_LEASE = 1 << 28  # capability.h
_WHOLE_UID_MAP = ["0", "0", "4294967295"]  # user_namespaces(7): the initial namespace's


@dataclass(slots=True)
class _Probe:
    """A file of ours, and the folder that it lies in now."""

    name: str
    folder: int

    def move(self, target: int) -> None:
        """As the daemon does it: replacing nothing, and durable on both sides."""
        files.rename_noreplace(self.name, self.name, src_dir_fd=self.folder, dst_dir_fd=target)
        source, self.folder = self.folder, target
        files.sync_folder(target)
        files.sync_folder(source)


def walk(inbox: Inbox, present: Mapping[str, Path], *, trusted: bool) -> list[Note]:
    about = f"inbox {inbox.path}"
    with ExitStack() as stack:  # what is opened stays so until the probe is gone, wherever it lies then
        with doing("can't be opened", inbox.path):
            top = stack.enter_context(opened(inbox.path))
        targets, notes = _open_targets(present, stack)
        claims = stack.enter_context(_claims(top, inbox.path))
        probe = stack.enter_context(_probe(top, inbox.path))
        notes += [_leases(inbox, probe)] if trusted else []
        with doing("a file can't be claimed", inbox.path):
            probe.move(claims)
        notes += [tried(name, partial(_filed, probe, claims, *target)) for name, target in targets.items()]
        with doing("a file can't be given back", inbox.path):
            probe.move(top)
    return [Note(Level.OK, about, "files can be made, claimed and given back"), *notes]


def _open_targets(
    present: Mapping[str, Path], stack: ExitStack
) -> tuple[dict[str, tuple[int, Path]], list[Note]]:
    folders: dict[str, tuple[int, Path]] = {}
    notes: list[Note] = []
    for role, path in present.items():
        if role == "inbox":
            continue
        try:
            with doing("can't be opened", path):
                folders[f"{role} {path}"] = (stack.enter_context(opened(path)), path)
        except Blocked as blocked:
            notes.append(Note(Level.FINDING, f"{role} {path}", str(blocked)))
    return folders, notes


@contextmanager
def _claims(top: int, inbox: Path) -> Iterator[int]:
    """The folder of claims if it is there and ours alone, else one like it for as long as we need it.

    `.sfwatch` itself is not made here: a daemon that starts now might be at it, and we would take it away.
    """
    if files.exists(claim.FOLDER, dir_fd=top):
        with doing(f"{claim.FOLDER} can't be read", inbox / claim.FOLDER):
            claim.folders(inbox)  # for its look at the folders' owners and modes
            fd = files.open_folder(claim.FOLDER, dir_fd=top)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    with ExitStack() as stack:
        with doing("no folder can be made there", inbox):
            fd = stack.enter_context(folder_of_ours(top))
        yield fd


@contextmanager
def _probe(top: int, inbox: Path) -> Iterator[_Probe]:
    with doing("no file can be made there", inbox):
        with files.temporary(top) as (fd, name):
            files.write_all(fd, PROBE)
            os.fsync(fd)
    probe = _Probe(name, top)
    try:
        yield probe
    finally:
        with doing(f"our {probe.name} can't be removed again, do that by hand", inbox):
            os.unlink(probe.name, dir_fd=probe.folder)


def _filed(probe: _Probe, claims: int, target: int, folder: Path) -> str:
    """File the probe there and, since it is to go on, take it back."""
    with doing("files can't be moved there", folder):
        try:
            probe.move(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            make_a_file(target)
            return "takes files; it is on another filesystem (rename gives EXDEV): they will be copied"
    with doing("files can't be moved from there again", folder):
        probe.move(claims)
    return "takes files, by rename"


# ---- whether the kernel vouches for files ----


def _leases(inbox: Inbox, probe: _Probe) -> Note:
    about = f"inbox {inbox.path}"
    with doing("our own file can't be read", inbox.path):
        with files.regular(probe.name, dir_fd=probe.folder) as fd:
            lease = files.probe_lease(fd)
    text = vouching(lease, for_others=may_lease(*_capability()), rest_s=inbox.settle_unproven_s)
    return Note(Level.WARNING if lease is Lease.UNPROVEN else Level.OK, about, text)


def vouching(lease: Lease, *, for_others: bool, rest_s: float) -> str:
    """What the kernel's word on writers is worth here."""
    if lease is Lease.UNPROVEN:
        return f"the filesystem knows no leases: every file rests for {rest_s:g} s before it is taken"
    if for_others:
        return "the kernel tells who still writes to a file, also to other users' files"
    return (
        "the kernel tells who still writes to files of our own; for other users' files that takes CAP_LEASE,"
        f" which this shell lacks and the systemd unit grants: without it they rest for {rest_s:g} s"
    )


def _capability() -> tuple[str, str]:
    return Path("/proc/self/status").read_text(encoding="utf-8"), Path("/proc/self/uid_map").read_text("ascii")


def may_lease(status: str, uid_map: str) -> bool:
    """Whether a process of this /proc/self/status and uid_map has CAP_LEASE, where it counts.

    The kernel asks for it in the initial user namespace; a capability in another one looks the same, and has
    no effect on other users' files.
    """
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) & _CAP_LEASE) and uid_map.split() == _WHOLE_UID_MAP

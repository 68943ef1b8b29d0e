"""What keeps us from using a folder is found by using it, and told with what would put it right."""

import errno
import os
import secrets
import shlex
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sfwatch import claim, files
from sfwatch.notes import Level, Note
from sfwatch.users import login, user

PROBE = b"sfwatch check\n"
"""What stands in a file that is only tried out."""


class Blocked(Exception):  # noqa: N818 - a finding, not an error of ours
    """Something that the daemon would have to do can't be done; the text says what, why, and what to do."""


@contextmanager
def doing(what: str, folder: Path) -> Iterator[None]:
    """Name what was being done in which folder when it failed."""
    try:
        yield
    except OSError as error:
        raise Blocked(f"{what}: {error.strerror or error}; {remedy(folder, error)}") from error


def remedy(folder: Path, error: OSError) -> str:
    match error.errno:
        case errno.EROFS:
            return "its filesystem is mounted read-only: mount it read-write"
        case errno.ENOSPC | errno.EDQUOT:
            return "its filesystem is full: make room"
        case errno.EACCES | errno.EPERM:
            return standing(folder)
        case errno.ENOENT:
            return "mount it, or make it"
        case errno.ENOTDIR | errno.ELOOP | errno.EEXIST:
            return "something else has its place: move that away, or name another folder"
        case _:
            return "look at the disk and at the kernel's log (dmesg)"


def standing(folder: Path) -> str:
    """Who the folder belongs to, who we are, and what would let us in."""
    me = user(os.geteuid())
    try:
        st = folder.stat()
    except OSError:
        return f"let {me} enter the folders above it (chmod +x)"
    mode = stat.S_IMODE(st.st_mode)
    return (
        f"it belongs to {user(st.st_uid)}, mode {mode:04o}, and this is {me}:"
        f" chown {login(os.geteuid())} {quoted(folder)}"
        " (or look for chattr and ACLs: lsattr -d, getfacl)"
    )


def quoted(path: Path) -> str:
    return shlex.quote(str(path))


def tried(about: str, trial: Callable[[], str]) -> Note:
    """What a trial says of itself, or what it was blocked by."""
    try:
        return Note(Level.OK, about, trial())
    except Blocked as blocked:
        return Note(Level.FINDING, about, str(blocked))


def make_a_file(fd: int) -> None:
    """Make one, durably, and take it away again."""
    with files.temporary(fd) as (made, name):
        files.write_all(made, PROBE)
        os.fsync(made)
        os.unlink(name, dir_fd=fd)
    files.sync_folder(fd)


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """The folder itself; its own path is the administrator's and may lead through links.

    Where chattr(1) keeps names from being removed, nothing is tried: it would stay for ever.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if claim.is_pinned(fd):
            raise Blocked(f"it is immutable or append-only (lsattr -d): chattr -i -a {quoted(folder)}")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def folder_of_ours(dir_fd: int) -> Iterator[int]:
    """A private folder in another one, for a moment."""
    name = f"{files.TEMPORARY_PREFIX}{secrets.token_hex(4)}.tmp"
    fd = files.make_folder(dir_fd, name, 0o700)
    try:
        yield fd
    finally:
        os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)

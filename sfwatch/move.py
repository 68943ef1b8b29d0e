"""A move overwrites nothing, survives power loss, and moves only the file that was sent.

Within a filesystem it is one rename. Between two (also between two bind mounts of one, which no number in
`stat` tells beforehand) it is a copy that is made from the open file, checked, made durable and only then
published; the source goes last. After any error the source lies whole where it lay, but for one: when a folder
can't be made durable after the rename, the file may already lie at the target. After a crash between the last
two steps of a copy the file lies in both places: `finish` ends that.
"""

import errno
import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass

from sfwatch import files

_BLOCK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Moved:
    """How it went: "rename" or "copy"."""

    how: str


class SourceChanged(Exception):  # noqa: N818 (nothing went wrong here: somebody else was at work)
    """What lies at the source is not the file that was sent; it is left, or put back, there."""


def move(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str, *, fd: int, sha256: str) -> Moved:
    """Move the file that `fd` was opened from and whose digest (hex) was taken as it was sent.

    Names are single components. FileExistsError: `dst` is taken. FileNotFoundError: `src` is gone.
    SourceChanged: see there. Any other OSError, as a full disk, unchanged.
    """
    sent = os.fstat(fd)
    if not _is_sent(src_dir_fd, src, sent, sha256):
        raise SourceChanged(f"{src!r} was replaced by another file after it had been sent")
    try:
        files.rename_noreplace(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(src_dir_fd, src, dst_dir_fd, dst, fd=fd, sha256=sha256)
        return Moved("copy")
    _require_moved(src_dir_fd, src, dst_dir_fd, dst, sent=sent, sha256=sha256)
    files.sync_rename(src_dir_fd, dst_dir_fd)
    return Moved("rename")


def finish(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str, *, fd: int, sha256: str) -> bool:
    """After a crash: end a move whose target was published and whose source was not yet removed.

    True if `dst` is whole, of this digest, and the source is gone now; False if the move has to be made anew.
    Only for a `dst` that was reserved for this very file, else two files of the same content become one.
    """
    if not files.exists(dst, dir_fd=dst_dir_fd) or not _is_sent(dst_dir_fd, dst, os.fstat(fd), sha256):
        return False
    with files.regular(dst, dir_fd=dst_dir_fd) as whole:
        if digest(whole) != sha256:
            return False
        os.fsync(whole)
    files.sync_folder(dst_dir_fd)
    _remove_source(src_dir_fd, src, fd)
    return True


def digest(fd: int) -> str:
    """SHA-256 (hex) of all that an open file holds; the file's position stays where it is."""
    taken = hashlib.sha256()
    position = 0
    while block := os.pread(fd, _BLOCK, position):
        taken.update(block)
        position += len(block)
    return taken.hexdigest()


def _is_sent(dir_fd: int, name: str, sent: os.stat_result, sha256: str) -> bool:
    """Whether the name leads to the file that was sent, or else to the very bytes.

    The inode number decides. The bytes have a say because sshfs changes the number with each rename.
    """
    found = files.lstat(name, dir_fd=dir_fd)
    if (found.st_dev, found.st_ino) == (sent.st_dev, sent.st_ino):
        return True
    if files.kind_of(found.st_mode) is not None or found.st_size != sent.st_size:
        return False
    with files.regular(name, dir_fd=dir_fd) as other:
        return digest(other) == sha256


def _require_moved(
    src_dir_fd: int, src: str, dst_dir_fd: int, dst: str, *, sent: os.stat_result, sha256: str
) -> None:
    """Put back what a replacement between the look and the rename brought to the target."""
    if _is_sent(dst_dir_fd, dst, sent, sha256):
        return
    try:
        files.rename_noreplace(dst, src, src_dir_fd=dst_dir_fd, dst_dir_fd=src_dir_fd)
    except FileExistsError:
        raise SourceChanged(
            f"{src!r} was replaced twice while it was moved; what came first lies in the target as {dst!r}"
        ) from None
    raise SourceChanged(f"{src!r} was replaced by another file while it was moved")


def _copy(src_dir_fd: int, src: str, dst_dir_fd: int, dst: str, *, fd: int, sha256: str) -> None:
    with files.temporary(dst_dir_fd) as (copy, made):
        _copy_bytes(fd, copy, sha256)
        _copy_numbers(fd, copy)
        os.fsync(copy)
        _require_faithful(copy, sha256)
        files.rename_noreplace(made, dst, src_dir_fd=dst_dir_fd, dst_dir_fd=dst_dir_fd)
        try:
            files.sync_folder(dst_dir_fd)
            _remove_source(src_dir_fd, src, fd)
        except OSError:
            if _same_inode(src_dir_fd, src, fd):
                _take_back(dst_dir_fd, dst, copy)
            raise


def _copy_bytes(fd: int, copy: int, sha256: str) -> None:
    taken = hashlib.sha256()
    position = 0
    while block := os.pread(fd, _BLOCK, position):
        taken.update(block)
        files.write_all(copy, block)
        position += len(block)
    if taken.hexdigest() != sha256:
        raise SourceChanged("the file was written to after it had been sent")


def _copy_numbers(fd: int, copy: int) -> None:
    """As far as we may and the filesystem can: user attributes, owner, permissions, time of the last change.

    Never a setuid or setgid bit. The time comes last, since what is before it changes it.
    """
    st = os.fstat(fd)
    _copy_attributes(fd, copy)
    _copy_owner(st, copy)
    with suppress(OSError):
        os.fchmod(copy, st.st_mode & 0o777)
    with suppress(OSError):
        os.utime(copy, ns=(st.st_atime_ns, st.st_mtime_ns))


def _copy_attributes(fd: int, copy: int) -> None:
    with suppress(OSError):
        for name in os.listxattr(fd):
            if name.startswith("user."):
                os.setxattr(copy, name, os.getxattr(fd, name))


def _copy_owner(st: os.stat_result, copy: int) -> None:
    """A user who may not give files away may still give them to a group of his own."""
    with suppress(OSError):
        os.fchown(copy, -1, st.st_gid)
    with suppress(OSError):
        os.fchown(copy, st.st_uid, -1)


def _require_faithful(copy: int, sha256: str) -> None:
    """Read back what was stored, from the disk where the kernel lets go of its memory of it."""
    with suppress(OSError):
        os.posix_fadvise(copy, 0, 0, os.POSIX_FADV_DONTNEED)
    if digest(copy) != sha256:
        raise OSError(errno.EIO, "the copy reads back otherwise than it was written: is the disk failing?")


def _remove_source(src_dir_fd: int, src: str, fd: int) -> None:
    """Only the file itself: a newcomer of its name was never sent and stays, and one that is gone is gone."""
    if _same_inode(src_dir_fd, src, fd):
        with suppress(FileNotFoundError):
            os.unlink(src, dir_fd=src_dir_fd)
    files.sync_folder(src_dir_fd)


def _take_back(dst_dir_fd: int, dst: str, copy: int) -> None:
    """The source can't be removed: the copy goes, so that the file is in one place only."""
    with suppress(OSError):
        if _same_inode(dst_dir_fd, dst, copy):
            os.unlink(dst, dir_fd=dst_dir_fd)
            files.sync_folder(dst_dir_fd)


def _same_inode(dir_fd: int, name: str, fd: int) -> bool:
    """False also if there is nothing of that name."""
    try:
        found, sent = files.lstat(name, dir_fd=dir_fd), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (sent.st_dev, sent.st_ino)

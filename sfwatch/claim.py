"""A file that is being worked on lies where nobody else can reach it: `<inbox>/.sfwatch/<instance>/<name>`.

The folder is on the inbox's own mount and ours alone (0700), so a claim is one rename: who comes back by the
old name makes a new file, a replacement can't hit the one under way, and two daemons can't take the same one.
Only names below the inbox are distrusted; its own path is the administrator's and may lead through links.

Descriptors of these folders live for one call only. The exception is `lock`, for as long as there are claims.
"""

import errno
import fcntl
import os
import pwd
import secrets
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sfwatch import files

FOLDER = ".sfwatch"
"""The folder at the top of an inbox that holds the claims of all instances."""

_PRIVATE = 0o700
_NOT_OURS_TO_MOVE = frozenset({errno.EPERM, errno.EACCES, errno.EROFS, errno.EXDEV})
_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, see ioctl_iflags(2)
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
_TRIES = 100
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ClaimError(Exception):
    """Why a file can't be had: `reason` is namesake, cannot_move, unsafe or foreign; `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class _TidiedAwayError(Exception):
    """A folder among the claims came or went under our hands: to be tried again."""


def claims_folder(inbox: Path, instance: str) -> Path:
    return inbox / FOLDER / instance


def prepare(inbox: Path, instance: str) -> None:
    """Make the folder for claims, or see that the one there is safe.

    ClaimError: "unsafe" with what to do, or "cannot_move" if the inbox is not ours to write to.
    FileNotFoundError if the inbox is gone; other OSErrors, as a full disk, unchanged.
    """
    with files.trusted_folder(inbox) as top, _ours(inbox, instance, top, make=True):
        pass


def take(inbox: Path, instance: str, name: str) -> None:
    """Claim a file by its relative name, durably.

    FileNotFoundError: it (or the inbox) is gone. NotRegular: it is no regular file, or a link leads to it.
    ClaimError: "namesake" while we hold one of that name, "cannot_move" with the right that is missing,
    "unsafe" if the folder for claims is not ours alone. Other OSErrors, as a full disk, unchanged; where
    making the claim durable fails (EIO), it is made all the same.
    """
    fd = take_and_open(inbox, instance, name)
    if fd is not None:
        files.close(fd)


def take_and_open(inbox: Path, instance: str, name: str) -> int | None:
    """`take`, and the file open for reading; None if that can't be had: `open_claimed` says why."""
    _require_outside(name)
    for _ in range(_TRIES):  # another thread may tidy the folders for claims away while we are under way
        with files.trusted_folder(inbox) as top, suppress(_TidiedAwayError):
            return _taken_from(top, inbox, instance, name)
    raise ClaimError("namesake", f"the folders for the claim of {name!r} are never left in peace")


def _require_outside(name: str) -> None:
    if files.parts(name)[0] == FOLDER:
        raise ValueError(f"{name!r} is in the folder of claims itself")


def _taken_from(top: int, inbox: Path, instance: str, name: str) -> int | None:
    try:
        with files.parent(top, name) as (source, base):
            files.require_regular(files.lstat(base, dir_fd=source), name)
            with _ours(inbox, instance, top, make=True) as mine:
                return _taken(source, base, mine, inbox, name)
    except PermissionError as error:
        folder = str((inbox / name).parent)
        raise ClaimError(
            "cannot_move", f"{folder!r} can't be opened: let our group read and enter it"
        ) from error


def _taken(source: int, base: str, mine: int, inbox: Path, name: str) -> int | None:
    try:
        with files.parent(mine, name, make=_PRIVATE) as (target, _):
            return _rename(source, base, target)
    except FileNotFoundError:
        _require_no_file_in_the_way(mine, name)
        raise _TidiedAwayError from None
    except FileExistsError:
        if _tidied(mine, name):
            raise _TidiedAwayError from None
        raise ClaimError("namesake", f"an earlier {name!r} is still under way") from None
    except OSError as error:
        if error.errno not in _NOT_OURS_TO_MOVE:
            raise
        raise ClaimError("cannot_move", _why_not(error, source, base, inbox / name)) from error


def _require_no_file_in_the_way(mine: int, name: str) -> None:
    """A file under way may have the name that is now a folder's."""
    *folders, _ = files.parts(name)
    for depth in range(1, len(folders) + 1):
        with suppress(FileNotFoundError), files.parent(mine, "/".join(folders[:depth])) as (around, base):
            if not stat.S_ISDIR(files.lstat(base, dir_fd=around).st_mode):
                raise ClaimError("namesake", f"an earlier {'/'.join(folders[:depth])!r} is still under way")


def _rename(source: int, base: str, target: int) -> int | None:
    files.rename_noreplace(base, base, src_dir_fd=source, dst_dir_fd=target)
    kind = files.kind_of(files.lstat(base, dir_fd=target).st_mode)
    if kind is not None:  # it was swapped after we had looked
        _return_swapped(source, base, target)
        raise files.NotRegular(kind, base)
    files.sync_rename(source, target)
    with suppress(OSError):
        return _open(base, target)
    return None


def _open(base: str, folder: int) -> int:
    """Open what was seen in our folder to be a regular file: nobody else can have put anything in its place."""
    return os.open(base, _READING, dir_fd=folder)


def _return_swapped(source: int, base: str, target: int) -> None:
    """Back under its name or, if even that is taken again, under one that can't be: it may be a full folder."""
    try:
        files.rename_noreplace(base, base, src_dir_fd=target, dst_dir_fd=source)
    except FileExistsError:
        other = f"sfwatch-returned-{secrets.token_hex(8)}"
        files.rename_noreplace(base, other, src_dir_fd=target, dst_dir_fd=source)


def _tidied(mine: int, name: str) -> bool:
    """Whether it was only a left-over folder that had the name among the claims."""
    _discard_empty(mine)
    try:
        with files.parent(mine, name) as (target, base):
            return not files.exists(base, dir_fd=target)
    except FileNotFoundError:
        return True


def open_claimed(inbox: Path, instance: str, name: str) -> int:
    """Open a claimed file for reading. FileNotFoundError, NotRegular, ClaimError("unsafe")."""
    with place(inbox, instance, name) as (folder, base):
        files.require_regular(files.lstat(base, dir_fd=folder), base)
        return _open(base, folder)


@contextmanager
def place(inbox: Path, instance: str, name: str) -> Iterator[tuple[int, str]]:
    """The folder that a claimed file lies in, seen to be ours alone, and the file's own name: to move it from.

    Opened for this call only. FileNotFoundError, NotRegular, ClaimError("unsafe").
    """
    with _ours(inbox, instance) as mine, files.parent(mine, name) as found:
        yield found


def give_back(inbox: Path, instance: str, name: str) -> None:
    """Put a claimed file back under its name, durably.

    A sub-folder that was removed meanwhile is made anew, with the permissions of the inbox. FileExistsError:
    a newcomer (or what stands where a folder was) has the name, and the file stays claimed.
    FileNotFoundError: it is not claimed, or the inbox is gone.
    """
    with (
        files.trusted_folder(inbox) as top,
        _ours(inbox, instance, top) as mine,
        files.parent(mine, name) as (claim, base),
    ):
        files.lstat(base, dir_fd=claim)
        try:
            _rename_home(claim, base, top, name)
        except (FileNotFoundError, files.NotRegular):
            raise FileExistsError(errno.EEXIST, "something else has the name of its folder", name) from None
        files.sync_folder(claim)


def _rename_home(claim: int, base: str, top: int, name: str) -> None:
    with files.parent(top, name, make=stat.S_IMODE(os.fstat(top).st_mode)) as (home, _):
        files.rename_noreplace(base, base, src_dir_fd=claim, dst_dir_fd=home)
        files.sync_folder(home)


def discard_empty_folders(inbox: Path, instance: str) -> None:
    """Remove what sub-folders are left empty among our claims, as far as possible. Never raises OSError."""
    with suppress(OSError, ClaimError), _ours(inbox, instance) as mine:
        _discard_empty(mine)


def _discard_empty(fd: int) -> None:
    _, folders = _listed(fd)
    for name in reversed(folders):  # those within come after those around them
        with suppress(OSError), files.parent(fd, name) as (around, base):
            os.rmdir(base, dir_fd=around)


def claimed(inbox: Path, instance: str) -> list[str]:
    """The relative names of the regular files that we hold in an inbox."""
    with files.trusted_folder(inbox) as top:
        if not files.exists(FOLDER, dir_fd=top):
            return []
        with _private(inbox / FOLDER, top) as outer:
            return _held_by(outer, inbox, instance)


def foreign(inbox: Path, instance: str) -> dict[str, list[str]]:
    """What other instances hold in an inbox: instance to relative names, those without any left out."""
    with files.trusted_folder(inbox) as top:
        if not files.exists(FOLDER, dir_fd=top):
            return {}
        with _private(inbox / FOLDER, top) as outer:
            others = sorted(set(os.listdir(outer)) - {instance})  # noqa: PTH208 (by descriptor)
            held = {other: _held_by(outer, inbox, other) for other in others if _is_folder(outer, other)}
    return {other: names for other, names in held.items() if names}


def _is_folder(dir_fd: int, name: str) -> bool:
    """False also if it is gone again: `sfwatch check` puts a file there for a moment."""
    with suppress(FileNotFoundError):
        return stat.S_ISDIR(files.lstat(name, dir_fd=dir_fd).st_mode)
    return False


def _held_by(outer: int, inbox: Path, instance: str) -> list[str]:
    if not files.exists(instance, dir_fd=outer):
        return []
    with _private(claims_folder(inbox, instance), outer) as held:
        return sorted(_listed(held)[0])


def _listed(fd: int) -> tuple[list[str], list[str]]:
    """The relative names of the regular files and of the folders below `fd`, one folder open at a time."""
    regular: list[str] = []
    folders: list[str] = []
    pending: list[list[str]] = [[]]
    while pending:
        around = pending.pop()
        with suppress(FileNotFoundError), files.below(fd, around) as folder, os.scandir(folder) as entries:
            for entry in entries:
                path = [*around, entry.name]
                if entry.is_dir(follow_symlinks=False):
                    folders.append("/".join(path))
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    regular.append("/".join(path))
    return regular, folders


def lock(inbox: Path, instance: str) -> int:
    """A descriptor whose flock says to other instances that our claims are alive; close it to let go.

    To be held before the first claim or adoption and until there are none, and not longer: while it is open
    the inbox can't be unmounted. BlockingIOError if it is held already, by this process as well.
    """
    with files.trusted_folder(inbox) as top:
        held = _open_ours(inbox, instance, top, make=True)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        files.close(held)
        raise
    return held


def adopt_foreign(
    inbox: Path,
    instance: str,
    other: str,
    *,
    former: bool = False,
    note: Callable[[str, os.stat_result], None] = lambda _name, _st: None,
) -> dict[str, float]:
    """Take over what another instance left behind when it ended.

    Returns the names that are ours now, and since when each was claimed (seconds since the epoch): from then
    on it may have been sent. `note` is told of each before it is ours, with its numbers as the other instance
    left them: the time of its claim is lost by the taking.

    A name that we hold ourselves stays there. ClaimError("foreign") if the other instance runs, or might run
    where we can't see it: flock reaches other hosts on no filesystem that can be relied on. `former`: it is
    known to have been ourselves, with a journal that is lost.
    """
    if not former:
        _require_local(inbox)
    with (
        files.trusted_folder(inbox) as top,
        _ours(inbox, instance, top, make=True) as mine,
        _private(inbox / FOLDER, top) as outer,
        _private(claims_folder(inbox, other), outer) as theirs,
    ):
        _require_ended(theirs, other)
        found = {name: _adopted(theirs, mine, name, note) for name in sorted(_listed(theirs)[0])}
        return {name: since for name, since in found.items() if since is not None}


def _require_local(inbox: Path) -> None:
    fs_type = files.mount_of(inbox).fs_type
    if fs_type not in files.LOCAL_FILESYSTEMS:
        raise ClaimError("foreign", f"on {fs_type} nobody can tell whether another host still works on them")


def _require_ended(theirs: int, other: str) -> None:
    try:
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ClaimError("foreign", f"instance {other} is at work: {error.strerror}") from error


def _adopted(theirs: int, mine: int, name: str, note: Callable[[str, os.stat_result], None]) -> float | None:
    with (
        suppress(FileExistsError, FileNotFoundError),
        files.parent(theirs, name) as (source, base),
        files.parent(mine, name, make=_PRIVATE) as (target, _),
    ):
        if files.exists(base, dir_fd=target):
            return None
        st = files.lstat(base, dir_fd=source)
        note(name, st)
        files.rename_noreplace(base, base, src_dir_fd=source, dst_dir_fd=target)
        files.sync_rename(source, target)
        return st.st_ctime
    return None


def _ours(inbox: Path, instance: str, top: int | None = None, *, make: bool = False) -> files.Opened[int]:
    """Our own folder in the inbox, seen to be nobody else's; in `top`, where the inbox itself is open."""
    fd = _open_ours(inbox, instance, top, make=make)
    return files.Opened(fd, fd)


def _open_ours(inbox: Path, instance: str, top: int | None, *, make: bool = False) -> int:
    path = f"{inbox}/{FOLDER}"
    outer = _open_private(path, path if top is None else FOLDER, top, make=make)
    try:
        return _open_private(f"{path}/{instance}", instance, outer, make=make)
    finally:
        files.close(outer)


def _private(path: Path, dir_fd: int) -> files.Opened[int]:
    fd = _open_private(str(path), path.name, dir_fd)
    return files.Opened(fd, fd)


def _open_private(path: str, name: str, dir_fd: int | None, *, make: bool = False) -> int:
    """Open a folder that must be ours alone; only the last component of its name is distrusted."""
    fd = _open_folder(path, name, dir_fd, make=make)
    try:
        _require_private(os.fstat(fd), path)
    except BaseException:
        files.close(fd)
        raise
    return fd


def _open_folder(path: str, name: str, dir_fd: int | None, *, make: bool) -> int:
    try:
        if make and dir_fd is not None:
            return files.make_folder(dir_fd, name, _PRIVATE)
        return files.open_sub_folder(name, dir_fd)
    except (OSError, files.NotRegular) as error:
        meaning = _no_folder(error, dir_fd, name, path)
        if meaning is None:
            raise
        raise meaning from error


def _no_folder(error: Exception, dir_fd: int | None, name: str, path: str) -> ClaimError | None:
    """What an error means: something else stands there, it can't be made, or (None) just what it says."""
    if files.exists(name, dir_fd=dir_fd):
        found = files.lstat(name, dir_fd=dir_fd)
        if not stat.S_ISDIR(found.st_mode):
            kind = files.kind_of(found.st_mode) or "file"
            return ClaimError("unsafe", f"{path!r} is a {kind}, not a folder: look at it and remove it")
        if isinstance(error, PermissionError):
            return ClaimError("unsafe", _not_private(found, path))
    if isinstance(error, OSError) and error.errno in _NOT_OURS_TO_MOVE and dir_fd is not None:
        return ClaimError("cannot_move", _why_not_made(error, dir_fd, path))
    return None


def _require_private(st: os.stat_result, path: str) -> None:
    if st.st_uid != os.geteuid() or st.st_mode & 0o077:
        raise ClaimError("unsafe", _not_private(st, path))


def _not_private(st: os.stat_result, path: str) -> str:
    if st.st_uid != os.geteuid():
        return (
            f"{path!r} belongs to {_user(st.st_uid)}, but sfwatch runs as {_user(os.geteuid())}: see what"
            " is in it, remove it, and let the inbox belong to sfwatch's user with mode 3770"
        )
    return f"{path!r} is open to others (mode {_mode(st)}): chmod 0700 it, then see that nothing is missing"


def _why_not_made(error: OSError, dir_fd: int, path: str) -> str:
    st = os.fstat(dir_fd)
    return (
        f"sfwatch ({_user(os.geteuid())}) can't make {path!r}: {error.strerror}; the folder around it"
        f" belongs to {_user(st.st_uid)}, mode {_mode(st)}: {_remedy(error, st, st, dir_fd, None)}"
    )


def _why_not(error: OSError, source: int, base: str, path: Path) -> str:
    """Who may do what to a file and its folder, and how to mend it."""
    folder = os.fstat(source)
    try:
        file = files.lstat(base, dir_fd=source)
    except OSError:
        return f"{str(path)!r} can't be moved: {error.strerror}"
    return (
        f"sfwatch ({_user(os.geteuid())}) can't move {str(path)!r}: {error.strerror}; it belongs"
        f" to {_user(file.st_uid)}, mode {_mode(file)}, its folder to {_user(folder.st_uid)}, mode"
        f" {_mode(folder)}: {_remedy(error, file, folder, source, base)}"
    )


def _remedy(error: OSError, file: os.stat_result, folder: os.stat_result, source: int, base: str | None) -> str:
    if error.errno == errno.EROFS:
        return "the filesystem is mounted read-only; mount it read-write"
    if error.errno == errno.EXDEV:
        return "another filesystem is mounted between it and the inbox; make that one an inbox of its own"
    if is_pinned(source):
        return "the folder is immutable or append-only (lsattr -d); chattr -i -a the folder"
    if base is not None and _flags_of(source, base) & (_IMMUTABLE | _APPEND_ONLY):
        return "the file is immutable or append-only (lsattr); chattr -i -a the file"
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in {file.st_uid, folder.st_uid}:
        return (
            "the folder is sticky, so only a file's owner and the folder's may move it; chown the folder to us"
        )
    return "we may not write to the folder; chown it to us, or let our group write to it (chmod g+wx)"


def is_pinned(fd: int) -> bool:
    """Whether chattr(1) keeps what is there from being removed: it is immutable or append-only."""
    return bool(_flags(fd) & (_IMMUTABLE | _APPEND_ONLY))


def _flags_of(dir_fd: int, name: str) -> int:
    with suppress(OSError, files.NotRegular), files.regular(name, dir_fd=dir_fd) as fd:
        return _flags(fd)
    return 0


def _flags(fd: int) -> int:
    """The attributes of chattr(1), 0 where the filesystem has none."""
    with suppress(OSError):
        return int(struct.unpack("i", fcntl.ioctl(fd, _GET_FLAGS, bytes(8))[:4])[0])
    return 0


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"


def _mode(st: os.stat_result) -> str:
    return f"{stat.S_IMODE(st.st_mode):04o}"

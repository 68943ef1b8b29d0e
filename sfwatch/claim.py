"""A file in progress lies where nobody else can reach it: `<inbox>/.sfwatch/<claims folder>/<name>`.

The folder is on the inbox's own mount and ours alone (0700), so a claim is one rename: who comes back by the
old name makes a new file, a replacement can't hit the one in progress, and two daemons can't take the same one.
Only names below the inbox are distrusted; its own path is the administrator's and may lead through links.

A daemon has one claims folder in an inbox, `<instance>-<6 hex>`; `<folder>.owner` beside it says whose it is.
It is made once, under a random name, and never removed or made again: where it is missing, this is another
inbox (or filesystem) than the one that the claims were made in. A claim never changes its claims folder.

Descriptors of these folders live for one call only. The exception is `lock`, for as long as there are claims.
"""

import errno
import fcntl
import json
import os
import pwd
import re
import secrets
import shlex
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sfwatch import files

FOLDER = ".sfwatch"
"""The folder at the top of an inbox that holds the claims folders of all instances."""

_PRIVATE = 0o700
_NOT_OURS_TO_MOVE = frozenset({errno.EPERM, errno.EACCES, errno.EROFS, errno.EXDEV})
_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, see ioctl_iflags(2)
_IMMUTABLE, _APPEND_ONLY = 0x10, 0x20
_TRIES = 100
_READING = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class ClaimError(Exception):
    """Why a file can't be had; `detail` is for people.

    `reason` is namesake, cannot_move, unsafe, foreign, or inbox_away where the claims folder is not there.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class _TidiedAwayError(Exception):
    """A folder among the claims came or went under our hands: to be tried again."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose a claims folder is. `machine` is None or "" if it has no id, `journal` is None if it is unknown.

    `adopted_by`: the instance that a person gave these claims to, with `sfwatch adopt`.
    """

    machine: str | None
    state_dir: str
    journal: str | None
    adopted_by: str | None = None

    def is_same_daemon(self, other: "Owner") -> bool:
        """Whether both are one state folder on one machine, whatever its journal; not a copy of it."""
        return (self.machine, self.state_dir) == (other.machine, other.state_dir)


def claims_folder(inbox: Path, folder: str) -> Path:
    return inbox / FOLDER / folder


def own_folder(inbox: Path, instance: str, owner: Owner) -> str:
    """Find the claims folder of this instance by its owner (whatever its journal), or make one.

    ClaimError: "unsafe" with what to do, or "cannot_move" if the inbox is not ours to write to.
    FileNotFoundError if the inbox is gone; other OSErrors, as a full disk, unchanged.
    """
    with files.trusted_folder(inbox) as top, _private(inbox / FOLDER, top, make=True) as outer:
        for folder in sorted(os.listdir(outer)):  # noqa: PTH208 (by descriptor)
            known = owner_of(inbox, folder) if folder != instance and is_ours(folder, instance) else None
            if known is not None and known.is_same_daemon(owner):
                with _private(claims_folder(inbox, folder), outer):
                    return folder
        while files.exists(folder := f"{instance}-{secrets.token_hex(3)}", dir_fd=outer):
            pass
        files.sweep_temporaries(outer)  # what a crash left of an earlier owner
        write_owner(inbox, folder, owner)  # before the folder is there to be used
        try:
            with _private(claims_folder(inbox, folder), outer, make=True):
                return folder
        except BaseException:
            os.unlink(f"{folder}.owner", dir_fd=outer)
            raise


def is_ours(folder: str, instance: str) -> bool:
    """Whether a claims folder is that of this instance, or the one that version 0.1.0 made for it."""
    return re.fullmatch(f"{re.escape(instance)}(-[0-9a-f]{{6}})?", folder) is not None


def folders(inbox: Path) -> dict[str, list[str]]:
    """Every claims folder, and the sorted relative names of the regular files in it."""
    found = {}
    with files.trusted_folder(inbox) as top, suppress(FileNotFoundError), _private(inbox / FOLDER, top) as fd:
        for folder in os.listdir(fd):  # noqa: PTH208 (by descriptor)
            with suppress(FileNotFoundError):  # `sfwatch check` puts a file there for a moment
                if stat.S_ISDIR(files.lstat(folder, dir_fd=fd).st_mode):
                    with _private(claims_folder(inbox, folder), fd) as held:
                        found[folder] = sorted(_listed(held)[0])
    return found


def owner_of(inbox: Path, folder: str) -> Owner | None:
    """What the `.owner` of a claims folder says; None if there is none that can be read and makes sense."""
    try:
        with files.trusted_folder(inbox) as top, _private(inbox / FOLDER, top) as outer:
            with files.regular(f"{folder}.owner", dir_fd=outer) as fd:
                text = os.read(fd, 2**16) if os.fstat(fd).st_uid == os.geteuid() else b""
        known = json.loads(text)
        machine, state_dir, journal = known["machine"], known["state_dir"], known["journal"]
        adopted_by = known.get("adopted_by")
    except (OSError, files.NotRegular, ValueError, TypeError, KeyError, RecursionError):
        return None
    maybe = (machine, journal, adopted_by)
    if isinstance(state_dir, str) and all(isinstance(text, str | None) for text in maybe):
        return Owner(machine, state_dir, journal, adopted_by)
    return None


def write_owner(inbox: Path, folder: str, owner: Owner) -> None:
    """Say durably, in the place of what was said before, whose a claims folder is."""
    with files.trusted_folder(inbox) as top, _private(inbox / FOLDER, top) as outer:
        with files.temporary(outer) as (fd, made):
            files.write_all(fd, json.dumps(asdict(owner)).encode())
            os.fsync(fd)
            os.rename(made, f"{folder}.owner", src_dir_fd=outer, dst_dir_fd=outer)
        files.sync_folder(outer)


def lock(inbox: Path, folder: str) -> int:
    """A descriptor whose flock says that the claims in a folder are being worked on; close it to let go.

    To be held before the first claim until there are none, and not longer: while it is open the inbox can't
    be unmounted. BlockingIOError if it is held already, by this process as well. FileNotFoundError.
    """
    held = _open_ours(inbox, folder, None)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        files.close(held)
        raise
    return held


def lock_foreign(inbox: Path, folder: str, *, ours: Owner, instance: str, former: Collection[str]) -> int:
    """The `lock` of a folder that another instance has left, if its claims may be worked on where they are.

    ClaimError("foreign") if the other one runs, or might run where we can't see it: flock reaches other hosts
    on no filesystem that can be relied on. It is dead if it was ourselves, by its owner or (for the folders of
    version 0.1.0, which have none) by `former`, or if a person says so.
    """
    fs_type, owner = files.mount_of(inbox).fs_type, owner_of(inbox, folder)
    path = shlex.quote(str(claims_folder(inbox, folder)))
    was_us = owner is not None and bool(owner.machine) and owner.is_same_daemon(ours)
    adopted = owner is not None and owner.adopted_by == instance
    if not (was_us or adopted or folder in former or fs_type in files.LOCAL_FILESYSTEMS):
        whose = f"with state_dir {owner.state_dir}" if owner else "that is not known"
        raise ClaimError(
            "foreign",
            f"claimed by a daemon {whose}, which may run on another machine: on {fs_type} that can't be seen"
            f" from here; once it is gone for good, run: sfwatch adopt {path}",
        )
    try:
        return lock(inbox, folder)
    except BlockingIOError:
        text = f"another process works on the claims in {path}: wait until it has ended, or stop it"
        raise ClaimError("foreign", text) from None


def take(inbox: Path, folder: str, name: str) -> None:
    """Claim a file by its relative name, durably.

    FileNotFoundError: it (or the inbox) is gone. NotRegular: it is no regular file, or a link leads to it.
    ClaimError: "namesake" while we hold one of that name, "cannot_move" with the right that is missing,
    "unsafe" if the claims folder is not ours alone, "inbox_away" if it is not there (it is never made again).
    Other OSErrors, as a full disk, unchanged; where making the claim durable fails (EIO), it is made still.
    """
    fd = take_and_open(inbox, folder, name)
    if fd is not None:
        files.close(fd)


def take_and_open(inbox: Path, folder: str, name: str) -> int | None:
    """`take`, and the file open for reading; None if that can't be had: `open_claimed` says why."""
    if files.parts(name)[0] == FOLDER:
        raise ValueError(f"{name!r} is in the folder of claims itself")
    with files.trusted_folder(inbox) as top:
        try:
            mine = _open_ours(inbox, folder, top)
        except FileNotFoundError:
            path = str(claims_folder(inbox, folder))
            text = f"{path!r} is gone: {FOLDER} was removed, or another folder or disk lies where the inbox was"
            raise ClaimError("inbox_away", text) from None
        with files.Opened(mine, mine):
            for _ in range(_TRIES):  # another thread may remove the empty sub-folders for claims meanwhile
                with suppress(_TidiedAwayError):
                    return _taken_from(top, mine, inbox, name)
    raise ClaimError("namesake", f"the sub-folders for the claim of {name!r} keep disappearing")


def _taken_from(top: int, mine: int, inbox: Path, name: str) -> int | None:
    try:
        with files.parent(top, name) as (source, base):
            files.require_regular(files.lstat(base, dir_fd=source), name)
            return _taken(source, base, mine, inbox, name)
    except PermissionError as error:
        folder = str((inbox / name).parent)
        text = f"{folder!r} can't be opened: let our group read and enter it"
        raise ClaimError("cannot_move", text) from error


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
        return os.open(base, _READING, dir_fd=target)
    return None


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
    with suppress(FileNotFoundError), files.parent(mine, name) as (target, base):
        return not files.exists(base, dir_fd=target)
    return True


def open_claimed(inbox: Path, folder: str, name: str) -> int:
    """Open a claimed file for reading. FileNotFoundError, NotRegular, ClaimError("unsafe")."""
    with place(inbox, folder, name) as (fd, base):
        files.require_regular(files.lstat(base, dir_fd=fd), base)
        return os.open(base, _READING, dir_fd=fd)  # nobody else can have put anything in its place


@contextmanager
def place(inbox: Path, folder: str, name: str) -> Iterator[tuple[int, str]]:
    """The folder that a claimed file lies in, seen to be ours alone, and the file's own name: to move it from.

    Opened for this call only. FileNotFoundError, NotRegular, ClaimError("unsafe").
    """
    with _ours(inbox, folder) as mine, files.parent(mine, name) as found:
        yield found


def give_back(inbox: Path, folder: str, name: str) -> None:
    """Put a claimed file back under its name, durably.

    A sub-folder that was removed meanwhile is made anew, with the permissions of the inbox. FileExistsError:
    a newcomer (or what stands where a folder was) has the name, and the file stays claimed.
    FileNotFoundError: it is not claimed, or the inbox is gone.
    """
    with (
        files.trusted_folder(inbox) as top,
        _ours(inbox, folder, top) as mine,
        files.parent(mine, name) as (claim, base),
    ):
        files.lstat(base, dir_fd=claim)
        try:
            with files.parent(top, name, make=stat.S_IMODE(os.fstat(top).st_mode)) as (home, _):
                files.rename_noreplace(base, base, src_dir_fd=claim, dst_dir_fd=home)
                files.sync_folder(home)
        except (FileNotFoundError, files.NotRegular):
            raise FileExistsError(errno.EEXIST, "something else has the name of its folder", name) from None
        files.sync_folder(claim)


def discard_empty_folders(inbox: Path, folder: str) -> None:
    """Remove what sub-folders are left empty among our claims, as far as possible. Never raises OSError."""
    with suppress(OSError, ClaimError), _ours(inbox, folder) as mine:
        _discard_empty(mine)


def _discard_empty(fd: int) -> None:
    _, folders = _listed(fd)
    for name in reversed(folders):  # those within come after those around them
        with suppress(OSError), files.parent(fd, name) as (around, base):
            os.rmdir(base, dir_fd=around)


def claimed(inbox: Path, folder: str) -> list[str]:
    """The sorted relative names of the regular files that are claimed in a folder."""
    with files.trusted_folder(inbox) as top, suppress(FileNotFoundError), _ours(inbox, folder, top) as held:
        return sorted(_listed(held)[0])
    return []


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


def _ours(inbox: Path, folder: str, top: int | None = None) -> files.Opened[int]:
    """A claims folder in the inbox, checked to be nobody else's; in `top`, where the inbox itself is open."""
    fd = _open_ours(inbox, folder, top)
    return files.Opened(fd, fd)


def _open_ours(inbox: Path, folder: str, top: int | None) -> int:
    path = f"{inbox}/{FOLDER}"
    outer = _open_private(path, path if top is None else FOLDER, top)
    try:
        return _open_private(f"{path}/{folder}", folder, outer)
    finally:
        files.close(outer)


def _private(path: Path, dir_fd: int, *, make: bool = False) -> files.Opened[int]:
    fd = _open_private(str(path), path.name, dir_fd, make=make)
    return files.Opened(fd, fd)


def _open_private(path: str, name: str, dir_fd: int | None, *, make: bool = False) -> int:
    """Open a folder that must be ours alone; only the last component of its name is distrusted."""
    try:
        if make and dir_fd is not None:
            fd = files.make_folder(dir_fd, name, _PRIVATE)
        else:
            fd = files.open_sub_folder(name, dir_fd)
    except (OSError, files.NotRegular) as error:
        meaning = _no_folder(error, dir_fd, name, path)
        if meaning is None:
            raise
        raise meaning from error
    try:
        st = os.fstat(fd)
        if st.st_uid != os.geteuid() or st.st_mode & 0o077:
            raise ClaimError("unsafe", _not_private(st, path))  # noqa: TRY301
    except BaseException:
        files.close(fd)
        raise
    return fd


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

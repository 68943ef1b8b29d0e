"""What Python's `os` lacks for files that others can touch: nothing is followed, replaced or half published.

A name that came from a folder is never trusted. Below a folder that was opened, every component of a relative
name is opened by the folder's descriptor with O_NOFOLLOW, so a symbolic link put anywhere leads nowhere.
A FIFO is never opened, because even opening one without blocking lets a waiting writer go on.

Descriptors are closed at once: one that is kept open on a watched folder hides the folder's deletion from
inotify, and keeps its filesystem from being unmounted. All of them are close-on-exec (Python's default).
"""

import ctypes
import errno
import fcntl
import itertools
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

Given = TypeVar("Given")

TEMPORARY_PREFIX = ".sfwatch-"
"""How our half-written files begin: hidden, so no pattern of an inbox takes one."""

LOCAL_FILESYSTEMS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "f2fs", "zfs", "bcachefs"}
    | {"exfat", "vfat", "ntfs3", "jfs", "reiserfs"}
)
"""Types, as /proc/self/mountinfo names them, on which all writers go through this kernel.

After the list of coreutils' `tail -f`, without the types that another host or layer can write behind.
"""

_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"[0-9a-f]{8}\.tmp")
_NUMBERS = itertools.count(secrets.randbits(32))
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RENAME_NOREPLACE = 1
_NO_SUCH_RENAME = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
_NO_SUCH_LINK = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK})
_NO_SUCH_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP})

_KINDS = {
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFDIR: "folder",
}


class NotRegular(Exception):  # noqa: N818 (it says what was found, which need not be a mistake)
    """Something that is no regular file: `kind` is symlink, fifo, socket, device or folder."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(f"{name!r} is no regular file but a {kind}")
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A file's numbers, to be compared only with the file's own earlier numbers."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, st: os.stat_result) -> "Fingerprint":
        """Equal numbers are kept once: of many files that wait, they are a tenth of the memory."""
        mtime, ctime = st.st_mtime_ns, st.st_ctime_ns
        return cls(_one(st.st_dev), st.st_ino, st.st_size, mtime, mtime if ctime == mtime else ctime)

    def same_content(self, other: "Fingerprint") -> bool:
        """All but ctime, which a rename, a chmod and a new link change as well."""
        return self == replace(other, ctime_ns=self.ctime_ns)


@cache
def _one(device: int) -> int:
    return device


class Lease(StrEnum):
    """What the kernel says about writers of a file."""

    FREE = "free"
    BUSY = "busy"
    UNPROVEN = "unproven"


def probe_lease(fd: int) -> Lease:
    """Ask whether anybody has the file open for writing; `fd` must be open for reading only.

    BUSY is true everywhere, FREE is proof on LOCAL_FILESYSTEMS only. UNPROVEN: it is somebody else's file and
    CAP_LEASE is missing (EACCES), or the filesystem knows no leases (EINVAL), see fcntl(2).
    SIGIO must be ignored by the process: a writer that comes between the two calls raises it, and it kills.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return Lease.BUSY
    except OSError:
        return Lease.UNPROVEN
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return Lease.FREE


def kind_of(mode: int) -> str | None:
    """What a mode of `stat` stands for, None for a regular file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "device")


def require_regular(st: os.stat_result, name: str) -> None:
    """Raise NotRegular unless `st` is of a regular file."""
    kind = kind_of(st.st_mode)
    if kind is not None:
        raise NotRegular(kind, name)


def lstat(name: str, *, dir_fd: int | None) -> os.stat_result:
    return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)


def exists(name: str, *, dir_fd: int | None) -> bool:
    """Whether there is anything of that name, be it a dangling link."""
    try:
        lstat(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return True


def parts(name: str) -> list[str]:
    """The components of a relative name; ValueError if it could lead out of its folder."""
    components = name.split("/")
    for component in components:
        _require_plain(component)
    return components


def _require_plain(name: str) -> None:
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is no plain name of a file")


def open_regular(name: str, *, dir_fd: int | None = None) -> int:
    """Open a regular file for reading, and nothing else ever.

    With `dir_fd`, `name` is relative and no component of it is followed; without, it is a path of which only
    the last component is not followed. Raises NotRegular, FileNotFoundError, PermissionError, and
    BlockingIOError where somebody holds a lease on it.
    """
    if dir_fd is None:
        return _open_regular(name, None)
    with parent(dir_fd, name) as (folder_fd, base):
        return _open_regular(base, folder_fd)


def _open_regular(name: str, dir_fd: int | None) -> int:
    handle = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        require_regular(os.fstat(handle), name)
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        close(handle)


def close(fd: int) -> None:
    """Close a descriptor; an error means nothing, since all that was written through it was synced before.

    Filesystems in user space may report one at any close. The descriptor is gone all the same, see close(2).
    """
    try:
        os.close(fd)
    except OSError:
        return


class Opened(Generic[Given]):
    """What was opened, for a `with`: it gives `given`, and closes `fd` (if that is not None) at the end.

    A generator would say the same; this takes a third of its time, and each file passes through many.
    """

    __slots__ = ("_fd", "_given")

    def __init__(self, given: Given, fd: int | None) -> None:
        self._given, self._fd = given, fd

    def __enter__(self) -> Given:
        return self._given

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            close(self._fd)


def regular(name: str, *, dir_fd: int | None = None) -> Opened[int]:
    """`open_regular`, closed at the end."""
    fd = open_regular(name, dir_fd=dir_fd)
    return Opened(fd, fd)


def open_folder(path: Path | str, *, dir_fd: int | None = None) -> int:
    """Open a folder; NotADirectoryError if the last component is a symbolic link or no folder."""
    return os.open(path, _FOLDER, dir_fd=dir_fd)


def folder(path: Path | str, *, dir_fd: int | None = None) -> Opened[int]:
    """`open_folder`, closed at the end."""
    fd = open_folder(path, dir_fd=dir_fd)
    return Opened(fd, fd)


def trusted_folder(path: Path) -> Opened[int]:
    """A folder of the administrator's, whose path may lead through links; closed at the end."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    return Opened(fd, fd)


def below(dir_fd: int, folders: list[str], *, make: int | None = None) -> Opened[int]:
    """The folder that `folders` lead to from `dir_fd`, component by component, no link followed.

    With `make`, missing ones are made, durably and with exactly that mode. FileNotFoundError also if a
    component is no folder any more, NotRegular if it is a symbolic link.
    """
    if not folders:
        return Opened(dir_fd, None)
    fd = _walked(dir_fd, folders, make)
    return Opened(fd, fd)


def parent(dir_fd: int, name: str, *, make: int | None = None) -> Opened[tuple[int, str]]:
    """The folder that holds the relative `name`, and its last component. See `below`."""
    *folders, base = parts(name)
    if not folders:
        return Opened((dir_fd, base), None)
    fd = _walked(dir_fd, folders, make)
    return Opened((fd, base), fd)


def _walked(dir_fd: int, folders: list[str], make: int | None) -> int:
    fd = os.dup(dir_fd)
    try:
        for name in folders:
            fd = _step(fd, name, make)
    except BaseException:
        close(fd)
        raise
    return fd


def _step(fd: int, name: str, make: int | None) -> int:
    """The sub-folder in place of `fd`, which is closed only once there is another to go on with."""
    child = open_sub_folder(name, fd) if make is None else make_folder(fd, name, make)
    close(fd)
    return child


def open_sub_folder(name: str, dir_fd: int | None) -> int:
    """Open a folder in a folder. FileNotFoundError also if it is none, NotRegular if it is a symbolic link."""
    try:
        return open_folder(name, dir_fd=dir_fd)
    except NotADirectoryError:
        if stat.S_ISLNK(lstat(name, dir_fd=dir_fd).st_mode):
            raise NotRegular("symlink", name) from None
        raise FileNotFoundError(errno.ENOENT, "its folder is no folder any more", name) from None


def make_folder(dir_fd: int, name: str, mode: int) -> int:
    """Open a sub-folder; if it is missing, make it with exactly `mode`, whatever the umask."""
    for _ in range(3):  # somebody who tidies up may take an empty folder away again before it is opened
        with suppress(FileNotFoundError):
            return open_sub_folder(name, dir_fd)
        with suppress(FileExistsError):
            os.mkdir(name, mode & 0o777, dir_fd=dir_fd)
            _set_folder_mode(dir_fd, name, mode)
            sync_folder(dir_fd)
    return open_sub_folder(name, dir_fd)


def _set_folder_mode(dir_fd: int, name: str, mode: int) -> None:
    """Only on a folder of our own: the name may lead to another one by now."""
    with suppress(FileNotFoundError, NotADirectoryError), folder(name, dir_fd=dir_fd) as fd:
        st = os.fstat(fd)
        if st.st_uid == os.geteuid() and st.st_mode & 0o777 != mode & 0o777:
            _give_to_group(fd, dir_fd, st.st_mode & 0o7000 | mode & 0o777)


def sync_folder(dir_fd: int) -> None:
    """Make the names in a folder durable. A filesystem that can't (EINVAL, as CIFS) is let off."""
    try:
        os.fsync(dir_fd)
    except OSError as error:
        if error.errno not in _NO_SUCH_SYNC:
            raise


def sync_rename(src_dir_fd: int, dst_dir_fd: int) -> None:
    """Make a rename from one folder to another durable.

    To ext4 and xfs it is one change, and the first sync would do; others (vfat, ext2) write each folder by
    itself. There a power cut between the two leaves the file in both folders; the other way round it would be
    in none. Without the second, what went away would come back, and be sent again.
    """
    sync_folder(dst_dir_fd)
    sync_folder(src_dir_fd)


def rename_noreplace(src: str, dst: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Rename without ever replacing: FileExistsError if `dst` is taken, other OSErrors (EXDEV too) unchanged.

    Where both names are links to one file it is FileExistsError as well; plain rename(2) would do nothing and
    call it a success. FUSE and network filesystems refuse RENAME_NOREPLACE with EINVAL; there it is link and
    unlink, and where there are no links, an empty placeholder that is then renamed over. A crash between two
    such steps leaves the file under both names, or an empty file under the new one: never none.
    """
    _require_plain(src)
    _require_plain(dst)
    try:
        _renameat2(src, dst, src_dir_fd, dst_dir_fd)
    except OSError as error:
        if error.errno not in _NO_SUCH_RENAME:
            raise
        _rename_by_link(src, dst, src_dir_fd, dst_dir_fd)


_LIBC = ctypes.CDLL(None, use_errno=True)


def _renameat2(src: str, dst: str, src_dir_fd: int, dst_dir_fd: int) -> None:
    source, target = os.fsencode(src), os.fsencode(dst)
    function = getattr(_LIBC, "renameat2", None)
    if function is None:  # a C library without it, as old musl
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(src_dir_fd, source, dst_dir_fd, target, ctypes.c_uint(_RENAME_NOREPLACE)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), src, None, dst)


def _rename_by_link(src: str, dst: str, src_dir_fd: int, dst_dir_fd: int) -> None:
    try:
        os.link(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_SUCH_LINK:
            raise
        _rename_over_placeholder(src, dst, src_dir_fd, dst_dir_fd)
        return
    if _same_file(lstat(src, dir_fd=src_dir_fd), lstat(dst, dir_fd=dst_dir_fd)):
        os.unlink(src, dir_fd=src_dir_fd)


def _same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether the name still is the file that was linked, not a newcomer put in its place meanwhile.

    sshfs gives each name an inode number of its own, hence the second half.
    """
    same_inode = (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
    return same_inode or (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _rename_over_placeholder(src: str, dst: str, src_dir_fd: int, dst_dir_fd: int) -> None:
    lstat(src, dir_fd=src_dir_fd)  # no placeholder for what isn't there
    close(os.open(dst, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=dst_dir_fd))
    try:
        os.rename(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except OSError:
        _remove_placeholder(dst, dst_dir_fd)
        raise


def _remove_placeholder(name: str, dir_fd: int) -> None:
    with suppress(OSError):
        if lstat(name, dir_fd=dir_fd).st_size == 0:
            os.unlink(name, dir_fd=dir_fd)


@contextmanager
def temporary(dir_fd: int) -> Iterator[tuple[int, str]]:
    """A new empty file (0600) of ours in the folder, and its name; removed again on any error.

    It stays open for writing until the end, so that `sweep_temporaries` can tell it from a crash's leftover.
    """
    fd, name = _create_temporary(dir_fd)
    try:
        yield fd, name
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=dir_fd)
        raise
    finally:
        close(fd)


def _create_temporary(dir_fd: int) -> tuple[int, str]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:  # another daemon, or a crash's leftover, may have the number
        name = f"{TEMPORARY_PREFIX}{next(_NUMBERS) % 2**32:08x}.tmp"
        with suppress(FileExistsError):
            return os.open(name, flags, 0o600, dir_fd=dir_fd), name


def publish(dir_fd: int, name: str, data: bytes, *, mode: int = 0o640) -> None:
    """A new file that is there whole and durable or not at all. FileExistsError if the name is taken.

    It gets exactly `mode`, and the folder's group where we may give it.
    """
    with temporary(dir_fd) as (fd, made):
        write_all(fd, data)
        _give_to_group(fd, dir_fd, mode)
        os.fsync(fd)
        rename_noreplace(made, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    sync_folder(dir_fd)


def put(path: Path, data: bytes, *, mode: int) -> None:
    """Put a file in the place of what is at this path, whole or not at all; not durably, it can be made anew.

    It gets exactly `mode`, and the folder's group where we may give it.
    """
    with folder(os.path.realpath(path.parent)) as dir_fd, temporary(dir_fd) as (fd, made):
        write_all(fd, data)
        _give_to_group(fd, dir_fd, mode)
        os.rename(made, path.name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _give_to_group(fd: int, dir_fd: int, mode: int) -> None:
    """Best effort: filesystems without owners refuse both.

    systemd's RestrictSUIDSGID refuses to set even a setgid bit that the folder inherited and has already;
    it is given up then, since the permissions matter more.
    """
    group = os.fstat(dir_fd).st_gid
    if os.fstat(fd).st_gid != group:
        with suppress(OSError):
            os.fchown(fd, -1, group)
    for wanted in (mode, mode & 0o777):
        with suppress(PermissionError):
            os.fchmod(fd, wanted)
            return


def sweep_temporaries(dir_fd: int) -> int:
    """Remove what a crash left half-written in a folder; how many there were.

    Only regular files of our own user and exactly our form of name, and none that somebody is still writing.
    """
    leftovers = [name for name in os.listdir(dir_fd) if _TEMPORARY.fullmatch(name)]
    return sum(_sweep(name, dir_fd) for name in leftovers)


def _sweep(name: str, dir_fd: int) -> bool:
    try:
        with regular(name, dir_fd=dir_fd) as fd:
            if os.fstat(fd).st_uid != os.geteuid() or probe_lease(fd) is Lease.BUSY:
                return False
            os.unlink(name, dir_fd=dir_fd)
    except (OSError, NotRegular):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a path is mounted: the mount's number in this namespace, and its filesystem's type."""

    id: int
    fs_type: str


@dataclass(frozen=True, slots=True)
class Identity:
    """Which folder a path leads to: it changes when the folder is replaced, unmounted or mounted over."""

    dev: int
    ino: int
    mount: int


def mount_of(path: Path) -> Mount:
    """The mount that a path is on, "unknown" if the kernel shows no type for it.

    By mount number: exact for over-mounts and bind mounts, where the longest matching path is not.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        number = _mount_id(fd)
    finally:
        close(fd)
    return Mount(number, _fs_type(number))


def identity(path: Path) -> Identity:
    """The folder that the path leads to now; OSError if there is none."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        st = os.fstat(fd)
        return Identity(st.st_dev, st.st_ino, _mount_id(fd))
    finally:
        close(fd)


def is_mounted(number: int) -> bool:
    """Whether there is a mount of this number (it may be another one by now)."""
    return _mountinfo(number) is not None


def _mount_id(fd: int) -> int:
    """From proc(5), /proc/pid/fdinfo."""
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    return next(int(line.split(":")[1]) for line in lines if line.startswith("mnt_id:"))


def _fs_type(number: int) -> str:
    """The type stands behind a lone hyphen."""
    line = _mountinfo(number)
    return "unknown" if line is None else os.fsdecode(line.partition(b" - ")[2].split(b" ", 1)[0])


def _mountinfo(number: int) -> bytes | None:
    """From proc(5), /proc/pid/mountinfo, the line of this mount.

    Paths in it may be any bytes but blanks and newlines (a carriage return comes as it is).
    """
    lines = Path("/proc/self/mountinfo").read_bytes().split(b"\n")
    return next((line for line in lines if line.split(b" ", 1)[0] == b"%d" % number), None)

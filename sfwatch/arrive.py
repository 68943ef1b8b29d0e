"""What is in the inboxes now; and a doorbell that may ring too often or not at all.

A look at the folder is the truth. The doorbell only makes the next look come sooner: the kernel drops
events in a burst, and tells nothing of what happens behind a network mount. So nobody may depend on a ring;
everybody may depend on `look`, and on `Doorbell.healthy` saying no when a watch is known to be dead. The
order that loses nothing is always `watch`, then `look`.

Of watchdog this uses the lowest layer alone, its inotify reader: one thread and one inotify instance for
all inboxes. Its observers would cost a thread a folder, hold back each arrival for half a second after each
file that we move out, and go deaf without a sign when a folder is replaced, unmounted or renamed, or when
events are lost.
"""

import errno
import fnmatch
import json
import logging
import os
import re
import resource
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchDescriptor,
)

from sfwatch import files
from sfwatch.files import Fingerprint, Lease
from sfwatch.settings import Inbox, Proof
from sfwatch.settle import Sighting, Tail, Unreadable

TEMPORARY_SUFFIXES = (
    ".part",
    ".partial",
    ".filepart",
    ".tmp",
    ".temp",
    ".crdownload",
    ".swp",
    "~",
    ".!sync",
)
"""Endings under which browsers, editors and transfer programs keep what they have not finished."""

OWN_SUFFIXES = (".fileid.json", ".error.json")
OWN_FOLDER = ".sfwatch"
TAIL_BYTES = 64 * 1024

# No IN_MOVED_FROM, IN_DELETE, IN_OPEN, IN_CLOSE_NOWRITE, IN_ATTRIB: our own reads and moves must not ring.
# One mask for all watches, since the kernel keeps one for each folder however often it is watched.
_MASK = Mask(
    InotifyConstants.IN_CREATE
    | InotifyConstants.IN_CLOSE_WRITE
    | InotifyConstants.IN_MOVED_TO
    | InotifyConstants.IN_DELETE_SELF
    | InotifyConstants.IN_MOVE_SELF
    | InotifyConstants.IN_ONLYDIR
    | InotifyConstants.IN_DONT_FOLLOW
    | InotifyConstants.IN_EXCL_UNLINK
)
_ENDINGS = {
    InotifyConstants.IN_UNMOUNT: "its filesystem was unmounted",
    InotifyConstants.IN_DELETE_SELF: "it was deleted",
    InotifyConstants.IN_MOVE_SELF: "it was renamed or moved away",
}

# The doorbell tells of lost events itself; without a handler Python would print watchdog's own warning.
logging.getLogger("watchdog").addHandler(logging.NullHandler())


@dataclass(frozen=True, slots=True)
class Rang:
    """Something happened to this name (relative to the inbox). `moved_in`: it was renamed to it."""

    inbox: str
    name: str
    moved_in: bool


@dataclass(frozen=True, slots=True)
class FoldersChanged:
    """A sub-folder of a recursive inbox came, went or moved: `watch` again, then look.

    Told once until then, however many folders it was.
    """

    inbox: str


@dataclass(frozen=True, slots=True)
class Overflowed:
    """The kernel dropped events: look."""

    inbox: str


@dataclass(frozen=True, slots=True)
class WatchEnded:
    """No more rings for this inbox until it is watched again."""

    inbox: str
    why: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The doorbell's thread has ended: events are lost, and so is every watch until it is armed again.

    It was a bug, or the kernel would not be read (an OSError).
    """

    bug: Exception


Ring = Callable[[Rang | FoldersChanged | Overflowed | WatchEnded | Broken], None]
"""What the doorbell calls, from a thread of its own: it must only put the ring somewhere, and return."""


class _Reader(InotifyFD):
    """The thread that reads inotify. If it fails it says so, and every watch of it says that it ended."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring

    @classmethod
    def _create_inotify_fd(cls) -> int:
        fd = super()._create_inotify_fd()
        os.set_inheritable(fd, False)  # watchdog leaves it open in children
        return fd

    def run(self) -> None:
        try:
            super().run()
        except Exception as bug:  # noqa: BLE001 - the border of the thread: said by the main thread
            self._ring(Broken(bug))
        finally:
            # Nobody reads any more, so that close() has to free the descriptors itself. It does nothing if the
            # thread was asked to stop, else it ends all watches.
            self._is_reading = False
            self.close()


class _Watch:
    """One inbox's watched folders; what the reader's thread and the doorbell both know of it."""

    def __init__(self, inbox: str, ring: Ring, reader: _Reader) -> None:
        self.inbox = inbox
        self.ring = ring
        self.reader = reader
        self.bells: dict[str, _Bell] = {}
        self.folders_changed = False

    def intact(self) -> bool:
        armed = "" in self.bells and not any(bell.ended for bell in self.bells.values())
        return armed and self.reader.is_alive()

    def arm_all(self, top: str, *, recursive: bool) -> None:
        """Arm what is not armed yet: each folder before it is read, so that nothing slips in between."""
        self.folders_changed = False
        self._arm(top, "", recursive=recursive)
        if not recursive:
            return
        mount = files.identity(Path(top)).mount
        todo = [""]
        while todo:
            folders = _level(top, todo.pop(), mount).folders
            todo += [folder for folder in folders if self._arm_if_there(top, folder)]

    def disarm_all(self) -> None:
        self.reader.remove_callbacks([(bell.wd, bell.id) for bell in self.bells.values()])

    def _arm(self, top: str, folder: str, *, recursive: bool) -> None:
        if folder in self.bells:
            return
        path = _below(top, folder)
        bell = _Bell(self, folder, recursive=recursive)
        bell.wd = self.reader.add_callback(os.fsencode(path), _MASK, bell, bell.id)
        if bell.wd == -1:  # watchdog passes over EACCES
            self.reader.remove_callbacks([(bell.wd, bell.id)])
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        self.bells[folder] = bell

    def _arm_if_there(self, top: str, folder: str) -> bool:
        """False if a sub-folder is gone or closed to us, which the next look says."""
        try:
            self._arm(top, folder, recursive=True)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False
        return True

    def tell_folders_changed(self) -> None:
        if not self.folders_changed:
            self.folders_changed = True
            self.ring(FoldersChanged(self.inbox))


class _Bell:
    """One watched folder: its inotify events become rings. Called by the reader's thread."""

    def __init__(self, watch: _Watch, folder: str, *, recursive: bool) -> None:
        self._watch = watch
        self._folder = folder
        self._recursive = recursive
        self.wd = WatchDescriptor(-1)
        self.ended = False

    @property
    def id(self) -> CallbackId:
        return CallbackId(id(self))

    def on_event(self, event: InotifyEvent) -> None:
        why = next((text for bit, text in _ENDINGS.items() if event.mask & bit), None)
        if why is not None:
            self._end(why)
        elif self.ended:  # the kernel goes on watching a folder that was moved away
            return
        elif event.name and not event.name.startswith(b"."):
            self._came(event)

    def _came(self, event: InotifyEvent) -> None:
        if self._recursive and event.is_directory:
            self._watch.tell_folders_changed()
        else:
            name = _below(self._folder, os.fsdecode(event.name))
            self._watch.ring(Rang(self._watch.inbox, name, moved_in=event.is_moved_to))

    def on_watch_deleted(self, wd: WatchDescriptor) -> None:  # noqa: ARG002 (watchdog's signature)
        self._end("the kernel ended the watch, or the thread that reads it failed")

    def on_queue_overflow(self) -> None:
        if not self._folder:
            self._watch.ring(Overflowed(self._watch.inbox))

    def _end(self, why: str) -> None:
        if self.ended:
            return
        self.ended = True
        if self._folder:
            self._watch.tell_folders_changed()
        else:
            self._watch.ring(WatchEnded(self._watch.inbox, why))


class Doorbell:
    """Rings when something happens in a watched folder, mostly.

    It has one owner: the methods are not thread-safe, and `ring` is called from the reader's thread.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._reader: _Reader | None = None
        self._watches: dict[str, _Watch] = {}

    def watch(self, name: str, path: Path, *, recursive: bool) -> str | None:
        """Arm the inbox `name`; None, or why it could not be, as a sentence for people.

        May be called before every look: what is armed stays armed, what is new or was lost is armed. After a
        refusal the inbox is merely not rung for, or of a tree not all of it is. It can't be seen from here that
        another folder lies at `path` now: compare `files.identity`, and `unwatch` first.
        """
        try:
            self._intact_watch(name).arm_all(os.path.realpath(path), recursive=recursive)
        except OSError as error:
            return _refusal(error, path)
        return None

    def unwatch(self, name: str) -> None:
        watch = self._watches.pop(name, None)
        if watch is not None:
            watch.disarm_all()

    def healthy(self, name: str) -> bool:
        """Whether the inbox is watched, with nothing known to have ended that, even in a sub-folder."""
        return name in self._watches and self._watches[name].intact()

    def close(self) -> None:
        """End all watches, without a ring, and the thread."""
        for name in list(self._watches):
            self.unwatch(name)
        if self._reader is not None:
            with suppress(OSError):  # watchdog's closing of its descriptors: they are gone all the same
                self._reader.stop()
            self._reader.join()

    def _intact_watch(self, name: str) -> _Watch:
        if not self.healthy(name):
            self.unwatch(name)
            self._watches[name] = _Watch(name, self._ring, self._living_reader())
        return self._watches[name]

    def _living_reader(self) -> _Reader:
        if self._reader is None or not self._reader.is_alive():
            self._reader = _Reader(self._ring)
            self._reader.start()
        return self._reader


def _refusal(error: OSError, path: Path) -> str:
    if error.errno == errno.ENOSPC:
        limit = _inotify_limit("max_user_watches")
        return f"{path}: no inotify watch is left for this user: {limit}; raise it with sysctl"
    if error.errno == errno.EMFILE:
        limit, open_files = _inotify_limit("max_user_instances"), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"{path}: no inotify instance is left for this user: {limit}; raise it with sysctl "
            f"(or all {open_files} files that this process may open are open)"
        )
    return f"{path}: it can't be watched: {error.strerror}"


def _inotify_limit(name: str) -> str:
    try:
        value = Path(f"/proc/sys/fs/inotify/{name}").read_text(encoding="ascii").strip()
    except OSError:
        value = "not to be seen from here"
    return f"fs.inotify.{name} is {value}"


@dataclass(frozen=True, slots=True)
class WatchMode:
    """How an inbox is watched. `trusted`: the kernel's "nobody writes" is proof there."""

    mode: Literal["inotify", "polling"]
    fs_type: str
    trusted: bool
    why: str


def watch_mode(path: Path, *, proof: Proof) -> WatchMode:
    """How far the kernel's word reaches on the filesystem that `path` is on. OSError if it leads nowhere.

    In polling mode a doorbell is still of use (it rings for what is done through this machine), but looks must
    be frequent. A local folder that is exported by NFS or SMB rings well, yet leases prove little there: NFSv3
    servers close a file between two writes. Nothing shows that a folder is exported, hence `proof: never`.
    """
    fs_type = files.mount_of(path).fs_type
    if fs_type not in files.LOCAL_FILESYSTEMS:
        why = (
            f"{fs_type}: files may be written behind this machine's back, and the kernel doesn't tell of those"
        )
        return WatchMode("polling", fs_type, trusted=False, why=why)
    if proof is Proof.NEVER:
        why = f"{fs_type} is local, but proof: never"
        return WatchMode("inotify", fs_type, trusted=False, why=why)
    return WatchMode("inotify", fs_type, trusted=True, why=f"{fs_type} is local: the kernel knows every writer")


@dataclass(frozen=True, slots=True)
class Look:
    """What lies in an inbox: names relative to it, in no order; only their names are known, not what they are.

    `names` are those that were not known, `missing` the known ones that are not there (None if nothing was said
    to be known). `others` counts names that nobody will take. `crossed`: sub-folders left out because something
    is mounted there. `unreadable`: sub-folders that could not be read.
    """

    names: list[str]
    others: int
    missing: set[str] | None = None
    crossed: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()


def look(inbox: Inbox, known: Collection[str] | None = None) -> Look:
    """List the inbox now, and compare with what is known of it. OSError if it can't be read.

    Names only, no stat of any: 100,000 of them take a tenth of a second.
    """
    return _look_at_tree(inbox, known) if inbox.recursive else _look_at_folder(inbox, known)


def _look_at_folder(inbox: Inbox, known: Collection[str] | None) -> Look:
    with os.scandir(inbox.path) as entries:
        return _sort_out((entry.name for entry in entries), inbox, known)


def _look_at_tree(inbox: Inbox, known: Collection[str] | None) -> Look:
    levels = list(_levels(inbox))
    return replace(
        _sort_out((name for level in levels for name in level.names), inbox, known),
        crossed=tuple(name for level in levels for name in level.crossed),
        unreadable=tuple(name for level in levels for name in level.unreadable),
    )


def _levels(inbox: Inbox) -> Iterator["_Level"]:
    """All folders of a tree, with a list of what is left to do: a deep tree must not exhaust the stack."""
    top, own = os.path.realpath(inbox.path), _own_folders(inbox)
    mount = files.identity(Path(top)).mount
    todo = [""]
    while todo:
        level = _level(top, todo.pop(), mount)
        yield level
        todo += [name for name in level.folders if name not in own]


def _sort_out(found: Iterable[str], inbox: Inbox, known: Collection[str] | None) -> Look:
    """Tell new candidates, known ones and others apart; of markers and our own folders nothing is said.

    Only what is new is kept of it: a hundred thousand may be waiting, and a million lie there for nobody.
    """
    wanted = _matcher(inbox.match, inbox.settle_marker)
    own, marker = _own_folders(inbox), inbox.settle_marker
    known_names = known or ()
    missing = set(known_names)
    names: list[str] = []
    others = 0
    for name in found:
        if name in known_names:
            missing.discard(name)
        elif wanted(name):
            names.append(name)
        elif name not in own and not (marker is not None and name.endswith(marker)):
            others += 1
    return Look(names, others, None if known is None else missing)


def _own_folders(inbox: Inbox) -> frozenset[str]:
    """Our own folders in the inbox, relative to it."""
    return _ours_inside(inbox.path, inbox.done, inbox.failed)


@cache
def _ours_inside(inbox: Path, done: Path, failed: Path) -> frozenset[str]:
    inside = (path for path in (done, failed) if path.is_relative_to(inbox))
    return frozenset({OWN_FOLDER, *(str(path.relative_to(inbox)) for path in inside)})


@dataclass(frozen=True, slots=True)
class _Level:
    """One folder of a tree. All names are relative to the tree's top."""

    names: list[str] = field(default_factory=list)  # of all that are no folders
    folders: list[str] = field(default_factory=list)  # neither hidden nor on another mount
    crossed: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def _level(top: str, folder: str, mount: int) -> _Level:
    """What is in a folder. The top must be there; a sub-folder may go, or be closed to us."""
    try:
        return _read_level(top, folder, mount)
    except OSError as error:
        if not folder:
            raise
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        return _Level() if gone else _Level(unreadable=[folder])


def _read_level(top: str, folder: str, mount: int) -> _Level:
    level = _Level()
    with os.scandir(_below(top, folder)) as entries:
        for entry in entries:
            name = _below(folder, entry.name)
            if not entry.is_dir(follow_symlinks=False):
                level.names.append(name)
            elif not entry.name.startswith("."):
                (level.folders if _mount(entry.path) == mount else level.crossed).append(name)
    return level


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name


def _mount(path: str) -> int | None:
    """By mount number: a bind mount has the device number of what it shows."""
    try:
        return files.identity(Path(path)).mount
    except OSError:
        return None


def candidate(name: str, inbox: Inbox) -> bool:
    """Whether a name (relative to the inbox) is one that sfwatch takes, letter case ignored.

    A leading dot comes first: some servers' temporary names keep the extension (`.upload.x.jsonl`).
    """
    return _matcher(inbox.match, inbox.settle_marker)(name)


def subject(name: str, inbox: Inbox) -> str | None:
    """The file that a rung name is about: itself, or the one whose marker it is; None if nobody takes it."""
    marker = inbox.settle_marker
    if marker is not None and name.endswith(marker):
        name = name.removesuffix(marker)
    return name if candidate(name, inbox) else None


@cache
def _matcher(match: tuple[str, ...], marker: str | None) -> Callable[[str], bool]:
    """A test of names, made once: 100,000 of them are tested at each look."""
    patterns = re.compile("|".join(fnmatch.translate(pattern.lower()) for pattern in match))
    never = tuple(suffix.lower() for suffix in (*TEMPORARY_SUFFIXES, *OWN_SUFFIXES, *filter(None, [marker])))

    def matches(name: str) -> bool:
        lowered = name.lower()
        if lowered.startswith(".") or "/." in lowered or lowered.endswith(never):
            return False
        return patterns.match(lowered[lowered.rfind("/") + 1 :]) is not None

    return matches


def sight(inbox: Inbox, name: str, *, wall: float, moved_in: bool) -> Sighting | Unreadable:
    """Look at one file: whether it is written to, its numbers, how it ends.

    In this order: a writer that closes between the first and the last is then seen as busy, never the reverse.
    `wall` is the wall clock, in seconds. Raises FileNotFoundError, and NotRegular for what is never opened.
    Whatever else goes wrong (busy, stale, forbidden, a disk error) may pass and is Unreadable.
    """
    try:
        with _top(inbox.path) as top:
            marker = _has_marker(top, name, inbox.settle_marker)
            with files.regular(name, dir_fd=top) as fd:
                return _sighting(fd, marker=marker, moved_in=moved_in, wall=wall)
    except FileNotFoundError:
        raise
    except OSError as error:
        return _unreadable(inbox.path / name, error)


def writers(fingerprint: Fingerprint) -> list[int]:
    """The ids of the processes that have the file open for writing, as far as this user may see.

    It reads a lot of /proc, and sees no mapping that outlived its descriptor: for telling people only.
    """
    own = os.getpid()
    ids = (int(entry) for entry in os.listdir("/proc") if entry.isdecimal())  # noqa: PTH208
    return sorted(pid for pid in ids if pid != own and _writes(pid, fingerprint))


def _writes(pid: int, fingerprint: Fingerprint) -> bool:
    with suppress(OSError):  # it has ended meanwhile, or is somebody else's
        for fd in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
            with suppress(OSError):
                st = os.stat(f"/proc/{pid}/fd/{fd}")  # noqa: PTH116
                if (st.st_dev, st.st_ino) == (fingerprint.dev, fingerprint.ino) and _is_for_writing(pid, fd):
                    return True
    return False


def _is_for_writing(pid: int, fd: str) -> bool:
    """By the access mode in proc(5), /proc/pid/fdinfo."""
    lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii").splitlines()
    flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_RDONLY


def _unreadable(path: Path, error: OSError) -> Unreadable:
    """FileNotFoundError if the name is gone: a fault on the way to it says nothing about a file then."""
    try:
        st = path.lstat()
    except FileNotFoundError:
        raise
    except OSError:
        return Unreadable(f"{path}: {error.strerror}")
    forbidden = isinstance(error, PermissionError)
    return Unreadable(_forbidden(path, st) if forbidden else f"{path}: {error.strerror}", st.st_size)


@contextmanager
def _top(path: Path) -> Iterator[int]:
    """The inbox, for a moment: a descriptor kept open would hide its deletion from inotify."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        files.close(fd)


def _has_marker(top: int, name: str, marker: str | None) -> bool:
    if marker is None:
        return False
    try:
        with files.parent(top, name + marker) as (folder, base):
            return files.exists(base, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def _sighting(fd: int, *, marker: bool, moved_in: bool, wall: float) -> Sighting:
    lease = files.probe_lease(fd)
    fingerprint = Fingerprint.of(os.fstat(fd))
    tail = None if lease is Lease.BUSY else read_tail(fd, fingerprint.size)
    age_s = wall - max(fingerprint.mtime_ns, fingerprint.ctime_ns) / 1e9
    return Sighting(fingerprint, lease, tail, marker, moved_in, age_s if age_s >= 0 else None)


def _forbidden(path: Path, st: os.stat_result) -> str:
    """Why a file can't be read, by numbers: to look names up may ask a server and take long."""
    ours = sorted({os.getegid(), *os.getgroups()})
    readable_by_group = bool(st.st_mode & stat.S_IRGRP)
    remedies = [] if readable_by_group else ["chmod g+r"]
    if readable_by_group or st.st_gid not in ours:
        remedies.insert(0, f"let its group be one of {', '.join(map(str, ours))} (chgrp)")
    return (
        f"{path}: owner {st.st_uid}, group {st.st_gid}, mode {stat.S_IMODE(st.st_mode):04o}: "
        f"user {os.geteuid()} may not read it; {' and '.join(remedies)}"
    )


def read_tail(fd: int, size: int) -> Tail:
    """How a file of `size` bytes ends, judged by its last 64 KiB.

    A last line longer than that is taken on its looks: it ends in a brace and a newline.
    """
    if size == 0:
        return Tail.EMPTY
    if _first_hole(fd, size) < size:
        return Tail.HOLE
    block = os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES))
    return _judge(block, starts_file=size <= TAIL_BYTES)


def _first_hole(fd: int, size: int) -> int:
    """Files that were allocated first and are still being filled have a hole from where they are filled to."""
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:  # a filesystem that knows no holes
        return size


def _judge(block: bytes, *, starts_file: bool) -> Tail:
    if block.endswith(b"\0"):
        return Tail.NUL
    text = block.rstrip(b" \t\r\n")
    ended = b"\n" in block[len(text) :]
    start = text.rfind(b"\n") + 1
    if start == 0 and not starts_file:
        return Tail.GOOD if ended and text.endswith(b"}") else Tail.UNPARSED
    if not _parses(text[start:]):
        return Tail.UNPARSED
    return Tail.GOOD if ended else Tail.NO_NEWLINE


def _parses(line: bytes) -> bool:
    """Whether either decoder takes it: the fast one refuses lone surrogates and 1e999, which are valid here."""
    for decode in (msgspec.json.decode, json.loads):
        try:
            decode(line)
        except (ValueError, RecursionError):
            continue
        return True
    return False

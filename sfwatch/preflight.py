"""What `sfwatch check` finds out: each thing is proved by doing it, and nothing is left behind.

Here are values only; what they look like on a terminal is check_page.py's business.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from sfwatch import account, arrive, claim, files
from sfwatch.notes import Level, Note
from sfwatch.obstacles import (
    Blocked,
    doing,
    folder_of_ours,
    make_a_file,
    opened,
    quoted,
    remedy,
    standing,
    tried,
)
from sfwatch.settings import ROOM_BYTES, Config, Inbox
from sfwatch.trial import walk
from sfwatch.users import as_user, foreign_owner, login, user

_LATER = "is not there yet: it is made at the first start (if it was there before: mount it)"

_PERHAPS = "is not there: it would be made at the first start (misspelt? if it was there before: mount it)"


def installation(
    config: Config,
    environ: Mapping[str, str],
    *,
    online: bool,
    wall: Callable[[], float],
    command: Sequence[str] = ("sfwatch", "check"),
) -> Iterator[Note]:
    """Look at everything that the daemon needs; with `online`, ask each service for one listing.

    `wall` gives seconds since the epoch; `command` is how this was called, for whom it should be run by.
    Ends after the state folder if that belongs to somebody else: what this user may do says nothing then.
    """
    state = state_folder(config.state_dir, command)
    yield from state
    if any(note.level is Level.NO_PERMISSION for note in state):
        return
    for inbox in config.inboxes:
        yield from folders(inbox)
    yield from watches(config.inboxes)
    yield from beside(config)
    for api, purpose in account.targets(config):
        yield from account.look(api, purpose, environ, online=online, wall=wall)


# ---- the state folder ----


def state_folder(folder: Path, command: Sequence[str] = ("sfwatch", "check")) -> list[Note]:
    """Whether the journal can live there. NO_PERMISSION: it is another user's, or another user must make it."""
    about = f"state {folder}"
    owner = foreign_owner(folder)
    if owner is not None:
        return [Note(Level.NO_PERMISSION, about, f"belongs to {user(owner)}; run: {as_user(owner, command)}")]
    absent = not os.path.lexists(folder)
    try:
        if absent:
            return [Note(Level.OK, about, _state_could_be_made(folder))]
        with doing("no file can be made there", folder), opened(folder) as fd:
            make_a_file(fd)
    except Blocked as blocked:
        others = isinstance(blocked.__cause__, OSError) and not isinstance(blocked.__cause__, PermissionError)
        return [Note(Level.FINDING if others else Level.NO_PERMISSION, about, str(blocked))]
    return [Note(Level.OK, about, "can be written"), *_open_to_others(folder, about), *room(folder, about)]


def _state_could_be_made(folder: Path) -> str:
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    try:
        with opened(above) as fd, folder_of_ours(fd):
            return "is not there yet: it is made at the first start"
    except OSError as error:
        make = f"install -d -m 0700 -o {login(os.geteuid())} {quoted(folder)}, or set state_dir"
        mend = make if isinstance(error, PermissionError) else "set another state_dir"
        text = f"is not there, and can't be made in {above}: {error.strerror}; {mend}"
        raise Blocked(text) from error


def _open_to_others(folder: Path, about: str) -> Iterator[Note]:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        text = f"can be written by others (mode {mode:04o}): chmod go-w {quoted(folder)}"
        yield Note(Level.WARNING, about, text)


# ---- room ----


def room(folder: Path, about: str) -> list[Note]:
    """Whether the folder's filesystem has the room that is asked for before each upload."""
    try:
        space = os.statvfs(folder)
    except OSError as error:
        return [Note(Level.FINDING, about, f"its filesystem does not say how full it is: {error.strerror}")]
    inodes = space.f_favail if space.f_files else None  # btrfs and others count none
    shortage = too_little(space.f_bavail * space.f_frsize, inodes)
    return [Note(Level.FINDING, about, shortage)] if shortage else []


def too_little(free: int, inodes: int | None) -> str | None:
    """What is wrong with so many free bytes and inodes, if anything is."""
    if free < ROOM_BYTES:
        return (
            f"only {free:,} bytes are free for this user, and nothing is uploaded below {ROOM_BYTES:,}:"
            " make room"
        )
    return None if inodes is None or inodes else "no inode is free, so no file can be made: remove some files"


# ---- the folders of one inbox ----


def folders(inbox: Inbox) -> list[Note]:
    """Send a file of ours the way of all files, as far as the folders are there."""
    absent = {role: note for role, path in _roles(inbox) if (note := _absence(role, path, inbox))}
    present = {role: path for role, path in _roles(inbox) if role not in absent}
    notes = _with_inbox(inbox, present) if "inbox" in present else _without_inbox(present)
    full = [note for role, path in present.items() for note in room(path, f"{role} {path}")]
    return [*absent.values(), *notes, *full]


def _roles(inbox: Inbox) -> tuple[tuple[str, Path], ...]:
    return ("inbox", inbox.path), ("done", inbox.done), ("failed", inbox.failed)


def _with_inbox(inbox: Inbox, present: Mapping[str, Path]) -> list[Note]:
    about = f"inbox {inbox.path}"
    notes: list[Note] = []
    try:
        mode = arrive.watch_mode(inbox.path, proof=inbox.proof)
        notes += [Note(Level.OK, about, f"{mode.mode}: {mode.why}"), *ownership(inbox.path)]
        notes += walk(inbox, present, trusted=mode.trusted)
    except claim.ClaimError as error:
        notes.append(Note(Level.FINDING, about, error.detail))
    except Blocked as blocked:
        notes.append(Note(Level.FINDING, about, str(blocked)))
    except OSError as error:
        notes.append(
            Note(Level.FINDING, about, f"can't be looked at: {error.strerror}; {remedy(inbox.path, error)}")
        )
    return notes


def _without_inbox(present: Mapping[str, Path]) -> list[Note]:
    """Done and failed where there is no inbox yet from which a file could come."""
    return [tried(f"{role} {path}", partial(_takes_files, path)) for role, path in present.items()]


def _takes_files(folder: Path) -> str:
    with doing("no file can be made there", folder), opened(folder) as fd:
        make_a_file(fd)
    return "takes files"


# ---- folders that are not there ----


def _absence(role: str, path: Path, inbox: Inbox) -> Note | None:
    """None if the folder is there, else what becomes of that."""
    about = f"{role} {path}"
    try:
        st = path.stat()
    except FileNotFoundError:
        return _to_be_made(path, about, inbox)
    except OSError as error:
        return Note(Level.FINDING, about, f"can't be reached: {error.strerror}; {remedy(path, error)}")
    if stat.S_ISDIR(st.st_mode):
        return None
    kind = files.kind_of(st.st_mode) or "file"
    return Note(Level.FINDING, about, f"is a {kind}, not a folder: move it away, or name another folder")


def _to_be_made(path: Path, about: str, inbox: Inbox) -> Note:
    if path.is_symlink():
        return Note(Level.FINDING, about, "is a link that leads nowhere: correct or remove it")
    if path.parent == inbox.path and not os.path.lexists(inbox.path):
        return Note(Level.OK, about, _LATER)  # after its inbox, which has a note of its own
    if not path.parent.is_dir():
        return Note(Level.FINDING, about, f"is not there, nor is {path.parent}: {_install(path)}")
    note = tried(about, partial(_could_be_made, path))
    if path == inbox.path and note.level is Level.OK:
        return Note(Level.WARNING, about, _PERHAPS)
    return note


def _could_be_made(path: Path) -> str:
    try:
        with opened(path.parent) as fd, folder_of_ours(fd):
            return _LATER
    except OSError as error:
        mend = _install(path) if isinstance(error, PermissionError) else remedy(path.parent, error)
        text = f"is not there, and can't be made in {path.parent}: {error.strerror}; {mend}"
        raise Blocked(text) from error


def _install(path: Path) -> str:
    """What makes a folder as it should be: ours, open to a group of droppers, and sticky."""
    return f"install -d -m 3770 -o {login(os.geteuid())} {quoted(path)}"


# ---- who may do what to our claims ----


def ownership(path: Path) -> list[Note]:
    """Whether others could rename the folder of claims, or keep us from claiming."""
    st = path.stat()
    danger = trap(st.st_uid, stat.S_IMODE(st.st_mode), euid=os.geteuid())
    if danger is None:
        return []
    level, what = danger
    mend = f"chmod +t {quoted(path)}"
    if st.st_uid != os.geteuid():
        mend = f"chown {login(os.geteuid())} {quoted(path)} && chmod 3770 {quoted(path)}"
    return [Note(level, f"inbox {path}", f"{what}: {mend}")]


def trap(owner: int, mode: int, *, euid: int) -> tuple[Level, str] | None:
    """What is dangerous about an inbox of this owner and mode for a daemon that runs as `euid`.

    In a folder without the sticky bit whoever may write renames what he likes, `.sfwatch` with the files under
    way as well. In a sticky one only a file's owner and the folder's own may, so a stranger's folder keeps us
    from claiming.
    """
    open_to_all = bool(mode & 0o022) and not mode & stat.S_ISVTX
    if owner == euid:
        text = f"others may write to it without the sticky bit (mode {mode:04o}) and so rename {claim.FOLDER}"
        return (Level.WARNING, text) if open_to_all else None
    whose = f"belongs to {user(owner)}, mode {mode:04o}"
    if mode & stat.S_ISVTX and euid != 0:
        return Level.FINDING, f"{whose}, sticky: {user(euid)} can't claim what other users drop"
    if open_to_all:
        return Level.FINDING, f"{whose}: whoever may write to it may rename {claim.FOLDER} with files under way"
    return Level.WARNING, f"{whose}: its owner may rename {claim.FOLDER} with files under way"


# ---- inotify ----


def watches(inboxes: Iterable[Inbox]) -> list[Note]:
    """Arm a doorbell as the daemon does: whether the user's limits leave room for one."""
    doorbell = arrive.Doorbell(_hear_nothing)
    try:
        there = [inbox for inbox in inboxes if os.path.isdir(inbox.path)]  # noqa: PTH112 - never raises
        refusals = [doorbell.watch(inbox.name, inbox.path, recursive=inbox.recursive) for inbox in there]
    finally:
        doorbell.close()
    refused = [Note(Level.WARNING, "inotify", _only_polled(refusal)) for refusal in refusals if refusal]
    return refused or ([Note(Level.OK, "inotify", "the limits leave room for the watches")] if there else [])


def _only_polled(refusal: str) -> str:
    return f"{refusal}; until then files there are found late, by looking every poll_interval"


def _hear_nothing(_ring: object) -> None:
    pass


# ---- other places ----


def beside(config: Config) -> list[Note]:
    """Whether the other files that the configuration names have a folder that we may write to."""
    named = {
        "status_file": config.status_file,
        "metrics_file": config.metrics_file,
        "log.file": config.log.file,
    }
    return [
        Note(Level.FINDING, f"{name} {file}", f"no file can be made in {file.parent}: {standing(file.parent)}")
        for name, file in named.items()
        if file is not None and not os.access(file.parent, os.W_OK | os.X_OK)
    ]

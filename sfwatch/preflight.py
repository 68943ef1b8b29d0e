"""What `sfwatch check` finds out: each thing is proved by doing it, and nothing is left behind.

A file of our own goes the way that every dropped file will go: made in the inbox, claimed, given back, filed
under done and under failed, each step a rename that replaces nothing, with its fsync. Permission bits alone
prove little (ACLs, sticky folders, read-only mounts, chattr), so they only explain what has failed.

A daemon may be at work in the same folders. Its eyes pass over hidden names, and what is put into its
`.sfwatch` is a file, which no instance takes for another's folder of claims. A check that was killed may
leave a file or folder named `.sfwatch-XXXXXXXX.tmp`.

Here are values only; what they look like on a terminal is check_page.py's business.
"""

import errno
import os
import pwd
import secrets
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from sfwatch import __version__, arrive, claim, files, key, verdict
from sfwatch.files import Lease
from sfwatch.reconcile import skew_s
from sfwatch.settings import ROOM_BYTES, Api, Config, Inbox
from sfwatch.upload import Client
from sfwatch.verdict import Blame

SKEW_TOLD_S = 5.0
"""Seconds by which two clocks may differ without a word; `Date` itself counts whole seconds."""

PATIENCE_S = 30.0
"""The longest wait for the service's answer: somebody sits there and waits as well."""

_CAP_LEASE = 1 << 28  # capability.h
_WHOLE_UID_MAP = ["0", "0", "4294967295"]  # user_namespaces(7): the initial namespace's
_PROBE = b"sfwatch check\n"
_LATER = "is not there yet: it is made at the first start (if it was there before: mount it)"

_PERHAPS = "is not there: it would be made at the first start (misspelt? if it was there before: mount it)"


class Level(StrEnum):
    """How it stands with one thing."""

    OK = "ok"
    WARNING = "warning"
    FINDING = "finding"
    UNAVAILABLE = "unavailable"
    NO_PERMISSION = "no_permission"


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that was looked at: `about` names it, `text` says how it is and, if not well, what to do."""

    level: Level
    about: str
    text: str


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
    for api, purpose in targets(config):
        yield from account(api, purpose, environ, online=online, wall=wall)


# ---- who we are, and how a folder stands to us ----


def user(uid: int) -> str:
    """The name of a user, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _login(uid: int) -> str:
    """How commands take a user."""
    try:
        return shlex.quote(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def foreign_owner(folder: Path) -> int | None:
    """The user id that a folder belongs to, if it is there and that is not ours."""
    try:
        owner = folder.stat().st_uid
    except OSError:
        return None
    return None if owner == os.geteuid() else owner


def as_user(uid: int, command: Iterable[str]) -> str:
    """The command line that does the same as that user."""
    if _login(uid) == str(uid):  # runuser takes names only
        return f"setpriv --reuid {uid} --clear-groups -- {shlex.join(command)}"
    return f"runuser -u {_login(uid)} -- {shlex.join(command)}"


class _Blocked(Exception):  # noqa: N818 - a finding, not an error of ours
    """Something that the daemon would have to do can't be done; the text says what, why, and what to do."""


@contextmanager
def _doing(what: str, folder: Path) -> Iterator[None]:
    """Name what was being done in which folder when it failed."""
    try:
        yield
    except OSError as error:
        raise _Blocked(f"{what}: {error.strerror or error}; {_remedy(folder, error)}") from error


def _remedy(folder: Path, error: OSError) -> str:
    match error.errno:
        case errno.EROFS:
            return "its filesystem is mounted read-only: mount it read-write"
        case errno.ENOSPC | errno.EDQUOT:
            return "its filesystem is full: make room"
        case errno.EACCES | errno.EPERM:
            return _standing(folder)
        case errno.ENOENT:
            return "mount it, or make it"
        case errno.ENOTDIR | errno.ELOOP | errno.EEXIST:
            return "something else has its place: move that away, or name another folder"
        case _:
            return "look at the disk and at the kernel's log (dmesg)"


def _standing(folder: Path) -> str:
    """Who the folder belongs to, who we are, and what would let us in."""
    me = user(os.geteuid())
    try:
        st = folder.stat()
    except OSError:
        return f"let {me} enter the folders above it (chmod +x)"
    mode = stat.S_IMODE(st.st_mode)
    return (
        f"it belongs to {user(st.st_uid)}, mode {mode:04o}, and this is {me}:"
        f" chown {_login(os.geteuid())} {_quoted(folder)}"
        " (or look for chattr and ACLs: lsattr -d, getfacl)"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


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
        with _doing("no file can be made there", folder), _opened(folder) as fd:
            _make_a_file(fd)
    except _Blocked as blocked:
        others = isinstance(blocked.__cause__, OSError) and not isinstance(blocked.__cause__, PermissionError)
        return [Note(Level.FINDING if others else Level.NO_PERMISSION, about, str(blocked))]
    return [Note(Level.OK, about, "can be written"), *_open_to_others(folder, about), *room(folder, about)]


def _state_could_be_made(folder: Path) -> str:
    above = next(parent for parent in folder.parents if os.path.lexists(parent))
    try:
        with _opened(above) as fd, _folder_of_ours(fd):
            return "is not there yet: it is made at the first start"
    except OSError as error:
        make = f"install -d -m 0700 -o {_login(os.geteuid())} {_quoted(folder)}, or set state_dir"
        mend = make if isinstance(error, PermissionError) else "set another state_dir"
        text = f"is not there, and can't be made in {above}: {error.strerror}; {mend}"
        raise _Blocked(text) from error


def _open_to_others(folder: Path, about: str) -> Iterator[Note]:
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o022:
        text = f"can be written by others (mode {mode:04o}): chmod go-w {_quoted(folder)}"
        yield Note(Level.WARNING, about, text)


def _make_a_file(fd: int) -> None:
    """Make one, durably, and take it away again."""
    with files.temporary(fd) as (made, name):
        files.write_all(made, _PROBE)
        os.fsync(made)
        os.unlink(name, dir_fd=fd)
    files.sync_folder(fd)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder itself; its own path is the administrator's and may lead through links.

    Where chattr(1) keeps names from being removed, nothing is tried: it would stay for ever.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if claim.is_pinned(fd):
            raise _Blocked(f"it is immutable or append-only (lsattr -d): chattr -i -a {_quoted(folder)}")
        yield fd
    finally:
        os.close(fd)


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
        notes += _walk(inbox, present, trusted=mode.trusted)
    except claim.ClaimError as error:
        notes.append(Note(Level.FINDING, about, error.detail))
    except _Blocked as blocked:
        notes.append(Note(Level.FINDING, about, str(blocked)))
    except OSError as error:
        notes.append(
            Note(Level.FINDING, about, f"can't be looked at: {error.strerror}; {_remedy(inbox.path, error)}")
        )
    return notes


def _without_inbox(present: Mapping[str, Path]) -> list[Note]:
    """Done and failed where there is no inbox yet from which a file could come."""
    return [_tried(f"{role} {path}", partial(_takes_files, path)) for role, path in present.items()]


def _tried(about: str, trial: Callable[[], str]) -> Note:
    """What a trial says of itself, or what it was blocked by."""
    try:
        return Note(Level.OK, about, trial())
    except _Blocked as blocked:
        return Note(Level.FINDING, about, str(blocked))


def _takes_files(folder: Path) -> str:
    with _doing("no file can be made there", folder), _opened(folder) as fd:
        _make_a_file(fd)
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
        return Note(Level.FINDING, about, f"can't be reached: {error.strerror}; {_remedy(path, error)}")
    if stat.S_ISDIR(st.st_mode):
        return None
    kind = files.kind_of(st.st_mode) or "file"
    return Note(Level.FINDING, about, f"is a {kind}, not a folder: move it away, or name another folder")


def _to_be_made(path: Path, about: str, inbox: Inbox) -> Note:
    if path.is_symlink():
        return Note(Level.FINDING, about, "is a link that leads nowhere: mend or remove it")
    if path.parent == inbox.path and not os.path.lexists(inbox.path):
        return Note(Level.OK, about, _LATER)  # after its inbox, which has a note of its own
    if not path.parent.is_dir():
        return Note(Level.FINDING, about, f"is not there, nor is {path.parent}: {_install(path)}")
    tried = _tried(about, partial(_could_be_made, path))
    if path == inbox.path and tried.level is Level.OK:
        return Note(Level.WARNING, about, _PERHAPS)
    return tried


def _could_be_made(path: Path) -> str:
    try:
        with _opened(path.parent) as fd, _folder_of_ours(fd):
            return _LATER
    except OSError as error:
        mend = _install(path) if isinstance(error, PermissionError) else _remedy(path.parent, error)
        text = f"is not there, and can't be made in {path.parent}: {error.strerror}; {mend}"
        raise _Blocked(text) from error


def _install(path: Path) -> str:
    """What makes a folder as it should be: ours, open to a group of droppers, and sticky."""
    return f"install -d -m 3770 -o {_login(os.geteuid())} {_quoted(path)}"


@contextmanager
def _folder_of_ours(dir_fd: int) -> Iterator[int]:
    """A private folder in another one, for a moment."""
    name = f"{files.TEMPORARY_PREFIX}{secrets.token_hex(4)}.tmp"
    fd = files.make_folder(dir_fd, name, 0o700)
    try:
        yield fd
    finally:
        os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)


# ---- who may do what to our claims ----


def ownership(path: Path) -> list[Note]:
    """Whether others could rename the folder of claims, or keep us from claiming."""
    st = path.stat()
    danger = trap(st.st_uid, stat.S_IMODE(st.st_mode), euid=os.geteuid())
    if danger is None:
        return []
    level, what = danger
    mend = f"chmod +t {_quoted(path)}"
    if st.st_uid != os.geteuid():
        mend = f"chown {_login(os.geteuid())} {_quoted(path)} && chmod 3770 {_quoted(path)}"
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


# ---- the way of a file ----


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


def _walk(inbox: Inbox, present: Mapping[str, Path], *, trusted: bool) -> list[Note]:
    about = f"inbox {inbox.path}"
    with ExitStack() as stack:  # what is opened stays so until the probe is gone, wherever it lies then
        with _doing("can't be opened", inbox.path):
            top = stack.enter_context(_opened(inbox.path))
        targets, notes = _open_targets(present, stack)
        claims = stack.enter_context(_claims(top, inbox.path))
        probe = stack.enter_context(_probe(top, inbox.path))
        notes += [_leases(inbox, probe)] if trusted else []
        with _doing("a file can't be claimed", inbox.path):
            probe.move(claims)
        notes += [_tried(name, partial(_filed, probe, claims, *target)) for name, target in targets.items()]
        with _doing("a file can't be given back", inbox.path):
            probe.move(top)
    return [Note(Level.OK, about, "files can be made, claimed and given back"), *notes]


def _open_targets(
    present: Mapping[str, Path], stack: ExitStack
) -> tuple[dict[str, tuple[int, Path]], list[Note]]:
    opened: dict[str, tuple[int, Path]] = {}
    notes: list[Note] = []
    for role, path in present.items():
        if role == "inbox":
            continue
        try:
            with _doing("can't be opened", path):
                opened[f"{role} {path}"] = (stack.enter_context(_opened(path)), path)
        except _Blocked as blocked:
            notes.append(Note(Level.FINDING, f"{role} {path}", str(blocked)))
    return opened, notes


@contextmanager
def _claims(top: int, inbox: Path) -> Iterator[int]:
    """The folder of claims if it is there and ours alone, else one like it for as long as we need it.

    `.sfwatch` itself is not made here: a daemon that starts now might be at it, and we would take it away.
    """
    if files.exists(claim.FOLDER, dir_fd=top):
        with _doing(f"{claim.FOLDER} can't be read", inbox / claim.FOLDER):
            claim.foreign(inbox, "")  # for its look at the folders' owners and modes
            fd = files.open_folder(claim.FOLDER, dir_fd=top)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    with ExitStack() as stack:
        with _doing("no folder can be made there", inbox):
            fd = stack.enter_context(_folder_of_ours(top))
        yield fd


@contextmanager
def _probe(top: int, inbox: Path) -> Iterator[_Probe]:
    with _doing("no file can be made there", inbox):
        with files.temporary(top) as (fd, name):
            files.write_all(fd, _PROBE)
            os.fsync(fd)
    probe = _Probe(name, top)
    try:
        yield probe
    finally:
        with _doing(f"our {probe.name} can't be removed again, do that by hand", inbox):
            os.unlink(probe.name, dir_fd=probe.folder)


def _filed(probe: _Probe, claims: int, target: int, folder: Path) -> str:
    """File the probe there and, since it is to go on, take it back."""
    with _doing("files can't be moved there", folder):
        try:
            probe.move(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _make_a_file(target)
            return "takes files; it is on another filesystem (rename gives EXDEV): they will be copied"
    with _doing("files can't be moved from there again", folder):
        probe.move(claims)
    return "takes files, by rename"


# ---- whether the kernel vouches for files ----


def _leases(inbox: Inbox, probe: _Probe) -> Note:
    about = f"inbox {inbox.path}"
    with _doing("our own file can't be read", inbox.path):
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
        Note(Level.FINDING, f"{name} {file}", f"no file can be made in {file.parent}: {_standing(file.parent)}")
        for name, file in named.items()
        if file is not None and not os.access(file.parent, os.W_OK | os.X_OK)
    ]


# ---- the key, and the service ----


def targets(config: Config) -> list[tuple[Api, str]]:
    """Each way to a service once, with the purpose that its first inbox sends."""
    purposes: dict[Api, str] = {}
    for inbox in config.inboxes:
        purposes.setdefault(inbox.api, inbox.purpose)
    return list(purposes.items())


def account(
    api: Api, purpose: str, environ: Mapping[str, str], *, online: bool, wall: Callable[[], float]
) -> list[Note]:
    """Whether there is a key, and with `online` whether the service takes it. `wall` gives seconds."""
    about = f"key of {_host(api)}"
    try:
        secret = key.read(api, environ)
    except key.NoKey as missing:
        return [Note(Level.FINDING, about, f"{missing}{_credential_hint(missing)}")]
    notes = [Note(Level.OK, about, f"comes from {key.source(api, environ)}")]
    notes += [Note(Level.WARNING, about, text) for text in key.warnings(api, environ)]
    return notes + (listing(api, purpose, secret, wall=wall) if online else [])


def _credential_hint(missing: key.NoKey) -> str:
    return "; a systemd credential is seen by the service alone" if missing.reason == "no_key" else ""


def _host(api: Api) -> str:
    return urlsplit(api.base_url).netloc


def listing(api: Api, purpose: str, secret: key.Key, *, wall: Callable[[], float]) -> list[Note]:
    """Ask for one listing, and judge it as the daemon would; compare the clocks."""
    patient = replace(api, read_timeout_s=min(api.read_timeout_s, PATIENCE_S))
    client = Client(patient, connections=1, user_agent=f"sfwatch/{__version__}")
    try:
        attempt = client.list_files(purpose=purpose, limit=1, key=secret.reveal())
    finally:
        client.close()
    now, about = wall(), f"service {client.host}"
    judged = verdict.judge_listing(attempt, host=client.host, reached_before=False, wall=now)
    notes = [Note(_level(judged), about, judged.detail)]
    skew = skew_s(attempt.answer.date, wall=now) if attempt.answer else None
    wrong = clocks(skew) if skew is not None else None
    return [*notes, Note(Level.WARNING, about, wrong)] if wrong else notes


def _level(judged: verdict.Verdict) -> Level:
    if judged.unreachable:
        return Level.UNAVAILABLE
    match judged.blame:
        case Blame.ACCEPTED:
            return Level.OK
        case Blame.NOT_NOW:
            return Level.UNAVAILABLE
        case _:
            return Level.FINDING


def clocks(skew: float) -> str | None:
    """What to say if the service's clock is `skew` seconds ahead of ours."""
    if abs(skew) <= SKEW_TOLD_S:
        return None
    side = "behind" if skew > 0 else "ahead of"
    return (
        f"this machine's clock is {abs(skew):.0f} s {side} the service's: set it"
        " (timedatectl set-ntp true); lost uploads are looked up by their times"
    )

"""A failed file goes back into the inbox that it came from, its report into the history first.

Nothing is overwritten. A daemon need not know: it sees the file arrive, and counts its attempts from zero. Only
a claimed file whose outcome stays unknown remains where it is: the request to send it again is left in the
state folder, and the daemon reads it at its next scan, or at its next start.

Whoever may write to a failed folder may have written a report, too: what it says is distrusted.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sfwatch import arrive, claim, files, journal, move, record
from sfwatch.settings import Config, Inbox

HISTORY = ".sfwatch-history"
"""The folder in failed that keeps the reports of files that were retried."""

REQUESTS = "retry"
"""The folder in `state_dir` with one file for each undecided upload that is to be sent again."""


class NotRetriedError(Exception):
    """Why a file was not moved, and what to do, as a sentence."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A file in a failed folder, `name` relative to it. `report` is None if there is none that can be read."""

    folder: Path
    name: str
    report: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class ResendRequest:
    """That this undecided upload be sent again, once: `id` is kept in its row when it is. `file` holds it."""

    inbox: str
    name: str
    id: str
    file: Path


# ── what there is to retry ─────────────────────────────────────────────────────────────────────────────────


def named(config: Config, name: str) -> Failed | None:
    """Find a failed file by its path, by its name in a failed folder, or by that under which it was dropped."""
    path = Path(os.path.abspath(name))  # noqa: PTH100 - links stay
    for folder in _folders(config):
        if path.is_relative_to(folder) and path != folder and _lies_in(folder, str(path.relative_to(folder))):
            return _failed(folder, str(path.relative_to(folder)))
    found = [_failed(folder, name) for folder in _folders(config) if _lies_in(folder, name)]
    found = found or [it for it in everything(config) if it.report and record.believed_name(it.report) == name]
    if len(found) > 1:
        paths = ", ".join(str(it.folder / it.name) for it in found)
        raise NotRetriedError(f"{name} may be any of {paths}: name one by its path")
    return found[0] if found else None


def everything(config: Config, reason: str | None = None) -> Iterator[Failed]:
    """Find all failed files that have a report, of one reason if it is given."""
    for folder in _folders(config):
        for name in _reported(folder):
            failed = _failed(folder, name)
            if failed.report is not None and reason in (None, failed.report.get("reason")):
                yield failed


def _folders(config: Config) -> list[Path]:
    return list(dict.fromkeys(inbox.failed for inbox in config.inboxes))


def _reported(folder: Path) -> list[str]:
    """The names beside which a report lies, in the whole tree; links are not followed."""
    names = []
    for where, folders, contents in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != HISTORY)
        base = os.path.relpath(where, folder)
        names += [
            os.path.normpath(os.path.join(base, name.removesuffix(record.REPORT)))  # noqa: PTH118
            for name in sorted(contents)
            if name.endswith(record.REPORT) and name.removesuffix(record.REPORT) in contents
        ]
    return names


def _lies_in(folder: Path, name: str) -> bool:
    try:
        with _opened(folder, name) as (fd, base), files.regular(base, dir_fd=fd):
            return HISTORY not in files.parts(name)
    except (OSError, ValueError, files.NotRegular):
        return False


def _failed(folder: Path, name: str) -> Failed:
    """The file and its report; that of an earlier try that was cut off lies in the history already."""
    report = None
    with suppress(OSError, files.NotRegular), _opened(folder, name) as (fd, base):
        report = record.read(base + record.REPORT, dir_fd=fd)
        if report is None:
            with files.folder(HISTORY, dir_fd=fd) as history:
                report = record.read(base + record.REPORT, dir_fd=history)
    return Failed(folder, name, report)


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """The folder in which a file lies below this one, no link followed below it, and the file's own name."""
    with files.folder(os.path.realpath(folder)) as top, files.parent(top, name) as found:
        yield found


# ── putting it back ────────────────────────────────────────────────────────────────────────────────────────


def put_back(config: Config, failed: Failed, *, inbox: str | None = None, now: datetime | None = None) -> Path:
    """Move one file into its inbox, or the one named; return where it lies then. Raises NotRetriedError."""
    home = _home(config, failed, inbox)
    name = _name_in(home, failed)
    path = failed.folder / failed.name
    try:
        _move_home(failed, home, name, now or datetime.now(UTC))
    except FileExistsError:
        text = f"{home.path / name} is taken: move that away, or wait until it is uploaded"
        raise NotRetriedError(text) from None
    except move.SourceChanged:
        raise NotRetriedError(f"{path} was changed meanwhile: retry it again") from None
    except files.NotRegular as odd:
        raise NotRetriedError(f"{path} can't be moved: a {odd.kind} is in its way") from None
    except OSError as error:
        raise NotRetriedError(f"{path} can't be moved to {home.path}: {error.strerror}") from error
    return home.path / name


def _move_home(failed: Failed, home: Inbox, name: str, now: datetime) -> None:
    with ExitStack() as opened:
        source, base = opened.enter_context(_opened(failed.folder, failed.name))
        fd = opened.enter_context(files.regular(base, dir_fd=source))
        target, wanted = opened.enter_context(_home_of(home, name))
        if files.exists(wanted, dir_fd=target):
            raise FileExistsError
        _into_history(source, base, now)
        try:
            move.move(source, base, target, wanted, fd=fd, sha256=move.digest(fd))
        except FileNotFoundError:
            if files.exists(base, dir_fd=source):
                raise
            # It was moved, and the daemon has claimed it already.
        finally:
            if files.exists(base, dir_fd=source):  # then it can be found by its report as before
                _out_of_history(source, base)
        _marker_too(home, source, base, target, wanted)


def _home(config: Config, failed: Failed, inbox: str | None) -> Inbox:
    wanted = inbox or (failed.report or {}).get("inbox")
    homes = [it for it in config.inboxes if it.name == wanted]
    if homes:
        return homes[0]
    names = ", ".join(it.name for it in config.inboxes)
    if inbox is not None:
        raise NotRetriedError(f"no inbox is called {inbox}: it is one of {names}")
    why = f"its inbox {wanted} is not in the configuration" if wanted else "its report is gone"
    raise NotRetriedError(f"{failed.folder / failed.name}: {why}; say where it belongs with --inbox ({names})")


def _name_in(home: Inbox, failed: Failed) -> str:
    try:
        name = record.original_name(failed.report) if failed.report else failed.name
    except ValueError as odd:
        raise NotRetriedError(f"the report of {failed.folder / failed.name} can't be believed: {odd}") from None
    if not arrive.candidate(name, home) or ("/" in name and not home.recursive):
        raise NotRetriedError(
            f"{failed.folder / failed.name} can't go to {home.path / name}: no file of that name is taken there"
        )
    return name


@contextmanager
def _home_of(home: Inbox, name: str) -> Iterator[tuple[int, str]]:
    with files.folder(os.path.realpath(home.path)) as top:
        with files.parent(top, name, make=os.fstat(top).st_mode & 0o777) as found:
            yield found


def _into_history(source: int, base: str, now: datetime) -> None:
    """Keep the report under its name; an earlier one of that name is kept by the time."""
    report = base + record.REPORT
    if not files.exists(report, dir_fd=source):
        return
    with suppress(FileExistsError):
        os.mkdir(HISTORY, 0o770, dir_fd=source)
    with files.folder(HISTORY, dir_fd=source) as history:
        if files.exists(report, dir_fd=history):
            earlier = f"{now:%Y%m%dT%H%M%S%f}Z{record.REPORT}"
            files.rename_noreplace(report, earlier, src_dir_fd=history, dst_dir_fd=history)
        files.rename_noreplace(report, report, src_dir_fd=source, dst_dir_fd=history)
        files.sync_folder(history)
    files.sync_folder(source)


def _out_of_history(source: int, base: str) -> None:
    """The file could not be moved: its report comes back, if it may; else it is found where it is."""
    report = base + record.REPORT
    with suppress(OSError), files.folder(HISTORY, dir_fd=source) as history:
        files.rename_noreplace(report, report, src_dir_fd=history, dst_dir_fd=source)


def _marker_too(home: Inbox, source: int, base: str, target: int, wanted: str) -> None:
    """The producer's marker comes after its file: only then the file is taken."""
    if home.settle_marker is None:
        return
    marker = wanted + home.settle_marker
    with (
        suppress(FileNotFoundError, FileExistsError, files.NotRegular),
        files.regular(base + home.settle_marker, dir_fd=source) as fd,
    ):
        move.move(source, base + home.settle_marker, target, marker, fd=fd, sha256=move.digest(fd))


# ── undecided uploads, which stay claimed ──────────────────────────────────────────────────────────────────


def claimed(config: Config, name: str) -> list[tuple[str, str]]:
    """Find the files in progress of this name, or path in an inbox: their inboxes' names and their own.

    They are claimed, or in the journal alone where their claims folder was removed.
    """
    found = []
    rows: set[tuple[str, str]] = set()
    with suppress(OSError, journal.JournalError):
        rows = {(row.inbox, row.name) for row in journal.glance(config.state_dir).under_way}
    for inbox in config.inboxes:
        own = name.removeprefix(f"{inbox.path}/")
        held: list[str] = []
        with suppress(OSError, claim.ClaimError, files.NotRegular):
            held = [each for names in claim.folders(inbox.path).values() for each in names]
        if own in held or (str(inbox.path), own) in rows:
            found.append((inbox.name, own))
    return found


def request(state_dir: Path, inbox: str, name: str) -> None:
    """Ask the daemon to send an undecided upload again, once. OSError if it can't be asked."""
    folder = state_dir / REQUESTS
    folder.mkdir(mode=0o700, exist_ok=True)
    asked = {"inbox": inbox, "name": os.fsencode(name).hex()}
    file = folder / f"{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]}.json"
    files.put(file, json.dumps({**asked, "id": secrets.token_hex(8)}).encode(), mode=0o600)


def requests(state_dir: Path) -> Sequence[ResendRequest]:
    """Return what was asked for and not done yet."""
    found = []
    for file in sorted((state_dir / REQUESTS).glob("*.json")):
        # Half of one, of a crash, was not asked for.
        with suppress(OSError, ValueError, KeyError, TypeError):
            asked = json.loads(file.read_bytes())
            name = os.fsdecode(bytes.fromhex(asked["name"]))
            found.append(ResendRequest(asked["inbox"], name, asked.get("id") or file.stem, file))
    return found

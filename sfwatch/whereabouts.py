"""Why a file is not taken, or what became of it, in one sentence.

What the daemon says of it counts; then what lies in its inbox; then the sidecars and reports in done and
failed, which know the name that a file was dropped under; and last, where this user may read it, the journal.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sfwatch import arrive, console, files, journal, record
from sfwatch.journal import State
from sfwatch.logs import printable
from sfwatch.settings import Config, Inbox
from sfwatch.status import REASONS, TROUBLE, Status, WaitingFile

_LONGEST_PREFIX = 60
"""Characters of a name that its sidecar's surely begins with: longer ones are shortened."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Where a file is: `state` is under_way, waiting, not_taken, done, failed or unknown.

    `exit_status`: 0 all is well with it, 1 somebody has to do something, 3 it waits for sfwatch to be started.
    """

    file: str
    state: str
    sentence: str
    exit_status: int
    inbox: str | None = None
    reason: str | None = None
    path: str | None = None
    beside: str | None = None
    file_id: str | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A file that may be meant: its inbox and its name there."""

    inbox: Inbox
    name: str

    def __str__(self) -> str:
        return printable(f"{self.inbox.name}/{self.name}")


@dataclass(frozen=True, slots=True)
class _Known:
    """What the answer is found in; `status` is None if no daemon runs."""

    config: Config
    status: Status | None
    now: datetime

    def age(self, at: datetime) -> str:
        return console.span(max(1, round((self.now - at).total_seconds())))


def find(name: str, config: Config, running: Status | None, *, now: datetime) -> Answer:
    """Say where the file of this name or path is; `running` is what the daemon published, if one runs."""
    known = _Known(config, running, now)
    places = list(_places(name, config))
    if not places:
        inboxes = ", ".join(str(inbox.path) for inbox in config.inboxes)
        text = f"{name} lies in no inbox: files are taken from {inboxes}"
        return Answer(printable(name), "not_taken", printable(text), 1, reason="no_inbox")
    stages: tuple[Callable[[_Place, _Known], Answer | None], ...] = (
        _under_way,
        _told,
        _in_inbox,
        _finished,
        _in_journal,
    )
    for stage in stages:
        for place in places:
            answer = stage(place, known)
            if answer is not None:
                return answer
    inboxes = ", ".join(place.inbox.name for place in places)
    text = (
        f"nothing is known of {name}: not in inbox, done or failed of {inboxes}, as far as this user may look"
    )
    return Answer(printable(name), "unknown", printable(text), 1)


# ---- which file is meant ----


def _places(name: str, config: Config) -> Iterator[_Place]:
    """The files that a name or path may mean: a plain name that is not here may be that of any inbox."""
    folder, base = os.path.split(os.path.abspath(name))  # noqa: PTH100 - the link itself may be meant
    full = Path(os.path.realpath(folder), base)
    found = [place for inbox in config.inboxes for place in _places_of(full, inbox)]
    yield from found
    if not found and "/" not in name:
        yield from (_Place(inbox, _stripped(name)) for inbox in config.inboxes)


def _places_of(full: Path, inbox: Inbox) -> Iterator[_Place]:
    for folder in (inbox.path, inbox.done, inbox.failed):
        real = Path(os.path.realpath(folder))
        if full != real and full.is_relative_to(real):
            relative = full.relative_to(real)
            if folder is inbox.path and relative.parts[0] == arrive.OWN_FOLDER:
                relative = Path(*relative.parts[2:])  # our own folder and the instance's
            elif folder is not inbox.path:
                relative = _dropped_as(folder, relative)
            if relative.name:
                yield _Place(inbox, str(relative))


def _dropped_as(folder: Path, relative: Path) -> Path:
    """The name that a file in done or failed was dropped under, if its document tells."""
    name = _stripped(str(relative))
    for suffix in (record.SIDECAR, record.REPORT):
        document = record.read(str(folder / f"{name}{suffix}")) or {}
        dropped_as = record.believed_name(document.get("sfwatch", document))
        if dropped_as is not None:
            return Path(dropped_as)
    return Path(name)


def _stripped(name: str) -> str:
    return name.removesuffix(record.SIDECAR).removesuffix(record.REPORT)


# ---- what the daemon says ----


def _under_way(place: _Place, known: _Known) -> Answer | None:
    for file in known.status.under_way if known.status else ():
        if (file.inbox, file.file) == (printable(place.inbox.name), printable(place.name)):
            if os.path.lexists(place.inbox.path / place.name):
                return _waits(place, known, "namesake")
            out = f"{console.size(file.sent)} of {console.size(file.size)} are out"
            words = {
                "checking": "is being checked",
                "uploading": f"is being uploaded: {out}",
                "looking_up": "is looked for in the service's listing, since the answer to its upload was lost",
                "filing": "is being moved away: its answer is there",
            }
            text = f"{place} {words.get(file.step, file.step)} (for {known.age(file.since)})"
            return Answer(printable(place.name), "under_way", text, 0, inbox=place.inbox.name, reason=file.step)
    return None


def _told(place: _Place, known: _Known) -> Answer | None:
    for group in known.status.waiting if known.status else ():
        for file in group.oldest:
            if (group.inbox, file.file) == (printable(place.inbox.name), printable(place.name)):
                return _waits(place, known, group.reason, file)
    return None


def _waits(place: _Place, known: _Known, reason: str, file: WaitingFile | None = None) -> Answer:
    said = file.detail if file is not None else None
    why = (_held(place, known) if reason == "held" else said) or REASONS.get(reason, reason)
    if reason == "settling":
        why += _rest(place.inbox)
    text = f"{place} waits: {why}" if file is None else f"{place} has waited for {known.age(file.since)}: {why}"
    if file is not None and file.attempts:
        text += f"; tries so far: {file.attempts}"
    if file is not None and file.retry_at is not None and file.retry_at > known.now:
        text += f"; next try in {console.span((file.retry_at - known.now).total_seconds())}"
    stopped = 3 if reason == "not_running" else 0
    exit_status = 1 if reason in TROUBLE else stopped
    path = printable(str(place.inbox.path / place.name))
    return Answer(
        printable(place.name), "waiting", text, exit_status, inbox=place.inbox.name, reason=reason, path=path
    )


def _rest(inbox: Inbox) -> str:
    """How long a file of this inbox has to rest."""
    settle, unproven = console.span(inbox.settle_s), console.span(inbox.settle_unproven_s)
    if inbox.settle_s == inbox.settle_unproven_s:
        return f" ({settle})"
    return f" ({settle} where the kernel says that nobody writes to it, else {unproven})"


def _held(place: _Place, known: _Known) -> str | None:
    """Why nothing of this inbox goes."""
    if known.status is None:
        return None
    needed = {str(path) for path in (place.inbox.path, place.inbox.done, place.inbox.failed)}
    for folder in known.status.folders:
        if folder.path in {*needed, known.status.state_dir}:
            return f"it is held, since {folder.detail}"
    for target in known.status.targets:
        if target.reason is not None and printable(place.inbox.name) in target.inboxes:
            return f"it is held with all others to {target.name} ({target.reason}): {target.detail}"
    return None


# ---- what lies in the inbox ----


def _in_inbox(place: _Place, known: _Known) -> Answer | None:
    path = place.inbox.path / place.name
    try:
        st = path.lstat()
    except OSError:
        return None
    kind = files.kind_of(st.st_mode)
    why = _why_never(place) if kind is None else f"it is a {kind}, not a regular file"
    if why is not None:
        reason = kind or "no_match"
        text = f"{place} is not taken: {why}"
        return Answer(
            printable(place.name), "not_taken", text, 1, place.inbox.name, reason, printable(str(path))
        )
    if known.status is None:
        return _waits(place, known, "not_running")
    return _waits(place, known, _reason_of_many(place, known.status))


def _why_never(place: _Place) -> str | None:
    """Why a name is none that sfwatch takes."""
    inbox, name = place.inbox, place.name
    if "/" in name and not inbox.recursive:
        return "it lies in a sub-folder, and the inbox is not recursive"
    if arrive.candidate(name, inbox):
        return None
    if name.startswith(".") or "/." in name:
        return "its name, or that of a folder above it, begins with a dot"
    if name.lower().endswith(tuple(suffix.lower() for suffix in arrive.TEMPORARY_SUFFIXES)):
        return "its name ends as those of unfinished files do: rename it when it is whole"
    if inbox.settle_marker is not None and name.endswith(inbox.settle_marker):
        return "it is the marker of another file"
    return f"its name does not match {' or '.join(inbox.match)}"


def _reason_of_many(place: _Place, status: Status) -> str:
    """Why a file waits that is not named: one of many then, or one that came just now."""
    mine = [group for group in status.waiting if group.inbox == printable(place.inbox.name)]
    unnamed = [group for group in mine if group.files > len(group.oldest)]
    return max(unnamed, key=lambda group: group.files).reason if unnamed else "settling"


# ---- what lies in done and failed ----


def _finished(place: _Place, known: _Known) -> Answer | None:
    """The latest of the documents that speak of a file of this name."""
    done = [
        (str(facts["sfwatch"].get("uploaded_at")), path, facts) for path, facts in _documents(place, done=True)
    ]
    failed = [(str(facts.get("failed_at")), path, facts) for path, facts in _documents(place, done=False)]
    latest = max([*done, *failed], key=lambda found: found[:2], default=None)
    if latest is None:
        return None
    at, path, facts = latest
    return (
        _is_done(place, known, at, path, facts)
        if "sfwatch" in facts
        else _is_failed(place, known, at, path, facts)
    )


def _documents(place: _Place, *, done: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    suffix = record.SIDECAR if done else record.REPORT
    folder = ((place.inbox.done if done else place.inbox.failed) / place.name).parent
    prefix = Path(place.name).stem[:_LONGEST_PREFIX]
    try:
        names = os.listdir(folder)  # noqa: PTH208 - a Path for each of 100,000 names takes long
    except OSError:
        return
    for name in names:
        if name.startswith(prefix) and name.endswith(suffix):
            document = record.read(str(folder / name)) or {}
            if record.believed_name(document.get("sfwatch") if done else document) == place.name:
                yield folder / name, document


def _is_done(place: _Place, known: _Known, at: str, path: Path, facts: dict[str, Any]) -> Answer:
    beside = printable(str(path))
    file_id = printable(str(facts.get("id")))
    text = f"{place} was uploaded {_ago(known, at)} as {file_id}; its sidecar is {beside}"
    return Answer(
        printable(place.name),
        "done",
        text,
        0,
        inbox=place.inbox.name,
        path=beside.removesuffix(record.SIDECAR),
        beside=beside,
        file_id=file_id,
    )


def _is_failed(place: _Place, known: _Known, at: str, path: Path, facts: dict[str, Any]) -> Answer:
    beside = printable(str(path))
    said = {key: printable(str(facts.get(key) or "")).rstrip(".") for key in ("reason", "detail", "next_step")}
    at_line = f"line {facts['line']}: " if isinstance(facts.get("line"), int) else ""
    why = f"{at_line}{said['detail']}. {said['next_step']}. See {beside}"
    text = f"{place} failed {_ago(known, at)} ({said['reason']}): {why}"
    return Answer(
        printable(place.name),
        "failed",
        text,
        1,
        inbox=place.inbox.name,
        reason=said["reason"],
        path=beside.removesuffix(record.REPORT),
        beside=beside,
    )


def _ago(known: _Known, at: str) -> str:
    try:
        return f"{known.age(datetime.fromisoformat(at))} ago"
    except (ValueError, TypeError):
        return "some time ago"


# ---- what the journal knows ----

_IN_JOURNAL = {
    State.SENDING: "looking_up",
    State.UNKNOWN: "looking_up",
    State.DOUBTED: "doubted",
    State.ACCEPTED: "filing",
    State.REFUSED: "filing",
}


def _in_journal(place: _Place, known: _Known) -> Answer | None:
    """A file that is claimed while no daemon runs."""
    if known.status is not None:
        return None
    try:
        rows = journal.glance(known.config.state_dir).under_way
    except (OSError, journal.JournalError):
        return None
    for row in rows:
        if (row.inbox, row.name) == (str(place.inbox.path), place.name) and row.state in _IN_JOURNAL:
            reason = _IN_JOURNAL[row.state]
            text = f"{place} is under way, but sfwatch is not running: {REASONS[reason]}"
            return Answer(printable(place.name), "under_way", text, 3, inbox=place.inbox.name, reason=reason)
    return None

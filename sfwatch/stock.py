"""What lies in the folders and the journal while no daemon runs: looked at, never touched.

It takes the form of the daemon's own document, so that it is shown alike.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

from sfwatch import __version__, arrive, files, journal, settings, status, watch
from sfwatch.journal import Delivery, State
from sfwatch.logs import printable
from sfwatch.settings import Config

_REASONS = {
    State.SENDING: "looking_up",
    State.UNKNOWN: "looking_up",
    State.DOUBTED: "doubted",
    State.ACCEPTED: "filing",
    State.REFUSED: "filing",
}


def take(config: Config, *, now: datetime) -> status.Status:
    """Return what can be seen. Raises OSError if the journal may not be read, JournalError if it can't be."""
    try:
        known = journal.glance(config.state_dir)
    except FileNotFoundError:  # it never ran
        known = journal.Glance((), None, None)
    rows = {(row.inbox, row.name): row for row in known.under_way}
    inboxes, waiting = [], []
    for inbox in config.inboxes:
        entry, groups = _inbox(inbox, rows)
        inboxes.append(entry)
        waiting += groups
    return status.Status(
        schema=status.SCHEMA,
        version=__version__,
        state="stopped",
        pid=0,
        process="",
        started_at=now,
        published_at=now,
        config=printable(os.path.abspath(config.source)) if config.source else None,  # noqa: PTH100
        state_dir=printable(str(config.state_dir)),
        inboxes=tuple(inboxes),
        waiting=tuple(waiting),
        last_done=_ended(known.last_done, config),
        last_failed=_ended(known.last_failed, config),
    )


def _inbox(
    inbox: settings.Inbox, rows: Mapping[tuple[str, str], Delivery]
) -> tuple[status.Inbox, list[status.Waiting]]:
    entry = status.Inbox(
        name=printable(inbox.name),
        path=printable(str(inbox.path)),
        done=printable(str(inbox.done)),
        failed=printable(str(inbox.failed)),
    )
    named: dict[str, list[status.WaitingFile]] = {}
    for row in rows.values():
        if row.inbox == str(inbox.path) and row.state in _REASONS:
            named.setdefault(_REASONS[row.state], []).append(_of_journal(row))
    try:
        look = arrive.look(inbox)
        named["not_running"] = list(_lying(inbox, look.names, rows))
    except OSError as error:
        reason, detail = watch.why_lost(watch.watched(inbox), error)
        entry, look = replace(entry, lost=status.Lost(reason, printable(detail))), arrive.Look([], 0)
    groups = [_group(entry.name, reason, those) for reason, those in named.items() if those]
    waiting = sum(group.files for group in groups)
    return replace(entry, waiting=waiting, others=look.others), groups


def _group(inbox: str, reason: str, those: list[status.WaitingFile]) -> status.Waiting:
    oldest = sorted(those, key=attrgetter("since", "file"))[: status.NAMED]
    return status.Waiting(inbox, reason, len(those), tuple(oldest))


def _lying(
    inbox: settings.Inbox, names: list[str], rows: Mapping[tuple[str, str], Delivery]
) -> Iterator[status.WaitingFile]:
    """The regular files among these names; the change time is about when they came."""
    with files.folder(os.path.realpath(inbox.path)) as top:
        for name in names:
            try:
                with files.parent(top, name) as (folder, base):
                    st = files.lstat(base, dir_fd=folder)
            except (OSError, files.NotRegular):  # gone meanwhile
                continue
            row = rows.get((str(inbox.path), name))
            attempts = 0 if row is None else row.attempts
            if files.kind_of(st.st_mode) is None:
                since = _moment(st.st_ctime)
                yield status.WaitingFile(printable(name), st.st_size, since, attempts=attempts)


def _of_journal(row: Delivery) -> status.WaitingFile:
    since = _moment(row.mtime_ns / 1e9)
    return status.WaitingFile(printable(row.name), row.size, since, attempts=row.attempts)


def _ended(row: Delivery | None, config: Config) -> status.Ended | None:
    if row is None or row.finished_at is None:
        return None
    names = {str(inbox.path): inbox.name for inbox in config.inboxes}
    inbox = names.get(row.inbox, Path(row.inbox).name)
    return status.Ended(printable(inbox), printable(row.name), _moment(row.finished_at))


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(round(at, 3), UTC)

"""Which file goes next: those seen first, inboxes in turn, one small file at a time where a target is held.

A file goes only where it can come to its end: its inbox is there, its claim is locked, and the folders that it
needs take files.
"""

from collections.abc import Iterable

from sfwatch import target as rules
from sfwatch.core import Core
from sfwatch.job import Job, Task
from sfwatch.journal import State
from sfwatch.settings import RemoteName
from sfwatch.table import Entry, Stage
from sfwatch.upstream import Service
from sfwatch.verdict import remote_name
from sfwatch.work import work


def queue(core: Core, entry: Entry) -> None:
    """Put a file where the next worker finds it: those that need nothing of the service go ahead."""
    if not entry.claimed and entry.settled is None:
        # A crash left it claimed, and it went back since: nothing is known of it as it lies there.
        entry.task = Task.DELIVER
        core.table.settle(entry, core.clock())
    elif _needs_service(entry):
        core.table.ready(entry)
    else:
        entry.stage = Stage.READY
        core.local.append(entry.key)


def give_back(core: Core, entry: Entry) -> None:
    """Let a claimed file go back into its inbox, to be tried anew."""
    entry.task = Task.GIVE_BACK
    queue(core, entry)


def doubted(core: Core, inboxes: Iterable[str]) -> list[Entry]:
    """Return the files of these inboxes that were refused, which is not believed yet."""
    entries = [entry for inbox in inboxes for entry in core.table.names(inbox).values()]
    return [entry for entry in entries if entry.stage is Stage.WAITING and entry.task is Task.CONDEMN]


def hand_out(core: Core, now: float) -> None:
    """Start all that may be started now."""
    for _ in range(len(core.local)):
        entry = core.table.get(core.local.popleft())
        if entry is None or entry.stage is not Stage.READY or _is_away(core, entry, now):
            continue
        if _may_go(core, entry, now):
            _submit(core, entry, now)
        else:
            core.local.append(entry.key)
    for service in core.services.values():
        while _hand_out_next(core, service, now):
            pass


def _hand_out_next(core: Core, service: Service, now: float) -> bool:
    """Start the next file of this service; its inboxes take turns."""
    for _ in range(len(service.inboxes)):
        inbox = service.inboxes[0]
        service.inboxes.rotate(-1)
        w = core.inboxes.watched[inbox]
        if w.lost is not None or now < w.refused_until or not service.room_for(inbox, now):
            continue
        entry = _next_of(core, service, inbox)
        if entry is None or _is_away(core, entry, now):
            continue
        if not _may_go(core, entry, now):
            if service.state.hold is None:  # a trial has kept its place
                core.table.ready(entry)
            continue
        _submit(core, entry, now)
        return True
    return False


def _may_go(core: Core, entry: Entry, now: float) -> bool:
    """Whether its claim can be locked, and all folders that it needs take files."""
    w = core.inboxes.watched[entry.inbox]
    return core.inboxes.locked(w, entry, now) and core.storage.ready(_folders(core, entry), entry.key, now)


def _is_away(core: Core, entry: Entry, now: float) -> bool:
    """Put a file off whose claim lies in an inbox that is not there now.

    Another folder may be in its place, a bare mount point perhaps: what is not in that one is not gone.
    """
    w = core.inboxes.watched[entry.inbox]
    away = entry.claimed and (w.lost is not None or entry.home not in (None, w.identity))
    if away:
        core.table.wait(entry, now + core.config.poll_interval_s)
    return away


def _next_of(core: Core, service: Service, inbox: str) -> Entry | None:
    if service.state.hold is not None:
        return _trial_of(core, service, inbox)
    while (entry := core.table.pop_ready(inbox)) is not None:
        if not service.blocks(entry.key, _remote_name(core, entry)):
            return entry
    return None


def _trial_of(core: Core, service: Service, inbox: str) -> Entry | None:
    """The smallest file that waits and has not been the trial of this hold yet."""
    waiting = [e for e in core.table.names(inbox).values() if e.stage is Stage.READY and _needs_service(e)]
    untried = [e for e in waiting if rules.may_try(service.state, e.key)]
    if waiting and not untried:
        service.state = rules.forget_tried(service.state)
    return min(untried or waiting, key=lambda e: (e.size, e.seen_at, e.name), default=None)


def _remote_name(core: Core, entry: Entry) -> str | None:
    if core.config.uploads.remote_name is RemoteName.TAGGED:
        return None
    return remote_name(entry.name, tag=None)


def _submit(core: Core, entry: Entry, now: float) -> None:
    w = core.inboxes.watched[entry.inbox]
    service = core.service_of[entry.inbox]
    if _needs_service(entry):
        service.start(entry.key, _remote_name(core, entry), now)
    entry.stage = Stage.UNDER_WAY
    entry.home = entry.home if entry.claimed else w.identity
    w.claims.add(entry.name)
    job = Job(
        task=entry.task,
        inbox=w.inbox,
        name=entry.name,
        seen_at=entry.seen_at,
        settled=None if entry.claimed else entry.settled,
        known=entry.known,
        looked_s=now - entry.lost_at if entry.lost_at is not None else 0.0,
        held_s=max(0.0, service.held_s(now) - entry.held_mark) if entry.held_mark is not None else 0.0,
        condemned=entry.condemned,
        insist=entry.insist,
        home=entry.home,
    )
    core.under_way[entry.key] = job
    core.pool.submit(work, job, service.tools, entry.key, core.mailbox.put)


def _folders(core: Core, entry: Entry) -> set[str]:
    """The folders that have to take files before this file can go on."""
    inbox = core.inboxes.watched[entry.inbox].inbox
    folders = {str(core.config.state_dir), str(inbox.path)}
    if not _is_refused(entry):
        folders.add(str(inbox.done))
    if _is_refused(entry) or _needs_service(entry):
        folders.add(str(inbox.failed))
    return folders


def needing(core: Core, folder: str) -> int:
    """Return how many files need this folder."""
    return sum(folder in _folders(core, entry) for entry in core.table.entries())


def _needs_service(entry: Entry) -> bool:
    known = entry.known
    answered = known is not None and (known.finished_at or known.state in (State.ACCEPTED, State.REFUSED))
    return entry.task is Task.DELIVER and not answered


def _is_refused(entry: Entry) -> bool:
    known = entry.known
    return entry.task is Task.CONDEMN or (known is not None and known.state is State.REFUSED)

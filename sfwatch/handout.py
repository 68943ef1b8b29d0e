"""Which file goes next: those seen first, inboxes in turn, one small file at a time where a target is held.

A file goes only where it can come to its end: its inbox is there, its claim is locked, and the folders that it
needs take files.
"""

from collections.abc import Iterable, Iterator

from sfwatch import target as rules
from sfwatch.core import Core
from sfwatch.job import Job, Task
from sfwatch.journal import Delivery, State
from sfwatch.settings import Inbox
from sfwatch.table import Entry, Key, Stage
from sfwatch.upstream import Service
from sfwatch.work import ask_listing, work


def queue(core: Core, entry: Entry) -> None:
    """Put a file where the next worker finds it: those that need nothing of the service go ahead."""
    if not entry.claimed and entry.settled is None:
        # A crash left it claimed, and it went back since: nothing is known of it as it lies there.
        entry.task = Task.DELIVER
        core.table.settle(entry, core.clock())
    elif needs_look_up(entry):
        entry.stage = Stage.READY
        core.service_of[entry.inbox].look_ups[entry.key] = None
    elif _needs_service(entry):
        core.table.ready(entry)
    else:
        entry.stage = Stage.READY
        core.local.append(entry.key)


def give_back(core: Core, entry: Entry) -> None:
    """Release a claimed file into its inbox, where it settles again."""
    entry.task = Task.GIVE_BACK
    entry.unknown_since = None
    queue(core, entry)


def release_doubted(core: Core, service: Service) -> None:
    """Release the files that were refused, which is not believed; their evidence stays in their rows."""
    for key in sorted(service.doubted):
        entry = core.table.get(key)
        if entry is not None and entry.stage in (Stage.WAITING, Stage.READY):
            give_back(core, entry)
    service.doubted.clear()


def has_untried(core: Core, service: Service) -> bool:
    """Whether a file waits that was not the trial of this hold yet."""
    return any(
        rules.may_try(service.state, entry.key)
        for inbox in service.inboxes
        for entry in _candidates(core, inbox)
    )


# ── look-ups ───────────────────────────────────────────────────────────────────────────────────────────────


def needs_look_up(entry: Entry) -> bool:
    """Whether the listing has to be read before anything else is done with this file."""
    return (
        entry.unknown_since is not None
        and entry.task is Task.DELIVER
        and entry.found is None
        and entry.resend is None
        and entry.known is not None
        and entry.known.tag is not None
        and entry.known.state not in (State.ACCEPTED, State.REFUSED)
    )


def unknown_files(core: Core, service: Service) -> list[Key]:
    """Return the files of this target that wait for a look-up, due or not."""
    entries = (entry for inbox in service.inboxes for entry in core.table.names(inbox).values())
    return [entry.key for entry in entries if needs_look_up(entry) and entry.stage is not Stage.UNDER_WAY]


def start_look_up(core: Core, service: Service, keys: Iterable[Key], now: float) -> bool:
    """Begin one look-up for these files, as far as they have one purpose; the others go with the next."""
    asked: dict[str, Key] = {}
    wanted: dict[str, Delivery] = {}
    inbox: Inbox | None = None
    purpose: str | None = None
    for key in [*service.look_ups, *keys]:  # the one that is due first says the purpose
        entry, w = core.table.get(key), core.inboxes.watched.get(key[0])
        known = entry.known if entry is not None else None
        waits = entry is not None and entry.stage is not Stage.UNDER_WAY and needs_look_up(entry)
        if entry is None or w is None or known is None or known.tag is None or not waits:
            service.look_ups.pop(key, None)
            continue
        its_purpose = known.purpose or w.inbox.purpose
        if known.tag in asked or purpose not in (None, its_purpose):
            continue
        service.look_ups.pop(key, None)
        inbox, purpose = inbox or w.inbox, its_purpose
        asked[known.tag], wanted[known.tag] = key, known
        entry.stage = Stage.READY
    if inbox is None:
        return False
    service.looking = True
    service.state = rules.look_started(service.state, now)
    core.probing += 1
    interval_s = service.state.interval_s
    core.pool.submit(ask_listing, service.tools, inbox, asked, wanted, now, interval_s, core.mailbox.put)
    return True


# ── starting jobs ──────────────────────────────────────────────────────────────────────────────────────────


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
        if service.state.interval_s and service.state.looked_last:  # then they take turns
            _hand_out_next(core, service, now)
        looking, uploading = service.looking, len(service.under_way - service.accepted)
        if service.look_ups and rules.may_look(service.state, now, looking=looking, uploading=uploading):
            start_look_up(core, service, unknown_files(core, service), now)  # one serves all, due or not
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
    return core.table.pop_ready(inbox)


def _trial_of(core: Core, service: Service, inbox: str) -> Entry | None:
    """The smallest file that waits and has not been the trial of this hold yet."""
    waiting = list(_candidates(core, inbox))
    untried = [e for e in waiting if rules.may_try(service.state, e.key)]
    if waiting and not untried:
        service.state = rules.forget_tried(service.state)
    return min(untried or waiting, key=lambda e: (e.size, e.seen_at, e.name), default=None)


def _candidates(core: Core, inbox: str) -> Iterator[Entry]:
    """The files of an inbox that could be the trial of a hold now."""
    entries = core.table.names(inbox).values()
    return (entry for entry in entries if entry.stage is Stage.READY and _needs_service(entry))


def _submit(core: Core, entry: Entry, now: float) -> None:
    w = core.inboxes.watched[entry.inbox]
    service = core.service_of[entry.inbox]
    held = service.state.hold is not None
    needs_service = _needs_service(entry)
    if needs_service:
        service.start(entry.key, now)
    entry.stage = Stage.UNDER_WAY
    if not entry.claimed:
        entry.home, entry.claims, entry.is_past_known = w.identity, w.claims_folder, True
    w.claims.add(entry.name)
    served_s = 0.0
    if entry.ended_at is not None:
        served_s = max(0.0, now - entry.ended_at - (service.held_s(now) - entry.held_mark))
    job = Job(
        task=entry.task,
        inbox=w.inbox,
        name=entry.name,
        seen_at=entry.seen_at,
        claims=entry.claims or w.claims_folder or "",
        settled=None if entry.claimed else entry.settled,
        known=entry.known,
        is_past_known=entry.is_past_known,
        served_s=served_s,
        charged=entry.key in service.state.charged,
        condemned=entry.condemned,
        found=entry.found,
        resend=entry.resend,
        trial=needs_service and held,
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
    if entry.task is not Task.DELIVER or entry.found is not None:
        return False
    known = entry.known
    if known is None or entry.resend is not None:
        return True
    return known.finished_at is None and known.state in (State.WAITING, State.DOUBTED)


def _is_refused(entry: Entry) -> bool:
    known = entry.known
    return entry.task is Task.CONDEMN or (known is not None and known.state is State.REFUSED)

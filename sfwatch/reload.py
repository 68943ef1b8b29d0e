"""A changed configuration is taken up between two turns of the loop; what is under way ends as it began.

An inbox that is gone from the settings, or has another path now, is let go of once nothing of it is under way;
so is a target to which no inbox goes any more.
"""

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from sfwatch import handout
from sfwatch.core import Core
from sfwatch.settings import Config
from sfwatch.table import Stage
from sfwatch.upstream import Plan, Service, begin


@dataclass(frozen=True, slots=True)
class Fresh:
    """A configuration that was read anew and found sound. `needs_restart`: keys whose change waits for that."""

    config: Config
    plans: tuple[Plan, ...]
    pool: Executor
    needs_restart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """A configuration that was read anew and can't be used."""

    problems: tuple[str, ...]


def reload(core: Core, fresh: Fresh | Rejected, now: float) -> None:
    """Go on with other settings; what is under way ends as it began. Bad ones change nothing."""
    if isinstance(fresh, Rejected):
        core.log("config.rejected", config=core.config.source, problems=list(fresh.problems))
        return
    core.config = fresh.config
    core.pool.shutdown(wait=False)  # it ends when it has done what it was given
    core.pool = fresh.pool
    _take_plans(core, fresh.plans, now)
    for service in core.services.values():  # what was refused may have been the former settings' fault
        handout.release_doubted(core, service)
    core.storage.reload(fresh.config.uploads, now)
    core.inboxes.reload(fresh.config, now)
    _regroup(core)
    names = [inbox.name for inbox in fresh.config.inboxes]
    needs_restart = list(fresh.needs_restart) or None
    core.log("config.loaded", config=core.config.source, inboxes=names, needs_restart=needs_restart)


def _take_plans(core: Core, plans: Iterable[Plan], now: float) -> None:
    core.target_of = {inbox: plan.tools.target for plan in plans for inbox in plan.inboxes}
    for plan in plans:
        service = core.services.get(plan.tools.target)
        if service is None:
            core.services[plan.tools.target] = begin(plan.tools)
        else:
            service.reload(plan.tools, now, waiting=core.waiting(service))


def _regroup(core: Core) -> None:
    """Let each inbox go to the target that it is meant for; one that is let go of stays where it was."""
    for inbox, target in core.target_of.items():
        w = core.inboxes.watched.get(inbox)
        before, after = core.service_of.get(inbox), core.services[target]
        if w is None or w.leaving or before is after:
            continue
        after.inboxes.append(inbox)
        core.service_of[inbox] = after
        if before is not None:
            _part(core, inbox, before, after)


def _part(core: Core, inbox: str, before: Service, after: Service | None) -> None:
    """Let an inbox go from a target, and its files that wait there for a look-up or another attempt with it."""
    before.inboxes.remove(inbox)
    for entry in list(core.table.names(inbox).values()):
        if entry.stage is Stage.READY and (entry.found or entry.resend):  # what the other target's listing said
            entry.found = entry.resend = None
            handout.queue(core, entry)
    for key in [key for key in before.look_ups if key[0] == inbox]:
        del before.look_ups[key]
        if after is not None:
            after.look_ups[key] = None
    undecided = {key for key in before.undecided if key[0] == inbox}
    doubted = {key for key in before.doubted if key[0] == inbox}
    before.undecided -= undecided
    before.doubted -= doubted
    if after is not None:
        after.undecided |= undecided
        after.doubted |= doubted


def let_go_where_done(core: Core, now: float) -> None:
    """Forget inboxes that are not wanted once nothing of theirs is under way, and what only they needed."""
    for inbox in core.inboxes.release():
        _part(core, inbox, core.service_of.pop(inbox), None)
        core.inboxes.take_up(now)  # one of its name may have waited for that
        _regroup(core)
    wanted = core.target_of.values()  # by an inbox that is still waited for, perhaps
    for service in [it for it in core.services.values() if it.is_idle() and it.name not in wanted]:
        service.change(replace(service.state, hold=None), now, waiting=0)
        service.tools.client.close()
        del core.services[service.name]
    if core.storage.holds:
        needed = {str(core.config.state_dir)}
        for w in core.inboxes.watched.values():
            needed |= {str(folder) for folder in (w.inbox.path, w.inbox.done, w.inbox.failed)}
        core.storage.keep(needed, now)

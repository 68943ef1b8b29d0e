"""What runs in a worker's thread, and the one border at which a bug in it becomes an event.

Whatever happens, something is put into the mailbox: a file whose worker never came back would wait for ever.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sfwatch import cores, retry
from sfwatch.deliver import deliver
from sfwatch.delivery import recovery
from sfwatch.filing import StorageError
from sfwatch.job import Crashed, Job, Outcome, Tools
from sfwatch.journal import Delivery, Journal, JournalDamagedError, JournalError
from sfwatch.key import renewal
from sfwatch.retry import ResendRequest
from sfwatch.settings import Api, Inbox
from sfwatch.table import Key
from sfwatch.verdict import Blame, Reason, Verdict


@dataclass(frozen=True, slots=True)
class Accepted:
    """The service has taken a file; its worker goes on and files it away."""

    key: Key


@dataclass(frozen=True, slots=True)
class Finished:
    """A worker is back."""

    key: Key
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Probed:
    """A probe of a held target came back."""

    target: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class LookedUp:
    """A look-up came back. `asked`: the files by their tags; `began`: when it began (monotonic)."""

    target: str
    asked: Mapping[str, Key]
    began: float
    result: recovery.LookedUp


@dataclass(frozen=True, slots=True)
class Requests:
    """What people have asked for with `sfwatch retry`."""

    requests: Sequence[ResendRequest]


def work(
    job: Job, tools: Tools, key: Key, put: Callable[[Accepted | Finished | JournalDamagedError], None]
) -> None:
    """Do one job, and put its outcome into the mailbox whatever happens."""
    log = tools.log.bind(inbox=job.inbox.name, file=job.name)
    tools = replace(tools, log=log, accepted=partial(put, Accepted(key)))
    try:
        with cores.for_file(job.size):
            outcome = deliver(job, tools)
    except JournalDamagedError as damage:
        put(damage)
        return
    except Exception as bug:  # noqa: BLE001 - said as internal.error by the main thread
        outcome = Crashed(f"{type(bug).__name__}: {bug}", traceback_of(bug))
    put(Finished(key, outcome))


def ask(tools: Tools, inbox: Inbox, put: Callable[[Probed], None]) -> None:
    """Probe a held target, and put the answer into the mailbox whatever happens."""
    try:
        verdict = with_renewal(recovery.probe(inbox, tools), inbox.api)
    except Exception as bug:  # noqa: BLE001
        tools.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=traceback_of(bug))
        verdict = Verdict(Blame.NOT_NOW, "internal_error", "the probe itself failed")
    put(Probed(tools.target, verdict))


def ask_listing(
    tools: Tools,
    inbox: Inbox,
    asked: Mapping[str, Key],
    wanted: Mapping[str, Delivery],
    began: float,
    interval_s: float,
    put: Callable[[LookedUp | JournalDamagedError], None],
) -> None:
    """Look up files whose outcome is unknown, and put what was found into the mailbox whatever happens."""
    try:
        result = recovery.look_up(inbox, tools, wanted, interval_s)
        if result.fault is not None:
            result = replace(result, fault=with_renewal(result.fault, inbox.api))
    except JournalDamagedError as damage:
        put(damage)
        return
    except StorageError as error:
        result = recovery.LookedUp({}, Verdict(Blame.NOT_NOW, error.reason, error.detail))
    except Exception as bug:  # noqa: BLE001
        tools.log("internal.error", detail=f"{type(bug).__name__}: {bug}", traceback=traceback_of(bug))
        result = recovery.LookedUp({}, Verdict(Blame.NOT_NOW, "internal_error", "the look-up itself failed"))
    put(LookedUp(tools.target, asked, began, result))


def read_requests(journal: Journal, state_dir: Path, put: Callable[[Requests], None]) -> None:
    """Read what people have asked for; the state folder is touched by the journal's thread alone."""
    with suppress(OSError, JournalError):
        put(Requests(journal.call(lambda: retry.requests(state_dir))))


def with_renewal(verdict: Verdict, api: Api) -> Verdict:
    """A key that is refused is renewed in one of three places, and not in all of them does it count at once."""
    if verdict.reason != Reason.UNAUTHORIZED:
        return verdict
    return replace(verdict, detail=f"{verdict.detail}; {renewal(api)}")


def traceback_of(bug: Exception) -> str:
    """Where it happened; no values of variables, which may be secret."""
    return "".join(traceback.format_exception(bug, limit=20))

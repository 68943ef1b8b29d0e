"""What a worker is asked to do with one file, and what it can answer: values, nothing else.

A worker does one step for one file and answers with exactly one outcome. Whether and when to try again, whether
a target or a folder is held, is decided by the main thread from these.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from sfwatch.files import Identity
from sfwatch.journal import Delivery, Journal
from sfwatch.logs import EventLog
from sfwatch.service.listing import Found
from sfwatch.settings import Api, Inbox, Uploads
from sfwatch.settle import Settled
from sfwatch.upload import Client, Pace
from sfwatch.verdict import Verdict


class Task(StrEnum):
    """What is wanted of a worker."""

    DELIVER = "deliver"  # take the file as far as it goes, from wherever it is
    RESUME = "resume"  # find out what is known of a claim that was found again
    GIVE_BACK = "give_back"  # put a claimed file back into its inbox
    CONDEMN = "condemn"  # file it under failed, for the reason given


@dataclass(frozen=True, slots=True)
class Condemned:
    """Why a file is given up though nobody has found a fault in it, or after the service has refused it."""

    reason: str
    detail: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Resend:
    """Why an upload whose outcome is unknown may be sent again.

    `proved`: the service has none of its attempts. `until` (monotonic): the proof is too old after that.
    `request`: the id of a person's request, which this resend uses up; `file` holds it.
    """

    detail: str
    proved: bool = False
    until: float | None = None
    request: str | None = None
    file: Path | None = None


BACK_S = 30.0
"""How long a worker may take to be back once its upload has run into a timeout."""

CONNECTING_S = 60.0


@dataclass(slots=True)
class Progress:
    """How far an upload is: its worker writes, the main thread reads. No lock: each is one value.

    Times are the daemon's clock. `started_at` is None while nothing is being uploaded (before, after, and while
    a lost one is looked up). `moved_at` is when bytes went out last, or waited for their turn under `max_rate`;
    None while there is no connection yet.
    """

    sent: int = 0
    started_at: float | None = None
    moved_at: float | None = None

    def start(self, now: float) -> None:
        """An upload begins."""
        self.sent, self.started_at, self.moved_at = 0, now, None

    def end(self) -> None:
        """It has ended, well or not."""
        self.started_at = self.moved_at = None

    def is_overdue(self, api: Api, now: float) -> bool:
        """Return whether its worker should long be back: `wire` itself ends an upload that stands still."""
        if self.started_at is None:
            return False
        if self.moved_at is None:
            # A name may be looked up for a minute, and each of the host's addresses has its own timeout.
            return now >= self.started_at + CONNECTING_S + 10 * api.connect_timeout_s + BACK_S
        return now >= self.moved_at + api.read_timeout_s + BACK_S


@dataclass(frozen=True, slots=True)
class Job:
    """One step for one file.

    `claims` is the name of the claims folder that the file is in, or will be claimed in. `known` is what is
    known of the file and could not be made durable yet, or was handed over with the last outcome. `served_s`:
    the pause between the last attempt and this one, without holds. `seen_at` (monotonic): when the file was
    first seen. `found`: its upload was found in the listing. `charged`: another file's acceptance has disproved
    an account refusal of this one.
    """

    task: Task
    inbox: Inbox
    name: str
    seen_at: float
    claims: str
    settled: Settled | None = None
    known: Delivery | None = None
    is_past_known: bool = True  # that folder began with this journal: a claim without a row was never sent
    served_s: float = 0.0
    charged: bool = False
    condemned: Condemned | None = None
    found: Found | None = None
    resend: Resend | None = None
    trial: bool = False  # it tries a held target
    home: Identity | None = None  # the folder that the inbox was when the file was seen or claimed in it
    progress: Progress = field(default_factory=Progress, compare=False)

    @property
    def size(self) -> int | None:
        """Bytes, as far as they are known beforehand."""
        if self.settled is not None:
            return self.settled.fingerprint.size
        return self.known.size if self.known is not None else None


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Tools:
    """What a worker works with: one set for each target.

    Who uploads goes through the `gate`, which lets `concurrency` through at once; `accepted` is called as soon
    as the service has taken the file.
    """

    target: str
    client: Client
    journal: Journal
    uploads: Uploads
    state_dir: str
    log: EventLog
    environ: Mapping[str, str]
    clock: Callable[[], float]
    wall: Callable[[], float]
    stop: Callable[[], bool]
    sleep: Callable[[float], object]
    pace: Pace | None = None
    gate: AbstractContextManager[object] = field(default_factory=nullcontext, compare=False)
    accepted: Callable[[], None] = _nothing
    room: dict[Path, tuple[float, int | None]] = field(default_factory=dict, compare=False)  # see `taken.room`


@dataclass(frozen=True, slots=True)
class Done:
    """The file lies in done, its sidecar beside it. `recovered`: its id was found in a listing."""

    size: int
    recovered: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The file lies in failed, its report beside it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The file is not there any more. `quiet`: what was found again was neither a claim nor a row."""

    quiet: bool = False


@dataclass(frozen=True, slots=True)
class BackInInbox:
    """The file is back in its inbox and has to settle anew."""


@dataclass(frozen=True, slots=True)
class NotTaken:
    """The file could not be taken, or not be given back (`claimed`): it waits, for this reason."""

    reason: str
    detail: str
    claimed: bool = False


@dataclass(frozen=True, slots=True)
class Ignored:
    """What lies under this name is no regular file."""

    kind: str


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not now, or the account's fault. Back in the inbox, unless its name was taken there (`claimed`)."""

    verdict: Verdict
    claimed: bool
    known: Delivery | None

    @property
    def attempt(self) -> int:
        return self.known.attempts if self.known is not None else 0


@dataclass(frozen=True, slots=True)
class Refused:
    """The service refuses this file. It is still claimed: the main thread decides what that means."""

    verdict: Verdict
    known: Delivery


@dataclass(frozen=True, slots=True)
class Unknown:
    """The outcome is unknown; the file stays claimed until the listing says what became of it."""

    verdict: Verdict
    known: Delivery

    @property
    def attempt(self) -> int:
        return self.known.attempts


@dataclass(frozen=True, slots=True)
class NeedsLookUp:
    """It is looked up before anything else. `known` may be a claim found again, which waits or has no row."""

    known: Delivery


@dataclass(frozen=True, slots=True)
class Undecided:
    """No look-up can say what became of it. It stays claimed until a person decides."""

    known: Delivery
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class NoStorage:
    """A folder does not take what must be written. `known` is what could not be written down."""

    folder: str
    reason: str
    detail: str
    claimed: bool
    known: Delivery | None = None


@dataclass(frozen=True, slots=True)
class InboxGone:
    """The inbox with its claims is not there; the file is waited for until it is."""

    known: Delivery | None = None


@dataclass(frozen=True, slots=True)
class Crashed:
    """A bug in sfwatch: said with its traceback; the file stays where it is and is tried again much later."""

    detail: str
    traceback: str


Outcome = (
    Done
    | Failed
    | Gone
    | BackInInbox
    | NotTaken
    | Ignored
    | Deferred
    | Refused
    | Unknown
    | NeedsLookUp
    | Undecided
    | NoStorage
    | InboxGone
    | Crashed
)

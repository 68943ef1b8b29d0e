"""The states of a file, and every change between them, as data.

A file is SETTLING until it is whole. QUEUED, it waits for a slot of its target. CLAIMED, it lies in the claims
folder and is checked. SENDING is durable before the first byte goes out; from then on the service may have the
file. It leaves SENDING by a clear answer: ACCEPTED, REJECTED (the file's fault), DOUBTED (refused, which may be
the account's fault) or RELEASING (nothing was stored; the file goes back). Any other end is UNKNOWN: the
listing is read for the file's tag, and the file is sent again only after it is PROVED that the service has
none of its attempts. ACCEPTED and REJECTED are durable before the sidecar or report is published; then only
the move is left. DONE, FAILED and GONE are final: exactly one event each. WAITING is a released file with a
row, which waits for its retry. ORPHAN is a finished row: an upload of ours that is no file's.

The tests and the simulation hold the daemon against this table; the daemon itself does not read it yet.
`durable`: the state stands in the file's row of the journal. `needs`: what must work for the file to go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class FileState(StrEnum):
    SETTLING = "settling"
    PARKED = "parked"
    QUEUED = "queued"
    BLOCKED = "blocked"
    CLAIMED = "claimed"
    SENDING = "sending"
    UNKNOWN = "unknown"
    PROVED = "proved"
    DOUBTED = "doubted"
    RELEASING = "releasing"
    WAITING = "waiting"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    DONE = "done"
    FAILED = "failed"
    GONE = "gone"
    ORPHAN = "orphan"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Row:
    """One state: whether it is durable, whether the file is claimed, what it needs, and what follows."""

    durable: bool
    claimed: bool
    needs: str | None
    next: Mapping[str, frozenset[FileState]]


def _row(durable: str, claimed: str, needs: str, events: str) -> Row:
    """Read a line of the table below: `event->STATE` or `event->STATE/STATE`; `|` joins events with one end."""
    following: dict[str, frozenset[FileState]] = {}
    for pair in events.split():
        names, _, ends = pair.partition("->")
        states = frozenset(FileState[end] for end in ends.split("/"))
        for name in names.split("|"):
            following[name] = states
    return Row(durable == "yes", claimed == "yes", None if needs == "-" else needs, following)


_TABLE = """
SETTLING  no  no  -      settled->QUEUED changed->SETTLING parked->PARKED not_regular->IGNORED gone->GONE
PARKED    no  no  -      changed->SETTLING gone->GONE
QUEUED    no  no  target claimed->CLAIMED blocked->BLOCKED changed->SETTLING not_regular->IGNORED gone->GONE
BLOCKED   no  no  -      due->QUEUED changed->SETTLING gone->GONE
CLAIMED   no  yes target valid->SENDING invalid|give_up->REJECTED gone->GONE found->ACCEPTED
CLAIMED   no  yes target changed|stopped|unreadable|no_key|storage|absent->RELEASING
CLAIMED   no  yes target moved_before->ACCEPTED/REJECTED past_unknown->UNKNOWN
SENDING   yes yes target accepted->ACCEPTED refused_at_once->DOUBTED refused->DOUBTED unclear->UNKNOWN
SENDING   yes yes target not_now|account|stopped->WAITING/UNKNOWN changed->RELEASING/ORPHAN restarted->UNKNOWN
SENDING   yes yes target answer_not_written->SENDING
UNKNOWN   yes yes lookup found->ACCEPTED absent|person|unproved->PROVED not_yet|undecidable->UNKNOWN
UNKNOWN   yes yes lookup changed->RELEASING/ORPHAN refused_at_once->REJECTED gone->GONE
PROVED    no  yes target ready->SENDING invalid->REJECTED stale->UNKNOWN changed->RELEASING/ORPHAN gone->GONE
DOUBTED   yes yes target due->CLAIMED proved->REJECTED all_refused->RELEASING changed->RELEASING gone->GONE
RELEASING no  yes -      back->WAITING/SETTLING name_taken->RELEASING due->CLAIMED gone->GONE
WAITING   yes no  target due->QUEUED give_up|poison->QUEUED changed->SETTLING gone|missing_at_first_scan->GONE
ACCEPTED  yes yes done   filed|source_gone->DONE storage|cannot_move->ACCEPTED changed->ORPHAN
REJECTED  yes yes failed filed|source_gone->FAILED storage|cannot_move->REJECTED changed->ORPHAN
DONE      no  no  -      claim_found_again->ACCEPTED
FAILED    no  no  -      claim_found_again->REJECTED
GONE      no  no  -
ORPHAN    yes no  -      settled->SETTLING
IGNORED   no  no  -      changed->SETTLING gone->GONE
"""


def _read(table: str) -> dict[FileState, Row]:
    rows: dict[FileState, Row] = {}
    for line in table.strip().splitlines():
        name, durable, claimed, needs, *events = line.split(maxsplit=4)
        row = _row(durable, claimed, needs, events[0] if events else "")
        before = rows.get(FileState[name])
        following = {**(before.next if before is not None else {}), **row.next}
        rows[FileState[name]] = Row(row.durable, row.claimed, row.needs, following)
    return rows


TABLE: Mapping[FileState, Row] = _read(_TABLE)


class ImpossibleError(Exception):
    """A change that the table does not list: a bug."""


def advance(state: FileState, event: str) -> frozenset[FileState]:
    """Return the states that may follow. Raise ImpossibleError for an event that the state does not list."""
    try:
        return TABLE[state].next[event]
    except KeyError:
        raise ImpossibleError(f"{event} in {state}") from None


def may_follow(before: FileState, after: FileState) -> bool:
    """Whether there is a way between two states of one row, over states that are in none.

    A file that settles again after it was changed gets another row.
    """
    reached, new = set[FileState](), {before}
    while new:
        state = new.pop()
        for following in TABLE[state].next.values():
            for each in following - reached:
                reached.add(each)
                if not TABLE[each].durable and each is not FileState.SETTLING:
                    new.add(each)
    return after in reached

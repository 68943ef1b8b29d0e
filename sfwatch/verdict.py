"""A file is condemned only by a short list of clear refusals; whatever else goes wrong, it waits.

An attempt to upload ends in one of five ways (`Blame`), and each has one consequence:

    ACCEPTED   the service has the file and named it
    FILE       the service read our request and refuses this file
    NOT_NOW    the service provably has nothing of it: the same file is tried again later
    ACCOUNT    key, balance, address or form are wrong: no file of this target can succeed
    UNKNOWN    the service may have the file: it is looked up before it is sent again

The status decides; the business code and the message only explain, save for the few codes named here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Trouble(StrEnum):
    """Why there is no whole answer."""

    RESOLVE = "resolve"
    CONNECT = "connect"
    CERTIFICATE = "certificate"
    PROXY = "proxy"
    RESET = "reset"
    STALLED = "stalled"
    CUT = "cut"  # the answer was cut short, or was no HTTP
    ABORTED = "aborted"  # we broke it off ourselves


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: status, headers of interest, and the first 64 KiB of the body (8 MiB of a listing)."""

    status: int
    body: bytes
    retry_after: str | None = None
    trace_id: str | None = None
    date: str | None = None
    location: str | None = None
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request and what is known of its end.

    `sent` counts the bytes of the file that went out, `sha256` is theirs and is there only if all of them
    did. `sent_all` says that the last byte of the body is out. An answer and a trouble may come together.
    """

    sent_all: bool
    sent: int
    sha256: str | None
    answer: Answer | None
    trouble: Trouble | None
    detail: str
    duration_s: float


class Blame(StrEnum):
    """Whose fault it was, which decides what becomes of the file."""

    ACCEPTED = "accepted"
    FILE = "file"
    NOT_NOW = "not_now"
    ACCOUNT = "account"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An attempt, judged."""

    blame: Blame
    reason: str
    detail: str
    http_status: int | None = None
    code: int | None = None
    message: str | None = None
    trace_id: str | None = None
    data: Mapping[str, Any] | None = None
    retry_after_s: float | None = None
    slows_target: bool = False
    unreachable: bool = False

"""A file is condemned only by a short list of clear refusals; whatever else goes wrong, it waits.

An attempt to upload ends in one of five ways (`Blame`), and each has one consequence:

    ACCEPTED   the service has the file and named it
    FILE       the service read our request and refuses this file
    NOT_NOW    the service provably has nothing of it: the same file is tried again later
    ACCOUNT    key, balance, address or form are wrong: no file of this target can succeed
    UNKNOWN    the service may have the file: it is looked up before it is sent again

The status decides; the business code and the message only explain, save for the few codes named here.
What the service writes is foreign text: it is bounded, and its control characters are escaped.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

OK_CODE = 20000
BALANCE_CODE = 30001
OVERLOAD_CODES = frozenset({50505, 50508, 50603})
PURPOSE_CODE = 20067  # the configured purpose
FORM_CODE = 20079  # "no file part": the form that we make
FILE_STATUSES = frozenset({400, 413, 415, 422})
NO_LISTING_STATUSES = frozenset({404, 405, 501})
LATER_STATUSES = frozenset({409, 421, 423})
"""Conflict, misdirected, locked: another time or another connection may do."""

DETAIL_MAX = 500
QUOTE_MAX = 200
ID_MAX = 256
RETRY_AFTER_MAX_S = 86400.0
NAME_MAX_BYTES = 255
SUFFIX = ".jsonl"


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


class Reason(StrEnum):
    """Every `Verdict.reason` there is: a public set that other people's scripts may rely on."""

    ACCEPTED = "accepted"
    # the file's fault
    REFUSED = "refused"
    # the account or the settings
    UNAUTHORIZED = "unauthorized"
    BALANCE = "balance"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD = "method"
    REDIRECT = "redirect"
    CERTIFICATE = "certificate"
    NAME_RESOLUTION = "name_resolution"  # at the first try; later it is "not now"
    PROXY = "proxy"
    SETTINGS = "settings"
    OUR_FAULT = "our_fault"
    ODD_STATUS = "odd_status"
    # not now
    RATE_LIMITED = "rate_limited"
    OVERLOADED = "overloaded"
    TOO_EARLY = "too_early"
    ODD_REFUSAL = "odd_refusal"
    UNREACHABLE = "unreachable"
    PROXY_REFUSED = "proxy_refused"
    # unknown once the whole body is out, not now before
    REQUEST_TIMEOUT = "request_timeout"
    SERVER_ERROR = "server_error"
    STALLED = "stalled"
    RESET = "reset"
    ABORTED = "aborted"
    UNREADABLE_ANSWER = "unreadable_answer"
    ODD_SUCCESS = "odd_success"
    # listings only
    LISTED = "listed"
    NO_LISTING = "no_listing"


@dataclass(frozen=True, slots=True)
class Verdict:
    """An attempt, judged.

    `detail` is a sentence for people of at most 500 characters. `data` is the service's file object after an
    acceptance, and the whole document after a listing. `retry_after_s` is at most a day.
    `slows_target` marks rate limits, `unreachable` a failed connect or lookup.
    """

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


@dataclass(frozen=True, slots=True)
class _Heard:
    """An answer, read: `code` and `message` if they make sense, `said` ready to stand in a sentence."""

    host: str
    status: int
    document: dict[str, Any] | None
    code: int | None
    message: str | None
    documented: bool
    location: str | None

    @property
    def said(self) -> str:
        quoted = f'"{printable(self.message, QUOTE_MAX)}"' if self.message else ""
        parts = ": ".join(part for part in (str(self.code or ""), quoted) if part)
        return f" ({parts})" if parts else ""


# ── judging ────────────────────────────────────────────────────────────────────────────────────────────────


def judge(attempt: Attempt, *, host: str, reached_before: bool, wall: float) -> Verdict:
    """Whose fault the end of an upload was.

    `reached_before`: the host's name has resolved before in this process, so that a failing lookup is an
    outage and not a wrong address. `wall`: seconds since the epoch, for a Retry-After that is a date.
    Never raises, whatever the service sends.
    """
    if attempt.answer is None:
        verdict = _unanswered(attempt, host=host, reached_before=reached_before)
        return replace(verdict, detail=printable(verdict.detail, DETAIL_MAX))
    heard = _hear(attempt.answer, host)
    return _with_facts(_answered(attempt, heard), attempt.answer, heard, wall)


def judge_listing(attempt: Attempt, *, host: str, reached_before: bool, wall: float) -> Verdict:
    """Whether a listing (also the probe of a key) could be had; never FILE, never UNKNOWN.

    404, 405 and 501 are ACCEPTED with `data` None and the reason `no_listing`: there is none to be had, but
    the service answers. So is a readable 400 (a gateway that dislikes a parameter): no hold may last for
    ever because a probe's form is disliked; a real upload decides.
    """
    attempt = replace(attempt, sent_all=False)  # nothing of a file is in it
    answer = attempt.answer
    if answer is None:
        return judge(attempt, host=host, reached_before=reached_before, wall=wall)
    heard = _hear(answer, host)
    return _with_facts(_listed(attempt, heard), answer, heard, wall)


def _listed(attempt: Attempt, heard: _Heard) -> Verdict:
    if _is_success_status(heard.status):
        return _listing(attempt, heard)
    if heard.status in NO_LISTING_STATUSES:
        return _no_listing(heard)
    verdict = _answered(attempt, heard)
    return _no_listing(heard) if verdict.blame is Blame.FILE else verdict


def _no_listing(heard: _Heard) -> Verdict:
    detail = f"{heard.host} gives no listing of files (HTTP {heard.status}{heard.said})"
    return Verdict(Blame.ACCEPTED, Reason.NO_LISTING, detail)


def _listing(attempt: Attempt, heard: _Heard) -> Verdict:
    if heard.document is None or attempt.trouble is not None or listed_entries(heard.document) is None:
        detail = f"the listing of {heard.host} cannot be read{heard.said}; it is asked for again"
        return _overloaded(heard) or Verdict(Blame.NOT_NOW, Reason.UNREADABLE_ANSWER, detail)
    if not _says_ok(heard.document):
        detail = f"{heard.host} answers the listing with HTTP {heard.status} but not with success{heard.said}"
        return _overloaded(heard) or Verdict(Blame.NOT_NOW, Reason.ODD_SUCCESS, detail)
    return Verdict(Blame.ACCEPTED, Reason.LISTED, f"{heard.host} lists its files", data=heard.document)


def _with_facts(verdict: Verdict, answer: Answer, heard: _Heard, wall: float) -> Verdict:
    return replace(
        verdict,
        detail=printable(verdict.detail, DETAIL_MAX),
        http_status=answer.status,
        code=heard.code,
        message=printable(heard.message, DETAIL_MAX) if heard.message else None,
        trace_id=printable(answer.trace_id, QUOTE_MAX) if answer.trace_id else None,
        retry_after_s=_retry_after_s(answer, wall),
    )


# ── no answer ──────────────────────────────────────────────────────────────────────────────────────────────


def _unanswered(attempt: Attempt, *, host: str, reached_before: bool) -> Verdict:
    said = printable(attempt.detail, QUOTE_MAX)
    why = f" ({said})" if said else ""
    before_connection = _never_connected(attempt, host, said, reached_before=reached_before)
    return before_connection or _broken_off(attempt, host, why)


def _never_connected(attempt: Attempt, host: str, said: str, *, reached_before: bool) -> Verdict | None:
    """Troubles before there was a connection: nothing can have been sent, whatever `sent_all` says."""
    why = f" ({said})" if said else ""
    match attempt.trouble:
        case Trouble.RESOLVE if not reached_before:
            detail = f"{said or _NO_NAME.format(host=host)}; check base_url and this machine's DNS"
            return Verdict(Blame.ACCOUNT, Reason.NAME_RESOLUTION, detail, unreachable=True)
        case Trouble.RESOLVE:
            detail = (
                f"{said or _NO_NAME.format(host=host)}; it did before: check this machine's DNS and network"
            )
            return Verdict(Blame.NOT_NOW, Reason.NAME_RESOLUTION, detail, unreachable=True)
        case Trouble.CONNECT:
            detail = f"{host} cannot be reached{why}; {_remedy(said)}"
            return Verdict(Blame.NOT_NOW, Reason.UNREACHABLE, detail, unreachable=True)
        case Trouble.CERTIFICATE:
            detail = (
                f"{said or f'the certificate of {host} does not verify'}; "
                "set ca_bundle if a company proxy or a private authority signs it"
            )
            return Verdict(Blame.ACCOUNT, Reason.CERTIFICATE, detail)
        case Trouble.PROXY:
            return _proxy(host, why)
    return None


_NO_NAME = "the name of {host} does not resolve"
_NO_TLS = re.compile("wrong.version.number|record layer failure|http.request|unknown.protocol", re.IGNORECASE)
"""What OpenSSL says, by its version, to an answer that is no TLS."""


def _remedy(said: str) -> str:
    if _NO_TLS.search(said):
        return "it does not speak TLS there: check base_url, its port and whether it is http://"
    return "check the network if it lasts"


def _proxy(host: str, why: str) -> Verdict:
    # A proxy's 407 to CONNECT reaches us as an error text only, never as an answer.
    if re.search(r"\b407\b", why):
        return Verdict(Blame.ACCOUNT, Reason.PROXY, _ASKS_FOR_LOGIN.format(host=host, said=why))
    detail = f"the proxy does not let us through to {host}{why}; check HTTPS_PROXY and NO_PROXY if it lasts"
    return Verdict(Blame.NOT_NOW, Reason.PROXY_REFUSED, detail, unreachable=True)


_BROKEN_OFF = {
    Trouble.RESET: (Reason.RESET, "{host} closed the connection{why}"),
    Trouble.STALLED: (Reason.STALLED, "{host} fell silent{why}"),
    Trouble.ABORTED: (Reason.ABORTED, "sfwatch broke off the upload to {host}{why}"),
    Trouble.CUT: (Reason.UNREADABLE_ANSWER, "the answer of {host} cannot be read{why}"),
}


def _broken_off(attempt: Attempt, host: str, why: str) -> Verdict:
    reason, what = _BROKEN_OFF[attempt.trouble or Trouble.CUT]
    return _unclear(attempt, reason, what.format(host=host, why=why))


def _unclear(attempt: Attempt, reason: Reason, what: str) -> Verdict:
    """Unknown once the last byte of the body is out; before it, the service cannot have the file."""
    if attempt.sent_all:
        detail = f"{what} after the whole file was sent; it is looked up before it is sent again"
        return Verdict(Blame.UNKNOWN, reason, detail)
    return Verdict(Blame.NOT_NOW, reason, f"{what} before the whole file was sent; it is sent again later")


# ── an answer, by its status ───────────────────────────────────────────────────────────────────────────────


def _answered(attempt: Attempt, heard: _Heard) -> Verdict:
    status = heard.status
    if _is_success_status(status):
        return _success(attempt, heard)
    if 300 <= status <= 399:
        return _redirect(heard)
    # 451 is the last registered one. Those above are proxies' private words, 499 and 460 among them: "the
    # client went away", which leaves open what the service behind the proxy made of the file.
    if 400 <= status <= 451 and status != 408:
        return _refusal(attempt, heard)
    return _server_error(attempt, heard)


def _success(attempt: Attempt, heard: _Heard) -> Verdict:
    """A 2xx is an acceptance only if everything fits; what could hide an id is looked up."""
    if heard.document is None or attempt.trouble is not None:
        detail = f"{heard.host} answered HTTP {heard.status} unreadably{heard.said}; the file is looked up"
        return Verdict(Blame.UNKNOWN, Reason.UNREADABLE_ANSWER, detail)
    file = _file_object(heard.document)
    if file is not None and _says_ok(heard.document) and attempt.sent_all:
        return Verdict(
            Blame.ACCEPTED, Reason.ACCEPTED, f"{heard.host} accepted the file as {file['id']}", data=file
        )
    if file is not None:
        return Verdict(Blame.UNKNOWN, Reason.ODD_SUCCESS, _odd_success(attempt, heard))
    return _overloaded(heard) or _unclear(
        attempt, Reason.ODD_SUCCESS, f"{heard.host} answered HTTP {heard.status} without a file id{heard.said}"
    )


def _odd_success(attempt: Attempt, heard: _Heard) -> str:
    if not attempt.sent_all:
        return (
            f"{heard.host} accepted the file before it was sent whole ({attempt.sent} bytes); it is looked up"
        )
    return f"{heard.host} named a file id but no success{heard.said}; the file is looked up"


def _overloaded(heard: _Heard) -> Verdict | None:
    if heard.code not in OVERLOAD_CODES:
        return None
    detail = f"{heard.host} is overloaded{heard.said}; the file is sent again later"
    return Verdict(Blame.NOT_NOW, Reason.OVERLOADED, detail)


def _redirect(heard: _Heard) -> Verdict:
    detail = (
        f"{heard.host} redirects to {_location_host(heard)} (HTTP {heard.status}); sfwatch follows no "
        "redirect, so that the key goes nowhere else: set base_url to the final address"
    )
    return Verdict(Blame.ACCOUNT, Reason.REDIRECT, detail)


def _location_host(heard: _Heard) -> str:
    try:
        return printable(urlsplit(heard.location or "").hostname or "another path of the same host", QUOTE_MAX)
    except ValueError:
        return "an address that cannot be read"


_RATE_LIMIT = re.compile("rate limit|rpm limit|tpm limit|limit exceeded|too many requests", re.IGNORECASE)


def _refusal(attempt: Attempt, heard: _Heard) -> Verdict:
    if heard.code == BALANCE_CODE or heard.status == 402:
        detail = f"the balance of the account at {heard.host} does not suffice{heard.said}; top it up"
        return Verdict(Blame.ACCOUNT, Reason.BALANCE, detail)
    if heard.status == 429 or (heard.status == 403 and _RATE_LIMIT.search(heard.message or "")):
        detail = f"{heard.host} limits the rate of requests{heard.said}; sfwatch slows down and sends it again"
        return Verdict(Blame.NOT_NOW, Reason.RATE_LIMITED, detail, slows_target=True)
    if heard.status in FILE_STATUSES:
        return _file_refusal(attempt, heard)
    return _waiting_refusal(heard)


def _file_refusal(attempt: Attempt, heard: _Heard) -> Verdict:
    """The four statuses that may condemn a file; every exception here makes it wait instead."""
    if not attempt.sent_all and attempt.trouble in {Trouble.ABORTED, Trouble.STALLED}:
        # Only half a request was there to be refused. A reset is different: so end early refusals.
        return _broken_off(attempt, heard.host, heard.said)
    if not heard.documented:
        detail = (
            f"HTTP {heard.status} without the service's own JSON{heard.said}: a proxy may have answered "
            f"in place of {heard.host}; the file waits and is sent again"
        )
        return Verdict(Blame.NOT_NOW, Reason.ODD_REFUSAL, detail)
    if heard.code == PURPOSE_CODE:
        detail = (
            f"{heard.host} does not take the purpose of this upload{heard.said}; check `purpose` of the inbox"
        )
        return Verdict(Blame.ACCOUNT, Reason.SETTINGS, detail)
    if heard.code == FORM_CODE:
        detail = f"{heard.host} finds no file in our request{heard.said}; look for a proxy that alters it"
        return Verdict(Blame.ACCOUNT, Reason.OUR_FAULT, detail)
    # A 400 that carries "overloaded" would be the service's fault in a file's clothes.
    return _overloaded(heard) or Verdict(
        Blame.FILE,
        Reason.REFUSED,
        f"{heard.host} refuses this file (HTTP {heard.status}){heard.said}; mend the file and drop it again",
    )


_ASKS_FOR_LOGIN = "the proxy before {host} asks for a login{said}; put user and password into HTTPS_PROXY"
_ACCOUNT_REFUSALS = {
    401: (
        Reason.UNAUTHORIZED,
        (
            "{host} does not accept the API key{said}; the .cn and .com sites have separate accounts: "
            "check base_url and the key"
        ),
    ),
    403: (
        Reason.FORBIDDEN,
        "{host} forbids this account to upload{said}; check the rights of the key and the state of the account",
    ),
    404: (Reason.NOT_FOUND, "{host} has no files API at this address{said}; check base_url, it ends in /v1"),
    405: (Reason.METHOD, "{host} takes no uploads at this address{said}; check base_url, it ends in /v1"),
    407: (Reason.PROXY, _ASKS_FOR_LOGIN),
}
# Length required, header too large, gone, legal reasons, …: such a status speaks of the address or of the
# request's form, which all files share, so holding the target asks the least of the service. Should it be
# one file after all, another file's acceptance disproves the hold.
_ODD_REFUSAL = (Reason.ODD_STATUS, "{host} answers HTTP {status}{said}; check base_url and what lies between")


def _waiting_refusal(heard: _Heard) -> Verdict:
    if heard.status == 425:
        return Verdict(
            Blame.NOT_NOW, Reason.TOO_EARLY, f"{heard.host} says it is too early{heard.said}; it is sent again"
        )
    if heard.status in LATER_STATUSES:
        detail = f"{heard.host} cannot take the file now (HTTP {heard.status}){heard.said}; it is sent again"
        return Verdict(Blame.NOT_NOW, Reason.ODD_STATUS, detail)
    reason, sentence = _ACCOUNT_REFUSALS.get(heard.status, _ODD_REFUSAL)
    return Verdict(
        Blame.ACCOUNT, reason, sentence.format(host=heard.host, said=heard.said, status=heard.status)
    )


def _server_error(attempt: Attempt, heard: _Heard) -> Verdict:
    """Any status that leaves open what became of the file.

    Only a 503 with one of the documented codes says that the service did nothing with the file; a 503 of a
    proxy may hide a stored file as well as a 502 may.
    """
    overloaded = _overloaded(heard) if heard.status == 503 else None
    reason = Reason.REQUEST_TIMEOUT if heard.status == 408 else Reason.SERVER_ERROR
    return overloaded or _unclear(attempt, reason, f"{heard.host} answered HTTP {heard.status}{heard.said}")


def _is_success_status(status: int) -> bool:
    return 200 <= status <= 299


# ── reading what the service says ──────────────────────────────────────────────────────────────────────────


def read_json(body: bytes) -> Any:
    """The JSON value in `body`, or None if it is none: UTF-8 only; NaN and infinities become None.

    None stands for `null` too, which no caller needs to tell apart.
    """
    try:
        return _JSON.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # too deep a nesting; too many digits are a ValueError
        return None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


_JSON = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite)


def readable_id(value: object) -> str | None:
    """A file id that can be kept and shown: a printable, non-empty string."""
    if isinstance(value, str) and value.strip() and value.isprintable() and len(value) <= ID_MAX:
        return value
    return None


def whole_number(value: object) -> int | None:
    """A JSON number, or a string of digits, as an integer that any database holds."""
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62:
        return value
    return None


def listed_entries(document: Mapping[str, Any]) -> list[Any] | None:
    """The entries of a listing: `data.data[]` as SiliconFlow answers, `data[]` as OpenAI does."""
    data = document.get("data")
    if isinstance(data, dict):
        data = data.get("data")
    return data if isinstance(data, list) else None


def _file_object(document: dict[str, Any]) -> dict[str, Any] | None:
    for candidate in (document.get("data"), document):
        if isinstance(candidate, dict) and readable_id(candidate.get("id")):
            return candidate
    return None


def _says_ok(document: dict[str, Any]) -> bool:
    code = document.get("code")
    return (code is None or whole_number(code) == OK_CODE) and document.get("status") is not False


def _hear(answer: Answer, host: str) -> _Heard:
    value = read_json(answer.body)
    document = value if isinstance(value, dict) else None
    inner = document.get("error") if document else None
    speaker = inner if isinstance(inner, dict) else document or {}
    code, message = whole_number(speaker.get("code")), speaker.get("message")
    documented = code is not None or (isinstance(message, str) and message != "")
    text = _as_text(message) if document is not None else _plain_text(answer.body, value)
    return _Heard(host, answer.status, document, code, text, documented, answer.location)


def _as_text(message: object) -> str | None:
    if message is None or isinstance(message, str):
        return message or None
    return json.dumps(message, ensure_ascii=False)


def _plain_text(body: bytes, value: object) -> str | None:
    """What a person should read of a body that is no JSON object: a string, a page's title, plain text."""
    if isinstance(value, str):
        return value or None
    text = body[:4096].decode("utf-8", "replace")
    title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
    if title is None and re.match(r"\s*<(!doctype|html|\?xml)", text, re.IGNORECASE):
        return None
    return " ".join((title.group(1) if title else text).split()) or None


_SECRETS = re.compile(r"\bsk-[A-Za-z0-9_-]{8,}|(?<=bearer )\S+", re.IGNORECASE)


def printable(text: str, limit: int) -> str:
    """`text` at most `limit` characters long, safe for logs, terminals and reports.

    Control, format (bidi), surrogate, private and unassigned characters and line separators become
    escapes; what looks like an API key becomes "sk-…", since services echo the key that they refuse.
    """
    escaped = _SECRETS.sub("sk-…", text[: 4 * limit])[: limit + 1]
    if not escaped.isprintable():
        escaped = "".join(char if _harmless(char) else _escape(char) for char in escaped)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


def _harmless(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def http_date(text: str | None) -> float | None:
    """An HTTP date (RFC 9110, 5.6.7) as seconds since the epoch; None if it is none."""
    try:
        moment = parsedate_to_datetime(text or "")
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _retry_after_s(answer: Answer, wall: float) -> float | None:
    """Seconds to wait: a number, or a date that counts from the service's own clock where it tells it."""
    text = (answer.retry_after or "").strip()
    if not text:
        return None
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return min(float(text), RETRY_AFTER_MAX_S)
    until = http_date(text)
    if until is None:
        return None
    asked = http_date(answer.date)
    return min(max(0.0, until - (wall if asked is None else asked)), RETRY_AFTER_MAX_S)


# ── how long to wait, and what to be called ────────────────────────────────────────────────────────────────


def backoff_s(
    failures: int, *, first_s: float, longest_s: float, luck: float, retry_after_s: float | None
) -> float:
    """Seconds until the next try after `failures` failures in a row (counted from 1).

    Doubles from `first_s`; `luck` in [0, 1) picks a point between half of it and the whole; never longer
    than `longest_s`. A Retry-After is a lower bound, but it too gets no more than `longest_s`.
    """
    doublings = min(max(failures - 1, 0), 64)
    pause = min(first_s * 2.0**doublings, longest_s) * (0.5 + luck / 2)
    return min(max(pause, retry_after_s or 0.0), longest_s)


# Beyond control characters, quotes and slashes, receivers disagree on: bidi marks and the byte order mark
# (some strip them), "%22" and its like (WHATWG forms escape quotes so, some parsers undo it), and "=?"
# (parsers built on mail libraries see an RFC 2047 word). ";" and inner spaces are safe between quotes.
_AMBIGUOUS = re.compile(
    "[\x00-\x1f\x7f-\x9f\"'/\\\\\u2028\u2029\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"
    r"|%(?=[0-9A-Fa-f]{2})|=(?=\?)"
)


def remote_name(name: str, *, tag: str | None) -> str:
    """The name to send a file under: one that every multipart parser reads alike.

    The base name of `name` with "_" for whatever parsers disagree on (an undecodable byte each), ending in
    lower-case ".jsonl", at most 255 bytes of UTF-8. `tag` goes before the suffix: stem-<tag>.jsonl.
    """
    base = _AMBIGUOUS.sub("_", name.rpartition("/")[2])
    base = base.lstrip().rjust(len(base), "_")  # some parsers strip
    stem = base[: -len(SUFFIX)] if base[-len(SUFFIX) :].lower() == SUFFIX else base
    ending = f"-{tag}{SUFFIX}" if tag else SUFFIX
    return (_shortened(stem, NAME_MAX_BYTES - len(ending.encode())) or "_") + ending


def _shortened(text: str, max_bytes: int) -> str:
    """As much of `text` as fits, in whole characters."""
    return text.encode()[:max_bytes].decode(errors="ignore")

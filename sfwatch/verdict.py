"""A file is rejected at once only by a short list of clear refusals; whatever else goes wrong, it waits.

An attempt to upload ends in one of six ways (`Blame`), and each has one consequence:

    ACCEPTED   the service has the file and named it
    FILE       the service read our request and refuses this file, with a code that speaks of the file
    DOUBTED    it refuses, but perhaps because of the account: the file waits for evidence
    NOT_NOW    the service provably has nothing of it: the same file is tried again later
    ACCOUNT    key, balance, address or form are wrong: no file of this target can succeed
    UNKNOWN    the service may have the file: it is looked up before it is sent again

The status decides. The business code and the message only explain, except for the codes named here and a
message that speaks of a rate limit or of money: such a refusal is never the file's fault.
Once the last byte is out, nothing was stored only if the answer is a 3xx, a 429, a 503 with an overload code,
or a 4xx that the service itself gave: 400, 413, 415 and 422 only with its own JSON, 408 never.
What the service writes is foreign text: it is bounded, and its control characters are escaped.
"""

import hashlib
import json
import math
import os
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
SIZE_CODES = frozenset({20069, 20074, 20087})
FILE_CODES = SIZE_CODES | {20012, 20015, 20070, 20071, 20072, 20073, 20080, 20088}
"""Codes that speak of the file or of what stands in it."""
FILE_STATUSES = frozenset({400, 413, 415, 422})
NO_LISTING_STATUSES = frozenset({404, 405, 501})

DETAIL_MAX = 500
QUOTE_MAX = 200
ID_MAX = 256
RETRY_AFTER_MAX_S = 86400.0
NAME_MAX_BYTES = 255
STEM_MAX_BYTES = 64  # with a tag, so that services that cut or escape names keep the tag
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
    DOUBTED = "doubted"
    NOT_NOW = "not_now"
    ACCOUNT = "account"
    UNKNOWN = "unknown"


class Reason(StrEnum):
    """Every `Verdict.reason` there is: a public set that other people's scripts may rely on."""

    ACCEPTED = "accepted"
    # the file's fault, or doubted
    REFUSED = "refused"
    # the account or the settings
    UNAUTHORIZED = "unauthorized"
    BALANCE = "balance"
    FORBIDDEN = "forbidden"
    INTERMEDIARY = "intermediary"  # a web page where the service speaks JSON
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
    UNREACHABLE = "unreachable"
    PROXY_REFUSED = "proxy_refused"
    # unknown once the whole body is out, not now before
    ODD_REFUSAL = "odd_refusal"
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
    `unreachable` marks a failed connect or lookup. `could_be_the_file` marks a failure that another file might
    not meet: cut while it was sent, or refused in place of the service before the last byte.
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
    rate_limited: bool = False
    unreachable: bool = False
    could_be_the_file: bool = False


@dataclass(frozen=True, slots=True)
class _Heard:
    """An answer, read: `code` and `message` if they make sense, `said` ready to stand in a sentence.

    `is_json`: an object or a bare JSON string, as the service answers. `is_page`: HTML or XML.
    """

    host: str
    status: int
    document: dict[str, Any] | None
    code: int | None
    message: str | None
    is_json: bool
    is_page: bool
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
        return _bounded(_never_connected(attempt, host, reached_before) or _broken_off(attempt, host))
    heard = _hear(attempt.answer, host)
    return _with_facts(_answered(attempt, heard), attempt.answer, heard, wall)


def judge_listing(attempt: Attempt, *, host: str, reached_before: bool, wall: float) -> Verdict:
    """Whether a listing (also the probe of a key) could be had; never FILE, DOUBTED or UNKNOWN.

    404, 405 and 501 are ACCEPTED with `data` None and the reason `no_listing`: there is none to be had, but
    the service answers. So is a refusal that would reject a file or be doubted (a gateway that dislikes a
    parameter): no hold may last for ever because of a probe's form. The caller compares its `words`.
    """
    attempt = replace(attempt, sent_all=False)  # nothing of a file is in it
    if attempt.answer is None:
        verdict = _never_connected(attempt, host, reached_before)
        return _bounded(verdict or _listing_failed(host, *_what_broke(attempt, host)))
    heard = _hear(attempt.answer, host)
    return _with_facts(_listed(attempt, heard), attempt.answer, heard, wall)


def _listed(attempt: Attempt, heard: _Heard) -> Verdict:
    host, what = heard.host, f"HTTP {heard.status}{heard.said}"
    if heard.status // 100 == 2:
        return _listing(attempt, heard, what)
    verdict = _answered(attempt, heard)
    if heard.status in NO_LISTING_STATUSES or verdict.blame in {Blame.FILE, Blame.DOUBTED}:
        return Verdict(Blame.ACCEPTED, Reason.NO_LISTING, f"{host} gives no listing of files ({what})")
    if verdict.blame is Blame.NOT_NOW:
        return replace(_listing_failed(host, verdict.reason, what), rate_limited=verdict.rate_limited)
    return verdict


def _listing(attempt: Attempt, heard: _Heard, what: str) -> Verdict:
    if heard.code in OVERLOAD_CODES:
        return _listing_failed(heard.host, Reason.OVERLOADED, what)
    if heard.document is None or attempt.trouble is not None or listed_entries(heard.document) is None:
        return _listing_failed(heard.host, Reason.UNREADABLE_ANSWER, f"{what}, but no listing in it")
    if not _says_ok(heard.document):
        return _listing_failed(heard.host, Reason.ODD_SUCCESS, f"{what}, but it names no success")
    return Verdict(Blame.ACCEPTED, Reason.LISTED, f"{heard.host} lists its files", data=heard.document)


def _listing_failed(host: str, reason: str, what: str) -> Verdict:
    return Verdict(Blame.NOT_NOW, reason, f"the listing of {host} failed: {what}")


def _bounded(verdict: Verdict) -> Verdict:
    return replace(verdict, detail=printable(verdict.detail, DETAIL_MAX))


def _with_facts(verdict: Verdict, answer: Answer, heard: _Heard, wall: float) -> Verdict:
    return replace(
        _bounded(verdict),
        http_status=answer.status,
        code=heard.code,
        message=printable(heard.message, DETAIL_MAX) if heard.message else None,
        trace_id=printable(answer.trace_id, QUOTE_MAX) if answer.trace_id else None,
        retry_after_s=_retry_after_s(answer, wall),
    )


# ── no answer ──────────────────────────────────────────────────────────────────────────────────────────────

_NO_TLS = re.compile("wrong.version.number|record layer failure|http.request|unknown.protocol", re.IGNORECASE)
"""What OpenSSL says, by its version, to an answer that is no TLS."""


def _never_connected(attempt: Attempt, host: str, reached_before: bool) -> Verdict | None:  # noqa: FBT001
    """Troubles before there was a connection: nothing can have been sent, whatever `sent_all` says."""
    said = printable(attempt.detail, QUOTE_MAX)
    why = f" ({said})" if said else ""
    match attempt.trouble:
        case Trouble.RESOLVE:
            blame, remedy = Blame.ACCOUNT, "check base_url and this machine's DNS"
            if reached_before:
                blame, remedy = Blame.NOT_NOW, "it did before: check this machine's DNS and network"
            detail = f"{said or f'the name of {host} does not resolve'}; {remedy}"
            return Verdict(blame, Reason.NAME_RESOLUTION, detail, unreachable=True)
        case Trouble.CONNECT:
            remedy = "check the network if it lasts"
            if _NO_TLS.search(said):
                remedy = "it does not speak TLS there: check base_url, its port and whether it is http://"
            detail = f"{host} cannot be reached{why}; {remedy}"
            return Verdict(Blame.NOT_NOW, Reason.UNREACHABLE, detail, unreachable=True)
        case Trouble.CERTIFICATE:
            remedy = "set ca_bundle if a company proxy or a private authority signs it"
            detail = f"{said or f'the certificate of {host} does not verify'}; {remedy}"
            return Verdict(Blame.ACCOUNT, Reason.CERTIFICATE, detail)
        # A proxy's 407 to CONNECT reaches us as an error text only, never as an answer.
        case Trouble.PROXY if re.search(r"\b407\b", said):
            return Verdict(Blame.ACCOUNT, Reason.PROXY, _ASKS_FOR_LOGIN.format(host=host, said=why))
        case Trouble.PROXY:
            remedy = "check HTTPS_PROXY and NO_PROXY if it lasts"
            detail = f"the proxy does not let us through to {host}{why}; {remedy}"
            return Verdict(Blame.NOT_NOW, Reason.PROXY_REFUSED, detail, unreachable=True)
    return None


_BROKEN_OFF = {
    Trouble.RESET: (Reason.RESET, "{host} closed the connection{why}"),
    Trouble.STALLED: (Reason.STALLED, "{host} fell silent{why}"),
    Trouble.ABORTED: (Reason.ABORTED, "sfwatch broke off the request to {host}{why}"),
    Trouble.CUT: (Reason.UNREADABLE_ANSWER, "the answer of {host} cannot be read{why}"),
}


def _what_broke(attempt: Attempt, host: str) -> tuple[Reason, str]:
    said = printable(attempt.detail, QUOTE_MAX)
    reason, what = _BROKEN_OFF[attempt.trouble or Trouble.CUT]
    return reason, what.format(host=host, why=f" ({said})" if said else "")


def _broken_off(attempt: Attempt, host: str) -> Verdict:
    reason, what = _what_broke(attempt, host)
    cut = not attempt.sent_all and reason in {Reason.RESET, Reason.UNREADABLE_ANSWER}
    return replace(_unclear(attempt, reason, what), could_be_the_file=cut)


def _unclear(attempt: Attempt, reason: Reason, what: str) -> Verdict:
    """Unknown once the last byte of the body is out; before it, the service cannot have the file."""
    if attempt.sent_all:
        detail = f"{what} after the whole file was sent; it is looked up before it is sent again"
        return Verdict(Blame.UNKNOWN, reason, detail)
    return Verdict(Blame.NOT_NOW, reason, f"{what} before the whole file was sent; it is sent again later")


# ── an answer, by its status ───────────────────────────────────────────────────────────────────────────────


def _answered(attempt: Attempt, heard: _Heard) -> Verdict:
    status = heard.status
    if status // 100 == 2:
        return _success(attempt, heard)
    if status // 100 == 3:
        return _redirect(heard)
    # 451 is the last registered one. Those above are proxies' private words, 499 and 460 among them: "the
    # client went away", which leaves open what the service behind the proxy made of the file.
    if 400 <= status <= 451 and status != 408:
        return _refusal(attempt, heard)
    # Only a 503 with one of the documented codes says that the service did nothing with the file; a 503 of a
    # proxy may hide a stored file as well as a 502 may.
    if status == 503 and heard.code in OVERLOAD_CODES:
        return _verdict(heard, *_BY_CODE[heard.code])
    reason = Reason.REQUEST_TIMEOUT if status == 408 else Reason.SERVER_ERROR
    return _unclear(attempt, reason, f"{heard.host} answered HTTP {status}{heard.said}")


def _verdict(heard: _Heard, blame: Blame, reason: Reason, sentence: str) -> Verdict:
    return Verdict(blame, reason, sentence.format(host=heard.host, status=heard.status, said=heard.said))


def _success(attempt: Attempt, heard: _Heard) -> Verdict:
    """A 2xx is an acceptance only if everything fits; what could hide an id is looked up."""
    if heard.document is None or attempt.trouble is not None:
        sentence = "{host} answered HTTP {status} unreadably{said}; the file is looked up"
        return _verdict(heard, Blame.UNKNOWN, Reason.UNREADABLE_ANSWER, sentence)
    file = _file_object(heard.document)
    if file is None:
        what = f"{heard.host} answered HTTP {heard.status} without a file id{heard.said}"
        return _unclear(attempt, Reason.ODD_SUCCESS, what)
    if attempt.sent_all and _says_ok(heard.document):
        detail = f"{heard.host} accepted the file as {file['id']}"
        return Verdict(Blame.ACCEPTED, Reason.ACCEPTED, detail, data=file)
    odd = "no success" if attempt.sent_all else f"got only {attempt.sent} bytes of it"
    detail = f"{heard.host} named a file id but {odd}{heard.said}; the file is looked up"
    return Verdict(Blame.UNKNOWN, Reason.ODD_SUCCESS, detail)


def _redirect(heard: _Heard) -> Verdict:
    try:
        where = urlsplit(heard.location or "").hostname or "another path of the same host"
    except ValueError:
        where = "an address that cannot be read"
    detail = (
        f"{heard.host} redirects to {printable(where, QUOTE_MAX)} (HTTP {heard.status}); sfwatch follows no "
        "redirect, so that the key goes nowhere else: set base_url to the final address"
    )
    return Verdict(Blame.ACCOUNT, Reason.REDIRECT, detail)


# Must not match: "size limit exceeded", "too many lines", "the file has too many requests", "unbalanced".
_RATE = re.compile(
    r"\brate[ _-]?limit|\b[iqrt]p[dhms] limit|\bper (?:second|minute|hour|day)\b|\bthrottl|\bslow down\b"
    r"|\btoo frequent|\bconcurrency|^(?!.*\b(?:file|batch|lines?)\b).*\btoo many\b.*\b(?:requests|calls)\b"
    r"|限流|限速|频率(?!惩罚)|频繁|速率|并发|请求(?:次?数)?[过太]多",
    re.IGNORECASE | re.DOTALL,
)
_MONEY = re.compile(
    r"(?<![a-z])(?:quotas?|balance|billing|arrears|overdue|payment)(?![a-z])"
    r"|(?<![a-z])(?:insufficient|out of|no|not enough)[ _](?:funds|credits?)(?![a-z])"
    r"|余额|欠费|配额|额度|充值|账单|计费|缴费",
    re.IGNORECASE,
)
_BUSY = "{host} is overloaded{said}; the file is sent again later"
_NO_PURPOSE = "{host} does not take this purpose{said}; check `purpose` of the inbox"
_NO_FORM = "{host} finds no file in our request{said}; look for a proxy that alters it"
_BY_CODE = dict.fromkeys(OVERLOAD_CODES, (Blame.NOT_NOW, Reason.OVERLOADED, _BUSY)) | {
    PURPOSE_CODE: (Blame.ACCOUNT, Reason.SETTINGS, _NO_PURPOSE),
    FORM_CODE: (Blame.ACCOUNT, Reason.OUR_FAULT, _NO_FORM),
}


def _refusal(attempt: Attempt, heard: _Heard) -> Verdict:
    # Without the service's own JSON it was perhaps a proxy that answered, and the service may have the file.
    mystery = heard.status in FILE_STATUSES and not heard.is_json
    verdict = None if mystery and attempt.sent_all else _never_the_files(heard)
    if verdict is not None or heard.status not in FILE_STATUSES:
        return verdict or _waiting_refusal(heard)
    if not attempt.sent_all and attempt.trouble in {Trouble.ABORTED, Trouble.STALLED}:
        # Only half a request was there to be refused. A reset is different: so end early refusals.
        reason, what = _what_broke(attempt, heard.host)
        return _unclear(attempt, reason, what + heard.said)
    if mystery:
        what = f"HTTP {heard.status} without the service's own JSON{heard.said}, perhaps by a proxy,"
        return replace(_unclear(attempt, Reason.ODD_REFUSAL, what), could_be_the_file=not attempt.sent_all)
    # A 400 that carries "overloaded" would be the service's fault in a file's clothes.
    if heard.code in _BY_CODE:
        return _verdict(heard, *_BY_CODE[heard.code])
    sentence = "{host} refuses this file (HTTP {status}){said}"
    if heard.code in FILE_CODES and heard.status in {400, 422}:
        return _verdict(heard, Blame.FILE, Reason.REFUSED, sentence + "; fix the file and drop it again")
    return _verdict(heard, Blame.DOUBTED, Reason.REFUSED, sentence)


def _never_the_files(heard: _Heard) -> Verdict | None:
    """A rate limit, or the account's money, by status, code or text; a text about a size may sound alike."""
    about_size = heard.status == 413 or heard.code in SIZE_CODES
    text = "" if about_size else (heard.message or "")[:DETAIL_MAX]
    if heard.status == 429 or (heard.code != BALANCE_CODE and _RATE.search(text)):
        sentence = "{host} limits the rate of requests{said}; sfwatch slows down and sends it again"
        return replace(_verdict(heard, Blame.NOT_NOW, Reason.RATE_LIMITED, sentence), rate_limited=True)
    if heard.status == 402 or heard.code == BALANCE_CODE or _MONEY.search(text):
        sentence = "the balance or quota of the account at {host} does not suffice{said}; top it up"
        return _verdict(heard, Blame.ACCOUNT, Reason.BALANCE, sentence)
    return None


_ASKS_FOR_LOGIN = "the proxy before {host} asks for a login{said}; put user and password into HTTPS_PROXY"
_NO_API = "{host} has no files API at this address{said}; check base_url, it ends in /v1"
_NO_KEY = (
    "{host} does not accept the API key{said}; the .cn and .com sites have separate accounts: check base_url "
    "and the key"
)
_NO_RIGHT = "{host} forbids this request{said}; check the rights of the key and the state of the account"
_WEB_PAGE = (
    "something on the way to {host} answered with a web page{said}; check proxies, firewalls and base_url"
)
_NOT_NOW = "{host} cannot take the file now (HTTP {status}){said}; it is sent again"
# Conflict, misdirected, locked: another time or another connection may do.
_BY_STATUS = dict.fromkeys((409, 421, 423), (Blame.NOT_NOW, Reason.ODD_STATUS, _NOT_NOW)) | {
    401: (Blame.ACCOUNT, Reason.UNAUTHORIZED, _NO_KEY),
    403: (Blame.ACCOUNT, Reason.FORBIDDEN, _NO_RIGHT),
    404: (Blame.ACCOUNT, Reason.NOT_FOUND, _NO_API),
    405: (Blame.ACCOUNT, Reason.METHOD, _NO_API),
    407: (Blame.ACCOUNT, Reason.PROXY, _ASKS_FOR_LOGIN),
    425: (Blame.NOT_NOW, Reason.TOO_EARLY, _NOT_NOW),
}


def _waiting_refusal(heard: _Heard) -> Verdict:
    # Length required, header too large, gone, legal reasons, …: such a status speaks of the address or of the
    # request's form, which all files share, so holding the target asks the least of the service. Should it be
    # one file after all, another file's acceptance disproves the hold.
    if heard.is_page and heard.status in {401, 403}:
        return _verdict(heard, Blame.ACCOUNT, Reason.INTERMEDIARY, _WEB_PAGE)
    odd = "{host} answers HTTP {status}{said}; check base_url and what lies between"
    return _verdict(heard, *_BY_STATUS.get(heard.status, (Blame.ACCOUNT, Reason.ODD_STATUS, odd)))


# ── reading what the service says ──────────────────────────────────────────────────────────────────────────


def read_json(body: bytes) -> Any:
    """The JSON value in `body`, or None if it is none: UTF-8 only; NaN and infinities become None.

    None stands for `null` too, which no caller needs to tell apart.
    """
    try:
        return _JSON.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # too deep a nesting; too many digits are a ValueError
        return None


_JSON = json.JSONDecoder(
    parse_constant=lambda _: None, parse_float=lambda text: x if math.isfinite(x := float(text)) else None
)


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


_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def _hear(answer: Answer, host: str) -> _Heard:
    value = read_json(answer.body)
    document = value if isinstance(value, dict) else None
    inner = document.get("error") if document else None
    speaker = inner if isinstance(inner, dict) else document or {}
    text = next((speaker[key] for key in ("message", "detail", "error") if speaker.get(key)), None)
    if document is None:
        text = _plain_text(answer.body, value)
    elif text is not None and not isinstance(text, str):
        text = json.dumps(text, ensure_ascii=False)
    is_json = isinstance(value, dict | str)
    is_page = not is_json and ("html" in (answer.content_type or "") or bool(_PAGE.match(answer.body)))
    code = whole_number(speaker.get("code"))
    return _Heard(host, answer.status, document, code, text, is_json, is_page, answer.location)


def _plain_text(body: bytes, value: object) -> str | None:
    """What a person should read of a body that is no JSON object: a string, a page's title, plain text."""
    if isinstance(value, str):
        return value or None
    text = body[:4096].decode("utf-8", "replace")
    title = re.search(r"<title[^>]*>([^<]*)", text, re.IGNORECASE)
    if title is None and _PAGE.match(body):
        return None
    return " ".join((title.group(1) if title else text).split()) or None


_ESCAPED = ("unicode_escape", "surrogatepass")
_SECRETS = re.compile(r"\bsk-[A-Za-z0-9_-]{8,}|(?<=bearer )\S+", re.IGNORECASE)


def printable(text: str, limit: int) -> str:
    """`text` at most `limit` characters long, safe for logs, terminals and reports.

    Control, format (bidi), surrogate, private and unassigned characters and line separators become
    escapes; what looks like an API key becomes "sk-…", since services echo the key that they refuse.
    """
    escaped = _SECRETS.sub("sk-…", text[: 4 * limit])[: limit + 1]
    if not escaped.isprintable():
        escaped = "".join(
            c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode(*_ESCAPED).decode()
            for c in escaped
        )
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"


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
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return min(float(text), RETRY_AFTER_MAX_S)
    until, asked = http_date(text), http_date(answer.date)
    if until is None:
        return None
    return min(max(0.0, until - (wall if asked is None else asked)), RETRY_AFTER_MAX_S)


def words(verdict: Verdict) -> str:
    """What refusals are compared by: status, code, and the message without whatever has a digit in it."""
    code = "" if verdict.code is None else f", code {verdict.code}"
    message = re.sub(r"[\w-]*\d[\w-]*", "#", verdict.message or "", flags=re.ASCII)
    return f"HTTP {verdict.http_status}{code}" + (f": {message}" if message else "")


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
    lower-case ".jsonl", at most 255 bytes of UTF-8. With a tag: STEM-TAG.jsonl, STEM of at most 64 bytes.
    """
    base = _AMBIGUOUS.sub("_", name.rpartition("/")[2])
    base = base.lstrip().rjust(len(base), "_")  # some parsers strip
    stem = base[: -len(SUFFIX)] if base[-len(SUFFIX) :].lower() == SUFFIX else base
    most = STEM_MAX_BYTES if tag else NAME_MAX_BYTES - len(SUFFIX)
    stem = stem.encode()[:most].decode(errors="ignore") or "_"  # whole characters
    return f"{stem}-{tag}{SUFFIX}" if tag else stem + SUFFIX


def tag_of(claims: str, name: str, mtime_ns: int, sha256: str) -> str:
    """The key of our own that a remote name carries: the first 12 hex digits of a SHA-256.

    Hashed are `sfwatch-1`, the name of the claims folder, the relative name as bytes, mtime in ns (decimal) and
    the content's SHA-256 (64 hex digits), each preceded by its length in decimal and a colon: `9:sfwatch-1…`.
    """
    parts = (b"sfwatch-1", os.fsencode(claims), os.fsencode(name), b"%d" % mtime_ns, sha256.encode())
    return hashlib.sha256(b"".join(b"%d:%s" % (len(part), part) for part in parts)).hexdigest()[:12]

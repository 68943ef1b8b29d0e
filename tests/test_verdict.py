"""Whose fault it was: every row of the service's table, and what must hold whatever the service sends."""

import hashlib
import io
import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from python_multipart.multipart import parse_options_header
from werkzeug.formparser import MultiPartParser

from sfwatch.verdict import (
    FILE_CODES,
    FILE_STATUSES,
    Answer,
    Attempt,
    Blame,
    Reason,
    Trouble,
    Verdict,
    backoff_s,
    http_date,
    judge,
    judge_listing,
    printable,
    read_json,
    remote_name,
    tag_of,
    words,
)

HOST = "api.siliconflow.cn"
WALL = 1_741_685_396.0
OK_BODY = {
    "code": 20000,
    "message": "Ok",
    "status": True,
    "data": {"id": "file-jkvytbjtow", "object": "file", "bytes": 8509, "filename": "requests.jsonl"},
}
HTML = b"<html><head><title>413 Request Entity Too Large</title></head><body>nginx</body></html>"


def attempt(
    status: int | None = None,
    body: object = b"",
    *,
    sent_all: bool = True,
    trouble: Trouble | None = None,
    detail: str = "",
    **headers: str,
) -> Attempt:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = None if status is None else Answer(status, raw, **headers)
    return Attempt(sent_all, 10, "d" if sent_all else None, answer, trouble, detail, 0.1)


def judged(a: Attempt, *, reached_before: bool = True) -> Verdict:
    return judge(a, host=HOST, reached_before=reached_before, wall=WALL)


# ── the table ──────────────────────────────────────────────────────────────────────────────────────────────

OVERLOADED = {"code": 50505, "message": "Model service overloaded. Please try again later.", "data": "string"}
NO_BALANCE = {"code": 30001, "message": "Sorry, your account balance is insufficient"}
NAMED = {"code": 20012, "message": "string", "data": "string"}
RPM = "RPM limit exceeded. Please complete identity verification to lift the restriction."

ANSWERS: list[tuple[int, object, Blame, str]] = [
    (200, OK_BODY, Blame.ACCEPTED, "accepted"),
    (201, {"id": "file-1", "object": "file"}, Blame.ACCEPTED, "accepted"),
    (200, {"code": "20000", "data": {"id": "file-1"}}, Blame.ACCEPTED, "accepted"),
    (200, {**OK_BODY, "code": 20012}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "code": "Ok"}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "status": False}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "data": None}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "data": {"id": ""}}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "data": {"id": 7}}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "data": {"id": "file-\ud800"}}, Blame.UNKNOWN, "odd_success"),
    (200, {**OK_BODY, "data": {"id": "file\n1"}}, Blame.UNKNOWN, "odd_success"),
    (200, {"code": 50508, "message": "System is too busy now."}, Blame.UNKNOWN, "odd_success"),
    (200, NO_BALANCE, Blame.UNKNOWN, "odd_success"),
    (200, b"", Blame.UNKNOWN, "unreadable_answer"),
    (204, b"", Blame.UNKNOWN, "unreadable_answer"),
    (200, HTML, Blame.UNKNOWN, "unreadable_answer"),
    (200, json.dumps(OK_BODY).encode()[:-5], Blame.UNKNOWN, "unreadable_answer"),
    (200, [OK_BODY], Blame.UNKNOWN, "unreadable_answer"),
    (200, b"[" * 100_000, Blame.UNKNOWN, "unreadable_answer"),
    (200, b'{"data": {"id": "f\xff"}}', Blame.UNKNOWN, "unreadable_answer"),
    *((400, {"code": code, "message": "string"}, Blame.FILE, "refused") for code in FILE_CODES),
    (400, {"code": "20071"}, Blame.FILE, "refused"),
    (422, {"error": {"code": 20080, "message": "corrupt"}}, Blame.FILE, "refused"),
    (413, {"code": 20042, "message": "too big"}, Blame.DOUBTED, "refused"),
    (413, NAMED, Blame.DOUBTED, "refused"),
    (415, {"message": "only jsonl"}, Blame.DOUBTED, "refused"),
    (422, {"error": {"message": "bad line", "type": "invalid_request_error"}}, Blame.DOUBTED, "refused"),
    (422, {"detail": [{"loc": ["body", "file"], "msg": "field required"}]}, Blame.DOUBTED, "refused"),
    (422, "bad line", Blame.DOUBTED, "refused"),
    (400, {}, Blame.DOUBTED, "refused"),
    (400, {"message": {"a": 1}}, Blame.DOUBTED, "refused"),
    (400, {"code": 20067, "message": "bad purpose"}, Blame.ACCOUNT, "settings"),
    (422, {"code": 20079, "message": "no file part"}, Blame.ACCOUNT, "our_fault"),
    (400, NO_BALANCE, Blame.ACCOUNT, "balance"),
    (400, OVERLOADED, Blame.NOT_NOW, "overloaded"),
    *(
        (status, body, Blame.UNKNOWN, "odd_refusal")
        for status in FILE_STATUSES
        for body in (HTML, b"", b"no", [1])
    ),
    (401, "Invalid token", Blame.ACCOUNT, "unauthorized"),
    (401, "Api key is invalid", Blame.ACCOUNT, "unauthorized"),
    (401, b"no", Blame.ACCOUNT, "unauthorized"),
    (401, HTML, Blame.ACCOUNT, "intermediary"),
    (403, HTML, Blame.ACCOUNT, "intermediary"),
    (402, b"", Blame.ACCOUNT, "balance"),
    (402, NO_BALANCE, Blame.ACCOUNT, "balance"),
    (403, "Forbidden", Blame.ACCOUNT, "forbidden"),
    (403, NO_BALANCE, Blame.ACCOUNT, "balance"),
    (403, RPM, Blame.NOT_NOW, "rate_limited"),
    (403, {"message": RPM.upper()}, Blame.NOT_NOW, "rate_limited"),
    (403, RPM.encode(), Blame.NOT_NOW, "rate_limited"),
    (403, {"error": {"message": "Too Many Requests"}}, Blame.NOT_NOW, "rate_limited"),
    (404, "404 page not found", Blame.ACCOUNT, "not_found"),
    (405, b"", Blame.ACCOUNT, "method"),
    (407, b"", Blame.ACCOUNT, "proxy"),
    (408, b"", Blame.UNKNOWN, "request_timeout"),
    (409, b"", Blame.NOT_NOW, "odd_status"),
    (421, b"", Blame.NOT_NOW, "odd_status"),
    (423, b"", Blame.NOT_NOW, "odd_status"),
    (425, b"", Blame.NOT_NOW, "too_early"),
    (429, {"message": "Details:TPM limit reached.", "data": None}, Blame.NOT_NOW, "rate_limited"),
    (429, NO_BALANCE, Blame.NOT_NOW, "rate_limited"),
    (429, b"Request was rejected due to rate limiting.", Blame.NOT_NOW, "rate_limited"),
    *((status, NAMED, Blame.ACCOUNT, "odd_status") for status in (406, 410, 411, 414, 418, 431, 451)),
    *((status, b"", Blame.ACCOUNT, "redirect") for status in (300, 301, 302, 303, 304, 307, 308)),
    *((503, {**OVERLOADED, "code": code}, Blame.NOT_NOW, "overloaded") for code in (50505, 50508, 50603)),
    (503, {"code": 50501, "message": "x"}, Blame.UNKNOWN, "server_error"),
    (503, HTML, Blame.UNKNOWN, "server_error"),
    (502, OVERLOADED, Blame.UNKNOWN, "server_error"),
    (504, {"code": 50501, "message": "Model service timeout."}, Blame.UNKNOWN, "server_error"),
    *((status, b"", Blame.UNKNOWN, "server_error") for status in (500, 501, 502, 504, 511, 599)),
    *((status, b"", Blame.UNKNOWN, "server_error") for status in (0, 101, 199, 460, 499, 600, 999)),
]


@pytest.mark.parametrize(("status", "body", "blame", "reason"), ANSWERS)
def test_answers_to_a_file_sent_whole(status: int, body: object, blame: Blame, reason: str) -> None:
    """Each answer that is documented or reported has its blame and its reason."""
    verdict = judged(attempt(status, body))
    assert (verdict.blame, verdict.reason) == (blame, reason)
    assert verdict.http_status == status


TROUBLES: list[tuple[Trouble | None, Blame, Blame, str]] = [
    (Trouble.CONNECT, Blame.NOT_NOW, Blame.NOT_NOW, "unreachable"),
    (Trouble.RESOLVE, Blame.NOT_NOW, Blame.NOT_NOW, "name_resolution"),
    (Trouble.CERTIFICATE, Blame.ACCOUNT, Blame.ACCOUNT, "certificate"),
    (Trouble.PROXY, Blame.NOT_NOW, Blame.NOT_NOW, "proxy_refused"),
    (Trouble.RESET, Blame.NOT_NOW, Blame.UNKNOWN, "reset"),
    (Trouble.STALLED, Blame.NOT_NOW, Blame.UNKNOWN, "stalled"),
    (Trouble.CUT, Blame.NOT_NOW, Blame.UNKNOWN, "unreadable_answer"),
    (Trouble.ABORTED, Blame.NOT_NOW, Blame.UNKNOWN, "aborted"),
    (None, Blame.NOT_NOW, Blame.UNKNOWN, "unreadable_answer"),
]


@pytest.mark.parametrize(("trouble", "before", "after", "reason"), TROUBLES)
def test_no_answer(trouble: Trouble | None, before: Blame, after: Blame, reason: str) -> None:
    """Without an answer, only a file whose last byte went out can be unknown."""
    partly, wholly = (judged(attempt(sent_all=sent_all, trouble=trouble)) for sent_all in (False, True))
    assert (partly.blame, partly.reason) == (before, reason)
    assert (wholly.blame, wholly.reason) == (after, reason)
    assert partly.http_status is None


def test_a_name_that_never_resolved_is_a_wrong_address() -> None:
    """A lookup that fails at the first try speaks of base_url, a later one of an outage."""
    first = judged(attempt(sent_all=False, trouble=Trouble.RESOLVE), reached_before=False)
    later = judged(attempt(sent_all=False, trouble=Trouble.RESOLVE), reached_before=True)
    assert (first.blame, later.blame) == (Blame.ACCOUNT, Blame.NOT_NOW)
    assert "base_url" in first.detail
    assert later.unreachable


@pytest.mark.parametrize(
    ("trouble", "said", "told"),
    [
        (
            Trouble.RESOLVE,
            "the name of h does not resolve: unknown",
            "the name of h does not resolve: unknown; check",
        ),
        (
            Trouble.CERTIFICATE,
            "the certificate of h does not verify: old",
            "the certificate of h does not verify: old; set",
        ),
        (
            Trouble.CERTIFICATE,
            "the CA bundle /x cannot be read: gone",
            "the CA bundle /x cannot be read: gone; set",
        ),
        (Trouble.RESOLVE, "", "the name of api.siliconflow.cn does not resolve; check"),
    ],
)
def test_nothing_is_said_twice(trouble: Trouble, said: str, told: str) -> None:
    """What the connection says is a sentence already; without one there is ours."""
    judgement = judged(attempt(sent_all=False, trouble=trouble, detail=said), reached_before=False)
    assert judgement.detail.startswith(told)


@pytest.mark.parametrize(
    "said", ["[SSL: WRONG_VERSION_NUMBER] wrong version number", "[SSL] record layer failure"]
)
def test_tls_to_a_port_without_it(said: str) -> None:
    """Then base_url says https where http is spoken, or names the wrong port."""
    judgement = judged(attempt(sent_all=False, trouble=Trouble.CONNECT, detail=said))
    assert "does not speak TLS there: check base_url, its port and whether it is http://" in judgement.detail
    assert (judgement.blame, judgement.unreachable) == (Blame.NOT_NOW, True)


def test_unreachable_is_a_failed_connect_or_lookup() -> None:
    """The flag that holds a target at once is set where no connection came about, and nowhere else."""
    flagged = {t for t, *_ in TROUBLES if judged(attempt(sent_all=False, trouble=t)).unreachable}
    assert flagged == {Trouble.CONNECT, Trouble.RESOLVE, Trouble.PROXY}


def test_a_proxy_that_asks_for_a_login_is_a_matter_of_settings() -> None:
    """A 407 to CONNECT is told by the HTTP library as a text; it holds the target all the same."""
    text = "Tunnel connection failed: 407 Proxy Authentication Required"
    verdict = judged(attempt(sent_all=False, trouble=Trouble.PROXY, detail=text))
    assert (verdict.blame, verdict.reason) == (Blame.ACCOUNT, "proxy")


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408])
def test_a_server_error_before_the_whole_body_is_no_mystery(status: int) -> None:
    """The service cannot have what was not sent."""
    assert judged(attempt(status, sent_all=False)).blame is Blame.NOT_NOW


def test_an_acceptance_of_half_a_file_is_looked_up() -> None:
    """An id for a body that was not sent whole is a mystery, not a success."""
    verdict = judged(attempt(200, OK_BODY, sent_all=False))
    assert (verdict.blame, verdict.reason, verdict.data) == (Blame.UNKNOWN, "odd_success", None)


def test_a_refusal_of_half_a_file_in_a_2xx_is_no_mystery() -> None:
    """A readable 2xx without an id, before the body was out: nothing is stored."""
    assert judged(attempt(200, {"code": 20012}, sent_all=False)).blame is Blame.NOT_NOW


@pytest.mark.parametrize(
    ("status", "blame"),
    [
        (401, Blame.ACCOUNT),
        (302, Blame.ACCOUNT),
        (429, Blame.NOT_NOW),
        (200, Blame.UNKNOWN),
        (502, Blame.UNKNOWN),
    ],
)
def test_a_cut_answer_is_judged_by_its_status(status: int, blame: Blame) -> None:
    """The status line says enough, except for a success, which needs the id whole."""
    assert judged(attempt(status, OK_BODY, trouble=Trouble.CUT)).blame is blame


def test_a_cut_refusal_is_no_refusal() -> None:
    """Half a JSON object is no documented refusal."""
    assert judged(attempt(400, b'{"code": 20071, "mess', trouble=Trouble.CUT)).blame is Blame.UNKNOWN


@pytest.mark.parametrize(
    ("trouble", "blame"),
    [(Trouble.RESET, Blame.FILE), (Trouble.ABORTED, Blame.NOT_NOW), (Trouble.STALLED, Blame.NOT_NOW)],
)
def test_a_refusal_while_the_body_was_going_out(trouble: Trouble, blame: Blame) -> None:
    """Services refuse early and close; but a body that we left unfinished may be refused for just that."""
    assert judged(attempt(400, NAMED, sent_all=False, trouble=trouble)).blame is blame


RATES = (
    "Rate limit reached|rate_limit_exceeded|RPM limit exceeded|3 requests per minute|Too many requests"
    "|请求过于频繁，请稍后再试|触发限流策略"
)
MONEY = (
    "You exceeded your current quota, check your plan and billing details|insufficient_quota"
    "|Insufficient credits|Billing hard limit has been reached|the account is in arrears"
    "|账户余额不足|您的账号已欠费|免费额度已用完"
)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 415, 422, 451])
@pytest.mark.parametrize(
    ("text", "reason"),
    [(text, "rate_limited") for text in RATES.split("|")] + [(text, "balance") for text in MONEY.split("|")],
)
def test_what_speaks_of_rates_or_money_is_never_the_files(status: int, text: str, reason: str) -> None:
    """Whatever the status and the code, those of size apart."""
    for body in ({"message": text}, {"code": 20012, "message": text}, {"detail": text}, text):
        verdict = judged(attempt(status, body))
        assert (verdict.reason, verdict.rate_limited) == (reason, reason == "rate_limited")
    for code in (20069, 20074, 20087):
        assert judged(attempt(400, {"code": code, "message": text})).blame is Blame.FILE
    assert judged(attempt(413, {"message": text})).blame is Blame.DOUBTED
    assert judged(attempt(429, {"message": text})).rate_limited


@pytest.mark.parametrize(
    "text",
    [
        "exceeds the size limit",
        "limit exceeded: file too large",
        "too many lines",
        "The batch file contains too many requests (6000 > 5000)",
        "unbalanced quotation marks in line 3",
        "文件大小超出限制",
        "第3行 frequency_penalty 频率惩罚 错误",
    ],
)
def test_what_speaks_of_the_file_is_doubted(text: str) -> None:
    """Words of size and of content are not those of the account."""
    assert judged(attempt(400, {"message": text})).blame is Blame.DOUBTED


@pytest.mark.parametrize(
    ("a", "could_be"),
    [
        (attempt(sent_all=False, trouble=Trouble.RESET), True),
        (attempt(sent_all=False, trouble=Trouble.CUT), True),
        (attempt(sent_all=True, trouble=Trouble.RESET), False),
        (attempt(sent_all=False, trouble=Trouble.STALLED), False),
        (attempt(sent_all=False, trouble=Trouble.ABORTED), False),
        (attempt(sent_all=False, trouble=Trouble.CONNECT), False),
        (attempt(413, HTML, sent_all=False), True),
        (attempt(400, b"", sent_all=False), True),
        (attempt(413, HTML), False),
        (attempt(413, HTML, sent_all=False, trouble=Trouble.STALLED), False),
        (attempt(429, b"", sent_all=False), False),
        (attempt(502, HTML, sent_all=False), False),
        (attempt(503, OVERLOADED, sent_all=False), False),
    ],
)
def test_failures_that_could_be_the_files(a: Attempt, could_be: bool) -> None:  # noqa: FBT001
    """Cut while it was sent, or refused in place of the service; no timeout, overload or lost answer."""
    verdict = judged(a)
    assert verdict.could_be_the_file is could_be
    assert verdict.blame is Blame.NOT_NOW or not could_be


# ── what the verdict tells ─────────────────────────────────────────────────────────────────────────────────


def test_a_doubted_refusal_promises_nothing() -> None:
    """Its sentence stands in the report as well, when the file has failed and is not sent again."""
    doubted = judged(attempt(400, {"code": 1, "message": "no"}))
    assert doubted.blame is Blame.DOUBTED
    assert doubted.detail == f'{HOST} refuses this file (HTTP 400) (1: "no")'


def test_acceptance_gives_the_file_object() -> None:
    """The object comes from under `data`, or from the top level of a gateway's answer."""
    assert judged(attempt(200, OK_BODY, trace_id="t-1")).data == OK_BODY["data"]
    assert judged(attempt(200, OK_BODY, trace_id="t-1")).trace_id == "t-1"
    assert judged(attempt(200, {"id": "file-1", "bytes": 3})).data == {"id": "file-1", "bytes": 3}


def test_code_and_message_are_told() -> None:
    """Code and message explain a refusal, in their own fields and in the sentence."""
    verdict = judged(attempt(400, {"code": "20071", "message": "bad line 3"}))
    assert (verdict.code, verdict.message) == (20071, "bad line 3")
    assert '20071: "bad line 3"' in verdict.detail
    assert judged(attempt(422, {"detail": [{"msg": "no"}]})).message == '[{"msg": "no"}]'
    assert judged(attempt(400, {"error": "no"})).message == "no"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"code": 20012, "message": "line 3"}, {"code": 20012, "message": "line 41"}, True),
        ("no (request 1f-00a2)", "no (request c3)", True),
        ({"code": 20012, "message": "x"}, {"code": 20015, "message": "x"}, False),
        ({"message": "x"}, {"message": "y"}, False),
        ({}, {"message": "y"}, False),
        ({"message": "第3行"}, {"message": "第4列"}, False),
    ],
)
def test_words_of_refusals(one: object, other: object, same: bool) -> None:  # noqa: FBT001
    """Ids and numbers make no difference; an upload's words are comparable with a listing's."""
    first, second = words(judged(attempt(400, one))), words(judged(attempt(400, other)))
    assert (first == second) is same
    assert first != words(judged(attempt(422, one)))
    assert first == words(judge_listing(attempt(400, one), host=HOST, reached_before=True, wall=WALL))


def test_401_names_the_host_and_both_sites() -> None:
    """A key of the other site is the common cause: the sentence says where to look."""
    detail = judged(attempt(401, "Api key is invalid")).detail
    assert detail == (
        'api.siliconflow.cn does not accept the API key ("Api key is invalid"); '
        "the .cn and .com sites have separate accounts: check base_url and the key"
    )


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("https://elsewhere.example/login", "elsewhere.example"),
        ("/v2/files", "another path"),
        ("http://[::1", "cannot be read"),
    ],
)
def test_a_redirect_names_where_to(location: str, words: str) -> None:
    """The host of Location is told; one that can't be parsed is no reason to fail."""
    assert words in judged(attempt(302, location=location)).detail


def test_a_page_is_quoted_by_its_title() -> None:
    """Of a proxy's page a person needs the title, not the markup."""
    assert judged(attempt(413, HTML)).message == "413 Request Entity Too Large"
    assert judged(attempt(502, b"<!doctype html><p>x")).message is None


def test_foreign_text_is_made_harmless() -> None:
    """Control, bidi and line-separating characters are escaped, and everything is bounded."""
    nasty = "a\x1b[31m\u202eevil\u2028\x85\ud800" + "x" * 10_000
    verdict = judged(attempt(400, {"message": nasty}, trace_id="t\r\nx"))
    assert verdict.message is not None
    assert verdict.message.startswith(r"a\x1b[31m\u202eevil\u2028\x85\ud800xx")
    assert len(verdict.message) <= 500
    assert len(verdict.detail) <= 500
    assert verdict.trace_id == r"t\r\nx"


def test_an_echoed_key_is_not_passed_on() -> None:
    """Services quote the key that they refuse; it must not reach a log."""
    verdict = judged(attempt(401, {"message": "Incorrect API key: sk-abcdefghijklmnop (Bearer s3cr3t-s3cr3t)"}))
    assert "abcdefgh" not in f"{verdict}"
    assert "s3cr3t" not in f"{verdict}"


@pytest.mark.parametrize(
    ("retry_after", "date", "expected"),
    [
        ("17", None, 17.0),
        (" 1.5 ", None, 1.5),
        ("9" * 5000, None, 86400.0),
        ("-3", None, None),
        ("soon", None, None),
        ("nan", None, None),
        (None, None, None),
        ("Tue, 11 Mar 2025 09:30:26 GMT", None, 30.0),
        ("Tue, 11 Mar 2025 09:30:26 GMT", "Tue, 11 Mar 2025 09:30:16 GMT", 10.0),
        ("Tue, 11 Mar 2025 09:30:26 GMT", "Tue, 11 Mar 2025 09:40:16 GMT", 0.0),
        ("Tue, 11 Mar 2025 09:30:26 GMT", "nonsense", 30.0),
    ],
)
def test_retry_after(retry_after: str | None, date: str | None, expected: float | None) -> None:
    """Seconds, or a date by the service's own clock where it tells it, else by ours; bounded."""
    answer = Answer(429, b"", retry_after=retry_after, date=date)
    assert judged(Attempt(True, 1, "d", answer, None, "", 0.0)).retry_after_s == expected


def test_every_reason_is_one_of_the_set() -> None:
    """Scripts may rely on the reasons: the table uses what `Reason` lists, and all of it."""
    used = {reason for *_, reason in ANSWERS} | {reason for *_, reason in TROUBLES}
    assert used | {"listed", "no_listing"} == set(Reason)


# ── whatever comes ─────────────────────────────────────────────────────────────────────────────────────────

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
envelopes = st.fixed_dictionaries(
    {},
    optional={
        "code": st.sampled_from([20000, 20067, 20079, 30001, 50505, "20000", None, True, 10**30]) | json_values,
        "message": st.text() | json_values,
        "status": st.booleans() | json_values,
        "id": st.text() | json_values,
        "data": st.fixed_dictionaries({}, optional={"id": st.text(), "data": st.lists(json_values)})
        | json_values,
        "error": json_values,
    },
)
bodies = (
    st.binary(max_size=200)
    | envelopes.map(lambda e: json.dumps(e).encode())
    | json_values.map(lambda v: json.dumps(v, ensure_ascii=False).encode(errors="surrogatepass"))
)
statuses = st.sampled_from([200, 201, 302, 400, 401, 403, 408, 413, 422, 429, 499, 502, 503]) | st.integers(
    -1, 1000
)
headers = st.none() | st.text(max_size=40)
answers = st.builds(
    Answer,
    status=statuses,
    body=bodies,
    retry_after=headers,
    trace_id=headers,
    date=headers,
    location=headers,
    content_type=headers,
)
attempts = st.builds(
    Attempt,
    sent_all=st.booleans(),
    sent=st.integers(0, 10**12),
    sha256=st.none(),
    answer=st.none() | answers,
    trouble=st.none() | st.sampled_from(Trouble),
    detail=st.text(max_size=300),
    duration_s=st.floats(0, 100),
)


@given(attempts, st.booleans())
def test_whatever_comes_is_judged(a: Attempt, reached: bool) -> None:  # noqa: FBT001
    """No answer raises; what condemns, accepts or leaves unknown is bounded; texts are safe to print."""
    verdict = judge(a, host=HOST, reached_before=reached, wall=WALL)
    status = a.answer.status if a.answer else 0
    assert verdict.blame not in {Blame.FILE, Blame.DOUBTED} or status in FILE_STATUSES
    assert words(verdict) == words(verdict).strip()
    assert (verdict.data is not None) == (verdict.blame is Blame.ACCEPTED)
    if verdict.blame is Blame.ACCEPTED:
        assert a.sent_all
        assert a.trouble is None
        assert 200 <= status <= 299
        assert verdict.data is not None
        assert verdict.data["id"].strip()
    if verdict.blame is Blame.UNKNOWN:
        assert a.sent_all or 200 <= status <= 299
    assert verdict.reason in set(Reason)
    assert_harmless(verdict)


@given(attempts)
def test_whatever_comes_a_listing_is_judged(a: Attempt) -> None:
    """A listing condemns no file and leaves nothing unknown; there is one, or it is not to be had, or later."""
    verdict = judge_listing(a, host=HOST, reached_before=True, wall=WALL)
    assert verdict.blame in {Blame.ACCEPTED, Blame.NOT_NOW, Blame.ACCOUNT}
    assert (verdict.reason in {"listed", "no_listing"}) == (verdict.blame is Blame.ACCEPTED)
    assert (verdict.data is not None) == (verdict.reason == "listed")
    assert_harmless(verdict)


def assert_harmless(verdict: Verdict) -> None:
    for text in (verdict.detail, verdict.message or "", verdict.trace_id or ""):
        assert len(text) <= 500
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert verdict.retry_after_s is None or 0 <= verdict.retry_after_s <= 86400


@given(st.text(), st.integers(1, 300))
def test_printable_is_bounded_and_stable(text: str, limit: int) -> None:
    """What was made printable once is not altered again."""
    once = printable(text, limit)
    assert len(once) <= limit
    assert printable(once, limit) == once


def test_spaces_of_other_scripts_stay() -> None:
    """They steer nothing, also beside a character that does."""
    assert printable("a\u3000b\u00a0c", 9) == "a\u3000b\u00a0c"
    assert printable("a\u3000b\x1b", 9) == "a\u3000b\\x1b"


@given(st.binary(max_size=300))
@example(b'{"a": NaN, "b": -Infinity, "c": 1e999}')
@example(b'{"a": ' + b"9" * 5000 + b"}")
def test_json_that_was_read_can_be_written(body: bytes) -> None:
    """Whatever is kept of an answer can be published as strict JSON."""
    json.dumps(read_json(body), allow_nan=False)


@given(st.text())
def test_dates_never_raise(text: str) -> None:
    """A header that is no date is no date."""
    assert http_date(text) is None or isinstance(http_date(text), float)


# ── listings ───────────────────────────────────────────────────────────────────────────────────────────────

LISTING: dict[str, Any] = {"code": 20000, "status": True, "data": {"data": [], "object": "file"}}


@pytest.mark.parametrize(
    ("status", "body", "blame", "reason"),
    [
        (200, LISTING, Blame.ACCEPTED, "listed"),
        (200, {"data": [], "object": "list"}, Blame.ACCEPTED, "listed"),
        (200, {**LISTING, "status": False}, Blame.NOT_NOW, "odd_success"),
        (200, {**LISTING, "code": 50505}, Blame.NOT_NOW, "overloaded"),
        (200, {"code": 50505}, Blame.NOT_NOW, "overloaded"),
        (200, {"code": 20000}, Blame.NOT_NOW, "unreadable_answer"),
        (200, HTML, Blame.NOT_NOW, "unreadable_answer"),
        (404, b"", Blame.ACCEPTED, "no_listing"),
        (405, b"", Blame.ACCEPTED, "no_listing"),
        (501, b"", Blame.ACCEPTED, "no_listing"),
        (400, NAMED, Blame.ACCEPTED, "no_listing"),
        (400, {"code": 20067}, Blame.ACCOUNT, "settings"),
        (400, {"message": "no such parameter"}, Blame.ACCEPTED, "no_listing"),
        (400, NO_BALANCE, Blame.ACCOUNT, "balance"),
        (400, HTML, Blame.NOT_NOW, "odd_refusal"),
        (401, "Invalid token", Blame.ACCOUNT, "unauthorized"),
        (403, HTML, Blame.ACCOUNT, "intermediary"),
        (429, b"", Blame.NOT_NOW, "rate_limited"),
        (403, RPM, Blame.NOT_NOW, "rate_limited"),
        (502, b"", Blame.NOT_NOW, "server_error"),
        (503, OVERLOADED, Blame.NOT_NOW, "overloaded"),
    ],
)
def test_listings(status: int, body: object, blame: Blame, reason: str) -> None:
    """A listing proves that the key works, or says why not; an absent one proves that the service answers."""
    verdict = judge_listing(attempt(status, body), host=HOST, reached_before=True, wall=WALL)
    assert (verdict.blame, verdict.reason) == (blame, reason)
    assert verdict.rate_limited == (reason == "rate_limited")
    assert "the file" not in verdict.detail
    if blame is Blame.NOT_NOW:
        assert verdict.detail.startswith(f"the listing of {HOST} failed: HTTP {status}")


def test_a_listing_that_broke_off_is_asked_for_again() -> None:
    """Nothing of a file is in a listing, so its loss leaves nothing unknown."""
    for trouble in (Trouble.RESET, Trouble.STALLED, Trouble.CUT):
        lost = attempt(trouble=trouble)
        verdict = judge_listing(lost, host=HOST, reached_before=True, wall=WALL)
        assert (verdict.blame, verdict.could_be_the_file) == (Blame.NOT_NOW, False)
        assert verdict.detail.startswith(f"the listing of {HOST} failed: ")
        assert "file" not in verdict.detail
    cut = judge_listing(attempt(200, LISTING, trouble=Trouble.CUT), host=HOST, reached_before=True, wall=WALL)
    assert cut.blame is Blame.NOT_NOW


# ── how long to wait ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("failures", "luck", "retry_after_s", "expected"),
    [
        (1, 0.0, None, 0.5),
        (1, 0.5, None, 0.75),
        (3, 0.0, None, 2.0),
        (10**9, 0.0, None, 150.0),
        (0, 0.0, None, 0.5),
        (-5, 0.0, None, 0.5),
        (1, 0.0, 60.0, 60.0),
        (1, 0.0, 1e6, 300.0),
        (9, 0.0, 1.0, 128.0),
    ],
)
def test_backoff(failures: int, luck: float, retry_after_s: float | None, expected: float) -> None:
    """Pauses double from the first to the longest; Retry-After is a lower bound with the same cap."""
    pause = backoff_s(failures, first_s=1.0, longest_s=300.0, luck=luck, retry_after_s=retry_after_s)
    assert pause == expected


@given(
    st.integers(), st.floats(0.001, 60), st.floats(0.001, 86400), st.floats(0, 1, exclude_max=True),
    st.none() | st.floats(0, 1e9),
)  # fmt: skip
def test_backoff_is_bounded(
    failures: int, first_s: float, longest_s: float, luck: float, retry_after_s: float | None
) -> None:
    """Never longer than the longest, never none at all, never shorter than asked for within the bound."""
    pause = backoff_s(failures, first_s=first_s, longest_s=longest_s, luck=luck, retry_after_s=retry_after_s)
    assert min(first_s, longest_s) / 2 <= pause <= longest_s
    assert pause >= min(retry_after_s or 0.0, longest_s)


# ── what to be called ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("requests.jsonl", "requests.jsonl"),
        ("REQ.JSONL", "REQ.jsonl"),
        ("a/b.jsonl", "b.jsonl"),
        ("a/", "_.jsonl"),
        ("", "_.jsonl"),
        (".jsonl", "_.jsonl"),
        ("batch", "batch.jsonl"),
        ("batch.ndjson", "batch.ndjson.jsonl"),
        ("请求 é.jsonl", "请求 é.jsonl"),
        ("e\u0301.jsonl", "e\u0301.jsonl"),
        ("a\"b'c\\d.jsonl", "a_b_c_d.jsonl"),
        ("a\r\nX: y\x00\x7f\x85.jsonl", "a__X: y___.jsonl"),
        ("caf\udce9.jsonl", "caf_.jsonl"),
        ("a\u202egpj\u2028.jsonl", "a_gpj_.jsonl"),
        ("\ufeffa.jsonl", "_a.jsonl"),
        ("  a .jsonl", "__a .jsonl"),
        ("\u3000\u00a0a.jsonl", "__a.jsonl"),
        ("100%.jsonl", "100%.jsonl"),
        ("a%22; b.jsonl", "a_22; b.jsonl"),
        ("=?utf-8?q?a?=.jsonl", "_?utf-8?q?a?=.jsonl"),
        ("x" * 300, "x" * 249 + ".jsonl"),
        ("é" * 124 + ".jsonl", "é" * 124 + ".jsonl"),
        ("é" * 125 + ".jsonl", "é" * 124 + ".jsonl"),
    ],
)
def test_remote_name(name: str, expected: str) -> None:
    """What parsers read differently becomes "_"; everything else stays as it is."""
    assert remote_name(name, tag=None) == expected


def test_a_tag_goes_before_the_suffix() -> None:
    """The stem is cut to 64 bytes of whole characters, so that services that cut names keep the tag."""
    assert remote_name("a.jsonl", tag="0123456789ab") == "a-0123456789ab.jsonl"
    assert remote_name("aé" * 40 + ".jsonl", tag="0123456789ab") == "aé" * 21 + "a-0123456789ab.jsonl"


def test_the_tag_is_of_the_claim_the_name_the_time_and_the_content() -> None:
    """Each part preceded by its length, so that no two files share the bytes that are hashed."""
    one = ("f-1", "a/b.jsonl", 1, "ab")
    said = b"9:sfwatch-13:f-19:a/b.jsonl1:12:ab"
    assert tag_of(*one) == hashlib.sha256(said).hexdigest()[:12]
    assert len({tag_of(*one), tag_of("f-", "1a/b.jsonl", 1, "ab"), tag_of("f-1", "a/b.jsonl", 11, "b")}) == 3
    assert re.fullmatch("[0-9a-f]{12}", tag_of("f-1", "caf\udce9", -1, ""))


file_names = st.binary(max_size=300).map(lambda raw: raw.decode(errors="surrogateescape")) | st.text(
    max_size=300
)


@given(file_names, st.none() | st.just("0123456789ab"))
def test_remote_names_are_safe(name: str, tag: str | None) -> None:
    """Valid UTF-8 of bounded length, one suffix, nothing that ends or escapes a quoted string."""
    remote = remote_name(name, tag=tag)
    assert len(remote.encode()) <= 255
    assert remote.endswith(".jsonl")
    assert not re.search("[\x00-\x1f\x7f-\x9f\"'/\\\\]", remote)
    assert remote_name(remote, tag=None) == remote


@given(file_names)
def test_parsers_read_the_name_that_was_sent(name: str) -> None:
    """Multipart parsers that nobody here wrote find the very name between the quotes."""
    remote = remote_name(name, tag=None)
    disposition = f'form-data; name="file"; filename="{remote}"'
    body = f"--b\r\nContent-Disposition: {disposition}\r\n\r\nx\r\n--b--\r\n".encode()
    parser = MultiPartParser(stream_factory=lambda *_, **__: io.BytesIO())
    assert parser.parse(io.BytesIO(body), b"b", None)[1]["file"].filename == remote
    assert parse_options_header(disposition.encode())[1][b"filename"] == remote.encode()

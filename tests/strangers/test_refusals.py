"""A7: a refusal condemns a file only where there is evidence that it is the file's, and not the account's."""

import itertools
from typing import Any

import pytest
from strangers.installation import Daemon, Site, batch, digest
from strangers.service import HTML, Answer, Service, Upload

FILES = 8


def openai(message: str, code: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def vendor(code: int, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "data": None}


BILLING = Answer(400, openai("Billing hard limit has been reached", "billing_hard_limit_reached"))
ARREARS = Answer(400, vendor(20099, "账户已欠费，请充值后重试"))
BAD_LINE = Answer(400, vendor(20071, "line 2 is not valid"))
NO_KEY = Answer(400, openai("Authentication Error, Invalid proxy server token passed", "400", "auth_error"))

OF_THE_ACCOUNT = {
    "billing limit": (BILLING, "balance"),
    "arrears": (ARREARS, "balance"),
    "unknown code": (Answer(400, vendor(20999, "request was rejected")), "refuses_all"),
    "no code": (Answer(400, openai("This organization may not use the Files API")), "refuses_all"),
    "FastAPI, 422": (Answer(422, {"detail": "Uploads are not open to this project"}), "refuses_all"),
    "413": (Answer(413, {"detail": "The storage of this project is full"}), "refuses_all"),
    "415": (Answer(415, {"detail": "Not for this project"}), "refuses_all"),
}


class Account:
    """Refuses everything for as long as it is not well, and these files always."""

    def __init__(self, service: Service) -> None:
        self.refusal: Answer | None = None
        self.refusals: dict[str, Answer] = {}
        self.refused = 0
        self._service = service
        service.on_upload = self._upload

    def _upload(self, upload: Upload) -> Answer | None:
        answer = self.refusals.get(upload.digest, self.refusal)
        self.refused += answer is not None
        return answer

    def refuses_listings_too(self) -> None:
        self._service.on_listing = lambda _: self.refusal


@pytest.fixture(name="account")
def _account(service: Service) -> Account:
    return Account(service)


@pytest.fixture(name="daemon")
def _daemon(site: Site) -> Daemon:
    """It has uploaded a file, larger than all that come; a doubted file waits for a second and a bit."""
    site.configure("a", first_retry="20ms", longest_retry="1s")
    daemon = site.start()
    site.drop("first.jsonl", batch("first", lines=10))
    daemon.until(site.done)
    return daemon


def drop_all(site: Site) -> list[str]:
    return [site.drop(f"{n}.jsonl", batch(f"file {n}")) for n in range(FILES)]


def all_end_well(service: Service, site: Site, daemon: Daemon, digests: list[str]) -> None:
    daemon.until(lambda: len(site.done()) == 1 + len(digests))
    assert site.failed() == []
    assert daemon.said("file.failed") == []
    assert [service.copies(digest) for digest in digests] == [1] * len(digests)


@pytest.mark.parametrize(("refusal", "reason"), OF_THE_ACCOUNT.values(), ids=OF_THE_ACCOUNT.keys())
def test_an_account_that_refuses_everything_costs_no_file(
    service: Service, site: Site, account: Account, daemon: Daemon, refusal: Answer, reason: str
) -> None:
    """The target is held, with a reason; when the account is well again all files are done."""
    account.refusal = refusal
    digests = drop_all(site)
    daemon.until(lambda: daemon.said("target.held"))
    tried = account.refused
    daemon.until(lambda: account.refused > tried)
    assert site.failed() == []
    account.refusal = None
    all_end_well(service, site, daemon, digests)
    assert [e["reason"] for e in daemon.said("target.held")] == [reason]
    assert [e["reason"] for e in daemon.said("target.resumed")] == [reason]


def test_words_that_differ_by_a_number_are_the_same_words(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """As with ids of requests in the message."""
    numbers = itertools.count(1000)
    service.on_upload = lambda _: Answer(400, openai(f"Request {next(numbers)} was rejected"))
    digests = drop_all(site)
    daemon.until(lambda: daemon.said("target.held", reason="refuses_all"))
    service.on_upload = lambda _: None
    all_end_well(service, site, daemon, digests)


LOOKED_UP = {
    f"{status}, {'stored' if stores else 'not stored'}": Answer(status, HTML, stores=stores)
    for status in (400, 413, 422)
    for stores in (True, False)
}


@pytest.mark.parametrize("refusal", LOOKED_UP.values(), ids=LOOKED_UP.keys())
def test_a_refusal_in_html_after_the_whole_file_is_looked_up(
    service: Service, site: Site, daemon: Daemon, refusal: Answer
) -> None:
    """Whoever says it, it is not the service: it tells nothing of what the service has."""
    service.on_upload = lambda upload: refusal if service.tries(upload.digest) == 1 else None
    file = site.drop("x.jsonl", batch("x"))
    daemon.until(lambda: "x.jsonl" in site.done())
    assert service.tries(file) == (1 if refusal.stores else 2)
    assert {site.done()["x.jsonl"]} == service.ids(file)
    assert site.failed() == []


def test_a_rate_limit_told_as_400_costs_no_file(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """It is tried again until the service takes it."""
    account.refusal = Answer(400, vendor(20099, "Rate limit reached for requests per minute"))
    digests = drop_all(site)
    daemon.until(lambda: account.refused > 4)
    account.refusal = None
    all_end_well(service, site, daemon, digests)


def test_a_key_that_is_refused_with_400_holds_the_target(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """For uploads and listings alike, as LiteLLM does it."""
    account.refuses_listings_too()
    account.refusal = NO_KEY
    digests = drop_all(site)
    daemon.until(lambda: daemon.said("target.held"))
    assert [e["reason"] for e in daemon.said("target.held")] == ["unauthorized"]
    account.refusal = None
    all_end_well(service, site, daemon, digests)


def test_check_online_finds_a_key_that_is_refused_with_400(
    service: Service, site: Site, account: Account
) -> None:
    """It says no, in the service's own words."""
    account.refuses_listings_too()
    account.refusal = NO_KEY
    checked = site.run("check", "--online")
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "Invalid proxy server token" in checked.stdout + checked.stderr
    account.refusal = None
    well = site.run("check", "--online")
    assert well.returncode == 0, well.stdout + well.stderr


def test_a_refusal_that_speaks_of_the_file_condemns_it(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """At once, with a report; the others are done."""
    bad = site.drop("bad.jsonl", batch("bad!!!"))
    account.refusals[bad] = BAD_LINE
    daemon.until(lambda: daemon.said("file.failed", file="bad.jsonl", reason="refused"))
    digests = drop_all(site)
    daemon.until(lambda: len(site.done()) == 1 + FILES)
    assert site.failed() == ["bad.jsonl"]
    assert (site.root / "a" / "failed" / "bad.jsonl.error.json").exists()
    assert service.tries(bad) == 1
    assert [service.copies(digest) for digest in digests] == [1] * FILES


def test_a_refusal_that_speaks_of_the_file_is_not_believed_of_file_after_file(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """Two may be bad; from the third on it may be the account, and they wait until it is known."""
    account.refusal = Answer(400, vendor(20012, "Bad request"))
    digests = drop_all(site)
    daemon.until(lambda: daemon.said("target.held"))
    assert len(site.failed()) <= 2
    account.refusal = None
    daemon.until(lambda: len(site.done()) + len(site.failed()) == 1 + FILES)
    assert len(site.failed()) <= 2
    assert max(service.copies(digest) for digest in digests) == 1


def test_an_unknown_refusal_condemns_a_file_after_three_with_others_accepted_between(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """The same words three times, and each time the service took another file meanwhile."""
    bad = digest(batch("bad"))
    account.refusals[bad] = Answer(400, vendor(20999, "rejected"))
    site.drop("bad.jsonl", batch("bad"))
    daemon.until(lambda: service.tries(bad))

    def accept_another(number: int) -> None:
        """One more good file is done, and then the bad one is tried again."""
        good, tries = f"good-{number}.jsonl", service.tries(bad)
        site.drop(good, batch(good))
        daemon.until(lambda: good in site.done())
        daemon.until(lambda: service.tries(bad) > tries or site.failed())

    for number in range(FILES):
        if not site.failed():
            accept_another(number)
    daemon.until(lambda: daemon.said("file.failed", file="bad.jsonl", reason="refused"))
    # Refusals that no other file came between count once.
    rows = [is_bad for is_bad, _ in itertools.groupby(upload.digest == bad for upload in service.uploads)]
    assert 3 <= rows.count(True) <= 4
    assert daemon.said("target.held") == []


def test_an_unknown_refusal_of_a_file_that_is_alone_condemns_nothing(
    service: Service, site: Site, account: Account, daemon: Daemon
) -> None:
    """It waits, is tried again with growing pauses, and is done when the service takes it."""
    refusal = Answer(400, vendor(20999, "rejected"))
    account.refusal = refusal
    bad = site.drop("bad.jsonl", batch("bad"))
    daemon.until(lambda: service.tries(bad) >= 3 or site.failed())
    assert site.failed() == []
    assert daemon.said("file.failed") == []
    account.refusal = None
    all_end_well(service, site, daemon, [bad])

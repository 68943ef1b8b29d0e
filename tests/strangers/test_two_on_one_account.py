"""A3: two who upload to one account never take each other's ids, however alike their files are.

The files have one name, one size and one number of lines; only their bytes differ.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from strangers.installation import Site, a_site, batch
from strangers.service import Answer, Lost, Service, Upload

ONE, TWO = batch("one"), batch("two")

each_loss = pytest.mark.parametrize(
    "lost", [Lost(stores=False), Lost(stores=True)], ids=["not stored", "stored"]
)


@pytest.fixture(name="other")
def _other(tmp_path: Path, service: Service) -> Iterator[Site]:
    """Another state folder on the same account."""
    with a_site(tmp_path / "other", service.port) as site:
        yield site


def loses_first_answer(service: Service, lost: Lost, *, until: Callable[[], object] | None = None) -> None:
    """The first answer to TWO is lost; that to ONE comes when `until` has come true."""

    def meet(upload: Upload) -> Answer | Lost:
        if upload.content == TWO and service.tries(upload.digest) == 1:
            return lost
        return Answer(200, stores=True, once=until if upload.content == ONE else None)

    service.on_upload = meet


def own_ids(service: Service, *files: tuple[Site, str, str]) -> None:
    """Each file was stored once, and has the id that the service gave to its bytes."""
    for site, inbox, digest in files:
        assert service.copies(digest) == 1
        assert {site.done(inbox)["x.jsonl"]} == service.ids(digest)
        assert site.failed(inbox) == []


@each_loss
def test_a_lost_answer_is_not_taken_from_another_state_folder(
    service: Service, site: Site, other: Site, lost: Lost
) -> None:
    """One after the other, by `once`."""
    loses_first_answer(service, lost)
    one, two = site.drop("x.jsonl", ONE), other.drop("x.jsonl", TWO)
    for each in (site, other):
        ended = each.run("once")
        assert ended.returncode == 0, ended.stdout + ended.stderr
    own_ids(service, (site, "a", one), (other, "a", two))


@each_loss
def test_a_lost_answer_is_not_taken_from_another_daemon(
    service: Service, site: Site, other: Site, lost: Lost
) -> None:
    """At the same time; the other's file is stored, and its answer is still on the way."""
    loses_first_answer(service, lost, until=other.done)
    daemon, second = site.start(), other.start()
    one = site.drop("x.jsonl", ONE)
    daemon.until(lambda: service.copies(one))
    two = other.drop("x.jsonl", TWO)
    second.until(other.done)
    daemon.until(site.done)
    own_ids(service, (site, "a", one), (other, "a", two))


@each_loss
def test_a_lost_answer_is_not_taken_from_another_inbox_with_a_key_of_its_own(
    service: Service, site: Site, lost: Lost
) -> None:
    """Two keys of one account are two targets, and one listing."""
    loses_first_answer(service, lost, until=lambda: site.done("b"))
    site.configure("a", "b", keys={"a": "sk-a", "b": "sk-b"})
    daemon = site.start()
    one = site.drop("x.jsonl", ONE, inbox="a")
    daemon.until(lambda: service.copies(one))
    two = site.drop("x.jsonl", TWO, inbox="b")
    daemon.until(lambda: site.done("a") and site.done("b"))
    own_ids(service, (site, "a", one), (site, "b", two))

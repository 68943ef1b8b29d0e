"""A5: a page of a listing is neither the whole listing nor its end."""

from dataclasses import dataclass

import pytest
from strangers.installation import Daemon, Site, batch
from strangers.service import Lost, Service, Upload


@dataclass(frozen=True)
class Habit:
    """How a service lists."""

    page: int
    largest_limit: int | None

    def of(self, service: Service) -> None:
        service.page, service.largest_limit = self.page, self.largest_limit


HABITS = {
    "20 a page": Habit(page=20, largest_limit=100),
    "100 a page": Habit(page=100, largest_limit=100),
    "any limit": Habit(page=10_000, largest_limit=None),
}
each_habit = pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS.keys())


def loses_first_answer(service: Service, *, stored: bool, then_others: int = 0) -> None:
    """The first answer to `lost.jsonl` is lost; then somebody else uploads as many files at once."""

    def meet(upload: Upload) -> Lost | None:
        if not upload.name.startswith("lost") or service.tries(upload.digest) > 1:
            return None
        if stored:
            service.store(upload)
        service.others_store(then_others)
        return Lost(stores=False)

    service.on_upload = meet


def first_is_done(site: Site, daemon: Daemon) -> None:
    """An upload is accepted, so that it is known that listings show what was accepted."""
    site.drop("first.jsonl", batch("first"))
    daemon.until(site.done)


def is_sent_once(service: Service, site: Site, daemon: Daemon) -> None:
    lost = site.drop("lost.jsonl", batch("lost"))
    daemon.until(lambda: "lost.jsonl" in site.done())
    assert service.tries(lost) == 1
    assert {site.done()["lost.jsonl"]} == service.ids(lost)


@each_habit
@pytest.mark.parametrize("others", [30, 250])
def test_a_lost_file_on_a_later_page_is_found(service: Service, site: Site, habit: Habit, others: int) -> None:
    """Others have uploaded so much that no first page shows it. Nothing was accepted before."""
    habit.of(service)
    loses_first_answer(service, stored=True, then_others=others)
    is_sent_once(service, site, site.start())


@pytest.mark.parametrize("habit", [HABITS["20 a page"]], ids=["20 a page"])
def test_a_lost_file_on_a_later_page_is_found_after_an_acceptance(
    service: Service, site: Site, habit: Habit
) -> None:
    """What was accepted is on a later page as well."""
    habit.of(service)
    daemon = site.start()
    first_is_done(site, daemon)
    loses_first_answer(service, stored=True, then_others=50)
    is_sent_once(service, site, daemon)


@each_habit
@pytest.mark.parametrize("files", [100, 1000])
def test_a_lost_file_that_was_not_stored_is_sent_again_to_an_account_with_a_round_number_of_files(
    service: Service, site: Site, habit: Habit, files: int
) -> None:
    """A listing as long as its limit has an end, too."""
    habit.of(service)
    service.others_store(files - 1)
    daemon = site.start()
    first_is_done(site, daemon)
    assert len(service.stored) == files
    loses_first_answer(service, stored=False)
    lost = site.drop("lost.jsonl", batch("lost"))
    daemon.until(lambda: "lost.jsonl" in site.done())
    assert (service.tries(lost), service.copies(lost)) == (2, 1)
    assert {site.done()["lost.jsonl"]} == service.ids(lost)


@pytest.mark.parametrize("files", [100, 1000])
def test_a_lost_file_that_was_stored_is_found_in_an_account_with_a_round_number_of_files(
    service: Service, site: Site, files: int
) -> None:
    """It is the last of the last page."""
    HABITS["20 a page"].of(service)
    loses_first_answer(service, stored=True, then_others=files - 1)
    is_sent_once(service, site, site.start())
    assert len(service.stored) == files

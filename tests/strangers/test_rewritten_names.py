"""A6: a service that keeps files under other names than they were sent with is sent none of them twice."""

from collections.abc import Callable

import pytest
from strangers.installation import Site, batch
from strangers.service import Lost, Service, Upload, cut_to, underscores

NAMES = {
    "blanks": "run 7 of 12.jsonl",
    "not ASCII": "评测-数据.jsonl",
    "both": "Ergebnisse für März (2).jsonl",
    "long": "x" * 200 + ".jsonl",
    "long, not ASCII": "评测" * 40 + ".jsonl",
}
HABITS: dict[str, tuple[Callable[[str], str], tuple[str, ...]]] = {
    "underscores": (underscores, ("blanks", "not ASCII", "both")),
    "cut to 100": (cut_to(100), ("long",)),
    "cut to 64": (cut_to(64), ("long, not ASCII",)),
    "lower case": (str.lower, ("both",)),
}
CASES = [
    pytest.param(renames, NAMES[kind], id=f"{habit}, {kind}")
    for habit, (renames, kinds) in HABITS.items()
    for kind in kinds
]


def loses_answers(service: Service) -> None:
    """The first answer to each file is lost; the file is there."""
    service.on_upload = lambda upload: Lost(stores=True) if service.tries(upload.digest) == 1 else None


@pytest.mark.parametrize(("renames", "name"), CASES)
def test_a_lost_file_is_found_under_its_new_name(
    service: Service, site: Site, renames: Callable[[str], str], name: str
) -> None:
    """Nothing was accepted before: nobody knows yet that names are rewritten."""
    service.renames = renames
    loses_answers(service)
    daemon = site.start()
    lost = site.drop(name, batch("lost"))
    daemon.until(site.done)
    assert service.tries(lost) == 1
    assert set(site.done().values()) == service.ids(lost)  # a long name may be shortened there


def test_lost_files_are_found_by_once(service: Service, site: Site) -> None:
    """Without a daemon, and several at once."""
    service.renames = underscores
    loses_answers(service)
    digests = [site.drop(f"run {n} für.jsonl", batch(f"run {n}")) for n in range(4)]
    ended = site.run("once")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [service.tries(digest) for digest in digests] == [1] * 4
    assert len(site.done()) == 4


def test_where_names_lose_what_tells_files_apart_nothing_is_sent_twice(service: Service, site: Site) -> None:
    """An answer has shown it, which is said; a lost answer is undecided then, and the file stays claimed."""
    service.renames = lambda _: "upload.jsonl"
    daemon = site.start()
    site.drop("first.jsonl", batch("first"))
    daemon.until(site.done)
    assert daemon.said("upload.mismatch", file="first.jsonl")
    service.on_upload = lambda _: Lost(stores=True)
    lost = site.drop("lost.jsonl", batch("lost"))
    daemon.until(lambda: service.tries(lost) > 1 or daemon.said("upload.undecided", file="lost.jsonl"))
    looked = service.listings
    daemon.until(lambda: service.listings >= looked + 3)
    assert service.tries(lost) == 1
    assert site.failed() == []


def test_a_name_that_was_rewritten_hides_no_absence(service: Service, site: Site) -> None:
    """What tells the files apart is kept: a lost file that is not listed is sent again."""
    service.renames = underscores
    daemon = site.start()
    site.drop("first one.jsonl", batch("first"))
    daemon.until(site.done)

    def meet(upload: Upload) -> Lost | None:
        return Lost(stores=False) if service.tries(upload.digest) == 1 else None

    service.on_upload = meet
    lost = site.drop("lost one.jsonl", batch("lost"))
    daemon.until(lambda: "lost one.jsonl" in site.done())
    assert (service.tries(lost), service.copies(lost)) == (2, 1)

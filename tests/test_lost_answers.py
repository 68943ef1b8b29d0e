"""Lost answers through the whole loop, over real sockets: one upload each, wherever the listing allows knowing.

The answer to an upload is lost in every way there is, and the listing that should tell is late, short, gone or
slow. `Loop.close` checks after each test that every file lies in one place, with the id of its own bytes, and
that there is exactly one upload of each, or as many more as the test says (`Loop.twice`).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loop import KEY, Loop

from sfwatch.settings import Api, OnUnknown, RemoteName, Uploads
from sfwatch.standin import (
    Behaviour,
    End,
    Listing,
    Reply,
    StandIn,
    Stored,
    answering,
    reply,
    storing_then_answering,
    storing_then_resetting,
    storing_then_stalling,
)

READ_TIMEOUT_S = 0.4
"""Real seconds: silence has to be waited for."""

NO_LISTING = Listing(answer=reply(404, "404 page not found"))
PAGE = b"<html><head><title>502 Bad Gateway</title></head></html>"

LOST = {
    "reset": storing_then_resetting(),
    "silence": storing_then_stalling(),
    "500": storing_then_answering(500, "oops"),
    "502": storing_then_answering(502, PAGE),
    "503 of a proxy": storing_then_answering(503, PAGE),
    "504": storing_then_answering(504, "string"),
    "408": storing_then_answering(408, b""),
    "garbage": storing_then_answering(200, b"\x00\xff\x1f\x8b"),
    "half an answer": storing_then_answering(200, b'{"code": 20000, "data": {"id": "file-jkvytb'),
    "an answer that stops": Behaviour(answer=Reply(200, b'{"code": 20000', (("Content-Length", "300"),))),
    "no id": storing_then_answering(200, {"code": 20000, "message": "Ok", "status": True, "data": {}}),
    "no success": storing_then_answering(200, {"code": 50000, "message": "?", "status": False, "data": None}),
    "nothing": storing_then_answering(204, b""),
}
"""The file is stored, and the answer does not say so."""

NOT_STORED = {
    "reset": Behaviour(stores=False, end=End.RESET),
    "silence": Behaviour(stores=False, end=End.STALL),
    "500": answering(500, "oops"),
    "502": answering(502, PAGE),
    "504": answering(504, "string"),
    "garbage": answering(200, b"\x00\xff\x1f\x8b"),
}
"""The same from outside, but the service has nothing."""

OTHER_TAG = "x-0123456789ab.jsonl"

Make = Callable[..., Loop]


class SlowListing(StandIn):
    """A service that thinks for a while before it lists anything."""

    thinks_s = 0.0

    def listed(self, limit: int, after: str | None = None) -> tuple[list[Stored], bool]:
        self.closing.wait(self.thinks_s)
        return super().listed(limit, after)


@pytest.fixture(name="service")
def _service() -> Iterator[SlowListing]:
    with SlowListing() as service:
        yield service


@pytest.fixture(name="make")
def _make(tmp_path: Path, service: StandIn) -> Iterator[Make]:
    """Loops that are started, and whose promises are checked at the end."""
    made: list[Loop] = []

    def make(*names: str, **settings: Any) -> Loop:
        api = Api(base_url=service.base_url, allow_plain_http=True, read_timeout_s=READ_TIMEOUT_S)
        loop = Loop(tmp_path, service, names=names or ("a",), **{"api": api} | settings)
        made.append(loop)
        return loop.start()

    yield make
    for loop in made:
        loop.close()


def lose(loop: Loop, behaviour: Behaviour, name: str = "x.jsonl") -> None:
    """Upload a file whose answer gets lost."""
    loop.service.script.append(replace(behaviour, filename=name))
    loop.drop("a", name)
    loop.look().run(2.1)
    assert len(loop.said("upload.unknown", file=name)) == 1


def told(loop: Loop) -> dict[str, int]:
    """How often each thing was said that concerns lost answers."""
    events = ("unknown", "recovered", "resent", "undecided")
    return {event: n for event in events if (n := len(loop.said(f"upload.{event}")))}


def sidecar(loop: Loop, name: str = "x.jsonl") -> Any:
    return json.loads((loop.root / "a" / "done" / f"{name}.fileid.json").read_text())


def somebody_elses(loop: Loop, *, name: str, size: int = 1, age_s: float = 0.0, number: int = 0) -> Stored:
    at = loop.wall() - age_s
    return Stored(f"file-other{number}", name, "batch", size, f"{number:064x}", 1, int(at), at)


# The listing tells.


@pytest.mark.parametrize("behaviour", LOST.values(), ids=LOST.keys())
def test_a_stored_file_whose_answer_is_lost_is_found(make: Make, behaviour: Behaviour) -> None:
    """It is not sent again: the sidecar has the id that the listing shows, and says where that comes from."""
    loop = make()
    lose(loop, behaviour)
    assert loop.claims("a") == ["x.jsonl"]
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}
    assert sidecar(loop)["id"] == loop.service.stored[0].id
    assert sidecar(loop)["sfwatch"]["recovered"] is True
    assert [e["recovered"] for e in loop.said("file.done")] == [True]


@pytest.mark.parametrize("behaviour", NOT_STORED.values(), ids=NOT_STORED.keys())
def test_a_file_that_the_service_does_not_have_is_sent_again_when_its_window_is_over(
    make: Make, behaviour: Behaviour
) -> None:
    """From outside it looked the same: only half a minute of listings without it tells."""
    loop = make()
    lose(loop, behaviour)
    loop.run(25)
    assert loop.posts() == 1
    loop.run(30)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 2
    assert told(loop) == {"unknown": 1, "resent": 1}


@pytest.mark.parametrize("lag_s", [1.0, 10.0, 25.0])
def test_a_listing_that_lags_is_waited_for(make: Make, lag_s: float) -> None:
    """The file is found as soon as it is shown, and never sent twice."""
    loop = make()
    loop.service.listing = Listing(lag_s=lag_s)
    lose(loop, LOST["reset"])
    loop.run(lag_s - 0.5)
    assert loop.done("a") == []
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}


def test_a_listing_that_lags_longer_than_the_window_costs_a_second_upload(make: Make) -> None:
    """This is what `reconcile_window` is for: a longer one would have waited."""
    loop = make()
    loop.service.listing = Listing(lag_s=90)
    lose(loop, LOST["reset"])
    loop.run(120)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "resent": 1}
    loop.twice = 1


def test_a_longer_window_waits_for_a_longer_lag(make: Make) -> None:
    """The same listing, and one upload."""
    loop = make(uploads=Uploads(reconcile_window_s=120.0))
    loop.service.listing = Listing(lag_s=90)
    lose(loop, LOST["reset"])
    loop.run(150)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "recovered": 1}


@pytest.mark.parametrize("listing", [Listing(longest=2), Listing(longest=20), Listing(), Listing(pages=False)])
def test_a_listing_is_read_to_its_end(make: Make, listing: Listing) -> None:
    """A hundred and fifty newer files hide it: a later page shows it, or a larger limit."""
    loop = make()
    loop.service.listing = listing
    lose(loop, LOST["502"])
    others = [somebody_elses(loop, name=f"{i}.jsonl", number=i) for i in range(150)]
    loop.service.stored.extend(others)
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}


def test_a_listing_that_the_service_cuts_off_proves_no_absence(make: Make) -> None:
    """It shows a hundred at most, whatever is asked for: the file waits until it can be seen."""
    loop = make()
    loop.service.listing = Listing(longest=100, pages=False)
    lose(loop, LOST["502"])
    others = [somebody_elses(loop, name=f"{i}.jsonl", number=i) for i in range(150)]
    loop.service.stored.extend(others)
    loop.run(3600)
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "undecided": 1}
    loop.service.listing = Listing()
    loop.run(600)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "undecided": 1, "recovered": 1}


def test_a_slow_listing_is_waited_for(make: Make, service: SlowListing) -> None:
    """As long as it comes within the timeout it is as good as any."""
    loop = make()
    service.thinks_s = READ_TIMEOUT_S / 2
    lose(loop, LOST["reset"])
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1


def test_a_listing_that_never_comes_says_nothing_about_the_file(make: Make, service: SlowListing) -> None:
    """It is asked for again; the file stays claimed for an hour, and is sent no second time."""
    loop = make()
    service.thinks_s = READ_TIMEOUT_S * 2
    lose(loop, LOST["reset"])
    loop.run(900)
    assert loop.claims("a") == ["x.jsonl"]
    assert loop.posts() == 1
    service.thinks_s = 0.0
    loop.run(600)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}


@pytest.mark.parametrize("status", [401, 403, 429, 502, 503])
def test_a_listing_that_is_refused_says_nothing_about_the_file(make: Make, status: int) -> None:
    """Neither an expired key nor an outage is an absence."""
    loop = make()
    loop.service.listing = Listing(answer=reply(status, "no"))
    lose(loop, LOST["reset"])
    loop.run(3600)
    assert loop.claims("a") == ["x.jsonl"]
    assert loop.posts() == 1
    loop.service.listing = Listing()
    loop.run(600)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}


def test_a_listing_that_cannot_be_read_says_nothing_about_the_file(make: Make) -> None:
    """A page of a proxy in place of the listing."""
    loop = make()
    loop.service.listing = Listing(answer=reply(200, PAGE))
    lose(loop, LOST["reset"])
    loop.run(3600)
    assert loop.posts() == 1
    loop.service.listing = Listing()
    loop.run(600)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "recovered": 1}


# There is no listing.


def test_without_a_listing_the_file_is_sent_again_when_the_window_is_over(make: Make) -> None:
    """The default: better twice at the service than not at all; both uploads are said."""
    loop = make()
    loop.service.listing = NO_LISTING
    lose(loop, LOST["reset"])
    loop.run(25)
    assert loop.posts() == 1
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "resent": 1}
    loop.twice = 1


def test_a_try_that_was_plainly_not_taken_is_not_counted(make: Make) -> None:
    """The first may have been stored, the others were not: two more may go as if they had never been."""
    loop = make()
    loop.service.listing = NO_LISTING
    lose(loop, answering(500, "oops"))
    loop.service.script.extend([answering(503, {"code": 50505, "message": "busy"})] * 5)
    loop.run(3600)
    assert loop.done("a") == ["x.jsonl"]
    assert not loop.said("upload.undecided")


def test_without_a_listing_a_file_is_sent_again_twice_at_most(make: Make) -> None:
    """Then it waits; the listing that comes shows the newest, which is adopted, and names the others."""
    loop = make()
    loop.service.listing = NO_LISTING
    loop.service.always = LOST["reset"]
    loop.drop("a", "x.jsonl")
    loop.look().run(2 * 3600)
    assert loop.posts() == 3
    assert told(loop) == {"unknown": 3, "resent": 2, "undecided": 1}
    loop.service.listing = Listing()
    loop.run(900)
    *others, newest = [stored.id for stored in loop.service.stored]
    assert sidecar(loop)["id"] == newest
    assert [set(e["orphans"]) for e in loop.said("upload.recovered")] == [set(others)]
    assert loop.posts() == 3
    loop.twice = 2


def test_on_unknown_hold_sends_nothing_again_without_a_listing(make: Make) -> None:
    """It is said once that nobody can tell, and looked up now and then until somebody can."""
    loop = make(uploads=Uploads(on_unknown=OnUnknown.HOLD))
    loop.service.listing = NO_LISTING
    lose(loop, LOST["504"])
    loop.run(6 * 3600)
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "undecided": 1}
    loop.service.listing = Listing()
    loop.run(600)
    assert told(loop) == {"unknown": 1, "undecided": 1, "recovered": 1}


# Others of its name.


@pytest.mark.parametrize("behaviour", [LOST["reset"], NOT_STORED["reset"]], ids=["stored", "not stored"])
def test_somebody_elses_upload_of_the_same_name_and_size_is_never_taken(
    make: Make, behaviour: Behaviour
) -> None:
    """It has no tag, or another one."""
    loop = make()
    loop.service.script.append(behaviour)
    path = loop.drop("a", "x.jsonl")
    size = path.stat().st_size
    others = [
        somebody_elses(loop, name=name, size=size, number=i) for i, name in enumerate(("x.jsonl", OTHER_TAG))
    ]
    loop.service.stored.extend(others)
    loop.look().run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert sidecar(loop)["id"] not in {other.id for other in others}
    assert told(loop) == {"unknown": 1, **({"recovered": 1} if behaviour.stores else {"resent": 1})}


@pytest.mark.parametrize("behaviour", [LOST["reset"], NOT_STORED["reset"]], ids=["stored", "not stored"])
def test_under_its_original_name_nothing_is_matched_by_likeness(make: Make, behaviour: Behaviour) -> None:
    """An entry of its size may be it, or not: it is held until a person decides."""
    loop = make(uploads=Uploads(remote_name=RemoteName.ORIGINAL))
    loop.service.script.append(behaviour)
    path = loop.drop("a", "x.jsonl")
    loop.service.stored.append(somebody_elses(loop, name="x.jsonl", size=path.stat().st_size))
    loop.look().run(6 * 3600)
    assert loop.claims("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "undecided": 1}
    assert [e["reason"] for e in loop.said("upload.undecided")] == ["unreadable_entry"]


def test_an_older_upload_of_the_same_name_and_size_is_no_match(make: Make) -> None:
    """Yesterday's is not this one: the file is sent again."""
    loop = make()
    loop.service.script.append(NOT_STORED["reset"])
    path = loop.drop("a", "x.jsonl")
    loop.service.stored.append(somebody_elses(loop, name="x.jsonl", size=path.stat().st_size, age_s=86400.0))
    loop.look().run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert told(loop) == {"unknown": 1, "resent": 1}


def test_two_inboxes_with_files_of_one_name_and_size_get_each_its_own_id(make: Make) -> None:
    """Each upload has the tag of its own claim: neither waits for the other."""
    loop = make("a", "b")
    loop.service.script.extend([LOST["reset"], LOST["502"]])
    loop.service.listing = Listing(lag_s=10)
    sizes = {loop.drop(inbox, "x.jsonl").stat().st_size for inbox in ("a", "b")}
    assert len(sizes) == 1
    loop.look().run(120)
    assert loop.done("a") == loop.done("b") == ["x.jsonl"]
    assert loop.posts() == 2
    assert told(loop) == {"unknown": 2, "recovered": 2}


def test_an_id_that_was_taken_with_the_key_from_elsewhere_is_taken(make: Make) -> None:
    """The key comes from a file now, and is of the same account: what the listing shows of it is proof."""
    loop = make()
    loop.drop("a", "x.jsonl")
    loop.look().run(2.5)
    assert loop.done("a") == ["x.jsonl"]
    (loop.root / "key").write_text(KEY)
    loop.api = Api(base_url=loop.service.base_url, key_file=loop.root / "key")
    loop.restart()
    lose(loop, NOT_STORED["reset"])
    loop.run(300)
    assert told(loop) == {"unknown": 1, "resent": 1}


# Restarts.


@pytest.mark.parametrize("after_s", [0.0, 5.0, 20.0])
def test_a_restart_goes_on_looking(make: Make, after_s: float) -> None:
    """What is unknown is so still, and found by the next process."""
    loop = make()
    loop.service.listing = Listing(lag_s=25)
    lose(loop, LOST["reset"])
    loop.run(after_s)
    loop.restart().run(120)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 1
    assert told(loop) == {"unknown": 1, "recovered": 1}


@pytest.mark.parametrize("after_s", [0.0, 5.0, 20.0])
def test_a_restart_does_not_send_again_too_early(make: Make, after_s: float) -> None:
    """The new process has seen no listing yet: it looks for as long as any."""
    loop = make()
    lose(loop, NOT_STORED["reset"])
    loop.run(after_s)
    loop.restart().run(25)
    assert loop.posts() == 1
    loop.run(60)
    assert loop.done("a") == ["x.jsonl"]
    assert loop.posts() == 2
    assert told(loop) == {"unknown": 1, "resent": 1}


def test_many_lost_answers_at_once(make: Make) -> None:
    """Twenty files, each stored and each unanswered: the listing clears up all of them."""
    loop = make()
    loop.service.script.extend([LOST["reset"], LOST["502"], LOST["garbage"], LOST["500"]] * 5)
    for number in range(20):
        loop.drop("a", f"{number:02}.jsonl")
    loop.look().run(6 * 3600)
    assert len(loop.done("a")) == 20
    assert loop.posts() == 20
    assert told(loop) == {"unknown": 20, "recovered": 20}

"""A4: no clock decides what became of an upload: not the service's, not this machine's, in no unit of time."""

import os
from pathlib import Path

import pytest
from programs import need
from strangers.installation import Daemon, Site, batch
from strangers.service import Answer, Lost, Service, Upload

FILES = 4


def loses_first_answers(service: Service, *, stored: bool) -> None:
    """The first answer to each file is lost, but for that to `first.jsonl`."""
    seen: set[str] = set()

    def meet(upload: Upload) -> Lost | None:
        first = upload.digest not in seen and not upload.name.startswith("first")
        seen.add(upload.digest)
        return Lost(stores=stored) if first else None

    service.on_upload = meet


def each_arrives_once(service: Service, site: Site, daemon: Daemon) -> None:
    """Files whose answers get lost are done, and the service was sent each once."""
    loses_first_answers(service, stored=True)
    digests = [site.drop(f"{n}.jsonl", batch(f"file {n}")) for n in range(FILES)]
    daemon.until(lambda: len(site.done()) == FILES)
    assert [service.tries(digest) for digest in digests] == [1] * FILES
    assert [{id_} for _, id_ in sorted(site.done().items())] == [service.ids(digest) for digest in digests]


@pytest.mark.parametrize("ahead_s", [10.0, -10.0, 3600.0])
def test_a_service_whose_clock_is_off_is_sent_no_file_twice(
    service: Service, site: Site, ahead_s: float
) -> None:
    """The Date header is a proxy's, and right: it tells nothing about the clock that files are dated by."""
    service.ahead_s, service.says_date_s = ahead_s, 0.0
    each_arrives_once(service, site, site.start())


@pytest.mark.parametrize("step_s", [10.0, -10.0])
def test_a_service_whose_clock_steps_before_the_look_up_is_sent_no_file_twice(
    service: Service, site: Site, step_s: float
) -> None:
    """Files are dated by the clock before its step, listings by the clock after it."""
    service.ahead_s = -step_s

    def step(_: object) -> Answer | None:
        service.ahead_s = 0.0
        return None

    service.on_listing = step
    each_arrives_once(service, site, site.start())


def test_a_service_that_tells_milliseconds_is_sent_no_file_twice(service: Service, site: Site) -> None:
    """Its times are a thousand times larger, and mean nothing to anybody who does not know."""
    service.milliseconds = True
    each_arrives_once(service, site, site.start())


@pytest.mark.parametrize("step_s", [10, -10, 3600])
def test_a_daemon_whose_clock_steps_before_the_look_up_sends_no_file_twice(
    service: Service, site: Site, tmp_path: Path, step_s: int
) -> None:
    """Its clock is off when it sends, and is set right (as after a boot) before it asks."""
    clock = tmp_path / "clock"
    clock.write_text(f"{-step_s:+d}")

    def set_right(_: object) -> Answer | None:
        clock.write_text("+0")
        return None

    service.on_listing = set_right
    each_arrives_once(service, site, site.start(faked(clock)))
    assert clock.read_text() == "+0"


@pytest.mark.parametrize("habit", ["clock off", "milliseconds"])
def test_a_lost_file_that_was_not_stored_is_sent_again_whatever_the_clock_says(
    service: Service, site: Site, habit: str
) -> None:
    """An upload accepted before it is listed, and it is not: that is proof, with any clock."""
    service.milliseconds = habit == "milliseconds"
    service.ahead_s, service.says_date_s = (3600.0, 0.0) if habit == "clock off" else (0.0, None)
    loses_first_answers(service, stored=False)
    daemon = site.start()
    site.drop("first.jsonl", batch("first"))
    daemon.until(site.done)
    lost = site.drop("lost.jsonl", batch("lost"))
    daemon.until(lambda: "lost.jsonl" in site.done())
    assert (service.tries(lost), service.copies(lost)) == (2, 1)


def faked(clock: Path) -> dict[str, str]:
    """What makes a program's wall clock run as the file says; file times and monotonic clocks stay real."""
    need("faketime")
    library = next(Path("/usr").glob("lib/*/faketime/libfaketimeMT.so.1"))
    return {
        "LD_PRELOAD": os.fspath(library),
        "FAKETIME_TIMESTAMP_FILE": os.fspath(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }

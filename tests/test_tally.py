"""What has become of the files is counted by inbox, and added up."""

from sfwatch.tally import BUCKETS_S, Ended, Tally, cumulated


def test_nothing_has_happened() -> None:
    """All is zero, and there is no last file."""
    tally = Tally()
    assert (tally.done, tally.failed, tally.last_done, tally.last_failed) == (0, 0, None, None)


def test_done_files() -> None:
    """Their number, bytes, times and the last one; the sums go over all inboxes."""
    tally = Tally()
    tally.note_done("a", "x.jsonl", size=10, seconds=1.0, at=100.0)
    tally.note_done("b", "y.jsonl", size=5, seconds=1e9, at=101.0)
    assert (tally.done, tally.last_done) == (2, Ended("b", "y.jsonl", 101.0))
    assert (tally.of("a").sent_bytes, tally.of("a").last_done_at, tally.of("b").seconds) == (10, 100.0, 1e9)


def test_failed_files() -> None:
    """By their reasons."""
    tally = Tally()
    for name in ("x.jsonl", "y.jsonl"):
        tally.note_failed("a", name, reason="bom", at=5.0)
    tally.note_failed("a", "z.jsonl", reason="refused", at=6.0)
    assert tally.failed == 3
    assert tally.of("a").failed == {"bom": 2, "refused": 1}
    assert tally.last_failed == Ended("a", "z.jsonl", 6.0)


def test_buckets() -> None:
    """A time on a bound is below it, as Prometheus counts; each bucket holds all shorter ones."""
    tally = Tally()
    for seconds in (0.1, 1.0, 1.1, 1e9):
        tally.note_done("a", "x.jsonl", size=0, seconds=seconds, at=0.0)
    counts = list(cumulated(tally.of("a").durations))
    assert counts[:2] == [2, 3]
    assert (counts[-2], counts[-1], len(counts)) == (3, 4, len(BUCKETS_S) + 1)

"""What a file's own failures prove: by scenes, and by any order of refusals and acceptances."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch.delivery.evidence import (
    Evidence,
    has_given_up,
    is_poison,
    is_proved,
    refused,
    retry_in_s,
    suspected,
)


def refused_after(*accepted: int, words: str = "HTTP 400") -> Evidence:
    e = Evidence()
    for number in accepted:
        e = refused(e, words, number)
    return e


@pytest.mark.parametrize(
    ("accepted", "refusals"),
    [((0,), 1), ((0, 0, 0), 1), ((0, 1, 1), 2), ((0, 1, 2), 3), ((5, 9, 9, 9, 12), 3)],
)
def test_a_refusal_counts_after_another_acceptance(accepted: tuple[int, ...], refusals: int) -> None:
    """Refusals in a row, however many, may all be the account's."""
    e = refused_after(*accepted)
    assert e.refusals == refusals
    assert is_proved(e) == (refusals >= 3)


def test_other_words_begin_anew() -> None:
    """What is refused for changing reasons is not proved."""
    e = refused(refused_after(1, 2), "HTTP 413", 3)
    assert (e.refusals, e.refused_words, e.refused_after) == (1, "HTTP 413", 3)


@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(0, 2)), max_size=12))
def test_three_in_the_same_words_reject(story: list[tuple[str, int]]) -> None:
    """Proved: the latest refusals in the same words have acceptances between each two of three."""
    e, accepted, run = Evidence(), 0, list[tuple[str, int]]()
    for words, more in story:
        accepted += more
        e = refused(e, words, accepted)
        run = [*(run if run and run[-1][0] == words else []), (words, accepted)]
        assert is_proved(e) == (len({number for _, number in run}) >= 3)


def test_pauses_of_a_doubted_file() -> None:
    """A minute after another acceptance; else doubling from a minute to an hour, as the first pause has it."""
    e, pauses = refused_after(4), list[float]()
    for _ in range(8):
        pauses.append(retry_in_s(e, 4, 1.0))
        e = replace(e, served_s=e.served_s + pauses[-1])
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert retry_in_s(e, 5, 1.0) == 60
    assert retry_in_s(e, 4, 0.01) == 36


def test_poison_needs_acceptances_between_and_an_hour() -> None:
    """A file that fails again and again in an outage is not poison."""
    e = Evidence(served_s=3600.0)
    for accepted in (0, 0, 0, 1, 1):
        e = suspected(e, accepted)
    assert (e.suspicions, is_poison(e, 3), is_poison(e, 2), is_poison(e, 0)) == (2, False, True, False)
    assert not is_poison(Evidence(suspicions=9, served_s=3599.9), 2)


def test_giving_up_counts_served_pauses() -> None:
    """Without the setting a file waits for ever."""
    e = Evidence(served_s=100.0)
    assert [has_given_up(e, limit) for limit in (None, 100.0, 100.1)] == [False, True, False]

"""Durations and sizes as people write them."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfwatch import values

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


@given(st.integers(0, 10**6 - 1), st.sampled_from(sorted(UNITS)))
def test_durations_are_numbers_times_units(number: int, unit: str) -> None:
    """A number and a unit give that many seconds, with or without a decimal part."""
    assert values.seconds(f"{number}{unit}") == pytest.approx(number * UNITS[unit])
    assert values.seconds(f"{number}.0{unit}") == values.seconds(f"{number}{unit}")
    assert values.seconds(f"0.{number:06}{unit}") == pytest.approx(number / 10**6 * UNITS[unit])


@given(st.integers(0, 10**15 - 1), st.sampled_from("KMGT"))
def test_sizes_are_exact(number: int, prefix: str) -> None:
    """KB to TB are powers of ten, KiB to TiB powers of two, without rounding."""
    power = "KMGT".index(prefix) + 1
    assert values.size(f"{number}{prefix}B") == number * 1000**power
    assert values.size(f"{number}{prefix}iB") == number * 1024**power
    assert values.size(f"{number}B") == number


@given(st.text(max_size=30))
def test_any_text_is_a_duration_and_a_size_or_wrong(text: str) -> None:
    """Text that is neither raises `Wrong` and nothing else."""
    for read in (values.seconds, values.size):
        with contextlib.suppress(values.Wrong):
            assert read(text) >= 0

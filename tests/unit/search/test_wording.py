"""Limits in the units that a config is written in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxshrink.config.budget import Budget
from onnxshrink.search.constraints import Miss
from onnxshrink.search.wording import breaks, relax, say


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [
        ("max_size", 11_251, "11.3 kB"),
        ("max_size", 999_900, "1000 kB"),
        ("max_size", 2_000_000, "2 MB"),
        ("max_size", 812, "812 B"),
        ("max_compressed_size", 4_812_345, "4.81 MB"),
        ("max_accuracy_drop", 0.0125, "0.0125"),
        ("max_accuracy_drop", 0.0, "0"),
        ("max_accuracy_drop", -0.002, "-0.002"),
        ("min_sqnr_db", 53.29, "53.3 dB"),
        ("max_latency_ratio", 0.8298, "0.83"),
        ("max_latency_ms", 12.34, "12.3 ms"),
        ("max_macs", 1_234_567, "1230000"),
    ],
)
def test_a_limit_is_said_as_a_person_writes_it(limit: str, value: float, text: str) -> None:
    """Three digits, decimal units, no exponent."""
    assert say(limit, value) == text


@given(st.integers(min_value=1, max_value=10**10), st.floats(min_value=1e-5, max_value=100))
@settings(derandomize=True, deadline=None)
def test_a_limit_relaxed_to_what_is_said_suffices(size: int, figure: float) -> None:
    """Rounding never gives a limit that the model would break again; the config takes it as it is said."""
    said = relax(Miss("max_size", 1.0, float(size), 0.0)).removeprefix("max_size to ")
    assert size <= (Budget.model_validate({"max_size": said}).max_size or 0) <= size * 1.01 + 1
    said = relax(Miss("max_accuracy_drop", 0.0, figure, 0.0)).removeprefix("max_accuracy_drop to ")
    assert figure * (1 - 1e-8) <= float(said) <= figure * 1.01
    said = relax(Miss("min_sqnr_db", 200.0, figure, 0.0)).removeprefix("min_sqnr_db to ").removesuffix(" dB")
    assert figure * 0.99 <= float(said) <= figure * (1 + 1e-8)


def test_a_miss_says_by_how_much() -> None:
    """What it has, what was asked, the difference; where that is not known, this is said."""
    assert breaks(Miss("max_size", 10_000, 11_251, 0.1)) == "11.3 kB breaks max_size 10 kB by 1.25 kB"
    assert breaks(Miss("min_sqnr_db", 19, 18.2, 0.1)) == "18.2 dB breaks min_sqnr_db 19 dB by 0.8 dB"
    missing = Miss("max_accuracy_drop", 0.01, None, 1.0)
    assert breaks(missing) == "breaks max_accuracy_drop 0.01, it is not known by how much"
    assert relax(missing) == "max_accuracy_drop"

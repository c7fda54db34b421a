"""What a histogram drawn from statistics promises: nearly numpy's own, and never a value lost."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxshrink.calibration.histogram import equal_edges, histogram
from onnxshrink.calibration.statistics import TensorStatistics

RNG = np.random.default_rng(0)
SAMPLES = {
    "normal": RNG.standard_normal(50_000),
    "after Relu": np.maximum(RNG.standard_normal(50_000), 0),
    "negative": -RNG.exponential(size=50_000) - 3,
    "skewed with an outlier": np.append(RNG.exponential(size=50_000), 40.0),
    "small": 1e-6 * RNG.standard_normal(1_000),
}


def statistics_of(values: NDArray[np.float64]) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update(values.astype(np.float32))
    return statistics


@pytest.mark.parametrize("name", list(SAMPLES))
def test_counts_are_nearly_numpys(name: str) -> None:
    """All values are counted, and at most one in fifty lies in a neighbouring bin; zeros are where numpy has them."""
    values = SAMPLES[name].astype(np.float32).astype(np.float64)
    edges = equal_edges(values.min(), values.max(), 48)
    got, want = histogram(statistics_of(values), edges), np.histogram(values, edges)[0]
    assert got.sum() == values.size
    assert np.abs(got - want).sum() / 2 <= 0.02 * values.size
    assert got.min() >= 0


def test_a_wider_frame_is_empty_at_its_ends() -> None:
    """Where the edges go beyond the values, the outer bins hold nothing."""
    values = RNG.uniform(-1, 1, 10_000)
    edges = equal_edges(-4, 4, 8)
    got = histogram(statistics_of(values), edges)
    assert got[:3].sum() == got[5:].sum() == 0
    assert got[3:5].sum() == 10_000


@pytest.mark.parametrize("value", [0.0, -2.5, 3.0])
def test_a_single_value_has_a_bin(value: float) -> None:
    """A tensor that is constant is one full bin around its value."""
    edges = equal_edges(value, value, 4)
    got = histogram(statistics_of(np.full(7, value)), edges)
    assert got.sum() == 7
    assert np.abs(got - np.histogram(np.full(7, value), edges)[0]).sum() in (0, 14)

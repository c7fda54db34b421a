"""Statistics of one tensor: exact extremes, exact counts."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, N_BINS, TensorStatistics


def counted(values: object) -> TensorStatistics:
    """Statistics of the values, in one update."""
    statistics = TensorStatistics()
    statistics.update(np.asarray(values, np.float32))
    return statistics


def plain_bin(value: float) -> int:
    """The bin of a value, found by comparing it with every edge: the oracle."""
    magnitude = abs(float(np.float32(value)))
    place = max(b for b in range(MAGNITUDE_EDGES.size) if MAGNITUDE_EDGES[b] <= magnitude)
    return place + (N_BINS // 2 if np.signbit(np.float32(value)) else 0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.1, 255.0, -3.4e38, 1e-30, 6.0, np.pi])
def test_bin_holds_its_value(value: float) -> None:
    """A value is counted in the bin whose edges enclose it, on the side of its sign."""
    statistics = counted([value])
    assert np.flatnonzero(statistics.counts).tolist() == [plain_bin(value)]
    assert (statistics.lo, statistics.hi) == (np.float32(value), np.float32(value))


def test_bins_are_narrow() -> None:
    """A bin of normal numbers is at most 1/128 of its lower edge wide."""
    normal = MAGNITUDE_EDGES[128:]
    assert np.max(np.diff(normal) / normal[:-1]) <= 1 / 128


def test_extremes_and_count_are_exact() -> None:
    """Smallest, largest and number of values are numpy's, over arrays longer than a counting chunk."""
    values = np.random.default_rng(0).standard_cauchy((7, 3, 100, 101)).astype(np.float32)
    statistics = counted(values)
    assert (statistics.lo, statistics.hi, statistics.size) == (values.min(), values.max(), values.size)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_cast(dtype: type) -> None:
    """Half and double precision are counted as the float32 they become; strides do not matter."""
    values = np.random.default_rng(0).standard_normal((40, 50)).astype(dtype).T
    statistics = TensorStatistics()
    statistics.update(values)
    np.testing.assert_array_equal(statistics.counts, counted(values.astype(np.float32)).counts)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_shows(bad: float) -> None:
    """One NaN or infinity among many values shows in `is_finite`, in any part of the stream and after a merge."""
    statistics = counted([1.0, bad, 2.0])
    assert not statistics.is_finite
    assert not counted([1.0]).merge(statistics).is_finite
    statistics.update(np.ones(3, np.float32))
    assert not statistics.is_finite


def test_nothing_seen() -> None:
    """Empty arrays count as nothing, and nothing is the neutral element of merging."""
    empty = counted(np.zeros((0, 3)))
    assert empty.size == 0
    assert empty.is_finite
    some = counted([1.0, -2.0])
    merged = empty.merge(some)
    assert (merged.lo, merged.hi) == (some.lo, some.hi)
    np.testing.assert_array_equal(merged.counts, some.counts)


@pytest.mark.parametrize(
    ("lo", "hi"), [(0.0, np.inf), (0.0, 6.0), (-1.0, 1.0), (-np.inf, np.inf), (0.3, 0.7), (-3, -1)]
)
def test_clipped_statistics_follow_exactly(lo: float, hi: float) -> None:
    """Clipping the statistics gives what counting the clipped values gives; only the sign of zero may differ."""
    values = 4 * np.random.default_rng(2).standard_normal(20_000).astype(np.float32)
    got, want = (
        counted(values).clipped(lo, hi),
        counted(np.clip(values, np.float32(lo), np.float32(hi)) + np.float32(0)),
    )
    assert (got.lo, got.hi) == (want.lo, want.hi)
    zero, minus_zero = 0, N_BINS // 2
    got.counts[zero] += got.counts[minus_zero]
    got.counts[minus_zero] = 0
    np.testing.assert_array_equal(got.counts, want.counts)


def test_small_counters_grow_before_they_overflow() -> None:
    """Counts kept in 32 bits become 64 bits where the next values might not fit, and merge to the same."""
    statistics = TensorStatistics(np.zeros(N_BINS, np.uint32))
    statistics.update(np.ones(10, np.float32))
    assert statistics.counts.dtype == np.uint32
    one = int(np.flatnonzero(statistics.counts)[0])
    statistics.counts[one] = 2**32 - 10
    assert statistics.merge(statistics).counts[one] == 2 * (2**32 - 10)
    statistics.update(np.ones(10, np.float32))
    assert statistics.counts[one] == 2**32


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_pickled_are_the_bins_that_hold_something(dtype: type) -> None:
    """They come back as they were, dtype and empty ones included, at a hundredth of the size; and go on counting."""
    statistics = TensorStatistics(np.zeros(N_BINS, dtype))
    empty = pickle.loads(pickle.dumps(statistics))  # noqa: S301  our own
    assert (empty.size, empty.lo, empty.hi) == (0, np.inf, -np.inf)
    statistics.update(np.random.default_rng(0).standard_normal(5000).astype(np.float32))
    stored = pickle.dumps(statistics)
    assert len(stored) < statistics.counts.nbytes / 10
    back = pickle.loads(stored)  # noqa: S301  our own
    assert back.counts.dtype == dtype
    np.testing.assert_array_equal(back.counts, statistics.counts)
    assert (back.lo, back.hi) == (statistics.lo, statistics.hi)
    back.update(np.ones(3, np.float32))
    assert back.size == statistics.size + 3

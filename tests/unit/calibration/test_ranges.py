"""Ranges from statistics, each method against a second source."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import entropy

from onnxshrink.calibration.ranges import (
    absurd_reason,
    entropy_range,
    linear_histogram,
    minmax_range,
    mse_range,
    percentile_range,
    requantized_divergence,
    value_range,
)
from onnxshrink.calibration.squared_error import SquaredError
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.config.stages import CalibrationMethod

METHODS: tuple[CalibrationMethod, ...] = ("minmax", "percentile", "entropy", "mse")
RNG = np.random.default_rng(7)
NORMAL = 3 * RNG.standard_normal(50_000)
SHAPES = {
    "normal": RNG.standard_normal(50_000),
    "relu": np.maximum(RNG.standard_normal(50_000), 0),
    "heavy": RNG.standard_t(2.5, 50_000),
    "silu": NORMAL / (1 + np.exp(-NORMAL)),
    "positive": RNG.uniform(2, 3, 50_000),
    "negative": -RNG.exponential(size=50_000),
}


def counted(values: NDArray[np.floating] | list[float]) -> TensorStatistics:
    """Statistics of the values."""
    statistics = TensorStatistics()
    statistics.update(np.asarray(values, np.float32))
    return statistics


def true_error(values: NDArray[np.floating], lo: float, hi: float) -> float:
    """Sum of squared errors of quantizing every single value: the oracle of `SquaredError`."""
    scale = (hi - lo) / 255
    zero_point = np.rint(-lo / scale)
    levels = np.clip(np.rint(values / scale), -zero_point, 255 - zero_point)
    return float(np.sum((values - levels * scale) ** 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_range_holds_zero_and_stays_inside(shape: str, method: CalibrationMethod) -> None:
    """Every range contains zero and reaches no further than what was observed."""
    statistics = counted(SHAPES[shape])
    lo, hi = value_range(statistics, method, percentile=0.999)
    assert min(0.0, float(statistics.lo)) <= lo <= 0 <= hi <= max(0.0, float(statistics.hi))
    assert lo < hi


def test_minmax_is_exact() -> None:
    """The minmax range is the observed one, to the last bit, extended to zero."""
    values = SHAPES["normal"].astype(np.float32)
    assert minmax_range(counted(values)) == (float(values.min()), float(values.max()))
    assert minmax_range(counted([2.0, 3.0])) == (0.0, 3.0)


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentile_agrees_with_numpy(shape: str, share: float) -> None:
    """The threshold is numpy's quantile of the magnitudes, or up to one bin (1/128) above it."""
    values = SHAPES[shape].astype(np.float32)
    want = float(np.quantile(np.abs(values), share, method="inverted_cdf"))
    got = max(np.abs(percentile_range(counted(values), share)))
    assert want <= got <= want * (1 + 1 / 128) or math.isclose(got, want, rel_tol=1e-6)


def test_percentile_of_one_is_minmax() -> None:
    """Covering all values is the minmax range."""
    statistics = counted(SHAPES["heavy"])
    assert percentile_range(statistics, 1.0) == minmax_range(statistics)


def test_linear_histogram_keeps_the_mass() -> None:
    """The linear histogram holds every value but the zeros, and agrees with numpy's within a bin's width."""
    values = np.abs(SHAPES["relu"]).astype(np.float32)
    histogram = linear_histogram(counted(values), 64)
    want, _ = np.histogram(values[values > 0], bins=64, range=(0, float(values.max())))
    assert histogram.sum() == pytest.approx(np.count_nonzero(values))
    assert np.max(np.abs(histogram.cumsum() - want.cumsum())) < 0.002 * values.size


def plain_divergence(histogram: list[float], kept: int, n_levels: int) -> float:
    """Migacz's comparison in plain Python, with scipy's KL divergence: the oracle."""
    reference = list(histogram[:kept])
    reference[-1] += sum(histogram[kept:])
    members: dict[int, list[int]] = {}
    for place in range(kept):
        members.setdefault(place * n_levels // kept, []).append(place)
    quantized = [0.0] * kept
    for places in members.values():
        occupied = [place for place in places if histogram[place] > 0]
        for place in occupied:
            quantized[place] = sum(histogram[p] for p in places) / len(occupied)
    total = sum(quantized)
    smoothed = [(1 - 1e-4) * q / total + 1e-4 / kept for q in quantized]
    return float(entropy(np.array(reference), np.array(smoothed)))


@pytest.mark.parametrize(("kept", "n_levels"), [(64, 16), (50, 16), (33, 32), (64, 64)])
def test_divergence_agrees_with_plain_python(kept: int, n_levels: int) -> None:
    """The KL divergence of a candidate is that of a plain implementation of the same definition."""
    histogram = RNG.poisson(3, 64).astype(float) * RNG.integers(0, 2, 64)
    got = requantized_divergence(histogram, np.array([kept, 64]), np.array([n_levels, 8]))
    want = [plain_divergence(histogram.tolist(), *candidate) for candidate in ((kept, n_levels), (64, 8))]
    assert got == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("one_sided", [True, False])
def test_entropy_clips_heavy_tails(*, one_sided: bool) -> None:
    """Few values far out, on one side or both, are clipped; the bulk is not."""
    bulk = np.maximum(SHAPES["normal"], 0) if one_sided else SHAPES["normal"]
    tail = np.array([20.0, 40.0, 60.0])
    statistics = counted(np.concatenate([bulk, tail, tail if one_sided else -tail]))
    hi = entropy_range(statistics)[1]
    assert np.quantile(np.abs(bulk), 0.99) < hi < 0.5 * minmax_range(statistics)[1]


def test_entropy_keeps_what_has_no_tail() -> None:
    """Uniform values have nothing to clip."""
    statistics = counted(RNG.uniform(0, 1, 100_000))
    assert entropy_range(statistics)[1] > 0.99 * minmax_range(statistics)[1]


@pytest.mark.parametrize("cut", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("shape", ["normal", "relu", "heavy", "silu", "negative"])
def test_expected_error_agrees_with_the_true_one(shape: str, cut: float) -> None:
    """The closed form over bins is within 4% of quantizing every value."""
    values = SHAPES[shape].astype(np.float32).astype(np.float64)
    lo, hi = (cut * end for end in minmax_range(counted(values)))
    assert SquaredError.of(counted(values)).on(lo, hi) == pytest.approx(true_error(values, lo, hi), rel=0.04)


@pytest.mark.parametrize("shape", ["normal", "heavy", "silu"])
def test_mse_range_is_the_best(shape: str) -> None:
    """No other clipping of the observed range has a true error more than 3% smaller."""
    values = SHAPES[shape].astype(np.float32).astype(np.float64)
    lo, hi = minmax_range(counted(values))
    thresholds = np.linspace(0.05, 1, 120) * max(-lo, hi)
    best = min(true_error(values, max(lo, -t), min(hi, t)) for t in thresholds)
    assert true_error(values, *mse_range(counted(values))) <= 1.03 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_never_worse_than_minmax(shape: str) -> None:
    """By the error it minimizes, the mse range is at most that of the whole range."""
    statistics = counted(SHAPES[shape])
    error = SquaredError.of(statistics)
    assert error.on(*mse_range(statistics)) <= error.on(*minmax_range(statistics))


def test_mse_clips_a_long_tail() -> None:
    """Of half a million Laplace values the range is cut by a fifth, to the literature's 9.9 times the scale parameter.

    Source: Banner et al. 2018, "Post-training 4-bit quantization", gives the optimal clip of 8 bits as 9.89 b.
    """
    statistics = counted(np.random.default_rng(3).laplace(size=500_000))
    hi = mse_range(statistics)[1]
    assert hi < 0.8 * max(np.abs(minmax_range(statistics)))
    assert 9.0 < hi < 10.8
    error = SquaredError.of(statistics)
    assert error.on(*mse_range(statistics)) < 0.8 * error.on(*minmax_range(statistics))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "want"), [([], (0, 0)), ([0.0, -0.0], (0, 0)), ([3.0] * 9, (0, 3)), ([-2.0], (-2, 0))]
)
def test_degenerate_tensors(method: CalibrationMethod, values: list[float], want: tuple[float, float]) -> None:
    """No values, zeros, and one value repeated have the obvious range by every method."""
    assert value_range(counted(values), method, percentile=0.999) == want


SCORES = RNG.standard_normal(1000) * 4


@pytest.mark.parametrize("mark", [np.finfo(np.float32).min, -1e9, -65504.0, -1e4])
def test_masked_scores_are_absurd(mark: float) -> None:
    """Scores beside a mask's mark are found, whichever mark it is."""
    assert absurd_reason(counted(np.concatenate([SCORES, SCORES + mark]))) is not None


def test_sentinel_alone_is_absurd() -> None:
    """A mask of zeros and finfo.min is found without any scores."""
    reason = absurd_reason(counted([0.0, float(np.finfo(np.float32).min)]))
    assert reason is not None
    assert "-3.4e+38" in reason


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_activations_are_not_absurd(shape: str) -> None:
    """Heavy tails, large scales and tiny values beside large ones are no masks."""
    assert absurd_reason(counted(SHAPES[shape])) is None
    assert absurd_reason(counted(SHAPES[shape] * 1e5)) is None
    assert absurd_reason(counted([1e-12, 1e-9, 0.5, 200.0])) is None

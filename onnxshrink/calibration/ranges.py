"""Ranges from statistics: which interval of an activation's values eight bits shall cover.

All methods but `minmax_range` choose one threshold on the magnitude and clip the observed range to it: large magnitudes
are what makes the steps of the grid wide, whichever their sign. A tensor without negative values (after Relu) keeps
``lo = 0`` and has all levels for its positive side.
"""

from __future__ import annotations

from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics
from onnxshrink.config.stages import CalibrationMethod

Range: TypeAlias = tuple[float, float]
"""``(lo, hi)`` in the tensor's own unit, ``lo <= 0 <= hi``."""

N_LEVELS = 256
"""Levels of an 8-bit grid."""

_ENTROPY_BINS = 2048
_ENTROPY_CANDIDATES = np.unique(np.rint(np.geomspace(N_LEVELS // 2, _ENTROPY_BINS, 60)).astype(int)).tolist()
_SMOOTHING = 1e-4
_MSE_SMALLEST = 1 / 64
_MSE_COARSE = 17
_MSE_FINE = 9

SENTINEL = 2.0**100
"""From this magnitude on (1.3e30) a value is a mark, such as ``finfo.min``, and no result of arithmetic."""

_FAR = 1024.0
_GAP_RATIO = 64.0


def value_range(statistics: TensorStatistics, method: CalibrationMethod, *, percentile: float = 1.0) -> Range:
    """The range of a tensor by one of the four methods.

    Args:
        statistics: What was observed; finite.
        method: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        percentile: Share of the values that ``percentile`` covers, above 0 and at most 1.

    Returns:
        ``(lo, hi)`` with ``lo <= 0 <= hi``, inside the observed range extended to zero; ``(0, 0)`` if nothing was seen.
    """
    if statistics.size == 0 or _largest_magnitude(statistics) == 0:
        return 0.0, 0.0
    match method:
        case "minmax":
            return minmax_range(statistics)
        case "percentile":
            return percentile_range(statistics, percentile)
        case "entropy":
            return entropy_range(statistics)
        case "mse":
            return mse_range(statistics)
        case _:
            assert_never(method)


def minmax_range(statistics: TensorStatistics) -> Range:
    """The observed extremes, extended to zero, which an 8-bit grid must be able to represent."""
    return min(float(statistics.lo), 0.0), max(float(statistics.hi), 0.0)


def percentile_range(statistics: TensorStatistics, percentile: float) -> Range:
    """The observed range clipped to the smallest magnitude that covers a share of the values.

    The threshold is the upper edge of a bin, so at least the share is covered, and the threshold is at most 1/128 above
    the exact quantile of ``|x|``. This is ONNX Runtime's definition too, where it counts magnitudes.

    Args:
        statistics: At least one value.
        percentile: Share of the values, above 0 and at most 1; 1 gives `minmax_range`.
    """
    counts = _magnitude_counts(statistics)
    cumulative = counts.cumsum()
    rank = int(np.ceil(percentile * int(cumulative[-1])))
    return _clip(statistics, float(MAGNITUDE_EDGES[1:][np.searchsorted(cumulative, rank)]))


def entropy_range(statistics: TensorStatistics) -> Range:
    """The observed range clipped where the re-quantized histogram is nearest the original in KL divergence.

    Magnitudes are binned linearly into 2,048 bins. A candidate keeps the first 128 to 2,048 of them (60 candidates,
    evenly spaced in the logarithm), folds what lies above into the
    last one, and is compared with its own quantization to as many levels as an 8-bit grid over the clipped range has
    for that magnitude: 128 if the range is symmetric, 256 if it starts at zero. Zeros are left out: every grid has
    them exactly. The quantized histogram gets 1e-4 of uniform mass, so that the divergence is finite.

    Args:
        statistics: At least one value that is not zero.

    Source: Migacz, "8-bit Inference with TensorRT", GTC 2017.
    """
    largest = _largest_magnitude(statistics)
    histogram = linear_histogram(statistics, _ENTROPY_BINS)
    best_divergence, best = np.inf, _ENTROPY_BINS
    for kept in _ENTROPY_CANDIDATES:
        threshold = largest * kept / _ENTROPY_BINS
        lo, hi = _clip(statistics, threshold)
        n_levels = round(N_LEVELS * threshold / (hi - lo))
        if kept < n_levels:
            continue
        divergence = requantized_divergence(histogram, kept, n_levels)
        if divergence < best_divergence:
            best_divergence, best = divergence, kept
    return _clip(statistics, largest * best / _ENTROPY_BINS)


def linear_histogram(statistics: TensorStatistics, n_bins: int) -> NDArray[np.float64]:
    """Magnitudes above zero in equal bins from 0 to the largest, ``(n_bins,)``; a wider bin's counts are spread."""
    counts = _magnitude_counts(statistics)
    counts[0] = 0
    largest = _largest_magnitude(statistics)
    top = int(np.searchsorted(MAGNITUDE_EDGES, largest, side="right"))
    edges = MAGNITUDE_EDGES[: top + 1].copy()
    edges[-1] = largest
    cumulative = np.concatenate([[0], counts[:top].cumsum()]).astype(float)
    return np.diff(np.interp(np.linspace(0.0, largest, n_bins + 1), edges, cumulative))


def requantized_divergence(histogram: NDArray[np.float64], kept: int, n_levels: int) -> float:
    """KL divergence from a histogram that is clipped to its first bins to its own quantization.

    Args:
        histogram: Counts per bin of equal width, ``(n_bins,)``, at least one above zero.
        kept: Bins inside the threshold, at least ``n_levels``.
        n_levels: Levels the kept bins are merged into; each level's mass is spread over its bins that are not empty.
    """
    inside = histogram[:kept]
    reference = inside.copy()
    reference[-1] += histogram[kept:].sum()
    level = np.arange(kept) * n_levels // kept
    occupied = inside > 0
    mass = np.bincount(level, weights=inside, minlength=n_levels)
    share = np.bincount(level, weights=occupied, minlength=n_levels)
    quantized = np.where(occupied, (mass / np.maximum(share, 1))[level], 0.0)
    total = quantized.sum()
    q = (1 - _SMOOTHING) * quantized / (total if total > 0 else 1.0) + _SMOOTHING / kept
    p = reference / reference.sum()
    seen = p > 0
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))


def mse_range(statistics: TensorStatistics) -> Range:
    """The observed range clipped where the expected squared error of an 8-bit grid over it is smallest.

    Thresholds go from 1/64 of the largest magnitude up to it, a factor of 1.3 apart, and then finer between the
    neighbours of the best one.

    Args:
        statistics: At least one value that is not zero.

    Source: the criterion of Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference";
        the search is ours.
    """
    thresholds = _largest_magnitude(statistics) * np.geomspace(1.0, _MSE_SMALLEST, _MSE_COARSE)
    best = _least_error(statistics, thresholds)
    around = thresholds[max(best - 1, 0)], thresholds[min(best + 1, thresholds.size - 1)]
    thresholds = np.geomspace(*around, _MSE_FINE)
    return _clip(statistics, float(thresholds[_least_error(statistics, thresholds)]))


def _least_error(statistics: TensorStatistics, thresholds: NDArray[np.float64]) -> int:
    return int(np.argmin([quantization_error(statistics, *_clip(statistics, float(t))) for t in thresholds]))


def quantization_error(statistics: TensorStatistics, lo: float, hi: float) -> float:
    """Sum of the expected squared errors of all values on the 256-level grid over ``[lo, hi]``, zero on the grid.

    Values are taken as uniform within their bin, and the integral over each bin is in closed form: with the grid at
    multiples of the scale ``s``, the integral of ``(x - s*round(x/s))^2`` from 0 to ``x`` is ``s^3 (n/12 + r^3/3)``
    with ``n = round(x/s)`` and ``r = x/s - n``; beyond its last level ``c`` the error is ``(x - c)^2``.

    Args:
        statistics: What was observed.
        lo: Lower end of the range, at most zero.
        hi: Upper end, at least zero and above ``lo``.
    """
    scale = (hi - lo) / (N_LEVELS - 1)
    below_zero = round(-lo / scale)
    bounds = (scale * (N_LEVELS - 1 - below_zero), scale * below_zero)
    total = 0.0
    ends = (float(statistics.hi), -float(statistics.lo))
    for counts, bound, end in zip(statistics.side_counts(), bounds, ends, strict=True):
        # Far below a step every value costs its own square, which is next to nothing.
        first = int(np.searchsorted(MAGNITUDE_EDGES, scale / 64)) + 1
        bins = np.flatnonzero(counts[first:]) + first
        if bins.size == 0:
            continue
        left, right = MAGNITUDE_EDGES[bins], MAGNITUDE_EDGES[bins + 1]
        # The last bin is filled up to the observed extreme only; a sliver of it keeps the division well conditioned.
        right[-1] = max(end, left[-1] + (right[-1] - left[-1]) / 16)
        integral = _error_integral(right, scale, bound) - _error_integral(left, scale, bound)
        total += float(np.dot(counts[bins], integral / (right - left)))
    return total


def _error_integral(x: NDArray[np.float64], scale: float, bound: float) -> NDArray[np.float64]:
    steps = np.minimum(x, bound) / scale
    whole = np.rint(steps)
    rest = steps - whole
    beyond = np.maximum(x - bound, 0.0)
    integral: NDArray[np.float64] = scale**3 * (whole / 12 + rest * rest * rest / 3) + beyond * beyond * beyond / 3
    return integral


def absurd_reason(statistics: TensorStatistics) -> str | None:
    """Why no 8-bit range can serve a tensor, or None if one can.

    Two signs, both from what was observed:

    * A magnitude from 2^100 on. That is a mark such as ``finfo.min`` in an attention mask; a grid over it has steps of
      1e36.
    * Magnitudes of at least 1,024 that lie 64 times and more above all others, with nothing between. A grid over the
      far values would leave fewer than four steps to all others (scores beside a mask of -10,000); a grid over the
      others would let what is masked leak through.
    """
    bins = np.flatnonzero(_magnitude_counts(statistics)[1:]) + 1
    if bins.size == 0:
        return None
    if MAGNITUDE_EDGES[bins[-1]] >= SENTINEL:
        return f"holds {_extreme(statistics):.3g}, a mark and no number to compute with"
    ratios = MAGNITUDE_EDGES[bins[1:]] / MAGNITUDE_EDGES[bins[:-1] + 1]
    far = np.flatnonzero((ratios >= _GAP_RATIO) & (MAGNITUDE_EDGES[bins[1:]] >= _FAR))
    if far.size == 0:
        return None
    ordinary = MAGNITUDE_EDGES[bins[far[-1]] + 1]
    return f"holds values up to {ordinary:.3g} and others near {_extreme(statistics):.3g}, with nothing between"


def _extreme(statistics: TensorStatistics) -> float:
    return float(statistics.lo if -statistics.lo > statistics.hi else statistics.hi)


def _magnitude_counts(statistics: TensorStatistics) -> NDArray[np.int64]:
    positive, negative = statistics.side_counts()
    return positive + negative


def _largest_magnitude(statistics: TensorStatistics) -> float:
    return max(abs(float(statistics.lo)), abs(float(statistics.hi)))


def _clip(statistics: TensorStatistics, threshold: float) -> Range:
    lo, hi = minmax_range(statistics)
    return max(lo, -threshold), min(hi, threshold)

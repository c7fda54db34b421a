"""Ranges from statistics: which interval of an activation's values eight bits shall cover.

All methods but `minmax_range` choose one threshold on the magnitude and clip the observed range to it: large magnitudes
are what makes the steps of the grid wide, whichever their sign. A tensor without negative values (after Relu) keeps
``lo = 0`` and has all levels for its positive side.
"""

from __future__ import annotations

from typing import TypeAlias, assert_never

import numpy as np
from numpy.typing import NDArray

from onnxshrink.calibration.squared_error import N_LEVELS, SquaredError
from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics
from onnxshrink.config.stages import CalibrationMethod

Range: TypeAlias = tuple[float, float]
"""``(lo, hi)`` in the tensor's own unit, ``lo <= 0 <= hi``."""

_ENTROPY_BINS = 2048
_ENTROPY_CANDIDATES = np.unique(np.rint(np.geomspace(N_LEVELS // 2, _ENTROPY_BINS, 60)).astype(int))
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
    thresholds = largest * _ENTROPY_CANDIDATES / _ENTROPY_BINS
    lo, hi = minmax_range(statistics)
    widths = np.minimum(hi, thresholds) - np.maximum(lo, -thresholds)
    n_levels = np.rint(N_LEVELS * thresholds / widths).astype(int)
    fit = n_levels <= _ENTROPY_CANDIDATES
    divergences = requantized_divergence(histogram, _ENTROPY_CANDIDATES[fit], n_levels[fit])
    return _clip(statistics, float(thresholds[fit][np.argmin(divergences)]))


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


def requantized_divergence(
    histogram: NDArray[np.float64], kept: NDArray[np.int_], n_levels: NDArray[np.int_]
) -> NDArray[np.float64]:
    """KL divergence from a histogram that is clipped to its first bins to its own quantization.

    A level's quantized mass is the same in all of its bins that are not empty, so a candidate's divergence follows from
    sums over whole levels, and those from running sums over the bins: no candidate costs more than its levels.

    Args:
        histogram: Counts per bin of equal width, ``(n_bins,)``, at least one above zero.
        kept: Bins inside the threshold, of each candidate; ``(n_candidates,)``, at least ``n_levels``.
        n_levels: Levels the kept bins are merged into; each level's mass is spread over its bins that are not empty.

    Returns:
        A divergence for each candidate, ``(n_candidates,)``.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        h_log_h = np.where(histogram > 0, histogram * np.log(histogram), 0.0)
    mass_below, occupied_below, h_log_h_below = (
        np.concatenate([[0.0], np.cumsum(values)]) for values in (histogram, histogram > 0, h_log_h)
    )
    # The first bin of each level; levels that a candidate does not have start and end at its threshold.
    levels = np.arange(int(n_levels.max()) + 1)
    starts = np.minimum(-(-levels * kept[:, None] // n_levels[:, None]), kept[:, None])
    occupied = np.diff(occupied_below[starts])
    mass = np.where(occupied > 0, np.diff(mass_below[starts]), 0.0)
    inside, total = mass_below[kept], mass_below[-1]
    spread = mass / np.maximum(occupied, 1) / np.where(inside > 0, inside, 1.0)[:, None]
    log_q = np.log((1 - _SMOOTHING) * spread + _SMOOTHING / kept[:, None])
    # The last bin has taken in all that lies above the threshold.
    last, folded = histogram[kept - 1], histogram[kept - 1] + total - inside
    with np.errstate(divide="ignore", invalid="ignore"):
        folded_log = np.where(folded > 0, folded * np.log(folded), 0.0)
    p_log_p = (h_log_h_below[kept - 1] + folded_log) / total - np.log(total)
    last_level = log_q[np.arange(kept.size), n_levels - 1]
    last_log_q = np.where(last > 0, last_level, np.log(_SMOOTHING / kept))
    p_log_q = ((mass * log_q).sum(axis=1) - last * last_level + folded * last_log_q) / total
    divergence: NDArray[np.float64] = p_log_p - p_log_q
    return divergence


def mse_range(statistics: TensorStatistics) -> Range:
    """The observed range clipped where the expected squared error of an 8-bit grid over it is smallest.

    Thresholds go from 1/64 of the largest magnitude up to it, a factor of 1.3 apart, and then finer between the
    neighbours of the best one. The whole range is the first candidate: the result is never worse than `minmax_range`.

    Args:
        statistics: At least one value that is not zero.

    Source: the criterion of Choukroun et al. 2019, "Low-bit Quantization of Neural Networks for Efficient Inference";
        the search is ours.
    """
    error = SquaredError.of(statistics)
    coarse = _largest_magnitude(statistics) * np.geomspace(1.0, _MSE_SMALLEST, _MSE_COARSE)
    errors = [error.on(*_clip(statistics, float(t))) for t in coarse]
    best = int(np.argmin(errors))
    around = coarse[max(best - 1, 0)], coarse[min(best + 1, coarse.size - 1)]
    fine = np.geomspace(*around, _MSE_FINE)[1:-1]
    errors += [error.on(*_clip(statistics, float(t))) for t in fine]
    return _clip(statistics, float(np.concatenate([coarse, fine])[np.argmin(errors)]))


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
    return np.add(positive, negative, dtype=np.int64)


def _largest_magnitude(statistics: TensorStatistics) -> float:
    return max(abs(float(statistics.lo)), abs(float(statistics.hi)))


def _clip(statistics: TensorStatistics, threshold: float) -> Range:
    lo, hi = minmax_range(statistics)
    return max(lo, -threshold), min(hi, threshold)

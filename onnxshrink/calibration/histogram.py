"""Histograms to look at: equal bins over the values themselves, from what calibration remembers of a tensor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics


def equal_edges(lo: float, hi: float, n_bins: int) -> NDArray[np.float64]:
    """Edges of equal bins from ``lo`` to ``hi``, ``(n_bins + 1,)``; around a single value a bin of width 1."""
    lo, hi = (lo, hi) if hi > lo else (lo - 0.5, hi + 0.5)
    return np.linspace(lo, hi, n_bins + 1)


def histogram(statistics: TensorStatistics, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    """What ``np.histogram(values, edges)`` counts, nearly: within a bin of the statistics values count as uniform.

    Such a bin is 1/128 of its value wide, so a count is wrong by what lies that near to one of its edges.

    Args:
        statistics: Finite values.
        edges: Rising, from the least value or below to the greatest or above.

    Returns:
        ``(n_bins,)``; they add up to all values.
    """
    positive, negative = (counts.astype(np.int64) for counts in statistics.side_counts())
    # Zeros lie in bin 0 of either side, by their sign; for the edge at zero they are all above it.
    positive[0] += negative[0]
    negative[0] = 0
    lo, hi = float(statistics.lo), float(statistics.hi)
    bounds = np.concatenate([-MAGNITUDE_EDGES[:0:-1], MAGNITUDE_EDGES])
    below = np.concatenate([[0], np.concatenate([negative[::-1], positive]).cumsum()])
    total = below[-1]
    # The outermost bins that hold something are filled up to the observed extremes only.
    cumulative = np.interp(np.clip(edges, lo, hi), np.clip(bounds, lo, hi), below)
    cumulative[edges <= lo] = 0
    cumulative[edges >= hi] = total
    cumulative[0], cumulative[-1] = 0, total
    counts: NDArray[np.int64] = np.diff(np.rint(cumulative).astype(np.int64))
    return counts

"""What an 8-bit grid costs: the expected squared error of a tensor's values, from its histogram alone."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics

N_LEVELS = 256
"""Levels of an 8-bit grid."""


class SquaredError:
    """The squared error of one tensor's values on any 8-bit grid; made once, asked for many ranges.

    Values are taken as uniform within their bin. Each side of zero is cut in three, with the grid at multiples of the
    scale ``s`` and its last level at ``c``: below ``s / 2`` the error is the value's own square, and beyond ``c`` it is
    ``(x - c)^2``, so both parts are differences of running sums. Between them the integral over each bin is in closed
    form: that of ``(x - s*round(x/s))^2`` from 0 to ``x`` is ``s^3 (n/12 + r^3/3)`` with ``n = round(x/s)`` and
    ``r = x/s - n``.

    Args:
        positive: The side above zero.
        negative: The side below zero, its magnitudes.
    """

    def __init__(self, positive: _Side, negative: _Side) -> None:
        self._sides = (positive, negative)

    @classmethod
    def of(cls, statistics: TensorStatistics) -> Self:
        """The error of what was observed."""
        positive, negative = statistics.side_counts()
        return cls(_Side(positive, float(statistics.hi)), _Side(negative, -float(statistics.lo)))

    def on(self, lo: float, hi: float) -> float:
        """Sum of the errors on the 256-level grid over ``[lo, hi]``, zero on the grid.

        Args:
            lo: Lower end of the range, at most zero.
            hi: Upper end, at least zero and above ``lo``.
        """
        scale = (hi - lo) / (N_LEVELS - 1)
        below_zero = round(-lo / scale)
        bounds = (scale * (N_LEVELS - 1 - below_zero), scale * below_zero)
        return sum(side.error(scale, bound) for side, bound in zip(self._sides, bounds, strict=True))


class _Side:
    """The magnitudes on one side of zero, in the bins from the first that holds something to the last.

    Args:
        counts: Values per magnitude bin, ``(32640,)``.
        end: The largest magnitude, in the last bin.
    """

    def __init__(self, counts: NDArray[np.int64 | np.uint32], end: float) -> None:
        held = np.flatnonzero(counts[1:]) + 1  # bin 0 holds the zeros, which every grid has
        first, last = (int(held[0]), int(held[-1]) + 1) if held.size else (1, 1)
        self._edges = edges = MAGNITUDE_EDGES[first : last + 1].copy()
        if held.size:
            # The last bin is filled up to the observed extreme only; a sliver keeps the division well conditioned.
            edges[-1] = max(end, edges[-2] + (edges[-1] - edges[-2]) / 16)
        numbers = counts[first:last].astype(float)
        left, right = edges[:-1], edges[1:]
        self._density = numbers / (right - left)
        means = numbers * (left + right) / 2
        squares = numbers * (left * left + left * right + right * right) / 3
        self._squares_below = np.concatenate([[0.0], squares.cumsum()])
        moments = np.stack([numbers, means, squares])
        # Summed from the far end, so that a sum of few large values is not the difference of two larger sums.
        self._moments_beyond = np.concatenate([moments[:, ::-1].cumsum(axis=1)[:, ::-1], np.zeros((3, 1))], axis=1)

    def error(self, scale: float, bound: float) -> float:
        """Sum of the squared errors with steps of ``scale`` from zero to ``bound``."""
        n_bins = self._density.size
        # Whole bins below half a step, and whole bins beyond the last level.
        first = max(int(np.searchsorted(self._edges, min(scale / 2, bound), side="right")) - 1, 0)
        last = max(min(int(np.searchsorted(self._edges, bound)), n_bins), first)
        edges = self._edges[first : last + 1]
        between = float(np.dot(self._density[first:last], np.diff(_error_integral(edges, scale, bound))))
        count, mean, square = self._moments_beyond[:, last]
        beyond = square - 2 * bound * mean + bound * bound * count
        return float(self._squares_below[first] + between + beyond)


def _error_integral(x: NDArray[np.float64], scale: float, bound: float) -> NDArray[np.float64]:
    steps = np.minimum(x, bound) / scale
    whole = np.rint(steps)
    rest = steps - whole
    integral = scale**3 * (whole / 12 + rest * rest * rest / 3)
    # The bin that holds the bound is the last one.
    integral[-1] += max(float(x[-1]) - bound, 0.0) ** 3 / 3
    return integral

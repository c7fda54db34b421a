"""What calibration remembers of a tensor: one integer histogram and the exact extremes.

A bin is the upper half of a float32: sign, exponent and 7 bits of mantissa. So the bins cover every float there is, no
range has to be guessed before the data is seen, and a bin is at most 1/128 of its value wide. Counting is a commutative
monoid: shards may be counted anywhere and merged in any order and grouping, and the bytes are the same.

Monotone maps of the values are monotone maps of the bins: the statistics of ``Relu(x)`` and ``Clip(x)`` follow exactly
from those of ``x`` (see `TensorStatistics.clipped`), which saves half of the counting in a usual network.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.tensors import Array

N_BINS = 1 << 16
_HALF = N_BINS // 2
_N_FINITE = 0x7F80  # the bin of infinity; NaNs lie above
_UINT32_MAX = (1 << 32) - 1
_CHUNK = 1 << 17  # values whose widened bin numbers, 1 MB, stay in the second-level cache

MAGNITUDE_EDGES = (np.arange(_N_FINITE + 1, dtype="<u4") << 16).view("<f4").astype(np.float64)
"""Lower edge of each finite magnitude bin, and the upper edge of the last, which stands for infinity."""
MAGNITUDE_EDGES[-1] = 2.0**128
MAGNITUDE_EDGES.flags.writeable = False


@dataclass(slots=True)
class TensorStatistics:
    """Counts and extremes of everything one tensor has held.

    Attributes:
        counts: Values per bin, ``(65536,)`` int64; or uint32 to save memory, which becomes int64 before it overflows.
            Bin ``b < 32768`` holds the values from ``MAGNITUDE_EDGES[b]`` up to the next edge, and bin ``32768 + b``
            their negatives.
        lo: Smallest value, exactly; infinity while nothing was seen, NaN once a NaN was.
        hi: Largest value, likewise; minus infinity while nothing was seen.
    """

    counts: NDArray[np.int64 | np.uint32] = field(default_factory=lambda: np.zeros(N_BINS, np.int64))
    lo: np.float32 = field(default=np.float32(np.inf))
    hi: np.float32 = field(default=np.float32(-np.inf))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the bins that hold something, a hundredth of them: shards come back from other processes."""
        bins = np.flatnonzero(self.counts)
        return _restored, (bins.astype(np.uint16), self.counts[bins], self.lo, self.hi)

    @property
    def size(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    @property
    def is_finite(self) -> bool:
        """True unless a NaN or an infinity was seen."""
        return self.size == 0 or bool(np.isfinite(self.lo) and np.isfinite(self.hi))

    def update(self, values: Array) -> None:
        """Count ``values``: any shape; float32, or a float type that is cast to it."""
        flat = np.ascontiguousarray(values, dtype="<f4").reshape(-1)
        upper_halves = flat.view("<u2")[1::2]
        if self.counts.dtype == np.uint32 and int(self.counts.max()) + flat.size > _UINT32_MAX:
            self.counts = self.counts.astype(np.int64)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            with np.errstate(invalid="ignore"):  # a NaN is kept in the extremes, for the caller to name
                self.lo = np.minimum(self.lo, part.min())
                self.hi = np.maximum(self.hi, part.max())
            counted = np.bincount(upper_halves[start : start + _CHUNK])
            within = self.counts[: counted.size]
            np.add(within, counted, out=within, casting="unsafe")

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of values together."""
        with np.errstate(invalid="ignore"):
            lo, hi = np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi)
        return TensorStatistics(np.add(self.counts, other.counts, dtype=np.int64), lo, hi)

    def clipped(self, lo: float, hi: float) -> TensorStatistics:
        """The statistics that ``np.clip(values, lo, hi)`` would have, exactly but for the sign of zero.

        Args:
            lo: Lower bound; minus infinity for none.
            hi: Upper bound, at least ``lo``; infinity for none.
        """
        if self.size == 0 or (lo <= self.lo and self.hi <= hi):
            return TensorStatistics(self.counts.astype(np.int64), self.lo, self.hi)
        bounds = np.array([lo, hi], np.float32)
        lo_bin, hi_bin = (int(bits) for bits in bounds.view("<u2")[1::2])
        order = _BY_VALUE
        first, last = int(_RANK[lo_bin]), int(_RANK[hi_bin])
        ranked = self.counts.astype(np.int64)[order]
        kept = np.zeros_like(ranked)
        kept[first : last + 1] = ranked[first : last + 1]
        kept[first] += ranked[:first].sum()
        kept[last] += ranked[last + 1 :].sum()
        counts = np.empty_like(kept)
        counts[order] = kept
        return TensorStatistics(counts, np.clip(self.lo, *bounds), np.clip(self.hi, *bounds))

    def side_counts(self) -> tuple[NDArray[np.int64 | np.uint32], NDArray[np.int64 | np.uint32]]:
        """Counts per magnitude bin of the positive and of the negative values, each ``(32640,)``.

        Bin 0 holds the zeros (and what is smaller than 1e-40, which no 8-bit grid tells from zero).
        """
        return self.counts[:_N_FINITE], self.counts[_HALF : _HALF + _N_FINITE]


def _restored(bins: Array, held: Array, lo: np.float32, hi: np.float32) -> TensorStatistics:
    counts = np.zeros(N_BINS, held.dtype)
    counts[bins] = held
    return TensorStatistics(counts, lo, hi)


# Bins from the most negative value to the largest, and each bin's place in that order.
_BY_VALUE = np.concatenate([np.arange(N_BINS - 1, _HALF - 1, -1), np.arange(_HALF)])
_RANK = np.argsort(_BY_VALUE)

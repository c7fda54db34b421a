"""The rows of an output that are farthest from the reference's, in memory that does not grow with the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

N_WORST = 8
"""Rows that are named."""


@dataclass(frozen=True, slots=True)
class WorstRow:
    """One row of an output that is far from the reference's.

    Attributes:
        row: Its place on axis 0, counted over all batches.
        relative_l2: ``||reference - candidate|| / ||reference||`` of the row; infinite where the reference's is all
            zeros, or where one side has a value that is not finite.
        max_abs: Largest ``|reference - candidate|`` of the row; infinite where a value is not finite.
    """

    row: int
    relative_l2: float
    max_abs: float

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the row in dB."""
        return -20 * math.log10(self.relative_l2) if math.isfinite(self.relative_l2) else -math.inf


def far_rows(
    error: NDArray[np.float64], reference: NDArray[np.float64], broken: NDArray[np.bool_]
) -> Iterator[WorstRow]:
    """The rows of one batch that may be among the worst, at most `N_WORST`.

    Args:
        error: ``|reference - candidate|``, ``(n, n_values)``, finite.
        reference: The same shape, finite.
        broken: ``(n,)``, True where one side has a value that is not finite and the other has not the same.
    """
    noise, signal = (np.sqrt(np.einsum("ij,ij->i", side, side)) for side in (error, reference))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(broken, math.inf, np.where(noise > 0, noise / signal, 0.0))
    largest = np.where(broken, math.inf, error.max(axis=1, initial=0.0))
    for row in np.lexsort((-largest, -relative))[:N_WORST]:
        yield WorstRow(int(row), float(relative[row]), float(largest[row]))


def worst_rows(rows: Iterable[WorstRow]) -> tuple[WorstRow, ...]:
    """The `N_WORST` with the largest relative error, then absolute error, then the earliest; equal rows are none."""
    far = (row for row in rows if row.relative_l2 > 0)
    return tuple(sorted(far, key=lambda row: (-row.relative_l2, -row.max_abs, row.row))[:N_WORST])

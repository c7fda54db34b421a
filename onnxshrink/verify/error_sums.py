"""What is summed up of a candidate's errors: of storing a tensor, of one piece, of all; and how errors are counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxshrink.core.tensors import Array
from onnxshrink.verify.pairing import Piece
from onnxshrink.verify.pieces import Grid
from onnxshrink.verify.products import Product

_MASK = 1e30
"""Values beyond stand for infinity, as in attention masks of ``finfo.min``: they are compared, and not summed up."""

_HALF_MASK = 1e4


@dataclass(slots=True)
class GridError:
    """What storing one tensor on its grid does, with the reference's values.

    Attributes:
        grid: The grid.
        size: Values.
        signal: Sum of their squares.
        rounding: Sum of the squared errors of values within the grid's range.
        clipping: The same of values beyond it, by more than half a step.
        clipped: How many those are.
        lo: Least value.
        hi: Greatest.
    """

    grid: Grid
    size: int = 0
    signal: float = 0.0
    rounding: float = 0.0
    clipping: float = 0.0
    clipped: int = 0
    lo: float = math.inf
    hi: float = -math.inf

    @property
    def noise(self) -> float:
        """Error energy over signal energy."""
        return ratio(self.rounding + self.clipping, self.signal)

    @property
    def used_ratio(self) -> float:
        """Share of the grid's width that the values use, 0 to 1."""
        width = self.grid.hi - self.grid.lo
        return max(0.0, min(self.hi, self.grid.hi) - max(self.lo, self.grid.lo)) / width if width else 0.0

    def update(self, values: Array) -> None:
        """Count these values, which the tensor has in the reference."""
        exact = values.astype(np.float64)
        exact = exact[np.abs(exact) < _MASK]
        if not exact.size:
            return
        squares = np.square(self.grid.restored(self.grid.stored(exact)) - exact)
        margin = self.grid.scale / 2
        outside = (exact > self.grid.hi + margin) | (exact < self.grid.lo - margin)
        self.size += exact.size
        self.signal += float(np.square(exact).sum())
        self.clipping += float(squares[outside].sum())
        self.rounding += float(squares[~outside].sum())
        self.clipped += int(outside.sum())
        self.lo, self.hi = min(self.lo, float(exact.min())), max(self.hi, float(exact.max()))


@dataclass(slots=True)
class PieceError:
    """Sums of squares over all samples of one piece.

    Attributes:
        piece: The piece.
        product: Its product with constant weights, if it has one.
        output: What storing its result does; None where it stays in float.
        signal: Of the reference's values.
        local: Of the deployed piece's error on the reference's inputs.
        weights: Of the part that stored weights and biases make.
        inputs: Of the part that storing the inputs makes.
        kernel: Of what the deployed kernels compute otherwise than the same operators one by one.
        saturation: Of what the products would lose on x86 without VNNI, emulated; 0 where that was not asked for.
        accumulated: Largest sum of a product as a share of what int32 holds.
        propagated: Of the error in the candidate as it runs.
        alone: For each output of the model its signal, and the error if this piece alone were the candidate's.
    """

    piece: Piece
    product: Product | None = None
    output: GridError | None = None
    signal: float = 0.0
    local: float = 0.0
    weights: float = 0.0
    inputs: float = 0.0
    kernel: float = 0.0
    saturation: float = 0.0
    accumulated: float = 0.0
    propagated: float = 0.0
    alone: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def local_noise(self) -> float:
        """Local error energy over signal energy, emulated saturation included."""
        return ratio(self.local + self.saturation, self.signal)

    @property
    def contribution(self) -> float:
        """Noise of the worst output if this piece alone were the candidate's, its emulated saturation scaled in."""
        noise = max((ratio(error, signal) for signal, error in self.alone.values()), default=0.0)
        return noise * (1 + self.saturation / self.local) if self.local and math.isfinite(noise) else noise


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was summed up.

    Attributes:
        pieces: In the candidate's order.
        grids: Candidate's tensor, before it is quantized, to what storing it does.
        samples: Samples that were run.
        windows: Windows that they were looked at in.
        output: Of each output of the reference: signal, error of the candidate.
    """

    pieces: tuple[PieceError, ...]
    grids: Mapping[str, GridError]
    samples: int
    windows: int
    output: Mapping[str, tuple[float, float]]


def ratio(error: float, signal: float) -> float:
    """Error over signal; infinite where only the signal is zero."""
    if error == 0:
        return 0.0
    return error / signal if signal else math.inf


def energy(reference: Array, other: Array) -> float:
    """Sum of the squared differences; marks of a mask agree with each other, what is no number is infinitely wrong."""
    left, right = (np.clip(values.astype(np.float64), -_MASK, _MASK) for values in (reference, other))
    marks = (np.abs(left) >= _MASK) & (right * np.sign(left) >= _HALF_MASK)  # float16 cannot hold the larger ones
    total = float(np.square(np.where(marks, 0.0, left - right)).sum())
    return total if math.isfinite(total) else math.inf


def as_dtype(values: Array, dtype: str) -> Array:
    """Values in another type; floats beyond its range become its largest ones, as they mark a mask."""
    if np.dtype(dtype).kind == values.dtype.kind == "f" and np.dtype(dtype).itemsize < values.dtype.itemsize:
        values = np.clip(values, np.finfo(dtype).min, np.finfo(dtype).max)
    return values.astype(dtype, copy=False)


def signal_of(values: Array) -> float:
    """Sum of the squares of what is no mark of a mask."""
    exact = values.astype(np.float64)
    return float(np.square(exact[np.abs(exact) < _MASK]).sum())


def added(before: tuple[float, float], reference: Array, other: Array) -> tuple[float, float]:
    """Signal and error so far, and those of one more tensor."""
    return before[0] + signal_of(reference), before[1] + energy(reference, other)

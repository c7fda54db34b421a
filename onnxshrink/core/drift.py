"""Drift: how far a candidate's output is from the reference's, summed up batch by batch in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Array, describe

IDENTICAL = "identical"
REFERENCE_NAN = "reference gives NaN"
CANDIDATE_NAN = "candidate gives NaN"
INFINITE = "infinity on one side only"


@dataclass(frozen=True, slots=True)
class Drift:
    """Sums over all values of one output, in float64, from which every measure of drift follows.

    Where both sides hold the same infinity (masked logits), they agree and the value is left out of the sums. Any other
    value that is not finite is a `flaw`, and no measure has a meaning then.

    Attributes:
        output: The output's name.
        n_values: Compared values.
        n_rows: Rows on axis 0, usually samples.
        max_abs: Largest ``|reference - candidate|``.
        worst_row: The row, counted over all batches, where it is.
        sum_abs: Sum of ``|reference - candidate|``.
        sum_squares: Sum of ``(reference - candidate)**2``.
        reference_squares: Sum of ``reference**2``.
        candidate_squares: Sum of ``candidate**2``.
        products: Sum of ``reference * candidate``.
        n_ranked: Rows that have a winning class: those of 2-D outputs with more than one column.
        n_agreed: Rows where both sides have the same winning class, ties to the first.
        flaw: What is wrong with the values, or None.
    """

    output: str
    n_values: int = 0
    n_rows: int = 0
    max_abs: float = 0.0
    worst_row: int = 0
    sum_abs: float = 0.0
    sum_squares: float = 0.0
    reference_squares: float = 0.0
    candidate_squares: float = 0.0
    products: float = 0.0
    n_ranked: int = 0
    n_agreed: int = 0
    flaw: str | None = None

    def update(self, reference: Array, candidate: Array) -> Drift:
        """This drift with one more batch.

        Args:
            reference: The reference's output, any shape, a numeric or bool dtype; rows on axis 0.
            candidate: The candidate's output, of the same shape and dtype; floats may differ in width.

        Raises:
            ModelError: Shapes or dtypes differ, or the values are no numbers.
        """
        _require_alike(self.output, reference, candidate)
        return self.merge(_drift_of(self.output, np.atleast_1d(reference), np.atleast_1d(candidate)))

    def merge(self, other: Drift) -> Drift:
        """The drift over this one's rows followed by ``other``'s; exact but for the rounding of float64 sums."""
        worse = other.max_abs > self.max_abs
        return replace(
            self,
            n_values=self.n_values + other.n_values,
            n_rows=self.n_rows + other.n_rows,
            max_abs=max(self.max_abs, other.max_abs),
            worst_row=self.n_rows + other.worst_row if worse else self.worst_row,
            sum_abs=self.sum_abs + other.sum_abs,
            sum_squares=self.sum_squares + other.sum_squares,
            reference_squares=self.reference_squares + other.reference_squares,
            candidate_squares=self.candidate_squares + other.candidate_squares,
            products=self.products + other.products,
            n_ranked=self.n_ranked + other.n_ranked,
            n_agreed=self.n_agreed + other.n_agreed,
            flaw=self.flaw or other.flaw,
        )

    @property
    def mean_abs(self) -> float:
        """Mean of ``|reference - candidate|``; NaN without values."""
        return self.sum_abs / self.n_values if self.n_values else math.nan

    @property
    def sqnr_db(self) -> float:
        """``10 log10(sum reference^2 / sum (reference - candidate)^2)`` in dB; infinite for identical outputs."""
        if not self.sum_squares:
            return math.inf
        return 10 * math.log10(self.reference_squares / self.sum_squares) if self.reference_squares else -math.inf

    @property
    def relative_l2(self) -> float:
        """``||reference - candidate|| / ||reference||``; infinite where only the reference is all zeros."""
        if not self.sum_squares:
            return 0.0
        return math.sqrt(self.sum_squares / self.reference_squares) if self.reference_squares else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both outputs, all values as one vector; NaN where only one is all zeros."""
        if not self.sum_squares:
            return 1.0
        norms = math.sqrt(self.reference_squares) * math.sqrt(self.candidate_squares)
        return max(-1.0, min(1.0, self.products / norms)) if norms else math.nan

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows whose winning class is the same on both sides, or None for outputs that rank no classes."""
        return self.n_agreed / self.n_ranked if self.n_ranked else None


def _drift_of(output: str, reference: Array, candidate: Array) -> Drift:
    n_rows = reference.shape[0]
    ranked = reference.ndim == 2 and reference.shape[1] > 1
    agreed = int((reference.argmax(-1) == candidate.argmax(-1)).sum()) if ranked else 0
    flat = (n_rows, math.prod(reference.shape[1:]))
    ref, cand = reference.astype(np.float64).reshape(flat), candidate.astype(np.float64).reshape(flat)
    flaw = _flaw(ref, cand)
    finite = np.isfinite(ref) & np.isfinite(cand)
    if not finite.all():
        ref, cand = np.where(finite, ref, 0.0), np.where(finite, cand, 0.0)
    error = np.abs(ref - cand)
    row_max = error.max(axis=1, initial=0.0)
    worst = int(row_max.argmax()) if n_rows else 0
    return Drift(
        output,
        n_values=error.size,
        n_rows=n_rows,
        max_abs=float(row_max[worst]) if n_rows else 0.0,
        worst_row=worst,
        sum_abs=float(error.sum()),
        sum_squares=_dot(error, error),
        reference_squares=_dot(ref, ref),
        candidate_squares=_dot(cand, cand),
        products=_dot(ref, cand),
        n_ranked=n_rows if ranked else 0,
        n_agreed=agreed,
        flaw=flaw,
    )


def _flaw(ref: NDArray[np.float64], cand: NDArray[np.float64]) -> str | None:
    if np.isnan(ref).any():
        return REFERENCE_NAN
    if np.isnan(cand).any():
        return CANDIDATE_NAN
    unlike = ref != cand
    return INFINITE if (np.isinf(ref) & unlike).any() or (np.isinf(cand) & unlike).any() else None


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.einsum("ij,ij->", a, b))


def _require_alike(output: str, reference: Array, candidate: Array) -> None:
    both_float = reference.dtype.kind == candidate.dtype.kind == "f"
    if reference.shape != candidate.shape or (reference.dtype != candidate.dtype and not both_float):
        raise ModelError(
            f"reference and candidate differ in the shape or dtype of the output {output!r}",
            where=f"output {output!r}",
            got=describe(output, candidate),
            want=describe(output, reference),
            fix="compare models of one interface: keep the outputs' types and sizes when converting",
        )
    if reference.dtype.kind not in "fiub":
        raise ModelError(
            f"the output {output!r} holds no numbers",
            where=f"output {output!r}",
            got=describe(output, reference),
            want="a float, integer or bool tensor",
            fix="remove the output from the graph",
        )

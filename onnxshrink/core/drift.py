"""Drift: how far a candidate's output is from the reference's, summed up batch by batch in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.classes import are_distributions, divergence, rank_of_winner, softmax_divergence
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Array, describe
from onnxshrink.core.worst import WorstRow, far_rows, worst_rows

IDENTICAL = "identical"
REFERENCE_NAN = "reference gives NaN"
CANDIDATE_NAN = "candidate gives NaN"
INFINITE = "infinity on one side only"

N_LISTED = 32
"""Rows of which each one's own error is kept, from the first on."""

_FIVE = 5

_ADDED = (
    "n_values", "n_rows", "sum_abs", "sum_squares", "reference_squares", "candidate_squares", "products", "n_ranked",
    "n_agreed", "n_among_five", "n_vectors", "n_distributions", "sum_divergence", "n_logits", "sum_softmax_divergence",
)  # fmt: skip


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
        reference_min: The reference's smallest finite value.
        reference_max: Its largest.
        n_ranked: Rows that have a winning class: those of 2-D outputs with more than one column.
        n_agreed: Rows where both sides have the same winning class, ties to the first.
        n_among_five: Rows where the reference's winning class is among the candidate's five best, ties to the first;
            counted where there are more than five classes.
        n_classes: Columns of a ranked output, else 0.
        n_vectors: Vectors along the last axis of a float output that has two axes or more.
        n_distributions: Those of them that hold probabilities, see `are_distributions`.
        sum_divergence: Sum of their Kullback-Leibler divergences, in nats.
        n_logits: Ranked float rows that have a softmax: at least one finite value, and none is plus infinity.
        sum_softmax_divergence: Sum of the divergences of their softmax, in nats.
        worst: The rows with the largest relative error, the worst first, see `worst_rows`.
        first_squares: Sum of ``(reference - candidate)**2`` of each of the first `N_LISTED` rows.
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
    reference_min: float = math.inf
    reference_max: float = -math.inf
    n_ranked: int = 0
    n_agreed: int = 0
    n_among_five: int = 0
    n_classes: int = 0
    n_vectors: int = 0
    n_distributions: int = 0
    sum_divergence: float = 0.0
    n_logits: int = 0
    sum_softmax_divergence: float = 0.0
    worst: tuple[WorstRow, ...] = ()
    first_squares: tuple[float, ...] = ()
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
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        later = (replace(row, row=self.n_rows + row.row) for row in other.worst)
        return replace(
            self,
            **sums,
            max_abs=max(self.max_abs, other.max_abs),
            worst_row=self.n_rows + other.worst_row if worse else self.worst_row,
            reference_min=min(self.reference_min, other.reference_min),
            reference_max=max(self.reference_max, other.reference_max),
            n_classes=max(self.n_classes, other.n_classes),
            worst=worst_rows((*self.worst, *later)),
            first_squares=(*self.first_squares, *other.first_squares)[:N_LISTED],
            flaw=self.flaw or other.flaw,
        )

    @property
    def mean_abs(self) -> float:
        """Mean of ``|reference - candidate|``; NaN without values."""
        return self.sum_abs / self.n_values if self.n_values else math.nan

    @property
    def rmse(self) -> float:
        """Root of the mean of ``(reference - candidate)**2``; NaN without values."""
        return math.sqrt(self.sum_squares / self.n_values) if self.n_values else math.nan

    @property
    def sqnr_db(self) -> float:
        """``10 log10(sum reference^2 / sum (reference - candidate)^2)`` in dB; infinite for identical outputs."""
        if not self.sum_squares:
            return math.inf
        return 10 * math.log10(self.reference_squares / self.sum_squares) if self.reference_squares else -math.inf

    @property
    def psnr_db(self) -> float:
        """``20 log10(peak / rmse)`` in dB, the peak being the reference's largest value less its smallest.

        Infinite for identical outputs, minus infinity where only the reference is constant.
        """
        if not self.sum_squares:
            return math.inf
        peak = self.reference_max - self.reference_min
        return 20 * math.log10(peak / self.rmse) if peak > 0 else -math.inf

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

    @property
    def top5_agreement(self) -> float | None:
        """Share of rows whose reference's winner is among the candidate's five best; None up to five classes."""
        return self.n_among_five / self.n_ranked if self.n_classes > _FIVE else None

    @property
    def kl_divergence(self) -> float | None:
        """Mean Kullback-Leibler divergence in nats, or None for outputs that are not probabilities throughout."""
        whole = self.n_vectors and self.n_distributions == self.n_vectors
        return self.sum_divergence / self.n_vectors if whole else None

    @property
    def softmax_kl(self) -> float | None:
        """Mean divergence in nats of the softmax of 2-D float outputs; None where they are probabilities already."""
        given = self.n_logits and self.kl_divergence is None
        return self.sum_softmax_divergence / self.n_logits if given else None


def _drift_of(output: str, reference: Array, candidate: Array) -> Drift:
    n_rows = reference.shape[0]
    flat = (n_rows, math.prod(reference.shape[1:]))
    ref, cand = reference.astype(np.float64).reshape(flat), candidate.astype(np.float64).reshape(flat)
    flaw = _flaw(ref, cand)
    drift = Drift(output, n_rows=n_rows, flaw=flaw)
    if reference.ndim > 1 and ref.size:
        drift = _with_classes(drift, ref, cand, reference.shape, is_float=reference.dtype.kind == "f")
    finite = np.isfinite(ref) & np.isfinite(cand)
    broken = (~finite & (ref != cand)).any(axis=1)
    low, high = ref.min(initial=math.inf, where=finite), ref.max(initial=-math.inf, where=finite)
    if not finite.all():
        ref, cand = np.where(finite, ref, 0.0), np.where(finite, cand, 0.0)
    error = np.abs(ref - cand)
    row_max = error.max(axis=1, initial=0.0)
    worst = int(row_max.argmax()) if n_rows else 0
    return replace(
        drift,
        n_values=error.size,
        max_abs=float(row_max[worst]) if n_rows else 0.0,
        worst_row=worst,
        sum_abs=float(error.sum()),
        sum_squares=_dot(error, error),
        reference_squares=_dot(ref, ref),
        candidate_squares=_dot(cand, cand),
        products=_dot(ref, cand),
        reference_min=float(low),
        reference_max=float(high),
        worst=worst_rows(far_rows(error, ref, broken)),
        first_squares=tuple(map(float, np.einsum("ij,ij->i", error[:N_LISTED], error[:N_LISTED]))),
    )


def _with_classes(
    drift: Drift, ref: NDArray[np.float64], cand: NDArray[np.float64], shape: tuple[int, ...], *, is_float: bool
) -> Drift:
    """With what is asked of outputs whose last axis holds classes; values that are not finite are alike on both."""
    n_classes = shape[-1]
    if len(shape) == 2 and n_classes > 1:
        rank = rank_of_winner(ref, cand)
        drift = replace(
            drift,
            n_ranked=len(rank),
            n_agreed=int((rank == 0).sum()),
            n_among_five=int((rank < _FIVE).sum()),
            n_classes=n_classes,
        )
    if not is_float or n_classes < 2 or drift.flaw:
        return drift
    p, q = ref.reshape(-1, n_classes), cand.reshape(-1, n_classes)
    likely = are_distributions(p, q)
    drift = replace(drift, n_vectors=len(p), n_distributions=int(likely.sum()))
    if likely.all():
        drift = replace(drift, sum_divergence=float(divergence(p, q).sum()))
    if drift.n_ranked:
        usable = (ref < math.inf).all(axis=1) & (ref > -math.inf).any(axis=1)
        total = float(softmax_divergence(ref[usable], cand[usable]).sum())
        drift = replace(drift, n_logits=int(usable.sum()), sum_softmax_divergence=total)
    return drift


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

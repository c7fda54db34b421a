"""A metric of many samples from what is kept of each, for any number of resamples at once.

Every function takes ``rows`` ``(n, k)``, what is kept of each sample, and ``weights`` ``(r, n)``, how often each of
``r`` resamples holds each sample, and gives ``(r,)`` float64. Ones for weights give the metric of the samples as they
are. A resample in which the metric is undefined gives NaN.
"""

from __future__ import annotations

import numpy as np

from onnxshrink.core.intervals import Floats


def mean(rows: Floats, weights: Floats) -> Floats:
    """Mean of the one column."""
    totals: Floats = weights @ rows[:, 0] / weights.sum(axis=1)
    return totals


def root_mean(rows: Floats, weights: Floats) -> Floats:
    """Root of the mean of the one column of squares."""
    return np.sqrt(mean(rows, weights))


def spearman(rows: Floats, weights: Floats) -> Floats:
    """Rank correlation of the two columns, ranked anew in each resample; equal values share their mean rank.

    A sample that a resample holds twice is a tie with itself, so that ranks follow from sums over the sorted values
    and nothing is sorted again.

    Source: Spearman, "The Proof and Measurement of Association between Two Things", 1904; Kendall, "Rank Correlation
        Methods", 1948, chapter 3, for ties.
    """
    first, second = (_centred_ranks(rows[:, column], weights) for column in (0, 1))
    both, one, other = ((weights * a * b).sum(axis=1) for a, b in ((first, second), (first, first), (second, second)))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Floats = both / np.sqrt(one * other)
    return np.clip(correlation, -1.0, 1.0)


def f1(rows: Floats, weights: Floats, average: str) -> Floats:
    """F1 from counts: ``rows`` are true positives, false positives and false negatives of each class, ``(n, 3 C)``.

    Args:
        rows: As above.
        weights: As above.
        average: As `onnxshrink.config.metrics.F1Score` has it.

    Source: van Rijsbergen, "Information Retrieval", 1979, chapter 7.
    """
    right, wrong, missed = _counts(rows, weights)
    if average == "binary":
        right, wrong, missed = (counts[:, -1:] for counts in (right, wrong, missed))
    elif average == "micro":
        right, wrong, missed = (counts.sum(axis=1, keepdims=True) for counts in (right, wrong, missed))
    return _mean_of_named(2 * right, 2 * right + wrong + missed)


def mean_iou(rows: Floats, weights: Floats) -> Floats:
    """Mean intersection over union from counts of pixels, as `f1` has them.

    Source: Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2015, section 4.4.
    """
    right, wrong, missed = _counts(rows, weights)
    return _mean_of_named(right, right + wrong + missed)


def one_more_of_each(original: Floats, candidate: Floats, n_samples: int) -> tuple[Floats, Floats]:
    """Counts of both models with two imagined samples more: one that the candidate alone gets wrong, one right.

    A bootstrap has no width where no sample changed, however few there are. These two give it the width that
    `onnxshrink.core.intervals.matched_difference_interval` has, for they are what Bonett and Price add to proportions.
    Their labels are those of the mean sample.

    Args:
        original: ``(n, 3 C)`` counts, as `f1` takes them.
        candidate: The same of the other model.
        n_samples: Samples that the counts are of; more than ``n`` where neighbours were added up.
    """
    right, _, missed = np.split(original.sum(axis=0) / n_samples, 3)
    labels, none = right + missed, np.zeros_like(right)
    hit, miss = np.concatenate([labels, none, none]), np.concatenate([none, labels, labels])
    return np.vstack([original, hit, miss]), np.vstack([candidate, miss, hit])


def _counts(rows: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    right, wrong, missed = np.split(weights @ rows, 3, axis=1)
    return right, wrong, missed


def _mean_of_named(part: Floats, whole: Floats) -> Floats:
    """Mean of ``part / whole`` over the columns where there is a whole."""
    named = whole > 0
    shares = np.divide(part, whole, out=np.zeros_like(part), where=named)
    with np.errstate(invalid="ignore"):
        means: Floats = shares.sum(axis=1) / named.sum(axis=1)
    return means


def _centred_ranks(values: Floats, weights: Floats) -> Floats:
    """Ranks less their mean, ``(r, n)``."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    held = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(held, axis=1) - held / 2
    ranks -= weights.sum(axis=1, keepdims=True) / 2
    group = np.empty(len(values), dtype=np.intp)
    group[order] = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])
    centred: Floats = ranks[:, group]
    return centred

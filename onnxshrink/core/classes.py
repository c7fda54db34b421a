"""Rows of an output as opinions about classes: where the winner went, and how far two distributions are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEAST_PROBABILITY = 2.0**-24
"""What counts as a candidate's zero: half the step of float32 below 1.

A class that quantization rounds to zero then costs much, and not infinity: 8-bit probabilities have many.
"""

_SUM_TOLERANCE = 1e-3  # float16 probabilities add up to 1 within 5e-4


def rank_of_winner(reference: Floats, candidate: Floats) -> NDArray[np.int64]:
    """At which place of the candidate's order the reference's winning class is; 0 where both agree.

    Args:
        reference: ``(n, n_classes)``, at least one class; of equal classes the first wins.
        candidate: The same shape; of equal classes the first is the better.

    Returns:
        ``(n,)``: how many classes the candidate puts before it.
    """
    winner = reference.argmax(axis=1)[:, None]
    own = np.take_along_axis(candidate, winner, axis=1)
    first = np.arange(candidate.shape[1]) < winner
    before: NDArray[np.int64] = ((candidate > own) | ((candidate == own) & first)).sum(axis=1)
    return before


def are_distributions(reference: Floats, candidate: Floats) -> NDArray[np.bool_]:
    """Which rows hold probabilities: ``(n,)``, True where the reference's are >= 0 and add up to 1.

    The candidate's need only be >= 0: rounded to 8 bits, a thousand probabilities no longer add up to 1.

    Args:
        reference: ``(n, n_classes)``, without NaN.
        candidate: The same.
    """
    with np.errstate(invalid="ignore"):  # masked logits: infinities that no probability is
        sums = np.abs(reference.sum(axis=1) - 1) <= _SUM_TOLERANCE
    holds: NDArray[np.bool_] = sums & (reference >= 0).all(axis=1) & (candidate >= 0).all(axis=1)
    return holds


def divergence(reference: Floats, candidate: Floats) -> Floats:
    """Kullback-Leibler divergence of each candidate's row from the reference's, ``(n,)`` in nats.

    Rows are normalized to a sum of 1, the candidate's after its zeros were raised to `LEAST_PROBABILITY`.

    Args:
        reference: ``(n, n_classes)``, >= 0, not all zeros.
        candidate: The same shape, >= 0.

    Source: Kullback and Leibler, "On Information and Sufficiency", 1951, eq. 2.4.
    """
    p = reference / reference.sum(axis=1, keepdims=True)
    q = np.maximum(candidate, LEAST_PROBABILITY)
    q = q / q.sum(axis=1, keepdims=True)
    terms = np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0)
    total: Floats = np.maximum(terms.sum(axis=1), 0.0)  # below zero only by rounding
    return total


def softmax_divergence(reference: Floats, candidate: Floats) -> Floats:
    """`divergence` of the softmax of each row, from logits: ``(n,)`` in nats.

    Args:
        reference: ``(n, n_classes)``; a class that is masked on both sides is minus infinity, at least one is finite.
        candidate: The same shape, with the same classes masked.
    """
    logs_p, logs_q = _log_softmax(reference), _log_softmax(candidate)
    alive = np.isfinite(logs_p)
    gap = np.where(alive, logs_p, 0.0) - np.where(alive, logs_q, 0.0)
    total: Floats = np.maximum((np.exp(logs_p) * gap).sum(axis=1), 0.0)
    return total


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs

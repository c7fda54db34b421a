"""Rows as opinions about classes, against scipy and sorting."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from onnxshrink.core.classes import (
    LEAST_PROBABILITY,
    are_distributions,
    divergence,
    rank_of_winner,
    softmax_divergence,
)

RNG = np.random.default_rng(0)


def test_the_winner_is_found_where_a_stable_sort_puts_it() -> None:
    """Few values, so that many classes are equal: the place is that of a stable sort, on both sides."""
    ref, cand = (RNG.integers(0, 4, (200, 9)).astype(float) for _ in range(2))
    order = np.argsort(-cand, axis=1, kind="stable")
    wanted = [list(row).index(winner) for row, winner in zip(order, ref.argmax(axis=1), strict=True)]
    assert rank_of_winner(ref, cand).tolist() == wanted
    assert (rank_of_winner(ref, ref) == 0).all()


def test_divergence_equals_scipy() -> None:
    """Zeros of the candidate are raised to the least probability first, those of the reference cost nothing."""
    p, q = (RNG.dirichlet(np.full(7, 0.3), 50) for _ in range(2))
    p[::3, 2] = 0
    q[::2, 1] = 0
    wanted = entropy(p, np.maximum(q, LEAST_PROBABILITY), axis=1)
    assert divergence(p, q) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert np.isfinite(wanted).all()
    assert divergence(p, p) == pytest.approx(np.zeros(50), abs=1e-5)


def test_softmax_divergence_equals_scipy() -> None:
    """Of logits of any size; classes masked on both sides are no part of it."""
    a, b = (RNG.normal(0, 30, (50, 6)) for _ in range(2))
    assert softmax_divergence(a, b) == pytest.approx(entropy(softmax(a, axis=1), softmax(b, axis=1), axis=1), rel=1e-6)
    masked = [np.concatenate([side, np.full((50, 2), -np.inf)], axis=1) for side in (a, b)]
    assert softmax_divergence(*masked) == pytest.approx(softmax_divergence(a, b))
    assert softmax_divergence(a, a + 5) == pytest.approx(np.zeros(50), abs=1e-9)


def test_what_are_probabilities() -> None:
    """float16 and 8-bit softmax are; logits, one-sided negatives, rows of zeros and masked logits are not."""
    p = softmax(RNG.normal(size=(1, 1000)), axis=1)
    assert are_distributions(p.astype(np.float16).astype(float), np.round(p * 255) / 255)
    for ref, cand in ((p * 2, p), (p, p - 1e-3), (p * 0, p), (np.log(p), p)):
        assert not are_distributions(ref, cand)
    assert not are_distributions(np.array([[np.inf, -np.inf]]), np.array([[np.inf, -np.inf]]))

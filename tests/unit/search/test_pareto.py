"""The front and its hypervolume, against optuna's own."""

from __future__ import annotations

import numpy as np
import pytest

from onnxshrink.search.pareto import dominates, front, hypervolume


def test_dominance_needs_one_objective_that_is_smaller() -> None:
    """Equal points do not beat each other; one that is smaller anywhere and larger nowhere beats."""
    assert dominates((1.0, 2.0), (1.0, 3.0))
    assert not dominates((1.0, 2.0), (1.0, 2.0))
    assert not dominates((0.0, 3.0), (1.0, 2.0))


def test_of_equal_points_the_first_is_on_the_front() -> None:
    """The front keeps the points' order, and one of those that are equal."""
    assert front([(3.0, 1.0), (1.0, 2.0), (3.0, 1.0), (2.0, 2.0)]) == [0, 1]
    assert front([]) == []


@pytest.mark.parametrize("n_objectives", [1, 2, 3, 4])
def test_hypervolume_is_optunas(n_objectives: int) -> None:
    """The volume is what optuna computes, ties and points beyond the corner included."""
    wfg = pytest.importorskip("optuna._hypervolume")
    for seed in range(20):
        points = np.random.default_rng(seed).integers(0, 12, (15, n_objectives)).astype(float)
        corner = np.full(n_objectives, 10.0)
        inside = points[(points < corner).all(1)]
        theirs = wfg.compute_hypervolume(inside, corner) if len(inside) else 0.0
        assert hypervolume([tuple(map(float, point)) for point in points], tuple(corner)) == pytest.approx(theirs)

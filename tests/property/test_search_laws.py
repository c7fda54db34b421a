"""Laws of the search: it ends, it asks nothing twice, it can be repeated, and it misses nothing it could have known."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from search_worlds import World, searched

from onnxshrink.config.budget import Budget
from onnxshrink.core.intervals import ratio_margin_db
from onnxshrink.search.pareto import dominates, front, hypervolume
from onnxshrink.search.record import objectives
from onnxshrink.search.trial import key_of

_schemes = st.dictionaries(
    st.sampled_from(["fp32", "fp16", "static", "compact", "weights_4", "mixed", "trained_static"]),
    st.tuples(st.sampled_from([0.5, 1.0, 1.25, 2.0, 4.0]), st.sampled_from([5.0, 14.0, 20.0, 20.5, 30.0, 60.0])),
    min_size=1,
)
_budgets = st.builds(
    Budget,
    max_size=st.sampled_from([150, 500, 5000, 10**6]),
    max_accuracy_drop=st.sampled_from([None, 0.05, 0.2]),
    min_sqnr_db=st.sampled_from([None, 19.0]),
    minimize=st.sampled_from(["size", "latency", "accuracy_drop"]),
)
_points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=8)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Up to eight trunks, some schemes, and points that fail."""
    widths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=5, unique=True))
    world = World(tuple(widths), draw(_schemes), noise=draw(st.sampled_from([0.0, 0.4])))
    keys = [key_of(point) for point in world.space.points()]
    world.failing = frozenset(draw(st.lists(st.sampled_from(keys), max_size=4)))
    return world


@settings(derandomize=True, deadline=None, max_examples=40)
@given(worlds(), _budgets, st.integers(1, 3))
def test_a_search_ends_and_asks_nothing_twice(world: World, budget: Budget, width: int) -> None:
    """Whatever fails, a search ends, and tries a point at most once at each depth; numbers are unique."""
    trials = searched(world, budget, width=width)
    assert max(world.asked.values(), default=0) <= 1
    assert len({trial.number for trial in trials}) == len(trials)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(worlds(), _budgets)
def test_a_search_can_be_repeated_and_resumed(world: World, budget: Budget) -> None:
    """The same world gives the same trials in the same order."""
    assert searched(world, budget) == searched(world, budget)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(worlds(), st.sampled_from([150, 500, 5000, 10**6]), st.sampled_from([0.05, 0.2]))
def test_what_keeps_every_limit_is_found(world: World, size: int, drop: float) -> None:
    """Where a model keeps every limit, a search without noise finds one, and of all that do the smallest."""
    world.noise = 0.0
    assume("mixed" not in world.schemes)
    budget = Budget(max_size=size, max_accuracy_drop=drop)
    fitting = [trial for trial in world.all() if objectives(trial)[0] <= size and objectives(trial)[1] <= drop]
    found = [trial for trial in searched(world, budget) if trial.status == "evaluated"]
    good = [objectives(trial) for trial in found if objectives(trial)[0] <= size and objectives(trial)[1] <= drop]
    assert min((size for size, _ in good), default=math.inf) == min(
        (objectives(trial)[0] for trial in fitting), default=math.inf
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(worlds())
def test_the_front_is_that_of_all_points(world: World) -> None:
    """Within limits that all keep and noise below the margin, the front is that of trying everything."""
    assume("mixed" not in world.schemes)
    every = [objectives(trial) for trial in world.all()]
    found = [objectives(trial) for trial in searched(world, Budget(max_size=10**9)) if trial.status == "evaluated"]
    assert {found[index] for index in front(found)} == {every[index] for index in front(every)}


@st.composite
def sampled_worlds(draw: st.DrawFn) -> World:
    """One trunk in up to forty schemes, measured on samples of which some are hard for all; probes within their margin.

    Schemes are left out of which a probe's difference from another one is farther from the truth than it should be.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread, own = draw(st.sampled_from([0.0, 0.5, 1.5])), draw(st.sampled_from([0.0, 0.2, 0.8]))
    n_schemes, n_samples = draw(st.integers(1, 40)), draw(st.sampled_from([20, 32, 400]))
    hard = rng.lognormal(0, spread, n_samples)
    schemes: dict[str, tuple[float, float]] = {}
    errors: dict[str, list[float]] = {}
    for n in range(n_schemes):
        found = (10 ** rng.uniform(-5, -2) * hard * rng.lognormal(0, own, n_samples)).tolist()
        if all(_off(found, other) <= ratio_margin_db(found[:32], other[:32]) + 1e-9 for other in errors.values()):
            schemes[f"s{n}"], errors[f"s{n}"] = (float(rng.integers(1, 9)) / 4, 0.0), found
    return World((20,), schemes, labelled=False, errors=errors)


def _off(one: list[float], other: list[float]) -> float:
    """By how much the difference of two drifts in dB on the first 32 samples is wrong."""
    few, whole = sum(one[:32]) / sum(other[:32]), sum(one) / sum(other)
    return abs(10 * math.log10(few / whole))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(sampled_worlds())
def test_the_front_is_that_of_all_points_where_probes_are_within_their_margin(world: World) -> None:
    """Nothing on the front is left out by a probe, whatever the noise that the probe itself tells of."""
    every = [objectives(trial) for trial in world.all()]
    found = [objectives(trial) for trial in searched(world, Budget(max_size=10**9)) if trial.status == "evaluated"]
    assert {found[index] for index in front(found)} == {every[index] for index in front(every)}


@settings(derandomize=True, deadline=None, max_examples=40)
@given(_points)
def test_the_front_dominates_the_rest(points: list[tuple[float, ...]]) -> None:
    """No point of a front beats another; each that is left out is beaten by one, or its equal, and adds no volume."""
    kept = front(points)
    best = [points[index] for index in kept]
    assert not any(dominates(one, other) for one in best for other in best)
    assert all(any(dominates(one, point) or one == point for one in best) for point in points)
    assert hypervolume(best, (7.0, 7.0, 7.0)) == hypervolume(points, (7.0, 7.0, 7.0))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(_points)
def test_hypervolume_counts_cells(points: list[tuple[int, ...]]) -> None:
    """On a grid the volume is the number of unit cells that a point dominates."""
    grid = [(x, y, z) for x in range(7) for y in range(7) for z in range(7)]
    cells = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in grid)
    assert hypervolume(points, (7.0, 7.0, 7.0)) == cells

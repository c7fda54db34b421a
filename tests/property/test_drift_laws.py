"""Laws of drift that hold for any outputs."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.core.drift import Drift

quick = settings(derandomize=True, deadline=None, max_examples=60)
values = st.floats(-1e6, 1e6, width=32)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Reference and candidate of one shape."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 5)))
    arrays = hnp.arrays(np.float32, shape, elements=values)
    return draw(arrays), draw(arrays)


def numbers(drift: Drift) -> list[float]:
    """Every measure, as a vector."""
    absolute = [drift.max_abs, drift.mean_abs, drift.rmse]
    return [*absolute, drift.sqnr_db, drift.psnr_db, drift.cosine, drift.relative_l2, drift.worst_row]


def counts(drift: Drift) -> list[object]:
    """What is counted or chosen, and must be the same to the bit."""
    counted = [getattr(drift, name) for name in fields_of(int)]
    return [*counted, drift.reference_min, drift.reference_max, drift.max_abs, drift.worst, drift.flaw]


def fields_of(kind: type) -> list[str]:
    """Names of the fields of one type, without the place that `numbers` has."""
    return [field.name for field in fields(Drift) if field.type == kind.__name__ and field.name != "worst_row"]


@quick
@given(pairs(), st.integers(0, 9))
def test_merging_parts_gives_the_whole(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    """Wherever the rows are cut, the parts merge to the drift of all rows."""
    ref, cand = pair
    whole = Drift("y").update(ref, cand)
    merged = Drift("y").update(ref[:cut], cand[:cut]).merge(Drift("y").update(ref[cut:], cand[cut:]))
    assert numbers(merged) == pytest.approx(numbers(whole), rel=1e-9, nan_ok=True)
    assert counts(merged) == counts(whole)


@quick
@given(pairs(), st.integers(0, 9), st.integers(0, 9))
def test_merging_does_not_ask_in_which_order(pair: tuple[np.ndarray, np.ndarray], a: int, b: int) -> None:
    """Three parts, the first two first or the last two first: the same, and nothing changes by an empty part."""
    first, second = sorted((a, b))
    one, two, three = (
        Drift("y").update(*(side[part] for side in pair))
        for part in (slice(0, first), slice(first, second), slice(second, None))
    )
    left, right = one.merge(two).merge(three), one.merge(two.merge(three))
    assert counts(left) == counts(right)
    assert numbers(left) == pytest.approx(numbers(right), rel=1e-9, nan_ok=True)
    assert left.merge(Drift("y")) == left == Drift("y").merge(left)


@quick
@given(pairs())
def test_divergences_are_none_or_at_least_zero(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Zero against itself, and never below."""
    ref, cand = pair
    for candidate in (ref, cand):
        measured = Drift("y").update(ref, candidate)
        for value in (measured.kl_divergence, measured.softmax_kl):
            assert value is None or value >= 0
    assert (Drift("y").update(ref, ref).softmax_kl or 0) == 0


@quick
@given(pairs())
def test_five_best_hold_the_best(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Whoever wins on both sides is among the five best, and the winner of the same side always is."""
    ref, cand = (np.repeat(side, 2, axis=1) for side in pair)
    measured = Drift("y").update(ref, cand)
    assert measured.n_agreed <= measured.n_among_five <= measured.n_ranked
    assert Drift("y").update(ref, ref).n_agreed == measured.n_ranked


@quick
@given(pairs(), st.sampled_from([2.0**-3, 2.0, 2.0**10]))
def test_relative_measures_do_not_depend_on_the_unit(pair: tuple[np.ndarray, np.ndarray], scale: float) -> None:
    """Scaling both sides scales absolute errors and leaves decibels, cosine and agreement alone."""
    ref, cand = (array.astype(np.float64) for array in pair)
    plain, scaled = Drift("y").update(ref, cand), Drift("y").update(ref * scale, cand * scale)
    assert numbers(scaled)[:3] == pytest.approx([value * scale for value in numbers(plain)[:3]])
    assert numbers(scaled)[3:] == pytest.approx(numbers(plain)[3:], nan_ok=True, rel=1e-9, abs=1e-9)
    assert scaled.n_agreed == plain.n_agreed


@quick
@given(pairs())
def test_decibels_and_distance_tell_the_same(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """SQNR is -20 log10 of the relative distance, and the cosine lies within -1 and 1."""
    drift = Drift("y").update(*pair)
    if math.isfinite(drift.sqnr_db):
        assert drift.sqnr_db == pytest.approx(-20 * math.log10(drift.relative_l2), abs=1e-9)
    assert math.isnan(drift.cosine) or -1 <= drift.cosine <= 1

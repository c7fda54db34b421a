"""Laws of drift that hold for any outputs."""

from __future__ import annotations

import math

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
    return [drift.max_abs, drift.mean_abs, drift.sqnr_db, drift.cosine, drift.relative_l2, drift.worst_row]


@quick
@given(pairs(), st.integers(0, 9))
def test_merging_parts_gives_the_whole(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    """Wherever the rows are cut, the parts merge to the drift of all rows."""
    ref, cand = pair
    whole = Drift("y").update(ref, cand)
    merged = Drift("y").update(ref[:cut], cand[:cut]).merge(Drift("y").update(ref[cut:], cand[cut:]))
    assert numbers(merged) == pytest.approx(numbers(whole), rel=1e-9, nan_ok=True)
    assert (merged.n_rows, merged.n_values, merged.n_agreed) == (whole.n_rows, whole.n_values, whole.n_agreed)


@quick
@given(pairs(), st.sampled_from([2.0**-3, 2.0, 2.0**10]))
def test_relative_measures_do_not_depend_on_the_unit(pair: tuple[np.ndarray, np.ndarray], scale: float) -> None:
    """Scaling both sides scales absolute errors and leaves decibels, cosine and agreement alone."""
    ref, cand = (array.astype(np.float64) for array in pair)
    plain, scaled = Drift("y").update(ref, cand), Drift("y").update(ref * scale, cand * scale)
    assert scaled.max_abs == pytest.approx(plain.max_abs * scale)
    assert numbers(scaled)[2:] == pytest.approx(numbers(plain)[2:], nan_ok=True, rel=1e-9, abs=1e-9)
    assert scaled.n_agreed == plain.n_agreed


@quick
@given(pairs())
def test_decibels_and_distance_tell_the_same(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """SQNR is -20 log10 of the relative distance, and the cosine lies within -1 and 1."""
    drift = Drift("y").update(*pair)
    if math.isfinite(drift.sqnr_db):
        assert drift.sqnr_db == pytest.approx(-20 * math.log10(drift.relative_l2), abs=1e-9)
    assert math.isnan(drift.cosine) or -1 <= drift.cosine <= 1

"""Laws of which weights stay: counts, magnitudes and order, against numpy."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from onnxshrink.stages.prune_weights import largest, largest_of_groups

# Few values, so that many are equal.
VALUES = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5])
QUICK = settings(derandomize=True, deadline=None, max_examples=200)


@QUICK
@given(arrays(np.float32, array_shapes(min_dims=1, max_dims=1, max_side=40), elements=VALUES), st.data())
def test_the_largest_stay(values: np.ndarray, data: st.DataObject) -> None:
    """As many as asked for; none that goes is larger, and of equal ones the first stay: numpy's stable order."""
    count = data.draw(st.integers(0, values.size))
    kept = largest(torch.from_numpy(values), count).numpy()
    want = np.zeros(values.size, bool)
    want[np.argsort(-values, kind="stable")[:count]] = True
    np.testing.assert_array_equal(kept, want)


@QUICK
@given(
    arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=30), elements=VALUES),
    st.integers(2, 8).flatmap(lambda size: st.tuples(st.integers(1, size - 1), st.just(size))),
)
def test_every_group_keeps_its_largest(values: np.ndarray, pattern: tuple[int, int]) -> None:
    """N of M in each group of each row, N or all of the last; each group is what numpy makes of it alone."""
    count, size = pattern
    kept = largest_of_groups(torch.from_numpy(values), count, size).numpy()
    for row, mask in zip(values, kept, strict=True):
        for at in range(0, row.size, size):
            group, chosen = row[at : at + size], mask[at : at + size]
            want = np.zeros(group.size, bool)
            want[np.argsort(-group, kind="stable")[:count]] = True
            np.testing.assert_array_equal(chosen, want)
            assert chosen.sum() == min(count, group.size)

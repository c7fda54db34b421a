"""Laws of weights in blocks."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxshrink.stages.blocks import packed, quantize_blocks

ROWS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=70),
    elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False),
)


@settings(derandomize=True, deadline=None)
@given(ROWS, st.sampled_from([16, 32, 64]))
def test_eight_bits_are_within_a_step(rows: np.ndarray, block_size: int) -> None:
    """Every weight comes back within one step of its block: half for the rounding, half for the zero point's."""
    blocks = quantize_blocks(rows, bits=8, block_size=block_size)
    steps = np.repeat(blocks.scales, block_size, axis=1)[:, : rows.shape[1]]
    assert (np.abs(blocks.dequantized() - rows) <= steps * 1.001).all()


@settings(derandomize=True, deadline=None)
@given(ROWS, st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]))
def test_zero_stays_zero(rows: np.ndarray, bits: int, block_size: int) -> None:
    """A weight of zero is exactly zero again, and what pads a row never shows."""
    blocks = quantize_blocks(rows, bits=bits, block_size=block_size)
    got = blocks.dequantized()
    assert got.shape == rows.shape
    assert (got[rows == 0] == 0).all()
    assert blocks.values.max() < 2**bits
    assert blocks.zero_points.max() < 2**bits


@settings(derandomize=True, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3), elements=st.integers(0, 15)))
def test_packing_loses_nothing(values: np.ndarray) -> None:
    """Unpacked, the bytes are the values again."""
    small = packed(values, 4)
    back = np.stack([small & 15, small >> 4], -1).reshape(*small.shape[:-1], -1)
    np.testing.assert_array_equal(back[..., : values.shape[-1]], values)

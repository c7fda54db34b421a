"""Weights in blocks: 4 or 8 bits each, with a scale and a zero point for every few of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Shares of a block's range. At 4 bits a block is nearer its weights if its largest is clipped a little.
_SHRINK = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 8: (1.0,)}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Quantized rows: ``weight = scale * (value - zero_point)``.

    Attributes:
        values: ``(n_rows, n_blocks, block_size)`` uint8; what pads the last block equals its zero point.
        scales: ``(n_rows, n_blocks)`` float32.
        zero_points: ``(n_rows, n_blocks)`` uint8.
        bits: 4 or 8; values and zero points are below ``2**bits``.
        width: Length of a row without its padding.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]
    bits: int
    width: int

    def dequantized(self) -> NDArray[np.float32]:
        """What the runtime computes with: ``(n_rows, width)`` float32."""
        steps = self.values.astype(np.float32) - self.zero_points[..., None]
        rows: NDArray[np.float32] = (steps * self.scales[..., None]).reshape(len(self.values), -1)
        return rows[:, : self.width]


def quantize_blocks(rows: NDArray[np.float32], *, bits: int, block_size: int) -> Blocks:
    """Round weights to the grid of their block; each grid holds zero.

    At 8 bits a grid spans its block. At 4 bits it is the one of seven, from all of the span to 0.7 of it, whose squared
    error is least.

    Args:
        rows: ``(n_rows, width)`` float32, finite. Blocks run along the rows.
        bits: 4 or 8.
        block_size: Weights of a block; the last block of a row may have fewer.
    """
    n_rows, width = rows.shape
    n_blocks = -(-width // block_size)
    values = np.empty((n_rows, n_blocks, block_size), np.uint8)
    scales = np.empty((n_rows, n_blocks), np.float32)
    zero_points = np.empty((n_rows, n_blocks), np.uint8)
    step = max(1, _CHUNK // (n_blocks * block_size))
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        padded = np.pad(rows[part], ((0, 0), (0, n_blocks * block_size - width)))
        blocks = padded.reshape(-1, n_blocks, block_size)
        values[part], scales[part], zero_points[part] = _best_grid(blocks, bits)
    return Blocks(values, scales, zero_points, bits, width)


def packed(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit values to a byte along the last axis, the first one low; 8-bit values as they are.

    An odd axis is padded with zero.
    """
    if bits == 8:
        return values
    if values.shape[-1] % 2:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
    return np.asarray(values[..., ::2] | (values[..., 1::2] << 4), np.uint8)


def _best_grid(
    blocks: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    top = 2**bits - 1
    lo, hi = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    best: NDArray[np.float32] | None = None
    for share in _SHRINK[bits]:
        scale = np.asarray((hi - lo) * np.float32(share / top), np.float32)
        scale = np.where(scale > 0, scale, np.float32(1))
        zero = np.clip(np.round(-lo * np.float32(share) / scale), 0, top)
        steps = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, top)
        error = np.square((steps - zero[..., None]) * scale[..., None] - blocks).sum(-1)
        if best is None:
            best, result = error, (steps.astype(np.uint8), scale, zero.astype(np.uint8))
            continue
        better = error < best
        best = np.where(better, error, best)
        new = (steps.astype(np.uint8), scale, zero.astype(np.uint8))
        result = (
            np.where(better[..., None], new[0], result[0]),
            np.where(better, new[1], result[1]),
            np.where(better, new[2], result[2]),
        )
    return result

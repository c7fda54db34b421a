"""Rounding as the quantize stages will do it, in torch and with a gradient: what is rounded stays float.

Rounding has no slope, so its gradient is taken as one: the straight-through estimator of Bengio et al. 2013,
"Estimating or Propagating Gradients Through Stochastic Neurons". What an activation's range clips has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from onnxshrink.calibration.ranges import Range
from onnxshrink.config.stages import QuantizeStatic, QuantizeWeights
from onnxshrink.stages.blocks import quantize_blocks

Scheme: TypeAlias = QuantizeStatic | QuantizeWeights

# Of `quantize_weights`: the least weights that gain from fewer bits, and the least in a row that make a block.
_MIN_WEIGHTS, _MIN_BLOCK = 256, 16
_CLIPS = tuple(0.87**k for k in range(25))  # of the largest weight, down to 0.035
_LEVELS = 255  # steps between the 256 values of a byte


def round_activation(values: Tensor, limits: Range) -> Tensor:
    """The 8-bit values that stand for ``values``, as QuantizeLinear and DequantizeLinear give them.

    Signed and unsigned bytes have the same grid, whose zero is exact. A quotient within 1e-6 of a tie may go to
    either side: torch multiplies by the inverse of the scale where ONNX divides.

    Args:
        values: Any shape, float32.
        limits: ``(lo, hi)`` with ``lo <= 0 <= hi``; with no width between them all values become zero.

    Returns:
        The same shape; the gradient is that of clipping to the grid.
    """
    scale, zero_point = grid_of(limits)
    rounded: Tensor = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, _LEVELS)
    return rounded


def grid_of(limits: Range) -> tuple[float, int]:
    """Scale and unsigned zero point of an activation: the arithmetic of ONNX Runtime's ``compute_scale_zp``."""
    lo, hi = (np.float32(limit) for limit in limits)
    scale = np.float32((np.float64(hi) - np.float64(lo)) / _LEVELS)
    if scale < np.finfo(np.float32).tiny:
        return 1.0, 0
    return float(scale), int(np.round(-np.float64(lo) / np.float64(scale)))


def round_weights(weights: Tensor, *, axis: int | None, bits: int = 8, signed: bool = True) -> Tensor:
    """Weights as ONNX Runtime's static quantization has them, bit for bit as DequantizeLinear gives them back.

    Args:
        weights: Any shape, float32.
        axis: The axis with a scale for each place; None for one scale in all.
        bits: 8, or 7 for processors that add products in 16 bits.
        signed: A grid from -127 to 127 (64 in 7 bits), or one from the lowest weight to the highest, and zero.

    Returns:
        The same shape; nothing is clipped, so the gradient is that of ``weights``.
    """
    values = weights.detach()
    others = [at for at in range(values.ndim) if at != axis]
    lo, hi = values.amin(dim=others, keepdim=True).clamp_max(0), values.amax(dim=others, keepdim=True).clamp_min(0)
    if signed:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    steps = (254 if bits == 8 else 128) if signed else 2**bits - 1
    scale = ((hi.double() - lo.double()) / steps).float()
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    lowest = torch.full_like(scale, -steps // 2) if signed else (lo.double() / scale.double()).round().float()
    rounded = values.div(scale).round_()
    return _straight_through(weights, rounded.clamp_(lowest, lowest + steps).mul_(scale))


def round_blocks(rows: Tensor, *, bits: int, block_size: int) -> Tensor:
    """Weights in blocks along the rows, as `quantize_weights` stores them.

    Args:
        rows: ``(n_rows, width)`` float32.
        bits: 4 or 8.
        block_size: Weights of a block.

    Returns:
        The same shape; the gradient is that of ``rows``.
    """
    array = np.ascontiguousarray(rows.detach().cpu().numpy(), np.float32)
    rounded = quantize_blocks(array, bits=bits, block_size=block_size).dequantized()
    return _straight_through(rows, torch.from_numpy(np.ascontiguousarray(rounded)).to(rows.device))


def rounded_weights(weights: Tensor, operator: str, scheme: Scheme) -> Tensor:
    """A layer's weights as the quantize stage will round them.

    Args:
        weights: In torch's layout.
        operator: ``Conv``, ``ConvTranspose``, ``Gemm`` (any linear layer) or ``Gather`` (an embedding).
        scheme: Settings of that stage.
    """
    output_axis = 1 if operator == "ConvTranspose" else 0
    if isinstance(scheme, QuantizeStatic):
        axis = None if scheme.granularity == "per_tensor" or operator == "Gather" else output_axis
        bits = 7 if scheme.reduce_range is True else 8
        return round_weights(weights, axis=axis, bits=bits, signed=scheme.types != "u8u8")
    if weights.numel() < _MIN_WEIGHTS:
        return weights
    rows = weights.flatten(1)
    if operator in ("Conv", "ConvTranspose"):
        if scheme.bits == 8 or rows.shape[1] < _MIN_BLOCK:
            return round_weights(weights, axis=output_axis)
        block_size = min(int(scheme.block_size), rows.shape[1])
        return round_blocks(rows, bits=scheme.bits, block_size=block_size).view_as(weights)
    return round_blocks(rows, bits=scheme.bits, block_size=scheme.block_size)


def best_clip(
    weights: Tensor, operator: str, scheme: Scheme, noise: Callable[[Tensor], Tensor], *, axis: int
) -> Tensor:
    """The magnitude at which to clip weights that share a scale, so that rounding costs a layer's output the least.

    Its means over all but the channels do not count: the bias corrects them.

    Args:
        weights: In torch's layout.
        operator: As for `rounded_weights`.
        scheme: Settings of the quantize stage.
        noise: Called with rounded weights; returns what they add to the layer's output.
        axis: Of the channels in that output.

    Returns:
        A scalar, at most the largest magnitude.
    """

    def power(limit: Tensor) -> float:
        added = noise(rounded_weights(weights.clamp(-limit, limit), operator, scheme))
        return float(added.var(dim=[at for at in range(added.ndim) if at != axis], correction=0).sum())

    largest = weights.abs().max()
    return min((largest * clip for clip in _CLIPS), key=power)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004  torch's signature
        return rounded.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradients[0], None


def _straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``values``."""
    result: Tensor = _StraightThrough.apply(values, rounded)  # type: ignore[no-untyped-call]
    return result

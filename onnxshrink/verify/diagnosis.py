"""From the parts of a piece's error to its cause, and to the settings that would mend it.

The largest part decides where the cause is: the stored weights, an input, the result, the kernel. What it is follows
from numbers that can be looked up: how a grid lies to the values, what the best grid of equal bits would lose, whether
a bias lies within int32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.verify.local_error import GridError, Measured, PieceError, ratio
from onnxshrink.verify.pairing import Pair
from onnxshrink.verify.products import Weights

Cause: TypeAlias = Literal[
    "weight_range",
    "activation_clipping",
    "resolution",
    "bias_overflow",
    "saturation",
    "fused_kernel",
    "none",
    "unknown",
]

HEALTHY_DB = 30.0
"""At this local SQNR nothing needs mending. A grid of 256 steps over 9 deviations of a normal tensor gives 40 dB, over
28 deviations 30 dB, and a node has two to four such errors."""

WASTED_DB = 6.0
"""One bit: weights that another scale of equal bits would serve so much better have the wrong range."""

CREST = 20.0
"""Largest over root mean square of a channel's weights; a million normal ones reach 5."""

WIDE = 0.5
"""A grid of whose width the values use less than this wastes a bit or more."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a piece is wrong.

    Attributes:
        cause: Its name.
        node: The reference's node to blame: the one that makes ``tensor``, or reads it where it is an input.
        tensor: The reference's tensor at fault; the piece's own result where the weights or the kernel are.
        text: What is the case, with figures.
        change: What to do about it, in words.
        settings: Settings of the quantizing stage that do it; empty where none would.
    """

    cause: Cause
    node: str
    tensor: str
    text: str
    change: str
    settings: Mapping[str, Any]


def diagnose(error: PieceError, measured: Measured, pair: Pair, *, sees_saturation: bool) -> Finding:
    """The cause of a piece's local error.

    Args:
        error: The piece's sums.
        measured: Everything, for the grids of its inputs.
        pair: Both models.
        sees_saturation: True if this processor's own kernels saturate; then the kernel's part is told apart by what the
            emulator says.
    """
    piece = error.piece
    if not math.isfinite(error.local) or not math.isfinite(error.signal):
        return Finding(
            "unknown", piece.node, piece.reference, "its result is no finite number", "look at its inputs", {}
        )
    if error.product is not None and error.accumulated > 1:
        return _bias_overflow(error, f"a sum reaches {error.accumulated:.1f} times what int32 holds")
    if error.local_noise <= 10 ** (-HEALTHY_DB / 10):
        return Finding("none", piece.node, piece.reference, "nothing stands out", "", {})
    parts = {
        "weights": error.weights,
        "inputs": error.inputs,
        "output": 0.0 if error.output is None else error.output.rounding + error.output.clipping,
        "kernel": error.kernel,
        "saturation": 0.0 if sees_saturation else error.saturation,
    }
    largest = max(parts, key=lambda name: parts[name])
    match largest:
        case "weights":
            return _of_weights(error, pair)
        case "inputs":
            return _of_input(error, measured, pair)
        case "output" if error.output is not None:
            return _of_grid(error.output, piece.reference, piece.node)
        case "saturation":
            return _saturation(error, seen=False)
        case "kernel" if sees_saturation and error.saturation >= error.kernel / 4:
            return _saturation(error, seen=True)
        case "kernel":
            return _of_kernel(error)
    return Finding("unknown", piece.node, piece.reference, "no part of its error stands out", "", {})


def _of_weights(error: PieceError, pair: Pair) -> Finding:
    piece, product = error.piece, error.product
    share = f"{_decibels(error.weights, error.signal)} with nothing but its weights stored"
    if product is not None and product.bias is not None and product.bias.overflows:
        return _bias_overflow(error, f"its bias does not fit into int32 at its scale: {share}")
    exclude = {"exclude_nodes": [piece.node]}
    if product is None or product.weights is None:
        if any(pair.candidate.specs[out].dtype == "float16" for out in _floats(error, pair)):
            return Finding(
                "resolution",
                piece.node,
                piece.reference,
                f"float16 is too coarse: {share}",
                "keep it in float32",
                exclude,
            )
        if piece.quantizer is None and not any(
            "Quant" in n.op_type or "Integer" in n.op_type or "NBits" in n.op_type for n in piece.nodes
        ):
            return Finding(
                "unknown", piece.node, piece.reference, f"the two models do not compute the same here: {share}", "", {}
            )
        return Finding(
            "resolution", piece.node, piece.reference, f"its weights have too few bits: {share}", "leave it", exclude
        )
    weights = product.weights
    wasted = wasted_db(weights)
    crest = crest_of(weights.exact)
    if wasted >= WASTED_DB:
        text = f"another scale of {weights.bits} bits per channel would be {wasted:.0f} dB nearer its weights: {share}"
        return Finding(
            "weight_range",
            piece.node,
            piece.reference,
            text,
            "one scale per channel, from the weights",
            {"granularity": "per_channel"},
        )
    if crest >= CREST:
        text = f"one weight is {crest:.0f} times the others of its channel: {share}"
        return Finding(
            "weight_range", piece.node, piece.reference, text, "leave it in float, or equalize before", exclude
        )
    text = f"{weights.bits} bits are too few for its weights: {share}"
    return Finding("resolution", piece.node, piece.reference, text, "leave it in float", exclude)


def _floats(error: PieceError, pair: Pair) -> list[str]:
    return [out for node in error.piece.nodes for out in node.output if out in pair.candidate.specs]


def _of_input(error: PieceError, measured: Measured, pair: Pair) -> Finding:
    """The cause lies in the grid of the worst input, which another piece makes."""
    grids = {name: measured.grids[name] for name in error.piece.inputs if name in measured.grids}
    if not grids:
        return Finding(
            "resolution",
            error.piece.node,
            error.piece.reference,
            "its inputs are stored with too few bits, by ranges that follow each sample",
            "leave it in float",
            {"exclude_nodes": [error.piece.node]},
        )
    worst = max(grids, key=lambda name: grids[name].noise)
    tensor = error.piece.inputs[worst]
    maker = next((piece.node for piece in pair.pieces if piece.tensor == worst), error.piece.node)
    return _of_grid(grids[worst], tensor, maker)


def _of_grid(grid: GridError, tensor: str, node: str) -> Finding:
    noise = _decibels(grid.rounding + grid.clipping, grid.signal)
    reach = f"[{grid.grid.lo:.4g}, {grid.grid.hi:.4g}]"
    values = f"[{grid.lo:.4g}, {grid.hi:.4g}]"
    if grid.clipping > grid.rounding:
        text = f"{grid.clipped / grid.size:.1%} of {tensor!r} lies beyond {reach}, up to {values}: {noise}"
        return Finding(
            "activation_clipping",
            node,
            tensor,
            text,
            "ranges that hold it, from samples like these",
            {"method": "minmax"},
        )
    if grid.used_ratio < WIDE:
        text = f"the grid {reach} of {tensor!r} is far wider than its values {values}: {noise}"
        return Finding("resolution", node, tensor, text, "ranges from samples like these", {"method": "minmax"})
    text = f"{tensor!r} needs finer steps than {grid.grid.scale:.3g} within {values}: {noise}"
    return Finding("resolution", node, tensor, text, "leave the node in float", {"exclude_nodes": [node]})


def _bias_overflow(error: PieceError, text: str) -> Finding:
    node = error.piece.node
    return Finding("bias_overflow", node, error.piece.reference, text, "leave it in float", {"exclude_nodes": [node]})


def _saturation(error: PieceError, *, seen: bool) -> Finding:
    noise = _decibels(error.kernel if seen else error.saturation, error.signal)
    how = "seen on this processor" if seen else "forecast for x86 without VNNI"
    text = f"sums of two products leave int16, {how}: {noise}"
    return Finding(
        "saturation", error.piece.node, error.piece.reference, text, "weights of 7 bits", {"reduce_range": True}
    )


def _of_kernel(error: PieceError) -> Finding:
    noise = _decibels(error.kernel, error.signal)
    text = f"the kernels that run differ from the operators in the file: {noise}"
    return Finding(
        "fused_kernel",
        error.piece.node,
        error.piece.reference,
        text,
        "leave it in float, and report it to ONNX Runtime",
        {"exclude_nodes": [error.piece.node]},
    )


def wasted_db(weights: Weights) -> float:
    """How much nearer symmetric scales of equal bits, one per channel from its largest weight, would come.

    Errors count relative to their own channel, so that a small channel matters as much as a large one.

    Returns:
        Decibels; negative where the weights are stored better than that.
    """
    steps = (1 << (weights.bits - 1)) - 1
    scale = np.abs(weights.exact).max(axis=1, keepdims=True) / steps
    safe = np.where(scale > 0, scale, 1.0)
    best = _relative(weights.exact, np.rint(weights.exact / safe) * scale)
    now = _relative(weights.exact, weights.restored)
    return math.inf if best == 0 < now else 10 * math.log10(now / best) if now > 0 else 0.0


def crest_of(weights: NDArray[np.float64]) -> float:
    """Largest weight over the root mean square of the rest of its channel, of the worst channel; 0 for no weights."""
    squares = np.square(weights)
    if weights.shape[1] < 2:
        return 0.0
    largest = squares.max(axis=1)
    others = (squares.sum(axis=1) - largest) / (weights.shape[1] - 1)
    return float(np.sqrt(np.max(largest[others > 0] / others[others > 0], initial=0.0)))


def _relative(exact: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    signal = np.square(exact).sum(axis=1)
    used = signal > 0
    return float((np.square(exact - other).sum(axis=1)[used] / signal[used]).mean()) if used.any() else 0.0


def _decibels(error: float, signal: float) -> str:
    noise = ratio(error, signal)
    return "no error" if noise == 0 else f"{-10 * math.log10(noise):.1f} dB" if math.isfinite(noise) else "no signal"

"""Cross-layer equalization: channels of a Conv and of the next one share their ranges evenly; the function stays.

One scale for a whole weight tensor serves its largest channel, and the small ones lose their bits. Where a Conv feeds
one other Conv, a channel may be scaled up in the first and down in the second: ``relu(k x) = k relu(x)``, ``k > 0``.

``Clip(x, 0, 6)`` is not homogeneous, and ONNX has no bound per channel to scale with it. Relu in its place would be
another function (EfficientNet-Lite0 falls to 0.4 dB), and a bound per channel costs a node in float. So a channel in
front of a Clip is scaled only where interval arithmetic proves that its upper bound is never reached, whatever the
input: the Conv behind another Clip has a bounded input.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxshrink.config.stages import Equalize
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ParityError
from onnxshrink.runtime.graph import graphs_of, load_model, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.optimize import gather

_MOST_SWEEPS = 50
_CONVERGED = 1e-3  # of the natural logarithm of a factor
_LARGEST_FACTOR = 2.0**10  # a channel that is smaller still is noise, and scaling it would overflow the next tools

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two Convs whose shared channels may be scaled.

    Attributes:
        first: The Conv that writes the channels.
        second: The Conv that alone reads them.
        limit: Largest factor of each channel, ``(channels,)``; infinity where it is free, and zero where it must stay.
    """

    first: onnx.NodeProto
    second: onnx.NodeProto
    limit: Floats


def equalize(settings: Equalize, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Scale the channels between Convs, and compare the result with the input on samples.

    Returns:
        Pairs, channels and how many of them were scaled; the spread of the channel ranges before and after; why Convs
        were left; the largest relative error.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
        ParityError: The result gives other numbers: the weights' dynamic range is beyond float32.
    """
    model = load_model(source.model_path)
    evidence = gather(model, ctx)
    facts = equalize_model(model)
    error = evidence.error(Session(save_model(model, out), optimization="disabled"))
    if not error <= settings.max_abs_error:
        raise ParityError(
            "the equalized model differs from the one it was made of",
            where=f"{ctx.step}, on {evidence.origin}",
            got=f"max|candidate - reference| = {error:.3g} of max(1, max|reference|)",
            want=f"at most {settings.max_abs_error:.3g}",
            fix="leave the stage out: a model that draws random numbers cannot be compared",
        )
    return facts | {"samples_from": evidence.origin, "max_error": error, "max_abs_error": settings.max_abs_error}


def equalize_model(model: onnx.ModelProto) -> Facts:
    """Scale the weights and biases of ``model`` in place until the ranges on both sides of each channel are equal.

    Returns:
        ``pairs``, ``channels``, ``channels_scaled``, ``spread_before``, ``spread_after`` and ``declined``.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs, declined = _pairs_of(model, tensors)
    names = dict.fromkeys(
        name for pair in pairs for name in (*pair.first.input[1:], pair.second.input[1]) if name in tensors
    )
    weights: dict[str, Floats] = {name: numpy_helper.to_array(tensors[name]).astype(np.float64) for name in names}
    factors = [np.ones(pair.limit.size) for pair in pairs]
    before = _spread(pairs, weights)
    for _ in range(_MOST_SWEEPS):
        moved = max((_equalize_pair(*args, weights) for args in zip(pairs, factors, strict=True)), default=0.0)
        if moved < _CONVERGED:
            break
    for name, values in weights.items():
        tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
    return {
        "pairs": len(pairs),
        "channels": sum(factor.size for factor in factors),
        "channels_scaled": sum(int(np.count_nonzero(factor != 1.0)) for factor in factors),
        "spread_before": before,
        "spread_after": _spread(pairs, weights),
        "declined": declined,
    }


def _equalize_pair(pair: _Pair, factor: Floats, weights: dict[str, Floats]) -> float:
    """Scale one pair; ``factor`` holds what its channels were scaled by in all. Returns the largest step taken."""
    first, second = weights[pair.first.input[1]], weights[pair.second.input[1]]
    written, read = _output_ranges(first), _input_ranges(second, factor.size)
    alive = (written > 0) & (read > 0)
    wanted = factor * np.sqrt(np.divide(read, written, out=np.ones_like(read), where=alive))
    wanted = np.minimum(np.clip(wanted, 1 / _LARGEST_FACTOR, _LARGEST_FACTOR), pair.limit)
    wanted = np.where(alive & (pair.limit > 0), wanted, 1.0)
    step = wanted / factor
    factor[:] = wanted
    weights[pair.first.input[1]] = first * step.reshape(-1, *[1] * (first.ndim - 1))
    for bias in pair.first.input[2:]:
        weights[bias] = weights[bias] * step
    # A group of the second Conv reads its own run of channels: (groups, outputs, inputs, taps) lines them up.
    groups = factor.size // second.shape[1]
    shaped = second.reshape(groups, -1, second.shape[1], math.prod(second.shape[2:]))
    weights[pair.second.input[1]] = (shaped / step.reshape(groups, 1, -1, 1)).reshape(second.shape)
    return float(np.abs(np.log(step)).max())


def _output_ranges(weights: Floats) -> Floats:
    ranges: Floats = np.abs(weights).reshape(len(weights), -1).max(axis=1)
    return ranges


def _input_ranges(weights: Floats, channels: int) -> Floats:
    """Largest weight that each of a Conv's input channels meets, ``(channels,)``; depthwise and grouped ones too."""
    groups = channels // weights.shape[1]
    shaped = np.abs(weights).reshape(groups, -1, weights.shape[1], math.prod(weights.shape[2:]))
    ranges: Floats = shaped.max(axis=(1, 3)).reshape(-1)
    return ranges


def _spread(pairs: list[_Pair], weights: Mapping[str, Floats]) -> float:
    """Largest over median channel range of a Conv, the geometric mean over all first Convs; 1 is even."""
    spreads = []
    for pair in pairs:
        ranges = _output_ranges(weights[pair.first.input[1]])
        if np.median(ranges) > 0:
            spreads.append(math.log(ranges.max() / np.median(ranges)))
    return math.exp(sum(spreads) / len(spreads)) if spreads else 1.0


def _pairs_of(model: onnx.ModelProto, tensors: Mapping[str, onnx.TensorProto]) -> tuple[list[_Pair], dict[str, str]]:
    """The pairs in graph order, and why each other Conv is no pair's first."""
    readers = Counter(name for graph in graphs_of(model.graph) for node in graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    reader_of = {name: node for node in model.graph.node for name in node.input}
    producers = {name: node for node in model.graph.node for name in node.output}
    pairs: list[_Pair] = []
    declined: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        label, follower, hi = node.name or node.output[0], node, math.inf
        while True:
            name = follower.output[0]
            if readers[name] != 1 or name not in reader_of:
                declined[label] = f"{name!r} is not read by one node alone"
                break
            follower = reader_of[name]
            if follower.op_type == "Conv" and follower.input[0] == name:
                reason = _unfit(node, tensors, readers) or _unfit(follower, tensors, readers)
                if reason:
                    declined[label] = reason
                else:
                    pairs.append(_Pair(node, follower, _limits(node, hi, producers, tensors)))
                break
            bound = _upper_bound(follower, tensors)
            if bound is None:
                declined[label] = f"{follower.op_type} behind it does not scale with its input"
                break
            hi = min(hi, bound)
    return pairs, declined


def _unfit(conv: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], readers: Mapping[str, int]) -> str | None:
    for name in conv.input[1:]:
        if name not in tensors or tensors[name].data_type != onnx.TensorProto.FLOAT:
            return f"{name or 'an input'!r} of {conv.name!r} is no float32 constant"
        if readers[name] != 1:
            return f"{name!r} is shared"
    return None


def _upper_bound(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> float | None:
    """The upper bound of a node that passes what lies between 0 and it; None for any other node."""
    if node.op_type == "Relu":
        return math.inf
    if node.op_type == "Clip" and len(node.input) > 1 and all(not x or x in tensors for x in node.input[1:]):
        lo, hi = (float(numpy_helper.to_array(tensors[x])) if x else math.nan for x in (*node.input[1:], "")[:2])
        return (math.inf if math.isnan(hi) else hi) if lo == 0 else None
    return None


def _limits(
    conv: onnx.NodeProto,
    hi: float,
    producers: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
) -> Floats:
    """Largest factor of each channel for which the bound ``hi`` behind ``conv`` provably never acts."""
    weights = numpy_helper.to_array(tensors[conv.input[1]]).astype(np.float64)
    if hi == math.inf:
        return np.full(len(weights), math.inf)
    producer = producers.get(conv.input[0])
    input_hi = _upper_bound(producer, tensors) if producer is not None else None
    if input_hi is None or input_hi == math.inf:
        return np.zeros(len(weights))
    bias = numpy_helper.to_array(tensors[conv.input[2]]) if len(conv.input) > 2 else np.zeros(len(weights))
    largest = bias + input_hi * np.maximum(weights, 0).reshape(len(weights), -1).sum(axis=1)
    largest *= 1 + 1e-5  # the sums of the kernels round
    free = np.divide(hi, largest, out=np.full(len(weights), math.inf), where=largest > 0)
    return np.where(free >= 1, free, 0.0)

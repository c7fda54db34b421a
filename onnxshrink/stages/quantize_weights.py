"""Only the weights in 4 or 8 bits, in the form that ONNX Runtime has kernels for.

MatMul and Gemm become MatMulNBits, embeddings GatherBlockQuantized: both read the small weights as they compute. A
convolution gets a DequantizeLinear before it, which ONNX Runtime runs at each inference, so it shrinks but does not
speed up. Activations stay in float; where the settings allow it, MatMulNBits rounds them to int8 for a moment.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeWeights
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.runtime.graph import load_model, opset_of, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.gemm import is_plain_gemm
from onnxshrink.stages.selection import chosen_op_types, excluded_nodes, strip
from onnxshrink.stages.small_weights import rewrite_weights

# Operator type to the input that holds its weights, and their rank if there is but one.
_WEIGHTS = {"Conv": (1, None), "ConvTranspose": (1, None), "Gather": (0, 2), "Gemm": (1, 2), "MatMul": (1, 2)}
_MICROSOFT = "com.microsoft"
_MIN_WEIGHTS = 256


def quantize_weights(settings: QuantizeWeights, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Write weights in few bits; a node that cannot take them stays as it is, and the facts say why.

    Args:
        settings: Bits, block size, and what to leave alone.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run.

    Returns:
        For each node the form its weights took, and how near they are to the float ones in decibels.

    Raises:
        ConfigError: An operator type or a node name that is not there.
        ModelError: The model is quantized already, computes in float16, or cannot be loaded when quantized.
    """
    loaded = load_model(source.model_path)
    model = prepare(loaded, where=ctx.step)
    what = "weight quantization cannot take"
    op_types = chosen_op_types(settings.op_types, tuple(_WEIGHTS), tuple(_WEIGHTS), stage=settings.kind, what=what)
    left = excluded_nodes(settings.exclude_nodes, model, stage=settings.kind)
    left |= _reasons_to_leave(model, op_types, left)
    left |= (without_form := _without_form(model))
    chosen = {n.name: n.op_type for n in model.graph.node if n.op_type in _WEIGHTS and n.name not in left}
    facts: Facts = {
        "bits": settings.bits,
        "block_size": settings.block_size,
        "activations": settings.activations,
        "opset_before": opset_of(loaded),
        "opset_after": opset_of(model),
        "bytes_before": size_bytes(source.path),
        "float_nodes": left,
    }
    if not chosen:
        save_model(loaded, out)
        declined = "the model has no constant weights that could be stored in fewer bits"
        ctx.events.warned(f"{ctx.step}: {declined}; it stays in float")
        return facts | {"declined": declined, "bytes_after": size_bytes(out), "quantized_nodes": {}}
    notes = rewrite_weights(
        model, chosen, settings, lambda n, name: ctx.events.progress(ctx.step, n, len(chosen), name)
    )
    ctx.events.progress(ctx.step, len(chosen), len(chosen))
    strip(model)
    Session(save_model(model, out), name=ctx.step)
    return facts | {
        "bytes_after": size_bytes(out),
        "quantized_nodes": dict(sorted(Counter(chosen.values()).items())),
        "nodes": notes,
        "warnings": [_still_float(without_form)] if without_form else [],
    }


def _still_float(nodes: Collection[str]) -> str:
    some = ", ".join(sorted(nodes)[:2])
    return f"the weights of {len(nodes)} fused nodes stay in float ({some}): quantize the model before it is fused"


def _without_form(model: onnx.ModelProto) -> dict[str, str]:
    """Nodes of ONNX Runtime's own operators that hold matrices of weights, such as Attention, each with the reason."""
    matrices = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and math.prod(tensor.dims) >= _MIN_WEIGHTS
    }
    return {
        node.name: f"{node.op_type} has no form with weights in few bits"
        for node in model.graph.node
        if node.domain == _MICROSOFT and node.op_type not in _WEIGHTS and matrices & set(node.input)
    }


def weight_nodes(model: onnx.ModelProto) -> frozenset[str]:
    """Names of the nodes of a prepared model whose weights can be written in few bits."""
    left = _reasons_to_leave(model, tuple(_WEIGHTS), {})
    return frozenset(node.name for node in model.graph.node if node.op_type in _WEIGHTS and node.name not in left)


def _reasons_to_leave(model: onnx.ModelProto, op_types: tuple[str, ...], left: dict[str, str]) -> dict[str, str]:
    """Nodes that have weights by their type and cannot take small ones, each with the reason."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    masked = masked_tensors(model)
    reasons = {}
    for node in model.graph.node:
        if node.op_type not in _WEIGHTS or node.name in left:
            continue
        weights = node.input[_WEIGHTS[node.op_type][0]]
        if node.op_type not in op_types:
            reason: str | None = f"{node.op_type} is not among op_types"
        elif weights in masked:
            reason = f"{weights!r} {masked[weights]}"
        else:
            reason = _reason(node, constants.get(weights))
        if reason:
            reasons[node.name] = reason
    return reasons


def _reason(node: onnx.NodeProto, weights: TensorProto | None) -> str | None:
    place, rank = _WEIGHTS[node.op_type]
    if weights is None or weights.data_type != TensorProto.FLOAT:
        return f"{node.input[place]!r} is no constant of float32"
    if rank is not None and len(weights.dims) != rank:
        return f"{weights.name!r} has {len(weights.dims)} axes, and {rank} are supported"
    if math.prod(weights.dims) < _MIN_WEIGHTS:
        return f"{weights.name!r} has fewer than {_MIN_WEIGHTS} weights, too few to gain from"
    if not np.isfinite(numpy_helper.to_array(weights)).all():
        return f"{weights.name!r} holds values that are not finite"
    if node.op_type == "Gather" and any(a.name == "axis" and a.i not in (0, -2) for a in node.attribute):
        return "it does not gather rows"
    if node.op_type == "Gemm" and not is_plain_gemm(node):
        return "its alpha, beta or transA is not the default"
    return None

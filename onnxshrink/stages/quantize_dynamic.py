"""ONNX Runtime's dynamic quantization: 8-bit weights in the file, activation ranges computed anew for every input.

It needs no samples and no range can be wrong, so it suits networks of matrix products over texts and sequences, where
ONNX Runtime fuses each product into one integer kernel. Activations are always u8 and asymmetric: that is the only form
these kernels have. Convolutions are left alone, because their dynamic kernel is slower than float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeDynamic
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.graph import load_model, opset_of, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.gemm import is_plain_gemm, unfold_gemms
from onnxshrink.stages.hold_float import own_constants
from onnxshrink.stages.selection import captured_warnings, chosen_op_types, excluded_nodes, strip

# Operator type to the inputs that must be constant floats, and their rank.
_WEIGHTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "Attention": ((1, 2),),
    "EmbedLayerNormalization": ((2, 2), (3, 2)),
    "Gather": ((0, 2),),
    "Gemm": ((1, 2),),
    "LSTM": ((1, 3), (2, 3)),
    "MatMul": ((1, 2),),
}
_WEIGHT_TYPES = {"s8": QuantType.QInt8, "u8": QuantType.QUInt8}


def quantize_dynamic(settings: QuantizeDynamic, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Quantize weights to 8 bits, and activations as they come.

    A node whose weights are computed, or that reads what an attention mask can reach, stays in float, and the facts say
    why. A model without anything to quantize is passed on as it is, and the facts say that.

    Args:
        settings: Granularity, weight type, and what to leave in float.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run.

    Raises:
        ConfigError: An operator type or a node name that is not there.
        ModelError: The model is quantized already, computes in float16, or cannot be loaded when quantized.
    """
    loaded = load_model(source.model_path)
    model = prepare(loaded, where=ctx.step)
    what = "dynamic quantization cannot take"
    op_types = chosen_op_types(settings.op_types, tuple(_WEIGHTS), tuple(_WEIGHTS), stage=settings.kind, what=what)
    left = excluded_nodes(settings.exclude_nodes, model, stage=settings.kind)
    left |= _reasons_to_leave(model, op_types, left)
    chosen = {n.name: n.op_type for n in model.graph.node if n.op_type in _WEIGHTS and n.name not in left}
    facts: Facts = {
        "granularity": settings.granularity,
        "weights": settings.weights,
        "opset_before": opset_of(loaded),
        "opset_after": opset_of(model),
        "bytes_before": size_bytes(source.path),
    }
    if not chosen:
        save_model(loaded, out)
        declined = "the model has no node that dynamic quantization could take"
        ctx.events.warned(f"{ctx.step}: {declined}; it stays in float")
        return facts | {
            "declined": declined,
            "bytes_after": size_bytes(out),
            "quantized_nodes": {},
            "float_nodes": left,
        }

    others = Counter(node.op_type for node in model.graph.node if node.op_type not in _WEIGHTS)
    with captured_warnings() as warnings:
        try:
            quantized = quantized_model(model, settings, nodes=chosen)
        except (ValueError, RuntimeError, KeyError) as e:  # what the quantizer raises on a graph it does not understand
            raise ModelError(
                f"ONNX Runtime cannot quantize the model: {str(e).strip().partition(chr(10))[0]}",
                where=ctx.step,
                got=type(e).__name__,
                fix="name the nodes at fault in exclude_nodes",
            ) from e
    strip(quantized)
    Session(save_model(quantized, out), name=ctx.step)
    return facts | {
        "bytes_after": size_bytes(out),
        "quantized_nodes": dict(sorted(Counter(chosen.values()).items())),
        "float_nodes": left,
        "float_op_types": dict(sorted(others.items())),
        "warnings": warnings,
    }


def dynamic_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Names and operator types of the nodes of a prepared model that dynamic quantization can take."""
    left = _reasons_to_leave(model, tuple(_WEIGHTS), {})
    return {node.name: node.op_type for node in model.graph.node if node.op_type in _WEIGHTS and node.name not in left}


def quantized_model(model: onnx.ModelProto, settings: QuantizeDynamic, *, nodes: Mapping[str, str]) -> onnx.ModelProto:
    """What ``onnxruntime.quantization.quantize_dynamic`` makes of ``model``, byte for byte where it has no Gemm.

    Args:
        model: A prepared model; it is changed in place.
        settings: Granularity, weight type, 7-bit weights.
        nodes: Names and operator types of the nodes to quantize.
    """
    left = [node.name for node in model.graph.node if node.op_type in _WEIGHTS and node.name not in nodes]
    own_constants(model, left, set(nodes.values()))
    # ONNX Runtime does so as well, but turns a weight that two of them share twice.
    unfold_gemms(model)
    op_types = sorted({"MatMul" if op_type == "Gemm" else op_type for op_type in nodes.values()})
    quantizer = ONNXQuantizer(
        model,
        settings.granularity == "per_channel",
        settings.reduce_range,
        QuantizationMode.IntegerOps,
        False,  # noqa: FBT003  static
        _WEIGHT_TYPES[settings.weights],
        QuantType.QUInt8,
        None,
        list(nodes),
        [],
        op_types,
        # The default serves values whose type ONNX cannot infer, behind the operators of ONNX Runtime's own.
        {"MatMulConstBOnly": True, "DefaultTensorType": TensorProto.FLOAT},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _reasons_to_leave(model: onnx.ModelProto, op_types: tuple[str, ...], left: Mapping[str, str]) -> dict[str, str]:
    """Nodes that could be quantized by their type, and cannot by what they are, each with the reason."""
    ranks = {t.name: len(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    masked = masked_tensors(model)
    reasons = {}
    for node in model.graph.node:
        if node.op_type not in _WEIGHTS or node.name in left:
            continue
        reason = _reason(node, ranks, masked)
        if node.op_type not in op_types:
            reason = f"{node.op_type} is not among op_types"
        if reason:
            reasons[node.name] = reason
    return reasons


def _reason(node: onnx.NodeProto, ranks: Mapping[str, int], masked: Mapping[str, str]) -> str | None:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for place, rank in _WEIGHTS[node.op_type]:
        if node.input[place] not in ranks:
            return f"{node.input[place]!r} is no constant of float32"
        if ranks[node.input[place]] != rank:
            return f"{node.input[place]!r} has {ranks[node.input[place]]} axes, and {rank} are supported"
    if node.input[0] in masked:
        return f"{node.input[0]!r} {masked[node.input[0]]}"
    if node.op_type == "Gemm" and not is_plain_gemm(node):
        return "its alpha, beta or transA is not the default"
    if node.op_type == "Attention" and "qkv_hidden_sizes" in attributes:
        return "ONNX Runtime has no integer form of it with qkv_hidden_sizes"
    if node.op_type == "EmbedLayerNormalization" and len(node.output) > 2:
        return "ONNX Runtime has no integer form of it with three outputs"
    return None

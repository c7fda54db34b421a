"""Weights and arithmetic in float16, with the converter that comes with ONNX Runtime.

Half the bytes, and for processors that compute in float16 (GPUs above all) up to twice the speed; ONNX Runtime's CPU
provider computes most of it in float32 behind casts. Constants beyond float16's range, such as the ``finfo.min`` of an
attention mask, become its largest number, and the facts name them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import ToFp16
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.core.tensors import did_you_mean
from onnxshrink.runtime.graph import load_model, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.selection import captured_warnings, excluded_nodes, strip

# Sums and powers of many values leave float16's range or lose its 11 bits.
_SENSITIVE = ("CumSum", "Exp", "InstanceNormalization", "Log", "Pow", "ReduceL2", "ReduceSum", "ReduceSumSquare")
_LARGEST = float(np.finfo(np.float16).max)


def to_fp16(settings: ToFp16, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Convert weights and arithmetic to float16; what is kept in float32 gets casts around it.

    Args:
        settings: What to keep in float32.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run.

    Returns:
        Nodes in float16 and float32 by type, and the constants that had to be clamped.

    Raises:
        ConfigError: An operator type or a node name that is not there.
        ModelError: The model is quantized or in float16 already, or cannot be loaded when converted.
    """
    loaded = load_model(source.model_path)
    model = prepare(loaded, where=ctx.step)
    keep = _SENSITIVE if settings.keep_op_types is None else _known(settings.keep_op_types, model)
    kept_nodes = excluded_nodes(settings.keep_nodes, model, stage=settings.kind, field="keep_nodes")
    blocked = sorted({*DEFAULT_OP_BLOCK_LIST, *keep})
    names = {node.name for node in model.graph.node}
    clamped = _clamp(model)
    counts = Counter((node.op_type in blocked or node.name in kept_nodes, node.op_type) for node in model.graph.node)
    with captured_warnings() as warnings:
        try:
            converted: onnx.ModelProto = convert_float_to_float16(
                model,
                keep_io_types=settings.keep_io_types,
                op_block_list=blocked,
                node_block_list=sorted(kept_nodes),
            )
        except (AssertionError, KeyError, RuntimeError, ValueError) as e:  # what it raises on graphs it does not know
            raise ModelError(
                f"the model cannot be converted to float16: {str(e).strip().partition(chr(10))[0]}",
                where=ctx.step,
                got=type(e).__name__,
                fix="name the nodes at fault in keep_nodes",
            ) from e
    _tidy_casts(converted, names)
    strip(converted)
    Session(save_model(converted, out), name=ctx.step)
    if clamped:
        ctx.events.warned(f"{ctx.step}: constants beyond float16's range were clamped: {', '.join(clamped)}")
    return {
        "bytes_before": size_bytes(source.path),
        "bytes_after": size_bytes(out),
        "float16_nodes": {op: n for (is_kept, op), n in sorted(counts.items()) if not is_kept},
        "float32_nodes": {op: n for (is_kept, op), n in sorted(counts.items()) if is_kept},
        "casts": sum(node.op_type == "Cast" and node.name not in names for node in converted.graph.node),
        "clamped": clamped,
        "warnings": warnings,
    }


def _known(op_types: tuple[str, ...], model: onnx.ModelProto) -> tuple[str, ...]:
    present = sorted({node.op_type for node in model.graph.node})
    for op_type in op_types:
        if op_type not in present:
            raise ConfigError(
                f"the model has no operator of type {op_type!r} to keep",
                where="to_fp16.keep_op_types",
                got=op_type,
                want=", ".join(present),
                fix=did_you_mean(op_type, present),
            )
    return op_types


def _clamp(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Bring constants into float16's finite range, in place; infinity, too, which times zero would be no number.

    Returns:
        Name of each changed constant to how many values were beyond, the most extreme, and what it became.
    """
    changed: dict[str, dict[str, Any]] = {}
    for name, tensor in _constants(model):
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        beyond = np.abs(values) > _LARGEST
        if not beyond.any():
            continue
        extreme = values[beyond][np.argmax(np.abs(values[beyond]))]
        tensor.CopyFrom(numpy_helper.from_array(np.clip(values, -_LARGEST, _LARGEST), tensor.name))
        now = float(np.sign(extreme) * _LARGEST)
        changed[name] = {"values": int(beyond.sum()), "was": f"{extreme:.3g}", "is": now}
    return changed


def _tidy_casts(model: onnx.ModelProto, names: set[str]) -> None:
    """Bring the converter's casts in order, in place: each once, none between two nodes in float32, all sorted.

    The converter adds one for each reader, so two readers get two nodes with the same output; and what one float32 node
    hands to another it sends through float16, where a large sum is lost.
    """
    graph = model.graph
    added = {node.output[0]: node for node in graph.node if node.op_type == "Cast" and node.name not in names}
    halved = {name: node.input[0] for name, node in added.items() if _target(node) == TensorProto.FLOAT16}
    straight = {name: halved[node.input[0]] for name, node in added.items() if node.input[0] in halved}
    shown = {value.name for value in graph.output}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = straight.get(name, name)
    for name in straight.keys() & shown:
        added[name].CopyFrom(helper.make_node("Identity", [straight[name]], [name], name=added[name].name))
    used = {name for node in graph.node for name in node.input} | shown
    nodes = [
        node
        for node in graph.node
        if node.name in names or node.op_type != "Cast" or (node.output[0] in used and node is added[node.output[0]])
    ]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    ONNXModel(model).topological_sort()


def _target(cast: onnx.NodeProto) -> int:
    return next(int(a.i) for a in cast.attribute if a.name == "to")


def _constants(model: onnx.ModelProto) -> list[tuple[str, TensorProto]]:
    found = [(tensor.name, tensor) for tensor in model.graph.initializer]
    for node in model.graph.node:
        if node.op_type in ("Constant", "ConstantOfShape"):
            found.extend((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return found

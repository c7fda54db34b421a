"""Only the weights in 4 or 8 bits, in the form that ONNX Runtime has kernels for.

MatMul and Gemm become MatMulNBits, embeddings GatherBlockQuantized: both read the small weights as they compute. A
convolution gets a DequantizeLinear before it, which ONNX Runtime runs at each inference, so it shrinks but does not
speed up. Activations stay in float; where the settings allow it, MatMulNBits rounds them to int8 for a moment.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import BLOCKS_OPSET, QuantizeWeights
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.runtime.graph import load_model, opset_of, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.blocks import packed, quantize_blocks
from onnxshrink.stages.context import Context
from onnxshrink.stages.gemm import drop_unused_initializers, is_plain_gemm, unfold_gemms
from onnxshrink.stages.selection import chosen_op_types, excluded_nodes, strip

# Operator type to the input that holds its weights, and their rank if there is but one.
_WEIGHTS = {"Conv": (1, None), "ConvTranspose": (1, None), "Gather": (0, 2), "Gemm": (1, 2), "MatMul": (1, 2)}
_MICROSOFT = "com.microsoft"
_MIN_BLOCK = 16
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
    unfold_gemms(model, leave=left)
    rewriter = _Rewriter(model, settings)
    for number, name in enumerate(chosen):
        ctx.events.progress(ctx.step, number, len(chosen), name)
        rewriter.rewrite(name)
    rewriter.finish()
    ctx.events.progress(ctx.step, len(chosen), len(chosen))
    strip(model)
    Session(save_model(model, out), name=ctx.step)
    return facts | {
        "bytes_after": size_bytes(out),
        "quantized_nodes": dict(sorted(Counter(chosen.values()).items())),
        "nodes": rewriter.notes,
    }


class Stored(NamedTuple):
    """Weights in the graph, quantized once for all nodes that read them in this form."""

    names: tuple[str, ...]
    note: dict[str, Any]


@dataclass
class _Rewriter:
    model: onnx.ModelProto
    settings: QuantizeWeights
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.nodes = {node.name: node for node in self.model.graph.node}
        self.stored: dict[tuple[str, str], Stored] = {}
        self.before: dict[str, list[onnx.NodeProto]] = {}

    def rewrite(self, name: str) -> None:
        """Give one node its small weights."""
        node = self.nodes[name]
        if node.op_type == "MatMul":
            self._matmul(node)
        elif node.op_type == "Gather":
            self._gather(node)
        else:
            self._convolution(node)

    def finish(self) -> None:
        """Put the new nodes before those that read them, and drop the float weights that nobody reads any more."""
        graph = self.model.graph
        ordered = [new for node in graph.node for new in (*self.before.get(node.name, ()), node)]
        del graph.node[:]
        graph.node.extend(ordered)
        drop_unused_initializers(graph)
        if any(node.domain == _MICROSOFT for node in ordered):
            imported = {entry.domain for entry in self.model.opset_import}
            if _MICROSOFT not in imported:
                self.model.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
        # 4-bit types came with this version of the format.
        self.model.ir_version = max(self.model.ir_version, 10)

    def _matmul(self, node: onnx.NodeProto) -> None:
        bits, block_size = self.settings.bits, self.settings.block_size
        weights = node.input[1]
        n_inputs, n_outputs = self.constants[weights].dims
        if (weights, "matmul") not in self.stored:
            rows = np.ascontiguousarray(numpy_helper.to_array(self.constants[weights]).T)
            blocks = quantize_blocks(rows, bits=bits, block_size=block_size)
            arrays = (packed(blocks.values, bits), blocks.scales, packed(blocks.zero_points, bits))
            note = _note("MatMulNBits", bits, block_size, rows, blocks.dequantized())
            self.stored[weights, "matmul"] = Stored(self._add(weights, "matmul", arrays), note)
        names, self.notes[node.name] = self.stored[weights, "matmul"]
        attributes: dict[str, Any] = {"K": n_inputs, "N": n_outputs, "bits": bits, "block_size": block_size}
        if self.settings.activations == "int8":
            attributes["accuracy_level"] = 4
        new = helper.make_node(
            "MatMulNBits", [node.input[0], *names], node.output, name=node.name, domain=_MICROSOFT, **attributes
        )
        node.CopyFrom(new)

    def _gather(self, node: onnx.NodeProto) -> None:
        bits, block_size = self.settings.bits, self.settings.block_size
        table = node.input[0]
        if (table, "gather") not in self.stored:
            rows = numpy_helper.to_array(self.constants[table])
            blocks = quantize_blocks(rows, bits=bits, block_size=block_size)
            values = blocks.values.reshape(len(rows), -1)[:, : blocks.width]
            # Unlike packed bytes, this type needs no even number of columns.
            tensors = (_unsigned(values, bits), blocks.scales, _unsigned(blocks.zero_points, bits))
            note = _note("GatherBlockQuantized", bits, block_size, rows, blocks.dequantized())
            self.stored[table, "gather"] = Stored(self._add(table, "gather", tensors), note)
        (values_name, scales, zero_points), self.notes[node.name] = self.stored[table, "gather"]
        inputs = [values_name, node.input[1], scales, zero_points]
        attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": block_size, "bits": bits}
        new = helper.make_node(
            "GatherBlockQuantized", inputs, node.output, name=node.name, domain=_MICROSOFT, **attributes
        )
        node.CopyFrom(new)

    def _convolution(self, node: onnx.NodeProto) -> None:
        weights = node.input[1]
        if (weights, "convolution") not in self.stored:
            array = numpy_helper.to_array(self.constants[weights])
            is_blocked = self.settings.bits == 4 and _has_blocks(self.model, array)
            nodes, note = self._blocked(weights, array) if is_blocked else self._per_channel(node, array)
            self.before[node.name] = nodes
            self.stored[weights, "convolution"] = Stored((nodes[-1].output[0],), note)
        (node.input[1],), self.notes[node.name] = self.stored[weights, "convolution"]

    def _per_channel(self, node: onnx.NodeProto, array: NDArray[np.float32]) -> tuple[list[onnx.NodeProto], Any]:
        """Symmetric int8, a scale for each output channel (of ConvTranspose: for each within its group)."""
        weights = node.input[1]
        axis = 0 if node.op_type == "Conv" else 1
        others = tuple(i for i in range(array.ndim) if i != axis)
        scale = np.abs(array).max(axis=others, keepdims=True) / np.float32(127)
        scale = np.where(scale > 0, scale, np.float32(1))
        values = np.round(array / scale).astype(np.int8)
        names = self._add(weights, "convolution", (values, scale.reshape(-1)))
        output = f"{weights}_dequantized"
        new = helper.make_node("DequantizeLinear", names, [output], name=f"{node.name}_weights", axis=axis)
        note = _note("DequantizeLinear", 8, None, array, np.asarray(values * scale, np.float32))
        if self.settings.bits == 4:
            note["reason"] = (
                f"a block of 4 bits needs {_MIN_BLOCK} weights in a channel"
                if opset_of(self.model) >= BLOCKS_OPSET
                else f"blocks of 4 bits need opset {BLOCKS_OPSET}: set the opset of export"
            )
        return [new], note

    def _blocked(self, weights: str, array: NDArray[np.float32]) -> tuple[list[onnx.NodeProto], Any]:
        """4-bit blocks over each filter, all its input channels and places in a row."""
        bits = self.settings.bits
        rows = array.reshape(len(array), -1)
        block_size = min(int(self.settings.block_size), rows.shape[1])
        blocks = quantize_blocks(rows, bits=bits, block_size=block_size)
        values = blocks.values.reshape(len(rows), -1)[:, : blocks.width]
        tensors = (_unsigned(values, bits), blocks.scales, _unsigned(blocks.zero_points, bits))
        names = self._add(weights, "convolution", tensors)
        (shape,) = self._add(weights, "shape", (np.array(array.shape, np.int64),))
        flat, output = f"{weights}_rows", f"{weights}_dequantized"
        nodes = [
            helper.make_node("DequantizeLinear", names, [flat], name=flat, axis=1, block_size=block_size),
            helper.make_node("Reshape", [flat, shape], [output], name=output),
        ]
        return nodes, _note("DequantizeLinear", bits, block_size, rows, blocks.dequantized())

    def _add(self, weights: str, form: str, tensors: tuple[NDArray[Any] | TensorProto, ...]) -> tuple[str, ...]:
        """Write initializers called after the weights, and return their names."""
        parts = ("values", "scales", "zero_points") if len(tensors) > 1 else ("",)
        names = []
        for part, tensor in zip(parts, tensors, strict=False):
            proto = tensor if isinstance(tensor, TensorProto) else numpy_helper.from_array(tensor)
            proto.name = f"{weights}_{form}_{part}".removesuffix("_")
            self.model.graph.initializer.append(proto)
            names.append(proto.name)
        return tuple(names)


def _has_blocks(model: onnx.ModelProto, array: NDArray[np.float32]) -> bool:
    return opset_of(model) >= BLOCKS_OPSET and array[0].size >= _MIN_BLOCK


def _unsigned(values: NDArray[np.uint8], bits: int) -> TensorProto:
    """An ONNX tensor of uint8 or of uint4, which packs two values to a byte over all axes."""
    if bits == 8:
        return numpy_helper.from_array(np.ascontiguousarray(values))
    raw = packed(values.reshape(-1), bits).tobytes()
    return helper.make_tensor("", TensorProto.UINT4, values.shape, raw, raw=True)


def _note(
    form: str, bits: int, block_size: int | None, weights: NDArray[np.float32], rounded: NDArray[np.float32]
) -> dict[str, Any]:
    signal = float(np.square(weights, dtype=np.float64).sum())
    noise = float(np.square(weights.astype(np.float64) - rounded).sum())
    sqnr_db = round(10 * math.log10(signal / noise), 1) if signal and noise else None
    return {"form": form, "bits": bits, "block_size": block_size, "weight_sqnr_db": sqnr_db}


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

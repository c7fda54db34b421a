"""Nodes rewritten so that they read their weights in 4 or 8 bits: which form each operator gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.config.stages import BLOCKS_OPSET, QuantizeWeights
from onnxshrink.runtime.graph import opset_of
from onnxshrink.stages.blocks import packed, quantize_blocks
from onnxshrink.stages.gemm import drop_unused_initializers, unfold_gemms

_MICROSOFT = "com.microsoft"
_MIN_BLOCK = 16


def rewrite_weights(
    model: onnx.ModelProto,
    nodes: Collection[str],
    settings: QuantizeWeights,
    tell: Callable[[int, str], None] = lambda _done, _name: None,
) -> dict[str, dict[str, Any]]:
    """Write the weights of some nodes in few bits.

    Args:
        model: Every node has a name; changed in place.
        nodes: Names out of `onnxshrink.stages.quantize_weights.weight_nodes`.
        settings: Bits, block size and arithmetic.
        tell: Called with the number of nodes that are done and the name of the next.

    Returns:
        For each node the form its weights took, and how near they are to the float ones in decibels.
    """
    unfold_gemms(model, leave={node.name for node in model.graph.node} - set(nodes))
    rewriter = _Rewriter(model, settings)
    for number, name in enumerate(nodes):
        tell(number, name)
        rewriter.rewrite(name)
    rewriter.finish()
    return rewriter.notes


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

"""What an ONNX file holds: operators, where its bytes lie, and which parts of it are quantized, how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
import onnx
from onnx import TensorProto

from onnxshrink.runtime.graph import graphs_of

LARGEST = 10
"""Initializers that are named."""

_HALF_BYTES = {"INT4", "UINT4", "FLOAT4E2M1"}
_WEIGHT_ONLY = ("MatMulNBits", "MatMulBnb4", "GatherBlockQuantized", "QMoE")
_POINTS = ("uint8", "int8", "uint16", "int16")
# Inputs that may hold a weight, each with the one that holds its scales, or its zero points where scales come later.
_WEIGHTS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "DequantizeLinear": ((0, 1),),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), ((3, 4),)),
    "QAttention": ((1, 4),),
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"), ((1, 3),)),
    "DynamicQuantizeMatMul": ((1, 2),),
    "DynamicQuantizeLSTM": ((1, 8), (2, 10)),
    "MatMulNBits": ((1, 2),),
    "GatherBlockQuantized": ((0, 2),),
}
_DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


@dataclass(frozen=True, slots=True)
class Stored:
    """An initializer.

    Attributes:
        name: Its name.
        dtype: ONNX's name of its element type, such as ``float32`` or ``int4``.
        shape: Axis lengths.
        size_bytes: What its values take, without the name.
        op_type: Operator that it feeds, through DequantizeLinear if there is one; ``unused`` if none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    op_type: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in the file.

    Attributes:
        ir_version: Of the file format.
        opsets: Domain to version; the default domain is ``ai.onnx``.
        producer: What wrote it.
        op_types: Operator to number of nodes, the most frequent first; subgraphs included.
        bytes_by_op_type: Operator to bytes of the initializers that feed it, the largest first.
        bytes_by_dtype: Element type to bytes.
        largest: The largest initializers.
    """

    ir_version: int
    opsets: dict[str, int]
    producer: str
    op_types: dict[str, int]
    bytes_by_op_type: dict[str, int]
    bytes_by_dtype: dict[str, int]
    largest: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Quantization:
    """What of a model is quantized already.

    Attributes:
        formats: ``qdq``, ``qoperator``, ``dynamic``, ``weights``, ``fp16``: those that were found. What brings a model
            of QOperators from float to integers and back is part of that format, and no ``qdq``.
        quantize_nodes: QuantizeLinear nodes.
        dequantize_nodes: DequantizeLinear nodes.
        weights: Element type and granularity to number of weights that are stored so: ``int8 per_channel``.
        activations: Element type to number of nodes that quantize to it or compute in it: ``uint8``.
        integer_op_types: Integer operators of the file itself, to number of nodes.
    """

    formats: tuple[str, ...]
    quantize_nodes: int
    dequantize_nodes: int
    weights: dict[str, int]
    activations: dict[str, int]
    integer_op_types: dict[str, int]


def contents_of(model: onnx.ModelProto) -> Contents:
    """Weigh the parts of a model; sizes are those of the values, so they sum to a little less than the file."""
    stored = list(_initializers(model))
    by_op: Counter[str] = Counter()
    by_dtype: Counter[str] = Counter()
    for tensor in stored:
        by_op[tensor.op_type] += tensor.size_bytes
        by_dtype[tensor.dtype] += tensor.size_bytes
    nodes = Counter(node.op_type for graph in graphs_of(model.graph) for node in graph.node)
    return Contents(
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        op_types=_ordered(nodes),
        bytes_by_op_type=_ordered(by_op),
        bytes_by_dtype=_ordered(by_dtype),
        largest=tuple(sorted(stored, key=lambda tensor: (-tensor.size_bytes, tensor.name))[:LARGEST]),
    )


def quantization_of(model: onnx.ModelProto) -> Quantization:
    """Find out how a model is quantized, from the file alone."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    tensors = {tensor.name: tensor for graph in graphs_of(model.graph) for tensor in graph.initializer}
    made_by = {name: node for node in nodes for name in node.output}
    quantizes = [node for node in nodes if node.op_type == "QuantizeLinear"]
    dequantizes = [node for node in nodes if node.op_type == "DequantizeLinear"]
    of_weights = [node for node in dequantizes if node.input[0] in tensors and len(tensors[node.input[0]].dims) > 1]
    pairs = [node for node in dequantizes if getattr(made_by.get(node.input[0]), "op_type", "") == "QuantizeLinear"]
    integer = Counter(node.op_type for node in nodes if _is_integer(node.op_type))
    found = {
        "qdq": bool(pairs or (of_weights and quantizes)),
        "qoperator": any(op_type.startswith(("QLinear", "QGemm", "QAttention")) for op_type in integer),
        "dynamic": any(op_type in _DYNAMIC for op_type in integer),
        "weights": any(op_type in _WEIGHT_ONLY for op_type in integer) or bool(of_weights and not quantizes),
        "fp16": any(_dtype(tensor) in ("float16", "bfloat16") and len(tensor.dims) > 1 for tensor in tensors.values()),
    }
    return Quantization(
        formats=tuple(name for name, is_so in found.items() if is_so),
        quantize_nodes=len(quantizes),
        dequantize_nodes=len(dequantizes),
        weights=_ordered(Counter(form for node in nodes for form in _weights(node, tensors, made_by))),
        activations=_ordered(Counter(dtype for node in nodes for dtype in _activation(node, tensors))),
        integer_op_types=_ordered(integer),
    )


def _initializers(model: onnx.ModelProto) -> Iterator[Stored]:
    for graph in graphs_of(model.graph):
        readers = _readers(graph)
        for tensor in graph.initializer:
            shape = tuple(tensor.dims)
            yield Stored(tensor.name, _dtype(tensor), shape, size_of(tensor), readers.get(tensor.name, "unused"))
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                tensor = node.attribute[0].t
                name = node.output[0]
                yield Stored(name, _dtype(tensor), tuple(tensor.dims), size_of(tensor), readers.get(name, "unused"))


def _readers(graph: onnx.GraphProto) -> dict[str, str]:
    """Tensor to the operator that reads it first, where that is DequantizeLinear the one behind it."""
    first: dict[str, onnx.NodeProto] = {}
    for inner in graphs_of(graph):
        for node in inner.node:
            for name in node.input:
                first.setdefault(name, node)
    readers = {}
    for name, node in first.items():
        behind = first.get(node.output[0]) if node.op_type == "DequantizeLinear" else None
        readers[name] = (behind or node).op_type
    return readers


def size_of(tensor: TensorProto) -> int:
    """Bytes of a tensor's values; two values of 4 bits share one."""
    count: int = prod(tensor.dims)
    name: str = TensorProto.DataType.Name(tensor.data_type)
    if name in _HALF_BYTES:
        return ceil(count / 2)
    if name == "STRING":
        return sum(map(len, tensor.string_data))
    return count * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)


def _dtype(tensor: TensorProto) -> str:
    name: str = TensorProto.DataType.Name(tensor.data_type)
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def _weights(
    node: onnx.NodeProto, tensors: Mapping[str, TensorProto], made_by: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    """``int8 per_channel`` for each weight that the node reads and that is stored in integers."""
    for at, scale_at in _WEIGHTS.get(node.op_type, ()):
        weight = tensors.get(node.input[at]) if at < len(node.input) else None
        if weight is None or len(weight.dims) < 2:
            continue
        given = {attribute.name: attribute.i for attribute in node.attribute}
        dtype = f"int{given.get('bits', 4)}" if node.op_type in _WEIGHT_ONLY else _dtype(weight)
        name = node.input[scale_at] if scale_at < len(node.input) else ""
        while name not in tensors and name in made_by:  # a scale may be stored in float16, and cast
            name = made_by[name].input[0] if made_by[name].input else ""
        many = name in tensors and prod(tensors[name].dims) > 1
        block = given.get("block_size", 0)
        yield f"{dtype} " + (f"per_block of {block}" if block else "per_channel" if many else "per_tensor")


def _activation(node: onnx.NodeProto, tensors: Mapping[str, TensorProto]) -> Iterator[str]:
    """The element type that the node rounds its output to, by its last zero point."""
    if node.op_type == "DynamicQuantizeLinear":
        yield "uint8"
    elif node.op_type == "QuantizeLinear" or node.op_type.startswith(("QLinear", "QGemm")):
        given = [tensors[name] for name in node.input if name in tensors]
        points = [_dtype(tensor) for tensor in given if prod(tensor.dims) == 1 and _dtype(tensor) in _POINTS]
        if points or node.op_type == "QuantizeLinear":
            yield points[-1] if points else "uint8"


def _is_integer(op_type: str) -> bool:
    return op_type in (*_WEIGHT_ONLY, *_DYNAMIC) or op_type.startswith(("QLinear", "QGemm", "QAttention")) or (
        op_type in ("MatMulInteger", "ConvInteger")
    )  # fmt: skip


def _ordered(counts: Mapping[str, int]) -> dict[str, int]:
    """The largest first, equal ones by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

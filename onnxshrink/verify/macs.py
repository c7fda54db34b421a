"""Multiply-accumulates of a node from the shapes of its tensors, and how many of them an integer kernel does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import onnx

# What ONNX Runtime appends when it changes a layout or doubles a node, and what its quantizers append.
_MARKS = re.compile(r"(_token_\d+|_nchwc|/duplicated|/MatmulTransposeFusion/)+$")
_BORDER_MARKS = re.compile(r"_(QuantizeLinear|DequantizeLinear)(_Output|_Input)?$|_quantized$")

Shape: TypeAlias = tuple[int, ...]
Shapes: TypeAlias = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Row:
    """A node that multiplies and accumulates.

    Attributes:
        name: The node.
        op_type: Its operator, as ONNX Runtime runs it.
        macs: Multiply-accumulates of one inference.
        integer_macs: Those of them that an integer kernel does.
    """

    name: str
    op_type: str
    macs: int
    integer_macs: int


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, or ``default`` where it has none."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def label(node: onnx.NodeProto) -> str:
    """What to call a node: the name it had before ONNX Runtime, or its operator and what it reads if it has none."""
    return _MARKS.sub("", node.name) or f"{node.op_type} of {tensor_label(node.input[0])}"


def tensor_label(name: str) -> str:
    """The float tensor's name, of a tensor that a quantizer and ONNX Runtime named after it."""
    return _MARKS.sub("", _BORDER_MARKS.sub("", _MARKS.sub("", name))) or name


def multiplies(node: onnx.NodeProto) -> bool:
    """True where the node's multiply-accumulates are counted."""
    return node.op_type in _FORMULAS


def is_integer(node: onnx.NodeProto) -> bool:
    """True where the node computes in integers, whatever the type of its output."""
    return node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OP_TYPES


def row_of(node: onnx.NodeProto, shapes: Shapes) -> Row:
    """Count a node for which `multiplies` holds.

    Args:
        node: The node.
        shapes: The shape of each of its inputs and outputs.
    """
    macs = _FORMULAS[node.op_type](node, shapes)
    integer = macs if is_integer(node) else 0
    if node.op_type == "QAttention":  # the projection is integer, the attention itself is not
        integer = macs - _attention_scores(node, shapes)
    return Row(label(node), node.op_type, macs, integer)


def _convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each output element sums over ``[C_in / group, *kernel]``."""
    weight = shapes[node.input[3 if node.op_type == "QLinearConv" else 1]]
    return math.prod(shapes[node.output[0]]) * math.prod(weight[1:])


def _transposed_convolution(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each input element is spread over ``[C_out / group, *kernel]``."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each output element sums over the inner axis, which is the last of A unless A is transposed."""
    left = shapes[node.input[0]]
    inner = left[-2 if attribute(node, "transA", 0) else -1]
    return math.prod(shapes[node.output[0]]) * inner


def _einsum(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Each output element sums over the labels that it does not have; one operand alone multiplies nothing."""
    equation = attribute(node, "equation").decode().replace(" ", "")
    operands, _, result = equation.partition("->")
    terms = operands.split(",")
    if len(terms) < 2:
        return 0
    lengths: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        head, _, tail = term.partition("...")
        shape = shapes[name]
        lengths |= dict(zip(head, shape, strict=False))
        lengths |= dict(zip(reversed(tail), reversed(shape), strict=False))
    if "->" not in equation:
        result = "".join(name for name in lengths if operands.count(name) == 1)
    return math.prod(shapes[node.output[0]]) * math.prod(n for name, n in lengths.items() if name not in result)


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Projection to queries, keys and values, then scores and their mix; of ``com.microsoft``, without a past."""
    batch, length, _ = shapes[node.input[0]]
    return batch * length * math.prod(shapes[node.input[1]]) + _attention_scores(node, shapes)


def _attention_scores(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Queries times keys and scores times values: ``[S, T]`` and the output's size each."""
    return 2 * shapes[node.input[0]][1] * math.prod(shapes[node.output[0]])


def _projected_attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Scores and their mix, where queries, keys and values come as inputs; keys are ``[…, T, D]``."""
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        return _attention(node, shapes)
    n_keys = shapes[node.input[1]][-2]
    return n_keys * (math.prod(shapes[node.input[0]]) + math.prod(shapes[node.output[0]]))


def _recurrence(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Every step of ``X[T,N,I]`` multiplies by all of W and R."""
    length, batch = shapes[node.input[0]][:2]
    return length * batch * sum(math.prod(shapes[name]) for name in node.input[1:3])


_FORMULAS: dict[str, Callable[[onnx.NodeProto, Shapes], int]] = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"), _convolution),
    **dict.fromkeys(("ConvTranspose",), _transposed_convolution),
    **dict.fromkeys(("Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "GemmFastGelu"), _product),
    **dict.fromkeys(("QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), _product),
    **dict.fromkeys(("MatMulNBits", "MatMulBnb4"), _product),
    "Einsum": _einsum,
    "QAttention": _attention,
    **dict.fromkeys(("Attention", "MultiHeadAttention"), _projected_attention),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrence),
}
# Beside those called QLinear…; MatMulNBits is not among them: its weights are integers, its product is not.
_INTEGER_OP_TYPES = {
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "QAttention", "QEmbedLayerNormalization", "QGemm", "QMoE",
}  # fmt: skip

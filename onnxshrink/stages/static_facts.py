"""What a statically quantized graph holds: which activations and nodes became integer, and why the others did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

import onnx

from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES
from onnxshrink.core.artifact import Facts

_INTEGERS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)


def quantized_activations(model: onnx.ModelProto, activations: AbstractSet[str]) -> int:
    """How many activations of the float model the result holds in 8 bits.

    Args:
        model: A model by ONNX Runtime's static quantizers, with their names.
        activations: Names of the float model's.
    """
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    quantized |= {
        name.removesuffix("_quantized")
        for node in model.graph.node
        for name in node.output
        if name.endswith("_quantized")
    }
    return len(quantized & activations)


def node_facts(
    before: Iterable[onnx.NodeProto], op_types: Iterable[str], excluded: Mapping[str, str], in_float: set[str]
) -> Facts:
    """Which nodes became integer, by type, and which stayed float and why.

    Args:
        before: Nodes of the prepared float model.
        op_types: What was to be quantized.
        excluded: Names of nodes that were left alone, each with the reason.
        in_float: As of `float_nodes`.
    """
    wanted = set(op_types)
    quantized: Counter[str] = Counter()
    left: dict[str, str] = {}
    others: Counter[str] = Counter()
    for node in before:
        if node.op_type not in QUANTIZABLE_OP_TYPES:
            others[node.op_type] += 1
        elif node.name in excluded:
            left[node.name] = excluded[node.name]
        elif node.op_type not in wanted:
            left[node.name] = f"{node.op_type} is not among op_types"
        elif node.name in in_float:
            left[node.name] = "ONNX Runtime leaves it: its input is not quantized"
        else:
            quantized[node.op_type] += 1
    return {
        "quantized_nodes": dict(sorted(quantized.items())),
        "float_nodes": left,
        "float_op_types": dict(sorted(others.items())),
    }


def float_nodes(model: onnx.ModelProto, integer_form: str) -> set[str]:
    """Names of nodes that compute in float: their first input is not 8 bits, nor (in QDQ) freshly dequantized.

    Args:
        model: A model by ONNX Runtime's static quantizers.
        integer_form: ``qdq`` or ``qoperator``.
    """
    integer = {tensor.name for tensor in model.graph.initializer if tensor.data_type in _INTEGERS}
    found = set()
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear"):
            integer.update(node.output)
        elif node.op_type == "DequantizeLinear":
            integer.update(node.output if integer_form == "qdq" else ())
        elif not node.input or node.input[0] not in integer:
            found.add(node.name)
        elif integer_form == "qoperator":  # Reshape and its like keep 8 bits
            integer.update(node.output)
    return found

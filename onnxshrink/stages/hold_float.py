"""Excluded nodes stay in float: where ONNX Runtime quantizes the model, and where it runs it.

Its quantizers put the 8-bit form of a constant in the constant's place wherever that is read, so a node that stays in
float gets a copy of what it shares with one that does not: see `own_constants`.

ONNX Runtime rounds the float weights of a Conv, ConvTranspose or Gemm between DequantizeLinear and QuantizeLinear to 8
bits while it loads the model (``WeightBiasQuantization``), with one scale for the whole tensor: EfficientNet-Lite0 with
one depthwise Conv excluded falls from 18.0 to 9.1 dB. Only a node that sits directly between the two is taken, and no
attribute or session option of the file's prevents it. So a ``LeakyRelu`` of slope 1, which changes no number, is put
behind the node: the CPU provider runs both as one kernel.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import TensorProto, helper

_TAKEN = {"Conv", "ConvTranspose", "Gemm"}
_FOLDED = {"QuantizeLinear", "Relu", "Clip"}  # the latter vanish into a QuantizeLinear that cuts at the same bounds


def hold_float(model: onnx.ModelProto) -> list[str]:
    """Keep ONNX Runtime from rounding the float weights of a quantized model; no number that the file gives changes.

    Args:
        model: A model by ONNX Runtime's static quantizers, either format; changed in place.

    Returns:
        Names of the nodes that ONNX Runtime would have taken.
    """
    floats = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    readers: dict[str, list[str]] = {value.name: [""] for value in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.op_type)
    held: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if (
            node.op_type in _TAKEN
            and node.input[0] in dequantized
            and node.input[1] in floats
            and len(readers.get(node.output[0], ())) == 1
            and readers[node.output[0]][0] in _FOLDED
        ):
            output = node.output[0]
            node.output[0] = f"{output}_in_float"
            held[node.name] = helper.make_node(
                "LeakyRelu", [node.output[0]], [output], name=f"{node.name}_in_float", alpha=1.0
            )
    after = [part for node in model.graph.node for part in (node, held.get(node.name)) if part is not None]
    del model.graph.node[:]
    model.graph.node.extend(after)
    return list(held)


def own_constants(model: onnx.ModelProto, nodes: Collection[str], op_types: Collection[str]) -> None:
    """Give nodes that stay in float a copy of each float constant that a node to be quantized reads as well, in place.

    Args:
        model: A float model, before it is quantized.
        nodes: Names of those that stay in float; they share one copy.
        op_types: What is quantized elsewhere.
    """
    left = set(nodes)
    graph = model.graph
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    read = {name for n in graph.node if n.name not in left and n.op_type in op_types for name in n.input}
    taken = {*(tensor.name for tensor in graph.initializer), *(name for n in graph.node for name in n.output)}
    copies: dict[str, str] = {}
    for node in graph.node:
        for place, name in enumerate(node.input if node.name in left else ()):
            if name not in floats or name not in read:
                continue
            if name not in copies:
                copies[name] = f"{name}_float"
                while copies[name] in taken:
                    copies[name] += "_"
                taken.add(copies[name])
                graph.initializer.add().CopyFrom(floats[name])
                graph.initializer[-1].name = copies[name]
            node.input[place] = copies[name]

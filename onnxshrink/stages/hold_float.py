"""Excluded nodes stay in float where ONNX Runtime runs the model, and not only in the file.

ONNX Runtime rounds the float weights of a Conv, ConvTranspose or Gemm between DequantizeLinear and QuantizeLinear to 8
bits while it loads the model (``WeightBiasQuantization``), with one scale for the whole tensor: EfficientNet-Lite0 with
one depthwise Conv excluded falls from 18.0 to 9.1 dB. Only a node that sits directly between the two is taken, and no
attribute or session option of the file's prevents it. So a ``LeakyRelu`` of slope 1, which changes no number, is put
behind the node: the CPU provider runs both as one kernel.
"""

from __future__ import annotations

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

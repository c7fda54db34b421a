"""Short names for what a quantizer added to a graph; what the float model has keeps its own.

ONNX Runtime's quantizer calls a scale ``<tensor>_scale`` and the node that reads it ``<tensor>_DequantizeLinear``:
names cost more than what they name. Nodes that compute and float activations keep theirs, which users, `exclude_nodes`
and comparisons layer by layer go by. 8-bit activations are called ``<activation>_quantized``, after which `inspect`
names them. Everything else gets a letter and a number, in the order of the graph:

    q stored integers     s scales     z zero points     d dequantized tensors
"""

from __future__ import annotations

from collections import Counter

import onnx

_ADDED = ("QuantizeLinear", "DequantizeLinear")
_LETTERS = "qszd"


def shorten_names(model: onnx.ModelProto) -> int:
    """Rename, in place, the tensors at QuantizeLinear and DequantizeLinear nodes, and take those nodes' names away.

    Args:
        model: A QDQ model without subgraphs, which would refer to the tensors as well.

    Returns:
        How many tensors have another name now. A second call changes nothing.
    """
    names = _short_names(model)
    for node in model.graph.node:
        if node.op_type in _ADDED:
            node.ClearField("name")
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    for item in (*model.graph.initializer, *model.graph.value_info):
        item.name = names.get(item.name, item.name)
    return sum(name != short for name, short in names.items())


def _short_names(model: onnx.ModelProto) -> dict[str, str]:
    """Old name to new, for every tensor that QuantizeLinear and DequantizeLinear nodes alone account for."""
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    stems: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            activation = node.input[0]
            output = "q" if activation in stems else f"{activation}_quantized"
            roles = [(node.output[0], output), *zip(node.input[1:], "sz", strict=False)]
        elif node.op_type == "DequantizeLinear":
            roles = [*zip(node.input, "qsz", strict=False), (node.output[0], "d")]
        else:
            continue
        for name, stem in roles:
            if name and name not in fixed:
                stems.setdefault(name, stem)
    taken = fixed | {tensor.name for tensor in graph.initializer}
    taken |= {name for node in graph.node for name in (*node.input, *node.output)}
    taken -= set(stems)
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, stem in stems.items():
        short = stem
        while short in taken or short in _LETTERS:
            short = f"{stem}{counts[stem]}"
            counts[stem] += 1
        taken.add(short)
        names[name] = short
    return names

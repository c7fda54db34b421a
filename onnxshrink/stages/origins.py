"""Which of the optimized graph's nodes stand for those that the user knows: a fused node answers to its old names."""

from __future__ import annotations

import json

import onnx

_KEY = "onnxshrink.stands_for"


def record_origins(original: onnx.ModelProto, optimized: onnx.ModelProto) -> None:
    """Write into each node of ``optimized`` the names of ``original``'s nodes that are gone and that it now computes.

    A node that is gone is computed where its output still is; if that is gone as well, then where the outputs of its
    readers are, and so on. What was folded into constants is computed nowhere.

    Args:
        original: The graph before; its own records are carried over.
        optimized: The graph after, each node with a name of its own; changed in place.
    """
    nodes = {node.name: node for node in optimized.graph.node}
    writers = {tensor: node.name for node in optimized.graph.node for tensor in node.output if tensor}
    constants = {tensor.name for tensor in optimized.graph.initializer}
    heirs: dict[str, set[str]] = {}  # tensor of the original to the nodes that now compute what follows from it
    gone: dict[str, set[str]] = {}
    for node in reversed(original.graph.node):
        written = {writers[tensor] for tensor in node.output if tensor in writers}
        if not written and not constants.intersection(node.output) and node.op_type != "Constant":
            written = {name for tensor in node.output for name in heirs.get(tensor, ())}
        for tensor in filter(None, node.input):
            heirs.setdefault(tensor, set()).update(written)
        for name in (node.name, *_recorded(node)):
            if name and name not in nodes:
                for heir in written:
                    gone.setdefault(heir, set()).add(name)
    for heir, names in gone.items():
        nodes[heir].metadata_props.add(key=_KEY, value=json.dumps(sorted(names)))


def origins(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Name of a node that was fused or renamed to the names of the nodes that compute it now."""
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        for name in _recorded(node):
            found.setdefault(name, []).append(node.name)
    return found


def _recorded(node: onnx.NodeProto) -> list[str]:
    return [name for entry in node.metadata_props if entry.key == _KEY for name in json.loads(entry.value)]

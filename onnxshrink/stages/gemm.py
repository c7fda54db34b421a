"""Gemm as MatMul and Add: the form that integer and block-wise kernels exist for."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper


def is_plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether the node is ``x @ w + b``, its weights turned or not: no factors, and ``x`` as it is."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return (attributes.get("alpha", 1.0), attributes.get("beta", 1.0), attributes.get("transA", 0)) == (1.0, 1.0, 0)


def unfold_gemms(model: onnx.ModelProto, *, leave: Collection[str] = ()) -> None:
    """Replace each plain Gemm with constant weights by a MatMul of the same name and, for its bias, an Add; in place.

    Weights that are stored turned are turned once for all nodes that share them; the stored form stays where others
    read it.

    Args:
        model: Every node has a name.
        leave: Names of nodes to keep.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    turned: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "Gemm" or node.name in leave or not is_plain_gemm(node) or node.input[1] not in constants:
            nodes.append(node)
            continue
        weights = node.input[1]
        if any(a.name == "transB" and a.i for a in node.attribute):
            if weights not in turned:
                turned[weights] = _free_name(f"{weights}_turned", constants)
                array = np.ascontiguousarray(numpy_helper.to_array(constants[weights]).T)
                graph.initializer.append(numpy_helper.from_array(array, turned[weights]))
            weights = turned[weights]
        has_bias = len(node.input) > 2 and node.input[2]
        product = f"{node.output[0]}_product" if has_bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weights], [product], name=node.name))
        if has_bias:
            nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]], name=f"{node.name}_bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_initializers(graph)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    """Remove the initializers that no node reads, subgraphs included, and no output shows; in place."""
    used = {value.name for value in graph.output}
    pending = [graph]
    while pending:
        for node in pending.pop().node:
            used.update(node.input)
            for attribute in node.attribute:
                pending.extend(g for g in (attribute.g, *attribute.graphs) if g.node)
                used.update(v.name for g in (attribute.g, *attribute.graphs) for v in g.output)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        dropped = {tensor.name for tensor in graph.initializer} - {tensor.name for tensor in kept}
        inputs = [value for value in graph.input if value.name not in dropped]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        del graph.input[:]
        graph.input.extend(inputs)


def _free_name(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "_"
    return name

"""The float graph's passes. The literal list at the end is the registry: its order is the order of work.

A pass gets a model of its own and returns it, or another, together with what it declined and why. It need not care for
the graph's inputs and outputs, nor prove itself: `optimize` restores the former and compares the numbers afterwards.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnx import numpy_helper

from onnxshrink.runtime.graph import graphs_of, load_model, name_nodes
from onnxshrink.runtime.session import Session

Pass: TypeAlias = Callable[[onnx.ModelProto], tuple[onnx.ModelProto, list[str]]]
"""A model in; a model and the reasons for what was left undone out."""

_STANDARD = ("", "ai.onnx")


def strip_metadata(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Drop documentation, stack traces and inferred shapes, and what marks initializers as inputs.

    The model's own ``metadata_props`` stay: class names and the like are the user's. Shapes stay where a node is of a
    foreign domain, because ONNX cannot infer them again.
    """
    own = list(model.metadata_props)
    proto = ir.serde.deserialize_model(model)
    ir_passes.RemoveInitializersFromInputsPass()(proto)
    ir_passes.ClearMetadataAndDocStringPass()(proto)
    model = ir.serde.serialize_model(proto)
    del model.metadata_props[:]
    model.metadata_props.extend(own)
    foreign = not domains_of(model) <= {""}
    for graph in graphs_of(model.graph):
        constants = {tensor.name for tensor in graph.initializer}
        kept = [value for value in graph.value_info if foreign and value.name not in constants]
        del graph.value_info[:]
        graph.value_info.extend(kept)
    return model, []


def fold_constants(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Optimize as onnxscript does: constants, dead code, batch norm into Conv, ConvTranspose and Gemm."""
    from onnxscript.optimizer import optimize

    return optimize(model), []


def slim(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Slim as onnxslim does: shape arithmetic, Pad, Add and Mul into Conv, MatMul and Add into Gemm."""
    import onnxslim

    result = onnxslim.slim(model)
    if not isinstance(result, onnx.ModelProto):
        raise TypeError(f"onnxslim returned {type(result).__name__}")
    return result, []


def run_basic(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """ONNX Runtime's offline BASIC level, which is the same on every host; taken if it saves a node.

    It folds batch norm and Mul into a MatMul's Gemm, which the others leave. Never above BASIC: higher levels write
    nodes that only ONNX Runtime knows, or that fit only this host's instruction set.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "basic.onnx"
        Session(model.SerializeToString(), optimization="basic", save_optimized=path, name="the model to optimize")
        result = load_model(path)
    if sum(count_ops(result).values()) >= sum(count_ops(model).values()):
        return model, ["it saves no node"]
    used = domains_of(result)
    kept = [entry for entry in result.opset_import if entry.domain in used or entry.domain in _STANDARD]
    del result.opset_import[:]
    result.opset_import.extend(kept)
    result.ir_version = model.ir_version
    return result, []


def pool_globally(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """ReduceMean over all spatial axes becomes GlobalAveragePool, with a Flatten behind it if it dropped the axes.

    torch's exporter writes global pooling as ReduceMean, which ONNX Runtime never runs in integers.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {name for node in model.graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    notes: list[str] = []
    for node in model.graph.node:
        if node.op_type != "ReduceMean" or node.domain not in _STANDARD:
            nodes.append(node)
            continue
        refusal = _why_not_pooled(node, types.get(node.input[0]), constants)
        if refusal:
            notes.append(f"{node.name or node.output[0]}: {refusal}")
            nodes.append(node)
        else:
            nodes.extend(_pooled(node, names))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model, notes


def tidy(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Constants become initializers, what nothing reads goes, and every node gets a name of its own.

    An unnamed node becomes ``<OpType>_<index>``: `quantize_static`'s ``exclude_nodes`` needs names that mean one node.
    """
    proto = ir.serde.deserialize_model(model)
    ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(proto)
    ir_passes.RemoveUnusedNodesPass()(proto)
    ir_passes.RemoveUnusedOpsetsPass()(proto)
    model = ir.serde.serialize_model(proto)
    name_nodes(model)
    return model, []


PASSES: tuple[Pass, ...] = (strip_metadata, fold_constants, slim, run_basic, pool_globally, tidy)

SAFE_ON_QUANTIZED: tuple[Pass, ...] = (strip_metadata, tidy)
"""Passes that move no QuantizeLinear: elsewhere a folded pair is a lost integer kernel."""


def count_ops(model: onnx.ModelProto) -> Counter[str]:
    """Number of nodes of each operator type, subgraphs included."""
    return Counter(node.op_type for graph in graphs_of(model.graph) for node in graph.node)


def domains_of(model: onnx.ModelProto) -> set[str]:
    """The operator domains that nodes use, the standard one as the empty string."""
    domains = {node.domain for graph in graphs_of(model.graph) for node in graph.node}
    return {"" if domain in _STANDARD else domain for domain in domains}


def _why_not_pooled(
    node: onnx.NodeProto, kind: onnx.TypeProto.Tensor | None, constants: dict[str, onnx.TensorProto]
) -> str | None:
    if kind is None or not kind.HasField("shape"):
        return "the rank of its input is not known"
    if kind.elem_type != onnx.TensorProto.FLOAT:
        return "its input is not float32"
    rank = len(kind.shape.dim)
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if len(node.input) > 1 and node.input[1]:
        if node.input[1] not in constants:
            return "its axes are computed"
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
    else:
        axes = list(attributes.get("axes", ()))
    spatial = set(range(2, rank))
    if not spatial or {axis % rank for axis in axes} != spatial:
        return f"it means over axes {sorted(axes)} of rank {rank}, not over all spatial ones"
    return None


def _pooled(node: onnx.NodeProto, names: set[str]) -> list[onnx.NodeProto]:
    keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    if keeps:
        return [onnx.helper.make_node("GlobalAveragePool", node.input[:1], node.output, name=node.name)]
    pooled = _unique(f"{node.output[0]}_pooled", names)
    return [
        onnx.helper.make_node("GlobalAveragePool", node.input[:1], [pooled], name=node.name),
        onnx.helper.make_node(
            "Flatten", [pooled], node.output, name=f"{node.name}_flatten" if node.name else "", axis=1
        ),
    ]


def _unique(name: str, used: set[str]) -> str:
    candidate, number = name, 0
    while candidate in used:
        number += 1
        candidate = f"{name}_{number}"
    used.add(candidate)
    return candidate

"""Tensors of two models find each other, by name or by structure, and what does not is listed."""

from __future__ import annotations

import explain_mutations as mutations
import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.graph import name_nodes
from onnxshrink.verify.pairing import Pair, Tensors, pair_up


def paired(reference: nets.Model, candidate: nets.Model) -> Pair:
    """The two, with samples of the networks' own sizes."""
    for model in (reference, candidate):
        name_nodes(model)
    return pair_up(Tensors(reference, {}, name="reference"), Tensors(candidate, {}, name="candidate"))


def renamed(model: nets.Model) -> nets.Model:
    """The same with other names for all tensors but the inputs and outputs, and for all nodes."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {value.name for value in (*copy.graph.input, *copy.graph.output)}
    for node in copy.graph.node:
        node.name = f"other_{node.name}"
        for field in (node.input, node.output):
            field[:] = [name if name in kept or not name else f"t_{name}" for name in field]
    for tensor in copy.graph.initializer:
        tensor.name = f"t_{tensor.name}"
    del copy.graph.value_info[:]
    return copy


@pytest.mark.parametrize("network", mutations.NETWORKS)
def test_every_node_of_a_quantized_model_is_matched(network: str) -> None:
    """Nothing is left over, and nothing had to be told by structure."""
    model = mutations.NETWORKS[network]()
    found = paired(model, mutations.quantized(model, mutations.samples(network, model)))
    assert found.unmatched == ()
    assert found.by_structure == 0


@pytest.mark.parametrize("network", mutations.NETWORKS)
def test_names_are_not_needed(network: str) -> None:
    """With other names the same pieces stand for the same nodes."""
    model = mutations.NETWORKS[network]()
    good = mutations.quantized(model, mutations.samples(network, model))
    by_name, by_structure = paired(model, good), paired(model, renamed(good))
    assert by_structure.unmatched == ()
    assert by_structure.by_structure > 0
    assert [piece.node for piece in by_structure.pieces] == [piece.node for piece in by_name.pieces]


def test_a_relu_that_the_grid_took_in_belongs_to_the_node_before() -> None:
    """The 8-bit tensor stands for the Relu's result, the float one for the product's."""
    model = mutations.mlp()
    found = paired(model, mutations.quantized(model, mutations.samples("mlp", model)))
    first = found.pieces[0]
    assert (first.node, first.raw, first.reference) == ("dense0", "g0", "r0")
    assert [fold.name for fold in first.folds] == ["relu0"]


def test_a_node_that_the_candidate_does_not_have_is_listed() -> None:
    """A node taken out is named, and its neighbours are still matched."""
    model = mutations.mlp()
    candidate = onnx.ModelProto()
    candidate.CopyFrom(model)
    candidate.graph.node[2].op_type = "Gemm"
    nodes = [node for node in candidate.graph.node if node.name != "relu0"]
    nodes[1].input[0] = "g0"
    del candidate.graph.node[:]
    candidate.graph.node.extend(nodes)
    assert paired(model, candidate).unmatched == ("relu0",)


def test_models_with_nothing_in_common_are_refused() -> None:
    """Other inputs are a mistake of the user's, not an empty table."""
    one = helper.make_node("Add", ["a", "b"], ["y"], name="add")
    other = nets.model_of([one], {"a": ["N", 4], "b": ["N", 4]}, {"y": ["N", 4]}, {})
    with pytest.raises(ModelError, match="differ in their inputs"):
        paired(mutations.mlp(), other)


def test_a_wrong_neighbour_is_not_taken_by_structure() -> None:
    """A tensor that only the candidate has is matched with none that another node of the reference makes."""
    model = mutations.mlp()
    good = mutations.quantized(model, mutations.samples("mlp", model))
    dense1 = next(node for node in good.graph.node if node.name == "dense1")
    for node in good.graph.node:
        node.input[:] = ["extra" if name == dense1.output[0] else name for name in node.input]
    place = list(good.graph.node).index(dense1)
    good.graph.node.insert(place + 1, helper.make_node("Identity", [dense1.output[0]], ["extra"], name="extra"))
    found = paired(model, good)
    assert found.stands_for[dense1.output[0]] in {"g1", "r1"}
    assert len(set(found.stands_for.values())) == len(found.stands_for)
    assert np.all([piece.node for piece in found.pieces])

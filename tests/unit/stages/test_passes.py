"""Each pass on a graph that shows it, as text: tests/golden/<name>.txt holds the graph before and after."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.runtime.graph import graphs_of, is_quantized, name_nodes
from onnxshrink.runtime.parity import reference_session, relative_errors
from onnxshrink.stages import passes
from onnxshrink.stages.passes import Pass

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGE = {"x": ["batch", 2, 4, 4]}


def model_of(
    nodes: list[onnx.NodeProto],
    outputs: dict[str, list[int | str]],
    weights: dict[str, NDArray[np.generic]] | None = None,
    *,
    inputs: dict[str, list[int | str]] | None = None,
    opset: int = 20,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A checked model of one float input ``x``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in (inputs or IMAGE).items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def ramp(*shape: int) -> NDArray[np.float32]:
    """Small float32 numbers that can be read in a golden file."""
    return (np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape) % 5 - 1) / 4


def axes(*values: int) -> NDArray[np.int64]:
    """The axes of a reduction."""
    return np.array(values, np.int64)


def pooling(*, keepdims: int, where: tuple[int, ...] = (2, 3), **options: int) -> onnx.ModelProto:
    """ReduceMean over ``where``."""
    reduced = [1 if keepdims else 0 if axis in where else size for axis, size in ((2, 4), (3, 4))]
    left = [size for size in reduced if size] if not keepdims else [1, 1]
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="mean", keepdims=keepdims)
    shape: list[int | str] = ["batch", 2, *left]
    return model_of([node], {"y": shape}, {"axes": axes(*where)}, **options)


def batch_norm(channels: int, source: str, out: str = "y") -> tuple[onnx.NodeProto, dict[str, NDArray[np.generic]]]:
    """A BatchNormalization with its four constants."""
    names = ["gamma", "beta", "mean", "var"]
    node = helper.make_node("BatchNormalization", [source, *names], [out], name="bn")
    constants = {name: np.abs(ramp(channels)) + np.float32(0.5) for name in names}
    return node, dict(constants)


def documented() -> onnx.ModelProto:
    """A model with everything that an exporter leaves behind, and metadata of the user's own."""
    node = helper.make_node("Add", ["x", "w"], ["y"], name="add", doc_string="File model.py, line 3")
    model = model_of([node], {"y": ["batch", 2, 4, 4]}, {"w": ramp(4)})
    node = model.graph.node[0]
    node.metadata_props.append(onnx.StringStringEntryProto(key="pkg.torch.onnx.stack_trace", value="File model.py"))
    model.graph.doc_string = "made somewhere"
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    model.metadata_props.append(onnx.StringStringEntryProto(key="names", value="cat,dog"))
    return onnx.shape_inference.infer_shapes(model)


def conv_bn_relu6() -> onnx.ModelProto:
    """Conv, batch norm, and a Clip whose limits are Constant nodes."""
    norm, weights = batch_norm(2, "c", "n")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        norm,
        helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.float32(0))),
        helper.make_node("Constant", [], ["six"], value=numpy_helper.from_array(np.float32(6))),
        helper.make_node("Clip", ["n", "zero", "six"], ["k"], name="clip"),
        helper.make_node("Dropout", ["k"], ["d"], name="drop"),
        helper.make_node("Identity", ["d"], ["y"], name="same"),
    ]
    return model_of(nodes, {"y": ["batch", 2, 4, 4]}, weights | {"w": ramp(2, 2, 3, 3)})


def conv_add() -> onnx.ModelProto:
    """A convolution whose bias is an Add behind it."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Add", ["c", "b"], ["y"], name="bias"),
    ]
    return model_of(nodes, {"y": ["batch", 2, 4, 4]}, {"w": ramp(2, 2, 1, 1), "b": ramp(2, 1, 1)})


def matmul_bn() -> onnx.ModelProto:
    """A layer without bias before a batch norm."""
    norm, weights = batch_norm(3, "m")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul"), norm]
    return model_of(nodes, {"y": ["batch", 3]}, weights | {"w": ramp(4, 3)}, inputs={"x": ["batch", 4]})


def untidy() -> onnx.ModelProto:
    """Nodes without names, one named as an unnamed one would be, a Constant, and what nothing reads."""
    nodes = [
        helper.make_node("Constant", [], ["two"], value=numpy_helper.from_array(np.float32(2))),
        helper.make_node("Mul", ["x", "two"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"], name="Neg_4"),
        helper.make_node("Neg", ["b"], ["c"], name="second"),
        helper.make_node("Neg", ["c"], ["y"]),
        helper.make_node("Exp", ["c"], ["unused"]),
    ]
    return model_of(nodes, {"y": ["batch", 2, 4, 4]}, {"nobody": ramp(9)})


CASES: dict[str, tuple[Pass, onnx.ModelProto]] = {
    "strip_metadata": (passes.strip_metadata, documented()),
    "fold_constants": (passes.fold_constants, conv_bn_relu6()),
    "slim": (passes.slim, conv_add()),
    "run_basic": (passes.run_basic, matmul_bn()),
    "pool_globally": (passes.pool_globally, pooling(keepdims=1)),
    "pool_globally_and_flatten": (passes.pool_globally, pooling(keepdims=0)),
    "tidy": (passes.tidy, untidy()),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pass_does_what_its_golden_file_shows(name: str) -> None:
    """Graph before and after as text. GOLDEN=write writes the file anew; the difference is for a reviewer to read."""
    pass_, before = CASES[name]
    copy = onnx.ModelProto()
    copy.CopyFrom(before)
    after, notes = pass_(copy)
    text = "\n".join(
        ["# before", onnx.printer.to_text(before), "# after", _text(after), "# notes", *(notes or ["none"])]
    )
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == path.read_text(encoding="utf-8")


def _text(model: onnx.ModelProto) -> str:
    # Other libraries note shapes, producers and folded weights, whose last digits differ between their versions.
    model, _ = passes.strip_metadata(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = np.round(numpy_helper.to_array(tensor), 4) + np.float32(0)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return onnx.printer.to_text(model)


@pytest.mark.parametrize("name", CASES)
def test_a_pass_keeps_the_numbers(name: str) -> None:
    """The graphs of the golden files compute the same."""
    pass_, before = CASES[name]
    copy = onnx.ModelProto()
    copy.CopyFrom(before)
    after, _ = pass_(copy)
    onnx.checker.check_model(after, full_check=True)
    shape = [dim.dim_value or 3 for dim in before.graph.input[0].type.tensor_type.shape.dim]
    batch = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    errors = relative_errors(
        reference_session(before, name="before").run(batch), reference_session(after, name="after").run(batch)
    )
    assert max(errors.values()) < 1e-5


def test_what_an_exporter_leaves_behind_is_gone() -> None:
    """Documentation, stack traces and shapes; the user's own metadata and the outputs' shapes stay."""
    before = documented()
    before.graph.value_info.append(helper.make_tensor_value_info("inner", TensorProto.FLOAT, [1]))
    after, _ = passes.strip_metadata(before)
    data = after.SerializeToString()
    assert b"model.py" not in data
    assert b"made somewhere" not in data
    assert not after.graph.value_info
    assert [(entry.key, entry.value) for entry in after.metadata_props] == [("names", "cat,dog")]


def test_shapes_stay_where_onnx_cannot_infer_them() -> None:
    """Behind an operator of another domain they are known from nowhere else."""
    nodes = [
        helper.make_node("Relu", ["x"], ["inner"]),
        helper.make_node("QuickGelu", ["inner"], ["y"], domain="com.microsoft"),
    ]
    model = model_of(nodes[:1], {"inner": ["batch", 2, 4, 4]})
    model.graph.node.append(nodes[1])
    model.graph.value_info.append(model.graph.output[0])
    model.graph.output[0].name = "y"
    assert [value.name for value in passes.strip_metadata(model)[0].graph.value_info] == ["inner"]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("where", [(2, 3), (-1, -2), (3, 2)])
def test_pooling_is_found_however_its_axes_are_written(where: tuple[int, ...], keepdims: int) -> None:
    """In any order, from either end; the numbers are numpy's."""
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)
    shape: list[int | str] = ["batch", 2, 1, 1] if keepdims else ["batch", 2]
    model, notes = passes.pool_globally(model_of([node], {"y": shape}, {"axes": axes(*where)}))
    assert [node.op_type for node in model.graph.node] == ["GlobalAveragePool", "Flatten"][: 2 - keepdims]
    assert notes == []
    x = np.random.default_rng(0).standard_normal((3, 2, 4, 4)).astype(np.float32)
    result = reference_session(model, name="m").run({"x": x})["y"]
    np.testing.assert_allclose(result, x.mean((2, 3), keepdims=bool(keepdims)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rank", "where"), [(3, (2,)), (5, (2, 3, 4))])
def test_pooling_is_not_only_for_images(rank: int, where: tuple[int, ...]) -> None:
    """Sequences and volumes are pooled alike."""
    shape: list[int | str] = ["batch", 2, 4, 4, 4][:rank]  # type: ignore[list-item]
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    model = model_of([node], {"y": ["batch", 2]}, {"axes": axes(*where)}, inputs={"x": shape})
    model, _ = passes.pool_globally(model)
    x = np.random.default_rng(0).standard_normal([3, 2, 4, 4, 4][:rank]).astype(np.float32)
    result = reference_session(model, name="m").run({"x": x})["y"]
    np.testing.assert_allclose(result, x.mean(where), rtol=1e-5, atol=1e-6)
    assert model.graph.node[0].op_type == "GlobalAveragePool"


def test_pooling_of_an_older_opset_is_found() -> None:
    """Before opset 18 the axes are an attribute."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=1)
    model, _ = passes.pool_globally(model_of([node], {"y": ["batch", 2, 1, 1]}, opset=13))
    assert [node.op_type for node in model.graph.node] == ["GlobalAveragePool"]


@pytest.mark.parametrize(
    ("node", "shape", "reason"),
    [
        (helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="m", keepdims=1), ["batch", 2, 4, 1], "axes [3]"),
        (helper.make_node("ReduceMean", ["x"], ["y"], name="m", keepdims=1), [1, 1, 1, 1], "axes []"),
    ],
)
def test_other_means_are_left_with_a_reason(node: onnx.NodeProto, shape: list[int | str], reason: str) -> None:
    """A mean over one axis, or over all, is no global pooling."""
    model, notes = passes.pool_globally(model_of([node], {"y": shape}, {"axes": axes(3)}))
    assert [node.op_type for node in model.graph.node] == ["ReduceMean"]
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_mean_in_double_is_left_with_a_reason() -> None:
    """ONNX Runtime pools in float32 only."""
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="m", keepdims=1)
    model = model_of([node], {"y": ["batch", 2, 1, 1]}, {"axes": axes(2, 3)}, dtype=TensorProto.DOUBLE)
    _, notes = passes.pool_globally(model)
    assert notes == ["m: its input is not float32"]


def test_a_mean_whose_axes_are_computed_is_left_with_a_reason() -> None:
    """They are known only when the model runs."""
    nodes = [
        helper.make_node("Identity", ["axes"], ["same"]),
        helper.make_node("ReduceMean", ["x", "same"], ["y"], name="m", keepdims=1),
    ]
    model = model_of(nodes, {"y": ["a", "b", "c", "d"]}, {"axes": axes(2, 3)})
    assert passes.pool_globally(model)[1] == ["m: its axes are computed"]


def test_names_of_nodes_in_subgraphs_are_unique_as_well() -> None:
    """A name means one node in the whole model."""

    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("Relu", ["x"], [name])], name, [], [out])

    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node("Relu", ["x"], ["z"]),
    ]
    model = model_of(nodes, {"y": ["batch", 2, 4, 4], "z": ["batch", 2, 4, 4]}, {"c": np.array([True])})
    model, _ = passes.tidy(model)
    names = [node.name for graph in graphs_of(model.graph) for node in graph.node]
    assert len(names) == 4
    assert all(names)
    assert len(set(names)) == 4


def test_no_name_that_the_user_gave_is_changed() -> None:
    """A node without a name never takes another's, wherever that stands; a name's second bearer gives way."""
    model = onnx.ModelProto()
    for name in ("", "Relu_0", "twice", "twice", "", "twice_1"):
        model.graph.node.append(helper.make_node("Relu", ["x"], ["y"], name=name))
    name_nodes(model)
    assert [node.name for node in model.graph.node] == ["Relu_0_1", "Relu_0", "twice", "twice_2", "Relu_4", "twice_1"]


@pytest.mark.parametrize(
    "op", ["QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "ConvInteger", "MatMulInteger"]
)
def test_a_quantized_model_is_recognized(op: str) -> None:
    """In either of ONNX Runtime's formats."""
    model = onnx.ModelProto()
    model.graph.node.append(helper.make_node("Relu", ["x"], ["a"]))
    assert not is_quantized(model)
    model.graph.node.append(helper.make_node(op, ["a"], ["y"]))
    assert is_quantized(model)

"""Short names: which tensors get them, which keep theirs, and that nothing but names changes."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.runtime.session import Session
from onnxshrink.stages.short_names import shorten_names


def model_of(nodes: list[onnx.NodeProto], outputs: dict[str, int]) -> onnx.ModelProto:
    """``x[4]`` through ``nodes``; constants: a scale and a zero point ``step``, ``zero``, and integers ``stored``."""
    constants = {
        "step": np.array(0.1, np.float32),
        "zero": np.array(3, np.uint8),
        "stored": np.array([1, 2, 3, 4], np.uint8),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info(name, kind, [4]) for name, kind in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def quantize(read: str, write: str) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [read, "step", "zero"], [write], name=f"{read}_node")


def dequantize(read: str, write: str) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [read, "step", "zero"], [write], name=f"{read}_node")


def shortened(model: onnx.ModelProto, count: int) -> list[tuple[str, list[str], list[str]]]:
    """Name, inputs and outputs of each node after ``count`` tensors were renamed; the numbers are as before."""
    before = onnx.ModelProto()
    before.CopyFrom(model)
    assert shorten_names(model) == count
    onnx.checker.check_model(model, full_check=True)
    again = onnx.ModelProto()
    again.CopyFrom(model)
    assert shorten_names(again) == 0
    assert again == model, "a second time changes nothing"
    x = {"x": np.array([-0.2, 0, 0.7, 9], np.float32)}
    want, got = (Session(one.SerializeToString()).run(x) for one in (before, model))
    assert list(want) == list(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)
    return [(node.name, list(node.input), list(node.output)) for node in model.graph.node]


def test_what_the_quantizer_added_is_short() -> None:
    """Nodes that compute and float activations keep their names; a tensor that two nodes read is the same for both."""
    model = model_of(
        [
            quantize("x", "x_QuantizeLinear_Output"),
            dequantize("x_QuantizeLinear_Output", "x_DequantizeLinear_Output"),
            dequantize("stored", "stored_DequantizeLinear_Output"),
            helper.make_node("Add", ["x_DequantizeLinear_Output", "stored_DequantizeLinear_Output"], ["sum"], name="a"),
            helper.make_node("Mul", ["sum", "x_DequantizeLinear_Output"], ["y"], name="b"),
        ],
        {"y": TensorProto.FLOAT},
    )
    assert shortened(model, 6) == [
        ("", ["x", "s0", "z0"], ["x_quantized"]),
        ("", ["x_quantized", "s0", "z0"], ["d0"]),
        ("", ["q0", "s0", "z0"], ["d1"]),
        ("a", ["d0", "d1"], ["sum"]),
        ("b", ["sum", "d0"], ["y"]),
    ]


def test_outputs_of_the_graph_keep_their_names() -> None:
    """Also where they are read on within the graph, integers among them."""
    model = model_of(
        [
            quantize("x", "integers"),
            dequantize("integers", "floats"),
            helper.make_node("Relu", ["floats"], ["y"], name="relu"),
        ],
        {"integers": TensorProto.UINT8, "floats": TensorProto.FLOAT, "y": TensorProto.FLOAT},
    )
    assert shortened(model, 2)[1] == ("", ["integers", "s0", "z0"], ["floats"])


def test_names_of_the_model_are_not_taken() -> None:
    """A tensor of the float model that is called like a short name keeps it, and the next number is used."""
    model = model_of(
        [
            helper.make_node("Relu", ["x"], ["d0"], name="relu"),
            helper.make_node("Neg", ["d0"], ["d0_quantized"], name="minus"),
            helper.make_node("Add", ["d0", "d0_quantized"], ["s0"], name="add"),
            quantize("d0", "first"),
            dequantize("first", "second"),
            helper.make_node("Add", ["second", "s0"], ["y"], name="end"),
        ],
        {"y": TensorProto.FLOAT},
    )
    assert shortened(model, 4)[3:5] == [
        ("", ["d0", "s1", "z0"], ["d0_quantized0"]),
        ("", ["d0_quantized0", "s1", "z0"], ["d1"]),
    ]


def test_quantized_twice() -> None:
    """A tensor that is quantized again straight after it was dequantized is no activation of the float model's."""
    model = model_of(
        [quantize("x", "a"), dequantize("a", "b"), quantize("b", "c"), dequantize("c", "y")], {"y": TensorProto.FLOAT}
    )
    assert [outputs[0] for _, _, outputs in shortened(model, 5)] == ["x_quantized", "d0", "q0", "y"]


def test_value_info_follows() -> None:
    """What the file says of an inner tensor's shape stays with the tensor."""
    model = model_of([quantize("x", "inner"), dequantize("inner", "y")], {"y": TensorProto.FLOAT})
    model.graph.value_info.append(helper.make_tensor_value_info("inner", TensorProto.UINT8, [4]))
    shorten_names(model)
    assert [value.name for value in model.graph.value_info] == ["x_quantized"]

"""The quantization step of an output is read off the graph, and only where it has one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import model_of

from onnxshrink.runtime.session import Session
from onnxshrink.verify.steps import output_steps

SCALE = np.float32(0.25)
WEIGHTS = {"s": np.array(SCALE), "z": np.array(3, np.uint8), "shape": np.array([-1, 4], np.int64)}


def ends_with(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    """``x[N,2,2]``, quantized to ``q`` and back to ``d``, then ``nodes`` up to ``y``."""
    border = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
    ]
    return model_of([*border, *nodes], {"x": ["N", 2, 2]}, {"y": ["N", "M"]}, WEIGHTS | weights)


def test_a_step_is_the_smallest_difference_of_an_output() -> None:
    """The numbers that come out are a step apart, through nodes that only move them."""
    model = ends_with(
        helper.make_node("Transpose", ["d"], ["t"], perm=[0, 2, 1]), helper.make_node("Reshape", ["t", "shape"], ["y"])
    )
    x = np.linspace(-1, 3, 400, dtype=np.float32).reshape(-1, 2, 2)
    values = np.unique(Session(model.SerializeToString()).run({"x": x})["y"])
    assert output_steps(model) == {"y": np.diff(values).min()} == {"y": 0.25}


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([helper.make_node("Mul", ["d", "s"], ["y"])], {}),
        ([helper.make_node("Concat", ["d", "x"], ["y"], axis=-1)], {}),
        ([helper.make_node("Identity", ["x"], ["y"])], {}),
        (
            [helper.make_node("DequantizeLinear", ["q", "ss", "zz"], ["y"], axis=1)],
            {"ss": np.array([1, 2], np.float32), "zz": np.array([0, 0], np.uint8)},
        ),
    ],
    ids=["computed", "joined with float", "float", "scale per channel"],
)
def test_other_outputs_have_none(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> None:
    """Nothing is said of outputs that are computed after the last rounding, not rounded, or rounded in several ways."""
    assert output_steps(ends_with(*nodes, **weights)) == {}


def test_scales_from_constant_nodes_count() -> None:
    """Some tools keep scales as nodes; those that are computed from the input have no fixed step."""
    value = onnx.numpy_helper.from_array(np.array(0.5, np.float32))
    fixed = [
        helper.make_node("Constant", [], ["c"], value=value),
        helper.make_node("DequantizeLinear", ["q", "c", "z"], ["y"]),
    ]
    dynamic = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["dq", "ds", "dz"]),
        helper.make_node("DequantizeLinear", ["dq", "ds", "dz"], ["y"]),
    ]
    assert output_steps(ends_with(*fixed)) == {"y": 0.5}
    assert output_steps(ends_with(*dynamic)) == {}


def test_quantized_numbers_are_a_step_apart_by_one() -> None:
    """An output of integers counts steps by itself."""
    model = ends_with(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]))
    model.graph.output.append(helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, ["N", 2, 2]))
    assert output_steps(model) == {"y": 0.25, "q": 1.0}

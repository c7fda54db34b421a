"""Scales and biases in 16 bits: the values that come back, what is an exception, and when nothing is done."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.core.tensors import Array
from onnxshrink.runtime.session import Session
from onnxshrink.stages.narrow import Layer, narrow

ENDS = [-(1 << 31), -40000, -32769, -32768, -32767, -1, 0, 1, 32767, 32768, 40000, (1 << 31) - 1]
SMALLEST_NORMAL = 2.0**-14


def model_of(tensors: dict[str, Array]) -> onnx.ModelProto:
    """A model whose outputs are its initializers: ``scale`` as ``scale_out``, and so on."""
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"], name=name) for name in tensors],
        "graph",
        [],
        [
            helper.make_tensor_value_info(f"{name}_out", helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in tensors.items()
        ],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def values_of(model: onnx.ModelProto) -> dict[str, Array]:
    """What ONNX Runtime reads in place of the initializers."""
    onnx.checker.check_model(model, full_check=True)
    values = Session(model.SerializeToString()).run({})
    return {name.removesuffix("_out"): value for name, value in values.items()}


def exact(count: int) -> Array:
    """Scales that float16 holds."""
    return np.linspace(1, 2, count, endpoint=False).astype(np.float16).astype(np.float32)


def test_biases_keep_their_values() -> None:
    """int16 holds -32768 to 32767, everything else is an exception, and int32 comes back with every value."""
    bias = np.resize(np.array(ENDS + [5] * 100, np.int32), 1000)
    model = model_of({"scale": exact(1000), "bias": bias})
    facts = narrow(model, [Layer("scale", "bias")])
    assert facts["int16_biases"] == sum(-32768 <= value <= 32767 for value in bias.tolist())
    assert facts["float16_scales"] == 1000
    assert facts["largest_scale_change"] == 0
    got = values_of(model)
    assert got["bias"].dtype == np.int32
    np.testing.assert_array_equal(got["bias"], bias)
    np.testing.assert_array_equal(got["scale"], exact(1000))
    stored = {TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert stored == {"INT16", "FLOAT16", "INT32", "INT64"}


def test_scales_are_rounded_and_biases_follow() -> None:
    """Each scale is the nearest float16, and the bias stands for the same number to half a step."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(1e-4, 1e-2, 500).astype(np.float32)
    bias = rng.integers(-60000, 60000, 500).astype(np.int32)
    model = model_of({"scale": scale, "bias": bias})
    facts = narrow(model, [Layer("scale", "bias")])
    got = values_of(model)
    np.testing.assert_array_equal(got["scale"], scale.astype(np.float16))
    assert facts["largest_scale_change"] == pytest.approx(np.abs(got["scale"].astype(np.float64) / scale - 1).max())
    assert 0 < facts["largest_scale_change"] <= 2**-11
    want, have = bias * scale.astype(np.float64), got["bias"] * got["scale"].astype(np.float64)
    assert (np.abs(have - want) <= got["scale"] * 0.5000001).all()
    assert (got["bias"] != bias).any()


def test_scales_beyond_float16_are_exceptions() -> None:
    """Scales below the normal numbers, above the largest, or whose bias would leave int32, come back as they were."""
    scale = np.full(400, 0.1, np.float32)
    scale[:4] = [1e-9, SMALLEST_NORMAL / 1.001, 65520, 3e38]
    scale[4] = np.float32(1 + 2**-11 + 2**-13)  # float16 has 1 + 2**-10, so this bias would shrink
    scale[5] = np.float32(1 + 2**-11 - 2**-13)  # float16 has 1, so this bias would pass int32's end
    bias = np.zeros(400, np.int32)
    bias[4:6] = (1 << 31) - 1
    bias[0] = 1 << 30
    model = model_of({"scale": scale, "bias": bias})
    assert narrow(model, [Layer("scale", "bias")])["float16_scales"] == 395
    got = values_of(model)
    kept = [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(got["scale"][kept], scale[kept])
    np.testing.assert_array_equal(got["bias"][kept], bias[kept])
    assert got["scale"][4] == 1 + 2**-10
    assert got["scale"][6] == np.float16(0.1)


def test_layers_may_share_a_scale() -> None:
    """Two biases of one scale both follow it."""
    rng = np.random.default_rng(1)
    scale = rng.uniform(1e-3, 1e-2, 300).astype(np.float32)
    biases = {name: rng.integers(-30000, 30000, 300).astype(np.int32) for name in ("first", "second")}
    model = model_of({"scale": scale, **biases})
    narrow(model, [Layer("scale", "first"), Layer("scale", "second")])
    got = values_of(model)
    ratio = scale.astype(np.float64) / got["scale"]
    for name, bias in biases.items():
        np.testing.assert_array_equal(got[name], np.rint(bias * ratio))


def test_untied_scales_stay() -> None:
    """A bias with a scale of its own would not follow, so its layer's scale is not touched; the bias itself packs."""
    scale, bias = np.full(300, 0.1, np.float32), np.full(300, 7, np.int32)
    model = model_of({"scale": scale, "bias": bias})
    facts = narrow(model, [Layer("scale", "bias", tied=False)])
    assert (facts["float16_scales"], facts["int16_biases"]) == (0, 300)
    np.testing.assert_array_equal(values_of(model)["scale"], scale)


@pytest.mark.parametrize(
    "tensors",
    [
        {"scale": exact(100), "bias": np.zeros(100, np.int32)},
        {"scale": np.full(500, 1e-8, np.float32), "bias": np.full(500, 1 << 20, np.int32)},
        {"scale": np.array(0.1, np.float32), "bias": np.array(3, np.int32)},
        {"scale": np.full((30, 30), 0.1, np.float32), "bias": np.zeros((30, 30), np.int32)},
        {"scale": np.full(500, 0.1, np.float64), "bias": np.zeros(500, np.int64)},
    ],
    ids=["few", "exceptions", "scalars", "matrices", "types"],
)
def test_left_where_it_does_not_pay(tensors: dict[str, Array]) -> None:
    """Few values, values that are mostly exceptions, scalars and other types: the model stays as it is."""
    model = model_of(tensors)
    assert narrow(model, [Layer("scale", "bias")]) == {
        "float16_scales": 0, "int16_biases": 0, "largest_scale_change": 0.0
    }  # fmt: skip
    assert model == model_of(tensors)


def test_names_that_are_taken() -> None:
    """Tensors of the model with names that the parts would have do not get in the way."""
    tensors = {"scales_16": exact(400), "biases_all": np.arange(400, dtype=np.int32), "biases__wide": exact(3)}
    model = model_of(tensors)
    narrow(model, [Layer("scales_16", "biases_all")])
    got = values_of(model)
    for name, value in tensors.items():
        np.testing.assert_array_equal(got[name], value)

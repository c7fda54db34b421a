"""quantize_weights: the runtime computes with exactly the weights that the blocks stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.capi import _pybind_state as kernels

from onnxshrink.config.stages import QuantizeWeights
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.graph import load_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.blocks import packed, quantize_blocks
from onnxshrink.stages.quantize_weights import quantize_weights


def run_stage(folder: Path, model: nets.Model, **settings: Any) -> tuple[Facts, nets.Model]:
    source = nets.artifact_of(model, folder / "source")
    (folder / "out").mkdir()
    context = nets.context_of(nets.ArrayReader({}), folder)
    facts = quantize_weights(QuantizeWeights(**settings), source, folder / "out", context)
    return facts, load_model(folder / "out" / "model.onnx")


def gaussian(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def words(width: int = 72) -> nets.Model:
    """``ids[N,5]`` to ``y[N,5,24]``: an embedding, a MatMul, and a Gemm over rows whose weights are stored turned."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "w"], ["m"], name="widen"),
        helper.make_node("Reshape", ["m", "rows"], ["r"], name="rows"),
        helper.make_node("Gemm", ["r", "v", "b"], ["g"], name="head", transB=1),
        helper.make_node("Reshape", ["g", "back"], ["y"], name="back"),
    ]
    weights: dict[str, NDArray[Any]] = {
        "table": gaussian(50, width),
        "w": gaussian(width, 48, seed=1) / 8,
        "v": gaussian(24, 48, seed=2) / 8,
        "b": gaussian(24, seed=3),
        "rows": np.array([-1, 48]),
        "back": np.array([-1, 5, 24]),
    }
    model = nets.model_of(nodes, {"ids": ["N", 5]}, {"y": ["N", 5, 24]}, weights)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    return model


def convolutions(*, opset: int) -> nets.Model:
    """``x[N,8,9,9]`` to ``y``: Conv, a depthwise Conv, ConvTranspose."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w2"], ["d"], name="depthwise", group=32),
        helper.make_node("ConvTranspose", ["d", "w3"], ["y"], name="up"),
    ]
    weights = {"w1": gaussian(32, 8, 3, 3), "w2": gaussian(32, 1, 3, 3, seed=1), "w3": gaussian(32, 6, 2, 2, seed=2)}
    return nets.model_of(nodes, {"x": ["N", 8, 9, 9]}, {"y": ["N", 6, 8, 8]}, weights, opset=opset)


def outputs(model: nets.Model, inputs: dict[str, Any]) -> NDArray[Any]:
    return Session(model.SerializeToString()).run(inputs)["y"]


def with_weights(model: nets.Model, arrays: dict[str, NDArray[np.float32]]) -> nets.Model:
    """A copy of the float model with other weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name].astype(np.float32), tensor.name))
    return copy


def rounded(rows: NDArray[np.float32], bits: int, block_size: int) -> NDArray[np.float32]:
    return quantize_blocks(np.ascontiguousarray(rows), bits=bits, block_size=block_size).dequantized()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("width", [72, 71])
def test_runtime_computes_with_the_rounded_weights(tmp_path: Path, bits: int, block_size: int, width: int) -> None:
    """The model's outputs are those of the float model with rounded weights, whatever remains at the end of a row."""
    model = words(width)
    facts, quantized = run_stage(tmp_path, model, bits=bits, block_size=block_size, activations="float")
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = with_weights(
        model,
        {
            "table": rounded(arrays["table"], bits, block_size),
            "w": rounded(arrays["w"].T, bits, block_size).T,
            "v": rounded(arrays["v"], bits, block_size),
        },
    )
    ids = {"ids": np.random.default_rng(1).integers(0, 50, (16, 5))}
    np.testing.assert_allclose(outputs(quantized, ids), outputs(expected, ids), atol=1e-4)
    assert facts["quantized_nodes"] == {"Gather": 1, "Gemm": 1, "MatMul": 1}
    assert {name: note["form"] for name, note in facts["nodes"].items()} == {
        "embed": "GatherBlockQuantized",
        "widen": "MatMulNBits",
        "head": "MatMulNBits",
    }
    floats = [t for t in quantized.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all("scales" in t.name or t.name == "b" for t in floats)


@pytest.mark.parametrize(("bits", "opset"), [(4, 21), (8, 21), (4, 17), (8, 13)])
def test_convolutions_dequantize(tmp_path: Path, bits: int, opset: int) -> None:
    """Convolutions take blocks where bits and opset allow it, else 8 bits a channel with the reason; numbers agree."""
    model = convolutions(opset=opset)
    facts, quantized = run_stage(tmp_path, model, bits=bits)
    assert facts["opset_after"] == opset
    blocked = {name for name, note in facts["nodes"].items() if note["block_size"]}
    assert blocked == ({"conv", "up"} if (bits, opset) == (4, 21) else set())
    if bits == 4:
        word = "16 weights" if opset == 21 else "opset 21"
        assert word in facts["nodes"]["depthwise"]["reason"]
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    new = {}
    for name, node, axis in (("w1", "conv", 0), ("w2", "depthwise", 0), ("w3", "up", 1)):
        array = arrays[name]
        if node in blocked:
            new[name] = rounded(array.reshape(len(array), -1), 4, min(32, array[0].size)).reshape(array.shape)
        else:
            scale = np.abs(array).max(axis=tuple({0, 1, 2, 3} - {axis}), keepdims=True) / np.float32(127)
            new[name] = np.round(array / scale) * scale
    x = {"x": gaussian(4, 8, 9, 9, seed=7)}
    np.testing.assert_allclose(outputs(quantized, x), outputs(with_weights(model, new), x), rtol=1e-4, atol=1e-3)


def test_blocks_at_eight_bits_are_those_of_onnxruntime() -> None:
    """At 8 bits values, scales and zero points are those that ONNX Runtime's own C++ quantizer writes."""
    weights = gaussian(96, 20, seed=5)
    ours = quantize_blocks(np.ascontiguousarray(weights.T), bits=8, block_size=32)
    values, zero = np.zeros((20, 3, 32), np.uint8), np.zeros((20, 3), np.uint8)
    scales = np.zeros((20, 3), np.float32)
    kernels.quantize_matmul_8bits(values, weights, scales, zero, 32, 20, 96, False)  # noqa: FBT003
    np.testing.assert_allclose(ours.scales, scales, rtol=1e-6)
    np.testing.assert_array_equal(ours.zero_points, zero)
    assert np.abs(ours.values.astype(int) - values).max() <= 1
    assert np.mean(ours.values != values) < 0.01


def test_blocks_at_four_bits_beat_onnxruntimes() -> None:
    """The grid that is searched is nearer the weights than the one ONNX Runtime's C++ quantizer lays over them."""
    weights = gaussian(96, 200, seed=5)
    ours = quantize_blocks(np.ascontiguousarray(weights.T), bits=4, block_size=32).dequantized()
    values, zero = np.zeros((200, 3, 16), np.uint8), np.zeros((200, 2), np.uint8)
    scales = np.zeros((200, 3), np.float32)
    kernels.quantize_matmul_4bits(values, weights, scales, zero, 32, 200, 96, False)  # noqa: FBT003
    steps = np.stack([values & 15, values >> 4], -1).reshape(200, 3, 32).astype(np.float32)
    zeros = np.stack([zero & 15, zero >> 4], -1).reshape(200, 4)[:, :3, None]
    theirs = ((steps - zeros) * scales[..., None]).reshape(200, 96)
    assert np.square(ours - weights.T).sum() < 0.98 * np.square(theirs - weights.T).sum()


def test_packing_puts_the_first_value_low() -> None:
    """Two values share a byte, the first in its lower half; an odd last one stands alone."""
    np.testing.assert_array_equal(packed(np.array([[1, 2, 3]], np.uint8), 4), [[0x21, 0x03]])
    np.testing.assert_array_equal(packed(np.array([[1, 2, 3]], np.uint8), 8), [[1, 2, 3]])


def test_int8_activations_are_an_attribute(tmp_path: Path) -> None:
    """The setting reaches MatMulNBits as its accuracy level, and changes the outputs only a little."""
    _, exact = run_stage(tmp_path / "a", words(), bits=8, activations="float")
    _, fast = run_stage(tmp_path / "b", words(), bits=8, activations="int8")
    levels = [
        {a.i for n in model.graph.node for a in n.attribute if a.name == "accuracy_level"} for model in (exact, fast)
    ]
    assert levels == [set(), {4}]
    ids = {"ids": np.random.default_rng(1).integers(0, 50, (16, 5))}
    want, got = outputs(exact, ids), outputs(fast, ids)
    assert 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)) > 30


def test_tied_weights_serve_both(tmp_path: Path) -> None:
    """A table that a Gather reads and a Gemm turns is stored in both forms, and its float form is gone."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("Gemm", ["e", "table"], ["y"], name="logits", transB=1),
    ]
    model = nets.model_of(nodes, {"ids": ["N"]}, {"y": ["N", 40]}, {"table": gaussian(40, 32)})
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    _, quantized = run_stage(tmp_path, model, bits=8)
    assert "table" not in {t.name for t in quantized.graph.initializer}
    ids = {"ids": np.arange(40)}
    want, got = outputs(model, ids), outputs(quantized, ids)
    assert 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)) > 30


def test_what_stays_is_named_with_its_reason(tmp_path: Path) -> None:
    """Excluded, unasked, computed, small and infinite weights stay as they are, each with its reason."""
    model = words()
    model.graph.initializer.append(numpy_helper.from_array(np.full((48, 48), -np.inf, np.float32), "bad"))
    model.graph.initializer.append(numpy_helper.from_array(gaussian(24, 4), "small"))
    extra = [
        helper.make_node("MatMul", ["m", "bad"], ["z1"], name="infinite"),
        helper.make_node("MatMul", ["y", "small"], ["z2"], name="tiny"),
        helper.make_node("Transpose", ["m"], ["mt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["m", "mt"], ["z3"], name="computed"),
        helper.make_node("Gather", ["marks", "ids"], ["z4"], name="look_up"),
        helper.make_node("Gather", ["table", "ids"], ["z5"], name="columns", axis=1),
        helper.make_node("Gemm", ["r", "v", "b"], ["z6"], name="unasked", transB=1),
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.full((50, 16), -1e9, np.float32), "marks"))
    model.graph.node.extend(extra)
    facts, quantized = run_stage(tmp_path, model, exclude_nodes=["head"], op_types=["MatMul", "Gather"])
    assert facts["float_nodes"] == {
        "head": "excluded in the config",
        "infinite": "'bad' holds values that are not finite",
        "look_up": "'marks' can hold -1e+09, a mask",
        "tiny": "'small' has fewer than 256 weights, too few to gain from",
        "computed": "'mt' is no constant of float32",
        "columns": "it does not gather rows",
        "unasked": "Gemm is not among op_types",
    }
    assert {"table", "v"} <= {t.name for t in quantized.graph.initializer}
    assert facts["quantized_nodes"] == {"Gather": 1, "MatMul": 1}


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    """A node or an operator type that is not there is an error that names the nearest one."""
    with pytest.raises(ConfigError, match="'widden'") as node:
        run_stage(tmp_path / "a", words(), exclude_nodes=["widden"])
    assert node.value.fix == "did you mean 'widen'?"
    with pytest.raises(ConfigError, match="'Matmul'") as op_type:
        run_stage(tmp_path / "b", words(), op_types=["Matmul"])
    assert op_type.value.fix == "did you mean 'MatMul'?"


def test_nothing_to_quantize_is_declined(tmp_path: Path) -> None:
    """A model of few weights comes out as it went in, and the facts say so."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="small")
    model = nets.model_of([node], {"x": ["N", 4]}, {"y": ["N", 4]}, {"w": gaussian(4, 4)})
    facts, result = run_stage(tmp_path, model)
    assert "no constant weights" in facts["declined"]
    assert result == model


def test_quantized_model_is_refused(tmp_path: Path) -> None:
    """A second time is an error."""
    _, quantized = run_stage(tmp_path / "first", words())
    with pytest.raises(ModelError, match="quantized already"):
        run_stage(tmp_path / "second", quantized)

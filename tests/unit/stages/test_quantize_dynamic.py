"""quantize_dynamic: ONNX Runtime's own bytes, and a reason for every node that stays in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType
from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeDynamic
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.graph import load_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.quantize_dynamic import quantize_dynamic


def run_stage(folder: Path, model: nets.Model, **settings: Any) -> tuple[Facts, nets.Model]:
    source = nets.artifact_of(model, folder / "source")
    (folder / "out").mkdir()
    context = nets.context_of(nets.ArrayReader({}), folder)
    facts = quantize_dynamic(QuantizeDynamic(**settings), source, folder / "out", context)
    return facts, load_model(folder / "out" / "model.onnx")


def words(*, shared: bool = False) -> nets.Model:
    """``ids[N,5]`` to ``y[N,5,12]``: an embedding, a MatMul, a Gemm over rows, a second Gemm that may share weights."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),
        helper.make_node("MatMul", ["e", "w"], ["m"], name="widen"),
        helper.make_node("Reshape", ["m", "rows"], ["r"], name="rows"),
        helper.make_node("Gemm", ["r", "v", "b"], ["g"], name="first", transB=1),
        helper.make_node("Gemm", ["g", "v" if shared else "u", "b"], ["h"], name="second", transB=1),
        helper.make_node("Reshape", ["h", "back"], ["y"], name="back"),
    ]
    weights = {
        "table": rng.standard_normal((50, 8)).astype(np.float32),
        "w": rng.standard_normal((8, 12)).astype(np.float32),
        "v": rng.standard_normal((12, 12)).astype(np.float32) / 3,
        "u": rng.standard_normal((12, 12)).astype(np.float32) / 3,
        "b": rng.standard_normal(12).astype(np.float32),
        "rows": np.array([-1, 12]),
        "back": np.array([-1, 5, 12]),
    }
    model = nets.model_of(nodes, {"ids": ["N", 5]}, {"y": ["N", 5, 12]}, weights)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.checker.check_model(model, full_check=True)
    return model


def sqnr_db(model: nets.Model, quantized: nets.Model, inputs: dict[str, Any]) -> float:
    want = Session(model.SerializeToString()).run(inputs)["y"]
    got = Session(quantized.SerializeToString()).run(inputs)["y"]
    return float(10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("weights", ["s8", "u8"])
def test_nodes_are_those_of_onnxruntime(tmp_path: Path, granularity: str, weights: str) -> None:
    """On a model of matrix products the stage writes the nodes and weights that ONNX Runtime's own function writes."""
    model = nets.attention()
    facts, ours = run_stage(tmp_path, model, granularity=granularity, weights=weights)
    ort_quantize_dynamic(
        prepare(model, where="test"),
        tmp_path / "theirs.onnx",
        per_channel=granularity == "per_channel",
        weight_type=QuantType.QInt8 if weights == "s8" else QuantType.QUInt8,
        op_types_to_quantize=["MatMul"],
    )
    theirs = load_model(tmp_path / "theirs.onnx")
    assert list(ours.graph.node) == list(theirs.graph.node)
    assert list(ours.graph.initializer) == list(theirs.graph.initializer)
    assert facts["quantized_nodes"] == {"MatMul": 3}
    assert facts["float_nodes"] == {
        name: f"'{b}' is no constant of float32" for name, b in (("scores", "kt"), ("mix", "v"))
    }


def test_embedding_matmul_and_gemm_are_quantized(tmp_path: Path) -> None:
    """All three shrink and stay close, the facts count them, and a Gemm counts as one."""
    facts, quantized = run_stage(tmp_path, words(), reduce_range=True)  # processors without VNNI saturate at 8 bits
    assert facts["quantized_nodes"] == {"Gather": 1, "Gemm": 2, "MatMul": 1}
    assert facts["float_nodes"] == {}
    assert sum(node.op_type == "MatMulInteger" for node in quantized.graph.node) == 3
    assert not any(t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 12 for t in quantized.graph.initializer)
    ids = np.random.default_rng(1).integers(0, 50, (16, 5))
    assert sqnr_db(words(), quantized, {"ids": ids}) > 25


def test_gemms_that_share_turned_weights(tmp_path: Path) -> None:
    """Two Gemms on one stored weight are both right; ONNX Runtime's own function turns it twice."""
    model = words(shared=True)
    _, quantized = run_stage(tmp_path, model, reduce_range=True)
    ids = np.random.default_rng(1).integers(0, 50, (16, 5))
    assert sqnr_db(model, quantized, {"ids": ids}) > 25
    ort_quantize_dynamic(prepare(model, where="test"), tmp_path / "theirs.onnx")
    assert sqnr_db(model, load_model(tmp_path / "theirs.onnx"), {"ids": ids}) < 5


def test_mask_never_meets_the_integers(tmp_path: Path) -> None:
    """A product that reads what a mask can reach stays in float, and the facts name the mask."""
    model = nets.attention()
    model.graph.node[-2].op_type = "Identity"  # no softmax ends the mask
    del model.graph.node[-2].attribute[:]
    model.graph.node[-1].input[1] = "wv6"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((6, 8), np.float32), "wv6"))
    facts, _ = run_stage(tmp_path, model)
    assert facts["float_nodes"]["mix"] == "'p' can hold -3.4e+38, a mask"


def test_excluded_and_unasked_nodes_stay_in_float(tmp_path: Path) -> None:
    """Nodes left out by name or by type keep their float weights, with the reason."""
    facts, quantized = run_stage(tmp_path, words(), exclude_nodes=["first"], op_types=["Gemm", "MatMul"])
    assert facts["float_nodes"] == {"embed": "Gather is not among op_types", "first": "excluded in the config"}
    assert facts["quantized_nodes"] == {"Gemm": 1, "MatMul": 1}
    sizes = {tuple(t.dims) for t in quantized.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert {(50, 8), (12, 12)} <= sizes


def test_excluded_node_keeps_weights_that_another_shares(tmp_path: Path) -> None:
    """A node that stays in float computes with its float weights, also where another one has them in 8 bits."""
    _, quantized = run_stage(tmp_path, nets.tied(), exclude_nodes=["tied1"])
    node = next(node for node in quantized.graph.node if node.name == "tied1")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in nets.tied().graph.initializer}
    np.testing.assert_array_equal(weights[node.input[1]], before["s"])


def test_gemm_with_factors_stays_in_float(tmp_path: Path) -> None:
    """A Gemm whose alpha is not 1 has no integer form, and comes through unharmed."""
    model = words()
    model.graph.node[3].attribute.append(helper.make_attribute("alpha", 0.5))
    facts, quantized = run_stage(tmp_path, model, reduce_range=True)
    assert facts["float_nodes"] == {"first": "its alpha, beta or transA is not the default"}
    ids = np.random.default_rng(1).integers(0, 50, (16, 5))
    assert sqnr_db(model, quantized, {"ids": ids}) > 25


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    """A node or an operator type that is not there is an error that names the nearest one."""
    with pytest.raises(ConfigError, match="'widden'") as node:
        run_stage(tmp_path / "a", words(), exclude_nodes=["widden"])
    assert node.value.fix == "did you mean 'widen'?"
    with pytest.raises(ConfigError, match="'Matmul'") as op_type:
        run_stage(tmp_path / "b", words(), op_types=["Matmul"])
    assert op_type.value.fix == "did you mean 'MatMul'?"


def test_nothing_to_quantize_is_declined(tmp_path: Path) -> None:
    """A model of convolutions comes out as it went in, and the facts say so."""
    model = nets.cnn()
    facts, result = run_stage(tmp_path, model, op_types=["MatMul"])
    assert "no node" in facts["declined"]
    assert facts["float_nodes"] == {"head": "Gemm is not among op_types"}
    assert result == model


def test_quantized_model_is_refused(tmp_path: Path) -> None:
    """A second time is an error."""
    _, quantized = run_stage(tmp_path / "first", words())
    with pytest.raises(ModelError, match="quantized already"):
        run_stage(tmp_path / "second", quantized)


def test_lstm_is_quantized(tmp_path: Path) -> None:
    """An LSTM with constant weights becomes ONNX Runtime's dynamic one, close to the float one."""
    rng = np.random.default_rng(2)
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "h", ""], name="lstm", hidden_size=8)
    squeeze = helper.make_node("Squeeze", ["h", "axis"], ["y"], name="squeeze")
    weights = {
        "w": rng.standard_normal((1, 32, 6)).astype(np.float32) / 2,
        "r": rng.standard_normal((1, 32, 8)).astype(np.float32) / 3,
        "axis": np.array([0]),
    }
    model = nets.model_of([node, squeeze], {"x": [5, "N", 6]}, {"y": ["N", 8]}, weights)
    facts, quantized = run_stage(tmp_path, model, reduce_range=True)
    assert facts["quantized_nodes"] == {"LSTM": 1}
    assert "DynamicQuantizeLSTM" in {node.op_type for node in quantized.graph.node}
    x = rng.standard_normal((5, 4, 6)).astype(np.float32)
    assert sqnr_db(model, quantized, {"x": x}) > 25

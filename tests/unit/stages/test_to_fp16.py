"""to_fp16: half the bytes, the same interface, no infinity and no garbage behind a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import TensorProto, helper

from onnxshrink.config.stages import ToFp16
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.runtime.graph import load_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.to_fp16 import to_fp16


def run_stage(folder: Path, model: nets.Model, **settings: Any) -> tuple[Facts, nets.Model]:
    source = nets.artifact_of(model, folder / "source")
    (folder / "out").mkdir()
    facts = to_fp16(ToFp16(**settings), source, folder / "out", nets.context_of(nets.ArrayReader({}), folder))
    return facts, load_model(folder / "out" / "model.onnx")


def test_weights_halve_and_the_interface_stays(tmp_path: Path) -> None:
    """Every weight is float16, inputs and outputs are float32 as before, and the outputs are within 50 dB."""
    model = nets.cnn()
    facts, half = run_stage(tmp_path, model)
    assert {t.data_type for t in half.graph.initializer if t.name.startswith("w")} == {TensorProto.FLOAT16}
    assert list(half.graph.input) == list(model.graph.input)
    assert [(v.name, v.type.tensor_type.elem_type) for v in half.graph.output] == [("y", TensorProto.FLOAT)]
    assert facts["bytes_after"] < 0.8 * facts["bytes_before"]
    assert facts["casts"] == 2
    assert facts["clamped"] == {}
    test = nets.samples_of(model, 16, seed=9)
    want, got = (Session(m.SerializeToString()).run(test)["y"] for m in (model, half))
    assert 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)) > 50


@pytest.mark.parametrize("mark", [float(np.finfo(np.float32).min), -np.inf, -1e9])
def test_mask_is_clamped_and_still_masks(tmp_path: Path, mark: float) -> None:
    """A mask's mark becomes -65504 and is named in the facts; nothing leaks, and nothing is NaN."""
    model = nets.attention(mark=mark)
    facts, half = run_stage(tmp_path, model)
    assert facts["clamped"] == {"mark": {"values": 1, "was": f"{mark:.3g}", "is": -65504.0}}
    session = Session(half.SerializeToString())
    test = nets.samples_of(model, 8, seed=3)
    test["keep"][:, :, 3:] = 0
    test["keep"][:, :, 0] = 1
    before = session.run(test)["y"][:, :3]
    assert np.isfinite(before).all()
    test["x"][:, 3:] += 1.0
    np.testing.assert_array_equal(session.run(test)["y"][:, :3], before)


def test_kept_nodes_and_types_stay_in_float32(tmp_path: Path) -> None:
    """Their weights keep their type, and the facts count them apart."""
    facts, half = run_stage(tmp_path, nets.cnn(), keep_nodes=["head"], keep_op_types=["GlobalAveragePool"])
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    assert types["w4"] == TensorProto.FLOAT
    assert types["w1"] == TensorProto.FLOAT16
    assert facts["float32_nodes"] == {"Gemm": 1, "GlobalAveragePool": 1}
    assert facts["float16_nodes"]["Conv"] == 3


def test_sensitive_sums_are_kept_by_default(tmp_path: Path) -> None:
    """A sum beyond 65504 survives, because ReduceSum stays in float32 unless told otherwise."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("ReduceSum", ["r", "axes"], ["s"], keepdims=0)]
    nodes += [helper.make_node("Div", ["s", "n"], ["y"], name="share")]
    weights: dict[str, Any] = {"axes": np.array([1]), "n": np.array(4096, np.float32)}
    model = nets.model_of(nodes, {"x": ["N", 4096]}, {"y": ["N"]}, weights)
    x = {"x": np.full((2, 4096), 32, np.float32)}
    _, half = run_stage(tmp_path / "kept", model, keep_nodes=["share"])
    onnx.checker.check_model(half, full_check=True)
    np.testing.assert_allclose(Session(half.SerializeToString()).run(x)["y"], 32, rtol=1e-3)
    facts, _ = run_stage(tmp_path / "not", model, keep_nodes=["share"], keep_op_types=[])
    assert facts["float32_nodes"] == {"Div": 1}


def test_two_kept_nodes_read_one_tensor(tmp_path: Path) -> None:
    """They share one cast; a sum that is the output reaches it in float32, beyond float16's range."""
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("ReduceSum", ["r", "axes"], ["y"], name="sum", keepdims=0),
        helper.make_node("Exp", ["r"], ["e"], name="exp"),
        helper.make_node("ReduceSum", ["e", "axes"], ["z"], name="sum_of_exp", keepdims=0),
    ]
    model = nets.model_of(nodes, {"x": ["N", 64]}, {"y": ["N"], "z": ["N"]}, {"axes": np.array([1])})
    _, half = run_stage(tmp_path, model)
    onnx.checker.check_model(half, full_check=True)
    got = Session(half.SerializeToString()).run({"x": np.full((2, 64), 12, np.float32)})
    np.testing.assert_allclose(got["z"], 64 * np.exp(12), rtol=1e-3)
    np.testing.assert_allclose(got["y"], 768, rtol=1e-3)


def test_io_types_may_change_too(tmp_path: Path) -> None:
    """Without keep_io_types inputs and outputs are float16 and no cast is left."""
    facts, half = run_stage(tmp_path, nets.cnn(), keep_io_types=False)
    assert half.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert facts["casts"] == 0


def test_unknown_names_are_refused_with_a_suggestion(tmp_path: Path) -> None:
    """A node or an operator type that is not there is an error that names the nearest one."""
    with pytest.raises(ConfigError, match="'heads'") as node:
        run_stage(tmp_path / "a", nets.cnn(), keep_nodes=["heads"])
    assert (node.value.where, node.value.fix) == ("to_fp16.keep_nodes", "did you mean 'head'?")
    with pytest.raises(ConfigError, match="'Covn'") as op_type:
        run_stage(tmp_path / "b", nets.cnn(), keep_op_types=["Covn"])
    assert op_type.value.fix == "did you mean 'Conv'?"


def test_float16_model_is_refused(tmp_path: Path) -> None:
    """A second time is an error."""
    _, half = run_stage(tmp_path / "first", nets.cnn())
    with pytest.raises(ModelError, match="16-bit floats"):
        run_stage(tmp_path / "second", half)
    assert isinstance(half, onnx.ModelProto)

"""SmoothQuant: the published scale, an alpha that pays, and the stage's own check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import SmoothQuant
from onnxshrink.core.errors import DataError
from onnxshrink.runtime.session import Session
from onnxshrink.stages.smooth_quant import ALPHAS, best_alpha, smooth_model, smooth_quant, smoothing_scale


def dense(channels: int = 32) -> onnx.ModelProto:
    """``x[N,32]`` through one MatMul."""
    weights = {"w": np.random.default_rng(0).standard_normal((channels, 16)).astype(np.float32)}
    return nets.model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="dense")], {"x": ["N", channels]}, {"y": ["N", 16]}, weights
    )


def outliers(count: int, seed: int = 1) -> np.ndarray:
    """Samples of 32 channels, three of which are a hundred times as loud."""
    x = np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32)
    x[:, [3, 11, 20]] *= 100
    return x


def test_scale_is_the_published_one() -> None:
    """``s`` is ``max|x|^alpha / max|w|^(1 - alpha)`` up to one common factor, and 1 for a channel never used."""
    x, w = np.array([1, 4, 100, 0], np.float32), np.array([2, 1, 0.5, 3], np.float32)
    scale = smoothing_scale(x, w, 0.7)
    want = x[:3] ** 0.7 / w[:3] ** 0.3
    np.testing.assert_allclose(scale[:3] / scale[0], want / want[0], rtol=1e-5)
    assert np.prod(scale[:3]) == pytest.approx(1, rel=1e-5)
    assert scale[3] == 1


def test_auto_pays_on_onnxruntimes_own_kernels(tmp_path: Path) -> None:
    """With outlier channels, ONNX Runtime's dynamic quantization is 6 dB nearer after smoothing, on other samples."""
    onnx.save(dense(), tmp_path / "plain.onnx")
    smooth = dense()
    facts = smooth_model(smooth, nets.ArrayReader({"x": outliers(64)}), None)
    assert facts["alphas"]["x"] in ALPHAS
    onnx.save(smooth, tmp_path / "smooth.onnx")
    x = {"x": outliers(64, seed=2)}
    want = Session(tmp_path / "plain.onnx").run(x)["y"]
    errors = []
    for name in ("plain", "smooth"):
        quantize_dynamic(
            tmp_path / f"{name}.onnx", tmp_path / f"{name}8.onnx", per_channel=True, weight_type=QuantType.QInt8
        )
        errors.append(np.square(Session(tmp_path / f"{name}8.onnx").run(x)["y"] - want).mean())
    assert 10 * np.log10(errors[0] / errors[1]) > 6


def test_even_activations_are_left() -> None:
    """Where 8 bits hold both sides exactly, ``auto`` leaves the node: no Mul, no changed weight."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (64, 32)).astype(np.float32)
    weights = rng.integers(-127, 128, (32, 16)).astype(np.float32)
    weights[0] = 127
    assert best_alpha([x], weights, np.abs(x).max(0)) is None


def test_nodes_that_share_an_input_share_the_mul() -> None:
    """Query, key and value read one smoothed activation; weights that two nodes read are left alone."""
    model = nets.attention(mark=-100.0)
    reader = nets.ArrayReader(nets.samples_of(model, 16))
    facts = smooth_model(model, reader, 0.5)
    assert facts == {"alphas": {"x": 0.5}, "folded": 0, "muls": 1}
    assert [node.input[0] for node in model.graph.node if node.name in ("query", "key", "value")] == ["x_smooth"] * 3
    twice = dense()
    twice.graph.node.append(helper.make_node("MatMul", ["x", "w"], ["z"], name="again"))
    assert smooth_model(twice, nets.ArrayReader({"x": outliers(8)}), 0.5)["alphas"] == {}


def test_stage_writes_and_checks(tmp_path: Path) -> None:
    """The stage writes a model with the same numbers; without samples it says what is missing."""
    model = dense()
    np.savez(tmp_path / "calibration.npz", x=outliers(32))
    source = nets.artifact_of(model, tmp_path / "source")
    bare = nets.context_of(nets.ArrayReader({"x": outliers(4)}), tmp_path)
    ctx = replace(bare, data=DataRoles(calibration=NpzData(npz=tmp_path / "calibration.npz")))
    facts = smooth_quant(SmoothQuant(alpha=0.8), source, tmp_path, ctx)
    assert facts["alphas"] == {"x": 0.8}
    assert facts["max_error"] <= 1e-5
    written = onnx.load(tmp_path / "model.onnx")
    assert [node.op_type for node in written.graph.node] == ["Mul", "MatMul"]
    assert not np.array_equal(
        numpy_helper.to_array(written.graph.initializer[0]), numpy_helper.to_array(model.graph.initializer[0])
    )
    with pytest.raises(DataError, match="no calibration samples"):
        smooth_quant(SmoothQuant(), source, tmp_path, replace(bare, data=DataRoles()))

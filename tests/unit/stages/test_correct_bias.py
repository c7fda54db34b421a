"""Bias correction: the mean of each channel comes back, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.core.errors import DataError
from onnxshrink.runtime.session import Session
from onnxshrink.stages.correct_bias import correct_bias
from onnxshrink.stages.quantize_static import quantize_static, quantized_model


def quantized(model: onnx.ModelProto, reader: nets.ArrayReader, exclude: tuple[str, ...] = (), **settings: Any) -> Any:
    """What ONNX Runtime makes of a copy of ``model``."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    ranges = ranges_of(observe_all(model, lambda _: reader), "minmax", leave_out={})
    return quantized_model(copy, ranges, QuantizeStatic(types="u8s8", **settings), exclude=exclude)


def initializer(model: onnx.ModelProto, name: str) -> Any:
    """The values of an initializer."""
    return next(numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_gemm_correction_is_the_mean_input_times_the_rounding(form: str, granularity: str) -> None:
    """A Gemm's new bias is ``b - E[x] @ (rounded - W)``, computed here by numpy from the quantized file's integers."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 5)).astype(np.float32), "b": rng.standard_normal(5).astype(np.float32)}
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="head")
    model = prepare(nets.model_of([node], {"x": ["N", 6]}, {"y": ["N", 5]}, weights), where="test")
    reader = nets.ArrayReader({"x": rng.standard_normal((40, 6)).astype(np.float32) + 3})
    integers = quantized(model, reader, format=form, granularity=granularity)
    corrected, facts = correct_bias(model, integers, reader)
    rounded = initializer(integers, "w_quantized") * initializer(integers, "w_scale")
    want = weights["b"] - reader.arrays["x"].mean(0, dtype=np.float64) @ (rounded - weights["w"])
    np.testing.assert_allclose(initializer(corrected, corrected.graph.node[0].input[2]), want, rtol=1e-5, atol=1e-6)
    assert facts["nodes"] == 1
    assert not facts["declined"]
    assert facts["largest_shift"] == pytest.approx(np.abs(want - weights["b"]).max(), rel=1e-3)


def test_mean_outputs_come_back() -> None:
    """With rounded weights each channel's mean output is the float model's again: padding, groups and no bias too."""
    model = prepare(nets.cnn(), where="test")
    reader = nets.ArrayReader(nets.samples_of(model, 32))
    integers = quantized(model, reader, granularity="per_tensor")
    corrected, facts = correct_bias(model, integers, reader)
    assert facts["nodes"] == 4
    # Only the first layer sees the same input in both, so only its mean is the same exactly.
    first = corrected.graph.node[0]
    rounded = initializer(integers, "w1_quantized") * initializer(integers, "w1_scale")
    tensor = next(t for t in corrected.graph.initializer if t.name == "w1")
    tensor.CopyFrom(numpy_helper.from_array(rounded.astype(np.float32), "w1"))
    means = []
    for net in (model, corrected):
        del net.graph.output[:]
        net.graph.output.append(helper.make_tensor_value_info(first.output[0], onnx.TensorProto.FLOAT, None))
        means.append(Session(net.SerializeToString()).run(reader.arrays)[first.output[0]].mean((0, 2, 3)))
    np.testing.assert_allclose(means[1], means[0], atol=1e-6)


def test_float_nodes_and_scaled_gemms_are_left() -> None:
    """A node that stays in float keeps its bias, and a Gemm with factors says why it is left."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal((4, 4)).astype(np.float32) for name in ("w1", "w2")}
    weights |= {name: rng.standard_normal(4).astype(np.float32) for name in ("b1", "b2")}
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="kept"),
        helper.make_node("Gemm", ["h", "w2", "b2"], ["y"], name="scaled", alpha=0.5),
    ]
    model = prepare(nets.model_of(nodes, {"x": ["N", 4]}, {"y": ["N", 4]}, weights), where="test")
    reader = nets.ArrayReader({"x": rng.standard_normal((20, 4)).astype(np.float32)})
    corrected, facts = correct_bias(model, quantized(model, reader, exclude=("kept",)), reader)
    assert corrected == model
    assert facts == {"nodes": 0, "largest_shift": 0.0, "declined": {"scaled": "it scales its product or its bias"}}


def test_stage_drifts_less_with_it(tmp_path: Path) -> None:
    """On held-out samples, per-tensor weights drift less with the option than without, and the facts tell of it."""
    model = nets.cnn()
    samples = nets.samples_of(model, 64)
    np.savez(tmp_path / "calibration.npz", **samples)  # type: ignore[arg-type]
    source = nets.artifact_of(model, tmp_path / "source")
    ctx = nets.context_of(nets.ArrayReader(samples), tmp_path)
    with_data = replace(ctx, data=DataRoles(calibration=NpzData(npz=tmp_path / "calibration.npz")))
    test = nets.samples_of(model, 256, seed=9)
    want = Session(model.SerializeToString()).run(test)["y"]
    errors = {}
    for corrects in (False, True):
        out = tmp_path / str(corrects)
        out.mkdir()
        settings = QuantizeStatic(granularity="per_tensor", bias_correction=corrects)
        facts = quantize_static(settings, source, out, with_data)
        assert ("bias_correction" in facts) == corrects
        errors[corrects] = np.square(Session(out / "model.onnx").run(test)["y"] - want).mean()
    assert errors[True] < 0.95 * errors[False]
    with pytest.raises(DataError, match="no calibration samples"):
        quantize_static(QuantizeStatic(), source, tmp_path, replace(ctx, data=DataRoles()))

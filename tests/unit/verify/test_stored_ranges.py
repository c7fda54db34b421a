"""What the pictures of a model's grids promise: the file's own grids beside the values, counted a second way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnxshrink.calibration.calibrate import load_calibration
from onnxshrink.config.stages import Calibrate, QuantizeStatic
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.session import Session
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify.graph_tensors import showing
from onnxshrink.verify.stored_ranges import MAX_TENSORS, N_BINS, range_details

FLOAT = nets.cnn()
SAMPLES = nets.samples_of(FLOAT, 32)


def details(folder: Path, **settings: Any) -> tuple[dict[str, dict[str, Any]], onnx.ModelProto]:
    source = nets.artifact_of(FLOAT, folder / "source")
    context = nets.context_of(nets.ArrayReader(SAMPLES), folder)
    (folder / "out").mkdir()
    quantize_static(QuantizeStatic(**settings), source, folder / "out", context)
    model = onnx.load(folder / "out/model.onnx")
    statistics = load_calibration(context.derive(Calibrate(), source).path).tensors
    return range_details(model, FLOAT, statistics), model


def values_of(name: str) -> Array:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in FLOAT.graph.initializer}
    if name in weights:
        return weights[name]
    if name in SAMPLES:
        return SAMPLES[name]
    return Session(showing(FLOAT, [name]).SerializeToString(), optimization="disabled", name="float").run(SAMPLES)[name]


def decibels(exact: NDArray[np.float64], restored: NDArray[np.float64]) -> float:
    return float(10 * np.log10(np.square(exact).sum() / np.square(exact - restored).sum()))


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "per_tensor"},
        {"granularity": "per_channel"},
        {"granularity": "per_channel", "compact": True},
        {"granularity": "per_tensor", "format": "qoperator"},
        {"granularity": "per_tensor", "method": "percentile", "percentile": 0.98},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_histograms_and_grids_are_those_of_the_tensors(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Weights and stored activations are there; counts, ends, clipped share and SQNR follow from the values."""
    found, _ = details(tmp_path, **settings)
    assert {"w1", "w2", "w3", "w4"} <= {name for name, one in found.items() if one["kind"] == "weight"}
    assert {"x", "k2"} <= {name for name, one in found.items() if one["kind"] == "activation"}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for name, one in found.items():
        values = values_of(name).astype(np.float64)
        assert len(one["edges"]) == len(one["counts"]) + 1 == N_BINS + 1
        assert sum(one["counts"]) == values.size
        exact = np.linspace(one["edges"][0], one["edges"][-1], N_BINS + 1)
        assert np.allclose(one["edges"], exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())
        want = np.histogram(np.clip(values, exact[0], exact[-1]), exact)[0]
        assert np.abs(np.array(one["counts"]) - want).sum() / 2 <= max(0.03 * values.size, 2)
        if one["scales"] > 1:
            continue
        steps = np.clip(
            np.rint(values / one["scale"]), round(one["lo"] / one["scale"]), round(one["hi"] / one["scale"])
        )
        assert one["sqnr_db"] == pytest.approx(decibels(values, steps * one["scale"]), abs=0.5)
        margin = one["scale"] / 2
        outside = ((values > one["hi"] + margin) | (values < one["lo"] - margin)).mean()
        assert one["clipped_ratio"] == pytest.approx(outside, abs=0.004)


def test_the_worst_come_first_and_the_rest_is_left_out(tmp_path: Path) -> None:
    """At most 24 tensors in the order of what storing them costs; a clipped one is among the first."""
    found, _ = details(tmp_path, granularity="per_tensor", method="percentile", percentile=0.9)
    order = [one["sqnr_db"] for one in found.values()]
    assert order == sorted(order)
    assert next(iter(found.values()))["clipped_ratio"] > 0.01
    assert len(found) <= MAX_TENSORS
    assert len(json.dumps(found)) < 900 * len(found)


def test_per_channel_weights_have_the_ends_of_all_channels(tmp_path: Path) -> None:
    """The largest scale is the one of per tensor, and nothing is clipped by more than half a step."""
    found, _ = details(tmp_path, granularity="per_channel")
    assert found["w1"]["scales"] == 8
    assert found["w1"]["clipped_ratio"] == 0
    largest = np.abs(values_of("w1")).max()
    assert found["w1"]["scale"] == pytest.approx(largest / 127.5, rel=0.01)


@pytest.mark.parametrize(("trans_b", "shape"), [(0, (6, 5)), (1, (5, 6)), (0, (5, 5)), (1, (5, 5))])
def test_scales_of_a_product_lie_along_its_outputs(trans_b: int, shape: tuple[int, int]) -> None:
    """Columns, and rows of weights that are transposed, square too: the figures of weights quantized by hand."""
    outputs = 0 if trans_b else 1
    sizes = np.expand_dims(10.0 ** np.arange(5), 1 - outputs)
    exact = (np.random.default_rng(0).standard_normal(shape) * sizes).astype(np.float32)
    scale = (np.abs(exact).max(axis=1 - outputs) / 127).astype(np.float32)
    integers = np.rint(exact / np.expand_dims(scale, 1 - outputs)).astype(np.int8)
    inner = shape[1 - outputs]
    one, zero = np.array(1, np.float32), np.array(0, np.uint8)
    constants = {"s": one, "z": zero, "w_quantized": integers, "ws": scale, "wz": np.zeros(5, np.int8)}
    names = ["x", "s", "z", "w_quantized", "ws", "wz", "", "s", "z"]
    node = onnx.helper.make_node("QGemm", names, ["y"], domain="com.microsoft", transB=trans_b)
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [None, inner])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [None, 5])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    before = onnx.helper.make_graph([], "g", [], [], [numpy_helper.from_array(exact, "w")])
    found = range_details(onnx.helper.make_model(graph), onnx.helper.make_model(before), {})["w"]
    restored = integers * np.expand_dims(scale.astype(np.float64), 1 - outputs)
    assert found["scales"] == 5
    assert found["clipped_ratio"] == 0
    assert found["sqnr_db"] == pytest.approx(decibels(exact.astype(np.float64), restored), abs=0.01)
    assert found["sqnr_db"] > 30


def test_scales_of_blocks_are_not_taken_for_those_of_rows() -> None:
    """One block of a square weight has as many scales as there are rows, and they lie along the columns."""
    constants = {"w_quantized": np.ones((32, 32), np.int8), "s": np.ones((1, 32), np.float32)}
    node = onnx.helper.make_node("DequantizeLinear", ["w_quantized", "s"], ["w"], axis=0, block_size=32)
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], tensors))
    assert range_details(model, None, {}) == {}


def test_dynamic_models_show_their_weights(tmp_path: Path) -> None:
    """Without calibration there are no activations; a model that is not quantized shows nothing."""
    onnx.save(FLOAT, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "m.onnx", weight_type=QuantType.QInt8)
    found = range_details(onnx.load(tmp_path / "m.onnx"), FLOAT, {})
    assert {one["kind"] for one in found.values()} <= {"weight"}
    assert range_details(FLOAT, None, {}) == {}

"""The forecast of a quantized model: counted against loops, and right about which layers are safe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.forecast import LayerForecast, forecast_saturation
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.core.tensors import Batch
from onnxshrink.stages.quantize_static import quantized_model


def forecast_of(
    model: onnx.ModelProto, arrays: dict[str, NDArray[np.float32]], **settings: Any
) -> tuple[list[LayerForecast], onnx.ModelProto]:
    """The forecast on the samples that the ranges came from, and the 8-bit model."""
    reader = nets.ArrayReader(arrays)
    original = prepare(model, where="test")
    ranges = ranges_of(observe_all(original, lambda _: reader), "minmax", leave_out={})
    eight, seven = (
        quantized_model(
            prepare(model, where="test"),
            ranges,
            QuantizeStatic.model_validate({"types": "u8s8", "reduce_range": reduced} | settings),
        )
        for reduced in (False, True)
    )
    return forecast_saturation(eight, seven, original, reader), eight


def constants_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def conv_by_loops(x: NDArray[np.int64], w: NDArray[np.int64], padding: int) -> tuple[int, int]:
    """Pairs and saturated pairs of a 3 x 3 convolution with a padding of 1, element by element."""
    x = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=padding)
    pairs = saturated = 0
    for n in range(len(x)):
        for row in range(x.shape[2] - 2):
            for column in range(x.shape[3] - 2):
                for filters in w:
                    products = [
                        int(x[n, c, row + i, column + j]) * int(filters[c, i, j])
                        for i in range(3)
                        for j in range(3)
                        for c in range(len(filters))
                    ]
                    sums = [sum(products[k : k + 2]) for k in range(0, len(products), 2)]
                    pairs += len(sums)
                    saturated += sum(not -32768 <= total <= 32767 for total in sums)
    return pairs, saturated


@pytest.mark.parametrize(("types", "low"), [("u8s8", 0), ("s8s8", -128)])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_counts_equal_loops(granularity: str, types: str, low: int) -> None:
    """Pairs are counted as a plain loop over positions, channels and pairs counts them, for both activation types."""
    rng = np.random.default_rng(3)
    weights = np.abs(rng.normal(1, 0.3, (4, 3, 3, 3))).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])
    model = nets.model_of([node], {"x": ["N", 3, 6, 5]}, {"y": ["N", 4, 6, 5]}, {"w": weights})
    x = rng.normal(0.5, 1, (4, 3, 6, 5)).astype(np.float32)
    (found,), eight = forecast_of(model, {"x": x}, granularity=granularity, types=types)
    constants = constants_of(eight)
    zero_point = int(constants["x_zero_point"].item())
    grid = np.clip(np.rint(x / constants["x_scale"]) + zero_point, low, low + 255).astype(np.int64) - low
    pairs, saturated = conv_by_loops(grid, constants["w_quantized"].astype(np.int64), zero_point - low)
    assert 0 < saturated < pairs
    assert (found.pairs, found.saturated) == (pairs, saturated)
    assert found.axis == (0 if granularity == "per_channel" else None)


def test_errors_are_those_of_the_outputs() -> None:
    """The three energies equal those computed from the two models' weights and the scalar instruction."""
    rng = np.random.default_rng(5)
    weights = rng.normal(0.4, 1, (8, 6)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mat")
    model = nets.model_of([node], {"x": ["N", 8]}, {"y": ["N", 6]}, {"w": weights})
    x = np.abs(rng.normal(2, 1, (20, 8))).astype(np.float32)
    (found,), eight = forecast_of(model, {"x": x})
    constants = constants_of(eight)
    scale, zero_point = constants["w_scale"], int(constants["x_zero_point"].item())
    grid = np.clip(np.rint(x / constants["x_scale"]) + zero_point, 0, 255).astype(np.int64)
    w8 = constants["w_quantized"].astype(np.int64)
    pairs = grid[:, 0::2, None] * w8[None, 0::2] + grid[:, 1::2, None] * w8[None, 1::2]
    saturated = np.clip(pairs, -32768, 32767).sum(axis=1) - zero_point * w8.sum(axis=0)
    output = (grid - zero_point) @ weights.astype(np.float64)
    assert found.saturated == np.count_nonzero(pairs != np.clip(pairs, -32768, 32767)) > 0
    assert found.signal == pytest.approx(np.sum(output**2), rel=1e-5)
    assert found.error == pytest.approx(np.sum((saturated * scale - output) ** 2), rel=1e-3)
    w7 = np.clip(np.rint(weights / (np.abs(weights).max(axis=0) / 64)), -64, 64) * (np.abs(weights).max(axis=0) / 64)
    assert found.reduced_error == pytest.approx(np.sum(((grid - zero_point) @ w7 - output) ** 2), rel=1e-3)


def test_network() -> None:
    """In a whole network depthwise layers are safe by their kernel, and integer layers without weights are left out."""
    model = nets.cnn()
    found, _ = forecast_of(model, nets.samples_of(model, 8))
    assert [forecast.node for forecast in found] == ["conv1", "conv2", "conv3", "head"]
    assert found[1].proof == "its depthwise kernel adds in 32 bits"
    assert all(forecast.pairs > 0 for forecast in found if forecast.proof is None)


def test_samples_are_not_read_where_the_weights_prove_it() -> None:
    """Where no pair of weights is risky the samples are never touched."""
    weights = np.array([[1, 0.01], [0.01, 1]], np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="mat")
    model = nets.model_of([node], {"x": ["N", 2]}, {"y": ["N", 2]}, {"w": weights})
    original = prepare(model, where="test")
    reader = nets.ArrayReader({"x": np.ones((4, 2), np.float32)})
    ranges = ranges_of(observe_all(original, lambda _: reader), "minmax", leave_out={})
    settings = QuantizeStatic(types="u8s8")
    quantized = quantized_model(prepare(model, where="test"), ranges, settings)

    def never() -> Iterator[Batch]:
        pytest.fail("the samples were read")
        yield {}

    (found,) = forecast_saturation(quantized, quantized, original, never())
    assert str(found) == "cannot saturate: no two weights of a channel sum to more than 128"
    assert not found.needs_reduced_range


@pytest.mark.parametrize(
    ("forecast", "words"),
    [
        (LayerForecast("n", "w", None, risky_ratio=0.012, pairs=1000), "0 of 1,000 pairs saturate (1.20%"),
        (LayerForecast("n", "w", None, None, 0.1, 1000, 7, 100.0, 1.0, 0.1), "20.0 dB in 8 bits, 30.0 dB in 7: 7 bits"),
        (LayerForecast("n", "w", None, None, 0.1, 1000, 7, 100.0, 0.1, 1.0), "30.0 dB in 8 bits, 20.0 dB in 7: 8 bits"),
    ],
)
def test_says_what_it_decides(forecast: LayerForecast, words: str) -> None:
    """One line tells the count, both errors, and what follows."""
    assert words in str(forecast)

"""7-bit weights are given where a processor saturates and only there, and the facts say why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.calibration.prepare import prepare
from onnxshrink.calibration.saturation import saturated_product
from onnxshrink.config.data import DataRoles
from onnxshrink.config.stages import Isa, QuantizeStatic
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.isa import detect_isa, resolve_scheme
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.stages.reduce_range import FORECAST_SAMPLES, forecast_samples, reduced_range


def two_layers() -> nets.Model:
    """``x[N,16]`` to ``y[N,8]``: weights of one sign side by side, which saturate, then a diagonal, which cannot."""
    rng = np.random.default_rng(0)
    weights = {"bold": rng.uniform(0.9, 1.0, (16, 8)).astype(np.float32), "safe": np.eye(8, dtype=np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "bold"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "safe"], ["y"], name="second"),
    ]
    return nets.model_of(nodes, {"x": ["N", 16]}, {"y": ["N", 8]}, weights)


def context(tmp_path: Path, count: int = 40) -> Context:
    """A context with calibration samples on disk, all positive."""
    x = np.abs(np.random.default_rng(1).normal(3, 1, (count, 16))).astype(np.float32)
    return nets.context_of(nets.ArrayReader({"x": x}), tmp_path)


def run_stage(tmp_path: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The stage's facts, and the constants of the model it wrote."""
    out = tmp_path / "out"
    out.mkdir()
    source = nets.artifact_of(two_layers(), tmp_path / "source")
    facts = quantize_static(QuantizeStatic.model_validate(settings), source, out, context(tmp_path))
    json.dumps(facts, allow_nan=False)
    model = onnx.load(out / "model.onnx")
    return facts, {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def bits_of(constants: dict[str, NDArray[Any]]) -> dict[str, int]:
    """Seven where the weights stay within -64 and 64, else eight."""
    largest = {name: np.abs(constants[f"{name}_quantized"].astype(int)).max() for name in ("bold", "safe")}
    return {name: 7 if value <= 64 else 8 for name, value in largest.items()}


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("types", ["u8s8", "s8s8"])
def test_without_vnni_only_what_saturates_gets_seven_bits(tmp_path: Path, granularity: str, types: str) -> None:
    """On x86_avx2 the saturating weights are reduced, the proven ones keep 8 bits, and each layer has its reason."""
    facts, constants = run_stage(tmp_path, isa="x86_avx2", granularity=granularity, types=types)
    assert bits_of(constants) == {"bold": 7, "safe": 8}
    assert facts["reduce_range"] == "1 of 2 weights"
    assert facts["saturation"]["first"].endswith("in 7: 7 bits")
    assert facts["saturation"]["second"] == "cannot saturate: no two weights of a channel sum to more than 128"


def test_integer_operators_are_reduced_as_a_whole(tmp_path: Path) -> None:
    """The format qoperator has no choice per tensor; the facts name the one that has."""
    facts, constants = run_stage(tmp_path, isa="x86_avx2", types="u8s8", format="qoperator")
    assert bits_of(constants) == {"bold": 7, "safe": 7}
    assert "format: qdq" in facts["reduce_range"]


@pytest.mark.parametrize(
    ("isa", "types", "says"),
    [
        ("x86_vnni", "u8s8", "u8s8 does not saturate on x86_vnni"),
        ("arm64", "s8s8", "s8s8 does not saturate on arm64"),
        ("x86_avx2", "u8u8", "u8u8 does not saturate on x86_avx2"),
    ],
)
def test_elsewhere_weights_keep_eight_bits(tmp_path: Path, isa: str, types: str, says: str) -> None:
    """Where kernels add exactly nothing is reduced, nothing is forecast, and the facts say why."""
    facts, constants = run_stage(tmp_path, isa=isa, types=types)
    assert "saturation" not in facts
    assert says in facts["reduce_range"]
    if types != "u8u8":
        assert bits_of(constants) == {"bold": 8, "safe": 8}


@pytest.mark.parametrize(("asked", "bits"), [(True, 7), (False, 8)])
@pytest.mark.parametrize("isa", ["x86_vnni", "x86_avx2"])
def test_what_was_asked_for_is_done(tmp_path: Path, isa: str, asked: bool, bits: int) -> None:  # noqa: FBT001
    """A boolean overrules the forecast on every processor."""
    facts, constants = run_stage(tmp_path, isa=isa, types="u8s8", reduce_range=asked)
    assert bits_of(constants) == {"bold": bits, "safe": bits}
    assert "as asked for" in facts["reduce_range"]


def test_bias_correction_sees_the_bits_that_are_used(tmp_path: Path) -> None:
    """Corrected biases and 7-bit weights go together."""
    facts, constants = run_stage(tmp_path, isa="x86_avx2", types="u8s8", bias_correction=True)
    assert bits_of(constants) == {"bold": 7, "safe": 8}
    assert "bias_correction" in facts


@pytest.mark.parametrize("isa", ["x86_vnni", "arm64"])
def test_costs_nothing_where_nothing_saturates(isa: Isa) -> None:
    """Neither a trial quantization nor a sample is asked for."""

    def never(*_: object) -> onnx.ModelProto:
        pytest.fail("work was done")

    def none() -> Iterator[Batch]:
        pytest.fail("a sample was read")
        yield {}

    model = prepare(two_layers(), where="test")
    settings = QuantizeStatic(types="u8s8", isa=isa)
    assert not reduced_range(settings, resolve_scheme(isa), never, model, none()).weights


@pytest.mark.parametrize(("count", "first"), [(5, [0, 1, 2, 3, 4]), (40, [0, 2, 4, 6, 8]), (161, [0, 10, 20, 30, 40])])
def test_samples_are_few_and_spread(tmp_path: Path, count: int, first: list[int]) -> None:
    """At most 16, one at a time, evenly spaced over the calibration data."""
    ctx = context(tmp_path, count)
    batches = [batch["x"] for batch in forecast_samples(ctx, two_layers())]
    with np.load(tmp_path / "samples.npz") as archive:
        assert all(np.array_equal(batch[0], archive["x"][place]) for batch, place in zip(batches, first, strict=False))
    assert len(batches) == min(count, FORECAST_SAMPLES)
    assert {len(batch) for batch in batches} == {1}


def test_no_samples_are_told(tmp_path: Path) -> None:
    """A context without calibration data is an error, not a forecast of nothing."""
    ctx = replace(context(tmp_path), data=DataRoles())
    with pytest.raises(DataError, match="no calibration samples"):
        list(forecast_samples(ctx, two_layers()))


@pytest.mark.parametrize("k", [16, 27])
def test_this_processors_kernel_does_as_forecast(k: int) -> None:
    """ONNX Runtime's own kernel gives the saturated product without VNNI, and the exact one elsewhere."""
    rng = np.random.default_rng(k)
    activations = rng.integers(0, 256, (9, k)).astype(np.uint8)
    weights = rng.integers(-128, 128, (k, 20)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [9, k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [9, 20])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    found = Session(model.SerializeToString()).run({"x": activations})["y"]
    exact = activations.astype(np.int32) @ weights.astype(np.int32)
    saturated = saturated_product(activations, weights.T)
    assert not np.array_equal(exact, saturated)
    assert np.array_equal(found, saturated if detect_isa() == "x86_avx2" else exact)

"""Quantization error and kernel error told apart, on models where each is known."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.qdq_loss_debug import (
    collect_activations,
    compute_activation_error,
    compute_weight_error,
    create_activation_matching,
    create_weight_matching,
    modify_model_output_intermediate_tensors,
)

from onnxshrink.config.stages import QuantizeStatic, QuantizeWeights, Stage
from onnxshrink.core.drift import IDENTICAL, Drift
from onnxshrink.core.errors import ModelError
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.runtime.session import Session
from onnxshrink.verify import drift_evidence
from onnxshrink.verify.drift_evidence import DriftEvidence
from onnxshrink.verify.kernel_error import find_kernel_error, not_covered, why_no_split

Arrays = dict[str, NDArray[np.float32]]


class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """What ONNX Runtime's quantizer reads."""

    def __init__(self, arrays: Arrays, size: int = 16) -> None:
        self._batches = iter(nets.ArrayReader(arrays, size))

    def get_next(self) -> Any:
        """The next batch, or None."""
        return next(self._batches, None)


def quantized(model: onnx.ModelProto, folder: Path, **options: Any) -> tuple[Path, Path]:
    """The float file, and one by ONNX Runtime's own static quantizer."""
    files = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(model, files[0])
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8} | options
    quantize_static(*files, Batches(nets.samples_of(model, 64)), **options)
    return files


def measured(reference: Path, candidate: Path, arrays: Arrays) -> tuple[dict[str, Metric], dict[str, Any]]:
    """Metrics by name, and the details."""
    evidence, like = DriftEvidence(candidate), Session(reference)
    metrics = evidence.measure(like, Session(candidate, like=like.inputs), nets.ArrayReader(arrays))
    return {metric.name: metric for metric in metrics}, evidence.details


def block_weights(folder: Path) -> tuple[Path, Path, Arrays]:
    """A product with 8-bit weights in blocks, whose inputs have one large value a block that weighs nothing.

    ONNX Runtime's weight-only kernel rounds each block of inputs to 8 bits, so that the large one drowns the others.
    """
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    weight[::32] = 0
    scale = (np.abs(weight.reshape(2, 32, 32)).max(axis=1) / 127).astype(np.float32)
    values = np.round(weight.reshape(2, 32, 32) / scale[:, None]).astype(np.int64).reshape(64, 32) + 128
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["wd"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    weights = {"q": values.astype(np.uint8), "s": scale, "z": np.full(scale.shape, 128, np.uint8)}
    axes: tuple[dict[str, list[int | str]], ...] = ({"x": ["N", 64]}, {"y": ["N", 32]})
    graph = helper.make_graph(
        nodes,
        "blocks",
        *([helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in side.items()] for side in axes),
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    plain = nets.model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], *axes, {"w": weight})
    onnx.save(plain, folder / "float.onnx")
    onnx.save(model, folder / "blocks.onnx")
    x = rng.standard_normal((48, 64)).astype(np.float32)
    x[:, ::32] = 1000
    return folder / "float.onnx", folder / "blocks.onnx", {"x": x}


def test_the_parts_are_what_numpy_makes_of_the_three_models(tmp_path: Path) -> None:
    """Float against literal, literal against deployed, float against deployed: each by numpy over all samples."""
    reference, candidate, arrays = block_weights(tmp_path)
    metrics, details = measured(reference, candidate, arrays)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(candidate).graph.initializer}
    stored = (weights["q"].astype(np.float64) - 128) * np.repeat(weights["s"], 32, axis=0)
    x = arrays["x"].astype(np.float64)
    exact = x @ numpy_helper.to_array(onnx.load(reference).graph.initializer[0]).astype(np.float64)
    literal, deployed = x @ stored, Session(candidate).run(arrays)["y"].astype(np.float64)

    def decibels(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))

    assert metrics["quantization_sqnr_db"].value == pytest.approx(decibels(exact, literal), abs=0.01)
    assert metrics["kernel_sqnr_db"].value == pytest.approx(decibels(literal, deployed), abs=0.01)
    assert metrics["sqnr_db"].value == pytest.approx(decibels(exact, deployed), abs=0.01)
    assert details["drift_split"]["cpu"]["not_covered"] == []
    assert "disable_quant_qdq" in details["drift_split"]["cpu"]["against"]


def test_kernels_that_lose_what_quantization_keeps_are_told(tmp_path: Path) -> None:
    """8-bit weights are 40 dB good and the kernel spoils them; in float weights of the same bits nothing is told."""
    reference, candidate, arrays = block_weights(tmp_path)
    metrics, _ = measured(reference, candidate, arrays)
    row = Candidate("blocks", "variant", "m.onnx", "0", tuple(metrics.values()))
    (line,) = find_kernel_error(row, [QuantizeWeights()])
    assert line.startswith("blocks: kernel error on cpu: output 'y' has ")
    assert "activations: float" in line
    metrics, _ = measured(reference, candidate, {"x": arrays["x"] / 1000 * (arrays["x"] < 100)})
    assert not list(find_kernel_error(Candidate("b", "variant", "m", "0", tuple(metrics.values())), ()))


def test_saturating_weights_are_kernel_error_without_vnni_and_none_with_it(tmp_path: Path) -> None:
    """Sums of two products beyond 16 bits: equal to the literal model within its rounding where 32 bits are added."""
    rng = np.random.default_rng(0)
    weights = {"w": np.where(rng.random((64, 16)) < 0.9, 1, -1).astype(np.float32)}
    model = nets.model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 64]}, {"y": ["N", 16]}, weights)
    files = quantized(model, tmp_path)
    arrays = {"x": np.abs(nets.samples_of(model, 64, seed=1)["x"])}
    arrays["x"][:] = np.maximum(arrays["x"], 2)  # near the top of the range, where two products do not fit
    metrics, _ = measured(*files, arrays)
    row = Candidate("int8", "variant", "m.onnx", "0", tuple(metrics.values()))
    lines = list(find_kernel_error(row, [QuantizeStatic()]))
    if detect_isa() == "x86_avx2":
        assert (metrics["kernel_sqnr_db"].value or 0) < 20
        assert "reduce_range: true" in lines[0]
    else:
        kernel = metrics["kernel_sqnr_db"]
        assert kernel.note == IDENTICAL or (kernel.value or 0) > 40
        assert not lines


def test_right_kernels_of_a_network_agree_with_the_literal_model(tmp_path: Path) -> None:
    """Where no product saturates the parts of a CNN's drift are quantization alone, and no warning is given."""
    model = nets.cnn()
    files = quantized(model, tmp_path, reduce_range=True)
    metrics, _ = measured(*files, nets.samples_of(model, 40, seed=1))
    quantization, kernel = metrics["quantization_sqnr_db"], metrics["kernel_sqnr_db"]
    assert quantization.value == pytest.approx(metrics["sqnr_db"].value, abs=0.5)
    assert kernel.note == IDENTICAL or (kernel.value or 0) > (quantization.value or 0) + 10
    assert not list(find_kernel_error(Candidate("q", "variant", "m", "0", tuple(metrics.values())), ()))
    assert metrics["output_step"].value == pytest.approx(float(output_scale(files[1])))
    assert (metrics["max_abs_error"].value or 0) < 20 * (metrics["output_step"].value or 0)


def output_scale(path: Path) -> NDArray[np.float32]:
    """The scale of the last DequantizeLinear."""
    model = onnx.load(path)
    node = next(node for node in model.graph.node if "y" in node.output)
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))


@pytest.mark.parametrize("kind", ["qoperator", "dynamic"])
def test_what_cannot_be_run_in_float_is_declined(tmp_path: Path, kind: str) -> None:
    """Integer operators in the file have no literal form: no parts, and the reason with their names."""
    model = nets.cnn()
    if kind == "qoperator":
        files = quantized(model, tmp_path, quant_format=QuantFormat.QOperator)
    else:
        files = tmp_path / "float.onnx", tmp_path / "int8.onnx"
        onnx.save(model, files[0])
        quantize_dynamic(*files, op_types_to_quantize=["Gemm", "MatMul"])
    metrics, details = measured(*files, nets.samples_of(model, 16, seed=1))
    assert not {"quantization_sqnr_db", "kernel_sqnr_db"} & set(metrics)
    named = {"qoperator": "QLinearConv", "dynamic": "MatMulInteger"}[kind]
    assert named in details["drift_split"]["cpu"]["declined"]
    assert why_no_split(onnx.load(files[1])) == details["drift_split"]["cpu"]["declined"]


def test_integer_operators_beside_qdq_are_named(tmp_path: Path) -> None:
    """A mixture is split, and what counts as quantization although it ran in integers is listed."""
    _, candidate, _ = block_weights(tmp_path)
    model = onnx.load(candidate)
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["y"], ["dq", "ds", "dz"]))
    assert why_no_split(model) is None
    assert not_covered(model) == ("DynamicQuantizeLinear",)


def test_float_models_have_no_parts(tmp_path: Path) -> None:
    """Nothing is run a third time, and nothing is said of it."""
    onnx.save(nets.cnn(), tmp_path / "a.onnx")
    metrics, details = measured(tmp_path / "a.onnx", tmp_path / "a.onnx", nets.samples_of(nets.cnn(), 8))
    assert "drift_split" not in details
    assert not {"quantization_sqnr_db", "output_step"} & set(metrics)


def test_a_model_without_float_kernels_costs_the_split_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ONNX Runtime says is kept as the reason."""

    def refuse(*_: object) -> Session:
        raise ModelError("ONNX Runtime cannot load the model: no kernel for X")

    monkeypatch.setattr(drift_evidence, "open_literal", refuse)
    reference, candidate, arrays = block_weights(tmp_path)
    metrics, details = measured(reference, candidate, arrays)
    assert "no kernel for X" in details["drift_split"]["cpu"]["declined"]
    assert "sqnr_db" in metrics
    assert "kernel_sqnr_db" not in metrics


@cache
def row_of(total: float | None, quantization: float | None, kernel: float | None) -> Candidate:
    """A variant with these decibels; None is identical."""
    parts = {"sqnr_db": total, "quantization_sqnr_db": quantization, "kernel_sqnr_db": kernel}
    metrics = (
        Metric(name, value, "dB", target="cpu", output="y", note=IDENTICAL if value is None else None)
        for name, value in parts.items()
    )
    return Candidate("int8", "variant", "m.onnx", "0", tuple(metrics))


@pytest.mark.parametrize(
    ("total", "quantization", "kernel", "told"),
    [
        (18.5, 18.5, 27.7, False),  # EfficientNet-Lite0 by scales per channel, with VNNI
        (18.0, 18.5, 19.0, False),  # other rounding, no worse
        (10.0, 18.5, 10.5, True),
        (10.0, None, 10.0, True),  # the literal model is exact
        (None, None, None, False),
        (41.0, 60.0, 41.0, False),  # nobody asks
    ],
)
def test_only_what_kernels_cost_is_told(
    total: float | None, quantization: float | None, kernel: float | None, *, told: bool
) -> None:
    """Large against quantization error, and worse for it."""
    assert bool(list(find_kernel_error(row_of(total, quantization, kernel), ()))) is told


@pytest.mark.parametrize(
    ("chain", "isa", "advice"),
    [
        ([QuantizeStatic()], "x86_avx2", "reduce_range: true"),
        ([QuantizeStatic()], "x86_vnni", "exclude_nodes"),
        ([QuantizeStatic()], "arm64", "exclude_nodes"),
        ([QuantizeWeights()], "x86_avx2", "activations: float"),
    ],
)
def test_the_advice_fits_the_processor(
    chain: list[Stage], isa: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saturation is a matter of processors without VNNI."""
    monkeypatch.setattr("onnxshrink.verify.kernel_error.detect_isa", lambda: isa)
    (line,) = find_kernel_error(row_of(10.0, 18.5, 10.5), chain)
    assert advice in line


def test_decibels_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    """The SQNR of every weight and every activation equals that of ONNX Runtime's own qdq_loss_debug."""
    model = nets.cnn()
    files = quantized(model, tmp_path)
    weights = create_weight_matching(*map(str, files))
    errors = compute_weight_error(weights)
    assert {"w1", "w2", "w3", "w4"} <= set(errors)
    for name, pair in weights.items():
        drift = Drift(name).update(pair["float"], pair["dequantized"])
        assert drift.sqnr_db == pytest.approx(errors[name], abs=1e-3)
    activations = []
    for file in files:
        modify_model_output_intermediate_tensors(file, tmp_path / "seen.onnx")
        activations.append(collect_activations(str(tmp_path / "seen.onnx"), Batches(nets.samples_of(model, 40), 16)))
    matched = create_activation_matching(activations[1], activations[0])
    found = compute_activation_error(matched)
    assert len(found) > 4
    for name, errors in found.items():
        drift = Drift(name)
        for ours, theirs in zip(matched[name]["float"], matched[name]["post_qdq"], strict=True):
            drift = drift.update(ours, theirs)
        assert drift.sqnr_db == pytest.approx(errors["xmodel_err"], abs=1e-3)

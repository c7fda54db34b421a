"""Fused transformer operators go through every stage: quantized where they can be, with the drift stated."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from encoder_models import encoder, extended_encoder, fused_encoder, sentences

from onnxshrink.config.load import validate
from onnxshrink.core.report import Report
from onnxshrink.pipeline import run
from onnxshrink.runtime.session import Session

STATIC: dict[str, Any] = {"kind": "quantize_static"}
DYNAMIC: dict[str, Any] = {"kind": "quantize_dynamic"}
# Stages, and the least SQNR in dB.
VARIANTS: dict[str, tuple[list[dict[str, Any]], float]] = {
    "static": ([STATIC], 15),
    "static_qoperator": ([STATIC | {"format": "qoperator"}], 15),
    "dynamic": ([DYNAMIC], 25),
    "smooth_dynamic": ([{"kind": "smooth_quant"}, DYNAMIC], 25),
    "weights8": ([{"kind": "quantize_weights", "bits": 8}], 30),
    "weights4": ([{"kind": "quantize_weights", "bits": 4}], 12),
    "fp16": ([{"kind": "to_fp16"}], 45),
    "optimize": ([{"kind": "optimize"}], 100),
    "optimize_dynamic": ([{"kind": "optimize"}, DYNAMIC], 25),
    "mixed": ([{"kind": "quantize_mixed", "max_float_ratio": 0.2}], 15),
}


@pytest.fixture(scope="module", params=["transformers", "extended"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Every stage on a graph as onnxruntime.transformers writes it, and on one that ONNX Runtime saved."""
    folder = tmp_path_factory.mktemp(request.param)
    onnx.save(fused_encoder() if request.param == "transformers" else extended_encoder(folder), str(folder / "m.onnx"))
    np.savez(folder / "calib.npz", **sentences(16))
    np.savez(folder / "test.npz", **sentences(16, seed=1))
    document = {
        "name": request.param,
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}},
        "variants": {name: stages for name, (stages, _) in VARIANTS.items()},
        "targets": [{"latency_seconds": 0.01}],
    }
    return run(validate(document, base=folder), runs=folder / "runs", base=folder)


def facts_of(report: Report, step: str) -> dict[str, Any]:
    return dict(next(found.facts for found in report.steps if found.name == step))


def test_the_fused_encoder_is_the_plain_one() -> None:
    """The two test models compute one function, so that what is said of one holds for the other."""
    batch = sentences(8)
    plain, fused = (Session(model.SerializeToString()).run(batch)["y"] for model in (encoder(), fused_encoder()))
    assert np.abs(plain - fused).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_takes_fused_operators(report: Report, name: str) -> None:
    """Each variant is made, and its outputs are near the float ones."""
    candidate = report.candidate(name)
    assert not [verdict for verdict in candidate.verdicts if verdict.gate == "completed"], candidate.verdicts
    metric = candidate.metric("sqnr_db")
    assert metric is not None
    assert metric.value is None or metric.value > VARIANTS[name][1]


@pytest.mark.slow
def test_products_between_fused_operators_become_integer(report: Report) -> None:
    """Static and dynamic quantization take the MatMuls behind fused operators, and nothing is skipped unseen."""
    least = {"transformers": 6, "extended": 12}[report.name]
    for step in ("static/quantize_static", "static_qoperator/quantize_static", "dynamic/quantize_dynamic"):
        assert facts_of(report, step)["quantized_nodes"]["MatMul"] >= least
    assert not [text for text in report.warnings if "failed to infer" in text]
    coverage = report.candidate("dynamic").metric("integer_coverage")
    assert coverage is not None
    assert coverage.value is not None
    assert coverage.value > 0.7


@pytest.mark.slow
def test_attention_and_embedding_have_dynamic_forms(report: Report) -> None:
    """Attention becomes QAttention; what has no integer form is named, with the reason."""
    if report.name != "transformers":
        pytest.skip("ONNX Runtime fuses no Attention at this level")
    facts = facts_of(report, "dynamic/quantize_dynamic")
    assert facts["quantized_nodes"]["Attention"] == 2
    assert facts_of(report, "smooth_dynamic/smooth_quant")["alphas"].keys() >= {"x0", "x1"}


@pytest.mark.slow
def test_weights_of_fused_operators_without_a_small_form_are_told(report: Report) -> None:
    """Attention and the embedding hold most of the bytes: that they stay in float is said, with what to do."""
    if report.name != "transformers":
        pytest.skip("ONNX Runtime fuses no Attention at this level")
    facts = facts_of(report, "weights8/quantize_weights")
    reason = "has no form with weights in few bits"
    assert facts["float_nodes"] == {
        "embed": f"EmbedLayerNormalization {reason}", "attend0": f"Attention {reason}", "attend1": f"Attention {reason}"
    }  # fmt: skip
    assert any("before it is fused" in text for text in report.warnings)

from __future__ import annotations

from pathlib import Path

import pytest

from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact, Digest
from onnxshrink.core.events import Silent
from onnxshrink.core.report import Candidate, Metric, Verdict
from onnxshrink.verify import caveats
from onnxshrink.verify.verify import Latency, Role, Row


def row_of(name: str, role: Role, artifact: str, reference: str, macs: float, ratio: float) -> tuple[Row, Candidate]:
    made, given = (Artifact("onnx", Path(at), Digest(at)) for at in (artifact, reference))
    metrics = (Metric("macs", macs, "count", target="cpu"), latency(ratio))
    return Row(name, role, made, given), Candidate(name, role, "", "", metrics)


def latency(ratio: float) -> Metric:
    return Metric("latency_ratio", ratio, "ratio", 0.99 * ratio, 1.01 * ratio, target="cpu")


def test_fewer_macs_are_judged_against_the_same_network_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another reference the original is measured once more; a float variant speaks for its reference."""
    pairs = [
        row_of("unpruned", "original", "u", "d", 1000, 1.0),
        row_of("reference", "reference", "d", "d", 1000, 1.0),
        row_of("reference-cut", "reference", "c", "c", 500, 1.0),
        row_of("dense", "variant", "d8", "d", 1000, 0.6),
        row_of("cut", "variant", "c2", "c", 500, 1.0),
        row_of("int8", "variant", "c8", "c", 500, 0.6),
    ]
    asked = []

    def measured(*, name: str, artifact: Artifact, reference: Artifact, **_: object) -> Latency:
        asked.append((name, artifact.digest, reference.digest))
        return Latency((latency(0.9),))

    monkeypatch.setattr(caveats, "measure_latency", measured)
    config = RunConfig.model_validate({"model": {"onnx": __file__}})
    rows, candidates = zip(*pairs, strict=True)
    texts = list(caveats.unpaid(config, rows, candidates, Silent()))
    assert asked == [("unpruned", "u", "c")]
    assert texts == ["cut: 0.50 of the MACs of unpruned, latency ratio 1.11 (1.09 to 1.13): fewer MACs and no faster"]


def test_without_an_original_the_reference_is_the_measure() -> None:
    """A model that was cut elsewhere is compared with the float model beside it."""
    pairs = [
        row_of("reference", "reference", "d", "d", 1000, 1.0),
        row_of("slow", "variant", "s", "d", 500, 1.0),
        row_of("fast", "variant", "f", "d", 500, 0.5),
    ]
    rows, candidates = zip(*pairs, strict=True)
    config = RunConfig.model_validate({"model": {"onnx": __file__}})
    (text,) = caveats.unpaid(config, rows, candidates, Silent())
    assert text.startswith("slow: 0.50 of the MACs of reference")


def test_a_failed_gate_on_drift_says_how_to_learn_why() -> None:
    """One line with the two files; a gate on size needs no explanation of nodes."""
    reference = Candidate("reference", "reference", "fp32.onnx", "")
    drifted = Candidate("int8", "variant", "int8.onnx", "", verdicts=(Verdict("min_sqnr_db", 20, "failed", ""),))
    heavy = Candidate("fat", "variant", "fat.onnx", "", verdicts=(Verdict("max_size", 20, "failed", ""),))
    rows, folder = [reference, drifted, heavy], Path("runs", "cnn")
    config = RunConfig.model_validate({"model": {"onnx": __file__}})
    (line,) = caveats.unexplained(config, rows, folder, {})
    models = f"{folder / 'fp32.onnx'} {folder / 'int8.onnx'}"
    assert line.startswith(f"int8 failed on drift: `onnxshrink explain {models} --data samples.npz`")
    data = {"evaluation": {"npz": __file__}}
    config = RunConfig.model_validate({"model": {"onnx": __file__}, "data": data})
    (line,) = caveats.unexplained(config, rows, folder, {"int8": Path("mine.onnx")})
    assert f"`onnxshrink explain {__file__} mine.onnx --data {__file__}`" in line

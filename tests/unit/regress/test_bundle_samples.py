from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.pipeline import run
from onnxshrink.regress import bundle as bundle_module
from onnxshrink.regress.bundle import MAX_SAMPLES, choose_samples, leave_bundle
from onnxshrink.regress.check import check_bundle
from onnxshrink.runtime.session import Session

QUICK = {"targets": [{"latency_seconds": 0.02}]}


def config_of(folder: Path, **document: Any) -> RunConfig:
    return validate({"name": "r", "model": {"onnx": "model.onnx"}, **QUICK, **document}, base=folder)


@pytest.fixture
def model(tmp_path: Path) -> Artifact:
    """A CNN as an artifact, with 40 samples beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(cnn(), str(folder / "model.onnx"))
    np.savez(tmp_path / "data.npz", **samples_of(cnn(), 40))
    return Artifact("onnx", folder, digest_folder(folder))


def test_the_closest_decision_and_the_worst_drift_are_golden(model: Artifact, tmp_path: Path) -> None:
    """The first of each kind is always among the samples, and equal data give equal samples."""
    rng = np.random.default_rng(0)
    other = onnx.load(str(model.model_path))
    tensor = next(t for t in other.graph.initializer if t.name == "w1")
    array = onnx.numpy_helper.to_array(tensor) + rng.normal(0, 0.05, tuple(tensor.dims)).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), "w1"))
    (tmp_path / "reference").mkdir()
    onnx.save(other, str(tmp_path / "reference/model.onnx"))
    reference = Artifact("onnx", tmp_path / "reference", digest_folder(tmp_path / "reference"))
    config = config_of(model.path, data={"evaluation": {"npz": "../data.npz"}})
    session = Session(model.model_path)
    numbers, samples = choose_samples(session, reference, config)
    data = np.load(tmp_path / "data.npz")["x"]
    got, want = session.run({"x": data})["y"], Session(reference.model_path).run({"x": data})["y"]
    first_two = np.sort(got, axis=1)[:, -2:]
    assert int((first_two[:, 1] - first_two[:, 0]).argmin()) in numbers
    assert int((np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).argmax()) in numbers
    assert len(numbers) == len(samples) == MAX_SAMPLES
    assert all(np.array_equal(row["x"], data[n : n + 1]) for n, row in zip(numbers, samples, strict=True))
    assert choose_samples(session, reference, config)[0] == numbers


def test_golden_samples_stay_within_their_bytes(model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are kept where they are large, and one in any case."""
    config = config_of(model.path, data={"evaluation": {"npz": "../data.npz"}})
    sample = 3 * 16 * 16 * 4 + 10 * 4
    for limit, count in ((5 * sample, 5), (1, 1)):
        monkeypatch.setattr(bundle_module, "MAX_BYTES", limit)
        assert len(choose_samples(Session(model.model_path), None, config)[0]) == count


def test_a_bundle_needs_no_data(model: Artifact, tmp_path: Path) -> None:
    """Seeded noise serves where a config has no samples."""
    config = config_of(model.path)
    report = run(config, runs=tmp_path / "runs", base=model.path, leave=leave_bundle)
    folder = tmp_path / "runs" / "r" / "bundle"
    assert report.candidate(str(report.winner)).details["bundle"]["n_samples"] == MAX_SAMPLES
    assert check_bundle(folder).outcome == "passed"
    assert run(config, runs=tmp_path / "other", base=model.path).candidates[-1].details.get("bundle") is None


def test_a_winner_without_a_bundle_is_told_so(model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is not lost for it."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "write_baseline", fail)
    report = run(config_of(model.path), runs=tmp_path / "runs", base=model.path, leave=leave_bundle)
    assert "No space left" in report.candidate(str(report.winner)).details["bundle"]["declined"]
    assert not (tmp_path / "runs" / "r" / "bundle").exists()

"""The files of a package against the model they were made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as nets
import pytest
from onnx import numpy_helper

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import PackageOrt
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.report import Candidate
from onnxshrink.runtime.ort_format import OrtConversion
from onnxshrink.runtime.session import Session
from onnxshrink.stages.package_ort import package_ort
from onnxshrink.verify.package import package_files, slow_packages, with_package, with_package_times
from onnxshrink.verify.verify import Latency, Quality, Row


def packaged(folder: Path, **settings: Any) -> Artifact:
    source, out = nets.artifact_of(nets.cnn(), folder / "source"), folder / "out"
    out.mkdir()
    package_ort(PackageOrt(**settings), source, out, nets.context_of(nets.ArrayReader({}), folder))
    return Artifact("onnx", out, digest_folder(out))


def config_of(folder: Path, artifact: Artifact, **target: Any) -> RunConfig:
    np.savez(folder / "test.npz", **nets.samples_of(nets.cnn(), 40, seed=3))
    document = {
        "model": {"onnx": str(artifact.model_path)},
        "data": {"evaluation": {"npz": str(folder / "test.npz")}},
        "targets": [target],
    }
    return validate(document, base=folder)


def test_drift_of_the_files_is_numpys(tmp_path: Path) -> None:
    """On all evaluation samples; a file with another bias is found to be off by exactly that."""
    artifact = packaged(tmp_path, styles=("fixed",))
    other = nets.cnn()
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == "b4")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), "b4"))
    row, config = Row("v", "variant", artifact, artifact), config_of(tmp_path, artifact)
    same = with_package(Quality(()), row, config).details["package"]["fixed"]
    assert same["outputs"]["y"]["max_abs_error"] < 1e-6
    assert same["file"] == "model.ort"
    assert same["size_bytes"] == (artifact.path / "model.ort").stat().st_size
    OrtConversion().write(nets.artifact_of(other, tmp_path / "other").model_path, artifact.path / "model.ort", "fixed")
    found = with_package(Quality(()), row, config).details["package"]["fixed"]["outputs"]["y"]
    samples = nets.samples_of(nets.cnn(), 40, seed=3)
    want = Session(artifact.model_path).run(samples)["y"].astype(np.float64)
    got = Session(artifact.path / "model.ort").run(samples)["y"].astype(np.float64)
    assert found["max_abs_error"] == pytest.approx(np.abs(want - got).max())
    assert found["max_abs_error"] == pytest.approx(0.5, abs=1e-5)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()))


def test_models_without_a_package_are_left_alone(tmp_path: Path) -> None:
    """So is a packaged model that is no variant, and latency where none was asked for."""
    artifact = nets.artifact_of(nets.cnn(), tmp_path / "model")
    config = config_of(tmp_path, artifact)
    quality, latency = Quality(()), Latency(())
    assert with_package(quality, Row("v", "variant", artifact, artifact), config) is quality
    assert with_package_times(latency, Row("v", "variant", artifact, artifact), config) is latency
    package = packaged(tmp_path / "package")
    assert with_package(quality, Row("reference", "reference", package, package), config) is quality
    silent = config_of(tmp_path, artifact, latency=False)
    assert with_package_times(latency, Row("v", "variant", package, package), silent) is latency
    assert list(package_files(package)) == ["fixed", "runtime"]
    assert package_files(artifact) == {}


@pytest.mark.slow
def test_times_are_told_for_every_file(tmp_path: Path) -> None:
    """Load time, first run and the ratio with its interval."""
    artifact = packaged(tmp_path)
    config = config_of(tmp_path, artifact, latency_seconds=0.1)
    row = Row("v", "variant", artifact, artifact)
    found = with_package_times(Latency(()), row, config).details["package_times"]["cpu"]
    assert list(found["files"]) == ["fixed", "runtime"]
    for times in found["files"].values():
        assert times["load_ms"] > 0 < times["first_run_ms"]
        ratio = times["latency_ratio"]
        assert ratio["lo"] <= ratio["value"] <= ratio["hi"]
    assert found["onnx"]["load_ms"] > 0


def test_a_slow_file_is_warned_of() -> None:
    """Once for a package and target, by its slowest file; an interval that reaches 1.1 says nothing."""

    def row(*ratios: float) -> Candidate:
        files = {
            style: {"latency_ratio": {"value": ratio, "lo": ratio - 0.05, "hi": ratio + 0.05}}
            for style, ratio in zip(("fixed", "runtime"), ratios, strict=False)
        }
        return replace(Candidate("int8", "variant", "m", "d"), details={"package_times": {"cpu": {"files": files}}})

    (line,) = slow_packages([row(2.0, 2.4)])
    assert line.startswith("int8: model.with_runtime_opt.ort takes 2.40 (2.35 to 2.45) times as long")
    assert list(slow_packages([row(1.12, 1.0), Candidate("fp32", "variant", "m", "d")])) == []

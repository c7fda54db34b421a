from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

from onnxshrink.config.gates import Target
from onnxshrink.config.load import validate
from onnxshrink.pipeline import run
from onnxshrink.runtime.session import Session

pytestmark = pytest.mark.cuda


def test_bound_and_plain_inference_agree_with_the_cpu(tmp_path: Path) -> None:
    """The same samples through CUDA, with and without IO binding, and through the CPU give the same numbers."""
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    batch = samples_of(model, 4)
    want = Session(tmp_path / "m.onnx").run(batch)["y"]
    session = Session(tmp_path / "m.onnx", Target(provider="cuda"))
    assert session.providers[0] == "CUDAExecutionProvider"
    np.testing.assert_allclose(session.run(batch)["y"], want, atol=1e-3)
    binding = session.bind(batch)
    session.run_bound(binding)
    np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], want, atol=1e-3)


def test_a_run_measures_on_both_providers(tmp_path: Path) -> None:
    """Drift, accuracy and latency have a row per target."""
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "x.npz", **samples_of(model, 32))
    config = validate(
        {
            "name": "both",
            "model": {"onnx": "m.onnx"},
            "data": {"evaluation": {"npz": "x.npz"}},
            "stages": [{"kind": "optimize"}],
            "variants": {"fp32": []},
            "targets": [{"provider": "cpu", "latency_seconds": 0.2}, {"provider": "cuda", "latency_seconds": 0.2}],
        },
        base=tmp_path,
    )
    row = run(config, runs=tmp_path / "runs").candidate("fp32")
    assert {metric.target for metric in row.metrics if metric.name == "latency_ratio"} == {"cpu", "cuda"}
    assert {metric.target for metric in row.metrics if metric.name == "sqnr_db"} == {"cpu", "cuda"}

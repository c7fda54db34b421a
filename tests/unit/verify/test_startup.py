"""Load time, first run and peak memory in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.config.gates import Gates, Target
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.device_memory import NOT_INSTALLED, OF_DEVICE, OF_PROCESS, SHRUNK, UNNUMBERED
from onnxshrink.core.errors import ModelError
from onnxshrink.core.report import Metric
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.verify import startup
from onnxshrink.verify.gates import judge
from onnxshrink.verify.startup import PROCESSES, measure_startup

BATCH = {"x": np.ones((1, 64), np.float32)}


def artifact(folder: Path, width: int) -> Artifact:
    """``x @ w`` with ``64 x width`` weights."""
    folder.mkdir()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(np.ones((64, width), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return Artifact("onnx", folder, digest_folder(folder))


def test_a_probe_loads_no_more_than_onnx_runtime() -> None:
    """Neither torch, onnx nor pydantic are in the process that is measured."""
    code = (
        "import sys, onnxshrink.verify.startup_probe; print(*sorted({'torch', 'onnx', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()


@pytest.mark.slow
def test_a_bigger_model_takes_more_memory(tmp_path: Path) -> None:
    """32 MB of weights more are at least 32 MB of memory more in every process; each figure lies within its ends."""
    big, small = artifact(tmp_path / "big", 128 * 1024), artifact(tmp_path / "small", 1024)
    specs = input_specs(load_model(small.model_path))
    metrics, figures = measure_startup(big, small, Target(spinning=False), BATCH, specs)
    assert {name: len(values) for name, values in figures["reference"].items()} == dict.fromkeys(
        ("load_ms", "first_run_ms", "peak_memory_bytes"), PROCESSES
    )
    least, most = min(figures["candidate"]["peak_memory_bytes"]), max(figures["reference"]["peak_memory_bytes"])
    assert least - most > 32e6
    assert least < 200e6
    values = {metric.name: metric for metric in metrics}
    assert len(values) == 6
    for metric in metrics:
        assert 0 < metric.lo <= metric.value <= metric.hi
        assert metric.target == "cpu, no spinning"
    assert values["peak_memory_bytes"].value == np.median(figures["candidate"]["peak_memory_bytes"])
    json.dumps(figures)


def test_the_reference_itself_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six processes, and both sides have their figures."""
    calls = []

    def probe(settings: dict[str, object], *, where: str) -> dict[str, float]:
        calls.append((settings, where))
        return {"load_ms": float(len(calls)), "first_run_ms": 1.0, "peak_memory_bytes": 2.0}

    monkeypatch.setattr(startup, "probe", probe)
    model = artifact(tmp_path / "m", 8)
    metrics, _ = measure_startup(model, model, Target(threads=3), BATCH, input_specs(load_model(model.model_path)))
    assert len(calls) == PROCESSES
    values = {metric.name: (metric.value, metric.lo, metric.hi) for metric in metrics}
    assert values["load_ms"] == values["reference_load_ms"] == (3.5, 1.0, 6.0)
    assert calls[0][0]["threads"] == 3


def test_no_memory_figure_is_no_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not tell, the metric has no value and says so."""
    monkeypatch.setattr(startup, "probe", lambda *_, **__: dict.fromkeys(startup._UNITS) | {"load_ms": 1.0})
    model = artifact(tmp_path / "m", 8)
    metrics, _ = measure_startup(model, model, Target(), BATCH, input_specs(load_model(model.model_path)))
    memory = next(metric for metric in metrics if metric.name == "peak_memory_bytes")
    assert (memory.value, memory.lo) == (None, None)
    assert "does not tell" in memory.note


@pytest.mark.parametrize(
    ("settings", "gpu"),
    [
        ({}, None),
        ({"provider": "openvino", "options": {"device_type": "GPU"}}, None),
        ({"provider": "directml", "options": {"device_id": 1}}, None),
        ({"provider": "cuda"}, 0),
        ({"provider": "cuda", "options": {"device_id": "2"}}, 2),
        ({"provider": "tensorrt", "options": {"device_id": 1}}, 1),
    ],
)
def test_the_gpu_that_is_looked_at_is_the_targets(settings: dict[str, Any], gpu: int | None) -> None:
    """NVML knows those of CUDA, and elsewhere no figure of it is announced."""
    assert startup.gpu_of(Target(**settings)) == gpu
    assert ("device_memory_bytes" in startup.units_of(Target(**settings))) is (gpu is not None)


def processes(held: list[int | None], notes: list[str]) -> startup.Figures:
    """Figures of a model's processes, with what they hold on a GPU."""
    times = {name: [1.0] * len(held) for name in startup._UNITS}
    peaks = [None if one is None else one + 7 for one in held]
    return {**times, "device_memory_bytes": held, "peak_device_memory_bytes": peaks, "device_memory_note": notes}


def test_memory_of_the_gpu_is_the_median_over_processes() -> None:
    """Of the model and of its reference, after loading and at most, with the source in the note."""
    own, ref = processes([30, 10, 20], [OF_PROCESS] * 3), processes([5, 5, 5], [OF_DEVICE, OF_DEVICE, OF_PROCESS])
    metrics = startup.startup_metrics({"candidate": own, "reference": ref}, Target(provider="cuda"))
    found = {metric.name: metric for metric in metrics}
    assert len(found) == 10
    held, peak = found["device_memory_bytes"], found["peak_device_memory_bytes"]
    assert (held.value, held.lo, held.hi, held.unit, held.target) == (20, 10, 30, "bytes", "cuda")
    assert (peak.value, peak.lo, peak.hi) == (27, 17, 37)
    assert held.note == f"median, least and most of 3 fresh processes; {OF_PROCESS}"
    assert found["reference_device_memory_bytes"].note.endswith(f"; {OF_DEVICE}; {OF_PROCESS}")
    assert found["load_ms"].note == "median, least and most of 3 fresh processes"


def test_memory_of_a_gpu_that_is_not_known_is_no_number() -> None:
    """In one process as in all: the note is that process's own reason, and the figures of the host stay."""
    own = processes([30, None, 20], [OF_PROCESS, SHRUNK, OF_PROCESS])
    ref = processes([None] * 3, [NOT_INSTALLED] * 3)
    metrics = startup.startup_metrics({"candidate": own, "reference": ref}, Target(provider="tensorrt"))
    found = {metric.name: metric for metric in metrics}
    for name, why in (("", SHRUNK), ("reference_", NOT_INSTALLED)):
        for figure in ("device_memory_bytes", "peak_device_memory_bytes"):
            metric = found[name + figure]
            assert (metric.value, metric.lo, metric.hi, metric.note) == (None, None, None, f"not measured: {why}")
        assert found[f"{name}peak_memory_bytes"].value == 1.0


def test_a_probe_whose_gpu_cannot_be_looked_at_still_times_the_start(tmp_path: Path) -> None:
    """The reason stands in place of the figures; a target without a GPU has neither."""
    model = artifact(tmp_path / "m", 8)
    specs = input_specs(load_model(model.model_path))
    settings = startup.probe_settings(model.model_path, Target(), BATCH, specs, tmp_path)
    assert set(startup.probe(settings, where="m")) == set(startup._UNITS)
    told = startup.probe({**settings, "gpu": ""}, where="m")
    assert told["device_memory_bytes"] is told["peak_device_memory_bytes"] is None
    assert told["device_memory_note"] in {NOT_INSTALLED, UNNUMBERED}
    assert told["load_ms"] > 0


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    """Its last line, and the model's name, as a mistake of the model."""
    model = artifact(tmp_path / "m", 8)
    specs = input_specs(load_model(model.model_path))
    settings = startup.probe_settings(model.model_path, Target(), BATCH, specs, tmp_path)
    with pytest.raises(ModelError, match=r"(?s)process of its own.*nowhere.onnx.*where  m.onnx"):
        startup.probe({**settings, "model": "nowhere.onnx"}, where="m.onnx")


@pytest.mark.parametrize(("limit", "outcome"), [(30, "passed"), (25, "inconclusive"), (10, "failed")])
def test_peak_memory_has_a_gate(limit: int, outcome: str) -> None:
    """Every process below the limit passes, every one above it fails, and between both it is open; bytes are whole."""
    metric = Metric("peak_memory_bytes", 24e6, "bytes", 20e6, 28e6, target="cpu")
    (verdict,) = judge(Gates(max_peak_memory=f"{limit} MB"), [metric], [Target()])
    assert verdict.outcome == outcome
    assert "24,000,000 bytes (20,000,000 … 28,000,000)" in verdict.reason

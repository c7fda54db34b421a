"""Other execution providers than the CPU's, really run: OpenVINO's, built in or as a plugin, and one of ggml's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx_models import cnn, model_of, samples_of

from onnxshrink.config.gates import Target
from onnxshrink.config.load import validate
from onnxshrink.core.errors import ProviderError
from onnxshrink.pipeline import run
from onnxshrink.runtime.session import Session
from onnxshrink.verify.placement import placements

OPENVINO = "OpenVINOExecutionProvider"
needs_openvino = pytest.mark.skipif(
    OPENVINO not in ort.get_available_providers(), reason="needs onnxruntime-openvino in place of onnxruntime"
)


def library_of(package: str, pattern: str) -> Path:
    """The plugin's library in an installed package; the test is skipped where there is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the package {package}")
    found = sorted(Path(spec.origin).parent.glob(pattern))
    assert found, f"{package} holds no {pattern}"
    return found[0]


def both(folder: Path, target: dict[str, Any], *, model: onnx.ModelProto, tail: list[dict[str, Any]]) -> Any:
    """A run on the CPU and on another target; the row of the variant and the report."""
    onnx.save(model, folder / "m.onnx")
    np.savez(folder / "x.npz", **samples_of(model, 64))
    config = validate(
        {
            "name": "both",
            "model": {"onnx": "m.onnx"},
            "data": {"calibration": {"npz": "x.npz"}, "evaluation": {"npz": "x.npz"}},
            "stages": [{"kind": "optimize"}],
            "variants": {"made": tail},
            "targets": [{"latency_seconds": 0.2}, {"latency_seconds": 0.2, **target}],
        },
        base=folder,
    )
    report = run(config, runs=folder / "runs")
    return report.candidate("made"), report


@needs_openvino
@pytest.mark.parametrize(("kind", "least_db"), [("fp32", 60.0), ("int8", 20.0)])
def test_openvino_takes_every_node_and_its_drift_from_the_cpu_is_told(
    tmp_path: Path, kind: str, least_db: float
) -> None:
    """Placement, drift between both and latency on each are in the report."""
    tail = [{"kind": "quantize_static"}] if kind == "int8" else []
    row, _ = both(tmp_path, {"provider": "openvino", "require_all": True}, model=cnn(), tail=tail)
    placed = row.details["placement"]["openvino"]
    assert placed["n_elsewhere"] == 0
    assert placed["nodes"][OPENVINO]["Conv"] == 3
    across = row.metric("across_sqnr_db", target="openvino")
    assert across.note.startswith("from cpu")
    assert across.value is None or across.value > least_db
    assert {metric.target for metric in row.metrics if metric.name == "latency_ratio"} == {"cpu", "openvino"}
    assert "cpu" not in row.details["placement"]


@needs_openvino
def test_what_openvino_cannot_do_is_refused_with_its_own_words(tmp_path: Path) -> None:
    """An option that it does not know is its error, and hardware that is not there is a fallback: neither runs on."""
    onnx.save(cnn(), tmp_path / "m.onnx")
    with pytest.raises(ProviderError, match=r"cannot open the model: .*nonesuch"):
        Session(tmp_path / "m.onnx", Target(provider="openvino", options={"nonesuch": 1}))
    with pytest.raises(ProviderError, match=OPENVINO):
        Session(tmp_path / "m.onnx", Target(provider="openvino", options={"device_type": "NPU"}))


def perceptron(last: str) -> onnx.ModelProto:
    """``x[N,16]`` to ``y[N,10]``: two products, a Relu between them, and one operator at the end."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["a"], name="relu"),
        helper.make_node("Gemm", ["a", "w2"], ["z"], name="second"),
        helper.make_node(last, ["z"], ["y"], name="last"),
    ]
    weights = {
        "w1": (rng.normal(size=(16, 32)) / 4).astype(np.float32),
        "w2": (rng.normal(size=(32, 10)) / 6).astype(np.float32),
    }
    return model_of(nodes, {"x": ["N", 16]}, {"y": ["N", 10]}, weights)


def test_a_plugin_library_runs_the_whole_model(tmp_path: Path) -> None:
    """A plugin that computes on any processor: registered, placed, compared with the CPU, timed."""
    library = library_of("onnxruntime_ggml", "lib/*onnxruntime_ggml.*")
    target = {"provider": "ggml", "library": str(library), "device": "cpu", "require_all": True}
    row, _ = both(tmp_path, target, model=perceptron("Softmax"), tail=[])
    assert row.details["placement"]["ggml cpu"]["nodes"] == {"ggml": {"Gemm": 2, "Relu": 1, "Softmax": 1}}
    assert row.metric("across_sqnr_db", target="ggml cpu").value > 40.0
    assert row.metric("latency_ratio", target="ggml cpu") is not None


def test_the_nodes_that_a_plugin_leaves_to_the_cpu_are_listed_or_refused(tmp_path: Path) -> None:
    """Softplus is none of its operators; with its option `partial` it takes the rest."""
    library = library_of("onnxruntime_ggml", "lib/*onnxruntime_ggml.*")
    onnx.save(perceptron("Softplus"), tmp_path / "m.onnx")
    target = Target(provider="ggml", library=library, options={"partial": 1})
    placed = placements(tmp_path / "m.onnx", [target])["ggml"]
    assert placed["nodes"] == {"ggml": {"Gemm": 2, "Relu": 1}, "CPUExecutionProvider": {"Softplus": 1}}
    assert placed["elsewhere"] == [{"name": "last", "op_type": "Softplus", "provider": "CPUExecutionProvider"}]
    with pytest.raises(ProviderError, match=r"runs 3 of 4 nodes") as error:
        Session(tmp_path / "m.onnx", target.model_copy(update={"require_all": True}))
    assert error.value.got == "last (Softplus)"
    with pytest.raises(ProviderError, match="takes no node"):
        Session(tmp_path / "m.onnx", target.model_copy(update={"options": {}}))


def test_openvinos_plugin_runs_or_says_that_it_finds_no_hardware(tmp_path: Path) -> None:
    """It computes on Intel's processors only: elsewhere it loads and offers nothing, which is told."""
    library = library_of("onnxruntime_ep_openvino", "*onnxruntime_providers_openvino_plugin.so")
    onnx.save(cnn(), tmp_path / "m.onnx")
    target = Target(provider="openvino", library=library)
    try:
        session = Session(tmp_path / "m.onnx", target)
    except ProviderError as e:
        assert "finds no hardware" in e.what
        assert not [device for device in ort.get_ep_devices() if device.ep_name == OPENVINO]
        return
    batch = samples_of(cnn(), 4)
    np.testing.assert_allclose(session.run(batch)["y"], Session(tmp_path / "m.onnx").run(batch)["y"], atol=1e-3)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxshrink.core.errors import DependencyError
from onnxshrink.core.report import Candidate, Metric, Report, Verdict
from onnxshrink.report import mlflow as module
from onnxshrink.report.mlflow import log_report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of mlflow's own dependencies
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # mlflow's file store will go one day
]


def report() -> Report:
    metrics = (
        Metric("latency_ratio", 0.6, "ratio", 0.5, 0.7, target="cpu, 1 thread"),
        Metric("sqnr_db", None, "dB", output="logits", note="identical"),
        Metric("top1", 0.9, "ratio"),
    )
    row = Candidate("int8", "variant", "m.onnx", "0", metrics, (Verdict("max_size", 1.0, "passed", "it fits"),))
    config = {"stages": [{"kind": "export", "opset": 20}], "seed": 0, "card": {}, "name": None, "long": "x" * 600}
    return Report("digits", config, (row,), (), "int8", "the smallest", {}, {}, 1.0)


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow with a store of files in a fresh folder."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    return mlflow


def test_a_report_is_logged_with_its_intervals_and_files(tracking: Any, tmp_path: Path) -> None:
    """Read back by MLflow's own client: settings by place, ends of intervals, tags, the files and the bundle."""
    folder = tmp_path / "run"
    (folder / "bundle").mkdir(parents=True)
    (folder / "variants").mkdir()
    for name in ("model.onnx", "report.json", "bundle/manifest.json", "variants/big.onnx"):
        (folder / name).write_text("x")
    log_report(report(), folder)
    client = tracking.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.run_name == "digits"
    assert run.data.params == {"stages.0.kind": "export", "stages.0.opset": "20", "seed": "0", "long": "x" * 500}
    ratio = "int8/latency_ratio/cpu_ 1 thread"
    assert run.data.metrics == {ratio: 0.6, f"{ratio}.lo": 0.5, f"{ratio}.hi": 0.7, "int8/top1": 0.9}
    assert {key: run.data.tags[key] for key in ("winner", "outcome.int8")} == {
        "winner": "int8",
        "outcome.int8": "passed",
    }
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"model.onnx", "report.json", "bundle"}


def test_a_report_joins_the_run_that_is_active(tracking: Any) -> None:
    """The user's own run gets the figures and goes on; no other is made."""
    with tracking.start_run() as active:
        log_report(report())
        assert tracking.active_run().info.run_id == active.info.run_id
    (run,) = tracking.MlflowClient().search_runs(["0"])
    assert run.data.metrics["int8/top1"] == 0.9


def test_without_mlflow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DependencyError, and the package that suffices."""

    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    with pytest.raises(DependencyError, match="pip install mlflow-skinny"):
        log_report(report())

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import onnxshrink, report_of
from onnx_models import cnn, samples_of

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float CNN, calibration and test samples; the test file calls its array something else."""
    model = cnn()
    onnx.save(model, str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "calib.npz", **samples_of(model, 32))
    x = samples_of(model, 48, seed=1)["x"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    np.savez(tmp_path / "test.npz", photos=x, labels=session.run(None, {"x": x})[0].argmax(1))
    return tmp_path


def test_quantize_writes_an_int8_model_and_says_what_it_cost(folder: Path) -> None:
    """One line from a float file to an int8 file; inputs are matched by order where names differ."""
    line = ("quantize", "model.onnx", "--data", "calib.npz", "-o", "int8.onnx", "--eval-data", "test.npz")
    result = onnxshrink(*line, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "int8.onnx" in result.stdout
    types = {node.op_type for node in onnx.load(folder / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types
    assert sorted(path.name for path in folder.iterdir()) == [
        "calib.npz",
        "int8.onnx",
        "int8.report.json",
        "model.onnx",
        "test.npz",
    ]
    report = report_of(onnxshrink(*line, "--json", cwd=folder))
    int8 = next(c for c in report["candidates"] if c["name"] == "int8")
    assert {m["name"] for m in int8["metrics"]} >= {"top1", "accuracy_drop", "sqnr_db", "size_bytes", "latency_ratio"}


def test_compare_judges_and_exits_accordingly(folder: Path) -> None:
    """A model against itself passes everything; a limit that is broken exits with 1."""
    same = onnxshrink("compare", "model.onnx", "model.onnx", "--data", "test.npz", "--min-sqnr-db", 90, cwd=folder)
    assert same.returncode == 0, same.stderr
    assert "same" in same.stdout
    onnxshrink("quantize", "model.onnx", "--data", "calib.npz", "-o", "int8.onnx", cwd=folder)
    line = ("compare", "model.onnx", "int8.onnx", "--data", "test.npz", "--min-sqnr-db")
    assert onnxshrink(*line, 5, cwd=folder).returncode == 0
    broken = onnxshrink(*line, 90, "--max-abs-error", "0 steps", "--min-top1-agreement", 0, cwd=folder)
    assert broken.returncode == 1
    said = " ".join(broken.stdout.split())
    assert "below the limit of 90 dB" in said
    assert "exceeds the limit of 0 steps" in said
    assert "such as '2 steps'" in onnxshrink(*line[:-1], "--max-abs-error", "2 dB", cwd=folder).stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("quantize", "none.onnx", "--data", "calib.npz", "-o", "o.onnx"), "none.onnx"),
        (("quantize", "calib.npz", "--data", "calib.npz", "-o", "o.onnx"), "cannot be read as an ONNX model"),
        (("quantize", "model.onnx", "--data", "none.npz", "-o", "o.onnx"), "none.npz"),
        (("quantize", "model.onnx", "--data", "model.onnx", "-o", "o.onnx"), "npz"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "no/o.onnx"), "mkdir -p no"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "model.onnx"), "overwrite"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "calib.npz"), "overwrite"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "."), "folder"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "o.onnx", "--exclude", "conv9"), "'conv"),
        (("quantize", "model.onnx", "--data", "calib.npz", "-o", "o.onnx", "--method", "best"), "percentile"),
        (("compare", "model.onnx", "none.onnx", "--data", "test.npz"), "none.onnx"),
        (("compare", "model.onnx", "model.onnx", "--data", "test.npz", "--metric", "top9"), "top1"),
        (
            ("compare", "model.onnx", "model.onnx", "--data", "calib.npz", "--max-accuracy-drop", "0.1"),
            "array 'labels'",
        ),
        (("compare", "model.onnx", "model.onnx", "--data", "calib.npz", "--metric", "top1"), "labels"),
    ],
)
def test_mistakes_on_the_command_line_are_told(folder: Path, line: tuple[str, ...], says: str) -> None:
    """Exit code 2, the fix in the message, no output file, no traceback."""
    result = onnxshrink(*line, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "o.onnx").exists()


def test_rows_of_equal_bytes_have_equal_times(folder: Path) -> None:
    """A candidate that is the reference itself is not timed again, and shows the same milliseconds."""
    report = report_of(onnxshrink("compare", "model.onnx", "model.onnx", "--data", "test.npz", "--json", cwd=folder))
    times = [[m for m in row["metrics"] if "latency" in m["name"]] for row in report["candidates"]]
    assert len(times) == 2
    assert times[0] == times[1]
    assert [m["value"] for m in times[0] if m["name"] == "latency_ratio"] == [1.0]

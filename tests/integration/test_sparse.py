"""A 2:4 network from torch to int8 on the real command line, beside the same one dense and one with fewer channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import make_project, onnxshrink
from onnx import numpy_helper

from onnxshrink.core.report import Candidate, Report

pytestmark = pytest.mark.slow

CONFIG = """\
model: {factory: "nets:build", inputs: {image: {shape: [batch, 1, 6, 6]}}, outputs: [logits]}
data:
  train:       {npz: data.npz, split: train}
  calibration: {npz: data.npz, split: calibration}
  evaluation:  {npz: data.npz, split: test, metric: top1}
stages: [{kind: finetune, epochs: 1}]
variants:
  dense: [{kind: export}, {kind: optimize}, {kind: quantize_static}]
  int8:
    - {kind: prune_weights, pattern: 2:4}
    - {kind: finetune, epochs: 2}
    - {kind: export}
    - {kind: optimize}
    - {kind: quantize_static}
  unsigned:
    - {kind: prune_weights, pattern: 2:4}
    - {kind: finetune, epochs: 2}
    - {kind: export}
    - {kind: optimize}
    - {kind: quantize_static, types: u8u8, granularity: per_tensor}
  cut:
    - {kind: prune_channels, pruning_ratio: 0.3, ignore: ["0"]}
    - {kind: export}
targets: [{latency_seconds: 0.2}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report, str]:
    """The run's folder, its report, and what was printed."""
    folder = tmp_path_factory.mktemp("sparse")
    make_project(folder)
    (folder / "cfg.yaml").write_text(CONFIG)
    result = onnxshrink("run", "cfg.yaml", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runs" / "cfg", Report.read(folder / "runs/cfg/report.json"), " ".join(result.stdout.split())


def weights(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The quantized weights of a file as real numbers."""
    model = onnx.load(path)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors and tensors[node.input[0]].ndim > 1:
            values, scale, zero = (tensors[name].astype(np.float64) for name in node.input)
            along = (-1, *[1] * (values.ndim - 1)) if scale.ndim else ()
            found[node.input[0]] = (values - zero.reshape(along)) * scale.reshape(along)
    return found


def value(row: Candidate, name: str) -> float:
    metric = row.metric(name)
    assert metric is not None
    assert metric.value is not None
    return metric.value


@pytest.mark.parametrize("variant", ["int8", "unsigned"])
def test_the_pattern_holds_in_the_quantized_file(run: tuple[Path, Report, str], variant: str) -> None:
    """After training, export, folding and rounding, two of every four weights along the inputs are exactly zero."""
    found = weights(run[0] / "variants" / variant / "model.onnx")
    assert len(found) == 3
    for values in found.values():
        flat = values.reshape(len(values), -1)
        groups = np.pad(flat, ((0, 0), (0, -flat.shape[1] % 4))).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) <= 2).all()
        assert np.count_nonzero(flat) > 0.4 * flat.size


def test_the_report_says_what_zeros_are_good_for(run: tuple[Path, Report, str]) -> None:
    """The compressed file is smaller, the file and the MACs are not, and the words say so."""
    _, report, printed = run
    int8, dense = report.candidate("int8"), report.candidate("dense")
    assert value(int8, "size_bytes") == pytest.approx(value(dense, "size_bytes"), rel=0.01)
    assert value(int8, "compressed_bytes") < 0.85 * value(dense, "compressed_bytes")
    assert value(int8, "macs") == value(dense, "macs")
    said = [text for text in report.warnings if "of the weights are zero" in text]
    assert [text.partition(":")[0] for text in said] == ["int8", "unsigned"]
    assert all("50%" in text and "nothing is faster" in text for text in said)
    assert "compressed: unpruned" in printed


def test_fewer_macs_are_compared_with_what_was_cut(run: tuple[Path, Report, str]) -> None:
    """Only `cut` has less work; whether it is faster is measured against the network before, and said once."""
    _, report, printed = run
    share = value(report.candidate("cut"), "macs") / value(report.candidate("unpruned"), "macs")
    assert share < 0.9
    said = [text for text in report.warnings if "fewer MACs" in text]
    assert all(text.startswith("cut:") for text in said)
    assert all(f"{share:.2f} of the MACs of unpruned" in text for text in said)
    assert "MACs of a sample: unpruned" in printed

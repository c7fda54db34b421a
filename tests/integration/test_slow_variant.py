"""A quantized variant may be slower than the float model; whoever selects it is told."""

from __future__ import annotations

from io import StringIO
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_models import model_of, samples_of
from rich.console import Console

from onnxshrink.config.load import validate
from onnxshrink.core.report import Report
from onnxshrink.pipeline import run
from onnxshrink.report.terminal import print_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run on a network whose every integer Add lies between two float operators, beside the float model itself."""
    folder = tmp_path_factory.mktemp("slow")
    names = ["x", *(f"t{i}" for i in range(16))]
    nodes = [
        helper.make_node("Neg", [a], [b]) if place % 2 else helper.make_node("Add", [a, "one"], [b])
        for place, (a, b) in enumerate(pairwise(names))
    ]
    one = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    model = model_of(nodes, {"x": ["N", 64, 512]}, {names[-1]: ["N", 64, 512]}, {"one": one})
    onnx.save(model, str(folder / "model.onnx"))
    np.savez(folder / "data.npz", **samples_of(model, 8))
    document = {
        "name": "slow",
        "model": {"onnx": "model.onnx"},
        "data": {"calibration": {"npz": "data.npz"}, "evaluation": {"npz": "data.npz"}},
        "variants": {"int8": [{"kind": "quantize_static", "types": "u8s8", "op_types": ["Add"]}]},
        "targets": [{"latency_seconds": 0.5}],
    }
    return run(validate(document, base=folder), runs=folder / "runs", base=folder)


def test_a_slow_winner_is_selected_only_with_the_reason(report: Report) -> None:
    """The only variant wins, its measured latency is beyond doubt above fp32's, and the selection says so."""
    (ratio,) = (metric for metric in report.candidate("int8").metrics if metric.name == "latency_ratio")
    assert ratio.lo is not None
    assert ratio.lo > 1
    assert report.winner == "int8"
    assert f"slower than the reference on {ratio.target}: {ratio.value:.2f} times its latency" in report.selection


def test_the_terminal_shows_it(report: Report) -> None:
    """What the selection says of the speed reaches whoever reads the terminal."""
    console = Console(width=120, record=True, file=StringIO())
    print_report(report, console)
    assert "slower than the reference" in " ".join(console.export_text().split())

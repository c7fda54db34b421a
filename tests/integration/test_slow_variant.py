"""A quantized variant may be slower than the float model; whoever selects it is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of
from rich.console import Console

from onnxshrink.config.load import validate
from onnxshrink.core.report import Report
from onnxshrink.pipeline import run
from onnxshrink.report.terminal import print_report
from onnxshrink.verify import verify
from onnxshrink.verify.latency import Run, measure_pairs
from onnxshrink.verify.times import PairedTimes

MS = 1_000_000


def measured(*_: Callable[[], Run], **settings: Any) -> PairedTimes:
    """Pairs on a clock that only the models move: the reference by a millisecond, the candidate by two."""
    now = [0]

    def of(ns: int) -> Callable[[], Run]:
        def call() -> None:
            now[0] += ns

        return lambda: call

    def clock() -> int:
        return now[0]

    return measure_pairs(of(MS), of(2 * MS), **settings | {"clock": clock, "cpu_clock": clock})


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    """A run whose int8 model takes twice as long as the float model."""
    folder: Path = tmp_path_factory.mktemp("slow")
    onnx.save(cnn(), str(folder / "model.onnx"))
    np.savez(folder / "data.npz", **samples_of(cnn(), 8))
    document = {
        "name": "slow",
        "model": {"onnx": "model.onnx"},
        "data": {"calibration": {"npz": "data.npz"}, "evaluation": {"npz": "data.npz"}},
        "variants": {"int8": [{"kind": "quantize_static"}]},
        "targets": [{"latency_seconds": 0.5}],
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(verify, "measure_pairs", measured)
        yield run(validate(document, base=folder), runs=folder / "runs", base=folder)


def test_a_slow_winner_is_selected_only_with_the_reason(report: Report) -> None:
    """The only variant wins, its measured latency is beyond doubt above fp32's, and the selection says so."""
    (ratio,) = (metric for metric in report.candidate("int8").metrics if metric.name == "latency_ratio")
    assert (ratio.value, ratio.lo) == (pytest.approx(2.0), pytest.approx(2.0))
    assert report.winner == "int8"
    assert f"slower than the reference on {ratio.target}: {ratio.value:.2f} times its latency" in report.selection


def test_the_terminal_shows_it(report: Report) -> None:
    """What the selection says of the speed reaches whoever reads the terminal."""
    console = Console(width=120, record=True, file=StringIO())
    print_report(report, console)
    assert "slower than the reference" in " ".join(console.export_text().split())

"""The budget search on the command line: what it writes, what it says, how it refuses, and that it goes on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import PATIENCE, environment, onnxshrink, report_of
from onnx_models import cnn, samples_of

from onnxshrink import recipes

pytestmark = pytest.mark.slow

# The command line, interrupted from within when its third trial has been written: nobody watching is surely in time.
INTERRUPTED = """
import os
import signal

from onnxshrink.__main__ import main
from onnxshrink.search.record import Record

add, trials = Record.add, []


def interrupt(record, trial):
    add(record, trial)
    trials.append(trial)
    if len(trials) == 3:
        os.kill(os.getpid(), signal.SIGINT)


Record.add = interrupt
main()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A float CNN, calibration samples, and samples with the labels that it gives them itself."""
    model = cnn()
    onnx.save(model, str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "calib.npz", **samples_of(model, 32))
    x = samples_of(model, 64, seed=1)["x"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    np.savez(tmp_path / "labelled.npz", x=x, labels=session.run(None, {"x": x})[0].argmax(1))
    return tmp_path


def test_fit_writes_the_model_beside_the_original_and_says_where(folder: Path) -> None:
    """The issue's own line; a second one is answered from what is known; everything fits 80 columns."""
    line = ("fit", "model.onnx", "--data", "labelled.npz", "--max-size", "2kB", "--max-drop", "0.5")
    first = onnxshrink(*line, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "wrote model.fit.onnx" in " ".join(first.stdout.split())
    assert max(map(len, first.stdout.splitlines())) <= 80
    assert (folder / "model.fit.onnx").stat().st_size <= 2000
    assert (folder / "model.fit.report.json").is_file()
    search = json.loads((folder / "runs/fit-model/search.json").read_text())
    rows = list(csv.DictReader((folder / "runs/fit-model/search.csv").read_text().splitlines()))
    assert len(rows) == len(search["trials"])
    assert all("latency_ratio" in {m["name"] for m in search["trials"][n]["metrics"]} for n in search["finalists"])
    again = onnxshrink(*line, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"goes on from {len(rows)} trials" in again.stderr
    assert "trial 0" not in again.stderr


def test_where_nothing_fits_it_says_what_to_relax_and_writes_no_model(folder: Path) -> None:
    """Exit code 1; the smallest found that keeps the quality; with that limit the same search finds it."""
    line = ("fit", "model.onnx", "--data", "calib.npz", "-o", "out.onnx", "--min-sqnr-db", 30, "--max-size")
    refused = onnxshrink(*line, "300 B", cwd=folder)
    assert refused.returncode == 1, refused.stderr
    said = " ".join(refused.stdout.split())
    assert "no model was written to out.onnx" in said
    assert not (folder / "out.onnx").exists()
    wanted = said.partition("relax max_size to ")[2].partition(":")[0]
    assert onnxshrink(*line, wanted, "--quiet", cwd=folder).returncode == 0
    assert (folder / "out.onnx").is_file()


def test_json_is_the_report_and_nothing_else(folder: Path) -> None:
    """For scripts: the report on standard output, whatever the outcome."""
    line = ("fit", "model.onnx", "--data", "calib.npz", "--max-size", "2kB", "--json", "--workers", 2)
    report = report_of(onnxshrink(*line, cwd=folder))
    assert report["winner"] is not None


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (("--data", "calib.npz"), "--max-size"),
        (("--data", "calib.npz", "--max-drop", "0.01"), "'labels'"),
        (("--data", "labelled.npz", "--eval-data", "calib.npz", "--max-drop", "0.01"), "'labels'"),
        (("--data", "none.npz", "--max-size", "2kB"), "none.npz"),
        (("--data", "calib.npz", "--max-size", "2kilo"), "60 kB"),
        (("--data", "calib.npz", "--max-size", "2kB", "--time-limit", "soon"), "20 min"),
        (("--data", "calib.npz", "--max-size", "2kB", "-o", "model.onnx"), "overwrite"),
        (("--data", "calib.npz", "--max-size", "2kB", "--minimize", "drift"), "accuracy_drop"),
    ],
)
def test_mistakes_are_told_before_any_work(folder: Path, line: tuple[str, ...], says: str) -> None:
    """Exit code 2 with the fix, and no folder of trials."""
    result = onnxshrink("fit", "model.onnx", *line, cwd=folder)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (folder / "runs").exists()


def test_ctrl_c_leaves_no_half_file_and_the_same_line_goes_on(folder: Path) -> None:
    """The message says so, and nothing that was finished is done again."""
    line = ("fit", "model.onnx", "--data", "calib.npz", "--max-size", "2kB")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", INTERRUPTED, *line],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 130, done.stderr
    assert "the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (folder / "runs/fit-model").exists()
    assert not (folder / "model.fit.onnx").exists()
    again = onnxshrink(*line, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "search goes on from 3 trials" in again.stderr


def test_the_recipe_with_a_budget_runs(tmp_path: Path) -> None:
    """A tiny version of it: less training, two widths, a limit that is easily kept."""
    recipe = Path(recipes.__file__).with_name("digits_budget.yaml")
    tiny = {
        "stages[0].epochs": 1,
        "stages[0].teacher.train.epochs": 1,
        "stages[2].epochs": 1,
        "stages[2].teacher.train.epochs": 1,
        "budget.max_accuracy_drop": 1.0,
        "budget.max_trials": 2,
        "budget.families": "[fp16]",
        "budget.max_size": "30 kB",
        "budget.vary": "{model.args.width: [8, 16], 'stages[1].pruning_ratio': [0.35]}",
        "targets[0].latency_seconds": 0.2,
    }
    settings = [text for path, value in tiny.items() for text in ("--set", f"{path}={value}")]
    result = onnxshrink("run", recipe, *settings, "--runs", tmp_path / "runs", cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    search = json.loads((tmp_path / "runs/digits_budget/search.json").read_text())
    assert search["counts"]["evaluated"] == 2
    assert {"width", "pruning_ratio"} <= set(result.stdout.split())  # what the names of the report stand for
    assert not [line for line in result.stderr.splitlines() if line.startswith("cached")]

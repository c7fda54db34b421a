"""A packaged variant from the command line: its files, its evidence, its card, and that both are kept up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import onnxruntime as ort
import pytest
from command_line import environment, onnxshrink

from onnxshrink.core.report import Report

pytestmark = pytest.mark.slow

CONFIG = """\
model: {onnx: model.onnx}
data:
  calibration: {npz: calib.npz}
  evaluation: {npz: test.npz}
variants:
  int8: [{kind: quantize_static}, {kind: package_ort}]
targets: [{latency_seconds: 0.1}]
card: {license: mit}
"""
PACKAGE = {"model.ort", "model.with_runtime_opt.ort", "required_operators_and_types.config"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packaged run of a small network."""
    folder = tmp_path_factory.mktemp("package")
    onnx.save(nets.cnn(), folder / "model.onnx")
    for name, count, seed in (("calib", 32, 1), ("test", 64, 2)):
        np.savez(folder / f"{name}.npz", **nets.samples_of(nets.cnn(), count, seed=seed))
    (folder / "cfg.yaml").write_text(CONFIG)
    done = onnxshrink("run", "cfg.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_files_lie_beside_the_model(project: Path) -> None:
    """In the variant's folder, at the top, and in the bundle, which passes."""
    run = project / "runs/cfg"
    for folder in (run, run / "variants/int8", run / "bundle"):
        assert {path.name for path in folder.iterdir()} >= PACKAGE | {"model.onnx"}
    samples = dict(np.load(project / "test.npz"))
    models = [run / "variants/int8" / name for name in ("model.onnx", "model.ort")]
    want, got = (ort.InferenceSession(str(path)).run(None, samples)[0] for path in models)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert onnxshrink("check", "runs/cfg/bundle", cwd=project).returncode == 0


def test_the_report_has_the_evidence(project: Path) -> None:
    """Drift and times of every file, and the stage's facts."""
    report = Report.read(project / "runs/cfg/report.json")
    details = report.candidate("int8").details
    assert {found["file"] for found in details["package"].values()} == PACKAGE - {"required_operators_and_types.config"}
    assert all(found["outputs"]["y"]["max_abs_error"] < 1e-6 for found in details["package"].values())
    assert details["package_times"]["cpu"]["files"]["fixed"]["latency_ratio"]["value"] > 0
    (step,) = (step for step in report.steps if step.kind == "package_ort")
    assert {found["provider"] for found in step.facts["mobile"]} >= {"nnapi", "coreml_ml_program"}


def test_the_card_tells_the_run_and_its_code_runs(project: Path) -> None:
    """`MODEL_CARD.md` has the licence of the config and the size of the report; its Python and shell blocks run."""
    run = project / "runs/cfg"
    text = (run / "MODEL_CARD.md").read_text(encoding="utf-8")
    size = Report.read(run / "report.json").candidate("int8").metric("size_bytes")
    assert size is not None
    assert size.value is not None
    assert f"| model.onnx | {int(size.value):,} |" in text
    assert "license: mit\n" in text
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(code) == 2
    (shell,) = re.findall(r"```sh\npython (.*?)\n```", text)
    for command in (*(["-c", block] for block in code), shell.split()):
        done = subprocess.run(
            [sys.executable, *command], cwd=run, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_card_can_be_written_anew(project: Path) -> None:
    """From the report alone, byte by byte the same; a folder without a report is a mistake that is told."""
    card = project / "runs/cfg/MODEL_CARD.md"
    before = card.read_bytes()
    card.unlink()
    assert onnxshrink("card", "runs/cfg", cwd=project).returncode == 0
    assert card.read_bytes() == before
    assert onnxshrink("card", "runs", cwd=project).returncode == 2


def test_a_run_without_the_package_leaves_none_of_it(project: Path) -> None:
    """The next run of the same name takes away the files and the card of the last, and nothing of the user's."""
    run = project / "runs/cfg"
    (run / "notes.txt").write_text("mine")
    (project / "cfg.yaml").write_text(CONFIG.replace(", {kind: package_ort}", "") + "gates: {max_size: 1 B}\n")
    assert onnxshrink("run", "cfg.yaml", cwd=project).returncode == 1
    left = {path.name for path in run.iterdir()}
    assert not left & (PACKAGE | {"MODEL_CARD.md", "model.onnx", "bundle"})
    assert "notes.txt" in left
    assert onnxshrink("card", "runs/cfg", cwd=project).returncode == 1

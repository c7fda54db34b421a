from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, make_project, onnxshrink, report_of

from onnxshrink.core.report import Report
from onnxshrink.regress.check import check_bundle

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose config has been run once."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    result = onnxshrink("run", "cfg.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_a_run_leaves_a_bundle_of_its_winner(project: Path) -> None:
    """With the winner's bytes, the report's metrics and the config without a path; the report tells of it."""
    run = project / "runs" / "cfg"
    manifest = json.loads((run / "bundle" / "manifest.json").read_text())
    report = Report.read(run / "report.json")
    winner = report.candidate(str(report.winner))
    assert (run / "bundle" / "model.onnx").read_bytes() == (run / "model.onnx").read_bytes()
    assert manifest["variant"] == winner.name == "int8"
    assert [metric["name"] for metric in manifest["metrics"]] == [metric.name for metric in winner.metrics]
    assert winner.details["bundle"]["n_samples"] == manifest["golden"]["n_samples"] == 16
    assert str(project.parent) not in json.dumps(manifest)
    assert manifest["config"]["variants"]["int8"][0]["kind"]
    assert manifest["model"]["op_types"]["QuantizeLinear"] > 0


def test_the_bundle_passes_with_our_command_and_alone(project: Path) -> None:
    """The command and the file in the bundle say the same, and a changed weight fails both."""
    bundle = project / "runs" / "cfg" / "bundle"
    ours = onnxshrink("check", bundle, "--json", cwd=project)
    assert ours.returncode == 0, ours.stdout + ours.stderr
    alone = [sys.executable, "-I", "-W", "error", str(bundle / "check.py"), "--json"]
    told = subprocess.run(alone, capture_output=True, text=True, check=False, env=environment())
    assert told.returncode == 0, told.stdout + told.stderr
    items = [[(i["name"], i["outcome"]) for i in json.loads(text)["items"]] for text in (ours.stdout, told.stdout)]
    assert items[0] == items[1]
    fp32 = onnxshrink("check", bundle, "runs/cfg/variants/fp32/model.onnx", "--no-latency", cwd=project)
    assert fp32.returncode == 1
    assert "max_abs_error logits" in fp32.stdout


def test_a_second_run_replaces_the_bundle_and_keeps_notes(project: Path) -> None:
    """Golden samples are the same again; what somebody put beside the bundle stays."""
    run = project / "runs" / "cfg"
    before = {path.name: path.read_bytes() for path in (run / "bundle").glob("*.npz")}
    (run / "note.md").write_text("ours")
    (run / "bundle" / "model.onnx").write_bytes(b"")
    report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=project))
    assert {path.name: path.read_bytes() for path in (run / "bundle").glob("*.npz")} == before
    assert check_bundle(run / "bundle").outcome == "passed"
    assert (run / "note.md").read_text() == "ours"


def test_a_run_without_a_winner_leaves_no_bundle(project: Path) -> None:
    """Neither a new one nor the one of the run before."""
    result = onnxshrink("run", "cfg.yaml", "--json", "--set", "gates.max_size=1 kB", cwd=project)
    assert result.returncode == 1
    assert not (project / "runs" / "cfg" / "bundle").exists()
    assert [path.name for path in (project / "runs").glob(".bundle*")] == []


def test_the_command_loads_no_framework(project: Path) -> None:
    """A check needs numpy and onnxruntime: torch, onnx and pydantic are not even looked for."""
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'pydantic', 'pydantic_core'): sys.modules[name] = None\n"
        "from onnxshrink.commands.check import check\n"
        "from pathlib import Path\n"
        "sys.exit(check(Path('runs/cfg/bundle')))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=project, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("passed")

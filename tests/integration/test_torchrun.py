"""A whole run under torchrun: several processes train, and one does the rest."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import PATIENCE, cached, command, environment, make_project

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python")

pytestmark = pytest.mark.slow

NETS = """\
from torch import nn


def build(width=16):
    print("a network of the user's")
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )
"""

CONFIG = """\
model: {factory: "nets:build", inputs: {image: {shape: [batch, 1, 6, 6]}}, outputs: [logits]}
data:
  train:       {npz: data.npz, split: train}
  calibration: {npz: data.npz, split: calibration}
  evaluation:  {npz: data.npz, split: test, metric: top1}
stages:
  - kind: distill
    teacher: {factory: "nets:build", args: {width: 24}, train: {epochs: 3, batch_size: 36}}
    epochs: 3
    batch_size: 36
  - {kind: prune_channels, pruning_ratio: 0.25, steps: 2, finetune: {epochs: 2, batch_size: 36}}
  - {kind: finetune, epochs: 2, batch_size: 36}
variants:
  fp32: [{kind: export}]
  int8: [{kind: export}, {kind: quantize_static}]
  small:
    - {kind: prune_channels, pruning_ratio: 0.25}
    - {kind: finetune, epochs: 2, batch_size: 36}
    - {kind: export}
  impossible: [{kind: prune_channels, max_size: 10 B}, {kind: finetune}, {kind: export}]
targets: [{latency_seconds: 0.05}]
"""

# Runs the command line as torchrun would; all processes but the first lie on a machine of their own.
APART = """\
import os
import sys
import tempfile
from onnxshrink.__main__ import main
from onnxshrink.runtime import processes

if os.environ["RANK"] != "0":
    is_here = processes._is_here
    own = tempfile.tempdir = sys.argv.pop()
    processes._is_here = lambda path, digest: str(path).startswith(own) and is_here(path, digest)
    os.chdir(own)
else:
    sys.argv.pop()
main()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project and what one process made of it, in ``alone``."""
    folder = tmp_path_factory.mktemp("project")
    make_project(folder)
    (folder / "nets.py").write_text(NETS)
    (folder / "cfg.yaml").write_text(CONFIG)
    result = start(command("run", "cfg.yaml", "--runs", "alone"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def surroundings() -> dict[str, str]:
    """Where this repository's package is the one that is imported."""
    return environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def start(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with this repository's package."""
    return subprocess.run(
        arguments, cwd=cwd, env=surroundings(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes."""
    return start([sys.executable, *LAUNCHER, *map(str, arguments)], cwd)


def report_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "cfg" / "report.json").read_text())
    return report


def curves(report: dict[str, Any]) -> dict[str, list[float]]:
    """The losses of every step that trained."""
    steps = ((step["name"], step["facts"].get("epochs", [])) for step in report["steps"])
    return {name: [epoch["loss"] for epoch in epochs] for name, epochs in steps if epochs}


@pytest.fixture(scope="module")
def shared(project: Path) -> tuple[dict[str, Any], str]:
    """What two processes made of the project: the report in ``runs``, and what they said."""
    result = torchrun(*command("run", "cfg.yaml"), cwd=project)
    assert result.returncode == 0, result.stderr
    return report_in(project / "runs"), result.stdout + result.stderr


def test_two_processes_learn_what_one_does(project: Path, shared: tuple[dict[str, Any], str]) -> None:
    """Every training has the loss curve of one process with the same global batch."""
    report, _ = shared
    alone, both = curves(report_in(project / "alone")), curves(report)
    assert set(alone) == set(both)
    assert len(alone) == 5
    for name, losses in alone.items():
        np.testing.assert_allclose(both[name], losses, atol=1e-4, err_msg=name)
    for step in report["steps"]:
        assert step["facts"].get("processes") == (2 if step["name"] in both else None)


def test_what_does_not_train_is_done_once(project: Path, shared: tuple[dict[str, Any], str]) -> None:
    """By the first process, which alone speaks; every model is there, and what cannot be made is told once."""
    report, said = shared
    lines = said.splitlines()
    assert [row["name"] for row in report["candidates"]] == [
        row["name"] for row in report_in(project / "alone")["candidates"]
    ]
    assert {path.name for path in (project / "runs").iterdir()} == {"cfg", ".store", ".cfg.lock"}
    assert not any((project / "runs" / ".store" / "work").iterdir())
    for step in report["steps"]:
        assert sum(line.endswith(f" s  {step['name']}") for line in lines) == 1, step["name"]
    assert sum("report  runs/cfg/report.json" in line for line in lines) == 1
    assert sum("…  impossible/prune_channels" in line for line in lines) == 1
    assert "warning: " not in said.lower()


@pytest.mark.usefixtures("shared")
def test_the_second_run_finds_everything(project: Path) -> None:
    """Run by two processes or by one, after a run by two."""
    for run in (torchrun(*command("run", "cfg.yaml"), cwd=project), start(command("run", "cfg.yaml"), cwd=project)):
        assert run.returncode == 0, run.stderr
        assert all(cached(report_in(project / "runs")).values())


@pytest.fixture
def elsewhere(project: Path, tmp_path: Path) -> Path:
    """What a second machine has: the config, the code and the data."""
    for name in ("cfg.yaml", "nets.py", "data.npz"):
        shutil.copy(project / name, tmp_path)
    (tmp_path / "apart.py").write_text(APART)
    return tmp_path


def apart(project: Path, elsewhere: Path) -> subprocess.CompletedProcess[str]:
    """Run the config by two processes without a common disk, each in its own folder."""
    script = [sys.executable, "-W", "error", elsewhere / "apart.py", "run", "cfg.yaml", "--runs", "apart", elsewhere]
    return torchrun(*script, cwd=project)


def test_machines_need_no_common_disk(project: Path, shared: tuple[dict[str, Any], str], elsewhere: Path) -> None:
    """What the first process makes is sent to the others: the same weights as with a common disk."""
    result = apart(project, elsewhere)
    assert result.returncode == 0, result.stderr
    there, here = report_in(project / "apart"), shared[0]
    assert curves(there) == curves(here)
    digests = {step["name"]: step["digest"] for step in here["steps"] if step["kind"] in {"distill", "finetune"}}
    assert digests.items() <= {step["name"]: step["digest"] for step in there["steps"]}.items()
    assert not (elsewhere / "apart").exists()


def test_a_machine_with_other_data_ends_the_run(project: Path, elsewhere: Path) -> None:
    """Its message is told, and nobody waits for it."""
    data = dict(np.load(elsewhere / "data.npz"))
    np.savez(elsewhere / "data.npz", **data | {"image": data["image"] + 1})
    shutil.rmtree(project / "apart", ignore_errors=True)
    result = apart(project, elsewhere)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert "error: process 1 does not have what the first one has" in result.stderr


def test_a_mistake_is_told_once(project: Path) -> None:
    """By the first process, whose exit status is the one without torchrun."""
    result = torchrun(*command("run", "cfg.yaml", "--set", "stages[0].epocs=2"), cwd=project)
    assert result.returncode != 0
    assert result.stderr.count("error: unknown option 'epocs'") == 1
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", result.stderr)


@pytest.mark.usefixtures("shared")
def test_where_nothing_trains_one_process_works(project: Path, tmp_path: Path) -> None:
    """And says so."""
    (tmp_path / "onnx.yaml").write_text(
        f"model: {{onnx: {project}/runs/cfg/reference/model.onnx}}\n"
        "variants: {dynamic: [{kind: quantize_dynamic}]}\ntargets: [{latency_seconds: 0.05}]\n"
    )
    result = torchrun(*command("run", "onnx.yaml"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning nothing in this config trains") == 1
    assert result.stdout.count("runs/onnx/report.json") == 1


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGKILL])
def test_an_end_ends_all_and_is_gone_on_from(project: Path, name: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C at the launcher, or a lost process: nobody is left, and the finished steps are kept."""
    arguments = command("run", "cfg.yaml", "--runs", tmp_path, "--set", "stages[0].epochs=100000")
    launcher = [sys.executable, *LAUNCHER, *arguments]
    with subprocess.Popen(
        launcher, cwd=project, env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stderr is not None
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "distill, loss" in line:
                break
        if name == signal.SIGINT:
            run.send_signal(name)
        else:
            children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
            os.kill(int(children[-1]), name)
        rest = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode != 0
    assert "bug in onnxshrink" not in rest
    assert rest.count("interrupted: ") == (1 if name == signal.SIGINT else 0)
    result = torchrun(*command("run", "cfg.yaml", "--runs", tmp_path), cwd=project)
    assert result.returncode == 0, result.stderr
    assert cached(report_in(tmp_path))["distill ▸ finetune"]

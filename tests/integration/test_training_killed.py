"""kill -9 in the middle of a training: the same command goes on, and ends with the weights of an unbroken run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PATIENCE, environment, make_project, onnxshrink, report_of

CONFIG = """\
model: {factory: "nets:build", inputs: {image: {shape: [batch, 1, 6, 6]}}, outputs: [logits]}
data:
  train:      {npz: data.npz, split: train}
  evaluation: {npz: data.npz, split: test, metric: top1}
stages:
  - kind: finetune
    epochs: 14
    batch_size: 8
    ema_decay: 0.9
    early_stopping: {patience: 300}
    checkpoint_minutes: 0.0001
  - {kind: export}
variants: {fp32: []}
targets: [{latency_seconds: 0.05}]
"""
# 160 samples, and 16 where they are those of the calibration; of both a tenth is held out.
STEPS = {"labels": 14 * 18, "quantization": 120 * 2}
SIMULATED = CONFIG.replace(
    "  evaluation:", "  calibration: {npz: data.npz, split: calibration}\n  evaluation:"
).replace("    epochs: 14\n", "    epochs: 120\n    simulate: {kind: quantize_static}\n")

# The command line, killed on the way to the next checkpoint once there is one of the step that is asked for or of a
# later one: nobody has to look in time.
KILLED = """
import os
import signal
import sys

from onnxshrink.__main__ import main
from onnxshrink.stages.checkpoint import Checkpoints

at, save, done = int(sys.argv.pop(1)), Checkpoints.save, [0]


def save_or_end(checkpoints, step, state):
    if done[0] >= at:
        os.kill(os.getpid(), signal.SIGKILL)
    save(checkpoints, step, state)
    done[0] = step


Checkpoints.save = save_or_end
main()
"""


def _project(folder: Path, what: str) -> Path:
    folder.mkdir()
    config = make_project(folder)
    config.write_text(CONFIG if what == "labels" else SIMULATED)
    return config


def _kill_after(config: Path, step: int) -> None:
    """A run that is killed once a checkpoint of ``step`` or a later one is there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(step), "run", config, "--json"],
        cwd=config.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def _checkpointed(config: Path) -> int:
    names = [path.name for path in config.parent.glob("runs/.store/partial/*/*.pt")]
    return max((int(name.split("-")[1]) for name in names), default=0)


def _finetuned(config: Path) -> dict[str, Any]:
    """The record of the step that trains."""
    report = report_of(onnxshrink("run", config, "--json", cwd=config.parent))
    step: dict[str, Any] = next(step for step in report["steps"] if step["kind"] == "finetune")
    return step


@pytest.mark.slow
@pytest.mark.parametrize("what", ["labels", "quantization"])
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path: Path, what: str) -> None:
    """Killed twice; the artifact's digest is that of a run that nobody disturbed, and nothing half-done is left."""
    unbroken = _finetuned(_project(tmp_path / "unbroken", what))
    assert "resumed_from_step" not in unbroken["facts"]
    config = _project(tmp_path / "killed", what)
    _kill_after(config, 60)
    first = _checkpointed(config)
    _kill_after(config, first + 60)
    second = _checkpointed(config)
    assert 60 <= first < second < STEPS[what]
    resumed = _finetuned(config)
    assert resumed["facts"]["resumed_from_step"] == second
    assert not resumed["cached"]
    assert resumed["digest"] == unbroken["digest"]
    assert resumed["facts"]["epochs"] == unbroken["facts"]["epochs"]
    assert list(config.parent.glob("runs/.store/partial/*")) == []
    assert list(config.parent.glob("runs/.store/work/*")) == []

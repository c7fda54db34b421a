"""The real command line in a subprocess, and a small project of a user's to run it on."""

from __future__ import annotations

import codecs
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

LOOKS = frozenset({
    "COLUMNS", "LINES", "TERMINAL_WIDTH", "JUPYTER_COLUMNS", "JUPYTER_LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE",
    "FORCE_COLOR", "NO_COLOR", "COLORTERM", "PY_COLORS", "CLICOLOR", "CLICOLOR_FORCE", "GITHUB_ACTIONS",
})  # fmt: skip
"""Variables that change how output looks."""

PATIENCE = 600
"""Seconds that nothing takes: what waits so long for a process waits for ever."""

NETS = """\
from torch import nn

from shapes import WIDTH


def build(width=WIDTH):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
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
  - {kind: distill, teacher: {factory: "nets:build", args: {width: 48}, train: {epochs: 2}}, epochs: 2}
  - {kind: prune_channels, pruning_ratio: 0.25}
  - {kind: finetune, epochs: 1}
  - {kind: export}
  - {kind: optimize}
variants:
  fp32: []
  int8: [{kind: quantize_static}]
targets: [{latency_seconds: 0.2}]
gates: {max_accuracy_drop: 1.0, min_sqnr_db: 5, max_size: 1 MB}
"""


def make_project(folder: Path) -> Path:
    """A config with a network, a module it imports, and data; returns the config's path."""
    (folder / "nets.py").write_text(NETS)
    (folder / "shapes.py").write_text("WIDTH = 32\n")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    image = rng.normal(size=(240, 1, 6, 6)) + labels[:, None, None, None]
    split = np.array(["train"] * 160 + ["calibration"] * 16 + ["test"] * 64)
    np.savez(folder / "data.npz", image=image.astype(np.float32), labels=labels, split=split)
    config = folder / "cfg.yaml"
    config.write_text(CONFIG)
    return config


def command(*arguments: object) -> list[str]:
    """The command line, with warnings as errors."""
    return [sys.executable, "-W", "error", "-m", "onnxshrink", *map(str, arguments)]


def onnxshrink(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def talk(*arguments: object, answers: Sequence[tuple[str, str]], cwd: Path) -> tuple[int, str]:
    """Run the command line in a terminal of its own, and answer what it asks.

    Args:
        arguments: Of the command line.
        answers: The end of each question, in order, and the keys that answer it.
        cwd: The working folder.

    Returns:
        The exit status, and all that stood on the terminal.
    """
    here, there = pty.openpty()
    # The terminal becomes the one that Ctrl-C comes from.
    owning = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", owning, *command(*arguments)],
        cwd=cwd,
        env=environment(),
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
    ) as process:
        os.close(there)
        shown, waiting, asked, end = "", list(answers), 0, time.monotonic() + PATIENCE
        decoder = codecs.getincrementaldecoder("utf-8")()  # a piece may end within a character
        while time.monotonic() < end:
            if not select.select([here], [], [], 0.2)[0]:
                continue
            try:
                shown += decoder.decode(os.read(here, 4096))
            except OSError:  # so Linux tells that the other end is closed
                break
            if waiting and shown[asked:].rstrip().endswith(waiting[0][0]):
                asked = len(shown)
                os.write(here, waiting.pop(0)[1].encode())
        else:
            process.kill()
        os.close(here)
    assert not waiting, f"{waiting[0][0]} was not asked\n{shown}"
    return process.returncode, shown


def environment() -> dict[str, str]:
    """This process's, without what would change how output looks."""
    return {key: value for key, value in os.environ.items() if key not in LOOKS | {"PYTHONPATH"}}


def report_of(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The report that ``--json`` printed."""
    assert result.returncode in {0, 1}, result.stderr
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def cached(report: dict[str, Any]) -> dict[str, bool]:
    """Step name to whether the store had it."""
    return {step["name"]: step["cached"] for step in report["steps"]}

"""Training for quantization on the command line: behind distillation and pruning, on attention, in two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PATIENCE, cached, command, environment, make_project, onnxshrink, report_of

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]

NETS = """\
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x):
        batch, tokens, width = x.shape
        parts = self.qkv(self.before(x)).chunk(3, dim=-1)
        q, k, v = (part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, width, blocks=2):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.place = nn.Parameter(torch.randn(6, width) / 10)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, image):
        x = self.blocks(self.embed(image.squeeze(1)) + self.place)
        return self.head(self.norm(x).mean(1))


def transformer(width=32):
    return Transformer(width)
"""

DATA = """\
data:
  train:       {npz: data.npz, split: train}
  calibration: {npz: data.npz, split: calibration}
  evaluation:  {npz: data.npz, split: test, metric: top1}
targets: [{latency_seconds: 0.05}]
"""

VARIANTS = """\
variants:
  per_channel:
    - {kind: finetune, epochs: 4, simulate: {kind: quantize_static, granularity: per_channel}}
    - {kind: export}
    - {kind: optimize}
    - {kind: quantize_static, granularity: per_channel}
  per_tensor:
    - {kind: finetune, epochs: 4, simulate: {kind: quantize_static, granularity: per_tensor}}
    - {kind: export}
    - {kind: optimize}
    - {kind: quantize_static, granularity: per_tensor}
  int4:
    - {kind: finetune, epochs: 4, simulate: {kind: quantize_weights, block_size: 16}}
    - {kind: export, opset: 21}
    - {kind: optimize}
    - {kind: quantize_weights, block_size: 16}
"""

STUDENT = """\
model: {factory: "nets:build", inputs: {image: {shape: [batch, 1, 6, 6]}}, outputs: [logits]}
stages:
  - {kind: distill, teacher: {factory: "nets:build", args: {width: 48}, train: {epochs: 3}}, epochs: 8}
  - {kind: prune_channels, pruning_ratio: 0.25}
  - {kind: finetune, epochs: 3}
"""

ATTENTION = """\
model: {factory: "attention:transformer", inputs: {image: {shape: [batch, 1, 6, 6]}}, outputs: [logits]}
stages:
  - {kind: finetune, epochs: 8}
"""

# What rounding may leave of the float model's outputs.
LEAST_DB = {"per_channel": 20, "per_tensor": 20, "int4": 15}


def project(folder: Path, *parts: str) -> Path:
    """A config of those parts beside networks and data."""
    config = make_project(folder)
    (folder / "attention.py").write_text(NETS)
    config.write_text("".join(parts))
    return config


def figures(report: dict[str, Any], name: str) -> dict[str, float]:
    """A row's metrics by their names."""
    row = next(row for row in report["candidates"] if row["name"] == name)
    return {metric["name"]: metric["value"] for metric in row["metrics"]}


@pytest.mark.parametrize("network", [STUDENT, ATTENTION], ids=["distilled and pruned", "attention"])
def test_a_chain_ends_as_quantized_models_near_the_float_one(tmp_path: Path, network: str) -> None:
    """Each is measured against the network before that training."""
    config = project(tmp_path, network, DATA, VARIANTS)
    report = report_of(onnxshrink("run", config, "--json", cwd=tmp_path))
    facts = {step["name"]: step["facts"] for step in report["steps"]}
    for variant, least in LEAST_DB.items():
        trained = facts[f"{variant}/finetune"]
        losses = [epoch["loss"] for epoch in trained["epochs"]]
        assert trained["original_runs"] == "once"
        assert len(losses) == 4
        measured = figures(report, variant)
        assert measured["sqnr_db"] >= least, (variant, measured)
    if network != ATTENTION:
        return
    again = report_of(onnxshrink("run", config, "--json", cwd=tmp_path))
    assert all(cached(again).values())


def test_two_processes_end_as_near(tmp_path: Path) -> None:
    """Under torchrun the result is as near the float model as it has to be from one process."""
    config = project(tmp_path, ATTENTION, DATA, VARIANTS[: VARIANTS.index("  per_tensor:")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = subprocess.run(
        [*torchrun, *command("run", config, "--json")],
        cwd=tmp_path,
        env=environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode in {0, 1}, done.stderr
    report = json.loads((tmp_path / "runs/cfg/report.json").read_text())
    facts = next(step["facts"] for step in report["steps"] if step["name"] == "per_channel/finetune")
    assert facts["processes"] == 2
    assert figures(report, "per_channel")["sqnr_db"] >= LEAST_DB["per_channel"]

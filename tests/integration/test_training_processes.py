"""Several processes train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import PATIENCE

REPOSITORY = Path(__file__).parents[2]

# Trains a network without BatchNorm and dropout, and leaves loss curve and weights in <folder>/<process>.json.
SCRIPT = """
import dataclasses, json, os, pathlib, sys
import torch
from torch import nn
from torch.nn import functional
from torch_models import Bench, held_samples
from onnxshrink.config.training import Training
from onnxshrink.stages.training import Learner, train

class Classifier(Learner):
    def __init__(self, network):
        super().__init__(network)
        self.unused = nn.Linear(2, 2)
    def forward(self, batch):
        return {"labels": functional.cross_entropy(self.network(*batch.inputs), batch.labels)}

class Killer:
    def __init__(self, at):
        self.at = at
    def progress(self, step, done, total, detail=""):
        if done == self.at:
            os._exit(9)
    def warned(self, text):
        raise AssertionError(text)

folder, settings, kill_at = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ.get("RANK", 0))
labels = torch.arange(45) % 3
values = torch.randn(45, 4, generator=torch.Generator().manual_seed(1)) + labels[:, None]
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
if rank:
    for parameter in network.parameters():  # it is the first process's network that is trained
        parameter.data += rank
place = folder / f"bench{rank}"
context = dataclasses.replace(Bench(place, events=Killer(kill_at)).context, scratch=folder / "scratch")
facts = train(Classifier(network), held_samples(values, labels), Training(**settings), context)
weights = torch.cat([p.detach().flatten() for p in network.parameters()]).tolist()
(folder / f"{rank}.json").write_text(json.dumps({"facts": facts, "weights": weights}))
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def _train(folder: Path, settings: dict[str, Any], processes: int, *, kill_at: int = 0) -> list[dict[str, Any]]:
    """What each process left; empty if they were killed."""
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    arguments = [*torchrun, script, folder, json.dumps(settings), kill_at]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    if kill_at:
        assert done.returncode != 0
        return []
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8},  # 45 samples: the last batch has five, three and two for the processes
        {"batch_size": 11},  # and here it has one, which its neighbour takes in
        {"batch_size": 14, "ema_decay": 0.9, "early_stopping": {"patience": 2, "held_out_ratio": 0.2}},
        {"batch_size": 7, "optimizer": "sgd", "learning_rate": 0.1},
    ],
)
def test_two_processes_learn_what_one_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The same loss curve within float noise, and the same weights in both, even where the batches are uneven."""
    settings = {"epochs": 4, "learning_rate": 0.01, **settings}
    (one,) = _train(tmp_path / "1", settings, 1)
    both = _train(tmp_path / "2", settings, 2)
    assert both[0]["weights"] == both[1]["weights"]
    np.testing.assert_allclose(both[0]["weights"], one["weights"], atol=2e-5)
    assert both[0]["facts"]["processes"] == 2
    for curve in ("loss", "held_out") if "early_stopping" in settings else ("loss",):
        expected = [epoch[curve] for epoch in one["facts"]["epochs"]]
        np.testing.assert_allclose([epoch[curve] for epoch in both[0]["facts"]["epochs"]], expected, atol=1e-5)
        assert expected[-1] < 0.9 * expected[0]


@pytest.mark.slow
def test_two_killed_processes_go_on(tmp_path: Path) -> None:
    """From the checkpoint of the first, to the bytes of an unbroken run with as many processes."""
    settings = {"epochs": 3, "batch_size": 8, "checkpoint_minutes": 1e-9}
    unbroken = _train(tmp_path / "unbroken", settings, 2)
    _train(tmp_path / "killed", settings, 2, kill_at=10)
    resumed = _train(tmp_path / "killed", settings, 2)
    assert [process["weights"] for process in resumed] == [process["weights"] for process in unbroken]
    assert {process["facts"]["resumed_from_step"] for process in resumed} == {9}
    assert resumed[0]["facts"]["epochs"] == unbroken[0]["facts"]["epochs"]

"""Trials that train under accelerate: every training of a search by two processes, which the trial starts itself."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import PATIENCE

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Silent
from onnxshrink.core.report import Report
from onnxshrink.runtime import processes
from onnxshrink.search.attempt import Deadline, TimeUp
from onnxshrink.search.budget import fit
from onnxshrink.stages import group
from onnxshrink.stages.group import train_together

pytestmark = pytest.mark.slow

NETS = """\
from torch import nn


def build(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
    )
"""
LEARNING = {"epochs": 3, "batch_size": 36}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network and three classes of images that differ in brightness."""
    (tmp_path / "nets.py").write_text(NETS)
    labels = np.arange(180) % 3
    image = (np.random.default_rng(0).standard_normal((180, 1, 6, 6)) + labels[:, None, None, None]).astype(np.float32)
    for name, rows in (("train", slice(0, 108)), ("calib", slice(108, 132)), ("test", slice(132, 180))):
        np.savez(tmp_path / f"{name}.npz", image=image[rows], labels=labels[rows])
    return tmp_path


def config_of(folder: Path, **more: Any) -> RunConfig:
    document = {
        "name": "r",
        "model": {"factory": "nets:build", "inputs": {"image": {"shape": ["batch", 1, 6, 6]}}, "outputs": ["logits"]},
        "data": {
            "train": {"npz": "train.npz"},
            "calibration": {"npz": "calib.npz"},
            "evaluation": {"npz": "test.npz", "metric": "top1"},
        },
        "stages": [
            {"kind": "distill", "teacher": {"factory": "nets:build", "args": {"width": 24}, "train": LEARNING}}
            | LEARNING,
            {"kind": "finetune", **LEARNING},
            {"kind": "export"},
        ],
        "targets": [{"latency_seconds": 0.05}],
        **more,
    }
    return validate(document, base=folder)


def searched(folder: Path, runs: str, **budget: Any) -> tuple[Report, dict[str, Any]]:
    limits = {"max_size": "1 MB", "families": ["fp16"], "vary": {"model.args.width": [8]}}
    config = config_of(folder, budget={**limits, "max_trials": 2, "time_limit": "30 min", **budget})
    report = fit(config, runs=folder / runs, base=folder)
    return report, json.loads((folder / runs / "r/search.json").read_text())


def trainings(report: Report) -> dict[str, tuple[int | None, list[float]]]:
    """Steps that trained: how many processes, and the losses."""
    found = ((s.name, s.digest, s.facts.get("processes"), s.facts.get("epochs", [])) for s in report.steps)
    return {
        f"{name} {index}": (count, [epoch["loss"] for epoch in epochs])
        for index, (name, _, count, epochs) in enumerate(found)
        if epochs
    }


def children() -> list[str]:
    """Processes that this one started and that are alive."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [pid for path in listed for pid in text_of(path).split() if is_follower(pid)]


def is_follower(pid: str) -> bool:
    """True for a process of a group that runs; one that only waits to be reaped has ended, and has no command line."""
    return "stages.group" in text_of(Path(f"/proc/{pid}/cmdline"))


def text_of(path: Path) -> str:
    """Nothing for a process that ended meanwhile."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_search_trains_in_groups(folder: Path) -> None:
    """Two processes each, here and in the workers of a pool: the losses of one process, the same trials."""
    assert processes.launched() == (0, 1)
    alone, one = searched(folder, "alone")
    together, two = searched(folder, "together", processes_per_training=2)
    pool = {"kind": "processes", "workers": 2}
    in_workers, _ = searched(folder, "in_workers", processes_per_training=2, parallel=pool)
    assert in_workers.winner == together.winner == alone.winner is not None
    points = [[(t["number"], t["point"], t["status"]) for t in search["trials"]] for search in (one, two)]
    assert points[0] == points[1]
    theirs, ours = trainings(alone), trainings(together)
    assert {count for count, _ in (*ours.values(), *trainings(in_workers).values())} == {2}
    assert {count for count, _ in theirs.values()} == {None}
    assert ours.keys() == theirs.keys()
    for name, (_, losses) in theirs.items():
        np.testing.assert_allclose(ours[name][1], losses, atol=1e-4, err_msg=name)
    assert processes.launched() == (0, 1)
    assert "WORLD_SIZE" not in os.environ
    assert children() == []


def test_what_was_trained_starts_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a group or by one process: the store has it."""
    config = config_of(folder)
    train_together(config, runs=folder / "runs", base=folder, processes=2, events=Silent())
    monkeypatch.setattr(subprocess, "Popen", None)
    train_together(config, runs=folder / "runs", base=folder, processes=2, events=Silent())


class Slow(Silent):
    """Waits for a moment at every progress, and tells when training has begun."""

    def __init__(self) -> None:
        self.training = threading.Event()

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Wait."""
        del step, done, total
        if "loss" in detail:
            self.training.set()
            time.sleep(0.05)


@pytest.fixture
def long(folder: Path) -> Iterator[RunConfig]:
    """Trainings that nobody waits for."""
    yield config_of(folder, stages=[{"kind": "finetune", "epochs": 100000, "batch_size": 36}, {"kind": "export"}])
    assert children() == []


def test_a_lost_process_is_told_with_what_to_do(folder: Path, long: RunConfig) -> None:
    """Instead of waiting for it for ever."""
    events = Slow()

    def kill() -> None:
        assert events.training.wait(PATIENCE)
        os.kill(int(children()[0]), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ConfigError, match="was lost") as caught:
        train_together(long, runs=folder / "runs", base=folder, processes=2, events=events)
    assert "exit status -9" in str(caught.value.got)


def test_a_process_that_cannot_begin_is_told(folder: Path, long: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last it said."""
    monkeypatch.setattr(group, "_FOLLOW", "raise SystemExit('no room')")
    with pytest.raises(ConfigError, match="was lost") as caught:
        train_together(long, runs=folder / "runs", base=folder, processes=3, events=Silent())
    assert "exit status 1: no room" in str(caught.value.got)


def test_time_that_is_over_ends_all(folder: Path, long: RunConfig) -> None:
    """As it ends a training by one process; the next one may train again."""
    with pytest.raises(TimeUp):
        train_together(long, runs=folder / "runs", base=folder, processes=2, events=Deadline(time.time() + 12))
    assert children() == []
    train_together(config_of(folder), runs=folder / "runs", base=folder, processes=2, events=Silent())


def _lead(config: RunConfig, folder: Path) -> None:
    train_together(config, runs=folder / "runs", base=folder, processes=2, events=Silent())


def test_a_killed_leader_leaves_nobody(folder: Path, long: RunConfig) -> None:
    """The others end with it: else they would train for ever."""
    leader = multiprocessing.get_context("spawn").Process(target=_lead, args=(long, folder))
    leader.start()
    pids: list[str] = []
    end = time.monotonic() + PATIENCE
    while not pids and time.monotonic() < end:
        listed = text_of(Path(f"/proc/{leader.pid}/task/{leader.pid}/children")).split()
        pids = [pid for pid in listed if is_follower(pid)]
        time.sleep(0.1)
    assert pids
    time.sleep(5)  # into the training, or on the way to it
    leader.kill()
    leader.join(PATIENCE)
    end = time.monotonic() + PATIENCE
    while any(map(is_follower, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_follower, pids))

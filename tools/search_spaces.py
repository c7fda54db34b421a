"""Spaces that `bench_search.py` tries point by point, and searches that are answered from what was found there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.config.budget import Budget
from onnxshrink.config.load import validate
from onnxshrink.search.attempt import Depth, Task, attempt
from onnxshrink.search.policy import Known, propose
from onnxshrink.search.space import Space, space_of
from onnxshrink.search.trial import Point, Trial, key_of, trunk_of

DIGITS = Path(__file__).resolve().parent.parent / "calib_data" / "digits.npz"
NETWORKS = '''\
from torch import nn


class Attention(nn.Module):
    """The eight rows of an image as tokens: one block of self-attention and a perceptron."""

    def __init__(self, width=32):
        super().__init__()
        self.embed, self.mix = nn.Linear(8, width), nn.Linear(width, 3 * width)
        self.project, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, image):
        x = self.embed(image.flatten(1, 2))
        q, k, v = self.mix(x).chunk(3, -1)
        x = self.norm(x + self.project((q @ k.transpose(1, 2) / 6).softmax(-1) @ v))
        return self.head((x + self.perceptron(x)).mean(1))


def attention():
    return Attention()


def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))


def convolutions():
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
'''
SMALL = ("convolutions", "perceptron", "attention")
_IMAGE = {"image": {"shape": ["batch", 1, 8, 8]}}


@dataclass(frozen=True)
class Table:
    """What every point of a space is, as deep as a search may ask."""

    space: Space
    trials: Mapping[tuple[str, Depth], Trial]

    def full(self) -> list[Trial]:
        """Every full evaluation."""
        return [trial for (_, depth), trial in self.trials.items() if depth == "evaluate"]

    def answer(self, task: Task) -> Trial:
        """As `attempt` does."""
        return replace(self.trials[key_of(task.point), task.depth], number=task.number)


def table_of(space: Space, runs: Path) -> Table:
    """Try every point of a space."""
    depths: tuple[Depth, ...] = ("predict", "probe", "evaluate")
    tasks = [Task(0, point, depth) for point in space.points() for depth in depths]
    return Table(space, {(key_of(task.point), task.depth): attempt(space, runs, task) for task in tasks})


def searched(table: Table, budget: Budget, *, n_evaluations: int | None = None) -> list[Trial]:
    """The trials of a search without a time limit, until it ends or has made so many full evaluations."""
    trunks: dict[str, Point] = {key_of(trunk): trunk for trunk in map(trunk_of, table.space.points())}
    trials: list[Trial] = []
    while tasks := propose(Known(table.space, budget, list(trunks.values()), trials)):
        for task in tasks:
            if task.depth == "evaluate" and n_evaluations is not None and len(evaluated(trials)) >= n_evaluations:
                return trials
            trials.append(table.answer(task))
    return trials


def evaluated(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were measured fully."""
    return [trial for trial in trials if trial.status == "evaluated"]


def count(trials: list[Trial], status: str) -> int:
    """How many trials came so far."""
    return sum(trial.status == status for trial in trials)


def small_space(network: str, folder: Path) -> tuple[Space, Budget]:
    """A small network trained for seconds, and quantization of many kinds: no labels, so SQNR is the quality."""
    (folder / "networks.py").write_text(NETWORKS, encoding="utf-8")
    variants = {
        "_".join(["static", granularity, *kept, *["7_bit"] * reduced, *["compact"] * compact]): [
            {"kind": "quantize_static", "granularity": granularity, "reduce_range": reduced, "compact": compact, **kept}
        ]
        for granularity in ("per_tensor", "per_channel")
        for kept in ({}, {"float_first": 1}, {"float_last": 1}, {"float_first": 1, "float_last": 1})
        for reduced in (False, True)
        for compact in (False, True)
    }
    variants |= {
        f"weights_{bits}_{size}": [{"kind": "quantize_weights", "bits": bits, "block_size": size}]
        for bits in (4, 8)
        for size in (16, 32, 64, 128)
    }
    document = {
        "name": network,
        "model": {"factory": f"networks:{network}", "inputs": _IMAGE, "outputs": ["logits"]},
        "data": {name: {"npz": str(DIGITS), "split": split} for name, split in SPLITS.items()},
        "stages": [{"kind": "finetune", "epochs": 6, "learning_rate": 0.004}, {"kind": "export"}, {"kind": "optimize"}],
        "variants": variants,
        "budget": {"max_size": "1 MB", "families": ["fp16", "dynamic", "static", "weight_only"]},
    }
    return _space(document, folder)


def trained_space(folder: Path) -> tuple[Space, Budget]:
    """Digits: eighteen networks, each taught for seconds, in a dozen forms; accuracy is the quality."""
    data: dict[str, Any] = {name: {"npz": str(DIGITS), "split": split} for name, split in SPLITS.items()}
    data["evaluation"]["metric"] = "top1"
    teacher = {"factory": "onnxshrink.recipes.digits:teacher", "train": {"epochs": 5}}
    document = {
        "name": "digits",
        "model": {"factory": "onnxshrink.recipes.digits:student", "inputs": _IMAGE, "outputs": ["logits"]},
        "data": data,
        "stages": [
            {"kind": "distill", "teacher": teacher, "epochs": 6, "learning_rate": 0.004},
            {"kind": "prune_channels", "pruning_ratio": 0.35},
            {"kind": "finetune", "epochs": 4, "learning_rate": 0.002},
            {"kind": "export"},
            {"kind": "optimize"},
        ],
        "budget": {
            "max_size": "1 MB",
            "families": ["fp16", "dynamic", "static", "weight_only"],
            "vary": {"model.args.width": [8, 16, 24, 32, 48, 64], "stages[1].pruning_ratio": [0.0, 0.35, 0.65]},
        },
    }
    return _space(document, folder)


SPLITS = {"train": "train", "calibration": "calibration", "evaluation": "test"}


def _space(document: Mapping[str, Any], folder: Path) -> tuple[Space, Budget]:
    config = validate(document, base=folder)
    if config.budget is None:
        raise ValueError(document)
    return space_of(config, config.budget, base=folder), config.budget


def random_points(space: Space, seed: int, n_points: int) -> list[Point]:
    """Different points as optuna's `RandomSampler` draws them; what it draws again is not counted."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    labels = {dimension.name: [option.label for option in dimension.options] for dimension in space.dimensions}
    found: dict[str, Point] = {}
    while len(found) < n_points:
        trial = study.ask()
        point = {name: str(trial.suggest_categorical(name, choices)) for name, choices in labels.items()}
        found.setdefault(key_of(point), point)
    return list(found.values())


def log_bytes(objectives: tuple[float, ...]) -> tuple[float, ...]:
    """Bytes on a scale where half is as much worth everywhere."""
    return float(np.log2(objectives[0])), *objectives[1:]

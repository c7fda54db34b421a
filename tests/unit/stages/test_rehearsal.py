"""Exports are tried before training: what fails is told first, and nothing is exported twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ModelError
from onnxshrink.core.events import Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.store import Store
from onnxshrink.rows import prove
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.rehearsal import rehearse_exports

pytest.importorskip("torch")

NETS = """\
import torch
from torch import nn


def good(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 3))


class Airy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(torch.special.airy_ai(x).flatten(1))


def bad():
    return Airy()
"""
FINETUNE = {"kind": "finetune", "epochs": 1}
EXPORT = {"kind": "export", "exporter": "torchscript"}
BAD_TEACHER = {"kind": "distill", "epochs": 1, "teacher": {"factory": "rehearsed:bad", "train": {"epochs": 1}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Networks and samples."""
    (tmp_path / "rehearsed.py").write_text(NETS)
    x = np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=np.arange(8) % 3)
    return tmp_path


def run(folder: Path, factory: str, stages: list[Any], **variants: list[Any]) -> tuple[RunConfig, Memo]:
    """A config and its memo."""
    document: dict[str, Any] = {
        "model": {"factory": f"rehearsed:{factory}", "inputs": {"x": {"shape": ["batch", 1, 8, 8]}}},
        "data": {role: {"npz": "data.npz"} for role in ("train", "evaluation")},
        "stages": stages,
    }
    document |= {"variants": variants} if variants else {}
    config = RunConfig.model_validate(document, context={"base": folder})
    return config, Memo(Store(folder / "store"), config.data, 0, Silent())


def names(memo: Memo) -> list[str]:
    return [step.name for step in memo.steps]


@pytest.mark.parametrize(
    ("factory", "stages", "variants"),
    [
        ("bad", [FINETUNE, EXPORT], {}),
        ("bad", [], {"a": [FINETUNE, EXPORT], "b": [FINETUNE, {**EXPORT, "opset": 17}]}),
        ("good", [BAD_TEACHER, EXPORT], {}),
    ],
)
def test_what_cannot_be_exported_is_told_before_training(
    folder: Path, factory: str, stages: list[Any], variants: dict[str, Any]
) -> None:
    """A network, one that every variant trains by itself, and a teacher that the report would have a row of."""
    with search_path(folder):
        config, memo = run(folder, factory, stages, **variants)
        with pytest.raises(ModelError, match="torchscript exporter cannot take the network"):
            prove(config, memo, {}, Silent())
    assert not {step.kind for step in memo.steps} & {"finetune", "distill"}


@pytest.mark.parametrize(
    ("factory", "stages", "variants"),
    [
        ("bad", [EXPORT], {}),
        ("bad", [], {"a": [FINETUNE, EXPORT], "b": [EXPORT]}),
        ("good", [FINETUNE, {**EXPORT, "max_abs_error": 1e-12}], {}),
        ("good", [], {"a": [FINETUNE, {**EXPORT, "opset": 23}], "b": [FINETUNE, EXPORT]}),
    ],
)
def test_the_rest_is_left_to_the_export_itself(
    folder: Path, factory: str, stages: list[Any], variants: dict[str, Any]
) -> None:
    """No training before it; a variant without any; numbers that differ; one variant of two: none ends a run."""
    with search_path(folder):
        config, memo = run(folder, factory, stages, **variants)
        rehearse_exports(config, memo)


def test_what_was_rehearsed_is_not_exported_again(folder: Path) -> None:
    """The network before pruning, which is a row of the report, is the one that was tried."""
    with search_path(folder):
        stages = [{"kind": "prune_channels", "pruning_ratio": 0.5}, FINETUNE, EXPORT]
        config, memo = run(folder, "good", stages)
        proof = prove(config, memo, {}, Silent())
    assert names(memo)[:2] == ["source", "source ▸ export"]
    assert [step.kind for step in memo.steps].count("export") == 2
    rehearsed = next(step for step in memo.steps if step.name == "source ▸ export")
    assert proof.rows[0].role == "original"
    assert proof.rows[0].artifact.digest == rehearsed.digest

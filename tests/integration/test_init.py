"""`onnxshrink init` from nothing to a verified model: the config of every template is run as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from command_line import onnxshrink, report_of

NETS = """\
import torch
from torch import nn


def vision(width=16):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.last = nn.Linear(32, 3)

    def forward(self, ids):
        x = self.norm(self.words(ids))
        return self.last((x + self.narrow(torch.relu(self.wide(x)))).mean(1))


def encoder():
    torch.manual_seed(0)
    return Encoder()
"""
QUICK = ("--set", "targets[0].latency_seconds=0.2")


def written(folder: Path, *arguments: object) -> list[str]:
    """The lines that `init` printed; it wrote `mine.yaml`."""
    result = onnxshrink("init", "mine.yaml", "--yes", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.splitlines()


def variants(folder: Path, *overrides: str) -> set[str]:
    """Names of the variants of the finished run; every one was measured and judged."""
    report = report_of(onnxshrink("run", "mine.yaml", "--json", *QUICK, *overrides, cwd=folder))
    rows = [row for row in report["candidates"] if row["role"] == "variant"]
    assert all(row["verdicts"] for row in rows)
    assert all(any(m["name"] == "size_bytes" and m["value"] for m in row["metrics"]) for row in rows)
    return {row["name"] for row in rows}


@pytest.mark.slow
def test_the_onnx_template_runs(tmp_path: Path) -> None:
    """A file and an archive are enough."""
    net = nets.cnn()
    onnx.save(net, tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **nets.samples_of(net, 16), labels=np.arange(16) % 10)
    lines = written(tmp_path, "--model", "model.onnx", "--data", "data.npz")
    assert lines[-1].split() == ["next", "onnxshrink", "run", "mine.yaml"]
    assert variants(tmp_path) == {"fp32", "int8_per_tensor", "int8_per_channel"}


@pytest.mark.slow
def test_the_vision_template_prunes_and_trains_where_there_is_something_to_learn_from(tmp_path: Path) -> None:
    """A factory and an archive with three splits go all the way."""
    (tmp_path / "mynets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    split = np.array(["train"] * 64 + ["val"] * 16 + ["test"] * 32)
    labels = rng.integers(0, 3, len(split))
    image = (rng.normal(size=(len(split), 3, 12, 12)) + labels[:, None, None, None]).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=image, y=labels, split=split)
    written(tmp_path, "--model", "mynets:vision", "--data", "data.npz")
    text = (tmp_path / "mine.yaml").read_text()
    assert "prune_channels" in text
    assert "rename: {y: labels}" in text.replace('"y"', "y")
    assert variants(tmp_path) == {"fp32", "int8_per_tensor", "int8_per_channel"}


@pytest.mark.slow
def test_a_folder_of_images_runs(tmp_path: Path) -> None:
    """Classes are sub-folders, and the size follows from the input."""
    images = pytest.importorskip("PIL.Image")
    (tmp_path / "mynets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    for index in range(12):
        folder = tmp_path / "photos" / ("cat", "dog", "cow")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        images.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(folder / f"{index}.png")
    lines = written(
        tmp_path, "--model", "mynets:vision", "--data", "photos", "--input", "image=batch,3,16,16", "--max-size", "1 MB"
    )
    assert any("12 images" in line for line in lines)
    assert variants(tmp_path) == {"fp32", "int8_per_tensor", "int8_per_channel"}


@pytest.mark.slow
def test_the_encoder_template_runs(tmp_path: Path) -> None:
    """Integer inputs make it an encoder: dynamic, static and weights only are compared."""
    (tmp_path / "mynets.py").write_text(NETS)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", ids=rng.integers(0, 50, (24, 10)), labels=rng.integers(0, 3, 24))
    written(tmp_path, "--model", "mynets:encoder", "--data", "data.npz")
    assert variants(tmp_path) == {"fp32", "int8_dynamic", "int8_static", "weights8"}


@pytest.mark.slow
def test_the_digits_template_runs(tmp_path: Path) -> None:
    """The demonstration, with one epoch where the recipe has many."""
    lines = written(tmp_path, "--template", "digits")
    assert "template digits" in lines[-2]
    short = [f"stages[0].{name}=1" for name in ("teacher.train.epochs", "epochs")]
    overrides = [part for text in (*short, "stages[2].epochs=1") for part in ("--set", text)]
    assert variants(tmp_path, *overrides) == {"fp32", "int8_per_tensor", "int8_per_channel"}
    assert json.loads(next((tmp_path / "runs").glob("*/report.json")).read_text())["name"] == "mine"

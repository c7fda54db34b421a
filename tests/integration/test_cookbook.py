"""The configs of the cookbook run as they stand, each on a small network of its kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from command_line import onnxshrink, report_of
from onnx import helper

PAGE = (Path(__file__).resolve().parents[2] / "onnxshrink/recipes/README.md").read_text(encoding="utf-8")
PARTS = dict(
    re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", PAGE.partition("\n## Cookbook\n")[2], re.DOTALL | re.MULTILINE)
)

ENCODER = """\
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(128, 32)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.norm, self.wide, self.narrow = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids) + self.places.weight
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 32**0.5
        hidden = (1.0 - attention_mask[:, None, :].float()) * -1e4
        x = self.norm(x + torch.softmax(scores + hidden, -1) @ self.value(x))
        return (x + self.narrow(torch.relu(self.wide(x)))).mean(1)


def build():
    return Encoder()
"""


def random(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def photographs(folder: Path) -> None:
    """Ten classes, three pictures of each."""
    images = pytest.importorskip("PIL.Image")
    onnx.save(nets.cnn(), str(folder / "model.onnx"))
    rng = np.random.default_rng(0)
    for number in range(30):
        (folder / "photos" / f"class{number % 10}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
        images.fromarray(pixels).save(folder / "photos" / f"class{number % 10}" / f"{number}.png")


def sentences(folder: Path) -> None:
    """Token numbers of one length, and which of them count."""
    torch = pytest.importorskip("torch")
    (folder / "mine.py").write_text(ENCODER)
    space: dict[str, Any] = {}
    exec(ENCODER, space)  # noqa: S102  our own text
    torch.manual_seed(0)
    torch.save(space["build"]().state_dict(), folder / "weights.pth")
    rng = np.random.default_rng(0)
    for name in ("calib", "test"):
        mask = (np.arange(128) < rng.integers(8, 128, (16, 1))).astype(np.int64)
        np.savez(folder / f"{name}.npz", input_ids=rng.integers(0, 50, (16, 128)), attention_mask=mask)


def series(folder: Path) -> None:
    """Nine steps of six values."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], name="turn", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r"], ["", "h", ""], name="lstm", hidden_size=8),
        helper.make_node("Squeeze", ["h", "axis"], ["y"], name="squeeze"),
    ]
    weights = {"w": random(1, 32, 6), "r": random(1, 32, 8), "axis": np.array([0])}
    model = nets.model_of(nodes, {"x": ["N", 9, 6]}, {"y": ["N", 8]}, weights)
    onnx.save(model, str(folder / "model.onnx"))
    np.savez(folder / "test.npz", **nets.samples_of(model, 16))


def candidates(folder: Path) -> None:
    """``boxes[N,16,4]`` and ``scores[N,16,5]`` from a shared trunk, as detectors have them."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="trunk", pads=[1, 1, 1, 1], strides=[4, 4]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
    ]
    weights: dict[str, Any] = {"w1": random(16, 3, 3, 3)}
    for name, width in (("boxes", 4), ("scores", 5)):
        nodes += [
            helper.make_node("Conv", ["r1", f"w_{name}"], [f"m_{name}"], name=f"head_{name}"),
            helper.make_node("Reshape", [f"m_{name}", f"s_{name}"], [f"f_{name}"], name=f"flat_{name}"),
            helper.make_node("Transpose", [f"f_{name}"], [name], name=f"turn_{name}", perm=[0, 2, 1]),
        ]
        weights |= {f"w_{name}": random(width, 16, 1, 1), f"s_{name}": np.array([0, width, 16])}
    outputs: dict[str, list[int | str]] = {"boxes": ["N", 16, 4], "scores": ["N", 16, 5]}
    model = nets.model_of(nodes, {"x": ["N", 3, 16, 16]}, outputs, weights)
    onnx.save(model, str(folder / "model.onnx"))
    for seed, name in enumerate(("calib", "test")):
        np.savez(folder / f"{name}.npz", **nets.samples_of(model, 24, seed=seed), labels=np.arange(24) % 5)
    block = next(text for text in blocks("A detector with several outputs", "python") if "# file: metrics.py" in text)
    (folder / "metrics.py").write_text(block)


def blocks(part: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PARTS[part], re.DOTALL | re.MULTILINE)


KINDS: dict[str, Callable[[Path], None]] = {
    "A convolutional network on folders of images": photographs,
    "An encoder": sentences,
    "An LSTM": series,
    "A detector with several outputs": candidates,
}


def test_no_part_of_the_cookbook_is_left_out() -> None:
    """The reader's own config is run by the test of the pages, which has its command."""
    assert set(PARTS) == {*KINDS, "Your own reader"}


@pytest.mark.slow
@pytest.mark.parametrize("part", KINDS)
def test_a_config_of_the_cookbook_runs(part: str, tmp_path: Path) -> None:
    """Every variant is made, measured and judged, and one passes its gates or could with more samples."""
    KINDS[part](tmp_path)
    (text,) = blocks(part, "yaml")
    (tmp_path / "cfg.yaml").write_text(text)
    quick = ("--json", "--quiet", "--set", "targets=[{latency_seconds: 0.1}]")
    report = report_of(onnxshrink("run", "cfg.yaml", *quick, cwd=tmp_path))
    rows = [row for row in report["candidates"] if row["role"] == "variant"]
    assert rows
    assert all(row["digest"] for row in rows), [row["verdicts"] for row in rows]
    names = {metric["name"] for row in rows for metric in row["metrics"]}
    assert {"size_bytes", "sqnr_db", "latency_ratio"} <= names
    assert report["winner"] is not None, report["selection"]

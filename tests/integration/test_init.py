"""`onnxshrink init` from nothing to a verified model: the config of every template is run as it was written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from command_line import onnxshrink, report_of, talk

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


@pytest.mark.slow
def test_questions_are_asked_and_wrong_answers_asked_again(tmp_path: Path) -> None:
    """In a real terminal: each mistake is told at its question, and the config that comes of the answers runs."""
    net = nets.cnn()
    onnx.save(net, tmp_path / "model.onnx")
    (tmp_path / "mynets.py").write_text(NETS)
    for seed, name in enumerate(("data", "test")):
        np.savez(tmp_path / f"{name}.npz", **nets.samples_of(net, 16, seed=seed), labels=np.arange(16) % 10)
    answers = [
        ("[Y/n]:", "\n"),
        ("model.onnx:", "modle.onnx\n"),
        ("model.onnx:", "mynets:vizion\n"),
        ("model.onnx:", "model.onnx\n"),
        ("callable:", "dta.npz\n"),
        ("callable:", "data.npz\n"),
        ("the same):", "test.npz\n"),
        ("[this]:", "arm\n"),
        ("[this]:", "\n"),
        ("[0.01]:", "3\n"),
        ("[0.01]:", "0.9\n"),
        ("any):", "5 lightyears\n"),
        ("any):", "5 MB\n"),
        ("[0]:", "-1\n"),
        ("[0]:", "9.5\n"),
    ]
    status, shown = talk("init", "mine.yaml", answers=answers, cwd=tmp_path)
    assert status == 0, shown
    said = " ".join(shown.split())
    for part in (
        "there is no file modle.onnx (did you mean 'model.onnx'?)",
        "has no 'vizion' (did you mean 'vision'?)",
        "there are no samples at 'dta.npz'",
        "there is no processor 'arm'",
        "3 is out of range (a number from 0 to 1)",
        "the size '5 lightyears' cannot be read",
        "-1 is out of range",
        "next onnxshrink run mine.yaml",
    ):
        assert part in said, shown
    text = (tmp_path / "mine.yaml").read_text()
    for part in ("max_accuracy_drop: 0.9 ", "max_size: ", "max_latency_ratio: 9.5 ", "npz: test.npz"):
        assert part in text, text
    assert variants(tmp_path) == {"fp32", "int8_per_tensor", "int8_per_channel"}


@pytest.mark.slow
def test_a_factory_is_asked_for_its_inputs(tmp_path: Path) -> None:
    """Where the samples do not tell; without labels nothing is asked of accuracy."""
    (tmp_path / "mynets.py").write_text(NETS)
    (tmp_path / "reader.py").write_text(
        "import numpy as np\n\n\ndef make():\n    yield {'ids': np.ones((2, 9), int)}\n"
    )
    answers = [
        ("[Y/n]:", "y\n"),
        ("model.onnx:", "mynets:encoder\n"),
        ("it does):", "w.pth\n"),
        ("it does):", "\n"),
        ("callable:", "reader:make\n"),
        ("the same):", "\n"),
        ("[image=batch,3,224,224]:", "ids=batch,9:int46\n"),
        ("[image=batch,3,224,224]:", "ids=batch,9:int64\n"),
        ("no more):", "\n"),
        ("[this]:", "arm64\n"),
        ("any):", "\n"),
    ]
    status, shown = talk("init", "mine.yaml", answers=answers, cwd=tmp_path)
    assert status == 0, shown
    text = (tmp_path / "mine.yaml").read_text()
    assert "ids: {shape: [batch, 9], dtype: int64}" in text
    assert "isa: arm64" in text
    assert "max_accuracy_drop" not in text


@pytest.mark.parametrize("keys", ["\x03", "\x04"])
@pytest.mark.parametrize("question", [0, 1])
def test_who_does_not_answer_leaves_nothing(keys: str, question: int, tmp_path: Path) -> None:
    """Ctrl-C and the end of the input, at either kind of question, are no bug of ours."""
    answers = [("[Y/n]:", "y\n"), ("model.onnx:", "")]
    answers = [*answers[:question], (answers[question][0], keys)]
    status, shown = talk("init", "mine.yaml", answers=answers, cwd=tmp_path)
    assert status == 130, shown
    assert "Traceback" not in shown
    assert not (tmp_path / "mine.yaml").exists()

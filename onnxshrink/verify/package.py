"""The ``.ort`` files beside a model, against the model itself: how far their outputs are, how fast they run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import OrtStyle
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.drift import Drift
from onnxshrink.core.report import Candidate, finite
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.affinity import on_cores
from onnxshrink.runtime.ort_format import ORT_FILES, REPLAY, open_ort
from onnxshrink.runtime.session import Session
from onnxshrink.verify.latency import Run, measure_pairs, runner, without_garbage_collection
from onnxshrink.verify.startup import PROCESSES, probe, probe_settings
from onnxshrink.verify.times import latency_metrics
from onnxshrink.verify.verify import Latency, Quality, Row, latency_batch

_BATCH_SIZE = 32
_SECONDS = 1.0
_SLOWER = 1.1


def with_package(quality: Quality, row: Row, config: RunConfig) -> Quality:
    """Add, of a variant that was packaged, how far each file's outputs are from those of its deployed ``.onnx`` file.

    Returns:
        ``details["package"]``: by style the file's name and size and, where there is evaluation data, by output
        ``max_abs_error`` and ``sqnr_db``, null where the outputs are identical. Unchanged without a package.
    """
    files = package_files(row.artifact)
    if row.role != "variant" or not files:
        return quality
    found = {
        style: {
            "file": path.name,
            "size_bytes": path.stat().st_size,
            "outputs": _drift(row.artifact, path, style, config),
        }
        for style, path in files.items()
    }
    return replace(quality, details={**quality.details, "package": found})


def with_package_times(latency: Latency, row: Row, config: RunConfig) -> Latency:
    """Add, of a variant that was packaged, how long its files take, on each target of the CPU that has latency.

    Returns:
        ``details["package_times"]``: by target, the ``.onnx`` file's ``load_ms``, and by style ``load_ms``,
        ``first_run_ms`` (medians of fresh processes) and ``latency_ratio``, the time of one inference over that of the
        ``.onnx`` file, with its 95% interval. Unchanged without a package.
    """
    files = package_files(row.artifact)
    targets = [target for target in filter(attrgetter("latency"), config.targets) if target.provider == "cpu"]
    if row.role != "variant" or not files or not targets:
        return latency
    times = {target.name: _times(row.artifact, files, target, config) for target in targets}
    return replace(latency, details={**latency.details, "package_times": times})


def package_files(artifact: Artifact) -> dict[OrtStyle, Path]:
    """The ``.ort`` files of a model, by style; none where it was not packaged."""
    return {style: artifact.path / name for style, name in ORT_FILES.items() if (artifact.path / name).is_file()}


def slow_packages(rows: Sequence[Candidate]) -> Iterator[str]:
    """A line for each package that has a file slower than its ``.onnx`` file beyond doubt, by more than a tenth."""
    for row in rows:
        for target, found in row.details.get("package_times", {}).items():
            ratios = {style: times["latency_ratio"] for style, times in found["files"].items()}
            style, ratio = max(ratios.items(), key=lambda item: item[1]["lo"] or 0.0)
            if (ratio["lo"] or 0.0) > _SLOWER:
                yield (
                    f"{row.name}: {ORT_FILES[style]} takes {ratio['value']:.2f} ({ratio['lo']:.2f} to "
                    f"{ratio['hi']:.2f}) times as long as model.onnx on {target}: what ONNX Runtime loads as "
                    ".ort it does not lay out for the processor; deploy model.onnx where ONNX can be read"
                )


def _drift(artifact: Artifact, path: Path, style: OrtStyle, config: RunConfig) -> dict[str, dict[str, Any]]:
    """By output, how far the file's are from the deployed model's on the evaluation data."""
    if config.data.evaluation is None:
        return {}
    expected, candidate = Session(artifact.model_path), open_ort(path, replay=style == "runtime")
    drifts = {spec.name: Drift(spec.name) for spec in expected.outputs}
    for batch in open_reader(config.data.evaluation, expected.inputs, batch_size=_BATCH_SIZE):
        want, got = expected.run(batch), candidate.run(batch)
        drifts = {name: drift.update(want[name], got[name]) for name, drift in drifts.items()}
    return {
        name: {"max_abs_error": finite(drift.max_abs), "sqnr_db": finite(drift.sqnr_db)}
        | ({"flaw": drift.flaw} if drift.flaw else {})
        for name, drift in drifts.items()
    }


def _times(artifact: Artifact, files: dict[OrtStyle, Path], target: Target, config: RunConfig) -> dict[str, Any]:
    specs = Session(artifact.model_path, target).inputs
    batch = latency_batch(config, specs, target.batch)
    models: dict[str, tuple[Path, Mapping[str, str]]] = {"onnx": (artifact.model_path, {})}
    models |= {style: (path, REPLAY if style == "runtime" else {}) for style, path in files.items()}
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            name: probe_settings(path, target, batch, specs, Path(folder), config=entries)
            for name, (path, entries) in models.items()
        }
        probes = [
            {name: probe(settings[name], where=str(models[name][0])) for name in sorted(models, reverse=bool(turn % 2))}
            for turn in range(PROCESSES)
        ]
    started = {
        name: {figure: _median(one[name][figure] for one in probes) for figure in ("load_ms", "first_run_ms")}
        for name in models
    }

    def opener(name: str) -> Callable[[], Run]:
        path, entries = models[name]
        return lambda: runner(Session(path, target, config=entries), batch)

    ratios = {style: _ratio(opener("onnx"), opener(style), target, config.seed) for style in files}
    return {
        "onnx": started["onnx"],
        "files": {style: {**started[style], "latency_ratio": ratio} for style, ratio in ratios.items()},
    }


def _median(values: Iterator[float | None]) -> float:
    return float(np.median([value for value in values if value is not None]))


def _ratio(
    open_onnx: Callable[[], Run], open_file: Callable[[], Run], target: Target, seed: int
) -> dict[str, float | None]:
    """Time of one inference of a file over that of the ``.onnx`` file, measured in pairs, with its interval."""
    with on_cores(target), without_garbage_collection():
        pairs = measure_pairs(
            open_onnx,
            open_file,
            seconds=min(_SECONDS, target.latency_seconds),
            rng=np.random.default_rng(seed),
            cpu_clock=time.thread_time_ns if target.threads == 1 else time.process_time_ns,
        )
    metric = next(found for found in latency_metrics(pairs, target_name=target.name) if found.name == "latency_ratio")
    return {"value": metric.value, "lo": metric.lo, "hi": metric.hi}

"""The pipeline for people without a config: quantize a file, compare two files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import ONNX_FILE
from onnxshrink.core.errors import ConfigError, DataError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.report import Report
from onnxshrink.core.tensors import LABELS
from onnxshrink.pipeline import run


def quantize(
    model: Path,
    data: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    stage: Mapping[str, Any] | None = None,
    threads: int = 1,
    events: Events | None = None,
) -> Report:
    """Optimize and quantize one ONNX model, and measure it against the original.

    Args:
        model: The float ``.onnx`` file.
        data: Calibration samples, ``.npz``.
        out: Where to write the int8 ``.onnx`` file.
        evaluation: Held-out samples to measure on; the calibration samples by default, and the report says so.
        stage: Settings of `QuantizeStatic` that differ from the defaults.
        threads: Threads while latency is measured.
        events: Listener for progress.

    Returns:
        The report; its variants are ``fp32`` (optimized only) and ``int8``.

    Raises:
        ShrinkError: Something the user can fix.
    """
    _require(model=model, data=data, **({"eval-data": evaluation} if evaluation else {}))
    if out.resolve() == model.resolve():
        raise ConfigError("the output would overwrite the model", where=str(out), fix="name another file: -o PATH")
    if not out.parent.is_dir():
        raise ConfigError("the output's folder is not there", where=str(out.parent), fix=f"mkdir -p {out.parent}")
    config = _config(
        model,
        calibration=data,
        evaluation=evaluation or data,
        stages=[{"kind": "optimize"}],
        variants={"fp32": [], "int8": [{"kind": "quantize_static", **(stage or {})}]},
        targets=[{"threads": threads}],
    )
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        report = run(config, runs=Path(folder), events=events or Silent())
        made = Path(folder) / report.name / report.candidate("int8").model
        _write(made, out)
    return report


def compare(
    reference: Path,
    candidate: Path,
    data: Path,
    *,
    metric: str | None = None,
    gates: Mapping[str, Any] | None = None,
    threads: int = 1,
    events: Events | None = None,
) -> Report:
    """Measure one ONNX model against another on the same samples.

    Args:
        reference: The model to compare with.
        candidate: The model in question; its inputs have the reference's names.
        data: Samples, ``.npz``, with ``labels`` for accuracy.
        metric: Task metric; ``top1`` by default where there are labels.
        gates: Limits, as in the config.
        threads: Threads while latency is measured.
        events: Listener for progress.

    Returns:
        The report; its winner is None where a gate failed.

    Raises:
        ShrinkError: Something the user can fix.
    """
    _require(reference=reference, candidate=candidate, data=data)
    config = _config(
        reference,
        evaluation=data,
        metric=metric,
        variants={"candidate": []},
        targets=[{"threads": threads}],
        gates=dict(gates or {}),
    )
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        return run(config, runs=Path(folder), events=events or Silent(), candidates={"candidate": candidate})


def _require(**files: Path) -> None:
    for name, path in files.items():
        if not path.is_file():
            raise ConfigError(
                f"there is no file {path}", where=name, want="data.npz" if "data" in name else "model.onnx"
            )


def _config(
    model: Path, *, evaluation: Path, calibration: Path | None = None, metric: str | None = None, **more: Any
) -> RunConfig:
    names = _array_names(evaluation)
    if metric is None and LABELS in names:
        metric = "top1"
    data: dict[str, Any] = {"evaluation": {"npz": evaluation, "metric": metric}}
    if calibration is not None:
        data["calibration"] = {"npz": calibration}
    document = {"name": "oneline", "model": {"onnx": model}, "data": data, **more}
    return validate(document, base=Path(), origin="arguments")


def _array_names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files) if hasattr(archive, "files") else []
    except (OSError, ValueError, EOFError) as e:
        raise DataError(
            "the samples cannot be read as an .npz archive",
            where=str(path),
            want="an .npz archive of the model's inputs",
        ) from e


def _write(made: Path, out: Path) -> None:
    """Put the finished model at ``out`` by renames, its external data beside it."""
    for file in sorted(made.parent.iterdir(), key=lambda path: path.name == ONNX_FILE):  # the model last
        target = out if file.name == ONNX_FILE else out.with_name(file.name)
        part = target.with_name(f".{target.name}.part")
        shutil.copyfile(file, part)
        part.replace(target)

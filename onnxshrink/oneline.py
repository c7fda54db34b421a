"""The pipeline for people without a config: quantize a file, compare two files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import ONNX_FILE
from onnxshrink.core.errors import ConfigError, ModelError, StoreError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.report import Report
from onnxshrink.core.store import require_output, write_atomically
from onnxshrink.core.tensors import LABELS
from onnxshrink.data.stored import zipped_arrays
from onnxshrink.pipeline import run


def quantize(
    model: Path,
    data: Path,
    out: Path,
    *,
    evaluation: Path | None = None,
    stage: Mapping[str, Any] | None = None,
    threads: int = 1,
    max_samples: int | None = None,
    events: Events | None = None,
) -> Report:
    """Optimize and quantize one ONNX model, and measure it against the original.

    The report is left beside the model, as ``<out>.report.json``.

    Args:
        model: The float ``.onnx`` file.
        data: Calibration samples, ``.npz``.
        out: Where to write the int8 ``.onnx`` file.
        evaluation: Held-out samples to measure on; the calibration samples by default, and the report says so.
        stage: Settings of `QuantizeStatic` that differ from the defaults.
        threads: Threads while latency is measured.
        max_samples: Use at most this many samples of each file, the first ones.
        events: Listener for progress.

    Returns:
        The report; its variant is ``int8``.

    Raises:
        ShrinkError: Something the user can fix.
    """
    _require(model=model, data=data, **({"eval-data": evaluation} if evaluation else {}))
    require_output(out, model, data, evaluation or data)
    config = _config(
        model,
        calibration=data,
        evaluation=evaluation or data,
        max_samples=max_samples,
        stages=[{"kind": "optimize"}],
        variants={"int8": [{"kind": "quantize_static", **(stage or {})}]},
        targets=[{"threads": threads}],
    )
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        report = run(config, runs=Path(folder), events=events or Silent())
        declined = next((step.facts.get("declined") for step in report.steps if step.kind == "quantize_static"), None)
        if declined:
            raise ModelError(declined, where=str(model), want="MatMul, Gemm, Conv or the like", fix="keep it as it is")
        _write(Path(folder) / report.name / report.candidate("int8").model, out)
    write_atomically(out.with_suffix(".report.json"), report.to_json().encode())
    return report


def compare(
    reference: Path,
    candidate: Path,
    data: Path,
    *,
    metric: str | None = None,
    gates: Mapping[str, Any] | None = None,
    threads: int = 1,
    max_samples: int | None = None,
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
        max_samples: Use at most this many samples, the first ones.
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
        max_samples=max_samples,
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
    model: Path,
    *,
    evaluation: Path,
    calibration: Path | None = None,
    metric: str | None = None,
    max_samples: int | None = None,
    **more: Any,
) -> RunConfig:
    if metric is None and LABELS in zipped_arrays(evaluation):
        metric = "top1"
    data: dict[str, Any] = {"evaluation": {"npz": evaluation, "metric": metric, "max_samples": max_samples}}
    if calibration is not None:
        data["calibration"] = {"npz": calibration, "max_samples": max_samples}
    document = {"name": "oneline", "model": {"onnx": model}, "data": data, **more}
    return validate(document, base=Path(), origin="arguments")


def _write(made: Path, out: Path) -> None:
    """Put the finished model at ``out`` by renames, its external data beside it.

    Raises:
        StoreError: It cannot be written.
    """
    for file in sorted(made.parent.iterdir(), key=lambda path: path.name == ONNX_FILE):  # the model last
        target = out if file.name == ONNX_FILE else out.with_name(file.name)
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(file, part)
            part.replace(target)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise StoreError(
                f"the model cannot be written: {e.strerror or e}", where=str(target), fix="name another file: -o PATH"
            ) from e

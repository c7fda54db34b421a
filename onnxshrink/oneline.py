"""The pipeline for people without a config: quantize a file, compare two files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import QuantizeDynamic, QuantizeStatic
from onnxshrink.core.artifact import ONNX_FILE
from onnxshrink.core.errors import ConfigError, ModelError, StoreError
from onnxshrink.core.events import Events, Logged
from onnxshrink.core.files import require_files
from onnxshrink.core.report import Report
from onnxshrink.core.store import require_output, write_atomically
from onnxshrink.core.tensors import LABELS
from onnxshrink.data.stored import zipped_arrays
from onnxshrink.pipeline import run
from onnxshrink.report.pages import PAGES
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.search.scheme import Choice, Scheme, choose_scheme

if TYPE_CHECKING:
    from onnxshrink.search.state import State


def quantize(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    evaluation: str | Path | None = None,
    scheme: Scheme | Literal["auto"] = "auto",
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
        scheme: ``static``, ``dynamic`` (with `SmoothQuant` before it), or ``auto``, which looks at the network.
        stage: Settings of `QuantizeStatic` or `QuantizeDynamic` that differ from the defaults.
        threads: Threads while latency is measured.
        max_samples: Use at most this many samples of each file, the first ones.
        events: Listener for progress; by default it is logged.

    Returns:
        The report; its variant is ``int8``, and its ``selection`` says why the scheme is what it is.

    Raises:
        ShrinkError: Something the user can fix.
    """
    model, data, out = Path(model), Path(data), Path(out)
    evaluation = None if evaluation is None else Path(evaluation)
    require_files(model=model, data=data, **({"eval-data": evaluation} if evaluation else {}))
    require_output(out, model, data, evaluation or data)
    choice = _choice(scheme, model, data, stage or {})
    config = _config(
        model,
        calibration=data,
        evaluation=evaluation or data,
        max_samples=max_samples,
        stages=[{"kind": "optimize"}],
        variants={"int8": _stages(choice.scheme, stage or {})},
        targets=[{"threads": threads}],
    )
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        report = run(config, runs=Path(folder), events=events or Logged())
        kind = f"quantize_{choice.scheme}"
        declined = next((step.facts.get("declined") for step in report.steps if step.kind == kind), None)
        if declined:
            raise ModelError(declined, where=str(model), want="MatMul, Gemm, Conv or the like", fix="keep it as it is")
        report = replace(report, selection=f"{report.selection}; {choice.scheme} scheme: {choice.reason}")
        _write((Path(folder) / report.name / report.candidate("int8").model).parent, out)
    write_atomically(out.with_suffix(".report.json"), report.to_json().encode())
    return report


def compare(
    reference: str | Path,
    candidate: str | Path,
    data: str | Path,
    *,
    metric: str | Mapping[str, Any] | None = None,
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
        metric: Task metric, as in the config; ``top1`` by default where there are labels.
        gates: Limits, as in the config.
        threads: Threads while latency is measured.
        max_samples: Use at most this many samples, the first ones.
        events: Listener for progress; by default it is logged.

    Returns:
        The report; its winner is None where a gate failed.

    Raises:
        ShrinkError: Something the user can fix.
    """
    reference, candidate, data = Path(reference), Path(candidate), Path(data)
    require_files(reference=reference, candidate=candidate, data=data)
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
        return run(config, runs=Path(folder), events=events or Logged(), candidates={"candidate": candidate})


def fit(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    budget: Mapping[str, Any],
    evaluation: str | Path | None = None,
    threads: int = 1,
    max_samples: int | None = None,
    runs: str | Path = "runs",
    events: Events | None = None,
    watch: Callable[[State], None] | None = None,
) -> Report:
    """Find the model that keeps every limit of a budget, without training.

    The report is left beside the model, as ``<out>.report.json``; where no model keeps every limit there is no model.

    Args:
        model: The float ``.onnx`` file.
        data: Calibration samples, ``.npz``.
        out: Where to write the ``.onnx`` file that fits.
        budget: As in the config.
        evaluation: Held-out samples to measure on; the calibration samples by default, and the report says so.
        threads: Threads while latency is measured.
        max_samples: Use at most this many samples of each file, the first ones.
        runs: Where trials are kept: a second search goes on from the first.
        events: Listener for progress of the final measurements; by default it is logged.
        watch: Told the state of the search before and after every trial.

    Returns:
        The report; its winner is None where nothing fits, and its ``selection`` says what to relax.

    Raises:
        ShrinkError: Something the user can fix.
    """
    from onnxshrink.search.budget import fit as search

    model, data, out, runs = Path(model), Path(data), Path(out), Path(runs)
    evaluation = None if evaluation is None else Path(evaluation)
    require_files(model=model, data=data, **({"eval-data": evaluation} if evaluation else {}))
    require_output(out, model, data, evaluation or data)
    if "max_accuracy_drop" in budget and LABELS not in zipped_arrays(evaluation or data):
        raise ConfigError(
            f"accuracy cannot be measured: {evaluation or data} has no array {LABELS!r}",
            where="max_accuracy_drop",
            got=", ".join(sorted(zipped_arrays(evaluation or data))),
            want=f"{LABELS!r}, one class for each sample",
            fix="add them, or limit the drift of the outputs: min_sqnr_db 20",
        )
    config = _config(
        model,
        calibration=data,
        evaluation=evaluation or data,
        max_samples=max_samples,
        stages=[{"kind": "optimize"}],
        targets=[{"threads": threads}],
        budget=dict(budget),
    ).model_copy(update={"name": f"fit-{model.stem}"})
    report = search(config, runs=runs, events=events or Logged(), watch=watch, pages=PAGES)
    if report.winner is not None:
        _write((runs / report.name / report.candidate(report.winner).model).parent, out)
    write_atomically(out.with_suffix(".report.json"), report.to_json().encode())
    return report


def _choice(scheme: Scheme | Literal["auto"], model: Path, data: Path, stage: Mapping[str, Any]) -> Choice:
    """What was asked for, what the other settings imply, or what suits the network.

    Raises:
        ConfigError: A setting of static quantization meets the dynamic scheme.
    """
    static = sorted(stage.keys() & (set(QuantizeStatic.model_fields) - set(QuantizeDynamic.model_fields)))
    if scheme == "dynamic" and static:
        raise ConfigError(
            f"the dynamic scheme has no {' and no '.join(static)}",
            where="scheme",
            got=f"dynamic with {', '.join(static)}",
            want="settings of static quantization only with the static scheme",
            fix=f"leave out {', '.join(static)}, or ask for the static scheme",
        )
    if scheme != "auto":
        return Choice(scheme, "it was asked for")
    if static:
        return Choice("static", f"{', '.join(static)} {'is a setting' if len(static) == 1 else 'are settings'} of it")
    return choose_scheme(model, data)


def _stages(scheme: Scheme, stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The variant's own stages: 7-bit weights where the dynamic kernels of this machine could saturate."""
    if scheme == "static":
        return [{"kind": "quantize_static", **stage}]
    reduce_range = detect_isa() == "x86_avx2"
    return [{"kind": "smooth_quant"}, {"kind": "quantize_dynamic", "reduce_range": reduce_range, **stage}]


def _config(
    model: Path,
    *,
    evaluation: Path,
    calibration: Path | None = None,
    metric: str | Mapping[str, Any] | None = None,
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
    """Put the finished model of a folder at ``out`` by renames, its external data beside it.

    Raises:
        StoreError: It cannot be written.
    """
    for file in sorted(made.iterdir(), key=lambda path: path.name == ONNX_FILE):  # the model last
        target = out if file.name == ONNX_FILE else out.with_name(file.name)
        part = target.with_name(f".{target.name}.part")
        try:
            shutil.copyfile(file, part)
            part.replace(target)
        except OSError as e:
            with suppress(OSError):  # where nothing can be written, nothing is left either
                part.unlink(missing_ok=True)
            raise StoreError(
                f"the model cannot be written: {e.strerror or e}", where=str(target), fix="name another file: -o PATH"
            ) from e

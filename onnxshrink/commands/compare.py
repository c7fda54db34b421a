"""``onnxshrink compare``: compare two ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.flags import in_flags
from onnxshrink.commands.options import AsJson, MaxSamples, Quiet, listening, show


def compare(
    reference: Annotated[Path, typer.Argument(help="The model to compare with.")],
    candidate: Annotated[Path, typer.Argument(help="The model in question.")],
    data: Annotated[Path, typer.Option(help="Samples: an .npz of the models' inputs, with `labels` for accuracy.")],
    metric: Annotated[
        str | None,
        typer.Option(help="top1, top5, mae, rmse, spearman, cosine, f1 or miou; top1 if there are labels."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Fail above this drop, such as 0.01.")] = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="Fail below this SQNR.")] = None,
    max_abs_error: Annotated[str | None, typer.Option(help="Fail above this error: 0.05, or '2 steps'.")] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Fail below this share of samples with the reference's winning class.")
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Fail above this latency relative to the reference.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Fail above this size, such as '60 kB'.")] = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Compare two ONNX models on the same samples: drift, accuracy, size and latency."""
    from onnxshrink.oneline import compare as compare_models

    gates = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_sqnr_db": min_sqnr_db,
        "max_abs_error": max_abs_error,
        "min_top1_agreement": min_top1_agreement,
        "max_latency_ratio": max_latency_ratio,
        "max_size": max_size,
    }
    given = {name: value for name, value in gates.items() if value is not None}
    with in_flags(compare), listening(quiet=quiet, as_json=as_json) as (events, console):
        report = compare_models(
            reference,
            candidate,
            data,
            metric=metric,
            gates=given,
            threads=threads,
            max_samples=max_samples,
            events=events,
        )
    show(report, console, as_json=as_json)
    return 0 if report.winner else 1

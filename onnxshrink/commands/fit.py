"""``onnxshrink fit``: make an ONNX file fit into a budget."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.flags import in_flags
from onnxshrink.commands.options import AsJson, MaxSamples, Quiet, listening, show_search

_LIMITS = "What the model must keep (at least one)"
_SEARCH = "The search"


class Goal(StrEnum):
    """Choices of ``--minimize``."""

    size = "size"
    latency = "latency"
    accuracy_drop = "accuracy_drop"


def fit(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[
        Path, typer.Option(help="Calibration samples: an .npz of the model's inputs, with `labels` for accuracy.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write the model that fits; <model>.fit.onnx beside it if none."),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval-data", help="Held-out samples to measure on; the calibration samples if none."),
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest file: 2MB.", rich_help_panel=_LIMITS)] = None,
    max_compressed_size: Annotated[
        str | None, typer.Option(help="Largest file as gzip: 1.5MB.", rich_help_panel=_LIMITS)
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Largest accuracy drop: 0.01 is one point.", rich_help_panel=_LIMITS)
    ] = None,
    min_sqnr_db: Annotated[
        float | None, typer.Option(help="Smallest SQNR against the model, in dB: 20.", rich_help_panel=_LIMITS)
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Largest latency relative to the model: 0.6.", rich_help_panel=_LIMITS)
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Largest median latency in milliseconds.", rich_help_panel=_LIMITS)
    ] = None,
    max_peak_memory: Annotated[
        str | None, typer.Option(help="Largest memory it adds to a process: 30MB.", rich_help_panel=_LIMITS)
    ] = None,
    minimize: Annotated[
        Goal, typer.Option(help="What to make small within the limits.", rich_help_panel=_SEARCH)
    ] = Goal.size,
    time_limit: Annotated[
        str, typer.Option(help="Time for the search: '90 s', '10 min'.", rich_help_panel=_SEARCH)
    ] = "20 min",
    workers: Annotated[int, typer.Option(min=1, help="Processes that try models.", rich_help_panel=_SEARCH)] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    runs: Annotated[Path, typer.Option(help="Where trials are kept: a second search goes on from the first.")] = Path(
        "runs"
    ),
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Find the smallest (or fastest, or most accurate) model that keeps every limit, or say which limit to relax."""
    from onnxshrink.core.errors import ConfigError
    from onnxshrink.oneline import fit as fit_model

    given = {
        "max_size": max_size,
        "max_compressed_size": max_compressed_size,
        "max_accuracy_drop": max_drop,
        "min_sqnr_db": min_sqnr_db,
        "max_latency_ratio": max_latency_ratio,
        "max_latency_ms": max_latency_ms,
        "max_peak_memory": max_peak_memory,
    }
    limits = {name: limit for name, limit in given.items() if limit is not None}
    if not limits:
        raise ConfigError("there is no limit to fit into", want="at least one limit", fix="--max-size 2MB")
    parallel = {"parallel": {"kind": "processes", "workers": workers}} if workers > 1 else {}
    target = out or model.with_suffix(".fit.onnx")
    with in_flags(fit), listening(quiet=quiet, as_json=as_json, searching=True) as (events, console):
        report = fit_model(
            model,
            data,
            target,
            evaluation=evaluation,
            budget={**limits, "minimize": minimize.value, "time_limit": time_limit, **parallel},
            threads=threads,
            max_samples=max_samples,
            runs=runs,
            events=events,
            watch=getattr(events, "watch", None),
        )
    show_search(report, console, runs / report.name, as_json=as_json)
    if report.winner:
        console.print(f"  [bold]wrote[/]   {target}", highlight=False, soft_wrap=True)
    else:
        console.print(f"  no model was written to {target}", highlight=False, soft_wrap=True, markup=False)
    return 0 if report.winner else 1

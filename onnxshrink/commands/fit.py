"""``onnxshrink fit``: make an ONNX file fit into a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import AsJson, MaxSamples, Quiet, listening, show


def fit(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[Path, typer.Option(help="Calibration samples: an .npz of the model's inputs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the model that fits.")],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval-data", help="Held-out samples to measure on; the calibration samples if none."),
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest file, such as '2 MB'.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest accuracy drop, such as 0.01; needs labels.")] = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="Smallest SQNR against the model.")] = None,
    max_latency_ratio: Annotated[float | None, typer.Option(help="Largest latency relative to the model.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="Largest p50 latency in milliseconds.")] = None,
    minimize: Annotated[str, typer.Option(help="size, latency or accuracy_drop.")] = "size",
    time_limit: Annotated[str, typer.Option(help="Time for the search, such as '10 min'.")] = "20 min",
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    runs: Annotated[Path, typer.Option(help="Where trials are kept, so that a second search is quick.")] = Path("runs"),
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Find the smallest (or fastest, or most accurate) model that keeps every limit, or the nearest misses."""
    from onnxshrink.oneline import fit as fit_model

    limits = {
        "max_size": max_size,
        "max_accuracy_drop": max_drop,
        "min_sqnr_db": min_sqnr_db,
        "max_latency_ratio": max_latency_ratio,
        "max_latency_ms": max_latency_ms,
    }
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    with listening(quiet=quiet, as_json=as_json) as (events, console):
        report = fit_model(
            model,
            data,
            out,
            evaluation=evaluation,
            budget=budget | {"minimize": minimize, "time_limit": time_limit},
            threads=threads,
            max_samples=max_samples,
            runs=runs,
            events=events,
        )
    show(report, console, folder=runs / report.name, as_json=as_json)
    return 0 if report.winner else 1

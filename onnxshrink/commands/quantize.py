"""``onnxshrink quantize``: quantize one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.flags import in_flags
from onnxshrink.commands.options import (
    AsJson,
    Format,
    Granularity,
    MaxSamples,
    Method,
    Quiet,
    Scheme,
    Types,
    listening,
    show,
)


def quantize(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[Path, typer.Option(help="Calibration samples: an .npz of the model's inputs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the int8 model.")],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval-data", help="Held-out samples to measure on; the calibration samples if none."),
    ] = None,
    scheme: Annotated[
        Scheme, typer.Option(help="Ranges from the samples, or anew for every input; auto looks at the network.")
    ] = Scheme.auto,
    granularity: Annotated[
        Granularity, typer.Option(help="One scale per tensor, or per channel.")
    ] = Granularity.per_channel,
    types: Annotated[
        Types | None,
        typer.Option(help="Static: of activations and weights; auto suits this machine.", show_default="auto"),
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="Static: how the file says int8.", show_default="qdq")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Static: how ranges follow from the samples.", show_default="minmax")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Name of a node to leave in float; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Quantize an ONNX model to int8, and measure what that changed."""
    from onnxshrink.oneline import quantize as quantize_model

    stage = {
        "granularity": granularity.value,
        "exclude_nodes": exclude or [],
    }
    static = {"types": types, "format": format_, "method": method}
    stage |= {name: choice.value for name, choice in static.items() if choice is not None}
    with in_flags(quantize), listening(quiet=quiet, as_json=as_json) as (events, console):
        report = quantize_model(
            model,
            data,
            out,
            evaluation=evaluation,
            scheme=scheme.value,
            stage=stage,
            threads=threads,
            max_samples=max_samples,
            events=events,
        )
    show(report, console, as_json=as_json)
    for label, path in (("model ", out), ("report", out.with_suffix(".report.json"))):
        console.print(f"  {label}  {path}", highlight=False, soft_wrap=True, markup=False)
    return 0

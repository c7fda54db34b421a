"""``onnxshrink sensitivity``: say which nodes suffer most in int8."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.flags import in_flags
from onnxshrink.commands.options import AsJson, Granularity, MaxSamples, Method, Quiet, Types, listening


def sensitivity(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[Path, typer.Option(help="Calibration samples: an .npz of the model's inputs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the stage that names the nodes to this YAML file.")
    ] = None,
    min_sqnr_db: Annotated[float, typer.Option(help="Look for the fastest mixture with this SQNR.")] = 20.0,
    max_float_ratio: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the multiply-accumulates that may stay.")
    ] = 0.1,
    granularity: Annotated[
        Granularity, typer.Option(help="One scale per tensor, or per channel.")
    ] = Granularity.per_channel,
    types: Annotated[Types, typer.Option(help="Of activations and weights; auto suits this machine.")] = Types.auto,
    method: Annotated[Method, typer.Option(help="How ranges follow from the samples.")] = Method.minmax,
    max_samples: MaxSamples = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say which nodes suffer most in int8, what each scheme for them costs, and which mixture is best."""
    from onnxshrink.core.store import require_output, write_atomically
    from onnxshrink.report.sensitivity import print_sensitivity
    from onnxshrink.search.sensitivity import find_sensitivity

    if out is not None:
        require_output(out, model, data)
    stage = {
        "min_sqnr_db": min_sqnr_db,
        "max_float_ratio": max_float_ratio,
        "granularity": granularity.value,
        "types": types.value,
        "method": method.value,
    }
    with in_flags(sensitivity), listening(quiet=quiet, as_json=as_json) as (events, console):
        found = find_sensitivity(model, data, stage=stage, max_samples=max_samples, events=events)
    if out is not None:
        write_atomically(out, found.to_yaml().encode())
    if as_json:
        sys.stdout.write(found.to_json())
        return
    print_sensitivity(found, console)
    if out is not None:
        console.print(f"  stage  {out}", highlight=False, soft_wrap=True, markup=False)

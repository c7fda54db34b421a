"""``onnxshrink check``: check a model against its bundle, with the code that lies in the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import Quiet


def check(
    bundle: Annotated[Path, typer.Argument(help="The folder `bundle` that a run left.")],
    model: Annotated[Path | None, typer.Argument(help="The model in question; the bundle's own if none.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the result as JUnit XML to this file.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="Write what failed as SARIF 2.1.0 to this file.")] = None,
    *,
    update: Annotated[
        bool, typer.Option("--update", help="Make the model the baseline, and say what changed.")
    ] = False,
    behaviour_only: Annotated[
        bool, typer.Option("--behaviour-only", help="Let the opset, the operators and the weights differ.")
    ] = False,
    latency: Annotated[
        bool | None,
        typer.Option(help="Time it; by default only a model that differs, on the machine of the bundle."),
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> int:
    """Check that a model still is and does what its bundle says; needs numpy and onnxruntime only."""
    from onnxshrink.regress.check import run_check

    return run_check(
        bundle,
        model,
        as_json=as_json,
        junit=junit,
        sarif=sarif,
        update=update,
        latency=latency,
        behaviour_only=behaviour_only,
        quiet=quiet,
    )

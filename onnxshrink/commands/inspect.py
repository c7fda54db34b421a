"""``onnxshrink inspect``: say what an ONNX file is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import AsJson, Level, Quiet


def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX model.")],
    provider: Annotated[str, typer.Option(help="Execution provider: cpu, cuda, openvino, …")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Samples: an .npz that gives dynamic axes their lengths.")] = None,
    optimization: Annotated[Level, typer.Option(help="Optimization level of the session.")] = Level.all,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what an ONNX model is, which share of it runs in integers, and what keeps the rest in float."""
    from rich.console import Console

    from onnxshrink.config.gates import Target
    from onnxshrink.report.inspection import inspect_model, print_inspection

    found = inspect_model(model, Target(provider=provider), data=data, optimization=optimization.value)
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        print_inspection(found, Console(quiet=quiet))

"""``onnxshrink inspect``: say what an ONNX file is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxshrink.commands.options import AsJson, Level, Quiet


def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX model.")],
    provider: Annotated[str, typer.Option(help="Execution provider: cpu, cuda, openvino, …")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Samples: an .npz that gives dynamic axes their lengths.")] = None,
    optimization: Annotated[Level, typer.Option(help="Optimization level of the session.")] = Level.all,
    html: Annotated[Path | None, typer.Option(help="Also write it as one page that opens offline.")] = None,
    *,
    netron: Annotated[
        bool, typer.Option("--netron", help="Also open the graph in netron, if it is installed.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what an ONNX model is, where its bytes lie, what runs in integers, and what would keep it from that."""
    from rich.console import Console

    from onnxshrink.config.gates import Target
    from onnxshrink.core.store import require_output, write_atomically
    from onnxshrink.report.inspection import inspect_model, print_inspection
    from onnxshrink.report.inspection_page import inspection_page

    if html is not None:
        require_output(html, model, data or model)
    viewer = _netron() if netron else None
    found = inspect_model(model, Target(provider=provider), data=data, optimization=optimization.value)
    if html is not None:
        write_atomically(html, inspection_page(found).encode())
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        console = Console(quiet=quiet)
        print_inspection(found, console)
        if html is not None:
            console.print(f"  page  {html}", highlight=False, soft_wrap=True, markup=False)
    if viewer is not None:
        viewer.start(str(model))
        viewer.wait()


def _netron() -> Any:
    """The module; looked for before any work is done.

    Raises:
        DependencyError: It is not installed.
    """
    import importlib

    from onnxshrink.core.errors import DependencyError

    try:
        return importlib.import_module("netron")
    except ImportError as e:
        raise DependencyError(
            "netron is not installed", where="--netron", want="the viewer of graphs", fix="pip install netron"
        ) from e

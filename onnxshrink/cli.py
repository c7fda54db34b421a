"""The command line: the literal list of commands; each is one file in `onnxshrink.commands`."""

from __future__ import annotations

from typing import Annotated

import typer

from onnxshrink.commands.bisect import bisect
from onnxshrink.commands.card import card
from onnxshrink.commands.check import check
from onnxshrink.commands.compare import compare
from onnxshrink.commands.doctor import doctor
from onnxshrink.commands.explain import explain
from onnxshrink.commands.fit import fit
from onnxshrink.commands.init import init
from onnxshrink.commands.inspect import inspect
from onnxshrink.commands.quantize import quantize
from onnxshrink.commands.report import report
from onnxshrink.commands.run import run
from onnxshrink.commands.schema import schema
from onnxshrink.commands.sensitivity import sensitivity

app = typer.Typer(
    help="Shrink a PyTorch or ONNX model for the device it must run on, and prove that it still works.",
    epilog="Exit status: 0 passed, 1 a gate failed, 2 you can fix it (the message says how), 3 a bug of ours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    init,
    run,
    quantize,
    fit,
    compare,
    inspect,
    check,
    report,
    card,
    sensitivity,
    explain,
    bisect,
    doctor,
    schema,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _options(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False
) -> None:
    if version:
        from onnxshrink import __version__

        typer.echo(f"onnxshrink {__version__}")
        raise typer.Exit

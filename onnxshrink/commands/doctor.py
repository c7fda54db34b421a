"""``onnxshrink doctor``: say whether this installation and this machine can do the work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import Quiet


def doctor(
    runs: Annotated[Path, typer.Option(help="Where runs and the store would be kept.")] = Path("runs"),
    *,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON on standard output.")] = False,
) -> int:
    """Say what is installed, what of it loads, what the processor does with int8, and what is known to go wrong.

    Exit status 1 says that something known to be bad was found.
    """
    from rich.console import Console

    from onnxshrink.report.doctor import diagnose, print_diagnosis

    found = diagnose(runs)
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        print_diagnosis(found, Console(quiet=quiet))
    return found.exit_status

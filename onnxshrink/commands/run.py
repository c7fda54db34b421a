"""``onnxshrink run``: run a config."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import AsJson, Quiet, listening, show, show_search


def run(
    config: Annotated[Path, typer.Argument(help="The YAML config.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: stages[0].epochs=2", metavar="PATH=VALUE")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs and the store are kept.")] = Path("runs"),
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Run a config: every stage, every variant, every measurement; leave the winner and its evidence."""
    from onnxshrink.config.load import load_config
    from onnxshrink.runtime.processes import launched

    settings = load_config(config, overrides or [])
    number, processes = launched()
    if processes > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch warns of says nothing to the user
    if number > 0 and settings.budget is None:
        from onnxshrink.stages.together import follow

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says that it was interrupted
        follow(settings, base=config.parent)
        return 0
    from onnxshrink.api import run_and_leave

    searching = settings.budget is not None
    with listening(quiet=quiet, as_json=as_json, searching=searching) as (events, console):
        report = run_and_leave(
            settings,
            runs=runs,
            base=config.parent,
            events=events,
            processes=processes,
            watch=getattr(events, "watch", None),
        )
    (show_search if searching else show)(report, console, folder=runs / report.name, config=config, as_json=as_json)
    return 0 if report.winner else 1

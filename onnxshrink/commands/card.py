"""``onnxshrink card``: write a run's model card anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(run: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/digits.")]) -> int:
    """Write MODEL_CARD.md from a run's report, with the metadata that Hugging Face reads.

    A run leaves one by itself; this is for a run of an older version. Exit status 1 says that the run has no winner.
    """
    from onnxshrink.core.report import Report
    from onnxshrink.core.run_folder import REPORT_FILE
    from onnxshrink.core.store import write_atomically
    from onnxshrink.report.model_card import MODEL_CARD_FILE, model_card

    text = model_card(Report.read(run / REPORT_FILE))
    if text is None:
        typer.echo(f"{run}: no variant was selected, so there is no model to describe", err=True)
        return 1
    write_atomically(run / MODEL_CARD_FILE, text.encode())
    typer.echo(str(run / MODEL_CARD_FILE))
    return 0

"""``onnxshrink report``: draw a run's page anew, or two runs side by side."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, such as runs/digits.")],
    compare: Annotated[Path | None, typer.Option(help="Another run's folder, to see both side by side.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to; report.html or compare.html in the run's folder.")] = None,
    *,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Draw report.html from a run's report.json: one file that needs nothing else.

    A run leaves one by itself; this is for a run of an older version, or to compare two runs.
    """
    from onnxshrink.core.errors import StoreError
    from onnxshrink.core.store import write_atomically
    from onnxshrink.report.html import COMPARISON_FILE, PAGE_FILE, compare_folders, render_folder

    page = render_folder(run) if compare is None else compare_folders(run, compare)
    path = out or run / (PAGE_FILE if compare is None else COMPARISON_FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.encode())
    except OSError as e:
        raise StoreError(
            f"the page cannot be written: {e.strerror or e}",
            where=str(path),
            want="a file in a folder that can be written",
            fix="name another one: --out FILE",
        ) from e
    typer.echo(str(path))
    if open_it:
        webbrowser.open(path.resolve().as_uri())

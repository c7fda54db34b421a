"""What several commands share: their choices, the listener for progress, and how a report is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from onnxshrink.core.report import Report

MaxSamples = Annotated[int | None, typer.Option(min=1, help="Use at most this many samples, the first ones.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else.")]


class Granularity(StrEnum):
    """Choices of ``--granularity``."""

    per_tensor = "per_tensor"
    per_channel = "per_channel"


class Types(StrEnum):
    """Choices of ``--types``: activations, weights."""

    auto = "auto"
    u8s8 = "u8s8"
    s8s8 = "s8s8"
    u8u8 = "u8u8"


class Format(StrEnum):
    """Choices of ``--format``."""

    qdq = "qdq"
    qoperator = "qoperator"


class Method(StrEnum):
    """Choices of ``--method``."""

    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"
    auto = "auto"


class Scheme(StrEnum):
    """Choices of ``--scheme``."""

    auto = "auto"
    static = "static"
    dynamic = "dynamic"


class Level(StrEnum):
    """Choices of ``--optimization``."""

    disabled = "disabled"
    basic = "basic"
    extended = "extended"
    all = "all"


@contextmanager
def listening(*, quiet: bool, as_json: bool, searching: bool = False) -> Iterator[tuple[Any, Console]]:
    """A listener for progress and the console for the result; progress goes to standard error.

    The listener of a search has ``watch`` as well, but where nobody listens.
    """
    from rich.console import Console

    from onnxshrink.core.events import Silent

    console = Console(quiet=quiet or as_json)
    with redirect_stdout(sys.stderr):  # what the user's own code prints is no part of the result
        if quiet or as_json:
            yield Silent(), console
            return
        if searching:
            from onnxshrink.report.search import search_listener as listener
        else:
            from onnxshrink.report.progress import listener
        with listener(Console(stderr=True)) as events:
            yield events, console


def show(
    report: Report, console: Console, *, folder: Path | None = None, config: Path | None = None, as_json: bool
) -> None:
    """Print a report for people, or as JSON."""
    from onnxshrink.report.terminal import print_report

    if as_json:
        sys.stdout.write(report.to_json())
    elif console.quiet and report.winner is None:
        typer.echo(report.selection, err=True)
    else:
        print_report(report, console, folder, config=config)


def show_search(report: Report, console: Console, folder: Path, *, config: Path | None = None, as_json: bool) -> None:
    """Print what a search came to and its report for people, or the report as JSON."""
    from onnxshrink.core.run_folder import SEARCH_FILE, SEARCH_TABLE
    from onnxshrink.report.search import print_search
    from onnxshrink.search.document import read_search

    if not (as_json or console.quiet):
        print_search(read_search(folder / SEARCH_FILE), console)
    show(report, console, folder=folder, config=config, as_json=as_json)
    console.print(
        f"  search  {folder / SEARCH_FILE}, to plot {SEARCH_TABLE}", highlight=False, markup=False, soft_wrap=True
    )

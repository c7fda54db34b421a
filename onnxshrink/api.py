"""What ``import onnxshrink`` offers besides the pipeline for people without a config: a run, and its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from onnxshrink.config.load import load_config, overridden, validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Events, Logged
from onnxshrink.core.report import Report
from onnxshrink.pipeline import run as run_pipeline
from onnxshrink.regress.bundle import leave_bundle
from onnxshrink.report.pages import PAGES
from onnxshrink.report.progress import listener

if TYPE_CHECKING:
    from onnxshrink.search.state import State


def run(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    runs: str | Path = "runs",
    events: Events | None = None,
) -> Report:
    """Run a config and leave what the command line leaves: the winner, every variant, the report, the bundle.

    Args:
        config: A YAML file, the same as a dict, or what `RunConfig` made of it. Paths in a dict start at the working
            folder.
        overrides: Values that take precedence, such as ``stages[0].epochs=2``; for a file or a dict.
        runs: Folder of the runs and of the store they share.
        events: Listener for progress; by default it is logged.

    Returns:
        The report; its winner is None where no variant passed its gates.

    Raises:
        ShrinkError: Something the user can fix.
    """
    base = Path()
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError(
                "a RunConfig is finished and takes no overrides",
                where="overrides",
                got=", ".join(overrides),
                want="overrides of a file or a dict",
                fix="config.model_copy(update={...}), or run the dict that it was made from",
            )
        settings = config
    elif isinstance(config, Mapping):
        settings = validate(overridden(deepcopy(dict(config)), overrides), base=base)
    else:
        settings, base = load_config(Path(config), overrides), Path(config).parent
    return run_and_leave(settings, runs=Path(runs), base=base, events=events or Logged())


def run_and_leave(
    config: RunConfig,
    *,
    runs: Path,
    base: Path,
    events: Events,
    processes: int = 1,
    watch: Callable[[State], None] | None = None,
) -> Report:
    """Run a config, or search where it has a budget, and leave the bundle and the pages beside the rest.

    Args:
        config: What to do.
        runs: Folder of the runs and of the store they share.
        base: The folder where the user's modules may lie.
        events: Listener for progress.
        processes: How many train.
        watch: Told the state of a search before and after every trial.

    Raises:
        ShrinkError: Something the user can fix.
    """
    if config.budget is not None:
        from onnxshrink.search.budget import fit

        return fit(config, runs=runs, base=base, events=events, watch=watch, leave=leave_bundle, pages=PAGES)
    return run_pipeline(
        config, runs=runs, base=base, events=events, processes=processes, leave=leave_bundle, pages=PAGES
    )


def progress() -> AbstractContextManager[Events]:
    """A listener that shows what goes on: bars on a terminal, plain lines in a notebook or a pipe.

    ```python
    with onnxshrink.progress() as events:
        onnxshrink.run("my.yaml", events=events)
    ```
    """
    if Console().is_jupyter:
        # There, standard error is painted as if something were wrong; and kernels set FORCE_COLOR, by which rich takes
        # a notebook for a terminal, whose cursor moves end as a pile of bars.
        return listener(Console(force_jupyter=False, force_terminal=False))
    return listener(Console(stderr=True))

"""``onnxshrink bisect``: say which step was the first to break a limit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from onnxshrink.commands.options import AsJson, MaxSamples, Quiet, listening


def bisect(
    config: Annotated[Path, typer.Argument(metavar="CONFIG|REFERENCE", help="The YAML config, or a reference model.")],
    candidate: Annotated[
        Path | None,
        typer.Argument(help="The model in question, if the first is a reference model.", show_default=False),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Which variant of the config; needed if there are several.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Two models: samples, an .npz of the models' inputs.")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Two models: the task metric for a drop.", show_default="top1")
    ] = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="Broken below this SQNR.")] = None,
    max_abs_error: Annotated[float | None, typer.Option(help="Broken above this absolute error.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Broken above this drop, such as 0.01.")] = None,
    max_samples: MaxSamples = None,
    provider: Annotated[
        str | None, typer.Option(help="Two models: where the candidate is deployed.", show_default="cpu")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Two models: threads.", show_default="1")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a value: stages[0].epochs=2", metavar="PATH=VALUE")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs and the store are kept.")] = Path("runs"),
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Find the step that first broke a limit: export, a pass of the optimizer, quantization, or the session itself.

    The limit is the config's own gate if none is given. Exit status 1 says that a step broke it, or gave a model that
    does not load or run.
    """
    from onnxshrink.config.gates import Gates, Target
    from onnxshrink.config.load import load_config
    from onnxshrink.core.errors import ConfigError
    from onnxshrink.report.bisection import print_bisection
    from onnxshrink.search.bisection import bisect_files, bisect_run
    from onnxshrink.search.limits import limit_of

    with listening(quiet=quiet, as_json=as_json) as (events, console):
        if candidate is None and config.suffix != ".onnx":
            _refuse("a config", data=data, metric=metric, provider=provider, threads=threads)
            settings = load_config(config, overrides or [])
            limit = limit_of(settings.gates, min_sqnr_db, max_abs_error, max_accuracy_drop)
            found = bisect_run(
                settings, limit, variant=variant, max_samples=max_samples, runs=runs, base=config.parent, events=events
            )
        elif candidate is None or data is None:
            raise ConfigError(
                "two models are compared on samples",
                got=str(config) if candidate is None else f"{config} {candidate}",
                want="a config, or two models and --data",
                fix="onnxshrink bisect reference.onnx candidate.onnx --data samples.npz",
            )
        else:
            _refuse("two models", variant=variant, set=overrides)
            limit = limit_of(Gates(), min_sqnr_db, max_abs_error, max_accuracy_drop)
            target = Target(provider=provider or "cpu", threads=threads or 1)
            found = bisect_files(
                config, candidate, data, limit, metric=metric, max_samples=max_samples, target=target, events=events
            )
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        print_bisection(found, console)
    return 0 if found.search.first is None else 1


def _refuse(mode: str, **options: object) -> None:
    """Raise where an option was given that means nothing for what is searched."""
    from onnxshrink.core.errors import ConfigError

    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} mean{'s' if len(given) == 1 else ''} nothing for {mode}",
            fix="write it into the config, or use --set" if mode == "a config" else "search a config",
        )

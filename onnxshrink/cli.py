"""The command line. Each command is a few lines over the Python API; frameworks are imported only when one runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.core.report import Report

app = typer.Typer(
    help="Shrink a PyTorch or ONNX model for the device it must run on, and prove that it still works.",
    epilog="Exit status: 0 passed, 1 a gate failed, 2 you can fix it (the message says how), 3 a bug of ours.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


class Provider(StrEnum):
    """Choices of ``--provider``."""

    cpu = "cpu"
    cuda = "cuda"


class Level(StrEnum):
    """Choices of ``--optimization``."""

    disabled = "disabled"
    basic = "basic"
    extended = "extended"
    all = "all"


@app.callback(invoke_without_command=True)
def _options(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False
) -> None:
    if version:
        from onnxshrink import __version__

        typer.echo(f"onnxshrink {__version__}")
        raise typer.Exit


@app.command()
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
    if number > 0:
        from onnxshrink.stages.together import follow

        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process says that it was interrupted
        follow(settings, base=config.parent)
        return 0
    from onnxshrink.pipeline import run as run_pipeline

    with _listening(quiet=quiet, as_json=as_json) as (events, console):
        report = run_pipeline(settings, runs=runs, base=config.parent, events=events, processes=processes)
    _show(report, console, folder=runs / report.name, as_json=as_json)
    return 0 if report.winner else 1


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[Path, typer.Option(help="Calibration samples: an .npz of the model's inputs.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the int8 model.")],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval-data", help="Held-out samples to measure on; the calibration samples if none."),
    ] = None,
    scheme: Annotated[
        Scheme, typer.Option(help="Ranges from the samples, or anew for every input; auto looks at the network.")
    ] = Scheme.auto,
    granularity: Annotated[
        Granularity, typer.Option(help="One scale per tensor, or per channel.")
    ] = Granularity.per_channel,
    types: Annotated[
        Types | None,
        typer.Option(help="Static: of activations and weights; auto suits this machine.", show_default="auto"),
    ] = None,
    format_: Annotated[
        Format | None, typer.Option("--format", help="Static: how the file says int8.", show_default="qdq")
    ] = None,
    method: Annotated[
        Method | None, typer.Option(help="Static: how ranges follow from the samples.", show_default="minmax")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Name of a node to leave in float; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Quantize an ONNX model to int8, and measure what that changed."""
    from onnxshrink.oneline import quantize as quantize_model

    stage = {
        "granularity": granularity.value,
        "exclude_nodes": exclude or [],
    }
    static = {"types": types, "format": format_, "method": method}
    stage |= {name: choice.value for name, choice in static.items() if choice is not None}
    with _listening(quiet=quiet, as_json=as_json) as (events, console):
        report = quantize_model(
            model,
            data,
            out,
            evaluation=evaluation,
            scheme=scheme.value,
            stage=stage,
            threads=threads,
            max_samples=max_samples,
            events=events,
        )
    _show(report, console, as_json=as_json)
    for label, path in (("model ", out), ("report", out.with_suffix(".report.json"))):
        console.print(f"  {label}  {path}", highlight=False, soft_wrap=True, markup=False)
    return 0


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="The model to compare with.")],
    candidate: Annotated[Path, typer.Argument(help="The model in question.")],
    data: Annotated[Path, typer.Option(help="Samples: an .npz of the models' inputs, with `labels` for accuracy.")],
    metric: Annotated[str | None, typer.Option(help="top1, top5, mae or rmse; top1 if there are labels.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads while latency is measured.")] = 1,
    max_samples: MaxSamples = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Fail above this drop, such as 0.01.")] = None,
    min_sqnr_db: Annotated[float | None, typer.Option(help="Fail below this SQNR.")] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="Fail above this latency relative to the reference.")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Fail above this size, such as '60 kB'.")] = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> int:
    """Compare two ONNX models on the same samples: drift, accuracy, size and latency."""
    from onnxshrink.oneline import compare as compare_models

    gates = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_sqnr_db": min_sqnr_db,
        "max_latency_ratio": max_latency_ratio,
        "max_size": max_size,
    }
    given = {name: value for name, value in gates.items() if value is not None}
    with _listening(quiet=quiet, as_json=as_json) as (events, console):
        report = compare_models(
            reference,
            candidate,
            data,
            metric=metric,
            gates=given,
            threads=threads,
            max_samples=max_samples,
            events=events,
        )
    _show(report, console, as_json=as_json)
    return 0 if report.winner else 1


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="An ONNX model.")],
    provider: Annotated[Provider, typer.Option(help="Execution provider.")] = Provider.cpu,
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

    found = inspect_model(model, Target(provider=provider.value), data=data, optimization=optimization.value)
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        print_inspection(found, Console(quiet=quiet))


@app.command()
def sensitivity(
    model: Annotated[Path, typer.Argument(help="The float ONNX model.")],
    data: Annotated[Path, typer.Option(help="Calibration samples: an .npz of the model's inputs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the stage that names the nodes to this YAML file.")
    ] = None,
    min_sqnr_db: Annotated[float, typer.Option(help="Look for the fastest mixture with this SQNR.")] = 20.0,
    max_float_ratio: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the multiply-accumulates that may stay.")
    ] = 0.1,
    granularity: Annotated[
        Granularity, typer.Option(help="One scale per tensor, or per channel.")
    ] = Granularity.per_channel,
    types: Annotated[Types, typer.Option(help="Of activations and weights; auto suits this machine.")] = Types.auto,
    method: Annotated[Method, typer.Option(help="How ranges follow from the samples.")] = Method.minmax,
    max_samples: MaxSamples = None,
    *,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say which nodes suffer most in int8, what each scheme for them costs, and which mixture is best."""
    from onnxshrink.core.store import require_output, write_atomically
    from onnxshrink.report.sensitivity import print_sensitivity
    from onnxshrink.search.sensitivity import find_sensitivity

    if out is not None:
        require_output(out, model, data)
    stage = {
        "min_sqnr_db": min_sqnr_db,
        "max_float_ratio": max_float_ratio,
        "granularity": granularity.value,
        "types": types.value,
        "method": method.value,
    }
    with _listening(quiet=quiet, as_json=as_json) as (events, console):
        found = find_sensitivity(model, data, stage=stage, max_samples=max_samples, events=events)
    if out is not None:
        write_atomically(out, found.to_yaml().encode())
    if as_json:
        sys.stdout.write(found.to_json())
        return
    print_sensitivity(found, console)
    if out is not None:
        console.print(f"  stage  {out}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of the config, for editors."""
    from onnxshrink.config.schema import schema_text

    typer.echo(schema_text(), nl=False)


@contextmanager
def _listening(*, quiet: bool, as_json: bool) -> Iterator[tuple[Any, Console]]:
    """A listener for progress and the console for the result; progress goes to standard error."""
    from rich.console import Console

    from onnxshrink.core.events import Silent
    from onnxshrink.report.progress import listener

    console = Console(quiet=quiet or as_json)
    with redirect_stdout(sys.stderr):  # what the user's own code prints is no part of the result
        if quiet or as_json:
            yield Silent(), console
            return
        with listener(Console(stderr=True)) as events:
            yield events, console


def _show(report: Report, console: Console, *, folder: Path | None = None, as_json: bool) -> None:
    from onnxshrink.report.terminal import print_report

    if as_json:
        sys.stdout.write(report.to_json())
    elif console.quiet and report.winner is None:
        typer.echo(report.selection, err=True)
    else:
        print_report(report, console, folder)

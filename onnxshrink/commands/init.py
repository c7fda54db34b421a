"""``onnxshrink init``: write a config for a model and its samples."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from onnxshrink.commands.options import Quiet

if TYPE_CHECKING:
    from onnxshrink.setup.answers import Template


class TemplateChoice(StrEnum):
    """Choices of ``--template``."""

    digits = "digits"
    vision = "vision"
    encoder = "encoder"
    onnx = "onnx"


class DeviceChoice(StrEnum):
    """Choices of ``--device``."""

    this = "this"
    x86_vnni = "x86_vnni"
    x86_avx2 = "x86_avx2"
    arm64 = "arm64"


def init(
    path: Annotated[
        Path | None,
        typer.Argument(help="The config to write; or model.onnx, as --model.", show_default="shrink.yaml"),
    ] = None,
    template: Annotated[
        TemplateChoice | None, typer.Option(help="Kind of config.", show_default="by the model")
    ] = None,
    model: Annotated[str | None, typer.Option(help="package.module:factory of a torch network, or model.onnx.")] = None,
    weights: Annotated[str | None, typer.Option(help="Factory: its weights, .safetensors or .pth.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="Factory: image=batch,3,224,224; ids=batch,128:int64.", show_default="as the .npz"
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Samples: an .npz, a folder of images, or package.module:callable.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out samples to measure on, of the same forms.")] = None,
    device: Annotated[
        DeviceChoice | None, typer.Option(help="Processor the model is for.", show_default="this")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(min=0.0, help="Most that accuracy may fall.", show_default="0.01")
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest file, such as '5 MB'.")] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(min=0.0, help="Most latency relative to the float model, such as 0.8.")
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is given, and defaults.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a config that is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Look into a model and its samples, and write a commented config that runs; asks for what is not given."""
    from rich.console import Console
    from rich.text import Text

    from onnxshrink.setup.answers import Answers, read_input, read_size
    from onnxshrink.setup.draft import draft, draft_digits, write_draft
    from onnxshrink.setup.interview import ask
    from onnxshrink.setup.output import model_and_output, refuse_existing

    model, out = model_and_output(path, model)
    refuse_existing(out, force=force)
    if max_size is not None:
        read_size(max_size)
    given: dict[str, Any] = {
        "model": model,
        "data": data,
        "weights": weights,
        "inputs": dict(map(read_input, inputs or [])),
        "held_out": eval_data,
        "device": None if device is None else device.value,
        "max_accuracy_drop": max_accuracy_drop,
        "max_size": max_size,
        "max_latency_ratio": max_latency_ratio,
    }
    asks = not yes and sys.stdin.isatty()
    if template is TemplateChoice.digits or (template is None and asks and model is None and _wants_digits()):
        _refuse_beside_digits(given)
        made = draft_digits(out, data)
    else:
        if asks:
            ask(given, out.parent)
        _require(given)
        answers = Answers(**{name: value for name, value in given.items() if value is not None})
        made = draft(answers, out, cast("Template | None", template.value if template else None))
    inputs = [given[name] for name in ("model", "weights", "data", "held_out") if given[name]]
    write_draft(made, out, force=force, inputs=inputs)
    console = Console(quiet=quiet)
    for note in made.notes:
        console.print(Text(f"  found  {note}"), soft_wrap=True)
    console.print(Text(f"{out}: {len(made.text.splitlines())} lines, template {made.template}"), soft_wrap=True)
    console.print(Text(f"  next   onnxshrink run {out}"), soft_wrap=True)


def _wants_digits() -> bool:
    return not typer.confirm("Do you have a model? (no: a small demonstration)", default=True)


def _refuse_beside_digits(given: dict[str, Any]) -> None:
    from onnxshrink.core.errors import ConfigError

    flags = {"inputs": "--input", "held_out": "--eval-data"}
    spelled = [
        f"{flags.get(name, '--' + name.replace('_', '-'))} {'…' if name == 'inputs' else value}"
        for name, value in given.items()
        if name != "data" and value not in (None, {})
    ]
    if spelled:
        raise ConfigError(
            "the template 'digits' is a demonstration with a model and limits of its own",
            where="--template digits",
            got=", ".join(spelled),
            want="digits alone, or with --data for its images",
            fix=f"leave out {' '.join(spelled)}"
            if not given["model"]
            else "leave out --template digits: the model says which template suits it",
        )


def _require(given: dict[str, Any]) -> None:
    from onnxshrink.core.errors import ConfigError

    examples = {"model": "--model model.onnx or --model nets:build", "data": "--data samples.npz"}
    for name, example in examples.items():
        if not given[name]:
            raise ConfigError(
                f"init is not told the {name}",
                where=f"--{name}",
                want=example,
                fix="give it, run init in a terminal to be asked, or start with --template digits",
            )

"""The questions of ``onnxshrink init``: each answer is looked at when it is given, and asked for again if wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer

from onnxshrink.core.errors import ConfigError, ShrinkError
from onnxshrink.core.files import require_files
from onnxshrink.core.importing import require_entry, search_path
from onnxshrink.setup.answers import Device, read_input, read_size
from onnxshrink.setup.samples import Samples, look_at_samples


def ask(given: dict[str, Any], folder: Path) -> None:
    """Ask for what is not given; Enter takes what stands in brackets.

    Args:
        given: The answers so far, by the names of `Answers`; filled in.
        folder: Where the config will lie, beside which modules are looked for as well.
    """
    if not given["model"]:
        given["model"] = _asked("Model: package.module:factory, or model.onnx", lambda text: _model(text, folder))
        if not given["model"].endswith(".onnx") and not given["weights"]:
            question = "Its weights, if the factory does not load them (Enter: it does)"
            given["weights"] = _asked(question, lambda text: require_files(weights=Path(text).expanduser()), "") or None
    if not given["data"]:
        given["data"] = _asked("Samples: .npz, folder of images, or package.module:callable", _samples)
    samples = look_at_samples(given["data"], given["held_out"])
    if samples.is_shared:
        question = "Other samples to measure on, which is more honest (Enter: the same)"
        given["held_out"] = _asked(question, _samples, "") or None
    if not given["model"].endswith(".onnx") and not given["inputs"] and not samples.arrays:
        given["inputs"] = dict(_inputs())
    if given["device"] is None:
        given["device"] = _asked(f"Processor it is for ({', '.join(get_args(Device))})", _device, "this")
    if given["max_accuracy_drop"] is None and samples.metric is not None:
        unit = "Accuracy that may be lost, from 0 to 1" if samples.metric == "top1" else "Error that may be added"
        most = 1.0 if samples.metric == "top1" else None
        given["max_accuracy_drop"] = float(_asked(unit, lambda text: _number(text, most), "0.01"))
    if given["max_size"] is None:
        given["max_size"] = _asked("Largest file, such as '5 MB' (Enter: any)", read_size, "") or None
    if given["max_latency_ratio"] is None and given["device"] == "this":
        ratio = float(_asked("Latency at most, relative to float (0: any)", lambda text: _number(text, None), "0"))
        given["max_latency_ratio"] = ratio or None


def _asked(question: str, look: Callable[[str], object], default: str | None = None) -> str:
    """The answer that ``look`` raises no `ShrinkError` for; an empty default is taken as it is.

    Raises:
        typer.Abort: There is nobody to answer, or Ctrl-C.
    """

    def looked(text: str) -> str:
        text = text.strip()
        try:
            if text or default != "":
                look(text)
        except ShrinkError as e:
            raise typer.BadParameter(f"{e.what} ({e.fix or e.want})") from e
        return text

    return str(typer.prompt(question, default, value_proc=looked, show_default=bool(default)))


def _inputs() -> list[tuple[str, Any]]:
    first = _asked("Its input", read_input, "image=batch,3,224,224")
    found = [read_input(first)]
    while text := _asked("Its next input (Enter: no more)", read_input, ""):
        found.append(read_input(text))
    return found


def _model(text: str, folder: Path) -> None:
    if text.endswith(".onnx"):
        require_files(model=Path(text).expanduser())
    else:
        with search_path(folder):
            require_entry(text)


def _samples(text: str) -> Samples:
    return look_at_samples(text)


def _device(text: str) -> None:
    if text not in get_args(Device):
        raise ConfigError(f"there is no processor {text!r}", want=", ".join(get_args(Device)))


def _number(text: str, most: float | None) -> None:
    want = "a number from 0" + (f" to {most:g}" if most else "")
    try:
        number = float(text)
    except ValueError as e:
        raise ConfigError(f"{text!r} is no number", want=want) from e
    if not 0 <= number < float("inf") or (most is not None and number > most):
        raise ConfigError(f"{text} is out of range", want=want)

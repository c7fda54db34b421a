"""What a person says of the config that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from pydantic import TypeAdapter, ValidationError

from onnxshrink.config.base import SizeBytes
from onnxshrink.config.source import InputSettings
from onnxshrink.core.errors import ConfigError

Template: TypeAlias = Literal["digits", "vision", "encoder", "onnx"]
Device: TypeAlias = Literal["this", "x86_vnni", "x86_avx2", "arm64"]


@dataclass(frozen=True, slots=True)
class Answers:
    """The model, the samples and what the result must reach.

    Attributes:
        model: ``package.module:factory`` or an ``.onnx`` file.
        data: An ``.npz`` file, a folder of images, or ``package.module:callable``.
        weights: The factory's weights, or None.
        inputs: The factory's inputs; empty takes them from the arrays of ``data``.
        held_out: Samples for evaluation alone, or None.
        device: The processor that the model is for.
        max_accuracy_drop: Most accuracy that may be lost, from 0 to 1.
        max_size: Such as ``5 MB``, or None.
        max_latency_ratio: Latency against float at most, or None.
    """

    model: str
    data: str
    weights: str | None = None
    inputs: Mapping[str, InputSettings] = field(default_factory=dict)
    held_out: str | None = None
    device: Device = "this"
    max_accuracy_drop: float = 0.01
    max_size: str | None = None
    max_latency_ratio: float | None = None


def read_input(text: str) -> tuple[str, InputSettings]:
    """``image=batch,3,224,224`` or ``ids=batch,128:int64`` as a name and its settings.

    Raises:
        ConfigError: It cannot be read.
    """
    name, equals, form = text.partition("=")
    shape, _, dtype = form.partition(":")
    dims = [int(part) if part.strip().isdecimal() else part.strip() for part in shape.split(",")]
    try:
        settings = InputSettings.model_validate({"shape": dims, "dtype": dtype.strip() or "float32"})
    except ValidationError:
        settings = None
    if settings is None or not (equals and name.strip() and all(dims)):
        raise ConfigError(
            f"the input {text!r} cannot be read",
            where="--input",
            want="name=shape, batch first, or name=shape:dtype",
            fix="--input image=batch,3,224,224 or --input ids=batch,128:int64",
        )
    return name.strip(), settings


def read_size(text: str) -> int:
    """``5 MB`` in bytes.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return int(TypeAdapter(SizeBytes).validate_python(text))
    except ValidationError as e:
        raise ConfigError(
            f"the size {text!r} cannot be read",
            where="--max-size",
            got=text,
            want="bytes, or a number and its unit",
            fix="--max-size '5 MB' or --max-size '60 kB'",
        ) from e

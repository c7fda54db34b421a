"""Which output of a model a task metric scores, what becomes of its NaN, and what is said where none can be scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from onnxshrink.core.errors import ModelError
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import Array, describe

Outputs: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch comes from, for messages: the model, the data, and the number of its first sample."""

    model: str
    data: str
    first: int


def first_fitting(outputs: Outputs, fits: Callable[[Array], bool]) -> Array | None:
    """The first output of which ``fits`` is true, or None."""
    return next((array for array in outputs.values() if fits(array)), None)


def squeezed(array: Array) -> tuple[int, ...]:
    """The shape less a last axis of length 1, so that labels ``(n,)`` fit an output ``(n, 1)``."""
    shape = tuple(array.shape)
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def or_nan(rows: Floats, output: Array) -> Floats:
    """NaN in place of what is kept of samples where the output has NaN."""
    if output.dtype.kind == "f":
        rows[np.isnan(output).reshape(len(output), -1).any(axis=1)] = np.nan
    return rows


def unfit(metric: str, outputs: Outputs, want: str, place: Place, fix: str) -> ModelError:
    """The error of a model none of whose outputs is what a metric wants."""
    return ModelError(
        f"no output of the model can be scored with {metric!r}",
        where=place.model,
        got=", ".join(describe(name, array) for name, array in outputs.items()),
        want=want,
        fix=fix,
    )

"""Named arrays and what is expected of them: the check every sample passes before a model sees it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError

Array: TypeAlias = NDArray[Any]
Batch: TypeAlias = Mapping[str, Array]
"""One batch of samples: input name to array, the batch on axis 0."""

Dim: TypeAlias = int | str
"""An axis length, or the name of a dynamic axis."""

LABELS = "labels"
"""The reserved array name that holds the targets of supervised data."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model expects of one of its inputs, or promises of one of its outputs.

    Attributes:
        name: The tensor's name in the model.
        dtype: A numpy dtype name, such as ``float32``.
        shape: Axis lengths; a string names a dynamic axis.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}[{','.join(map(str, self.shape))}]"

    def admits_shape(self, shape: Sequence[int], *, any_batch: bool = False) -> bool:
        """True if ``shape`` fits; ``any_batch`` leaves axis 0 out of the comparison."""
        if len(shape) != len(self.shape):
            return False
        pairs = list(zip(shape, self.shape, strict=True))[1 if any_batch else 0 :]
        return all(isinstance(want, str) or got == want for got, want in pairs)


def describe(name: str, array: Array) -> str:
    """``'image' float64[8,3,96,96]``: an array in the words of error messages."""
    return f"{name!r} {array.dtype}[{','.join(map(str, array.shape))}]"


def did_you_mean(name: str, known: Sequence[str]) -> str | None:
    """A suggestion for a misspelt ``name``, or None when nothing known is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else None


def check_batch(batch: Batch, specs: Sequence[TensorSpec], *, where: str, first_sample: int = 0) -> None:
    """Refuse a batch that the model cannot take, or that is not numbers.

    Args:
        batch: Input name to array; an array named ``labels`` is left alone.
        specs: What the model expects.
        where: The data's origin, for the message.
        first_sample: Index of the batch's first sample in the data, so that the message can name the sample.

    Raises:
        DataError: A name, shape or dtype does not fit, or a value is NaN or infinite.
    """
    known = {spec.name: spec for spec in specs}
    wanted = ", ".join(map(str, specs))
    for name in batch:
        if name != LABELS and name not in known:
            raise DataError(
                f"the data has an array {name!r} that is no input of the model",
                where=where,
                got=describe(name, batch[name]),
                want=wanted,
                fix=did_you_mean(name, list(known)) or "rename the array, or map it: `rename: {array: input}`",
            )
    for spec in specs:
        if spec.name not in batch:
            raise DataError(
                f"the data has no array for the model input {spec.name!r}",
                where=where,
                got=", ".join(describe(name, array) for name, array in batch.items()) or "no arrays",
                want=wanted,
                fix=f"add an array named {spec.name!r}, or map one: `rename: {{array: {spec.name}}}`",
            )
        check_array(batch[spec.name], spec, where=where, first_sample=first_sample)


def check_array(array: Array, spec: TensorSpec, *, where: str, first_sample: int = 0) -> None:
    """Refuse one array that does not fit ``spec`` or holds NaN or infinity; see `check_batch`."""
    if str(array.dtype) != spec.dtype:
        raise DataError(
            f"the array {spec.name!r} has dtype {array.dtype}, and the model takes {spec.dtype}",
            where=where,
            got=describe(spec.name, array),
            want=str(spec),
            fix=f"save it as {spec.dtype}, scaled as the model was trained: array.astype({spec.dtype!r})",
        )
    if not spec.admits_shape(array.shape):
        raise DataError(
            f"the array {spec.name!r} has a shape the model cannot take",
            where=where,
            got=describe(spec.name, array),
            want=str(spec),
            fix=shape_fix(array.shape, spec),
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0]
        sample = first_sample + int(bad[0]) if array.ndim else first_sample
        raise DataError(
            f"sample {sample} of {spec.name!r} holds {array[tuple(bad)]}",
            where=where,
            got=f"{array[tuple(bad)]} at {spec.name}[{sample}, {', '.join(map(str, bad[1:]))}]",
            want="finite numbers",
            fix="remove the sample, or mend what makes it: one NaN spoils every range and every metric",
        )


def shape_fix(shape: Sequence[int], spec: TensorSpec) -> str:
    """The likeliest mend of a wrong shape: a missing batch axis, or NHWC where NCHW is wanted."""
    rank = len(spec.shape)
    if len(shape) == rank - 1 and spec.admits_shape((1, *shape), any_batch=True):
        return "add the batch axis: array[None]"
    if len(shape) == 4 and rank == 4 and spec.admits_shape((shape[0], shape[3], shape[1], shape[2]), any_batch=True):
        return "the layout is NHWC and the model wants NCHW: array.transpose(0, 3, 1, 2)"
    return "give samples of the wanted shape"

"""Named arrays and what is expected of them: the check every sample passes before a model sees it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError, ModelError

_TEXT = "object"  # what ONNX's strings are in numpy; arrays of fixed width do as well

Array: TypeAlias = NDArray[Any]
Batch: TypeAlias = Mapping[str, Array]
"""One batch of samples: input name to array, the batch on axis 0."""

Dim: TypeAlias = int | str
"""An axis length, or the name of a dynamic axis."""

LABELS = "labels"
"""The reserved array name that holds the targets of supervised data."""

LIKE_LABELS = ("label", "target", "targets", "y", "y_true", "y_test")
"""Names that others give to such an array."""


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


class Form(Protocol):
    """Anything with a dtype and a shape: an array, or the header of one that is still on disk."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis lengths."""


def describe(name: str, form: Form) -> str:
    """``'image' float64[8,3,96,96]``: an array in the words of error messages."""
    return f"{name!r} {form.dtype}[{','.join(map(str, form.shape))}]"


def require_tensor(name: str, dtype: str, *, where: str) -> None:
    """Refuse an input or output that is a sequence, a map or an optional.

    Args:
        name: Of the input or output.
        dtype: A numpy dtype name; the type in ONNX's words for what is no tensor, such as ``seq(tensor(float))``.
        where: What to call the model in messages.

    Raises:
        ModelError: It is no tensor.
    """
    if "(" in dtype:
        raise ModelError(
            f"{name!r} is no tensor, and nothing else can be compared",
            where=where,
            got=dtype,
            want="a tensor",
            fix="export without it (skl2onnx: options={'zipmap': False}), or cut it from the graph",
        )


def did_you_mean(name: str, known: Sequence[str]) -> str | None:
    """A suggestion for a misspelt ``name``, or None when nothing known is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else None


def check_batch(
    batch: Batch,
    specs: Sequence[TensorSpec],
    *,
    where: str,
    samples: Sequence[int] | None = None,
    any_batch: bool = False,
) -> None:
    """Refuse a batch that the model cannot take, or that is not numbers.

    Args:
        batch: Input name to array; of an array named ``labels`` only the values are looked at.
        specs: What the model expects.
        where: The data's origin, for the message.
        samples: The number that each row has in the data, so that the message can name the sample; rows count from 0
            by default.
        any_batch: Axis 0 may have any length, whatever the model takes at once.

    Raises:
        DataError: A name, shape or dtype does not fit, or a value is NaN or infinite.
    """
    known = {spec.name: spec for spec in specs}
    for name in batch:
        if name != LABELS and name not in known:
            raise DataError(
                f"the data has an array {name!r} that is no input of the model",
                where=where,
                got=describe(name, batch[name]),
                want=", ".join(map(str, specs)),
                fix=did_you_mean(name, list(known)) or "rename the array, or map it: `rename: {array: input}`",
            )
    for spec in specs:
        if spec.name not in batch:
            raise missing_input(spec, specs, list(batch), where=where)
        check_form(batch[spec.name], spec, where=where, any_batch=any_batch)
    for name, array in batch.items():
        check_finite(name, array, where=where, samples=samples)


def missing_input(spec: TensorSpec, specs: Sequence[TensorSpec], names: Sequence[str], *, where: str) -> DataError:
    """The error of data that have no array for the model input ``spec``, but arrays called ``names``."""
    return DataError(
        f"the data has no array for the model input {spec.name!r}",
        where=where,
        got=", ".join(map(repr, names)) or "no arrays",
        want=", ".join(map(str, specs)),
        fix=f"add an array named {spec.name!r}, or map one: `rename: {{{_nearest(spec.name, names)}: {spec.name}}}`",
    )


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """The name that is most likely meant, whatever its capitals; the first where none is near."""
    lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(wanted.lower(), list(lower), n=1)
    return lower[near[0]] if near else next(iter(names), "array")


def check_form(form: Form, spec: TensorSpec, *, where: str, any_batch: bool = False) -> None:
    """Refuse a dtype or shape that does not fit ``spec``.

    Args:
        form: The array, or its header.
        spec: What the model expects.
        where: The data's origin, for the message.
        any_batch: Axis 0 counts all samples, and is left out of the comparison.

    Raises:
        DataError: The dtype or the shape does not fit.
    """
    is_text = spec.dtype == _TEXT
    if form.dtype.kind not in "UO" if is_text else str(form.dtype) != spec.dtype:
        raise DataError(
            f"the array {spec.name!r} has dtype {form.dtype}, and the model takes {spec.dtype}",
            where=where,
            got=describe(spec.name, form),
            want=str(spec),
            fix=_dtype_fix(form.dtype, spec.dtype),
        )
    if not spec.admits_shape(form.shape, any_batch=any_batch):
        raise DataError(
            f"the array {spec.name!r} has a shape the model cannot take",
            where=where,
            got=describe(spec.name, form),
            want=str(spec),
            fix=shape_fix(form.shape, spec),
        )


def _dtype_fix(got: np.dtype[Any], want: str) -> str:
    """The likeliest mend of a wrong dtype: pixels that were never scaled, or numbers that are no token's."""
    if want == _TEXT:
        return "save it as text: array.astype(str)"
    if "int" in want or want == "bool":
        return f"save whole numbers, such as the ids of tokens: array.astype({want!r})"
    scaled = f"array.astype({want!r}) / 255 where that is how it was" if got == np.uint8 else f"array.astype({want!r})"
    return f"save it as {want}, scaled as the model was trained: {scaled}"


def check_finite(name: str, array: Array, *, where: str, samples: Sequence[int] | None = None) -> None:
    """Refuse an array that holds NaN or infinity; see `check_batch`.

    Raises:
        DataError: Names the first bad sample and the place in it.
    """
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))[0].tolist()
    value = array[tuple(bad)]
    # A constant input has one row for all samples, or none: its own indices are all there is to say.
    if samples is not None and array.ndim and len(samples) == array.shape[0]:
        bad[0] = int(samples[bad[0]])
    at = f"{name}[{', '.join(map(str, bad))}]" if bad else name
    raise DataError(
        f"sample {bad[0]} of {name!r} holds {value}" if bad else f"{name!r} holds {value}",
        where=where,
        got=f"{value} at {at}",
        want="finite numbers",
        fix="remove the sample, or mend what makes it: one NaN spoils every range and every metric",
    )


def shape_fix(shape: Sequence[int], spec: TensorSpec) -> str:
    """The likeliest mend of a wrong shape: a missing batch axis, or channels on another axis than the model's."""
    rank = len(spec.shape)
    if len(shape) == rank - 1 and spec.admits_shape((1, *shape), any_batch=True):
        return "add the batch axis: array[None]"
    if len(shape) == 4 and rank == 4 and spec.admits_shape((shape[0], shape[3], shape[1], shape[2]), any_batch=True):
        return "the layout is NHWC and the model wants NCHW: array.transpose(0, 3, 1, 2)"
    if len(shape) == 4 and rank == 4 and spec.admits_shape((shape[0], shape[2], shape[3], shape[1]), any_batch=True):
        return "the layout is NCHW and the model wants NHWC: array.transpose(0, 2, 3, 1)"
    if len(shape) == 4 and rank == 4 and shape[1] == spec.shape[1]:
        return "resize or crop the samples as for training, or take a model that was exported for their size"
    return "give samples of the wanted shape"

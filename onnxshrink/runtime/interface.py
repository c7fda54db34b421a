"""Samples made for one model, handed to another: inputs matched by name or order, floats cast to the width it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Array, Batch, Dim, TensorSpec

_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Interface:
    """What batches hold, and which input of a model takes each array.

    Attributes:
        specs: What batches hold: names and dtypes of the model they are made for; an axis that either model fixes has
            that length.
        takers: Name in the batch to the name of the input that takes it.
        casts: Name in the batch to the float dtype that its input takes, where it is another.
    """

    specs: tuple[TensorSpec, ...]
    takers: Mapping[str, str]
    casts: Mapping[str, str]

    @property
    def note(self) -> str | None:
        """What a reader of the results must know of the inputs."""
        return f"inputs cast to {', '.join(sorted(set(self.casts.values())))}" if self.casts else None

    def feed(self, batch: Batch, *, where: str) -> dict[str, Array]:
        """The model's inputs; an array that is none, such as ``labels``, is left out.

        Args:
            batch: Arrays that fit `specs`.
            where: What to call the model in messages.

        Raises:
            ModelError: The batch has no array for an input.
        """
        missing = [str(spec) for spec in self.specs if spec.name in self.takers and spec.name not in batch]
        if missing:
            raise ModelError(
                "the batch has no array for an input of the model",
                where=where,
                got=", ".join(map(repr, batch)) or "no arrays",
                want=", ".join(missing),
                fix="give an array of that name",
            )
        return {
            taker: np.ascontiguousarray(batch[name], dtype=self.casts.get(name)) for name, taker in self.takers.items()
        }


def match_inputs(given: Sequence[TensorSpec], own: Sequence[TensorSpec], *, where: str) -> Interface:
    """Hand batches that are made for the inputs ``given`` to a model whose inputs are ``own``.

    Inputs are matched by name, and by order where names differ and both models have equally many. Floats may differ in
    width. An input of ``given`` that the model does not have is not handed on.

    Raises:
        ModelError: Inputs cannot be matched, or differ in kind, rank or the length of an axis.
    """
    names = [spec.name for spec in given]
    mine = {spec.name: spec for spec in own}
    if set(mine) <= set(names):
        pairs = [(spec, mine.get(spec.name)) for spec in given]
    elif len(given) == len(own):
        pairs = list(zip(given, own, strict=True))
    else:
        raise _unlike("cannot be matched with", given, own, where)
    misfits = [(spec, taker) for spec, taker in pairs if taker is not None and not _is_alike(spec, taker)]
    if misfits:
        raise _unlike("differ in dtype or shape from", [misfits[0][0]], [misfits[0][1]], where)
    return Interface(
        tuple(spec if taker is None else _fixed(spec, taker) for spec, taker in pairs),
        {spec.name: taker.name for spec, taker in pairs if taker is not None},
        {spec.name: taker.dtype for spec, taker in pairs if taker is not None and taker.dtype != spec.dtype},
    )


def _is_alike(spec: TensorSpec, taker: TensorSpec) -> bool:
    both_float = spec.dtype in _FLOATS and taker.dtype in _FLOATS
    return (
        (spec.dtype == taker.dtype or both_float)
        # An unknown rank reads as no axes at all.
        and (len(spec.shape) == len(taker.shape) or not spec.shape or not taker.shape)
        and all(
            isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(spec.shape, taker.shape, strict=False)
        )
    )


def _fixed(spec: TensorSpec, taker: TensorSpec) -> TensorSpec:
    def fixed(a: Dim, b: Dim) -> Dim:
        return b if isinstance(a, str) and isinstance(b, int) else a

    return TensorSpec(spec.name, spec.dtype, tuple(map(fixed, spec.shape, taker.shape or spec.shape)))


def _unlike(how: str, given: Sequence[TensorSpec], own: Sequence[TensorSpec], where: str) -> ModelError:
    return ModelError(
        f"the inputs of the candidate {how} the reference's",
        where=where,
        got=", ".join(map(str, own)),
        want=", ".join(map(str, given)),
        fix="export both models with the same inputs",
    )

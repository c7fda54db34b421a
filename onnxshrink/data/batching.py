"""Which axis of a model's inputs counts samples, and how many of them the model takes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Batch, Form, TensorSpec


def constant_inputs(specs: Sequence[TensorSpec], forms: Mapping[str, Form]) -> frozenset[str]:
    """Names of the inputs that hold no samples, and are given whole with every batch.

    Axis 0 of an input counts samples, with two exceptions. An input of rank 0 has no such axis. And where axis 0 is a
    fixed length that is not the batch axis of the model (a table of anchors ``[1000, 4]`` beside images
    ``[batch, 3, 224, 224]``), the input is taken for a constant if its array has exactly the input's shape. The batch
    axis of the model is a dynamic axis 0 if any input has one, else axis 0 of the first input that has axes.

    Args:
        specs: The model's inputs.
        forms: Input name to array or header.
    """
    lengths = [spec.shape[0] for spec in specs if spec.shape]
    batch = next((length for length in lengths if isinstance(length, str)), lengths[0] if lengths else 0)
    return frozenset(
        spec.name
        for spec in specs
        if not spec.shape
        or (isinstance(spec.shape[0], int) and spec.shape[0] != batch and forms[spec.name].shape == spec.shape)
    )


def fixed_batch(specs: Sequence[TensorSpec], constants: frozenset[str], *, where: str) -> int | None:
    """Samples that the model takes at once, or None where it takes any number.

    Raises:
        DataError: Two inputs that hold samples have different fixed lengths of axis 0.
    """
    fixed = {s.name: s.shape[0] for s in specs if s.name not in constants and isinstance(s.shape[0], int)}
    if len(set(fixed.values())) > 1:
        raise DataError(
            "the model's inputs take different numbers of samples at once",
            where=where,
            got=", ".join(f"{name!r} {length}" for name, length in fixed.items()),
            want="one batch size; or, for an input that is the same for all samples, an array of exactly its shape",
        )
    return next(iter(fixed.values()), None)


def sample_count(forms: Mapping[str, Form], *, where: str) -> int:
    """The common length of axis 0.

    Raises:
        DataError: Two arrays have different numbers of samples, or one has no axes.
    """
    counts: dict[str, int] = {}
    for name, form in forms.items():
        if not form.shape:
            raise DataError(f"the array {name!r} has no axis for samples", where=where, want="samples on axis 0")
        counts[name] = form.shape[0]
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise DataError(
                f"the arrays {first!r} and {name!r} have different numbers of samples",
                where=where,
                got=f"{first!r} {counts[first]}, {name!r} {count}",
                want="samples on axis 0 of every array, as many in each",
                fix="save the arrays of the same samples together, after what drops or selects some",
            )
    return counts[first]


def n_samples(batch: Batch, specs: Sequence[TensorSpec]) -> int:
    """Samples in a batch that fits ``specs``; one where no input counts any."""
    constants = constant_inputs(specs, batch)
    return next((len(batch[spec.name]) for spec in specs if spec.name not in constants), 1)


def shard_of(rows: range | NDArray[np.intp], group: int, index: int, count: int) -> range | NDArray[np.intp]:
    """Every ``count``-th group of ``group`` rows, from group ``index`` on."""
    if group == 1:
        return rows[index::count]
    return np.asarray(rows, np.intp).reshape(-1, group)[index::count].ravel()


def partial_batch(count: int, batch: int, *, where: str) -> DataError:
    """The error of ``count`` samples for a model that takes ``batch`` at once, no more and no fewer."""
    whole = count - count % batch
    return DataError(
        f"{count} samples do not fill batches of {batch}, and the model takes no other number at once",
        where=where,
        got=f"{count} samples",
        want=f"a multiple of {batch}",
        fix=f"max_samples: {whole}" if whole else f"give at least {batch} samples, or export with a dynamic batch axis",
    )

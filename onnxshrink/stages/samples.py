"""Samples to learn from, as torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from onnxshrink.core.errors import TrainingError
from onnxshrink.core.tensors import LABELS, Array, TensorSpec
from onnxshrink.data.batching import constant_inputs
from onnxshrink.data.labels import numeric_labels
from onnxshrink.stages.context import Context

_READ_SAMPLES = 256


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Some samples.

    Attributes:
        inputs: One tensor for each input of the network, samples on axis 0.
        labels: Their labels, samples on axis 0, or None where the data has none.
        rows: Their numbers in the whole, ``(batch,)`` int64.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Samples:
    """Training data in memory: every epoch draws it in another order.

    Attributes:
        inputs: One tensor for each input of the network, samples on axis 0.
        labels: What the data has, samples on axis 0, int64 or float32 (the task says what must fit); None without any.
        where: The origin, for messages.
        constants: Positions of the inputs that hold no samples and are given whole with every batch.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    where: str
    constants: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return next(len(tensor) for at, tensor in enumerate(self.inputs) if at not in self.constants)

    def take(self, rows: Tensor) -> TrainingBatch:
        """The samples with the numbers ``rows``, int64."""
        inputs = tuple(tensor if at in self.constants else tensor[rows] for at, tensor in enumerate(self.inputs))
        return TrainingBatch(inputs, None if self.labels is None else self.labels[rows], rows)


def read_samples(
    ctx: Context, specs: Sequence[TensorSpec], *, labels: Literal["needed", "wanted", "unused"]
) -> Samples:
    """Read ``data.train`` once.

    Args:
        ctx: The run.
        specs: The network's inputs.
        labels: Data without them is refused, taken as it is, or not asked.

    Raises:
        DataError: The samples do not fit, or have no labels and need them.
        TrainingError: There are fewer than two samples.
    """
    reader = ctx.reader("train", specs, batch_size=_READ_SAMPLES, labels=labels == "needed")
    assert reader is not None  # noqa: S101  # `needs` has train: the config is refused without it
    if labels == "wanted" and reader.has_labels:
        reader = ctx.reader("train", specs, batch_size=_READ_SAMPLES, labels=True)
        assert reader is not None  # noqa: S101
    batches = list(reader)
    whole = constant_inputs(specs, batches[0])
    arrays: dict[str, Array] = {
        name: first if name in whole else np.concatenate([batch[name] for batch in batches])
        for name, first in batches[0].items()
    }
    samples = Samples(
        tuple(torch.from_numpy(arrays[spec.name]) for spec in specs),
        None,
        reader.where,
        frozenset(at for at, spec in enumerate(specs) if spec.name in whole),
    )
    if len(samples) < 2:
        raise TrainingError("one sample is too few to learn from", where=reader.where, want="at least two")
    if LABELS not in arrays:
        return samples
    return replace(samples, labels=torch.from_numpy(numeric_labels(arrays[LABELS], where=reader.where)))

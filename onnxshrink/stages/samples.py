"""Samples to learn from, as torch tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from onnxshrink.config.data import Role
from onnxshrink.core.errors import TrainingError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.indexed import Indexed, by_number
from onnxshrink.data.labels import numeric_labels
from onnxshrink.stages.acceleration import seeded
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

    def to(self, device: torch.device) -> TrainingBatch:
        """The same with inputs and labels on a device; the rows stay."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, inputs=tuple(tensor.to(device) for tensor in self.inputs), labels=labels)


@dataclass(frozen=True, slots=True)
class Samples:
    """Training data, read as it is drawn: every epoch draws it in another order. Only labels are in memory.

    Attributes:
        source: Where samples are read from.
        inputs: The network's inputs.
        labels: What the data has, samples on axis 0, int64 or float32 (the task says what must fit); None without any.
        seed: Of steps that change a sample at random.
    """

    source: Indexed
    inputs: tuple[str, ...]
    labels: Tensor | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    @property
    def where(self) -> str:
        """The origin, for messages."""
        return self.source.where

    @property
    def is_random(self) -> bool:
        """True if a sample may differ from one epoch to the next."""
        return self.source.is_random

    def take(self, rows: Tensor, *, epoch: int | None = None) -> TrainingBatch:
        """Read some samples.

        Args:
            rows: Their numbers, int64.
            epoch: The one in which they are learned from: random steps follow from it, the seed and a sample's number.
                None reads them without chance, to judge by or to look at; a user's own Dataset, whose chance is torch's
                global state, from the same state each time.

        Returns:
            The samples, with the inputs that hold no samples whole.

        Raises:
            DataError: A value is not finite, or cannot be read.
        """
        draw = None if epoch is None else (self.seed, epoch)
        with seeded(self.seed, torch.device("cpu")) if self.is_random and draw is None else nullcontext():
            batch = self.source.take(rows.numpy(), draw)
        inputs = tuple(torch.from_numpy(batch[name]) for name in self.inputs)
        return TrainingBatch(inputs, None if self.labels is None else self.labels[rows], rows)

    def in_order(self, device: torch.device) -> Iterator[TrainingBatch]:
        """All of them, without chance, in batches on a device."""
        for rows in torch.split(torch.arange(len(self)), _READ_SAMPLES):
            yield self.take(rows).to(device)


def read_samples(
    ctx: Context,
    specs: Sequence[TensorSpec],
    *,
    labels: Literal["needed", "wanted", "unused"],
    role: Role = "train",
) -> Samples:
    """Open the data of a role: stored samples are read as they are drawn, a stream of batches once, here, into memory.

    Args:
        ctx: The run.
        specs: The network's inputs.
        labels: Data without them is refused, taken as it is, or not asked.
        role: Which samples; the stage needs them.

    Raises:
        DataError: The samples do not fit, or have no labels and need them.
        TrainingError: There are fewer than two samples.
    """
    reader = ctx.reader(role, specs, batch_size=_READ_SAMPLES, labels=labels == "needed")
    assert reader is not None  # noqa: S101  # `needs` has it: the config is refused without it
    with_labels = labels != "unused" and reader.has_labels
    if with_labels and labels == "wanted":
        reader = ctx.reader(role, specs, batch_size=_READ_SAMPLES, labels=True)
        assert reader is not None  # noqa: S101
    source = by_number(reader, specs)
    if len(source) < 2:
        raise TrainingError("one sample is too few to learn from", where=source.where, want="at least two")
    known = torch.from_numpy(numeric_labels(source.labels(), where=source.where)) if with_labels else None
    return Samples(source, tuple(spec.name for spec in specs), known, ctx.seed)

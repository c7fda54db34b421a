"""Samples by number, in any order: what training draws its batches from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import LABELS, Array, Batch, TensorSpec
from onnxshrink.data.arrays import ArrayReader
from onnxshrink.data.batching import constant_inputs, fixed_batch, n_samples, partial_batch, sample_count, shard_of
from onnxshrink.data.reader import Reader

Numbers: TypeAlias = NDArray[np.intp]
"""Which samples, ``(batch,)``, in any order; one may come twice."""

Draw: TypeAlias = tuple[int, int]
"""Seed and epoch, from which random steps draw."""


class Indexed(Protocol):
    """Samples that can be had in any order; their values are checked as they are read."""

    @property
    def where(self) -> str:
        """The origin of the samples, for messages."""

    @property
    def has_labels(self) -> bool:
        """True if the source holds labels, whether or not they were asked for."""

    @property
    def is_random(self) -> bool:
        """True if a sample may differ from one time it is drawn to the next."""

    def __len__(self) -> int:
        """Number of samples."""

    def take(self, numbers: Numbers, draw: Draw | None = None) -> Batch:
        """Some samples, with labels where they were asked for.

        Args:
            numbers: Which.
            draw: What random steps draw from; None for their form without chance.
        """

    def labels(self) -> Array:
        """The labels of all samples; only where they were asked for."""


@dataclass(frozen=True, slots=True)
class IndexedReader:
    """The samples of an indexed source in order, or a shard of them; made by `in_order`."""

    _source: Indexed
    _numbers: Numbers
    _batch_size: int
    _group: int

    @property
    def where(self) -> str:
        """The source's."""
        return self._source.where

    @property
    def has_labels(self) -> bool:
        """The source's."""
        return self._source.has_labels

    @property
    def is_random(self) -> bool:
        """The source's; iterating gives the form without chance."""
        return self._source.is_random

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, _, batch in self.numbered(0, 1))

    def numbered(self, index: int, count: int) -> Iterator[tuple[int, int, Batch]]:
        """See `numbered`."""
        for number in range(index, -(-len(self) // self._batch_size), count):
            start = number * self._batch_size
            yield number, start, self._source.take(self._numbers[start : start + self._batch_size])

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th sample; where the model has a fixed batch axis, every ``count``-th batch of that size."""
        return replace(self, _numbers=np.asarray(shard_of(self._numbers, self._group, index, count)))

    def take(self, numbers: Numbers, draw: Draw | None = None) -> Batch:
        """See `Indexed.take`."""
        return self._source.take(self._numbers[numbers], draw)

    def labels(self) -> Array:
        """See `Indexed.labels`."""
        return self._source.labels()[self._numbers]


@dataclass(frozen=True, slots=True)
class HeldSamples:
    """Samples in memory.

    Attributes:
        where: Their origin.
        arrays: Name to array, samples on axis 0; labels among them.
        constants: Inputs that hold no samples.
    """

    where: str
    arrays: Mapping[str, Array]
    constants: Mapping[str, Array] = field(default_factory=dict)

    @property
    def has_labels(self) -> bool:
        """True if labels are among the arrays."""
        return LABELS in self.arrays

    @property
    def is_random(self) -> bool:
        """They are always the same."""
        return False

    def __len__(self) -> int:
        return sample_count(self.arrays, where=self.where)

    def take(self, numbers: Numbers, draw: Draw | None = None) -> Batch:  # noqa: ARG002  # as above
        """See `Indexed.take`."""
        return {**{name: array[numbers] for name, array in self.arrays.items()}, **self.constants}

    def labels(self) -> Array:
        """See `Indexed.labels`."""
        return self.arrays[LABELS]


def numbered(
    reader: Reader, specs: Sequence[TensorSpec], index: int = 0, count: int = 1
) -> Iterator[tuple[int, int, Batch]]:
    """Every ``count``-th batch of a reader, from ``index`` on: its number, that of its first sample, and the batch.

    The others are not read where samples lie by number. They are where they come as a stream.
    """
    if isinstance(reader, IndexedReader):
        yield from reader.numbered(index, count)
        return
    start = 0
    for number, batch in enumerate(reader):
        if number % count == index:
            yield number, start, batch
        start += n_samples(batch, specs)


def in_order(source: Indexed, specs: Sequence[TensorSpec], *, batch_size: int) -> Reader:
    """A reader of the samples of an indexed source.

    Args:
        source: Samples of which every input holds one each.
        specs: The model's inputs. One with a fixed batch axis decides the batch size.
        batch_size: Samples per batch; the last may be smaller.

    Raises:
        DataError: There are no samples, or they do not fill batches of the model's size.
    """
    numbers = np.arange(len(source))
    if not len(numbers):
        raise DataError("there are no samples", where=source.where, want="at least one sample")
    batch = fixed_batch(specs, frozenset(), where=source.where)
    if batch is not None and len(numbers) % batch:
        raise partial_batch(len(numbers), batch, where=source.where)
    return IndexedReader(source, numbers, batch or batch_size, batch or 1)


def by_number(reader: Reader, specs: Sequence[TensorSpec]) -> Indexed:
    """The samples of a reader in any order: from disk where they lie there by number, else read once into memory."""
    if isinstance(reader, (ArrayReader, IndexedReader)):
        return reader
    batches = list(reader)
    whole = constant_inputs(specs, batches[0])
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0] if name not in whole}
    return HeldSamples(reader.where, arrays, {name: batches[0][name] for name in sorted(whole)})

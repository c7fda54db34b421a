"""Samples from the user's own code: any iterable of batches, ONNX Runtime's CalibrationDataReader, or a Dataset."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count as numbers
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxshrink.config.data import EntryData
from onnxshrink.core.errors import DataError
from onnxshrink.core.importing import load_entry
from onnxshrink.core.tensors import LABELS, Batch, TensorSpec, check_batch
from onnxshrink.data.batching import constant_inputs, fixed_batch, partial_batch, sample_count
from onnxshrink.data.datasets import DatasetSamples, is_dataset
from onnxshrink.data.indexed import in_order
from onnxshrink.data.items import named_arrays, users_code
from onnxshrink.data.reader import Reader

Rows: TypeAlias = NDArray[np.intp]


def open_entry(settings: EntryData, specs: Sequence[TensorSpec], *, batch_size: int, labels: bool = False) -> Reader:
    """Open what the user's callable returns as samples.

    The callable is called anew for each pass. It returns an iterable of batches such as torch's DataLoader, or an
    object with ``get_next()`` that gives batches and None at the end; see `named_arrays` for what a batch is. The
    batches are the user's: they are checked, and cut into at most ``batch_size`` samples, but never merged. The first
    batch is looked at here. Or it returns samples by number, such as torch's Dataset; see `is_dataset`.

    Args:
        settings: Callable, its arguments, renamings and number of samples.
        specs: The model's inputs. One that has a fixed batch axis decides the batch size.
        batch_size: Most samples in a batch, so that one giant batch of the user's is not run at once.
        labels: Give the array ``labels`` with each batch.

    Raises:
        ConfigError: The callable cannot be imported.
        DataError: The callable fails, returns something else, or its first batch does not fit.
    """
    if settings.split is not None:
        raise DataError(
            "`split` chooses by an array named 'split', and a callable has none",
            where=settings.entry,
            got=f"split: {settings.split}",
            fix=f"let the callable choose: `args: {{split: {settings.split}}}`",
        )
    make = load_entry(settings.entry)
    with users_code(settings.entry):
        made = [make(**settings.args)]
    if is_dataset(made[0]):
        samples = DatasetSamples(
            made[0],
            specs,
            where=settings.entry,
            rename=settings.rename,
            max_samples=settings.max_samples,
            labels=labels,
            is_random=True,  # nobody can tell
        )
        return in_order(samples, specs, batch_size=batch_size)
    passes = _Passes(settings, specs, lambda: made.pop() if made else make(**settings.args))
    reader = EntryReader(passes, specs, settings.max_samples, batch_size=batch_size, labels=labels)
    if next(iter(reader), None) is None:
        raise DataError("there are no samples", where=settings.entry, want="at least one batch")
    return reader


class EntryReader:
    """Samples from the user's callable; made by `open_entry`.

    Args:
        passes: Gives the user's batches, from the start each time.
        specs: The model's inputs.
        max_samples: Stop after this many samples.
        batch_size: Most samples in a batch where the model takes any number.
        labels: Give labels with each batch.
        shard: Number of this shard, and of all shards.
    """

    def __init__(
        self,
        passes: _Passes,
        specs: Sequence[TensorSpec],
        max_samples: int | None,
        *,
        batch_size: int,
        labels: bool,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self._passes = passes
        self._specs = tuple(specs)
        self._max_samples = max_samples
        self._batch_size = batch_size
        self._labels = labels
        self._shard = shard
        self._length: int | None = None

    @property
    def where(self) -> str:
        """The entry point."""
        return self._passes.where

    @property
    def has_labels(self) -> bool:
        """True if the first batch holds labels, given or not."""
        return self._passes.has_labels

    def __len__(self) -> int:
        if self._length is None:  # the user's code does not say: count once
            self._length = sum(len(samples) for samples, _ in self._numbered())
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self._numbered())

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th sample; where the model has a fixed batch axis, every ``count``-th batch of that size.

        Each shard runs the user's code in full and takes its own part.
        """
        outer, step = self._shard
        shard = (outer + step * index, step * count)
        return type(self)(
            self._passes, self._specs, self._max_samples, batch_size=self._batch_size, labels=self._labels, shard=shard
        )

    def _numbered(self) -> Iterator[tuple[Rows, Batch]]:
        """The batches of this shard, each with the numbers that its samples have in the whole pass."""
        index, count = self._shard
        start = 0
        for given in self._passes.batches():
            batch = self._checked(given, start)
            constants = constant_inputs(self._specs, batch)
            n_given = sample_count({name: a for name, a in batch.items() if name not in constants}, where=self.where)
            n_taken = n_given if self._max_samples is None else min(n_given, self._max_samples - start)
            fixed = fixed_batch(self._specs, constants, where=self.where)
            group = fixed or 1
            if n_taken % group:
                raise partial_batch(start + n_taken, group, where=self.where)
            rows = np.arange(n_taken)
            rows = rows[(start + rows) // group % count == index]
            for part in _parts(rows, fixed or self._batch_size):
                yield start + part, {name: a if name in constants else a[part] for name, a in batch.items()}
            start += n_given
            if start == self._max_samples or n_taken < n_given:
                return
        self._passes.ended(start)

    def _checked(self, given: Batch, start: int) -> Batch:
        if self._labels and LABELS not in given:
            raise DataError(
                f"labels are needed, and the batch has no array {LABELS!r}",
                where=self.where,
                got=", ".join(map(repr, given)),
                want="the targets on axis 0, one for each sample",
                fix=f"give them in each batch as {LABELS!r}, or map an array: `rename: {{array: {LABELS}}}`",
            )
        batch = {name: array for name, array in given.items() if self._labels or name != LABELS}
        rows = next((array.shape[0] for array in batch.values() if array.ndim), 0)
        check_batch(batch, self._specs, where=self.where, samples=range(start, start + rows))
        return batch


class _Passes:
    """The user's batches from the start, as often as they are asked for, and the checks that passes are alike."""

    def __init__(self, settings: EntryData, specs: Sequence[TensorSpec], make: Callable[[], Any]) -> None:
        self.where = settings.entry
        self.has_labels = False
        self._specs = tuple(specs)
        self._rename = settings.rename
        self._make = make
        self._made: Any = None
        self._first: int | None = None
        self._n_samples: int | None = None

    def batches(self) -> Iterator[Batch]:
        """One pass: name to array, renamed, not yet checked against the model."""
        with users_code(self.where):
            made = self._make()
            iterator = _iterator_of(made)
        if iterator is None:
            raise DataError(
                "the callable returned something that is no reader",
                where=self.where,
                got=type(made).__name__,
                want="an iterable of {input: array}, an object with get_next(), or a Dataset",
            )
        # A list may be returned again and again; an iterator only by a callable that rewinds it.
        once = iterator is made or not hasattr(made, "__iter__")
        again = once and made is self._made
        self._made = made
        for number in numbers():
            with users_code(self.where):
                item = next(iterator, None)
            if item is None:
                if number == 0 and self._first is not None:
                    raise self._unlike("a second pass over the samples gave nothing")
                return
            batch = named_arrays(item, self._specs, self._rename, where=self.where, what=f"batch {number}")
            if number == 0:
                self._begin(batch, again=again)
            yield batch

    def ended(self, n_samples: int) -> None:
        """A pass came to its end after ``n_samples``.

        Raises:
            DataError: An earlier pass gave another number.
        """
        if self._n_samples not in (None, n_samples):
            raise self._unlike(f"a pass gave {n_samples} samples, and an earlier one {self._n_samples}")
        self._n_samples = n_samples

    def _begin(self, batch: Batch, *, again: bool) -> None:
        first = 0
        for name in sorted(batch):
            first = zlib.crc32(np.ascontiguousarray(batch[name]).tobytes(), first)
        if again and first != self._first:
            raise self._unlike("the callable returned the same iterator again, already begun")
        self._first = first
        self.has_labels = LABELS in batch

    def _unlike(self, what: str) -> DataError:
        return DataError(
            what,
            where=self.where,
            want="the same batches in every pass; calibration, drift and accuracy each take one",
            fix="return a new iterator from each call",
        )


def _parts(rows: Rows, size: int) -> Iterator[Rows]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def _iterator_of(made: Any) -> Iterator[Any] | None:
    if hasattr(made, "__iter__"):  # ONNX Runtime's own readers are iterable as well
        iterator: Iterator[Any] = iter(made)
        return iterator
    return iter(made.get_next, None) if hasattr(made, "get_next") else None

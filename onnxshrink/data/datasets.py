"""Samples from an object that has a length and gives one sample for each number, as torch's Dataset does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import LABELS, Array, Batch, TensorSpec, check_batch, check_finite, describe
from onnxshrink.data.indexed import Draw, Numbers
from onnxshrink.data.items import named_arrays, users_code


def is_dataset(made: Any) -> bool:
    """True of what has items by number and cannot be iterated otherwise: a list, or a DataLoader, gives batches."""
    return all(hasattr(made, name) for name in ("__getitem__", "__len__")) and not hasattr(made, "__iter__")


class DatasetSamples:
    """The items of a dataset, one sample each, without an axis for samples.

    Args:
        dataset: See `is_dataset`.
        specs: The model's inputs; every one holds samples.
        where: The origin, for messages.
        rename: Name in an item to input name.
        max_samples: Use the first ones, at most so many.
        labels: Give labels with each batch.
        is_random: An item may differ from one time to the next.

    Raises:
        DataError: The first item does not fit, or has no labels and needs them.
    """

    def __init__(
        self,
        dataset: Any,
        specs: Sequence[TensorSpec],
        *,
        where: str,
        rename: Mapping[str, str],
        max_samples: int | None,
        labels: bool,
        is_random: bool,
    ) -> None:
        self.where = where
        self.is_random = is_random
        self._dataset, self._specs, self._rename, self._with_labels = dataset, tuple(specs), rename, labels
        with users_code(where):
            length = len(dataset)
        self._length = length if max_samples is None else min(length, max_samples)
        self.has_labels = bool(self._length) and LABELS in self._item(0)
        if labels and self._length and not self.has_labels:
            raise DataError(
                "labels are needed, and the first sample has none",
                where=where,
                want=f"{{input: array, {LABELS}: …}}, or a tuple with the label last",
            )
        if self._length:
            self.take(np.arange(1))

    def __len__(self) -> int:
        return self._length

    def take(self, numbers: Numbers, draw: Draw | None = None) -> Batch:  # noqa: ARG002  # chance is the user's own
        """See `Indexed.take`."""
        items = [self._item(int(number)) for number in numbers]
        names = [name for name in items[0] if name != LABELS or self._with_labels]
        batch = {name: self._stacked(name, items, numbers) for name in names}
        check_batch(batch, self._specs, where=self.where, samples=numbers.tolist(), any_batch=True)
        return batch

    def labels(self) -> Array:
        """The labels of all samples: every item is read once for them."""
        numbers = np.arange(self._length)
        items = [{LABELS: item[LABELS]} for item in map(self._item, numbers.tolist()) if LABELS in item]
        if len(items) < self._length:
            raise DataError("a sample has no labels", where=self.where, got=f"labels of {len(items)} samples")
        labels = self._stacked(LABELS, items, numbers)
        check_finite(LABELS, labels, where=self.where, samples=numbers.tolist())
        return labels

    def _item(self, number: int) -> dict[str, Array]:
        with users_code(self.where):
            item = self._dataset[number]
        return named_arrays(item, self._specs, self._rename, where=self.where, what=f"sample {number}")

    def _stacked(self, name: str, items: Sequence[Mapping[str, Array]], numbers: Numbers) -> Array:
        """One array of all items, which must be alike."""
        first = items[0][name]
        for number, item in zip(numbers, items, strict=True):
            if name not in item or item[name].shape != first.shape or item[name].dtype != first.dtype:
                raise DataError(
                    f"sample {number} has another {name!r} than sample {numbers[0]}",
                    where=self.where,
                    got=describe(name, item[name]) if name in item else ", ".join(map(repr, item)),
                    want=describe(name, first),
                    fix="give all samples one shape and dtype, or let a DataLoader collate them",
                )
        return np.stack([item[name] for item in items])

"""What a source of samples is, and how one is opened from its settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, Self

from onnxshrink.config.data import Data, EntryData, HfData, ImageData, NpyData, NpzData
from onnxshrink.core.tensors import Batch, TensorSpec


class Reader(Protocol):
    """A source of batches. Iterating again gives the same batches; every batch passed `check_batch`."""

    @property
    def where(self) -> str:
        """The origin of the samples, for messages."""

    @property
    def has_labels(self) -> bool:
        """True if the source holds an array ``labels``, whether or not it was asked for."""

    def __len__(self) -> int:
        """Number of samples (not batches)."""

    def __iter__(self) -> Iterator[Batch]:
        """Input name to array, samples on axis 0; with ``labels`` as well where they were asked for."""

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th sample, from ``index`` on; the shards of one reader are disjoint and complete.

        Where the model has a fixed batch axis, every ``count``-th batch of that size. A shard may be empty.
        """


def open_reader(settings: Data, specs: Sequence[TensorSpec], *, batch_size: int = 16, labels: bool = False) -> Reader:
    """Open the samples that ``settings`` describe, for a model whose inputs are ``specs``.

    Only headers are read here, and the first image: names, shapes and dtypes are checked before any work. Values are
    checked as they stream.

    Args:
        settings: Where the samples come from.
        specs: The model's inputs. One that has a fixed batch axis decides the batch size.
        batch_size: Samples per batch; the last batch may be smaller. A callable may give fewer.
        labels: Give the array ``labels`` with each batch.

    Raises:
        DataError: The samples do not fit ``specs``, there are none, or labels are asked for and missing.
    """
    from onnxshrink.data.arrays import open_npy, open_npz
    from onnxshrink.data.hugging_face import open_hf
    from onnxshrink.data.images import open_images
    from onnxshrink.data.indexed import in_order
    from onnxshrink.data.sources import open_entry

    match settings:
        case NpzData():
            return open_npz(settings, specs, batch_size=batch_size, labels=labels)
        case NpyData():
            return open_npy(settings, specs, batch_size=batch_size, labels=labels)
        case ImageData():
            return in_order(open_images(settings, specs, labels=labels), specs, batch_size=batch_size)
        case HfData():
            return in_order(open_hf(settings, specs, labels=labels), specs, batch_size=batch_size)
        case EntryData():
            return open_entry(settings, specs, batch_size=batch_size, labels=labels)

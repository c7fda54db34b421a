"""Samples from numpy files: which array feeds which input, which rows are wanted, and the batches they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxshrink.config.data import DataSettings, NpyData, NpzData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import (
    LABELS,
    LIKE_LABELS,
    Array,
    Batch,
    TensorSpec,
    check_batch,
    check_finite,
    check_form,
    did_you_mean,
    missing_input,
)
from onnxshrink.data.batching import constant_inputs, fixed_batch, partial_batch, sample_count, shard_of
from onnxshrink.data.stored import MappedArray, Rows, StoredArray, zipped_arrays

SPLIT = "split"
"""The reserved array name that names each sample's split."""

_SPLIT_ROWS = 1 << 14


def open_npz(
    settings: NpzData, specs: Sequence[TensorSpec], *, batch_size: int = 16, labels: bool = False
) -> ArrayReader:
    """Open the arrays of an `.npz` archive as samples; memory does not grow with their number.

    Arrays feed the inputs of the same name; where no name fits and there are as many arrays as inputs, arrays feed the
    inputs in order. `labels` and `split` are not counted, and arrays that feed nothing are left alone.

    Args:
        settings: Archive, split, renamings and number of samples.
        specs: The model's inputs. One with a fixed batch axis decides the batch size.
        batch_size: Samples per batch; the last batch may be smaller.
        labels: Give the array ``labels`` with each batch.

    Raises:
        DataError: The file is no archive, or its arrays do not fit.
    """
    return _open(zipped_arrays(settings.npz), str(settings.npz), settings, specs, batch_size, labels=labels)


def open_npy(
    settings: NpyData, specs: Sequence[TensorSpec], *, batch_size: int = 16, labels: bool = False
) -> ArrayReader:
    """Open one memory-mapped `.npy` file for each input as samples; see `open_npz`."""
    arrays = {name: MappedArray(path) for name, path in settings.npy.items()}
    where = ", ".join(map(str, settings.npy.values()))
    return _open(arrays, where, settings, specs, batch_size, labels=labels)


@dataclass(frozen=True, slots=True)
class ArrayReader:
    """Chosen rows of stored arrays, a batch at a time.

    Attributes:
        where: The origin of the samples, for messages.
        has_labels: True if the file holds labels, given or not.
    """

    where: str
    has_labels: bool
    _specs: tuple[TensorSpec, ...]
    _arrays: Mapping[str, StoredArray]
    _constants: Mapping[str, Array]
    _rows: Rows
    _batch_size: int
    _group: int

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        streams = [array.rows(self._pieces()) for array in self._arrays.values()]
        for samples, *values in zip(self._pieces(), *streams, strict=True):
            batch = {**dict(zip(self._arrays, values, strict=True)), **self._constants}
            check_batch(batch, self._specs, where=self.where, samples=samples)
            yield batch

    def shard(self, index: int, count: int) -> Self:
        """Every ``count``-th sample; where the model has a fixed batch axis, every ``count``-th batch of that size."""
        return replace(self, _rows=shard_of(self._rows, self._group, index, count))

    @property
    def is_random(self) -> bool:
        """Stored samples are always the same."""
        return False

    def take(self, numbers: NDArray[np.intp], draw: tuple[int, int] | None = None) -> Batch:  # noqa: ARG002  # as above
        """Samples in any order; see `Indexed`."""
        chosen = self._rows
        rows = chosen.start + chosen.step * numbers if isinstance(chosen, range) else chosen[numbers]
        batch = {**{name: array.at(rows) for name, array in self._arrays.items()}, **self._constants}
        check_batch(batch, self._specs, where=self.where, samples=rows.tolist(), any_batch=True)
        return batch

    def labels(self) -> Array:
        """The labels of all samples; see `Indexed`."""
        labels = next(self._arrays[LABELS].rows([self._rows]))
        check_finite(LABELS, labels, where=self.where, samples=np.asarray(self._rows).tolist())
        return labels

    def _pieces(self) -> Iterator[Rows]:
        for start in range(0, len(self._rows), self._batch_size):
            yield self._rows[start : start + self._batch_size]


def _open(
    arrays: Mapping[str, StoredArray],
    where: str,
    settings: DataSettings,
    specs: Sequence[TensorSpec],
    batch_size: int,
    *,
    labels: bool,
) -> ArrayReader:
    arrays = _renamed(arrays, settings.rename, specs, where)
    feeds = _feeds(arrays, specs, where)
    for spec in specs:
        check_form(feeds[spec.name].header, spec, where=where, any_batch=bool(spec.shape))
    constants = constant_inputs(specs, {name: array.header for name, array in feeds.items()})
    sampled = {name: array for name, array in feeds.items() if name not in constants}
    if not sampled:
        raise DataError("no input of the model holds samples", where=where, want="an input with a batch axis")
    has_labels = LABELS in arrays and LABELS not in feeds
    if labels and not has_labels:
        raise _no_labels(arrays, feeds, where)
    if labels:
        sampled[LABELS] = arrays[LABELS]
    rows = _chosen(arrays, sampled, settings, where)
    batch = fixed_batch(specs, constants, where=where)
    if batch is not None and len(rows) % batch:
        raise partial_batch(len(rows), batch, where=where)
    whole = {name: feeds[name].whole() for name in sorted(constants)}
    for name, value in whole.items():
        check_finite(name, value, where=where)
    shown = f"{where}, split {settings.split!r}" if settings.split is not None else where
    return ArrayReader(shown, has_labels, tuple(specs), sampled, whole, rows, batch or batch_size, batch or 1)


def _renamed(
    arrays: Mapping[str, StoredArray], rename: Mapping[str, str], specs: Sequence[TensorSpec], where: str
) -> dict[str, StoredArray]:
    """The arrays by their names after ``rename``."""
    wanted = [*(spec.name for spec in specs), LABELS, SPLIT]
    for old, new in rename.items():
        for name, known, what in ((old, list(arrays), "array of the data"), (new, wanted, "input of the model")):
            if name not in known:
                raise DataError(
                    f"`rename` names {name!r}, which is no {what}",
                    where=where,
                    got=f"rename: {{{old}: {new}}}",
                    want=", ".join(known) or "no arrays are there",
                    fix=did_you_mean(name, known),
                )
    renamed: dict[str, StoredArray] = {}
    for old, array in arrays.items():
        new = rename.get(old, old)
        if new in renamed:
            raise DataError(
                f"two arrays of the data are called {new!r} after `rename`",
                where=where,
                got=", ".join(f"{old}: {new}" for old, new in rename.items()),
                want="different names",
            )
        renamed[new] = array
    return renamed


def _feeds(arrays: Mapping[str, StoredArray], specs: Sequence[TensorSpec], where: str) -> dict[str, StoredArray]:
    """Input name to array: by name, or by order where no name fits and the numbers agree."""
    inputs = {spec.name for spec in specs}
    names = [name for name in arrays if name in inputs or name not in (LABELS, SPLIT)]
    if inputs.isdisjoint(names) and len(names) == len(specs):
        return {spec.name: arrays[name] for spec, name in zip(specs, names, strict=True)}
    for spec in specs:
        if spec.name not in arrays:
            raise missing_input(spec, specs, names, where=where)
    return {spec.name: arrays[spec.name] for spec in specs}


def _chosen(
    arrays: Mapping[str, StoredArray], sampled: Mapping[str, StoredArray], settings: DataSettings, where: str
) -> Rows:
    """Rows of the split, at most ``max_samples`` of them; a range, or eight bytes for each sample of the split."""
    headers = {name: array.header for name, array in sampled.items()}
    rows: Rows
    if settings.split is None:
        rows = range(sample_count(headers, where=where))
    else:
        if SPLIT not in arrays:
            raise DataError(
                f"the data has no array {SPLIT!r} to choose {settings.split!r} by",
                where=where,
                got=", ".join(map(repr, arrays)),
                want="an array of text, one entry for each sample",
                fix="leave `split` out, or name the array: `rename: {array: split}`",
            )
        sample_count({**headers, SPLIT: arrays[SPLIT].header}, where=where)
        rows = _split_rows(arrays[SPLIT], settings.split, where)
    rows = rows[: settings.max_samples]
    if not len(rows):
        raise DataError(
            "there are no samples",
            where=where,
            got="arrays with no rows",
            want="at least one sample",
            fix="look at what wrote the file: a filter that kept nothing, or a wrong folder",
        )
    return rows


def _split_rows(array: StoredArray, split: str, where: str) -> NDArray[np.intp]:
    count = array.header.shape[0]
    if len(array.header.shape) != 1:
        raise DataError(f"the array {SPLIT!r} has more than one axis", where=where, want="one entry for each sample")
    pieces = (range(start, min(start + _SPLIT_ROWS, count)) for start in range(0, count, _SPLIT_ROWS))
    found: list[NDArray[np.intp]] = []
    names: set[str] = set()
    start = 0
    for piece in array.rows(pieces):
        texts = _texts(piece)
        found.append(np.flatnonzero(texts == split) + start)
        names.update(texts.tolist())
        start += len(texts)
    if split not in names:
        known = sorted(names)
        raise DataError(
            f"the data has no split {split!r}",
            where=where,
            want=", ".join(map(repr, known[:20])) or "an array with entries",
            fix=did_you_mean(split, known),
        )
    return np.concatenate(found)


def _texts(values: Array) -> NDArray[Any]:
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    return values.astype(str)


def _no_labels(arrays: Mapping[str, StoredArray], feeds: Mapping[str, StoredArray], where: str) -> DataError:
    others = [name for name, array in arrays.items() if name != SPLIT and array not in feeds.values()]
    usual = next((repr(name) for name in others if name.lower() in LIKE_LABELS), None)
    near = usual or did_you_mean(LABELS, others) or (others[0] if len(others) == 1 else None)
    example = near.split("'")[1] if near and "'" in near else near or "array"
    return DataError(
        f"labels are needed, and the data has no array {LABELS!r}",
        where=where,
        got=", ".join(map(repr, arrays)),
        want="the targets on axis 0, one for each sample",
        fix=f"name them: `rename: {{{example}: {LABELS}}}`" if others else f"add an array named {LABELS!r}",
    )

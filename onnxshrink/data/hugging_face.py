"""Samples from a data set of Hugging Face's `datasets`: on disk as Arrow files, read by number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.config.data import HfData
from onnxshrink.core.errors import DataError, DependencyError
from onnxshrink.core.tensors import Array, TensorSpec, did_you_mean
from onnxshrink.data.datasets import DatasetSamples


def open_hf(settings: HfData, specs: Sequence[TensorSpec], *, labels: bool) -> DatasetSamples:
    """Open a data set that `save_to_disk` wrote, or one of the hub, which is downloaded first.

    Args:
        settings: The data set, its split and columns.
        specs: The model's inputs.
        labels: Give labels with each batch.

    Raises:
        DependencyError: `datasets` is not installed.
        DataError: The data set cannot be had, lacks the split or a column, or does not fit.
    """
    where = str(settings.hf)
    try:
        import datasets
    except ImportError as e:
        raise DependencyError(
            "Hugging Face data sets need the package 'datasets', and it is not installed",
            where=where,
            want="the hf extra",
            fix="pip install datasets",
        ) from e
    try:
        loaded = (
            datasets.load_from_disk(str(settings.hf))
            if isinstance(settings.hf, Path)
            else datasets.load_dataset(settings.hf, revision=settings.revision)
        )
    except Exception as e:  # the network, the hub, a script of the data set: it may raise anything
        raise DataError(
            f"the data set cannot be had: {str(e).partition(chr(10))[0] or type(e).__name__}",
            where=where,
            want="a folder that save_to_disk wrote, or a name on the hub",
        ) from e
    rows = _split(loaded, settings, where)
    for column in settings.columns.values():
        if column not in rows.column_names:
            raise DataError(
                f"the data set has no column {column!r}",
                where=where,
                want=", ".join(rows.column_names),
                fix=did_you_mean(column, rows.column_names),
            )
    shown = f"{where}, split {settings.split!r}" if settings.split is not None else where
    columns = _Columns(rows, settings.columns, specs)
    return DatasetSamples(
        columns, specs, where=shown, rename={}, max_samples=settings.max_samples, labels=labels, is_random=False
    )


def _split(loaded: Any, settings: HfData, where: str) -> Any:
    """The rows of one split; a data set that was saved without any is whole."""
    known = list(loaded) if isinstance(loaded, Mapping) else []
    if settings.split in known:
        return loaded[settings.split]
    if not known and settings.split is None:
        return loaded
    raise DataError(
        f"the data set has no split {settings.split!r}" if settings.split else "the data set has splits",
        where=where,
        want=", ".join(map(repr, known)) or "no `split`: it was saved without",
        fix=did_you_mean(settings.split, known) if settings.split else f"split: {known[0]}",
    )


class _Columns:
    """Rows as mappings from input to array.

    `datasets` gives every float as float32 and every integer as int64; the kind is checked, and the width is the
    input's.
    """

    def __init__(self, rows: Any, columns: Mapping[str, str], specs: Sequence[TensorSpec]) -> None:
        self._rows = rows.with_format("numpy", columns=sorted(set(columns.values())))
        self._columns = columns
        self._dtypes = {spec.name: np.dtype(spec.dtype) for spec in specs}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, Array]:
        row = self._rows[number]
        return {name: self._wide(name, np.asarray(row[column])) for name, column in self._columns.items()}

    def _wide(self, name: str, values: Array) -> Array:
        dtype = self._dtypes.get(name, values.dtype)
        return values.astype(dtype) if values.dtype.kind == dtype.kind else values

"""Which images a folder holds, and their labels: from sub-folders, or from a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from onnxshrink.config.data import ImageData
from onnxshrink.core.artifact import files_of
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Array, did_you_mean

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_COLUMNS = ("file", "label", "split")


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Images in the order in which they are samples.

    Attributes:
        where: Their origin, for messages.
        paths: One for each.
        labels: ``(images,)`` int64 classes or float64 values; None where there are none.
    """

    where: str
    paths: tuple[Path, ...]
    labels: Array | None


def find_images(settings: ImageData) -> ImageFiles:
    """List the images that ``settings`` choose. None is opened.

    Raises:
        DataError: There are none, one of the CSV file's is missing, or its columns do not fit.
    """
    if not settings.images.is_dir():
        raise DataError("`images` is no folder", where=str(settings.images), want="a folder of image files")
    if isinstance(settings.labels, Path):
        return _listed(settings, settings.labels)
    for option, value in (("split", settings.split), ("rename", settings.rename or None)):
        if value is not None:
            raise DataError(
                f"`{option}` is about the columns of a CSV file, and `labels` names none",
                where=str(settings.images),
                got=f"{option}: {value}",
                fix="labels: index.csv, or name the sub-folder as `images`",
            )
    paths = [path for path in files_of(settings.images) if path.suffix.lower() in _SUFFIXES]
    if settings.labels is None:
        return _chosen(paths, None, settings, str(settings.images))
    names = [path.relative_to(settings.images).parts for path in paths]
    loose = next((path for path, parts in zip(paths, names, strict=True) if len(parts) == 1), None)
    if loose is not None:
        raise DataError(
            "an image lies in no sub-folder, and so has no class",
            where=str(loose),
            want="one sub-folder for each class",
            fix="move it, or give `labels: index.csv`",
        )
    return _chosen(paths, _numbered([parts[0] for parts in names]), settings, str(settings.images))


def _listed(settings: ImageData, index: Path) -> ImageFiles:
    """The images of a CSV file, in its order."""
    rows, columns = _read_index(index, settings.rename)
    labels = None
    if "label" in columns:
        empty = next((line for line, row in enumerate(rows, 2) if not row["label"]), None)
        if empty is not None:
            raise DataError("an image has no label", where=f"{index}:{empty}", want="a label in every row, or in none")
        labels = _numbered([row["label"] for row in rows])  # before the choice: all roles number classes alike
    kept = list(range(len(rows)))
    if settings.split is not None:
        kept = _of_split(rows, settings.split, columns, index)
    paths = []
    for row in kept:
        name = PurePosixPath(rows[row]["file"])
        path = settings.images / name
        if name.is_absolute() or ".." in name.parts or not path.is_file():
            raise DataError(
                f"there is no image {str(name)!r} in the folder",
                where=f"{index}:{row + 2}",
                got=str(path),
                want=f"a file below {settings.images}",
            )
        paths.append(path)
    shown = f"{index}, split {settings.split!r}" if settings.split is not None else str(index)
    return _chosen(paths, None if labels is None else labels[kept], settings, shown)


def _read_index(index: Path, rename: Mapping[str, str]) -> tuple[list[dict[str, str]], list[str]]:
    """Rows, and columns by their names after ``rename``."""
    try:
        with index.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            given = list(reader.fieldnames or [])
            rows = [{rename.get(key, key): value for key, value in row.items() if key is not None} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"the CSV file cannot be read: {e}", where=str(index), want="UTF-8 text with a header") from e
    for old, new in rename.items():
        for name, known, what in (
            (old, given, "column of the file"),
            (new, list(_COLUMNS), "column that is looked at"),
        ):
            if name not in known:
                raise DataError(
                    f"`rename` names {name!r}, which is no {what}",
                    where=str(index),
                    got=f"rename: {{{old}: {new}}}",
                    want=", ".join(known),
                    fix=did_you_mean(name, known),
                )
    columns = [rename.get(name, name) for name in given]
    if "file" not in columns:
        raise _no_column("file", columns, index)
    return rows, columns


def _of_split(rows: Sequence[Mapping[str, str]], split: str, columns: Sequence[str], index: Path) -> list[int]:
    if "split" not in columns:
        raise _no_column("split", columns, index)
    known = sorted({row["split"] for row in rows})
    if split not in known:
        raise DataError(
            f"the data has no split {split!r}",
            where=str(index),
            want=", ".join(map(repr, known[:20])) or "rows",
            fix=did_you_mean(split, known),
        )
    return [at for at, row in enumerate(rows) if row["split"] == split]


def _chosen(paths: Sequence[Path], labels: Array | None, settings: ImageData, where: str) -> ImageFiles:
    """The first ``max_samples``."""
    if not paths:
        raise DataError(
            "there are no images",
            where=where,
            got="none",
            want=f"files ending in {', '.join(sorted(_SUFFIXES))}",
            fix="name the folder that holds them, or one that holds a folder for each class; an index needs rows",
        )
    count = settings.max_samples
    return ImageFiles(where, tuple(paths[:count]), None if labels is None else labels[:count])


def _numbered(labels: Sequence[str]) -> Array:
    """Class numbers or values as they are; names by their place among the sorted names."""
    for number in (int, float):
        try:
            return np.array([number(label) for label in labels])
        except ValueError:
            continue
    return np.unique(np.array(labels, str), return_inverse=True)[1].astype(np.int64)


def _no_column(name: str, columns: Sequence[str], index: Path) -> DataError:
    return DataError(
        f"the CSV file has no column {name!r}",
        where=str(index),
        got=", ".join(columns),
        want=f"a header with {name}",
        fix=did_you_mean(name, columns) or f"rename: {{{columns[0] if columns else 'column'}: {name}}}",
    )

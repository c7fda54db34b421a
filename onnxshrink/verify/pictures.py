"""The worst samples to look at, where they are images: thumbnails in a file beside the report."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.config.data import Data
from onnxshrink.core.artifact import Facts
from onnxshrink.core.tensors import Array, TensorSpec
from onnxshrink.data.arrays import ArrayReader
from onnxshrink.data.indexed import IndexedReader
from onnxshrink.data.reader import Reader, open_reader

MAX_SIDE = 64
"""Pixels of a thumbnail's longer side, at most."""

MAX_PICTURES = 32
"""Samples of a run that are shown: some 10 kB each where they are photographs."""

PICTURES_FILE = "pictures.json"
"""Beside the report: too much to read for a part of it."""

_BATCH_SIZE = 16
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # grey and RGB in PNG's terms


def image_input(specs: Sequence[TensorSpec]) -> tuple[str, int] | None:
    """The one input of a model that takes images, and the axis of its channels: 1 or 3 of them, before or behind."""
    if len(specs) != 1 or len(specs[0].shape) != 4:
        return None
    return next(((specs[0].name, axis) for axis in (1, 3) if specs[0].shape[axis] in _COLOUR_TYPES), None)


def worst_numbers(details: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    """Numbers of the samples that ``worst_samples`` names, rising; at most `MAX_PICTURES`, the worst of every list.

    Args:
        details: As of `Candidate.details`, of every row.
    """
    lists = [
        rows for one in details for by_output in one.get("worst_samples", {}).values() for rows in by_output.values()
    ]
    ranked = (row["sample"] for rank in zip_longest(*lists) for row in rank if row is not None)
    return tuple(sorted(list(dict.fromkeys(ranked))[:MAX_PICTURES]))


def draw_pictures(data: Data, specs: Sequence[TensorSpec], numbers: Sequence[int], out: Path) -> Facts:
    """Write ``pictures.json``: ``input`` and, by sample number, a PNG as a data URI.

    An image is drawn from its own least to its own greatest value, so that any normalization is undone but for contrast
    and colour cast. Equal arguments give equal bytes on one machine.

    Args:
        data: Where the samples come from.
        specs: The model's inputs, for which `image_input` holds.
        numbers: Which samples, rising.
        out: The folder.
    """
    found = image_input(specs)
    assert found is not None  # noqa: S101  # the caller has asked
    name, axis = found
    samples: dict[str, str] = {}
    for number, image in _images(open_reader(data, specs, batch_size=_BATCH_SIZE), name, numbers):
        encoded = base64.b64encode(png(thumbnail(image if axis == 3 else np.moveaxis(image, 0, -1)))).decode()
        samples[str(number)] = f"data:image/png;base64,{encoded}"
    document = {"schema": 1, "input": name, "samples": samples}
    (out / PICTURES_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return {"pictures": len(samples)}


def thumbnail(image: Array) -> NDArray[np.uint8]:
    """An image of at most `MAX_SIDE` pixels a side, of which each is the mean of a square.

    Args:
        image: ``(height, width, channels)``, any numeric type; what is not finite counts as 0.

    Returns:
        From 0 to 255: the least value to the greatest.
    """
    values = np.nan_to_num(image.astype(np.float64), posinf=0.0, neginf=0.0)
    side = -(-max(values.shape[:2]) // MAX_SIDE)
    height, width = (max(length // side, 1) for length in values.shape[:2])
    cut = values[: height * side, : width * side]
    rows, columns = cut.shape[0] // height, cut.shape[1] // width
    means = cut.reshape(height, rows, width, columns, -1).mean(axis=(1, 3))
    lo, hi = means.min(), means.max()
    pixels: NDArray[np.uint8] = np.rint((means - lo) * (255.0 / (hi - lo) if hi > lo else 0.0)).astype(np.uint8)
    return pixels


def png(image: NDArray[np.uint8]) -> bytes:
    """A PNG file of ``(height, width, 1 or 3)``.

    Source: W3C, "Portable Network Graphics (PNG) Specification", second edition, without filters.
    """
    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = image.reshape(height, -1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _images(reader: Reader, name: str, numbers: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """Number and array of each, from disk where samples lie there by number, else read up to the last one."""
    if isinstance(reader, ArrayReader | IndexedReader):
        for number in numbers:
            yield number, reader.take(np.array([number]))[name][0]
        return
    wanted, start = set(numbers), 0
    for batch in reader:
        images = batch[name]
        yield from ((start + row, image) for row, image in enumerate(images) if start + row in wanted)
        start += len(images)
        if start > max(wanted, default=-1):
            return

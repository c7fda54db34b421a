"""What a model weighs: on disk, compressed for download, and in parameters."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

from onnxshrink.core.report import Metric
from onnxshrink.runtime.graph import external_files, load_model

_CHUNK_BYTES = 1 << 20
_GZIP = 16 + zlib.MAX_WBITS


def measure_footprint(path: Path) -> tuple[Metric, ...]:
    """Weigh the model at ``path``.

    Args:
        path: The ``.onnx`` file; external data counts as well.

    Returns:
        ``size_bytes``, ``compressed_bytes`` (each file as gzip at its default level, as app stores and registries ship
        it) and ``parameters`` (elements of the graph's initializers, scales and zero points among them).

    Raises:
        ModelError: The file is no ONNX model, or its external data is missing.
    """
    model = load_model(path)
    files = [path, *sorted(external_files(path))]
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    return (
        Metric("size_bytes", float(sum(file.stat().st_size for file in files)), "bytes"),
        Metric("compressed_bytes", float(sum(map(_gzip_bytes, files))), "bytes"),
        Metric("parameters", float(parameters), "count"),
    )


def _gzip_bytes(path: Path) -> int:
    deflate = zlib.compressobj(level=6, wbits=_GZIP)
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(deflate.compress(chunk))
    return size + len(deflate.flush())

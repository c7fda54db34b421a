"""What a model weighs: on disk, compressed for download, in parameters, and how many of them are zero."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

from onnx import TensorProto, numpy_helper

from onnxshrink.core.report import Metric
from onnxshrink.runtime.graph import external_files, is_quantized, load_model

_CHUNK_BYTES = 1 << 20
_GZIP = 16 + zlib.MAX_WBITS
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


def measure_footprint(path: Path) -> tuple[Metric, ...]:
    """Weigh the model at ``path``.

    Args:
        path: The ``.onnx`` file; external data counts as well.

    Returns:
        ``size_bytes``, ``compressed_bytes`` (each file as gzip at its default level, as app stores and registries ship
        it), ``parameters`` (elements of the graph's initializers, scales and zero points among them), and of a float
        model ``sparsity``: the share of zeros in floating initializers of two axes or more.

    Raises:
        ModelError: The file is no ONNX model, or its external data is missing.
    """
    model = load_model(path)
    files = [path, *sorted(external_files(path))]
    parameters = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    metrics = [
        Metric("size_bytes", float(sum(file.stat().st_size for file in files)), "bytes"),
        Metric("compressed_bytes", float(sum(map(_gzip_bytes, files))), "bytes"),
        Metric("parameters", float(parameters), "count"),
    ]
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1 and tensor.data_type in _FLOATS]
    if not is_quantized(model) and (total := sum(math.prod(tensor.dims) for tensor in weights)):
        zeros = sum(int((numpy_helper.to_array(tensor) == 0).sum()) for tensor in weights)
        metrics.append(Metric("sparsity", zeros / total, "ratio"))
    return tuple(metrics)


def _gzip_bytes(path: Path) -> int:
    deflate = zlib.compressobj(level=6, wbits=_GZIP)
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(deflate.compress(chunk))
    return size + len(deflate.flush())

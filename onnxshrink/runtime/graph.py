"""ONNX files in and out: loaded whole, checked, written with external data only where the format needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import external_data_helper

from onnxshrink.core.artifact import ONNX_FILE
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import TensorSpec

PROTOBUF_LIMIT_BYTES = (1 << 31) - (1 << 20)
"""Protobuf's 2 GiB, less some room; a larger model needs external data."""

EXTERNAL_DATA_FILE = "model.onnx.data"


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX model with all its weights.

    Raises:
        ModelError: The file is no ONNX model, or its external data is missing or too short.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        missing = sorted(str(file) for file in _external_files(model, path.parent) if not file.is_file())
        if not missing:
            external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as e:  # protobuf's DecodeError and onnx's checker errors share no base
        raise ModelError(
            f"the file cannot be read as an ONNX model: {str(e).strip().partition(chr(10))[0]}",
            where=str(path),
            got=f"{path.stat().st_size} bytes" if path.exists() else "nothing",
            want="an ONNX model",
        ) from e
    if missing:
        raise ModelError(
            "external data of the ONNX model is missing",
            where=str(path),
            got=f"nothing at {', '.join(missing)}",
            want="the .onnx file with its data files beside it",
            fix="copy the data file that belongs to the model into the same folder, under its own name",
        )
    if not model.graph.node and not model.graph.output:
        raise ModelError("the ONNX model is empty", where=str(path), want="a graph with nodes and outputs")
    return model


def save_model(model: onnx.ModelProto, folder: Path) -> Path:
    """Write ``model`` into an artifact's folder; weights go to one external file only above protobuf's limit.

    Returns:
        The path of the ``.onnx`` file.
    """
    path = folder / ONNX_FILE
    if model.ByteSize() < PROTOBUF_LIMIT_BYTES:
        onnx.save(model, str(path))
    else:
        onnx.save(model, str(path), save_as_external_data=True, location=EXTERNAL_DATA_FILE, size_threshold=1024)
    return path


def external_files(path: Path) -> set[Path]:
    """The files of external data that the model at ``path`` refers to, beside the model."""
    return _external_files(onnx.load(str(path), load_external_data=False), path.parent)


def _external_files(model: onnx.ModelProto, folder: Path) -> set[Path]:
    tensors = (t for t in _tensors(model.graph) if external_data_helper.uses_external_data(t))
    return {folder / external_data_helper.ExternalDataInfo(tensor).location for tensor in tensors}


def input_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The model's inputs, less those that are initializers with a default."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in initializers)


def output_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The model's outputs."""
    return tuple(map(_spec, model.graph.output))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default ONNX operator set."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph) if subgraph.node else ()


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "unknown"
    shape = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"dim_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)

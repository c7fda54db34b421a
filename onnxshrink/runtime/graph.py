"""ONNX files in and out: loaded whole, checked, written with external data only where the format needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper, numpy_helper

from onnxshrink.core.artifact import ONNX_FILE
from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import Array, TensorSpec, require_tensor

PROTOBUF_LIMIT_BYTES = (1 << 31) - (1 << 20)
"""Protobuf's 2 GiB, less some room; a larger model needs external data."""

EXTERNAL_DATA_FILE = "model.onnx.data"

_LFS_POINTER = b"version https://git-lfs"
_FIRST_IR_VERSION_WITH_CONSTANTS = 4  # before, every initializer had to be an input


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX model with all its weights.

    Models of an IR version before 4 list every initializer as an input as well. They are read as version 4, without
    those: later tools take an input for something that the caller gives.

    Raises:
        ModelError: The file is no ONNX model, or its external data is missing or too short.
    """
    model = _read(path)
    missing = sorted(str(file) for file in _external_files(model, path.parent) if not file.is_file())
    if missing:
        raise ModelError(
            "external data of the ONNX model is missing",
            where=str(path),
            got=f"nothing at {', '.join(missing)}",
            want="the .onnx file with its data files beside it",
            fix="copy the data file that belongs to the model into the same folder, under its own name",
        )
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as e:  # onnx's checker errors and ValueError share no base
        raise _unreadable(path, e) from e
    if not model.graph.node and not model.graph.output:
        raise ModelError("the ONNX model is empty", where=str(path), want="a graph with nodes and outputs")
    if model.ir_version < _FIRST_IR_VERSION_WITH_CONSTANTS:
        inputs = _given_inputs(model)
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.ir_version = _FIRST_IR_VERSION_WITH_CONSTANTS
    return model


def require_valid(path: Path) -> None:
    """Refuse a file that is not ONNX by the rules.

    Raises:
        ModelError: onnx.checker finds a mistake.
    """
    try:
        onnx.checker.check_model(str(path))  # by path: a model above 2 GiB cannot be serialized
    except onnx.checker.ValidationError as e:
        raise ModelError(
            f"the ONNX model is not valid: {str(e).strip().partition(chr(10))[0]}",
            where=str(path),
            want="a model that onnx.checker accepts",
            fix="export it again, or see: python -c 'import onnx; onnx.checker.check_model(\"model.onnx\")'",
        ) from e


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
    """The files of external data that the model at ``path`` refers to, beside the model.

    Raises:
        ModelError: The file is no ONNX model.
    """
    return _external_files(_read(path), path.parent)


def _read(path: Path) -> onnx.ModelProto:
    """The model without its external data."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as e:  # protobuf's DecodeError and OSError share no base
        raise _unreadable(path, e) from e


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"the file cannot be read as an ONNX model: {str(error).strip().partition(chr(10))[0]}",
        where=str(path),
        got=f"{path.stat().st_size} bytes" if path.exists() else "nothing",
        want="an ONNX model",
        fix=_way_in(path),
    )


def _way_in(path: Path) -> str:
    """How a file that is no ONNX model becomes one."""
    if path.suffix in {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}:
        return "weights of torch come in with the code of their network: onnxshrink init --template vision"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "the file only points to the model, which Git LFS keeps: git lfs pull"
    return "check that the file was copied whole, or export it again"


def _external_files(model: onnx.ModelProto, folder: Path) -> set[Path]:
    tensors = (t for t in _tensors(model.graph) if external_data_helper.uses_external_data(t))
    return {folder / external_data_helper.ExternalDataInfo(tensor).location for tensor in tensors}


def input_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The model's inputs, less those that are initializers with a default.

    Raises:
        ModelError: One is no tensor.
    """
    return tuple(map(_spec, _given_inputs(model)))


def output_specs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The model's outputs.

    Raises:
        ModelError: One is no tensor.
    """
    return tuple(map(_spec, model.graph.output))


def constant_value(node: onnx.NodeProto) -> Array | None:
    """The numbers that a Constant or ConstantOfShape node holds, in whichever attribute; None for any other node."""
    if node.op_type not in ("Constant", "ConstantOfShape"):
        return None
    for attribute in node.attribute:
        match attribute.name:
            case "value":
                return np.asarray(numpy_helper.to_array(attribute.t))
            case "value_float" | "value_floats":
                return np.asarray(onnx.helper.get_attribute_value(attribute), np.float32)
            case "value_int" | "value_ints":
                return np.asarray(onnx.helper.get_attribute_value(attribute), np.int64)
    return None


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default ONNX operator set."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, then the bodies of its If, Loop and Scan nodes, at any depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node or body.output:
                    yield from graphs_of(body)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own, subgraphs included; only a name that stands twice is changed, the second time.

    A node without a name becomes ``<OpType>_<index>``, and never takes the name of another.
    """
    graphs = list(graphs_of(model.graph))
    taken = {node.name for graph in graphs for node in graph.node}
    seen = {""}
    for graph in graphs:
        for index, node in enumerate(graph.node):
            if node.name in seen:
                base = name = node.name or f"{node.op_type}_{index}"
                number = 0
                while name in taken:
                    number += 1
                    name = f"{base}_{number}"
                node.name = name
                taken.add(name)
            seen.add(node.name)


def quantized_op_types(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that quantize, dequantize or compute on quantized numbers, subgraphs included, sorted."""
    marks = ("Quantize", "Dequantize", "QLinear", "Integer", "QGemm", "QAttention", "NBits", "Bnb4", "QMoE")
    types = {node.op_type for graph in graphs_of(model.graph) for node in graph.node}
    return tuple(sorted(op_type for op_type in types if any(mark in op_type for mark in marks)))


def require_float(model: onnx.ModelProto, *, where: str) -> None:
    """Refuse a model that is quantized already: there is nothing to calibrate, and rounding twice only loses.

    Args:
        model: The model.
        where: What to call it in messages.

    Raises:
        ModelError: It has one of `quantized_op_types`.
    """
    if found := quantized_op_types(model):
        raise ModelError(
            "the model is quantized already",
            where=where,
            got=", ".join(found),
            want="a float32 model",
            fix="start from the float model that this one was made from; what is quantized in a file says: "
            "onnxshrink inspect model.onnx",
        )


def is_quantized(model: onnx.ModelProto) -> bool:
    """Whether a node quantizes, dequantizes or computes on quantized numbers."""
    return bool(quantized_op_types(model))


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for subgraph in (attribute.g, *attribute.graphs):
                yield from _tensors(subgraph) if subgraph.node else ()


def _given_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.WhichOneof("value") or "tensor_type"
    if kind != "tensor_type":
        require_tensor(value.name, f"{kind.removesuffix('_type')}(...)", where="the graph's inputs and outputs")
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "unknown"
    shape = tuple(
        # Some exporters write -1 or 0 for an axis of any length.
        dim.dim_value if dim.dim_value > 0 else dim.dim_param or f"dim_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)

"""Pieces of a candidate as one model that runs each on its own inputs, in several versions.

* ``weights``: activations in float, weights as stored; what is wrong now comes from the weights
* ``inputs``: the inputs quantized as well, the result not
* ``whole``: everything as in the candidate

Each piece gets its inputs under names of its own, so that pieces that follow each other are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.core.tensors import Array
from onnxshrink.runtime.session import Session
from onnxshrink.verify.pairing import Pair, Piece, Tensors

Version: TypeAlias = Literal["weights", "inputs", "whole"]
VERSIONS: tuple[Version, ...] = ("weights", "inputs", "whole")


@dataclass(frozen=True, slots=True)
class Grid:
    """How a tensor is stored: ``real = scale * (q - zero_point)``.

    Attributes:
        scale: One number.
        zero_point: One integer.
        dtype: Name of the integer type.
    """

    scale: float
    zero_point: int
    dtype: str

    @property
    def lo(self) -> float:
        """Least value it holds."""
        return self.scale * (int(np.iinfo(self.dtype).min) - self.zero_point)

    @property
    def hi(self) -> float:
        """Greatest value it holds."""
        return self.scale * (int(np.iinfo(self.dtype).max) - self.zero_point)

    def stored(self, values: Array) -> Array:
        """The integers, as QuantizeLinear makes them: rounded half to even, then clipped."""
        info = np.iinfo(self.dtype)
        rounded = np.rint(values.astype(np.float32) / np.float32(self.scale)) + self.zero_point
        stored: Array = np.clip(np.nan_to_num(rounded), info.min, info.max).astype(self.dtype)
        return stored

    def restored(self, stored: Array) -> NDArray[np.float32]:
        """The numbers that integers stand for."""
        return ((stored.astype(np.int64) - self.zero_point) * np.float32(self.scale)).astype(np.float32)


def constants_of(tensors: Tensors, names: Iterable[str]) -> dict[str, Array]:
    """Values of constants, computed where nodes make them."""
    wanted = [name for name in dict.fromkeys(names) if name in tensors.constants]
    values = {
        name: np.asarray(numpy_helper.to_array(tensors.initializers[name]))
        for name in wanted
        if name in tensors.initializers
    }
    made = [name for name in wanted if name not in values]
    if made:
        nodes = [node for node in tensors.model.graph.node if all(out in tensors.constants for out in node.output)]
        session = Session(_model(tensors, nodes, [], made), optimization="disabled", name="the constants")
        values |= session.run({})
    return values


def grid_of(quantizer: onnx.NodeProto, tensors: Tensors) -> Grid | None:
    """The grid of a QuantizeLinear; None where it has several scales."""
    values = constants_of(tensors, quantizer.input[1:])
    scale = values.get(quantizer.input[1])
    if scale is None or scale.size != 1:
        return None
    zero = values.get(quantizer.input[2]) if len(quantizer.input) > 2 else np.zeros((), np.uint8)
    if zero is None or zero.dtype.kind not in "iu":
        return None
    return Grid(float(scale.item()), int(zero.item()), zero.dtype.name)


def feed_name(place: int, tensor: str) -> str:
    """What the model of `pieces_model` calls an input of its piece number ``place``."""
    return f"in{place}:{tensor}"


def result_name(place: int, version: Version) -> str:
    """What it calls a result."""
    return f"out{place}:{version}"


def pieces_model(pair: Pair, pieces: Mapping[int, Piece], versions: Iterable[Version]) -> bytes:
    """A model that runs each piece, in these versions, on inputs of its own.

    Args:
        pair: The two models.
        pieces: The pieces, by a number each.
        versions: Which versions; ``whole`` needs no other.
    """
    nodes: list[onnx.NodeProto] = []
    inputs, outputs = [], []
    for place, piece in pieces.items():
        for name in piece.inputs:
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(pair.candidate.specs[name].dtype))
            inputs.append(helper.make_tensor_value_info(feed_name(place, name), dtype, None))
        for version in versions:
            nodes += _version(pair, place, piece, version)
            outputs.append(result_name(place, version))
    others = [*_fold_constants(pair, pieces.values()), *_computed_grids(pair, pieces.values())]
    return _model(pair.candidate, nodes, inputs, outputs, others=others)


def _version(pair: Pair, place: int, piece: Piece, version: Version) -> Iterator[onnx.NodeProto]:
    """The nodes of one version, each name marked with it."""
    own = {out for node in piece.nodes for out in node.output if out}
    constants = pair.candidate.constants
    names: dict[str, str] = {name: feed_name(place, name) for name in piece.inputs}

    def called(name: str) -> str:
        return names.get(name, f"{version}{place}:{name}" if name in own else name)

    for node in piece.nodes:
        if version == "weights" and node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            names[node.output[0]] = called(node.input[0])
        elif version == "weights" and node.op_type == "DequantizeLinear" and node.input[0] in names:
            names[node.output[0]] = names[node.input[0]]
        else:
            yield _renamed(node, called, f"{version}{place}:")
    end = called(piece.tensor)
    if version == "whole":
        if piece.quantizer is not None:
            yield from _quantized(piece.quantizer, end, f"{version}{place}:end")
            end = f"{version}{place}:end_restored"
    else:
        for number, fold in enumerate(piece.folds):
            clipped = f"{version}{place}:fold{number}"
            renamed = _renamed(fold, lambda name: f"fold:{name}", clipped)
            renamed.input[0], renamed.output[0] = end, clipped
            yield renamed
            end = clipped
    yield helper.make_node("Identity", [end], [result_name(place, version)])


def _quantized(quantizer: onnx.NodeProto, name: str, base: str) -> Iterator[onnx.NodeProto]:
    node = onnx.NodeProto()
    node.CopyFrom(quantizer)
    node.name, node.input[0], node.output[0] = f"{base}_q", name, f"{base}_q"
    yield node
    yield helper.make_node(
        "DequantizeLinear",
        [f"{base}_q", *quantizer.input[1:]],
        [f"{base}_restored"],
        name=f"{base}_restored",
        domain=quantizer.domain,
    )


def _renamed(node: onnx.NodeProto, called: Callable[[str], str], mark: str) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = f"{mark}{node.name}"
    copy.input[:] = [called(name) if name else "" for name in node.input]
    copy.output[:] = [called(name) if name else "" for name in node.output]
    return copy


def _fold_constants(pair: Pair, pieces: Iterable[Piece]) -> list[onnx.TensorProto]:
    folds = {name for piece in pieces for fold in piece.folds for name in fold.input[1:] if name}
    tensors = []
    for name in sorted(folds):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(pair.reference.initializers[name])
        tensor.name = f"fold:{name}"
        tensors.append(tensor)
    return tensors


def _computed_grids(pair: Pair, pieces: Iterable[Piece]) -> list[onnx.TensorProto]:
    """Scales and zero points of results that nodes compute."""
    read = {name for piece in pieces if piece.quantizer is not None for name in piece.quantizer.input[1:] if name}
    values = constants_of(pair.candidate, sorted(read - pair.candidate.initializers.keys()))
    return [numpy_helper.from_array(value, name) for name, value in values.items()]


def _model(
    tensors: Tensors,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: Iterable[str],
    *,
    others: Iterable[onnx.TensorProto] = (),
) -> bytes:
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "pieces", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    graph.initializer.extend(tensor for name, tensor in tensors.initializers.items() if name in read)
    graph.initializer.extend(others)
    model = helper.make_model(
        graph, opset_imports=list(tensors.model.opset_import), ir_version=tensors.model.ir_version
    )
    serialized: bytes = model.SerializeToString()
    return serialized

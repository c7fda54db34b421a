"""The tensors of one graph: who makes and who reads them, their types, and a copy that shows any of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.graph import input_specs
from onnxshrink.runtime.session import Session

FLOATS = ("float32", "float16", "float64")


class Tensors:
    """The tensors of one graph: who makes and who reads them, and their types.

    Args:
        model: Without nodes of equal names.
        shapes: Lengths of the inputs' axes, to know sizes by; the model's own by default.
        name: What to call the model in messages.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
    """

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], *, name: str) -> None:
        graph = model.graph
        self.model = model
        self.inputs = input_specs(model)
        self.outputs = tuple(value.name for value in graph.output)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {out: node for node in graph.node for out in node.output if out}
        self.place = {out: place for place, node in enumerate(graph.node) for out in node.output if out}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.constants = set(self.initializers)
        for node in graph.node:
            for read in dict.fromkeys(reads_of(node)):
                self.readers.setdefault(read, []).append(node)
            if all(read in self.constants for read in reads_of(node)):
                self.constants.update(out for out in node.output if out)
        self.specs = {spec.name: spec for spec in (*self.inputs, *self._computed(shapes, name))}

    def is_float(self, name: str) -> bool:
        """Whether the tensor holds real numbers that a sample decides."""
        return name not in self.constants and name in self.specs and self.specs[name].dtype in FLOATS

    def quantizer(self, name: str) -> onnx.NodeProto | None:
        """The QuantizeLinear that reads the tensor, if one does."""
        return next((node for node in self.readers.get(name, ()) if node.op_type == "QuantizeLinear"), None)

    def _computed(self, shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[TensorSpec, ...]:
        """Types and sizes of what the nodes make, as ONNX Runtime infers them."""
        shown = showing(self.model, (out for out in self.maker if out not in self.constants))
        for value in shown.graph.input:
            dims = value.type.tensor_type.shape.dim
            for dim, length in zip(dims, shapes.get(value.name, ()), strict=False):
                dim.dim_value = length
        for value in shown.graph.output:
            value.ClearField("type")
        del shown.graph.value_info[:]
        return Session(shown.SerializeToString(), optimization="disabled", name=name).outputs


def reads_of(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, those that its subgraphs take from outside included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            made = {out for inner in body.node for out in inner.output}
            made |= {value.name for value in (*body.input, *body.initializer)}
            names += [name for inner in body.node for name in reads_of(inner) if name not in made]
    return names


def showing(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """A copy of ``model`` whose outputs are these tensors; ONNX Runtime fills in their types."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return shown

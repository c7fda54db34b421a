"""Which tensors of two models stand for each other, and the pieces of the candidate between them.

Nothing is assumed about how the candidate was made: a piece is whatever it computes one matched tensor with from other
matched ones. It is a node with its Q/DQ pairs, the four nodes of a dynamic product, a node between casts to float16, or
a convolution that took in the batch normalization after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.graph import input_specs
from onnxshrink.runtime.session import Session
from onnxshrink.verify.drift import match_outputs

FLOATS = ("float32", "float16", "float64")
_BORDERS = ("QuantizeLinear", "DequantizeLinear")
_CLIPS = ("Relu", "Clip")


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


@dataclass(frozen=True, slots=True)
class Piece:
    """What the candidate computes one matched tensor with.

    Attributes:
        node: Name of the reference's node that makes the tensor.
        op_type: Its operator.
        tensor: The tensor in the candidate, before it is quantized.
        reference: The tensor in the reference that its 8-bit form stands for: past a Relu or Clip that the
            quantization took in.
        raw: The tensor in the reference that ``tensor`` itself stands for.
        folds: The reference's Relu and Clip nodes from ``raw`` to ``reference``.
        nodes: The candidate's nodes in order, Q/DQ of the inputs included, those of the output not.
        inputs: Matched tensors that it reads: the candidate's name to the reference's.
        quantizer: QuantizeLinear of ``tensor``, or None where it stays in float.
    """

    node: str
    op_type: str
    tensor: str
    reference: str
    raw: str
    folds: tuple[onnx.NodeProto, ...]
    nodes: tuple[onnx.NodeProto, ...]
    inputs: Mapping[str, str]
    quantizer: onnx.NodeProto | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models, tensor by tensor.

    Attributes:
        reference: The float model's tensors.
        candidate: The other's.
        stands_for: Candidate's tensor to the reference's.
        outputs: Reference's output to the candidate's.
        pieces: The candidate in pieces, in its own order.
        unmatched: Nodes of the reference that nothing of the candidate could be told to stand for.
        by_structure: How many tensors were matched by the order of operators, as their names differ.
    """

    reference: Tensors
    candidate: Tensors
    stands_for: Mapping[str, str]
    outputs: Mapping[str, str]
    pieces: tuple[Piece, ...]
    unmatched: tuple[str, ...]
    by_structure: int


def pair_up(reference: Tensors, candidate: Tensors) -> Pair:
    """Match the tensors by name, the rest by the order of the operators that make them.

    Raises:
        ModelError: The inputs or outputs differ in number, or nothing matches.
    """
    where = "the candidate"
    if len(reference.inputs) != len(candidate.inputs):
        raise ModelError("the models differ in their inputs", where=where, want=", ".join(map(str, reference.inputs)))
    outputs = match_outputs(reference.outputs, candidate.outputs, where=where)
    named = {spec.name for spec in reference.inputs} == {spec.name for spec in candidate.inputs}
    stands_for = {
        mine.name: mine.name if named else other.name
        for other, mine in zip(reference.inputs, candidate.inputs, strict=True)
    }
    for name in candidate.maker:
        if name in reference.maker and reference.is_float(name) and candidate.is_float(name):
            source = _unquantized(name, candidate)
            if source not in stands_for and name not in stands_for.values():
                stands_for[source] = name
    for other, mine in outputs.items():
        stands_for.setdefault(_unquantized(mine, candidate), other)
    by_structure = dict(_by_structure(reference, candidate, stands_for))
    stands_for |= by_structure
    pieces = tuple(_pieces(reference, candidate, stands_for))
    if not pieces:
        raise ModelError("no tensor of the candidate can be matched with one of the reference", where=where)
    return Pair(
        reference,
        candidate,
        stands_for,
        outputs,
        pieces,
        tuple(_unmatched(reference, stands_for, pieces)),
        len(by_structure),
    )


def _unquantized(name: str, tensors: Tensors) -> str:
    """The float tensor behind a tensor that a Q/DQ pair gives; else the tensor itself."""
    second = tensors.maker.get(name)
    first = tensors.maker.get(second.input[0]) if second is not None else None
    if first is None or second is None or (first.op_type, second.op_type) != _BORDERS:
        return name
    return str(first.input[0])


def _by_structure(reference: Tensors, candidate: Tensors, named: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Tensors that the same operator makes from tensors matched before; of several such, in the order of the graph."""
    taken, stands_for = set(named.values()), dict(named)
    open_ones: dict[tuple[object, ...], list[str]] = {}
    for name in _makes(reference):
        node = reference.maker[name]
        read = (each for each in reads_of(node) if each not in reference.constants)
        key = (node.op_type, _form(reference.specs[name]), frozenset(_unclipped(each, reference) for each in read))
        if name not in taken:
            open_ones.setdefault(key, []).append(name)
    for name in _makes(candidate):
        if name in stands_for:
            continue
        _, inputs = _closure(name, candidate, set(stands_for))
        if inputs.keys() <= stands_for.keys():
            read = (_unclipped(stands_for[each], reference) for each in inputs)
            key = (candidate.maker[name].op_type, _form(candidate.specs[name]), frozenset(read))
            if open_ones.get(key):
                stands_for[name] = open_ones[key].pop(0)
                yield name, stands_for[name]


def _unclipped(name: str, reference: Tensors) -> str:
    """The tensor before a Relu or Clip, which one of the models may not have."""
    while (maker := reference.maker.get(name)) is not None and maker.op_type in _CLIPS:
        name = maker.input[0]
    return name


def _form(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)


def _makes(tensors: Tensors) -> Iterator[str]:
    """First outputs of the nodes that compute on real numbers; a Cast from float to float only carries them."""
    for node in tensors.model.graph.node:
        carries = node.op_type in _BORDERS or (node.op_type == "Cast" and tensors.is_float(node.input[0]))
        if not carries and node.output[0] and tensors.is_float(node.output[0]):
            yield node.output[0]


def _pieces(reference: Tensors, candidate: Tensors, stands_for: Mapping[str, str]) -> Iterator[Piece]:
    taken = set(stands_for.values())
    folds = {name: _folds(reference, other, taken) for name, other in stands_for.items()}
    ends = {name: nodes[-1].output[0] if nodes else stands_for[name] for name, nodes in folds.items()}
    inner = {name for name in stands_for if _is_clipped_next(name, candidate, stands_for)}
    for name in sorted(stands_for.keys() & candidate.maker.keys(), key=lambda name: candidate.place[name]):
        if name in inner or stands_for[name] not in reference.maker or not candidate.is_float(name):
            continue
        nodes, inputs = _closure(name, candidate, stands_for.keys() - inner)
        if not inputs.keys() <= stands_for.keys() or any(_has_body(node) for node in nodes):
            continue
        quantizer = candidate.quantizer(name)
        raw, before = _taken_in(reference, stands_for[name], {node.op_type for node in nodes})
        named = reference.maker[_before_clips(reference, raw)]
        yield Piece(
            node=named.name,
            op_type=named.op_type,
            tensor=name,
            reference=ends[name] if quantizer is not None else stands_for[name],
            raw=raw,
            folds=(*before, *folds[name]) if quantizer is not None else before,
            nodes=nodes,
            inputs={read: ends[read] if candidate.quantizer(read) else stands_for[read] for read in inputs},
            quantizer=quantizer,
        )


def _taken_in(reference: Tensors, name: str, op_types: set[str]) -> tuple[str, tuple[onnx.NodeProto, ...]]:
    """The tensor before the Relu or Clip that a grid took in, whose name went to the result of the node before it."""
    before: list[onnx.NodeProto] = []
    while (maker := reference.maker[name]).op_type in _CLIPS and maker.op_type not in op_types:
        if maker.input[0] not in reference.maker or not all(r in reference.initializers for r in reads_of(maker)[1:]):
            break
        before.insert(0, maker)
        name = maker.input[0]
    return name, tuple(before)


def _before_clips(reference: Tensors, name: str) -> str:
    """The tensor that a Relu or Clip makes a result from, if its node computes one: kernels run both as one."""
    while (maker := reference.maker[name]).op_type in _CLIPS and maker.input[0] in reference.maker:
        if len(reference.readers[maker.input[0]]) > 1:
            break
        name = maker.input[0]
    return name


def _is_clipped_next(name: str, candidate: Tensors, stands_for: Mapping[str, str]) -> bool:
    """True for a tensor that one Relu or Clip alone reads: kernels take it in, so it is no border of a piece."""
    readers = candidate.readers.get(name, [])
    return (
        name in candidate.maker
        and name not in candidate.outputs
        and len(readers) == 1
        and readers[0].op_type in _CLIPS
        and readers[0].output[0] in stands_for
    )


def _folds(reference: Tensors, name: str, taken: set[str]) -> tuple[onnx.NodeProto, ...]:
    """The Relu and Clip nodes behind a tensor that the candidate does not have any more."""
    folds: list[onnx.NodeProto] = []
    while name not in reference.outputs:
        readers = reference.readers.get(name, [])
        if len(readers) != 1 or readers[0].op_type not in _CLIPS or readers[0].output[0] in taken:
            break
        if not all(read in reference.initializers for read in reads_of(readers[0])[1:]):
            break
        folds.append(readers[0])
        name = readers[0].output[0]
    return tuple(folds)


def _closure(name: str, tensors: Tensors, borders: set[str]) -> tuple[tuple[onnx.NodeProto, ...], dict[str, None]]:
    """The nodes that make a tensor out of matched ones, in order, and those tensors."""
    wanted, seen, inputs = [name], set[str](), dict[str, None]()
    places: set[int] = set()
    while wanted:
        made = wanted.pop()
        place = tensors.place[made]
        if place in places:
            continue
        places.add(place)
        for read in reads_of(tensors.model.graph.node[place]):
            if read in seen or read in tensors.initializers:
                continue
            seen.add(read)
            if read in borders or read not in tensors.maker:
                inputs[read] = None
            else:
                wanted.append(read)
    return tuple(tensors.model.graph.node[place] for place in sorted(places)), inputs


def _has_body(node: onnx.NodeProto) -> bool:
    return any(a.g.node or a.graphs for a in node.attribute)


def _unmatched(reference: Tensors, stands_for: Mapping[str, str], pieces: tuple[Piece, ...]) -> Iterator[str]:
    """Nodes of the reference whose result no tensor of the candidate stands for, nor a piece takes in."""
    known = {name for piece in pieces for name in (piece.raw, piece.reference)} | {
        fold.output[0] for piece in pieces for fold in piece.folds
    }
    known |= {stands_for[out] for piece in pieces for node in piece.nodes for out in node.output if out in stands_for}
    for node in reference.model.graph.node:
        if any(reference.is_float(out) for out in node.output if out) and not known & set(node.output):
            yield node.name

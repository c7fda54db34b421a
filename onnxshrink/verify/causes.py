"""Why a node runs in float, and what to change: read off the graph that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES
from onnxshrink.config.stages import Isa
from onnxshrink.runtime.isa import NO_INTEGERS_ON_CUDA
from onnxshrink.runtime.session import Optimization
from onnxshrink.verify.macs import attribute, is_integer, label, multiplies, tensor_label

_FLOATS = {"float32", "float16", "float64", "bfloat16"}
_SIXTEEN_BITS = {"int16", "uint16"}
BORDERS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
# They move numbers and compute nothing, so an island of nothing else costs next to nothing.
MOVES = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Concat", "Split", "Gather",
    "Expand", "Cast", "Dropout", "Shape", "ReorderInput", "ReorderOutput",
}  # fmt: skip
_NORMS = {"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"}
_WEIGHT_ONLY = {"MatMulNBits", "MatMulBnb4"}
_FUSED = {"FusedConv": "Conv", "NhwcFusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}
_WITHOUT_KERNEL = {"BatchNormalization", "ConvTranspose", "InstanceNormalization", *_NORMS}


@dataclass(frozen=True, slots=True)
class Cause:
    """Why nodes run in float.

    Attributes:
        kind: A short name, equal for equal causes: ``signed activations``.
        text: What is the case, with names.
        change: What to do about it.
    """

    kind: str
    text: str
    change: str


_BETWEEN_DYNAMIC = Cause(
    "between dynamic products",
    "dynamic quantization computes everything but the products in float",
    "quantize statically, or leave it",
)
SECONDARY = {"not quantized", "output not quantized", _BETWEEN_DYNAMIC.kind}  # they follow from what is beside them


class RunGraph:
    """A graph as ONNX Runtime runs it, with what is needed to explain it.

    Args:
        graph: The optimized graph.
        dtypes: Element type of every tensor.
        optimization: The level of the session that runs it.
        provider: The session's execution provider.
        isa: The processor's instruction set.
    """

    def __init__(
        self, graph: onnx.GraphProto, dtypes: Mapping[str, str], optimization: Optimization, provider: str, isa: Isa
    ) -> None:
        self.nodes = list(graph.node)
        self.dtypes = dtypes
        self.optimization = optimization
        self.provider = provider
        self.isa = isa
        self.constants = {tensor.name for tensor in graph.initializer}
        self.maker: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            inputs = [name for name in node.input if name]
            if all(name in self.constants for name in inputs):
                self.constants.update(node.output)
            for name in inputs:
                self.readers.setdefault(name, []).append(node)
            self.maker |= dict.fromkeys(node.output, node)
        self.dynamic = any("Dynamic" in node.op_type for node in self.nodes)
        self.quantized = any(node.op_type in BORDERS or is_integer(node) for node in self.nodes)

    def is_float(self, node: onnx.NodeProto) -> bool:
        """True where the node computes float activations from float activations."""
        if node.op_type in BORDERS or is_integer(node):
            return False
        return any(self.dtypes.get(name) in _FLOATS for name in node.output) and bool(self.activations(node))

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The node's float inputs that are not constant."""
        return [name for name in node.input if name not in self.constants and self.dtypes.get(name) in _FLOATS]

    def dequantized(self, name: str) -> str | None:
        """The integer tensor that ``name`` is dequantized from, or None."""
        maker = self.maker.get(name)
        return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else None

    def quantized_as(self, name: str) -> str | None:
        """The integer tensor that ``name`` is quantized to, or None."""
        readers = (node for node in self.readers.get(name, ()) if node.op_type == "QuantizeLinear")
        return next((node.output[0] for node in readers), None)


def cause_of(node: onnx.NodeProto, island: list[onnx.NodeProto], graph: RunGraph) -> Cause | None:
    """Why this one node is float; None for nodes that only follow their neighbours.

    Args:
        node: The node.
        island: The float nodes that it hangs together with.
        graph: The graph that runs.
    """
    if node.op_type in MOVES:
        return None
    if node.op_type in _WEIGHT_ONLY:
        return _weight_only(node)
    if not graph.quantized:
        return Cause("not quantized", "nothing in the model is quantized", "onnxshrink quantize")
    op_type = _FUSED.get(node.op_type, node.op_type)
    known = op_type in QUANTIZABLE_OP_TYPES and op_type not in _WITHOUT_KERNEL
    return (_session_cause(node, graph) or (_type_cause(node, graph) if known else None)) or (
        _border_cause(node, graph) if known else _kernel_cause(node, island)
    )


def _session_cause(node: onnx.NodeProto, graph: RunGraph) -> Cause | None:
    """What is wrong with the session, not with the model."""
    if not any(graph.dequantized(name) for name in node.input):
        return None
    if graph.provider == "cuda":
        return Cause("no integer kernels on CUDA", NO_INTEGERS_ON_CUDA, "use fp16 on CUDA, and int8 on the CPU")
    if graph.optimization in ("disabled", "basic"):
        return Cause(
            "session below EXTENDED",
            f"the session optimizes at {graph.optimization!r}, and pairs of Q and DQ are fused from EXTENDED on",
            "open the session with ORT_ENABLE_EXTENDED or ORT_ENABLE_ALL",
        )
    return None


def _type_cause(node: onnx.NodeProto, graph: RunGraph) -> Cause | None:
    """Quantized neighbours of a type that has no kernel here."""
    sides = graph.activations(node) if multiplies(node) else node.input  # a constant side must be of the same type
    borders = [border for name in sides if (border := graph.dequantized(name))]
    borders += [border for name in node.output if (border := graph.quantized_as(name))]
    for border in borders:
        if graph.dtypes.get(border) in _SIXTEEN_BITS:
            return Cause(
                "16-bit activations",
                f"{tensor_label(border)!r} has 16 bits, and the CPU provider has integer kernels for 8",
                "quantize its activations to 8 bits, or leave the node in float",
            )
    signed = [border for border in borders if graph.dtypes.get(border) == "int8"]
    if not signed or graph.isa == "arm64":
        return None
    border = max(signed, key=lambda name: len(graph.readers.get(name, ())))
    n_readers = len(graph.readers.get(border, ()))
    return Cause(
        "signed activations",
        f"{tensor_label(border)!r} is signed (int8) and has {n_readers} reader{'' if n_readers == 1 else 's'}; on x86 "
        "signed activations run in integers only where ONNX Runtime can make them unsigned: at one reader",
        "quantize with types: u8s8 (`auto` on x86)",
    )


def _border_cause(node: onnx.NodeProto, graph: RunGraph) -> Cause | None:
    """A node that could be integer and whose inputs, weights or output are not quantized."""
    name, inputs = label(node), graph.activations(node)
    loose = [tensor for tensor in inputs if not graph.dequantized(tensor)]
    weights = [tensor for tensor in node.input[1:2] if tensor in graph.constants] if multiplies(node) else []
    stored = [tensor for tensor in weights if graph.dequantized(tensor)]
    if loose and stored:
        return _weight_only(node)
    if loose and graph.dynamic:
        return _dynamic(node) if multiplies(node) and not weights else _BETWEEN_DYNAMIC
    if loose or len(weights) > len(stored):
        what = f"input {tensor_label(loose[0])!r} is" if loose else "weights are"
        return Cause(
            "not quantized",
            f"{name!r} was left out of quantization: its {what} not quantized",
            "take it out of exclude_nodes, add its type to op_types, or leave it",
        )
    if not all(graph.quantized_as(tensor) for tensor in node.output if tensor):
        return Cause(
            "output not quantized",
            f"the output of {name!r} is not quantized",
            "quantize the node that reads it as well, or leave it",
        )
    return None


def _kernel_cause(node: onnx.NodeProto, island: list[onnx.NodeProto]) -> Cause | None:
    """Operators without an integer kernel, which no quantization makes integer."""
    name, op_type = label(node), node.op_type
    if op_type == "BatchNormalization":
        return Cause(
            "batch normalization",
            f"the batch normalization {name!r} is not folded into a convolution",
            "optimize before quantizing, which folds it into the convolution before it; where it follows none, put it "
            "after one in the network",
        )
    if op_type in {"HardSwish", "HardSigmoid"}:
        swish = op_type == "HardSwish" or any(other.op_type == "Mul" for other in island)
        called = "HardSwish" if swish else "HardSigmoid"
        return Cause(
            called, f"{called} at {name!r} has no integer kernel", "put Relu or Relu6 in its place and finetune"
        )
    if op_type == "ConvTranspose":
        return Cause(
            op_type,
            f"ConvTranspose at {name!r} has no integer kernel",
            "put Resize and Conv in its place, which have one each",
        )
    if op_type in _NORMS:
        return Cause(
            "layer normalization",
            f"{op_type} at {name!r} has no integer kernel",
            "leave it: it is little work; batch normalization after a convolution would fold",
        )
    if op_type == "ReduceMean":
        return Cause(
            op_type,
            f"ReduceMean at {name!r} has no integer kernel" + (", GlobalAveragePool has one" if _pools(node) else ""),
            "optimize before quantizing, which writes global pooling as GlobalAveragePool"
            if _pools(node)
            else "leave it",
        )
    if op_type == "Mul" or op_type in QUANTIZABLE_OP_TYPES:
        return None
    return Cause(
        f"no kernel: {op_type}",
        f"{op_type} at {name!r} has no integer kernel",
        "leave it, or choose an operator that has one",
    )


def _pools(node: onnx.NodeProto) -> bool:
    """True where two axes are reduced; opset 18 has them as an input, which is as good as always those of an image."""
    axes = attribute(node, "axes")
    return axes is None or len(axes) == 2


def _dynamic(node: onnx.NodeProto) -> Cause:
    return Cause(
        "dynamic quantization",
        f"{label(node)!r} multiplies two activations, and dynamic quantization takes products with constant weights",
        "quantize statically, or leave it",
    )


def _weight_only(node: onnx.NodeProto) -> Cause:
    return Cause(
        "weight-only",
        f"only the weights of {label(node)!r} are quantized, its activations are float",
        "quantize statically or dynamically for speed; weight-only saves bytes",
    )


def unknown(names: tuple[str, ...]) -> Cause:
    """For nodes of which none has a cause."""
    shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return Cause("unknown", f"unknown: ONNX Runtime did not fuse {shown}", "report it with the model, or exclude it")

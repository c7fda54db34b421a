"""Which tensors are looked at, and the session that shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto, numpy_helper

from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES
from onnxshrink.core.tensors import Array, TensorSpec
from onnxshrink.runtime.graph import constant_value, input_specs
from onnxshrink.runtime.session import Session

_SAME_VALUES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"}


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor whose statistics follow from another's: its values are the source's, clipped.

    Attributes:
        name: The tensor.
        source: The tensor it is made from; observed, or derived earlier.
        lo: Lower bound; minus infinity for none.
        hi: Upper bound; infinity for none.
    """

    name: str
    source: str
    lo: float = -math.inf
    hi: float = math.inf


@dataclass(frozen=True, slots=True)
class Plan:
    """What calibration does with each tensor.

    Attributes:
        inputs: Model inputs to count, taken from the samples.
        observed: Tensors to compute and count.
        derived: Tensors that need no counting, in topological order.
        masked: Tensors that a mask can reach and why; they stay in float and are not looked at.
        specs: The model's inputs.
    """

    inputs: tuple[str, ...]
    observed: tuple[str, ...]
    derived: tuple[Derived, ...]
    masked: dict[str, str]
    specs: tuple[TensorSpec, ...]


def tensors_to_calibrate(model: onnx.ModelProto, op_types: Iterable[str] = QUANTIZABLE_OP_TYPES) -> tuple[str, ...]:
    """Float activations that a quantizable node reads or writes, in graph order.

    These are the tensors ONNX Runtime may quantize, as ``CalibraterBase.select_tensors_to_calibrate`` selects them. A
    tensor whose type inference does not know is none of them.

    Args:
        model: A prepared model.
        op_types: Operator types that may be quantized.
    """
    wanted = set(op_types)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output, *model.graph.input)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    floats -= {tensor.name for tensor in model.graph.initializer}
    names = (name for node in model.graph.node if node.op_type in wanted for name in (*node.input, *node.output))
    return tuple(dict.fromkeys(name for name in names if name in floats))


def plan_of(model: onnx.ModelProto) -> Plan:
    """Decide for every tensor to calibrate whether it is counted, derived, or left alone.

    Args:
        model: A prepared model.
    """
    masked = masked_tensors(model)
    wanted = [name for name in tensors_to_calibrate(model) if name not in masked]
    rules = {rule.name: rule for node in model.graph.node if (rule := _derivation(node, model)) is not None}
    inputs = {value.name for value in model.graph.input}
    counted: list[str] = []
    derived: list[Derived] = []
    known: set[str] = set()
    for name in wanted:
        rule = rules.get(name)
        if rule is not None and rule.source in known:
            derived.append(rule)
        else:
            counted.append(name)
        known.add(name)
    return Plan(
        tuple(name for name in counted if name in inputs),
        tuple(name for name in counted if name not in inputs),
        tuple(derived),
        masked,
        input_specs(model),
    )


def observed_model(model: onnx.ModelProto, plan: Plan) -> bytes:
    """``model`` with the observed tensors as its outputs, serialized.

    Args:
        model: A prepared model.
        plan: What to observe; the model's own outputs are dropped where they are not.
    """
    # The outputs are exchanged while the bytes are made: a copy of the model would double the memory of its weights.
    outputs = list(model.graph.output)
    del model.graph.output[:]
    # Types without shapes: an inferred shape that is wrong would be an error here, and nobody needs it.
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None) for tensor in plan.observed
    )
    shown: bytes = model.SerializeToString()
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return shown


def open_observed(shown: bytes, *, name: str) -> Session:
    """A session on what `observed_model` made.

    ONNX Runtime's own optimization is off, as in its calibrators: the values are those of the graph's own operators.

    Args:
        shown: A serialized model.
        name: What to call the model in messages.
    """
    return Session(shown, optimization="disabled", name=name)


def _derivation(node: onnx.NodeProto, model: onnx.ModelProto) -> Derived | None:
    if node.op_type in _SAME_VALUES:
        return Derived(node.output[0], node.input[0])
    if node.op_type == "Relu":
        return Derived(node.output[0], node.input[0], lo=0.0)
    if node.op_type == "Clip":
        bounds = [_constant(name, model) if name else default for name, default in _clip_inputs(node)]
        if None not in bounds:
            lo, hi = (float(bound) for bound in bounds if bound is not None)
            return Derived(node.output[0], node.input[0], lo, hi) if lo <= hi else None
    return None


def _clip_inputs(node: onnx.NodeProto) -> list[tuple[str, float]]:
    names = [*node.input[1:], "", ""][:2]
    return list(zip(names, (-math.inf, math.inf), strict=True))


def _constant(name: str, model: onnx.ModelProto) -> float | None:
    tensor = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if tensor is not None:
        value: Array | None = numpy_helper.to_array(tensor)
    else:
        value = next(
            (constant_value(n) for n in model.graph.node if n.op_type == "Constant" and name in n.output), None
        )
    return None if value is None else float(value.reshape(-1)[0])

"""Mutants of a model and of a bundle: what a regression check must find, one small change each.

Model mutants keep the file's form and change one thing in it; tamperings change one file of a bundle. Everything is
seeded, so a mutant is the same file every time. Behaviour that cannot be told apart (another opset, another order of
the nodes) is part of the list on purpose: only a digest finds it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Model = onnx.ModelProto
Array = NDArray[np.generic]

FLOAT_BITS = {"lowest mantissa bit": 0, "mantissa bit 12": 12, "highest mantissa bit": 22, "exponent": 26, "sign": 31}
INT8_BITS = {"bit 0": 0, "bit 2": 2, "bit 4": 4, "bit 6": 6, "sign": 7}
_WEIGHED = ("Conv", "Gemm", "MatMul")
_SKIPPABLE = ("Relu", "Clip", "Erf", "Gelu", "Softmax")
_SLOW_SIDE = 64


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        family: The kind of change.
        name: What exactly.
        make: Writes the mutated model to a path, from the original's path.
        costs: True if nothing but its time tells it from the original.
    """

    family: str
    name: str
    make: Callable[[Path, Path], None]
    costs: bool = False


@dataclass(frozen=True)
class Tampering:
    """One change of a bundle's files, made in place."""

    family: str
    name: str
    make: Callable[[Path], None]


def model_mutants(path: Path) -> Iterator[Mutant]:
    """The 21 mutants of the model at ``path``, quantized (QDQ) or float."""
    model = onnx.load(path)
    weights, quantized = _weights(model), _is_quantized(model)
    rng = np.random.default_rng(0)
    for turn, (bit, place) in enumerate((INT8_BITS if quantized else FLOAT_BITS).items()):
        weight = weights[turn * (len(weights) - 1) // 4]
        index = int(rng.integers(int(np.prod(_array(model, weight).shape))))
        yield _edited("bit flip", f"{bit} of {weight}[{index}]", partial(_flip, name=weight, index=index, bit=place))
    yield from _int8_mutants(model) if quantized else _float_mutants(model)
    bias = _biases(model)[0]
    yield _edited("bias", f"one channel of {bias} is 0", partial(_change, name=bias, change=_first_zero))
    yield _edited("classes", "the first two are swapped", _swap_classes)
    yield Mutant(
        "slow-down", "a node of known cost before the output", partial(_write_edited, edit=slow_down), costs=True
    )
    yield _edited("opset", "one version later", _next_opset)
    for level in ("BASIC", "EXTENDED"):
        yield Mutant("saved by ORT", f"optimization level {level.lower()}", partial(_save_optimized, level=level))
    yield _edited("interface", "the output has another name", _rename_output)
    yield _edited("interface", "an input has another name", _rename_input)
    yield _edited("interface", "the output is float64", _widen_output)
    yield _edited("node", "one is removed", _remove_node)
    yield _edited("node", "in another order", _reorder)
    yield _edited("metadata", "another producer", _other_producer)


def tamperings() -> tuple[Tampering, ...]:
    """Changes of a bundle's files."""
    return (
        Tampering("file", "model.onnx is truncated", partial(_truncate, name="model.onnx")),
        Tampering("golden", "one golden output is 1% off", partial(_nudge, name="golden_outputs.npz", ratio=1.01)),
        Tampering("file", "check.py always passes", _blind_check),
        Tampering("manifest", "the tolerances are ten times wider", _loosen),
        Tampering("file", "golden_outputs.npz is truncated", partial(_truncate, name="golden_outputs.npz")),
        Tampering("golden", "one golden input is 1% off", partial(_nudge, name="golden_inputs.npz", ratio=1.01)),
        Tampering("file", "golden_inputs.npz is missing", _remove_inputs),
        Tampering("manifest", "manifest.json is truncated", partial(_truncate, name="manifest.json")),
    )


def slow_down(model: Model, products: int = 1) -> None:
    """Add work before the first output and leave its values as they are: ``products`` of 64 x 64 matrices in a row."""
    (output, raw), side = _detach_output(model), _SLOW_SIDE
    weight = np.full((side, side), 1 / side, np.float32)
    model.graph.initializer.extend(
        numpy_helper.from_array(array, f"slow_{name}")
        for name, array in {"w": weight, "shape": np.array([side, side]), "zero": np.array(0, np.float32)}.items()
    )
    names = [f"slow_{turn}" for turn in range(products + 1)]
    model.graph.node.extend(
        [
            helper.make_node("ReduceMean", [raw], ["slow_mean"], keepdims=0),
            helper.make_node("Expand", ["slow_mean", "slow_shape"], [names[0]]),
            *(helper.make_node("MatMul", [a, "slow_w"], [b]) for a, b in pairwise(names)),
            helper.make_node("ReduceMean", [names[-1]], ["slow_end"], keepdims=0),
            helper.make_node("Mul", ["slow_end", "slow_zero"], ["slow_nothing"]),
            helper.make_node("Add", [raw, "slow_nothing"], [output]),
        ]
    )


def _edited(family: str, name: str, edit: Callable[[Model], None]) -> Mutant:
    return Mutant(family, name, partial(_write_edited, edit=edit))


def _write_edited(source: Path, target: Path, *, edit: Callable[[Model], None]) -> None:
    model = onnx.load(source)
    edit(model)
    onnx.save(model, str(target))


def _int8_mutants(model: Model) -> Iterator[Mutant]:
    """Scales by a hundredth, zero points by one: of a weight and of an activation."""
    weights = _weights(model)
    pairs = [node for node in model.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    weight = next(node.input for node in pairs if node.input[0] == weights[len(weights) // 2])
    shared = {node.input[1] for node in pairs if node.input[0] in weights}
    rounded = [node.input for node in pairs if node.op_type == "QuantizeLinear" and node.input[1] not in shared]
    free = [values for values in rounded if _fits(_array(model, values[2]), 1)]
    activation = free[len(free) // 2]
    for values in (weight, activation):
        yield _edited("scale", f"{values[1]}[0] x 1.01", partial(_change, name=values[1], change=_first_more))
    for values, step in ((weight, -1), (activation, 1)):
        change = partial(_stepped, step=step)
        yield _edited("zero point", f"{values[2]} {step:+d}", partial(_change, name=values[2], change=change))


def _float_mutants(model: Model) -> Iterator[Mutant]:
    """A weight tensor, one of its channels, and biases by a hundredth."""
    weight, bias = _weights(model)[-1], _biases(model)[-1]
    yield _edited("scale", f"{weight} x 1.01", partial(_change, name=weight, change=lambda a: a * a.dtype.type(1.01)))
    yield _edited("scale", f"{weight}[0] x 1.01", partial(_change, name=weight, change=_first_more))
    for ratio in (1.01, 0.99):
        change = partial(_times, ratio=ratio)
        yield _edited("bias", f"{bias} x {ratio}", partial(_change, name=bias, change=change))


def _is_quantized(model: Model) -> bool:
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)


def _weights(model: Model) -> list[str]:
    """Initializers of rank 2 and more that are multiplied, in the graph's order; the integers of a quantized model."""
    types = {TensorProto.INT8, TensorProto.UINT8} if _is_quantized(model) else {TensorProto.FLOAT}
    reading = {"DequantizeLinear"} if _is_quantized(model) else set(_WEIGHED)
    known = {item.name for item in model.graph.initializer if item.data_type in types and len(item.dims) >= 2}
    read = (name for node in model.graph.node if node.op_type in reading for name in node.input)
    return list(dict.fromkeys(name for name in read if name in known))


def _biases(model: Model) -> list[str]:
    """Initializers of rank 1 that are added; int32 in a quantized model where it has such."""
    ranks = {item.name: (len(item.dims), item.data_type) for item in model.graph.initializer}
    integers = [name for name, kind in ranks.items() if kind == (1, TensorProto.INT32)]
    read = (name for node in model.graph.node if node.op_type in {*_WEIGHED, "Add"} for name in node.input)
    return integers or [name for name in read if ranks.get(name) == (1, TensorProto.FLOAT)]


def _array(model: Model, name: str) -> Array:
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name))


def _change(model: Model, *, name: str, change: Callable[[Array], Any]) -> None:
    item = next(item for item in model.graph.initializer if item.name == name)
    array = numpy_helper.to_array(item).copy()
    item.CopyFrom(numpy_helper.from_array(np.asarray(change(array), array.dtype), name))


def _flip(model: Model, *, name: str, index: int, bit: int) -> None:
    def flipped(array: Any) -> Any:
        whole = array.view(f"u{array.dtype.itemsize}").reshape(-1)
        whole[index] ^= whole.dtype.type(1 << bit)
        return whole.view(array.dtype).reshape(array.shape)

    _change(model, name=name, change=flipped)


def _first_zero(array: Any) -> Any:
    array.reshape(-1)[int(np.argmax(np.abs(array)))] = 0
    return array


def _first_more(array: Any) -> Any:
    """The first channel, or the whole of a scalar, x 1.01."""
    rows = array.reshape(max(1, array.shape[0] if array.ndim else 1), -1)
    rows[0] *= rows.dtype.type(1.01)
    return rows.reshape(array.shape)


def _times(array: Any, *, ratio: float) -> Any:
    return array * array.dtype.type(ratio)


def _fits(array: Any, step: int) -> bool:
    info = np.iinfo(array.dtype)
    return bool(info.min <= int(array.reshape(-1)[0]) + step <= info.max)


def _stepped(array: Any, *, step: int) -> Any:
    return array.astype(np.int64) + step


def _detach_output(model: Model) -> tuple[str, str]:
    """The first output's name, and the new name of the value that was it."""
    output = model.graph.output[0].name
    raw = f"{output}_raw"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == output:
                    names[place] = raw
    return output, raw


def _swap_classes(model: Model) -> None:
    count = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    output, raw = _detach_output(model)
    order = np.array([1, 0, *range(2, count)])
    model.graph.initializer.append(numpy_helper.from_array(order, "swapped"))
    model.graph.node.append(helper.make_node("Gather", [raw, "swapped"], [output], axis=-1))


def _next_opset(model: Model) -> None:
    next(entry for entry in model.opset_import if not entry.domain).version += 1


def _save_optimized(source: Path, target: Path, *, level: str) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _rename_output(model: Model) -> None:
    output, raw = _detach_output(model)
    model.graph.output[0].name = f"{output}_renamed"
    model.graph.node.append(helper.make_node("Identity", [raw], [f"{output}_renamed"]))


def _rename_input(model: Model) -> None:
    name = model.graph.input[0].name
    model.graph.input[0].name = f"{name}_renamed"
    model.graph.node.insert(0, helper.make_node("Identity", [f"{name}_renamed"], [name]))


def _widen_output(model: Model) -> None:
    output, raw = _detach_output(model)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    model.graph.node.append(helper.make_node("Cast", [raw], [output], to=TensorProto.DOUBLE))


def _remove_node(model: Model) -> None:
    """The first activation is left out; of a quantized model without one, the first pair of Q and DQ."""
    nodes = model.graph.node
    gone = next((node for node in nodes if node.op_type in _SKIPPABLE), None)
    if gone is None:
        pair = next(node for node in nodes if node.op_type == "QuantizeLinear")
        gone = next(node for node in nodes if pair.output[0] in node.input)
        gone.input[0] = pair.input[0]
    source, target = gone.input[0], gone.output[0]
    nodes.remove(gone)
    for node in nodes:
        for place, name in enumerate(node.input):
            if name == target:
                node.input[place] = source


def _reorder(model: Model) -> None:
    """The initializers stand in reverse, and two nodes in a row that do not need each other change places."""
    nodes = list(model.graph.node)
    free = (i for i in range(len(nodes) - 1) if not set(nodes[i].output) & set(nodes[i + 1].input))
    for place in islice(free, 1):
        nodes[place : place + 2] = nodes[place + 1], nodes[place]
    for field, items in (("node", nodes), ("initializer", list(model.graph.initializer)[::-1])):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(items)


def _other_producer(model: Model) -> None:
    model.producer_name = "somebody else"


def _truncate(folder: Path, *, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) * 3 // 4])


def _nudge(folder: Path, *, name: str, ratio: float) -> None:
    """The largest value of the first floating-point array, or the first value of integers plus one."""
    with np.load(folder / name) as stored:
        arrays = dict(stored)
    key = next((key for key, array in arrays.items() if array.dtype.kind == "f"), next(iter(arrays)))
    flat = arrays[key].reshape(-1)
    if arrays[key].dtype.kind == "f":
        flat[int(np.argmax(np.abs(flat)))] *= ratio
    else:
        flat[0] += 1
    np.savez(folder / name, **arrays)


def _blind_check(folder: Path) -> None:
    (folder / "check.py").write_text("print('passed')\n", encoding="utf-8")


def _remove_inputs(folder: Path) -> None:
    (folder / "golden_inputs.npz").unlink()


def _loosen(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(_wider(manifest), indent=2), encoding="utf-8")


def _wider(value: Any, *, inside: bool = False) -> Any:
    """Every number below a key that names a tolerance or a limit, ten times larger."""
    match value:
        case dict():
            words = ("tolerance", "limit", "max_")
            return {
                key: _wider(item, inside=inside or any(word in key for word in words)) for key, item in value.items()
            }
        case list():
            return [_wider(item, inside=inside) for item in value]
        case float() if inside:
            return value * 10
        case _:
            return value

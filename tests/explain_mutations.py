"""Quantized networks with one fault planted in each, and what `explain` has to say of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import encoder_models
import numpy as np
import onnx
import onnx_models as nets
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxshrink.calibration.unfold import weight_rows
from onnxshrink.config.data import NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.runtime.session import Session
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify.explain import Explanation, explain_models
from onnxshrink.verify.local_error import Deployed

Model = onnx.ModelProto
Arrays = dict[str, NDArray[np.generic]]

_SAMPLES = 24


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        network: Where.
        cause: What `explain` must call it.
        node: The node that it must name.
        plant: Name of what plants it.
        run: Plants it and explains.
    """

    network: str
    cause: str
    node: str
    plant: str
    run: Callable[[], Explanation]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.network}-{self.cause}-{self.node}-{self.plant}"


def mlp() -> Model:
    """``x[N,16]`` to ``y[N,8]``: three Gemm with Relu between."""
    rng = np.random.default_rng(5)
    sizes = (16, 32, 32, 8)
    nodes, weights = [], {}
    for i in range(3):
        weights[f"w{i}"] = (rng.standard_normal((sizes[i], sizes[i + 1])) / np.sqrt(sizes[i])).astype(np.float32)
        weights[f"b{i}"] = (rng.standard_normal(sizes[i + 1]) / 2).astype(np.float32)
        source, result = ("x" if i == 0 else f"r{i - 1}"), ("y" if i == 2 else f"g{i}")
        nodes.append(helper.make_node("Gemm", [source, f"w{i}", f"b{i}"], [result], name=f"dense{i}"))
        if i < 2:
            nodes.append(helper.make_node("Relu", [result], [f"r{i}"], name=f"relu{i}"))
    return nets.model_of(nodes, {"x": ["N", 16]}, {"y": ["N", 8]}, weights)


def residual() -> Model:
    """``x[N,4,12,12]`` to ``y[N,6]``: two blocks with a skip each, a strided Conv between, pooling and Gemm."""
    rng = np.random.default_rng(6)
    weights: dict[str, NDArray[np.generic]] = {}

    def conv(name: str, source: str, result: str, shape: tuple[int, ...], **more: int | list[int]) -> onnx.NodeProto:
        weights[f"{name}_w"] = (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
        weights[f"{name}_b"] = (rng.standard_normal(shape[0]) / 4).astype(np.float32)
        return helper.make_node("Conv", [source, f"{name}_w", f"{name}_b"], [result], name=name, **more)

    def relu(source: str, result: str) -> onnx.NodeProto:
        return helper.make_node("Relu", [source], [result], name=f"relu_{result}")

    nodes = [
        conv("stem", "x", "s", (8, 4, 3, 3), pads=[1] * 4), relu("s", "s_r"),
        conv("a1", "s_r", "a1_c", (8, 8, 3, 3), pads=[1] * 4), relu("a1_c", "a1_r"),
        conv("a2", "a1_r", "a2_c", (8, 8, 3, 3), pads=[1] * 4),
        helper.make_node("Add", ["a2_c", "s_r"], ["a_s"], name="a_add"), relu("a_s", "a_r"),
        conv("down", "a_r", "d_c", (12, 8, 3, 3), pads=[1] * 4, strides=[2, 2]), relu("d_c", "d_r"),
        conv("dw", "d_r", "dw_c", (12, 1, 3, 3), pads=[1] * 4, group=12), relu("dw_c", "dw_r"),
        conv("pw", "dw_r", "pw_c", (12, 12, 1, 1)),
        helper.make_node("Add", ["pw_c", "d_r"], ["b_s"], name="b_add"), relu("b_s", "b_r"),
        helper.make_node("GlobalAveragePool", ["b_r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "h_w", "h_b"], ["y"], name="head"),
    ]  # fmt: skip
    weights |= {"h_w": rng.standard_normal((12, 6)).astype(np.float32), "h_b": np.zeros(6, np.float32)}
    return nets.model_of(nodes, {"x": ["N", 4, 12, 12]}, {"y": ["N", 6]}, weights)


NETWORKS: dict[str, Callable[[], Model]] = {
    "cnn": nets.cnn,
    "residual": residual,
    "mlp": mlp,
    "attention": nets.attention,
    "encoder": encoder_models.encoder,
}


def samples(network: str, model: Model) -> Arrays:
    """What the network is calibrated and explained on."""
    found = encoder_models.sentences(_SAMPLES) if network == "encoder" else nets.samples_of(model, _SAMPLES)
    return {name: np.asarray(array) for name, array in found.items()}


def quantized(model: Model, arrays: Arrays, **settings: object) -> Model:
    """Our own stage's result, with weights of 7 bits: they saturate on no processor, so that all say the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "out"
        out.mkdir()
        stage = QuantizeStatic.model_validate({"types": "u8s8", "reduce_range": True, **settings})
        context = nets.context_of(nets.ArrayReader(arrays), folder)  # type: ignore[arg-type]
        quantize_static(stage, nets.artifact_of(model, folder / "source"), out, context)
        return onnx.load(out / "model.onnx")


def explained(
    reference: Model, candidate: Model, arrays: Arrays, *, isa: str = "x86_vnni", **more: object
) -> Explanation:
    """What is said of two models in memory."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "x.npz", **arrays)  # type: ignore[arg-type]
        return explain_models(reference, candidate, NpzData(npz=Path(folder) / "x.npz"), isa=isa, **more)  # type: ignore[arg-type]


def cases() -> Iterator[Case]:
    """Every fault, in the order of networks and causes."""
    for network in NETWORKS:
        model, _, good = _base(network)
        tensors = _grids(good)
        for node in model.graph.node:
            products = _weighted(node, good)
            plants = [("weight_range", _far_scale), ("fused_kernel", _broken_kernel)] * products
            if products and _both_signs(node, model):
                plants.append(("saturation", _saturating))
            if products and len(node.input) > 2:
                plants.append(("bias_overflow", _overflowing))
                if _relu_follows(node, model):
                    plants.append(("weight_range", _dead_channel))
            if (tensor := _stored_as(node, model, tensors)) is not None:
                plants.append(("activation_clipping", partial(_other_grid, tensor=tensor, factor=0.3)))
                plants.append(("resolution", partial(_other_grid, tensor=tensor, factor=50.0)))
            for cause, plant in plants:
                name = getattr(plant, "__name__", "_other_grid").removeprefix("_")
                yield Case(network, cause, node.name, name, partial(plant, network, node.name))


@cache
def _base(network: str) -> tuple[Model, Arrays, Model]:
    model = NETWORKS[network]()
    arrays = samples(network, model)
    return model, arrays, quantized(model, arrays)


def _copies(network: str) -> tuple[Model, Arrays, Model]:
    model, arrays, good = _base(network)
    copies = [Model(), Model()]
    for copy, one in zip(copies, (model, good), strict=True):
        copy.CopyFrom(one)
    return copies[0], arrays, copies[1]


def _constant(model: Model, name: str) -> NDArray[np.generic]:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def _set(model: Model, name: str, value: NDArray[np.generic]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(value, order="C"), name))


def _maker(model: Model, name: str) -> onnx.NodeProto | None:
    return next((node for node in model.graph.node if name in node.output), None)


def _node(model: Model, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _weighted(node: onnx.NodeProto, good: Model) -> bool:
    """Whether a node multiplies with constant weights, in 8 bits in the candidate."""
    if node.op_type not in {"Conv", "Gemm", "MatMul"}:
        return False
    partner = next((other for other in good.graph.node if other.name == node.name), None)
    maker = _maker(good, partner.input[1]) if partner is not None else None
    return maker is not None and maker.input[0] in {tensor.name for tensor in good.graph.initializer}


def _both_signs(node: onnx.NodeProto, model: Model) -> bool:
    """Whether a node's input is stored around 128, so that large weights alone make it saturate."""
    maker = _maker(model, node.input[0])
    depthwise = any(a.name == "group" and a.i > 1 for a in node.attribute)
    return not depthwise and (maker is None or maker.op_type not in {"Relu", "Clip", "Gelu", "Softmax"})


def _relu_follows(node: onnx.NodeProto, model: Model) -> bool:
    return any(other.op_type == "Relu" and node.output[0] in other.input for other in model.graph.node)


def _grids(good: Model) -> dict[str, str]:
    """Tensor to the name of its scale, where no other tensor shares it."""
    found = {node.input[0]: node.input[1] for node in good.graph.node if node.op_type == "QuantizeLinear"}
    return {name: scale for name, scale in found.items() if list(found.values()).count(scale) == 1}


def _stored_as(node: onnx.NodeProto, model: Model, grids: dict[str, str]) -> str | None:
    """The candidate's tensor that holds a node's result, or that of the Relu or Clip behind it."""
    if node.op_type not in {"Conv", "Gemm", "MatMul", "Add", "Softmax"}:
        return None
    names = [node.output[0], f"{node.output[0]}_QuantizeLinear_Input"]
    names += [
        other.output[0]
        for other in model.graph.node
        if other.op_type in {"Relu", "Clip"} and other.input[0] == node.output[0]
    ]
    return next((name for name in names if name in grids), None)


def _requantize_bias(good: Model, node: onnx.NodeProto, exact: NDArray[np.generic]) -> None:
    """Store a bias in int32 by the product of the scales, as the kernels read it."""
    if len(node.input) < 3:
        return
    makers = [_maker(good, name) for name in node.input]
    activation, weight, bias = (maker.input for maker in makers if maker is not None)
    scale = np.asarray(_constant(good, activation[1]) * _constant(good, weight[1]), np.float32)
    scale = scale.reshape(_constant(good, bias[1]).shape)
    stored = np.rint(exact.astype(np.float64) / scale.astype(np.float64)).clip(-(2**31), 2**31 - 1)
    _set(good, bias[1], scale)
    _set(good, bias[0], stored.astype(np.int32))


def _restored_bias(good: Model, node: onnx.NodeProto) -> NDArray[np.generic]:
    if len(node.input) < 3:
        return np.zeros(0)
    maker = _maker(good, node.input[2])
    assert maker is not None
    return _constant(good, maker.input[0]) * _constant(good, maker.input[1])


def _far_scale(network: str, name: str) -> Explanation:
    """The weights' scale is 40 times what they need."""
    model, arrays, good = _copies(network)
    node, weights = _node(good, name), _constant(model, _node(model, name).input[1])
    bias = _restored_bias(good, node)
    maker = _maker(good, node.input[1])
    assert maker is not None
    scale = np.full_like(_constant(good, maker.input[1]), 40 * np.abs(weights).max() / 127)
    _set(good, maker.input[1], scale)
    _set(good, maker.input[0], np.rint(weights / scale.reshape(-1)[0]).astype(np.int8))
    _requantize_bias(good, node, bias)
    return explained(model, good, arrays)


def _dead_channel(network: str, name: str) -> Explanation:
    """One channel of the weights is 100 times the others, a Relu never lets it through, and one scale serves all."""
    model, arrays, _ = _copies(network)
    good = quantized(model, arrays, granularity="per_tensor")
    node, mine = _node(model, name), _node(good, name)
    weights, bias = (np.array(_constant(model, each)) for each in node.input[1:3])
    rows = weights.T if _is_transposed(node) else weights
    rows[1] *= 100
    bias[1] = -4 * np.abs(rows[1]).sum()
    _set(model, node.input[1], weights)
    _set(model, node.input[2], bias)
    maker = _maker(good, mine.input[1])
    assert maker is not None
    scale = np.full_like(_constant(good, maker.input[1]), np.abs(weights).max() / 127)
    _set(good, maker.input[1], scale)
    _set(good, maker.input[0], np.rint(weights / scale).astype(np.int8))
    _requantize_bias(good, mine, bias)
    return explained(model, good, arrays)


def _is_transposed(node: onnx.NodeProto) -> bool:
    """Whether the output channels are the last axis of a node's weights."""
    return node.op_type != "Conv" and not any(a.name == "transB" and a.i for a in node.attribute)


def _other_grid(network: str, _: str, *, tensor: str, factor: float) -> Explanation:
    """A tensor's range is so many times as wide."""
    model, arrays, good = _copies(network)
    scale = _grids(good)[tensor]
    readers = [node for node in good.graph.node if node.op_type in {"Conv", "Gemm"} and len(node.input) > 2]
    biases = {node.name: _restored_bias(good, node) for node in readers}
    _set(good, scale, _constant(good, scale) * np.float32(factor))
    for node in readers:
        maker = _maker(good, node.input[0])
        if maker is not None and len(maker.input) > 1 and maker.input[1] == scale:
            _requantize_bias(good, node, biases[node.name])
    return explained(model, good, arrays)


def _overflowing(network: str, name: str) -> Explanation:
    """Half of the channels have next to no weights but a bias, which their scale cannot hold in int32."""
    model, arrays, _ = _copies(network)
    node = _node(model, name)
    weights, bias = (np.array(_constant(model, each)) for each in node.input[1:3])
    transposed = _is_transposed(node)
    rows = weights.T if transposed else weights
    half = len(rows) // 2
    rows[:half] *= np.float32(1e-10)
    bias[:half] = np.abs(bias[:half]) + 1
    _set(model, node.input[1], weights)
    _set(model, node.input[2], bias)
    good = quantized(model, arrays, bias_correction=False)
    mine = _node(good, name)
    maker = _maker(good, mine.input[1])
    assert maker is not None
    steps = np.abs(rows.reshape(len(rows), -1)).max(axis=1) / 127
    scale = np.asarray(steps if _constant(good, maker.input[1]).size > 1 else steps.max(), np.float32)
    spread = scale.reshape(-1, *[1] * (rows.ndim - 1))
    stored = np.rint(rows / spread).astype(np.int8)
    _set(good, maker.input[1], scale)
    _set(good, maker.input[0], stored.T if transposed else stored)
    _requantize_bias(good, mine, bias)
    return explained(model, good, arrays)


def _saturating(network: str, name: str) -> Explanation:
    """Weights of one sign side by side and activations in the upper half: x86 without VNNI would saturate."""
    model, arrays, _ = _copies(network)
    node = _node(model, name)
    weights = _constant(model, node.input[1])
    rng = np.random.default_rng(7)
    signs = np.sign(np.asarray(weight_rows(node, weights))[..., :1]).reshape(-1)
    bold = rng.uniform(0.9, 1.0, weights.shape).astype(np.float32) * np.abs(weights).max()
    transposed = _is_transposed(node)
    bold *= signs if transposed else signs.reshape(-1, *[1] * (weights.ndim - 1))
    _set(model, node.input[1], bold)
    good = quantized(model, arrays, reduce_range=True)
    mine = _node(good, name)
    bias, maker = _restored_bias(good, mine), _maker(good, mine.input[1])
    assert maker is not None
    scale = _constant(good, maker.input[1]) / np.float32(127 / 64)
    axis = [1] * bold.ndim
    axis[-1 if transposed else 0] = -1
    _set(good, maker.input[1], scale)
    _set(
        good,
        maker.input[0],
        np.rint(bold / (scale.reshape(axis) if scale.size > 1 else scale)).clip(-127, 127).astype(np.int8),
    )
    _requantize_bias(good, mine, bias)
    return explained(model, good, arrays, isa="x86_avx2")


def _broken_kernel(network: str, name: str) -> Explanation:
    """The deployed kernel of one node is wrong: no such ONNX Runtime is at hand, so the session is a double."""
    model, arrays, good = _copies(network)
    return explained(model, good, arrays, deployed=broken_kernel(name))


def broken_kernel(name: str) -> Deployed:
    """Opens pieces whose node ``name`` gives four fifths of what it should."""

    def deployed(serialized: bytes) -> Session:
        model = onnx.load_from_string(serialized)
        model.graph.initializer.append(numpy_helper.from_array(np.array(0.8, np.float32), "fault"))
        for node in list(model.graph.node):
            if node.name.rpartition(":")[2] == name:
                end = node.output[0]
                for other in model.graph.node:
                    other.input[:] = [f"{each}:wrong" if each == end else each for each in other.input]
                place = list(model.graph.node).index(node)
                fault = helper.make_node("Mul", [end, "fault"], [f"{end}:wrong"])
                model.graph.node.insert(place + 1, fault)
        return Session(model.SerializeToString(), name="pieces with a fault")

    return deployed

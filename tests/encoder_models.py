"""A small BERT-type encoder with random weights, as ONNX operators and as the fused ones of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Model = onnx.ModelProto

HIDDEN, HEADS, LENGTH, LAYERS, WORDS = 32, 4, 12, 2, 60
_EPSILON = 1e-5


def encoder() -> Model:
    """``ids[N,12]`` and ``mask[N,12]`` int32 to ``y[N,12,32]``, in plain ONNX operators."""
    nodes = [
        helper.make_node("Gather", ["word", "ids"], ["words"], name="embed"),
        helper.make_node("Add", ["words", "place"], ["placed"], name="add_place"),
        helper.make_node("LayerNormalization", ["placed", "g", "h"], ["x0"], name="norm", epsilon=_EPSILON),
        helper.make_node("Cast", ["mask"], ["shown"], name="show", to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "shown"], ["hidden"], name="hide"),
        helper.make_node("Unsqueeze", ["hidden", "axes"], ["hidden4"], name="axes4"),
        helper.make_node("Mul", ["hidden4", "mark"], ["bias"], name="mark_bias"),
    ]
    for layer in range(LAYERS):
        nodes += _attention(layer) + _mlp(layer)
    constants = {
        "one": np.array(1, np.float32),
        "axes": np.array([1, 2]),
        "mark": np.array(np.finfo(np.float32).min),
        "heads": np.array([0, 0, HEADS, HIDDEN // HEADS]),
        "flat": np.array([0, 0, HIDDEN]),
        "root": np.array((HIDDEN // HEADS) ** 0.5, np.float32),
    }
    return _model(nodes, _weights() | constants)


def fused_encoder() -> Model:
    """The same function in ``com.microsoft`` operators, as onnxruntime.transformers writes them."""
    embedded = ["ids", "", "word", "place", "", "g", "h", "mask"]
    nodes = [
        _own("EmbedLayerNormalization", embedded, ["x0", "lengths"], name="embed", epsilon=_EPSILON),
    ]
    weights = _weights()
    for i in range(LAYERS):
        weights[f"qkv{i}"] = np.concatenate([weights.pop(f"{part}{i}") for part in "qkv"], axis=1)
        weights[f"qkvb{i}"] = np.concatenate([weights.pop(f"{part}b{i}") for part in "qkv"])
        nodes += [
            _own(
                "Attention",
                [f"x{i}", f"qkv{i}", f"qkvb{i}", "mask"],
                [f"mixed{i}"],
                name=f"attend{i}",
                num_heads=HEADS,
                mask_filter_value=float(np.finfo(np.float32).min),
            ),
            helper.make_node("MatMul", [f"mixed{i}", f"o{i}"], [f"out{i}"], name=f"mix{i}"),
            _own(
                "SkipLayerNormalization",
                [f"out{i}", f"x{i}", "g", "h", f"ob{i}"],
                [f"n{i}"],
                name=f"norm_a{i}",
                epsilon=_EPSILON,
            ),
            helper.make_node("MatMul", [f"n{i}", f"w{i}"], [f"wide{i}"], name=f"widen{i}"),
            _own("BiasGelu", [f"wide{i}", f"wb{i}"], [f"act{i}"], name=f"gelu{i}"),
            helper.make_node("MatMul", [f"act{i}", f"r{i}"], [f"slim{i}"], name=f"narrow{i}"),
            _own(
                "SkipLayerNormalization",
                [f"slim{i}", f"n{i}", "g", "h", f"rb{i}"],
                [f"x{i + 1}"],
                name=f"norm_b{i}",
                epsilon=_EPSILON,
            ),
        ]
    return _model(nodes, weights)


def extended_encoder(folder: Path) -> Model:
    """What ONNX Runtime saves of `encoder` at the level EXTENDED: FusedMatMul, BiasGelu, SkipLayerNormalization."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "extended.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(encoder().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "extended.onnx")


def sentences(count: int, *, seed: int = 0) -> dict[str, NDArray[np.int32]]:
    """Seeded words, padded after 5 to 12 of them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, LENGTH + 1, count)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    return {"ids": rng.integers(1, WORDS, (count, LENGTH)).astype(np.int32) * mask, "mask": mask}


def _attention(i: int) -> list[onnx.NodeProto]:
    nodes = []
    for part in "qkv":
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"{part}{i}"], [f"{part}m{i}"], name=f"{part}_product{i}"),
            helper.make_node("Add", [f"{part}m{i}", f"{part}b{i}"], [f"{part}a{i}"], name=f"{part}_bias{i}"),
            helper.make_node("Reshape", [f"{part}a{i}", "heads"], [f"{part}r{i}"], name=f"{part}_heads{i}"),
            helper.make_node(
                "Transpose",
                [f"{part}r{i}"],
                [f"{part}t{i}"],
                name=f"{part}_turn{i}",
                perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3],
            ),
        ]
    return [
        *nodes,
        helper.make_node("MatMul", [f"qt{i}", f"kt{i}"], [f"raw{i}"], name=f"scores{i}"),
        helper.make_node("Div", [f"raw{i}", "root"], [f"scaled{i}"], name=f"scale{i}"),
        helper.make_node("Add", [f"scaled{i}", "bias"], [f"masked{i}"], name=f"mask{i}"),
        helper.make_node("Softmax", [f"masked{i}"], [f"p{i}"], name=f"softmax{i}", axis=-1),
        helper.make_node("MatMul", [f"p{i}", f"vt{i}"], [f"heads{i}"], name=f"weigh{i}"),
        helper.make_node("Transpose", [f"heads{i}"], [f"turned{i}"], name=f"turn_back{i}", perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [f"turned{i}", "flat"], [f"mixed{i}"], name=f"join{i}"),
        helper.make_node("MatMul", [f"mixed{i}", f"o{i}"], [f"out{i}"], name=f"mix{i}"),
        helper.make_node("Add", [f"out{i}", f"ob{i}"], [f"outb{i}"], name=f"mix_bias{i}"),
        helper.make_node("Add", [f"outb{i}", f"x{i}"], [f"res{i}"], name=f"skip_a{i}"),
        helper.make_node(
            "LayerNormalization", [f"res{i}", "g", "h"], [f"n{i}"], name=f"norm_a{i}", epsilon=_EPSILON, axis=-1
        ),
    ]


def _mlp(i: int) -> list[onnx.NodeProto]:
    return [
        helper.make_node("MatMul", [f"n{i}", f"w{i}"], [f"wide{i}"], name=f"widen{i}"),
        helper.make_node("Add", [f"wide{i}", f"wb{i}"], [f"wideb{i}"], name=f"widen_bias{i}"),
        helper.make_node("Gelu", [f"wideb{i}"], [f"act{i}"], name=f"gelu{i}"),
        helper.make_node("MatMul", [f"act{i}", f"r{i}"], [f"slim{i}"], name=f"narrow{i}"),
        helper.make_node("Add", [f"slim{i}", f"rb{i}"], [f"slimb{i}"], name=f"narrow_bias{i}"),
        helper.make_node("Add", [f"slimb{i}", f"n{i}"], [f"sum{i}"], name=f"skip_b{i}"),
        helper.make_node(
            "LayerNormalization", [f"sum{i}", "g", "h"], [f"x{i + 1}"], name=f"norm_b{i}", epsilon=_EPSILON, axis=-1
        ),
    ]


def _weights() -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights: dict[str, NDArray[np.generic]] = {
        "word": rng.standard_normal((WORDS, HIDDEN)).astype(np.float32),
        "place": rng.standard_normal((LENGTH, HIDDEN)).astype(np.float32) / 2,
        "g": rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32),
        "h": rng.standard_normal(HIDDEN).astype(np.float32) / 4,
    }
    for i in range(LAYERS):
        shapes = dict.fromkeys("qkvo", (HIDDEN, HIDDEN)) | {"w": (HIDDEN, 4 * HIDDEN), "r": (4 * HIDDEN, HIDDEN)}
        for part, shape in shapes.items():
            weights[f"{part}{i}"] = normal(*shape)
            weights[f"{part}b{i}"] = (rng.standard_normal(shape[1]) / 8).astype(np.float32)
    return weights


def _own(op_type: str, inputs: list[str], outputs: list[str], **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, domain="com.microsoft", **attributes)


def _model(nodes: list[onnx.NodeProto], weights: dict[str, NDArray[np.generic]]) -> Model:
    nodes.append(helper.make_node("Identity", [f"x{LAYERS}"], ["y"], name="result"))
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT32, ["N", LENGTH]) for name in ("ids", "mask")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", LENGTH, HIDDEN])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=9)

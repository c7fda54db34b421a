"""Small float ONNX models built with numpy, and a reader over arrays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.calibration.calibrate import observe_all, save_calibration
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import AnyStage
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.events import Silent
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.graph import load_model, save_model
from onnxshrink.stages.context import Context

Model = onnx.ModelProto


@dataclass(frozen=True)
class ArrayReader:
    """Arrays in memory, in batches."""

    arrays: dict[str, NDArray[np.float32]]
    batch_size: int = 16
    where: str = "memory"

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), self.batch_size):
            yield {name: array[start : start + self.batch_size] for name, array in self.arrays.items()}

    def shard(self, index: int, count: int) -> ArrayReader:
        """Every ``count``-th sample from ``index`` on."""
        return ArrayReader({name: array[index::count] for name, array in self.arrays.items()}, self.batch_size)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    weights: dict[str, NDArray[np.generic]],
    *,
    opset: int = 17,
) -> Model:
    """A checked model of float32 inputs and outputs."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def cnn(*, opset: int = 17) -> Model:
    """``x[N,3,16,16]`` to ``y[N,10]``: Conv, Relu, depthwise Conv, Clip, residual Add, pooling, Gemm."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1, 1, 1, 1], group=8),
        helper.make_node("Clip", ["c2", "zero", "six"], ["k2"], name="clip2"),
        helper.make_node("Conv", ["k2", "w3"], ["c3"], name="conv3"),
        helper.make_node("Add", ["c3", "r1"], ["a3"], name="add3"),
        helper.make_node("GlobalAveragePool", ["a3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="head", transB=1),
    ]
    weights = {
        "w1": weight(8, 3, 3, 3), "b1": weight(8), "w2": weight(8, 1, 3, 3), "b2": weight(8), "w3": weight(8, 8, 1, 1),
        "w4": weight(10, 8), "b4": weight(10), "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
    }  # fmt: skip
    return model_of(nodes, {"x": ["N", 3, 16, 16]}, {"y": ["N", 10]}, weights, opset=opset)


def attention(*, mark: float = float(np.finfo(np.float32).min)) -> Model:
    """``x[N,6,8]`` and ``keep[N,1,6]`` (1 attends, 0 is masked) to ``y[N,6,8]``: one head of masked self-attention."""
    rng = np.random.default_rng(1)
    nodes = [
        helper.make_node("MatMul", ["x", "wq"], ["q"], name="query"),
        helper.make_node("MatMul", ["x", "wk"], ["k"], name="key"),
        helper.make_node("MatMul", ["x", "wv"], ["v"], name="value"),
        helper.make_node("Transpose", ["k"], ["kt"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["s"], name="scores"),
        helper.make_node("Sub", ["one", "keep"], ["drop"], name="invert"),
        helper.make_node("Mul", ["drop", "mark"], ["m"], name="mask"),
        helper.make_node("Add", ["s", "m"], ["sm"], name="masked"),
        helper.make_node("Softmax", ["sm"], ["p"], name="softmax", axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"], name="mix"),
    ]
    weights = {f"w{name}": rng.standard_normal((8, 8)).astype(np.float32) / 2 for name in "qkv"}
    weights |= {"one": np.array(1, np.float32), "mark": np.array(mark, np.float32)}
    return model_of(nodes, {"x": ["N", 6, 8], "keep": ["N", 1, 6]}, {"y": ["N", 6, 8]}, weights)


def tied() -> Model:
    """Four products, the two in the middle with the same weights."""
    rng = np.random.default_rng(0)
    weights = {name: (rng.standard_normal((32, 32)) / 4).astype(np.float32) for name in ("a", "s", "b")}
    nodes = []
    for place, (weight, name) in enumerate([("a", "first"), ("s", "tied1"), ("s", "tied2"), ("b", "last")]):
        nodes += [
            helper.make_node("MatMul", [f"r{place}" if place else "x", weight], [f"p{place}"], name=name),
            helper.make_node("Relu", [f"p{place}"], [f"r{place + 1}" if place < 3 else "y"], name=f"relu_{name}"),
        ]
    return model_of(nodes, {"x": ["N", 32]}, {"y": ["N", 32]}, weights)


def samples_of(model: Model, count: int, *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Seeded samples for the inputs of a model with a dynamic batch; inputs named ``keep`` are zeros and ones."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for value in model.graph.input:
        shape = (count, *(dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]))
        array = rng.standard_normal(shape).astype(np.float32)
        arrays[value.name] = np.abs(array).round().clip(0, 1) if value.name == "keep" else array
    return arrays


def artifact_of(model: Model, folder: Path) -> Artifact:
    """The model, written as an artifact."""
    folder.mkdir(parents=True)
    save_model(model, folder)
    return Artifact("onnx", folder, digest_folder(folder))


def context_of(reader: ArrayReader, folder: Path) -> Context:
    """A context whose `derive` observes ``reader``, and whose calibration data are its arrays on disk, if any."""
    folder.mkdir(parents=True, exist_ok=True)
    if reader.arrays:
        np.savez(folder / "samples.npz", **reader.arrays)

    def derive(stage: AnyStage, source: Artifact) -> Artifact:
        assert stage.kind == "calibrate"
        out = folder / "ranges"
        out.mkdir(parents=True, exist_ok=True)
        model = prepare(load_model(source.model_path), where="test")
        save_calibration(observe_all(model, lambda _: reader), out)
        return Artifact("ranges", out, digest_folder(out))

    roles = DataRoles(calibration=NpzData(npz=folder / "samples.npz")) if reader.arrays else DataRoles()
    return Context("test", roles, 0, Silent(), open=_no_source, derive=derive)


def _no_source(_: object) -> Artifact:
    raise NotImplementedError

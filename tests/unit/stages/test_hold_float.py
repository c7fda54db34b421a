"""Float nodes between quantized ones: what ONNX Runtime does to them, and that it is kept from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper

from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.runtime.session import Session
from onnxshrink.stages.hold_float import hold_float
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify.coverage import audit


def chain(op_type: str, activation: str) -> onnx.ModelProto:
    """Three products in a row, the one in the middle followed by an activation."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {"zero": np.array(0, np.float32), "top": np.array(0.5, np.float32)}
    shape: list[int | str] = ["N", 8] if op_type == "Gemm" else ["N", 8, 6, 6]
    around = "Gemm" if op_type == "Gemm" else "Conv"
    for name, kind in (("w0", around), ("w1", op_type), ("w2", around)):
        size = (8, 8) if kind == "Gemm" else (8, 8, 1, 1)
        weights[name] = (rng.standard_normal(size) / 3).astype(np.float32)
    nodes = [helper.make_node(around, ["x", "w0"], ["a"], name="first")]
    nodes.append(helper.make_node(op_type, ["a", "w1"], ["b" if activation else "c"], name="middle"))
    if activation:
        bounds = ["zero", "top"] if activation == "Clip" else []
        nodes.append(helper.make_node(activation, ["b", *bounds], ["c"], name="activation"))
    nodes.append(helper.make_node(around, ["c", "w2"], ["y"], name="last"))
    return nets.model_of(nodes, {"x": shape}, {"y": shape}, weights)


def quantized(tmp_path: Path, model: onnx.ModelProto, **settings: object) -> tuple[list[str], Path]:
    tmp_path.mkdir(exist_ok=True)
    source, out = nets.artifact_of(model, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    reader = nets.ArrayReader(nets.samples_of(model, 16))
    config = QuantizeStatic.model_validate({"reduce_range": False, **settings})
    facts = quantize_static(config, source, out, nets.context_of(reader, tmp_path))
    return facts["held_in_float"], out / "model.onnx"


def integer_ratio(path: Path) -> float:
    ratio = audit(path).ratio
    assert ratio is not None
    return ratio


@pytest.mark.parametrize("op_type", ["Conv", "Gemm"])
@pytest.mark.parametrize("activation", ["", "Relu", "Clip"])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_excluded_node_runs_in_float(tmp_path: Path, op_type: str, activation: str, form: str) -> None:
    """ONNX Runtime runs an excluded node in float, which without us it would quantize while it loads the file."""
    held, path = quantized(
        tmp_path, chain(op_type, activation), types="u8s8", format=form, exclude_nodes=["middle", "activation"]
        if activation
        else ["middle"]
    )  # fmt: skip
    assert held == ["middle"]
    assert integer_ratio(path) == pytest.approx(2 / 3)
    freed = onnx.load(path)
    hold = next(node for node in freed.graph.node if node.op_type == "LeakyRelu")
    readers = [node for node in freed.graph.node if hold.output[0] in node.input]
    for node in readers:
        node.input[0] = hold.input[0]
    freed.graph.node.remove(hold)
    onnx.save(freed, tmp_path / "freed.onnx")
    assert integer_ratio(tmp_path / "freed.onnx") == 1.0, "ONNX Runtime no longer does it: hold_float can go"
    x = nets.samples_of(freed, 8, seed=3)
    plain, ours = (Session(p, optimization="disabled").run(x)["y"] for p in (tmp_path / "freed.onnx", path))
    np.testing.assert_array_equal(ours, plain)


def test_float_weights_stay_exact(tmp_path: Path) -> None:
    """A ConvTranspose has no integer kernel, yet would get rounded weights: its outputs are those of the file."""
    held, path = quantized(tmp_path, chain("ConvTranspose", ""), types="u8s8", op_types=["Conv"])
    assert held == ["middle"]
    x = nets.samples_of(onnx.load(path), 8, seed=3)
    as_written = Session(path, optimization="disabled").run(x)["y"]
    np.testing.assert_allclose(Session(path).run(x)["y"], as_written, atol=0.02)


@pytest.mark.parametrize("excluded", [[], ["first"], ["last"]])
def test_nothing_is_added_without_need(tmp_path: Path, excluded: list[str]) -> None:
    """A node at the border of the graph, which ONNX Runtime leaves, stays as its quantizer wrote it."""
    held, path = quantized(tmp_path, chain("Conv", "Relu"), types="u8s8", exclude_nodes=excluded)
    assert held == []
    assert all(node.op_type != "LeakyRelu" for node in onnx.load(path).graph.node)
    assert integer_ratio(path) == pytest.approx(1 - len(excluded) / 3)


def test_float_model_is_left_alone() -> None:
    """A model that is not quantized has nothing to hold."""
    model = nets.cnn()
    assert hold_float(model) == []
    assert model == nets.cnn()


def test_compact_files_hold_too(tmp_path: Path) -> None:
    """A compact file with an excluded node gives the numbers of the full one, and runs the node in float."""
    model = chain("Conv", "Relu")
    paths = [
        quantized(tmp_path / str(compact), model, types="u8s8", compact=compact, exclude_nodes=["middle"])[1]
        for compact in (False, True)
    ]
    x = nets.samples_of(model, 8, seed=3)
    full, compacted = (Session(path).run(x)["y"] for path in paths)
    np.testing.assert_array_equal(compacted, full)
    assert integer_ratio(paths[1]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_excluded_node_keeps_weights_that_another_shares(tmp_path: Path, form: str) -> None:
    """A node that stays in float computes with its float weights, also where another one has them in 8 bits."""
    _, path = quantized(tmp_path, nets.tied(), types="u8s8", format=form, exclude_nodes=["tied1", "relu_tied1"])
    assert {row.name for row in audit(path).rows if not row.integer_macs} == {"tied1"}
    model = onnx.load(path)
    (node,) = (node for node in model.graph.node if node.name == "tied1")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in nets.tied().graph.initializer}
    np.testing.assert_array_equal(weights[node.input[1]], before["s"])
    _, path = quantized(tmp_path / "none", nets.tied(), types="u8s8", format=form)
    assert len(onnx.load(path).graph.initializer) < len(model.graph.initializer)

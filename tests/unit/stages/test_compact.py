"""A compacted file is smaller, gives the bits it should and runs in the same integer kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.runtime.session import Session
from onnxshrink.stages.compact import compact
from onnxshrink.stages.quantize_static import quantize_static
from onnxshrink.verify.coverage import audit


def written(tmp_path: Path, name: str, model: onnx.ModelProto | None = None, **settings: object) -> Path:
    """The quantized model, the cnn by default, as the stage writes it."""
    model = model or nets.cnn()
    samples = nets.samples_of(model, 32)
    np.savez(tmp_path / "calibration.npz", **samples)  # type: ignore[arg-type]
    source = nets.artifact_of(model, tmp_path / name / "source")
    ctx = nets.context_of(nets.ArrayReader(samples), tmp_path / name)
    ctx = replace(ctx, data=DataRoles(calibration=NpzData(npz=tmp_path / "calibration.npz")))
    facts = quantize_static(QuantizeStatic(**settings), source, tmp_path / name, ctx)  # type: ignore[arg-type]
    assert ("compact" in facts) == bool(settings.get("compact"))
    return tmp_path / name / "model.onnx"


def fused(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    Session(path, save_optimized=folder / "fused.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


@pytest.mark.parametrize("types", ["u8s8", "s8s8", "u8u8"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_same_bits_in_fewer_bytes(tmp_path: Path, granularity: str, types: str) -> None:
    """The outputs are equal bit for bit, the fused graph has the same operators, and the file is smaller."""
    plain = written(tmp_path, "plain", granularity=granularity, types=types)
    small = written(tmp_path, "small", granularity=granularity, types=types, compact=True)
    onnx.checker.check_model(str(small), full_check=True)
    x = nets.samples_of(nets.cnn(), 64, seed=5)
    for level in ("all", "disabled"):
        want, got = (Session(path, optimization=level).run(x)["y"] for path in (plain, small))  # type: ignore[arg-type]
        assert np.array_equal(want, got)
    assert fused(small, tmp_path) == fused(plain, tmp_path)
    if granularity == "per_channel":
        assert small.stat().st_size < plain.stat().st_size


def wide(*, opset: int = 17) -> onnx.ModelProto:
    """``x[N,3,8,8]`` to ``y[N,40]`` and ``inner``, an output that a Conv and an Add read on; 2 channels are dead."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((96, 3, 3, 3)), "b1": rng.standard_normal(96),
        "w2": rng.standard_normal((96, 1, 3, 3)), "b2": rng.standard_normal(96),
        "w3": rng.standard_normal((96, 96, 1, 1)) / 9, "b3": rng.standard_normal(96) * 9,
        "w4": rng.standard_normal((96, 40)), "b4": rng.standard_normal(40),
    }  # fmt: skip
    weights["w1"][:2] *= 1e-9
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1"),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", group=96, pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["inner"], name="relu2"),
        helper.make_node("Conv", ["inner", "w3", "b3"], ["c3"], name="conv3"),
        helper.make_node("Add", ["c3", "inner"], ["a3"], name="add3"),
        helper.make_node("GlobalAveragePool", ["a3"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["y"], name="head"),
    ]
    return nets.model_of(
        nodes,
        {"x": ["N", 3, 8, 8]},
        {"y": ["N", 40], "inner": ["N", 96, 6, 6]},
        {name: value.astype(np.float32) for name, value in weights.items()},
        opset=opset,
    )


def in_float16_scales(model: onnx.ModelProto) -> None:
    """Round the weights' scales of a plain QDQ model as float16 does where it can, and its biases after them."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        (_, x_scale, _), (_, scale, _), *others = (makers[name].input for name in node.input)
        old = numpy_helper.to_array(tensors[scale])
        new = np.where(old < 2**-14, old, old.astype(np.float16)).astype(np.float32)
        tensors[scale].CopyFrom(numpy_helper.from_array(new, scale))
        for bias, bias_scale, _ in others:
            parts = zip(numpy_helper.to_array(tensors[bias]).tolist(), old.tolist(), new.tolist(), strict=True)
            steps = np.array([round(value * before / after) for value, before, after in parts], np.int32)
            tensors[bias].CopyFrom(numpy_helper.from_array(steps, bias))
            product = numpy_helper.to_array(tensors[x_scale]) * new
            tensors[bias_scale].CopyFrom(numpy_helper.from_array(product, bias_scale))


@pytest.mark.parametrize("types", ["u8s8", "s8s8"])
def test_wide_layers_in_sixteen_bits(tmp_path: Path, types: str) -> None:
    """A compact file gives the bits of the full one with its scales rounded to float16, in the same kernels."""
    model = onnx.load(written(tmp_path, "plain", wide(), types=types))
    small = written(tmp_path, "small", wide(), types=types, compact=True)
    onnx.checker.check_model(str(small), full_check=True)
    in_float16_scales(model)
    rounded = tmp_path / "rounded.onnx"
    onnx.save(model, rounded)
    x = nets.samples_of(wide(), 32, seed=5)
    for session in ({}, {"optimization": "disabled"}, {"config": {"session.disable_quant_qdq": "1"}}):
        want, got = (Session(path, **session).run(x) for path in (rounded, small))  # type: ignore[arg-type]
        assert list(got) == ["y", "inner"]
        for name in want:
            assert np.array_equal(want[name], got[name]), (session, name)
    assert fused(small, tmp_path) == fused(rounded, tmp_path)
    names = [[row.name for row in audit(path).rows] for path in (small, rounded)]
    assert names[0] == names[1] == ["conv1", "conv2", "conv3", "head"]


def test_sixteen_bits_are_counted(tmp_path: Path) -> None:
    """The facts count scales and biases in 16 bits: all but the dead channels, whose bias int16 cannot hold."""
    path = written(tmp_path, "plain", wide(), types="u8s8", bias_correction=False)
    model = onnx.load(path)
    facts = compact(model)
    assert facts["float16_scales"] == 96 * 3 + 40 - 2
    assert 0 < facts["int16_biases"] <= 96 * 3 + 40 - 2
    assert 0 < facts["largest_scale_change"] <= 2**-11
    assert facts["bytes_saved"] == path.stat().st_size - model.ByteSize()
    assert [node.name for node in model.graph.node if node.name] == [
        node.name for node in wide().graph.node if node.op_type != "Relu"
    ], "Relus go into the quantized ranges; every other node keeps its name, and no other has one"
    again = onnx.ModelProto()
    again.CopyFrom(model)
    assert not any(compact(again).values())
    assert again == model


def test_products_of_matrices(tmp_path: Path) -> None:
    """A MatMul has no bias; opset 13 is the first with Split's sizes and a scale for each channel."""
    weights = {"w": np.random.default_rng(0).standard_normal((16, 300)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    source = nets.model_of(nodes, {"x": ["N", 16]}, {"y": ["N", 300]}, weights, opset=13)
    model = onnx.load(written(tmp_path, "plain", source, types="u8s8"))
    small = written(tmp_path, "small", source, types="u8s8", compact=True)
    in_float16_scales(model)
    rounded = tmp_path / "rounded.onnx"
    onnx.save(model, rounded)
    assert "Split" in {node.op_type for node in onnx.load(small).graph.node}
    x = nets.samples_of(source, 8, seed=5)
    assert np.array_equal(*(Session(path).run(x)["y"] for path in (rounded, small)))
    assert fused(small, tmp_path) == fused(rounded, tmp_path)


def test_masked_attention(tmp_path: Path) -> None:
    """A compact model with float nodes beside the quantized ones has the same numbers, kernels and float nodes."""
    plain = written(tmp_path, "plain", nets.attention(), types="u8s8")
    small = written(tmp_path, "small", nets.attention(), types="u8s8", compact=True)
    x = nets.samples_of(nets.attention(), 8, seed=5)
    assert np.array_equal(*(Session(path).run(x)["y"] for path in (plain, small)))
    assert fused(small, tmp_path) == fused(plain, tmp_path)
    assert audit(small).islands == audit(plain).islands


def test_bodies_are_left(tmp_path: Path) -> None:
    """Beside an If, whose branches may read any tensor, names, scales and biases stay."""
    path = written(tmp_path, "plain", wide(), types="u8s8")
    model = onnx.load(path)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner_scale"], ["chosen"])],
        "branch",
        [],
        [helper.make_tensor_value_info("chosen", onnx.TensorProto.FLOAT, [])],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.bool_(1), "yes"))
    model.graph.node.append(helper.make_node("If", ["yes"], ["z"], name="if", then_branch=branch, else_branch=branch))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, []))
    names = {name for node in model.graph.node for name in node.output}
    onnx.save(model, tmp_path / "full.onnx")
    facts = compact(model)
    assert set(facts) == {"zero_points", "bias_scales", "bytes_saved"}
    assert names <= {name for node in model.graph.node for name in node.output}
    onnx.save(model, tmp_path / "small.onnx")
    x = nets.samples_of(wide(), 8, seed=5)
    want, got = (Session(tmp_path / f"{name}.onnx").run(x) for name in ("full", "small"))
    for name in want:
        assert np.array_equal(want[name], got[name])


def test_says_what_went(tmp_path: Path) -> None:
    """Four biases lose zero points and scales, three Convs the zero points of their weights; a second time, nothing."""
    model = onnx.load(written(tmp_path, "plain", types="u8s8", bias_correction=False))
    facts = compact(model)
    assert facts["bias_scales"] == 3  # conv3 has no bias
    assert facts["zero_points"] == 3 + 3
    assert facts["bytes_saved"] == onnx.load(tmp_path / "plain" / "model.onnx").ByteSize() - model.ByteSize()
    again = onnx.ModelProto()
    again.CopyFrom(model)
    assert not any(compact(again).values())
    assert again == model


def test_float_models_are_left() -> None:
    """A model that is not QDQ stays as it is."""
    model = nets.cnn()
    assert compact(model)["bytes_saved"] == 0
    assert model == nets.cnn()

"""What a file holds: bytes by operator, by type and by initializer, and how it is quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.runtime.contents import contents_of, quantization_of, size_of
from onnxshrink.runtime.graph import load_model
from onnxshrink.stages.quantize_static import quantize_static


def test_every_byte_is_counted_once() -> None:
    """The sums by operator and by type agree with numpy's own sizes, and the largest come first."""
    model = nets.cnn()
    contents = contents_of(model)
    total = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
    assert sum(contents.bytes_by_op_type.values()) == sum(contents.bytes_by_dtype.values()) == total
    sizes = [stored.size_bytes for stored in contents.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert contents.op_types["Conv"] == 3
    assert next(iter(contents.bytes_by_op_type)) == "Conv"
    assert contents.opsets == {"ai.onnx": 17}


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(TensorProto.INT4, 3), (TensorProto.FLOAT16, 10), (TensorProto.FLOAT, 20), (TensorProto.BOOL, 5)],
)
def test_sizes_are_those_of_the_values(dtype: int, size: int) -> None:
    """Two values of four bits share a byte."""
    assert size_of(TensorProto(dims=[5], data_type=dtype)) == size


def test_weights_behind_dequantize_linear_count_for_the_product(tmp_path: Path) -> None:
    """And the granularity is read off the scales."""
    net = nets.cnn()
    for granularity in ("per_channel", "per_tensor"):
        folder = tmp_path / granularity
        (folder / "out").mkdir(parents=True)
        context = nets.context_of(nets.ArrayReader(nets.samples_of(net, 8)), folder)
        settings = QuantizeStatic(types="u8s8", granularity=granularity)  # type: ignore[arg-type]
        quantize_static(settings, nets.artifact_of(net, folder / "source"), folder / "out", context)
        model = load_model(folder / "out" / "model.onnx")
        found = quantization_of(model)
        assert found.formats == ("qdq",)
        assert list(found.weights) == [f"int8 {granularity}"]
        assert list(found.activations) == ["uint8"]
        assert found.quantize_nodes == sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
        assert next(iter(contents_of(model).bytes_by_op_type)) == "Conv"


def test_other_forms_of_quantization_are_told_apart(tmp_path: Path) -> None:
    """Float has none; dynamic products, weights alone and float16 each have their name."""
    assert quantization_of(nets.cnn()).formats == ()
    net = nets.attention(mark=-100.0)
    onnx.save(net, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", weight_type=QuantType.QInt8)
    assert quantization_of(onnx.load(tmp_path / "dynamic.onnx")).formats == ("dynamic",)
    weight = {"w": np.ones((4, 4), np.int8), "s": np.array(0.1, np.float32)}
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["f"]), helper.make_node("MatMul", ["x", "f"], ["y"])]
    weights_only = nets.model_of(nodes, {"x": [1, 4]}, {"y": [1, 4]}, weight)
    assert quantization_of(weights_only).formats == ("weights",)
    assert quantization_of(weights_only).weights == {"int8 per_tensor": 1}
    half = nets.cnn()
    for tensor in half.graph.initializer:
        if len(tensor.dims) > 1:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    assert quantization_of(half).formats == ("fp16",)


def test_constants_and_what_nobody_reads_are_counted() -> None:
    """A Constant node weighs as an initializer does."""
    value = numpy_helper.from_array(np.zeros((4, 4), np.float32))
    nodes = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("MatMul", ["x", "c"], ["y"])]
    model = nets.model_of(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"spare": np.zeros(3, np.float32)})
    assert contents_of(model).bytes_by_op_type == {"MatMul": 64, "unused": 12}

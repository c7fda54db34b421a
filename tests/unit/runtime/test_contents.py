"""What a file holds: bytes by operator, by type and by initializer, and how it is quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization import quantize_static as quantize_with_ort
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

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


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_forms_of_other_files_are_told_as_well(tmp_path: Path, *, per_channel: bool) -> None:
    """ONNX Runtime's own QOperator and dynamic files: one format each, every weight with its granularity."""
    granularity = "per_channel" if per_channel else "per_tensor"
    onnx.save(net := nets.cnn(), tmp_path / "float.onnx")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([nets.samples_of(net, 4)])

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]
            return next(self.batches, None)

    given, out = tmp_path / "float.onnx", tmp_path / "out.onnx"
    settings = {"per_channel": per_channel, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_with_ort(given, out, Reader(), quant_format=QuantFormat.QOperator, **settings)
    found = quantization_of(load_model(out))
    assert found.formats == ("qoperator",)
    assert found.weights.get(f"int8 {granularity}", 0) >= 3
    assert sum(found.weights.values()) == 4
    assert set(found.activations) == {"uint8"}
    quantize_dynamic(given, out, per_channel=per_channel, weight_type=QuantType.QInt8)
    found = quantization_of(load_model(out))
    assert found.formats == ("dynamic",)
    assert sum(found.weights.values()) == 4
    assert found.weights.get(f"int8 {granularity}", 0) >= 1
    assert found.activations == {"uint8": 4}


def test_weights_in_blocks_are_told_with_their_bits() -> None:
    """ONNX Runtime's own MatMulNBits."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="wide")]
    weight = {"w": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}
    made = MatMulNBitsQuantizer(nets.model_of(nodes, {"x": [1, 64]}, {"y": [1, 32]}, weight), block_size=32, bits=4)
    made.process()
    found = quantization_of(made.model.model)
    assert found.formats == ("weights",)
    assert found.weights == {"int4 per_block of 32": 1}


def test_scales_that_are_cast_are_still_one_for_each_channel() -> None:
    """As `compact` stores them: in float16, with a Cast behind."""
    arrays = {"w": np.ones((4, 4), np.int8), "half": np.ones(4, np.float16), "z": np.zeros(4, np.int8)}
    nodes = [
        helper.make_node("Cast", ["half"], ["s"], to=TensorProto.FLOAT),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], axis=1),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    assert quantization_of(nets.model_of(nodes, {"x": [1, 4]}, {"y": [1, 4]}, arrays)).weights == {
        "int8 per_channel": 1
    }


def test_constants_and_what_nobody_reads_are_counted() -> None:
    """A Constant node weighs as an initializer does."""
    value = numpy_helper.from_array(np.zeros((4, 4), np.float32))
    nodes = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("MatMul", ["x", "c"], ["y"])]
    model = nets.model_of(nodes, {"x": [1, 4]}, {"y": [1, 4]}, {"spare": np.zeros(3, np.float32)})
    assert contents_of(model).bytes_by_op_type == {"MatMul": 64, "unused": 12}

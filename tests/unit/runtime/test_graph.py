"""ONNX files in and out."""

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime import graph


def add_model(size: int = 512) -> onnx.ModelProto:
    """``y = x + w`` with ``w`` of ``size`` float32 values, also listed as an input as old exporters did."""
    weight = np.arange(size, dtype=np.float32)
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="add")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", size]),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [size]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, size])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_model_survives_saving_and_loading(tmp_path: Path) -> None:
    """What is loaded equals what was saved, in one file."""
    model = add_model()
    path = graph.save_model(model, tmp_path)
    assert graph.load_model(path) == model
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert graph.external_files(path) == set()


def test_a_model_above_the_limit_gets_one_external_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights lie beside the model, and loading brings them back."""
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT_BYTES", 1000)
    path = graph.save_model(add_model(), tmp_path)
    assert graph.external_files(path) == {tmp_path / "model.onnx.data"}
    assert path.stat().st_size < 1000
    weight = numpy_helper.to_array(graph.load_model(path).graph.initializer[0])
    np.testing.assert_array_equal(weight, np.arange(512, dtype=np.float32))


def test_missing_external_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which file has to lie beside the model."""
    monkeypatch.setattr(graph, "PROTOBUF_LIMIT_BYTES", 1000)
    path = graph.save_model(add_model(), tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data"):
        graph.load_model(path)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    """Random bytes give an error with the path, not protobuf's."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="cannot be read as an ONNX model") as error:
        graph.load_model(path)
    assert error.value.where == str(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    """Zero bytes are valid protobuf and no model."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="empty"):
        graph.load_model(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """The error is ours, and names the path."""
    with pytest.raises(ModelError, match="missing"):
        graph.load_model(tmp_path / "absent.onnx")


def test_specs_leave_initializers_out_and_name_unnamed_axes() -> None:
    """An initializer with a default is no input; an axis without a name gets one."""
    model = add_model()
    assert graph.input_specs(model) == (TensorSpec("x", "float32", ("batch", 512)),)
    assert graph.output_specs(model) == (TensorSpec("y", "float32", ("dim_0", 512)),)


def test_the_opset_is_that_of_the_default_domain() -> None:
    """Other domains do not count, and the domain's long name does."""
    model = add_model()
    del model.opset_import[:]
    model.opset_import.extend([helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("ai.onnx", 19)])
    assert graph.opset_of(model) == 19


@pytest.mark.parametrize("content", [b"no model" * 9, None])
def test_external_files_of_a_broken_model_are_our_error(tmp_path: Path, content: bytes | None) -> None:
    """Damaged or absent: the error is ours and names the path."""
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read as an ONNX model") as error:
        graph.external_files(path)
    assert error.value.where == str(path)


def test_a_model_of_ir_version_3_loses_its_initializers_as_inputs(tmp_path: Path) -> None:
    """Old exporters had to list weights as inputs; what is loaded has only real inputs, and is valid."""
    model = add_model()
    model.ir_version = 3
    onnx.save(model, tmp_path / "old.onnx")
    loaded = graph.load_model(tmp_path / "old.onnx")
    assert [value.name for value in loaded.graph.input] == ["x"]
    assert loaded.ir_version == 4
    assert loaded.graph.initializer == model.graph.initializer
    onnx.checker.check_model(loaded, full_check=True)


@pytest.mark.parametrize("length", [-1, 0])
def test_an_axis_of_no_length_is_dynamic(length: int) -> None:
    """Some exporters write -1 where the axis has any length."""
    model = add_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = length
    assert graph.input_specs(model) == (TensorSpec("x", "float32", ("dim_0", 512)),)


def test_a_sequence_is_refused_by_name() -> None:
    """The interface of a model that gives a sequence cannot be told in arrays."""
    model = add_model()
    model.graph.output.append(helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match=r"(?s)'many' is no tensor.*sequence"):
        graph.output_specs(model)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": numpy_helper.from_array(np.float64([1.5]))}, np.float64([1.5])),
        ({"value_float": 1.5}, np.float32(1.5)),
        ({"value_floats": [1.5, 2.0]}, np.float32([1.5, 2])),
        ({"value_int": -3}, np.int64(-3)),
        ({"value_ints": [3, 4]}, np.int64([3, 4])),
        ({"value_string": "text"}, None),
    ],
)
def test_a_constant_is_read_from_any_attribute(attributes: dict[str, object], expected: np.ndarray | None) -> None:
    """The numbers with the shape and dtype of ONNX's reference implementation; None for text and other operators."""
    node = helper.make_node("Constant", [], ["c"], **attributes)
    value = graph.constant_value(node)
    if expected is None:
        assert value is None
        return
    assert value is not None
    theirs = onnx.reference.ReferenceEvaluator(node).run(None, {})[0]
    assert (
        (value.dtype, value.shape)
        == (np.asarray(theirs).dtype, np.asarray(theirs).shape)
        == (expected.dtype, expected.shape)
    )
    np.testing.assert_array_equal(value, expected)
    assert graph.constant_value(helper.make_node("Relu", ["x"], ["y"])) is None


def test_an_invalid_model_is_our_error(tmp_path: Path) -> None:
    """onnx.checker's refusal arrives with the path and with what is wrong."""
    model = add_model()
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="NoSuchOperator") as error:
        graph.require_valid(tmp_path / "model.onnx")
    assert error.value.where == str(tmp_path / "model.onnx")

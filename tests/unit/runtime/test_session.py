"""ONNX Runtime sessions: opened as asked, or refused."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx_models import cnn

from onnxshrink.config.gates import Target
from onnxshrink.core.errors import ModelError, ProviderError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime import session as session_module
from onnxshrink.runtime.providers import Provider
from onnxshrink.runtime.session import Session, refuse_fallback, require_provider


def twice(dtype: int = TensorProto.FLOAT) -> bytes:
    """``y = x + x`` and ``z = -x`` for ``x`` of shape [batch, 3]."""
    names = [("y", "Add", ["x", "x"]), ("z", "Neg", ["x"])]
    made = helper.make_graph(
        [helper.make_node(op, inputs, [name], name=name) for name, op, inputs in names],
        "g",
        [helper.make_tensor_value_info("x", dtype, ["batch", 3])],
        [helper.make_tensor_value_info(name, dtype, ["batch", 3]) for name, _, _ in names],
    )
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(made, opset_imports=opset, ir_version=8).SerializeToString())


def test_a_session_gives_outputs_by_name_and_leaves_labels_out() -> None:
    """Only the outputs asked for, and arrays that are no input do not matter."""
    x = np.float32([[1, 2, 3]])
    session = Session(twice())
    result = session.run({"x": x, "labels": np.zeros(1)})
    np.testing.assert_array_equal(result["y"], 2 * x)
    np.testing.assert_array_equal(result["z"], -x)
    assert list(session.run({"x": x}, ["z"])) == ["z"]
    assert session.providers[0] == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(TensorProto.FLOAT, "float32"), (TensorProto.DOUBLE, "float64"), (TensorProto.INT64, "int64")],
)
def test_specs_speak_numpy(dtype: int, name: str) -> None:
    """ONNX Runtime's element types come back as numpy's, axes by name."""
    session = Session(twice(dtype))
    assert session.inputs == (TensorSpec("x", name, ("batch", 3)),)
    assert [spec.name for spec in session.outputs] == ["y", "z"]


def test_bound_runs_compute_the_same() -> None:
    """What is timed is what is measured: a bound run gives the outputs of a plain one."""
    session = Session(twice())
    batch = {"x": np.float32([[1, 2, 3], [4, 5, 6]])}
    binding = session.bind(batch)
    session.run_bound(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], session.run(batch)["y"])


def test_a_non_contiguous_input_is_taken() -> None:
    """A transposed view is copied, not misread."""
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    np.testing.assert_array_equal(Session(twice()).run({"x": x})["y"], 2 * x)


def test_a_batch_of_a_wrong_dtype_is_our_error() -> None:
    """ONNX Runtime's exception arrives as a ModelError that names the model."""
    with pytest.raises(ModelError, match="cannot run") as error:
        Session(twice(), name="mine").run({"x": np.zeros((1, 3), np.float64)})
    assert error.value.where == "mine"


def test_a_batch_of_a_wrong_shape_is_our_error() -> None:
    """A fixed axis of another length is refused, too."""
    with pytest.raises(ModelError, match="cannot run"):
        Session(twice()).run({"x": np.zeros((1, 4), np.float32)})


def test_a_file_that_is_no_model_is_our_error(tmp_path: Path) -> None:
    """The error names the path."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot load") as error:
        Session(path)
    assert error.value.where == str(path)


def test_an_operator_that_nobody_implements_is_our_error() -> None:
    """A valid graph that this ONNX Runtime has no kernel for."""
    model = onnx.load_from_string(twice())
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match="NoSuchOperator"):
        Session(model.SerializeToString())


def test_a_provider_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a session is made, with what to install."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match="'cuda' is not available") as error:
        require_provider(Target(provider="cuda"))
    assert error.value.fix == "pip install onnxruntime-gpu, in place of onnxruntime"


@pytest.mark.parametrize("got", [[], ["CPUExecutionProvider"], ["CPUExecutionProvider", "CUDAExecutionProvider"]])
def test_a_silent_fallback_is_refused(got: list[str]) -> None:
    """The provider that was asked for has to come first."""
    with pytest.raises(ProviderError, match="dropped CUDAExecutionProvider"):
        refuse_fallback("CUDAExecutionProvider", got, where="model.onnx")


def test_the_provider_asked_for_is_accepted() -> None:
    """With the CPU behind it for operators it does not have."""
    refuse_fallback("CUDAExecutionProvider", ["CUDAExecutionProvider", "CPUExecutionProvider"], where="model.onnx")


def test_a_session_that_falls_back_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor itself compares: no caller can forget to."""
    monkeypatch.setattr(session_module, "find_provider", lambda _: Provider("CUDAExecutionProvider"))

    class Dropped:
        """Stands for a session whose CUDA libraries did not load."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(ort, "InferenceSession", Dropped)
    with pytest.raises(ProviderError, match="without an error"):
        Session(twice(), Target(provider="cuda"))


def test_the_optimized_graph_can_be_saved(tmp_path: Path) -> None:
    """At the level asked for, as a model that loads."""
    path = tmp_path / "basic.onnx"
    Session(twice(), optimization="basic", save_optimized=path)
    assert {node.op_type for node in onnx.load(path).graph.node} == {"Add", "Neg"}


def test_a_missing_input_is_our_error() -> None:
    """The error names what the batch lacks and what it has."""
    with pytest.raises(ModelError, match=r"(?s)no array for an input.*'image'.*'x' float32") as error:
        Session(twice(), name="mine").run({"image": np.zeros((1, 3), np.float32)})
    assert error.value.where == "mine"


def test_a_sequence_output_is_refused_where_it_is_asked_for() -> None:
    """A sequence cannot be compared; the model's tensors can."""
    model = onnx.load_from_string(twice())
    model.graph.node.append(helper.make_node("SequenceConstruct", ["y", "z"], ["both"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("both", TensorProto.FLOAT, None))
    session = Session(model.SerializeToString())
    batch = {"x": np.zeros((1, 3), np.float32)}
    assert list(session.run(batch, ["y"])) == ["y"]
    with pytest.raises(ModelError, match="'both' is no tensor"):
        session.run(batch)


def test_an_axis_of_no_length_is_dynamic_in_a_session() -> None:
    """An axis that is written as -1 or 0 gets a name."""
    for length in (-1, 0):
        model = onnx.load_from_string(twice())
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = length
        assert Session(model.SerializeToString()).inputs == (TensorSpec("x", "float32", ("dim_0", 3)),)


def test_what_cannot_be_loaded_is_sent_where_the_reason_is_told(tmp_path: Path) -> None:
    """To ONNX's own checker, which finds it, and not to a command that would load the model again."""
    model = cnn()
    model.graph.node[1].input[0] = "nowhere"
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        Session(path)
    assert caught.value.fix is not None
    assert "onnx.checker.check_model('model.onnx', full_check=True)" in caught.value.fix
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        onnx.checker.check_model(str(path), full_check=True)


def test_what_fails_while_it_runs_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the lengths that were given and the way out; ONNX Runtime's own line of log is not printed beside it."""
    model = cnn()
    flat = next(node for node in model.graph.node if node.op_type == "Flatten")
    flat.op_type = "Reshape"
    flat.input.append("one")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 8]), "one"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    session = Session(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="cannot run the model") as caught:
        session.run({"x": np.zeros((4, 3, 16, 16), np.float32)})
    assert caught.value.got == "'x' float32[4,3,16,16]"
    assert "Reshape" in str(caught.value.fix)
    assert capfd.readouterr().err == ""

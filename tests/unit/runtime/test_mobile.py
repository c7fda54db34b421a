"""What phones' accelerators would make of a model."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import onnx
import onnx_models as nets
import pytest
from onnxruntime.tools.mobile_helpers import usability_checker

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.mobile import MobileUsability, mobile_usability


def usability(model: onnx.ModelProto, folder: Path) -> dict[str, MobileUsability]:
    onnx.save(model, folder / "model.onnx")
    return {found.provider: found for found in mobile_usability(folder / "model.onnx")}


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model for batches of one."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_value = 1
    return model


def test_a_plain_network_of_fixed_shape_suits_phones(tmp_path: Path) -> None:
    """Every operator is on the lists, so there is one partition with all nodes; the one that is missing is named."""
    found = usability(fixed(nets.cnn()), tmp_path)
    for name in ("nnapi", "coreml_neural_network"):
        assert found[name].suits == found[name].suits_if_fixed == "yes"
        assert found[name].supported_nodes == found[name].nodes
        assert found[name].partitions == 1
        assert found[name].unsupported_op_types == ()
    assert found["coreml_ml_program"].suits == "maybe"
    assert found["coreml_ml_program"].unsupported_op_types == ("ai.onnx:Flatten",)


def test_dynamic_lengths_are_what_keeps_nnapi_away(tmp_path: Path) -> None:
    """With a batch axis of any length no node has a known shape, and fixing it mends that."""
    found = usability(nets.cnn(), tmp_path)["nnapi"]
    assert found.suits == "no"
    assert found.suits_if_fixed == "yes"
    assert found.supported_nodes == 0


def test_operators_that_a_phone_has_not_are_named(tmp_path: Path) -> None:
    """Erf is on none of the lists."""
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    model = nets.model_of([node], {"x": [1, 3]}, {"y": [1, 3]}, {})
    found = usability(model, tmp_path)
    assert found["nnapi"].unsupported_op_types == ("ai.onnx:Erf",)
    assert found["nnapi"].suits == found["nnapi"].suits_if_fixed == "no"


@pytest.mark.parametrize("is_fixed", [True, False])
def test_the_answers_are_those_of_the_checker_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, is_fixed: bool
) -> None:
    """ONNX Runtime's command line says the same."""
    model = fixed(nets.cnn()) if is_fixed else nets.cnn()
    found = usability(model, tmp_path)
    caplog.set_level(logging.INFO)
    with contextlib.redirect_stdout(io.StringIO()):
        usability_checker.analyze_model(tmp_path / "model.onnx", logger=logging.getLogger("checker"))
    names = {"NNAPI": "nnapi", "CoreML NeuralNetwork": "coreml_neural_network", "CoreML MLProgram": "coreml_ml_program"}
    for theirs, ours in names.items():
        assert f"Model should perform well with {theirs} as is: {found[ours].suits.upper()}" in caplog.text


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    """It is a mistake that the user can fix."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError):
        mobile_usability(tmp_path / "model.onnx")

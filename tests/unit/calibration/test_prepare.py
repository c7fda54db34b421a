"""prepare: one graph for calibration and quantization, with every type that a quantizer must know."""

from __future__ import annotations

import onnx
import onnx_models as nets
import pytest
from encoder_models import fused_encoder
from onnx import TensorProto

import onnxshrink.calibration.prepare as module
from onnxshrink.calibration.observe import tensors_to_calibrate
from onnxshrink.calibration.prepare import prepare
from onnxshrink.core.errors import ModelError


def types_of(model: nets.Model) -> dict[str, int]:
    values = (*model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def test_types_behind_the_operators_of_onnxruntime_are_known() -> None:
    """ONNX infers nothing behind Attention and its like; after prepare every tensor has its type."""
    model = fused_encoder()
    assert "n0" not in types_of(onnx.shape_inference.infer_shapes(model))
    types = types_of(prepare(model, where="test"))
    assert types.pop("lengths") == TensorProto.INT32
    assert set(types.values()) == {TensorProto.FLOAT}
    assert {name for node in model.graph.node for name in node.output} - {"lengths"} == set(types)


def test_products_between_fused_operators_are_calibrated() -> None:
    """Inputs and outputs of every MatMul are observed, though fused operators write and read them."""
    model = prepare(fused_encoder(), where="test")
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert {name for node in products for name in (node.input[0], *node.output)} <= set(tensors_to_calibrate(model))


def test_a_model_of_onnx_operators_opens_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape inference knows all of it: nothing is asked of ONNX Runtime."""
    monkeypatch.setattr(module, "Session", None)
    assert types_of(prepare(nets.cnn(), where="test"))["c1"] == TensorProto.FLOAT


def test_an_operator_that_nobody_knows_is_a_model_error() -> None:
    """The message is ONNX Runtime's, with the place."""
    model = fused_encoder()
    model.graph.node[2].op_type = "SkipNormalisation"
    with pytest.raises(ModelError, match="SkipNormalisation"):
        prepare(model, where="test")

"""Models over text."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import check_batch
from onnxshrink.runtime.graph import input_specs
from onnxshrink.runtime.session import Session


def test_text_inputs_are_taken_as_numpy_saves_them() -> None:
    """A model over strings runs on an array of text; another dtype is told how to become one."""
    text = helper.make_tensor_value_info("x", onnx.TensorProto.STRING, ["N"])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.STRING, ["N"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "text", [text], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    specs = input_specs(model)
    assert specs == Session(model.SerializeToString()).inputs
    words = np.array(["one", "three"])
    check_batch({"x": words}, specs, where="d.npz")
    assert Session(model.SerializeToString()).run({"x": words})["y"].tolist() == ["one", "three"]
    with pytest.raises(DataError, match=r"array.astype\(str\)"):
        check_batch({"x": np.zeros(2, np.float32)}, specs, where="d.npz")

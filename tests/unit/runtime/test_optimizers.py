"""ONNX Runtime's optimizers by name, from its log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_models as nets
import pytest

from onnxshrink.core.errors import ModelError
from onnxshrink.runtime.optimizers import applied_optimizers
from onnxshrink.runtime.session import Session


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(nets.cnn(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def ops(model: Path, out: Path, without: tuple[str, ...] = ()) -> Counter[str]:
    Session(model, optimization="extended", without=without, save_optimized=out)
    return Counter(node.op_type for node in onnx.load(out).graph.node)


def test_what_acts_is_named_and_can_be_left_out(model: Path, tmp_path: Path) -> None:
    """Conv and Relu are fused by the optimizer that the log names, and stay two nodes without it."""
    names = applied_optimizers(model, "extended")
    assert "ConvActivationFusion" in names
    assert ops(model, tmp_path / "all.onnx")["FusedConv"] > 0
    without = ops(model, tmp_path / "without.onnx", ("ConvActivationFusion",))
    assert without["FusedConv"] == 0
    assert without["Relu"] == 1


def test_nothing_is_fused_where_nothing_is_optimized(model: Path) -> None:
    """The level decides which optimizers act."""
    assert "ConvActivationFusion" not in applied_optimizers(model, "disabled")


def test_a_model_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    """No empty answer is given for a file that is none."""
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="cannot be told from ONNX Runtime's log"):
        applied_optimizers(tmp_path / "model.onnx", "all")

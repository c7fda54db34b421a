"""The one-liner's scheme follows from what a session really runs, and says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from encoder_models import encoder, extended_encoder, fused_encoder, sentences
from onnx import helper

import onnxshrink.search.scheme as module
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.search.scheme import Choice, choose_scheme


def chosen(folder: Path, model: nets.Model) -> Choice:
    onnx.save(model, str(folder / "m.onnx"))
    samples = sentences(2) if "ids" in {value.name for value in model.graph.input} else nets.samples_of(model, 2)
    np.savez(folder / "calib.npz", **samples)
    return choose_scheme(folder / "m.onnx", folder / "calib.npz")


def test_transformers_are_dynamic_however_they_are_written(tmp_path: Path) -> None:
    """Plain operators, those of onnxruntime.transformers, and those that ONNX Runtime saves: one decision."""
    for model in (encoder(), fused_encoder(), extended_encoder(tmp_path)):
        choice = chosen(tmp_path, model)
        assert choice == Choice("dynamic", "100% of the multiply-accumulates lie in matrix products of a transformer")


def test_networks_of_convolutions_are_static(tmp_path: Path) -> None:
    """The reason says where the work lies."""
    choice = chosen(tmp_path, nets.cnn())
    assert choice.scheme == "static"
    assert "outside of matrix products" in choice.reason


def test_products_without_a_normalization_are_static(tmp_path: Path) -> None:
    """No LayerNormalization, no outliers to expect."""
    choice = chosen(tmp_path, nets.attention())
    assert choice == Choice("static", "its matrix products read no LayerNormalization")


def test_a_recurrent_network_is_dynamic(tmp_path: Path) -> None:
    """ONNX Runtime has no static form of an LSTM."""
    rng = np.random.default_rng(2)
    weights = {name: rng.standard_normal((1, 32, n)).astype(np.float32) for name, n in (("w", 6), ("r", 8))}
    node = helper.make_node("LSTM", ["x", "w", "r"], ["y"], name="lstm", hidden_size=8)
    choice = chosen(tmp_path, nets.model_of([node], {"x": ["N", 4, 6]}, {"y": ["N", 1, 4, 8]}, weights))
    assert choice.scheme == "dynamic"
    assert "LSTM" in choice.reason


def test_a_graph_that_cannot_be_audited_is_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The audit must not stop what ONNX Runtime can run."""

    def refuse(*_: object, **__: object) -> None:
        raise ModelError("it cannot be read back")

    monkeypatch.setattr(module, "audit", refuse)
    choice = chosen(tmp_path, encoder())
    assert choice == Choice("static", "the graph could not be audited: it cannot be read back")


def test_a_quantized_model_is_refused_before_it_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No session is opened for the choice."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    monkeypatch.setattr(module, "audit", lambda *_, **__: pytest.fail("it was audited"))
    with pytest.raises(ModelError, match="quantized already") as caught:
        chosen(tmp_path, nets.model_of(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, weights))
    assert caught.value.where == str(tmp_path / "m.onnx")


def test_samples_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    """As everywhere: before any work."""
    onnx.save(encoder(), str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "calib.npz", ids=np.zeros((2, 12), np.int32))
    with pytest.raises(DataError, match="mask"):
        choose_scheme(tmp_path / "m.onnx", tmp_path / "calib.npz")

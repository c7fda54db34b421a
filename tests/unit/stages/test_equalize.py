"""Cross-layer equalization: even channels, clips respected, refusals with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper, numpy_helper

from onnxshrink.config.data import DataRoles
from onnxshrink.config.stages import Equalize
from onnxshrink.core.errors import ParityError
from onnxshrink.runtime.session import Session
from onnxshrink.stages.equalize import equalize, equalize_model


def chain(activation: str | None, first: Any, bias: Any, second: Any, *, group: int = 1) -> onnx.ModelProto:
    """``x[N,2,4,4]``: ReLU6, a 1x1 Conv to two channels, an activation, and another 1x1 Conv."""
    nodes = [
        helper.make_node("Clip", ["x", "zero", "six"], ["x6"], name="clip0"),
        helper.make_node("Conv", ["x6", "w1", "b1"], ["c"], name="first"),
        helper.make_node("Conv", ["a" if activation else "c", "w2"], ["y"], name="second", group=group),
    ]
    if activation:
        bounds = ["zero", "six"] if activation == "Clip" else []
        nodes.insert(2, helper.make_node(activation, ["c", *bounds], ["a"], name="act"))
    weights = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32), "b1": np.array(bias, np.float32)}
    weights["w1"] = np.array(first, np.float32).reshape(2, 2, 1, 1)
    weights["w2"] = np.array(second, np.float32)[..., None, None]
    return nets.model_of(nodes, {"x": ["N", 2, 4, 4]}, {"y": ["N", "C", 4, 4]}, weights)


def weights_of(model: onnx.ModelProto, name: str) -> Any:
    """An initializer with its single taps dropped."""
    return next(numpy_helper.to_array(tensor).squeeze() for tensor in model.graph.initializer if tensor.name == name)


@pytest.mark.parametrize("activation", [None, "Relu"])
def test_ranges_meet_in_the_geometric_mean(activation: str | None) -> None:
    """Each channel's range becomes ``sqrt(r1 r2)`` on both sides, and the bias is scaled with it."""
    model = chain(activation, [[8, 0], [0, 0.5]], [1, 1], [[0.5, 2], [0.25, 1]])
    facts = equalize_model(model)
    np.testing.assert_allclose(weights_of(model, "w1"), [[2, 0], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(weights_of(model, "b1"), [0.25, 2], rtol=1e-6)
    np.testing.assert_allclose(weights_of(model, "w2"), [[2, 1], [1, 0.5]], rtol=1e-6)
    assert (facts["pairs"], facts["channels"], facts["channels_scaled"]) == (1, 2, 2)
    assert facts["spread_after"] < facts["spread_before"]


def test_a_clip_that_may_act_keeps_its_channel() -> None:
    """Behind ReLU6 at most 6 * 1 + 1 = 7 > 6 keeps a channel; 6 * 0.1 + 0.4 = 1 proves room for a factor of 6."""
    model = chain("Clip", [[1, 0], [0.1, 0]], [1, 0.4], [[1, 1000], [1, 1000]])
    equalize_model(model)
    np.testing.assert_allclose(weights_of(model, "w1")[:, 0], [1, 0.6], rtol=1e-4)
    np.testing.assert_allclose(weights_of(model, "w2")[0], [1, 1000 / 6], rtol=1e-4)
    unbounded = chain("Clip", [[1, 0], [0.1, 0]], [1, 0.4], [[1, 1000], [1, 1000]])
    unbounded.graph.node[0].op_type = "Relu"  # the Conv's input is bounded no more, so nothing is proved
    del unbounded.graph.node[0].input[1:]
    assert equalize_model(unbounded)["channels_scaled"] == 0


def test_depthwise_and_dead_channels() -> None:
    """A depthwise Conv's own channel is scaled; one without weights on either side is left as it is."""
    model = chain("Relu", [[4, 0], [0, 0]], [0, 3], [[1], [5]], group=2)
    facts = equalize_model(model)
    np.testing.assert_allclose(weights_of(model, "w1"), [[2, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(weights_of(model, "w2"), [2, 5], rtol=1e-6)
    assert facts["channels_scaled"] == 1


def test_says_why_convs_are_left() -> None:
    """Each Conv that starts no pair has its reason: a branch, another operator, shared weights."""
    facts = equalize_model(nets.cnn())
    assert facts["declined"] == {
        "conv1": "'r1' is not read by one node alone",
        "conv3": "Add behind it does not scale with its input",
    }
    assert facts["pairs"] == 1
    shared = chain("Relu", [[1, 2], [3, 4]], [0, 0], [[1, 2], [3, 4]])
    shared.graph.node[3].input[1] = "w1"
    assert equalize_model(shared)["declined"]["first"] == "'w1' is shared"


def test_stage_checks_itself(tmp_path: Path) -> None:
    """The stage writes a model with the same numbers and says what it compared; beyond the limit it raises."""
    model = chain("Relu", [[7, 0.1], [0.2, 0.3]], [1, 1], [[0.5, 2], [0.25, 1]])
    source = nets.artifact_of(model, tmp_path / "source")
    ctx = replace(nets.context_of(nets.ArrayReader(nets.samples_of(model, 4)), tmp_path), data=DataRoles())
    facts = equalize(Equalize(), source, tmp_path, ctx)
    assert facts["max_error"] <= 1e-5
    assert facts["samples_from"] == "seeded random values"
    x = nets.samples_of(model, 4)
    want, got = (Session(path).run(x)["y"] for path in (source.model_path, tmp_path / "model.onnx"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ParityError, match="differs"):
        equalize(Equalize(max_abs_error=1e-12), source, tmp_path, ctx)

"""Equalization and SmoothQuant leave the float function as it is, on random networks and inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_models as nets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxshrink.runtime.parity import reference_session, relative_error
from onnxshrink.stages.equalize import equalize_model
from onnxshrink.stages.smooth_quant import smooth_model

LAYERS = st.tuples(st.sampled_from(["full", "grouped", "depthwise"]), st.sampled_from(["none", "relu", "clip"]))


def convolutions(layers: list[tuple[str, str]], seed: int, *, biased: bool) -> onnx.ModelProto:
    """``x[N,4,5,5]`` through Convs over four channels whose ranges lie up to a factor of 100 apart."""
    rng = np.random.default_rng(seed)
    weights = {"zero": np.array(0, np.float32), "six": np.array(6, np.float32)}
    nodes, name = [], "x"
    for i, (form, activation) in enumerate(layers):
        groups = {"full": 1, "grouped": 2, "depthwise": 4}[form]
        ranges = 10.0 ** rng.uniform(-1, 1, (4, 1, 1, 1))
        weights[f"w{i}"] = (rng.standard_normal((4, 4 // groups, 3, 3)) * ranges).astype(np.float32)
        weights[f"b{i}"] = (rng.standard_normal(4) * ranges.ravel()).astype(np.float32)
        inputs = [name, f"w{i}", f"b{i}"] if biased else [name, f"w{i}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{i}"], name=f"conv{i}", group=groups, pads=[1, 1, 1, 1]))
        name = f"c{i}"
        if activation != "none":
            clip = activation == "clip"
            inputs = [name, "zero", "six"] if clip else [name]
            nodes.append(helper.make_node("Clip" if clip else "Relu", inputs, [f"a{i}"], name=f"act{i}"))
            name = f"a{i}"
    nodes.append(helper.make_node("Identity", [name], ["y"], name="end"))
    return nets.model_of(nodes, {"x": ["N", 4, 5, 5]}, {"y": ["N", 4, 5, 5]}, weights)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    layers=st.lists(LAYERS, min_size=2, max_size=4),
    seed=st.integers(0, 1000),
    biased=st.booleans(),
    loudness=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_equalization_leaves_the_function(
    *, layers: list[tuple[str, str]], seed: int, biased: bool, loudness: float
) -> None:
    """The outputs are the same for any input, in front of a Clip as well, and a second time changes nothing."""
    model = convolutions(layers, seed, biased=biased)
    x = {"x": np.random.default_rng(seed + 1).standard_normal((3, 4, 5, 5)).astype(np.float32) * loudness}
    want = reference_session(model, name="before").run(x)["y"]
    facts = equalize_model(model)
    got = reference_session(model, name="after").run(x)["y"]
    assert relative_error(want, got) < 5e-5
    assert facts["pairs"] == len(layers) - 1
    assert equalize_model(model)["spread_before"] == pytest.approx(facts["spread_after"], rel=1e-5)


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    alpha=st.sampled_from([None, 0.0, 0.5, 1.0]),
    transposed=st.booleans(),
    residual=st.booleans(),
)
def test_smoothing_leaves_the_function(*, seed: int, alpha: float | None, transposed: bool, residual: bool) -> None:
    """The outputs are the same for any input, whether the scale goes into LayerNormalization or into a Mul."""
    rng = np.random.default_rng(seed)
    weights = {
        "gain": (rng.standard_normal(6) * 10 ** rng.uniform(-1, 2, 6)).astype(np.float32),
        "shift": rng.standard_normal(6).astype(np.float32),
        "wq": rng.standard_normal((6, 6)).astype(np.float32),
        "wk": rng.standard_normal((6, 6)).astype(np.float32),
        "bk": rng.standard_normal(6).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "wq"], ["q"], name="query"),
        helper.make_node("Gemm", ["n", "wk", "bk"], ["k"], name="key", transB=int(transposed)),
        helper.make_node("Mul", ["q", "k"], ["m"], name="mix"),
        helper.make_node("Add", ["m", "n" if residual else "q"], ["y"], name="add"),
    ]
    model = nets.model_of(nodes, {"x": ["N", 6]}, {"y": ["N", 6]}, weights)
    reader = nets.ArrayReader({"x": rng.standard_normal((20, 6)).astype(np.float32)})
    x = {"x": rng.standard_normal((9, 6)).astype(np.float32) * 50}
    want = reference_session(model, name="before").run(x)["y"]
    facts = smooth_model(model, reader, alpha)
    onnx.checker.check_model(model, full_check=True)
    assert relative_error(want, reference_session(model, name="after").run(x)["y"]) < 2e-5
    if alpha is not None:
        assert (facts["folded"], facts["muls"]) == ((0, 1) if residual else (1, 0))

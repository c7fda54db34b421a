"""What a group costs follows from the kernels that differ, whatever the machine did meanwhile."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import onnx_models as nets
import pytest
from onnx import helper

from onnxshrink.runtime.profile import MIN_RUNS, profiled, shortest
from onnxshrink.stages.node_cost import excess_us


def event(name: str, op: str, us: int) -> dict[str, Any]:
    return {"name": f"{name}_kernel_time", "cat": "Node", "dur": us, "args": {"op_name": op}}


def test_only_what_differs_counts_at_one_pace() -> None:
    """A machine that was half as fast for the second model changes nothing; the kernels of both tell."""
    base = {("a", "QLinearConv"): 100.0, ("b", "QLinearConv"): 40.0, ("c", "QLinearConv"): 60.0}
    other = {("a", "QLinearConv"): 200.0, ("b", "Conv"): 200.0, ("b", "Dequantize"): 20.0, ("c", "QLinearConv"): 120.0}
    assert excess_us(base, other) == pytest.approx(110 - 40)
    assert excess_us(other, base) == pytest.approx(-2 * (110 - 40))
    assert excess_us(base, base) == 0


def test_the_shortest_run_of_each_kernel() -> None:
    """Kernels of one name are added up within a run, marks of layouts are dropped, other events are passed over."""
    events = [
        {"name": "model_run", "cat": "Session", "dur": 99},
        *[event("conv_token_7", "Conv", us) for us in (5, 3, 9)],
        *[event("", "Reorder", us) for us in (1, 2, 1, 1, 4, 4)],
        *[event("then", "If", 6)],
    ]
    assert shortest(events, 3) == {("conv", "Conv"): 3, ("", "2 Reorder"): 2, ("then", "If"): 2}


def test_more_conversions_are_no_slower_machine() -> None:
    """Conversions of one name that only one of the models has are its cost, and say nothing about the pace."""
    base = shortest([event("conv", "Conv", 100), event("Transpose_token_3", "Transpose", 10)], 1)
    more = [event(f"Transpose_token_{place}", "Transpose", 10) for place in (3, 5, 8)]
    assert excess_us(base, shortest([event("conv", "Conv", 100), *more], 1)) == pytest.approx(20)


RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((256, 256)).astype(np.float32) for name in "abc"}
BATCHES = [{"x": RNG.standard_normal((64, 256)).astype(np.float32)} for _ in range(3)]


def chain(*names: str) -> bytes:
    """Products one after the other, each of as much work."""
    ends = ["x", *(f"{name}_out" for name in names[:-1]), "y"]
    nodes = [
        helper.make_node("MatMul", [before, name], [after], name=f"product_{name}")
        for name, (before, after) in zip(names, pairwise(ends), strict=True)
    ]
    shape: list[int | str] = ["N", 256]
    model = nets.model_of(nodes, {"x": shape}, {"y": shape}, {name: WEIGHTS[name] for name in names})
    return model.SerializeToString()


def test_each_kernel_has_its_time_and_the_outputs_are_onnx_runtimes() -> None:
    """Of two models that differ by one product, that one is what the second has more; few batches are run again."""
    outputs, two = profiled(chain("a", "b"), BATCHES, name="two")
    _, three = profiled(chain("a", "b", "c"), BATCHES, name="three")
    np.testing.assert_allclose(outputs[2]["y"], BATCHES[2]["x"] @ WEIGHTS["a"] @ WEIGHTS["b"], rtol=1e-3, atol=0.1)
    assert len(outputs) == 3 < MIN_RUNS
    assert three.keys() - two.keys() == {("product_c", "MatMul")}
    assert all(us >= 0 for us in three.values())


@pytest.mark.serial
def test_a_known_difference_is_found() -> None:
    """Of two models that differ by one product, the excess is that product's time."""
    (_, two), (_, three) = (profiled(chain(*names), BATCHES, name=names) for names in ("ab", "abc"))
    known = three["product_c", "MatMul"]
    assert known > 0
    assert 0.2 * known < excess_us(two, three) < 5 * known
    assert 0.1 < known / two["product_b", "MatMul"] < 10

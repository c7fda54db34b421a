"""What would keep a model from quantizing well: each hindrance on a network that has it."""

from __future__ import annotations

import numpy as np
import onnx_models as nets
import pytest
from onnx import helper

from onnxshrink.runtime.graph import input_specs
from onnxshrink.verify.readiness import find_hindrances, lost_bits

ONES = np.ones(4, np.float32)
WEIGHT = np.ones((4, 4, 1, 1), np.float32)


def kinds(model: nets.Model) -> dict[str, int]:
    return {found.kind: found.count for found in find_hindrances(model, input_specs(model))}


def net(
    *nodes: object, shape: tuple[int | str, ...] = ("n", 4, 8, 8), opset: int = 17, **weights: object
) -> nets.Model:
    return nets.model_of(list(nodes), {"x": list(shape)}, {"y": ["n", "c", "h", "w"]}, weights, opset=opset)  # type: ignore[arg-type]


def test_nothing_stands_in_the_way_of_a_plain_network() -> None:
    """Even channels, folded, fixed lengths beside the batch."""
    assert kinds(net(helper.make_node("Conv", ["x", "w"], ["y"]), w=WEIGHT)) == {}


def test_batch_normalization_is_found_where_it_is_not_folded() -> None:
    """Behind a convolution `optimize` mends it; elsewhere only the network can."""
    moments = {"s": ONES, "b": ONES, "m": ONES, "v": ONES}
    conv = helper.make_node("Conv", ["x", "w"], ["c"])
    behind = net(conv, helper.make_node("BatchNormalization", ["c", *moments], ["y"]), w=WEIGHT, **moments)
    alone = net(helper.make_node("BatchNormalization", ["x", *moments], ["y"]), **moments)
    assert kinds(behind) == kinds(alone) == {"batch normalization": 1}
    assert "optimize" in find_hindrances(behind, ())[0].fix
    assert "network" in find_hindrances(alone, ())[0].fix


@pytest.mark.parametrize(("axes", "found"), [([2, 3], 1), ([-1, -2], 1), ([1], 0)])
def test_means_over_height_and_width_are_found(axes: list[int], found: int) -> None:
    """As an attribute and as an input; means over channels are no pooling."""
    old = net(helper.make_node("ReduceMean", ["x"], ["y"], axes=axes))
    new = net(helper.make_node("ReduceMean", ["x", "a"], ["y"]), opset=18, a=np.array(axes))
    assert kinds(old).get("reduce mean", 0) == kinds(new).get("reduce mean", 0) == found


@pytest.mark.parametrize(("largest", "bits"), [(1.0, 0.0), (16.0, 4.0), (256.0, 8.0)])
def test_bits_are_lost_to_the_largest_channel(largest: float, bits: float) -> None:
    """One channel of 16 times the others' range leaves them 4 bits fewer, whatever the axis."""
    weights = np.ones((8, 6), np.float32)
    weights[3] *= largest
    assert lost_bits(weights, 0) == pytest.approx(bits)
    assert lost_bits(weights.T, -1) == pytest.approx(bits)
    assert lost_bits(np.zeros((3, 3)), 0) == 0.0


def test_outlier_channels_are_named_with_their_worst() -> None:
    """The fix is a scale for each channel."""
    weight = WEIGHT.copy()
    weight[0] *= 20
    found = find_hindrances(net(helper.make_node("Conv", ["x", "w"], ["y"], name="first"), w=weight), ())
    assert [hindrance.kind for hindrance in found] == ["outlier channels"]
    assert "'first'" in found[0].what
    assert "4.3 at worst" in found[0].what
    assert "per_channel" in found[0].fix


def test_old_opsets_quantized_models_and_free_axes_are_found() -> None:
    """Opset 11 has no scales per channel; axes beside the batch that have no length are told by name."""
    assert kinds(net(helper.make_node("Relu", ["x"], ["y"]), opset=11)) == {"opset": 1}
    free = net(helper.make_node("Relu", ["x"], ["y"]), shape=("n", 4, "height", "width"))
    assert kinds(free) == {"dynamic axes": 2}
    scale, zero = np.array(0.1, np.float32), np.array(0, np.uint8)
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])
    dequantize = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"])
    assert kinds(net(quantize, dequantize, s=scale, z=zero)) == {"quantized": 1}


def test_shapes_that_do_not_follow_are_found() -> None:
    """A shape that the values decide has not even a number of axes before they are there."""
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=7),
        helper.make_node("Reshape", ["whole", "flat"], ["given"]),
        helper.make_node("Reshape", ["x", "given"], ["inner"]),
        helper.make_node("Relu", ["inner"], ["y"]),
    ]
    found = find_hindrances(net(*nodes, flat=np.array([-1])), ())
    assert [(hindrance.kind, hindrance.count) for hindrance in found] == [("shapes", 1)]
    assert "'inner'" in found[0].what

"""The measure that export and optimize are believed by, and the inputs they are tried on."""

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from scipy.spatial.distance import chebyshev

from onnxshrink.core.tensors import TensorSpec, check_batch
from onnxshrink.runtime import parity
from onnxshrink.runtime.parity import axis_lengths, random_batch, reference_session, relative_error, relative_errors


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_error_is_the_chebyshev_distance_over_the_largest_value_or_one(scale: float) -> None:
    """Equal to scipy's Chebyshev distance divided by max(1, max|reference|)."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5)) * scale
    want = chebyshev(a.ravel(), b.ravel()) / max(1.0, np.abs(a).max())
    assert relative_error(a, b) == pytest.approx(want, rel=1e-12)


def test_half_precision_is_compared_in_double() -> None:
    """float16 values whose difference overflows float16 still give a finite error."""
    a, b = np.float16([60000.0]), np.float16([-60000.0])
    assert relative_error(a, b) == pytest.approx(2.0, rel=1e-3)


def test_unsigned_integers_do_not_wrap() -> None:
    """uint8 5 and 7 differ by 2, in either order."""
    assert relative_error(np.uint8([5]), np.uint8([7])) == pytest.approx(2 / 5)
    assert relative_error(np.uint8([7]), np.uint8([5])) == pytest.approx(2 / 7)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1.0, math.nan], [1.0, math.nan]),
        ([math.inf, -math.inf], [math.inf, -math.inf]),
        ([], []),
    ],
)
def test_equal_arrays_have_no_error_even_where_they_are_not_finite(a: list[float], b: list[float]) -> None:
    """NaN equals NaN here, and an infinity itself: both models gave it."""
    assert relative_error(np.float32(a), np.float32(b)) == 0.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.float32([1.0]), np.float32([math.nan])),
        (np.float32([math.nan]), np.float32([1.0])),
        (np.float32([math.inf]), np.float32([-math.inf])),
        (np.float32([math.inf]), np.float32([3e38])),
        (np.zeros((2, 1), np.float32), np.zeros((1, 2), np.float32)),
        (np.zeros(2, np.float32), np.zeros(2, np.float64)),
        (np.array(["a"]), np.array(["b"])),
    ],
)
def test_what_cannot_be_compared_is_infinitely_wrong(a: np.ndarray, b: np.ndarray) -> None:
    """A NaN on one side, another shape, another dtype or other text never passes a tolerance."""
    assert relative_error(a, b) == math.inf


def test_a_missing_output_is_infinitely_wrong() -> None:
    """The candidate has to give every output of the reference."""
    assert relative_errors({"y": np.ones(1), "z": np.ones(1)}, {"y": np.ones(1)}) == {"y": 0.0, "z": math.inf}


def test_different_axes_get_different_lengths() -> None:
    """Batch names count from the batch, others are multiples of the length, and one name has one length."""
    specs = (TensorSpec("a", "float32", ("batch", 3, "h", "w")), TensorSpec("b", "float32", ("n", "h")))
    assert axis_lengths(specs, batch=2, length=32) == {"batch": 2, "n": 3, "h": 32, "w": 64}


def test_random_batches_are_seeded_and_fit_the_specs() -> None:
    """The same seed gives the same values, of the asked shape and dtype."""
    dtypes = ("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool")
    specs = [TensorSpec(dtype, dtype, ("batch", 50)) for dtype in dtypes]
    batch = random_batch(specs, {"batch": 4}, seed=7)
    check_batch(batch, specs, where="here")
    again = random_batch(specs, {"batch": 4}, seed=7)
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert set(np.unique(batch["int64"])) == {0, 1}
    assert batch["int8"].min() < -100
    assert batch["uint8"].max() > 200


def test_a_model_above_the_protobuf_limit_is_opened_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be serialized in memory, and gives the same numbers through external data."""
    weight = np.arange(1024, dtype=np.float32).reshape(1, 1024)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    monkeypatch.setattr(parity, "PROTOBUF_LIMIT_BYTES", 1000)
    monkeypatch.setattr("onnxshrink.runtime.graph.PROTOBUF_LIMIT_BYTES", 1000)
    result = reference_session(model, name="m").run({"x": np.ones((1, 1024), np.float32)})
    np.testing.assert_array_equal(result["y"], weight + 1)

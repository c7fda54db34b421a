"""Conv, MatMul and Gemm as matrix products: ONNX Runtime's own operators are the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnxshrink.calibration import unfold
from onnxshrink.calibration.unfold import activation_rows, groups_of, weight_rows
from onnxshrink.runtime.session import Session


def multiplied(node: Any, x: NDArray[np.float32], w: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Each group's product of rows, ``(P, M)``."""
    parts: list[list[NDArray[np.float32]]] = [[] for _ in range(groups_of(node))]
    for group, rows in activation_rows(node, x, w.shape[2:], 0):
        parts[group].append(rows @ weight_rows(node, w)[group].T)
    return [np.concatenate(part) for part in parts]


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize(
    ("x", "w", "attributes"),
    [
        ((2, 3, 9, 8), (4, 3, 3, 3), {"pads": [1, 0, 2, 1]}),
        ((2, 3, 9, 8), (4, 3, 1, 1), {"strides": [2, 3]}),
        ((1, 6, 9, 8), (4, 3, 3, 2), {"group": 2, "dilations": [2, 1], "strides": [1, 2]}),
        ((2, 4, 7, 7), (8, 1, 3, 3), {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        ((2, 2, 8, 7), (3, 2, 4, 2), {"auto_pad": "SAME_LOWER"}),
        ((1, 2, 8, 7), (3, 2, 2, 2), {"auto_pad": "VALID"}),
        ((2, 3, 11), (2, 3, 4), {"pads": [2, 1], "strides": [3]}),
        ((1, 2, 5, 4, 6), (3, 2, 2, 3, 2), {"pads": [0, 1, 0, 1, 0, 1]}),
    ],
)
def test_conv_is_onnxruntimes(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    x: tuple[int, ...],
    w: tuple[int, ...],
    attributes: dict[str, Any],
) -> None:
    """The rows of any convolution, whole or in blocks, multiply to what the operator gives."""
    monkeypatch.setattr(unfold, "_BLOCK", block)
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 10, x).astype(np.float32)
    weights = rng.integers(-9, 10, w).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    model = nets.model_of([node], {"x": list(x)}, {"y": [None] * len(x)}, {"w": weights})  # type: ignore[list-item]
    wanted = Session(model.SerializeToString()).run({"x": values})["y"]
    products = multiplied(node, values, weights)
    rows = np.concatenate(products, axis=1)
    assert np.array_equal(np.moveaxis(wanted, 1, -1).reshape(rows.shape), rows)


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm_is_onnxruntimes(transposed: tuple[int, int]) -> None:
    """Either operand of Gemm may be transposed."""
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 10, (5, 7)).astype(np.float32)
    weights = rng.integers(-9, 10, (7, 3)).astype(np.float32)
    values, weights = values.T if transposed[0] else values, weights.T if transposed[1] else weights
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=transposed[0], transB=transposed[1])
    model = nets.model_of([node], {"x": list(values.shape)}, {"y": [5, 3]}, {"w": weights})
    assert np.array_equal(
        Session(model.SerializeToString()).run({"x": values})["y"], multiplied(node, values, weights)[0]
    )


def test_matmul_flattens_the_leading_axes() -> None:
    """Activations of any rank are rows of their last axis."""
    rng = np.random.default_rng(0)
    values, weights = rng.integers(-9, 10, (2, 3, 4, 5)).astype(np.float32), np.eye(5, 6, dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    assert np.array_equal(multiplied(node, values, weights)[0], (values @ weights).reshape(-1, 6))


def test_k_runs_over_positions_then_channels() -> None:
    """The order of K is the kernels': channels of one position lie side by side."""
    weights = np.arange(2 * 2 * 3).reshape(1, 2, 2, 3)
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    assert weight_rows(node, weights).reshape(-1).tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]

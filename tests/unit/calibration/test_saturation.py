"""Pairwise 16-bit saturation: the instruction in plain Python is the reference, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from onnxshrink.calibration.saturation import (
    harmless_in_any_order,
    risky_pairs,
    saturated_product,
    saturation_loss,
)


def instruction(activations: list[int], weights: list[int]) -> tuple[int, int]:
    """The dot product by PMADDUBSW, one element at a time, and how many pairs saturated."""
    if len(activations) % 2:
        activations, weights = [*activations, 0], [*weights, 0]
    total = saturated = 0
    for k in range(0, len(activations), 2):
        pair = activations[k] * weights[k] + activations[k + 1] * weights[k + 1]
        kept = min(max(pair, -32768), 32767)
        saturated += kept != pair
        total += kept
    return total, saturated


def by_instruction(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> tuple[list[list[int]], int]:
    """Every dot product of a matrix product, and the number of saturated pairs."""
    cells = [[instruction(row.tolist(), column.tolist()) for column in weights] for row in activations]
    return [[total for total, _ in row] for row in cells], sum(count for row in cells for _, count in row)


@pytest.mark.parametrize("k", [1, 2, 7, 32, 65])
@pytest.mark.parametrize("spread", [20, 60, 128])
def test_product_is_the_instructions(k: int, spread: int) -> None:
    """Sums and counts of the fast path are those of the scalar instruction, for even and odd K, rare and frequent."""
    rng = np.random.default_rng(k)
    activations = rng.integers(0, 256, (9, k)).astype(np.uint8)
    weights = np.clip(rng.normal(0, spread, (5, k)).round(), -128, 127).astype(np.int8)
    wanted, count = by_instruction(activations, weights)
    assert saturated_product(activations, weights).tolist() == wanted
    assert saturation_loss(activations, risky_pairs(weights), 5)[1] == count


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs looked at one by one give the sums of pairs looked at together."""
    rng = np.random.default_rng(0)
    activations = rng.integers(0, 256, (4, 40)).astype(np.uint8)
    weights = rng.integers(-128, 128, (6, 40)).astype(np.int8)
    together = saturated_product(activations, weights)
    monkeypatch.setattr("onnxshrink.calibration.saturation._CHUNK", 1)
    assert np.array_equal(saturated_product(activations, weights), together)
    assert together.tolist() == by_instruction(activations, weights)[0]


@pytest.mark.parametrize(
    ("pair", "risky"),
    [
        ((64, 64), False),
        ((65, 64), True),
        ((127, 1), False),
        ((127, 2), True),
        ((-64, -64), False),
        ((-65, -64), True),
        ((-128, 0), False),
        ((-128, -1), True),
        ((127, -128), False),
    ],
)
def test_risky_from_129_on(pair: tuple[int, int], risky: bool) -> None:  # noqa: FBT001
    """A pair is risky exactly if the largest activations saturate it: from a sum of 129 in one sign on."""
    weights = np.array([pair], np.int8)
    assert bool(risky_pairs(weights).size) is risky
    assert harmless_in_any_order(weights) is not risky
    extremes = [[255, 255], [255, 0], [0, 255]]
    assert any(instruction(activations, list(pair))[1] for activations in extremes) is risky


def test_seven_bits_never_saturate() -> None:
    """ONNX Runtime's reduced range, -64 to 64, is proven harmless: 255 * 64 * 2 = 32,640."""
    worst = np.array([[64, 64, -64, -64], [-64, 64, 64, -64]], np.int8)
    assert harmless_in_any_order(worst)
    assert risky_pairs(worst).size == 0
    assert 255 * 64 * 2 <= 32767


def test_order_decides() -> None:
    """Weights that are harmless as the kernel pairs them are not called harmless in any order."""
    weights = np.array([[100, -100, 100, -100]], np.int8)
    assert risky_pairs(weights).size == 0
    assert not harmless_in_any_order(weights)
    assert risky_pairs(weights[:, [0, 2, 1, 3]]).size == 2


def test_one_product_alone_fits() -> None:
    """With K of 1 there is nothing to saturate with."""
    weights = np.array([[-128], [127]], np.int8)
    assert harmless_in_any_order(weights)
    assert saturated_product(np.array([[255]], np.uint8), weights).tolist() == [[-32640, 32385]]

"""Laws of pairwise saturation, against the instruction in plain Python."""

from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from onnxshrink.calibration.saturation import (
    harmless_in_any_order,
    risky_pairs,
    saturated_product,
    saturation_loss,
)

sizes = st.integers(1, 12)


@st.composite
def products(draw: st.DrawFn, *, lo: int = -128, hi: int = 127) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Activations ``(P, K)`` and weights ``(M, K)``, extremes among them."""
    p, m, k = draw(sizes), draw(sizes), draw(sizes)
    a = draw(arrays(np.uint8, (p, k), elements=st.one_of(st.just(255), st.integers(0, 255))))
    w = draw(arrays(np.int8, (m, k), elements=st.one_of(st.sampled_from([lo, hi]), st.integers(lo, hi))))
    return a, w


def scalar(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> list[list[int]]:
    """PMADDUBSW and a sum, in plain Python."""
    rows, columns = activations.tolist(), weights.tolist()
    return [
        [sum(_pair(row[k : k + 2], column[k : k + 2]) for k in range(0, len(row), 2)) for column in columns]
        for row in rows
    ]


def _pair(activations: list[int], weights: list[int]) -> int:
    return min(max(sum(x * y for x, y in zip(activations, weights, strict=True)), -32768), 32767)


@given(products())
@settings(derandomize=True, deadline=None)
def test_equals_the_instruction(product: tuple[NDArray[np.uint8], NDArray[np.int8]]) -> None:
    """The fast path is bit-exact for any activations and weights."""
    assert saturated_product(*product).tolist() == scalar(*product)


@given(products())
@settings(derandomize=True, deadline=None)
def test_risky_pairs_are_those_the_largest_activations_saturate(
    product: tuple[NDArray[np.uint8], NDArray[np.int8]],
) -> None:
    """A pair is listed if and only if activations of 0 and 255 can saturate it; none other ever loses anything."""
    _, weights = product
    risky = risky_pairs(weights)
    found = set(zip(risky.channel.tolist(), risky.place.tolist(), strict=True))
    assert risky.size == len(found)
    padded = np.pad(weights.astype(int), [(0, 0), (0, weights.shape[1] % 2)])
    sums = [(255 * (a * padded[:, 0::2] + b * padded[:, 1::2])) for a in (0, 1) for b in (0, 1)]
    can = np.any([(s > 32767) | (s < -32768) for s in sums], axis=0)
    assert found == set(zip(*(part.tolist() for part in np.nonzero(can)), strict=True))


@given(products(), st.randoms(use_true_random=False))
@settings(derandomize=True, deadline=None)
def test_harmless_in_any_order_holds(product: tuple[NDArray[np.uint8], NDArray[np.int8]], random: Random) -> None:
    """Weights called harmless lose nothing however K is ordered, and others have an order that is risky."""
    _, weights = product
    order = list(range(weights.shape[1]))
    random.shuffle(order)
    if harmless_in_any_order(weights):
        assert risky_pairs(weights[:, order]).size == 0
    else:
        ascending = np.sort(weights, axis=1)
        assert risky_pairs(ascending[:, :2]).size + risky_pairs(ascending[:, -2:]).size > 0


@given(products(lo=-64, hi=64))
@settings(derandomize=True, deadline=None)
def test_seven_bits_lose_nothing(product: tuple[NDArray[np.uint8], NDArray[np.int8]]) -> None:
    """With weights of the reduced range the saturated product is the exact one."""
    activations, weights = product
    assert harmless_in_any_order(weights)
    assert np.array_equal(saturated_product(*product), activations.astype(int) @ weights.astype(int).T)
    assert saturation_loss(activations, risky_pairs(weights), len(weights))[1] == 0

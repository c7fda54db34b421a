"""What ``vpmaddubsw`` does to an 8-bit dot product, and whether it will.

x86 processors without VNNI multiply unsigned activations with signed weights by an instruction that adds the products
of two neighbours along K in 16 bits, and saturates: 255 * 100 + 255 * 100 becomes 32,767. ONNX Runtime's AVX2 kernels
then add these sums in 32 bits, exactly. So a dot product is wrong by what its pairs lose, and which pairs can lose
anything follows from the weights alone: only those whose positive weights sum to more than 128, or whose negative ones
to less than -128. Weights of 7 bits (up to 64 in magnitude) have none.

Neighbours are elements 2j and 2j + 1 along K, padded with a zero where K is odd. In a convolution K runs over the
kernel's positions and, within each, over the channels of the group. A depthwise convolution (one channel in, one out)
is computed without the instruction.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW; the packing order is that of
    ONNX Runtime 1.31, ``MlasConvSymPackW`` (mlas/lib/convsym.cpp), ``ReorderFilter`` (qlinearconv.cc) and
    ``MlasGemmU8S8CopyPackBAvx2``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

INT16_MIN, INT16_MAX = -(1 << 15), (1 << 15) - 1
HARMLESS_SUM = INT16_MAX // 255
"""128: weights of one sign that sum to no more cannot saturate, whatever the activations are."""

_CHUNK = 1 << 21  # sums that are looked at together, 8 MB

_T = TypeVar("_T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class RiskyPairs:
    """The pairs of a weight matrix that saturate for some activations; all others do for none.

    Attributes:
        channel: Output channel of each pair, ``(n,)`` intp, ascending.
        place: The pair's number ``j`` along K, ``(n,)`` intp; it multiplies activations ``2j`` and ``2j + 1``.
        even: Weight at ``2j``, ``(n,)`` int32.
        odd: Weight at ``2j + 1``, ``(n,)`` int32.
    """

    channel: NDArray[np.intp]
    place: NDArray[np.intp]
    even: NDArray[np.int32]
    odd: NDArray[np.int32]

    @property
    def size(self) -> int:
        """Number of pairs."""
        return int(self.channel.size)

    def reached_by(self, largest: NDArray[np.uint8]) -> RiskyPairs:
        """Those that saturate for some activations from zero up to ``largest``, ``(K,)``, K even."""
        even, odd = largest[2 * self.place].astype(np.int32), largest[2 * self.place + 1].astype(np.int32)
        hi = even * np.maximum(self.even, 0) + odd * np.maximum(self.odd, 0)
        lo = even * np.minimum(self.even, 0) + odd * np.minimum(self.odd, 0)
        kept = np.flatnonzero((hi > INT16_MAX) | (lo < INT16_MIN))
        return RiskyPairs(self.channel[kept], self.place[kept], self.even[kept], self.odd[kept])


def risky_pairs(weights: NDArray[np.int8]) -> RiskyPairs:
    """The pairs of ``weights`` that can saturate.

    Args:
        weights: One row for each output channel, ``(M, K)``, K in the kernel's order.
    """
    even, odd = (half.astype(np.int16) for half in _halves(weights))
    positive = np.maximum(even, 0) + np.maximum(odd, 0)
    negative = np.minimum(even, 0) + np.minimum(odd, 0)
    channel, place = np.nonzero((positive > HARMLESS_SUM) | (negative < -HARMLESS_SUM))
    return RiskyPairs(channel, place, even[channel, place].astype(np.int32), odd[channel, place].astype(np.int32))


def harmless_in_any_order(weights: NDArray[np.int8]) -> bool:
    """True if no two weights of a channel could saturate together, however a kernel pairs them.

    Args:
        weights: One row for each output channel, ``(M, K)``.
    """
    if weights.shape[1] < 2:  # one product alone, 255 * 128 at most, fits
        return True
    ordered = np.sort(weights, axis=1).astype(np.int16)
    lowest, highest = ordered[:, :2], ordered[:, -2:]
    return bool(
        np.maximum(highest, 0).sum(axis=1).max(initial=0) <= HARMLESS_SUM
        and np.minimum(lowest, 0).sum(axis=1).min(initial=0) >= -HARMLESS_SUM
    )


def saturation_loss(activations: NDArray[np.uint8], risky: RiskyPairs, channels: int) -> tuple[NDArray[np.int32], int]:
    """What saturation adds to each dot product, and how many pairs saturate.

    Args:
        activations: Rows of the matrix product, ``(P, K)``, K in the kernel's order.
        risky: The weights' `risky_pairs`; only these are computed.
        channels: Output channels, M.

    Returns:
        Saturated minus exact sum, ``(P, M)`` int32, and how many of the ``P * M * ceil(K / 2)`` pairs saturate.
    """
    loss = np.zeros((len(activations), channels), np.int32)
    saturated = 0
    even, odd = _halves(activations)
    risky = risky.reached_by(np.stack([even.max(axis=0, initial=0), odd.max(axis=0, initial=0)], axis=1).reshape(-1))
    step = max(1, _CHUNK // max(1, len(activations)))
    for start in range(0, risky.size, step):
        part = slice(start, start + step)
        sums = even[:, risky.place[part]].astype(np.int32) * risky.even[part]
        sums += odd[:, risky.place[part]].astype(np.int32) * risky.odd[part]
        lost = np.clip(sums, INT16_MIN, INT16_MAX) - sums
        saturated += int(np.count_nonzero(lost))
        channel = risky.channel[part]
        first = np.flatnonzero(np.diff(channel, prepend=-1))
        loss[:, channel[first]] += np.add.reduceat(lost, first, axis=1)
    return loss, saturated


def saturated_product(activations: NDArray[np.uint8], weights: NDArray[np.int8]) -> NDArray[np.int32]:
    """The matrix product as an AVX2 kernel accumulates it, before zero points and scales.

    Args:
        activations: ``(P, K)``.
        weights: ``(M, K)``, K in the same order.

    Returns:
        ``activations @ weights.T`` with every pair's sum saturated, ``(P, M)`` int32.
    """
    # float64 holds every sum of up to 2^37 products exactly, and BLAS is fast.
    exact = (activations.astype(np.float64) @ weights.astype(np.float64).T).astype(np.int32)
    return exact + saturation_loss(activations, risky_pairs(weights), len(weights))[0]


def _halves(matrix: NDArray[_T]) -> tuple[NDArray[_T], NDArray[_T]]:
    """Even and odd columns; a last odd one has a zero beside it."""
    even, odd = matrix[:, 0::2], matrix[:, 1::2]
    if matrix.shape[1] % 2:
        odd = np.concatenate([odd, np.zeros_like(matrix[:, :1])], axis=1)
    return even, odd

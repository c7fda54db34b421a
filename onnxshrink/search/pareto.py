"""Points that no other beats in everything, and how much of the space they cover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

Objectives: TypeAlias = tuple[float, ...]
"""What is to be small: such as bytes, latency ratio and accuracy drop, in this order for all that are compared."""


def dominates(a: Objectives, b: Objectives) -> bool:
    """True if ``a`` is nowhere larger than ``b`` and somewhere smaller."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def front(points: Sequence[Objectives]) -> list[int]:
    """Indices of the points that none dominates, in their order; of equal points the first."""
    kept = []
    for index, point in enumerate(points):
        beaten = any(dominates(other, point) for other in points) or point in points[:index]
        if not beaten:
            kept.append(index)
    return kept


def hypervolume(points: Sequence[Objectives], worst: Objectives) -> float:
    """Volume of what the points dominate within the box below ``worst``.

    Args:
        points: Each of the length of ``worst``; those not below it in every objective add nothing.
        worst: The box's far corner.

    Returns:
        In the product of the objectives' units; 0 without points.

    Source: Zitzler and Thiele, "Multiobjective Optimization Using Evolutionary Algorithms", PPSN 1998; by slices along
        the last objective, as in Knowles, "Local-Search and Hybrid Evolutionary Algorithms", 2002.
    """
    inside = [point for point in points if all(x < w for x, w in zip(point, worst, strict=True))]
    if not inside:
        return 0.0
    if len(worst) == 1:
        return worst[0] - min(point[0] for point in inside)
    inside.sort(key=lambda point: point[-1])
    volume = 0.0
    for index, point in enumerate(inside):
        end = inside[index + 1][-1] if index + 1 < len(inside) else worst[-1]
        if end > point[-1]:
            slice_ = [other[:-1] for other in inside[: index + 1]]
            volume += (end - point[-1]) * hypervolume(slice_, worst[:-1])
    return volume

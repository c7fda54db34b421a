"""The graph that runs as a bar: stretches of nodes in the order of the graph, in integers, in float or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, TypeAlias

import onnx

from onnxshrink.verify.causes import BORDERS, RunGraph
from onnxshrink.verify.islands import Island
from onnxshrink.verify.macs import Row, is_integer

SegmentKind: TypeAlias = Literal["integer", "float", "other", "mixed"]

MAX_SEGMENTS = 60
"""Stretches that a report keeps of one graph: neighbours become ``mixed`` where there are more."""

_MAX_OP_TYPES = 6
_EIGHT_BITS = {"int8", "uint8"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive nodes that compute alike.

    Attributes:
        kind: ``integer`` kernels; ``float``, all of one island; ``other`` moves numbers, converts them, or computes
            shapes; ``mixed`` stands for several stretches of different kinds.
        nodes: How many.
        macs: Their multiply-accumulates in one inference.
        integer_macs: Those of them that integer kernels do.
        op_types: Their operators, each once, in the order of the graph.
        island: The float island they belong to, in ``mixed`` the one with the most multiply-accumulates; or None.
    """

    kind: SegmentKind
    nodes: int
    macs: int
    integer_macs: int
    op_types: tuple[str, ...]
    island: Island | None = None


def find_segments(graph: RunGraph, rows: Mapping[str, Row], islands: Mapping[str, Island]) -> tuple[Segment, ...]:
    """Every node of the graph in one segment.

    Args:
        graph: The graph that runs.
        rows: The multiply-accumulates of the nodes that have any, by the node's first output.
        islands: The island of each float node, likewise.
    """
    single = [_single(node, graph, rows.get(node.output[0]), islands.get(node.output[0])) for node in graph.nodes]
    return tuple(_joined(list(group)) for _, group in groupby(single, key=lambda one: (one.kind, id(one.island))))


def coarser(segments: Sequence[Segment], most: int = MAX_SEGMENTS) -> tuple[Segment, ...]:
    """At most ``most`` segments with the same nodes in the same order: equal numbers of neighbours are joined."""
    each = -(-len(segments) // most) if segments else 1
    return tuple(_joined(segments[start : start + each]) for start in range(0, len(segments), each))


def segment_details(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Segments as plain JSON for `Candidate.details`, at most `MAX_SEGMENTS`.

    Returns:
        For each ``kind``, ``nodes``, ``macs_ratio`` and ``integer_macs_ratio`` (shares of the whole graph's
        multiply-accumulates, 0 to 1; 0 where it has none), up to six ``op_types``, and for float ones ``main_node``,
        ``cause`` and ``fix``.
    """
    total = sum(segment.macs for segment in segments) or 1
    return [
        {
            "kind": segment.kind,
            "nodes": segment.nodes,
            "macs_ratio": round(segment.macs / total, 6),
            "integer_macs_ratio": round(segment.integer_macs / total, 6),
            "op_types": list(segment.op_types[:_MAX_OP_TYPES]),
        }
        | (
            {"main_node": island.main_node, "cause": island.cause, "fix": island.change}
            if (island := segment.island) is not None
            else {}
        )
        for segment in coarser(segments)
    ]


def _single(node: onnx.NodeProto, graph: RunGraph, row: Row | None, island: Island | None) -> Segment:
    kind: SegmentKind = "float" if island is not None else "integer" if _in_integers(node, graph) else "other"
    counts = (row.macs, row.integer_macs) if row is not None else (0, 0)
    return Segment(kind, 1, *counts, (node.op_type,), island)


def _in_integers(node: onnx.NodeProto, graph: RunGraph) -> bool:
    """True for integer kernels and for what works on 8-bit activations as they are, such as MaxPool."""
    if node.op_type in BORDERS or all(name in graph.constants for name in node.output):
        return False
    return is_integer(node) or any(graph.dtypes.get(name) in _EIGHT_BITS for name in node.output)


def _joined(segments: Sequence[Segment]) -> Segment:
    if len(segments) == 1:
        return segments[0]
    kinds = {segment.kind for segment in segments}
    islands = [segment.island for segment in segments if segment.island is not None]
    return replace(
        segments[0],
        kind=segments[0].kind if len(kinds) == 1 else "mixed",
        nodes=sum(segment.nodes for segment in segments),
        macs=sum(segment.macs for segment in segments),
        integer_macs=sum(segment.integer_macs for segment in segments),
        op_types=tuple(dict.fromkeys(name for segment in segments for name in segment.op_types)),
        island=max(islands, key=lambda island: island.macs, default=None),
    )

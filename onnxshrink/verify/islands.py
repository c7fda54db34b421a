"""Float islands of the graph that ONNX Runtime runs: where they are, why they are float, and what to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from onnxshrink.verify.causes import MOVES, SECONDARY, Cause, RunGraph, cause_of, unknown
from onnxshrink.verify.macs import Row, label


@dataclass(frozen=True, slots=True)
class Island:
    """Connected nodes that compute in float.

    Attributes:
        nodes: Their names, in the order of the graph.
        op_types: Their operators, each once.
        macs: Their multiply-accumulates in one inference; 0 for an island that only normalizes or activates.
        main_node: The node that multiplies most, else the first one with a cause.
        causes: What keeps them in float, the weightiest first.
    """

    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    macs: int
    main_node: str
    causes: tuple[Cause, ...]

    @property
    def cause(self) -> str:
        """The causes in words."""
        return "; ".join(cause.text for cause in self.causes)

    @property
    def change(self) -> str:
        """What to change, for all of them."""
        return "; ".join(dict.fromkeys(cause.change for cause in self.causes))


def island_of_nodes(graph: RunGraph, rows: Mapping[str, Row]) -> dict[str, Island]:
    """The float island that each node belongs to, by the node's first output.

    Args:
        graph: The graph that runs.
        rows: The multiply-accumulates of the nodes that have any, by the node's first output.

    Returns:
        The nodes of one island have the very same object.
    """
    groups = (nodes for nodes in _connected(graph) if any(node.op_type not in MOVES for node in nodes))
    return {node.output[0]: island for nodes in groups for island in [_island(nodes, graph, rows)] for node in nodes}


def find_islands(islands: Mapping[str, Island]) -> tuple[Island, ...]:
    """Each island once, those with the most multiply-accumulates first, then in the order of the graph.

    Args:
        islands: As of `island_of_nodes`.
    """
    return tuple(sorted({id(island): island for island in islands.values()}.values(), key=lambda island: -island.macs))


def _connected(graph: RunGraph) -> Iterator[list[onnx.NodeProto]]:
    """Float nodes in groups that hang together by tensors that one of them makes."""
    group: dict[str, int] = {}
    groups: dict[int, list[onnx.NodeProto]] = {}
    for place, node in enumerate(graph.nodes):
        if not graph.is_float(node):
            continue
        groups[place] = [node]
        for other in sorted({group[name] for name in node.input if name in group}):
            joined = groups.pop(other)
            groups[place] = joined + groups[place]
            group |= {name: place for member in joined for name in member.output}
        group |= dict.fromkeys(node.output, place)
    order = {node.output[0]: place for place, node in enumerate(graph.nodes)}
    for nodes in groups.values():
        yield sorted(nodes, key=lambda node: order[node.output[0]])


def _island(nodes: list[onnx.NodeProto], graph: RunGraph, rows: Mapping[str, Row]) -> Island:
    macs = {node.output[0]: rows[node.output[0]].macs if node.output[0] in rows else 0 for node in nodes}
    weighty = sorted(nodes, key=lambda node: -macs[node.output[0]])
    found = [(node, cause) for node in weighty if (cause := cause_of(node, nodes, graph)) is not None]
    if any(cause.kind not in SECONDARY for _, cause in found):  # the others follow from these
        found = [(node, cause) for node, cause in found if cause.kind not in SECONDARY or macs[node.output[0]]]
    first = {cause.kind: (node, cause) for node, cause in reversed(found)}  # one of a kind, the weightiest
    causes = [first.pop(cause.kind)[1] for _, cause in found if cause.kind in first]
    main = weighty[0] if macs[weighty[0].output[0]] else next((node for node, _ in found), weighty[0])
    names = tuple(map(label, nodes))
    return Island(
        names,
        tuple(dict.fromkeys(node.op_type for node in nodes)),
        sum(macs.values()),
        label(main),
        tuple(causes) or (unknown(names),),
    )

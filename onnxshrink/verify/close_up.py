"""A quantized model seen from near, for the report: the grids of its tensors, and the nodes where its error is born."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx

from onnxshrink.calibration.calibrate import load_calibration
from onnxshrink.config.data import Data
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import size_bytes
from onnxshrink.runtime.graph import input_specs, is_quantized, load_model, name_nodes
from onnxshrink.verify.explain import Explanation, NodeError, explain_models
from onnxshrink.verify.stored_ranges import range_details
from onnxshrink.verify.verify import Quality, Row

MAX_NODES = 40
"""Nodes that a report shows of one model, the worst first."""

MAX_SAMPLES = 8

MAX_MACS = 1e10
"""Multiply-accumulates that a run spends on looking: about a second on one core. EfficientNet-Lite0 needs 23e9 a sample
(61 pieces, each carried on to the outputs), and 5 to 8 s."""

MAX_GRAPH_NODES = 400
"""Sessions with a piece of each node take their time to open, however little they compute."""

MAX_BYTES = 64 << 20
"""What the float model may weigh: it is loaded several times."""


def look_closer(quality: Quality, row: Row, config: RunConfig) -> Quality:
    """Add ``details["ranges"]``, see `range_details`, and ``details["nodes"]``, see `node_details`.

    Args:
        quality: Of the row.
        row: The model; one that is not quantized is left as it is.
        config: The data.
    """
    model = load_model(row.artifact.model_path)
    if row.role != "variant" or not is_quantized(model):
        return quality
    before = load_model(row.before.model_path) if row.before is not None else None
    statistics = load_calibration(row.calibration.path).tensors if row.calibration is not None else {}
    details = dict(quality.details)
    if ranges := range_details(model, before, statistics):
        details["ranges"] = ranges
    data = config.data.evaluation or config.data.calibration
    if data is not None:
        macs = next((metric.value for metric in quality.metrics if metric.name == "macs"), None)
        details["nodes"] = node_details(
            load_model(row.reference.model_path), model, data, macs, size_bytes(row.reference.path)
        )
    return replace(quality, details=details)


def node_details(
    reference: onnx.ModelProto, model: onnx.ModelProto, data: Data, macs: float | None, size: int
) -> dict[str, Any]:
    """Where a model's error is born, as plain JSON, if that is soon found out.

    Args:
        reference: The float model; nodes without a name get one.
        model: The quantized one.
        data: Samples; the first eight at most are looked at, fewer where they cost too much.
        macs: Multiply-accumulates of one inference; None where nobody knows.
        size: Bytes of the float model.

    Returns:
        ``samples``; ``measured``, how many nodes were; ``unmatched``, how many have no counterpart; ``nodes``, at most
        `MAX_NODES`: each with ``node``, ``op_type``, ``tensor``, ``place`` in the float graph, ``local_sqnr_db`` (with
        the float model's inputs), ``propagated_sqnr_db`` (as it runs), ``output_sqnr_db`` (of the outputs if this node
        alone were quantized), ``noise_ratio`` (its share of what all do to the outputs), and where something is wrong
        ``cause``, ``text`` and ``change``. Decibels are None for no error. Else ``declined``, the reason.
    """
    name_nodes(reference)
    places = {node.name: place for place, node in enumerate(reference.graph.node)}
    reason, samples = _affordable(len(places), macs, size)
    if reason is not None:
        return {"declined": f"{reason}: onnxshrink explain finds out where the error is born, and takes its time"}
    batch = max(
        (spec.shape[0] for spec in input_specs(reference) if spec.shape and isinstance(spec.shape[0], int)), default=1
    )
    count = max(samples // batch, 1) * batch
    limited = data.model_copy(update={"max_samples": min(count, data.max_samples or count)})
    try:
        found = explain_models(reference, model, limited)
    except Exception as e:  # noqa: BLE001  # evidence for a picture must not cost the run, whatever graph it cannot take
        return {"declined": f"{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}"}
    return _as_json(found, places)


def _affordable(nodes: int, macs: float | None, size: int) -> tuple[str | None, int]:
    """Why it is not looked, or None; and on how many samples."""
    if macs is None:
        return "the multiply-accumulates of the model are not known", 0
    if nodes > MAX_GRAPH_NODES:
        return f"the model has {nodes:,} nodes", 0
    if size > MAX_BYTES:
        return f"the float model has {size:,} bytes", 0
    samples = int(MAX_MACS / max(macs * nodes, 1.0))
    if not samples:
        return f"{nodes:,} nodes at {macs:,.0f} multiply-accumulates would take too long in every run", 0
    return None, min(samples, MAX_SAMPLES)


def _as_json(found: Explanation, places: Mapping[str, int]) -> dict[str, Any]:
    return {
        "samples": found.samples,
        "measured": len(found.nodes),
        "unmatched": len(found.unmatched),
        "nodes": [_node(node, places.get(node.node)) for node in found.nodes[:MAX_NODES]],
    }


def _node(error: NodeError, place: int | None) -> dict[str, Any]:
    decibels = {name: getattr(error, name) for name in ("local_sqnr_db", "propagated_sqnr_db", "output_sqnr_db")}
    found = error.finding
    return {
        "node": error.node,
        "op_type": error.op_type,
        "tensor": error.tensor,
        "place": place,
        **{name: None if value is None else round(value, 2) for name, value in decibels.items()},
        "noise_ratio": round(error.noise_ratio, 5),
        **({} if found.cause == "none" else {"cause": found.cause, "text": found.text, "change": found.change}),
    }

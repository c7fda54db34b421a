"""Which share of a model's multiply-accumulates runs in integer kernels, and what keeps the rest in float.

A file that says int8 need not run in int8: ONNX Runtime computes every DequantizeLinear, node, QuantizeLinear that it
cannot fuse in float, without a word. So the graph is read that a session really runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxshrink.config.gates import Target
from onnxshrink.config.stages import Isa
from onnxshrink.core.errors import ModelError, ProviderError
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import Batch, TensorSpec
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.runtime.parity import AXIS_LENGTHS, axis_lengths, random_batch
from onnxshrink.runtime.session import Optimization, Session
from onnxshrink.verify.causes import RunGraph
from onnxshrink.verify.islands import Island, find_islands, island_of_nodes
from onnxshrink.verify.macs import Row, multiplies, row_of
from onnxshrink.verify.segments import Segment, find_segments, segment_details

_FILE = "optimized.onnx"
_WEIGHTS = "optimized.weights"
_PROBE = "shape of "
# The blocked layout of float convolutions pads their channels, and padding is no work of the model's.
_CONFIG = {
    "optimization.disable_specified_optimizers": "NchwcTransformer",
    "session.optimized_model_external_initializers_file_name": _WEIGHTS,
    "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
}
_FLOATS = {"float32", "float16", "float64", "bfloat16"}


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one session runs in integers.

    Attributes:
        rows: Every node that multiplies, in the order of the graph.
        islands: Connected float nodes, those with the most multiply-accumulates first.
        segments: All nodes in the order of the graph, in stretches that compute alike.
    """

    rows: tuple[Row, ...]
    islands: tuple[Island, ...]
    segments: tuple[Segment, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(row.macs for row in self.rows)

    @property
    def ratio(self) -> float | None:
        """Share of the multiply-accumulates that integer kernels do; None where there are none at all."""
        return sum(row.integer_macs for row in self.rows) / self.macs if self.macs else None

    @property
    def note(self) -> str | None:
        """The largest float island and its cause, in one line; None where nothing that counts is in float."""
        if not self.islands or not self.islands[0].macs:
            return None
        island = self.islands[0]
        more = f" and {len(island.nodes) - 1} more" if len(island.nodes) > 1 else ""
        where = f"{island.macs / self.macs:.0%} at {island.main_node!r}{more}"
        return f"the largest float island, {where}: {island.cause}"


def audit(
    path: Path,
    target: Target | None = None,
    *,
    batch: Batch | None = None,
    optimization: Optimization | None = None,
    isa: Isa | None = None,
) -> Coverage:
    """Open a session, read the graph that it runs, and count.

    Shapes are those of one real inference of that graph. What lies within If, Loop and Scan is not looked into.

    Args:
        path: The ``.onnx`` file.
        target: Where it runs; the CPU by default.
        batch: One inference's inputs; seeded noise at several axis lengths by default.
        optimization: The session's level; the target's by default.
        isa: The processor's instruction set, for the causes; this machine's by default.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or run it on ``batch``.
        ProviderError: The target's provider is not there.
    """
    target = target or Target()
    optimization = optimization or target.optimization
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        saved = Path(folder) / _FILE
        session = Session(path, target, optimization=optimization, config=_CONFIG, save_optimized=saved, name=str(path))
        specs = session.inputs
        del session
        model = onnx.load(str(saved), load_external_data=False)
        outputs = [name for node in model.graph.node for name in node.output if name]
        dtypes = {spec.name: spec.dtype for spec in (*specs, *_types(model, outputs, saved.parent, target))}
        dtypes |= {
            tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
            for tensor in model.graph.initializer
        }
        counted = [node for node in model.graph.node if multiplies(node) and _computes(node, dtypes)]
        shapes = _shapes(model, _tensors_of(counted), saved.parent, target, batch, where=str(path))
    rows = tuple(row_of(node, shapes) for node in counted)
    graph = RunGraph(model.graph, dtypes, optimization, target.provider, isa or detect_isa())
    row_of_nodes = {node.output[0]: row for node, row in zip(counted, rows, strict=True)}
    islands = island_of_nodes(graph, row_of_nodes)
    return Coverage(rows, find_islands(islands), find_segments(graph, row_of_nodes, islands))


def measure_work(
    path: Path, target: Target, batch: Batch, *, quantized: bool
) -> tuple[tuple[Metric, Metric], list[dict[str, Any]]]:
    """``macs`` and ``integer_coverage`` of a model on a target; the coverage has its largest float island as the note.

    A model whose optimized graph cannot be read back has no value: the audit must not stop what ONNX Runtime can run.

    Args:
        path: The ``.onnx`` file.
        target: Where it runs.
        batch: One inference's inputs, whose multiply-accumulates are counted.
        quantized: Whether any of it is meant to run in integers; else the coverage is 0 without a cause.

    Returns:
        The metrics, and the graph as of `segment_details`; empty where it is not quantized or cannot be read back.
    """
    float_share = Metric("integer_coverage", 0.0, "ratio", target=target.name)
    try:
        coverage = audit(path, target, batch=batch)
    except (ModelError, ProviderError) as e:  # a provider that compiles its nodes does not show them
        macs = Metric("macs", None, "count", target=target.name, note=e.what)
        return (macs, replace(float_share, value=None, note=e.what) if quantized else float_share), []
    note = coverage.note if coverage.macs else "the model has no multiply-accumulates"
    macs = Metric("macs", float(coverage.macs), "count", target=target.name)
    if not quantized:
        return (macs, float_share), []
    return (macs, replace(float_share, value=coverage.ratio, note=note)), segment_details(coverage.segments)


def _computes(node: onnx.NodeProto, dtypes: Mapping[str, str]) -> bool:
    """False for products of plain integers, which are arithmetic on shapes."""
    plain = node.op_type in {"MatMul", "Gemm", "Einsum"}
    return not plain or dtypes.get(node.output[0]) in _FLOATS


def _tensors_of(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    return list(dict.fromkeys(name for node in nodes for name in (*node.input, node.output[0]) if name))


def _types(model: onnx.ModelProto, tensors: Sequence[str], folder: Path, target: Target) -> tuple[TensorSpec, ...]:
    """The element type of each tensor, as ONNX Runtime infers it: it knows its own operators, onnx does not."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    return _open(shown, folder, target, name="the optimized model").outputs


def _shapes(
    model: onnx.ModelProto, tensors: Sequence[str], folder: Path, target: Target, batch: Batch | None, *, where: str
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in one inference; only the shapes leave the session, so no tensor is kept."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    for name in tensors:
        shown.graph.node.append(onnx.helper.make_node("Shape", [name], [_PROBE + name]))
        shown.graph.output.append(onnx.ValueInfoProto(name=_PROBE + name))
    if not tensors:
        return {}
    session = _open(shown, folder, target, name=where)
    tries = [batch] if batch is not None else _noise(session.inputs)
    for index, tried in enumerate(tries):
        try:
            values = session.run(tried)
        except ModelError as e:
            if index < len(tries) - 1:
                continue
            raise ModelError(
                e.what,
                where=where,
                want="samples of a shape the model takes",
                fix=e.fix or "give samples: --data samples.npz",
            ) from e
        return {name: tuple(map(int, values[_PROBE + name])) for name in tensors}
    raise AssertionError("there is always a batch to try")


def _noise(specs: Sequence[TensorSpec]) -> list[Batch]:
    return [random_batch(specs, axis_lengths(specs, batch=1, length=length), seed=0) for length in AXIS_LENGTHS]


def _open(model: onnx.ModelProto, folder: Path, target: Target, *, name: str) -> Session:
    """A session on a graph that is optimized already, beside the file with its weights."""
    path = folder / "shown.onnx"
    onnx.save(model, str(path))
    return Session(path, target, optimization="disabled", name=name)

"""Why a candidate is not its reference: node by node, with causes and the settings that would mend them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from ruamel.yaml import YAML

from onnxshrink.config.data import Data, NpzData
from onnxshrink.config.stages import Isa
from onnxshrink.core.events import Events, Logged, Silent
from onnxshrink.core.files import require_files
from onnxshrink.core.report import finite
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model, name_nodes
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.runtime.session import Session
from onnxshrink.verify.diagnosis import Finding, diagnose
from onnxshrink.verify.error_sums import Measured, ratio
from onnxshrink.verify.graph_tensors import Tensors
from onnxshrink.verify.local_error import Deployed, measure_pieces
from onnxshrink.verify.pairing import Pair, pair_up

MAX_SAMPLES = 32
"""Samples by default: an error of a node is millions of values in one of them."""

MAX_BYTES = 256 << 20
"""What the tensors of one window may take by default."""

WORTH_FLOAT = 0.02
"""Share of what differs from which a node is worth leaving in float, where it is slower and takes conversions around.

EfficientNet-Lite0 with one scale per tensor: of 19 findings 15 call for one scale per channel, which takes the outputs
from 10.9 to 22.3 dB; the other four do 0.3% and less of what differs.
"""

_BATCH = 4


@dataclass(frozen=True, slots=True)
class NodeError:
    """One node of the reference, as the candidate computes it.

    Attributes:
        node: Its name.
        op_type: Its operator.
        tensor: Its result in the reference.
        local_sqnr_db: With the reference's inputs; None for no error at all.
        propagated_sqnr_db: In the candidate as it runs; None likewise.
        output_sqnr_db: Of the model's worst output if this node alone were the candidate's; None likewise.
        noise_ratio: Its share of what all nodes do to the outputs, each alone, 0 to 1.
        finding: Why.
    """

    node: str
    op_type: str
    tensor: str
    local_sqnr_db: float | None
    propagated_sqnr_db: float | None
    output_sqnr_db: float | None
    noise_ratio: float
    finding: Finding


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found of a pair of models.

    Attributes:
        reference: Path of the one.
        candidate: Path of the other.
        samples: Samples that were run.
        isa: The processor that the candidate was judged for.
        sqnr_db: Of each output of the reference; None for no error, or one that is not finite.
        nodes: The worst first.
        unmatched: Nodes of the reference that nothing in the candidate could be told to stand for.
        by_structure: How many tensors have other names and were matched by the order of operators.
        windows: How many windows of tensors were looked at.
        patch: The stage with the settings that mend most of it; empty where none would.
    """

    reference: str
    candidate: str
    samples: int
    isa: Isa
    sqnr_db: Mapping[str, float | None]
    nodes: tuple[NodeError, ...]
    unmatched: tuple[str, ...]
    by_structure: int
    windows: int
    patch: Mapping[str, Any]

    @property
    def findings(self) -> tuple[NodeError, ...]:
        """The nodes with a cause, one for each tensor at fault, the worst first."""
        found: dict[tuple[str, str], NodeError] = {}
        for node in self.nodes:
            if node.finding.cause != "none":
                found.setdefault((node.finding.cause, node.finding.tensor), node)
        return tuple(found.values())

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def to_yaml(self) -> str:
        """The patch as one item of a config's list of stages."""
        yaml, text = YAML(), io.StringIO()
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.dump([dict(self.patch)] if self.patch else [], text)
        return text.getvalue()


def explain(
    reference: str | Path,
    candidate: str | Path,
    data: str | Path,
    *,
    max_samples: int | None = MAX_SAMPLES,
    max_bytes: int = MAX_BYTES,
    isa: Isa | None = None,
    events: Events | None = None,
) -> Explanation:
    """Find the nodes that make a candidate differ, and say why.

    Args:
        reference: The float ``.onnx`` file.
        candidate: The same network quantized, in float16, or otherwise rewritten.
        data: Samples, ``.npz``.
        max_samples: Use at most this many, the first ones.
        max_bytes: What the tensors that are looked at together may take.
        isa: The processor that the candidate is for; this machine's by default. Saturation is emulated for x86 without
            VNNI where this is another.
        events: Listener for progress.

    Raises:
        ConfigError: A file is not there.
        DataError: The samples do not fit.
        ModelError: The models have nothing in common.
    """
    reference, candidate, data = Path(reference), Path(candidate), Path(data)
    require_files(reference=reference, candidate=candidate, data=data)
    return explain_models(
        load_model(reference),
        load_model(candidate),
        NpzData.model_validate({"npz": data, "max_samples": max_samples}),
        names=(str(reference), str(candidate)),
        max_bytes=max_bytes,
        isa=isa,
        events=events or Logged(),
    )


def explain_models(
    reference: onnx.ModelProto,
    candidate: onnx.ModelProto,
    data: Data,
    *,
    names: tuple[str, str] = ("reference", "candidate"),
    max_bytes: int = MAX_BYTES,
    isa: Isa | None = None,
    events: Events | None = None,
    deployed: Deployed | None = None,
) -> Explanation:
    """`explain` for models in memory.

    Args:
        reference: The float model; nodes without a name get one.
        candidate: The other.
        data: Samples.
        names: What to call the two.
        max_bytes: As of `explain`.
        isa: As of `explain`.
        events: Listener for progress.
        deployed: Opens pieces as they are deployed; every optimization of ONNX Runtime by default.

    Raises:
        DataError: The samples do not fit.
        ModelError: The models have nothing in common.
    """
    for model in (reference, candidate):
        name_nodes(model)
    reader = open_reader(data, input_specs(reference), batch_size=_BATCH)
    first = next(iter(reader))
    shapes = {name: tuple(array.shape) for name, array in first.items()}
    tensors = Tensors(reference, shapes, name=names[0])
    others = dict(zip((s.name for s in input_specs(candidate)), (shapes[s.name] for s in tensors.inputs), strict=False))
    pair = pair_up(tensors, Tensors(candidate, shapes | others, name=names[1]))
    here = detect_isa()
    wanted = isa or here
    listener = events or Silent()
    measured = measure_pieces(
        pair,
        reader,
        max_bytes=max_bytes,
        emulate_saturation=wanted == "x86_avx2",
        deployed=deployed or (lambda model: Session(model, name="the candidate's pieces")),
        progress=lambda done, total: listener.progress("explain", done, total, "windows"),
    )
    nodes = tuple(_ranked(measured, pair, sees_saturation=here == wanted == "x86_avx2"))
    return Explanation(
        reference=names[0],
        candidate=names[1],
        samples=measured.samples,
        isa=wanted,
        sqnr_db={name: _decibels(ratio(error, signal)) for name, (signal, error) in measured.output.items()},
        nodes=nodes,
        unmatched=pair.unmatched,
        by_structure=pair.by_structure,
        windows=measured.windows,
        patch=_patch(nodes, candidate),
    )


def _ranked(measured: Measured, pair: Pair, *, sees_saturation: bool) -> Iterator[NodeError]:
    """The nodes, those first that do most to the outputs."""
    total = sum(error.contribution for error in measured.pieces if math.isfinite(error.contribution))
    for error in sorted(measured.pieces, key=lambda error: (-error.contribution, -error.local_noise)):
        finding = diagnose(error, measured, pair, sees_saturation=sees_saturation)
        share = error.contribution / total if total and math.isfinite(error.contribution) else 0.0
        yield NodeError(
            error.piece.node,
            error.piece.op_type,
            error.piece.reference,
            _decibels(error.local_noise),
            _decibels(ratio(error.propagated, error.signal)),
            _decibels(error.contribution),
            share,
            finding,
        )


def _decibels(noise: float) -> float | None:
    return finite(-10 * math.log10(noise)) if 0 < noise < math.inf else None


def _patch(nodes: tuple[NodeError, ...], candidate: onnx.ModelProto) -> dict[str, Any]:
    """One stage with the settings that mend most: those of the whole stage first, which leave no node in float.

    A node is left in float where it does more than `WORTH_FLOAT` of what these do not mend.
    """
    kind = _stage_of(candidate)
    allowed = _SETTINGS.get(kind, set())
    found = [(node, name, value) for node in nodes for name, value in node.finding.settings.items()]
    whole = {name: value for _, name, value in found if name in allowed and name != "exclude_nodes"}
    left = 1 - sum(node.noise_ratio for node, name, _ in found if name in whole)
    setting = "keep_nodes" if kind == "to_fp16" else "exclude_nodes"
    names = [
        one
        for node, name, value in found
        if name == "exclude_nodes" and setting in allowed
        if node.output_sqnr_db is None or node.noise_ratio > WORTH_FLOAT * left
        for one in value
    ]
    patch = whole | ({setting: list(dict.fromkeys(names))} if names else {})
    return {"kind": kind, **patch} if patch else {}


# Others may mend as well: `types`, the method `mse`, an `equalize` stage before. Nothing here tells that they would.
_SETTINGS: dict[str, set[str]] = {
    "quantize_static": {"granularity", "method", "reduce_range", "exclude_nodes"},
    "quantize_dynamic": {"granularity", "reduce_range", "exclude_nodes"},
    "quantize_weights": {"exclude_nodes"},
    "to_fp16": {"keep_nodes"},
}


def _stage_of(model: onnx.ModelProto) -> str:
    """The stage whose work the candidate looks like; empty for a float model."""
    types = {node.op_type for node in model.graph.node}
    if "DynamicQuantizeLinear" in types:
        return "quantize_dynamic"
    if "QuantizeLinear" in types:
        return "quantize_static"
    if types & {"DequantizeLinear", "MatMulNBits", "GatherBlockQuantized"}:
        return "quantize_weights"
    halves = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return "to_fp16" if halves else ""

"""How much each group of nodes costs in accuracy when it is quantized, and in work when it is not.

A group is a node that multiplies, with what follows it up to the next one: only together do they keep the tensors
between them in float. Each is measured by what the outputs gain when it alone returns to float and the rest stays in
8 bits, for that is the question a mixed scheme asks. It is the deployed model that is measured, on ONNX Runtime's own
integer kernels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxshrink.core.artifact import Facts
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import DataError
from onnxshrink.core.report import finite
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.graph import save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.hold_float import hold_float
from onnxshrink.stages.quantize_static import StaticPlan, quantizable_op_types
from onnxshrink.stages.reduce_range import forecast_samples
from onnxshrink.verify.coverage import audit
from onnxshrink.verify.macs import label, multiplies


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that are quantized or left in float together.

    Attributes:
        nodes: Their names, in the order of the graph; the first one multiplies, if any does.
        macs_ratio: Their share of the model's multiply-accumulates, 0 to 1.
    """

    nodes: tuple[str, ...]
    macs_ratio: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one group's 8 bits cost.

    Attributes:
        group: The group.
        sqnr_db: Of the outputs, when it alone is in float; infinite for outputs without any error.
        gain: Share of the all-int8 model's noise that its 8 bits cause, at most 1; below 0 if they cancel other noise.
    """

    group: Group
    sqnr_db: float
    gain: float

    @property
    def worth(self) -> float:
        """Gain for the work that the group's return to float takes; one without products counts as a thousandth."""
        return self.gain / max(self.group.macs_ratio, 1e-3)

    def facts(self) -> Facts:
        """As plain JSON."""
        return {
            "nodes": list(self.group.nodes),
            "macs_ratio": self.group.macs_ratio,
            "sqnr_db": finite(self.sqnr_db),
            "gain": self.gain,
        }


class Trials:
    """A model quantized again and again with other nodes in float, each time measured on the same few samples.

    Args:
        plan: What is decided but for the nodes.
        ctx: The run; up to 16 of its calibration samples are held, and the float model's outputs on them.

    Raises:
        DataError: There are no calibration samples.
    """

    def __init__(self, plan: StaticPlan, ctx: Context) -> None:
        self.plan = plan
        self._step = ctx.step
        self.model = plan.corrected(ctx)[0] if plan.settings.bias_correction else plan.model
        self._batches: Sequence[Batch] = list(forecast_samples(ctx, plan.model))
        if not self._batches:
            raise DataError("there are no calibration samples", where=ctx.step, want="at least one sample")
        reference = Session(plan.model.SerializeToString(), name=ctx.step)
        self._wanted: list[dict[str, Array]] = [reference.run(batch) for batch in self._batches]

    def noise(self, in_float: Collection[str] = ()) -> float:
        """Error power over signal power of the worst output, when these nodes stay in float as well."""
        quantized = self.plan.quantized(in_float, model=_uncorrected(self.model, self.plan.model, in_float))
        hold_float(quantized)
        return self.noise_of(quantized.SerializeToString())

    def noise_of(self, model: bytes | Path) -> float:
        """Error power over signal power of a finished model's worst output; infinite where one is no number."""
        session = Session(model, name=self._step)
        drifts = {name: Drift(name) for name in self._wanted[0]}
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            got = session.run(batch)
            drifts = {name: drift.update(wanted[name], got[name]) for name, drift in drifts.items()}
        return max(math.inf if drift.flaw else 10 ** (-drift.sqnr_db / 10) for drift in drifts.values())

    def groups(self) -> tuple[Group, ...]:
        """Everything that is quantized, in groups, in the order of the graph."""
        with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
            path = save_model(self.plan.model, Path(folder))
            coverage = audit(path, batch=self._batches[0], optimization="disabled")
        macs = {row.name: row.macs for row in coverage.rows}
        labels = {node.name: label(node) for node in self.plan.model.graph.node}
        total = max(coverage.macs, 1)
        return tuple(
            Group(nodes, sum(macs.get(labels[name], 0) for name in nodes) / total)
            for nodes in node_groups(self.plan.model, quantizable_op_types(self.plan.settings), set(self.plan.excluded))
        )


def measure_sensitivity(trials: Trials, ctx: Context) -> tuple[float, tuple[Sensitivity, ...]]:
    """Return each group to float by itself, and measure.

    Returns:
        The SQNR of the all-int8 model in dB, and the groups, the most worthwhile first; ties in the order of the graph.
    """
    everything = trials.noise()
    groups = trials.groups()
    measured = []
    for done, group in enumerate(groups):
        noise = trials.noise(group.nodes)
        gain = (everything - noise) / everything if 0 < everything < math.inf else float(noise < everything)
        measured.append(Sensitivity(group, decibels(noise), gain))
        ctx.events.progress(ctx.step, done + 1, len(groups), "sensitivity")
    return decibels(everything), tuple(sorted(measured, key=lambda one: -one.worth))


def decibels(noise: float) -> float:
    """SQNR in dB of error power over signal power; infinite for none."""
    return -10 * math.log10(noise) if noise else math.inf


def node_groups(
    model: onnx.ModelProto, op_types: Iterable[str], excluded: Collection[str]
) -> tuple[tuple[str, ...], ...]:
    """The nodes to be quantized, each in one group.

    A node that multiplies begins a group; another one joins the latest group that it reads from, through whatever
    nodes lie between.

    Args:
        model: Its nodes in topological order, each with a name.
        op_types: Operator types that are quantized.
        excluded: Names of nodes that are not.
    """
    wanted = set(op_types)
    groups: list[list[str]] = []
    owners: dict[str, int] = {}
    for node in model.graph.node:
        owner = max((owners[name] for name in node.input if name in owners), default=-1)
        if node.op_type in wanted and node.name not in excluded:
            if owner < 0 or multiplies(node):
                owner = len(groups)
                groups.append([])
            groups[owner].append(node.name)
        if owner >= 0:
            owners.update(dict.fromkeys(node.output, owner))
    return tuple(map(tuple, groups))


def _uncorrected(corrected: onnx.ModelProto, original: onnx.ModelProto, nodes: Collection[str]) -> onnx.ModelProto:
    """``corrected`` with the original bias at ``nodes``: float weights need no correction."""
    if corrected is original or not nodes:
        return corrected
    model = onnx.ModelProto()
    model.CopyFrom(corrected)
    before = {node.name: node for node in original.graph.node if node.name in nodes}
    for node in model.graph.node:
        if node.name in before:
            del node.input[:]
            node.input.extend(before[node.name].input)
    there = {tensor.name for tensor in model.graph.initializer}
    model.graph.initializer.extend(tensor for tensor in original.graph.initializer if tensor.name not in there)
    return model

"""How much each group of nodes costs in accuracy and in time under each scheme.

A group is a node that multiplies, with what follows it up to the next one: only together do they keep the tensors
between them in one form. Each is measured by what the outputs gain, and what an inference takes longer, when it alone
leaves the base's scheme, for that is the question a mixed scheme asks. It is the deployed model that is measured, on
ONNX Runtime's own kernels, drift and time in the same runs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx

from onnxshrink.config.stages import NodeScheme, QuantizeMixed
from onnxshrink.core.artifact import Facts
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.report import finite
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.runtime.graph import save_model
from onnxshrink.runtime.profile import Kernels
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.hold_float import hold_float
from onnxshrink.stages.node_cost import Ratio, Stopwatch, excess_us
from onnxshrink.stages.quantize_static import StaticPlan
from onnxshrink.stages.reduce_range import forecast_samples
from onnxshrink.stages.schemes import finish_schemes, fixed_nodes, takeable
from onnxshrink.verify.coverage import audit
from onnxshrink.verify.macs import label, multiplies

Mixture: TypeAlias = tuple[NodeScheme, ...]
"""What each group becomes, in the order of the groups."""

_MATTERS = 0.01
"""Other schemes are tried where float would take this share of the noise away; elsewhere they have nothing to win."""


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes that take a scheme together.

    Attributes:
        nodes: Their names, in the order of the graph; the first one multiplies, if any does.
        macs_ratio: Their share of the model's multiply-accumulates, 0 to 1.
        schemes: What the group can become, in the order of the settings; a node of it that cannot stays in float.
    """

    nodes: tuple[str, ...]
    macs_ratio: float
    schemes: tuple[NodeScheme, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A mixture, measured.

    Attributes:
        noise: Error power over signal power of the worst output; infinite where one is no number.
        kernels: What its kernels took.
    """

    noise: float
    kernels: Kernels

    @property
    def sqnr_db(self) -> float:
        """The noise in decibels; infinite for none."""
        return decibels(self.noise)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What one group's change of scheme does to the base.

    Attributes:
        place: The group's place among the groups.
        group: The group.
        scheme: What it becomes.
        sqnr_db: Of the outputs then; infinite for outputs without any error.
        gain: Share of the base's noise that goes away, at most 1; below 0 if noise is added.
        time_ratio: What an inference takes longer, as a share of the float model's; below 0 if it gets shorter.
    """

    place: int
    group: Group
    scheme: NodeScheme
    sqnr_db: float
    gain: float
    time_ratio: float

    @property
    def worth(self) -> float:
        """Gain for the time it takes; what takes less than a thousandth counts as that."""
        return self.gain / max(self.time_ratio, 1e-3)

    def facts(self) -> Facts:
        """As plain JSON."""
        return {
            "nodes": list(self.group.nodes),
            "macs_ratio": self.group.macs_ratio,
            "scheme": self.scheme,
            "sqnr_db": finite(self.sqnr_db),
            "gain": self.gain,
            "time_ratio": self.time_ratio,
        }


class Trials:
    """A model made again and again as other mixtures, each time measured on the same few samples.

    Args:
        plan: What is decided for static quantization.
        settings: The stage's.
        ctx: The run; up to 16 of its calibration samples are held, and the float model's outputs on them.
        stopwatch: Measures time.

    Raises:
        ConfigError: An override that names no node, or asks for what its node cannot become.
        DataError: There are no calibration samples.
    """

    def __init__(self, plan: StaticPlan, settings: QuantizeMixed, ctx: Context, stopwatch: Stopwatch) -> None:
        self.plan = plan
        self.takes = takeable(plan, settings)
        self.fixed = fixed_nodes(settings, plan.model, self.takes)
        self.limit = settings.max_float_ratio
        self._settings = settings
        self._ctx = ctx
        self._stopwatch = stopwatch
        self._done: dict[Mixture, Trial] = {}
        batches = forecast_samples(ctx, plan.model)
        self._batches: Sequence[Batch] = list(batches)
        if not self._batches:
            raise DataError("there are no calibration samples", where=ctx.step, want="at least one sample")
        self.groups = self._groups()
        self._model: onnx.ModelProto | None = None
        self._wanted: list[dict[str, Array]] = []

    def single(self, scheme: NodeScheme) -> Mixture:
        """This scheme wherever it can be, and float elsewhere."""
        return tuple(scheme if scheme in group.schemes else "float" for group in self.groups)

    def nodes(self, mixture: Mixture) -> dict[str, NodeScheme]:
        """What every node becomes that could be anything but float."""
        schemes: dict[str, NodeScheme] = dict.fromkeys(self.takes, "float")
        for group, scheme in zip(self.groups, mixture, strict=True):
            schemes |= {name: scheme for name in group.nodes if scheme in self.takes[name]}
        return schemes | {name: scheme for name, scheme in self.fixed.items() if name in schemes}

    def float_ratio(self, mixture: Mixture) -> float:
        """Share of the multiply-accumulates that stays in float though an 8-bit scheme exists for them."""
        pairs = zip(self.groups, mixture, strict=True)
        return math.fsum(group.macs_ratio for group, scheme in pairs if scheme == "float")

    def allows(self, mixture: Mixture) -> bool:
        """True if no more is in float than the settings allow."""
        return self.float_ratio(mixture) <= self.limit + 1e-9

    def trial(self, mixture: Mixture) -> Trial:
        """Make a mixture, unless that was done before, and measure it; one that cannot run has infinite noise."""
        if mixture not in self._done:
            try:
                self._done[mixture] = self.measured(self.made(mixture))
            except ModelError as e:
                self._ctx.events.warned(f"{self._ctx.step}: a mixture was left out: {e.what}")
                self._done[mixture] = Trial(math.inf, {})
        return self._done[mixture]

    def measured(self, model: bytes) -> Trial:
        """Drift and kernel times of a finished model.

        Raises:
            ModelError: ONNX Runtime cannot load or run it.
        """
        if not self._wanted:
            reference = Session(self.plan.model.SerializeToString(), name=self._ctx.step)
            self._wanted = [reference.run(batch) for batch in self._batches]
        outputs, kernels = self._stopwatch.kernels(model, self._batches, name=self._ctx.step)
        drifts = {name: Drift(name) for name in self._wanted[0]}
        for wanted, got in zip(self._wanted, outputs, strict=True):
            drifts = {name: drift.update(wanted[name], got[name]) for name, drift in drifts.items()}
        noise = max(math.inf if drift.flaw else 10 ** (-drift.sqnr_db / 10) for drift in drifts.values())
        return Trial(noise, kernels)

    def ratio(self, reference: Mixture, candidate: Mixture) -> Ratio:
        """Time of one mixture over that of another, from interleaved pairs, and its interval."""
        models = self.made(reference), self.made(candidate)
        return self._stopwatch.ratio(*models, self._batches[0], name=self._ctx.step)

    def made(self, mixture: Mixture) -> bytes:
        """The model of a mixture, serialized.

        Raises:
            ModelError: ONNX Runtime's quantizers do not understand the graph.
        """
        schemes = self.nodes(mixture)
        others = [name for name, scheme in schemes.items() if scheme != "static"]
        if len(others) == len(schemes):
            model = onnx.ModelProto()
            model.CopyFrom(self.plan.model)
        else:
            if self._model is None:
                corrects = self.plan.settings.bias_correction
                self._model = self.plan.corrected(self._ctx)[0] if corrects else self.plan.model
            model = self.plan.quantized(others, model=_uncorrected(self._model, self.plan.model, others))
            hold_float(model)
        serialized: bytes = finish_schemes(model, schemes, self._settings, where=self._ctx.step).SerializeToString()
        return serialized

    def _groups(self) -> tuple[Group, ...]:
        """Every node that has a choice, in groups, in the order of the graph."""
        asked = self._settings.schemes
        free = {
            name: schemes
            for name, schemes in self.takes.items()
            if name not in self.fixed and not schemes.isdisjoint(asked)
        }
        with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
            path = save_model(self.plan.model, Path(folder))
            coverage = audit(path, batch=self._batches[0], optimization="disabled")
        macs = {row.name: row.macs for row in coverage.rows}
        labels = {node.name: label(node) for node in self.plan.model.graph.node}
        total = max(coverage.macs, 1)
        found = []
        for nodes in node_groups(self.plan.model, free):
            possible = {"float", *(scheme for name in nodes for scheme in free[name])}
            ratio = sum(macs.get(labels[name], 0) for name in nodes) / total
            found.append(Group(nodes, ratio, tuple(scheme for scheme in asked if scheme in possible)))
        return tuple(found)


def measure_sensitivity(trials: Trials, base: Mixture, base_ratio: float, ctx: Context) -> tuple[Sensitivity, ...]:
    """Give each group its other schemes by itself, and measure.

    Float comes first, as it tells what a group's noise is; a group without noise to speak of is not tried further.

    Args:
        trials: Measures mixtures.
        base: The mixture to start from.
        base_ratio: Its time over that of the float model.
        ctx: The run.

    Returns:
        The groups with their schemes, the most worthwhile first; ties in the order of the graph.
    """
    before = trials.trial(base)
    whole_us = sum(before.kernels.values()) / base_ratio if before.kernels else 0.0
    measured = []
    for place, group in enumerate(trials.groups):
        for scheme in sorted(group.schemes, key=lambda scheme: scheme != "float"):
            if scheme == base[place]:
                continue
            after = trials.trial((*base[:place], scheme, *base[place + 1 :]))
            gain = (before.noise - after.noise) / before.noise if 0 < before.noise < math.inf else 0.0
            gain = float(after.noise < before.noise) if before.noise == math.inf else gain
            time_ratio = excess_us(before.kernels, after.kernels) / whole_us if whole_us and after.kernels else 0.0
            if math.isfinite(gain):
                measured.append(Sensitivity(place, group, scheme, after.sqnr_db, gain, time_ratio))
            if scheme == "float" and gain < _MATTERS:
                break
        ctx.events.progress(ctx.step, place + 1, len(trials.groups), "sensitivity")
    return tuple(sorted(measured, key=lambda one: -one.worth))


def decibels(noise: float) -> float:
    """SQNR in dB of error power over signal power; infinite for none."""
    return -10 * math.log10(noise) if noise else math.inf


def node_groups(model: onnx.ModelProto, wanted: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The nodes that have a choice, each in one group.

    A node that multiplies begins a group; another one joins the latest group that it reads from, through whatever
    nodes lie between.

    Args:
        model: Its nodes in topological order, each with a name.
        wanted: Names of the nodes.
    """
    groups: list[list[str]] = []
    owners: dict[str, int] = {}
    for node in model.graph.node:
        owner = max((owners[name] for name in node.input if name in owners), default=-1)
        if node.name in wanted:
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

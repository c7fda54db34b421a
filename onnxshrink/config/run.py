"""The whole config of a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import Model
from onnxshrink.config.budget import Budget
from onnxshrink.config.card import Card
from onnxshrink.config.data import DataRoles, ImageData
from onnxshrink.config.gates import Gates, Select, Target
from onnxshrink.config.metrics import SHARES, name_of
from onnxshrink.config.source import ModelSource
from onnxshrink.config.stages import (
    BLOCKS_OPSET,
    Export,
    Finetune,
    PackageOrt,
    PruneChannels,
    QuantizeStatic,
    QuantizeWeights,
    Stage,
)
from onnxshrink.config.training import Learning
from onnxshrink.core.artifact import Kind

RESERVED = ("original", "reference", "source", "teacher", "unpruned")
"""Rows of the report that are no variants."""


class RunConfig(Model):
    """A model, its data, what to do with it, where to measure it and what it must reach."""

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder; the config file's name by default."""
    model: ModelSource
    """Where the model comes from."""
    data: DataRoles = DataRoles()
    """Which samples serve which purpose."""
    stages: tuple[Stage, ...] = ()
    """The trunk: what is done to the model, in order."""
    variants: dict[str, tuple[Stage, ...]] = Field(default={"model": ()}, min_length=1)
    """Branches that continue the trunk; each is measured, and one is selected."""
    targets: tuple[Target, ...] = Field(default=(Target(),), min_length=1)
    """Where to measure."""
    gates: Gates = Gates()
    """What a variant must reach to be selected."""
    select: Select = "smallest"
    """Which of the variants that pass every gate wins."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything random."""
    budget: Budget | None = None
    """What the result must fit into; with it, variants are searched for instead of only compared."""
    card: Card = Card()
    """What the model card says besides what was measured."""

    def branches(self) -> Iterator[tuple[str, tuple[Stage, ...]]]:
        """Every variant with its whole chain, trunk first."""
        for name, tail in self.variants.items():
            yield name, (*self.stages, *tail)

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        for misfit in self._misfits():
            raise misfit
        return self

    def _misfits(self) -> Iterator[PydanticCustomError]:
        """Everything that is right by itself and does not fit together."""
        yield from self._chain(self.model.gives, self.stages, ("stages",))
        kind = _end(self.model.gives, self.stages)
        for name, tail in self.variants.items():
            if name in RESERVED or name.startswith("reference-"):
                yield _misfit(("variants", name), f"the report has a row {name!r} of its own", "another name")
            if not _is_name(name):
                yield _misfit(("variants", name), f"{name!r} cannot name a folder", "letters, digits, '.', '_' and '-'")
            yield from self._chain(kind, tail, ("variants", name))
            if (end := _end(kind, tail)) != "onnx":
                yield _misfit(
                    ("variants", name),
                    f"the variant {name!r} ends as {_a(end)} model, which ONNX Runtime cannot run",
                    "a chain that ends as an ONNX model",
                    "add {kind: export} to `stages`",
                )
            yield from self._simulated(tail, ("variants", name))
            yield from self._packaged(tail, ("variants", name))
        yield from self._data_misfits()
        names = [target.name for target in self.targets]
        if len(set(names)) != len(names):
            yield _misfit(
                ("targets",),
                "two targets are the same",
                "targets that differ in provider, device, threads, batch and the like, or in their `label`",
            )

    def _chain(self, kind: Kind, stages: tuple[Stage, ...], at: tuple[str, ...]) -> Iterator[PydanticCustomError]:
        for index, stage in enumerate(stages):
            loc: tuple[str | int, ...] = (*at, index)
            if stage.takes != kind:
                yield _misfit(
                    loc,
                    f"{stage.kind!r} takes {_a(stage.takes)} model and is given {_a(kind)} model",
                    f"a stage that takes {_a(kind)} model",
                    self._order(stage, kind),
                )
            for role in stage.needs:
                if self.data.of(role) is None:
                    yield _misfit(
                        loc,
                        f"{stage.kind!r} needs data.{role}, which is not given",
                        f"data: {{{role}: …}}",
                        f"name samples in the config: data: {{{role}: {{npz: samples.npz}}}}",
                    )
            kind = stage.gives

    def _simulated(self, tail: tuple[Stage, ...], at: tuple[str, ...]) -> Iterator[PydanticCustomError]:
        """What undoes quantization-aware training, or misses it."""
        simulated: QuantizeStatic | QuantizeWeights | None = None
        for index, stage in enumerate((*self.stages, *tail)):
            own = index - len(self.stages)
            loc: tuple[str | int, ...] = ("stages", index) if own < 0 else (*at, own)
            inner = stage.finetune if isinstance(stage, PruneChannels) else stage
            if isinstance(stage, Finetune) and stage.simulate is not None:
                simulated = stage.simulate
            elif isinstance(inner, Learning) and simulated is not None:
                yield _misfit(
                    loc,
                    f"{stage.kind!r} trains in float what was trained for quantization before it, and undoes that",
                    "training with `simulate` last",
                    "put the stage that simulates behind this one",
                )
            elif isinstance(stage, Export) and stage.opset < BLOCKS_OPSET and getattr(simulated, "bits", None) == 4:
                yield _misfit(
                    loc,
                    f"training simulated 4 bits, and in opset {stage.opset} convolutions are stored in 8",
                    f"opset: {BLOCKS_OPSET} or later",
                    f"{{kind: export, opset: {BLOCKS_OPSET}}}",
                )

    def _packaged(self, tail: tuple[Stage, ...], at: tuple[str, ...]) -> Iterator[PydanticCustomError]:
        """Stages that change the model which was packaged before them."""
        before: Stage | None = None
        for index, stage in enumerate((*self.stages, *tail)):
            if isinstance(before, PackageOrt):
                own = index - len(self.stages)
                yield _misfit(
                    ("stages", index) if own < 0 else (*at, own),
                    f"{stage.kind!r} changes the model that {before.kind!r} has packaged before it",
                    "the package as the last stage",
                    f"put {{kind: {before.kind}}} at the end of each variant",
                )
            before = stage

    def _order(self, stage: Stage, kind: Kind) -> str:
        """What to do about a stage that is given the wrong kind of model."""
        if kind == "torch":
            exported = any(isinstance(other, Export) for other in self.stages)
            return "move it behind {kind: export}" if exported else "put {kind: export} before it"
        if self.model.gives != "torch":
            return f"{stage.kind!r} needs a torch network as the source: model: {{factory: …, weights: …, inputs: …}}"
        return "move it before {kind: export}"

    def _data_misfits(self) -> Iterator[PydanticCustomError]:
        for role, settings in (("calibration", self.data.calibration), ("evaluation", self.data.evaluation)):
            if isinstance(settings, ImageData) and (at := settings.random_step) is not None:
                yield _misfit(
                    ("data", role, "steps", at),
                    f"data.{role} has a step that acts at random, and only training may",
                    "the same samples every time",
                    "crop in place of random_crop, and no flip",
                )
        yield from self._limit_misfits(("gates",), self.gates)
        wishes = {"fastest": "latency", "most_accurate": "accuracy_drop"}
        yield from self._wish_misfits(("select",), wishes.get(self.select))
        if self.budget is not None:
            yield from self._limit_misfits(("budget",), self.budget)
            yield from self._wish_misfits(("budget", "minimize"), self.budget.minimize)
            yield from self._budget_misfits(self.budget)

    def _limit_misfits(self, at: tuple[str, ...], gates: Gates) -> Iterator[PydanticCustomError]:
        """Limits that nothing would be measured for."""
        evaluation = self.data.evaluation
        metric = evaluation.metric if evaluation is not None else None
        if gates.max_accuracy_drop is not None and metric is None:
            yield _misfit(
                (*at, "max_accuracy_drop"),
                "there is nothing to measure accuracy with",
                "data.evaluation with a metric and labels",
                "data: {evaluation: {npz: …, metric: top1}}",
            )
        elif (drop := gates.max_accuracy_drop or 0) > 1 and metric is not None and name_of(metric) in SHARES:
            yield _misfit(
                (*at, "max_accuracy_drop"),
                f"{name_of(metric)} lies between 0 and 1: none can lose more than that",
                "a share, such as 0.01 for one point",
                f"{drop / 100:g}, if {drop:g} points were meant",
            )
        for gate in ("min_sqnr_db", "max_abs_error", "min_top1_agreement"):
            if getattr(gates, gate) is not None and evaluation is None:
                yield _misfit((*at, gate), "there is nothing to measure drift on", "data.evaluation")
        for gate in ("max_latency_ratio", "max_latency_ms", "max_peak_memory"):
            if getattr(gates, gate) is not None and not self._clocked:
                yield _misfit((*at, gate), "latency is measured on no target", "a target with `latency: true`")
        for gate in ("max_latency_ratio", "max_latency_ms"):
            if isinstance(limit := getattr(gates, gate), Mapping):
                yield from self._target_misfits((*at, gate), limit)

    def _target_misfits(self, at: tuple[str, ...], named: Collection[str]) -> Iterator[PydanticCustomError]:
        """Targets that are not there, or that are not timed."""
        timed = [target.name for target in self.targets if target.latency]
        for name in named:
            if name in timed:
                continue
            there = any(target.name == name for target in self.targets)
            yield _misfit(
                (*at, name),
                f"latency is not measured on the target {name!r}" if there else f"there is no target {name!r}",
                ", ".join(map(repr, timed)),
                "latency: true on that target"
                if there
                else f"name one of these, or add it: targets: [{{label: {name}}}]",
            )

    @property
    def _clocked(self) -> bool:
        return any(target.latency for target in self.targets)

    def _wish_misfits(self, at: tuple[str, ...], wish: str | None) -> Iterator[PydanticCustomError]:
        """What cannot be small because it is not measured."""
        evaluation = self.data.evaluation
        if wish == "latency" and not self._clocked:
            yield _misfit(at, "latency is measured on no target", "a target with `latency: true`")
        if wish == "accuracy_drop" and (evaluation is None or evaluation.metric is None):
            yield _misfit(at, "there is nothing to measure accuracy with", "data.evaluation with a metric")

    def _budget_misfits(self, budget: Budget) -> Iterator[PydanticCustomError]:
        """Limits that stand in two places, and families of which this config could try nothing."""
        for limit, value in budget.limits.items():
            if (other := self.gates.limits.get(limit, value)) != value:
                yield _misfit(
                    ("budget", limit),
                    f"{limit} has two limits: budget says {value}, gates say {other}",
                    "one limit",
                    f"leave {limit} out of `gates`: every limit of the budget is a gate as well",
                )
        missing: dict[str, str] = {}
        if self.data.calibration is None:
            missing |= dict.fromkeys(("static", "mixed", "quantization_aware"), "data.calibration")
        if self.data.train is None:
            missing["quantization_aware"] = "data.train"
        if not any(isinstance(stage, Export) for stage in self.stages):
            missing["quantization_aware"] = "a torch network as the model, and {kind: export} in `stages`"
        if not any(isinstance(stage, PruneChannels) and stage.pruning_ratio is not None for stage in self.stages):
            missing["pruned"] = "{kind: prune_channels, pruning_ratio: 0.5} in `stages`"
        for index, family in enumerate(budget.families or ()):
            if family in missing:
                yield _misfit(
                    ("budget", "families", index), f"nothing of the family {family!r} can be tried", missing[family]
                )

    def export_settings(self) -> Export:
        """How networks beside the trunk, such as the teacher, are exported: as the config's first `export` says."""
        stages = [stage for _, chain in self.branches() for stage in chain]
        return next((stage for stage in stages if isinstance(stage, Export)), Export())


def _end(kind: Kind, stages: tuple[Stage, ...]) -> Kind:
    return stages[-1].gives if stages else kind


def _a(kind: Kind) -> str:
    return f"an {kind}" if kind.startswith("o") else f"a {kind}"


def _is_name(name: str) -> bool:
    return bool(name) and name[0] not in ".-" and all(c.isalnum() or c in "._-" for c in name)


def _misfit(loc: tuple[str | int, ...], what: str, want: str, fix: str | None = None) -> PydanticCustomError:
    context: dict[str, Any] = {"what": what, "want": want, "fix": fix, "loc": loc}
    return PydanticCustomError("misfit", "{what}", context)

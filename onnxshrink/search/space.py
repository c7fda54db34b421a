"""The space of a budget search: what may be varied, and the config of each point, the cheapest to try first."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxshrink.config.budget import Budget, Family
from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Finetune, PruneChannels, Stage
from onnxshrink.config.torch_stages import Recovery
from onnxshrink.core.errors import ConfigError
from onnxshrink.search.trial import SCHEME, Point

VARIANT = "trial"
"""Name of the one variant of a trial's config."""

_STEP = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(\d+)\]")
_INTEGERS = frozenset({"dynamic", "static", "mixed", "quantization_aware"})
"""Families of integer kernels; the CUDA provider has none."""

_RATIOS = (0.2, 0.35, 0.5, 0.65, 0.8)
_LARGE_RATIO, _STEPS = 0.5, 3
"""What is cut by so much is cut in so many steps as well: a network may recover from each that is lost in one."""


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of a dimension.

    Attributes:
        label: Its name in tables and in a `Point`.
        values: Path in the config to the value that it gets there; see `Space.document`.
        tail: The variant's own stages, plain values; None where the dimension does not decide that.
        simulate: True if the trunk trains for the quantize stage of ``tail`` before its export.
    """

    label: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tail: tuple[Mapping[str, Any], ...] | None = None
    simulate: bool = False


@dataclass(frozen=True, slots=True)
class Dimension:
    """What is varied, its options in order: of numbers by size, of schemes the cheapest to try first."""

    name: str
    options: tuple[Option, ...]

    def __getitem__(self, label: str) -> Option:
        return {option.label: option for option in self.options}[label]


@dataclass(frozen=True, slots=True)
class Space:
    """Every combination of the dimensions' options.

    Attributes:
        document: The user's config without its budget, paths made absolute, as plain values.
        dimensions: What is varied; the scheme is the last of them.
        base: The config file's folder, where the user's modules may lie.
    """

    document: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]
    base: Path = Path()

    def __len__(self) -> int:
        n = 1
        for dimension in self.dimensions:
            n *= len(dimension.options)
        return n

    def points(self) -> Iterator[Point]:
        """Every point; the last dimension runs fastest."""
        names = [dimension.name for dimension in self.dimensions]
        for choice in itertools.product(*(dimension.options for dimension in self.dimensions)):
            yield dict(zip(names, (option.label for option in choice), strict=True))

    def config(self, point: Point) -> RunConfig:
        """The config of a point: one variant, named `VARIANT`.

        Raises:
            ConfigError: What the options make of the config is not valid; names the option.
        """
        return self.together({VARIANT: point})[0]

    def together(self, points: Mapping[str, Point]) -> list[RunConfig]:
        """Configs that hold these points as variants of their names; points of one trunk share a config."""
        groups: dict[str, dict[str, Any]] = {}
        for name, point in points.items():
            document = self._edited(point)
            tail = document.pop("variants")[VARIANT]
            group = groups.setdefault(json.dumps(document, sort_keys=True), document)
            group.setdefault("variants", {})[name] = tail
        return [validate(group, base=self.base, origin="budget") for group in groups.values()]

    def _edited(self, point: Point) -> dict[str, Any]:
        options = [dimension[point[dimension.name]] for dimension in self.dimensions]
        document: dict[str, Any] = copy.deepcopy(dict(self.document))
        document["variants"] = {VARIANT: [dict(stage) for option in options for stage in option.tail or ()]}
        for path, value in (pair for option in options for pair in option.values.items()):
            set_value(document, path, value)
        if any(option.simulate for option in options):
            stages, tail = document["stages"], document["variants"][VARIANT]
            at = next(index for index, stage in enumerate(stages) if stage["kind"] == "export")
            stages.insert(at, {"kind": "finetune", "simulate": tail[-1]})
        document["stages"] = [stage for stage in document.get("stages", ()) if not _prunes_nothing(stage)]
        return document


def _prunes_nothing(stage: Mapping[str, Any]) -> bool:
    return stage["kind"] == "prune_channels" and stage.get("pruning_ratio") == 0


def set_value(document: Any, path: str, value: Any) -> None:
    """Set one value of nested dicts and lists.

    Args:
        document: Plain values.
        path: Such as ``stages[1].pruning_ratio``.
        value: What to put there; a key that is not there is made.

    Raises:
        ConfigError: The path cannot be read, or leads nowhere.
    """
    steps: list[int | str] = [key or int(index) for key, index in _STEP.findall(path)]
    here = document
    try:
        for step in steps[:-1]:
            here = here.setdefault(step, {}) if isinstance(step, str) else _listed(here)[step]
        if isinstance(steps[-1], int):
            here = _listed(here)
        here[steps[-1]] = value
    except (AttributeError, IndexError, KeyError, TypeError) as e:
        raise ConfigError(
            f"the path {path!r} leads nowhere in this config",
            where="budget.vary",
            want="a path such as stages[1].pruning_ratio or model.args.width",
        ) from e


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(value)
    return value


def space_of(config: RunConfig, budget: Budget, *, base: Path = Path()) -> Space:
    """What a budget lets the search vary of a config.

    Args:
        config: The run.
        budget: Its budget.
        base: The config file's folder.

    Raises:
        ConfigError: A path of ``vary`` leads nowhere, a value does not fit there, or nothing may be tried.
    """
    document = config.model_dump(mode="json", exclude_unset=True)
    for name in ("budget", "select", "gates", "variants"):
        document.pop(name, None)
    dimensions = [
        Dimension(path, tuple(Option(json.dumps(value), {path: value}) for value in values))
        for path, values in budget.vary.items()
    ]
    if budget.families is None or "pruned" in budget.families:
        dimensions += _pruning(config, budget)
    space = Space(document, (*dimensions, Dimension(SCHEME, tuple(_schemes(config, budget)))), base)
    for dimension in space.dimensions:  # every option once: a mistake in one is told before any work
        first = {other.name: other.options[0].label for other in space.dimensions}
        for option in dimension.options:
            space.config(first | {dimension.name: option.label})
    return space


def _pruning(config: RunConfig, budget: Budget) -> Iterator[Dimension]:
    """The ratio of every stage that prunes channels by one and that the user did not vary."""
    for index, stage in enumerate(config.stages):
        path = f"stages[{index}].pruning_ratio"
        if isinstance(stage, PruneChannels) and stage.pruning_ratio is not None and path not in budget.vary:
            ratios = sorted({0.0, stage.pruning_ratio, *_RATIOS})
            options = [Option(f"{ratio:g}", {path: ratio}) for ratio in ratios]
            yield Dimension(path, (*options, *_iterative(config, index, ratios)))


def _iterative(config: RunConfig, index: int, ratios: Sequence[float]) -> Iterator[Option]:
    """The larger ratios in steps, with the training that follows the stage between them as well."""
    stage, after = config.stages[index : index + 1], config.stages[index + 1 : index + 2]
    if not after or not isinstance(after[0], Finetune) or after[0].simulate or getattr(stage[0], "steps", 1) > 1:
        return
    between = after[0].model_dump(mode="json", exclude_unset=True, include=set(Recovery.model_fields))
    for ratio in ratios:
        if ratio >= _LARGE_RATIO:
            own = {"pruning_ratio": ratio, "steps": _STEPS, "finetune": between}
            values = {f"stages[{index}].{name}": value for name, value in own.items()}
            yield Option(f"{ratio:g} in {_STEPS} steps", values)


def _schemes(config: RunConfig, budget: Budget) -> Iterator[Option]:
    """What may follow the trunk, the cheapest to try first: the user's own variants, then ours."""
    options: list[Option] = []
    if "variants" in config.model_fields_set:
        for name, stages in config.variants.items():
            options.append(Option(name, tail=tuple(_plain(stage) for stage in stages)))
    on_cuda = any(target.provider == "cuda" for target in config.targets)
    for family, option in _catalogue(config, budget):
        is_wanted = family is None or budget.families is None or family in budget.families
        if is_wanted and not (on_cuda and family in _INTEGERS):
            options.append(option)
    own = [(option.tail, option.simulate) for option in options]
    yield from (option for index, option in enumerate(options) if own[index] not in own[:index])


def _plain(stage: Stage) -> dict[str, Any]:
    return {"kind": stage.kind} | stage.model_dump(mode="json", exclude_unset=True)


def _catalogue(config: RunConfig, budget: Budget) -> Iterator[tuple[Family | None, Option]]:
    """Every scheme that the config's data and source allow."""
    yield None, Option("fp32", tail=())
    yield "fp16", Option("fp16", tail=({"kind": "to_fp16"},))
    yield "dynamic", Option("dynamic", tail=({"kind": "quantize_dynamic"},))
    yield "weight_only", Option("weights_8", tail=({"kind": "quantize_weights", "bits": 8},))
    yield "weight_only", Option("weights_4", tail=({"kind": "quantize_weights", "bits": 4},))
    if config.data.calibration is None:
        return
    static = {
        name: {"kind": "quantize_static", **settings}
        for name, settings in (
            ("per_tensor", {"granularity": "per_tensor"}),
            ("per_channel", {"granularity": "per_channel"}),
            ("per_channel_mse", {"granularity": "per_channel", "method": "mse"}),
            ("per_tensor_compact", {"granularity": "per_tensor", "compact": True}),
            ("per_channel_compact", {"granularity": "per_channel", "compact": True}),
            ("per_channel_mse_compact", {"granularity": "per_channel", "method": "mse", "compact": True}),
        )
    }
    for name, stage in static.items():
        yield "static", Option(f"static_{name}", tail=(stage,))
    yield "dynamic", Option("dynamic_smooth", tail=({"kind": "smooth_quant"}, {"kind": "quantize_dynamic"}))
    limit = {} if budget.min_sqnr_db is None else {"min_sqnr_db": budget.min_sqnr_db}
    yield "mixed", Option("mixed", tail=({"kind": "quantize_mixed", **limit},))
    trainable = config.data.train is not None and isinstance(config.model, FactorySource)
    trainable = trainable and any(stage.kind == "export" for stage in config.stages)
    simulated = any(isinstance(stage, Finetune) and stage.simulate is not None for stage in config.stages)
    if trainable and not simulated:
        for name in ("per_tensor_compact", "per_channel_compact"):
            yield "quantization_aware", Option(f"trained_{name}", tail=(static[name],), simulate=True)

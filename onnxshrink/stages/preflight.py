"""What can be found wrong before any work is done: packages, providers, entry points, data that does not fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnxshrink.config.data import EntryData
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import PruneChannels, Stage, StaticQuantization
from onnxshrink.config.training import EntryLoss, Learning
from onnxshrink.core.importing import require_entry
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.runtime.isa import detect_isa, resolve_scheme
from onnxshrink.runtime.session import require_batch, require_provider
from onnxshrink.stages.memo import require_torch


def preflight(config: RunConfig) -> None:
    """Raise what would otherwise be found only after minutes of training.

    Raises:
        ShrinkError: Of the kind that the mistake is.
    """
    stages = [stage for _, chain in config.branches() for stage in chain]
    require_torch({config.model.gives, *(stage.takes for stage in stages)}, "the config")
    _refuse_misfits(config)
    for target in config.targets:
        require_provider(target)
    for entry in _entries(config):
        require_entry(entry)
    specs = model_inputs(config)
    for target in config.targets:
        require_batch(target, specs, where="the model")
    for role in dict.fromkeys(role for stage in stages for role in (*stage.needs, *stage.uses)):
        if settings := config.data.of(role):
            is_learned = role == "train" and any(learning.needs_labels for learning in _learnings(stages))
            open_reader(settings, specs, labels=is_learned)
    if config.data.evaluation is not None:
        open_reader(config.data.evaluation, specs, labels=config.data.evaluation.metric is not None)


def model_inputs(config: RunConfig) -> tuple[TensorSpec, ...]:
    """What the model takes, as the config or the ONNX file says."""
    if isinstance(config.model, FactorySource):
        return config.model.specs
    return input_specs(load_model(config.model.onnx))


def _refuse_misfits(config: RunConfig) -> None:
    """Raise where a target cannot run what a stage makes, before anything is made."""
    for name, chain in config.branches():
        for stage in chain:
            for target in config.targets:
                if isinstance(stage, StaticQuantization):
                    isa = detect_isa() if stage.isa == "auto" else stage.isa
                    resolve_scheme(isa, target.provider, where=f"variants.{name}, on {target.name}")


def _entries(config: RunConfig) -> list[str]:
    """Every entry point that the config names."""
    entries = [config.model.factory] if isinstance(config.model, FactorySource) else []
    for learning in _learnings(stage for _, chain in config.branches() for stage in chain):
        entries += [teacher.factory for teacher in learning.teachers]
        entries += [loss.entry for loss in learning.losses if isinstance(loss, EntryLoss)]
    roles = (config.data.train, config.data.calibration, config.data.evaluation)
    entries += [data.entry for data in roles if isinstance(data, EntryData)]
    return list(dict.fromkeys(entries))


def _learnings(stages: Iterable[Stage]) -> Iterator[Learning]:
    """The stages that train, and the training inside others."""
    for stage in stages:
        learning = stage.finetune if isinstance(stage, PruneChannels) else stage
        if isinstance(learning, Learning):
            yield learning

"""What can be found wrong before any work is done: packages, providers, entry points, data that does not fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from onnxshrink.config.data import EntryData
from onnxshrink.config.metrics import OwnMetric
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource, ModelSource, OnnxSource
from onnxshrink.config.stages import (
    PruneChannels,
    PruneWeights,
    QuantizeDynamic,
    QuantizeWeights,
    Stage,
    StaticQuantization,
    ToFp16,
)
from onnxshrink.config.training import AttentionTransfer, EntryLoss, FeatureHint, Learning, Training
from onnxshrink.core.importing import require_entry
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.arrays import ArrayReader
from onnxshrink.data.indexed import IndexedReader
from onnxshrink.data.labels import check_labels
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.affinity import require_cores
from onnxshrink.runtime.graph import input_specs, load_model, require_float
from onnxshrink.runtime.isa import detect_isa, resolve_scheme
from onnxshrink.runtime.session import require_batch, require_provider
from onnxshrink.stages.memo import require_torch

_OF_FLOAT = (StaticQuantization, QuantizeDynamic, QuantizeWeights, ToFp16)
"""Stages that refuse a model that is quantized already."""


def preflight(config: RunConfig) -> None:
    """Raise what would otherwise be found only after minutes of training.

    Raises:
        ShrinkError: Of the kind that the mistake is.
    """
    stages = [stage for _, chain in config.branches() for stage in chain]
    require_torch({config.model.gives, *(stage.takes for stage in stages)}, "the config")
    for target in config.targets:
        require_provider(target)  # before what only those who have it need to know
        require_cores(target)
    _refuse_misfits(config)
    for entry in _entries(config):
        require_entry(entry)
    for training in _trainings(stages):
        if training.precision == "float16":
            from onnxshrink.stages.acceleration import arithmetic

            arithmetic(training, "the config")
    _refuse_unknown_modules(config)
    _refuse_quantized(config.model, stages)
    specs = model_inputs(config)
    for target in config.targets:
        require_batch(target, specs, where="the model")
    for role in dict.fromkeys(role for stage in stages for role in (*stage.needs, *stage.uses)):
        if settings := config.data.of(role):
            is_learned = role == "train" and any(learning.needs_labels for learning in _learnings(stages))
            open_reader(settings, specs, labels=is_learned)
    if config.data.evaluation is not None:
        open_reader(config.data.evaluation, specs, labels=config.data.evaluation.metric is not None)
    refuse_labels(config, ())


def refuse_labels(config: RunConfig, classes: Sequence[int]) -> None:
    """Raise where the labels that accuracy is measured with are no class numbers of the model; streams are not read.

    Args:
        config: The run's.
        classes: How many classes each output of logits has, in the model's order; none where they are not known yet.

    Raises:
        DataError: Of a sample's label.
    """
    data = config.data.evaluation
    if data is None or data.metric not in ("top1", "top5") or isinstance(data, EntryData):
        return
    reader = open_reader(data, model_inputs(config), labels=True)
    assert isinstance(reader, ArrayReader | IndexedReader)  # noqa: S101  all but streams have their labels by number
    least = 1 + int(data.metric.removeprefix("top"))
    n_classes = next((count for count in classes if count >= least), None)
    check_labels(reader.labels(), n_samples=len(reader), n_classes=n_classes, where=reader.where)


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


def _refuse_quantized(model: ModelSource, stages: Iterable[Stage]) -> None:
    """Raise where a stage that begins with a float model would be given one that is quantized in its file.

    No stage makes a float model of it, so those before the first of them would work for nothing.
    """
    if isinstance(model, OnnxSource) and any(isinstance(stage, _OF_FLOAT) for stage in stages):
        require_float(load_model(model.onnx), where=str(model.onnx))


def _entries(config: RunConfig) -> list[str]:
    """Every entry point that the config names."""
    entries = [config.model.factory] if isinstance(config.model, FactorySource) else []
    for learning in _learnings(stage for _, chain in config.branches() for stage in chain):
        entries += [teacher.factory for teacher in learning.teachers]
        entries += [loss.entry for loss in learning.losses if isinstance(loss, EntryLoss)]
    roles = (config.data.train, config.data.calibration, config.data.evaluation)
    entries += [data.entry for data in roles if isinstance(data, EntryData)]
    entries += [data.metric.entry for data in roles if data and isinstance(data.metric, OwnMetric)]
    return list(dict.fromkeys(entries))


def _refuse_unknown_modules(config: RunConfig) -> None:
    """Raise where a stage names a module that its network does not have: no stage renames any."""
    if not isinstance(config.model, FactorySource):
        return
    wanted: dict[str, tuple[FactorySource, list[tuple[str, str, Collection[str]]]]] = {}
    for name, chain in config.branches():
        for stage in chain:
            for source, option, modules in _named_modules(config.model, stage):
                if modules:
                    _, known = wanted.setdefault(source.model_dump_json(), (source, []))
                    known.append((f"{name}/{stage.kind}", option, modules))
    for source, named in wanted.values():
        from onnxshrink.runtime.torch_model import Architecture, build_network
        from onnxshrink.stages.named_modules import find_modules

        network = build_network(Architecture.of(source), seed=config.seed)
        for where, option, modules in named:
            find_modules(network, tuple(modules), option=option, where=where)


def _named_modules(model: FactorySource, stage: Stage) -> Iterator[tuple[FactorySource, str, Collection[str]]]:
    """Whose modules a stage names, in which option, and their names."""
    if isinstance(stage, PruneChannels | PruneWeights):
        yield model, "ignore", stage.ignore
    if isinstance(stage, PruneChannels):
        yield model, "num_heads", stage.num_heads
    for learning in _learnings([stage]):
        for loss in learning.losses:
            if isinstance(loss, FeatureHint | AttentionTransfer):
                yield model, f"{loss.kind}.student", (loss.student,)
                if (teacher := learning.teacher) is not None:
                    named = {"factory": teacher.factory, "args": teacher.args, "weights": None, "outputs": None}
                    yield model.model_copy(update=named), f"{loss.kind}.teacher", (loss.teacher,)


def _trainings(stages: Iterable[Stage]) -> Iterator[Training]:
    """All that is trained, teachers too."""
    for learning in _learnings(stages):
        yield learning
        for teacher in learning.teachers:
            if teacher.train is not None:
                yield teacher.train


def _learnings(stages: Iterable[Stage]) -> Iterator[Learning]:
    """The stages that train, and the training inside others."""
    for stage in stages:
        learning = stage.finetune if isinstance(stage, PruneChannels) else stage
        if isinstance(learning, Learning):
            yield learning

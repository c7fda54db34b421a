"""What the variants of a run are measured against: the float reference, and the original before it was shrunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import (
    Calibrate,
    Distill,
    Export,
    Finetune,
    Optimize,
    PruneChannels,
    PruneWeights,
    QuantizeDynamic,
    QuantizeMixed,
    QuantizeStatic,
    QuantizeWeights,
    Stage,
)
from onnxshrink.core.artifact import Artifact
from onnxshrink.stages.memo import Memo


def reference_of(memo: Memo, stages: Sequence[Stage], chain: Sequence[Artifact]) -> Artifact:
    """What drift and latency of a branch are measured against: its first ONNX model.

    Float weights that were trained for quantization are no yardstick: then it is the network before that training,
    exported as the branch says.

    Args:
        memo: The run's steps.
        stages: Of the branch.
        chain: Its artifacts, the source first.
    """
    for stage, before in zip(stages, chain, strict=False):
        if isinstance(stage, Finetune) and stage.simulate is not None:
            export = next(other for other in stages if isinstance(other, Export))
            return memo.derive(export, before, f"reference/{export.kind}")
    return next(artifact for artifact in chain if artifact.kind == "onnx")


def original_of(
    config: RunConfig, memo: Memo, trunk: Sequence[Artifact], branches: Mapping[str, Sequence[Artifact]]
) -> tuple[str, Artifact] | None:
    """What accuracy is measured against, as ONNX: the teacher, or the network before it was cut or trained further.

    Args:
        config: The run.
        memo: Its steps.
        trunk: The artifacts of the shared stages, the source first.
        branches: Every variant's artifacts, trunk first; those that could be made.

    Returns:
        The name of its row and the model; None where that is the reference itself.
    """
    if not isinstance(config.model, FactorySource):
        return None
    stages: Sequence[Stage] = next(chain for _, chain in config.branches())
    tail: list[Stage] = [config.export_settings(), *(s for s in stages if isinstance(s, Optimize))]
    for stage, student in zip(config.stages, trunk, strict=False):
        if isinstance(stage, Distill):
            from onnxshrink.stages.distill import teacher_of

            teacher = teacher_of(stage.teacher, student, memo.context(stage.kind, stage.needs), stage.task)
            return "teacher", memo.fold(teacher, tail, "teacher/")[-1]
    for variant, chain in config.branches():
        cut = next(
            (index for index, stage in enumerate(chain) if isinstance(stage, PruneChannels | PruneWeights)), None
        )
        if cut is not None and variant in branches:
            name = "unpruned" if cut else "source"
            return name, memo.fold(branches[variant][cut], tail, f"{name}/")[-1]
    trained = any(isinstance(stage, Finetune) and stage.simulate is None for stage in config.stages)
    if config.model.weights is not None and trained:
        return "source", memo.fold(trunk[0], tail, "source/")[-1]
    return None


def quantized_from(
    memo: Memo, stages: Sequence[Stage], chain: Sequence[Artifact]
) -> tuple[Artifact | None, Artifact | None]:
    """The float model that a branch quantizes, and the calibration that its ranges come from, as far as there are any.

    Args:
        memo: The run's steps, those of the branch among them.
        stages: Of the branch.
        chain: Its artifacts, the source first.
    """
    for stage, before in zip(stages, chain, strict=False):
        if isinstance(stage, QuantizeStatic | QuantizeMixed | QuantizeDynamic | QuantizeWeights):
            return before, memo.made(Calibrate(), before)
    return None, None

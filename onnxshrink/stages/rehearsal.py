"""What no exporter takes is found before the training whose result would be exported."""

from __future__ import annotations

from collections.abc import Iterator

from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Distill, Export
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.stages.memo import Memo


def rehearse_exports(config: RunConfig, memo: Memo) -> None:
    """Export the networks as they are, where training lies before their export: seconds in place of minutes.

    Training changes numbers, and pruning changes lengths; neither changes the code that an exporter has to take. How
    near the numbers are is left to the export itself. What is exported here is found again by what needs it later.

    Args:
        config: The run.
        memo: Its steps.

    Raises:
        ModelError: No branch could be exported, or its teacher could not, which every row is measured against.
    """
    if not isinstance(config.model, FactorySource):
        return
    refusals: list[ModelError] = []
    for _, chain in config.branches():
        at = next((at for at, stage in enumerate(chain) if isinstance(stage, Export)), 0)
        export = chain[at] if at else None
        if not isinstance(export, Export) or not any(stage.trains for stage in chain[:at]):
            return
        if (refusal := _refusal(export, memo.open(config.model), "source", memo)) is None:
            break
        refusals.append(refusal)
    if len(refusals) == len(config.variants):
        raise refusals[0]
    for teacher in _teachers(config, memo):
        if refusal := _refusal(config.export_settings(), teacher, "teacher", memo):
            raise refusal


def _refusal(export: Export, network: Artifact, name: str, memo: Memo) -> ModelError | None:
    """Why the exporter does not take a network; None where it does."""
    try:
        memo.derive(export, network, f"{name} ▸ {export.kind}")
    except ParityError:
        return None
    except ModelError as e:
        return e
    return None


def _teachers(config: RunConfig, memo: Memo) -> Iterator[Artifact]:
    """The teacher that the report will have a row of, before it is trained."""
    distill = next((stage for stage in config.stages if isinstance(stage, Distill)), None)
    if distill is not None:
        from onnxshrink.stages.distill import untrained_teacher

        yield untrained_teacher(distill.teacher, memo.open(config.model), memo.context(distill.kind, distill.needs))

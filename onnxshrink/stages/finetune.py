"""Fine-tuning: further training, usually to recover what pruning cost."""

from __future__ import annotations

from pathlib import Path

from onnxshrink.config.stages import Finetune
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.stages.context import Context
from onnxshrink.stages.distill import learn


def finetune(settings: Finetune, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Train the network of ``source`` from labels alone, or against a teacher as `distill` does.

    Raises:
        ModelError: The teacher cannot be built, or its logits do not fit.
        DataError: The samples do not fit, or have no labels and there is no teacher.
        TrainingError: The loss is not finite.
    """
    return learn(settings, source, out, ctx)

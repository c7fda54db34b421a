"""What a stage may see of the run besides its input and its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from onnxshrink.calibration.parts import Sharding
from onnxshrink.config.data import DataRoles, Role
from onnxshrink.config.source import ModelSource
from onnxshrink.config.stages import AnyStage
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.events import Events
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import Reader, open_reader


@dataclass(frozen=True, slots=True)
class Context:
    """The run, seen from one stage. All of it that can change a result is part of the stage's memo key.

    Attributes:
        step: The step's name in progress and messages, such as ``int8_per_channel/quantize_static``.
        data: The data roles that the stage's settings declare in ``needs`` and ``uses``; the others are None.
        seed: Seed of everything random in the stage.
        events: Listener for progress and warnings.
        open: Memoized: a model source to its artifact.
        derive: Memoized: run another stage on an artifact and take its result.
        scratch: A folder, not yet made, for what a killed run can go on from. It belongs to the step's memo key, so all
            that can change the result is the same in the run that finds it; it is removed when the step is done. None
            where nothing is kept.
        sharding: Where the shards of a calibration run; None counts all of it here. It changes no result.
    """

    step: str
    data: DataRoles
    seed: int
    events: Events
    open: Callable[[ModelSource], Artifact]
    derive: Callable[[AnyStage, Artifact], Artifact]
    scratch: Path | None = None
    sharding: Sharding | None = None

    def reader(
        self, role: Role, specs: Sequence[TensorSpec], *, batch_size: int = 16, labels: bool = False
    ) -> Reader | None:
        """The samples of a role, or None where the config gives none (only possible for a role in ``uses``)."""
        settings = self.data.of(role)
        if settings is None:
            return None
        return open_reader(settings, specs, batch_size=batch_size, labels=labels)


Work: TypeAlias = Callable[[Artifact, Path, Context], Facts]
"""What a stage is: read the input artifact, fill the folder, say what was done."""

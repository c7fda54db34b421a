"""Whether the models of a space can be compared: quality is measured against one and the same model for all of them.

Drift is measured against the first ONNX model of a trunk, accuracy against the original, as `stages.references` has it.
A dimension that changes that model makes a small, bad network look as good as its own bad reference.
"""

from __future__ import annotations

import re

from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.config.stages import Distill, Export, PruneChannels, PruneWeights
from onnxshrink.core.errors import ConfigError
from onnxshrink.search.space import Space
from onnxshrink.search.trial import SCHEME

_STAGE = re.compile(r"stages\[(\d+)\]")
_SCHEMES_ONLY = "vary nothing but schemes: no `vary`, and families: [fp16, dynamic, static, weight_only]"


def require_yardstick(config: RunConfig, space: Space) -> None:
    """Raise where two trunks of a space would each be measured against something else.

    Raises:
        ConfigError: Names what is varied, and what would make its models comparable.
    """
    paths = [dimension.name for dimension in space.dimensions if dimension.name != SCHEME]
    evaluation = config.data.evaluation
    if evaluation is None or evaluation.metric is None:
        for path in paths:
            if _place(path) < _first_onnx(config):
                raise ConfigError(
                    "models of different networks cannot be compared by their drift: "
                    "that of each is measured against its own float network",
                    where=path,
                    got="no metric of the task",
                    want="data.evaluation with a metric and labels",
                    fix=f"data: {{evaluation: {{npz: …, metric: top1}}}}; or {_SCHEMES_ONLY}",
                )
        return
    for path in paths:
        if _moves_original(config, path):
            raise ConfigError(
                "accuracy would be measured against another original for each value that is tried",
                where=path,
                got="no teacher that all have in common",
                want="one original that all models are compared with",
                fix=f"stages: [{{kind: distill, teacher: {{factory: …}}}}, …]; or {_SCHEMES_ONLY}",
            )


def _place(path: str) -> int:
    """Which stage a path changes; -1 is the source."""
    match = _STAGE.match(path)
    return int(match[1]) if match else -1


def _first_onnx(config: RunConfig) -> int:
    """The stage from which on nothing changes the float reference."""
    if not isinstance(config.model, FactorySource):
        return 0
    exports = (index for index, stage in enumerate(config.stages) if isinstance(stage, Export))
    return next(exports, len(config.stages))


def _moves_original(config: RunConfig, path: str) -> bool:
    """True if a path changes what accuracy is measured against."""
    for index, stage in enumerate(config.stages):
        if isinstance(stage, Distill):
            return path.startswith(f"stages[{index}].teacher")
        if isinstance(stage, PruneChannels | PruneWeights):
            return _place(path) < index
    kept = isinstance(config.model, FactorySource) and config.model.weights is not None
    return _place(path) < (0 if kept else _first_onnx(config))

"""What the result must fit into: limits, what to make small within them, and how long and where to look."""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import Model, SizeBytes
from onnxshrink.config.gates import Gates

Family: TypeAlias = Literal["fp16", "dynamic", "static", "mixed", "weight_only", "quantization_aware", "pruned"]
"""What a search may try."""

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def _seconds(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _DURATION.fullmatch(value.strip())
    if match is None:
        raise PydanticCustomError("duration_form", "a duration is wanted, such as '20 min', '90 s' or '1.5 h'", {})
    return float(match[1]) * _SECONDS[match[2]]


Seconds = Annotated[
    float,
    BeforeValidator(_seconds),
    Field(gt=0),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[0-9.]+ ?(s|min|h)$"}]}),
]
"""Seconds, or text such as ``20 min``."""


class Processes(Model):
    """Trials in processes of this machine."""

    kind: Literal["processes"] = "processes"
    workers: int = Field(default=2, gt=0)
    """How many at a time."""


class Dask(Model):
    """Trials on the workers of a dask cluster (`pip install distributed`)."""

    kind: Literal["dask"] = "dask"
    address: str
    """The scheduler, such as `tcp://scheduler:8786`."""
    workers: int = Field(default=2, gt=0)
    """How many trainings to begin at a time."""


Parallel: TypeAlias = Annotated[Processes | Dask, Field(discriminator="kind")]


class Budget(Model):
    """Limits that the result must keep, and the search for the best one that does."""

    max_size: SizeBytes | None = None
    """Largest model file, external data included."""
    max_compressed_size: SizeBytes | None = None
    """Largest model as gzip, as app stores and registries ship it."""
    max_peak_memory: SizeBytes | None = None
    """Largest memory that loading the model and one inference add to a process."""
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = None
    """Largest p50 latency relative to the float reference, on every target."""
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    """Largest p50 latency in milliseconds, on every target."""
    max_accuracy_drop: Annotated[float, Field(ge=0)] | None = None
    """Largest loss of the task metric against the original, in the metric's own unit."""
    min_sqnr_db: float | None = None
    """Smallest signal-to-quantization-noise ratio of any output against the float reference, in dB."""
    max_macs: Annotated[int, Field(gt=0)] | None = None
    """Largest number of multiply-accumulates of one sample."""
    minimize: Literal["size", "latency", "accuracy_drop"] = "size"
    """What to make as small as possible among the models that keep every limit."""
    time_limit: Seconds = 1200.0
    """Time for the search; the trial at work when it is over is ended. Later runs go on from what is known."""
    max_trials: Annotated[int, Field(gt=0)] | None = None
    """At most this many full evaluations."""
    families: tuple[Family, ...] | None = None
    """What to try; by default all that the model, its data and the processor allow."""
    vary: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Options of this config to search over: path to values, such as `stages[1].pruning_ratio: [0.3, 0.5, 0.7]` or
    `model.args.width: [16, 32, 64]`. Every `pruning_ratio` of the trunk is varied where none is named here."""
    storage: str | None = None
    """Where trials are remembered: an optuna storage URL that machines share; a file in the run's folder by default."""
    parallel: Parallel | None = None
    """Where trials run; one after the other in this process by default. Latency is always measured here, alone."""
    latency_host: str | None = None
    """Host name of the machine on which latency counts; the search refuses to start elsewhere."""

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given, by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name.startswith(("max_", "min_"))}
        return {name: float(value) for name, value in values.items() if value is not None and name != "max_trials"}

    def gates(self, own: Gates) -> Gates:
        """The config's own gates with the budget's limits that gates know."""
        shared = {name: getattr(self, name) for name in self.limits if name in Gates.model_fields}
        return own.model_copy(update=shared)

    @model_validator(mode="after")
    def _limits_something(self) -> Budget:
        if not self.limits:
            context = {
                "what": "the budget limits nothing",
                "want": "at least one limit, such as max_size",
                "fix": "budget: {max_size: 2 MB}",
            }
            raise PydanticCustomError("misfit", "{what}", context)
        return self

"""What the result must fit into: limits, what to make small within them, and how long and where to look."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, JsonValue, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import NO_SWITCH, Model
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


class Budget(Gates):
    """Limits that the result must keep, as gates; those of `gates` hold as well. And the search for the best one."""

    minimize: Literal["size", "latency", "accuracy_drop"] = "size"
    """What to make as small as possible among the models that keep every limit."""
    time_limit: Seconds = 1200.0
    """Time for the search and the final measurement: no trial is begun that is likely to take longer, and one that does
    is ended. A later run goes on from what is known."""
    max_trials: Annotated[int, Field(gt=0), NO_SWITCH] | None = None
    """At most this many full evaluations."""
    families: Annotated[tuple[Family, ...], Field(min_length=1)] | None = None
    """What to try; by default all that the model, its data and the processor allow."""
    vary: dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Options of this config to search over: path to values, such as `stages[1].pruning_ratio: [0.3, 0.5, 0.7]` or
    `model.args.width: [16, 32, 64]`. Every `pruning_ratio` of the trunk is varied where none is named here."""
    storage: str | None = None
    """Where trials are remembered: an optuna storage URL that machines share; a file in the run's folder by default."""
    parallel: Parallel | None = None
    """Where trials run; one after the other in this process by default. Latency is always measured here, alone."""
    processes_per_training: int = Field(default=1, gt=0)
    """How many processes share each training of a trial, as under torchrun; the trial starts them on its machine."""
    latency_host: str | None = None
    """Host name of the machine on which latency counts; the search refuses to start elsewhere."""

    def within(self, own: Gates) -> Budget:
        """This budget with the gates' limits as well; a config in which one has two is refused."""
        return self.model_copy(update={**own.limits, **self.limits, "strict": self.strict or own.strict})

    @property
    def as_gates(self) -> Gates:
        """The limits alone."""
        return Gates().model_copy(update={**self.limits, "strict": self.strict})

    @model_validator(mode="after")
    def _makes_sense(self) -> Budget:
        for misfit in self._misfits():
            raise misfit
        return self

    def _misfits(self) -> Iterator[PydanticCustomError]:
        if not self.limits:
            yield _misfit(
                (), "the budget limits nothing", "at least one limit, such as max_size", "budget: {max_size: 2 MB}"
            )
        for name in ("max_size", "max_compressed_size", "max_peak_memory"):
            if self.limits.get(name) == 0:
                yield _misfit((name,), "no model takes 0 bytes", "a size such as 60 kB")
        for path in self.vary:
            if not path.startswith(("model.", "stages[")):
                yield _misfit(
                    ("vary", path),
                    f"{path!r} is not of the model or of the trunk, and cannot be varied",
                    "a path such as model.args.width or stages[1].pruning_ratio",
                )


def _misfit(loc: tuple[str, ...], what: str, want: str, fix: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{what}", {"what": what, "want": want, "fix": fix, "loc": ("budget", *loc)})

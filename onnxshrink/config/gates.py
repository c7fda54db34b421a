"""Where the result is measured, and what it must reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import NO_SWITCH, FilePath, Model, Ratio, SizeBytes, fingerprint
from onnxshrink.config.providers import short_name
from onnxshrink.config.tolerance import Tolerance

Optimization: TypeAlias = Literal["disabled", "basic", "extended", "all"]
"""ONNX Runtime's graph optimization levels; ``all`` is what a session has by default."""


OF_OUTPUTS = {"provider", "library", "device", "options", "require_all", "optimization", "threads"}
"""Settings of a target that outputs may depend on, or whether there are any; the others are latency's and its name."""


class Target(Model):
    """An execution provider with its options; drift, accuracy and latency are measured on each."""

    provider: Annotated[str, Field(min_length=1), AfterValidator(short_name)] = "cpu"
    """Execution provider: ``cpu``, ``cuda``, ``openvino``, ``tensorrt``, …, or ONNX Runtime's own name of any other.
    One that the session silently drops, or that runs no node, is an error."""
    library: FilePath | None = None
    """Shared library of a provider that comes as a plugin, such as the one in the package onnxruntime-ep-openvino."""
    device: Literal["cpu", "gpu", "npu"] | None = None
    """Kind of hardware that a plugin shall use; the first that it offers by default."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Provider options, passed on to ONNX Runtime as text: ``true`` as ``True``, a mapping or list as JSON."""
    require_all: bool = False
    """Refuse a model of which any node runs on another provider; else those nodes are listed."""
    optimization: Optimization = "all"
    """Graph optimization level of the session."""
    threads: int = Field(default=1, gt=0)
    """Intra-op threads."""
    spinning: bool = True
    """Let intra-op threads wait in a busy loop, as ONNX Runtime does by default: faster, and it burns CPU time."""
    affinity: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1)
    """Cores that latency is measured on; all that the process may use by default."""
    copies: Literal["included", "excluded"] = "excluded"
    """Whether latency on CUDA has the copies between host and device in it; on the CPU there are none."""
    startup: bool = False
    """Measure load time, first run and peak memory as well, in six fresh processes of each model: some seconds. On CUDA
    and TensorRT what is held on the GPU, too, where ``onnxshrink[cuda]`` is installed."""
    batch: int = Field(default=1, gt=0)
    """Samples per inference while latency is measured."""
    latency: bool = True
    """Measure latency here; a target without it still has drift and accuracy, and no latency gate applies to it."""
    latency_seconds: float = Field(default=3.0, gt=0)
    """Time to measure the latency of one variant; up to four times as long before a gate is inconclusive, and longer
    for a model that is slow to open: sessions are opened anew at least six times."""
    label: Annotated[str, Field(min_length=1, max_length=40)] | None = None
    """Name in the report, for targets that differ in nothing else that it would show, such as their options."""

    def outputs_key(self) -> dict[str, Any]:
        """What can change outputs, for a memo key, and the name that they are reported under."""
        return {"name": self.name} | {name: value for name, value in fingerprint(self).items() if name in OF_OUTPUTS}

    @property
    def name(self) -> str:
        """``cpu`` or ``cpu x2, batch 8, basic``, unless labelled: short, and different for the targets of one run."""
        parts = (
            f"{self.provider} {self.device}" if self.device else self.provider,
            f" x{self.threads}" if self.threads != 1 else "",
            f", batch {self.batch}" if self.batch != 1 else "",
            f", {self.optimization}" if self.optimization != "all" else "",
            "" if self.spinning else ", no spinning",
            f", cores {'+'.join(map(str, self.affinity))}" if self.affinity else "",
            ", with copies" if self.copies == "included" else "",
        )
        return self.label or "".join(parts)


def _per_target(value: object) -> object:
    """A number above 0, or one for each target that is named."""
    numbers: list[Any] = list(value.values()) if isinstance(value, Mapping) else [value]
    try:
        fits = [not isinstance(number, bool) and 0 < float(number) < math.inf for number in numbers]
    except (TypeError, ValueError):
        fits = []
    if not fits or not all(fits):
        text = "a number above 0 is wanted, or one for each target by its name, such as {cpu: 0.6}"
        raise PydanticCustomError("per_target", text, {})
    return value


PerTarget: TypeAlias = Annotated[
    float | dict[str, float],
    BeforeValidator(_per_target),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0},
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
                    "minProperties": 1,
                },
            ]
        }
    ),
]
"""A limit on every target, or one for each by its name; targets that are not named have none."""


def on_target(limit: float | Mapping[str, float] | None, target: str | None) -> float | None:
    """What a `PerTarget` asks on the target of this name; None for nothing."""
    return limit.get(target or "") if isinstance(limit, Mapping) else limit


class Gates(Model):
    """Limits a variant must keep. One that is not given is not checked; one whose metric is missing fails."""

    max_accuracy_drop: Annotated[float, Field(ge=0), NO_SWITCH] | None = None
    """Largest loss of the task metric against the original, in the metric's own unit (0.01 is one point of top-1)."""
    min_sqnr_db: Annotated[float, NO_SWITCH] | None = None
    """Smallest signal-to-quantization-noise ratio of any output against the float reference, in dB."""
    max_abs_error: Tolerance | None = None
    """Largest difference of any value of any output from the float reference's: a number in the output's own unit, or
    text such as `2 steps`, which counts steps of the output's quantization."""
    min_top1_agreement: Ratio | None = None
    """Smallest share of the samples for which the float reference's winning class wins, of any 2-D output."""
    max_size: SizeBytes | None = None
    """Largest model file, external data included."""
    max_compressed_size: SizeBytes | None = None
    """Largest model as gzip, as app stores and registries ship it."""
    max_macs: Annotated[int, Field(gt=0), NO_SWITCH] | None = None
    """Most multiply-accumulates of one sample."""
    max_latency_ratio: PerTarget | None = None
    """Largest p50 latency relative to the float reference; 1.0 is as fast as the reference. A number for every target,
    or one for each by its name in the report, such as `{cpu: 0.6, cpu x4: 0.8}`; others then have no such limit."""
    max_latency_ms: PerTarget | None = None
    """Largest p50 latency in milliseconds; a number, or one for each target as above."""
    max_peak_memory: SizeBytes | None = None
    """Most memory that loading the model and one inference may add to a fresh process; has `startup` measured."""
    min_integer_coverage: Ratio | None = None
    """Smallest share of the multiply-accumulates that must run in integer kernels; 1.0 is all of them."""
    strict: bool = False
    """Let an inconclusive gate fail."""

    @property
    def limits(self) -> dict[str, Any]:
        """The limits that are given, by name."""
        values = {name: getattr(self, name) for name in Gates.model_fields if name != "strict"}
        return {name: value for name, value in values.items() if value is not None}


Select: TypeAlias = Literal["smallest", "fastest", "most_accurate"]

"""What a search tries and what it learns: points of a space, and what is known of each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric

Point: TypeAlias = Mapping[str, str]
"""A choice for every dimension: its name to the label of one of its options."""

SCHEME = "scheme"
"""The dimension of what follows the trunk: a point without it is a trunk."""

_LEAST = frozenset({"sqnr_db", "top1_agreement", "integer_coverage"})
"""Metrics of which small is bad."""

Status: TypeAlias = Literal["predicted", "probed", "evaluated", "failed"]
"""How far a trial came: its bytes are known, untrained; it was made and measured on a few samples; on all of them; it
could not be made."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One point and what is known of it; plain data that JSON holds and processes exchange.

    Attributes:
        number: Its place in the order in which trials were begun.
        point: What was tried.
        status: How far it came.
        metrics: All that was measured, as in a report; of a probe, on its few samples.
        digest: Of the model, where it was made.
        errors: Of a probe: the squared error of each sample, of the output that drifts most; empty where an output's
            rows are no samples.
        reason: Why it failed, in one line.
        seconds: Work it cost when it was done.
    """

    number: int
    point: Point
    status: Status
    metrics: tuple[Metric, ...] = ()
    digest: str | None = None
    errors: tuple[float, ...] = ()
    reason: str | None = None
    seconds: float = 0.0

    def worst(self, name: str) -> Metric | None:
        """The metric of that name that is worst over targets and outputs; None where it was not measured.

        One without a value is the worst, but for the SQNR of outputs that are identical, which is the best.
        """
        sign = -1.0 if name in _LEAST else 1.0

        def badness(metric: Metric) -> float:
            if metric.value is None:
                return -math.inf if metric.note == IDENTICAL else math.inf
            return sign * metric.value

        return max((metric for metric in self.metrics if metric.name == name), key=badness, default=None)


def key_of(point: Point) -> str:
    """A point as text: equal points, equal text."""
    return json.dumps(dict(point), sort_keys=True)


def trunk_of(point: Point) -> Point:
    """The point without its scheme."""
    return {name: label for name, label in point.items() if name != SCHEME}


def name_of(trial: Trial) -> str:
    """The name of a trial as a variant of the report."""
    return f"{trial.point[SCHEME]}-{trial.number}"


def describe(point: Point) -> str:
    """A point in words, the scheme last: ``width 16, pruning_ratio 0.35, static_per_tensor``.

    A dimension is called by the end of its path, or by all of it where two ends are equal.
    """
    paths = [name for name in point if name != SCHEME]
    ends = [path.rpartition(".")[2] for path in paths]
    words = [f"{end if ends.count(end) == 1 else path} {point[path]}" for path, end in zip(paths, ends, strict=True)]
    return ", ".join([*words, *([point[SCHEME]] if SCHEME in point else [])])


def trial_of(raw: Mapping[str, Any]) -> Trial:
    """A trial from plain data, such as a row of ``search.json``; what this version does not know is left out."""
    known = {name: value for name, value in raw.items() if name in Trial.__dataclass_fields__}
    metrics = tuple(Metric(**metric) for metric in raw["metrics"])
    return Trial(**known | {"metrics": metrics, "errors": tuple(raw.get("errors", ()))})


def size_of(trial: Trial) -> float:
    """Bytes of a trial's model; infinite where they are not known."""
    metric = trial.worst("size_bytes")
    return math.inf if metric is None or metric.value is None else metric.value

"""Limits of a budget against what is known of a trial: kept, broken, or within noise; and the nearest miss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxshrink.config.budget import Budget
from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric, Outcome, worst
from onnxshrink.search.trial import Trial

METRICS: Mapping[str, str] = {
    "max_size": "size_bytes",
    "max_compressed_size": "compressed_bytes",
    "max_peak_memory": "peak_memory_bytes",
    "max_latency_ratio": "latency_ratio",
    "max_latency_ms": "latency_p50_ms",
    "max_accuracy_drop": "accuracy_drop",
    "min_sqnr_db": "sqnr_db",
    "max_macs": "macs",
}
"""What each limit of a budget limits."""

TIMED = frozenset({"max_latency_ratio", "max_latency_ms", "max_peak_memory"})
"""Limits that are decided last: by a clock, alone."""


def judge(budget: Budget, trial: Trial, *, timed: bool = True) -> dict[str, Outcome]:
    """What becomes of each limit.

    A limit is passed where the whole interval of its metric keeps it on every target, failed where none of it does or
    where the metric is missing, and else inconclusive.

    Args:
        budget: The limits.
        trial: What is known of a model.
        timed: Judge what a clock must measure as well; without, such limits are left out.
    """
    limits = {name: limit for name, limit in budget.limits.items() if timed or name not in TIMED}
    return {name: _judge(name, limit, trial) for name, limit in limits.items()}


def _judge(name: str, limit: float, trial: Trial) -> Outcome:
    metrics = [metric for metric in trial.metrics if metric.name == METRICS[name]]
    if not metrics:
        return "failed"
    return worst([_outcome(metric, limit, least=name.startswith("min_")) for metric in metrics])


def _outcome(metric: Metric, limit: float, *, least: bool) -> Outcome:
    if metric.value is None:
        return "passed" if least and metric.note == IDENTICAL else "failed"
    lo = metric.value if metric.lo is None else metric.lo
    hi = metric.value if metric.hi is None else metric.hi
    if least:
        return "passed" if lo >= limit else "failed" if hi < limit else "inconclusive"
    return "passed" if hi <= limit else "failed" if lo > limit else "inconclusive"


@dataclass(frozen=True, slots=True)
class Miss:
    """How far a trial is from keeping one limit.

    Attributes:
        limit: The limit's name in the budget.
        asked: Its value.
        needed: What it would have to be for the trial to keep it; None where the metric is missing.
        share: How far off, relative to the limit: 0 is kept, 1 is twice as large as asked.
    """

    limit: str
    asked: float
    needed: float | None
    share: float


def misses(budget: Budget, trial: Trial, *, timed: bool = True) -> tuple[Miss, ...]:
    """The limits that a trial does not keep, by their point estimates, the worst first."""
    found = []
    for name, outcome in judge(budget, trial, timed=timed).items():
        if outcome == "failed":
            asked, metric = budget.limits[name], trial.worst(METRICS[name])
            needed = None if metric is None else metric.value
            found.append(Miss(name, asked, needed, _share(asked, needed, least=name.startswith("min_"))))
    return tuple(sorted(found, key=lambda miss: -miss.share))


def _share(asked: float, needed: float | None, *, least: bool) -> float:
    if needed is None:
        return math.inf
    if least:
        return 10 ** ((asked - needed) / 20) - 1  # decibels: as a ratio of amplitudes
    return (needed - asked) / asked if asked else math.inf


def nearest(budget: Budget, trials: Sequence[Trial], *, timed: bool = True) -> dict[str, Trial]:
    """For each limit, the trial that comes nearest to it among those that keep all the others.

    So what is said of ``max_size`` is the smallest model that keeps the accuracy, and of ``max_accuracy_drop`` the most
    accurate model that fits. A limit that no trial comes near alone has no entry.
    """
    found: dict[str, Trial] = {}
    for name in budget.limits:
        alone = [trial for trial in trials if {miss.limit for miss in misses(budget, trial, timed=timed)} == {name}]
        if alone:
            found[name] = min(alone, key=lambda trial: (misses(budget, trial, timed=timed)[0].share, trial.number))
    return found

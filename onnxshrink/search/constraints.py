"""Limits of a budget against what is known of a trial: kept, broken, or within noise; and the nearest miss.

Gates judge; what is added here is how far off a model is, and which one is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxshrink.config.budget import Budget
from onnxshrink.config.tolerance import in_steps
from onnxshrink.core.report import Outcome, worst
from onnxshrink.search.trial import Trial
from onnxshrink.verify.gates import TIMED, at_points, judge_on

METRICS: Mapping[str, str] = {
    "max_size": "size_bytes",
    "max_compressed_size": "compressed_bytes",
    "max_macs": "macs",
    "max_peak_memory": "peak_memory_bytes",
    "max_latency_ratio": "latency_ratio",
    "max_latency_ms": "latency_p50_ms",
    "max_accuracy_drop": "accuracy_drop",
    "max_abs_error": "max_abs_error",
    "min_sqnr_db": "sqnr_db",
    "min_top1_agreement": "top1_agreement",
    "min_integer_coverage": "integer_coverage",
}
"""What each limit of a budget limits."""


def judge(budget: Budget, trial: Trial, *, timed: bool = True) -> dict[str, Outcome]:
    """What becomes of each limit on the targets that the trial was measured on, the worst of them.

    A limit whose metric is missing is failed.

    Args:
        budget: The limits.
        trial: What is known of a model.
        timed: Judge what a clock must measure as well; without, such limits are left out.
    """
    gates = budget if timed else budget.model_copy(update=dict.fromkeys(TIMED))
    names = list(dict.fromkeys(metric.target for metric in trial.metrics if metric.target is not None))
    clocked = list(dict.fromkeys(metric.target for metric in trial.metrics if metric.name == "latency_ratio"))
    found: dict[str, list[Outcome]] = {}
    for verdict in judge_on(gates, trial.metrics, names or [None], clocked or [None]):
        found.setdefault(verdict.gate, []).append(verdict.outcome)
    return {gate: worst(outcomes) for gate, outcomes in found.items()}


def leans_over(budget: Budget, trial: Trial) -> bool:
    """True if a trial breaks a limit that no clock decides as it was measured, if only within noise."""
    exact = replace(trial, metrics=at_points(trial.metrics))
    return "failed" in judge(budget, exact, timed=False).values()


@dataclass(frozen=True, slots=True)
class Miss:
    """How far a trial is from keeping one limit.

    Attributes:
        limit: The limit's name in the budget.
        target: The target whose own limit it is; None where all have the same.
        asked: Its value.
        needed: What it would have to be for the trial to keep it; None where the metric is missing.
        share: How far off, relative to the limit: 0 is kept, 1 is twice as large as asked.
    """

    limit: str
    asked: float
    needed: float | None
    share: float
    target: str | None = None


def misses(budget: Budget, trial: Trial, *, timed: bool = True) -> tuple[Miss, ...]:
    """The limits that a trial does not keep, by their point estimates, the worst first."""
    found = []
    for name, outcome in judge(budget, trial, timed=timed).items():
        if outcome == "failed":
            found.append(_missed(budget, trial, name))
    return tuple(sorted(found, key=lambda miss: -miss.share))


def _missed(budget: Budget, trial: Trial, name: str) -> Miss:
    """How far a trial is from one limit: where targets have their own, on the one that is the farthest off."""
    limit, target, metrics = budget.limits[name], None, trial.metrics
    if isinstance(limit, Mapping):

        def excess(target: str) -> float:
            own = next((m for m in metrics if m.name == METRICS[name] and m.target == target), None)
            return math.inf if own is None or own.value is None else own.value / limit[target]

        target = max(limit, key=excess)
        asked, in_own_unit = limit[target], True
        trial = replace(trial, metrics=tuple(metric for metric in metrics if metric.target == target))
    else:
        asked, in_own_unit = _asked(budget, name)
    metric = trial.worst(METRICS[name]) if in_own_unit else None
    needed = None if metric is None else metric.value
    return Miss(name, asked, needed, _share(name, asked, needed), target)


def _asked(budget: Budget, name: str) -> tuple[float, bool]:
    """A limit as a number, and whether it is in its metric's unit: a tolerance may count steps of each output."""
    if name == "max_abs_error":
        limit, counts_steps = in_steps(budget.limits[name])
        return limit, not counts_steps
    return float(budget.limits[name]), True


def _share(name: str, asked: float, needed: float | None) -> float:
    if needed is None:
        return math.inf
    if name.endswith("_db"):
        return 10 ** ((asked - needed) / 20) - 1  # decibels: as a ratio of amplitudes
    return abs(needed - asked) / asked if asked else math.inf


def nearest(budget: Budget, trials: Sequence[Trial], *, timed: bool = True) -> dict[str, Trial]:
    """For each limit, the trial that comes nearest to it among those that keep all the others.

    So what is said of ``max_size`` is the smallest of them that keeps the accuracy, and of ``max_accuracy_drop`` the
    most accurate that fits. A limit that no trial comes near alone has no entry.
    """
    alone: dict[str, list[tuple[float, int, Trial]]] = {}
    for trial in trials:
        missed = misses(budget, trial, timed=timed)
        if len(missed) == 1:
            alone.setdefault(missed[0].limit, []).append((missed[0].share, trial.number, trial))
    return {limit: min(alone[limit], key=lambda found: found[:2])[2] for limit in budget.limits if limit in alone}

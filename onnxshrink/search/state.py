"""A search so far, for those who watch it and those who write it down."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from onnxshrink.config.budget import Budget
from onnxshrink.search.attempt import Task
from onnxshrink.search.constraints import judge, leans_over
from onnxshrink.search.pareto import Objectives, front
from onnxshrink.search.record import objectives
from onnxshrink.search.trial import Status, Trial, key_of, size_of

_DEPTHS: tuple[Status, ...] = ("evaluated", "failed", "probed", "predicted")


@dataclass(frozen=True)
class State:
    """A search so far.

    Attributes:
        budget: What is asked.
        trials: Everything tried; a point has one trial for each depth that it was tried at.
        seconds: Time spent.
        n_points: Points of the space.
        at_work: What is being tried.
        is_whole: False if the search ended before all that might do was tried.
    """

    budget: Budget
    trials: tuple[Trial, ...]
    seconds: float
    n_points: int = 0
    at_work: tuple[Task, ...] = ()
    is_whole: bool = True

    @cached_property
    def evaluated(self) -> tuple[Trial, ...]:
        """The trials that were measured fully."""
        return tuple(trial for trial in self.trials if trial.status == "evaluated")

    @cached_property
    def front(self) -> tuple[Trial, ...]:
        """The evaluated trials that no other beats in bytes and quality, by bytes."""
        points = [objectives(trial) for trial in self.evaluated]
        return tuple(sorted((self.evaluated[index] for index in front(points)), key=size_of))

    @cached_property
    def keeping(self) -> tuple[Trial, ...]:
        """The evaluated trials that break no limit but those that a clock decides."""
        return tuple(t for t in self.evaluated if "failed" not in judge(self.budget, t, timed=False).values())

    @property
    def best(self) -> Trial | None:
        """The best of those that keep every limit a clock need not decide, or None."""
        return min(self.keeping, key=self.rank, default=None)

    def rank(self, trial: Trial) -> Objectives:
        """The order of the evaluated trials: those that keep every limit as measured, then what is wanted small."""
        first = objectives(trial)[1 if self.budget.minimize == "accuracy_drop" else 0]
        return (float(leans_over(self.budget, trial)), first, *objectives(trial))

    @cached_property
    def deepest(self) -> tuple[Trial, ...]:
        """For each point that was tried, the trial that knows most of it, in the order in which they were begun."""
        found: dict[str, Trial] = {}
        for status in _DEPTHS:
            for trial in self.trials:
                if trial.status == status:
                    found.setdefault(key_of(trial.point), trial)
        return tuple(sorted(found.values(), key=lambda trial: trial.number))

    @property
    def counts(self) -> dict[Status, int]:
        """How many points came how far."""
        counts = Counter(trial.status for trial in self.deepest)
        return {status: counts[status] for status in _DEPTHS}

    @property
    def seconds_left(self) -> float:
        """Time that the search may still take."""
        return max(0.0, self.budget.time_limit - self.seconds)

    @property
    def n_left(self) -> int:
        """Points that are likely to be tried yet: those left, or as many as the time allows at the pace so far."""
        counts = self.counts
        left = max(0, self.n_points - counts["evaluated"] - counts["failed"] - counts["probed"])
        done = self.n_points - left
        work = sum(trial.seconds for trial in self.trials)
        if not done or not work:
            return left
        width = self.budget.parallel.workers if self.budget.parallel else 1
        return min(left, math.ceil(self.seconds_left * width * done / work))

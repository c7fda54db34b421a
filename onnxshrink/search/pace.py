"""The time of a search: what is left of it, and whether a trial is likely to end within it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from onnxshrink.config.run import RunConfig
from onnxshrink.search.attempt import Task
from onnxshrink.search.trial import SCHEME, Trial, key_of, trunk_of

Clock: TypeAlias = Callable[[], float]

_MARGIN = 1.25
"""A trial may take so much longer than the longest of its kind did."""

_OPENING = 1.5
"""The final measurement takes so much longer than its timing alone: sessions are opened, the winner is copied."""


@dataclass(frozen=True, slots=True)
class Pace:
    """When a search began and when it must end.

    Attributes:
        started: The clock's time at its beginning.
        seconds: How long it may take, the final measurement included.
        reserve: Seconds of those that the final measurement needs.
        clock: Seconds since any moment.
        trials: What was tried so far; it grows.
    """

    started: float
    seconds: float
    reserve: float
    clock: Clock
    trials: Sequence[Trial]

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self.clock() - self.started

    @property
    def left(self) -> float:
        """Seconds until the final measurement must begin; negative when it should have."""
        return self.seconds - self.reserve - self.spent

    def allows(self, task: Task) -> bool:
        """True if a task is likely to end in time: one of a kind that was never tried is, as long as any is left."""
        return self.left > 0 and expected(task, self.trials) <= self.left

    def is_over(self) -> bool:
        """True if the final measurement must begin."""
        return self.left <= 0


def expected(task: Task, trials: Sequence[Trial]) -> float:
    """Seconds that a task is likely to take: a little more than the longest of its kind; 0 where there was none.

    A kind is the depth and the scheme, and whether the task is the first of its trunk: then the trunk is made as well,
    which may train.
    """
    kind, seconds, begun = _kind(task.depth, task.point[SCHEME], first=_is_first(task, trials)), [0.0], set[str]()
    for trial in trials:
        trunk = key_of(trunk_of(trial.point))
        depth = _DEPTHS.get(trial.status, "probe")
        if _kind(depth, trial.point[SCHEME], first=depth != "predict" and trunk not in begun) == kind:
            seconds.append(trial.seconds)
        if depth != "predict":
            begun.add(trunk)
    return _MARGIN * max(seconds)


_DEPTHS = {"predicted": "predict", "probed": "probe", "evaluated": "evaluate"}


def _kind(depth: str, scheme: str, *, first: bool) -> tuple[str, str]:
    return ("first", "") if first else (depth, scheme)


def _is_first(task: Task, trials: Sequence[Trial]) -> bool:
    trunk = trunk_of(task.point)
    return task.depth != "predict" and not any(
        trunk_of(trial.point) == trunk for trial in trials if trial.status != "predicted"
    )


def final_seconds(config: RunConfig, n_models: int) -> float:
    """Seconds that the final measurement of so many models is likely to take, beside its reference."""
    timing = sum(target.latency_seconds for target in config.targets if target.latency)
    return _OPENING * (n_models + 1) * timing

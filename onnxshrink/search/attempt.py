"""One trial, as deep as it is asked for: a function of plain values, which any process can run."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from onnxshrink.config.run import RunConfig
from onnxshrink.config.stages import PruneChannels, Stage
from onnxshrink.core.drift import N_LISTED
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.core.store import Store
from onnxshrink.pipeline import evaluate
from onnxshrink.search.space import VARIANT, Space
from onnxshrink.search.trial import Point, Status, Trial
from onnxshrink.stages.group import train_together
from onnxshrink.stages.memo import Memo
from onnxshrink.verify.footprint import measure_footprint

PROBE_SAMPLES = N_LISTED
"""Evaluation samples that tell whether a trial is worth all of them."""

Depth: TypeAlias = Literal["predict", "probe", "evaluate"]
"""How much is done for a point: its network is cut and stored without being trained, which tells its bytes; it is made,
and measured on a few samples; it is measured on all of them."""

_STATUS: dict[Depth, Status] = {"predict": "predicted", "probe": "probed", "evaluate": "evaluated"}


@dataclass(frozen=True, slots=True)
class Task:
    """A point, and how deep to look."""

    number: int
    point: Point
    depth: Depth


class TimeUp(BaseException):
    """The search's time is over: like Ctrl-C nothing half-done is kept, but for what a training can go on from."""


class Deadline(Silent):
    """A listener that ends the work it listens to.

    Args:
        until: Seconds of `time.time`, for the work may be done on another machine.
    """

    def __init__(self, until: float) -> None:
        self._until = until

    def started(self, step: str) -> None:
        """See `progress`."""
        self.progress(step, 0, 0)

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """Raise `TimeUp` if it is."""
        del step, done, total, detail
        if time.time() >= self._until:
            raise TimeUp


def attempt_until(space: Space, runs: Path, until: float, task: Task, *, processes: int = 1) -> Trial | None:
    """As `attempt`; None where the task was not done at ``until``, seconds of `time.time`."""
    try:
        return attempt(space, runs, task, Deadline(until), processes=processes)
    except TimeUp:
        return None


def attempt(space: Space, runs: Path, task: Task, events: Events | None = None, *, processes: int = 1) -> Trial:
    """Do a task.

    Args:
        space: Where the point lies.
        runs: Folder of the store; what it has is not done again.
        task: What to do.
        events: Listener for progress.
        processes: How many share each training.

    Returns:
        What was learnt. A model that cannot be made is a failed trial, with the reason.

    Raises:
        ShrinkError: What no other point could change, such as data that does not fit.
    """
    started, events = time.perf_counter(), events or Silent()
    config = space.config(task.point)
    digest: str | None = None
    errors: tuple[float, ...] = ()
    try:
        if task.depth == "predict":
            metrics = _untrained(config, runs, space.base, events)
        else:
            if processes > 1:
                train_together(config, runs=runs, base=space.base, processes=processes, events=events)
            wanted = _shortened(config) if task.depth == "probe" else config
            rows = evaluate(wanted, runs=runs, base=space.base, events=events)
            row = next(row for row in rows if row.name == VARIANT)
            if not row.digest:
                return Trial(task.number, task.point, "failed", reason=row.verdicts[0].reason)
            metrics, digest = row.metrics, row.digest
            errors = _errors(row) if task.depth == "probe" else ()
    except (ModelError, ParityError) as e:
        return Trial(task.number, task.point, "failed", reason=e.what, seconds=time.perf_counter() - started)
    seconds = round(time.perf_counter() - started, 3)
    return Trial(task.number, task.point, _STATUS[task.depth], metrics, digest, errors, seconds=seconds)


def _errors(row: Candidate) -> tuple[float, ...]:
    """The squared error of each sample, of the output that drifts most; four digits tell two models apart."""
    listed = row.details.get("sample_errors", {})
    drifts = [m for m in row.metrics if m.name == "sqnr_db" and m.output in listed.get(m.target, {})]
    if not drifts:
        return ()
    worst = min(drifts, key=lambda metric: math.inf if metric.value is None else metric.value)
    return tuple(float(f"{error:.4g}") for error in listed[worst.target][worst.output])


def _shortened(config: RunConfig) -> RunConfig:
    """The config with the first few evaluation samples only."""
    evaluation = config.data.evaluation
    if evaluation is None:
        return config
    few = min(PROBE_SAMPLES, evaluation.max_samples or PROBE_SAMPLES)
    data = config.data.model_copy(update={"evaluation": evaluation.model_copy(update={"max_samples": few})})
    return config.model_copy(update={"data": data})


def _untrained(config: RunConfig, runs: Path, base: Path, events: Events) -> tuple[Metric, ...]:
    """Bytes of the model without its training: what is cut, and how it is stored, does not depend on the weights."""
    stages = [_hasty(stage) for stage in (*config.stages, *config.variants[VARIANT]) if not _only_trains(stage)]
    with search_path(base):
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events)
        return measure_footprint(memo.fold(memo.open(config.model), stages, "untrained/")[-1].model_path)


def _only_trains(stage: Stage) -> bool:
    return stage.trains and not isinstance(stage, PruneChannels)


def _hasty(stage: Stage) -> Stage:
    """A cut in one step, without training between."""
    if isinstance(stage, PruneChannels):
        return stage.model_copy(update={"steps": 1, "finetune": None, "importance": "magnitude_l2"})
    return stage

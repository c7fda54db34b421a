"""The limit that every step must keep, and what measures a step against it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from onnxshrink.config.data import Data
from onnxshrink.config.gates import Gates, Target
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ConfigError, InferenceError, ModelError, ParityError
from onnxshrink.core.events import Events
from onnxshrink.core.report import finite
from onnxshrink.search.checkpoints import Checkpoint, Way
from onnxshrink.stages.memo import Memo
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.checkpoints import (
    Runtime,
    load_deviations,
    measure_deviations,
    measure_scores,
    of_the_reference,
    save_deviations,
)
from onnxshrink.verify.comparison import accuracy_metrics
from onnxshrink.verify.evidence import load_quality, save_quality
from onnxshrink.verify.verify import Quality

MetricOfLimit: TypeAlias = Literal["sqnr_db", "max_abs_error", "accuracy_drop"]


@dataclass(frozen=True, slots=True)
class Limit:
    """What every step must keep.

    Attributes:
        metric: ``sqnr_db`` of the worst output, at least; ``max_abs_error`` of the worst output or ``accuracy_drop``,
            at most.
        value: In the metric's unit.
    """

    metric: MetricOfLimit
    value: float

    def is_kept(self, value: float) -> bool:
        """Whether a measured value keeps the limit; NaN never does."""
        return value >= self.value if self.metric == "sqnr_db" else value <= self.value


@dataclass(frozen=True, slots=True)
class Check:
    """One step that was measured.

    Attributes:
        step: Its place among the steps, from 0.
        name: Its name.
        value: The limit's metric; None where it is not finite, and the note says why.
        is_broken: Whether the limit is not kept, or there is no model, or one that ONNX Runtime does not load or run.
        output: The worst output, for drift.
        note: What else there is to say of the value.
        runs: False where there was nothing to measure, and the note says why.
    """

    step: int
    name: str
    value: float | None
    is_broken: bool
    output: str | None = None
    note: str | None = None
    runs: bool = True


Measure: TypeAlias = Callable[[int, Checkpoint], Check]
"""Measures the step of a place."""


def limit_of(
    gates: Gates, min_sqnr_db: float | None, max_abs_error: float | None, max_accuracy_drop: float | None
) -> Limit:
    """The one limit that was asked for, else the config's own: its SQNR gate, or that of the accuracy drop.

    Raises:
        ConfigError: There is none, or more than one was asked for.
    """
    given: tuple[tuple[MetricOfLimit, float | None], ...] = (
        ("sqnr_db", min_sqnr_db),
        ("max_abs_error", max_abs_error),
        ("accuracy_drop", max_accuracy_drop),
    )
    asked = [Limit(metric, value) for metric, value in given if value is not None]
    if not asked and gates.min_sqnr_db is not None:
        asked = [Limit("sqnr_db", gates.min_sqnr_db)]
    elif not asked and gates.max_accuracy_drop is not None:
        asked = [Limit("accuracy_drop", gates.max_accuracy_drop)]
    if len(asked) != 1:
        raise ConfigError(
            "there is no limit that a step could break"
            if not asked
            else "a search has one limit, and several are given",
            got=", ".join(f"{limit.metric} {limit.value:g}" for limit in asked) or None,
            want="--min-sqnr-db, --max-abs-error or --max-accuracy-drop",
            fix="give one, such as --min-sqnr-db 30",
        )
    return asked[0]


def measure_of(memo: Memo, way: Way, limit: Limit, data: Data, *, data_key: Any, seed: int, events: Events) -> Measure:
    """What measures a checkpoint; the store keeps what was measured, whatever the limit is.

    A step that cannot make its model, or makes one that ONNX Runtime does not load or cannot run on the samples, breaks
    every limit. Where the reference is not loaded or cannot be run either, that is an error and no step's doing.
    """

    def key(model: Artifact, runtime: Runtime) -> Facts:
        session = {"target": runtime.target.model_dump(mode="json"), "without": list(runtime.without)}
        return {"model": model.digest, "data": data_key, "optimization": runtime.optimization, **session}

    def deviation(step: int, at: Checkpoint, model: Artifact) -> Check:
        name = f"check {at.name}"

        def work(out: Path) -> Facts:
            progress = partial(events.progress, name)
            save_deviations(measure_deviations(way.reference, model, at.runtime, data, progress), out)
            return {}

        whole = {"reference": way.reference.digest, **key(model, at.runtime)}
        evidence = memo.once(name, "deviations", whole, "evidence", work, uses={way.reference.kind, "onnx"})
        found = load_deviations(evidence.path)
        by_sqnr = limit.metric == "sqnr_db"
        worst = min(found, key=lambda one: one.sqnr_db if by_sqnr else -one.max_abs_error)
        value = worst.sqnr_db if by_sqnr else worst.max_abs_error
        note = worst.flaw or ("identical" if worst.max_abs_error == 0 else None)
        return Check(step, at.name, finite(value), not limit.is_kept(value), worst.output, note)

    def scores(model: Artifact, name: str, runtime: Runtime) -> Scores:
        def work(out: Path) -> Facts:
            progress = partial(events.progress, name)
            save_quality(Quality((), {"": measure_scores(model, runtime, data, progress)}), out)
            return {}

        evidence = memo.once(name, "scores", key(model, runtime), "evidence", work, uses={"onnx"})
        return load_quality(evidence.path).scores[""]

    def drop(step: int, at: Checkpoint, model: Artifact) -> Check:
        plain = Runtime(Target(threads=at.runtime.target.threads))
        with of_the_reference():
            original = scores(way.reference, f"score {way.reference_name}", plain)
        metrics = accuracy_metrics(original, scores(model, f"score {at.name}", at.runtime), target_name="", seed=seed)
        found = next(metric for metric in metrics if metric.name == "accuracy_drop")
        broken = found.value is None or not limit.is_kept(found.value)
        return Check(step, at.name, found.value, broken, note=found.note)

    def measure(step: int, at: Checkpoint) -> Check:
        try:
            model = at.make()
        except (ModelError, ParityError) as e:
            return Check(step, at.name, None, is_broken=True, note=f"no model: {e.what}", runs=False)
        try:
            return drop(step, at, model) if limit.metric == "accuracy_drop" else deviation(step, at, model)
        except ModelError as e:
            return _refused(step, at, model, way.reference, e)

    return measure


def _refused(step: int, at: Checkpoint, model: Artifact, reference: Artifact, error: ModelError) -> Check:
    """The check of a model that ONNX Runtime does not load, or cannot run on a batch that the reference has answered.

    Raises:
        ModelError: ``error``, where it is another, or ONNX Runtime does not even load the reference.
    """
    if isinstance(error, InferenceError):
        return Check(step, at.name, None, is_broken=True, note=f"no answer: {error.what}", runs=False)
    reason = at.runtime.refuses(model)
    if reason is None or (reference.kind == "onnx" and Runtime().refuses(reference)):
        raise error
    return Check(step, at.name, None, is_broken=True, note=f"no session: {reason}", runs=False)

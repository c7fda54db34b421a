"""The task metric, sample by sample, so that two models can be compared on the samples where they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxshrink.config.data import MetricName
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.intervals import (
    Floats,
    Interval,
    bootstrap,
    matched_difference_interval,
    percentile_interval,
    wilson_interval,
)
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import LABELS, Array, describe
from onnxshrink.data.labels import check_labels
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session

_RANK = {"top1": 1, "top5": 5}


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scored on each sample, in the reader's order.

    Attributes:
        metric: The task metric.
        values: ``(n_samples,)`` float64. top1, top5: 1 where the label is among the best classes, else 0; mae: mean
            absolute error of the sample; rmse: mean squared error of the sample. NaN where the model gave NaN.
    """

    metric: MetricName
    values: Floats

    @property
    def counts(self) -> bool:
        """True for metrics that count right answers (larger is better), False for errors (smaller is better)."""
        return self.metric in _RANK


def score(
    session: Session, reader: Reader, metric: MetricName, progress: Callable[[int, int], None] | None = None
) -> Scores:
    """Run the model on every sample and compare its answer with the label.

    The first output whose shape fits the metric is scored: ``(n, n_classes)`` for top1 and top5, the labels' shape for
    mae and rmse.

    Args:
        session: The model.
        reader: Samples, opened with ``labels=True``: ``(n,)`` integers for top1 and top5, the output's shape otherwise.
        metric: The task metric.
        progress: Told the samples done and their total after each batch.

    Raises:
        DataError: Labels are missing or do not fit the model, or the reader is empty.
        ModelError: No output can be scored with ``metric``.
    """
    parts: list[Floats] = []
    for batch in reader:
        if LABELS not in batch:
            raise DataError(
                f"the metric {metric!r} needs labels", where=reader.where, fix=f"add an array named {LABELS!r}"
            )
        outputs, labels = session.run(batch), batch[LABELS]
        if metric in _RANK:
            logits = _class_output(outputs, metric, where=session.name)
            check_labels(
                labels,
                n_samples=len(logits),
                n_classes=logits.shape[1],
                where=reader.where,
                first_sample=sum(map(len, parts)),
            )
            parts.append(_among_best(logits, labels, _RANK[metric]))
        else:
            parts.append(_errors(outputs, labels, metric, where=reader.where))
        if progress:
            progress(sum(map(len, parts)), len(reader))
    if not parts:
        raise DataError("there are no samples to score", where=reader.where, want="at least one sample")
    return Scores(metric, np.concatenate(parts))


def accuracy_metrics(original: Scores | None, candidate: Scores, *, target_name: str, seed: int) -> tuple[Metric, ...]:
    """The task metric of a candidate with its interval, and its drop against the original on the same samples.

    ``accuracy_drop`` is positive where the candidate is worse, whatever the metric: original - candidate for top1 and
    top5, candidate - original for mae and rmse.

    Args:
        original: Scores of the model the user brought, or None for that model itself: then there is no drop.
        candidate: Scores of the model under test.
        target_name: The execution target.
        seed: Seed of the bootstrap behind the intervals of mae and rmse.

    Raises:
        DataError: The reader did not give the same samples to both.
    """
    unit, n_samples = ("ratio" if candidate.counts else ""), len(candidate.values)
    metrics = [Metric("evaluation_samples", float(n_samples), "count", target=target_name)]
    for side, scores in (("candidate", candidate), ("original", original)):
        if scores is not None and np.isnan(scores.values).any():
            note = f"{side} gives NaN at sample {int(np.isnan(scores.values).argmax())}"
            names = (candidate.metric, "accuracy_drop") if original else (candidate.metric,)
            return (*metrics, *(Metric(name, None, unit, target=target_name, note=note) for name in names))
    value = float(_total(candidate)(candidate.values))
    metrics.append(Metric(candidate.metric, value, unit, *_interval(candidate, seed), target=target_name))
    if original is not None:
        if len(original.values) != n_samples:
            raise DataError(
                "the evaluation data gave the models different samples",
                got=f"{n_samples} samples",
                want=f"{len(original.values)} samples, as for the original",
                fix="let the reader give the same batches each time it is iterated",
            )
        sign = 1.0 if candidate.counts else -1.0
        drop = sign * (float(_total(original)(original.values)) - value)
        bounds = _drop_interval(original, candidate, seed)
        metrics.append(Metric("accuracy_drop", drop, unit, *bounds, target=target_name))
    return tuple(metrics)


def _total(scores: Scores) -> Callable[[Floats], Floats]:
    """The metric over all samples, ``(..., n)`` to ``(...)``."""

    def total(values: Floats) -> Floats:
        mean: Floats = np.mean(values, axis=-1)
        root: Floats = np.sqrt(mean)
        return root if scores.metric == "rmse" else mean

    return total


def _interval(scores: Scores, seed: int) -> Interval:
    if scores.counts:
        return wilson_interval(int(scores.values.sum()), len(scores.values))
    return percentile_interval(bootstrap(scores.values[None], _total(scores), seed=seed)[0], len(scores.values))


def _drop_interval(original: Scores, candidate: Scores, seed: int) -> Interval:
    before, after = original.values, candidate.values
    if candidate.counts:
        return matched_difference_interval(int((before > after).sum()), int((after > before).sum()), len(before))
    draws = bootstrap(np.stack([before, after]), _total(candidate), seed=seed)
    return percentile_interval(draws[1] - draws[0], len(before))


def _class_output(outputs: dict[str, Array], metric: MetricName, *, where: str) -> Array:
    n_classes = _RANK[metric] + 1
    for array in outputs.values():
        if array.ndim == 2 and array.shape[1] >= n_classes and array.dtype.kind == "f":
            return array
    raise ModelError(
        f"no output of the model can be scored with {metric!r}",
        where=where,
        got=", ".join(describe(name, array) for name, array in outputs.items()),
        want=f"a float output [n, n_classes] with at least {n_classes} classes",
        fix="use another metric, or export the logits as an output",
    )


def _among_best(logits: Array, labels: Array, rank: int) -> Floats:
    """1 where fewer than ``rank`` classes beat the label's; among equals the first wins, as argmax has it."""
    column = labels.astype(np.int64)[:, None]
    own = np.take_along_axis(logits, column, axis=1)
    earlier = np.arange(logits.shape[1]) < column
    better = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    correct: Floats = (better < rank).astype(np.float64)
    correct[np.isnan(logits).any(axis=1)] = np.nan
    return correct


def _errors(outputs: dict[str, Array], labels: Array, metric: MetricName, *, where: str) -> Floats:
    """Mean absolute or squared error of each sample, over the label's own axes."""
    output = next((array for array in outputs.values() if _squeezed(array) == _squeezed(labels)), None)
    if output is None or labels.dtype.kind not in "fiu":
        raise DataError(
            "the labels have the shape of no output of the model",
            where=where,
            got=describe(LABELS, labels),
            want=" or ".join(describe(name, array) for name, array in outputs.items()),
            fix="give labels of the output's shape, samples on axis 0",
        )
    error = output.reshape(len(labels), -1).astype(np.float64) - labels.reshape(len(labels), -1).astype(np.float64)
    values: Floats = np.abs(error) if metric == "mae" else np.square(error)
    return np.asarray(values.mean(axis=1))


def _squeezed(array: Array) -> tuple[int, ...]:
    """The shape less a last axis of length 1, so that labels ``(n,)`` fit an output ``(n, 1)``."""
    shape = tuple(array.shape)
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape

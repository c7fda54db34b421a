"""The task metric with its interval, and its drop as a paired comparison on the same samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxshrink.config.metrics import better_of, name_of
from onnxshrink.core.errors import DataError
from onnxshrink.core.intervals import (
    Floats,
    Interval,
    matched_difference_interval,
    mcnemar_p,
    percentile_interval,
    resamples,
    wilson_interval,
)
from onnxshrink.core.report import Metric
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.task_metrics import Measure, measure_of
from onnxshrink.verify.totals import one_more_of_each


def accuracy_metrics(original: Scores | None, candidate: Scores, *, target_name: str, seed: int) -> tuple[Metric, ...]:
    """The task metric of a candidate with its interval, and its drop against the original on the same samples.

    ``accuracy_drop`` is positive where the candidate is worse, whatever the metric: original - candidate where higher
    is better, candidate - original where lower is. For top1 and top5 the interval of the metric is Wilson's, that of
    the drop Bonett and Price's, and ``accuracy_drop_p`` is the p-value of McNemar's exact test that neither model is
    better; the intervals of all others are from a bootstrap of the samples, the same for both models.

    Args:
        original: Scores of the model the user brought, or None for that model itself: then there is no drop, and the
            metric's note says what of the scores seems wrong.
        candidate: Scores of the model under test.
        target_name: The execution target.
        seed: Seed of the bootstrap.

    Raises:
        DataError: The reader did not give the same samples to both, or only one where an interval needs two.
    """
    measure, name = measure_of(candidate.metric), name_of(candidate.metric)
    metrics = [Metric("evaluation_samples", float(candidate.n_samples), "count", target=target_name)]
    names = (name, "accuracy_drop") if original else (name,)
    note = _undefined(original, candidate, measure)
    if note:
        return (*metrics, *(Metric(name, None, measure.unit, target=target_name, note=note) for name in names))
    if original is not None and (original.n_samples, original.values.shape) != (
        candidate.n_samples,
        candidate.values.shape,
    ):
        raise _different(original, candidate)
    if measure.rank:
        found = _proportions(original, candidate, name, target_name)
    else:
        found = _resampled(original, candidate, measure, target_name, seed)
    return (*metrics, *found)


def accuracy_details(original: Scores | None, candidate: Scores) -> dict[str, Any]:
    """What the metrics of `accuracy_metrics` rest on, as plain JSON.

    Returns:
        ``metric``, which way is ``better``, the ``interval``'s method, and of top1 and top5 how many samples are
        ``lost`` (right before, wrong now) and ``won``.
    """
    is_rank = measure_of(candidate.metric).rank is not None
    details: dict[str, Any] = {
        "metric": name_of(candidate.metric),
        "better": better_of(candidate.metric),
        "interval": "Wilson; of the drop: Bonett and Price" if is_rank else "bootstrap of the samples, paired",
    }
    if is_rank and original is not None and original.values.shape == candidate.values.shape:
        lost, won = _changes(original, candidate)
        details |= {"lost": lost, "won": won}
    return details


def _proportions(original: Scores | None, candidate: Scores, name: str, target: str) -> list[Metric]:
    """Of samples that are right or wrong."""
    n, right = candidate.n_samples, int(candidate.values.sum())
    lo, hi = wilson_interval(right, n)
    if original is None:
        assert candidate.n_classes is not None  # noqa: S101
        chance = min(1.0, (measure_of(candidate.metric).rank or 1) / candidate.n_classes)
        note = f"not above the chance of {chance:.1%} with {candidate.n_classes} classes" if lo <= chance else None
        return [Metric(name, right / n, "ratio", lo, hi, target, note=note)]
    lost, won = _changes(original, candidate)
    drop = Metric("accuracy_drop", (lost - won) / n, "ratio", *matched_difference_interval(lost, won, n), target)
    p_value = Metric("accuracy_drop_p", mcnemar_p(lost, won), target=target)
    return [Metric(name, right / n, "ratio", lo, hi, target), drop, p_value]


def _resampled(original: Scores | None, candidate: Scores, measure: Measure, target: str, seed: int) -> list[Metric]:
    """Of any metric, by a bootstrap in which both models meet the same samples."""
    models = [candidate.values] if original is None else [candidate.values, original.values]
    if len(candidate.values) < 2:
        raise DataError("one sample has no interval", got=f"{candidate.n_samples} samples", want="at least two samples")
    values = [_value(measure, rows) for rows in models]
    if measure.imagined:
        after, before = models[0], models[-1]
        models = [*reversed(one_more_of_each(before, after, candidate.n_samples))][: len(models)]
    draws = _draws(measure, models, seed)
    name, unit, n = name_of(candidate.metric), measure.unit, len(candidate.values)
    found = [Metric(name, values[0], unit, *_around(values[0], draws[0], n), target)]
    if original is not None:
        sign = 1.0 if better_of(candidate.metric) == "higher" else -1.0
        drop = sign * (values[1] - values[0])
        found.append(Metric("accuracy_drop", drop, unit, *_around(drop, sign * (draws[1] - draws[0]), n), target))
    return found


def _draws(measure: Measure, models: list[Floats], seed: int) -> Floats:
    """The metric of each model over the same resamples, ``(models, r)``; those without a value are left out."""
    width = sum(rows.shape[1] for rows in models)
    parts = [
        np.stack([measure.total(rows, weights) for rows in models])
        for weights in resamples(len(models[0]), seed=seed, width=width)
    ]
    draws: Floats = np.concatenate(parts, axis=1)
    return draws[:, np.isfinite(draws).all(axis=0)]


def _around(value: float, draws: Floats, n: int) -> Interval:
    lo, hi = percentile_interval(draws, n)
    return min(value, lo), max(value, hi)


def _value(measure: Measure, rows: Floats) -> float:
    return float(measure.total(rows, np.ones((1, len(rows))))[0])


def _changes(original: Scores, candidate: Scores) -> tuple[int, int]:
    """Samples lost and won."""
    before, after = original.values, candidate.values
    return int((before > after).sum()), int((after > before).sum())


def _undefined(original: Scores | None, candidate: Scores, measure: Measure) -> str | None:
    """Why the metric has no value: NaN, or nothing that it could be taken of."""
    for side, scores in (("candidate", candidate), ("original", original)):
        if scores is None:
            continue
        bad = np.isnan(scores.values).any(axis=1)
        if bad.any():
            group = -(-scores.n_samples // len(scores.values))
            first = int(bad.argmax()) * group
            return f"{side} gives NaN at sample {first}" + (f" to {first + group - 1}" if group > 1 else "")
        if not np.isfinite(_value(measure, scores.values)):
            return f"{name_of(scores.metric)} of the {side} is undefined: its answers or the labels are all the same"
    return None


def _different(original: Scores, candidate: Scores) -> DataError:
    if original.n_samples == candidate.n_samples:
        return DataError(
            "the models have different numbers of classes",
            got=f"{candidate.values.shape[1] // 3} classes",
            want=f"{original.values.shape[1] // 3} classes, as the original",
            fix="compare models of the same task",
        )
    return DataError(
        "the evaluation data gave the models different samples",
        got=f"{candidate.n_samples} samples",
        want=f"{original.n_samples} samples, as for the original",
        fix="let the reader give the same batches each time it is iterated",
    )

"""Drift of a candidate's outputs from the reference's on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from onnxshrink.core.drift import IDENTICAL, Drift
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.intervals import wilson_interval
from onnxshrink.core.report import Metric, finite
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session


def measure_drift(
    reference: Session,
    candidate: Session,
    reader: Reader,
    target_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Metric, ...]:
    """Run both models on every sample and compare their outputs, in memory that does not grow with the samples.

    Args:
        reference: The float model.
        candidate: The model under test, opened ``like`` the reference's inputs where its own differ.
        reader: Samples for both, of the candidate's `inputs`.
        target_name: The execution target the sessions run on.
        progress: Told the samples done and their total after each batch.

    Returns:
        For each output of the reference ``max_abs_error``, ``mean_abs_error``, ``sqnr_db``, ``cosine``, ``relative_l2``
        and, for 2-D outputs with several columns, ``top1_agreement``. Outputs without any difference have no finite
        ``sqnr_db``: its value is None and its note ``identical``. Where inputs were cast, the other notes say so.

    Raises:
        DataError: The reader is empty.
        ModelError: The models' outputs do not match.
    """
    partner = match_outputs(_names(reference), _names(candidate), where=candidate.name)
    drifts = {name: Drift(name) for name in partner}
    done = 0
    for batch in reader:
        expected, got = reference.run(batch), candidate.run(batch)
        drifts = {name: drift.update(expected[name], got[partner[name]]) for name, drift in drifts.items()}
        done += n_samples(batch, candidate.inputs)
        if progress:
            progress(done, len(reader))
    if not done:
        raise DataError("there are no samples to compare the models on", where=reader.where, want="at least one sample")
    metrics = (metric for drift in drifts.values() for metric in drift_metrics(drift, target_name, done))
    return tuple(replace(metric, note=metric.note or candidate.interface.note) for metric in metrics)


def match_outputs(reference: Sequence[str], candidate: Sequence[str], *, where: str) -> dict[str, str]:
    """The candidate's output for each of the reference's: by name, or by position where names differ.

    Raises:
        ModelError: Names differ, and so does the number of outputs.
    """
    if set(reference) <= set(candidate):
        return {name: name for name in reference}
    if len(reference) == len(candidate):
        return dict(zip(reference, candidate, strict=True))
    raise ModelError(
        "the candidate's outputs cannot be matched with the reference's",
        where=where,
        got=", ".join(candidate),
        want=", ".join(reference),
        fix="give both models the same output names, or the same number of outputs",
    )


def drift_metrics(drift: Drift, target_name: str, n_samples: int) -> tuple[Metric, ...]:
    """The measures of one output as metrics; one whose values are not finite has none, and says why."""
    worst = f"worst at sample {drift.worst_row}" if drift.max_abs and drift.n_rows == n_samples else None
    silent = None if math.isfinite(drift.cosine) else "one side is all zeros"
    measures = (
        ("max_abs_error", drift.max_abs, "", worst),
        ("mean_abs_error", drift.mean_abs, "", None),
        ("sqnr_db", drift.sqnr_db, "dB", IDENTICAL if drift.sqnr_db == math.inf else silent),
        ("cosine", drift.cosine, "", silent),
        ("relative_l2", drift.relative_l2, "ratio", silent),
    )
    metrics = [Metric(name, finite(value), unit, note=note) for name, value, unit, note in measures]
    if drift.top1_agreement is not None:
        lo, hi = wilson_interval(drift.n_agreed, drift.n_ranked)
        metrics.append(Metric("top1_agreement", drift.top1_agreement, "ratio", lo, hi))
    return tuple(
        replace(metric, target=target_name, output=drift.output)
        if drift.flaw is None
        else Metric(metric.name, None, metric.unit, target=target_name, output=drift.output, note=drift.flaw)
        for metric in metrics
    )


def _names(session: Session) -> list[str]:
    return [spec.name for spec in session.outputs]

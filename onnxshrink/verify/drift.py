"""Drift of a candidate's outputs from the reference's on the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnxshrink.core.drift import IDENTICAL, N_LISTED, Drift
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.intervals import wilson_interval
from onnxshrink.core.report import Metric, finite
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session
from onnxshrink.verify.kernel_error import split_metrics


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two models' outputs have to do with each other.

    Attributes:
        metrics: For each output of the reference: ``max_abs_error``, ``mean_abs_error``, ``rmse_error``, ``sqnr_db``,
            ``psnr_db``, ``cosine`` and ``relative_l2``; ``top1_agreement`` and ``top5_agreement`` for 2-D outputs with
            several columns, and more than five; ``kl_divergence`` for probabilities, else ``softmax_kl`` for such 2-D
            outputs; ``quantization_sqnr_db`` and ``kernel_sqnr_db`` where the candidate was run in float as well.
            Outputs without any difference have no finite ``sqnr_db``: its value is None and its note ``identical``.
            Where inputs were cast, the other notes say so.
        worst_samples: For each output whose axis 0 is the samples, those with the largest relative error, as plain
            JSON: ``sample``, ``relative_l2``, ``max_abs_error``, ``sqnr_db``; None for what has no finite value.
        sample_errors: For each such output, where all are finite and there are few samples, `N_LISTED` at most: the sum
            of ``(reference - candidate)**2`` of every one.
        partner: The candidate's output for each of the reference's.
    """

    metrics: tuple[Metric, ...]
    worst_samples: dict[str, list[dict[str, Any]]]
    sample_errors: dict[str, list[float]]
    partner: dict[str, str]


def compare_outputs(
    reference: Session,
    candidate: Session,
    reader: Reader,
    target_name: str,
    progress: Callable[[int, int], None] | None = None,
    *,
    literal: Session | None = None,
) -> Comparison:
    """Run the models on every sample, once, and compare their outputs, in memory that does not grow with the samples.

    Args:
        reference: The float model.
        candidate: The model under test, opened ``like`` the reference's inputs where its own differ.
        reader: Samples for both, of the candidate's `inputs`.
        target_name: The execution target the sessions run on.
        progress: Told the samples done and their total after each batch.
        literal: The candidate run in float, see `open_literal`, to split drift in quantization and kernel error.

    Raises:
        DataError: The reader is empty.
        ModelError: The models' outputs do not match.
    """
    partner = match_outputs(_names(reference), _names(candidate), where=candidate.name)
    total, quantization, kernel = ({name: Drift(name) for name in partner} for _ in range(3))
    done = 0
    for batch in reader:
        expected, got = reference.run(batch), candidate.run(batch)
        between = literal.run(batch) if literal else {}
        for name, own in partner.items():
            total[name] = total[name].update(expected[name], got[own])
            if literal:
                quantization[name] = quantization[name].update(expected[name], between[own])
                kernel[name] = kernel[name].update(between[own], got[own])
        done += n_samples(batch, candidate.inputs)
        if progress:
            progress(done, len(reader))
    if not done:
        raise DataError("there are no samples to compare the models on", where=reader.where, want="at least one sample")
    metrics = [metric for drift in total.values() for metric in drift_metrics(drift, target_name, done)]
    if literal:
        metrics += [
            metric for name in partner for metric in split_metrics(quantization[name], kernel[name], target_name)
        ]
    return Comparison(
        tuple(replace(metric, note=metric.note or candidate.interface.note) for metric in metrics),
        {name: _worst_samples(drift) for name, drift in total.items() if drift.n_rows == done},
        {
            name: list(drift.first_squares)
            for name, drift in total.items()
            if drift.n_rows == done <= N_LISTED and drift.flaw is None
        },
        partner,
    )


def measure_drift(
    reference: Session,
    candidate: Session,
    reader: Reader,
    target_name: str,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Metric, ...]:
    """The metrics of `compare_outputs`, with the same arguments and errors."""
    return compare_outputs(reference, candidate, reader, target_name, progress).metrics


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
    flat = "the reference is constant" if drift.psnr_db == -math.inf else None
    measures = [
        ("max_abs_error", drift.max_abs, "", worst),
        ("mean_abs_error", drift.mean_abs, "", None),
        ("rmse_error", drift.rmse, "", None),
        ("sqnr_db", drift.sqnr_db, "dB", IDENTICAL if drift.sqnr_db == math.inf else silent),
        ("psnr_db", drift.psnr_db, "dB", IDENTICAL if drift.psnr_db == math.inf else flat),
        ("cosine", drift.cosine, "", silent),
        ("relative_l2", drift.relative_l2, "ratio", silent),
    ]
    divergences = (("kl_divergence", drift.kl_divergence), ("softmax_kl", drift.softmax_kl))
    measures += [(name, value, "nats", None) for name, value in divergences if value is not None]
    metrics = [Metric(name, finite(value), unit, note=note) for name, value, unit, note in measures]
    shares = (
        ("top1_agreement", drift.top1_agreement, drift.n_agreed),
        ("top5_agreement", drift.top5_agreement, drift.n_among_five),
    )
    for name, share, count in shares:
        if share is not None:
            metrics.append(Metric(name, share, "ratio", *wilson_interval(count, drift.n_ranked)))
    return tuple(
        replace(metric, target=target_name, output=drift.output)
        if drift.flaw is None
        else Metric(metric.name, None, metric.unit, target=target_name, output=drift.output, note=drift.flaw)
        for metric in metrics
    )


def _worst_samples(drift: Drift) -> list[dict[str, Any]]:
    return [
        {
            "sample": row.row,
            "relative_l2": finite(row.relative_l2),
            "max_abs_error": finite(row.max_abs),
            "sqnr_db": finite(row.sqnr_db),
        }
        for row in drift.worst
    ]


def _names(session: Session) -> list[str]:
    return [spec.name for spec in session.outputs]

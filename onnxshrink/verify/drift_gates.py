"""Gates on drift: the output that is farthest off decides."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxshrink.config.tolerance import in_steps
from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric, Outcome, Verdict


def judge_sqnr(limit: float, metrics: Sequence[Metric]) -> Verdict:
    """The output with the lowest SQNR decides; identical outputs pass.

    Args:
        limit: Smallest ratio in dB.
        metrics: Of one target.
    """
    gate, outputs = "min_sqnr_db", [metric for metric in metrics if metric.name == "sqnr_db"]
    if not outputs:
        return Verdict(gate, limit, "failed", "SQNR has no value: it was not measured")
    broken = next((m for m in outputs if m.value is None and m.note != IDENTICAL), None)
    if broken:
        return Verdict(gate, limit, "failed", f"SQNR of output {broken.output!r} has no value: {broken.note}")
    finite = [(metric.value, metric) for metric in outputs if metric.value is not None]
    if not finite:
        return Verdict(gate, limit, "passed", "outputs are identical to the reference's")
    value, metric = min(finite, key=lambda pair: pair[0])
    outcome: Outcome = "passed" if value >= limit else "failed"
    compared = "keeps" if value >= limit else "is below"
    reason = f"SQNR {value:.1f} dB of output {metric.output!r} {compared} the limit of {limit:g} dB"
    return Verdict(gate, limit, outcome, reason)


def judge_error(tolerance: float | str, metrics: Sequence[Metric]) -> Verdict:
    """The output whose largest error is the largest, in its own unit or in its steps, decides.

    An output without any error keeps every tolerance, quantized or not.

    Args:
        tolerance: A validated `Tolerance`.
        metrics: Of one target.
    """
    gate, (limit, counts_steps) = "max_abs_error", in_steps(tolerance)
    errors = [metric for metric in metrics if metric.name == "max_abs_error"]
    if not errors:
        return Verdict(gate, limit, "failed", "the largest error has no value: it was not measured")
    steps = {m.output: m.value for m in metrics if m.name == "output_step"} if counts_steps else {}
    found: list[tuple[float, Metric]] = []
    for metric in errors:
        if metric.value is None:
            reason = f"the largest error of output {metric.output!r} has no value: {metric.note}"
            return Verdict(gate, limit, "failed", reason)
        step = steps.get(metric.output) if counts_steps and metric.value else 1.0
        if not step:
            reason = (
                f"output {metric.output!r} has no quantization step: it does not end in one DequantizeLinear of one "
                f"scale; give the limit in its own unit, in which its largest error is {metric.value:.4g}"
            )
            return Verdict(gate, limit, "failed", reason)
        found.append((metric.value / step, metric))
    value, worst = max(found, key=lambda pair: pair[0])
    unit = " steps" if counts_steps else ""
    where = f" ({worst.note})" if worst.note else ""
    outcome: Outcome = "passed" if value <= limit else "failed"
    compared = "keeps" if value <= limit else "exceeds"
    reason = (
        f"largest error {value:.4g}{unit} of output {worst.output!r}{where} {compared} the limit of {limit:g}{unit}"
    )
    return Verdict(gate, limit, outcome, reason)


def judge_agreement(limit: float, metrics: Sequence[Metric]) -> Verdict:
    """The output with the lowest agreement decides, by its interval.

    Args:
        limit: Smallest share of samples whose winning class is the reference's.
        metrics: Of one target.
    """
    gate, shares = "min_top1_agreement", [metric for metric in metrics if metric.name == "top1_agreement"]
    if not shares:
        why = "it was not measured, or no output ranks classes (2-D with several columns)"
        return Verdict(gate, limit, "failed", f"top-1 agreement has no value: {why}")
    broken = next((metric for metric in shares if metric.value is None), None)
    if broken:
        reason = f"top-1 agreement of output {broken.output!r} has no value: {broken.note}"
        return Verdict(gate, limit, "failed", reason)
    worst = min(shares, key=lambda metric: math.inf if metric.value is None else metric.value)
    value = worst.value or 0.0
    lo, hi = (value if end is None else end for end in (worst.lo, worst.hi))
    found = f"top-1 agreement {value:.1%} ({lo:.1%} … {hi:.1%}) of output {worst.output!r}"
    if lo >= limit:
        return Verdict(gate, limit, "passed", f"{found} keeps the limit of {limit:.1%}")
    if hi < limit:
        return Verdict(gate, limit, "failed", f"{found} is below the limit of {limit:.1%}")
    return Verdict(gate, limit, "inconclusive", f"{found} straddles the limit of {limit:.1%}: add evaluation samples")

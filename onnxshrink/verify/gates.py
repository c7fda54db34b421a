"""Gates applied to metrics, and the choice among the variants that keep them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnxshrink.config.gates import Gates, Select, Target, on_target
from onnxshrink.core.intervals import samples_to_decide
from onnxshrink.core.report import Candidate, Metric, Verdict
from onnxshrink.verify.drift_gates import judge_agreement, judge_error, judge_sqnr


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one gate reads: the metric it limits, its name in sentences, and what decides a close call.

    Attributes:
        metric: Name of the metric.
        label: Its name in sentences.
        scale: What a value is multiplied with for people; 100 turns a ratio into points.
        unit: Unit after scaling.
        count: Name of the metric that counts what was measured, and its name in sentences.
        remedy: What to do when the interval straddles the limit.
    """

    metric: str
    label: str
    scale: float = 1.0
    unit: str = ""
    count: tuple[str, str] | None = None
    remedy: str = ""


_PAIRS = ("latency_pairs", "pairs")
_RULES = {
    "max_accuracy_drop": _Rule("accuracy_drop", "accuracy drop"),
    "max_size": _Rule("size_bytes", "model size", 1.0, " bytes"),
    "max_compressed_size": _Rule("compressed_bytes", "compressed size", 1.0, " bytes"),
    "max_macs": _Rule("macs", "work", 1.0, " MACs"),
    "max_latency_ratio": _Rule("latency_ratio", "latency ratio", 1.0, "", _PAIRS, "raise latency_seconds"),
    "max_latency_ms": _Rule("latency_p50_ms", "p50 latency", 1.0, " ms", _PAIRS, "raise latency_seconds"),
    "max_peak_memory": _Rule(
        "peak_memory_bytes", "peak memory", 1.0, " bytes", remedy="some processes took more, and some less"
    ),
}


TIMED = frozenset({"max_latency_ratio", "max_latency_ms", "max_peak_memory"})
"""Gates that a clock decides, or fresh processes: on the targets with ``latency`` only, and last."""

_ONCE = frozenset({"max_size", "max_compressed_size"})


def judge(gates: Gates, metrics: Sequence[Metric], targets: Sequence[Target]) -> tuple[Verdict, ...]:
    """One verdict for each gate that is set and each target it is measured on.

    A gate is passed where the metric's whole interval keeps the limit, failed where none of it does, and else
    inconclusive (failed under ``strict``). A metric that was not measured, or has no finite value, fails its gate.

    Args:
        gates: The limits.
        metrics: Everything measured on one variant.
        targets: The targets of the run.

    Returns:
        Verdicts in the order of the config's fields, then of the targets.
    """
    names = [target.name for target in targets]
    return judge_on(gates, metrics, names, [target.name for target in targets if target.latency])


def judge_on(
    gates: Gates, metrics: Sequence[Metric], names: Sequence[str | None], clocked: Sequence[str | None]
) -> tuple[Verdict, ...]:
    """As `judge`, on the targets of these names; ``clocked`` are those on which latency is measured."""
    verdicts = []
    for gate, limit in gates.limits.items():
        on = [None] if gate in _ONCE else clocked if gate in TIMED else names
        for target in limit if isinstance(limit, Mapping) else on:
            mine = [metric for metric in metrics if metric.target == target]
            verdict = _judge(gate, on_target(limit, target), mine)
            verdicts.append(replace(_strict(verdict) if gates.strict else verdict, target=target))
    return tuple(verdicts)


def select(candidates: Sequence[Candidate], criterion: Select) -> tuple[str | None, str]:
    """The winner among the variants without a failed gate, and why.

    One that breaks a limit as it was measured, if only within noise, comes after those that do not. Ties are broken by
    the other criteria, then by the config's order. Latencies whose intervals overlap are a tie, so
    that two runs on one machine choose alike. On several targets a variant counts as it does on its worst.

    Args:
        candidates: Rows of the report; only variants take part.
        criterion: What to prefer.

    Returns:
        The winner's name, or None when no variant passed, and a reason of one line.
    """
    variants = [candidate for candidate in candidates if candidate.role == "variant"]
    fit = [variant for variant in variants if variant.outcome != "failed"]
    if not fit:
        failures = "; ".join(f"{variant.name}: {_failed_gates(variant)}" for variant in variants)
        return None, f"no variant passed every gate ({failures})"
    fastest = min((_worst(variant, "latency_ratio") for variant in fit), key=_number)

    def key(variant: Candidate) -> tuple[float, ...]:
        size, drop = _value(variant, "size_bytes"), _value(variant, "accuracy_drop")
        ratio = _worst(variant, "latency_ratio")
        tied = ratio.lo is not None and fastest.hi is not None and ratio.lo <= fastest.hi
        speed = 0.0 if tied else _number(ratio)
        orders = {
            "smallest": (size, drop, speed),
            "fastest": (speed, drop, size),
            "most_accurate": (drop, size, speed),
        }
        return orders[criterion]

    pool = [variant for variant in fit if not _leans_over(variant)] or fit
    winner = min(pool, key=key)
    kept = "failed no gate" if len(pool) == len(fit) else "kept every limit as measured"
    return winner.name, _why(winner, criterion, kept, n_fit=len(pool), n_variants=len(variants))


def _leans_over(variant: Candidate) -> bool:
    """True if a gate would have failed by the point estimates alone."""
    points = at_points(variant.metrics)
    return any(
        _judge(verdict.gate, verdict.limit, [m for m in points if m.target == verdict.target]).outcome == "failed"
        for verdict in variant.verdicts
        if verdict.outcome == "inconclusive"
    )


def at_points(metrics: Sequence[Metric]) -> tuple[Metric, ...]:
    """The metrics as if they were exact."""
    return tuple(replace(metric, lo=None, hi=None) for metric in metrics)


def _judge(gate: str, limit: Any, metrics: Sequence[Metric]) -> Verdict:
    match gate:
        case "min_sqnr_db":
            return judge_sqnr(limit, metrics)
        case "max_abs_error":
            return judge_error(limit, metrics)
        case "min_top1_agreement":
            return judge_agreement(limit, metrics)
        case "min_integer_coverage":
            return _judge_coverage(limit, metrics)
        case _:
            return _judge_most(gate, limit, metrics)


def _judge_most(gate: str, limit: float, metrics: Sequence[Metric]) -> Verdict:
    rule = _RULES[gate]
    metric = next((metric for metric in metrics if metric.name == rule.metric), None)
    if metric is None or metric.value is None:
        why = (metric and metric.note) or "it was not measured"
        return Verdict(gate, limit, "failed", f"{rule.label} has no value: {why}")
    if metric.unit == "ratio" and gate == "max_accuracy_drop":
        rule = replace(rule, scale=100.0, unit=" points")
    if gate == "max_accuracy_drop":
        return _judge_drop(limit, metric, rule, metrics)
    lo, hi = (metric.value if end is None else end for end in (metric.lo, metric.hi))
    found, wanted = f"{rule.label} {_said(metric, rule)}", f"the limit of {_figure(limit, rule)}{rule.unit}"
    if hi <= limit:
        return Verdict(gate, limit, "passed", f"{found} keeps {wanted}")
    if lo > limit:
        return Verdict(gate, limit, "failed", f"{found} exceeds {wanted}")
    count = next((m for m in metrics if rule.count and m.name == rule.count[0] and m.value is not None), None)
    cannot = f"{count.value:.0f} {rule.count[1]} cannot decide it; " if count and rule.count else ""
    return Verdict(gate, limit, "inconclusive", f"{found} straddles {wanted}: {cannot}{rule.remedy}")


def _judge_drop(limit: float, metric: Metric, rule: _Rule, metrics: Sequence[Metric]) -> Verdict:
    """In the words of a comparison that is to show that nothing much was lost."""
    gate, value = "max_accuracy_drop", metric.value or 0.0
    lo, hi = (value if end is None else end for end in (metric.lo, metric.hi))
    found = f"{rule.label} {_said(metric, rule)}"
    claim = f"worse by more than {_figure(limit, rule)}{rule.unit} is"
    if hi <= limit:
        return Verdict(gate, limit, "passed", f"{found}: not {claim} shown")
    if lo > limit:
        return Verdict(gate, limit, "failed", f"{found}: {claim} shown")
    n = next((int(m.value) for m in metrics if m.name == "evaluation_samples" and m.value), None)
    said = f"{found}: not {claim} not shown" + (f" by {n:,} samples" if n else "")
    enough = samples_to_decide(value, (lo, hi), limit, n) if n else None
    return Verdict(gate, limit, "inconclusive", said + (f"; about {enough:,} would decide it" if enough else ""))


def _judge_coverage(limit: float, metrics: Sequence[Metric]) -> Verdict:
    """Exact, so never inconclusive; the metric's note names the largest float island and its cause."""
    gate = "min_integer_coverage"
    metric = next((metric for metric in metrics if metric.name == "integer_coverage"), None)
    if metric is None or metric.value is None:
        why = (metric and metric.note) or "it was not measured"
        return Verdict(gate, limit, "failed", f"integer coverage has no value: {why}")
    if metric.value >= limit:
        return Verdict(gate, limit, "passed", f"integer coverage {metric.value:.1%} keeps the limit of {limit:.1%}")
    found = f"integer coverage {metric.value:.1%} is below the limit of {limit:.1%}"
    return Verdict(gate, limit, "failed", f"{found}: {metric.note or 'nothing in the model is quantized'}")


def _strict(verdict: Verdict) -> Verdict:
    if verdict.outcome != "inconclusive":
        return verdict
    return replace(verdict, outcome="failed", reason=f"{verdict.reason} (strict: what is not proved fails)")


def _said(metric: Metric, rule: _Rule) -> str:
    """``0.4 points (-0.2 … 1.1)``."""
    ends = ""
    if metric.lo is not None and metric.hi is not None:
        ends = f" ({_figure(metric.lo, rule)} … {_figure(metric.hi, rule)})"
    return f"{_figure(metric.value or 0.0, rule)}{rule.unit}{ends}"


def _figure(value: float, rule: _Rule) -> str:
    if rule.unit in (" bytes", " MACs"):
        return f"{value:,.0f}"
    return f"{value * rule.scale:.2f}" if rule.scale > 1 else f"{value:.4g}"


def _worst(variant: Candidate, name: str) -> Metric:
    """The metric on the target where it is largest; one without a value where it was not measured."""
    metrics = [metric for metric in variant.metrics if metric.name == name]
    return max(metrics, key=_number, default=Metric(name, None))


def _number(metric: Metric) -> float:
    return math.inf if metric.value is None else metric.value


def _value(variant: Candidate, name: str) -> float:
    return _number(_worst(variant, name))


def _failed_gates(variant: Candidate) -> str:
    return ", ".join(dict.fromkeys(verdict.gate for verdict in variant.verdicts if verdict.outcome == "failed"))


def _why(winner: Candidate, criterion: Select, kept: str, *, n_fit: int, n_variants: int) -> str:
    """Why the winner, and what of it a person must know: open gates, and a speed below the reference's."""
    field = f"{n_fit} variants" + (f" that {kept}" if n_fit < n_variants else "")
    why = f"the {criterion.replace('_', ' ')} of {field}"
    if n_fit == 1:
        why = "the only variant" + (f" of {n_variants} that {kept}" if n_variants > 1 else "")
    parts = [f"selected {winner.name}: {why}"]
    undecided = dict.fromkeys(verdict.gate for verdict in winner.verdicts if verdict.outcome == "inconclusive")
    if undecided:
        parts.append(f"inconclusive: {', '.join(undecided)}")
    parts += [
        f"slower than the reference on {metric.target}: {metric.value:.2f} times its latency"
        for metric in winner.metrics
        if metric.name == "latency_ratio" and metric.value is not None and metric.lo is not None and metric.lo > 1
    ]
    return "; ".join(parts)

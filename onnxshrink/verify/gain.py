"""What pruning did not buy, in as many words: zeros that are computed all the same, fewer MACs that are no faster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxshrink.core.report import Candidate, Metric

SPARSE = 0.05
"""Share of zeros from which weights count as pruned: what training leaves at exactly zero is far less."""

_FEWER = 0.9


def idle_zeros(candidate: Candidate, reference: Candidate) -> Iterator[str]:
    """What zeros in the weights are good for on the CPU, of a model that has many.

    Args:
        candidate: The model.
        reference: The float model it was made of; quantized weights are zero by rounding as well.
    """
    sparsity = _value(reference.metric("sparsity"))
    if sparsity >= SPARSE:
        size, compressed = (_value(candidate.metric(name)) for name in ("size_bytes", "compressed_bytes"))
        yield (
            f"{candidate.name}: {sparsity:.0%} of the weights are zero, and ONNX Runtime's CPU provider computes them "
            f"all the same: {size:,.0f} bytes compress to {compressed:,.0f}, and nothing is faster for it"
        )


def has_fewer_macs(candidate: Candidate, base: Candidate) -> bool:
    """Whether the model saves more than a tenth of the multiply-accumulates of ``base``, on any target."""
    return any(share < _FEWER for _, share in _macs_shares(candidate, base))


def idle_cuts(candidate: Candidate, base: Candidate, beside: Sequence[Metric]) -> Iterator[str]:
    """Where fewer multiply-accumulates are not faster beyond doubt, by target.

    Args:
        candidate: The model, with its latency against its reference.
        base: What it was cut from.
        beside: The latency of ``base`` against the same reference. The quotient of both ratios is told; its interval
            reaches from the least to the most that their intervals allow.
    """
    bases = {metric.target: metric for metric in beside if metric.name == "latency_ratio"}
    own = {metric.target: metric for metric in candidate.metrics if metric.name == "latency_ratio"}
    for target, share in _macs_shares(candidate, base):
        if share >= _FEWER or target not in own or target not in bases:
            continue
        (value, lo, hi), (base_value, base_lo, base_hi) = _ends(own[target]), _ends(bases[target])
        if hi / base_lo >= 1:
            where = f" on {target}" if len(own) > 1 else ""
            yield (
                f"{candidate.name}: {share:.2f} of the MACs of {base.name}, latency ratio {value / base_value:.2f} "
                f"({lo / base_hi:.2f} to {hi / base_lo:.2f}){where}: fewer MACs and no faster"
            )


def _macs_shares(candidate: Candidate, base: Candidate) -> Iterator[tuple[str | None, float]]:
    """The candidate's share of the multiply-accumulates on each target; none where one of both is not known."""
    counts = {metric.target: _value(metric) for metric in base.metrics if metric.name == "macs"}
    for metric in candidate.metrics:
        if metric.name == "macs" and metric.value and counts.get(metric.target):
            yield metric.target, metric.value / counts[metric.target]


def _ends(metric: Metric) -> tuple[float, float, float]:
    """Value and interval; a number without one is exact."""
    value = _value(metric)
    return value, value if metric.lo is None else metric.lo, value if metric.hi is None else metric.hi


def _value(metric: Metric | None) -> float:
    """The number, 0 where there is none."""
    return metric.value or 0.0 if metric is not None else 0.0

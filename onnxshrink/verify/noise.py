"""Variants whose outputs are mostly noise: said in every report, whether a gate asks or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onnxshrink.config.stages import QuantizeDynamic, QuantizeWeights, Stage, StaticQuantization, ToFp16
from onnxshrink.core.drift import IDENTICAL, REFERENCE_NAN
from onnxshrink.core.report import Candidate, Metric

LEAST_SQNR_DB = 10.0
"""Below, noise has a third of the outputs' size or more: ``10 ** (-10 / 20) = 0.32``.

MiniLM's ranking of sentence pairs kept 0.95 of its correlation with fp32's at 11.4 dB, 0.93 at 9.5, 0.79 at 4.5 and
0.29 at -1.2.
"""

LEAST_AGREEMENT = 0.5
"""Below, the two models name different classes for most samples."""

_AT_THE_SOURCE = "look at the samples, and at the reference: no variant can be judged by them"

_LOSSY = StaticQuantization | QuantizeDynamic | QuantizeWeights | ToFp16


def loses(chain: Sequence[Stage]) -> bool:
    """Whether a stage of the chain rounds weights or activations."""
    return any(isinstance(stage, _LOSSY) for stage in chain)


def find_noise(variant: Candidate, chain: Sequence[Stage]) -> Iterator[str]:
    """A line where the outputs are far from the reference's, with what to do about it.

    Args:
        variant: A row of the report with everything measured.
        chain: The stages that made it.

    Returns:
        At most one line. Nothing where no drift was measured.
    """
    finding = _finding(variant.metrics)
    if finding is not None:
        remedy = _AT_THE_SOURCE if finding.endswith(REFERENCE_NAN) else _remedy(chain)
        yield f"{variant.name}: {finding}; {remedy}"


def _finding(metrics: Sequence[Metric]) -> str | None:
    ratios = [metric for metric in metrics if metric.name == "sqnr_db"]
    broken = next((metric for metric in ratios if metric.value is None and metric.note != IDENTICAL), None)
    if broken is not None:
        return f"output {broken.output!r} cannot be compared with the reference's: {broken.note}"
    value, worst = min(((m.value, m) for m in ratios if m.value is not None), key=lambda p: p[0], default=(None, None))
    if value is not None and worst is not None and value < LEAST_SQNR_DB:
        size = 10 ** (-value / 20)
        return f"noise has {size:.0%} of the size of output {worst.output!r} ({value:.1f} dB SQNR): do not trust it"
    for metric in metrics:
        if metric.name == "top1_agreement" and metric.hi is not None and metric.hi < LEAST_AGREEMENT:
            return f"output {metric.output!r} names the reference's class for {metric.value:.0%} of the samples only"
    return None


def _remedy(chain: Sequence[Stage]) -> str:
    """What to try next, by the last stage that rounds."""
    last = next((stage for stage in reversed(chain) if isinstance(stage, _LOSSY)), None)
    match last:
        case StaticQuantization():
            return (
                "try quantize_dynamic with smooth_quant before it (transformers), or quantize_mixed (convolutions); "
                "`onnxshrink sensitivity` names the nodes that suffer"
            )
        case QuantizeDynamic():
            return "try smooth_quant before it, exclude_nodes, or quantize_weights with 8 bits"
        case QuantizeWeights():
            return "try 8 bits, smaller blocks, or exclude_nodes"
        case ToFp16():
            return "try keep_nodes or keep_op_types"
        case _:
            return "the two models do not compute the same function"

"""Whether the calibration samples suffice, and what to do where they do not.

Everything follows from the four parts of the one pass: ranges on a quarter, on half and on all of the samples, and the
last part held out from the ranges of the other three. Only tensors that get a grid are judged: what a Relu or a Clip
alone reads is quantized behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import onnx

from onnxshrink.calibration.calibrate import Calibration
from onnxshrink.calibration.parts import PARTS, Observed
from onnxshrink.calibration.ranges import Range, minmax_range
from onnxshrink.calibration.statistics import MAGNITUDE_EDGES, TensorStatistics
from onnxshrink.core.artifact import Facts

# Below this share of its final width a range on half of the samples is told. The 8-bit grid's step grows with the
# range, so 0.8 is 2 dB. Measured: 0.93 is the least of any tensor for 100 digits, and 0.87 and 0.89 for 32 and 100
# photographs through EfficientNet-Lite0; with 16 samples it is 0.73 and 0.70, with 4 photographs 0.60.
MIN_SPAN_OF_HALF = 0.8

# Ten times what `percentile: 0.9999` clips on purpose. Measured on the same: at most 0.00005 from 32 photographs on,
# and up to 0.0025 and 0.005 with 8 and 4.
MAX_CLIPPED_RATIO = 1e-3

MIN_CLIPPED = 5
"""Fewer held-out values outside are chance: the five largest of all lie in one given quarter once in a thousand."""

_NAMED = 3

HELD_OUT = 2
"""The part that is held out. Neither the first batch nor, as batches are usually a multiple of four, the last is in it:
of sorted samples these are the extremes, which only a part that holds them could show."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that needs doing.

    Attributes:
        what: What is wrong, and how much.
        tensors: The tensors at fault with their figure or reason, worst first.
        fix: What to do.
    """

    what: str
    tensors: Mapping[str, float | str]
    fix: str

    def __str__(self) -> str:
        names = ", ".join(f"{name!r}" for name in list(self.tensors)[:_NAMED])
        more = len(self.tensors) - _NAMED
        shown = f" ({names}{f' and {more} more' if more > 0 else ''})" if names else ""
        return f"{self.what}{shown}; {self.fix}"


@dataclass(frozen=True, slots=True)
class Health:
    """What the samples are worth.

    Attributes:
        samples: Samples of a quarter, of half and of all; the parts hold every fourth batch.
        spans: Judged tensor to the widths of its ranges on a quarter and on half of the samples, each as a share of
            that on all of them, 0 to 1. Empty if the samples came in fewer than four batches.
        clipped_ratio: Judged tensor to the share of one quarter's values outside the range of the others, 0 to 1.
        findings: What needs doing.
    """

    samples: tuple[int, int, int]
    spans: dict[str, tuple[float, float]]
    clipped_ratio: dict[str, float]
    findings: tuple[Finding, ...]

    def facts(self) -> Facts:
        """All of it as plain JSON, the judged tensors summed up."""
        facts: Facts = {"samples": list(self.samples), "judged_tensors": len(self.spans)}
        if self.spans:
            of_quarter, of_half = zip(*self.spans.values(), strict=True)
            facts |= {
                "span_of_quarter": {"median": median(of_quarter), "smallest": min(of_quarter)},
                "span_of_half": {"median": median(of_half), "smallest": min(of_half)},
                "largest_clipped_ratio": max(self.clipped_ratio.values()),
            }
        else:
            facts["not_judged"] = f"the samples do not come in {PARTS} batches or more, or no tensor varies"
        return facts | {"findings": [asdict(finding) for finding in self.findings]}


def examine(observed: Observed, calibration: Calibration, model: onnx.ModelProto) -> Health:
    """Judge what was observed; costs a few milliseconds and a few hundred kilobytes for each tensor.

    Args:
        observed: The whole pass, in its parts.
        calibration: The same without the parts.
        model: The prepared model that was observed.
    """
    quarter, half, everything = (sum(observed.samples[:n]) for n in (1, 2, PARTS))
    spans: dict[str, tuple[float, float]] = {}
    clipped: dict[str, float] = {}
    judged: dict[str, float] = {}
    unused: dict[str, str] = {}
    absurd = calibration.absurd()
    for name in judged_tensors(observed, model):
        if name in absurd:
            continue
        ranges = [minmax_range(observed.statistics(name, range(n))) for n in (1, 2, 3, 4)]
        widths = [hi - lo for lo, hi in ranges]
        if widths[-1] == 0:
            unused[name] = "zero on every sample"
        elif all(observed.samples):
            spans[name] = (widths[0] / widths[3], widths[1] / widths[3])
            others = minmax_range(observed.statistics(name, [part for part in range(PARTS) if part != HELD_OUT]))
            held_out = observed.statistics(name, [HELD_OUT])
            clipped[name] = share_outside(held_out, others)
            if clipped[name] * held_out.size >= MIN_CLIPPED:
                judged[name] = clipped[name]
    findings = (
        *_too_few(observed.samples),
        *_moving({name: of_half for name, (_, of_half) in spans.items()}, half, everything),
        *_clipping(judged, len(clipped)),
        *_without_range(absurd, unused),
    )
    return Health((quarter, half, everything), spans, clipped, findings)


def judged_tensors(observed: Observed, model: onnx.ModelProto) -> list[str]:
    """The tensors that get a grid: all but those that only Relu and Clip read, which the kernels take in.

    Args:
        observed: Names the tensors that were counted and derived.
        model: The prepared model.
    """
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for value in model.graph.output:
        readers[value.name].append(onnx.NodeProto())
    names = (*observed.counted, *(rule.name for rule in observed.plan.derived))
    derived = set(names) - set(observed.counted)
    return [
        name
        for name in names
        if not readers[name]
        or any(node.op_type not in ("Relu", "Clip") or node.output[0] not in derived for node in readers[name])
    ]


def share_outside(statistics: TensorStatistics, inside: Range) -> float:
    """The share of the values beyond a range, from 0 to 1; beyond by less than a bin, 1/128, is not counted.

    Args:
        statistics: What was observed.
        inside: ``(lo, hi)`` with ``lo <= 0 <= hi``.
    """
    ends = (inside[1], -inside[0])
    outside = (
        int(counts[np.searchsorted(MAGNITUDE_EDGES, end, side="right") :].sum())
        for counts, end in zip(statistics.side_counts(), ends, strict=True)
    )
    return sum(outside) / max(statistics.size, 1)


def _too_few(samples: tuple[int, ...]) -> list[Finding]:
    # Samples in fewer than four batches, as a callable may give them, cannot be judged; that alone is no finding.
    if sum(samples) >= PARTS:
        return []
    return [Finding(f"the ranges rest on {sum(samples)} samples", {}, "give a hundred or more calibration samples")]


def _moving(spans: dict[str, float], half: int, everything: int) -> list[Finding]:
    moving = _ascending({name: span for name, span in spans.items() if span < MIN_SPAN_OF_HALF})
    if not moving:
        return []
    return [
        Finding(
            f"{len(moving)} of {len(spans)} ranges still move: on {half} samples they span less than "
            f"{MIN_SPAN_OF_HALF:.0%} of what they span on all {everything}, one {next(iter(moving.values())):.0%}",
            moving,
            "give more calibration samples; if the ranges never settle, `method: percentile` leaves single values out",
        )
    ]


def _clipping(clipped: dict[str, float], n_tensors: int) -> list[Finding]:
    over = _ascending({name: share for name, share in clipped.items() if share > MAX_CLIPPED_RATIO}, reverse=True)
    if not over:
        return []
    return [
        Finding(
            f"{len(over)} of {n_tensors} tensors would clip more than {MAX_CLIPPED_RATIO:.1%} of the values of "
            f"samples not calibrated on, the most {next(iter(over.values())):.1%}",
            over,
            "give more calibration samples, of all kinds that the model will meet",
        )
    ]


def _without_range(absurd: dict[str, str], unused: dict[str, str]) -> list[Finding]:
    findings = []
    if absurd:
        reason = next(iter(absurd.values()))
        what = f"no 8-bit range can serve {len(absurd)} tensors, and their nodes stay in float: the first {reason}"
        findings.append(Finding(what, absurd, "nothing is lost if that is a mask; otherwise look at the samples"))
    if unused:
        what = f"{len(unused)} tensors are zero on every sample, and would be zero for ever in 8 bits"
        findings.append(Finding(what, unused, "give samples that use them, or name their nodes in exclude_nodes"))
    return findings


def _ascending(figures: dict[str, float], *, reverse: bool = False) -> dict[str, float]:
    return dict(sorted(figures.items(), key=lambda item: item[1], reverse=reverse))

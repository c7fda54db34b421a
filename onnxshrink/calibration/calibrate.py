"""One pass over the calibration samples: every tensor's statistics, kept as one small file for every later method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import onnx

from onnxshrink.calibration.parts import Observed, Sharding, observe_parts
from onnxshrink.calibration.ranges import Range, absurd_reason, value_range
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.config.stages import CalibrationMethod
from onnxshrink.core.events import Events
from onnxshrink.data.reader import Reader

STATISTICS_FILE = "statistics.npz"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over the samples found.

    Attributes:
        samples: How many samples were seen.
        tensors: Tensor name to its statistics, in an order that depends on the model alone.
    """

    samples: int
    tensors: dict[str, TensorStatistics]

    @classmethod
    def of(cls, observed: Observed) -> Self:
        """All parts of a pass together, and the tensors that follow from them."""
        tensors = {name: observed.statistics(name) for name in observed.counted}
        for rule in observed.plan.derived:
            tensors[rule.name] = tensors[rule.source].clipped(rule.lo, rule.hi)
        return cls(sum(observed.samples), tensors)

    def merge(self, other: Calibration) -> Calibration:
        """Both passes together; the samples must be different ones, and the model the same."""
        merged = {name: statistics.merge(other.tensors[name]) for name, statistics in self.tensors.items()}
        return Calibration(self.samples + other.samples, merged)

    def absurd(self) -> dict[str, str]:
        """Tensors that no 8-bit range can serve, each with the reason."""
        reasons = ((name, absurd_reason(statistics)) for name, statistics in self.tensors.items())
        return {name: reason for name, reason in reasons if reason is not None}

    def degenerate(self) -> list[str]:
        """Tensors that held one single value throughout, or none: the samples do not exercise them."""
        return [name for name, statistics in self.tensors.items() if not statistics.lo < statistics.hi]


def observe_all(
    model: onnx.ModelProto,
    open_samples: Callable[[int], Reader],
    *,
    events: Events | None = None,
    step: str = "calibrate",
    name: str = "model",
    sharding: Sharding | None = None,
) -> Calibration:
    """Run the samples through the model once: `observe_parts` without the parts."""
    observed = observe_parts(model, open_samples, events=events, step=step, name=name, sharding=sharding)
    return Calibration.of(observed)


def ranges_of(
    calibration: Calibration, method: CalibrationMethod, *, percentile: float = 1.0, leave_out: Mapping[str, str]
) -> dict[str, Range]:
    """Every tensor's range by one method.

    Args:
        calibration: What was observed.
        method: ``minmax``, ``percentile``, ``entropy`` or ``mse``.
        percentile: Share of the values that ``percentile`` covers.
        leave_out: Tensors that get no range, such as absurd ones.

    Returns:
        Tensor name to ``(lo, hi)`` with ``lo <= 0 <= hi``.
    """
    return {
        name: value_range(statistics, method, percentile=percentile)
        for name, statistics in calibration.tensors.items()
        if name not in leave_out
    }


def save_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write the statistics: equal statistics give equal bytes, wherever and whenever they are written.

    Only bins that hold something are kept, with counts in the smallest integer type that fits them: some 10 to 30 kB
    for a tensor. No pickle; the archive's timestamps are constant.
    """
    statistics = list(calibration.tensors.values())
    bins = [np.flatnonzero(s.counts).astype(np.uint16) for s in statistics]
    counts = np.concatenate([np.zeros(0, np.int64), *(s.counts[b] for s, b in zip(statistics, bins, strict=True))])
    header = json.dumps({"schema": 1, "samples": calibration.samples, "tensors": list(calibration.tensors)})
    path = folder / STATISTICS_FILE
    np.savez(
        path,
        header=np.frombuffer(header.encode(), np.uint8),
        # A zero's sign would tell which of two shards came first.
        extremes=np.array([(s.lo, s.hi) for s in statistics], np.float32).reshape(-1, 2) + np.float32(0),
        lengths=np.array([b.size for b in bins], np.int64),
        bins=np.concatenate([np.zeros(0, np.uint16), *bins]),
        counts=counts.astype(np.min_scalar_type(int(counts.max(initial=0)))),
    )
    return path


def load_calibration(folder: Path) -> Calibration:
    """Read what `save_calibration` wrote."""
    with np.load(folder / STATISTICS_FILE, allow_pickle=False) as arrays:
        header = json.loads(arrays["header"].tobytes())
        extremes, bins, counts = arrays["extremes"], arrays["bins"], arrays["counts"]
        ends = np.cumsum(arrays["lengths"])
    tensors = {}
    for name, (lo, hi), end, start in zip(header["tensors"], extremes, ends, (0, *ends), strict=False):
        statistics = TensorStatistics(lo=lo, hi=hi)
        statistics.counts[bins[start:end]] = counts[start:end]
        tensors[name] = statistics
    return Calibration(header["samples"], tensors)

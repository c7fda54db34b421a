"""One pass over the calibration samples: every tensor's statistics, kept as one small file for every later method."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxshrink.calibration.observe import Plan, open_observed, plan_of
from onnxshrink.calibration.ranges import Range, absurd_reason, value_range
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.config.stages import CalibrationMethod
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.data.reader import Reader

STATISTICS_FILE = "statistics.npz"

BATCH_BYTES = 64 << 20
"""Observed activations of one batch stay below this, so that memory depends on neither model nor samples."""

_MAX_BATCH = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """What one pass over the samples found.

    Attributes:
        samples: How many samples were seen.
        tensors: Tensor name to its statistics, in an order that depends on the model alone.
    """

    samples: int
    tensors: dict[str, TensorStatistics]

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
) -> Calibration:
    """Run the samples through the model once and count every tensor that may be quantized.

    Activations are counted and freed batch by batch. The batch is chosen from what one sample takes, so memory grows
    neither with the samples nor, beyond one sample, with the model.

    Args:
        model: A prepared float model.
        open_samples: Batch size to a reader of the calibration samples; every call gives the same samples.
        events: Listener for progress.
        step: The step's name in progress.
        name: What to call the model in messages.

    Raises:
        DataError: There are no samples, or an activation is NaN or infinite; names the tensor and the samples.
        ModelError: ONNX Runtime cannot run the model.
    """
    events = events or Silent()
    plan = plan_of(model)
    session = open_observed(model, plan, name=name) if plan.observed else None

    def tensors_of(batch: Batch) -> dict[str, Array]:
        values = {tensor: np.asarray(batch[tensor]) for tensor in plan.inputs}
        return values | (session.run(batch) if session is not None else {})

    reader = open_samples(_batch_size(open_samples(1), tensors_of))
    total = len(reader)
    counted = {tensor: TensorStatistics() for tensor in (*plan.inputs, *plan.observed)}
    samples = 0
    for batch in reader:
        size = len(next(iter(batch.values())))
        for tensor, values in tensors_of(batch).items():
            counted[tensor].update(values)
            if not counted[tensor].is_finite:
                raise _not_finite(tensor, values, f"{reader.where}, run through {name}", samples, size)
        samples += size
        events.progress(step, samples, total)
    if samples == 0:
        raise DataError("there are no calibration samples", where=reader.where, got="0 samples", want="at least one")
    return Calibration(samples, _with_derived(counted, plan))


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
        extremes=np.array([(s.lo, s.hi) for s in statistics], np.float32).reshape(-1, 2),
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


def _batch_size(single: Reader, tensors_of: Callable[[Batch], dict[str, Array]]) -> int:
    batch = next(iter(single), None)
    if batch is None:
        return 1
    samples = max(1, len(next(iter(batch.values()))))
    sample_bytes = sum(values.nbytes for values in tensors_of(batch).values()) / samples
    return max(1, min(_MAX_BATCH, int(BATCH_BYTES / max(sample_bytes, 1))))


def _with_derived(counted: Mapping[str, TensorStatistics], plan: Plan) -> dict[str, TensorStatistics]:
    tensors = dict(counted)
    for tensor in plan.derived:
        tensors[tensor.name] = tensors[tensor.source].clipped(tensor.lo, tensor.hi)
    return tensors


def _not_finite(tensor: str, values: Array, where: str, first_sample: int, size: int) -> DataError:
    bad = np.argwhere(~np.isfinite(values))[0]
    per_sample = values.ndim > 0 and values.shape[0] == size
    culprit = first_sample + int(bad[0]) if per_sample else f"{first_sample} to {first_sample + size - 1}"
    return DataError(
        f"the activation {tensor!r} holds {values[tuple(bad)]} on sample {culprit}",
        where=where,
        want="finite activations",
        fix="look at that sample, and at the operator behind the tensor: an overflow, a division by zero",
    )

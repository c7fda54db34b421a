"""Task metrics: what is kept of a batch so that any resample of the samples can be scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from onnxshrink.config.metrics import F1Score, MeanIou, OwnMetric, TaskMetric
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.importing import load_entry
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import Array, describe
from onnxshrink.verify import totals
from onnxshrink.verify.class_metrics import among_best, class_counts
from onnxshrink.verify.pixel_metrics import pixel_counts
from onnxshrink.verify.scored_output import Outputs, Place
from onnxshrink.verify.value_metrics import cosines, errors, pairs


@dataclass(frozen=True, slots=True)
class Measure:
    """How one task metric is measured.

    Attributes:
        marks: Outputs and labels of a batch to what is kept of each sample, ``(b, k)`` float64; NaN where the model
            gave NaN.
        total: The metric from what was kept; see `onnxshrink.verify.totals`.
        unit: ``ratio`` where the metric is a share, which is told in percent and its drop in points, else empty.
        rank: Of top1 and top5, whose samples are right (1) or wrong (0), among how many classes the label must be.
        counts: True if samples are kept as true positives, false positives and false negatives of each class.
        imagined: True if the bootstrap is given `onnxshrink.verify.totals.one_more_of_each`: a class of a sample is
            right or wrong, and may be so in all samples, which the shares of a sample's pixels never are.
    """

    marks: Callable[[Outputs, Array, Place], Floats]
    total: Callable[[Floats, Floats], Floats]
    unit: str = ""
    rank: int | None = None
    counts: bool = False
    imagined: bool = False


def measure_of(metric: TaskMetric) -> Measure:
    """How a metric is measured.

    Raises:
        ConfigError: The user's own function cannot be imported.
    """
    match metric:
        case "top1" | "top5":
            rank = int(metric[3:])
            return Measure(partial(among_best, metric=metric, rank=rank), totals.mean, "ratio", rank=rank)
        case "mae" | "rmse" | "spearman" | "cosine":
            return _OF_VALUES[metric]
        case F1Score() | "f1":
            settings = F1Score() if metric == "f1" else metric
            total = partial(totals.f1, average=settings.average)
            return Measure(partial(class_counts, settings=settings), total, "ratio", counts=True, imagined=True)
        case MeanIou() | "miou":
            pixels = MeanIou() if metric == "miou" else metric
            return Measure(partial(pixel_counts, settings=pixels), totals.mean_iou, "ratio", counts=True)
        case OwnMetric():
            return Measure(partial(_own, entry=metric.entry, score=load_entry(metric.entry)), totals.mean)


def _own(outputs: Outputs, labels: Array, place: Place, entry: str, score: Callable[..., Any]) -> Floats:
    """What the user's function says of each sample."""
    try:
        scores = np.asarray(score(outputs, labels))
    except (Exception, SystemExit) as e:  # it is the user's code, and may raise anything
        raise ConfigError(f"the metric failed: {type(e).__name__}: {e}", where=entry, fix="mend the function") from e
    if scores.shape != (len(labels),) or scores.dtype.kind not in "fiub":
        raise ConfigError(
            "the metric gives something else than a number for each sample",
            where=entry,
            got=describe("scores", scores),
            want=f"float64[{len(labels)}]",
            fix="return one score for each sample, not their mean",
        )
    broken = np.zeros(len(labels), dtype=bool)
    for array in outputs.values():
        if array.dtype.kind == "f" and len(array) == len(labels):
            broken |= np.isnan(array).reshape(len(array), -1).any(axis=1)
    rows = scores.astype(np.float64)
    bad = ~np.isfinite(rows) & ~broken
    if bad.any():
        sample = int(bad.argmax())
        raise ConfigError(
            f"the metric of sample {place.first + sample} is {rows[sample]}",
            where=entry,
            want="finite scores",
            fix="give the worst score where there is none",
        )
    rows[broken & ~np.isfinite(rows)] = np.nan
    return rows[:, None]


_OF_VALUES = {
    "mae": Measure(partial(errors, power=1), totals.mean),
    "rmse": Measure(partial(errors, power=2), totals.root_mean),
    "spearman": Measure(pairs, totals.spearman),
    "cosine": Measure(cosines, totals.mean),
}

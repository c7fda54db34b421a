"""Task metrics: what accuracy means, and which way is better."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import Discriminator, Field, Tag

from onnxshrink.config.base import EntryPoint, Model

Better: TypeAlias = Literal["higher", "lower"]
MetricName: TypeAlias = Literal["top1", "top5", "mae", "rmse", "spearman", "cosine", "f1", "miou"]

ERRORS: tuple[MetricName, ...] = ("mae", "rmse")
"""The metrics of which less is better; of all others, and of F1 and mIoU with options, more is."""

SHARES: tuple[str, ...] = ("top1", "top5", "f1", "miou")
"""The metrics that are shares, from 0 to 1."""


class F1Score(Model):
    """F1 with options; `metric: f1` is this with the defaults.

    Labels `[n]` of an output `[n, classes]` are class numbers, and the answer is the largest. Labels 0 and 1 of an
    output of their own shape, `[n]`, `[n, 1]` or `[n, classes]`, are yes or no for each class by itself.
    """

    kind: Literal["f1"] = "f1"
    average: Literal["macro", "micro", "binary"] = "macro"
    """`macro`: mean over the classes that a label or an answer names; `micro`: of the counts of all classes together;
    `binary`: of class 1 of two."""
    threshold: float = 0.0
    """Above it the answer is yes, where each class is answered by itself: 0 suits logits, 0.5 probabilities."""


class MeanIou(Model):
    """Mean intersection over union of a segmentation, with options; `metric: miou` is this with the defaults.

    Labels are class numbers `[n, height, width]`; the output holds logits `[n, classes, height, width]` or class
    numbers as the labels do. The mean is over the classes that a label or an answer names, from the counts of all
    samples together.
    """

    kind: Literal["miou"] = "miou"
    ignore_index: int = 255
    """Pixels with this label count for nothing."""
    n_classes: int | None = Field(default=None, gt=1)
    """Needed where the output holds class numbers, which do not say how many there are."""


class OwnMetric(Model):
    """The user's own: a function that scores each sample; the metric is the mean of the scores.

    It is called as `score(outputs, labels)` for each batch, with the model's outputs by name, and returns `[n]` finite
    numbers.
    """

    entry: EntryPoint
    """`package.module:function`."""
    better: Better
    """Whether a higher or a lower score is better; an accuracy drop is positive where the score is worse."""


def _which(value: Any) -> str:
    if isinstance(value, dict):
        kinds = {"f1": "F1Score", "miou": "MeanIou"}
        return kinds.get(str(value.get("kind")), "OwnMetric")
    return type(value).__name__ if isinstance(value, Model) else "name"


TaskMetric: TypeAlias = Annotated[
    Annotated[MetricName, Tag("name")]
    | Annotated[F1Score, Tag("F1Score")]
    | Annotated[MeanIou, Tag("MeanIou")]
    | Annotated[OwnMetric, Tag("OwnMetric")],
    Discriminator(_which),
]


def name_of(metric: TaskMetric) -> str:
    """What the metric is called in a report: its own name, or the entry point, which no other metric's name equals."""
    if isinstance(metric, str):
        return metric
    return metric.entry if isinstance(metric, OwnMetric) else metric.kind


def better_of(metric: TaskMetric) -> Better:
    """Which way is better."""
    if isinstance(metric, OwnMetric):
        return metric.better
    return "lower" if metric in ERRORS else "higher"


METRIC_NAMES: tuple[MetricName, ...] = get_args(MetricName)

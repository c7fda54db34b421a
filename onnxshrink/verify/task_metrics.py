"""Task metrics, a small function each: what is kept of a batch so that any resample of the samples can be scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from onnxshrink.config.metrics import F1Score, MeanIou, OwnMetric, TaskMetric
from onnxshrink.core.errors import ConfigError, DataError, ModelError
from onnxshrink.core.importing import load_entry
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import LABELS, Array, describe
from onnxshrink.data.labels import check_labels
from onnxshrink.verify import totals

Outputs: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a batch comes from, for messages: the model, the data, and the number of its first sample."""

    model: str
    data: str
    first: int


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
            return Measure(partial(_among_best, metric=metric, rank=rank), totals.mean, "ratio", rank=rank)
        case "mae" | "rmse" | "spearman" | "cosine":
            return _OF_VALUES[metric]
        case F1Score() | "f1":
            settings = F1Score() if metric == "f1" else metric
            total = partial(totals.f1, average=settings.average)
            return Measure(partial(_class_counts, settings=settings), total, "ratio", counts=True, imagined=True)
        case MeanIou() | "miou":
            pixels = MeanIou() if metric == "miou" else metric
            return Measure(partial(_pixel_counts, settings=pixels), totals.mean_iou, "ratio", counts=True)
        case OwnMetric():
            return Measure(partial(_own, entry=metric.entry, score=load_entry(metric.entry)), totals.mean)


def n_classes_of(outputs: Outputs, rank: int) -> int:
    """Classes of the output that top1 (``rank`` 1) or top5 looks at."""
    return next(int(array.shape[1]) for array in outputs.values() if _is_logits(array, rank + 1))


def _among_best(outputs: Outputs, labels: Array, place: Place, metric: str, rank: int) -> Floats:
    """1 where fewer than ``rank`` classes beat the label's; among equals the first wins, as argmax has it."""
    logits = _first(outputs, lambda array: _is_logits(array, rank + 1))
    if logits is None:
        want = f"a float output [n, n_classes] with at least {rank + 1} classes"
        raise _unfit(metric, outputs, want, place, "use another metric, or export the logits as an output")
    _check_classes(labels, logits, place)
    column = labels.astype(np.int64)[:, None]
    own = np.take_along_axis(logits, column, axis=1)
    earlier = np.arange(logits.shape[1]) < column
    better = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return _or_nan((better < rank).astype(np.float64)[:, None], logits)


def _errors(outputs: Outputs, labels: Array, place: Place, power: int) -> Floats:
    """Mean absolute or squared error of each sample, over the label's own axes."""
    answer, wanted = _alike(outputs, labels, place)
    errors: Floats = np.abs(answer - wanted) ** power
    return np.asarray(errors.mean(axis=1, keepdims=True))


def _pairs(outputs: Outputs, labels: Array, place: Place) -> Floats:
    """Answer and label, one number each."""
    answer, wanted = _alike(outputs, labels, place)
    if answer.shape[1] != 1:
        raise DataError(
            "a rank correlation is of one number for each sample",
            where=place.data,
            got=describe(LABELS, labels),
            want=f"{LABELS!r} float32[{len(labels)}], and an output of that shape",
            fix="use cosine for vectors",
        )
    return np.hstack([answer, wanted])


def _cosines(outputs: Outputs, labels: Array, place: Place) -> Floats:
    """Cosine of each answer and its label; 0 where one of them is all zeros."""
    answer, wanted = _alike(outputs, labels, place)
    if answer.shape[1] == 1:
        raise DataError(
            "the cosine of single numbers is their sign",
            where=place.data,
            got=describe(LABELS, labels),
            want="a vector for each sample",
            fix="use spearman, mae or rmse",
        )
    # Scaled first, so that the squares of large and of tiny values stay within what float64 holds.
    answer, wanted = (values / _or_one(np.abs(values).max(axis=1, keepdims=True)) for values in (answer, wanted))
    lengths = np.linalg.norm(answer, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines: Floats = (answer * wanted).sum(axis=1) / _or_one(lengths)
    return np.clip(cosines, -1.0, 1.0)[:, None]


def _class_counts(outputs: Outputs, labels: Array, place: Place, settings: F1Score) -> Floats:
    """True positives, false positives and false negatives of each class."""
    logits = _first(outputs, lambda array: _is_logits(array, 2)) if labels.ndim == 1 else None
    if logits is not None:
        _check_classes(labels, logits, place)
        numbers = np.arange(logits.shape[1])
        is_wanted, is_answer = labels[:, None] == numbers, logits.argmax(axis=1)[:, None] == numbers
    else:
        logits = _first(outputs, lambda a: a.dtype.kind == "f" and a.ndim <= 2 and _squeezed(a) == _squeezed(labels))
        if logits is None:
            want = "a float output [n, classes] for labels [n], or one of the labels' shape for labels 0 and 1"
            raise _unfit("f1", outputs, want, place, f"give other labels than {describe(LABELS, labels)}")
        logits = logits.reshape(len(labels), -1)
        is_wanted, is_answer = _yes_or_no(labels, place).reshape(logits.shape), logits > settings.threshold
    if settings.average == "binary" and logits.shape[1] > 2:
        raise ConfigError(
            f"the average is binary, and the model has {logits.shape[1]} classes",
            where=place.model,
            want="an output [n], [n, 1] or [n, 2]",
            fix="average: macro",
        )
    rows = np.hstack([is_wanted & is_answer, ~is_wanted & is_answer, is_wanted & ~is_answer])
    return _or_nan(rows.astype(np.float64), logits)


def _pixel_counts(outputs: Outputs, labels: Array, place: Place, settings: MeanIou) -> Floats:
    """True positives, false positives and false negatives of each class, in pixels."""
    if labels.ndim != 3 or labels.dtype.kind not in "iu":
        raise DataError(
            "the labels are no class numbers of pixels",
            where=place.data,
            got=describe(LABELS, labels),
            want=f"{LABELS!r} uint8[{len(labels)},height,width]",
            fix="labels[:, 0] where there is a channel axis of one; labels.astype('uint8') where they are no integers",
        )
    answer, n_classes, logits = _segmentation(outputs, labels, place, settings)
    wanted = labels.astype(np.int64).reshape(len(labels), -1)
    valid = wanted != settings.ignore_index
    outside = ((wanted < 0) | (wanted >= n_classes)) & valid
    if outside.any():
        sample = int(outside.any(axis=1).argmax())
        raise DataError(
            f"a pixel of sample {place.first + sample} has the label {wanted[sample][outside[sample]][0]}, "
            f"and the model has {n_classes} classes",
            where=place.data,
            want=f"0 to {n_classes - 1}, or {settings.ignore_index} for pixels that do not count",
            fix="name the number of no class: metric: {kind: miou, ignore_index: …}",
        )
    cells = np.arange(len(labels))[:, None] * n_classes

    def counted(chosen: Array, classes: Array) -> Array:
        counts = np.bincount((cells + classes)[chosen], minlength=len(labels) * n_classes)
        return counts.reshape(len(labels), n_classes)

    right = counted(valid & (answer == wanted), wanted)
    rows = np.hstack([right, counted(valid, answer) - right, counted(valid, wanted) - right])
    return _or_nan(rows.astype(np.float64), logits)


def _segmentation(outputs: Outputs, labels: Array, place: Place, settings: MeanIou) -> tuple[Array, int, Array]:
    """Class numbers ``(b, pixels)`` int64 of the first output that fits, how many classes there are, and the output."""
    n_samples, *size = labels.shape
    for name, array in outputs.items():
        if array.dtype.kind == "f" and array.ndim == 4 and array.shape[1] > 1 and [*array.shape[2:]] == size:
            return array.argmax(axis=1).reshape(n_samples, -1), array.shape[1], array
        if array.dtype.kind in "iu" and array.size == labels.size and [*array.shape[-2:]] == size:
            if settings.n_classes is None:
                raise ModelError(
                    f"the output {name!r} holds class numbers, which do not say how many classes there are",
                    where=place.model,
                    got=describe(name, array),
                    fix="metric: {kind: miou, n_classes: …}",
                )
            answer = array.astype(np.int64).reshape(n_samples, -1)
            if answer.min() < 0 or answer.max() >= settings.n_classes:
                raise ModelError(
                    f"the output {name!r} holds class numbers outside 0 to {settings.n_classes - 1}",
                    where=place.model,
                    got=f"{answer.min()} to {answer.max()}",
                    fix="raise n_classes of the metric",
                )
            return answer, settings.n_classes, array
    want = f"a float output [n, classes, {size[0]}, {size[1]}], or class numbers [n, {size[0]}, {size[1]}]"
    raise _unfit(
        "miou", outputs, want, place, f"give labels of the output's height and width, not {size[0]}, {size[1]}"
    )


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


def _alike(outputs: Outputs, labels: Array, place: Place) -> tuple[Floats, Floats]:
    """The first output of the labels' shape, and the labels, ``(b, values)`` float64 both."""
    output = _first(outputs, lambda array: _squeezed(array) == _squeezed(labels))
    if output is None or labels.dtype.kind not in "fiu":
        raise DataError(
            "the labels have the shape of no output of the model",
            where=place.data,
            got=describe(LABELS, labels),
            want=" or ".join(describe(name, array) for name, array in outputs.items()),
            fix="give labels of the output's shape, samples on axis 0",
        )
    answer, wanted = (array.reshape(len(labels), -1).astype(np.float64) for array in (output, labels))
    return answer, wanted


def _first(outputs: Outputs, fits: Callable[[Array], bool]) -> Array | None:
    return next((array for array in outputs.values() if fits(array)), None)


def _is_logits(array: Array, least: int) -> bool:
    return array.ndim == 2 and array.shape[1] >= least and array.dtype.kind == "f"


def _check_classes(labels: Array, logits: Array, place: Place) -> None:
    n_samples, n_classes = logits.shape
    check_labels(labels, n_samples=n_samples, n_classes=n_classes, where=place.data, first_sample=place.first)


def _yes_or_no(labels: Array, place: Place) -> Array:
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        sample = int(wrong.reshape(len(labels), -1).any(axis=1).argmax())
        raise DataError(
            f"a label of sample {place.first + sample} is neither 0 nor 1",
            where=place.data,
            got=describe(LABELS, labels),
            want="1 where a class is meant, 0 where it is not",
            fix="give class numbers as labels [n] where an output [n, classes] answers one of them",
        )
    return labels.astype(bool)


def _squeezed(array: Array) -> tuple[int, ...]:
    """The shape less a last axis of length 1, so that labels ``(n,)`` fit an output ``(n, 1)``."""
    shape = tuple(array.shape)
    return shape[:-1] if len(shape) > 1 and shape[-1] == 1 else shape


def _or_nan(rows: Floats, output: Array) -> Floats:
    """NaN in place of what is kept of samples where the output has NaN."""
    if output.dtype.kind == "f":
        rows[np.isnan(output).reshape(len(output), -1).any(axis=1)] = np.nan
    return rows


def _or_one(values: Floats) -> Floats:
    return np.where(values == 0, 1.0, values)


def _unfit(metric: str, outputs: Outputs, want: str, place: Place, fix: str) -> ModelError:
    return ModelError(
        f"no output of the model can be scored with {metric!r}",
        where=place.model,
        got=", ".join(describe(name, array) for name, array in outputs.items()),
        want=want,
        fix=fix,
    )


_OF_VALUES = {
    "mae": Measure(partial(_errors, power=1), totals.mean),
    "rmse": Measure(partial(_errors, power=2), totals.root_mean),
    "spearman": Measure(_pairs, totals.spearman),
    "cosine": Measure(_cosines, totals.mean),
}

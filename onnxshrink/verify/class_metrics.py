"""Metrics of class numbers, one for each sample: top-k and F1."""

from __future__ import annotations

import numpy as np

from onnxshrink.config.metrics import F1Score
from onnxshrink.core.errors import ConfigError, DataError
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import LABELS, Array, describe
from onnxshrink.data.labels import check_labels
from onnxshrink.verify.scored_output import Outputs, Place, first_fitting, or_nan, squeezed, unfit


def n_classes_of(outputs: Outputs, rank: int) -> int:
    """Classes of the output that top1 (``rank`` 1) or top5 looks at."""
    return next(int(array.shape[1]) for array in outputs.values() if _is_logits(array, rank + 1))


def among_best(outputs: Outputs, labels: Array, place: Place, metric: str, rank: int) -> Floats:
    """1 where fewer than ``rank`` classes beat the label's; among equals the first wins, as argmax has it."""
    logits = first_fitting(outputs, lambda array: _is_logits(array, rank + 1))
    if logits is None:
        want = f"a float output [n, n_classes] with at least {rank + 1} classes"
        raise unfit(metric, outputs, want, place, "use another metric, or export the logits as an output")
    _check_classes(labels, logits, place)
    column = labels.astype(np.int64)[:, None]
    own = np.take_along_axis(logits, column, axis=1)
    earlier = np.arange(logits.shape[1]) < column
    better = ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
    return or_nan((better < rank).astype(np.float64)[:, None], logits)


def class_counts(outputs: Outputs, labels: Array, place: Place, settings: F1Score) -> Floats:
    """True positives, false positives and false negatives of each class."""
    logits = first_fitting(outputs, lambda array: _is_logits(array, 2)) if labels.ndim == 1 else None
    if logits is not None:
        _check_classes(labels, logits, place)
        numbers = np.arange(logits.shape[1])
        is_wanted, is_answer = labels[:, None] == numbers, logits.argmax(axis=1)[:, None] == numbers
    else:
        logits = first_fitting(
            outputs, lambda a: a.dtype.kind == "f" and a.ndim <= 2 and squeezed(a) == squeezed(labels)
        )
        if logits is None:
            want = "a float output [n, classes] for labels [n], or one of the labels' shape for labels 0 and 1"
            raise unfit("f1", outputs, want, place, f"give other labels than {describe(LABELS, labels)}")
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
    return or_nan(rows.astype(np.float64), logits)


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

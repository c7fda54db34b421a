"""Metrics of values, where labels have the shape of an output: errors, rank correlation and cosine."""

from __future__ import annotations

import numpy as np

from onnxshrink.core.errors import DataError
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import LABELS, Array, describe
from onnxshrink.verify.scored_output import Outputs, Place, first_fitting, squeezed


def errors(outputs: Outputs, labels: Array, place: Place, power: int) -> Floats:
    """Mean absolute or squared error of each sample, over the label's own axes."""
    answer, wanted = _alike(outputs, labels, place)
    powers: Floats = np.abs(answer - wanted) ** power
    return np.asarray(powers.mean(axis=1, keepdims=True))


def pairs(outputs: Outputs, labels: Array, place: Place) -> Floats:
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


def cosines(outputs: Outputs, labels: Array, place: Place) -> Floats:
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
    quotients: Floats = (answer * wanted).sum(axis=1) / _or_one(lengths)
    return np.clip(quotients, -1.0, 1.0)[:, None]


def _alike(outputs: Outputs, labels: Array, place: Place) -> tuple[Floats, Floats]:
    """The first output of the labels' shape, and the labels, ``(b, values)`` float64 both."""
    output = first_fitting(outputs, lambda array: squeezed(array) == squeezed(labels))
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


def _or_one(values: Floats) -> Floats:
    return np.where(values == 0, 1.0, values)

"""Labels: class numbers or values, and one check for those that are learned from and those that are measured on."""

from __future__ import annotations

import numpy as np

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import LABELS, Array, check_finite, describe


def numeric_labels(labels: Array, *, where: str) -> Array:
    """Labels as a network learns from them, whatever the task: integers as int64, fractions as float32.

    Raises:
        DataError: They are no numbers.
    """
    if labels.dtype.kind not in "iuf":
        fix = "number the classes from 0: np.unique(labels, return_inverse=True)[1]"
        raise DataError(
            "the labels are no numbers",
            where=where,
            got=describe(LABELS, labels),
            want="class numbers, or values",
            fix="labels.astype('int64')" if labels.dtype.kind == "b" else fix,
        )
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64)


def check_labels(
    labels: Array, *, n_samples: int, where: str, n_classes: int | None = None, first_sample: int = 0
) -> None:
    """Refuse labels that are no class numbers, each with its likeliest mend.

    Args:
        labels: What should be ``(n_samples,)`` integers from 0 to ``n_classes - 1``.
        n_samples: Number of samples that the labels belong to.
        where: The data's origin, for the message.
        n_classes: Number of the model's classes; None where it is not known yet.
        first_sample: Number of the first of these samples in the data, for the message.

    Raises:
        DataError: The shape, the dtype or a value does not fit; names the first bad sample.
    """
    values = f", each from 0 to {n_classes - 1}" if n_classes is not None else ""
    got, want = describe(LABELS, labels), f"{LABELS!r} int64[{n_samples}]{values}"
    if labels.shape != (n_samples,):
        fix = "give one label per sample"
        if labels.shape == (n_samples, 1):
            fix = "drop the last axis: labels[:, 0]"
        elif labels.ndim == 2 and len(labels) == n_samples:
            fix = "give class numbers in place of one-hot rows: labels.argmax(1)"
        raise DataError("the labels have the wrong shape", where=where, got=got, want=want, fix=fix)
    if labels.dtype.kind not in "iu":
        raise DataError(
            "the labels are no class numbers",
            where=where,
            got=got,
            want=want,
            fix="number the classes from 0: np.unique(labels, return_inverse=True)[1]"
            if labels.dtype.kind in "US"
            else "labels.astype('int64')",
        )
    if n_classes is None:
        return
    outside = (labels < 0) | (labels >= n_classes)
    if outside.any():
        sample = int(outside.argmax())
        one_based = int(labels.min()) >= 1 and int(labels.max()) == n_classes
        raise DataError(
            f"the label of sample {first_sample + sample} is {labels[sample]}, and the model has {n_classes} classes",
            where=where,
            got=f"labels from {labels.min()} to {labels.max()}",
            want=want,
            fix=f"the labels seem to run from 1 to {n_classes}; classes count from 0: labels - 1"
            if one_based
            else "check that data and model belong together",
        )


def check_token_labels(labels: Array, *, shape: tuple[int, int], n_classes: int, ignored: int, where: str) -> None:
    """Refuse labels that are no class numbers of tokens.

    Args:
        labels: What should be integers from 0 to ``n_classes - 1``, or ``ignored`` for tokens that have none.
        shape: ``(samples, tokens)``.
        n_classes: Number of the model's classes.
        ignored: The number of no class.
        where: The data's origin, for the message.

    Raises:
        DataError: The shape, the dtype or a value does not fit; names the first bad token.
    """
    got = describe(LABELS, labels)
    want = f"{LABELS!r} int64[{shape[0]},{shape[1]}], each from 0 to {n_classes - 1}, or {ignored} where there is none"
    if labels.shape != shape:
        fix = "one class number per token of the network's output"
        raise DataError("the labels have the wrong shape", where=where, got=got, want=want, fix=fix)
    if labels.dtype.kind not in "iu":
        fix = "labels.astype('int64')"
        raise DataError("the labels are no class numbers", where=where, got=got, want=want, fix=fix)
    outside = ((labels < 0) | (labels >= n_classes)) & (labels != ignored)
    if outside.any():
        sample, token = divmod(int(outside.argmax()), shape[1])
        raise DataError(
            f"the label of token {token} of sample {sample} is {labels[sample, token]}, "
            f"and the model has {n_classes} classes",
            where=where,
            got=f"labels from {labels.min()} to {labels.max()}",
            want=want,
            fix="check that data and model belong together",
        )


def check_values(labels: Array, *, shape: tuple[int, ...], where: str) -> None:
    """Refuse labels that are no values for an output of a regression.

    Args:
        labels: What should be finite numbers of the output's shape; axes of length 1 may be missing.
        shape: The output's, over all samples.
        where: The data's origin, for the message.

    Raises:
        DataError: The shape does not fit, or a value is not finite.
    """
    if [n for n in labels.shape[1:] if n != 1] != [n for n in shape[1:] if n != 1] or len(labels) != shape[0]:
        raise DataError(
            "the labels do not have the shape of the network's first output",
            where=where,
            got=describe(LABELS, labels),
            want=f"{LABELS!r} float32[{','.join(map(str, shape))}]",
            fix="give labels of the output's shape, samples on axis 0",
        )
    check_finite(LABELS, labels, where=where)

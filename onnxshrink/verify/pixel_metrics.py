"""The metric of class numbers for each pixel: intersection over union."""

from __future__ import annotations

import numpy as np

from onnxshrink.config.metrics import MeanIou
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.intervals import Floats
from onnxshrink.core.tensors import LABELS, Array, describe
from onnxshrink.verify.scored_output import Outputs, Place, or_nan, unfit


def pixel_counts(outputs: Outputs, labels: Array, place: Place, settings: MeanIou) -> Floats:
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
    return or_nan(rows.astype(np.float64), logits)


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
    raise unfit("miou", outputs, want, place, f"give labels of the output's height and width, not {size[0]}, {size[1]}")

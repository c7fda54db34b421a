"""Labels are class numbers, or the message says how to make them so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxshrink.core.errors import DataError
from onnxshrink.data.labels import check_labels

GOOD = np.array([0, 2, 1, 1], np.uint8)


def test_class_numbers_are_taken() -> None:
    """Any integer dtype, with or without a known number of classes."""
    check_labels(GOOD, n_samples=4, n_classes=3, where="d.npz")
    check_labels(GOOD.astype(np.int64) + 500, n_samples=4, where="d.npz")


@pytest.mark.parametrize(
    ("labels", "what", "fix"),
    [
        (GOOD[:, None], "the labels have the wrong shape", "drop the last axis: labels[:, 0]"),
        (np.eye(3)[GOOD], "the labels have the wrong shape", "class numbers in place of one-hot rows"),
        (GOOD[:3], "the labels have the wrong shape", "one label per sample"),
        (GOOD / 2, "the labels are no class numbers", "labels.astype('int64')"),
        (GOOD + 1, "the label of sample 11 is 3, and the model has 3 classes", "labels - 1"),
        (GOOD - 1.0 + 0, "the labels are no class numbers", "labels.astype('int64')"),
        (GOOD.astype(np.int8) - 1, "the label of sample 10 is -1, and the model has 3 classes", "belong together"),
    ],
)
def test_what_does_not_fit_is_told_with_its_mend(labels: Any, what: str, fix: str) -> None:
    """Each mistake has a message of its own, which names the sample in the data."""
    with pytest.raises(DataError) as caught:
        check_labels(labels, n_samples=4, n_classes=3, where="d.npz", first_sample=10)
    assert caught.value.what == what
    assert fix in (caught.value.fix or "")
    assert caught.value.want == "'labels' int64[4], each from 0 to 2"

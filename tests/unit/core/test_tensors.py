"""What the check of samples promises: every misfit is found, named, and told with its likeliest mend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec, check_batch, check_finite, check_form, describe, did_you_mean, shape_fix

X = TensorSpec("x", "float32", ("batch", 3, 8, 8))
IDS = TensorSpec("ids", "int64", ("batch", "seq"))


def batch(**changes: Any) -> dict[str, Any]:
    """A batch that fits X and IDS, with changes; None removes an array."""
    arrays = {"x": np.zeros((2, 3, 8, 8), np.float32), "ids": np.zeros((2, 5), np.int64)} | changes
    return {name: array for name, array in arrays.items() if array is not None}


def refused(**changes: Any) -> DataError:
    """The error of a batch with changes."""
    with pytest.raises(DataError) as caught:
        check_batch(batch(**changes), (X, IDS), where="data.npz", samples=[4, 9])
    assert caught.value.where == "data.npz"
    return caught.value


def test_a_batch_that_fits_passes() -> None:
    """Names, dtypes and shapes that fit pass, with labels of any dtype beside them."""
    assert check_batch(batch(), (X, IDS), where="") is None  # type: ignore[func-returns-value]
    check_batch(batch(labels=np.array(["a", "b"])), (X, IDS), where="")


def test_unknown_and_missing_names_are_refused() -> None:
    """An array that is no input, and an input without array, are named with the mend."""
    assert refused(idz=np.zeros(1)).fix == "did you mean 'ids'?"
    assert "rename" in (refused(zzz=np.zeros(1)).fix or "")
    error = refused(ids=None)
    assert error.what == "the data has no array for the model input 'ids'"
    assert error.want == "'x' float32[batch,3,8,8], 'ids' int64[batch,seq]"


def test_dtypes_must_be_equal() -> None:
    """No silent casts: raw bytes are not what a float model was trained on."""
    error = refused(x=np.zeros((2, 3, 8, 8), np.uint8))
    assert error.what == "the array 'x' has dtype uint8, and the model takes float32"
    assert error.got == "'x' uint8[2,3,8,8]"
    assert "scaled as the model was trained" in (error.fix or "")


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ((3, 8, 8), "add the batch axis: array[None]"),
        ((2, 8, 8, 3), "the layout is NHWC and the model wants NCHW: array.transpose(0, 3, 1, 2)"),
        (
            (2, 3, 8, 9),
            "resize or crop the samples as for training, or take a model that was exported for their size",
        ),
        ((2, 3, 8, 8, 1), "give samples of the wanted shape"),
        ((), "give samples of the wanted shape"),
    ],
)
def test_shapes_must_fit_and_the_mend_is_told(shape: tuple[int, ...], fix: str) -> None:
    """A missing batch axis and the other layout are recognised."""
    error = refused(x=np.zeros(shape, np.float32))
    assert (error.what, error.fix) == ("the array 'x' has a shape the model cannot take", fix)
    assert shape_fix(shape, X) == fix


def test_the_batch_axis_may_be_left_out_of_the_comparison() -> None:
    """A header counts all samples on axis 0, whatever batch the model takes."""
    spec = TensorSpec("x", "float32", (2, 3))
    check_form(np.zeros((7, 3), np.float32), spec, where="", any_batch=True)
    with pytest.raises(DataError):
        check_form(np.zeros((7, 3), np.float32), spec, where="")
    with pytest.raises(DataError):
        check_form(np.zeros((2, 4), np.float32), spec, where="", any_batch=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.complex64])
def test_values_must_be_finite(value: float, dtype: Any) -> None:
    """NaN and infinity are refused in every float type; the row's number in the data is told."""
    array = np.zeros((2, 3), dtype)
    array[1, 2] = value
    with pytest.raises(DataError, match="sample 9 of 'x' holds") as caught:
        check_finite("x", array, where="", samples=[4, 9])
    assert (caught.value.got or "").endswith("at x[9, 2]")
    with pytest.raises(DataError, match="sample 1 of 'x' holds"):
        check_finite("x", array, where="")


def test_labels_must_be_finite() -> None:
    """Labels may have any shape and dtype, but a NaN among them spoils the metric."""
    assert refused(labels=np.array([0.0, np.nan])).what == "sample 9 of 'labels' holds nan"


def test_places_are_told_for_every_rank() -> None:
    """One axis, no axis and constants that have no samples are all told in readable form."""
    for array, what, got in (
        (np.array([0.0, np.inf]), "sample 9 of 'x' holds inf", "inf at x[9]"),
        (np.array(np.nan), "'x' holds nan", "nan at x"),
        (np.array([0.0, 0.0, np.nan]), "sample 2 of 'x' holds nan", "nan at x[2]"),
    ):
        with pytest.raises(DataError) as caught:
            check_finite("x", array, where="", samples=[4, 9])
        assert (caught.value.what, caught.value.got) == (what, got)


def test_integers_and_text_are_always_finite() -> None:
    """Only floats can be NaN."""
    for array in (np.array([1]), np.array([True]), np.array(["nan"]), np.array([], np.float32)):
        assert check_finite("x", array, where="") is None  # type: ignore[func-returns-value]


def test_words_of_messages() -> None:
    """Arrays and specs read alike, and suggestions come only for near names."""
    assert describe("x", np.zeros((2, 3), np.int8)) == "'x' int8[2,3]"
    assert str(X) == "'x' float32[batch,3,8,8]"
    assert did_you_mean("imgae", ["image", "mask"]) == "did you mean 'image'?"
    assert did_you_mean("zzz", ["image"]) is None

"""Samples made for one model reach the inputs of another, or the misfit is named."""

import numpy as np
import pytest

from onnxshrink.core.errors import ModelError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.interface import match_inputs

X = TensorSpec("x", "float32", ("batch", 3))
MASK = TensorSpec("mask", "int64", ("batch", 4))
BATCH = {"x": np.float32([[0.1, 2, 3]]), "mask": np.int64([[1, 0, 1, 0]]), "labels": np.int64([7])}


def test_a_model_of_the_same_inputs_gets_them_as_they_are() -> None:
    """In any order; what is no input is left out, and nothing is copied or noted."""
    interface = match_inputs([X, MASK], [MASK, X], where="m")
    fed = interface.feed(BATCH, where="m")
    assert set(fed) == {"x", "mask"}
    assert fed["x"] is BATCH["x"]
    assert (interface.specs, interface.note) == ((X, MASK), None)


def test_other_names_are_matched_by_order() -> None:
    """Batches keep the reference's names."""
    interface = match_inputs([X, MASK], [TensorSpec("in_0", "float32", ("n", 3)), MASK], where="m")
    fed = interface.feed(BATCH, where="m")
    assert list(fed) == ["in_0", "mask"]
    assert fed["in_0"] is BATCH["x"]
    assert interface.specs == (X, MASK)


def test_an_input_that_the_candidate_lost_is_read_and_not_handed_on() -> None:
    """The reference still needs it."""
    interface = match_inputs([X, MASK], [X], where="m")
    assert interface.specs == (X, MASK)
    assert list(interface.feed(BATCH, where="m")) == ["x"]


def test_floats_are_cast_to_the_width_that_is_taken() -> None:
    """And the note says so."""
    interface = match_inputs([X, MASK], [TensorSpec("x", "float16", ("batch", 3)), MASK], where="m")
    fed = interface.feed(BATCH, where="m")
    assert fed["x"].dtype == np.float16
    np.testing.assert_array_equal(fed["x"], BATCH["x"].astype(np.float16))
    assert (interface.specs[0].dtype, interface.note) == ("float32", "inputs cast to float16")


@pytest.mark.parametrize(("reference", "candidate"), [("batch", 8), (8, "batch"), (8, 8)])
def test_a_batch_that_either_fixes_is_fixed(reference: int | str, candidate: int | str) -> None:
    """Both models can run what is read."""
    given, own = (TensorSpec("x", "float32", (batch, 3)) for batch in (reference, candidate))
    assert match_inputs([given], [own], where="m").specs == (TensorSpec("x", "float32", (8, 3)),)


@pytest.mark.parametrize(
    ("own", "what"),
    [
        ((TensorSpec("x", "int64", ("batch", 3)), MASK), "differ in dtype or shape"),
        ((TensorSpec("x", "float32", ("batch", 4)), MASK), "differ in dtype or shape"),
        ((TensorSpec("x", "float32", ("batch", 3, 1)), MASK), "differ in dtype or shape"),
        ((X, MASK, TensorSpec("extra", "float32", ())), "cannot be matched"),
    ],
)
def test_misfits_are_refused_with_both_sides(own: tuple[TensorSpec, ...], what: str) -> None:
    """Another kind of number, length or rank, or an input that nobody gives."""
    with pytest.raises(ModelError, match=what) as error:
        match_inputs([X, MASK], own, where="m.onnx")
    assert error.value.where == "m.onnx"
    assert "'x' float32[batch,3]" in str(error.value)

"""What errors promise: five lines that tell what to do, and a trip through a process pool."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from onnxshrink.core import errors
from onnxshrink.core.errors import ConfigError, ConfigErrors, DataError, ShrinkError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, ShrinkError) and kind is not ConfigErrors
]
ROWS = {"where": "cfg.yaml:14", "got": "'image' float64[8,3,96,96]", "want": "'x' float32[N,3,96,96]", "fix": "rename"}


def fail(what: str) -> None:
    """Raise a DataError; runs in another process."""
    raise DataError(what, where="there", fix="mend it")


def test_the_form_is_what_where_got_want_fix() -> None:
    """The text is the house's form, line by line."""
    assert str(DataError("the dtype does not fit", **ROWS)) == (
        "the dtype does not fit\n"
        "  where  cfg.yaml:14\n"
        "  got    'image' float64[8,3,96,96]\n"
        "  want   'x' float32[N,3,96,96]\n"
        "  fix    rename"
    )


def test_rows_that_are_missing_are_left_out_and_long_ones_indented() -> None:
    """No empty rows; further lines of a row stand under its first."""
    assert str(ShrinkError("what", got="", fix="one\ntwo")) == "what\n  fix    one\n         two"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_users_to_fix_and_pickles(kind: type[ShrinkError]) -> None:
    """Every kind ends with exit code 2, says when it is used, and survives pickling with all its rows."""
    error = kind("what", **ROWS)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is kind
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))
    assert error.exit_code == 2
    assert kind.__doc__


def test_the_tree_in_the_docstring_is_complete() -> None:
    """The module's picture of the tree names every kind."""
    for kind in KINDS:
        assert kind.__name__ in (errors.__doc__ or "")


def test_several_config_errors_are_told_together() -> None:
    """All mistakes are in the text, and survive pickling."""
    both = ConfigErrors([ConfigError("one", where="cfg.yaml:1"), ConfigError("two", fix="x")])
    assert str(both) == "one\n  where  cfg.yaml:1\n\ntwo\n  fix    x"
    assert both.where == "cfg.yaml:1"
    copy = pickle.loads(pickle.dumps(both))  # noqa: S301 - our own bytes
    assert str(copy) == str(both)


def test_errors_cross_a_process_pool() -> None:
    """An error raised in a worker arrives with its type and rows."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool, pytest.raises(DataError, match="in a worker") as caught:
        pool.submit(_raise_data_error, "in a worker").result()
    assert (caught.value.where, caught.value.fix) == ("there", "mend it")


_raise_data_error = fail

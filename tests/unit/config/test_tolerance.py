"""Tolerances as a config gives them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from onnxshrink.config.gates import Gates
from onnxshrink.config.tolerance import Tolerance, in_steps

FIELD: TypeAdapter[float | str] = TypeAdapter(Tolerance)


@pytest.mark.parametrize(
    ("given", "number", "steps"),
    [
        (0.05, 0.05, False),
        (3, 3.0, False),
        (0, 0.0, False),
        ("1e-3", 1e-3, False),
        ("2 steps", 2.0, True),
        ("1 step", 1.0, True),
        (" .5steps", 0.5, True),
        ("0.1234567 steps", 0.1234567, True),
    ],
)
def test_what_a_tolerance_says(given: Any, number: float, *, steps: bool) -> None:
    """Numbers are in the output's own unit, text with the word counts steps; validated again it is the same."""
    tolerance = FIELD.validate_python(given)
    assert in_steps(tolerance) == (number, steps)
    assert FIELD.validate_python(tolerance) == tolerance


@pytest.mark.parametrize("given", [True, -1, "-1 steps", "two steps", "2 stepss", "2 dB", "nan", "", "1e999", [1]])
def test_what_is_no_tolerance_is_refused(given: Any) -> None:
    """With the two forms that are wanted."""
    with pytest.raises(ValidationError, match="a number from 0 on, or text such as '2 steps'"):
        Gates(max_abs_error=given)


@pytest.mark.parametrize(
    ("text", "fits"), [("2 steps", True), (".5 step", True), ("0.05", True), ("2 dB", False), ("-1", False)]
)
def test_editors_are_told_the_same(text: str, *, fits: bool) -> None:
    """The schema's pattern takes the texts that the config takes."""
    number, words = FIELD.json_schema()["anyOf"]
    assert number == {"type": "number", "minimum": 0}
    assert bool(re.search(words["pattern"], text)) is fits

"""What is read of a trial."""

from __future__ import annotations

import math

import pytest

from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric
from onnxshrink.search.record import drift_db, objectives
from onnxshrink.search.trial import Trial, key_of, size_of, trunk_of


def trial_of(*metrics: Metric) -> Trial:
    """An evaluated trial with these metrics."""
    return Trial(0, {"scheme": "a"}, "evaluated", metrics)


def sqnr(value: float | None, note: str | None = None, output: str = "y") -> Metric:
    """SQNR of one output."""
    return Metric("sqnr_db", value, "dB", output=output, note=note)


@pytest.mark.parametrize(
    ("metrics", "drift"),
    [
        ([sqnr(20.0), sqnr(30.0, output="z")], -20.0),
        ([sqnr(None, IDENTICAL), sqnr(5.0, output="z")], -5.0),
        ([sqnr(None, IDENTICAL)], -1e9),
        ([sqnr(40.0), sqnr(None, "the output has values that are not finite", "z")], 1e9),
        ([], -1e9),
    ],
)
def test_the_worst_output_decides(metrics: list[Metric], drift: float) -> None:
    """Identical outputs are the best there is, and never hide one that drifts; one without a value is the worst."""
    assert drift_db(trial_of(*metrics)) == drift


def test_the_accuracy_is_the_quality_where_it_was_measured() -> None:
    """Drift counts only where there is no metric of the task; a metric without a value is the worst."""
    size, drop = Metric("size_bytes", 100.0), Metric("accuracy_drop", 0.02)
    assert objectives(trial_of(size, sqnr(20.0))) == (100.0, -20.0)
    assert objectives(trial_of(size, sqnr(20.0), drop)) == (100.0, 0.02)
    assert objectives(trial_of(size, sqnr(20.0), Metric("accuracy_drop", None)))[1] == 1e9


def test_bytes_that_are_not_known_are_infinite() -> None:
    """A trial that was not made weighs more than any other."""
    assert size_of(trial_of()) == math.inf


def test_a_point_is_its_values_in_any_order() -> None:
    """Equal points have equal keys, and a trunk is what is left without the scheme."""
    assert key_of({"a": "1", "scheme": "x"}) == key_of({"scheme": "x", "a": "1"})
    assert trunk_of({"a": "1", "scheme": "x"}) == {"a": "1"}

"""The limit of a search: one, from the command line or from the config's gates."""

from __future__ import annotations

import math

import pytest

from onnxshrink.config.gates import Gates
from onnxshrink.core.errors import ConfigError
from onnxshrink.search.limits import Limit, limit_of


@pytest.mark.parametrize(
    ("limit", "kept", "broken"),
    [
        (Limit("sqnr_db", 30.0), [30.0, 31.0, math.inf], [29.9, -math.inf, math.nan]),
        (Limit("max_abs_error", 1e-3), [0.0, 1e-3], [1.1e-3, math.inf, math.nan]),
        (Limit("accuracy_drop", 0.01), [-0.5, 0.01], [0.02, math.nan]),
    ],
)
def test_the_limit_itself_is_kept_and_nan_never(limit: Limit, kept: list[float], broken: list[float]) -> None:
    """SQNR is a floor, the others are ceilings."""
    assert all(limit.is_kept(value) for value in kept)
    assert not any(limit.is_kept(value) for value in broken)


def test_what_is_asked_for_goes_before_the_gates() -> None:
    """Without a limit of its own the search takes the SQNR gate, then that of the accuracy drop."""
    gates = Gates(min_sqnr_db=20.0, max_accuracy_drop=0.02)
    assert limit_of(gates, None, 1e-3, None) == Limit("max_abs_error", 1e-3)
    assert limit_of(gates, None, None, None) == Limit("sqnr_db", 20.0)
    assert limit_of(Gates(max_accuracy_drop=0.02), None, None, None) == Limit("accuracy_drop", 0.02)


@pytest.mark.parametrize(("given", "what"), [((None, None, None), "no limit"), ((30.0, 1e-3, None), "several")])
def test_no_limit_and_two_limits_are_refused(given: tuple[float | None, ...], what: str) -> None:
    """The message names the options."""
    with pytest.raises(ConfigError, match=what) as e:
        limit_of(Gates(), *given)
    assert "--min-sqnr-db" in str(e.value)

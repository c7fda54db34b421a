"""Cores and waiting threads of a measurement."""

from __future__ import annotations

import os

import pytest

from onnxshrink.config.gates import Target
from onnxshrink.core.errors import ConfigError
from onnxshrink.runtime.affinity import on_cores, require_cores


def test_a_measurement_stays_on_its_cores() -> None:
    """Inside, one core; a thread that is started there inherits it; afterwards as before."""
    before = os.sched_getaffinity(0)
    core = max(before)
    with on_cores(Target(affinity=(core,))):
        assert os.sched_getaffinity(0) == {core}
    assert os.sched_getaffinity(0) == before
    with on_cores(Target()):
        assert os.sched_getaffinity(0) == before


def test_cores_come_back_after_an_error() -> None:
    """A measurement that fails leaves the process where it was."""
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), on_cores(Target(affinity=(min(before),))):
        _ = 1 / 0
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_there_is_refused() -> None:
    """The message names the core and those that are there."""
    with pytest.raises(ConfigError, match=r"(?s)no core 4095.*affinity: \[4095\].*of 0"):
        require_cores(Target(affinity=(4095,)))


def test_a_system_without_affinity_refuses_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux a wish for cores is an error, and no wish is none."""
    monkeypatch.delattr(os, "sched_getaffinity")
    require_cores(Target())
    with pytest.raises(ConfigError, match="cannot set it"):
        require_cores(Target(affinity=(0,)))

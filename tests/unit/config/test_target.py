"""A target of measurement."""

from __future__ import annotations

import pytest

from onnxshrink.config.gates import Target

LABELLED = Target(label="device")


@pytest.mark.parametrize(
    "settings",
    [
        {"latency_seconds": 9.0},
        {"latency": False},
        {"startup": True},
        {"spinning": False},
        {"affinity": (0,)},
        {"batch": 8},
        {"copies": "included"},
    ],
)
def test_what_only_latency_depends_on_measures_no_outputs_anew(settings: dict[str, object]) -> None:
    """Outputs are remembered whatever latency is measured like, as long as the target keeps its name."""
    assert LABELLED.model_copy(update=settings).outputs_key() == LABELLED.outputs_key()


@pytest.mark.parametrize(
    "settings",
    [{"threads": 2}, {"optimization": "basic"}, {"provider": "openvino"}, {"options": {"a": 1}}, {"label": "other"}],
)
def test_what_outputs_or_their_names_depend_on_measures_anew(settings: dict[str, object]) -> None:
    """A setting that changes outputs, or the name that they are reported under, is part of the key."""
    assert LABELLED.model_copy(update=settings).outputs_key() != LABELLED.outputs_key()

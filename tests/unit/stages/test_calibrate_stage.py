"""The stage calibrate: statistics in, facts out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx_models as nets
import pytest

from onnxshrink.calibration.calibrate import load_calibration
from onnxshrink.config.data import DataRoles
from onnxshrink.config.stages import Calibrate
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import Reader
from onnxshrink.stages.calibrate import calibrate


def test_facts_tell_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage writes statistics that load, and says how many samples and tensors, and which are masked."""
    model = nets.attention()
    reader = nets.ArrayReader(nets.samples_of(model, 20))

    def open_reader(_settings: object, specs: list[TensorSpec], **_options: object) -> Reader:
        assert [spec.name for spec in specs] == ["x", "keep"]
        return reader

    monkeypatch.setattr("onnxshrink.stages.calibrate.open_reader", open_reader)
    source = nets.artifact_of(model, tmp_path / "source")
    ctx = nets.context_of(reader, tmp_path)
    ctx = replace(ctx, data=ctx.data.model_copy(update={"calibration": object()}))
    facts = calibrate(Calibrate(), source, tmp_path, ctx)
    json.dumps(facts, allow_nan=False)
    found = load_calibration(tmp_path)
    assert facts["samples"] == found.samples == 20
    assert facts["tensors"] == len(found.tensors)
    assert set(facts["masked_tensors"]) == {"mark", "m", "sm"}
    assert facts["health"]["samples"][-1] == 20
    assert len(facts["warnings"]) == len(facts["health"]["findings"])


def test_without_samples_the_role_is_named(tmp_path: Path) -> None:
    """Calibrating without calibration data is an error that names the data role."""
    source = nets.artifact_of(nets.cnn(), tmp_path / "source")
    ctx = nets.context_of(nets.ArrayReader({}), tmp_path)
    with pytest.raises(DataError, match="no calibration samples") as error:
        calibrate(Calibrate(), source, tmp_path, replace(ctx, data=DataRoles()))
    assert "`calibration`" in str(error.value)

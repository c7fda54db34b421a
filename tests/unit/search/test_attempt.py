"""What a trial tells of its model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

from onnxshrink.config.load import validate
from onnxshrink.core.drift import N_LISTED
from onnxshrink.search.attempt import Depth, Task, attempt
from onnxshrink.search.space import Space, space_of
from onnxshrink.search.trial import SCHEME, Trial


@pytest.fixture
def space(tmp_path: Path) -> Space:
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "test.npz", **samples_of(model, N_LISTED + 8))
    document = {"model": {"onnx": "m.onnx"}, "data": {"evaluation": {"npz": "test.npz"}}, "budget": {"max_size": 10**6}}
    config = validate(document, base=tmp_path)
    assert config.budget is not None
    return space_of(config, config.budget, base=tmp_path)


def test_a_probe_has_the_error_of_each_of_its_samples(space: Space, tmp_path: Path) -> None:
    """They add up to the drift that it was measured with; a full evaluation needs none."""

    def tried(scheme: str, depth: Depth) -> Trial:
        return attempt(space, tmp_path / "runs", Task(0, {SCHEME: scheme}, depth))

    def metric(trial: Trial, name: str) -> float:
        found = trial.worst(name)
        assert found is not None
        assert found.value is not None
        return found.value

    coarse, fine = tried("dynamic", "probe"), tried("fp16", "probe")
    assert len(coarse.errors) == len(fine.errors) == N_LISTED
    by_errors = 10 * np.log10(sum(coarse.errors) / sum(fine.errors))
    assert by_errors == pytest.approx(metric(fine, "sqnr_db") - metric(coarse, "sqnr_db"), abs=0.01)
    assert tried("fp16", "evaluate").errors == ()

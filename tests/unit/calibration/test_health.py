"""Whether the samples suffice: told where they do not, silent where they do."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_models as nets
import pytest
from numpy.typing import NDArray
from onnx import helper

from onnxshrink.calibration.calibrate import Calibration
from onnxshrink.calibration.health import Health, examine, judged_tensors, share_outside
from onnxshrink.calibration.parts import observe_parts
from onnxshrink.calibration.prepare import prepare
from onnxshrink.calibration.statistics import TensorStatistics


def relu_net() -> onnx.ModelProto:
    """``y = sigmoid(relu(x))`` on one number a sample."""
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="a"), helper.make_node("Sigmoid", ["h"], ["y"], name="b")]
    return nets.model_of(nodes, {"x": ["N", "width"]}, {"y": ["N", "width"]}, {})


def examined(x: NDArray[np.floating], *, batch_size: int | None = None) -> Health:
    """The health of `relu_net` on rows ``x``."""
    model = prepare(relu_net(), where="test")
    rows = x.reshape(len(x), -1).astype(np.float32)
    observed = observe_parts(model, lambda size: nets.ArrayReader({"x": rows}, batch_size or size))
    return examine(observed, Calibration.of(observed), model)


def test_enough_samples_are_no_finding() -> None:
    """Two hundred normal samples of 64 values settle: ranges and held-out values give no finding."""
    health = examined(np.random.default_rng(0).standard_normal((200, 64)))
    assert health.findings == ()
    assert sum(health.samples[-1:]) == 200
    assert min(of_half for _, of_half in health.spans.values()) > 0.8


def test_sorted_samples_are_no_finding() -> None:
    """Samples in order of size are spread over the parts, so their order raises no alarm."""
    assert examined(np.sort(np.random.default_rng(0).random((400, 1)), axis=0)).findings == ()


def test_spans_and_clipped_share_are_those_of_the_values() -> None:
    """Spans are widths over the whole width, and the clipped share counts the held-out part's values, exactly."""
    x = np.tile([1.0, 2.0, 3.0, 10.0], 8)  # batches of two: [1, 2], [3, 10], ...; part 2 gets [20, 5]
    x[4::8], x[5::8] = 20.0, 5.0
    health = examined(x)
    assert health.samples == (8, 16, 32)
    assert health.spans["h"] == (2 / 20, 10 / 20)
    assert health.clipped_ratio["h"] == 0.5


def test_moving_ranges_are_told() -> None:
    """A range that half of the samples had to two fifths is a finding that names tensor, figure and remedy."""
    x = np.ones(64)
    x[12:16] = 2.5
    moving = examined(x).findings[0]
    assert list(moving.tensors) == ["h", "y"]
    assert moving.tensors["h"] == 0.4
    assert "on 32 samples they span less than 80% of what they span on all 64, one 40%" in moving.what
    assert str(moving).endswith("`method: percentile` leaves single values out")


def test_clipped_held_out_values_are_told() -> None:
    """Held-out values beyond the range of the others is a finding with the share."""
    x = np.ones(64)
    x[8:10] = 1.1
    x[24:27] = 1.2
    clipping = examined(x).findings[0]
    assert dict(clipping.tensors) == {"h": 5 / 16, "y": 5 / 16}
    assert "2 of 2 tensors would clip more than 0.1%" in clipping.what


def test_a_few_clipped_values_are_chance() -> None:
    """Four of sixteen held-out values lie outside, which says nothing: no finding, and the share is in the facts."""
    x = np.ones(64)
    x[24:28] = 1.2
    health = examined(x)
    assert health.findings == ()
    assert health.clipped_ratio["h"] == 0.25


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_samples_are_told(count: int) -> None:
    """Fewer than four samples cannot be judged, and that is told."""
    health = examined(np.ones(count))
    assert health.spans == {}
    assert [finding.what for finding in health.findings] == [f"the ranges rest on {count} samples"]


def test_many_samples_in_one_batch_are_not_judged() -> None:
    """Samples that come in one batch, as a callable may give them, give no finding; the facts say why."""
    health = examined(np.random.default_rng(0).random(100), batch_size=100)
    assert health.findings == ()
    assert "batches" in health.facts()["not_judged"]


def test_unused_tensors_are_told() -> None:
    """A tensor that is zero on every sample is a finding; a constant other than zero is none."""
    found = [(finding.what, list(finding.tensors)) for finding in examined(-np.arange(1.0, 65)).findings]
    assert found == [("1 tensors are zero on every sample, and would be zero for ever in 8 bits", ["h"])]
    assert examined(np.ones(64)).findings == ()


def test_absurd_tensors_are_told() -> None:
    """Scores beside a mask's mark are a finding with the reason."""
    x = np.random.default_rng(0).standard_normal((64, 64))
    x[:, ::2] += 1e5
    finding = examined(x).findings[-1]
    assert set(finding.tensors) == {"x", "h"}
    assert "nothing between" in str(finding)


def test_only_what_gets_a_grid_is_judged() -> None:
    """A tensor that Relu or Clip alone reads is quantized behind it; model outputs and others are judged."""
    model = prepare(nets.cnn(), where="test")
    samples = nets.samples_of(model, 20)
    observed = observe_parts(model, lambda size: nets.ArrayReader(samples, size))
    assert judged_tensors(observed, model) == ["x", "c3", "a3", "p", "y", "r1", "k2", "f"]


def test_share_outside_counts_both_sides() -> None:
    """Values beyond either end are counted, those at the ends are not; within numpy's own count."""
    values = np.random.default_rng(1).standard_normal(20_000).astype(np.float32)
    statistics = TensorStatistics()
    statistics.update(values)
    want = np.mean((values < -1.5) | (values > 2.0))
    assert share_outside(statistics, (-1.5, 2.0)) == pytest.approx(want, rel=0.05)
    assert share_outside(statistics, (float(values.min()), float(values.max()))) == 0


@pytest.mark.parametrize("count", [2, 64])
def test_facts_are_plain_json(count: int) -> None:
    """The facts, findings included, are JSON without NaN or infinity."""
    json.dumps(examined(np.geomspace(1, 1e6, count)).facts(), allow_nan=False)

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from onnxshrink.config.budget import Budget
from onnxshrink.config.gates import Target
from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric, worst
from onnxshrink.search.constraints import METRICS, judge, misses, nearest
from onnxshrink.search.trial import Trial
from onnxshrink.search.wording import relax
from onnxshrink.verify import gates

LIMITS = {
    "max_size": 1000,
    "max_compressed_size": 800,
    "max_macs": 500,
    "max_peak_memory": 5000,
    "max_latency_ratio": 0.6,
    "max_latency_ms": 2.0,
    "max_accuracy_drop": 0.01,
    "max_abs_error": 0.5,
    "min_sqnr_db": 20.0,
    "min_top1_agreement": 0.9,
    "min_integer_coverage": 0.5,
}
OUTPUT = {"sqnr_db", "max_abs_error", "top1_agreement"}


def metric(limit: str, share: float, spread: float = 0.0, target: str | None = "cpu") -> Metric:
    """A metric at ``share`` of its limit."""
    name, value = METRICS[limit], LIMITS[limit] * share
    once = limit in {"max_size", "max_compressed_size"}
    output = "y" if name in OUTPUT else None
    return Metric(name, value, "", value - spread, value + spread, None if once else target, output)


def trial(*metrics: Metric, number: int = 0) -> Trial:
    return Trial(number, {"scheme": "s"}, "evaluated", metrics)


def budget(**limits: Any) -> Budget:
    return Budget.model_validate(limits)


def test_every_limit_has_its_metric() -> None:
    """A gate that is added is judged, and its nearest miss is known."""
    assert METRICS.keys() == LIMITS.keys() == budget(**LIMITS).limits.keys()


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_judged_as_the_gate_of_its_name(limit: str) -> None:
    """Kept, broken, and missing, by the whole interval: the search and the report cannot disagree."""
    wanted = budget(**{limit: LIMITS[limit]})
    least = limit.startswith("min_")
    for share in (0.5, 0.99, 1.0, 1.01, 2.0):
        found = trial(metric(limit, share))
        # What says on which targets latency is measured, where the limit is another one.
        found = replace(found, metrics=(*found.metrics, Metric("latency_ratio", 0.1, target="cpu")))
        outcome = judge(wanted, found)[limit]
        by_gates = gates.judge(wanted.as_gates, found.metrics, [Target()])
        assert outcome == worst([verdict.outcome for verdict in by_gates])
        if limit != "max_latency_ratio":
            assert outcome == ("passed" if (share >= 1 if least else share <= 1) else "failed")
    assert judge(wanted, trial())[limit] == "failed"


def test_noise_is_inconclusive_and_the_worst_target_counts() -> None:
    """An interval over the limit decides nothing; one target that fails is enough."""
    wanted = budget(max_accuracy_drop=0.01)
    assert judge(wanted, trial(metric("max_accuracy_drop", 0.9, 0.005)))["max_accuracy_drop"] == "inconclusive"
    both = trial(metric("max_accuracy_drop", 0.5), metric("max_accuracy_drop", 3.0, target="cpu x2"))
    assert judge(wanted, both)["max_accuracy_drop"] == "failed"
    missing = trial(metric("max_accuracy_drop", 0.5), Metric("macs", 1.0, target="cpu x2"))
    assert judge(wanted, missing)["max_accuracy_drop"] == "failed"


def test_limits_of_the_clock_can_be_left_for_later() -> None:
    """Before a clock has seen a model they are neither kept nor broken."""
    wanted = budget(max_size=1000, max_latency_ratio=0.6, max_latency_ms=2, max_peak_memory=5000)
    assert judge(wanted, trial(metric("max_size", 0.5)), timed=False) == {"max_size": "passed"}
    assert set(judge(wanted, trial(metric("max_size", 0.5))).values()) == {"passed", "failed"}


def test_identical_outputs_keep_every_drift() -> None:
    """The reference itself has no finite SQNR, and is no miss."""
    same = trial(Metric("sqnr_db", None, "dB", target="cpu", output="y", note=IDENTICAL))
    assert misses(budget(min_sqnr_db=20), same) == ()


def test_a_miss_says_what_would_have_done() -> None:
    """Twice the bytes is a share of 1; 6.02 dB too few is twice the noise; what was not measured is farthest."""
    (size,) = misses(budget(max_size=1000), trial(metric("max_size", 2.0)))
    assert (size.limit, size.asked, size.needed, size.share) == ("max_size", 1000.0, 2000.0, 1.0)
    low = Metric("sqnr_db", 20 - 20 * math.log10(2), "dB", target="cpu", output="y")
    (drift,) = misses(budget(min_sqnr_db=20), trial(low))
    assert drift.share == pytest.approx(1.0)
    (missing,) = misses(budget(max_latency_ratio=0.6), trial())
    assert missing.needed is None
    assert missing.share == math.inf
    worst_first = misses(budget(max_size=1000, max_macs=500), trial(metric("max_size", 1.5), metric("max_macs", 3.0)))
    assert [miss.limit for miss in worst_first] == ["max_macs", "max_size"]
    (steps,) = misses(budget(max_abs_error="2 steps"), trial(metric("max_abs_error", 1.0)))
    assert (steps.asked, steps.needed) == (2.0, None)


def test_nearest_is_the_least_miss_of_one_limit_alone() -> None:
    """Of the size: the smallest of the trials that keeps the accuracy; of the accuracy: the most accurate that fits."""
    wanted = budget(max_size=1000, max_accuracy_drop=0.01)

    def at(number: int, size: float, drop: float) -> Trial:
        return trial(metric("max_size", size), metric("max_accuracy_drop", drop), number=number)

    trials = [at(0, 3.0, 0.5), at(1, 1.2, 0.5), at(2, 0.5, 4.0), at(3, 0.6, 2.0), at(4, 1.1, 1.1)]
    assert {limit: t.number for limit, t in nearest(wanted, trials).items()} == {"max_size": 1, "max_accuracy_drop": 3}
    assert nearest(wanted, [at(4, 1.1, 1.1)]) == {}


def test_of_targets_with_limits_of_their_own_the_farthest_off_is_the_miss() -> None:
    """It is judged against its own limit, not against the strictest, and named; one that was not timed fails."""
    wanted = budget(max_latency_ratio={"cpu": 0.6, "cpu x2": 1.0})
    fast, slow = Metric("latency_ratio", 0.7, target="cpu"), Metric("latency_ratio", 1.5, target="cpu x2")
    (miss,) = misses(wanted, trial(fast, slow))
    assert (miss.target, miss.asked, miss.needed) == ("cpu x2", 1.0, 1.5)
    assert relax(miss) == "max_latency_ratio on cpu x2 to 1.5"
    (miss,) = misses(wanted, trial(fast, replace(slow, value=0.9)))
    assert (miss.target, miss.asked, miss.needed) == ("cpu", 0.6, 0.7)
    assert judge(wanted, trial(replace(fast, value=0.5), replace(slow, value=0.9))) == {"max_latency_ratio": "passed"}
    assert misses(wanted, trial(replace(fast, value=0.5)))[0].target == "cpu x2"
    assert judge(wanted, trial(replace(fast, value=0.5)))["max_latency_ratio"] == "failed"

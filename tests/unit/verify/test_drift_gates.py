"""Gates on drift: the output that is farthest off decides, in its own unit or in steps."""

from __future__ import annotations

import pytest

from onnxshrink.config.gates import Gates, Target
from onnxshrink.core.report import Metric, Outcome
from onnxshrink.verify.drift_gates import judge_agreement, judge_error, judge_sqnr
from onnxshrink.verify.gates import judge


def error(value: float | None, output: str = "y", note: str | None = None) -> Metric:
    return Metric("max_abs_error", value, target="cpu", output=output, note=note)


def step(value: float, output: str = "y") -> Metric:
    return Metric("output_step", value, target="cpu", output=output)


def agreement(value: float, lo: float, hi: float) -> Metric:
    return Metric("top1_agreement", value, "ratio", lo, hi, target="cpu", output="y")


def test_the_worst_output_decides_sqnr() -> None:
    """One bad output fails the gate and is named; identical outputs pass, alone and beside others."""
    same = Metric("sqnr_db", None, "dB", target="cpu", output="same", note="identical")
    good, bad = (Metric("sqnr_db", db, "dB", target="cpu", output=f"at{db:.0f}") for db in (40.0, 9.0))
    verdict = judge_sqnr(15, [good, bad, same])
    assert (verdict.outcome, "'at9'" in verdict.reason) == ("failed", True)
    assert judge_sqnr(15, [good, same]).outcome == "passed"
    assert judge_sqnr(15, [same]).outcome == "passed"


def test_a_number_limits_the_largest_error() -> None:
    """The output with the largest error is named with its sample; the limit itself is kept."""
    far, near = error(0.5, "far", "worst at sample 7"), error(0.1, "near")
    verdict = judge_error(0.4, [near, far])
    assert verdict.reason == "largest error 0.5 of output 'far' (worst at sample 7) exceeds the limit of 0.4"
    assert (verdict.outcome, verdict.limit) == ("failed", 0.4)
    assert judge_error(0.5, [near, far]).outcome == "passed"


def test_steps_are_counted_by_each_output() -> None:
    """Half the error is farther off where the step is a tenth."""
    metrics = [error(0.5, "coarse"), step(0.5, "coarse"), error(0.25, "fine"), step(0.05, "fine")]
    verdict = judge_error("4 steps", metrics)
    assert verdict.reason == "largest error 5 steps of output 'fine' exceeds the limit of 4 steps"
    assert (verdict.outcome, verdict.limit) == ("failed", 4.0)
    assert judge_error("5 steps", metrics).outcome == "passed"


def test_steps_of_an_output_without_any_fail_with_what_to_do() -> None:
    """A float output cannot keep a limit in steps, unless it has no error at all."""
    verdict = judge_error("2 steps", [error(0.25)])
    assert verdict.outcome == "failed"
    assert "give the limit in its own unit, in which its largest error is 0.25" in verdict.reason
    assert judge_error("2 steps", [error(0.0)]).outcome == "passed"
    assert judge_error(0.3, [error(0.25)]).outcome == "passed"


def test_outputs_without_a_number_fail() -> None:
    """NaN keeps no tolerance and no agreement, and the reason is the metric's note."""
    for tolerance in (1e9, "100 steps"):
        verdict = judge_error(tolerance, [error(0.1), step(1), error(None, "z", "candidate gives NaN")])
        assert (verdict.outcome, verdict.reason.endswith("'z' has no value: candidate gives NaN")) == ("failed", True)
    nothing = Metric("top1_agreement", None, "ratio", output="z", note="candidate gives NaN")
    assert judge_agreement(0.1, [nothing, agreement(1.0, 0.9, 1.0)]).outcome == "failed"


@pytest.mark.parametrize(
    ("lo", "hi", "outcome"), [(0.96, 0.99, "passed"), (0.95, 0.99, "passed"), (0.9, 0.94, "failed"), (0.9, 0.95, None)]
)
def test_the_interval_of_agreement_decides(lo: float, hi: float, outcome: Outcome | None) -> None:
    """All of it at the limit or above passes, all of it below fails, else more samples are asked for."""
    verdict = judge_agreement(0.95, [agreement(0.5 * (lo + hi), lo, hi), agreement(1.0, 0.99, 1.0)])
    assert verdict.outcome == (outcome or "inconclusive")
    assert ("add evaluation samples" in verdict.reason) is (outcome is None)


def test_gates_of_the_config_reach_them() -> None:
    """A tolerance in steps and an agreement, as a config gives them, on each target and strictly."""
    gates = Gates.model_validate({"max_abs_error": "2 steps", "min_top1_agreement": 0.95, "strict": True})
    metrics = [error(0.3), step(0.1), agreement(0.95, 0.9, 0.99)]
    verdicts = judge(gates, metrics, (Target(),))
    assert [(v.gate, v.outcome, v.target) for v in verdicts] == [
        ("max_abs_error", "failed", "cpu"),
        ("min_top1_agreement", "failed", "cpu"),
    ]
    assert "largest error 3 steps" in verdicts[0].reason
    assert "strict" in verdicts[1].reason

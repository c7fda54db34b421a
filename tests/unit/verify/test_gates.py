"""Gates and the choice of the winner."""

from __future__ import annotations

import pytest

from onnxshrink.config.gates import Gates, Target
from onnxshrink.core.report import Candidate, Metric, Outcome, Verdict
from onnxshrink.verify.gates import judge, select

CPU = (Target(),)


def only(gates: Gates, *metrics: Metric, targets: tuple[Target, ...] = CPU) -> Verdict:
    """The one verdict."""
    (verdict,) = judge(gates, metrics, targets)
    return verdict


def drop(value: float | None, lo: float | None = None, hi: float | None = None, **more: str) -> Metric:
    """An accuracy drop on the CPU."""
    return Metric("accuracy_drop", value, "ratio", lo, hi, target="cpu", **more)


@pytest.mark.parametrize(
    ("lo", "hi", "outcome"),
    [(-0.01, 0.009, "passed"), (0.0, 0.01, "passed"), (0.011, 0.02, "failed"), (0.01, 0.02, "inconclusive")],
)
def test_the_interval_decides(lo: float, hi: float, outcome: Outcome) -> None:
    """All of it within the limit passes, none of it fails, else nobody knows."""
    assert only(Gates(max_accuracy_drop=0.01), drop(0.01, lo, hi)).outcome == outcome


def test_inconclusive_says_what_would_decide_it() -> None:
    """Points, interval, limit, number of samples and the remedy stand on one line."""
    samples = Metric("evaluation_samples", 797.0, "count", target="cpu")
    verdict = only(Gates(max_accuracy_drop=0.01), drop(0.004, -0.002, 0.011), samples)
    assert verdict.reason == (
        "accuracy drop 0.40 points (-0.20 … 1.10): not worse by more than 1.00 points is not shown by 797 samples; "
        "about 2,300 would decide it"
    )
    assert (verdict.gate, verdict.limit, verdict.target) == ("max_accuracy_drop", 0.01, "cpu")


def test_what_is_shown_is_said() -> None:
    """Passed and failed drops say in words what the interval has shown."""
    assert only(Gates(max_accuracy_drop=0.01), drop(0.0, -0.01, 0.009)).reason.endswith(
        ": not worse by more than 1.00 points is shown"
    )
    assert only(Gates(max_accuracy_drop=0.01), drop(0.03, 0.011, 0.04)).reason.endswith(
        "): worse by more than 1.00 points is shown"
    )


def test_strict_fails_what_is_not_proved() -> None:
    """Under strict an inconclusive gate fails and says why; a passed one stays passed."""
    verdict = only(Gates(max_accuracy_drop=0.01, strict=True), drop(0.004, -0.002, 0.011))
    assert verdict.outcome == "failed"
    assert "strict" in verdict.reason
    assert only(Gates(max_accuracy_drop=0.01, strict=True), drop(0.0, -0.002, 0.001)).outcome == "passed"


@pytest.mark.parametrize(
    "gate",
    [
        "max_accuracy_drop",
        "min_sqnr_db",
        "max_abs_error",
        "min_top1_agreement",
        "max_size",
        "max_latency_ratio",
        "max_latency_ms",
        "min_integer_coverage",
    ],
)
def test_what_was_not_measured_fails(gate: str) -> None:
    """No metric, no pass."""
    verdict = only(Gates.model_validate({gate: 1}))
    assert (verdict.gate, verdict.outcome) == (gate, "failed")
    assert "not measured" in verdict.reason


def test_a_value_that_is_not_finite_fails_with_its_note() -> None:
    """NaN outputs fail accuracy and drift, and the reason is the metric's note."""
    verdict = only(Gates(max_accuracy_drop=1), drop(None, note="candidate gives NaN at sample 3"))
    assert (verdict.outcome, "NaN at sample 3" in verdict.reason) == ("failed", True)
    sqnr = Metric("sqnr_db", None, "dB", target="cpu", output="y", note="candidate gives NaN")
    verdict = only(Gates(min_sqnr_db=1), sqnr)
    assert (verdict.outcome, "'y'" in verdict.reason) == ("failed", True)


def test_integer_coverage_names_what_is_in_float() -> None:
    """A share below the limit fails with the largest float island and its cause; at the limit it passes."""
    cause = "the largest float island, 42% at 'conv': 'x' has 16 bits"
    share = Metric("integer_coverage", 0.58, "ratio", target="cpu", note=cause)
    verdict = only(Gates(min_integer_coverage=0.9), share)
    assert verdict.outcome == "failed"
    assert verdict.reason == f"integer coverage 58.0% is below the limit of 90.0%: {cause}"
    assert only(Gates(min_integer_coverage=0.58), share).outcome == "passed"
    nothing = Metric("integer_coverage", 0.0, "ratio", target="cpu")
    assert "nothing in the model is quantized" in only(Gates(min_integer_coverage=0.5), nothing).reason


def test_each_target_is_judged_and_size_once() -> None:
    """Verdicts come per target in the config's order; size belongs to the file."""
    targets = (Target(), Target(threads=2))
    metrics = [
        Metric("size_bytes", 61_000.0, "bytes"),
        Metric("latency_ratio", 0.5, "ratio", 0.4, 0.6, target="cpu"),
        Metric("latency_ratio", 1.5, "ratio", 1.4, 1.6, target="cpu x2"),
        Metric("latency_p50_ms", 2.0, "ms", 1.9, 2.1, target="cpu"),
        Metric("latency_p50_ms", 2.0, "ms", 1.9, 2.1, target="cpu x2"),
    ]
    verdicts = judge(Gates(max_size=60_000, max_latency_ratio=1.0, max_latency_ms=2.0), metrics, targets)
    assert [(v.gate, v.target, v.outcome) for v in verdicts] == [
        ("max_size", None, "failed"),
        ("max_latency_ratio", "cpu", "passed"),
        ("max_latency_ratio", "cpu x2", "failed"),
        ("max_latency_ms", "cpu", "inconclusive"),
        ("max_latency_ms", "cpu x2", "inconclusive"),
    ]
    assert verdicts[0].reason == "model size 61,000 bytes exceeds the limit of 60,000 bytes"
    assert "latency_seconds" in verdicts[3].reason
    own = judge(Gates(max_latency_ratio={"cpu x2": 1.6, "gone": 1}, max_latency_ms={"cpu": 1}), metrics, targets)
    assert [(v.gate, v.target, v.limit, v.outcome) for v in own] == [
        ("max_latency_ratio", "cpu x2", 1.6, "passed"),
        ("max_latency_ratio", "gone", 1, "failed"),
        ("max_latency_ms", "cpu", 1, "failed"),
    ]


def test_errors_are_not_told_in_points() -> None:
    """The drop of mae is in the metric's own unit."""
    metric = Metric("accuracy_drop", 0.5, "", 0.4, 0.6, target="cpu")
    assert "0.5 (0.4 … 0.6)" in only(Gates(max_accuracy_drop=1), metric).reason


def variant(
    name: str,
    size: float,
    ratio: tuple[float, float, float],
    loss: float | None = 0.0,
    outcome: Outcome = "passed",
) -> Candidate:
    """A variant with a size, a latency ratio with its interval, an accuracy drop and one verdict."""
    return Candidate(
        name,
        "variant",
        f"{name}.onnx",
        name,
        (
            Metric("size_bytes", size, "bytes"),
            Metric("latency_ratio", ratio[1], "ratio", ratio[0], ratio[2], target="cpu"),
            drop(loss),
        ),
        (Verdict("max_size", 1.0, outcome, "because"),),
    )


ROWS = (
    Candidate("reference", "reference", "r.onnx", "r", (Metric("size_bytes", 1.0, "bytes"),)),
    variant("fp32", 400, (1.0, 1.0, 1.0), 0.0),
    variant("int8", 100, (0.49, 0.50, 0.51), 0.02),
    variant("int8_per_channel", 110, (0.48, 0.495, 0.505), 0.01),
    variant("tiny", 10, (0.1, 0.1, 0.1), 0.9, outcome="failed"),
)


def test_each_criterion_has_its_winner() -> None:
    """Smallest by bytes, most accurate by drop; the fastest two are a tie that accuracy breaks; failures never win."""
    assert select(ROWS, "smallest")[0] == "int8"
    assert select(ROWS, "most_accurate")[0] == "fp32"
    assert select(ROWS, "fastest")[0] == "int8_per_channel"
    assert select(ROWS, "smallest")[1] == "selected int8: the smallest of 3 variants that failed no gate"


def test_ties_fall_to_the_other_criteria_then_to_the_order() -> None:
    """Equal bytes: the more accurate; all equal: the first."""
    a, b = variant("a", 5, (1, 1, 1), 0.1), variant("b", 5, (1, 1, 1), 0.05)
    assert select([a, b], "smallest")[0] == "b"
    assert select([a, variant("c", 5, (1, 1, 1), 0.1)], "smallest")[0] == "a"


def test_worst_target_counts() -> None:
    """A variant that is fast on one target and slow on another is slow."""
    slow_elsewhere = Metric("latency_ratio", 3.0, "ratio", 2.9, 3.1, target="cpu x2")
    row = variant("mixed", 1, (0.1, 0.1, 0.1))
    mixed = Candidate(row.name, row.role, row.model, row.digest, (*row.metrics, slow_elsewhere), row.verdicts)
    assert select([mixed, variant("even", 1, (0.5, 0.5, 0.5))], "fastest")[0] == "even"


def test_a_slow_winner_is_told() -> None:
    """A winner slower than the reference beyond doubt says so; one within doubt does not."""
    assert "slower than the reference on cpu: 1.30 times" in select([variant("q", 1, (1.2, 1.3, 1.4))], "smallest")[1]
    assert "slower" not in select([variant("q", 1, (0.9, 1.1, 1.4))], "smallest")[1]


def test_an_open_gate_is_told_and_may_win() -> None:
    """Inconclusive is no failure, and the reason names the gate."""
    name, reason = select([variant("q", 1, (1, 1, 1), outcome="inconclusive")], "smallest")
    assert (name, reason.endswith("inconclusive: max_size")) == ("q", True)


def test_what_breaks_a_limit_within_noise_wins_only_where_nothing_keeps_it() -> None:
    """Small and probably too inaccurate comes after larger and probably not; both are inconclusive."""
    gates = Gates(max_accuracy_drop=0.01)

    def measured(name: str, size: float, value: float) -> Candidate:
        metrics = (Metric("size_bytes", size, "bytes"), drop(value, value - 0.02, value + 0.02))
        return Candidate(name, "variant", "", name, metrics, judge(gates, metrics, CPU))

    over, under, sure = measured("over", 1, 0.012), measured("under", 2, 0.008), measured("sure", 3, -0.02)
    assert [row.outcome for row in (over, under, sure)] == ["inconclusive", "inconclusive", "passed"]
    name, why = select([over, under, sure], "smallest")
    assert name == "under"
    assert why.startswith("selected under: the smallest of 2 variants that kept every limit as measured; inconclusive")
    assert (
        select([over, sure], "smallest")[1] == "selected sure: the only variant of 2 that kept every limit as measured"
    )
    assert select([over], "smallest")[0] == "over"


def test_no_variant_passed() -> None:
    """Nobody wins, and each variant's failed gates are named."""
    name, reason = select([ROWS[0], ROWS[4]], "smallest")
    assert name is None
    assert "tiny: max_size" in reason


def test_missing_metrics_come_last() -> None:
    """A variant that was not timed, or has no accuracy, never beats one that was."""
    bare = Candidate("bare", "variant", "b.onnx", "b", (Metric("size_bytes", 1.0, "bytes"),))
    assert select([bare, ROWS[1]], "fastest")[0] == "fp32"
    assert select([bare, ROWS[1]], "most_accurate")[0] == "fp32"
    assert select([bare], "fastest")[0] == "bare"

"""Outputs that are mostly noise are told, with what to do, and nothing else is."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from onnxshrink.config.stages import Optimize, QuantizeDynamic, QuantizeStatic, QuantizeWeights, Stage, ToFp16
from onnxshrink.core.drift import CANDIDATE_NAN, IDENTICAL, REFERENCE_NAN
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.verify.noise import LEAST_SQNR_DB, find_noise


def said(*metrics: Metric, chain: Sequence[Stage] = (QuantizeStatic(),)) -> str:
    return "\n".join(find_noise(Candidate("int8", "variant", "m.onnx", "0", metrics), chain))


def sqnr(value: float | None, *, output: str = "y", note: str | None = None) -> Metric:
    return Metric("sqnr_db", value, "dB", output=output, note=note)


def test_the_worst_output_is_named_with_the_size_of_its_noise() -> None:
    """6.02 dB are noise of half the size of the signal."""
    text = said(sqnr(30.0, output="a"), sqnr(6.0206, output="b"))
    assert text.startswith("int8: noise has 50% of the size of output 'b' (6.0 dB SQNR)")
    assert "quantize_dynamic" in text
    assert "sensitivity" in text
    assert "\n" not in text


@pytest.mark.parametrize("metric", [sqnr(LEAST_SQNR_DB), sqnr(40.0), sqnr(None, note=IDENTICAL)])
def test_outputs_that_can_be_used_are_passed_over(metric: Metric) -> None:
    """At the limit, far above it, and identical."""
    assert not said(metric)


@pytest.mark.parametrize("note", [CANDIDATE_NAN, "one side is all zeros"])
def test_outputs_without_an_sqnr_are_told(note: str) -> None:
    """A model that gives NaN is no better than one that gives noise."""
    assert note in said(sqnr(50.0), sqnr(None, output="z", note=note))


def test_a_reference_that_gives_nan_is_no_fault_of_the_variant() -> None:
    """No stage is blamed for it, and no setting of it would help."""
    text = said(sqnr(None, note=REFERENCE_NAN))
    assert "look at the samples, and at the reference" in text
    assert "quantize" not in text


@pytest.mark.parametrize(("hi", "told"), [(0.49, True), (0.51, False)])
def test_classes_that_disagree_for_most_samples_are_told(hi: float, *, told: bool) -> None:
    """Only where the whole interval is below a half."""
    agreement = Metric("top1_agreement", 0.4, "ratio", 0.3, hi, output="y")
    assert ("40% of the samples" in said(sqnr(20.0), agreement)) is told


@pytest.mark.parametrize(
    ("chain", "advice"),
    [
        ((Optimize(), QuantizeStatic()), "smooth_quant"),
        ((QuantizeDynamic(),), "smooth_quant before it"),
        ((QuantizeWeights(),), "8 bits"),
        ((ToFp16(),), "keep_nodes"),
        ((), "do not compute the same function"),
    ],
)
def test_the_advice_fits_the_stage(chain: Sequence[Stage], advice: str) -> None:
    """What to try next depends on what was done."""
    assert advice in said(sqnr(1.0), chain=chain)

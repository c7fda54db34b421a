"""Intervals against scipy, and their coverage in simulations."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats

from onnxshrink.core.intervals import (
    _t,
    bootstrap,
    matched_difference_interval,
    mcnemar_p,
    mean_interval,
    percentile_interval,
    ratio_margin_db,
    resamples,
    samples_to_decide,
    wilson_interval,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 10), (789, 797), (1, 5000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_wilson_equals_scipy(successes: int, n: int, confidence: float) -> None:
    """The score interval is scipy's, the extremes included."""
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence=confidence) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.999])
@pytest.mark.parametrize("n", [6, 12, 60])
def test_mean_interval_equals_scipy(n: int, confidence: float) -> None:
    """Student's interval is scipy's, to the 1% that the quantile is known to."""
    values = np.random.default_rng(n).normal(3, 2, n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    width = expected.high - expected.low
    assert mean_interval(values, confidence=confidence) == pytest.approx(tuple(expected), abs=0.01 * width)


@pytest.mark.parametrize(("n_lost", "n_won", "n"), [(150, 86, 1600), (4, 0, 400), (30, 30, 90)])
def test_matched_difference_is_that_of_a_mean_with_one_more_of_each(n_lost: int, n_won: int, n: int) -> None:
    """With one more lost and one more won sample, it is the plain normal interval of the mean change."""
    changes = np.repeat([1.0, -1.0, 0.0], [n_lost + 1, n_won + 1, n - n_lost - n_won])
    expected = stats.norm.interval(0.95, changes.mean(), changes.std() / np.sqrt(changes.size))
    assert matched_difference_interval(n_lost, n_won, n) == pytest.approx(expected)


def test_matched_difference_has_width_where_nothing_changed() -> None:
    """Twenty unchanged samples do not prove a drop below a point; two thousand do."""
    assert matched_difference_interval(0, 0, 20)[1] > 0.05
    assert matched_difference_interval(0, 0, 2000)[1] < 0.002
    assert matched_difference_interval(0, 0, 400)[1] == pytest.approx(3 / 400, rel=0.1)  # the rule of three


@pytest.mark.parametrize(("p_lost", "p_won", "n"), [(0.03, 0.02, 200), (0.005, 0.0, 400), (0.2, 0.1, 50)])
def test_matched_difference_holds_the_truth(p_lost: float, p_won: float, n: int) -> None:
    """At least 93 of 100 intervals hold the true difference."""
    counts = np.random.default_rng(0).multinomial(n, [p_lost, p_won, 1 - p_lost - p_won], size=2000)
    ends = np.array([matched_difference_interval(lost, won, n) for lost, won, _ in counts.tolist()])
    held = (ends[:, 0] <= p_lost - p_won) & (p_lost - p_won <= ends[:, 1])
    assert held.mean() > 0.93


def test_bootstrap_agrees_with_scipy() -> None:
    """The ratio of medians of pairs has the standard error and the percentiles of scipy's paired bootstrap."""
    columns = np.random.default_rng(3).lognormal(0, 0.2, (2, 200))
    draws = bootstrap(columns, partial(np.median, axis=-1), seed=0, n_resamples=4000)
    ratio = draws[1] / draws[0]

    def statistic(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return np.median(b, axis=axis) / np.median(a, axis=axis)

    expected = stats.bootstrap(
        (columns[0], columns[1]),
        statistic,
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    assert ratio.std(ddof=1) == pytest.approx(expected.standard_error, rel=0.05)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert percentile_interval(ratio, 200) == pytest.approx(tuple(expected.confidence_interval), abs=0.06 * width)


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is saved without changing a draw."""
    columns = np.random.default_rng(0).normal(size=(2, 37, 3))
    statistic = partial(np.mean, axis=(-2, -1))
    whole = bootstrap(columns, statistic, seed=5, n_resamples=101)
    monkeypatch.setattr("onnxshrink.core.intervals._CHUNK_VALUES", 500)
    assert np.array_equal(bootstrap(columns, statistic, seed=5, n_resamples=101), whole)
    assert whole.shape == (2, 101)


def test_bootstrap_resamples_whole_observations() -> None:
    """Further axes travel with their observation: rows that are constant stay constant."""
    rows = np.repeat(np.arange(6.0)[None, :, None], 4, axis=2)
    spread = bootstrap(rows, lambda x: np.ptp(x, axis=-1).max(axis=-1), seed=0, n_resamples=50)
    assert not spread.any()


@pytest.mark.parametrize("freedom", [3, 5, 11, 59, 1000])
def test_t_equals_scipy(freedom: int) -> None:
    """The quantile of Student's t is within 1%."""
    assert _t(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


@pytest.mark.parametrize("n", [6, 12, 40])
def test_percentile_interval_holds_the_truth_for_few_observations(n: int) -> None:
    """More than 91 of 100 intervals of a mean hold it, where plain percentiles of six observations hold 85."""
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        values = rng.normal(size=(1, n))
        lo, hi = percentile_interval(bootstrap(values, partial(np.mean, axis=-1), seed=trial, n_resamples=500)[0], n)
        held += lo <= 0 <= hi
    assert held / 400 > 0.91


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (12, 5), (5, 12), (700, 640), (40_000, 39_500)])
def test_mcnemar_equals_scipys_exact_test(lost: int, won: int) -> None:
    """The two-sided p-value is scipy's binomial test of lost among changed samples."""
    expected = stats.binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert mcnemar_p(lost, won) == pytest.approx(expected, rel=1e-8)


def test_resamples_are_those_of_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting how often a sample is drawn gives the same means, however they are chunked."""
    values = np.random.default_rng(0).normal(size=37)
    draws = bootstrap(values[None], partial(np.mean, axis=-1), seed=5, n_resamples=101)[0]
    monkeypatch.setattr("onnxshrink.core.intervals._CHUNK_VALUES", 500)
    chunks = list(resamples(37, seed=5, n_resamples=101))
    assert len(chunks) > 1
    weights = np.vstack(chunks)
    assert np.array_equal(weights.sum(axis=1), np.full(101, 37))
    assert weights @ values / 37 == pytest.approx(draws)
    assert len(next(resamples(37, seed=5, n_resamples=101, width=250))) == 2


@pytest.mark.parametrize(
    ("p_lost", "p_won", "limit"), [(0.02, 0.015, 0.02), (0.01, 0.01, 0.01), (0.08, 0.03, 0.03), (0.04, 0.0, 0.02)]
)
def test_the_samples_that_are_asked_for_decide(p_lost: float, p_won: float, limit: float) -> None:
    """With the number asked for, the paired interval is clear of the limit in about four of five experiments."""
    n, drop = 200, p_lost - p_won
    half = 1.96 * np.sqrt((p_lost + p_won - drop**2) / n)
    enough = samples_to_decide(drop, (drop - half, drop + half), limit, n)
    assert enough is not None
    counts = np.random.default_rng(0).multinomial(enough, [p_lost, p_won, 1 - p_lost - p_won], size=1000)
    ends = np.array([matched_difference_interval(lost, won, enough) for lost, won, _ in counts.tolist()])
    decided = (ends[:, 1] <= limit) if drop < limit else (ends[:, 0] > limit)
    assert 0.72 < decided.mean() < 0.9


def test_no_number_of_samples_decides_what_lies_on_the_limit() -> None:
    """The value at the limit, or next to it, is not promised to be decided."""
    assert samples_to_decide(0.01, (-0.01, 0.03), 0.01, 200) is None
    assert samples_to_decide(0.0099999, (-0.01, 0.03), 0.01, 200) is None


def test_ratio_margin_is_that_of_a_bootstrap() -> None:
    """Half the interval of the ratio of two sums over the same samples, by Student's t in place of the normal's."""
    rng = np.random.default_rng(3)
    a = rng.gamma(4.0, size=60)
    b = a * rng.gamma(9.0, 2.0, size=60)
    drawn = bootstrap(np.stack([a, b]), lambda c: 10 * np.log10(c[0].sum(-1) / c[1].sum(-1)), seed=0)
    expected = stats.t.ppf(0.975, 59) * drawn.std(ddof=1)
    assert ratio_margin_db(a.tolist(), b.tolist()) == pytest.approx(expected, rel=0.05)
    assert ratio_margin_db(b.tolist(), a.tolist()) == ratio_margin_db(a.tolist(), b.tolist())


def test_ratio_margin_holds_the_truth() -> None:
    """Of few samples, most of whose spread both share, in about 95 of 100 cases; in 90 where a few decide the sum."""
    rng = np.random.default_rng(5)
    for tail, least in ((0.3, 0.93), (1.0, 0.88)):
        shared, own = rng.lognormal(0, tail, (2000, 32)), rng.lognormal(0, 0.5, (2, 2000, 32))
        found = 10 * np.log10((shared * own[0]).sum(1) / (shared * own[1]).sum(1))
        margins = [ratio_margin_db(a, b) for a, b in zip(*(shared * own).tolist(), strict=True)]
        assert least < (np.abs(found) <= margins).mean() <= 0.98


def test_ratio_margin_knows_what_it_cannot_say() -> None:
    """Nothing of a few samples, or of outputs without an error; and no chance is in what is the same but for a size."""
    assert ratio_margin_db([1, 2, 3], [3, 2, 1]) == math.inf
    assert ratio_margin_db([0, 0, 0, 0], [1, 2, 3, 4]) == math.inf
    assert ratio_margin_db([1, 2, 3, 4], [2, 4, 6, 8]) == 0

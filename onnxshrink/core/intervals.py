"""Intervals: how far a measured number may be from the true one. Every function is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Interval: TypeAlias = tuple[float, float]

CONFIDENCE = 0.95
"""Of every interval in a report."""

_CHUNK_VALUES = 1 << 20


def wilson_interval(successes: int, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Score interval of a proportion; honest at 0 and at 1, where the plain one has no width.

    Args:
        successes: How many of the ``n`` trials succeeded.
        n: Trials, at least one.
        confidence: Share of such intervals that hold the true proportion.

    Returns:
        ``(lo, hi)`` with ``0 <= lo <= successes / n <= hi <= 1``.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    z = _z(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def matched_difference_interval(n_lost: int, n_won: int, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the difference of two proportions that were measured on the same samples.

    A bootstrap of the samples has no width where no sample changed, however few there are; this one says that twenty
    unchanged samples prove little.

    Args:
        n_lost: Samples that were right and are wrong now.
        n_won: Samples that were wrong and are right now.
        n: All samples, at least one.
        confidence: Share of such intervals that hold the true difference.

    Returns:
        ``(lo, hi)`` around ``(n_lost - n_won) / n``, within -1 and 1.

    Source: Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on
        Paired Data", Journal of Educational and Behavioral Statistics 2012.
    """
    total = n + 2
    lost, won = (n_lost + 1) / total, (n_won + 1) / total
    half = _z(confidence) * math.sqrt((lost + won - (lost - won) ** 2) / total)
    return max(-1.0, lost - won - half), min(1.0, lost - won + half)


def mcnemar_p(n_lost: int, n_won: int) -> float:
    """How likely samples change as unevenly as this, or more, if none of the models is better: exact, two-sided.

    Args:
        n_lost: Samples that were right and are wrong now.
        n_won: Samples that were wrong and are right now.

    Returns:
        The p-value, 0 to 1; 1 where no sample changed.

    Source: McNemar, "Note on the Sampling Error of the Difference between Correlated Proportions or Percentages",
        Psychometrika 1947, with the binomial distribution in place of its normal approximation.
    """
    n, fewer = n_lost + n_won, min(n_lost, n_won)
    log_half_to_n = n * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - log_half_to_n)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def samples_to_decide(value: float, interval: Interval, limit: float, n: int) -> int | None:
    """How many samples would decide on which side of a limit a mean is, four times in five, if it is what it seems.

    Widths shrink with the root of the number. A mean that is close to the limit is itself measured with an error, so
    the interval must stay clear of the limit by what four of five measurements keep.

    Args:
        value: The mean of ``n`` samples.
        interval: Its interval, which holds the limit.
        limit: What it is compared with.
        n: Samples.

    Returns:
        The number, rounded up to two digits, or None where the value is the limit, or ten million would not do.

    Source: the sample size of a one-sided test with power 0.8, such as Chow, Shao and Wang, "Sample Size Calculations
        in Clinical Research", 2003, section 3.1.
    """
    width = interval[1] - value if value < limit else value - interval[0]
    power = 1 + NormalDist().inv_cdf(0.8) / _z(CONFIDENCE)
    if value == limit or (found := n * (power * width / (limit - value)) ** 2) > 1e7:
        return None
    step: int = 10 ** max(0, len(str(int(found))) - 2)
    return max(n + 1, math.ceil(found / step) * step)


def resamples(n: int, *, seed: int, n_resamples: int = 2000, width: int = 1) -> Iterator[Floats]:
    """How often each resample of a bootstrap holds each of ``n`` observations; the draws are those of `bootstrap`.

    Args:
        n: Observations.
        seed: Seed of the resampling.
        n_resamples: How many resamples.
        width: Numbers that will be made of each resample, where they are more than ``n``.

    Yields:
        ``(r, n)`` float64, few enough rows to bound memory.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_VALUES // max(n, width))
    for start in range(0, n_resamples, chunk):
        rows = min(chunk, n_resamples - start)
        picks = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(picks.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def bootstrap(columns: Floats, statistic: Callable[[Floats], Floats], *, seed: int, n_resamples: int = 2000) -> Floats:
    """Values of a statistic over resamples of observations; what was observed together stays together.

    Memory is bounded whatever the number of observations, and the draws do not depend on how they are chunked.

    Args:
        columns: ``(m, n, ...)`` float64: ``m`` quantities observed together ``n`` times. Further axes belong to one
            observation, such as the samples of one round.
        statistic: Takes ``(m, r, n, ...)`` resamples and gives ``(..., r)`` values.
        seed: Seed of the resampling.
        n_resamples: How many resamples.

    Returns:
        ``(..., n_resamples)`` float64.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 6 and 8.
    """
    n = columns.shape[1]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_VALUES * len(columns) // columns.size)
    draws = []
    for start in range(0, n_resamples, chunk):
        picks = rng.integers(0, n, size=(min(chunk, n_resamples - start), n))
        draws.append(statistic(columns[:, picks]))
    return np.concatenate(draws, axis=-1)


def percentile_interval(draws: Floats, n: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Interval from bootstrap draws, wider for few observations, where the plain percentiles hold too little.

    Args:
        draws: ``(r,)`` float64, as `bootstrap` gives them.
        n: Observations they were resampled from, at least two.
        confidence: Share of such intervals that hold the true value.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 2015, section 4.5:
        the expanded percentile interval.
    """
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * _t(confidence, n - 1))
    lo, hi = np.quantile(draws, (tail, 1 - tail))
    return float(lo), float(hi)


def mean_interval(values: Floats, *, confidence: float = CONFIDENCE) -> Interval:
    """Interval of the mean of what the values are samples of, by Student's t; cheap enough to be asked often.

    Args:
        values: ``(n,)`` float64, at least four.
        confidence: Share of such intervals that hold the true mean, where values are about normal.

    Source: Student, "The Probable Error of a Mean", Biometrika 1908.
    """
    n = len(values)
    half = _t(confidence, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def ratio_margin_db(a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE) -> float:
    """How far the ratio of two sums may be from that of all samples, when both are sums over the same few of them.

    What is common to both, such as a sample that is hard for either, has no part in it.

    Args:
        a: A sample's own part of the first sum, none below 0.
        b: That of the second, of the same samples.
        confidence: Share of such margins within which the true ratio lies; of 32 samples a few of which decide the
            sums, it is 0.90 in place of 0.95.

    Returns:
        Half the width of the interval, in dB of energy; 0 where one is a multiple of the other, and infinite where
        nothing can be said: for fewer than four samples, or a sum of 0.

    Source: Cochran, "Sampling Techniques", 3rd edition 1977, section 6.4: the variance of a ratio estimate.
    """
    n, sum_a, sum_b = len(a), math.fsum(a), math.fsum(b)
    if n < 4 or not sum_a or not sum_b:
        return math.inf
    variance = n / (n - 1) * math.fsum((x / sum_a - y / sum_b) ** 2 for x, y in zip(a, b, strict=True))
    return 10 / math.log(10) * _t(confidence, n - 1) * math.sqrt(variance)


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _t(confidence: float, freedom: int) -> float:
    """Two-sided quantile of Student's t, within 1% from 3 degrees of freedom on.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 1964, 26.7.5.
    """
    z = _z(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    correction: float = sum(term / freedom**power for power, term in enumerate(terms, start=1))
    return z + correction

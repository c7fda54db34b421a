"""Times of interleaved pairs, and what follows from them: ratio, intervals, metrics, and the evidence to keep.

The ratio is the median over pairs of one call over the call beside it. Where a machine changes its speed, the medians
of either model's times wander apart, and the pairs' ratios do not: of 70 measurements of a model against itself on a
loaded machine the median pair was off by 0.26% (root mean square), the quotient of medians by 0.79%.

Beside the wall clock stands the processor's: how long the model computed. What else runs on the machine makes a call
wait, which only the wall clock sees; so where both disagree on the ratio, something was in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import numpy as np

from onnxshrink.config.gates import Target
from onnxshrink.core.intervals import CONFIDENCE, Floats, Interval, bootstrap, mean_interval, percentile_interval
from onnxshrink.core.report import Candidate, Metric

CpuClock: TypeAlias = Literal["thread", "process"]

PRECISE_RATIO = 0.01
"""Measuring ends early once the ratio is known to plus or minus this share of itself."""

MAX_STORED_PAIRS = 200
"""Pairs that a report keeps of one measurement, but for one in each round: enough to draw how the times lie."""

_GUARDED = 0.975
"""Confidence of a ratio's interval where its arithmetic holds, so that 95% remain where it does not quite: ending early
costs up to 0.7 points, and rounds are not exactly normal."""

_CAUTIOUS = 0.999
"""Confidence at which a limit counts as decided while measuring goes on."""

_BUSY = 1.2
"""Wall time over CPU time from which a machine counts as busy."""

_COARSE = "the clock of CPU time does not move within one sample"
_SEED = 0


@dataclass(frozen=True, eq=False)
class PairedTimes:
    """Times of one call of each model, pair by pair: arrays ``(n_rounds, n_pairs)`` float64, in nanoseconds.

    Attributes:
        reference_ns: Wall time of one call of the reference.
        candidate_ns: The same of the candidate.
        reference_cpu_ns: CPU time of the same call of the reference.
        candidate_cpu_ns: The same of the candidate.
        inner_calls: Each time is the mean of this many calls in a row, long enough for the clock.
        warm_up_pairs: Pairs that were run before each round and not kept.
        n_unstable: Rounds whose warm-up ended because its time was up, with a model still getting faster.
    """

    reference_ns: Floats
    candidate_ns: Floats
    reference_cpu_ns: Floats
    candidate_cpu_ns: Floats
    inner_calls: int = 1
    warm_up_pairs: tuple[int, ...] = ()
    n_unstable: int = 0

    @property
    def ratio(self) -> float:
        """Median over pairs of candidate over reference; below 1 the candidate is faster."""
        return float(np.median(self.candidate_ns / self.reference_ns))

    @cached_property
    def draws(self) -> Floats:
        """``(2, 2, r)``: bootstrap draws of (p50, p95) of (reference, candidate), rounds resampled."""
        quantiles = partial(np.quantile, q=(0.5, 0.95), axis=(-2, -1))
        return bootstrap(np.stack([self.reference_ns, self.candidate_ns]), quantiles, seed=_SEED, n_resamples=1000)

    @cached_property
    def ratio_interval(self) -> Interval:
        """Interval of `ratio`."""
        return _ratio_interval(self.candidate_ns / self.reference_ns)

    @cached_property
    def cpu_ratio(self) -> tuple[float, Interval] | None:
        """`ratio` and its interval by CPU time; None where a clock of ticks of 10 ms sees most calls as nothing."""
        if min(np.median(self.reference_cpu_ns), np.median(self.candidate_cpu_ns)) <= 0:
            return None
        # A call that the clock missed has no ratio: it stands at the end that it belongs to, and the median remains.
        ratios = self.candidate_cpu_ns / np.maximum(self.reference_cpu_ns, 1.0)
        return float(np.median(ratios)), _ratio_interval(ratios)

    def interval(self, draws: Floats) -> Interval:
        """Interval from draws over this measurement's rounds."""
        return percentile_interval(draws, len(self.reference_ns))

    def is_precise(self) -> bool:
        """True once the ratio is known to plus or minus `PRECISE_RATIO`; it does not matter what the ratio is."""
        lo, hi = mean_interval(self._log_ratios, confidence=CONFIDENCE)
        return (hi - lo) / 2 < PRECISE_RATIO

    def decides(self, max_ratio: float | None, max_ms: float | None) -> bool:
        """True if each limit that is given is told apart, at a confidence that bears to be asked again and again.

        Who looks every few rounds and stops once a 95% interval leaves the limit out is wrong in 17% of the cases where
        the ratio lies on the limit (nine looks from 12 to 43 rounds, then at 48). At 99.9% the looks add 0.1%, and the
        last one keeps its 95%.

        Source: Peto et al., "Design and Analysis of Randomized Clinical Trials Requiring Prolonged Observation of Each
            Patient", British Journal of Cancer 1976: the Haybittle-Peto boundary.
        """
        p50_ms = np.log(np.median(self.candidate_ns, axis=1) / 1e6)
        for limit, logs in ((max_ratio, self._log_ratios), (max_ms, p50_ms)):
            if limit is not None:
                lo, hi = mean_interval(logs, confidence=_CAUTIOUS)
                if lo <= np.log(limit) < hi:
                    return False
        return True

    def to_details(self) -> dict[str, Any]:
        """The times as plain JSON, nanoseconds to four digits, a list for each round.

        Of more than `MAX_STORED_PAIRS` pairs every ``stored_every``-th of each round is kept.
        """
        every = -(-self.reference_ns.size // MAX_STORED_PAIRS)
        facts = {
            "inner_calls": self.inner_calls,
            "rounds": len(self.reference_ns),
            "pairs": self.reference_ns.size,
            "warm_up_pairs": list(self.warm_up_pairs),
            "warm_up_unstable_rounds": self.n_unstable,
            "stored_every": every,
        }
        names = [field.name for field in fields(self) if field.name.endswith("_ns")]
        return facts | {name: _four_digits(getattr(self, name)[:, ::every]) for name in names}

    @cached_property
    def _log_ratios(self) -> Floats:
        """``(n_rounds,)``: logarithm of each round's own ratio."""
        ratios: Floats = np.log(np.median(self.candidate_ns / self.reference_ns, axis=1))
        return ratios


def _four_digits(ns: Floats) -> list[list[int]]:
    steps = 10.0 ** np.maximum(np.floor(np.log10(np.maximum(ns, 1.0))) - 3, 0)
    rounded: list[list[int]] = (np.rint(ns / steps) * steps).astype(int).tolist()
    return rounded


def latency_metrics(times: PairedTimes, *, target_name: str) -> tuple[Metric, ...]:
    """A measurement as metrics, with 95% intervals from how the rounds differ.

    Returns:
        ``latency_p50_ms``, ``latency_p95_ms``, ``reference_latency_p50_ms``, ``latency_ratio`` (of the median pair),
        the CPU time's ``latency_cpu_p50_ms`` and ``latency_cpu_ratio``, and ``latency_pairs``, the number of pairs.
    """
    note = f"each time is the mean of {times.inner_calls} calls" if times.inner_calls > 1 else None
    (reference_p50, candidate_p50), (_, candidate_p95) = times.draws / 1e6
    rows = (
        ("latency_p50_ms", np.median(times.candidate_ns) / 1e6, "ms", times.interval(candidate_p50)),
        ("latency_p95_ms", np.quantile(times.candidate_ns, 0.95) / 1e6, "ms", times.interval(candidate_p95)),
        ("reference_latency_p50_ms", np.median(times.reference_ns) / 1e6, "ms", times.interval(reference_p50)),
        ("latency_ratio", times.ratio, "ratio", times.ratio_interval),
    )
    return (
        *(Metric(name, float(value), unit, *ends, target=target_name, note=note) for name, value, unit, ends in rows),
        *_cpu_metrics(times, target_name, note),
        Metric("latency_pairs", float(times.candidate_ns.size), "count", target=target_name),
    )


def find_waiting(candidate: Candidate, target: Target) -> Iterator[str]:
    """What to think of a model's latency on a target of the CPU where calls waited for the processor.

    Several threads compute more than the wall clock shows, and share the work of two models differently, so that only
    one thread's ratios must agree. Threads that spin count as computing.
    """
    wall, cpu, ratio, cpu_ratio = (
        candidate.metric(name, target=target.name)
        for name in ("latency_p50_ms", "latency_cpu_p50_ms", "latency_ratio", "latency_cpu_ratio")
    )
    if wall is None or cpu is None or not wall.value or not cpu.value:
        return
    head = f"{candidate.name}: on {target.name}"
    if target.threads == 1 and ratio is not None and cpu_ratio is not None and _are_apart(ratio, cpu_ratio):
        yield (
            f"{head} latency is {_said(ratio)} times the reference's by the wall clock and {_said(cpu_ratio)} times by "
            "CPU time: one of both waited for the processor more than the other; the CPU ratio is the model's own, and "
            "a quiet machine will tell"
        )
    if wall.value > _BUSY * cpu.value:
        yield (
            f"{head} a call took {wall.value:.3g} ms and computed for {cpu.value:.3g} ms of them: the machine was "
            "busy; the milliseconds are too many, while the ratio compares calls that waited alike"
        )


def _are_apart(one: Metric, other: Metric) -> bool:
    ends = (one.lo, one.hi, other.lo, other.hi)
    return None not in ends and (one.hi < other.lo or other.hi < one.lo)  # type: ignore[operator]  # none is None here


def _said(metric: Metric) -> str:
    return f"{metric.value:.3f} ({metric.lo:.3f} to {metric.hi:.3f})"


def _cpu_metrics(times: PairedTimes, target_name: str, note: str | None) -> tuple[Metric, ...]:
    names = (("latency_cpu_p50_ms", "ms"), ("latency_cpu_ratio", "ratio"))
    if times.cpu_ratio is None:
        return tuple(Metric(name, None, unit, target=target_name, note=_COARSE) for name, unit in names)
    p50 = float(np.median(times.candidate_cpu_ns)) / 1e6
    p50_ends = times.interval(_median_draws(times.candidate_cpu_ns / 1e6))
    values = ((p50, p50_ends), times.cpu_ratio)
    return tuple(
        Metric(name, value, unit, *ends, target=target_name, note=note)
        for (name, unit), (value, ends) in zip(names, values, strict=True)
    )


def _ratio_interval(ratios: Floats) -> Interval:
    """Interval of the median of ``(n_rounds, n_pairs)`` ratios: Student's, of the rounds' own on a logarithmic scale.

    A bootstrap of six rounds holds too little: it missed the truth in 8.5% of 600 simulated measurements.
    """
    ratio = float(np.median(ratios))
    medians = np.maximum(np.median(ratios, axis=1), np.finfo(np.float64).tiny)
    lo, hi = np.exp(mean_interval(np.log(medians), confidence=_GUARDED))
    return min(float(lo), ratio), max(float(hi), ratio)


def _median_draws(values: Floats) -> Floats:
    """``(r,)``: bootstrap draws of the median of ``(n_rounds, n_pairs)``, rounds resampled."""
    draws: Floats = bootstrap(values[None], partial(np.median, axis=(-2, -1)), seed=_SEED, n_resamples=1000)[0]
    return draws

"""Latency of a candidate against its reference: interleaved pairs in one process, with an honest interval.

Processors change their clock, other programs come and go. So both models are timed in turn, in an order drawn anew for
each pair: whatever slows the machine meets both alike, and the ratio stays right where each time alone does not.

Where a session's memory happens to lie makes it some tenths of a percent faster or slower for as long as it lives, and
no number of pairs shows that. So pairs come in rounds, each with freshly opened sessions, and the interval follows from
how the rounds differ (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np

from onnxshrink.core.intervals import Floats, Interval, bootstrap, percentile_interval
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.session import Session

Run: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[], int]
Row: TypeAlias = tuple[float, float]

PATIENCE = 4.0
"""How many times the asked time is spent before a gate is left undecided."""

PRECISE_RATIO = 0.01
"""Measuring ends early once the ratio is known to plus or minus this share of itself."""

MIN_ROUNDS = 6
"""Fewer give no useful interval, so slow models take these even when the time is up."""

MAX_ROUNDS = 60
_PLANNED_ROUNDS = 12
_MAX_PAIRS = 100
_CHECK_GROWTH = 1.15
_SAMPLE_NS = 50_000
_WARM_UP_WINDOW = 5
_SEED = 0


@dataclass(frozen=True, eq=False)
class PairedTimes:
    """Times of one call of each model, pair by pair.

    Attributes:
        reference_ns: ``(n_rounds, n_pairs)`` float64, nanoseconds for one call of the reference.
        candidate_ns: The same of the candidate.
        inner_calls: Each time is the mean of this many calls in a row, long enough for the clock.
    """

    reference_ns: Floats
    candidate_ns: Floats
    inner_calls: int = 1

    @property
    def ratio(self) -> float:
        """Median of the candidate over median of the reference; below 1 the candidate is faster."""
        return float(np.median(self.candidate_ns) / np.median(self.reference_ns))

    @cached_property
    def draws(self) -> Floats:
        """``(2, 2, r)``: bootstrap draws of (p50, p95) of (reference, candidate), rounds resampled."""
        columns = np.stack([self.reference_ns, self.candidate_ns])
        return bootstrap(columns, partial(np.quantile, q=(0.5, 0.95), axis=(-2, -1)), seed=_SEED, n_resamples=1000)

    @cached_property
    def ratio_interval(self) -> Interval:
        """Interval of `ratio`."""
        reference, candidate = self.draws[0]
        return self.interval(candidate / reference)

    def interval(self, draws: Floats) -> Interval:
        """Interval from draws over this measurement's rounds."""
        return percentile_interval(draws, len(self.reference_ns))

    def is_precise(self) -> bool:
        """True once `ratio_interval` is narrow."""
        lo, hi = self.ratio_interval
        return (hi - lo) / 2 < PRECISE_RATIO * self.ratio

    def decides(self, max_ratio: float | None, max_ms: float | None) -> bool:
        """True if each limit that is given lies outside its interval."""
        limits = ((max_ratio, self.ratio_interval), (max_ms, self.interval(self.draws[0, 1] / 1e6)))
        return not any(limit is not None and lo <= limit < hi for limit, (lo, hi) in limits)


def measure_pairs(
    open_reference: Callable[[], Run],
    open_candidate: Callable[[], Run],
    *,
    seconds: float,
    rng: np.random.Generator,
    clock: Clock = time.perf_counter_ns,
    max_ratio: float | None = None,
    max_ms: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> PairedTimes:
    """Time two models in interleaved pairs until their ratio is known.

    Rounds are added until the ratio is precise and no limit lies inside its interval; else until ``seconds`` are over;
    else, for a limit still inside, up to `PATIENCE` times as long. Outliers are kept.

    Args:
        open_reference: Opens the reference anew and gives what runs one inference.
        open_candidate: The same for the candidate.
        seconds: Time to spend, opening included, where no limit needs more.
        rng: Draws the order within each round and pair.
        clock: Nanoseconds since any moment; never steps back.
        max_ratio: Limit that candidate / reference must be told apart from.
        max_ms: Limit, in milliseconds, that the candidate's median must be told apart from.
        progress: Told the seconds spent after each round.

    Returns:
        At least `MIN_ROUNDS` and at most `MAX_ROUNDS` rounds.
    """
    round_ns = seconds * 1e9 / _PLANNED_ROUNDS
    inner_calls = n_pairs = 0
    rounds: list[list[Row]] = []
    check_at = MIN_ROUNDS
    start = clock()
    while True:
        runs = _open(open_reference, open_candidate, candidate_first=rng.random() < 0.5)
        warm = _warm_up(runs, clock, round_ns)
        if not rounds:
            inner_calls = math.ceil(_SAMPLE_NS / max(min(warm), 1.0))
            n_pairs = max(1, min(_MAX_PAIRS, int(round_ns / max(sum(warm) * inner_calls, 1.0))))
        rounds.append(
            [_time_pair(runs, inner_calls, clock, candidate_first=flip < 0.5) for flip in rng.random(n_pairs)]
        )
        del runs  # the next round opens its own: two models in memory, not four
        elapsed = (clock() - start) / 1e9
        if progress:
            progress(elapsed)
        is_over = elapsed >= PATIENCE * seconds or len(rounds) >= MAX_ROUNDS
        if len(rounds) < (MIN_ROUNDS if is_over else check_at):
            continue
        check_at = math.ceil(len(rounds) * _CHECK_GROWTH)
        reference, candidate = np.moveaxis(np.asarray(rounds, dtype=np.float64), -1, 0)
        times = PairedTimes(reference, candidate, inner_calls)
        if is_over or ((elapsed >= seconds or times.is_precise()) and times.decides(max_ratio, max_ms)):
            return times


def latency_metrics(times: PairedTimes, *, target_name: str) -> tuple[Metric, ...]:
    """A measurement as metrics, with 95% bootstrap intervals over rounds.

    Returns:
        ``latency_p50_ms``, ``latency_p95_ms``, ``reference_latency_p50_ms``, ``latency_ratio`` (of the p50s), and
        ``latency_pairs``, the number of pairs.
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
        Metric("latency_pairs", float(times.candidate_ns.size), "count", target=target_name),
    )


def runner(session: Session, batch: Batch) -> Run:
    """One inference of ``session`` on ``batch``, as a callable.

    On CUDA inputs and outputs are bound, so that the network is timed without its copies; on the CPU it is called as an
    application calls it.
    """
    if session.target.provider == "cuda":
        return partial(session.run_bound, session.bind(batch))
    return session.call(batch)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from running between two clock readings."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(
    open_reference: Callable[[], Run], open_candidate: Callable[[], Run], *, candidate_first: bool
) -> tuple[Run, Run]:
    if candidate_first:
        candidate = open_candidate()
        return open_reference(), candidate
    return open_reference(), open_candidate()


def _warm_up(runs: tuple[Run, Run], clock: Clock, limit_ns: float) -> Row:
    """Run both until they no longer get faster or the time is up; returns what a call of each then takes."""
    rows: list[Row] = []
    start = clock()
    while True:
        rows.append(_time_pair(runs, 1, clock, candidate_first=bool(len(rows) % 2)))
        reference, candidate = np.median(rows[-_WARM_UP_WINDOW:], axis=0)
        if len(rows) >= 2 * _WARM_UP_WINDOW:
            before = np.median(rows[-2 * _WARM_UP_WINDOW : -_WARM_UP_WINDOW], axis=0)
            if (np.array([reference, candidate]) >= 0.98 * before).all():
                break
        if clock() - start >= limit_ns:
            break
    return float(reference), float(candidate)


def _time_pair(runs: tuple[Run, Run], inner_calls: int, clock: Clock, *, candidate_first: bool) -> Row:
    """Nanoseconds per call of reference and candidate."""
    reference, candidate = runs
    if candidate_first:
        ns = _time(candidate, inner_calls, clock)
        return _time(reference, inner_calls, clock), ns
    return _time(reference, inner_calls, clock), _time(candidate, inner_calls, clock)


def _time(run: Run, inner_calls: int, clock: Clock) -> float:
    calls = range(inner_calls)
    start = clock()
    for _ in calls:
        run()
    return (clock() - start) / inner_calls

"""Paired measurement on a synthetic machine whose clock and noise are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from onnxshrink.verify.latency import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    PATIENCE,
    PairedTimes,
    Run,
    latency_metrics,
    measure_pairs,
)

MS = 1_000_000


class Machine:
    """A clock that moves only while a model runs, on a machine that slows down and speeds up.

    Args:
        seed: Of all noise.
        noise: Spread of one call.
        placement: Spread between sessions of one file.
        drift: How far the machine's speed wanders from call to call; it meets whatever runs.
    """

    def __init__(self, seed: int, *, noise: float = 0.02, placement: float = 0.002, drift: float = 0.002) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise, self.placement, self.drift = noise, placement, drift
        self.now, self.speed, self.opened, self.calls = 0, 0.0, 0, 0

    def clock(self) -> int:
        """Nanoseconds since the machine was built."""
        return self.now

    def model(self, ns: float, *, warm_up: int = 0, open_ns: int = 0) -> Callable[[], Run]:
        """A model of ``ns`` a call, three times as slow for its first calls."""

        def open_anew() -> Run:
            self.opened += 1
            self.now += open_ns
            placed = ns * np.exp(self.rng.normal(0, self.placement))
            cold = iter(range(warm_up))

            def run() -> None:
                self.calls += 1
                self.speed = 0.99 * self.speed + self.rng.normal(0, self.drift)
                factor = np.exp(self.speed + abs(self.rng.normal(0, self.noise)))
                self.now += round(placed * factor * (3 if next(cold, None) is not None else 1))

            return run

        return open_anew


def measure(machine: Machine, reference_ns: float, candidate_ns: float, **more: float) -> PairedTimes:
    """Half a second of pairs."""
    return measure_pairs(
        machine.model(reference_ns),
        machine.model(candidate_ns),
        seconds=more.pop("seconds", 0.5),
        rng=np.random.default_rng(0),
        clock=machine.clock,
        **more,
    )


@pytest.mark.parametrize("true_ratio", [0.5, 1.0, 1.3])
def test_interval_holds_the_true_ratio(true_ratio: float) -> None:
    """On a machine that wanders, at least 26 of 30 intervals hold the true ratio; A against A among them."""
    held = 0
    for seed in range(30):
        lo, hi = measure(Machine(seed), MS, MS * true_ratio).ratio_interval
        held += lo <= true_ratio <= hi
    assert held >= 26


def test_interval_knows_of_placement() -> None:
    """Sessions differ more than calls do, and still at least 17 of 20 A/A intervals hold 1; pairs alone hold few."""
    held = fooled = 0
    for seed in range(20):
        times = measure(Machine(seed, noise=0.005, placement=0.004), MS, MS)
        lo, hi = times.ratio_interval
        held += lo <= 1 <= hi
        one_round = np.log(times.candidate_ns[0] / times.reference_ns[0])
        ends = stats.ttest_1samp(one_round, 0).confidence_interval()
        fooled += not ends.low <= 0 <= ends.high
    assert held >= 17
    assert fooled >= 10


def test_easy_case_ends_early() -> None:
    """A quiet machine needs a fraction of the time."""
    machine = Machine(0, noise=0.001, placement=0.0001)
    times = measure(machine, MS, 2 * MS, seconds=2.0, max_ratio=1.0)
    assert machine.now < 2e9
    assert times.ratio == pytest.approx(2.0, rel=0.01)


def test_close_case_takes_longer_and_then_ends() -> None:
    """A limit inside the interval is worth four times the time, not more; without the limit it is not."""
    seconds = 0.2
    loud = {"noise": 0.2, "placement": 0.05}
    without = Machine(0, **loud)
    measure(without, MS, MS, seconds=seconds)
    assert seconds <= without.now / 1e9 < 1.5 * seconds
    limited = Machine(0, **loud)
    lo, hi = measure(limited, MS, MS, seconds=seconds, max_ratio=1.0).ratio_interval
    assert lo <= 1 < hi
    assert PATIENCE * seconds <= limited.now / 1e9 < (PATIENCE + 0.5) * seconds


def test_absolute_limit_counts_as_well() -> None:
    """A limit in milliseconds inside the interval of the p50 is measured longer for, too."""
    machine = Machine(0, noise=0.001, placement=0.05)
    measure(machine, MS, MS, seconds=0.2, max_ms=1.0)
    assert machine.now / 1e9 >= 0.8


def test_slow_models_get_few_calls() -> None:
    """Calls of a second each: six rounds of one pair after one warm-up pair, whatever the time."""
    machine = Machine(0)
    times = measure(machine, 1000 * MS, 500 * MS, seconds=0.5)
    assert times.reference_ns.shape == (MIN_ROUNDS, 1)
    assert machine.calls == MIN_ROUNDS * 4
    assert times.ratio_interval[0] < 0.5 < times.ratio_interval[1]


def test_fast_calls_are_timed_in_groups() -> None:
    """A call of 2 microseconds is timed 25 at once, reported per call, and the metrics say so."""
    times = measure(Machine(0, noise=0.0, placement=0.0, drift=0.0), 2000, 2000)
    assert times.inner_calls == 25
    assert np.median(times.reference_ns) == 2000
    notes = {metric.note for metric in latency_metrics(times, target_name="cpu") if metric.name == "latency_p50_ms"}
    assert notes == {"each time is the mean of 25 calls"}


def test_rounds_are_bounded() -> None:
    """However much time is given for a limit that cannot be decided, there is an end."""
    times = measure(Machine(0, noise=0.3, placement=0.1), MS, MS, seconds=1e6, max_ratio=1.0)
    assert times.reference_ns.shape[0] <= MAX_ROUNDS


def test_warm_up_is_not_timed() -> None:
    """Calls that are slow because a session is new do not enter the times."""
    machine = Machine(0, noise=0.001, drift=0.0)
    times = measure_pairs(
        machine.model(MS, warm_up=6),
        machine.model(MS, warm_up=6),
        seconds=1.0,
        rng=np.random.default_rng(0),
        clock=machine.clock,
    )
    assert times.reference_ns.max() < 1.1 * MS


def test_outliers_are_kept() -> None:
    """The tail is part of the result: one call in ten of five times the length shows in the p95."""
    machine = Machine(0)

    def spiky() -> Run:
        run = machine.model(MS)()

        def sometimes() -> None:
            run()
            machine.now += 4 * MS * int(machine.rng.random() < 0.1)

        return sometimes

    times = measure_pairs(machine.model(MS), spiky, seconds=1.0, rng=np.random.default_rng(0), clock=machine.clock)
    metrics = {metric.name: metric for metric in latency_metrics(times, target_name="cpu")}
    assert metrics["latency_p95_ms"].value == pytest.approx(5.0, rel=0.2)
    assert metrics["latency_p50_ms"].value == pytest.approx(1.0, rel=0.2)


def test_order_is_drawn_for_each_pair() -> None:
    """Both go first about equally often, and a seed draws the same order again."""

    def order(seed: int) -> str:
        machine, log = Machine(0), []

        def logged(name: str) -> Callable[[], Run]:
            def open_anew() -> Run:
                run = machine.model(MS)()
                return lambda: (log.append(name), run())

            return open_anew

        measure_pairs(logged("a"), logged("b"), seconds=0.5, rng=np.random.default_rng(seed), clock=machine.clock)
        return "".join(log)

    first = order(1)
    assert first == order(1)
    assert first != order(2)
    pairs = [first[i : i + 2] for i in range(0, len(first), 2)]
    assert 0.35 < pairs.count("ab") / len(pairs) < 0.65


def test_metrics_are_quantiles_with_ends_around_them() -> None:
    """p50, p95 and ratio equal numpy's over all pairs, each within its interval, on the target."""
    times = measure(Machine(3), MS, 1.2 * MS)
    metrics = {metric.name: metric for metric in latency_metrics(times, target_name="cpu x2")}
    assert metrics["latency_p50_ms"].value == np.median(times.candidate_ns) / MS
    assert metrics["latency_p95_ms"].value == np.quantile(times.candidate_ns, 0.95) / MS
    assert metrics["reference_latency_p50_ms"].value == np.median(times.reference_ns) / MS
    assert metrics["latency_ratio"].value == np.median(times.candidate_ns) / np.median(times.reference_ns)
    assert metrics["latency_pairs"].value == times.candidate_ns.size
    for metric in metrics.values():
        assert metric.target == "cpu x2"
        assert metric.lo is None or metric.lo <= metric.value <= metric.hi


def test_progress_is_told_after_each_round() -> None:
    """Seconds grow, and each round says so."""
    machine, told = Machine(0), []
    times = measure(machine, MS, MS, progress=told.append)
    assert told == sorted(told)
    assert len(told) == len(times.reference_ns)

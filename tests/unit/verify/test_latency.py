"""Paired measurement on a synthetic machine whose clock and noise are known."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from onnxshrink.config.gates import Target
from onnxshrink.core.report import Candidate
from onnxshrink.verify.latency import MAX_ROUNDS, MIN_ROUNDS, PATIENCE, Run, measure_pairs
from onnxshrink.verify.times import MAX_STORED_PAIRS, PairedTimes, find_waiting, latency_metrics

MS = 1_000_000


class Machine:
    """A clock that moves only while a model runs, on a machine that slows down and speeds up.

    Args:
        seed: Of all noise.
        noise: Spread of one call.
        placement: Spread between sessions of one file.
        drift: How far the machine's speed wanders from call to call; it meets whatever runs.
        waits: Share of the calls during which something else has the processor for as long as the call computes.
    """

    def __init__(
        self, seed: int, *, noise: float = 0.02, placement: float = 0.002, drift: float = 0.002, waits: float = 0.0
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.noise, self.placement, self.drift = noise, placement, drift
        self.waits = waits
        self.now, self.computed, self.speed, self.opened, self.calls = 0, 0, 0.0, 0, 0

    def clock(self) -> int:
        """Nanoseconds since the machine was built."""
        return self.now

    def cpu_clock(self) -> int:
        """Nanoseconds that models computed."""
        return self.computed

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
                ns = round(placed * factor * (3 if next(cold, None) is not None else 1))
                self.computed += ns
                self.now += ns * (2 if self.waits and self.rng.random() < self.waits else 1)

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
        cpu_clock=machine.cpu_clock,
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
        cpu_clock=machine.cpu_clock,
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


@pytest.mark.parametrize(("who", "ms"), [("opened", 1), ("called", 1), ("called", 100)])
def test_who_goes_first_makes_no_difference(who: str, ms: int) -> None:
    """A model is 1% slower where it goes first: of 20 A/A measurements none is off by a tenth of that.

    Where a coin alone decides, more begin one way than the other, and some measurements are off by 0.3%.
    """
    off = []
    for seed in range(20):
        machine, turns = Machine(seed, noise=0.0005, placement=0.0, drift=0.0), {"opened": 0, "called": 0}

        def open_anew(machine: Machine = machine, turns: dict[str, int] = turns) -> Run:
            turns["opened"] += 1
            slow = {"opened": turns["opened"] % 2}

            def run() -> None:
                turns["called"] += 1
                slow["called"] = turns["called"] % 2
                machine.now += round(ms * MS * (1 + 0.01 * slow[who]) * np.exp(machine.rng.normal(0, 0.0005)))

            return run

        times = measure_pairs(
            open_anew, open_anew, seconds=1.0, rng=np.random.default_rng(seed), clock=machine.clock,
            cpu_clock=machine.clock,
        )  # fmt: skip
        assert len(times.reference_ns) % 2 == 0
        off.append(np.log(times.candidate_ns / times.reference_ns).mean())
        assert times.ratio_interval[0] <= 1 <= times.ratio_interval[1]
    assert np.abs(off).max() < 0.001


def test_metrics_are_quantiles_with_ends_around_them() -> None:
    """p50, p95 and ratio equal numpy's over all pairs, each within its interval, on the target."""
    times = measure(Machine(3), MS, 1.2 * MS)
    metrics = {metric.name: metric for metric in latency_metrics(times, target_name="cpu x2")}
    assert metrics["latency_p50_ms"].value == pytest.approx(np.median(times.candidate_ns) / MS)
    assert metrics["latency_p95_ms"].value == pytest.approx(np.quantile(times.candidate_ns, 0.95) / MS)
    assert metrics["reference_latency_p50_ms"].value == pytest.approx(np.median(times.reference_ns) / MS)
    assert metrics["latency_ratio"].value == np.median(times.candidate_ns / times.reference_ns)
    assert metrics["latency_pairs"].value == times.candidate_ns.size
    for metric in metrics.values():
        assert metric.target == "cpu x2"
        assert metric.lo is None or metric.lo <= metric.value <= metric.hi


def test_intervals_of_milliseconds_hold_the_truth_for_six_rounds() -> None:
    """Rounds that differ by 2%: 95% of the intervals of p50 hold the true one; plain percentiles of six hold 93%."""
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        ns = MS * np.exp(rng.normal(0, 0.02, (6, 1)) + rng.normal(0, 0.001, (6, 50)))
        metrics = {metric.name: metric for metric in latency_metrics(without_cpu(ns, ns), target_name="cpu")}
        held += metrics["latency_p50_ms"].lo <= 1.0 <= metrics["latency_p50_ms"].hi
    assert 285 <= held < 300


def test_progress_is_told_after_each_round() -> None:
    """Seconds grow, and each round says so."""
    machine, told = Machine(0), []
    times = measure(machine, MS, MS, progress=told.append)
    assert told == sorted(told)
    assert len(told) == len(times.reference_ns)


def without_cpu(reference_ns: np.ndarray, candidate_ns: np.ndarray) -> PairedTimes:
    """Times of a machine that never waits."""
    return PairedTimes(reference_ns, candidate_ns, reference_ns, candidate_ns)


def test_precision_and_limits_are_judged_as_scipy_does() -> None:
    """Precise: the 95% interval of the rounds' log ratios is within 1%; decided: the 99.9% one leaves the limit out."""
    rng = np.random.default_rng(5)
    answers = set()
    for spread in (0.002, 0.01, 0.02, 0.05):
        reference = rng.normal(MS, 1000, (10, 20))
        candidate = 1.02 * reference * np.exp(rng.normal(0, spread, (10, 1)))
        times = without_cpu(reference, candidate)
        logs = np.log(np.median(candidate / reference, axis=1))
        narrow, wide = (stats.ttest_1samp(logs, 0).confidence_interval(c) for c in (0.95, 0.999))
        p50 = stats.ttest_1samp(np.log(np.median(candidate, axis=1) / MS), 0).confidence_interval(0.999)
        assert times.is_precise() == ((narrow.high - narrow.low) / 2 < 0.01)
        assert times.decides(1.0, None) == (not wide.low <= 0 < wide.high)
        assert times.decides(None, 1.0) == (not p50.low <= 0 < p50.high)
        answers |= {("precise", times.is_precise()), ("decides", times.decides(1.0, None))}
        assert times.decides(None, None)
    assert len(answers) == 4


@pytest.mark.slow
def test_looking_often_finds_no_more_than_looking_once() -> None:
    """A model on its limit, looked at after every round: of 300 measurements at most 8% are decided, not 20%."""
    decided = stopped = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        logs = rng.normal(0, 0.03, 48)
        rounds = np.full((48, 1), float(MS)), MS * np.exp(logs)[:, None]
        early = any(without_cpu(rounds[0][:n], rounds[1][:n]).decides(1.0, None) for n in range(12, 48))
        lo, hi = without_cpu(*rounds).ratio_interval
        decided += early or not lo <= 1 <= hi
        naive = (stats.ttest_1samp(logs[:n], 0).pvalue for n in range(12, 49))
        stopped += min(naive) < 0.05
    assert decided <= 24
    assert stopped >= 45


@pytest.mark.parametrize("columns", [1, 7])
def test_interval_of_the_ratio_is_scipys(columns: int) -> None:
    """Student's 97.5% interval of the rounds' log ratios, to the 1% that the quantile is known to."""
    rng = np.random.default_rng(1)
    reference, candidate = np.exp(rng.normal([[[0]], [[0.1]]], 0.05, (2, 15, columns))) * MS
    logs = np.log(np.median(candidate / reference, axis=1))
    expected = stats.ttest_1samp(logs, 0).confidence_interval(0.975)
    interval = np.log(without_cpu(reference, candidate).ratio_interval)
    assert tuple(interval) == pytest.approx(tuple(expected), abs=0.01 * (expected.high - expected.low))


def test_the_median_pair_is_nearer_than_the_quotient_of_medians() -> None:
    """On a machine that changes its speed from round to round, the pairs' ratio errs less than half as much."""
    errors = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        speed = rng.choice([1.0, 1.6], (12, 1)) * np.exp(np.cumsum(rng.normal(0, 0.01, (12, 100)), axis=1))
        reference, candidate = MS * speed * np.exp(np.abs(rng.normal(0, 0.02, (2, 12, 100))))
        quotient = np.median(candidate) / np.median(reference)
        errors.append((without_cpu(reference, candidate).ratio - 1, quotient - 1))
    ours, quotient = np.sqrt(np.mean(np.square(errors), axis=0))
    assert ours < quotient / 2


def test_cpu_time_does_not_wait() -> None:
    """Where every third call of both waits as long as it computes, CPU time is that of a machine of one's own."""
    times = measure(Machine(0, noise=0.01, waits=0.6), MS, 1.3 * MS, seconds=1.0)
    metrics = {metric.name: metric for metric in latency_metrics(times, target_name="cpu")}
    cpu, ratio = metrics["latency_cpu_p50_ms"], metrics["latency_cpu_ratio"]
    assert cpu.value == np.median(times.candidate_cpu_ns) / MS
    assert cpu.value == pytest.approx(1.3, rel=0.1)
    assert metrics["latency_p50_ms"].value > 1.5 * cpu.value
    assert ratio.value == np.median(times.candidate_cpu_ns / times.reference_cpu_ns)
    assert ratio.lo < 1.3 < ratio.hi


def test_a_coarse_clock_of_cpu_time_gives_no_number() -> None:
    """Ticks of 10 ms see most samples as none: no figure, and the note says why."""
    machine = Machine(0)
    times = measure_pairs(
        machine.model(MS),
        machine.model(MS),
        seconds=0.5,
        rng=np.random.default_rng(0),
        clock=machine.clock,
        cpu_clock=lambda: machine.computed // (10 * MS) * 10 * MS,
    )
    metrics = [metric for metric in latency_metrics(times, target_name="cpu") if "cpu" in metric.name]
    assert [metric.value for metric in metrics] == [None, None]
    assert {metric.note for metric in metrics} == {"the clock of CPU time does not move within one sample"}


def warnings(times: PairedTimes, target: Target) -> list[str]:
    """What is said of a measurement."""
    metrics = latency_metrics(times, target_name=target.name)
    return list(find_waiting(Candidate("int8", "variant", "m.onnx", "d", metrics), target))


def test_waiting_is_told() -> None:
    """One model waits more than the other, both wait, none does; with two threads only the milliseconds can tell."""
    machine = Machine(0, noise=0.01)
    quiet = measure(machine, MS, MS)
    assert warnings(quiet, Target()) == []
    unfair = PairedTimes(quiet.reference_ns, 1.1 * quiet.candidate_ns, quiet.reference_cpu_ns, quiet.candidate_cpu_ns)
    told = warnings(unfair, Target())
    assert len(told) == 1
    assert told[0].startswith("int8: on cpu latency is 1.099 (1.096 to 1.101) times")
    assert warnings(unfair, Target(threads=2)) == []
    hardly = PairedTimes(quiet.reference_ns, 1.01 * quiet.candidate_ns, quiet.reference_cpu_ns, quiet.candidate_cpu_ns)
    assert warnings(hardly, Target()) == []
    busy = PairedTimes(2 * quiet.reference_ns, 2 * quiet.candidate_ns, quiet.reference_cpu_ns, quiet.candidate_cpu_ns)
    told = warnings(busy, Target(threads=2))
    assert len(told) == 1
    assert "a call took 1.99 ms" in told[0]
    assert "computed for 0.994 ms" in told[0]


def test_details_hold_the_times() -> None:
    """Whole nanoseconds by round, both clocks, both models, and how they were got; plain JSON."""
    times = measure(Machine(0, noise=0.01), MS, 2 * MS, seconds=2.0)
    details = json.loads(json.dumps(times.to_details()))
    every = details["stored_every"]
    for name in ("reference_ns", "candidate_ns", "reference_cpu_ns", "candidate_cpu_ns"):
        assert np.allclose(details[name], getattr(times, name)[:, ::every], atol=0.5)
    assert (details["rounds"], details["pairs"]) == (len(times.reference_ns), times.reference_ns.size)
    assert len(details["warm_up_pairs"]) == details["rounds"]
    assert min(details["warm_up_pairs"]) >= 10
    assert details["warm_up_unstable_rounds"] == 0


def test_details_are_bounded() -> None:
    """Of 6,000 pairs every thirtieth of each round is kept, and the details say so."""
    ns = np.arange(6000.0).reshape(60, 100)
    details = without_cpu(ns, ns).to_details()
    assert details["stored_every"] == 30
    assert details["candidate_ns"] == ns[:, ::30].astype(int).tolist()
    assert len(json.dumps(details)) < 8000
    assert sum(map(len, details["candidate_ns"])) <= MAX_STORED_PAIRS + 60


def test_a_warm_up_that_never_ends_is_counted() -> None:
    """A model that gets faster call by call is timed when the round's time for it is up, and the rounds say so."""
    machine = Machine(0, noise=0.0, placement=0.0, drift=0.0)

    def slowly_faster() -> Run:
        calls = iter(range(1000))

        def run() -> None:
            machine.now += round(10 * MS * 0.97 ** next(calls))

        return run

    times = measure_pairs(slowly_faster, slowly_faster, seconds=2.0, rng=np.random.default_rng(0), clock=machine.clock)
    assert times.n_unstable == len(times.reference_ns)
    assert times.ratio == pytest.approx(1.0, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine",
    [
        {"noise": 0.02, "placement": 0.004, "drift": 0.002},
        {"noise": 0.1, "placement": 0.015, "drift": 0.01},
        {"noise": 0.3, "placement": 0.01, "drift": 0.002, "waits": 0.1},
    ],
    ids=["quiet", "at the edge of precision", "loud, with spikes"],
)
def test_coverage(machine: dict[str, float]) -> None:
    """Of 250 measurements at least 93% hold the true ratio, with and without a limit on it, early ends among them."""
    for limit in (None, 1.0):
        held = 0
        for seed in range(250):
            lo, hi = measure(Machine(seed, **machine), MS, MS, max_ratio=limit, seconds=0.3).ratio_interval
            held += lo <= 1 <= hi
        assert held >= 0.93 * 250, (limit, held)

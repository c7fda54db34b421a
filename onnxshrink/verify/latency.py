"""Latency of a candidate against its reference: interleaved pairs in one process, with an honest interval.

Processors change their clock, other programs come and go. So both models are timed in turn, in an order that is drawn:
whatever slows the machine meets both alike, and the ratio stays right where each time alone does not. Who is opened or
called first is a little slower or faster for it, by 0.2% where it was measured. So of each two rounds either opens one
and of each two pairs either begins one: drawn by coin alone, ten rounds are as uneven as 8 to 2 in a tenth of the
measurements, and the ratio is off by what is no difference of the models.

Where a session's memory happens to lie makes it some tenths of a percent faster or slower for as long as it lives, and
no number of pairs shows that. So pairs come in rounds, each with freshly opened sessions, and the interval follows from
how the rounds differ (Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", ISMM 2013).

Who stops measuring as soon as the result is the one looked for finds it too often. So measuring ends early for its
precision alone, whatever the ratio is; and where a gate is worth more time, the looks in between are held to a stricter
measure.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np

from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.providers import memory_of
from onnxshrink.runtime.session import Session
from onnxshrink.verify.times import PairedTimes

Run: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[], int]
Time: TypeAlias = tuple[float, float]
"""Wall time and CPU time of one call, in nanoseconds."""
Row: TypeAlias = tuple[Time, Time]
"""Of the reference and of the candidate."""

PATIENCE = 4.0
"""How many times the asked time is spent before a gate is left undecided."""

MIN_ROUNDS = 6
"""Fewer give no useful interval, so slow models take these even when the time is up."""

MAX_ROUNDS = 60
_FIRST_CHECK = 10
"""Rounds before measuring may end early: the spread of fewer is so uncertain that intervals taken because they look
narrow miss the truth too often."""
_PLANNED_ROUNDS = 12
_MAX_PAIRS = 100
_SAMPLE_NS = 50_000
_WARM_UP_WINDOW = 5


def measure_pairs(
    open_reference: Callable[[], Run],
    open_candidate: Callable[[], Run],
    *,
    seconds: float,
    rng: np.random.Generator,
    clock: Clock = time.perf_counter_ns,
    cpu_clock: Clock = time.thread_time_ns,
    max_ratio: float | None = None,
    max_ms: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> PairedTimes:
    """Time two models in interleaved pairs until their ratio is known.

    Rounds are added until the ratio is precise, else until ``seconds`` are over; with a limit that is not told apart
    by then, until it is, up to `PATIENCE` times as long. Outliers are kept.

    Args:
        open_reference: Opens the reference anew and gives what runs one inference.
        open_candidate: The same for the candidate.
        seconds: Time to spend, opening included, where no limit needs more.
        rng: Draws which of each two rounds the candidate is opened first in, and which of each two pairs it begins.
        clock: Nanoseconds since any moment; never steps back.
        cpu_clock: Nanoseconds that were computed: of the calling thread, or of the process where others compute too.
        max_ratio: Limit that candidate / reference must be told apart from.
        max_ms: Limit, in milliseconds, that the candidate's median must be told apart from.
        progress: Told the seconds spent after each round.

    Returns:
        An even number of rounds, at least `MIN_ROUNDS` and at most `MAX_ROUNDS`.
    """
    round_ns = seconds * 1e9 / _PLANNED_ROUNDS
    inner_calls = n_pairs = 0
    rounds: list[list[Row]] = []
    warm_ups: list[_WarmUp] = []
    clocks = clock, cpu_clock
    openings, orders = _coin(rng), _coin(rng)
    start = clock()
    while True:
        runs = _open(open_reference, open_candidate, candidate_first=next(openings))
        warm = _warm_up(runs, clocks, round_ns)
        warm_ups.append(warm)
        if not rounds:
            inner_calls = math.ceil(_SAMPLE_NS / max(min(warm.ns), 1.0))
            n_pairs = max(1, min(_MAX_PAIRS, int(round_ns / max(sum(warm.ns) * inner_calls, 1.0))))
        rounds.append(
            [_time_pair(runs, inner_calls, clocks, candidate_first=first) for first in islice(orders, n_pairs)]
        )
        del runs  # the next round opens its own: two models in memory, not four
        elapsed = (clock() - start) / 1e9
        if progress:
            progress(elapsed)
        if len(rounds) % 2 or len(rounds) < (MIN_ROUNDS if elapsed >= seconds else _FIRST_CHECK):
            continue
        times = _paired(rounds, inner_calls, warm_ups)
        if elapsed >= PATIENCE * seconds or len(rounds) >= MAX_ROUNDS:
            return times
        if (elapsed >= seconds or times.is_precise()) and times.decides(max_ratio, max_ms):
            return times


def runner(session: Session, batch: Batch) -> Run:
    """One inference of ``session`` on ``batch``, as a callable.

    On CUDA inputs and outputs are bound, so that the network is timed without its copies, unless the target asks for
    them; it returns when the device is done. On the CPU it is called as an application calls it.
    """
    if memory_of(session.target)[0] != "cpu" and session.target.copies == "excluded":
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


def _coin(rng: np.random.Generator) -> Iterator[bool]:
    """Flips that even out: of each two, one is heads.

    Source: blocks of two, as in Box, Hunter and Hunter, "Statistics for Experimenters", 1978, chapter 4.
    """
    while True:
        first = bool(rng.random() < 0.5)
        yield first
        yield not first


def _open(
    open_reference: Callable[[], Run], open_candidate: Callable[[], Run], *, candidate_first: bool
) -> tuple[Run, Run]:
    if candidate_first:
        candidate = open_candidate()
        return open_reference(), candidate
    return open_reference(), open_candidate()


class _WarmUp(NamedTuple):
    """What a round began with: wall time of a call of reference and candidate, pairs run, and how it ended."""

    ns: tuple[float, float]
    pairs: int
    is_stable: bool


def _warm_up(runs: tuple[Run, Run], clocks: tuple[Clock, Clock], limit_ns: float) -> _WarmUp:
    """Run both until they no longer get faster or the time is up."""
    rows: list[tuple[float, float]] = []
    clock = clocks[0]
    start = clock()
    while True:
        (reference_ns, _), (candidate_ns, _) = _time_pair(runs, 1, clocks, candidate_first=bool(len(rows) % 2))
        rows.append((reference_ns, candidate_ns))
        now = np.median(rows[-_WARM_UP_WINDOW:], axis=0)
        is_stable = False
        if len(rows) >= 2 * _WARM_UP_WINDOW:
            before = np.median(rows[-2 * _WARM_UP_WINDOW : -_WARM_UP_WINDOW], axis=0)
            is_stable = bool((now >= 0.98 * before).all())
        if is_stable or clock() - start >= limit_ns:
            return _WarmUp((float(now[0]), float(now[1])), len(rows), is_stable)


def _paired(rounds: list[list[Row]], inner_calls: int, warm_ups: list[_WarmUp]) -> PairedTimes:
    (reference, reference_cpu), (candidate, candidate_cpu) = np.moveaxis(np.asarray(rounds, np.float64), (2, 3), (0, 1))
    return PairedTimes(
        reference,
        candidate,
        reference_cpu,
        candidate_cpu,
        inner_calls,
        warm_up_pairs=tuple(warm.pairs for warm in warm_ups),
        n_unstable=sum(not warm.is_stable for warm in warm_ups),
    )


def _time_pair(runs: tuple[Run, Run], inner_calls: int, clocks: tuple[Clock, Clock], *, candidate_first: bool) -> Row:
    """Both times of a call of reference and candidate."""
    reference, candidate = runs
    if candidate_first:
        first = _time(candidate, inner_calls, clocks)
        return _time(reference, inner_calls, clocks), first
    return _time(reference, inner_calls, clocks), _time(candidate, inner_calls, clocks)


def _time(run: Run, inner_calls: int, clocks: tuple[Clock, Clock]) -> Time:
    clock, cpu_clock = clocks
    calls = range(inner_calls)
    cpu_start = cpu_clock()  # outside: it takes ten times as long as the other to read
    start = clock()
    for _ in calls:
        run()
    ns = clock() - start
    return ns / inner_calls, (cpu_clock() - cpu_start) / inner_calls

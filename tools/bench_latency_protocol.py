#!/usr/bin/env python3
"""How often a latency protocol is wrong: a model against itself, and against itself with one more node.

    python tools/bench_latency_protocol.py [--trials 200] [--seconds 1.0]

Each trial asks three protocols the same two questions, on one thread, in an order drawn anew:

- ours, as a run measures: interleaved pairs in rounds of fresh sessions; it answers "different" where the 95% interval
  of the ratio leaves out 1;
- the same pairs by CPU time in place of wall time;
- the usual one: each model alone, 10 warm-ups, the median of 20 runs; it answers "different" beyond 5%.

The network is a chain of equal convolutions, the slower one has one more of them; how many there are is chosen so that
one is 5% of the time, and what it is on this machine is measured with interleaved pairs before the trials. Exits 1
where ours calls a model different from itself in more than 5% of the trials, or finds the slower one in less than 90%.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.core.intervals import wilson_interval
from onnxshrink.core.machine import machine
from onnxshrink.runtime.session import Session
from onnxshrink.verify.latency import Run, measure_pairs, runner, without_garbage_collection
from onnxshrink.verify.times import PairedTimes

CHANNELS, SIZE, LAYERS = 16, 20, 20
SLOW_DOWN = 0.05
MAX_FALSE, MIN_FOUND = 0.05, 0.90
WARM_UPS, RUNS, USUAL_LIMIT = 10, 20, 0.05
BATCH = {"x": np.random.default_rng(0).normal(size=(1, CHANNELS, SIZE, SIZE)).astype(np.float32)}


def main() -> int:
    """Calibrate, run the trials, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="trials of each question")
    parser.add_argument("--seconds", type=float, default=1.0, help="latency_seconds of a trial's measurement")
    options = parser.parse_args()
    layers, planted = calibrate()
    (lo, hi), p50_ms = planted.ratio_interval, np.median(planted.reference_ns) / 1e6
    where = machine()
    print(f"{where['processor']}, {where['cores']} cores, load {where['load']}")
    print(
        f"{layers} convolutions, {p50_ms:.2f} ms; one more makes it {planted.ratio:.4f} ({lo:.4f} to {hi:.4f}) times\n"
    )
    fast, slow = partial(opened, convolutions(layers)), partial(opened, convolutions(layers + 1))
    answers: dict[str, list[tuple[bool, bool]]] = {}
    ratios: list[tuple[float, float]] = []
    rng = np.random.default_rng(1)
    start = time.perf_counter()
    with without_garbage_collection():
        for trial in range(options.trials):
            results = {}
            for question in rng.permutation(["same", "slower"]):
                candidate = slow if question == "slower" else fast
                times = measure(fast, candidate, options.seconds, seed=trial)
                results[str(question)] = (*judged(times), usual(fast, candidate))
                ratios += [(times.ratio, width(times))] if question == "same" else []
            for name, same, slower in zip(("ours", "ours, CPU time", "usual"), *ordered(results), strict=True):
                answers.setdefault(name, []).append((same != 0, slower > 0))
    seconds = time.perf_counter() - start
    print(f"{options.trials} trials, {seconds / options.trials:.1f} s each, `latency_seconds` {options.seconds:g}")
    return describe(answers, ratios)


def convolutions(n_layers: int) -> bytes:
    """A chain of equal convolutions, each a few percent of the whole."""
    rng = np.random.default_rng(0)
    shape = (CHANNELS, CHANNELS, 3, 3)
    names = ["x", *(f"c{index}" for index in range(n_layers - 1)), "y"]
    graph = helper.make_graph(
        [
            helper.make_node("Conv", [source, f"w{index}"], [output], pads=[1, 1, 1, 1])
            for index, (source, output) in enumerate(pairwise(names))
        ],
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, CHANNELS, SIZE, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, CHANNELS, SIZE, SIZE])],
        [
            numpy_helper.from_array(rng.normal(0, 0.08, shape).astype(np.float32), f"w{index}")
            for index in range(n_layers)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def opened(model: bytes) -> Run:
    """A fresh session, ready to run."""
    return runner(Session(model), BATCH)


def measure(reference: Callable[[], Run], candidate: Callable[[], Run], seconds: float, *, seed: int) -> PairedTimes:
    """As a run does."""
    return measure_pairs(reference, candidate, seconds=seconds, rng=np.random.default_rng(seed))


def calibrate() -> tuple[int, PairedTimes]:
    """How many convolutions make one more of them 5%, and what one more then costs."""
    layers = LAYERS
    for seconds in (5.0, 20.0):
        times = measure(
            partial(opened, convolutions(layers)), partial(opened, convolutions(layers + 1)), seconds, seed=0
        )
        if seconds < 20:
            layers = max(4, min(60, round(layers * (times.ratio - 1) / SLOW_DOWN)))
    return layers, times


def judged(times: PairedTimes) -> tuple[int, int]:
    """By wall time and by CPU time: 1 for slower, -1 for faster, 0 for neither."""
    intervals = (times.ratio_interval, times.cpu_ratio[1] if times.cpu_ratio else (0.0, np.inf))
    wall, cpu = ((lo > 1) - (hi < 1) for lo, hi in intervals)
    return wall, cpu


def usual(reference: Callable[[], Run], candidate: Callable[[], Run]) -> int:
    """One model after the other: 1 for slower by more than the limit, -1 for faster, 0 for neither."""
    medians = []
    for open_anew in (reference, candidate):
        run, ns = open_anew(), []
        for index in range(WARM_UPS + RUNS):
            start = time.perf_counter_ns()
            run()
            if index >= WARM_UPS:
                ns.append(time.perf_counter_ns() - start)
        medians.append(np.median(ns))
    change = medians[1] / medians[0] - 1
    return int(change > USUAL_LIMIT) - int(change < -USUAL_LIMIT)


def width(times: PairedTimes) -> float:
    """Half the width of the ratio's interval."""
    lo, hi = times.ratio_interval
    return (hi - lo) / 2


def ordered(results: dict[str, tuple[int, int, int]]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """The answers on the same model, and on the slower one."""
    return results["same"], results["slower"]


def describe(answers: dict[str, list[tuple[bool, bool]]], ratios: list[tuple[float, float]]) -> int:
    """The table, and 1 where a target is missed."""
    print(f"{'protocol':<18}{'A/A called different':>36}{'5% slow-down found':>36}")
    shares = {}
    for name, rows in answers.items():
        counts = [sum(column) for column in zip(*rows, strict=True)]
        shares[name] = [count / len(rows) for count in counts]
        cells = [f"{share(count, len(rows)):>36}" for count in counts]
        print(f"{name:<18}{''.join(cells)}")
    off, half = np.abs(np.array(ratios)[:, 0] - 1), np.array(ratios)[:, 1]
    print(f"\nA/A ratios of ours: {np.median(off):.2%} off in the median, {off.max():.2%} at most; ", end="")
    print(f"intervals of ±{np.median(half):.2%} in the median")
    false, found = shares["ours"]
    kept = false <= MAX_FALSE and found >= MIN_FOUND
    verdict = "kept" if kept else "MISSED"
    print(f"targets: false alarms at most {MAX_FALSE:.0%}, slow-downs found at least {MIN_FOUND:.0%}: {verdict}")
    return 0 if kept else 1


def share(count: int, n: int) -> str:
    """``12 of 200, 6.0% (3.5-10.2)``: with its Wilson interval."""
    lo, hi = wilson_interval(count, n)
    return f"{count} of {n}, {count / n:.1%} ({100 * lo:.1f} to {100 * hi:.1f})"


if __name__ == "__main__":
    sys.exit(main())

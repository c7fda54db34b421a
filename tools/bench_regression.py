#!/usr/bin/env python3
"""100 mutants through ``check``, and 1,000 checks of what has not changed.

    python tools/bench_regression.py            about ten minutes
    python tools/bench_regression.py --quick    100 unchanged checks in place of 1,000

Four bundles as ``onnxshrink run`` leaves them: the digits network quantized per tensor and per channel, a small
encoder quantized, and a float CNN. 84 mutants change the model, 16 tamper with the bundle (`tests/bundle_mutants.py`).

file        The mutant takes the place of the bundle's model, or of the file that is tampered with: ``check BUNDLE``.
build       The mutant is another build: ``check BUNDLE mutant.onnx``. No digest of the file can tell.
behaviour   The same with ``--behaviour-only``: interface, size, outputs and time, whatever the graph and weights are.
allclose    What teams write: ``np.testing.assert_allclose(rtol=1e-3, atol=1e-3)`` by name, on the same golden samples.
onnx        The comparison of onnx's own backend tests: by position, dtypes equal, rtol 1e-3, atol 1e-7.

A mutant that gives the golden outputs bit for bit is equivalent on them: no comparison of outputs can find it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from ruamel.yaml import YAML

from onnxshrink.config.load import validate
from onnxshrink.pipeline import run
from onnxshrink.regress.bundle import leave_bundle
from onnxshrink.regress.check import BundleError, Result, check_bundle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from bundle_mutants import Mutant, Tampering, model_mutants, tamperings  # noqa: E402  the tests have them too
from encoder_models import encoder, sentences  # noqa: E402
from onnx_models import cnn, samples_of  # noqa: E402

RECIPES = ROOT / "onnxshrink" / "recipes"
EPOCHS = 3
UNCHANGED = 1000
TIMED = 10
"""One of so many unchanged checks measures latency as well."""

PROCESSES = 25
"""One of so many is ``python check.py`` in a process of its own, with another hash seed."""

COLUMNS = ("file", "build", "behaviour", "allclose", "onnx")


@dataclass(frozen=True)
class Row:
    """One mutant, and what found it: per column the item that failed first, or None."""

    bundle: str
    family: str
    name: str
    found: Mapping[str, str | None]
    equivalent: bool = False
    slower: bool = False


def main() -> int:
    """Print both tables; exit status 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 unchanged checks in place of 1,000")
    count = UNCHANGED // 10 if parser.parse_args().quick else UNCHANGED
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as name:
        bundles = make_bundles(Path(name))
        start = time.perf_counter()
        rows = [row for place, bundle in enumerate(bundles) for row in mutate(bundle, Path(name), place)]
        describe(rows, time.perf_counter() - start)
        start = time.perf_counter()
        alarms, undecided, timed = unchanged(bundles, Path(name), count)
        seconds = time.perf_counter() - start
    print(f"\n{count} unchanged checks, {timed} of them with latency ({undecided} inconclusive), {seconds:.0f} s")
    print("\n".join(alarms) or "  no alarm")
    caught = sum(row.found["file"] is not None for row in rows)
    print(f"\nmutants caught  {caught} of {len(rows)}  target all  {'met' if caught == len(rows) else 'MISSED'}")
    print(f"false alarms    {len(alarms)} of {count}  target 0  {'MISSED' if alarms else 'met'}")
    return 0 if caught == len(rows) and not alarms else 1


def make_bundles(folder: Path) -> list[Path]:
    """Run the pipeline four times; each run's folder ``bundle``."""
    recipe = YAML(typ="safe").load((RECIPES / "digits.yaml").read_text(encoding="utf-8"))
    del recipe["gates"]
    for stage in recipe["stages"]:
        stage.update({"epochs": EPOCHS} if "epochs" in stage else {})
        stage.get("teacher", {}).get("train", {}).update(epochs=EPOCHS)
    made = []
    for granularity in ("per_tensor", "per_channel"):
        quantize = {"kind": "quantize_static", "granularity": granularity}
        document = recipe | {"name": f"digits_{granularity}", "variants": {"int8": [quantize]}}
        made.append(made_bundle(document, RECIPES, folder / "runs"))
    model = cnn()
    for name, network, samples, stages in (
        ("encoder", encoder(), sentences, [{"kind": "quantize_static"}]),
        ("float_cnn", model, partial(samples_of, model), []),
    ):
        onnx.save(network, str(folder / f"{name}.onnx"))
        roles = {role: {"npz": f"{name}_{role}.npz"} for role in ("calibration", "evaluation")}
        for seed, data in enumerate(roles.values()):
            np.savez(folder / data["npz"], **samples(64, seed=seed))
        document = {"name": name, "model": {"onnx": f"{name}.onnx"}, "data": roles, "variants": {"it": stages}}
        made.append(made_bundle(document, folder, folder / "runs"))
    return made


def made_bundle(document: Mapping[str, Any], base: Path, runs: Path) -> Path:
    """The bundle of one run."""
    report = run(validate(dict(document), base=base), runs=runs, base=base, leave=leave_bundle)
    print(f"made {report.name}, {report.seconds:.0f} s", flush=True)
    return runs / report.name / "bundle"


def mutate(bundle: Path, scratch: Path, place: int) -> Iterator[Row]:
    """The bundle's 21 mutants, and 4 of the tamperings."""
    kinds = tamperings()
    for one in (*model_mutants(bundle / "model.onnx"), *kinds[place * 4 % len(kinds) :][:4]):
        copy, mutant = scratch / "mutant.bundle", scratch / "mutant.onnx"
        shutil.copytree(bundle, copy)
        if isinstance(one, Mutant):
            one.make(bundle / "model.onnx", mutant)
            shutil.copyfile(mutant, copy / "model.onnx")
        else:
            one.make(copy)
        yield judged(one, bundle, copy, mutant)
        shutil.rmtree(copy)


def judged(one: Mutant | Tampering, bundle: Path, copy: Path, mutant: Path) -> Row:
    """One mutant through every column; where a mutant is slower and nothing else, the check measures time."""
    found = {"file": failing(lambda: first_failed(check_bundle(copy, latency=False)))}
    found["allclose"] = failing(lambda: compare_by_name(bundle, copy))
    found["onnx"] = failing(lambda: compare_by_position(copy))
    equivalent = False
    if isinstance(one, Mutant):
        for column, loose in (("build", False), ("behaviour", True)):
            found[column] = failing(
                lambda loose=loose: first_failed(
                    check_bundle(bundle, mutant, latency=one.costs, behaviour_only=loose), slow=one.costs
                )
            )
        equivalent = failing(lambda: compare_by_name(bundle, copy, rtol=0.0, atol=0.0)) is None and not one.costs
    return Row(bundle.parent.name, one.family, one.name, found, equivalent, isinstance(one, Mutant) and one.costs)


def first_failed(result: Result, *, slow: bool = False) -> str | None:
    """The first item that failed; of a mutant that is slower and nothing else the latency, with its ratio."""
    failed = [item for item in result.items if item.outcome == "failed"]
    times = [f"{item.name} {item.value:.2f}" for item in failed if slow and item.name == "latency_ratio"]
    return next(iter([*times, *(item.name for item in failed)]), None)


def golden_samples(bundle: Path, name: str, count: int) -> list[list[np.ndarray[Any, Any]]]:
    """The arrays of one golden file, sample by sample, in the order of the model's tensors."""
    with np.load(bundle / name) as archive:
        samples = len({key.partition(".")[0] for key in archive.files})
        return [[archive[f"{i}.{k}"] for k in range(count)] for i in range(samples)]


def compare_by_name(bundle: Path, copy: Path, *, rtol: float = 1e-3, atol: float = 1e-3) -> None:
    """A golden test as teams write it: they know the names of the tensors, and compare values only."""
    spec = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["model"]
    inputs, outputs = ([value["name"] for value in spec[side]] for side in ("inputs", "outputs"))
    session = open_quietly(copy / "model.onnx")
    inputs_npz = golden_samples(copy, "golden_inputs.npz", len(inputs))
    for sample, golden in zip(inputs_npz, golden_samples(copy, "golden_outputs.npz", len(outputs)), strict=True):
        for value, want in zip(session.run(outputs, dict(zip(inputs, sample, strict=True))), golden, strict=True):
            np.testing.assert_allclose(value, want, rtol=rtol, atol=atol)


def compare_by_position(copy: Path) -> None:
    """The comparison of onnx's backend tests.

    Source: onnx.backend.test.runner, ``Runner.assert_similar_outputs``; onnxruntime.backend, inputs by position.
    """
    session = open_quietly(copy / "model.onnx")
    names = [value.name for value in session.get_inputs()]
    inputs = golden_samples(copy, "golden_inputs.npz", len(names))
    for sample, golden in zip(
        inputs, golden_samples(copy, "golden_outputs.npz", len(session.get_outputs())), strict=True
    ):
        for value, want in zip(session.run(None, dict(zip(names, sample, strict=True))), golden, strict=True):
            np.testing.assert_equal(value.dtype, want.dtype)
            np.testing.assert_allclose(value, want, rtol=1e-3, atol=1e-7)


def open_quietly(path: Path) -> ort.InferenceSession:
    """One thread, no warnings."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def failing(check: Callable[[], str | None]) -> str | None:
    """What a check says, or the kind of error that it ended with."""
    try:
        return check()
    except BundleError as e:
        return "manifest" if "manifest" in e.what else "error"
    except Exception as e:  # noqa: BLE001  ONNX Runtime, zipfile and numpy raise what they like, and each is a find
        return type(e).__name__


def describe(rows: list[Row], seconds: float) -> None:
    """Per family how many each column found, which items of the check did, and what none of them can."""
    print(f"\n{len(rows)} mutants, {seconds:.0f} s")
    print(f"{'family':<14}{'of':>4}" + "".join(f"{name:>11}" for name in COLUMNS) + "   build was found by")
    for family in dict.fromkeys(row.family for row in rows):
        print(line(family, [row for row in rows if row.family == family]))
    print(line("all", rows))
    mutants = [row for row in rows if "build" in row.found]
    same = [row for row in mutants if row.equivalent]
    print(f"{len(same)} of the {len(mutants)} mutants of the model give the golden outputs bit for bit, and as fast")
    for column in ("file", "build"):
        for row in rows:
            if row.found.get(column, "") is None:
                print(f"  not found by {column}: {row.bundle}, {row.family}: {row.name}")
    ratios = [f"{row.bundle} {(row.found['behaviour'] or '').partition(' ')[2]}" for row in mutants if row.slower]
    print(f"  slow-downs, latency over the baseline's: {', '.join(ratios)}")
    missed = [row for row in mutants if row.found["behaviour"] is None and not row.equivalent]
    print(f"  outputs differ, within the tolerances of behaviour: {len(missed)}")
    for row in missed:
        print(f"    {row.bundle}, {row.family}: {row.name}")
    print(f"files found by {items(row.found['file'] for row in rows)}")


def line(family: str, rows: list[Row]) -> str:
    """One row of the table; a dash where a column does not apply."""
    cells = []
    for column in COLUMNS:
        asked = [row.found[column] for row in rows if column in row.found]
        cells.append(f"{sum(item is not None for item in asked) if asked else '-':>11}")
    return f"{family:<14}{len(rows):>4}{''.join(cells)}   {items(row.found.get('build') for row in rows)}"


def items(names: Any) -> str:
    """Names with how often, without what they are about."""
    counts = Counter(name.partition(" ")[0] for name in names if name)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def unchanged(bundles: list[Path], scratch: Path, count: int) -> tuple[list[str], int, int]:
    """Check what has not changed, in turn from many sides.

    Returns:
        The alarms; how many latencies were inconclusive; how many were measured.
    """
    moved = {bundle: scratch / "moved" / bundle.parent.name / "elsewhere" for bundle in bundles}
    rewritten = {bundle: scratch / f"{bundle.parent.name}_rewritten.onnx" for bundle in bundles}
    for bundle in bundles:
        shutil.copytree(bundle, moved[bundle])
        model = onnx.load(bundle / "model.onnx")
        model.doc_string = "read and written again"
        onnx.save(model, str(rewritten[bundle]))
    alarms: list[str] = []
    undecided = timed = 0
    for turn in range(count):
        bundle, kind = bundles[turn % len(bundles)], turn // len(bundles) % 4
        if turn % PROCESSES == 0:
            alarm = in_a_process(moved[bundle], seed=turn)
        else:
            latency = turn % TIMED == 1
            kind = 3 if latency else kind  # only other bytes are timed against the baseline's
            try:
                result = one_unchanged(kind, bundle, moved[bundle], rewritten[bundle], latency=latency)
            except BundleError as e:
                alarms.append(f"  turn {turn}, {bundle.parent.name}, kind {kind}: {e}")
                continue
            timed += latency
            undecided += result.outcome == "inconclusive"
            failed = [f"{item.name}: {item.reason}" for item in result.items if item.outcome == "failed"]
            alarm = "; ".join(failed)
        if alarm:
            alarms.append(f"  turn {turn}, {bundle.parent.name}, kind {kind}: {alarm}")
    return alarms, undecided, timed


def one_unchanged(kind: int, bundle: Path, moved: Path, rewritten: Path, *, latency: bool) -> Result:
    """In place; in another folder; from another working folder; the same model, read and written again."""
    match kind:
        case 0:
            return check_bundle(bundle, latency=latency)
        case 1:
            return check_bundle(moved, latency=latency)
        case 2:
            with chdir(bundle.parent):
                return check_bundle(Path("bundle"), latency=latency)
        case _:
            return check_bundle(bundle, rewritten, latency=latency)


def in_a_process(bundle: Path, *, seed: int) -> str:
    """``python check.py``, as on a device."""
    done = subprocess.run(
        [sys.executable, "check.py"],
        cwd=bundle,
        env=os.environ | {"PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"check.py ended with {done.returncode}: {done.stdout}{done.stderr}" if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())

"""What a run leaves for later: the winner with golden samples, tolerances, and a manifest that signs them all.

`onnxshrink.regress.check` reads it, with nothing of ours installed; what it can make itself, such as the tolerances of
a new baseline, is made there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import DataRoles
from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.core.errors import DataError, ShrinkError
from onnxshrink.core.report import Candidate, Report
from onnxshrink.core.run_folder import copy_files
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.data.reader import open_reader
from onnxshrink.regress.check import BundleError, ranks_classes, write_baseline
from onnxshrink.runtime.providers import provider_options
from onnxshrink.runtime.session import Session
from onnxshrink.verify.verify import latency_batch

MAX_SAMPLES = 16
MAX_BYTES = 4_000_000
"""Of golden inputs and outputs, so that a bundle can lie in version control; one sample is kept in any case."""

POOL = 128
"""Samples that the golden ones are chosen from: the first ones of the data."""

_SKETCH = 32


@dataclass(frozen=True, slots=True)
class _Look:
    """What is remembered of a sample until the golden ones are chosen.

    Attributes:
        sketch: ``(32,)`` float64, a random projection of all outputs: near samples have near sketches.
        drift: Largest distance of an output from the reference's, relative to the output's size.
        margin: By how much the winning class has won; infinite where there are no classes.
        n_bytes: Of its inputs and outputs.
    """

    sketch: NDArray[np.float64]
    drift: float
    margin: float
    n_bytes: int


def leave_bundle(report: Report, artifacts: Mapping[str, Artifact], config: RunConfig, folder: Path) -> Facts | None:
    """Write the bundle of a run's winner.

    Args:
        report: What the run found out; its metrics and inputs are copied.
        artifacts: Row of the report to its model.
        config: The run's, for its data and its first target; the CPU where all targets need a plugin.
        folder: Where the bundle shall be; it is made here.

    Returns:
        Facts for the report: how many golden samples, how far each output may be from them, bytes of the folder. Where
        no bundle can be made of the winner, ``declined`` says why, and there is no folder. None without a winner.
    """
    if report.winner is None:
        return None
    try:
        manifest = _write(report, artifacts, config, folder)
    except (ShrinkError, BundleError, OSError) as e:  # what was measured stays true, with a bundle or without
        shutil.rmtree(folder, ignore_errors=True)
        return {"declined": str(e).partition("\n")[0]}
    return {
        "folder": folder.name,
        "n_samples": manifest["golden"]["n_samples"],
        "tolerances": {name: limits["max_abs"] for name, limits in manifest["tolerances"].items()},
        "size_bytes": size_bytes(folder),
    }


def _write(report: Report, artifacts: Mapping[str, Artifact], config: RunConfig, folder: Path) -> Mapping[str, Any]:
    # A provider that comes as a plugin is not there where only onnxruntime is.
    target = next((target for target in config.targets if target.library is None), Target())
    winner = report.candidate(str(report.winner))
    artifact = artifacts[winner.name]
    session = Session(artifact.model_path, target)
    numbers, samples = choose_samples(session, artifacts.get("reference"), config)
    copy_files(artifact, folder)
    lock = fingerprint(config.model_copy(update={"data": DataRoles()}))  # the data's own are among the inputs
    kept = {
        "name": report.name,
        "variant": winner.name,
        "session": {
            "provider": session.providers[0],
            "options": provider_options(target),
            "threads": target.threads,
            "optimization": target.optimization,
        },
        "golden": {"numbers": numbers, "from": _origin(config)},
        "versions": report.versions,
        "config": {**lock, "data": report.inputs},
        "metrics": [asdict(metric) for metric in winner.metrics],
        "latency": _latency(winner, target),
        "history": [],
    }
    return write_baseline(folder, kept, samples)


def choose_samples(
    session: Session, reference: Artifact | None, config: RunConfig
) -> tuple[list[int], list[dict[str, Array]]]:
    """The golden samples: few, and chosen to cover.

    In turn: the sample whose outputs are farthest from those of all that are chosen, the one with the most drift from
    the reference, and the one whose class wins by the least. Of the first `POOL` samples, as long as `MAX_SAMPLES` and
    `MAX_BYTES` last; equal data give equal samples. A model that fixes its batch counts batches.

    Args:
        session: The model.
        reference: The float model, where there is one to drift from.
        config: The data: evaluation, else calibration; seeded noise without data.

    Returns:
        The numbers of the samples in the data, and each sample's inputs, by name in the model's order.

    Raises:
        DataError: There are no samples.
        ModelError: The model cannot be run on one.
    """
    origin = None if reference is None else Session(reference.model_path, session.target, like=session.inputs)
    looks = [_look(session, origin, batch) for batch in _pool(session, config)]
    kept: list[int] = []
    for number in _order(looks)[:MAX_SAMPLES]:
        if kept and sum(looks[other].n_bytes for other in (*kept, number)) > MAX_BYTES:
            break
        kept.append(number)
    names = [spec.name for spec in session.inputs]
    found = {
        number: {name: np.asarray(batch[name]) for name in names}
        for number, batch in enumerate(_pool(session, config))
        if number in kept
    }
    return sorted(found), [found[number] for number in sorted(found)]


def _pool(session: Session, config: RunConfig) -> Iterator[Batch]:
    """The samples to choose from, one at a time."""
    data = config.data.evaluation or config.data.calibration
    if data is not None:
        yield from islice(open_reader(data, session.inputs, batch_size=1), POOL)
        return
    for number in range(MAX_SAMPLES):
        seeded = config.model_copy(update={"seed": config.seed + number})
        yield latency_batch(seeded, session.inputs, 1)


def _origin(config: RunConfig) -> str:
    if config.data.evaluation is not None:
        return "data.evaluation"
    return "seeded noise" if config.data.calibration is None else "data.calibration"


def _look(session: Session, origin: Session | None, batch: Batch) -> _Look:
    outputs = session.run(batch)
    expected = origin.run(batch) if origin is not None else {}
    numbers = {name: array.astype(np.float64) for name, array in outputs.items() if array.dtype.kind in "fiub"}
    inputs = [batch[spec.name] for spec in session.inputs]
    return _Look(
        np.concatenate([_sketch(array) for array in numbers.values()] or [np.zeros(1)]),
        max((_drift(array, expected.get(name)) for name, array in numbers.items()), default=0.0),
        min((_margin(array) for array in outputs.values() if ranks_classes(array)), default=np.inf),
        sum(array.nbytes for array in (*inputs, *outputs.values())),
    )


def _sketch(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(32,)``: values added into buckets under signs that look random, so that near outputs have near sketches.

    Source: Charikar, Chen and Farach-Colton, "Finding Frequent Items in Data Streams" (count sketch), ICALP 2002.
    """
    values = np.nan_to_num(array.ravel(), posinf=0.0, neginf=0.0)
    places = np.arange(values.size, dtype=np.uint64)
    signs = 1.0 - 2.0 * ((places * np.uint64(2654435761) >> np.uint64(15)) & np.uint64(1))
    return np.bincount(places.astype(np.intp) % _SKETCH, signs * values, minlength=_SKETCH).astype(np.float64)


def _drift(array: NDArray[np.float64], expected: Array | None) -> float:
    """``||expected - array|| / ||expected||``, 0 where there is nothing to compare with."""
    if expected is None or expected.shape != array.shape or expected.dtype.kind not in "fiub":
        return 0.0
    want = expected.astype(np.float64)
    finite = np.isfinite(want) & np.isfinite(array)
    size = float(np.linalg.norm(want[finite]))
    return float(np.linalg.norm(want[finite] - array[finite])) / size if size else 0.0


def _margin(array: Array) -> float:
    """By how much the winning class of the closest row wins."""
    first_two = np.sort(array.astype(np.float64), axis=1)[:, -2:]
    return float((first_two[:, 1] - first_two[:, 0]).min())


def _order(looks: Sequence[_Look]) -> list[int]:
    """Sample numbers, those first that tell the most; among equals the first."""
    if not looks:
        raise DataError("there are no samples to keep as golden ones", want="at least one sample")
    numbers = range(len(looks))
    drifting = sorted((n for n in numbers if looks[n].drift > 0), key=lambda n: -looks[n].drift)
    close = sorted((n for n in numbers if looks[n].margin < np.inf), key=lambda n: looks[n].margin)
    turns = zip_longest(_farthest_first(looks), drifting, close)
    return list(dict.fromkeys(number for number in chain.from_iterable(turns) if number is not None))


def _farthest_first(looks: Sequence[_Look]) -> list[int]:
    """Each the farthest from those before it, beginning with the one nearest to the mean.

    Source: Gonzalez, "Clustering to Minimize the Maximum Intercluster Distance", 1985.
    """
    rows = np.stack([look.sketch for look in looks])
    spread = rows.std(axis=0)
    rows = (rows - rows.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    chosen = [int(np.square(rows).sum(axis=1).argmin())]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < min(MAX_SAMPLES, len(rows)):
        nearest = np.minimum(nearest, np.square(rows - rows[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return chosen


def _latency(winner: Candidate, target: Target) -> dict[str, Any] | None:
    metric = winner.metric("latency_p50_ms", target=target.name)
    return {"p50_ms": metric.value, "lo_ms": metric.lo, "hi_ms": metric.hi} if metric is not None else None

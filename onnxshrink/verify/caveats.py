"""What the figures of a run do not show by themselves: the lines of warning below its table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxshrink.config.data import NpyData, NpzData, Role
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import OnnxSource
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.events import Events
from onnxshrink.core.report import OPTIMISTIC, Candidate
from onnxshrink.core.tensors import LABELS, LIKE_LABELS
from onnxshrink.data.stored import zipped_arrays
from onnxshrink.verify.gain import has_fewer_macs, idle_cuts, idle_zeros
from onnxshrink.verify.kernel_error import find_kernel_error
from onnxshrink.verify.noise import find_noise, loses
from onnxshrink.verify.times import find_waiting
from onnxshrink.verify.verify import Row, measure_latency

_DRIFT_GATES = {"min_sqnr_db", "max_abs_error", "min_top1_agreement"}


def unproven(config: RunConfig, data_key: Callable[[Role], Any]) -> Iterator[str]:
    """What was not measured, or on samples that a stage has seen.

    Args:
        config: The run.
        data_key: Fingerprint of a role's data, None where there is none; roles with equal fingerprints share samples.
    """
    evaluation = data_key("evaluation")
    if evaluation is None:
        names = [name for name, chain in config.branches() if loses(chain)]
        yield "no evaluation data: neither drift nor accuracy was measured" + (
            f"; nothing shows that {', '.join(names)} still work{'s' if len(names) == 1 else ''}" * bool(names)
        )
    for role in ("calibration", "train"):
        settings = config.data.of(role)
        if settings is not None and data_key(role) == evaluation:
            yield f"drift and accuracy were measured on the {role} samples: they {OPTIMISTIC}"


def unlabelled(config: RunConfig, inputs: Collection[str]) -> Iterator[str]:
    """An array that holds the labels under another name, by all appearances, where no metric asks for any.

    Args:
        config: The run.
        inputs: Names of the model's inputs.
    """
    data = config.data.evaluation
    if data is None or data.metric is not None or not isinstance(data, NpzData | NpyData):
        return
    names = zipped_arrays(data.npz) if isinstance(data, NpzData) else data.npy
    found = [name for name in names if name.lower() in LIKE_LABELS and name not in {*inputs, *data.rename}]
    if LABELS not in names and len(found) == 1:
        yield (
            f"accuracy was not measured: the array {found[0]!r} of the evaluation data is not used; if it holds the "
            f"labels, name it {LABELS!r} (`rename: {{{found[0]}: {LABELS}}}`) and set a metric"
        )


def guessing(candidates: Sequence[Candidate]) -> Iterator[str]:
    """Where the model that the user brought is no better than chance, on any target."""
    for candidate in candidates[:1]:
        for metric in candidate.metrics:
            if metric.name in ("top1", "top5") and metric.value is not None and metric.note:
                yield (
                    f"{candidate.name}: {metric.name} of {metric.value:.1%} is {metric.note}: the labels or the "
                    "preprocessing may be wrong, or the samples are too few"
                )


def noisy(config: RunConfig, candidates: Sequence[Candidate]) -> Iterator[str]:
    """The variants that are far from their reference, where no gate of the user's says how far is too far.

    Whatever the gates say: those whose kernels, and not their quantization, take them there.
    """
    chains = dict(config.branches())
    for candidate in candidates:
        if candidate.name in chains:
            yield from find_kernel_error(candidate, chains[candidate.name])
            if config.gates.min_sqnr_db is None:
                yield from find_noise(candidate, chains[candidate.name])


def unpaid(config: RunConfig, rows: Sequence[Row], measured: Sequence[Candidate], events: Events) -> Iterator[str]:
    """Where pruning bought less than it seems.

    Args:
        config: The run.
        rows: Every model of it: the original where there is one, references, variants.
        measured: What is known of each row.
        events: Listener for progress: beside a reference other than the first, the original is measured once more.
    """
    pairs = list(zip(rows, measured, strict=True))
    references = {row.reference: candidate for row, candidate in pairs if row.role == "reference"}
    original = measured[0] if rows[0].role == "original" else None
    beside = {rows[0].reference: measured[0].metrics}
    said: set[Artifact] = set()
    # Variants first: what is said of one need not be said of its reference again.
    for row, candidate in sorted(pairs, key=lambda pair: pair[0].role == "reference"):
        reference = references[row.reference]
        base = original or reference
        if row.role == "variant" and any(target.provider == "cpu" for target in config.targets):
            yield from idle_zeros(candidate, reference)
        if (row.role == "reference" and row.reference in said) or not has_fewer_macs(candidate, base):
            continue
        if original and row.reference not in beside:
            beside[row.reference] = measure_latency(
                name=original.name, artifact=rows[0].artifact, reference=row.reference, config=config, events=events
            ).metrics
        texts = list(idle_cuts(candidate, base, beside[row.reference] if original else reference.metrics))
        said |= {row.reference} if texts else set()
        yield from texts


def disturbed(config: RunConfig, candidates: Sequence[Candidate]) -> Iterator[str]:
    """Where wall time and CPU time part: something else had the processor while latency was measured."""
    for target in config.targets:
        if target.provider == "cpu":
            for candidate in candidates:
                yield from find_waiting(candidate, target)


def unexplained(
    config: RunConfig, candidates: Sequence[Candidate], folder: Path, elsewhere: Mapping[str, Path]
) -> Iterator[str]:
    """How to learn why a variant failed a gate on drift: it takes a run of its own, so it is not done unasked.

    Args:
        config: The run.
        candidates: Its rows.
        folder: The run's, which the rows' models are relative to.
        elsewhere: Variants that were made elsewhere, name to file: what they are compared with may lie there too.
    """
    data, source = config.data.evaluation, config.model
    samples = data.npz if isinstance(data, NpzData) and data.is_plain else "samples.npz"
    reference = next((folder / one.model for one in candidates if one.role == "reference"), Path("reference.onnx"))
    if elsewhere and isinstance(source, OnnxSource):
        reference = source.onnx
    for candidate in candidates:
        failed = {verdict.gate for verdict in candidate.verdicts if verdict.outcome == "failed"}
        if failed & _DRIFT_GATES:
            files = f"{reference} {elsewhere.get(candidate.name, folder / candidate.model)} --data {samples}"
            yield f"{candidate.name} failed on drift: `onnxshrink explain {files}` says which nodes, and why"


def undecided(candidates: Sequence[Candidate]) -> Iterator[str]:
    """The gates that the measurements could not decide."""
    for candidate in candidates:
        for verdict in candidate.verdicts:
            if verdict.outcome == "inconclusive":
                yield f"{candidate.name}: {verdict.gate} is inconclusive: {verdict.reason}"

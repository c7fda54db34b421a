"""Drift of one model between targets: what another provider, or another setting of one, makes of its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Events
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import Reader, open_reader
from onnxshrink.runtime.session import Session
from onnxshrink.verify.drift import drift_metrics
from onnxshrink.verify.placement import placements
from onnxshrink.verify.verify import Quality, Row

_KEPT = ("max_abs_error", "sqnr_db", "top1_agreement")
_BATCH_SIZE = 32
# What a session is opened with: targets that differ in nothing of it compute the same.
_SETTINGS = {"provider", "library", "device", "options", "optimization", "threads"}
# Float kernels that only add in another order are far above it: a difference of 1% of the outputs is more than that.
_NOTED_DB = 40.0


def compare_targets(quality: Quality, row: Row, config: RunConfig, events: Events) -> Quality:
    """Add to what was measured on each target what shows only beside another one.

    Args:
        quality: Of the row, on each target by itself.
        row: The model.
        config: Targets and data.
        events: Told of progress, as ``verify/<name>``.

    Returns:
        The same with `measure_across`'s metrics, where there are evaluation data and targets that differ, and for
        targets other than the CPU with ``details["placement"]``; see `placements`.

    Raises:
        DataError: As of `measure_across`.
        ModelError: As of `measure_across`.
        ProviderError: As of `measure_across` and `placements`.
    """
    metrics, details, data = quality.metrics, dict(quality.details), config.data.evaluation
    if placed := placements(row.artifact.model_path, config.targets):
        details["placement"] = placed
    targets = differing(config.targets)
    if data is not None and len(targets) > 1 and row.role != "original":
        like = Session(row.reference.model_path, targets[0]).inputs if row.role == "variant" else None
        metrics += measure_across(
            row.artifact.model_path,
            targets,
            lambda specs: open_reader(data, specs, batch_size=_BATCH_SIZE),
            like=like,
            progress=partial(events.progress, f"verify/{row.name}", detail="drift between targets"),
        )
    return replace(quality, metrics=metrics, details=details)


def differing(targets: Sequence[Target]) -> tuple[Target, ...]:
    """The first target, and those that open another session than it does."""
    first = targets[0].model_dump(include=_SETTINGS)
    return (targets[0], *(target for target in targets[1:] if target.model_dump(include=_SETTINGS) != first))


def parted(candidates: Sequence[Candidate]) -> Iterator[str]:
    """A line for each output of a row whose values on two targets are further apart than the rounding of floats."""
    for candidate in candidates:
        for metric in candidate.metrics:
            if metric.name != "across_sqnr_db" or metric.value is None or metric.value >= _NOTED_DB:
                continue
            top1 = candidate.metric("across_top1_agreement", target=metric.target, output=metric.output)
            agreed = f", and the top-1 answer agrees on {top1.value:.1%}" if top1 and top1.value is not None else ""
            yield (
                f"{candidate.name}: output {metric.output!r} on {metric.target} is {metric.value:.1f} dB "
                f"{metric.note}{agreed}: what was measured on one target does not hold on the other"
            )


def measure_across(
    model: Path,
    targets: Sequence[Target],
    open_samples: Callable[[tuple[TensorSpec, ...]], Reader],
    *,
    like: Sequence[TensorSpec] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Metric, ...]:
    """The same samples through a model on every target; each target's outputs are compared with the first one's.

    It is neither the drift from the reference nor an error: no target is right by itself. A quantized model that falls
    just beside a rounding edge on one provider differs by whole quantization steps on another.

    Args:
        model: The ``.onnx`` file.
        targets: Two or more; the first is what the others are compared with.
        open_samples: Opens the samples for inputs of those specs.
        like: Inputs of another model, whose samples this one shall take; its own by default.
        progress: Told the samples done and their total after each batch.

    Returns:
        For each other target and each output ``across_max_abs_error``, ``across_sqnr_db`` and, for 2-D outputs with
        several columns, ``across_top1_agreement``; ``target`` is the other one, and ``note`` names the first. Outputs
        without any difference have no finite SQNR, and the note says ``identical``.

    Raises:
        DataError: There are no samples, or they do not fit the model.
        ModelError: The model cannot be run.
        ProviderError: A target's provider is not there.
    """
    first, *others = [Session(model, target, like=like) for target in targets]
    reader = open_samples(first.inputs)
    names = [spec.name for spec in first.outputs]
    drifts = {(other, name): Drift(name) for other in range(len(others)) for name in names}
    done = 0
    for batch in reader:
        expected = first.run(batch)
        for index, other in enumerate(others):
            got = other.run(batch)
            for name in names:
                drifts[index, name] = drifts[index, name].update(expected[name], got[name])
        done += n_samples(batch, first.inputs)
        if progress:
            progress(done, len(reader))
    if not done:
        raise DataError("there are no samples to compare targets on", where=reader.where, want="at least one sample")
    return tuple(
        replace(
            metric,
            name=f"across_{metric.name}",
            note="; ".join(filter(None, (f"from {first.target.name}", metric.note))),
        )
        for (index, _), drift in drifts.items()
        for metric in drift_metrics(drift, others[index].target.name, done)
        if metric.name in _KEPT
    )

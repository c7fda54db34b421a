"""Everything measured on one model, in two parts: quality, which is deterministic, and latency, which never is.

Quality may be kept and measured in parallel; latency is measured anew in every run, alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import numpy as np

from onnxshrink.config.gates import Target, on_target
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Events
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import Batch, TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.affinity import on_cores
from onnxshrink.runtime.graph import input_specs, is_quantized, load_model
from onnxshrink.runtime.interface import match_inputs
from onnxshrink.runtime.parity import random_batch
from onnxshrink.runtime.providers import memory_of
from onnxshrink.runtime.session import Session, require_batch
from onnxshrink.verify.accuracy import Scores, score
from onnxshrink.verify.comparison import accuracy_details, accuracy_metrics
from onnxshrink.verify.coverage import measure_work
from onnxshrink.verify.drift_evidence import DriftEvidence
from onnxshrink.verify.footprint import measure_footprint
from onnxshrink.verify.latency import PATIENCE, Run, measure_pairs, runner, without_garbage_collection
from onnxshrink.verify.startup import measure_startup
from onnxshrink.verify.times import CpuClock, latency_metrics

Role: TypeAlias = Literal["original", "reference", "variant"]

_BATCH_SIZE = 32
_SAME_FILE = "the reference itself"


@dataclass(frozen=True, slots=True)
class Row:
    """A model to be measured: its place in the comparison, and what it is compared with.

    Attributes:
        name: In the report.
        role: What the model is to the run.
        artifact: The model.
        reference: The float model that drift and latency are measured against.
        before: Of a quantized model, the float model that was quantized.
        calibration: Of a statically quantized model, what its ranges come from.
    """

    name: str
    role: Role
    artifact: Artifact
    reference: Artifact
    before: Artifact | None = None
    calibration: Artifact | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """What is known of a model without a clock.

    Attributes:
        metrics: Footprint, drift and accuracy.
        scores: The model's scores on each target, by the target's name; empty without a task metric.
        details: Evidence for `Candidate.details`, plain JSON by topic.
    """

    metrics: tuple[Metric, ...]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Latency:
    """What the clock said of a model.

    Attributes:
        metrics: Of every target.
        details: Evidence for `Candidate.details`, plain JSON by topic.
    """

    metrics: tuple[Metric, ...]
    details: Mapping[str, Any] = field(default_factory=dict)


def measure_quality(
    *,
    name: str,
    role: Role,
    artifact: Artifact,
    reference: Artifact,
    original_scores: Mapping[str, Scores] | None,
    config: RunConfig,
    events: Events,
) -> Quality:
    """Footprint, and on each target MACs, integer coverage, drift from the reference (variants only) and accuracy.

    Equal arguments give equal results on one machine.

    Args:
        name: The row's name in the report.
        role: What the model is to the run.
        artifact: The model, kind ``onnx``.
        reference: The float model that drift is measured against.
        original_scores: Scores of the user's own model by target; None for that model, which then has no drop.
        config: Data, targets and seed.
        events: Told of progress, as ``verify/<name>``.

    Raises:
        DataError: The evaluation data does not fit the model.
        ModelError: A model cannot be run, or its outputs do not match the reference's.
        ProviderError: A target's provider is not there.
    """
    metrics, scores, accuracy = list(measure_footprint(artifact.model_path)), {}, {}
    work, segments = _work(artifact, reference, config)
    metrics += work
    details: dict[str, Any] = {"coverage": segments} if segments else {}
    data = config.data.evaluation
    if data is None:
        return Quality(tuple(metrics), details=details)
    drift = DriftEvidence(artifact.model_path) if role == "variant" else None
    for target in config.targets:
        expected = Session(reference.model_path, target) if role == "variant" else None
        candidate = Session(artifact.model_path, target, like=expected.inputs if expected else None)
        if expected and drift:
            metrics += drift.measure(
                expected,
                candidate,
                open_reader(data, candidate.inputs, batch_size=_BATCH_SIZE),
                _progress(events, name, f"drift on {target.name}"),
            )
        if data.metric:
            scores[target.name] = score(
                candidate,
                open_reader(data, candidate.inputs, batch_size=_BATCH_SIZE, labels=True),
                data.metric,
                _progress(events, name, f"accuracy on {target.name}"),
            )
            original = original_scores[target.name] if original_scores else None
            metrics += accuracy_metrics(original, scores[target.name], target_name=target.name, seed=config.seed)
            accuracy[target.name] = accuracy_details(original, scores[target.name])
    details |= (drift.details if drift else {}) | ({"accuracy": accuracy} if accuracy else {})
    return Quality(tuple(metrics), scores, details)


def measure_latency(
    *, name: str, artifact: Artifact, reference: Artifact, config: RunConfig, events: Events
) -> Latency:
    """Latency against the reference on each target, on real samples where there are any.

    Nothing else should run meanwhile. The ratio of a model that is the reference itself, byte for byte, is 1 and exact.

    Args:
        name: The row's name in the report.
        artifact: The model, kind ``onnx``.
        reference: The float model it is compared with.
        config: Data, targets, gates and seed; a gate that is hard to decide is measured longer for.
        events: Told of the whole as a step ``latency/<name>``, and of its progress: milliseconds of what it takes, and
            where that decided nothing, of the longest it may take.

    Returns:
        Metrics, and as ``details["latency"]`` by target what was measured under which conditions, with the times
        themselves; see `PairedTimes.to_details`. Where startup is asked for, ``details["startup"]`` has each process's
        figures by target and model.

    Raises:
        ConfigError: A target asks for another batch than the one that the model is fixed to, or for a core that is not
            there.
        DataError: There is no data to say how long a dynamic axis is.
        ModelError: A model cannot be run.
        ProviderError: A target's provider is not there.
    """
    metrics: list[Metric] = []
    details: dict[str, dict[str, Any]] = {"latency": {}, "startup": {}}
    is_reference = artifact.digest == reference.digest
    targets = list(filter(attrgetter("latency"), config.targets))
    if not targets:
        return Latency(())
    step, started = f"latency/{name}", time.perf_counter()
    events.started(step)
    for target in targets:
        specs = _shared_inputs(artifact, reference, target)
        require_batch(target, specs, where=name)
        batch = latency_batch(config, specs, target.batch)
        tell = partial(_tell_time, partial(events.progress, step, detail=f"on {target.name}"), target.latency_seconds)
        cpu_clock: CpuClock = "thread" if target.provider == "cpu" and target.threads == 1 else "process"
        with on_cores(target), without_garbage_collection():
            times = measure_pairs(
                _opener(reference, target, batch, specs),
                _opener(artifact, target, batch, specs),
                seconds=target.latency_seconds,
                rng=np.random.default_rng(config.seed),
                cpu_clock=time.thread_time_ns if cpu_clock == "thread" else time.process_time_ns,
                max_ratio=None if is_reference else on_target(config.gates.max_latency_ratio, target.name),
                max_ms=on_target(config.gates.max_latency_ms, target.name),
                progress=tell,
            )
        if is_reference:
            times = replace(times, reference_ns=times.candidate_ns, reference_cpu_ns=times.candidate_cpu_ns)
        details["latency"][target.name] = _conditions(target, batch) | {"cpu_clock": cpu_clock} | times.to_details()
        metrics += latency_metrics(times, target_name=target.name)
        if target.startup or config.gates.max_peak_memory is not None:
            startup, details["startup"][target.name] = measure_startup(artifact, reference, target, batch, specs)
            metrics += startup
    events.finished(step, time.perf_counter() - started, cached=False)
    return Latency(
        tuple(
            replace(metric, note=_SAME_FILE) if is_reference and metric.name == "latency_ratio" else metric
            for metric in metrics
        ),
        {topic: by_target for topic, by_target in details.items() if by_target},
    )


def latency_batch(config: RunConfig, specs: tuple[TensorSpec, ...], n_samples: int) -> Batch:
    """The first batch of the evaluation (else calibration) data; seeded noise without data.

    Args:
        config: Data and seed.
        specs: The model's inputs.
        n_samples: Samples wanted where the model takes any number; a batch with fewer is repeated.

    Raises:
        DataError: There is no data, and an axis other than the batch has no length.
    """
    data = config.data.evaluation or config.data.calibration
    if data is None:
        return _noise(specs, n_samples, config.seed)
    batch = next(iter(open_reader(data, specs, batch_size=n_samples)))
    repeated = {spec.name for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    return {
        spec.name: batch[spec.name][np.arange(n_samples) % len(batch[spec.name])]
        if spec.name in repeated
        else batch[spec.name]
        for spec in specs
    }


def _work(
    artifact: Artifact, reference: Artifact, config: RunConfig
) -> tuple[list[Metric], dict[str, list[dict[str, Any]]]]:
    """Multiply-accumulates and integer coverage on each target, with the shapes of one sample; the graph by target."""
    model = load_model(artifact.model_path)
    quantized = is_quantized(model)
    inputs = match_inputs(input_specs(load_model(reference.model_path)), input_specs(model), where=str(artifact.path))
    batch = inputs.feed(latency_batch(config, inputs.specs, 1), where=str(artifact.path))
    metrics: list[Metric] = []
    segments: dict[str, list[dict[str, Any]]] = {}
    for target in config.targets:
        work, found = measure_work(artifact.model_path, target, batch, quantized=quantized)
        metrics += work
        if found:
            segments[target.name] = found
    return metrics, segments


def _shared_inputs(artifact: Artifact, reference: Artifact, target: Target) -> tuple[TensorSpec, ...]:
    """What batches for both hold: the names are the reference's, a batch that either fixes is fixed."""
    expected = Session(reference.model_path, target).inputs
    return Session(artifact.model_path, target, like=expected).inputs if artifact != reference else expected


def _opener(artifact: Artifact, target: Target, batch: Batch, specs: tuple[TensorSpec, ...]) -> Callable[[], Run]:
    """Opens the model anew on the same samples each time."""
    return lambda: runner(Session(artifact.model_path, target, like=specs), batch)


def _conditions(target: Target, batch: Batch) -> dict[str, Any]:
    """What the times of a target hold for."""
    return {
        "provider": target.provider,
        "options": target.options,
        "threads": target.threads,
        "spinning": target.spinning,
        "affinity": list(target.affinity) if target.affinity else None,
        "copies": target.copies if memory_of(target)[0] != "cpu" else "none",
        "inputs": {name: f"{array.dtype}[{','.join(map(str, array.shape))}]" for name, array in batch.items()},
        "latency_seconds": target.latency_seconds,
    }


def _tell_time(tell: Callable[[int, int], None], usual: float, seconds: float) -> None:
    """Milliseconds so far, of the usual time, and beyond it of the longest."""
    longest = usual if seconds <= usual else PATIENCE * usual
    tell(int(1000 * min(seconds, longest)), int(1000 * longest))


def _progress(events: Events, name: str, detail: str) -> Callable[[int, int], None]:
    return partial(events.progress, f"verify/{name}", detail=detail)


def _noise(specs: tuple[TensorSpec, ...], n_samples: int, seed: int) -> Batch:
    lengths = {dim: n_samples for spec in specs for dim in spec.shape[:1] if isinstance(dim, str)}
    for spec in specs:
        loose = [dim for dim in spec.shape if isinstance(dim, str) and dim not in lengths]
        if loose:
            raise DataError(
                f"the axis {loose[0]!r} of the input {spec.name!r} has no length, so latency cannot be measured",
                got=str(spec),
                want="samples that say how long it is",
                fix="give data.evaluation",
            )
    return random_batch(specs, lengths, seed=seed)

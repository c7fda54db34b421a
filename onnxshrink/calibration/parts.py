"""The one pass over the samples: counted in four parts, alone or in shards that run anywhere.

Batch ``i`` belongs to part ``i % 4``, whoever counts it. All parts together are the calibration; some of them tell
what fewer samples would have given, and how held-out samples fare (see `health`). Samples that are sorted by class are
spread over the parts.

A shard of ``n`` runs every ``n``-th batch of the one pass, and not every ``n``-th sample: a kernel may round otherwise
in a batch of another size. So the shards together give the bytes of the one pass by construction.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import reduce

import numpy as np
import onnx

from onnxshrink.calibration.observe import Plan, observed_model, open_observed, plan_of
from onnxshrink.calibration.statistics import N_BINS, TensorStatistics
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.tensors import Array, Batch
from onnxshrink.data.batching import n_samples
from onnxshrink.data.indexed import numbered
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.session import Session

PARTS = 4

BATCH_BYTES = 32 << 20
"""Observed activations of one batch stay below this, so that memory depends on neither model nor samples."""

# More samples at once are no faster here, and 64 samples in larger batches would not give every part four of them:
# memory would then differ between few samples and many.
_MAX_BATCH = 4
_BATCHES_PER_PART = 4

_GRACE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sharding:
    """Where the shards of a pass run.

    Attributes:
        executor: Any.
        count: Number of shards; the result is the same for any.
        until: When they must end, seconds of `time.time`, for they may run on another machine.
    """

    executor: Executor
    count: int
    until: float = math.inf

    @property
    def patience(self) -> float | None:
        """Seconds until a shard that has not ended was lost with its worker; None for ever."""
        return None if self.until == math.inf else max(0.0, self.until + _GRACE_SECONDS - time.time())


@dataclass(frozen=True, slots=True)
class Observed:
    """What a pass, or a shard of it, has counted.

    Attributes:
        plan: Which tensors were counted, and which follow from them.
        samples: Samples in each part.
        counted: Tensor name to its statistics in each part, in an order that depends on the model alone.
    """

    plan: Plan
    samples: tuple[int, ...]
    counted: Mapping[str, tuple[TensorStatistics, ...]]

    def merge(self, other: Observed) -> Observed:
        """Both shards together; the batches must be different ones, and the model the same."""
        samples = tuple(a + b for a, b in zip(self.samples, other.samples, strict=True))
        counted = {
            name: tuple(a.merge(b) for a, b in zip(parts, other.counted[name], strict=True))
            for name, parts in self.counted.items()
        }
        return Observed(self.plan, samples, counted)

    def statistics(self, name: str, parts: Iterable[int] = range(PARTS)) -> TensorStatistics:
        """The statistics of one tensor, counted or derived, over some parts.

        Args:
            name: A tensor of the plan.
            parts: Numbers of the parts, from 0 to 3.
        """
        if name in self.counted:
            return reduce(TensorStatistics.merge, (self.counted[name][part] for part in parts), TensorStatistics())
        rule = next(rule for rule in self.plan.derived if rule.name == name)
        return self.statistics(rule.source, parts).clipped(rule.lo, rule.hi)


def observe_parts(
    model: onnx.ModelProto,
    open_samples: Callable[[int], Reader],
    *,
    events: Events | None = None,
    step: str = "calibrate",
    name: str = "model",
    sharding: Sharding | None = None,
) -> Observed:
    """Run the samples through the model once and count every tensor that may be quantized.

    Activations are counted and freed batch by batch. The batch is chosen from what one sample takes, so memory grows
    neither with the samples nor, beyond one sample, with the model.

    Args:
        model: A prepared float model.
        open_samples: Batch size to a reader of the calibration samples; every call gives the same samples. For an
            executor of processes it must be picklable: a function of a module, or a `functools.partial` of one.
        events: Listener for progress.
        step: The step's name in progress.
        name: What to call the model in messages.
        sharding: Where to run shards of the pass; None runs it here. Each shard opens its own session and reader.

    Raises:
        DataError: There are no samples, or an activation is NaN or infinite; names the tensor and the samples.
        ModelError: ONNX Runtime cannot run the model.
        TimeoutError: The shards had not ended in time.
    """
    events = events or Silent()
    plan = plan_of(model)
    session = open_observed(observed_model(model, plan), name=name) if plan.observed else None
    single = open_samples(1)
    total = len(single)
    batch_size = _batch_size(single, total, session, plan)
    if sharding is None:
        observed = _count(session, plan, open_samples(batch_size), name, on_samples=_told(events, step, total))
    else:
        del session
        shown = observed_model(model, plan) if plan.observed else None
        work = _Shards(shown, plan, open_samples, batch_size, name, sharding.until)
        observed = _merged(_counted(work, sharding), _told(events, step, total))
    if sum(observed.samples) == 0:
        raise DataError("there are no calibration samples", where=single.where, got="0 samples", want="at least one")
    return observed


def _told(events: Events, step: str, total: int) -> Callable[[int], None]:
    return lambda done: events.progress(step, done, total)


def _counted(work: _Shards, sharding: Sharding) -> Iterator[Observed]:
    """What each shard has counted. However it ends, none is at work afterwards: latency is measured alone."""
    jobs: list[Future[Observed]] = []
    try:
        with warnings.catch_warnings():
            # dask's advice for a model's bytes in a task: to lay them on a disk that the workers may not have
            warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
            jobs.extend(sharding.executor.submit(work.count, index, sharding.count) for index in range(sharding.count))
        for job in jobs:
            yield job.result(sharding.patience)
    finally:
        wait([job for job in jobs if not job.cancel()], sharding.patience)


def _merged(shards: Iterable[Observed], on_samples: Callable[[int], None]) -> Observed:
    def merge(a: Observed, b: Observed) -> Observed:
        both = a.merge(b)
        on_samples(sum(both.samples))
        return both

    return reduce(merge, shards)


@dataclass(frozen=True, slots=True)
class _Shards:
    """What every shard needs, wherever it runs."""

    shown: bytes | None
    plan: Plan
    open_samples: Callable[[int], Reader]
    batch_size: int
    name: str
    until: float = math.inf

    def count(self, index: int, shards: int) -> Observed:
        session = open_observed(self.shown, name=self.name) if self.shown is not None else None
        reader = self.open_samples(self.batch_size)
        return _count(session, self.plan, reader, self.name, index=index, shards=shards, on_samples=self._in_time)

    def _in_time(self, _: int) -> None:
        if time.time() >= self.until:
            raise TimeoutError


def _count(
    session: Session | None,
    plan: Plan,
    reader: Reader,
    name: str,
    *,
    index: int = 0,
    shards: int = 1,
    on_samples: Callable[[int], None] = lambda _: None,
) -> Observed:
    """Count every ``shards``-th batch of a reader, from ``index`` on."""
    # Half the bytes of int64: there are four for each tensor.
    counted = {
        tensor: tuple(TensorStatistics(np.zeros(N_BINS, np.uint32)) for _ in range(PARTS))
        for tensor in (*plan.inputs, *plan.observed)
    }
    samples = [0] * PARTS
    for number, start, batch in numbered(reader, plan.specs, index, shards):
        size, part = n_samples(batch, plan.specs), number % PARTS
        for tensor, values in _tensors_of(session, plan, batch).items():
            counted[tensor][part].update(values)
            if not counted[tensor][part].is_finite:
                raise _not_finite(tensor, values, f"{reader.where}, run through {name}", start, size)
        samples[part] += size
        on_samples(start + size)
    return Observed(plan, tuple(samples), counted)


def _tensors_of(session: Session | None, plan: Plan, batch: Batch) -> dict[str, Array]:
    values = {tensor: np.asarray(batch[tensor]) for tensor in plan.inputs}
    return values | (session.run(batch) if session is not None else {})


def _batch_size(single: Reader, total: int, session: Session | None, plan: Plan) -> int:
    """As many samples as fit into `BATCH_BYTES`, at most 4, and few enough for four batches in every part."""
    batch = next(iter(single), None)
    if batch is None:
        return 1
    samples = n_samples(batch, plan.specs)
    sample_bytes = sum(values.nbytes for values in _tensors_of(session, plan, batch).values()) / samples
    return max(1, min(_MAX_BATCH, int(BATCH_BYTES / max(sample_bytes, 1)), total // (PARTS * _BATCHES_PER_PART)))


def _not_finite(tensor: str, values: Array, where: str, first_sample: int, size: int) -> DataError:
    bad = np.argwhere(~np.isfinite(values))[0]
    per_sample = values.ndim > 0 and values.shape[0] == size
    culprit = first_sample + int(bad[0]) if per_sample else f"{first_sample} to {first_sample + size - 1}"
    return DataError(
        f"the activation {tensor!r} holds {values[tuple(bad)]} on sample {culprit}",
        where=where,
        want="finite activations",
        fix="look at that sample, and at the operator behind the tensor: an overflow, a division by zero",
    )

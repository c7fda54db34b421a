"""A model on its way from torch to the session that is deployed, measured against where it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from onnxshrink.config.data import Data
from onnxshrink.config.gates import Target
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.drift import Drift
from onnxshrink.core.errors import DataError, InferenceError, ModelError
from onnxshrink.core.tensors import Array, Batch, TensorSpec
from onnxshrink.data.batching import n_samples
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.session import Optimization, Session
from onnxshrink.verify.accuracy import Scores, score
from onnxshrink.verify.drift import match_outputs

Progress = Callable[[int, int], None]

_BATCH_SIZE = 16
_FILE = "deviations.json"


@dataclass(frozen=True, slots=True)
class Runtime:
    """How ONNX Runtime runs a model.

    Attributes:
        target: Provider and threads.
        optimization: Level of its graph optimization; ``disabled`` computes what the graph says, node by node.
        without: Names of its optimizers that are left out.
    """

    target: Target = field(default_factory=Target)
    optimization: Optimization = "disabled"
    without: tuple[str, ...] = ()

    def open(self, model: Artifact, *, like: Sequence[TensorSpec] | None = None) -> Session:
        """A session that runs ``model`` so, on batches made for the inputs ``like``."""
        path, target = model.model_path, self.target
        return Session(path, target, optimization=self.optimization, without=self.without, like=like)

    def refuses(self, model: Artifact) -> str | None:
        """Why ONNX Runtime does not load ``model`` so, in its words; None where it does."""
        try:
            self.open(model)
        except ModelError as e:
            return e.what
        return None


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far one output is from the reference's.

    Attributes:
        output: The reference's name of the output.
        sqnr_db: As of `Drift`, in dB; infinite for identical outputs.
        max_abs_error: Largest ``|reference - candidate|``.
        flaw: Why neither has a meaning, or None: NaN, or infinity on one side only.
    """

    output: str
    sqnr_db: float
    max_abs_error: float
    flaw: str | None = None


def measure_deviations(
    reference: Artifact, candidate: Artifact, runtime: Runtime, data: Data, progress: Progress | None = None
) -> tuple[Deviation, ...]:
    """Run a model and the one it came from on the same samples, batch by batch.

    Args:
        reference: Kind ``torch``, run by torch, or ``onnx``, run node by node on the CPU.
        candidate: Kind ``onnx``. Its outputs are those of a torch reference in order, of an ONNX reference by name.
        runtime: How to run the candidate.
        data: The samples.
        progress: Told the samples done and their total after each batch.

    Returns:
        One entry for each output of the reference.

    Raises:
        DataError: The samples do not fit, or there are none.
        InferenceError: The candidate fails on a batch that the reference has answered.
        ModelError: The models' inputs or outputs do not match, or the reference fails.
    """
    specs, names, answer = _answers(reference, runtime)
    session = runtime.open(candidate, like=specs)
    own = [spec.name for spec in session.outputs]
    names = own if names is None else names
    partner = match_outputs(names, own, where=session.name)
    reader = open_reader(data, session.inputs, batch_size=_BATCH_SIZE)
    drifts, done = {name: Drift(name) for name in names}, 0
    for batch in reader:
        with of_the_reference():
            expected = answer(batch)
        got = session.run(batch)
        if len(expected) != len(names):
            raise ModelError(
                "the exported model and the network differ in the number of their outputs",
                where=session.name,
                got=f"{len(names)} outputs",
                want=f"{len(expected)} outputs",
            )
        drifts = {
            name: drifts[name].update(value, got[partner[name]]) for name, value in zip(names, expected, strict=True)
        }
        done += n_samples(batch, session.inputs)
        if progress:
            progress(done, len(reader))
    if not done:
        raise DataError("there are no samples to compare the models on", where=reader.where, want="at least one sample")
    return tuple(
        Deviation(drift.output, drift.sqnr_db, drift.max_abs, drift.flaw)
        if drift.flaw is None
        else Deviation(drift.output, -math.inf, math.inf, drift.flaw)
        for drift in drifts.values()
    )


def measure_scores(model: Artifact, runtime: Runtime, data: Data, progress: Progress | None = None) -> Scores:
    """The data's task metric of a model, sample by sample.

    Raises:
        DataError: Labels are missing or do not fit.
        InferenceError: The model fails on a batch.
        ModelError: No output can be scored.
    """
    if data.metric is None:
        raise DataError("there is nothing to score with", want="a metric", fix="metric: top1")
    session = runtime.open(model)
    reader = open_reader(data, session.inputs, batch_size=_BATCH_SIZE, labels=True)
    return score(session, reader, data.metric, progress)


@contextmanager
def of_the_reference() -> Iterator[None]:
    """Tell a reference that fails on a batch from a candidate that does: there is nothing to measure it against.

    Raises:
        ModelError: In place of the `InferenceError` within, with the same words.
    """
    try:
        yield
    except InferenceError as e:
        raise ModelError(e.what, where=e.where, got=e.got, want=e.want, fix=e.fix) from e


def save_deviations(deviations: Sequence[Deviation], folder: Path) -> None:
    """Write what was measured as JSON; Python's spelling of infinity is read back as it is."""
    (folder / _FILE).write_text(json.dumps([asdict(one) for one in deviations], indent=1), encoding="utf-8")


def load_deviations(folder: Path) -> tuple[Deviation, ...]:
    """The inverse of `save_deviations`."""
    return tuple(Deviation(**one) for one in json.loads((folder / _FILE).read_text(encoding="utf-8")))


def _answers(
    reference: Artifact, runtime: Runtime
) -> tuple[Sequence[TensorSpec], list[str] | None, Callable[[Batch], Sequence[Array]]]:
    """The reference's inputs, the names of its outputs (None where they have none), and what it says to a batch."""
    if reference.kind == "torch":
        from onnxshrink.runtime.torch_export import run_torch
        from onnxshrink.runtime.torch_model import load_network

        network, architecture = load_network(reference)

        def run(batch: Batch) -> Sequence[Array]:
            # Samples that are mapped from a file cannot be written, and torch warns of such arrays.
            return run_torch(network, architecture.inputs, {name: array.copy() for name, array in batch.items()})

        return architecture.inputs, None, run
    session = Runtime(Target(threads=runtime.target.threads)).open(reference)
    return session.inputs, [spec.name for spec in session.outputs], lambda batch: list(session.run(batch).values())

"""Which step of a run, or which of ONNX Runtime's own, was the first to break a limit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import Data, DataRoles, NpzData
from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import OnnxSource
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.files import require_files
from onnxshrink.core.importing import search_path
from onnxshrink.core.run_folder import require_own
from onnxshrink.core.store import Store
from onnxshrink.runtime.optimizers import applied_optimizers
from onnxshrink.search.bisect import bisect
from onnxshrink.search.checkpoints import Checkpoint, Way, accuracy_way, drift_way, session_steps
from onnxshrink.search.limits import Check, Limit, Measure, measure_of
from onnxshrink.search.neighbours import explain_command, write_neighbours
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import preflight
from onnxshrink.verify.checkpoints import Runtime

_NONE_OF_THEM = "none of them"


@dataclass(frozen=True, slots=True)
class Search:
    """What one search has found.

    Attributes:
        steps: Every step's name, in order.
        checks: What was measured, in the order in which it was.
        first: A broken step whose predecessor is not, by its place; None where the last step keeps the limit.
        unseen: Steps before it that were not checked: one of them may have broken the limit, and another mended it.
    """

    steps: tuple[str, ...]
    checks: tuple[Check, ...]
    first: int | None
    unseen: tuple[int, ...]

    @property
    def broke(self) -> Check | None:
        """The check of the step that broke the limit."""
        return next((check for check in self.checks if check.step == self.first), None)

    @property
    def kept(self) -> Check | None:
        """The check of the step before it; None if that is the reference."""
        return next((check for check in self.checks if self.first is not None and check.step == self.first - 1), None)


@dataclass(frozen=True, slots=True)
class Found:
    """The answer.

    Attributes:
        subject: What was searched.
        reference: What every step was measured against.
        limit: What every step must keep.
        search: Over the steps.
        optimizers: Over those of ONNX Runtime's optimizers that first act at the level that broke the limit; None where
            a step of the run did, or nothing, or where no optimizer is new at the level.
        without: The session as deployed, but for the one optimizer that was found; None where none was.
        files: The models before and after the step that broke the limit, where they were written.
        advice: What to do next, one command or setting a line.
    """

    subject: str
    reference: str
    limit: Limit
    search: Search
    optimizers: Search | None = None
    without: Check | None = None
    files: dict[str, str] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


def bisect_run(
    config: RunConfig,
    limit: Limit,
    *,
    variant: str | None = None,
    max_samples: int | None = None,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
) -> Found:
    """Find the first step of a variant that breaks a limit, and leave the models before and after it.

    Drift is measured from the last torch network on, accuracy from the run's original on; see `drift_way` and
    `accuracy_way`. Stages and checks that the store has are not done again.

    Args:
        config: The run.
        limit: What every step must keep.
        variant: Which of the variants; it may be left out where there is one.
        max_samples: Measure on at most this many samples, the first ones; the stages have theirs all the same.
        runs: Folder of the runs and of their store.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress.

    Raises:
        ConfigError: There is no such variant, or nothing to measure on.
        ShrinkError: A stage cannot do its work for a reason that is not its model's: one that cannot be made, or is not
            what it was made from, breaks every limit.
    """
    config = _with_one_variant(config, variant)
    data = _data(config, limit)
    if max_samples is not None:
        data = data.model_copy(update={"max_samples": min(max_samples, data.max_samples or max_samples)})
    name = config.name or "run"
    require_own(runs / name)
    with search_path(base):
        preflight(config)
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events or Silent())
        way = accuracy_way(config, memo) if limit.metric == "accuracy_drop" else drift_way(config, memo)
        key, told = fingerprint(data), events or Silent()
        measure = measure_of(memo, way, limit, data, data_key=key, seed=config.seed, events=told)
        found = _searched(f"{name}, {next(iter(config.variants))}", way, limit, measure)
        files = write_neighbours(way, found.search.first, runs / name)
        broke = found.search.broke
        explained = explain_command(files, data) if broke is not None and broke.runs else ()
        return replace(found, files=files, advice=(*found.advice, *explained))


def bisect_files(
    reference: Path,
    candidate: Path,
    data: Path,
    limit: Limit,
    *,
    metric: str | None = None,
    max_samples: int | None = None,
    target: Target | None = None,
    events: Events | None = None,
) -> Found:
    """Find what breaks a limit between two files: the candidate's graph, or what ONNX Runtime makes of it.

    Args:
        reference: The ``.onnx`` file to measure against; run node by node.
        candidate: The ``.onnx`` file in question.
        data: Samples, ``.npz``, with ``labels`` for accuracy.
        limit: What every step must keep.
        metric: Task metric for a limit of accuracy; ``top1`` by default.
        max_samples: Use at most this many samples, the first ones.
        target: Where the candidate is deployed; the CPU by default. The graph itself is run there by one thread.
        events: Listener for progress.

    Raises:
        ConfigError: A file is not there.
        ShrinkError: The reference cannot be used, or the models or the samples do not fit each other. A candidate that
            is no model, or one that ONNX Runtime does not load or cannot run on the samples, breaks every limit.
    """
    require_files(reference=reference, candidate=candidate, data=data)
    scored = (metric or "top1") if limit.metric == "accuracy_drop" else None
    samples = NpzData.model_validate({"npz": data, "metric": scored, "max_samples": max_samples})
    with tempfile.TemporaryDirectory(prefix="onnxshrink-") as folder:
        memo = Memo(Store(Path(folder)), DataRoles(evaluation=samples), 0, events or Silent())
        source = memo.open(OnnxSource(onnx=reference), "reference")
        graph = Checkpoint("graph", partial(memo.open, OnnxSource(onnx=candidate), "candidate"), Runtime())
        try:
            sessions = session_steps(graph.make(), target or Target())
        except ModelError:
            sessions = []
        way = Way(source, str(reference), (graph, *sessions))
        key, told = memo.data_key("evaluation"), events or Silent()
        measure = measure_of(memo, way, limit, samples, data_key=key, seed=0, events=told)
        found = _searched(str(candidate), way, limit, measure)
    broke = found.search.broke
    if broke is not None and broke.step == 0 and broke.runs:
        return replace(found, advice=(f"onnxshrink explain {reference} {candidate} --data {data}",))
    return found


def _searched(subject: str, way: Way, limit: Limit, measure: Measure) -> Found:
    """Search the steps, and the optimizers where a level of theirs broke the limit."""
    search = _search(way.steps, measure)
    found = Found(subject, way.reference_name, limit, search)
    if search.first is None or not way.steps[search.first].is_session:
        return found
    step = way.steps[search.first]
    before = way.steps[search.first - 1].runtime if search.first else Runtime()
    if before.target.provider != step.runtime.target.provider:
        return found
    advice = _LEVEL_ADVICE.format(level=_LEVEL_NAMES[before.optimization])
    optimizers = _optimizer_steps(step, before)
    if len(optimizers) == 1:
        return replace(found, advice=(advice,))
    finer = _search(optimizers, measure)
    if not finer.first:
        return replace(found, optimizers=finer, advice=(advice,))
    name = finer.steps[finer.first]
    runtime = replace(way.steps[-1].runtime, without=(name,))
    without = measure(len(way.steps), replace(way.steps[-1], name=f"all but {name}", runtime=runtime))
    if not without.is_broken:
        advice = f'InferenceSession(…, disabled_optimizers=["{name}"]), and time it again'
    return replace(found, optimizers=finer, without=without, advice=(advice,))


_LEVEL_NAMES = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_LEVEL_ADVICE = "options.graph_optimization_level = GraphOptimizationLevel.{level}, and time it again"


def _search(steps: Sequence[Checkpoint], measure: Measure) -> Search:
    checks: list[Check] = []

    def is_broken(step: int) -> bool:
        checks.append(measure(step, steps[step]))
        return checks[-1].is_broken

    seen = bisect(len(steps), is_broken)
    return Search(tuple(step.name for step in steps), tuple(checks), seen.first, seen.unseen)


def _optimizer_steps(step: Checkpoint, before: Runtime) -> list[Checkpoint]:
    """The session of ``step`` without the optimizers that do not act ``before`` it, then with one more of them each.

    Elsewhere than on the CPU none is told apart, nor where the session cannot be opened.
    """
    runtime, path, new = step.runtime, step.make().model_path, list[str]()
    if runtime.target.provider == "cpu" and not runtime.refuses(step.make()):
        old = applied_optimizers(path, before.optimization)
        new = [name for name in applied_optimizers(path, runtime.optimization) if name not in old]
    return [
        replace(step, name=name, runtime=replace(runtime, without=tuple(new[count:])))
        for count, name in enumerate((_NONE_OF_THEM, *new))
    ]


def _with_one_variant(config: RunConfig, variant: str | None) -> RunConfig:
    names = list(config.variants)
    name = variant or (names[0] if len(names) == 1 else None)
    if name not in config.variants:
        raise ConfigError(
            f"there is no variant {name!r}" if name else "the config has several variants, and one is searched",
            where="--variant",
            got=name,
            want=", ".join(names),
            fix=f"--variant {names[-1]}",
        )
    return config.model_copy(update={"variants": {name: config.variants[name]}})


def _data(config: RunConfig, limit: Limit) -> Data:
    """What to measure on: the evaluation samples, else, for drift, those of the calibration."""
    evaluation, calibration = config.data.evaluation, config.data.calibration
    if limit.metric == "accuracy_drop":
        if evaluation is None or evaluation.metric is None:
            raise ConfigError(
                "there is nothing to measure accuracy with",
                where="data.evaluation",
                want="samples with labels and a metric",
                fix="data: {evaluation: {npz: …, metric: top1}}",
            )
        return evaluation
    if evaluation is not None:
        return evaluation
    if calibration is not None:
        return calibration
    raise ConfigError(
        "there is nothing to measure drift on",
        where="data",
        want="data.evaluation, or data.calibration",
        fix="data: {evaluation: {npz: …}}",
    )

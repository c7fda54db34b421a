"""Search for the model that fits a budget: propose, try, remember; then measure the best against each other.

```
budget ─▶ space ─▶ propose ─▶ attempt (here, in processes, on a cluster) ─▶ record ─┐
                     ▲                                                              │
                     └──────────────────────────────────────────────────────────────┘
front ─▶ finalists ─▶ pipeline.run: latency, alone ─▶ gates ─▶ the winner, or what to relax
```
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from onnxshrink.config.base import fingerprint
from onnxshrink.config.budget import Budget
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import digest_json
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.machine import versions
from onnxshrink.core.report import Report
from onnxshrink.pipeline import Leave, run
from onnxshrink.search.attempt import Task, attempt
from onnxshrink.search.constraints import nearest
from onnxshrink.search.document import conclude
from onnxshrink.search.pareto import front
from onnxshrink.search.policy import Known, propose
from onnxshrink.search.record import Record, objectives
from onnxshrink.search.space import space_of
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, key_of, name_of
from onnxshrink.search.workers import open_workers

_FINALISTS = 6

Clock: TypeAlias = Callable[[], float]


def fit(
    config: RunConfig,
    *,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
    executor: Executor | None = None,
    watch: Callable[[State], None] | None = None,
    leave: Leave | None = None,
    clock: Clock = time.monotonic,
) -> Report:
    """Find the model that keeps every limit of a config's budget, or the nearest misses.

    Trials and their results are kept: a killed search goes on from its last finished trial, and a second one like it
    only measures latency again.

    Args:
        config: One with a budget.
        runs: Folder of the runs and of the store they share.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress of the final measurements.
        executor: Where trials run; None as ``budget.parallel`` says.
        watch: Told the state before and after every trial.
        leave: Writes ``bundle/``; see `onnxshrink.pipeline.run`.
        clock: Seconds since any moment.

    Returns:
        The report of the finalists, as written to ``report.json``: its winner keeps every limit, and where there is
        none, its ``selection`` says which limit to relax and by how much. ``search.json`` beside it has every trial.

    Raises:
        ConfigError: The budget contradicts itself or the config, or this is not the machine it names.
        ShrinkError: Something else the user can fix.
    """
    budget = _require(config)
    started = clock()
    with search_path(base):
        space = space_of(config, budget, base=base.absolute())
        name = digest_json({"config": _identity(config), "space": space.document, "libraries": versions()})
    folder = runs / f".{config.name or 'run'}.search"
    record = Record(name, space, storage=budget.storage, folder=folder, seed=config.seed)
    longest, width = 0.0, budget.parallel.workers if budget.parallel else 1

    def is_over() -> bool:
        return clock() - started >= budget.time_limit and bool(record.trials)

    def look(*at_work: Task) -> State:
        state = State(budget, tuple(record.trials), clock() - started, len(space), at_work)
        if watch:
            watch(state)
        return state

    with open_workers(budget.parallel, executor) as workers:
        while tasks := _affordable(
            propose(Known(space, budget, record.trunks(), record.trials, width)), budget, record
        ):
            begun = clock()
            if begun + longest - started > budget.time_limit and record.trials:
                break
            look(*tasks)
            for trial in workers(partial(attempt, space, runs.absolute()), tasks, is_over):
                record.add(trial)
                look(*(task for task in tasks if task.number > trial.number))
            longest = max(longest, clock() - begun)
    state = look()
    finalists = choose_finalists(state)
    return run(
        _final(config, budget),
        runs=runs,
        base=base,
        events=events or Silent(),
        conclude=partial(conclude, space, state),
        leave=leave,
        parts=tuple(
            part.model_copy(update={"gates": budget.gates(config.gates)})
            for part in space.together({name_of(trial): trial.point for trial in finalists})
        ),
    )


def _require(config: RunConfig) -> Budget:
    budget = config.budget
    if budget is None:
        raise ConfigError("there is no budget to search for", where="budget", fix="budget: {max_size: 2 MB}")
    host = socket.gethostname()
    if budget.latency_host not in (None, host):
        raise ConfigError(
            "latency counts on another machine than this one",
            where="budget.latency_host",
            got=host,
            want=str(budget.latency_host),
            fix="start the search there; trials may run anywhere, see `parallel`",
        )
    return budget


def _identity(config: RunConfig) -> dict[str, Any]:
    """All of a config that changes a trial; not how long it may take, where it runs and what it must reach."""
    whole = fingerprint(config)
    return {name: value for name, value in whole.items() if name not in ("name", "budget", "gates", "select")}


def _affordable(tasks: Sequence[Task], budget: Budget, record: Record) -> list[Task]:
    """The tasks within the budget's number of full evaluations."""
    left = None
    if budget.max_trials is not None:
        left = max(0, budget.max_trials - sum(trial.status == "evaluated" for trial in record.trials))
    full = [task for task in tasks if task.depth == "evaluate"][:left]
    return [task for task in tasks if task.depth != "evaluate" or task in full]


def choose_finalists(state: State) -> tuple[Trial, ...]:
    """What latency is measured for: the front within the limits; without one, the nearest miss of each limit.

    Raises:
        ConfigError: The time was too short for a single model.
    """
    budget = state.budget
    if not state.evaluated:
        raise ConfigError(
            "the search ended before a single model was measured",
            where="budget.time_limit",
            got=f"{budget.time_limit:g} s",
            fix="allow more time; what was tried is kept",
        )
    if state.keeping:
        points = [objectives(trial) for trial in state.keeping]
        chosen = sorted((state.keeping[index] for index in front(points)), key=state.rank)[:_FINALISTS]
    else:
        near = nearest(budget, state.evaluated, timed=False)
        chosen = list({key_of(trial.point): trial for trial in near.values()}.values()) or list(state.front[:2])
    return tuple(sorted(chosen, key=lambda trial: trial.number))


def _final(config: RunConfig, budget: Budget) -> RunConfig:
    criterion = {"size": "smallest", "latency": "fastest", "accuracy_drop": "most_accurate"}[budget.minimize]
    if config.data.evaluation is None or (criterion == "most_accurate" and config.data.evaluation.metric is None):
        criterion = "smallest"
    return config.model_copy(update={"gates": budget.gates(config.gates), "select": criterion})

"""Search for the model that fits a budget: propose, try, remember; then measure the best against each other.

```
budget ─▶ space ─▶ propose ─▶ attempt (here, in processes, on a cluster) ─▶ record ─┐
                     ▲                                                              │
                     └──────────────────────────────────────────────────────────────┘
front ─▶ finalists ─▶ pipeline.run: latency, alone ─▶ gates ─▶ the winner, or what to relax
             ▲                                          │
             └───── while the clock lets none pass ─────┘
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from onnxshrink.calibration.parts import Sharding
from onnxshrink.config.base import fingerprint
from onnxshrink.config.budget import Budget
from onnxshrink.config.gates import Select
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import digest_json
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.machine import versions
from onnxshrink.core.report import Candidate, Report
from onnxshrink.core.run_folder import home_of, require_own, require_same_config
from onnxshrink.pipeline import Leave, Page, run
from onnxshrink.search.ahead import calibrate_ahead, uncut
from onnxshrink.search.attempt import Task, attempt_until
from onnxshrink.search.document import conclude
from onnxshrink.search.finalists import N_FINALISTS, first_finalists, further_finalists
from onnxshrink.search.pace import Clock, Pace, final_seconds
from onnxshrink.search.policy import Known, propose
from onnxshrink.search.record import Record
from onnxshrink.search.require import require_budget, require_space
from onnxshrink.search.space import Space, space_of
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, name_of
from onnxshrink.search.workers import Workers, here, open_workers
from onnxshrink.search.yardstick import require_yardstick

_LARGEST_RESERVE = 1 / 3
"""Of the time, for the final measurement: it may need more, and a search must have some, too."""

_SELECT: dict[str, Select] = {"size": "smallest", "latency": "fastest", "accuracy_drop": "most_accurate"}


def fit(
    config: RunConfig,
    *,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
    executor: Executor | None = None,
    watch: Callable[[State], None] | None = None,
    leave: Leave | None = None,
    pages: Mapping[str, Page] | None = None,
    clock: Clock = time.monotonic,
) -> Report:
    """Find the model that keeps every limit of a config's budget, or the nearest misses.

    Trials and their results are kept: a killed search goes on from its last finished trial, and a second one like it
    only measures latency again.

    Args:
        config: One with a budget.
        runs: Folder of the runs and of the store they share; workers that do not have it make one of their own at the
            same path, and the finalists are made here again.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress of the final measurements.
        executor: Where trials run; None as ``budget.parallel`` says.
        watch: Told the state before and after every trial.
        leave: Writes ``bundle/``; see `onnxshrink.pipeline.run`.
        pages: Files to leave beside the report; see there as well.
        clock: Seconds since any moment.

    Returns:
        The report of the finalists, as written to ``report.json``: its winner keeps every limit, and where there is
        none, its ``selection`` says which limit to relax and by how much. ``search.json`` beside it has every trial.

    Raises:
        ConfigError: The budget contradicts itself or the config, its models cannot be compared, or this is not the
            machine it names.
        ShrinkError: Something else the user can fix.
    """
    started = clock()
    budget = require_budget(config)
    require_own(runs / (config.name or "run"))
    with search_path(base):
        space = space_of(config, budget, base=base.absolute())
        require_space(space)
        require_yardstick(config, space)
        require_same_config(runs / (config.name or "run"), home_of(base, runs), fingerprint(config.model))
        tried = {"space": space.document, "dimensions": [asdict(dimension) for dimension in space.dimensions]}
        name = digest_json({"config": _identity(config), **tried, "libraries": versions()})
    folder = runs / f".{config.name or 'run'}.search"
    record = Record(name, space, storage=budget.storage, folder=folder, seed=config.seed)
    n_timed = 2 * N_FINALISTS if budget.minimize == "latency" else N_FINALISTS
    reserve = min(final_seconds(config, n_timed), budget.time_limit * _LARGEST_RESERVE)
    pace = Pace(started, budget.time_limit, reserve, clock, record.trials)

    def look(*at_work: Task) -> State:
        state = State(budget, tuple(record.trials), pace.spent, len(space), at_work)
        if watch:
            watch(state)
        return state

    events = events or Silent()
    if budget.parallel and (reason := uncut(config)):
        events.warned(reason)
    with open_workers(budget.parallel, executor) as workers:
        is_whole = _try(space, budget, runs.absolute(), record, pace, workers=workers, look=look)
    compare = partial(run, runs=runs, base=base, events=events, leave=leave, pages=pages)
    return _measure(config, space, replace(look(), is_whole=is_whole), pace, compare)


def _try(
    space: Space,
    budget: Budget,
    runs: Path,
    record: Record,
    pace: Pace,
    *,
    workers: Workers,
    look: Callable[..., State],
) -> bool:
    """Propose and try until nothing is left to try: True; or no time for it, or no evaluation: False."""
    width = budget.parallel.workers if budget.parallel else 1
    while wanted := propose(Known(space, budget, record.trunks(), record.trials, width)):
        tasks = _within(wanted, budget, record.trials)
        look(*tasks)
        if width > 1 and workers.executor is not None:
            configs = [space.config(task.point) for task in tasks if task.depth == "probe"]
            sharding = Sharding(workers.executor, width, time.time() + pace.left)
            calibrate_ahead(configs, runs=runs, base=space.base, sharding=sharding)
        until = time.time() + pace.left
        work = partial(attempt_until, space, runs, until, processes=budget.processes_per_training)
        n_before = len(record.trials)
        for trial in _spread(space, tasks, work, workers, pace):
            record.add(trial)
            look(*(task for task in tasks if task.number > trial.number))
        if len(record.trials) == n_before:
            return False
    return True


def _spread(
    space: Space, tasks: Sequence[Task], work: Callable[[Task], Trial | None], workers: Workers, pace: Pace
) -> Iterator[Trial]:
    """The tasks on the workers, and then here, alone, those whose stages decide by times that they measure."""
    alone = [task for task in tasks if task.depth != "predict" and _is_timed(space, task)]
    yield from workers(work, [task for task in tasks if task not in alone], pace)
    yield from here(work, alone, pace)


def _is_timed(space: Space, task: Task) -> bool:
    config = space.config(task.point)
    return any(stage.times for _, chain in config.branches() for stage in chain)


def _within(tasks: Sequence[Task], budget: Budget, trials: Sequence[Trial]) -> list[Task]:
    """The tasks within the budget's number of full evaluations; none once it is reached."""
    if budget.max_trials is None:
        return list(tasks)
    left = budget.max_trials - sum(trial.status == "evaluated" for trial in trials)
    full = [task for task in tasks if task.depth == "evaluate"][: max(0, left)]
    return [task for task in tasks if task.depth != "evaluate" or task in full] if left > 0 else []


def _measure(
    config: RunConfig,
    space: Space,
    state: State,
    pace: Pace,
    compare: Callable[..., Report],
) -> Report:
    """Measure the finalists, and further ones as long as the clock lets none pass and there is time."""
    timed: list[Trial] = []
    skipped: list[Trial] = []

    def parts_of(trials: Sequence[Trial]) -> list[RunConfig]:
        timed.extend(trials)
        return space.together({name_of(trial): trial.point for trial in trials}) if trials else []

    def further(measured: Sequence[Candidate]) -> list[RunConfig]:
        if any(row.role == "variant" and row.outcome != "failed" for row in measured):
            return []
        more = further_finalists(state, timed)
        if final_seconds(config, len(more)) > pace.seconds - pace.spent:
            skipped.extend(more)
            return []
        return parts_of(more)

    def last_word(report: Report) -> tuple[Report, dict[str, str]]:
        if skipped and report.winner is None:
            text = f"the time was over before the latency of {len(skipped)} or more further models could be measured"
            report = replace(report, warnings=(*report.warnings, text))
        return conclude(space, replace(state, seconds=pace.spent), report)

    judged = {"gates": state.budget.as_gates, "select": _SELECT[state.budget.minimize]}
    return compare(
        config.model_copy(update=judged),
        parts=parts_of(first_finalists(state)),
        further=further,
        conclude=last_word,
    )


def _identity(config: RunConfig) -> dict[str, Any]:
    """All of a config that changes a trial; not how long it may take, where it runs and what it must reach.

    Where the budget decides what is tried (families, `vary`, the SQNR that a mixture must keep), the dimensions tell.
    """
    whole = fingerprint(config)
    return {name: value for name, value in whole.items() if name not in ("name", "budget", "gates", "select")}

"""What a search leaves beside its report: ``search.json`` with every trial, and ``search.csv`` to plot from."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onnxshrink.core.errors import StoreError
from onnxshrink.core.report import Report, finite
from onnxshrink.core.run_folder import SEARCH_FILE, SEARCH_TABLE
from onnxshrink.search.constraints import METRICS, Miss, judge, misses, nearest
from onnxshrink.search.known import SIZES
from onnxshrink.search.reasons import reasons
from onnxshrink.search.record import objectives
from onnxshrink.search.space import Space
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, describe, key_of, name_of, trial_of, trunk_of
from onnxshrink.search.wording import relax, say
from onnxshrink.verify.gates import TIMED

SCHEMA = 1
"""Raised when the meaning of a field changes; adding a field does not raise it."""

_MEASURED = ("size_bytes", "compressed_bytes", "sqnr_db", "accuracy_drop", "latency_ratio")


def conclude(space: Space, state: State, report: Report) -> tuple[Report, dict[str, str]]:
    """The last word on a search.

    Args:
        space: What was searched.
        state: What was found.
        report: Of the finalists, which are named by `name_of`.

    Returns:
        The report, its ``selection`` telling what to relax where nothing keeps every limit, and the files to leave
        beside it, name to text.
    """
    measured = {candidate.name: candidate.metrics for candidate in report.variants if candidate.digest}
    joined = replace(
        state,
        trials=tuple(
            replace(trial, metrics=measured[name_of(trial)])
            if trial.status == "evaluated" and name_of(trial) in measured
            else trial
            for trial in state.trials
        ),
    )
    finalists = tuple(trial for trial in joined.evaluated if name_of(trial) in measured)
    report = replace(report, selection=_selection(report, joined, finalists))
    document = _document(space, joined, finalists, report)
    return report, {SEARCH_FILE: json.dumps(document, indent=1, allow_nan=False) + "\n", SEARCH_TABLE: _table(document)}


def read_search(path: Path) -> dict[str, Any]:
    """Read ``search.json``.

    Raises:
        StoreError: There is none, or it is none, or one of a newer schema.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise StoreError(f"the search cannot be read: {e}", where=str(path), want="search.json of a run") from e
    if schema > SCHEMA:
        raise StoreError(
            "the search was written by a newer onnxshrink",
            where=str(path),
            got=f"schema {schema}",
            want=f"schema {SCHEMA} or older",
            fix="pip install --upgrade onnxshrink",
        )
    return document


def nearest_misses(state: State, finalists: Sequence[Trial]) -> Iterator[tuple[Trial, tuple[Miss, ...]]]:
    """The models that would do if one limit were relaxed, the least first; or the one nearest to all of its limits.

    Args:
        state: With the finalists' latency, where that was measured.
        finalists: The trials a clock has seen; of the others nothing is said where a clock decides a limit.
    """
    budget = state.budget
    pool = finalists if budget.limits.keys() & TIMED else state.evaluated
    alone = nearest(budget, pool)
    for trial in sorted(alone.values(), key=lambda trial: (misses(budget, trial)[0].share, trial.number)):
        yield trial, misses(budget, trial)
    broken = [trial for trial in pool if misses(budget, trial)]
    if not alone and broken:
        trial = min(broken, key=lambda trial: (misses(budget, trial)[0].share, trial.number))
        yield trial, misses(budget, trial)


def _selection(report: Report, state: State, finalists: Sequence[Trial]) -> str:
    """Why the winner won, or what to relax."""
    if report.winner is not None:
        return report.selection
    ways = [
        f"relax {' and '.join(map(relax, missed))}: {_named(trial)} keeps the rest"
        for trial, missed in nearest_misses(state, finalists)
    ]
    if not ways:
        return report.selection
    cut = [] if state.is_whole else ["the search ended before all was tried: with more time or trials it goes on"]
    return "; ".join([f"no model{_found(state)} keeps every limit; {'; or '.join(ways)}", *_too_large(state), *cut])


def _found(state: State) -> str:
    """What to add where a statement is about all models and not all of them were measured, as in most searches."""
    tried = {key_of(trial.point) for trial in state.trials if trial.status in ("evaluated", "failed")}
    return "" if len(tried) >= state.n_points else " found"


def _too_large(state: State) -> Iterator[str]:
    """That nothing fits, where nothing does, and what the smallest model is, of all or of those that were found."""
    found = _found(state)
    for limit, metric in METRICS.items():
        if limit not in SIZES or limit not in state.budget.limits:
            continue
        sizes = {trial.number: _value(trial, metric) or math.inf for trial in state.evaluated}
        smallest = min(state.evaluated, key=lambda trial: (sizes[trial.number], objectives(trial), trial.number))
        asked = state.budget.limits[limit]
        if sizes[smallest.number] > asked:
            drop, sqnr = _value(smallest, "accuracy_drop"), _value(smallest, "sqnr_db")
            quality = (
                f", accuracy drop {drop:.3g}" if drop is not None else f", {sqnr:.1f} dB" if sqnr is not None else ""
            )
            size = say(limit, sizes[smallest.number], up=True)
            nothing = f"nothing{found} fits {limit} {say(limit, asked)}"
            yield f"{nothing}: the smallest{found} is {_named(smallest)} with {size}{quality}"


def _named(trial: Trial) -> str:
    trunk = describe(trunk_of(trial.point))
    return f"{name_of(trial)} ({trunk})" if trunk else name_of(trial)


def _document(space: Space, state: State, finalists: Sequence[Trial], report: Report) -> dict[str, Any]:
    best, beaten = state.best, dict(reasons(space, state))
    winner = next((trial for trial in finalists if name_of(trial) == report.winner), None)
    return {
        "schema": SCHEMA,
        "name": report.name,
        "budget": state.budget.model_dump(mode="json", exclude_none=True),
        "space": {dimension.name: [option.label for option in dimension.options] for dimension in space.dimensions},
        "n_points": len(space),
        "counts": state.counts,
        "seconds": round(state.seconds, 1),
        "is_whole": state.is_whole,
        "selection": report.selection,
        "winner": None if winner is None else winner.number,
        "best": None if best is None else best.number,
        "front": [trial.number for trial in state.front],
        "finalists": [trial.number for trial in finalists],
        "nearest": []
        if report.winner
        else [
            {"trial": trial.number, "misses": [_plain(miss) for miss in missed]}
            for trial, missed in nearest_misses(state, finalists)
        ],
        "history": list(_history(state)),
        "trials": [_row(state, trial, beaten.get(trial.number), finalists) for trial in state.trials],
    }


def _row(state: State, trial: Trial, reason: str | None, finalists: Sequence[Trial]) -> dict[str, Any]:
    row = asdict(replace(trial, errors=())) | {"label": describe(trial.point), "name": None, "limits": {}}
    if trial.status == "evaluated":
        row["name"] = name_of(trial)
        row["limits"] = judge(state.budget, trial, timed=trial in finalists)
    return row | {"reason": trial.reason or reason}


def _plain(miss: Miss) -> dict[str, Any]:
    return asdict(miss) | {"share": finite(miss.share)}


def _history(state: State) -> Iterator[dict[str, Any]]:
    """Whenever a trial became the best one: its number, its objectives, and the work done until then."""
    work, best = 0.0, None
    keeping = {trial.number for trial in state.keeping}
    for trial in state.trials:
        work += trial.seconds
        if trial.status == "evaluated" and trial.number in keeping and (best is None or state.rank(trial) < best):
            best = state.rank(trial)
            values = {name: _value(trial, name) for name in ("size_bytes", "accuracy_drop", "sqnr_db")}
            yield {"trial": trial.number, "work_seconds": round(work, 1), **values}


def _value(trial: Trial, name: str) -> float | None:
    metric = trial.worst(name)
    return None if metric is None else metric.value


def _table(document: Mapping[str, Any]) -> str:
    """One row per trial: its point, how far it came, and the numbers to plot."""
    text = io.StringIO()
    dimensions = list(document["space"])
    header = ["number", *dimensions, "status", *_MEASURED, "on_front", "reason"]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in document["trials"]:
        trial = trial_of(row)
        values = ["" if (value := _value(trial, name)) is None else f"{value:.10g}" for name in _MEASURED]
        on_front = int(trial.number in document["front"])
        points = [row["point"][name] for name in dimensions]
        writer.writerow([trial.number, *points, trial.status, *values, on_front, row["reason"] or ""])
    return text.getvalue()

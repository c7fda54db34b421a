"""A search as a person follows it: how far it is, the front so far, the best so far; and what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnxshrink.core.drift import IDENTICAL
from onnxshrink.core.report import Metric, Outcome
from onnxshrink.report.progress import PLAIN_SECONDS, LiveEvents, PlainEvents
from onnxshrink.report.terminal import format_bytes
from onnxshrink.search.attempt import PROBE_SAMPLES, Depth
from onnxshrink.search.constraints import judge
from onnxshrink.search.state import State
from onnxshrink.search.trial import Trial, describe, size_of, trial_of, trunk_of

_DOING: Mapping[Depth, str] = {"predict": "predicting", "probe": "probing", "evaluate": "measuring"}
_LIVE_ROWS, _ROWS = 6, 12

Clock: TypeAlias = Callable[[], float]


class LiveSearch(LiveEvents):
    """The state of a search above the bars; it goes when the finalists are measured. For terminals."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._state: State | None = None
        self._seen = 0.0
        super().__init__(console, above=self._above)

    def watch(self, state: State) -> None:
        """Show another state."""
        self._state, self._seen = state, self._clock()

    def started(self, step: str) -> None:
        """A bar: the search is over, its finalists are measured."""
        self._state = None
        super().started(step)

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """A line, but for what the search has just made."""
        if not cached:
            super().finished(step, seconds, cached=cached)

    def _above(self) -> Iterator[RenderableType]:
        state = self._state
        if state is not None:
            yield _panel(state, max(0.0, state.seconds_left - (self._clock() - self._seen)))


class PlainSearch(PlainEvents):
    """A line for each model that was measured fully, and now and then one for the whole; for logs and pipes."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        super().__init__(console, clock)
        self._told: set[int] | None = None
        self._next = clock()

    def watch(self, state: State) -> None:
        """Lines for what is new since the last state."""
        if self._told is None:
            self._told = {trial.number for trial in state.trials}
            if self._told:
                self._line(f"search goes on from {len(self._told)} trials that are known")
        for trial in state.trials:
            if trial.number not in self._told and trial.status in ("evaluated", "failed"):
                self._line(f"trial {trial.number}: {_told(state, trial)}")
        self._told |= {trial.number for trial in state.trials}
        if state.at_work and self._clock() >= self._next:
            self._next = self._clock() + PLAIN_SECONDS
            best = "none keeps every limit yet" if state.best is None else f"best {_told(state, state.best)}"
            self._line(f"{_extent(state)}, {_minutes(state.seconds_left)} left; {best}; {_now(state)}")

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """A line, but for what the search has just made."""
        if not cached:
            super().finished(step, seconds, cached=cached)


def search_listener(console: Console) -> AbstractContextManager[Any]:
    """The listener with ``watch`` that fits where ``console`` writes to; use it as a context manager."""
    return LiveSearch(console) if console.is_terminal else nullcontext(PlainSearch(console))


def print_search(document: Mapping[str, Any], console: Console) -> None:
    """Print what a search came to: how much was tried, the front, and what each model of it is.

    Args:
        document: ``search.json``, as `onnxshrink.search.document.read_search` gives it.
        console: Where to.
    """
    rows = {row["number"]: row for row in document["trials"]}
    shown = sorted({*document["front"], *document["finalists"]}, key=lambda number: size_of(trial_of(rows[number])))
    counts = document["counts"]
    told = [
        f"{counts['evaluated']} measured fully",
        f"{counts['probed']} on {PROBE_SAMPLES} samples at most",
        f"{counts['predicted']} by their bytes alone" if counts["predicted"] else "",
        f"{counts['failed']} could not be made" if counts["failed"] else "",
    ]
    console.print()
    console.print(
        f"tried {sum(counts.values())} of {document['n_points']} models: {', '.join(filter(None, told))}",
        highlight=False,
    )
    trials = {number: trial_of(rows[number]) for number in shown[:_ROWS]}
    table = _table(
        list(trials.values()),
        best=document["winner"],
        title="the front",
        words=lambda trial: _named(rows[trial.number]),
        standing=lambda trial: _standing(rows[trial.number], on_front=trial.number in document["front"]),
    )
    console.print(table)
    if len(shown) > _ROWS:
        console.print(Text(f"… and {len(shown) - _ROWS} more in search.json", style="dim"))


def _table(
    trials: Sequence[Trial],
    *,
    best: int | None,
    title: str,
    words: Callable[[Trial], str],
    standing: Callable[[Trial], Text],
) -> Table:
    """A row for each trial: size, quality, latency where it is known, what it is, and which limits it breaks."""
    drops = [drop for trial in trials if (drop := trial.worst("accuracy_drop"))]
    headers = ["", "size", "drop pt" if any(map(_is_ratio, drops)) else "drop", "dB", "vs ref", title, ""]
    rows = [[*_figures(trial), _latency(trial)] for trial in trials]
    used = [any(row[column] for row in rows) for column in range(len(rows[0]))]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for header, is_used in zip(headers, (True, *used, True, True), strict=True):
        if is_used:
            is_number = header not in ("", title)
            table.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for trial, row in zip(trials, rows, strict=True):
        is_best = trial.number == best
        figures = [figure for figure, is_used in zip(row, used, strict=True) if is_used]
        name = Text(words(trial), style="bold green" if is_best else "")
        table.add_row("▸" if is_best else " ", *figures, name, standing(trial))
    return table


def _panel(state: State, seconds_left: float) -> RenderableType:
    """The search so far, in at most ten lines of a terminal."""
    best = state.best
    head = Text(f"search  {_extent(state)}, {_minutes(seconds_left)} left", overflow="ellipsis", no_wrap=True)
    now = Text(f"        {_now(state)}", style="dim", overflow="ellipsis", no_wrap=True)
    if not state.front:
        return Group(head, now)
    at = state.front.index(best) if best in state.front else 0
    first = max(0, min(at - _LIVE_ROWS // 2, len(state.front) - _LIVE_ROWS))
    table = _table(
        state.front[first : first + _LIVE_ROWS],
        best=None if best is None else best.number,
        title="the front so far",
        words=lambda trial: describe(trial.point),
        standing=lambda trial: Text(limits := _broken(state, trial), style=_style(limits)),
    )
    lines: list[RenderableType] = [head, now, table]
    if best is None:
        lines.append(Text("no model keeps every limit yet", style="yellow"))
    return Group(*lines)


def _extent(state: State) -> str:
    counts = state.counts
    tried = counts["evaluated"] + counts["probed"] + counts["failed"]
    if not tried:
        return f"{counts['predicted']} of {state.n_points} models predicted, none made yet"
    return f"{tried} of {state.n_points} models tried ({counts['evaluated']} fully), about {state.n_left} to go"


def _now(state: State) -> str:
    if not state.at_work:
        return "the models left over are measured against each other"
    first, *others = state.at_work
    return f"{_DOING[first.depth]} {describe(first.point)}" + (f" and {len(others)} more" if others else "")


def _told(state: State, trial: Trial) -> str:
    """``width 16, fp16: 7.6 kB, drop +0.4 pt, 22.1 dB, keeps every limit``."""
    if trial.status == "failed":
        return f"{describe(trial.point)} could not be made: {trial.reason}"
    size, drop, sqnr = _figures(trial)
    unit = " pt" if _is_ratio(trial.worst("accuracy_drop")) else ""
    near = f"{sqnr} dB" if sqnr[-1:].isdigit() else sqnr and f"outputs {sqnr}"
    figures = ", ".join(filter(None, (size, drop and f"drop {drop}{unit}", near)))
    return f"{describe(trial.point)}: {figures}, {_broken(state, trial) or 'keeps every limit'}"


def _broken(state: State, trial: Trial) -> str:
    """The limits that a trial breaks, as far as no clock decides; or else those that nobody knows it to keep."""
    return _limits(judge(state.budget, trial, timed=False))


def _limits(outcomes: Mapping[str, Outcome]) -> str:
    for outcome, words in (("failed", "breaks"), ("inconclusive", "inconclusive:")):
        if names := [name for name, found in outcomes.items() if found == outcome]:
            return f"{words} {', '.join(names)}"
    return ""


def _style(limits: str) -> str:
    return "red" if limits.startswith("breaks") else "yellow"


def _standing(row: Mapping[str, Any], *, on_front: bool) -> Text:
    """What becomes of a row's limits."""
    if limits := _limits(row["limits"]):
        return Text(limits, style=_style(limits))
    if not on_front:
        return Text("not on the front", style="dim")
    return Text("")


def _named(row: Mapping[str, Any]) -> str:
    """The name of a trial in the report, and what its trunk is."""
    trunk = describe(trunk_of(row["point"]))
    return f"{row['name']}: {trunk}" if trunk else str(row["name"])


def _figures(trial: Trial) -> tuple[str, str, str]:
    """Size, accuracy drop and SQNR."""
    drop, sqnr = trial.worst("accuracy_drop"), trial.worst("sqnr_db")
    lost = ""
    if drop is not None and drop.value is not None:
        lost = f"{100 * drop.value:+.1f}" if _is_ratio(drop) else f"{drop.value:+.3g}"
    near = "" if sqnr is None else f"{sqnr.value:.1f}" if sqnr.value is not None else sqnr.note or "n/a"
    return format_bytes(size_of(trial)), lost, "same" if IDENTICAL in near else near


def _latency(trial: Trial) -> str:
    ratio = trial.worst("latency_ratio")
    return "" if ratio is None or ratio.value is None else f"{ratio.value:.2f}"


def _is_ratio(metric: Metric | None) -> bool:
    return metric is not None and metric.unit == "ratio"


def _minutes(seconds: float) -> str:
    """``3:40 min``, or seconds below a minute."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02} h"

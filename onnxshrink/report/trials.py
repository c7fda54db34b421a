"""The section that shows how a search went: what it came to, what it tried, and when it found something better.

It reads ``search.json`` of this or any earlier version; what that does not tell is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from onnxshrink.report.blocks import Block, Figure, Note, Section, plain, table, text
from onnxshrink.report.figures import Point, scatter
from onnxshrink.report.terminal import format_bytes
from onnxshrink.search.wording import say

_MOST_LABELS = 8


def search(found: Mapping[str, Any] | None) -> Section:
    """What a search asked for, came to and tried.

    Args:
        found: ``search.json``, or None where no search made the run.
    """
    known = found or {}
    trials = [_trial(trial) for trial in known.get("trials") or () if isinstance(trial, Mapping)]
    if not trials:
        return Section("search", "Search", ())
    blocks: list[Block] = [Note(str(known["selection"]))] if known.get("selection") else []
    blocks += _relaxed(known, {trial.number: trial for trial in trials})
    blocks += _drawn(trials, known)
    blocks += _history(known, {trial.number: trial for trial in trials})
    rows = [
        (
            text(trial.number), text(trial.point, "code"), text(trial.status),
            text("" if trial.size is None else format_bytes(trial.size), "num"), text(trial.said_drop, "num"),
            text("" if trial.sqnr is None else f"{trial.sqnr:.1f} dB", "num"),
            text("" if trial.ratio is None else f"{trial.ratio:.2f}", "num"), text(trial.limits), text(trial.reason),
        )
        for trial in trials
    ]  # fmt: skip
    headers = (
        "number", "tried", "status", "size", "accuracy drop", "lowest SQNR", "latency ratio", "limits it breaks",
        "reason",
    )  # fmt: skip
    blocks.append(table(_counted(known, len(trials)), headers, rows, folded=True))
    return Section("search", "Search", tuple(blocks))


class _Trial(NamedTuple):
    """A trial; of several targets and outputs the worst figures."""

    number: Any
    point: str
    status: str
    size: float | None
    drop: float | None
    said_drop: str
    sqnr: float | None
    ratio: float | None
    limits: str
    reason: str


def _trial(found: Mapping[str, Any]) -> _Trial:
    metrics = [metric for metric in found.get("metrics") or () if isinstance(metric, Mapping)]

    def worst(name: str, pick: Callable[[list[float]], float]) -> float | None:
        values = [m["value"] for m in metrics if m.get("name") == name and m.get("value") is not None]
        return pick(values) if values else None

    drop = worst("accuracy_drop", max)
    is_ratio = any(m.get("name") == "accuracy_drop" and m.get("unit") == "ratio" for m in metrics)
    point = found.get("point")
    items = point.items() if isinstance(point, Mapping) else ()
    tried = found.get("label") or ", ".join(f"{name}={value}" for name, value in items) or plain(point)
    limits = found.get("limits")
    broken = [name for name, outcome in limits.items() if outcome == "failed"] if isinstance(limits, Mapping) else []
    return _Trial(
        number=found.get("number"),
        point=f"{tried} ({found['name']})" if found.get("name") else str(tried),
        status=str(found.get("status")),
        size=worst("size_bytes", max),
        drop=drop,
        said_drop="" if drop is None else f"{100 * drop:+.2f} pt" if is_ratio else f"{drop:+.3g}",
        sqnr=worst("sqnr_db", min),
        ratio=worst("latency_ratio", max),
        limits=", ".join(map(str, broken)),
        reason=str(found.get("reason") or ""),
    )


def _relaxed(known: Mapping[str, Any], trials: Mapping[Any, _Trial]) -> Iterator[Block]:
    """The limits that would have to give, and how far, for which model."""
    rows = [
        (
            text(miss.get("limit"), "code"), text(_said(miss, "asked"), "num"), text(_said(miss, "needed"), "num"),
            text(trials[near["trial"]].point, "code"),
        )
        for near in known.get("nearest") or ()
        if isinstance(near, Mapping) and near.get("trial") in trials
        for miss in near.get("misses") or ()
        if isinstance(miss, Mapping)
    ]  # fmt: skip
    if rows:
        yield table("What to relax, the least first", ("limit", "asked for", "needed", "for the model"), rows)


def _said(miss: Mapping[str, Any], key: str) -> str:
    """A limit as a config has it; what is needed is rounded so that it suffices."""
    value, limit = miss.get(key), str(miss.get("limit"))
    if not isinstance(value, int | float):
        return "not known"
    return say(limit, value, up=None if key == "asked" else not limit.startswith("min_"))


def _drawn(trials: Sequence[_Trial], known: Mapping[str, Any]) -> Iterator[Figure]:
    """Size against what it costs: accuracy, or closeness to the reference where that was not scored."""
    front, winner = set(known.get("front") or ()), known.get("winner")
    for axis, values, said in (
        ("accuracy drop", [trial.drop for trial in trials], {t.drop: t.said_drop for t in trials}),
        ("lowest SQNR", [trial.sqnr for trial in trials], {t.sqnr: f"{t.sqnr or 0:.1f} dB" for t in trials}),
    ):
        pairs = [(t, t.size, v) for t, v in zip(trials, values, strict=True) if t.size and v is not None]
        if len(pairs) < 2:
            continue
        shown = [t.number for t, _, _ in pairs if t.number in front or t.number == winner][:_MOST_LABELS]
        points = [
            Point(
                str(trial.number) if trial.number in shown else "", size, value, None, trial.number in front,
                f"{trial.number}, {trial.point}: {format_bytes(size)}, {axis} {said[value]}, {trial.status}",
            )
            for trial, size, value in pairs
        ]  # fmt: skip
        words = "{:.3g} dB".format if axis != "accuracy drop" else _points(said)
        title = f"Trials of the search: size and {axis}, those on the front filled and with their numbers"
        yield Figure(title, scatter(points, title, names=("size", axis), said=(format_bytes, words), alike=True))
        return


def _points(said: Mapping[float | None, str]) -> Callable[[float], str]:
    """How an axis of accuracy drops is written: as the drops are."""
    return (lambda v: f"{100 * v:+.3g} pt") if any(" pt" in words for words in said.values()) else "{:+.3g}".format


def _history(known: Mapping[str, Any], trials: Mapping[Any, _Trial]) -> Iterator[Block]:
    """Whenever a trial became the best one."""
    rows = [
        (
            text(one.get("trial")), text(trials[one["trial"]].point, "code"),
            text("" if one.get("work_seconds") is None else f"{one['work_seconds']:.1f} s", "num"),
            text("" if one.get("size_bytes") is None else format_bytes(one["size_bytes"]), "num"),
            text(trials[one["trial"]].said_drop, "num"),
            text("" if one.get("sqnr_db") is None else f"{one['sqnr_db']:.1f} dB", "num"),
        )
        for one in known.get("history") or ()
        if isinstance(one, Mapping) and one.get("trial") in trials
    ]  # fmt: skip
    if rows:
        headers = ("number", "tried", "work until then", "size", "accuracy drop", "lowest SQNR")
        yield table("The best so far, whenever there was a better one", headers, rows)


def _counted(known: Mapping[str, Any], n_trials: int) -> str:
    counts = known.get("counts")
    words = ", ".join(f"{n} {name}" for name, n in counts.items() if n) if isinstance(counts, Mapping) else ""
    whole = "" if known.get("is_whole", True) else "; the search ended before all was tried"
    points = f" of {known['n_points']} models" if isinstance(known.get("n_points"), int) else ""
    return f"{n_trials} trials{points}{f': {words}' if words else ''}{whole}"

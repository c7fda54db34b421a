"""The sections that show what shrinking brought and cost: sizes, trade-offs, latency and packages.

Each gives no blocks where its evidence is missing, as in reports of older versions, and then the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from onnxshrink.core.report import Candidate, Metric, Report, Step
from onnxshrink.report.blocks import (
    Block,
    Cell,
    Figure,
    Note,
    Section,
    Table,
    measured,
    plain,
    said,
    table,
    text,
    topic,
)
from onnxshrink.report.figures import Bar, Point, Ridge, bars, is_dominated, ridges, scatter
from onnxshrink.report.next_steps import ranked
from onnxshrink.report.summary import baseline_of, in_detail, on, targets_of, worst_sqnr
from onnxshrink.report.terminal import format_bytes, format_count, task_metric

_NAMES = {"prune_channels": "pruned channels", "export": "fp32 ONNX", "optimize": "optimized ONNX"}
_MOST_LABELS = 8
_WITHIN = "▸"
"""Stands in the names of steps that served another one."""


def sizes(report: Report) -> Section:
    """From what was brought to the winner, step by step."""
    rows = list(_sizes(report))
    if len(rows) < 2:
        return Section("sizes", "Where the bytes went", ())
    drawn = [
        Bar(name, size, format_bytes(size), rows[i - 1][1] if i else None) for i, (name, size, _) in enumerate(rows)
    ]
    cells = [
        (text(name), Cell((f"{size:,.0f}",), "num"), text(f"{size / rows[0][1]:.1%}", "num"), text(origin))
        for name, size, origin in rows
    ]
    title = f"Size from {rows[0][0]}, {format_bytes(rows[0][1])}, to {rows[-1][0]}, {format_bytes(rows[-1][1])}"
    shown = Table(title, ("model", "bytes", "of the first", "from"), tuple(cells))
    return Section("sizes", "Where the bytes went", (Figure(title, bars(drawn, title), shown),))


def trade_offs(report: Report) -> Section:
    """Size against accuracy, or drift where there is no accuracy, and against latency."""
    blocks: list[Block] = []
    for target in targets_of(report):
        rows = [row for row in report.candidates if row.role != "original" and on(row, "size_bytes", target)]
        metric = task_metric(report)
        judged = [(row, on(row, metric, target) if metric else worst_sqnr(row, target)) for row in rows]
        timed = [(row, on(row, "latency_ratio", target)) for row in rows]
        where = f" on {target}" if target else ""
        name = metric or "lowest SQNR"
        chosen = report.winner
        blocks += _scatter(judged, f"Size and {name}{where}", name, target, winner=chosen)
        blocks += _scatter(timed, f"Size and latency ratio{where}", "latency ratio", target, winner=chosen, level=1.0)
    return Section("trade-offs", "Trade-offs", tuple(blocks))


def latency(report: Report) -> Section:
    """Every pair of every candidate, and how it was timed."""
    blocks: list[Block] = []
    chosen, others = in_detail(report)
    targets = dict.fromkeys(name for row in report.candidates for name in topic(row, "latency"))
    for target in targets:
        rows = [row for row in report.candidates if target in topic(row, "latency") and row.name != "reference"]
        close = [row for row in rows if row.role != "variant" or row in chosen]
        pairs = [(row, *_times(row.details["latency"][target])) for row in close]
        pairs = [(row, ours, theirs) for row, ours, theirs in pairs if ours.size and ours.size == theirs.size]
        if not pairs:
            continue
        title = f"Latency of each pair on {target}, candidate over reference"
        found = [
            _ridge(row, "latency_ratio", ours / np.maximum(theirs, 1.0), target, 1.0) for row, ours, theirs in pairs
        ]
        blocks.append(
            Figure(
                title,
                ridges(found, title, axis="ratio; below 1 is faster", said="{:.3g}".format, level=1.0),
                _timing(rows, target),
            )
        )
        title = f"Milliseconds of each call on {target}"
        found = [_ridge(row, "latency_p50_ms", ours, target, 1e-6) for row, ours, _ in pairs]
        blocks.append(Figure(title, ridges(found, title, axis="ms", said="{:.3g}".format)))
        blocks.append(Note(_protocol(rows[0].details["latency"][target])))
    return Section("latency", "Latency", (*others, *blocks) if blocks else ())


def package(report: Report) -> Section:
    """The ``.ort`` files beside a model: what they weigh, how far they are from it, and how fast they run."""
    rows = []
    for row in report.variants:
        times: list[tuple[str, Any]] = list(topic(row, "package_times").items()) or [("", {})]
        for style, found in topic(row, "package").items():
            about = (text(row.name), text(found.get("file"), "code"), text(format_bytes(found.get("size_bytes") or 0)))
            drift = text(_worst_output(found.get("outputs") or {}))
            for target, timed in times:
                own = (timed.get("files") or {}).get(style) or {}
                ratio = own.get("latency_ratio") or {}
                words = f"{ratio['value']:.2f} ({plain(ratio.get('lo'))} … {plain(ratio.get('hi'))})" if ratio else ""
                loads = [text(_ms(side.get("load_ms"))) for side in (own, timed.get("onnx") or {})]
                rows.append((*about, drift, text(target), *loads, text(words)))
    headers = ("model", "file", "size", "SQNR to the .onnx file", "target", "load", "load of .onnx", "latency to .onnx")
    title = "Files for the edge, against the .onnx file that they were made of"
    blocks = (table(title, headers, rows), *_devices(report)) if rows else ()
    return Section("package", "Package", blocks)


def _devices(report: Report) -> Iterator[Table]:
    """What the stage found that phones and other processors make of each packaged model."""
    rows = []
    for row in report.variants:
        names = (f"{row.name}/package_ort", "package_ort")
        facts = next((step.facts for name in names for step in report.steps if step.name == name), None)
        if facts is None or not topic(row, "package"):
            continue
        for found in facts.get("mobile") or ():
            suits, if_fixed = found.get("suits"), found.get("suits_if_fixed")
            words = f"{suits}" if suits == if_fixed else f"{suits}; {if_fixed} with fixed shapes"
            rows.append((text(row.name), text(found.get("provider"), "code"), text(words)))
        for file in (facts.get("files") or {}).values():
            for name, words in (file.get("instruction_sets") or {}).items():
                if isinstance(words, str):
                    rows.append((text(row.name), text(f"{file.get('file')}, {name}", "code"), text(words)))
        operators = f"{plain(len(facts.get('operators') or ()))}, listed in {facts.get('required')}"
        rows.append((text(row.name), text("operators of a reduced build"), text(operators)))
    if rows:
        title = "What devices make of them: accelerators by ONNX Runtime's estimate, not tried on a phone"
        yield table(title, ("model", "what", "found"), rows, folded=True)


def _sizes(report: Report) -> Iterator[tuple[str, float, str]]:
    """Model, bytes, and where the figure is from; steps that change nothing are left out."""
    rows: list[tuple[str, float, str]] = []
    base = baseline_of(report)
    if base and base.role == "original" and _size(base) < float("inf"):
        rows.append((base.name, _size(base), "its ONNX file"))
    winner = next((row for row in ranked(report) if _size(row) < float("inf")), None)
    names = dict(_NAMES) | ({"source": "student"} if any(step.kind == "distill" for step in report.steps) else {})
    for step in report.steps:
        branch, _, kind = step.name.rpartition("/")
        if (
            _WITHIN not in step.name
            and step.kind != "package_ort"
            and (not branch or (winner and branch == winner.name))
        ):
            found = _size_after(step)
            if found is not None:
                rows.append((names.get(kind, kind), *found))
    if winner and _size(winner) < float("inf"):
        while rows and rows[-1][1] == _size(winner):  # the stage that made it; its name says more
            rows.pop()
        rows.append((winner.name, _size(winner), "its ONNX file"))
    for before, row in pairwise([None, *rows]):
        if row is not None and (before is None or before[1] != row[1]):
            yield row


def _size_after(step: Step) -> tuple[float, str] | None:
    for key in ("size_bytes", "bytes_after", "bytes"):
        if isinstance(step.facts.get(key), (int, float)):
            return float(step.facts[key]), f"{step.kind}, {key}"
    for key in ("parameters_after", "parameters"):
        if isinstance(step.facts.get(key), (int, float)):
            return 4.0 * step.facts[key], f"{step.kind}, 4 bytes for each of {format_count(step.facts[key])} parameters"
    return None


def _size(row: Candidate) -> float:
    metric = row.metric("size_bytes")
    return metric.value if metric and metric.value is not None else float("inf")


def _scatter(
    rows: list[tuple[Candidate, Metric | None]],
    title: str,
    axis: str,
    target: str | None,
    *,
    winner: str | None,
    level: float | None = None,
) -> Iterator[Figure]:
    found = [(row, m) for row, m in rows if m is not None and m.value is not None and _size(row) > 0]
    if len(found) < 2:
        return
    sign = 1.0 if axis in ("latency ratio", "mae", "rmse") else -1.0
    judged = [(_size(row), sign * (m.value or 0.0)) for row, m in found]
    points = []
    cells = []
    for (row, m), own in zip(found, judged, strict=True):
        assert m.value is not None  # noqa: S101
        ends = (m.lo, m.hi) if m.lo is not None and m.hi is not None else None
        on_front = not is_dominated(own, judged)
        interval = f" ({said(m, ends[0])} to {said(m, ends[1])})" if ends else ""
        others = [on(row, name, target) for name in ("latency_ratio", "accuracy_drop", "integer_coverage")]
        more = [
            f"{o.name.replace('_', ' ')} {said(o, o.value)}" for o in others if o and o.value is not None and o is not m
        ]
        tip = "; ".join([f"{row.name}: {format_bytes(_size(row))}, {axis} {said(m, m.value)}{interval}", *more])
        points.append(Point(row.name, _size(row), m.value, ends, on_front, tip))
        front = text("on the front" if on_front else "another is no worse in both")
        cells.append((text(row.name), measured(row, row.metric("size_bytes")), measured(row, m), front))
    points = _labelled(points, winner)
    drawn = scatter(points, title, names=("size", axis), said=(format_bytes, _said_as(found[0][1])), level=level)
    yield Figure(title, drawn, table(title, ("model", "size", axis, "front"), cells))


def _labelled(points: list[Point], winner: str | None) -> list[Point]:
    """All with their names, or where those would lie on each other, the winner and some of the front."""
    if len(points) <= _MOST_LABELS:
        return points
    wanted = sorted(points, key=lambda point: (point.name != winner, not point.on_front))[:_MOST_LABELS]
    kept = {point.name for point in wanted if point.on_front or point.name == winner}
    return [point if point.name in kept else replace(point, name="") for point in points]


def _said_as(metric: Metric) -> Any:
    def words(value: float) -> str:
        return said(metric, value)

    return words


def _times(found: Mapping[str, Any]) -> tuple[Any, Any]:
    """Candidate's and reference's nanoseconds, each ``(n_pairs,)`` float64."""
    sides = (found.get("candidate_ns") or (), found.get("reference_ns") or ())
    ours, theirs = (np.asarray([ns for of_round in side for ns in of_round], np.float64) for side in sides)
    return ours, theirs


def _ridge(row: Candidate, name: str, values: Any, target: str, factor: float) -> Ridge:
    metric = on(row, name, target)
    middle = metric.value if metric else None
    ends = (metric.lo, metric.hi) if metric and metric.lo is not None and metric.hi is not None else None
    tip = f"{row.name}: {plain(middle)}" + (f" ({ends[0]:.4g} to {ends[1]:.4g})" if ends else "")
    return Ridge(row.name, values * factor, middle, ends, f"{tip}, {values.size:,} pairs drawn")


def _timing(rows: list[Candidate], target: str) -> Table:
    names = (
        ("median", "latency_p50_ms"), ("95th percentile", "latency_p95_ms"),
        ("reference, median", "reference_latency_p50_ms"), ("ratio", "latency_ratio"),
        ("ratio by CPU time", "latency_cpu_ratio"), ("pairs", "latency_pairs"),
    )  # fmt: skip
    cells = [(text(row.name), *(measured(row, on(row, name, target)) for _, name in names)) for row in rows]
    return table(f"Latency on {target}, with 95% intervals", ("model", *(title for title, _ in names)), cells)


def _protocol(found: Mapping[str, Any]) -> str:
    parts = [f"{found.get('provider')}, threads: {found.get('threads')}", f"inputs {plain(found.get('inputs'))}"]
    parts.append("reference and candidate were called in turn, in rounds with freshly opened sessions")
    return "Measured on " + "; ".join(parts) + ". The marked point is the median, the bar its 95% interval."


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _worst_output(outputs: Mapping[str, Any]) -> str:
    known = [output["sqnr_db"] for output in outputs.values() if output.get("sqnr_db") is not None]
    return f"{min(known):.1f} dB" if known else "identical" if outputs else ""

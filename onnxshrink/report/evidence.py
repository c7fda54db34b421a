"""The sections that show what was measured on the models: sizes, trade-offs, latency, drift, coverage and ranges.

Each gives no blocks where its evidence is missing, as in reports of older versions, and then the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from onnxshrink.core.report import Candidate, Metric, Report, Step
from onnxshrink.report.blocks import (
    Block,
    Cell,
    Figure,
    Gallery,
    Note,
    Picture,
    Section,
    Table,
    measured,
    plain,
    said,
    table,
    text,
)
from onnxshrink.report.figures import Bar, Point, Ridge, bars, histogram, is_dominated, ridges, scatter, stack
from onnxshrink.report.summary import baseline_of, on, targets_of, worst_sqnr
from onnxshrink.report.terminal import format_bytes, format_count, task_metric

_NAMES = {"prune_channels": "pruned channels", "export": "fp32 ONNX", "optimize": "optimized ONNX"}
_WITHIN = "▸"
"""Stands in the names of steps that served another one."""
_MAX_HISTOGRAMS = 12
_MAX_BARS = 10
_PNG = "data:image/png;base64,"


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
        blocks += _scatter(judged, f"Size and {name}{where}", name, target, None)
        blocks += _scatter(timed, f"Size and latency ratio{where}", "latency ratio", target, 1.0)
    return Section("trade-offs", "Trade-offs", tuple(blocks))


def latency(report: Report) -> Section:
    """Every pair of every candidate, and how it was timed."""
    blocks: list[Block] = []
    targets = dict.fromkeys(name for row in report.candidates for name in _topic(row, "latency"))
    for target in targets:
        rows = [row for row in report.candidates if target in _topic(row, "latency") and row.name != "reference"]
        pairs = [(row, *_times(row.details["latency"][target])) for row in rows]
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
    return Section("latency", "Latency", tuple(blocks))


def drift(report: Report, pictures: Mapping[str, str]) -> Section:
    """Each output against the reference's, where the difference is from, and the samples that it meets worst.

    Args:
        report: Of any version.
        pictures: By sample number, a PNG as a data URI.
    """
    blocks: list[Block] = []
    rows = []
    for row in report.variants:
        for base in (m for m in row.metrics if m.name == "sqnr_db"):
            of = {m.name: m for m in row.metrics if (m.target, m.output) == (base.target, base.output)}
            names = (
                "max_abs_error",
                "rmse_error",
                "cosine",
                "top1_agreement",
                "quantization_sqnr_db",
                "kernel_sqnr_db",
            )
            cells = [measured(row, of.get(name)) for name in names]
            first = measured(row, base) if base.value is not None else text(base.note or "", "num")
            rows.append((text(row.name), text(base.output, "code"), text(base.target), first, *cells))
    if rows:
        headers = (
            "model", "output", "target", "SQNR", "largest error", "RMSE", "cosine", "same top-1",
            "SQNR, quantization alone", "SQNR, kernels alone",
        )  # fmt: skip
        blocks.append(table("Drift of each output against the reference's", headers, rows))
    blocks += [Note(line) for line in _splits(report)]
    for row in report.variants:
        blocks += _nodes(row)
    for row in report.variants:
        blocks += _worst(row, pictures)
    return Section("drift", "Drift", tuple(blocks))


def coverage(report: Report) -> Section:
    """How much of each model runs in integers, where the float islands are, and why."""
    blocks: list[Block] = []
    for row in report.variants:
        for target in targets_of(report):
            metric = on(row, "integer_coverage", target)
            if metric is None or metric.value is None:
                continue
            found = _topic(row, "coverage").get(target or "")
            segments = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
            if metric.value or segments:
                blocks += _covered(row, metric, segments)
    return Section("coverage", "Integer coverage", tuple(blocks))


def ranges(report: Report) -> Section:
    """Histograms of weights and activations with what was chosen of them; those that clip most are drawn."""
    blocks: list[Block] = []
    for row in report.variants:
        found = {name: value for name, value in _topic(row, "ranges").items() if isinstance(value, dict)}
        if not found:
            continue
        cells = [
            (
                text(name, "code"), text(value.get("kind")),
                *(text(plain(value.get(key)), "num") for key in ("lo", "hi", "scale", "scales")),
                text(f"{value.get('clipped_ratio') or 0.0:.3%}", "num"), text(plain(value.get("sqnr_db")), "num"),
            )
            for name, value in found.items()
        ]  # fmt: skip
        headers = ("tensor", "kind", "from", "to", "largest scale", "scales", "clipped", "SQNR in dB")
        shown = Table(f"Chosen ranges of {row.name}, the worst first", headers, tuple(cells))
        for i, (name, value) in enumerate([*found.items()][:_MAX_HISTOGRAMS]):
            if value.get("counts") and len(value.get("edges") or ()) == len(value["counts"]) + 1:
                clipped = f"{value.get('clipped_ratio') or 0.0:.3%} clipped"
                title = f"{row.name}: {value.get('kind') or 'values'} {name}, {clipped}"
                chosen = (float(value["lo"]), float(value["hi"]))
                drawn = histogram(
                    value["edges"], value["counts"], chosen, title, 0 if value.get("kind") == "weight" else 1
                )
                blocks.append(Figure(title, drawn, shown if i == 0 else None))
        if not any(block.kind == "figure" and block.table is shown for block in blocks):
            blocks.append(shown)
    return Section("ranges", "Ranges", tuple(blocks))


def _sizes(report: Report) -> Iterator[tuple[str, float, str]]:
    """Model, bytes, and where the figure is from; steps that change nothing are left out."""
    rows: list[tuple[str, float, str]] = []
    base = baseline_of(report)
    if base and base.role == "original" and _size(base) < float("inf"):
        rows.append((base.name, _size(base), "its ONNX file"))
    winner = next((row for row in report.variants if row.name == report.winner), None)
    winner = winner or min(report.variants, key=_size, default=None)
    names = dict(_NAMES) | ({"source": "student"} if any(step.kind == "distill" for step in report.steps) else {})
    for step in report.steps:
        branch, _, kind = step.name.rpartition("/")
        if _WITHIN not in step.name and (not branch or (winner and branch == winner.name)):
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
    rows: list[tuple[Candidate, Metric | None]], title: str, axis: str, target: str | None, level: float | None
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
    drawn = scatter(points, title, names=("size", axis), said=(format_bytes, _said_as(found[0][1])), level=level)
    yield Figure(title, drawn, table(title, ("model", "size", axis, "front"), cells))


def _said_as(metric: Metric) -> Any:
    def words(value: float) -> str:
        return said(metric, value)

    return words


def _topic(row: Candidate, name: str) -> Mapping[str, Any]:
    found = row.details.get(name)
    return found if isinstance(found, Mapping) else {}


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


def _splits(report: Report) -> Iterator[str]:
    for row in report.variants:
        for target, found in _topic(row, "drift_split").items():
            if not isinstance(found, Mapping):
                continue
            if "declined" in found:
                yield f"{row.name} on {target}: quantization and kernel error were not told apart: {found['declined']}."
            elif found.get("not_covered"):
                yield f"{row.name} on {target}: the split leaves out {plain(found['not_covered'])}."


def _nodes(row: Candidate) -> Iterator[Block]:
    """Where the error is born: what each node does to the outputs, the worst first."""
    found = _topic(row, "nodes")
    if found.get("declined"):
        yield Note(f"{row.name}: nobody looked at single nodes: {found['declined']}.")
    nodes = [node for node in found.get("nodes") or () if isinstance(node, Mapping)]
    if not nodes:
        return
    shares = [(str(node.get("node")), float(node.get("noise_ratio") or 0.0)) for node in nodes]
    title = f"{row.name}: where the error is born, each node's share of the noise at the outputs"
    keys = ("local_sqnr_db", "propagated_sqnr_db", "output_sqnr_db")
    cells = [
        (
            text(node.get("node"), "code"), text(node.get("op_type")), text(f"{share:.1%}", "num"),
            *(text("no error" if node.get(key) is None else f"{node[key]:.1f} dB", "num") for key in keys),
            text(node.get("text")), text(node.get("change")),
        )
        for node, (_, share) in zip(nodes, shares, strict=True)
    ]  # fmt: skip
    headers = (
        "node", "operator", "share of the noise", "SQNR with float inputs", "SQNR as it runs",
        "SQNR of the outputs, this node alone", "cause", "what to change",
    )  # fmt: skip
    drawn = [Bar(name, share, f"{share:.1%}") for name, share in shares[:_MAX_BARS]]
    yield Figure(title, bars(drawn, title, number=4), table(title, headers, cells))


def _worst(row: Candidate, pictures: Mapping[str, str]) -> Iterator[Block]:
    for target, outputs in _topic(row, "worst_samples").items():
        for output, samples in outputs.items() if isinstance(outputs, Mapping) else ():
            if not samples:
                continue
            cells = [
                (
                    text(f"sample {sample.get('sample')}"),
                    *(text(plain(sample.get(key)), "num") for key in ("relative_l2", "max_abs_error", "sqnr_db")),
                )
                for sample in samples
            ]
            title = f"Worst samples of {row.name} on {target}, output {output}"
            numbers = [(str(sample.get("sample")), sample) for sample in samples]
            shown = tuple(
                Picture(f"{number}: {plain(sample.get('sqnr_db'))} dB", pictures[number])
                for number, sample in numbers
                if pictures.get(number, "").startswith(_PNG)
            )
            if shown:
                yield Gallery(title, shown)
            yield table(title, ("sample", "relative error", "largest error", "SQNR in dB"), cells, folded=True)


def _covered(row: Candidate, metric: Metric, segments: list[Mapping[str, Any]]) -> Iterator[Block]:
    assert metric.value is not None  # noqa: S101
    share = metric.value
    where = f" on {metric.target}" if metric.target else ""
    title = f"{row.name}{where}: {share:.1%} of the multiply-accumulates run in integers"
    summed = [
        ("integer", share, f"integer kernels: {share:.1%}", "c2"),
        ("float", 1 - share, f"float: {1 - share:.1%}", "c4"),
    ]
    headers = ("stretch", "nodes", "operators", "MACs of all", "of them in integers")
    rows = [
        (
            text(f"{i} {one.get('kind')}"), text(plain(one.get("nodes")), "num"),
            text(plain(one.get("op_types") or "")), text(f"{one.get('macs_ratio') or 0.0:.1%}", "num"),
            text(f"{one.get('integer_macs_ratio') or 0.0:.1%}", "num"),
        )
        for i, one in enumerate(segments, 1)
    ]  # fmt: skip
    shown = Table(f"{title}: the graph in the order it runs", headers, tuple(rows)) if rows else None
    yield Figure(title, stack(list(_stretches(segments)) or summed, title), shown)
    islands = {one["main_node"]: one for one in segments if one.get("main_node")}
    if islands:
        cells = [
            (text(name, "code"), text(plain(one.get("op_types") or "")), text(one.get("cause")), text(one.get("fix")))
            for name, one in islands.items()
        ]
        yield table(f"Float islands of {row.name}{where}", ("at", "operators", "cause", "what to change"), cells)
    elif metric.note:
        yield Note(f"{row.name}: {metric.note}")


def _stretches(segments: list[Mapping[str, Any]]) -> Iterator[tuple[str, float, str, str]]:
    """Parts of a bar, as wide as their multiply-accumulates; one that has none is a line."""
    if sum(one.get("macs_ratio") or 0.0 for one in segments) <= 0:
        return
    classes = {"integer": "c2", "float": "c4", "mixed": "c1"}
    for one in segments:
        kind, share = str(one.get("kind")), float(one.get("macs_ratio") or 0.0)
        cause = f"; {one['cause']}" if one.get("cause") else ""
        tip = f"{kind}: {plain(one.get('op_types') or '')}, {share:.1%} of the multiply-accumulates{cause}"
        yield kind, share, tip, classes.get(kind, "c6")

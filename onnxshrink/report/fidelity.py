"""The sections that show how true a model stayed: drift, where it is born, integer coverage and ranges.

Each gives no blocks where its evidence is missing, as in reports of older versions, and then the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxshrink.core.report import Candidate, Metric, Report
from onnxshrink.report.blocks import (
    Block,
    Figure,
    Gallery,
    Note,
    Picture,
    Section,
    Table,
    measured,
    plain,
    table,
    text,
    topic,
)
from onnxshrink.report.figures import Bar, bars, histogram, stack
from onnxshrink.report.summary import in_detail, on, targets_of

_MAX_HISTOGRAMS = 8
_HISTOGRAMS = (
    "How many values lie where, on a logarithmic height. Dashed lines are the ends of what the 8-bit grid holds; what "
    "lies beyond is clipped to them. The tensors that lose most come first."
)
_MAX_BARS = 10
_PNG = "data:image/png;base64,"


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
    chosen, others = in_detail(report)
    close = [*(Note(line) for line in _splits(chosen)), *(block for row in chosen for block in _nodes(row))]
    close += [block for row in chosen for block in _worst(row, pictures)]
    blocks += [*others, *close] if close else []
    return Section("drift", "Drift", tuple(blocks))


def coverage(report: Report) -> Section:
    """How much of each model runs in integers, where the float islands are, and why."""
    chosen, others = in_detail(report)
    blocks: list[Block] = []
    for row in chosen:
        for target in targets_of(report):
            metric = on(row, "integer_coverage", target)
            if metric is None or metric.value is None:
                continue
            found = topic(row, "coverage").get(target or "")
            segments = [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
            if metric.value or segments:
                blocks += _covered(row, metric, segments)
    return Section("coverage", "Integer coverage", (*others, *blocks) if blocks else ())


def ranges(report: Report) -> Section:
    """Histograms of weights and activations with what the grid holds of them; more of them of the winner."""
    chosen, others = in_detail(report)
    blocks: list[Block] = []
    for row in chosen:
        found = {name: value for name, value in topic(row, "ranges").items() if isinstance(value, dict)}
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
        shown = Table(f"Chosen ranges of {row.name}, the worst first", headers, tuple(cells), folded=True)
        for name, value in [*found.items()][: _MAX_HISTOGRAMS if row.name == report.winner else 4]:
            ends = (value.get("lo"), value.get("hi"))
            is_whole = None not in ends and len(value.get("edges") or ()) == len(value.get("counts") or ()) + 1
            if value.get("counts") and is_whole:
                ratio = value.get("clipped_ratio") or 0.0
                clipped = f"{ratio:.3%} clipped" if ratio else "nothing clipped"
                title = f"{row.name}: {value.get('kind') or 'values'} {name}, {clipped}"
                held = (float(value["lo"]), float(value["hi"]))
                drawn = histogram(
                    value["edges"], value["counts"], held, title, 0 if value.get("kind") == "weight" else 1
                )
                blocks.append(Figure(title, drawn, _bins(title, value["edges"], value["counts"], held)))
        blocks.append(shown)
    return Section("ranges", "Ranges", (Note(_HISTOGRAMS), *others, *blocks) if blocks else ())


def _bins(title: str, edges: Sequence[float], counts: Sequence[float], held: tuple[float, float]) -> Table:
    """The counts of a histogram, for those who read them; what is empty is left out."""
    rows = tuple(
        (
            text(f"{left:.4g} to {right:.4g}", "num"),
            text(f"{n:,.0f}", "num"),
            text("held" if right > held[0] and left < held[1] else "clipped"),
        )
        for left, right, n in zip(edges, edges[1:], counts, strict=False)
        if n > 0
    )
    return Table(title, ("from … to", "values", "by the grid"), rows)


def _splits(rows: Sequence[Candidate]) -> Iterator[str]:
    for row in rows:
        for target, found in topic(row, "drift_split").items():
            if not isinstance(found, Mapping):
                continue
            if "declined" in found:
                yield f"{row.name} on {target}: quantization and kernel error were not told apart: {found['declined']}."
            elif found.get("not_covered"):
                yield f"{row.name} on {target}: the split leaves out {plain(found['not_covered'])}."


def _nodes(row: Candidate) -> Iterator[Block]:
    """Where the error is born: what each node does to the outputs, the worst first."""
    found = topic(row, "nodes")
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
    drawn: set[tuple[str, ...]] = set()
    for target, outputs in topic(row, "worst_samples").items():
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
            # Targets seldom differ in their worst samples, and pictures weigh most of a page.
            names = tuple(number for number, _ in numbers)
            if shown and names not in drawn:
                drawn.add(names)
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

"""A report as a person reads it in a terminal: one table per target, verdicts in words, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxshrink.config.metrics import METRIC_NAMES
from onnxshrink.core.report import Candidate, Metric, Outcome, Report
from onnxshrink.verify.gain import SPARSE

_MARKS: dict[Outcome, tuple[str, str]] = {
    "passed": ("passed", "green"),
    "failed": ("failed", "red"),
    "inconclusive": ("inconclusive", "yellow"),
}


def print_report(report: Report, console: Console, folder: Path | None = None) -> None:
    """Print the comparison, the verdicts that need words, and the winner's path.

    Args:
        report: What to print.
        console: Where to.
        folder: The run's folder, for the path of the winner.
    """
    targets: list[str | None] = list(dict.fromkeys(m.target for c in report.candidates for m in c.metrics if m.target))
    for target in targets or [None]:
        console.print()
        console.print(_table(report, target, console.width, titled=len(targets) > 1))
    console.print(Text(_caption(report), style="dim"))
    for line in _extents(report):
        console.print(Text(line, style="dim"))
    _print_verdicts(report, console)
    for warning in report.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)
    console.print()
    style = "bold green" if report.winner else "bold red"
    console.print(Text(report.selection, style=style))
    if report.winner and folder is not None:
        console.print(f"  model   {escape(str(folder / 'model.onnx'))}", highlight=False, soft_wrap=True)
    if folder is not None:
        console.print(f"  report  {escape(str(folder / 'report.json'))}", highlight=False, soft_wrap=True)


def _table(report: Report, target: str | None, width: int, *, titled: bool) -> Table:
    """The comparison in ``width`` columns: units stand in the headers, and names are cut before any number is."""
    metric = _task_metric(report)
    is_ratio = any(m.name == metric and m.unit == "ratio" for c in report.candidates for m in c.metrics)
    drop = "" if metric is None else "drop pt" if is_ratio else "drop"
    headers = ["", "size", (metric or "").rpartition(":")[2], drop, "dB", "ms", "vs reference", "gates"]
    rows = [_row(c, target, metric, winner=c.name == report.winner) for c in report.candidates]
    gap = 2 if width >= 96 else 1
    numbers = sum(gap + max(len(header), *(len(row[i]) for row in rows)) for i, header in enumerate(headers) if i)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        header_style="dim",
        title=f"on {target}" if titled else None,
        title_justify="left",
    )
    room = max(8, width - numbers)
    table.add_column("", no_wrap=True, max_width=room)
    for header in headers[1:]:
        justify: Literal["left", "right"] = "left" if header in ("vs reference", "gates") else "right"
        width = max(len(header), *(len(row[headers.index(header)]) for row in rows)) if header else 0
        table.add_column(header, justify=justify, no_wrap=True, min_width=width)
    for name, *figures in rows:
        table.add_row(_cut(name, room), *figures)
    return table


def _cut(name: Text, room: int) -> Text:
    """The name in ``room`` columns: names are told apart by their ends as well, and lose their middle."""
    if len(name) <= room:
        return name
    end = (room - 1) // 2
    return Text(f"{name.plain[: room - 1 - end]}…{name.plain[len(name) - end :]}", style=name.style)


def _caption(report: Report) -> str:
    """What the columns are measured against."""
    roles = {candidate.role: candidate.name for candidate in report.candidates}
    original = roles.get("original", "reference")
    drop = f"drop: {_task_metric(report)} lost against {original}; " if _task_metric(report) else ""
    return f"{drop}dB: SQNR, and vs reference: latency ratio with its 95% interval, both against reference; ms: median"


def _extents(report: Report) -> Iterator[str]:
    """Multiply-accumulates where the models differ in them, and compressed bytes where zeros make them tell."""
    macs = {c.name: format_count(m.value) for c in report.candidates if (m := c.metric("macs")) and m.value is not None}
    if len(set(macs.values())) > 1:
        yield f"MACs of a sample: {_grouped(macs)}"
    if any((m := c.metric("sparsity")) and (m.value or 0) >= SPARSE for c in report.candidates):
        yield f"compressed: {_grouped({c.name: _bytes(c.metric('compressed_bytes')) for c in report.candidates})}"


def _grouped(values: Mapping[str, str]) -> str:
    """``teacher 2.1 M; fp32, int8 0.3 M``: names with the same value beside it once."""
    names: dict[str, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    return "; ".join(f"{', '.join(group)} {value}" for value, group in names.items() if value)


def _row(candidate: Candidate, target: str | None, metric: str | None, *, winner: bool) -> list[Text]:
    def measured(name: str) -> Metric | None:
        return next((m for m in candidate.metrics if m.name == name and m.target in (target, None)), None)

    ratio = measured("latency_ratio")
    verdict = Text("")
    if candidate.verdicts:
        mark, style = _MARKS[candidate.outcome]
        verdict = Text(mark, style=style)
    elif candidate.role == "variant":
        verdict = Text("no gates", style="dim")
    name = Text(f"{'▸ ' if winner else '  '}{candidate.name}", style="bold" if winner else "")
    return [
        name,
        Text(_bytes(measured("size_bytes"))),
        Text(_score(measured(metric) if metric else None)),
        Text(_drop(measured("accuracy_drop"))),
        Text(_worst_sqnr(candidate, target)),
        Text(_milliseconds(measured("latency_p50_ms"))),
        Text(_ratio(ratio), style=_ratio_style(ratio) if candidate.role == "variant" else ""),
        verdict,
    ]


def _print_verdicts(report: Report, console: Console) -> None:
    """The reasons of everything that did not plainly pass."""
    rows = [(c.name, v) for c in report.variants for v in c.verdicts if v.outcome != "passed"]
    if rows:
        console.print()
    for name, verdict in rows:
        mark, style = _MARKS[verdict.outcome]
        console.print(Text.assemble((mark, style), f"  {name}: {verdict.reason}"), highlight=False)


def _task_metric(report: Report) -> str | None:
    """Its name; the user's own is called by its entry point, the one name with a colon in it."""
    names = dict.fromkeys(m.name for c in report.candidates for m in c.metrics if m.output is None)  # drift has one
    return next((name for name in names if name in METRIC_NAMES or ":" in name), None)


def _worst_sqnr(candidate: Candidate, target: str | None) -> str:
    found = [m for m in candidate.metrics if m.name == "sqnr_db" and target in (None, m.target)]
    if not found:
        return ""
    values = [m.value for m in found if m.value is not None]
    if values:
        return f"{min(values):.1f}"
    return "same" if found[0].note and "identical" in found[0].note else "n/a"


def format_bytes(value: float) -> str:
    """``12.3 kB``: decimal units, three digits."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def format_count(value: float) -> str:
    """``12.3 M``: thousands and millions, three digits."""
    for unit in ("", " k", " M"):
        if value < 1000:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.2f} G"


def _bytes(metric: Metric | None) -> str:
    return format_bytes(metric.value) if metric and metric.value is not None else ""


def _score(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ""
    return f"{metric.value:.1%}" if metric.unit == "ratio" else f"{metric.value:.4g}"


def _drop(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ""
    return f"{100 * metric.value:+.1f}" if metric.unit == "ratio" else f"{metric.value:+.3g}"


def _milliseconds(metric: Metric | None) -> str:
    return f"{metric.value:.3g}" if metric and metric.value is not None else ""


def _ratio(metric: Metric | None) -> str:
    """``0.79 0.76-0.82``: the ratio and its interval; alone where it is exact."""
    if metric is None or metric.value is None:
        return ""
    if metric.lo is None or metric.hi is None or metric.lo == metric.hi:
        return f"{metric.value:.2f}"
    return f"{metric.value:.2f} {metric.lo:.2f}–{metric.hi:.2f}"  # noqa: RUF001


def _ratio_style(metric: Metric | None) -> str:
    """Green where faster beyond doubt, red where slower beyond doubt."""
    if metric is None or metric.lo is None or metric.hi is None:
        return ""
    return "green" if metric.hi < 1 else "red" if metric.lo > 1 else ""

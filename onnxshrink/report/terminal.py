"""A report as a person reads it in a terminal: one table per target, verdicts in words, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnxshrink.config.metrics import METRIC_NAMES
from onnxshrink.core.report import Candidate, Metric, Outcome, Report
from onnxshrink.report.next_steps import next_steps
from onnxshrink.verify.gain import SPARSE

_MARKS: dict[Outcome, tuple[str, str]] = {
    "passed": ("passed", "green"),
    "failed": ("failed", "red"),
    "inconclusive": ("inconclusive", "yellow"),
}

_SIZE_CHANGE = "±%"
_WIDE = 96
_LEAST_NAME = 10


def print_report(report: Report, console: Console, folder: Path | None = None, *, config: Path | None = None) -> None:
    """Print the comparison, the verdicts that need words, the winner's path and what to do next.

    Args:
        report: What to print.
        console: Where to.
        folder: The run's folder, for paths.
        config: The file that was run, for commands to run next.
    """
    targets: list[str | None] = list(dict.fromkeys(m.target for c in report.candidates for m in c.metrics if m.target))
    headers: set[str] = set()
    for target in targets or [None]:
        columns = _fitted(report, _columns(report, target), console.width)
        headers.update(column.header for column in columns)
        console.print()
        console.print(_table(report, columns, console.width, title=f"on {target}" if len(targets) > 1 else None))
    for line in (*_captions(report, headers), *_extents(report)):
        console.print(Text(line, style="dim"))
    _print_verdicts(report, console)
    steps = next_steps(report, folder, config)
    for warning in _unsaid(report, steps):
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)
    console.print()
    style = "bold green" if report.winner else "bold red"
    console.print(Text(report.selection, style=style))
    if report.winner and folder is not None:
        console.print(f"  model   {escape(str(folder / 'model.onnx'))}", highlight=False, soft_wrap=True)
    if folder is not None:
        console.print(f"  report  {escape(str(folder / 'report.json'))}", highlight=False, soft_wrap=True)
    for step in steps:
        console.print(f"  next    {escape(step)}", highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class _Column:
    """One column: its cells from top to bottom, and the shorter ones that do where the terminal is narrow."""

    header: str
    cells: tuple[Text, ...]
    justify: Literal["left", "right"] = "right"
    brief: tuple[Text, ...] | None = None

    @property
    def width(self) -> int:
        return max(cell_len(self.header), *(cell.cell_len for cell in self.cells))


def _columns(report: Report, target: str | None) -> list[_Column]:
    """Everything that was measured on ``target``, less what has no value in any row; units stand in the headers."""
    metric = task_metric(report)
    is_ratio = _is_ratio(report, metric)

    def of(candidate: Candidate, name: str | None) -> Metric | None:
        own = (m for m in candidate.metrics if m.output is None and m.target in (target, None))
        return next((m for m in own if m.name == name), None)

    def column(header: str, cell: Callable[[Candidate], Text], **more: Any) -> _Column:
        return _Column(header, tuple(map(cell, report.candidates)), **more)

    original = next((c for c in report.candidates if c.role != "variant"), None)
    size, score = (of(original, name) if original else None for name in ("size_bytes", metric))
    brief = tuple(_ratio(of(c, "latency_ratio"), c, interval=False) for c in report.candidates)
    columns = [
        column("size", lambda c: Text(_bytes(of(c, "size_bytes")))),
        column(_SIZE_CHANGE, lambda c: _size_change(of(c, "size_bytes"), size)),
        column((metric or "").rpartition(":")[2], lambda c: Text(_score(of(c, metric)))),
        column("±pt" if is_ratio else "±", lambda c: _change(of(c, metric), score, of(c, "accuracy_drop"))),
        column("dB", lambda c: Text(_worst_sqnr(c, target))),
        column("ms", lambda c: Text(_milliseconds(of(c, "latency_p50_ms")))),
        column("vs reference", lambda c: _ratio(of(c, "latency_ratio"), c), justify="left", brief=brief),
        column("gates", _verdict, justify="left"),
    ]
    return [column for column in columns if any(column.cells)]


def _fitted(report: Report, columns: list[_Column], width: int) -> list[_Column]:
    """The columns that fit: where they are too wide the change of the size goes first, then the intervals."""
    longest = 1 + _gap(width) + max(cell_len(candidate.name) for candidate in report.candidates)
    slim = [column for column in columns if column.header != _SIZE_CHANGE]
    short = [replace(column, header="ratio", cells=column.brief) if column.brief else column for column in slim]
    return next((each for each in (columns, slim) if longest + _width(each, width) <= width), short)


def _table(report: Report, columns: list[_Column], width: int, *, title: str | None) -> Table:
    """The comparison; names that are too long for what is left of the line are folded, never cut."""
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, _gap(width), 0, 0),
        header_style="dim",
        title=title,
        title_justify="left",
    )
    table.add_column("", width=1)
    left = width - _width(columns, width) - 1 - _gap(width)
    table.add_column("", overflow="fold", max_width=max(_LEAST_NAME, left))
    for column in columns:
        table.add_column(column.header, justify=column.justify, no_wrap=True, min_width=column.width)
    for row, candidate in enumerate(report.candidates):
        wins = candidate.name == report.winner
        name = Text(candidate.name, style="bold" if wins else "")
        table.add_row("▸" if wins else "", name, *(column.cells[row] for column in columns))
    return table


def _gap(width: int) -> int:
    return 2 if width >= _WIDE else 1


def _width(columns: Sequence[_Column], width: int) -> int:
    """What the columns take of a terminal of ``width``, with the gaps before them."""
    return sum(_gap(width) + column.width for column in columns)


def _captions(report: Report, headers: Collection[str]) -> Iterator[str]:
    """What the columns that are shown mean, and what they are measured against."""
    original = {candidate.role: candidate.name for candidate in report.candidates}.get("original", "reference")
    changes = {_SIZE_CHANGE: "size", **dict.fromkeys(("±pt", "±"), task_metric(report))}
    shown = [sign for sign in changes if sign in headers]
    if shown:
        yield f"{', '.join(shown)}: change of {' and '.join(str(changes[sign]) for sign in shown)} against {original}"
    # The reference's milliseconds are of one session, a ratio's of another: one need not be the others' quotient.
    units = {"dB": "dB (SQNR): against reference", "ms": "ms: median, each timed in its own session"}
    if shown := [text for header, text in units.items() if header in headers]:
        yield "; ".join(shown)
    ratios = {"vs reference": "latency ratio (95% interval)", "ratio": "latency ratio"}
    yield from (f"{text}: against the reference timed beside it" for sign, text in ratios.items() if sign in headers)


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


def _verdict(candidate: Candidate) -> Text:
    if candidate.verdicts:
        mark, style = _MARKS[candidate.outcome]
        return Text(mark, style=style)
    return Text("no gates", style="dim") if candidate.role == "variant" else Text("")


def _print_verdicts(report: Report, console: Console) -> None:
    """The reasons of everything that did not plainly pass."""
    rows = [(c.name, v) for c in report.variants for v in c.verdicts if v.outcome != "passed"]
    if rows:
        console.print()
    for name, verdict in rows:
        mark, style = _MARKS[verdict.outcome]
        console.print(Text.assemble((mark, style), f"  {name}: {verdict.reason}"), highlight=False)


def task_metric(report: Report) -> str | None:
    """Its name; the user's own is called by its entry point, the one name with a colon in it.

    Drift has a cosine as well, of each output.
    """
    names = dict.fromkeys(m.name for c in report.candidates for m in c.metrics if m.output is None)
    return next((name for name in names if name in METRIC_NAMES or ":" in name), None)


def _is_ratio(report: Report, metric: str | None) -> bool:
    return any(m.unit == "ratio" for c in report.candidates for m in c.metrics if m.name == metric and m.output is None)


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


def shortened(words: str, n: int) -> str:
    """At most ``n`` letters: what is too long loses its middle, as names of a kind differ at their ends."""
    return words if len(words) <= n else f"{words[: n - 1 - n // 2]}…{words[len(words) - n // 2 :]}"


def _bytes(metric: Metric | None) -> str:
    return format_bytes(metric.value) if metric and metric.value is not None else ""


def _score(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ""
    return f"{metric.value:.1%}" if metric.unit == "ratio" else f"{metric.value:.4g}"


def _size_change(metric: Metric | None, original: Metric | None) -> Text:
    """``-95``: per cent of the original's size, green where it shrank."""
    if metric is None or original is None or metric is original or not metric.value or not original.value:
        return Text("")
    change = f"{100 * (metric.value / original.value - 1):+.0f}"
    return Text(change, style="" if change in ("+0", "-0") else "green" if change[0] == "-" else "red")


def _change(metric: Metric | None, original: Metric | None, drop: Metric | None) -> Text:
    """``+0.5``: what the task metric gained or lost, coloured where its interval says that it did."""
    if metric is None or original is None or metric is original or metric.value is None or original.value is None:
        return Text("")
    change = metric.value - original.value
    style = ""
    if drop is not None and drop.lo is not None and drop.hi is not None:
        style = "red" if drop.lo > 0 else "green" if drop.hi < 0 else ""
    return Text(f"{100 * change:+.1f}" if metric.unit == "ratio" else f"{change:+.3g}", style=style)


def _milliseconds(metric: Metric | None) -> str:
    return f"{metric.value:.3g}" if metric and metric.value is not None else ""


def _ratio(metric: Metric | None, candidate: Candidate, *, interval: bool = True) -> Text:
    """``0.79 0.76-0.82``: the ratio and its interval, alone where it is exact; green where faster beyond doubt."""
    if metric is None or metric.value is None:
        return Text("")
    if metric.lo is None or metric.hi is None or metric.lo == metric.hi:
        return Text(f"{metric.value:.2f}")
    style = ""
    if candidate.role == "variant":
        style = "green" if metric.hi < 1 else "red" if metric.lo > 1 else ""
    ends = f" {metric.lo:.2f}–{metric.hi:.2f}" if interval else ""  # noqa: RUF001
    return Text(f"{metric.value:.2f}{ends}", style=style)


def _unsaid(report: Report, steps: Sequence[str]) -> Iterator[str]:
    """The warnings that neither a verdict nor the next steps have said already."""
    reasons = [v.reason for c in report.variants for v in c.verdicts if v.outcome != "passed"]
    explained = any(step.startswith("onnxshrink explain ") for step in steps)
    for warning in report.warnings:
        if not any(reason in warning for reason in reasons) and not (explained and "`onnxshrink explain " in warning):
            yield warning

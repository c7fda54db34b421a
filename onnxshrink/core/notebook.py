"""A report as a notebook shows it: one small table of plain HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from onnxshrink.core.report import Candidate, Metric, Report

_HEADERS = {
    "size_bytes": "size",
    "accuracy_drop": "accuracy drop",
    "sqnr_db": "lowest SQNR",
    "latency_ratio": "latency ratio",
}


def report_table(report: Report) -> str:
    """The rows of a report with what decides, each number with its 95% interval where it has one.

    Args:
        report: Names in it are the user's, and escaped.
    """
    task = _task_metric(report.config)
    targets: list[str | None] = list(
        dict.fromkeys(m.target for c in report.candidates for m in c.metrics if m.target)
    ) or [None]
    headers = {"size_bytes": "size", **({task: task} if task else {}), **_HEADERS}
    parts = [f"<p><b>{escape(report.name)}</b>: {escape(report.selection)}</p>"]
    for target in targets:
        caption = f"<caption>on {escape(str(target))}</caption>" if len(targets) > 1 else ""
        head = "".join(f"<th>{escape(text)}</th>" for text in ("", *headers.values(), "gates"))
        body = "".join(_row(row, tuple(headers), target, wins=row.name == report.winner) for row in report.candidates)
        parts.append(f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if report.warnings:
        parts.append(f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in report.warnings)}</ul>")
    return "".join(parts)


def _row(row: Candidate, names: tuple[str, ...], target: str | None, *, wins: bool) -> str:
    cells = "".join(f"<td>{_value(_found(row, name, target))}</td>" for name in names)
    gates = row.outcome if row.verdicts else ""
    return f"<tr><th>{'▸ ' if wins else ''}{escape(row.name)}</th>{cells}<td>{gates}</td></tr>"


def _found(row: Candidate, name: str, target: str | None) -> Metric | None:
    """The metric on that target, or on none; of outputs alone the lowest, and one without a value last."""
    found = [m for m in row.metrics if m.name == name and m.target in (None, target)]
    found = [m for m in found if m.output is None] or found
    return min(found, key=lambda m: float("inf") if m.value is None else m.value, default=None)


def _value(metric: Metric | None) -> str:
    """``0.60 (0.59 to 0.61)``, ``37.8 kB``, ``41.1 dB``."""
    if metric is None:
        return ""
    if metric.value is None:
        return escape(metric.note or "no value")
    match metric.unit:
        case "bytes":
            return f"{metric.value / 1000:,.1f} kB"
        case "dB":
            return f"{metric.value:.1f} dB"
    interval = "" if metric.lo is None or metric.hi is None else f" ({metric.lo:.3g} to {metric.hi:.3g})"
    return f"{metric.value:.3g}{interval}"


def _task_metric(config: dict[str, Any]) -> str | None:
    """The name that the report has for it; None where nothing is scored."""
    metric = ((config.get("data") or {}).get("evaluation") or {}).get("metric")
    return metric.get("entry") or metric.get("kind") if isinstance(metric, dict) else metric

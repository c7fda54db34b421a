"""What a page is made of: sections of tables, figures, notes and code, as plain values that a template draws.

A number keeps its exact value beside its text, and says which one of ``report.json`` it is: a test compares them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from markupsafe import Markup

from onnxshrink.core.report import Candidate, Metric, Outcome
from onnxshrink.report.terminal import format_bytes, format_count

MARKS: dict[Outcome, str] = {"passed": "✓", "failed": "✗", "inconclusive": "?"}
"""Beside each outcome's word, for those who see no colours."""

Part: TypeAlias = Literal["value", "lo", "hi"]


@dataclass(frozen=True, slots=True)
class Number:
    """A number of the report.

    Attributes:
        value: Exactly as ``report.json`` has it.
        text: As a person reads it.
        row: The candidate it belongs to.
        metric: The metric's name.
        part: The metric's value, or an end of its interval.
        target: The metric's.
        output: The metric's.
    """

    value: float
    text: str
    row: str
    metric: str
    part: Part = "value"
    target: str | None = None
    output: str | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        parts: Text and numbers, shown one after the other.
        style: A class of the page's own style sheet: ``num``, ``passed``, ``failed``, ``inconclusive``, ``code``.
        ends: Lower and upper end of an interval, shown smaller.
    """

    parts: tuple[str | Number, ...] = ()
    style: str = ""
    ends: tuple[Number, Number] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headers; the first cell of a row names it. One that is ``folded`` is opened by who wants to see it."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    kind: Literal["table"] = field(default="table", init=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with its description in words and the table it was drawn from."""

    caption: str
    svg: Markup
    table: Table | None = None
    kind: Literal["figure"] = field(default="figure", init=False)


@dataclass(frozen=True, slots=True)
class Note:
    """A paragraph."""

    text: str
    style: str = ""
    kind: Literal["note"] = field(default="note", init=False)


@dataclass(frozen=True, slots=True)
class Code:
    """Text to be copied."""

    caption: str
    text: str
    kind: Literal["code"] = field(default="code", init=False)


@dataclass(frozen=True, slots=True)
class Picture:
    """A sample as an image.

    Attributes:
        caption: What it shows.
        source: A PNG as a data URI.
    """

    caption: str
    source: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Pictures side by side."""

    caption: str
    pictures: tuple[Picture, ...]
    kind: Literal["gallery"] = field(default="gallery", init=False)


Block: TypeAlias = Table | Figure | Note | Code | Gallery


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what stands under it.

    Attributes:
        anchor: Where links lead.
        title: The heading.
        blocks: Without any the section is left out.
    """

    anchor: str
    title: str
    blocks: tuple[Block, ...]


def text(value: object, style: str = "") -> Cell:
    """A cell with what has no number behind it."""
    return Cell(("" if value is None else str(value),), style)


def number(row: Candidate, metric: Metric | None, part: Part = "value") -> Number | None:
    """A part of a metric, or None where it has no value."""
    value = None if metric is None else getattr(metric, part)
    if metric is None or value is None:
        return None
    return Number(value, said(metric, value), row.name, metric.name, part, metric.target, metric.output)


def measured(row: Candidate, metric: Metric | None) -> Cell:
    """A metric with its interval, where it has one that is not a single point."""
    value = number(row, metric)
    if metric is None or value is None:
        return Cell((metric.note if metric and metric.note else "",), "num")
    lo, hi = number(row, metric, "lo"), number(row, metric, "hi")
    return Cell((value,), "num", None if lo is None or hi is None or lo.value == hi.value else (lo, hi))


def outcome(value: Outcome) -> Cell:
    """An outcome as a mark and a word."""
    return Cell((f"{MARKS[value]} {value}",), value)


def said(metric: Metric, value: float) -> str:
    """A metric's value in words: its unit decides, and drops are points of a hundred."""
    if metric.unit == "bytes":
        return format_bytes(value)
    if metric.unit == "count":
        return format_count(value)
    if metric.unit == "ms":
        return f"{value:.3g} ms"
    if metric.unit == "dB":
        return f"{value:.1f} dB"
    if metric.name == "accuracy_drop":
        return f"{100 * value:+.2f} pt" if metric.unit == "ratio" else f"{value:+.3g}"
    if metric.unit == "ratio" and not metric.name.startswith(("latency", "relative")):
        return f"{value:.1%}"
    if metric.name.startswith("latency"):
        return f"{value:.2f}"
    return f"{value:.3g}"


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, folded: bool = False) -> Table:
    """A table without the columns that are empty in every row."""
    kept = [i for i in range(len(headers)) if i == 0 or any("".join(map(str, row[i].parts)) for row in rows)]
    return Table(caption, tuple(headers[i] for i in kept), tuple(tuple(row[i] for i in kept) for row in rows), folded)


def facts(caption: str, values: Mapping[str, object], *, folded: bool = False) -> Table:
    """Names and values."""
    rows = tuple((text(name), text(plain(value))) for name, value in values.items())
    return Table(caption, ("", "value"), rows, folded)


def plain(value: object) -> str:
    """A value of the JSON in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def topic(row: Candidate, name: str) -> Mapping[str, Any]:
    """What a row knows of a topic; nothing where it is missing or of a form that this version does not know."""
    found = row.details.get(name)
    return found if isinstance(found, Mapping) else {}

"""Two runs side by side: what became better or worse, and what was asked for differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onnxshrink.core.report import Candidate, Metric, Report
from onnxshrink.report.blocks import Block, Cell, Note, Section, Table, measured, outcome, plain, said, table, text
from onnxshrink.report.summary import on, targets_of, worst_sqnr
from onnxshrink.report.terminal import task_metric

_MISSING = "–"  # noqa: RUF001
_MINUS = "−"  # noqa: RUF001


def compare_reports(one: Report, other: Report) -> tuple[Section, ...]:
    """The sections of a page about two reports; rows of one name are compared, and the winners whatever their names.

    Args:
        one: The run that is looked at.
        other: The one it is compared with; differences are this one's less the other's.
    """
    return (
        Section("winners", "Winners", tuple(_winners(one, other))),
        Section("gates", "Gates", tuple(_gates(one, other))),
        Section("models", "Models", tuple(_models(one, other))),
        Section("config", "Config", tuple(_differing("config", one.config, other.config))),
        Section("environment", "Environment", tuple(_environments(one, other))),
    )


def _winners(one: Report, other: Report) -> Iterator[Block]:
    for report in (one, other):
        yield Note(f"{name_of(report)}: {report.selection}", "passed" if report.winner else "failed")
    rows = [next((row for row in report.variants if row.name == report.winner), None) for report in (one, other)]
    if rows[0] and rows[1]:
        names = f"{rows[0].name} and {rows[1].name}"
        yield from (
            _figures((rows[0], rows[1]), (one, other), target, f"Winners: {names}") for target in _targets(one, other)
        )


def _gates(one: Report, other: Report) -> Iterator[Block]:
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for i, report in enumerate((one, other)):
        for row in report.variants:
            for verdict in row.verdicts:
                cells = found.setdefault((row.name, verdict.gate, verdict.target or ""), [text(_MISSING)] * 4)
                cells[2 * i : 2 * i + 2] = outcome(verdict.outcome), text(f"{verdict.limit:g}", "num")
    rows = [
        (text(name), text(gate, "code"), text(target), cells[0], cells[2], cells[1], cells[3])
        for (name, gate, target), cells in found.items()
    ]
    names = (name_of(one), name_of(other))
    headers = ("model", "gate", "target", *names, *(f"limit in {name}" for name in names))
    if rows:
        yield table("Every gate of both runs", headers, rows)


def _models(one: Report, other: Report) -> Iterator[Block]:
    theirs = {row.name: row for row in other.candidates}
    for row in one.candidates:
        if row.name in theirs:
            yield from (
                _figures((row, theirs[row.name]), (one, other), target, row.name) for target in _targets(one, other)
            )
    for report, names in ((one, set(theirs)), (other, {row.name for row in one.candidates})):
        alone = [row.name for row in report.candidates if row.name not in names]
        if alone:
            yield Note(f"Only in {name_of(report)}: {plain(alone)}")


def _targets(one: Report, other: Report) -> list[str | None]:
    return [target for target in targets_of(one) if target in targets_of(other)]


def _figures(rows: tuple[Candidate, Candidate], runs: tuple[Report, Report], target: str | None, what: str) -> Table:
    (row, their), metric = rows, task_metric(runs[0])
    names = (
        ("size", "size_bytes"), ("compressed", "compressed_bytes"), (metric or "", metric or ""),
        ("accuracy drop", "accuracy_drop"), ("latency ratio", "latency_ratio"), ("median latency", "latency_p50_ms"),
        ("integer share", "integer_coverage"), ("MACs", "macs"), ("peak memory", "peak_memory_bytes"),
        ("peak GPU memory", "peak_device_memory_bytes"),
    )  # fmt: skip
    pairs = [(title, on(row, name, target), on(their, name, target)) for title, name in names if name]
    pairs.insert(4, ("lowest SQNR", worst_sqnr(row, target), worst_sqnr(their, target)))
    cells = [
        (text(title), measured(row, ours), measured(their, theirs), text(_difference(ours, theirs), "num"))
        for title, ours, theirs in pairs
        if ours or theirs
    ]
    if row.digest and their.digest:
        file = (text(row.digest[:12], "code"), text(their.digest[:12], "code"))
        cells.append((text("sha256"), *file, text("the same" if row.digest == their.digest else "another file")))
    where = f" on {target}" if target else ""
    return Table(f"{what}{where}", ("figure", *map(name_of, runs), "difference"), tuple(cells))


def _difference(ours: Metric | None, theirs: Metric | None) -> str:
    """This less the other, and in percent where that says more; with a word where the intervals do not touch."""
    if ours is None or theirs is None or ours.value is None or theirs.value is None:
        return ""
    difference = ours.value - theirs.value
    if difference == 0:
        return "the same"
    words = said(ours, abs(difference)).lstrip("+")
    share = (
        f", {difference / theirs.value:+.1%}".replace("-", _MINUS)
        if theirs.value > 0 and ours.unit in ("bytes", "ms", "count")
        else ""
    )
    ends = (ours.lo, ours.hi, theirs.lo, theirs.hi)
    apart = ""
    if ours.unit == "ms":
        apart = "; timed at different hours"  # an interval of milliseconds covers its own run only
    elif None not in ends:
        apart = "; intervals apart" if ours.lo > theirs.hi or ours.hi < theirs.lo else "; intervals overlap"  # type: ignore[operator]  # none is None
    return f"{'+' if difference > 0 else _MINUS}{words}{share}{apart}"


def _environments(one: Report, other: Report) -> Iterator[Block]:
    if one.machine.get("processor") != other.machine.get("processor"):
        yield Note("⚠ The runs took place on different processors: milliseconds cannot be compared.", "warning")
    yield from _differing("machine", one.machine, other.machine)
    yield from _differing("versions", one.versions, other.versions)
    yield from _differing("inputs", one.inputs, other.inputs)


def _differing(what: str, one: Any, other: Any) -> Iterator[Block]:
    ours, theirs = dict(_leaves(one)), dict(_leaves(other))
    rows = [
        (text(path, "code"), text(ours.get(path, _MISSING), "code"), text(theirs.get(path, _MISSING), "code"))
        for path in dict.fromkeys([*ours, *theirs])
        if ours.get(path) != theirs.get(path)
    ]
    if rows:
        yield Table(f"What differs in {what}", ("where", "first", "second"), tuple(rows))
    else:
        yield Note(f"Nothing differs in {what}.")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """``stages[2].epochs`` and its value, for everything in a tree of JSON."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for i, item in enumerate(value):
            yield from _leaves(item, f"{path}[{i}]")
    else:
        yield path, plain(value)


def name_of(report: Report) -> str:
    """What tells a run from another of the same name."""
    when = report.finished[:19].replace("T", " ")
    return f"{report.name}, {when}" if when else report.name

"""The first screen: what went in, what came out, and whether to ship it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from onnxshrink.core.report import OPTIMISTIC, Candidate, Metric, Report
from onnxshrink.report.blocks import Cell, Note, Section, Table, measured, outcome, table, text
from onnxshrink.report.next_steps import ranked
from onnxshrink.report.terminal import task_metric


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the first screen: what it is, the winner's, and what it is measured against."""

    title: str
    cell: Cell
    against: Cell


@dataclass(frozen=True, slots=True)
class Summary:
    """The first screen.

    Attributes:
        outcome: Class of the headline.
        headline: Whether to ship, in words.
        reason: Why that one.
        went_in: What the run was given, name to words.
        came_out: What it left.
        cards: The figures that decide.
        shown: Whose they are and what it fails, where that is no winner.
        warnings: What the run warns of the winner, or of the one shown, as far as the reason does not say it.
    """

    outcome: str
    headline: str
    reason: str
    went_in: dict[str, str]
    came_out: dict[str, str]
    cards: tuple[Card, ...]
    shown: str = ""
    warnings: tuple[str, ...] = ()


MOST_IN_DETAIL = 6
"""Variants that the page looks at closely; a search may leave dozens, and all of them are in its tables."""

_UNFOLDED = 3


def summarize(report: Report) -> Summary:
    """The first screen of a report; without a winner its figures are of the variant that fails the fewest gates."""
    winner = next((row for row in report.variants if row.name == report.winner), None)
    if winner is None:
        nearest = next((row for row in ranked(report) if row.metrics), None)
        cards = tuple(_cards(report, nearest)) if nearest else ()
        shown = _nearest(nearest) if nearest and cards else ""
        of_nearest = tuple(line for line in report.warnings if nearest and _concerns(line, nearest))
        return Summary(
            "failed",
            "✗ Do not ship",
            report.selection,
            _went_in(report),
            {"model": "none"},
            cards,
            shown,
            of_nearest[:_UNFOLDED],
        )
    undecided = sum(verdict.outcome == "inconclusive" for verdict in winner.verdicts)
    style = winner.outcome if winner.verdicts else "inconclusive"
    doubts = tuple(_doubts(report, winner))
    if not winner.verdicts:
        headline = f"? {winner.name} was chosen, and no gate judged it"
    elif undecided:
        headline = f"? Not proven: {winner.name} fails no gate, and {undecided} could not be decided"
    elif doubts:
        style, headline = "inconclusive", f"? Not proven: {winner.name} passes every gate, on figures that prove little"
    else:
        headline = f"✓ Ship {winner.name}"
    reason = "; ".join((*doubts, report.selection))
    of_winner = tuple(line for line in report.warnings if _concerns(line, winner) and line not in doubts)
    return Summary(
        style,
        headline,
        reason,
        _went_in(report),
        _came_out(winner),
        tuple(_cards(report, winner)),
        warnings=of_winner[:_UNFOLDED],
    )


def _concerns(warning: str, row: Candidate) -> bool:
    """Whether a warning begins with the row or with a step of it, and not with another row of a longer name."""
    return warning.startswith(tuple(f"{row.name}{sign}" for sign in (":", "/", " ")))


def _doubts(report: Report, winner: Candidate) -> Iterator[str]:
    """Why the figures themselves prove little: those of the warnings that no gate can make up for."""
    for name in dict.fromkeys((report.candidates[0].name, winner.name)):
        row = report.candidate(name)
        for metric in row.metrics:
            if metric.name in ("top1", "top5") and metric.value is not None and metric.note:
                yield f"{metric.name} of {row.name}, {metric.value:.1%}, is {metric.note}"
    yield from (warning for warning in report.warnings if OPTIMISTIC in warning)


def verdicts(report: Report) -> Section:
    """Every gate of every variant, the winner's first, then of those nearest to it."""
    tables = [
        table(
            f"Gates of {row.name}" + (", the winner" if row.name == report.winner else f": {row.outcome}"),
            ("gate", "outcome", "what was found"),
            [
                (Cell((v.gate, f" on {v.target}" if v.target else ""), "code"), outcome(v.outcome), text(v.reason))
                for v in row.verdicts
            ],
            folded=i >= _UNFOLDED,
        )
        for i, row in enumerate(row for row in ranked(report) if row.verdicts)
    ]
    return Section("verdicts", "Verdicts", tuple(tables))


def comparison(report: Report) -> Section:
    """All models side by side, one table a target."""
    return Section("models", "All models", tuple(_compared(report, target) for target in targets_of(report)))


def in_detail(report: Report) -> tuple[list[Candidate], list[Note]]:
    """The variants that are looked at closely, the winner first, and a word on the others where there are any."""
    rows = ranked(report)
    if len(rows) <= MOST_IN_DETAIL:
        return rows, []
    words = f"Of {len(rows)} variants the {MOST_IN_DETAIL} that are the winner or nearest to it"
    return rows[:MOST_IN_DETAIL], [Note(f"{words}; report.json has the others.")]


def targets_of(report: Report) -> list[str | None]:
    """Every target that something was measured on, or None once where there is none."""
    return list(dict.fromkeys(m.target for c in report.candidates for m in c.metrics if m.target)) or [None]


def on(row: Candidate, name: str, target: str | None) -> Metric | None:
    """A metric of the model, not of one of its outputs: on a target, or else the one that depends on none."""
    found = {m.target: m for m in reversed(row.metrics) if m.name == name and m.output is None}
    return found.get(target) or found.get(None) or (next(iter(found.values()), None) if target is None else None)


def worst_sqnr(row: Candidate, target: str | None) -> Metric | None:
    """The lowest SQNR of a row's outputs; one without a value where outputs are identical."""
    found = [m for m in row.metrics if m.name == "sqnr_db" and target in (None, m.target)]
    return min(found, key=lambda m: float("inf") if m.value is None else m.value, default=None)


def baseline_of(report: Report) -> Candidate | None:
    """What the user brought, or the float reference where that is the same."""
    rows = {row.role: row for row in reversed(report.candidates)}
    return rows.get("original") or rows.get("reference")


def _compared(report: Report, target: str | None) -> Table:
    metric = task_metric(report)
    headers = (
        "model", "gates", "size", metric or "", "accuracy drop", "lowest SQNR", "median latency", "latency ratio",
        "integer share", "MACs",
    )  # fmt: skip
    rows = []
    for row in report.candidates:
        ungated = "no gates" if row.role == "variant" else row.role
        cells = (
            *(on(row, name, target) for name in ("size_bytes", metric or "", "accuracy_drop")),
            worst_sqnr(row, target),
            *(on(row, name, target) for name in ("latency_p50_ms", "latency_ratio", "integer_coverage", "macs")),
        )
        name = f"▸\u00a0{row.name}" if row.name == report.winner else row.name
        gates = outcome(row.outcome) if row.verdicts else text(ungated)
        rows.append((text(name), gates, *(measured(row, cell) for cell in cells)))
    where = f" on {target}" if target else ""
    return table(
        f"Every model{where}, with 95% intervals; SQNR is against the reference, a latency ratio against the reference "
        "timed beside it; median latencies are each of their own session",
        headers,
        rows,
    )


def _cards(report: Report, winner: Candidate) -> list[Card]:
    target = targets_of(report)[0]
    base = baseline_of(report)
    metric = task_metric(report)
    rows = [
        ("Size", "size_bytes"),
        ("Accuracy", metric or ""),
        ("Accuracy drop", "accuracy_drop"),
        ("Latency ratio", "latency_ratio"),
    ]
    cards = []
    for title, name in rows:
        found = on(winner, name, target) if name else None
        if found is None or found.value is None:
            continue
        before = on(base, name, target) if base and name in ("size_bytes", metric) else None
        against = text("")
        if base and before is not None and before.value is not None:
            cell = measured(base, before)
            is_size = name == "size_bytes" and found.value > 0
            times = f", {before.value / found.value:.3g} times as large" if is_size else ""
            against = replace(cell, parts=(f"{base.name}: ", *cell.parts, times))
        elif name == "latency_ratio":
            against = text(f"of the reference's time{f' on {target}' if target else ''}; below 1 is faster")
        elif name == "accuracy_drop" and base:
            against = text(f"lost against {base.name}; below 0 is a gain")
        cards.append(Card(metric if name == metric and metric else title, measured(winner, found), against))
    sqnr = worst_sqnr(winner, target)
    if sqnr is not None:
        cell = measured(winner, sqnr)
        cards.append(Card("Lowest SQNR", cell, text("of the outputs, against the reference; 20 dB is a tenth off")))
    return cards


def _nearest(row: Candidate) -> str:
    failed = [verdict.reason for verdict in row.verdicts if verdict.outcome == "failed"]
    return f"The nearest, {row.name}: {'; '.join(failed)}" if failed else f"The nearest, {row.name}:"


def _went_in(report: Report) -> dict[str, str]:
    said: dict[str, str] = {}
    model = report.config.get("model")
    if isinstance(model, dict):
        said["model"] = str(model.get("onnx") or model.get("factory") or model.get("hf") or "see the config")
    base = baseline_of(report)
    if base is not None and base.digest:
        said["measured against"] = f"{base.name}, sha256 {base.digest[:12]}…"
    samples = next((m.value for c in report.candidates if (m := c.metric("evaluation_samples")) and m.value), None)
    if samples:
        said["measured on"] = f"{samples:,.0f} samples"
    data = report.config.get("data")
    for role, value in data.items() if isinstance(data, dict) else ():
        if value:
            said[f"data, {role}"] = _source(value)
    return said


def _source(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    place = next((f"{value[key]}" for key in ("npz", "npy", "images", "hf", "entry") if value.get(key)), None)
    split = f", split {value['split']}" if value.get("split") else ""
    return f"{place or value.get('kind') or 'see the config'}{split}"


def _came_out(winner: Candidate) -> dict[str, str]:
    out = {"model": "model.onnx", "sha256": f"{winner.digest[:12]}…"}
    bundle = winner.details.get("bundle")
    if isinstance(bundle, dict):
        samples = bundle.get("n_samples")
        out["bundle"] = f"{samples} golden samples" if samples is not None else f"none: {bundle.get('declined')}"
    return out

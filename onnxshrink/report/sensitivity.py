"""The table of the command ``sensitivity``, in 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.search.sensitivity import Proposal

_SHOWN = 20


def print_sensitivity(found: Proposal, console: Console) -> None:
    """Print the groups, those first whose return to float gains most for its work, and what was chosen."""
    facts = found.facts
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("group", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("nodes", "MACs", "noise", "dB if float", ""):
        table.add_column(name, justify="right", no_wrap=True)
    returned = set(facts["returned"])
    for one in facts["sensitivity"][:_SHOWN]:
        decibels = "identical" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f}"
        figures = (str(len(one["nodes"])), f"{one['macs_ratio']:.1%}", f"{one['gain']:.1%}", decibels)
        table.add_row(Text(one["nodes"][0]), *figures, "float" if returned >= set(one["nodes"]) else "")
    console.print(table)
    if len(facts["sensitivity"]) > _SHOWN:
        console.print(f"and {len(facts['sensitivity']) - _SHOWN} more; --json has them all")
    console.print()
    console.print(Text(_summary(found)))


def _summary(found: Proposal) -> str:
    facts = found.facts
    before, after = (_decibels(facts[name]) for name in ("sqnr_db_int8", "sqnr_db_mixed"))
    wanted = f"{facts['min_sqnr_db']:g} dB"
    if not facts["returned"]:
        return f"all in int8: {before}" + (
            f", at least the {wanted} asked for" if facts["reached"] else f" of {wanted}"
        )
    verdict = "" if facts["reached"] else f"; {wanted} needs more than {facts['max_float_ratio']:.0%} in float"
    return f"int8: {before}; mixed: {after} with {facts['float_ratio']:.1%} of the MACs in float{verdict}"


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"

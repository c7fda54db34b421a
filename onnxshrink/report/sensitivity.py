"""The table of the command ``sensitivity``, in 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.search.sensitivity import Proposal

_SHOWN = 20
_NOTES = """\
dB then, noise gone, time: that group alone changed, all others in {base}
time: share of fp32's, from profiled kernels; below, whole models timed in pairs
all shares and ratios are of figures before rounding"""


def print_sensitivity(found: Proposal, console: Console) -> None:
    """Print the groups, those changes first that gain most for their time, and what was chosen."""
    facts = found.facts
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("group", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("MACs", "as", "dB then", "noise gone", "time", ""):
        table.add_column(name, justify="right", no_wrap=True)
    assigned = facts["assigned"]
    for one in facts["sensitivity"][:_SHOWN]:
        decibels = "identical" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f}"
        figures = (
            f"{one['macs_ratio']:.1%}",
            one["scheme"],
            decibels,
            f"{one['gain']:.1%}",
            f"{one['time_ratio']:+.1%}",
        )
        is_chosen = assigned.get(one["nodes"][0]) == one["scheme"]
        table.add_row(Text(one["nodes"][0]), *figures, "chosen" if is_chosen else "")
    console.print(table)
    if len(facts["sensitivity"]) > _SHOWN:
        console.print(f"and {len(facts['sensitivity']) - _SHOWN} more; --json has them all")
    console.print()
    console.print(Text(_NOTES.format(base=facts["base"]), style="dim"))
    console.print()
    console.print(Text(_summary(found)))


def _summary(found: Proposal) -> str:
    facts = found.facts
    lines = [
        f"{scheme} alone: {_decibels(one['sqnr_db'])} in {one['time_ratio'][0]:.2f} of fp32's time"
        for scheme, one in facts["singles"].items()
    ]
    after, wanted = _decibels(facts["sqnr_db_mixed"]), f"{facts['min_sqnr_db']:g} dB"
    verdict = (
        "" if facts["reached"] else f"; {wanted} is out of reach with at most {facts['max_float_ratio']:.0%} in float"
    )
    what = (
        f"{facts['base']} with other schemes at {len(facts['assigned'])} nodes" if facts["assigned"] else facts["base"]
    )
    lines.append(f"chosen: {what}: {after} in {facts['time_ratio'][0]:.2f} of fp32's time{verdict}")
    return "\n".join((*lines, f"because {facts['decision']}"))


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"

"""The table of the command ``explain``, in 80 columns, and what to change."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.verify.explain import Explanation

SHOWN = 12
_NAMED = 5


def print_explanation(found: Explanation, console: Console, *, top: int = SHOWN) -> None:
    """Print the worst nodes, then each cause with its figures and what to change.

    Args:
        found: What was found.
        console: Where to.
        top: Print at most this many nodes, and as many causes.
    """
    console.print(Text(_outputs(found)))
    console.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("node", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("local dB", "as it runs", "outputs", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    for node in found.nodes[:top]:
        figures = (_decibels(v) for v in (node.local_sqnr_db, node.propagated_sqnr_db, node.output_sqnr_db))
        cause = "" if node.finding.cause == "none" else node.finding.cause
        table.add_row(Text(node.node), *figures, f"{node.noise_ratio:.0%}", cause)
    console.print(table)
    if len(found.nodes) > top:
        console.print(f"and {len(found.nodes) - top} more; --json has them all")
    console.print()
    for node in found.findings[:top]:
        console.print(Text(f"{node.finding.node}: {node.finding.cause}: {node.finding.text}"))
        if node.finding.change:
            console.print(Text(f"  change  {node.finding.change}"))
    if not found.findings:
        console.print(Text("no node stands out: what differs is the sum of many small errors"))
    if found.unmatched:
        console.print(Text(_unmatched(found)))
    if found.by_structure:
        console.print(
            Text(f"{found.by_structure} tensors have other names, and were matched by the order of operators")
        )
    if found.patch:
        console.print(Text("\nsettings that would mend it:\n" + found.to_yaml().rstrip()))


def _outputs(found: Explanation) -> str:
    outputs = ", ".join(f"{name} {_decibels(value)} dB" for name, value in found.sqnr_db.items())
    return f"{found.candidate} against {found.reference}: {outputs} on {found.samples} samples, judged for {found.isa}"


def _unmatched(found: Explanation) -> str:
    names = ", ".join(found.unmatched[:_NAMED])
    more = f" and {len(found.unmatched) - _NAMED} more" if len(found.unmatched) > _NAMED else ""
    return f"not matched, so not judged: {names}{more}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"

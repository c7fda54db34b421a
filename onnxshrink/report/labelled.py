"""Labels and texts for a terminal: what is too long goes on under itself."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text


def labelled(*rows: tuple[str | Text, str | Text], indent: int = 0) -> Table:
    """One line for each row, the labels in a column of their own.

    Args:
        rows: Label, dim where it is plain text, and what it says.
        indent: Spaces before the labels.
    """
    table = Table(box=None, show_header=False, pad_edge=indent > 0, padding=(0, 2, 0, indent))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(label, text if isinstance(text, Text) else Text(text))
    return table

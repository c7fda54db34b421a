"""An inspection as one page without scripts that opens offline, in light and dark, and prints."""

from __future__ import annotations

from pathlib import Path

import jinja2

from onnxshrink.report.inspection import Inspection
from onnxshrink.report.terminal import format_bytes, format_count


def inspection_page(found: Inspection) -> str:
    """The HTML text; every name from the model is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "count": format_count}
    return environment.get_template("inspection.html.j2").render(found=found, coverage=found.coverage)

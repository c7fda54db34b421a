"""The page of a run: one file that opens offline, on a phone, in print, in light and in dark.

Nothing is fetched and nothing but the page's own script and style is run: the policy in its head names both by their
digests, and names from the user's model or data are text wherever they stand.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from onnxshrink.core.report import Report
from onnxshrink.core.run_folder import REPORT_FILE, SEARCH_FILE
from onnxshrink.report import evidence, fidelity, history, trials
from onnxshrink.report.blocks import Section
from onnxshrink.report.side_by_side import compare_reports, name_of
from onnxshrink.report.summary import comparison, summarize, verdicts
from onnxshrink.verify.pictures import PICTURES_FILE

PAGE_FILE = "report.html"
COMPARISON_FILE = "compare.html"


def render(report: Report, pictures: Mapping[str, str] | None = None, search: Mapping[str, Any] | None = None) -> str:
    """The page of one report.

    Args:
        report: Of this or any earlier version; sections whose evidence it lacks are left out.
        pictures: By sample number, a PNG as a data URI: ``samples`` of ``pictures.json``.
        search: ``search.json`` of the same run, if a search made it.

    Returns:
        HTML, UTF-8, whole.
    """
    sections = (
        verdicts(report),
        comparison(report),
        history.warnings(report),
        evidence.sizes(report),
        evidence.trade_offs(report),
        evidence.latency(report),
        evidence.package(report),
        fidelity.drift(report, pictures or {}),
        fidelity.coverage(report),
        fidelity.ranges(report),
        history.calibration(report),
        history.training(report),
        trials.search(search),
        history.steps(report),
        history.environment(report),
    )
    return _fill("report.html.j2", sections, report=report, summary=summarize(report))


def render_folder(folder: Path) -> str:
    """The page of a run's folder: the report with the pictures and the search beside it.

    Raises:
        StoreError: There is no report, or it cannot be read.
    """
    return render(
        Report.read(folder / REPORT_FILE), _samples(_beside(folder, PICTURES_FILE)), _beside(folder, SEARCH_FILE)
    )


def render_finished(report: Report, beside: Mapping[str, str | None]) -> str:
    """The page that a run leaves, from its report and the text of the files beside it, as far as there are any."""
    pictures, search = (_object(beside.get(name) or "") for name in (PICTURES_FILE, SEARCH_FILE))
    return render(report, _samples(pictures), search)


def compare_folders(run: Path, other: Path) -> str:
    """The page of two runs' folders side by side.

    Raises:
        StoreError: One has no report, or it cannot be read.
    """
    reports = [Report.read(folder / REPORT_FILE) for folder in (run, other)]
    title = f"{name_of(reports[0])} – {name_of(reports[1])}"  # noqa: RUF001
    return _fill("compare.html.j2", compare_reports(*reports), title=title)


def _samples(pictures: Mapping[str, Any] | None) -> dict[str, str]:
    """The pictures of ``pictures.json`` by sample number."""
    found = (pictures or {}).get("samples")
    return {number: uri for number, uri in found.items() if isinstance(uri, str)} if isinstance(found, dict) else {}


def _beside(folder: Path, name: str) -> Mapping[str, Any] | None:
    try:
        return _object((folder / name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):  # the page is about the report, and tells more where there is more
        return None


def _object(text: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _fill(template: str, sections: tuple[Section, ...], **values: object) -> str:
    """A template with the page's style and script in it."""
    style, script = _read("style.css"), _read("page.js")
    return (
        _environment()
        .get_template(template)
        .render(
            sections=[section for section in sections if section.blocks],
            style=Markup(style),  # noqa: S704  our own files
            script=Markup(script),  # noqa: S704
            policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
            **values,
        )
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _read(name: str) -> str:
    return (files("onnxshrink.report") / "page" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    names = ("blocks.html.j2", "report.html.j2", "compare.html.j2")
    return Environment(
        loader=DictLoader({name: _read(name) for name in names}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

"""The files for people that a run leaves beside its report."""

from __future__ import annotations

from collections.abc import Mapping

from onnxshrink.pipeline import Page
from onnxshrink.report.html import PAGE_FILE, render_finished
from onnxshrink.report.model_card import MODEL_CARD_FILE, model_card

PAGES: Mapping[str, Page] = {MODEL_CARD_FILE: lambda report, _: model_card(report), PAGE_FILE: render_finished}
"""By name, what draws it; the page has the pictures and the search in it."""

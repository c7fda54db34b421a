"""The page of a real run in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import BROWSER, Page, chromium
from command_line import make_project, onnxshrink

from onnxshrink.config.load import load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium: apt-get install chromium"),
]

SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"width": 1280},
    "phone": {"width": 360, "height": 740},
    "dark": {"width": 1280, "scheme": "dark"},
    "print": {"width": 800, "media": "print"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder."""
    project = tmp_path_factory.mktemp("project")
    config = make_project(project)
    config.write_text(config.read_text() + "name: page\n")
    result = onnxshrink("run", config, "--quiet", cwd=project)
    assert result.returncode in {0, 1}, result.stderr
    return project / "runs" / "page"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests."""
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_opens_without_a_complaint(folder: Path, browser: Page, screen: str) -> None:
    """No console message, no request, nothing wider than the screen, and the answer on the first one."""
    browser.open(folder / "report.html", **SCREENS[screen])
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    head = browser.run("(({top, bottom}) => [top, bottom])(document.querySelector('h1').getBoundingClientRect())")
    assert 0 <= head[0] < head[1] < 300


def test_the_figures_of_the_page_are_the_reports(folder: Path, browser: Page) -> None:
    """Every number that the browser shows equals the one of report.json, and no metric of a table's is missing."""
    browser.open(folder / "report.html")
    raw = json.loads((folder / "report.json").read_text())
    metrics = {(c["name"], m["name"], m["target"], m["output"]): m for c in raw["candidates"] for m in c["metrics"]}
    shown = browser.run(
        "[...document.querySelectorAll('data')].map(d => ({...d.dataset, value: Number(d.value), text: d.innerText}))"
    )
    assert len(shown) > 100
    for number in shown:
        metric = metrics[number["row"], number["metric"], number.get("target"), number.get("output")]
        assert number["value"] == metric[number["part"]], number
    for row in raw["candidates"]:
        names = {number["metric"] for number in shown if number["row"] == row["name"]}
        assert {"size_bytes", "latency_ratio", "top1", "macs"} <= names
    verdicts = browser.run("[...document.querySelectorAll('#verdicts tbody tr')].map(r => r.innerText)")
    assert len(verdicts) == sum(len(row["verdicts"]) for row in raw["candidates"])
    for verdict in (verdict for row in raw["candidates"] for verdict in row["verdicts"]):
        assert any(verdict["outcome"] in line and verdict["reason"] in line for line in verdicts)


def test_names_cannot_run_or_draw(folder: Path, browser: Page, tmp_path: Path) -> None:
    """Outputs, nodes, tensors, targets, variants, warnings and trials that look like HTML are text everywhere."""
    evil = """<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b onclick='window.hacked=1'>'"&"""
    text = (folder / "report.json").read_text()
    for name in ("logits", "int8", "cpu"):
        text = text.replace(json.dumps(name), json.dumps(evil + name))
    raw = json.loads(text)
    raw["warnings"] = [evil]
    raw["selection"] = evil
    found = next(row["details"] for row in raw["candidates"] if row["name"] == f"{evil}int8")
    found["ranges"] = {evil + name: value for name, value in found["ranges"].items()}
    for node in found["nodes"]["nodes"]:
        node |= {"node": evil, "op_type": evil, "text": evil}
    trial = {"number": 1, "point": {evil: evil}, "label": evil, "status": evil, "reason": evil, "metrics": []}
    (tmp_path / "report.json").write_text(json.dumps(raw))
    (tmp_path / "search.json").write_text(json.dumps({"trials": [trial], "selection": evil, "history": [{"trial": 1}]}))
    result = onnxshrink("report", tmp_path, cwd=folder.parents[1])
    assert result.returncode == 0, result.stderr
    browser.open(tmp_path / "report.html")
    browser.run("for (const part of document.querySelectorAll('details')) part.open = true")
    pointed = "e.dispatchEvent(new Event('pointerover', {bubbles: true}))"
    browser.run(f"for (const e of document.querySelectorAll('[data-tip]')) {pointed}")
    assert browser.run("window.hacked") is None
    assert browser.run("document.querySelectorAll('img[src=x], b, script').length") == 1
    assert browser.complaints() == []
    for place in ("h1", "#drift", "#trade-offs", "#ranges", "#warnings", "#search", "#latency figcaption"):
        assert "<img src=x onerror" in browser.run(f"document.querySelector('{place}').innerText"), place
    assert browser.run("[...document.querySelectorAll('svg text')].some(t => t.textContent.startsWith('<img src=x'))")


def test_points_and_curves_tell_what_they_are(folder: Path, browser: Page) -> None:
    """Pointed at or reached by keyboard, a point says its figures, within the screen; Escape ends it."""
    browser.open(folder / "report.html", width=360, height=740)
    browser.run("document.querySelector('.point').focus()")
    tip = browser.run("(t => [t.hidden, t.textContent])(document.getElementById('tip'))")
    assert tip == [False, browser.run("document.querySelector('.point').getAttribute('aria-label')")]
    assert browser.run(
        "(b => b.left >= 0 && b.right <= innerWidth)(document.getElementById('tip').getBoundingClientRect())"
    )
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Escape")
    assert browser.run("document.getElementById('tip').hidden")
    assert browser.run("document.querySelectorAll('#training .hit[data-tip]').length") >= 2


def test_a_screen_reader_finds_its_way(folder: Path, browser: Page) -> None:
    """The browser's own tree for assistive technology has landmarks, headings and names for every picture and table."""
    browser.open(folder / "report.html")
    browser.send("Accessibility.enable")
    nodes = [node for node in browser.send("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    by_role: dict[str, list[str]] = {}
    for node in nodes:
        by_role.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"banner", "main", "navigation", "contentinfo"} <= set(by_role)
    assert len(by_role["heading"]) > 8
    for role in ("image", "table", "region", "link"):
        assert by_role[role], role
        assert all(by_role[role]), role


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_paper(folder: Path, browser: Page, scheme: str) -> None:
    """All text has a contrast of at least 4.5 to 1 with what is behind it (WCAG 2.2, 1.4.3)."""
    browser.open(folder / "report.html", scheme=scheme)
    assert browser.run(_CONTRAST) == []


def test_on_paper_everything_is_unfolded(folder: Path, browser: Page) -> None:
    """What is folded on the screen is printed, in a PDF of some pages."""
    browser.open(folder / "report.html")
    folded = "document.querySelectorAll('.blocks > details:not([open])').length"
    assert browser.run(folded) > 3
    browser.run(f"addEventListener('beforeprint', () => window.folded = {folded})")
    assert browser.pdf().startswith(b"%PDF")
    assert browser.run("window.folded") == 0
    assert browser.run(folded) > 3


def test_the_config_of_the_page_is_the_runs(folder: Path, browser: Page) -> None:
    """Copied from the page into a file beside the modules it names, it is the same config again."""
    browser.open(folder / "report.html")
    text = browser.run("[...document.querySelectorAll('#reproduce pre')].map(p => p.textContent)[1]")
    again = folder.parents[1] / "again.yaml"
    again.write_text(text)
    config = json.loads((folder / "report.json").read_text())["config"]
    assert load_config(again).model_dump(mode="json") == config


def test_the_page_is_small_and_can_be_drawn_again(folder: Path, tmp_path: Path) -> None:
    """Below 2 MB, and `report` gives the same bytes again."""
    page = (folder / "report.html").read_bytes()
    assert len(page) < 2_000_000
    again = onnxshrink("report", folder, "--out", tmp_path / "again.html", cwd=folder.parents[1])
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again.html").read_bytes() == page
    refused = onnxshrink("report", folder, "--out", folder / "report.json" / "x.html", cwd=folder.parents[1])
    assert refused.returncode == 2
    assert all(word in refused.stderr for word in ("where", "want", "fix", "--out"))


def test_two_runs_open_side_by_side(folder: Path, browser: Page, tmp_path: Path) -> None:
    """A run compared with one of other figures: differences, no complaint."""
    raw = json.loads((folder / "report.json").read_text())
    raw["config"]["seed"] = 99
    for metric in (m for row in raw["candidates"] for m in row["metrics"] if m["name"] == "size_bytes"):
        metric["value"] += 1000
    (tmp_path / "report.json").write_text(json.dumps(raw))
    result = onnxshrink("report", tmp_path, "--compare", folder, cwd=folder.parents[1])
    assert result.returncode == 0, result.stderr
    for screen in SCREENS.values():
        browser.open(tmp_path / "compare.html", **screen)
        assert browser.complaints() == []
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert "+1.0 kB" in browser.run("document.querySelector('#models').innerText")
    assert "99" in browser.run("document.querySelector('#config').innerText")


_CONTRAST = """
(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *:not(script):not(.inside)")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.closest("#tip")) continue;
    const style = getComputedStyle(e);
    const ours = luminance(parse(e instanceof SVGElement ? style.fill : style.color));
    const theirs = luminance(behind(e));
    const ratio = (Math.max(ours, theirs) + 0.05) / (Math.min(ours, theirs) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.className, ratio]);
  }
  return bad;
})()
"""

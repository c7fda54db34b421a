from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from onnxshrink.core.report import Candidate, Metric, Report, Step, Verdict
from onnxshrink.report import trials
from onnxshrink.report.evidence import latency, package, sizes, trade_offs
from onnxshrink.report.fidelity import ranges
from onnxshrink.report.figures import Bar, Point, Ridge, bars, curves, histogram, is_dominated, ridges, scatter, stack
from onnxshrink.report.html import render
from onnxshrink.report.side_by_side import compare_reports
from onnxshrink.report.summary import on, summarize
from onnxshrink.report.svg import WIDTH, Scale, apart, brief
from onnxshrink.report.terminal import task_metric

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}"
PICTURE = "data:image/png;base64,iVBORw0KGgo="


class Parsed(HTMLParser):
    """Elements with their attributes and the text right in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element begins."""
        self.found.append((tag, dict(attrs), []))
        if tag not in {"meta", "link", "img", "br"}:
            self._open.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        """The innermost one ends."""
        assert self.found[self._open.pop()][0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        """Its text."""
        if self._open:
            self.found[self._open[-1]][2].append(data)

    def all(self, tag: str) -> Iterator[tuple[dict[str, str | None], str]]:
        """Attributes and text of every element of a name."""
        return ((attributes, "".join(text).strip()) for name, attributes, text in self.found if name == tag)


def row(name: str, size: float, ratio: float, sqnr: float | None, outcome: Any = "passed", **details: Any) -> Candidate:
    metrics = (
        Metric("size_bytes", size, "bytes"),
        Metric("macs", 2e6, "count", target="cpu"),
        Metric("integer_coverage", 0.75, "ratio", target="cpu", note="the largest float island"),
        Metric("sqnr_db", sqnr, "dB", target="cpu", output="logits", note=None if sqnr else "identical"),
        Metric("top1", 0.9925, "ratio", 0.98, 0.996, "cpu"),
        Metric("accuracy_drop", -0.005, "ratio", -0.013, 0.003, "cpu"),
        Metric("latency_p50_ms", 0.05 * ratio, "ms", 0.04 * ratio, 0.06 * ratio, "cpu"),
        Metric("latency_ratio", ratio, "ratio", ratio - 0.02, ratio + 0.02, "cpu"),
    )
    verdicts = (Verdict("max_size", 60000, outcome, f"model size {size:,.0f} bytes"),)
    return Candidate(name, "variant", f"variants/{name}/model.onnx", "ab" * 32, metrics, verdicts, details)


def step(name: str, kind: str, **facts: Any) -> Step:
    return Step(name, kind, name.encode().hex(), cached=kind == "distill", seconds=1.0, facts=facts)


def full(name: str = "int8") -> Report:
    """A report with every topic in it."""
    ns = np.random.default_rng(0).lognormal(10.8, 0.1, (2, 3, 20)).round().astype(int).tolist()
    details = {
        "latency": {"cpu": {"provider": "cpu", "threads": 1, "candidate_ns": ns[0], "reference_ns": ns[1]}},
        "worst_samples": {"cpu": {"logits": [{"sample": 17, "relative_l2": 0.1, "max_abs_error": 1, "sqnr_db": 20.0}]}},
        "drift_split": {"cpu": {"declined": "no float kernel"}},
        "coverage": {
            "cpu": [
                {"kind": "integer", "nodes": 3, "macs_ratio": 0.75, "integer_macs_ratio": 0.75, "op_types": ["Conv"]},
                {
                    "kind": "float", "nodes": 1, "macs_ratio": 0.25, "integer_macs_ratio": 0.0, "op_types": ["Softmax"],
                    "main_node": "soft", "cause": "no integer kernel", "fix": "none",
                },
            ]
        },
        "ranges": {
            "w": {"kind": "weight", "edges": [-1, 0, 1], "counts": [3, 4], "lo": -1, "hi": 1, "scale": 0.1, "scales": 1,
                  "clipped_ratio": 0.01, "sqnr_db": None},
        },
        "package": {"fixed": {"file": "model.ort", "size_bytes": 40_000, "outputs": {"logits": {"sqnr_db": None}}}},
        "package_times": {"cpu": {"onnx": {"load_ms": 9.0}, "files": {"fixed": {"load_ms": 3.0}}}},
        "nodes": {"nodes": [{"node": "soft", "op_type": "Softmax", "noise_ratio": 0.7, "local_sqnr_db": 40.0}]},
    }  # fmt: skip
    epochs = [{"epoch": 1, "loss": 2.0, "terms": {"kl": 1.5, "labels": 0.5}}, {"epoch": 2, "loss": 0.01}]
    health = {"samples": [25, 50, 100], "findings": [{"what": "few samples", "fix": "give more"}]}
    quantize = f"{name}/quantize_static"
    steps = (
        step("source", "source", size_bytes=300_000),
        step("distill", "distill", size_bytes=300_000, samples=897, epochs=epochs),
        step("prune_channels", "prune_channels", size_bytes=119_000),
        step("export", "export", size_bytes=121_000),
        step(quantize, "quantize_static", size_bytes=36_000),
        step(f"{quantize} ▸ calibrate", "calibrate", health=health),
    )
    original = Candidate("teacher", "original", "teacher/model.onnx", "cd" * 32, row("", 2e6, 3.0, None).metrics)
    return Report(
        name="digits",
        config={"name": "digits", "stages": [{"kind": "distill"}]},
        candidates=(original, row("fp32", 120_000, 0.99, 146.0, "failed"), row(name, 36_000, 0.76, 40.4, **details)),
        steps=steps,
        winner=name,
        selection=f"selected {name}",
        machine={"processor": "x", "memory_bytes": 8e9},
        versions={"onnxshrink": "0.1.0"},
        seconds=59.0,
        warnings=("mind the samples",),
        finished="2026-11-22T17:51:50+00:00",
        inputs={"data.evaluation": {"npz": "0123456789abcdef" * 4}},
    )


def numbers(page: str) -> Iterator[tuple[dict[str, str | None], str]]:
    return Parsed(page).all("data")


def test_every_number_of_the_page_is_the_reports() -> None:
    """Value, metric, row, target and output of each number name one figure of report.json, bit for bit."""
    report = full()
    raw = {c["name"]: c["metrics"] for c in json.loads(report.to_json())["candidates"]}
    found = list(numbers(render(report)))
    for attributes, _ in found:
        keys = {
            "name": attributes["data-metric"],
            "target": attributes.get("data-target"),
            "output": attributes.get("data-output"),
        }
        (metric,) = [m for m in raw[str(attributes["data-row"])] if all(m[key] == value for key, value in keys.items())]
        assert float(str(attributes["value"])) == metric[str(attributes["data-part"])]
    shown = {(a["data-row"], a["data-metric"]) for a, _ in found}
    assert {(c.name, m.name) for c in report.candidates for m in c.metrics if m.value is not None} <= shown


def test_the_first_screen_says_what_to_do() -> None:
    """Ship, do not ship, or not proven, before anything else."""
    report = full()
    heads = {
        "✓ Ship int8": report,
        "✗ Do not ship": replace(report, winner=None, selection="none passed"),
        "? Not proven: int8 fails no gate, and 1 could not be decided": replace(
            report, candidates=(row("int8", 1e4, 0.9, 30.0, "inconclusive"),)
        ),
        "? int8 was chosen, and no gate judged it": replace(
            report, candidates=(replace(row("int8", 1e4, 0.9, 30.0), verdicts=()),)
        ),
        "? Not proven: int8 passes every gate, on figures that prove little": replace(
            report, warnings=("drift and accuracy were measured on the calibration samples: they are optimistic",)
        ),
    }
    for expected, case in heads.items():
        assert [text for _, text in Parsed(render(case)).all("h1")] == [expected]


def test_a_model_that_guesses_is_not_shipped() -> None:
    """What keeps the figures from proving anything stands under the headline, not below the fold."""
    report = full()
    first = report.candidates[0]
    guessed = Metric("top1", 0.297, "ratio", 0.2, 0.4, "cpu", note="not above the chance of 33.3% with 3 classes")
    metrics = (guessed, *(m for m in first.metrics if m.name != "top1"))
    summary = summarize(replace(report, candidates=(replace(first, metrics=metrics), *report.candidates[1:])))
    assert summary.headline.startswith("? Not proven")
    assert summary.outcome == "inconclusive"
    assert summary.reason.startswith(f"top1 of {first.name}, 29.7%, is not above the chance of 33.3%")


@pytest.mark.parametrize("number", [0, -1])
def test_neither_the_original_nor_the_winner_may_guess(number: int) -> None:
    """Accuracy that is not above chance is no reason to ship, whichever of the two has it."""
    report = full()
    rows = list(report.candidates)
    guessed = Metric("top1", 0.3, "ratio", 0.2, 0.4, "cpu", note="not above the chance of 33.3% with 3 classes")
    rows[number] = replace(rows[number], metrics=(guessed, *(m for m in rows[number].metrics if m.name != "top1")))
    assert summarize(replace(report, candidates=tuple(rows))).outcome == "inconclusive"


def test_what_is_warned_of_the_winner_stands_on_the_first_screen() -> None:
    """Its own warnings and its steps', not those of a longer name; the others are linked; so is the sample count."""
    own = ("int8: far from the reference", "int8/quantize_static: few samples")
    report = full()
    counted = replace(
        report.candidates[-1],
        metrics=(*report.candidates[-1].metrics, Metric("evaluation_samples", 1797.0, "count", target="cpu")),
    )
    case = replace(report, warnings=(*own, "int8_slow: slow", "mind"), candidates=(*report.candidates[:-1], counted))
    first, rest = render(case).split("<main", 1)
    assert summarize(case).warnings == own
    assert all(line in first for line in (*own, "1,797 samples", '<a href="#warnings">All warnings (4)</a>'))
    assert "int8_slow: slow" not in first
    assert "int8_slow: slow" in rest


def test_without_a_winner_the_nearest_shows_what_is_missing() -> None:
    """The figures of the variant that fails the fewest gates, and why it fails; never those of one without a model."""
    unmade = Candidate("gone", "variant", "", "", (), (Verdict("completed", 1.0, "failed", "it could not be made"),))
    far = row("far", 9e4, 0.9, 3.0, "failed")
    far = replace(far, verdicts=(*far.verdicts, Verdict("min_sqnr_db", 20.0, "failed", "3 dB is below 20")))
    near = row("near", 7e4, 0.9, 30.0, "failed")
    report = replace(full(), candidates=(unmade, far, near), winner=None, selection="no model keeps every limit")
    summary = summarize(report)
    assert summary.reason == "no model keeps every limit"
    assert summary.shown == "The nearest, near: model size 70,000 bytes"
    assert [card.title for card in summary.cards] == ["Size", "top1", "Accuracy drop", "Latency ratio", "Lowest SQNR"]
    parsed = Parsed(render(report))
    shown = [a["data-row"] for a, _ in parsed.all("data")]
    assert shown[0] == "near"
    captions = [text for _, text in parsed.all("span") if text.startswith("Gates of")]
    assert captions == ["Gates of near: failed", "Gates of far: failed", "Gates of gone: failed"]
    assert summarize(replace(report, candidates=(unmade,))).cards == ()


def many(n: int) -> Report:
    """As a search leaves it: names differ in their last letters, and all have every topic."""
    details = full().candidate("int8").details
    rows = [
        row(
            f"static_per_channel_mse_compact_without_the_first-{i}", 36_000 + 700 * (i * 11 % n), 0.76 - i / n / 9, 40.4
        )
        for i in range(n)
    ]
    rows = [replace(one, details=details) for one in rows]
    return replace(full(), candidates=(full().candidates[0], *rows), winner=rows[n // 2].name)


def test_thirty_variants_stay_a_page() -> None:
    """All of them are in the tables; drawn and looked at closely are the winner and those nearest to it."""
    report = many(30)
    one, page = render(many(6)), render(report)
    assert len(page) < 3 * len(one)
    parsed = Parsed(page)
    compared = [a["data-row"] for a, _ in parsed.all("data") if a["data-metric"] == "integer_coverage"]
    assert compared == ["teacher", *(one.name for one in report.variants)]
    titles = [text for _, text in parsed.all("figcaption")]
    assert sum("where the error is born" in title for title in titles) == 6
    assert next(title for title in titles if "where the error is born" in title).startswith(str(report.winner))
    assert page.count("Of 30 variants the 6") >= 4
    assert "Of 6 variants" not in one
    folded = [text for _, text in parsed.all("summary") if text.startswith("Gates of")]
    assert len(folded) == 27


@pytest.mark.parametrize("n", [6, 30])
def test_labels_stay_in_their_drawing(n: int) -> None:
    """However long names are and however many: no label is cut at the edge, and no drawing has more than a few."""
    for section in (trade_offs(many(n)), latency(many(n)), sizes(many(n))):
        for figure in (block for block in section.blocks if block.kind == "figure"):
            labels = list(Parsed(figure.svg).all("text"))
            assert len(labels) < 35
            for place, words in labels:
                x, wide = float(str(place["x"])), 6.9 * len(words)
                start = {"start": x, "middle": x - wide / 2, "end": x - wide}[str(place["text-anchor"])]
                assert start >= -1, words
                assert start + wide <= WIDTH + 8, words
                assert 0 < float(str(place["y"])) <= float(figure.svg.split('"')[1].split(" ")[3])


def test_no_label_of_a_scatter_lies_on_another() -> None:
    """Neither those on one side of their points nor those that meet in the middle."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [
            Point(f"variant_{i}" * int(n), 10.0**x, y, None, on_front=True, tip="")
            for i, (x, y, n) in enumerate(
                zip(rng.uniform(0, 1, 8), rng.uniform(0, 1, 8), rng.integers(1, 4, 8), strict=True)
            )
        ]
        drawn = Parsed(scatter(points, "t", names=("x", "y"), said=(str, str))).all("text")
        found = [(a, words) for a, words in drawn if a.get("class") == "halo"]
        assert len(found) >= 7
        boxes = []
        for place, words in found:
            x, wide = float(str(place["x"])), 6.9 * len(words)
            boxes.append((x - wide if place["text-anchor"] == "end" else x, wide, float(str(place["y"]))))
        for (x, wide, y), (other, width, height) in combinations(boxes, 2):
            assert abs(y - height) >= 14 or x + wide <= other or other + width <= x


def test_a_long_name_keeps_its_ends() -> None:
    """What tells names apart is at their end, what they are at their start; short ones stay."""
    assert brief("static_per_channel_mse_compact-15", 144.0) == "static_pe…compact-15"
    assert brief("int8", 144.0) == "int8"


def test_pictures_stand_once_for_a_model() -> None:
    """A second target with the same worst samples has its figures, and not their pictures again."""
    (sample,) = full().candidate("int8").details["worst_samples"]["cpu"]["logits"]
    details = full().candidate("int8").details
    again = {"cpu": {"logits": [sample]}, "cpu x2": {"logits": [sample]}, "gpu": {"logits": [sample | {"sample": 18}]}}
    report = replace(full(), candidates=(row("int8", 1e4, 0.9, 30.0, **(details | {"worst_samples": again})),))
    page = render(report, {"17": PICTURE, "18": PICTURE})
    assert len(list(Parsed(page).all("img"))) == 2
    assert page.count("Worst samples of int8 on cpu x2") >= 2


def test_a_range_without_an_end_has_no_histogram() -> None:
    """Its other figures stand in the table."""
    details = full().candidate("int8").details
    cut = {name: value for name, value in details["ranges"]["w"].items() if name != "lo"}
    report = replace(full(), candidates=(row("int8", 1e4, 0.9, 30.0, **(details | {"ranges": {"w": cut}})),))
    (note, table) = ranges(report).blocks
    assert (note.kind, table.kind) == ("note", "table")


def test_names_are_text_wherever_they_stand() -> None:
    """A variant, output, sample, node or config that looks like HTML or a template stays what it is."""
    report = json.loads(full(HOSTILE).to_json().replace("logits", json.dumps(HOSTILE)[1:-1]))
    report["config"] = {HOSTILE: HOSTILE}
    report["warnings"] = [HOSTILE]
    report["name"] = HOSTILE
    hostile = Report.from_json(json.dumps(report))
    for page in (
        render(hostile, {"17": PICTURE}, {"trials": [{"number": HOSTILE, "point": {HOSTILE: HOSTILE}}]}),
        render(hostile, {"17": f'{PICTURE}"><script>'}),
    ):
        parsed = Parsed(page)
        assert len(list(parsed.all("script"))) == 1
        assert "<script>alert" not in page
        assert f"✓ Ship {HOSTILE}" in [text for _, text in parsed.all("h1")]
        assert not [name for _, attributes, _ in parsed.found for name in attributes if name.startswith("on")]


def test_pictures_come_from_data_uris_alone() -> None:
    """A picture with another address is left out: nothing is fetched."""
    assert [a["src"] for a, _ in Parsed(render(full(), {"17": PICTURE})).all("img")] == [PICTURE]
    assert not list(Parsed(render(full(), {"17": "https://example.org/x.png"})).all("img"))


def test_nothing_outside_the_page_is_named() -> None:
    """No address but its own anchors; the policy allows its own script and style by digest."""
    parsed = Parsed(render(full()))
    links = [a.get("href") or a.get("src") for _, a, _ in parsed.found if a.get("href") or a.get("src")]
    assert all(str(link).startswith(("#", "data:")) for link in links)
    anchors = {f"#{a['id']}" for _, a, _ in parsed.found if "id" in a}
    assert {link for link in links if str(link).startswith("#")} <= anchors
    policy = next(a["content"] for a, _ in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'sha256-\S+'; script-src 'sha256-\S+'", str(policy)
    )


def test_old_reports_render_without_empty_sections() -> None:
    """A report of the first version, with no details, facts or versions, shows what it has and no bare heading."""
    raw = asdict(full())
    old = {key: raw[key] for key in ("name", "config", "winner", "selection", "seconds")} | {
        "machine": {}, "versions": {}, "schema": 1, "steps": [],
        "candidates": [{k: v for k, v in c.items() if k != "details"} for c in raw["candidates"]],
    }  # fmt: skip
    titles = [text for _, text in Parsed(render(Report.from_json(json.dumps(old)))).all("h2")]
    assert "Verdicts" in titles
    assert "Trade-offs" in titles
    assert not {"Latency", "Ranges", "Calibration", "Training", "Search", "Steps", "Warnings"} & set(titles)
    bare = Report("r", {}, (), (), None, "nothing was measured", {}, {}, 0.0)
    assert "nothing was measured" in render(bare)


def trial(number: int, size: float, drop: float | None, **more: Any) -> dict[str, Any]:
    metrics = [Metric("size_bytes", size, "bytes"), Metric("sqnr_db", 30.0 - number, "dB", target="cpu", output="y")]
    if drop is not None:
        metrics += [
            Metric("accuracy_drop", value, "ratio", target=t) for value, t in ((drop, "cpu"), (drop / 2, "gpu"))
        ]
    return {
        "number": number,
        "point": {"width": "8"},
        "status": "evaluated",
        "metrics": list(map(asdict, metrics)),
    } | more


def test_a_search_without_a_winner_says_what_to_relax() -> None:
    """Each limit with what was asked for and what suffices, rounded so that it does, as a config has them."""
    known = {
        "selection": "no model keeps every limit",
        "trials": [trial(1, 1693.0, 0.02, name="fp16-1", label="width 8, fp16", limits={"max_size": "failed"})],
        "nearest": [
            {"trial": 1, "misses": [{"limit": "max_size", "asked": 1000.0, "needed": 1691.0, "share": 0.7}]},
            {"trial": 1, "misses": [{"limit": "min_sqnr_db", "asked": 40.0, "needed": 28.999, "share": 0.3}]},
            {"trial": 9, "misses": [{"limit": "max_macs", "asked": 1.0, "needed": None, "share": None}]},
        ],
    }
    note, relax, tried = trials.search(known).blocks
    assert note.kind == "note"
    assert note.text == known["selection"]
    assert relax.kind == tried.kind == "table"
    assert [[cell.parts[0] for cell in row] for row in relax.rows] == [
        ["max_size", "1 kB", "1.7 kB", "width 8, fp16 (fp16-1)"],
        ["min_sqnr_db", "40 dB", "28.9 dB", "width 8, fp16 (fp16-1)"],
    ]  # fmt: skip
    (cells,) = tried.rows
    assert [cell.parts[0] for cell in cells] == [
        "1", "width 8, fp16 (fp16-1)", "evaluated", "1.7 kB", "+2.00 pt", "29.0 dB", "max_size",
    ]  # fmt: skip


def test_a_search_shows_its_course() -> None:
    """Trials by size and accuracy drop, worst over targets, or by SQNR where none is scored; and each better one."""
    known = {
        "n_points": 8, "counts": {"evaluated": 2, "failed": 0}, "is_whole": False, "front": [2], "winner": 2,
        "history": [{"trial": 1, "work_seconds": 3.0, "size_bytes": 9e3}, {"trial": 2, "work_seconds": 5.5}],
    }  # fmt: skip
    scored, bare = (trials.search(known | {"trials": [trial(1, 9e3, d), trial(2, 5e3, d)]}) for d in (0.01, None))
    figure, history, tried = scored.blocks
    assert figure.kind == "figure"
    tips = [a["data-tip"] for a, _ in Parsed(figure.svg).all("g") if "data-tip" in a]
    assert tips[1] == "2, width=8: 5.0 kB, accuracy drop +1.00 pt, evaluated"
    assert "+1 pt" in [words for _, words in Parsed(figure.svg).all("text")]
    assert history.kind == tried.kind == "table"
    assert [row[2].parts[0] for row in history.rows] == ["3.0 s", "5.5 s"]
    assert tried.caption == "2 trials of 8 models: 2 evaluated; the search ended before all was tried"
    by_drift = bare.blocks[0]
    assert by_drift.kind == "figure"
    assert "lowest SQNR 28.0 dB" in by_drift.svg


def test_every_topic_has_its_section() -> None:
    """What the report knows, the page shows."""
    search = {"trials": [{"number": 1, "point": {"width": "8"}, "status": "full", "metrics": []}], "selection": "none"}
    titles = [text for _, text in Parsed(render(full(), {}, search)).all("h2")]
    for title in (
        "What went in", "What came out", "Verdicts", "All models", "Warnings", "Where the bytes went", "Trade-offs",
        "Latency", "Package", "Drift", "Integer coverage", "Ranges", "Calibration", "Training", "Search", "Steps",
    ):  # fmt: skip
        assert title in titles


def test_readers_of_screens_get_the_same() -> None:
    """Tables have captions and named cells, drawings a description, headings no gaps, ids one owner."""
    page = render(full(), {"17": PICTURE})
    parsed = Parsed(page)
    assert len(list(parsed.all("table"))) == len(re.findall("<caption><span>[^<]+</span></caption>", page))
    assert all(a.get("scope") in {"row", "col"} for a, _ in parsed.all("th"))
    assert all(a["aria-label"] for a, _ in parsed.all("svg"))
    assert all(a["alt"] for a, _ in parsed.all("img"))
    assert next(parsed.all("html"))[0]["lang"] == "en"
    levels = [int(name[1]) for name, _, _ in parsed.found if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a, _ in parsed.found if "id" in a]
    assert len(ids) == len(set(ids))


def test_drift_is_not_taken_for_accuracy() -> None:
    """The cosine of an output is no task metric, and a task's cosine is not that of an output."""
    of_output = Metric("cosine", 0.5, target="cpu", output="logits")
    drifted = replace(row("int8", 1e4, 0.9, 30.0), metrics=(Metric("size_bytes", 1e4, "bytes"), of_output))
    report = replace(full(), candidates=(drifted,))
    assert task_metric(report) is None
    judged = replace(drifted, metrics=(*drifted.metrics, Metric("cosine", 0.9, target="cpu")))
    assert task_metric(replace(report, candidates=(judged,))) == "cosine"
    found = on(judged, "cosine", "cpu")
    assert found is not None
    assert found.value == 0.9


def test_the_waterfall_goes_from_the_original_to_the_winner() -> None:
    """Teacher, student, pruned, ONNX, quantized, each once and with its bytes; unchanged sizes are left out."""
    (figure,) = sizes(full()).blocks
    assert figure.kind == "figure"
    assert figure.table is not None
    rows = [(r[0].parts[0], r[1].parts[0]) for r in figure.table.rows]
    assert rows == [
        ("teacher", "2,000,000"), ("student", "300,000"), ("pruned channels", "119,000"), ("fp32 ONNX", "121,000"),
        ("int8", "36,000"),
    ]  # fmt: skip


def test_points_lie_where_their_values_are() -> None:
    """A scale is linear, or linear in the logarithm, and holds what is outside at its edge."""
    linear, log = Scale(0.0, 10.0, 100.0, 0.0), Scale(1.0, 100.0, 0.0, 10.0, log=True)
    assert [linear(v) for v in (0.0, 5.0, 10.0, 11.0)] == [100.0, 50.0, 0.0, 0.0]
    assert [log(v) for v in (0.0, 1.0, 10.0, 100.0)] == pytest.approx([0.0, 0.0, 5.0, 10.0])
    assert linear.ticks() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert all(scale.lo <= t <= scale.hi for scale in (linear, log) for t in scale.ticks())


@pytest.mark.parametrize(("lo", "hi"), [(1e-9, 2e-9), (0.97, 1.01), (3.0, 3e6), (-5.0, -4.99)])
def test_axes_have_round_ticks(lo: float, hi: float) -> None:
    """Two to ten, whatever the span."""
    assert 2 <= len(Scale(lo, hi, 0.0, 1.0).ticks()) <= 10
    assert lo < 0 or 2 <= len(Scale(lo, hi, 0.0, 1.0, log=True).ticks()) <= 10


def test_labels_do_not_lie_on_each_other() -> None:
    """Neighbours are moved apart, and the rest stays."""
    assert apart([10.0, 11.0, 50.0], 14.0) == [10.0, 24.0, 50.0]
    assert apart([10.0, 48.0, 50.0], 14.0, 52.0) == [10.0, 38.0, 52.0]


def test_the_front_is_what_nothing_beats() -> None:
    """No worse in everything and better in something beats; equals do not beat each other."""
    points = [(1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (2.0, 2.0)]
    assert [is_dominated(point, points) for point in points] == [False, False, True, False]


def test_drawings_stand_odd_numbers() -> None:
    """One value, equal values, zeros and no counts: no drawing is worth a run."""
    one = Point("a", 1.0, 0.0, None, on_front=True, tip="a")
    drawn = [
        bars([Bar("a", 0.0, "0 B")], "t"),
        scatter([one], "t", names=("x", "y"), said=(str, str)),
        scatter([one, one], "t", names=("x", "y"), said=(str, str), level=1.0),
        ridges([Ridge("a", np.array([5.0]), 5.0, None, "a")], "t", axis="x", said=str),
        curves({"loss": [0.0, 0.0]}, "t", axis="loss"),
        curves({"loss": [1e9, 1e-9], "kl": [math.pi] * 2}, "t", axis="loss"),
        stack([], "t"),
        stack([("integer", 1.0, "a", "c2"), ("float", 0.0, "b", "c4")], "t"),
        histogram([0.0, 0.0], [0], (0.0, 0.0), "t", 0),
    ]
    for svg in drawn:
        assert "nan" not in svg
        assert "inf" not in svg
        Parsed(svg)


@pytest.mark.parametrize(
    ("digests", "said"),
    [(("ab", "ab"), "the same"), (("ab", "cd"), "another file"), (("ab", ""), None), (("", ""), None)],
)
def test_two_files_are_the_same_where_their_digests_are(digests: tuple[str, str], said: str | None) -> None:
    """What neither report knows is not the same."""
    pair = [replace(full(), candidates=(replace(row("int8", 1.0, 1.0, 30.0), digest=one),)) for one in digests]
    (table,) = next(section for section in compare_reports(*pair) if section.title == "Models").blocks
    assert table.kind == "table"
    found = {str(r[0].parts[0]): str(r[3].parts[0]) for r in table.rows}
    assert found.get("sha256") == said


def test_runs_of_one_minute_are_told_apart() -> None:
    """A small run is done in a second: the columns of two must not have one name."""
    one, other = (replace(full(), finished=f"2026-11-22T17:51:{second}+00:00") for second in (50, 51))
    (_, _, table, *_) = next(s for s in compare_reports(one, other) if s.title == "Winners").blocks
    assert table.kind == "table"
    assert len(set(table.headers)) == 4


def test_what_has_no_share_of_a_bar_can_be_seen() -> None:
    """A float island without multiply-accumulates is a line of some width, and the bar stays as long as it is."""
    drawn = stack([("integer", 1.0, "a", "c2"), ("float", 0.0, "b", "c4"), ("integer", 0.0, "c", "c2")], "t")
    widths = [float(str(a["width"])) for a, _ in Parsed(drawn).all("rect")]
    assert min(widths) > 2
    assert sum(widths) == pytest.approx(WIDTH, abs=0.1)


def test_a_bar_is_told_without_colours() -> None:
    """What runs in float and what is mixed are hatched, each its own way and within its part, and so is the legend."""
    parts = [
        ("integer", 0.5, "a", "c2"),
        ("float", 0.3, "b", "c4"),
        ("mixed", 0.2, "c", "c1"),
        ("float", 0.0, "d", "c4"),
    ]
    parsed = Parsed(stack(parts, "t"))
    assert [text for _, text in parsed.all("text")] == ["integer", "float", "mixed"]
    hatches = [str(a["d"]) for a, _ in parsed.all("path") if a["class"] == "hatch"]
    assert len(hatches) == 5  # three parts of the bar and two of the legend
    leaning, upright, *_ = ([tuple(map(float, end.split(","))) for end in re.split("[ML]", d)[1:]] for d in hatches)
    assert all(low[1] - high[1] == pytest.approx(high[0] - low[0], abs=0.11) for low, high in batched(leaning))
    assert all(low[0] == high[0] for low, high in batched(upright))
    bars = [(float(str(a["x"])), float(str(a["width"]))) for a, _ in parsed.all("rect")]
    for (x, width), drawn in ((bars[1], leaning), (bars[2], upright)):
        assert all(x - 0.1 <= end[0] <= x + width + 0.1 and 2 <= end[1] <= 32 for end in drawn)


def batched(ends: list[tuple[float, ...]]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Both ends of each line."""
    return list(zip(ends[::2], ends[1::2], strict=True))


def test_the_counts_of_a_histogram_can_be_read() -> None:
    """Each bin that is not empty is a row of a table under the drawing: from, to, how many, held or clipped."""
    found = {"kind": "weight", "lo": -1.0, "hi": 1.0, "edges": [-2.0, -1.0, 0.0, 1.0, 2.0], "counts": [3, 1200, 0, 7]}
    report = replace(full(), candidates=(row("int8", 1e4, 0.9, 30.0, ranges={"w": found}),))
    _, figure, table = ranges(report).blocks
    assert (figure.kind, table.kind) == ("figure", "table")
    assert figure.kind == "figure"
    assert figure.table is not None
    said = [tuple(str(cell.parts[0]) for cell in line) for line in figure.table.rows]
    assert said == [("-2 to -1", "3", "clipped"), ("-1 to 0", "1,200", "held"), ("1 to 2", "7", "clipped")]


def test_without_a_winner_the_warnings_are_those_of_the_nearest() -> None:
    """The first screen has those of the variant that it shows, and not those of others."""
    near, far = row("near", 7e4, 0.9, 30.0, "failed"), row("near2", 9e4, 0.9, 3.0, "failed")
    far = replace(far, verdicts=(*far.verdicts, Verdict("min_sqnr_db", 20.0, "failed", "3 dB is below 20")))
    said = ("near: it is slow", "near2: it is slower", "near/quantize_static: it clips", "of all")
    report = replace(full(), candidates=(far, near), winner=None, selection="none", warnings=said)
    assert summarize(report).warnings == ("near: it is slow", "near/quantize_static: it clips")


def test_the_page_says_what_devices_make_of_a_package() -> None:
    """Phones, instruction sets and operators, of the stage's facts, whether it is the variant's own or of all."""
    facts = {
        "required": "required_operators.config", "operators": ["ai.onnx:Conv:11", "ai.onnx:Relu:14"],
        "files": {"fixed": {"file": "model.ort", "instruction_sets": {"minimum": "none", "may_saturate": 3}}},
        "mobile": [{"provider": "nnapi", "suits": "no", "suits_if_fixed": "yes"}, {"provider": "coreml"}],
    }  # fmt: skip
    packed = row("int8", 1e4, 0.9, 30.0, package={"fixed": {"file": "model.ort", "size_bytes": 7}})
    for name in ("int8/package_ort", "package_ort"):
        step = Step(name, "package_ort", "d", cached=False, seconds=0.1, facts=facts)
        report = replace(full(), candidates=(packed,), steps=(step,))
        _, table = package(report).blocks
        assert table.kind == "table"
        said = [tuple(str(cell.parts[0]) for cell in line) for line in table.rows]
        assert said == [
            ("int8", "nnapi", "no; yes with fixed shapes"),
            ("int8", "coreml", "None"),
            ("int8", "model.ort, minimum", "none"),
            ("int8", "operators of a reduced build", "2, listed in required_operators.config"),
        ]
    (_,) = package(replace(report, steps=())).blocks


def test_two_runs_stand_side_by_side() -> None:
    """Each figure of both with the difference, and whether the intervals lie apart; then what was asked differently."""
    other = replace(
        full(), name="before", config={"name": "digits", "stages": [{"kind": "distill", "epochs": 3}]},
        candidates=(row("int8", 40_000, 0.9, 35.0, "failed"),), winner=None,
    )  # fmt: skip
    sections = {section.title: section for section in compare_reports(full(), other)}
    (table, only) = sections["Models"].blocks
    assert table.kind == "table"
    found = {str(r[0].parts[0]): str(r[3].parts[0]) for r in table.rows}
    assert found["size"] == "−4.0 kB, −10.0%"  # noqa: RUF001
    assert found["median latency"].endswith("timed at different hours")
    assert found["latency ratio"] == "−0.14; intervals apart"  # noqa: RUF001
    assert found["top1"] == "the same"
    assert found["lowest SQNR"] == "+5.4 dB"
    assert only.kind == "note"
    assert only.text == "Only in digits, 2026-11-22 17:51:50: teacher, fp32"
    (config,) = sections["Config"].blocks
    assert config.kind == "table"
    assert [[str(cell.parts[0]) for cell in r] for r in config.rows] == [["stages[0].epochs", "–", "3"]]  # noqa: RUF001

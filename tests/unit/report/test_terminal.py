from __future__ import annotations

import os
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onnxshrink.core.report import Candidate, Metric, Report, Verdict
from onnxshrink.report.next_steps import next_steps
from onnxshrink.report.terminal import format_count, print_report


def shown(*candidates: Candidate) -> str:
    console = Console(file=StringIO(), width=80)
    report = Report("r", {}, candidates, (), None, "none", {}, {}, 0.0)
    print_report(report, console)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def row(name: str, macs: float, sparsity: float | None, compressed: float) -> Candidate:
    metrics = [Metric("macs", macs, "count", target="cpu"), Metric("compressed_bytes", compressed, "bytes")]
    if sparsity is not None:
        metrics.append(Metric("sparsity", sparsity, "ratio"))
    return Candidate(name, "variant", "", "", tuple(metrics))


def test_macs_and_compressed_bytes_stand_where_they_tell_something() -> None:
    """Equal values stand once; a run that neither cut nor pruned shows neither line."""
    text = shown(row("unpruned", 2e6, 0.0, 9000.0), row("fp32", 1e6, 0.5, 5000.0), row("int8", 1e6, None, 1200.0))
    assert "MACs of a sample: unpruned 2.0 M; fp32, int8 1.0 M" in text
    assert "compressed: unpruned 9.0 kB; fp32 5.0 kB; int8 1.2 kB" in text
    dense = shown(row("fp32", 1e6, 0.0, 9000.0), row("int8", 1e6, None, 2500.0))
    assert "MACs" not in dense
    assert "compressed" not in dense


@pytest.mark.parametrize(
    ("value", "text"), [(999, "999"), (12_345, "12.3 k"), (345_678, "346 k"), (4.1e9, "4.10 G"), (390e6, "390 M")]
)
def test_counts_are_read_at_a_glance(value: float, text: str) -> None:
    """Three digits and a unit."""
    assert format_count(value) == text


def test_what_was_not_measured_on_a_target_is_not_shown_there() -> None:
    """A target without latency shows none, and not that of another; what belongs to no target stands on each."""
    times = Metric("latency_p50_ms", 1.25, "ms", target="cpu"), Metric("sqnr_db", 40.0, "dB", target="plain")
    text = shown(Candidate("int8", "variant", "", "", (*times, Metric("size_bytes", 9000.0, "bytes"))))
    on_cpu, on_plain = text.split("on cpu")[1].split("on plain")
    assert "1.25" in on_cpu
    assert "1.25" not in on_plain
    assert on_cpu.count("9.0 kB") == on_plain.count("9.0 kB") == 1


def test_milliseconds_and_ratios_say_what_they_are_of() -> None:
    """A ratio is of its own pairs, so it need not be the quotient of the milliseconds beside it."""
    times = Metric("latency_p50_ms", 0.0994, "ms", target="cpu"), Metric("latency_ratio", 0.91, "ratio", target="cpu")
    text = shown(Candidate("int8", "variant", "", "", times))
    assert "ms: median, each timed in its own session" in text
    assert "latency ratio (95% interval): against the reference timed beside it" in text


def test_a_long_name_is_whole() -> None:
    """Names of a search end in the number that tells them apart: they are folded where a line has no room."""
    names = [f"static_per_channel_mse_compact-{number}" for number in (14, 15)]
    rows = tuple(
        Candidate(name, "variant", "", "1", (Metric("size_bytes", 1.0), Metric("top1", 0.5, "ratio", target="cpu")))
        for name in names
    )
    text = StringIO()
    print_report(Report("r", {}, rows, (), None, "", {}, {}, 1.0), Console(file=text, width=40))
    lines = text.getvalue().splitlines()
    folded = "".join(line[2:].split(" ")[0] for line in lines)
    assert all(name in folded for name in names)
    assert not any(name in line for name in names for line in lines)
    assert max(map(len, lines)) <= 40


def test_the_cosine_of_the_task_is_not_that_of_an_output() -> None:
    """Drift has one of the same name, nearer to 1: neither the score nor its change is taken of it."""

    def judged(name: str, role: Any, cosine: float) -> Candidate:
        drift = Metric("cosine", 1.0, target="cpu", output="y")
        return Candidate(name, role, "", "", (drift, Metric("cosine", cosine, "ratio", target="cpu")))

    text = shown(judged("reference", "reference", 0.75), judged("int8", "variant", 0.5))
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("  ")][1:] == [
        ["75.0%"], ["50.0%", "-25.0", "no", "gates"],
    ]  # fmt: skip


def measured(name: str, role: str, size: float, top1: float, drop: float | None, **more: Any) -> Candidate:
    """A row as a run leaves it; ``ratio`` is value, lo, hi."""
    metrics = [Metric("size_bytes", size, "bytes"), Metric("top1", top1, "ratio", target="cpu")]
    if drop is not None:
        metrics.append(Metric("accuracy_drop", drop, "ratio", drop - 0.004, drop + 0.004, target="cpu"))
    if "sqnr" in more:
        metrics.append(Metric("sqnr_db", more["sqnr"], "dB", target="cpu", output="logits"))
    value, low, high = more["ratio"]
    metrics.append(Metric("latency_p50_ms", 1.234 * value, "ms", target="cpu"))
    metrics.append(Metric("latency_ratio", value, "ratio", low, high, target="cpu"))
    verdicts = tuple(Verdict(gate, 0.0, outcome, why, "cpu") for gate, outcome, why in more.get("verdicts", ()))
    return Candidate(name, role, f"variants/{name}/model.onnx", "", tuple(metrics), verdicts)  # type: ignore[arg-type]


TEACHER = measured("teacher", "original", 2_224_151, 0.9875, None, ratio=(3.37, 3.12, 3.4))
REFERENCE = measured("reference", "reference", 121_273, 0.9925, -0.005, ratio=(1.0, 1.0, 1.0))
KEPT = ("max_accuracy_drop", "passed", "kept")
SLOW = ("max_latency_ratio", "inconclusive", "latency 1.00 straddles the limit of 1: measure longer")
LOST = ("max_accuracy_drop", "failed", "accuracy drop 3.00 points exceeds the limit of 1.00")
BIG = ("max_size", "failed", "model size 150,000 bytes exceeds the limit of 60,000 bytes")
GOOD = measured(
    "int8_per_channel", "variant", 37_776, 0.985, 0.0025, sqnr=41.1, ratio=(0.6, 0.58, 0.61), verdicts=[KEPT]
)
BAD = measured("int8_per_tensor", "variant", 35_980, 0.9575, 0.03, sqnr=9.2, ratio=(1.2, 1.1, 1.3), verdicts=[LOST])
OPEN = measured("fp32", "variant", 120_186, 0.9925, -0.005, sqnr=146.0, ratio=(1, 0.98, 1.02), verdicts=[SLOW])
LONG = measured(
    "int8_percentile_per_channel_without_the_first", "variant", 150_000, 0.9575, 0.03, ratio=(0.5, 0.4, 0.6),
    verdicts=[LOST, BIG],
)  # fmt: skip
CONFIG = {"data": {"evaluation": {"npz": "/data/test.npz"}}, "targets": [{"latency_seconds": 3.0}]}
WARNING = f"fp32: max_latency_ratio is inconclusive: {SLOW[2]}"
REPORTS = {
    "winner": Report(
        "r", CONFIG, (TEACHER, REFERENCE, OPEN, BAD, GOOD), (), "int8_per_channel",
        "selected int8_per_channel: the only variant of 3 that failed no gate", {}, {}, 0.0, (WARNING, "mind the gap"),
    ),
    "no_winner": Report(
        "r", CONFIG, (TEACHER, REFERENCE, LONG, BAD), (), None, "no variant passed every gate", {}, {}, 0.0,
        ("int8_per_tensor failed on drift: `onnxshrink explain a b --data samples.npz` says which nodes, and why",),
    ),
    "undecided": Report(
        "r", CONFIG, (TEACHER, REFERENCE, OPEN), (), "fp32", "selected fp32: the only variant", {}, {}, 0.0
    ),
    "too_big": Report("r", CONFIG, (REFERENCE, LONG), (), None, "no variant passed every gate", {}, {}, 0.0),
}  # fmt: skip
GOLDEN = Path(__file__).parents[2] / "golden"


def as_shown(name: str, width: int, folder: Path) -> str:
    file = StringIO()
    console = Console(file=file, width=width, color_system=None, legacy_windows=False)
    print_report(REPORTS[name], console, folder, config=Path("mine.yaml"))
    return "\n".join(line.rstrip() for line in file.getvalue().replace(str(folder), "RUN").splitlines()) + "\n"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", list(REPORTS))
def test_a_run_is_shown_as_its_golden_file_shows(name: str, width: int, tmp_path: Path) -> None:
    """Table, captions, verdicts, warnings that say something new, and what to do next. GOLDEN=write writes it anew."""
    folder = tmp_path
    (folder / "bundle").mkdir()
    (folder / "report.html").touch()
    path = GOLDEN / f"terminal_{name}_{width}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.write_text(as_shown(name, width, folder), encoding="utf-8")
    assert as_shown(name, width, folder) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", list(REPORTS))
def test_nothing_is_cut(name: str, width: int, tmp_path: Path) -> None:
    """No line of the table is wider than the terminal, and every name and verdict is there to its last letter."""
    text = as_shown(name, width, tmp_path)
    table = text.partition("timed beside it")[0]
    assert max(map(len, table.splitlines())) <= width
    assert "…" not in text
    start = 3 if width >= 96 else 2  # behind the mark of the winner
    column = "".join(line[start:].split(" ")[0] for line in table.splitlines())
    assert all(candidate.name in column for candidate in REPORTS[name].candidates)


def test_colour_says_what_intervals_say() -> None:
    """A loss that is shown is red and one that is not has no colour; without colour no escape stands there at all."""
    file = StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system="standard", legacy_windows=False)
    print_report(REPORTS["winner"], console)
    text = file.getvalue()
    assert "\x1b[31m-3.0\x1b[0m" in text
    assert "\x1b[32m0.60" in text
    assert "\x1b[31m1.20" in text
    assert "\x1b[31m-0.2\x1b[0m" not in text
    plain = StringIO()
    print_report(REPORTS["winner"], Console(file=plain, width=100))
    assert "\x1b" not in plain.getvalue()


def test_a_failed_run_leads_on_from_what_there_is(tmp_path: Path) -> None:
    """A variant that could not be made fails one gate only, and no command can look at it; the page is always there."""
    (tmp_path / "report.html").touch()
    unmade = Candidate("gone", "variant", "", "", (), (Verdict("completed", 1.0, "failed", "it could not be made"),))
    report = Report("r", CONFIG, (REFERENCE, unmade, LONG), (), None, "no variant passed every gate", {}, {}, 0.0)
    steps = next_steps(report, tmp_path)
    assert f"onnxshrink inspect {tmp_path / LONG.model}" in steps
    assert steps[-1] == f"open {tmp_path / 'report.html'}"
    alone = Report("r", CONFIG, (REFERENCE, unmade), (), None, "no variant passed every gate", {}, {}, 0.0)
    assert next_steps(alone, tmp_path) == (f"open {tmp_path / 'report.html'}",)


def test_what_is_too_big_or_too_slow_may_be_searched_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step names every gate as the search takes it; not after a search, nor for drift, nor without optuna."""
    slow = Verdict("max_latency_ratio", 0.5, "failed", "too slow", "cpu")
    gates = {"max_size": 60_000, "max_accuracy_drop": 0.01, "max_latency_ratio": 0.5, "min_sqnr_db": None}
    config = {"gates": gates, "data": {"calibration": {"npz": "c.npz"}, "evaluation": {"npz": "/my data/e.npz"}}}
    row = Candidate("int8", "variant", "variants/int8/model.onnx", "1", (), (slow,))
    reference = Candidate("reference", "reference", "reference/model.onnx", "0", ())

    def steps(config: dict[str, Any], row: Candidate = row) -> list[str]:
        report = Report("r", config, (reference, row), (), None, "", {}, {}, 0.0)
        return [step for step in next_steps(report, tmp_path) if step.startswith("onnxshrink fit")]

    model = tmp_path / "reference/model.onnx"
    limits = "--max-size 60000B --max-drop 0.01 --max-latency-ratio 0.5"
    assert steps(config) == [f"onnxshrink fit {model} --data c.npz --eval-data '/my data/e.npz' {limits}"]
    assert steps({**config, "budget": {"max_size": 60_000}}) == []
    drifts = Verdict("min_sqnr_db", 20.0, "failed", "far", "cpu")
    assert steps(config, Candidate("int8", "variant", "variants/int8/model.onnx", "1", (), (drifts,))) == []
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert steps(config) == []

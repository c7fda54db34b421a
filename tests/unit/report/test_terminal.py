from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from onnxshrink.core.report import Candidate, Metric, Report
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


def test_a_long_name_keeps_its_end() -> None:
    """Names of a search end in the number that tells them apart: the middle goes."""
    names = [f"static_per_channel_mse_compact-{number}" for number in (14, 15)]
    rows = tuple(
        Candidate(name, "variant", "", "1", (Metric("size_bytes", 1.0), Metric("top1", 0.5, "ratio", target="cpu")))
        for name in names
    )
    text = StringIO()
    print_report(Report("r", {}, rows, (), None, "", {}, {}, 1.0), Console(file=text, width=72))
    assert [line.split()[0][-3:] for line in text.getvalue().splitlines() if "…" in line] == ["-14", "-15"]
    assert max(map(len, text.getvalue().splitlines())) <= 72

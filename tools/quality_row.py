"""A row of `bench_quality.py`: one model, what was measured of it, and which targets it was to meet."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from onnxshrink.core.report import Candidate


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        label: What was done to which network.
        size_bytes: Of the files.
        sqnr_db: Drift from the float model on held-out samples; infinite for the float model itself.
        accuracy: The task's metric on held-out samples; None where there is none.
        speed: Times as fast as fp32, with the ends of its 95% interval; None where it was not timed.
        targets: What was asked of this row, and whether it was met.
    """

    label: str
    size_bytes: float
    sqnr_db: float
    accuracy: float | None = None
    speed: tuple[float, float, float] | None = None
    targets: tuple[tuple[str, bool], ...] = ()

    def __str__(self) -> str:
        """The row as a line."""
        accuracy = f"{self.accuracy:.3f}" if self.accuracy is not None else "-"
        speed = "-" if self.speed is None else "{:.2f} x ({:.2f} to {:.2f})".format(*self.speed)
        return f"{self.label:<52}{self.size_bytes:>12,.0f}{self.sqnr_db:>9.1f}{accuracy:>9}  {speed}"


HEAD = f"{'':<52}{'bytes':>12}{'SQNR dB':>9}{'accuracy':>9}  speed against fp32 (95%)"


def speed_of(row: Candidate) -> tuple[float, float, float]:
    """Times as fast as what it was compared with, and the ends of the interval."""
    ratio = next((metric for metric in row.metrics if metric.name == "latency_ratio"), None)
    if ratio is None or not (ratio.value and ratio.lo and ratio.hi):
        sys.exit(f"{row.name} has no latency ratio")
    return 1 / ratio.value, 1 / ratio.hi, 1 / ratio.lo


def value_of(row: Candidate, name: str) -> float:
    """A metric that must have been measured."""
    metric = row.metric(name)
    if metric is None or metric.value is None:
        sys.exit(f"{row.name} has no {name}")
    return metric.value

"""What a person does after a run: the commands that fit how it ended."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxshrink.core.report import Candidate, Report

_DRIFT = {"min_sqnr_db", "max_abs_error", "min_top1_agreement"}
_SIZE = {"max_size", "max_compressed_size", "max_macs", "min_integer_coverage"}
_TIME = {"max_latency_ratio", "max_latency_ms", "max_peak_memory"}

_BYTES = {
    "max_size": "--max-size",
    "max_compressed_size": "--max-compressed-size",
    "max_peak_memory": "--max-peak-memory",
}
_LIMITS = {
    "max_accuracy_drop": "--max-drop",
    "min_sqnr_db": "--min-sqnr-db",
    "max_latency_ratio": "--max-latency-ratio",
    "max_latency_ms": "--max-latency-ms",
}
"""Gates that ``onnxshrink fit`` takes as options; those of bytes have their unit behind them."""


def next_steps(report: Report, folder: Path | None, config: Path | None = None) -> tuple[str, ...]:
    """Commands, the most useful first; none for a report whose run has no folder.

    Args:
        report: How the run ended.
        folder: The run's folder.
        config: The file that was run; commands that need it are left out without it.
    """
    if folder is None:
        return ()
    if report.winner is not None:
        steps = [*_of_winner(folder), *_of_undecided(report.candidate(report.winner), report, config)]
    else:
        nearest = next((row for row in ranked(report) if row.model), None)
        steps = [] if nearest is None else [*_of_failed(nearest, report, folder, config)]
        steps += _of_page(folder)
        if nearest is not None:
            steps += _of_undecided(nearest, report, config)
    return tuple(dict.fromkeys(steps))


def ranked(report: Report) -> list[Candidate]:
    """The variants: the winner, then those that fail the fewest gates; last those of which there is no model."""

    def place(row: Candidate) -> tuple[bool, bool, int, int]:
        outcomes = [verdict.outcome for verdict in row.verdicts]
        failed, open_ = outcomes.count("failed"), outcomes.count("inconclusive")
        return row.name != report.winner, not row.model, failed, open_

    return sorted(report.variants, key=place)


def _of_winner(folder: Path) -> Iterator[str]:
    if (folder / "bundle").is_dir():
        yield f"onnxshrink check {_quoted(folder / 'bundle')}"
    yield from _of_page(folder)


def _of_page(folder: Path) -> Iterator[str]:
    if (folder / "report.html").is_file():
        yield f"open {_quoted(folder / 'report.html')}"


def _of_failed(nearest: Candidate, report: Report, folder: Path, config: Path | None) -> Iterator[str]:
    """For the variant that failed the fewest gates: what says why each of them failed."""
    failed = {verdict.gate for verdict in nearest.verdicts if verdict.outcome == "failed"}
    model = _quoted(folder / nearest.model)
    reference = next((c.model for c in report.candidates if c.role == "reference"), None)
    if failed & (_DRIFT | {"max_accuracy_drop"}) and reference is not None:
        yield f"onnxshrink explain {_quoted(folder / reference)} {model} --data {_quoted(_samples(report))}"
        if config is not None:
            yield f"onnxshrink bisect {_quoted(config)} --variant {shlex.quote(nearest.name)}"
    if failed & (_SIZE | _TIME):
        yield f"onnxshrink inspect {model}"
    if failed & (_BYTES.keys() | _LIMITS.keys() & _TIME) and reference is not None and not report.config.get("budget"):
        yield from _of_search(report, folder / reference)


def _of_undecided(candidate: Candidate, report: Report, config: Path | None) -> Iterator[str]:
    """What to raise for the gates that nothing was shown about."""
    gates = {verdict.gate for verdict in candidate.verdicts if verdict.outcome == "inconclusive"}
    if gates & _TIME and config is not None:
        seconds = max((target["latency_seconds"] for target in report.config.get("targets", ())), default=3.0)
        n_targets = len(report.config.get("targets", ()))
        raised = " ".join(f"--set 'targets[{i}].latency_seconds={4 * seconds:g}'" for i in range(n_targets))
        yield f"onnxshrink run {_quoted(config)} {raised}".rstrip()
    if "max_accuracy_drop" in gates:
        yield "give data.evaluation more samples: the interval of the drop is wider than the gate"


def _of_search(report: Report, reference: Path) -> Iterator[str]:
    """The search for a model that is small or fast enough and keeps the other gates; none where it could not run."""
    if importlib.util.find_spec("optuna") is None:
        return
    gates: dict[str, Any] = report.config.get("gates") or {}
    given = {_BYTES[name]: f"{gates[name]}B" for name in _BYTES if gates.get(name) is not None}
    given |= {_LIMITS[name]: gates[name] for name in _LIMITS if isinstance(gates.get(name), int | float)}
    if given:
        limits = " ".join(f"{option} {value}" for option, value in given.items())
        samples = f"--data {_quoted(_samples(report, 'calibration'))} --eval-data {_quoted(_samples(report))}"
        yield f"onnxshrink fit {_quoted(reference)} {samples} {limits}"


def _samples(report: Report, role: str = "evaluation") -> str:
    data: dict[str, Any] = (report.config.get("data") or {}).get(role) or {}
    return str(data.get("npz") or "samples.npz")


def _quoted(path: Path | str) -> str:
    return shlex.quote(str(path))

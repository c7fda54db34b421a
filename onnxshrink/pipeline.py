"""The whole pipeline: a left fold of stages over artifacts, then the proof of every variant.

```
source ─▶ stage ─▶ … ─▶ stage ─┬─▶ variant ─▶ quality ─▶ latency ─▶ gates ─┐
                               └─▶ variant ─▶ quality ─▶ latency ─▶ gates ─┴─▶ select ─▶ report
```
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from onnxshrink.config.base import fingerprint
from onnxshrink.config.gates import Gates
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import OnnxSource
from onnxshrink.core.artifact import ONNX_FILE, Artifact, Facts
from onnxshrink.core.errors import ModelError, ParityError, ShrinkError
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.machine import machine, versions
from onnxshrink.core.report import Candidate, Report, Verdict
from onnxshrink.core.run_folder import BUNDLE_FOLDER, publish, require_own
from onnxshrink.core.store import Store
from onnxshrink.runtime.processes import Leader
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import model_inputs, preflight
from onnxshrink.stages.references import original_of, reference_of
from onnxshrink.stages.together import run_trainings, trains
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.across import compare_targets, parted
from onnxshrink.verify.caveats import disturbed, guessing, noisy, undecided, unlabelled, unpaid, unproven
from onnxshrink.verify.evidence import load_quality, save_quality
from onnxshrink.verify.gates import judge, select
from onnxshrink.verify.leaks import find_leaks
from onnxshrink.verify.placement import misplaced
from onnxshrink.verify.verify import Latency, Quality, Row, measure_latency, measure_quality

Leave: TypeAlias = Callable[[Report, Mapping[str, Artifact], RunConfig, Path], Facts | None]
"""Writes a folder beside the winner, from the report, the models of its rows and the config; gives its facts."""

Conclude: TypeAlias = Callable[[Report], tuple[Report, Mapping[str, str]]]
"""Has the last word on a report before anything is written, and gives further files of its folder, name to text."""


def run(
    config: RunConfig,
    *,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
    candidates: Mapping[str, Path] | None = None,
    processes: int = 1,
    parts: Sequence[RunConfig] = (),
    conclude: Conclude | None = None,
    leave: Leave | None = None,
) -> Report:
    """Run a config and leave ``runs/<name>/``: the winner, every variant, the report.

    Args:
        config: What to do.
        runs: Folder of the runs and of the store they share.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress.
        candidates: Variants that were made elsewhere, name to ``.onnx`` file, in place of the config's branch.
        processes: How many train; this is the first, and each other one calls `onnxshrink.stages.together.follow`.
        parts: Configs with the same data whose variants are compared in one report, where they do not share a trunk;
            ``config`` then says how they are judged.
        conclude: Has the last word on the report.
        leave: Writes ``bundle/``, such as `onnxshrink.regress.bundle.leave_bundle`; there is none by default.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        ShrinkError: Something the user can fix; nothing half-done is kept.
    """
    started, events = time.perf_counter(), events or Silent()
    name = config.name or "run"
    require_own(runs / name)
    with search_path(base):
        for part in parts or (config,):
            preflight(part)
        leader = _leader(config, processes, events)
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events, leader)
        if leader is not None:
            run_trainings(config, memo)
            leader.dismiss()
        rows, qualities, failures = _united(
            [_proven(part, memo, candidates or {}, events) for part in parts or (config,)]
        )
        latencies = _measure_latencies(config, rows, events)
        measured = [_judged(*row, config) for row in zip(rows, qualities, latencies, strict=True)]
        idle = list(unpaid(config, rows, measured, events))
    measured += [_not_made(name, failure) for name, failure in failures.items()]
    winner, selection = select(measured, config.select)
    report = Report(
        name=name,
        config=config.model_dump(mode="json"),
        candidates=tuple(measured),
        steps=memo.steps,
        winner=winner,
        selection=selection,
        machine=machine(),
        versions=versions(),
        seconds=round(time.perf_counter() - started, 3),
        warnings=(
            *memo.warnings,
            *unproven(config, memo.data_key),
            *unlabelled(config, {spec.name for spec in model_inputs(config)}),
            *guessing(measured),
            *(text for part in parts or (config,) for text in noisy(part, measured)),
            *idle,
            *disturbed(config, measured),
            *misplaced(measured),
            *parted(measured),
            *undecided(measured),
        ),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=memo.inputs,
    )
    report, texts = conclude(report) if conclude else (report, {})
    models = {row.name: row.artifact for row in rows}
    with TemporaryDirectory(dir=runs, prefix=".bundle.") as scratch:
        bundle = Path(scratch) / BUNDLE_FOLDER
        if leave is not None:
            with search_path(base):
                report = _with_bundle(report, leave(report, models, config, bundle))
        publish(report, models, runs / report.name, bundle, texts)
    return report


def evaluate(
    config: RunConfig, *, runs: Path = Path("runs"), base: Path = Path(), events: Events | None = None
) -> tuple[Candidate, ...]:
    """All of a run but the clock: every variant is made and its quality measured, and nothing is left but the store.

    May run beside others of its kind, in other processes as well.

    Args:
        config: What to do.
        runs: Folder of the store.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress.

    Returns:
        The rows of the report, without latency and verdicts; one for each variant that could not be made, too.

    Raises:
        ShrinkError: Something the user can fix.
    """
    events = events or Silent()
    with search_path(base):
        preflight(config)
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events)
        rows, qualities, failures = _proven(config, memo, {}, events)
    judged = (
        _judged(row, quality, Latency(()), config.model_copy(update={"gates": Gates()}))
        for row, quality in zip(rows, qualities, strict=True)
    )
    return (*judged, *(_not_made(name, failure) for name, failure in failures.items()))


_Proven: TypeAlias = tuple[list[Row], list[Quality], dict[str, ShrinkError]]


def _united(parts: Sequence[_Proven]) -> _Proven:
    """What several configs gave as one: an original and a reference that they share are one row."""
    rows, qualities, failures = parts[0]
    for more, their_qualities, their_failures in parts[1:]:
        failures |= their_failures
        variant = next(row.name for row in more if row.role == "variant")
        for row, quality in zip(more, their_qualities, strict=True):
            seen = any(row.role == other.role and row.artifact == other.artifact for other in rows)
            if row.role == "variant":
                rows.append(row)
                qualities.append(quality)
            elif row.role == "reference" and not seen:
                at = next(index for index, other in enumerate(rows) if other.role == "variant")
                rows.insert(at, replace(row, name=f"reference-{variant}"))
                qualities.insert(at, quality)
    return rows, qualities, failures


def _proven(config: RunConfig, memo: Memo, candidates: Mapping[str, Path], events: Events) -> _Proven:
    """Every model of the run, what is known of it without a clock, and the variants that could not be made."""
    trunk = memo.fold(memo.open(config.model), config.stages)
    branches, failures = _branches(config, memo, trunk, candidates)
    rows = list(_rows(config, memo, trunk, branches))
    _look_for_leaks(config, memo, rows[0].reference)
    return rows, _measure_qualities(config, memo, rows, events), failures


def _with_bundle(report: Report, facts: Facts | None) -> Report:
    """The report with what is known of the bundle in the winner's row."""
    if facts is None:
        return report
    return replace(
        report,
        candidates=tuple(
            replace(row, details={**row.details, "bundle": facts}) if row.name == report.winner else row
            for row in report.candidates
        ),
    )


def _leader(config: RunConfig, processes: int, events: Events) -> Leader | None:
    """This process's part in training with others."""
    if processes == 1:
        return None
    if not trains(config):
        events.warned(f"nothing in this config trains: one process does it all, and {processes - 1} have ended")
        return None
    return Leader(processes)


def _branches(
    config: RunConfig, memo: Memo, trunk: Sequence[Artifact], candidates: Mapping[str, Path]
) -> tuple[dict[str, list[Artifact]], dict[str, ShrinkError]]:
    """Every variant's artifacts, trunk first, and the variants whose model cannot be made: they cost no other.

    Raises:
        ShrinkError: None of them can be made, or one fails for a reason that is not the model's.
    """
    branches: dict[str, list[Artifact]] = {}
    failures: dict[str, ShrinkError] = {}
    for name, tail in config.variants.items():
        try:
            if name in candidates:
                branches[name] = [trunk[0], memo.open(OnnxSource(onnx=candidates[name]), name)]
            else:
                branches[name] = [*trunk, *memo.fold(trunk[-1], tail, f"{name}/")[1:]]
        except (ModelError, ParityError) as e:
            failures[name] = e
    if not branches:
        raise next(iter(failures.values()))
    return branches, failures


def _rows(
    config: RunConfig, memo: Memo, trunk: Sequence[Artifact], branches: Mapping[str, Sequence[Artifact]]
) -> Iterator[Row]:
    """Original, reference and variants, each with the reference it is measured against."""
    references = {
        name: reference_of(memo, stages, branches[name]) for name, stages in config.branches() if name in branches
    }
    first = next(iter(references.values()))
    original = original_of(config, memo, trunk, branches)
    if original is not None:
        yield Row(original[0], "original", original[1], first)
    for reference in dict.fromkeys(references.values()):
        name = "reference" if reference == first else f"reference-{_first_name(references, reference)}"
        yield Row(name, "reference", reference, reference)
    for name, chain in branches.items():
        yield Row(name, "variant", chain[-1], references[name])


def _look_for_leaks(config: RunConfig, memo: Memo, reference: Artifact) -> None:
    """A step whose warnings name evaluation samples that the stages have seen; `unproven` tells equal roles."""
    needed = {role for _, chain in config.branches() for stage in chain for role in stage.needs}
    evaluation = memo.data_key("evaluation")
    roles = [role for role in sorted(needed) if memo.data_key(role) not in (None, evaluation)]
    if evaluation is None or not roles:
        return
    key = {"reference": reference.digest, "data": {role: memo.data_key(role) for role in (*roles, "evaluation")}}

    def work(_: Path) -> Facts:
        return find_leaks(config.data, roles, reference)

    memo.once("health", "health", key, "evidence", work, uses={"onnx"})


def _measure_qualities(config: RunConfig, memo: Memo, rows: Sequence[Row], events: Events) -> list[Quality]:
    """Footprint, drift and accuracy of every row: memoized, for they depend on nothing but their inputs."""
    qualities: list[Quality] = []
    first: Artifact | None = None
    for row in rows:
        original = qualities[0].scores if qualities else None
        key = {
            "role": row.role,
            "candidate": row.artifact.digest,
            "reference": row.reference.digest,
            "original": first.digest if first else None,
            "data": memo.data_key("evaluation"),
            "targets": [fingerprint(target) for target in config.targets],
            "seed": config.seed,
        }

        def work(out: Path, row: Row = row, original: Mapping[str, Scores] | None = original) -> Facts:
            quality = measure_quality(
                name=row.name,
                role=row.role,
                artifact=row.artifact,
                reference=row.reference,
                original_scores=original,
                config=config,
                events=events,
            )
            save_quality(compare_targets(quality, row, config, events), out)
            return {}

        evidence = memo.once(f"verify/{row.name}", "verify", key, "evidence", work, uses={"onnx"})
        qualities.append(load_quality(evidence.path))
        first = first or evidence
    return qualities


def _measure_latencies(config: RunConfig, rows: Sequence[Row], events: Events) -> list[Latency]:
    """Measured now, alone, every time; rows that are equal byte for byte share one measurement."""
    known: dict[tuple[Artifact, Artifact], Latency] = {}
    for row in rows:
        pair = row.artifact, row.reference
        if pair not in known:
            known[pair] = measure_latency(
                name=row.name, artifact=row.artifact, reference=row.reference, config=config, events=events
            )
    return [known[row.artifact, row.reference] for row in rows]


def _judged(row: Row, quality: Quality, latency: Latency, config: RunConfig) -> Candidate:
    """One row of the report: what was measured, and what the gates make of it."""
    metrics = (*quality.metrics, *latency.metrics)
    verdicts = judge(config.gates, metrics, config.targets) if row.role == "variant" else ()
    folder = f"variants/{row.name}" if row.role == "variant" else row.name
    details = {**quality.details, **latency.details}
    return Candidate(row.name, row.role, f"{folder}/{ONNX_FILE}", row.artifact.digest, metrics, verdicts, details)


def _not_made(name: str, failure: ShrinkError) -> Candidate:
    """The row of a variant without a model."""
    verdict = Verdict("completed", 1.0, "failed", f"it could not be made: {failure.what}")
    return Candidate(name, "variant", "", "", (), (verdict,))


def _first_name(names: Mapping[str, Artifact], artifact: Artifact) -> str:
    return next(name for name, value in names.items() if value == artifact)

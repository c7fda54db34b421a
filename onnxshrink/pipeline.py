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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

from onnxshrink.config.base import fingerprint
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
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.runtime.processes import Leader
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import model_inputs, preflight, refuse_labels
from onnxshrink.stages.references import original_of, quantized_from, reference_of
from onnxshrink.stages.together import run_trainings, trains
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.across import compare_targets, parted
from onnxshrink.verify.caveats import disturbed, guessing, noisy, undecided, unexplained, unlabelled, unpaid, unproven
from onnxshrink.verify.close_up import look_closer
from onnxshrink.verify.evidence import load_quality, save_quality
from onnxshrink.verify.gates import judge, select
from onnxshrink.verify.leaks import find_leaks
from onnxshrink.verify.package import slow_packages, with_package, with_package_times
from onnxshrink.verify.pictures import PICTURES_FILE, draw_pictures, image_input, worst_numbers
from onnxshrink.verify.placement import misplaced
from onnxshrink.verify.verify import Latency, Quality, Row, measure_latency, measure_quality

Leave: TypeAlias = Callable[[Report, Mapping[str, Artifact], RunConfig, Path], Facts | None]
"""Writes a folder beside the winner, from the report, the models of its rows and the config; gives its facts."""

Page: TypeAlias = Callable[[Report, str | None], str | None]
"""Draws a page from a finished report and the text of ``pictures.json``, or None where there is nothing to draw."""


def run(
    config: RunConfig,
    *,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
    candidates: Mapping[str, Path] | None = None,
    processes: int = 1,
    leave: Leave | None = None,
    pages: Mapping[str, Page] | None = None,
) -> Report:
    """Run a config and leave ``runs/<name>/``: the winner, every variant, the report.

    Args:
        config: What to do.
        runs: Folder of the runs and of the store they share.
        base: The config file's folder, where the user's modules may lie.
        events: Listener for progress.
        candidates: Variants that were made elsewhere, name to ``.onnx`` file, in place of the config's branch.
        processes: How many train; this is the first, and each other one calls `onnxshrink.stages.together.follow`.
        leave: Writes ``bundle/``, such as `onnxshrink.regress.bundle.leave_bundle`; there is none by default.
        pages: Files to leave beside the report, by name, such as ``MODEL_CARD.md``.

    Returns:
        The report, as written to ``report.json``.

    Raises:
        ShrinkError: Something the user can fix; nothing half-done is kept.
    """
    started, events = time.perf_counter(), events or Silent()
    name = config.name or "run"
    require_own(runs / name)
    with search_path(base):
        preflight(config)
        leader = _leader(config, processes, events)
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events, leader)
        if leader is not None:
            run_trainings(config, memo)
            leader.dismiss()
        source = memo.open(config.model)
        facts = next((step.facts for step in memo.steps if step.name == "source"), {})
        refuse_labels(config, facts.get("classes", ()))
        trunk = memo.fold(source, config.stages)
        branches, failures = _branches(config, memo, trunk, candidates or {})
        rows = list(_rows(config, memo, trunk, branches))
        _look_for_leaks(config, memo, rows[0].reference)
        qualities = _measure_qualities(config, memo, rows, events)
        pictures = _draw_worst(config, memo, rows, qualities)
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
            *noisy(config, measured),
            *unexplained(measured),
            *idle,
            *slow_packages(measured),
            *disturbed(config, measured),
            *misplaced(measured),
            *parted(measured),
            *undecided(measured),
        ),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=memo.inputs,
    )
    models = {row.name: row.artifact for row in rows}
    with TemporaryDirectory(dir=runs, prefix=".bundle.") as scratch:
        bundle = Path(scratch) / BUNDLE_FOLDER
        if leave is not None:
            with search_path(base):
                report = _with_bundle(report, leave(report, models, config, bundle))
        drawn = {page: draw(report, pictures) for page, draw in (pages or {}).items()}
        publish(report, models, runs / report.name, bundle, {PICTURES_FILE: pictures, **drawn})
    return report


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
    stages = dict(config.branches())
    for name, chain in branches.items():
        yield Row(name, "variant", chain[-1], references[name], *quantized_from(memo, stages[name], chain))


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
            "before": row.before.digest if row.before else None,
            "calibration": row.calibration.digest if row.calibration else None,
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
            quality = look_closer(quality, row, config)
            save_quality(with_package(compare_targets(quality, row, config, events), row, config), out)
            return {}

        evidence = memo.once(f"verify/{row.name}", "verify", key, "evidence", work, uses={"onnx"})
        qualities.append(load_quality(evidence.path))
        first = first or evidence
    return qualities


def _draw_worst(config: RunConfig, memo: Memo, rows: Sequence[Row], qualities: Sequence[Quality]) -> str | None:
    """``pictures.json`` with the samples that drifted most, where they are images; else None."""
    data, specs = config.data.evaluation, input_specs(load_model(rows[0].reference.model_path))
    numbers = worst_numbers(quality.details for quality in qualities)
    if data is None or not numbers or image_input(specs) is None:
        return None
    key = {"inputs": list(map(str, specs)), "data": memo.data_key("evaluation"), "samples": numbers}
    draw = partial(draw_pictures, data, specs, numbers)
    drawn = memo.once("pictures", "pictures", key, "evidence", draw, uses={"onnx"})
    return (drawn.path / PICTURES_FILE).read_text(encoding="utf-8")


def _measure_latencies(config: RunConfig, rows: Sequence[Row], events: Events) -> list[Latency]:
    """Measured now, alone, every time; rows that are equal byte for byte share one measurement."""
    known: dict[tuple[Artifact, Artifact], Latency] = {}
    for row in rows:
        pair = row.artifact, row.reference
        if pair not in known:
            latency = measure_latency(
                name=row.name, artifact=row.artifact, reference=row.reference, config=config, events=events
            )
            known[pair] = with_package_times(latency, row, config)
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

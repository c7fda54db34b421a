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
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.events import Events, Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.machine import machine, versions
from onnxshrink.core.report import Candidate, Report
from onnxshrink.core.run_folder import BUNDLE_FOLDER, home_of, publish, require_own, require_same_config
from onnxshrink.core.store import Store
from onnxshrink.rows import Latencies, Proof, closer, draw_worst, judged, measure, not_made, prove, united
from onnxshrink.runtime.processes import Leader
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import model_inputs, preflight
from onnxshrink.stages.rehearsal import rehearse_exports
from onnxshrink.stages.together import run_trainings, trains
from onnxshrink.verify.across import parted
from onnxshrink.verify.caveats import disturbed, guessing, noisy, undecided, unexplained, unlabelled, unpaid, unproven
from onnxshrink.verify.gates import select
from onnxshrink.verify.package import slow_packages
from onnxshrink.verify.pictures import PICTURES_FILE
from onnxshrink.verify.placement import misplaced
from onnxshrink.verify.verify import Latency

Leave: TypeAlias = Callable[[Report, Mapping[str, Artifact], RunConfig, Path], Facts | None]
"""Writes a folder beside the winner, from the report, the models of its rows and the config; gives its facts."""

Further: TypeAlias = Callable[[Sequence[Candidate]], Sequence[RunConfig]]
"""Looks at the rows that were measured, and names configs whose variants are to be compared as well; none when done."""

Conclude: TypeAlias = Callable[[Report], tuple[Report, Mapping[str, str]]]
"""Has the last word on a report before anything is written, and gives further files of its folder, name to text."""

Page: TypeAlias = Callable[[Report, Mapping[str, str | None]], str | None]
"""Draws a page from a finished report and the files beside it, name to text, or None where there is nothing to draw."""


def run(
    config: RunConfig,
    *,
    runs: Path = Path("runs"),
    base: Path = Path(),
    events: Events | None = None,
    candidates: Mapping[str, Path] | None = None,
    processes: int = 1,
    parts: Sequence[RunConfig] = (),
    further: Further | None = None,
    conclude: Conclude | None = None,
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
        parts: Configs with the same data and targets whose variants are compared in one report, where they do not share
            a trunk; ``config`` says how they are judged, and the report has the config of the winner's part.
        further: Asked for more of them, each time that all so far were measured.
        conclude: Has the last word on the report.
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
        for part in (parts := tuple(parts) or (config,)):
            preflight(part)
        if told := require_same_config(runs / name, home_of(base, runs), fingerprint(config.model)):
            events.warned(told)
        leader = _leader(config, processes, events)
        memo = Memo(Store(runs / ".store"), config.data, config.seed, events, leader)
        if leader is not None:
            rehearse_exports(config, Memo(Store(runs / ".store"), config.data, config.seed, events))
            run_trainings(config, memo)
            leader.dismiss()
        proofs: list[Proof] = []
        known: Latencies = {}
        fresh: Sequence[RunConfig] = parts
        while fresh:
            proofs += [closer(prove(part, memo, candidates or {}, events), part, memo) for part in fresh]
            proof = united(proofs)
            measured = measure(proof, config, known, events)
            fresh = further(measured) if further else ()
            parts += tuple(fresh)
        pictures = draw_worst(config, memo, proof)
        idle = list(unpaid(config, proof.rows, measured, events))
    measured += [not_made(name, failure) for name, failure in proof.failures.items()]
    winner, selection = select(measured, config.select)
    config = _of_winner(config, parts, winner)
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
            *_caveats(config, parts, measured, memo),
            *unexplained(config, measured, runs / name, candidates or {}),
            *idle,
            *slow_packages(measured),
        ),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=memo.inputs,
        home=home_of(base, runs),
    )
    report, texts = conclude(report) if conclude else (report, {})
    models = {row.name: row.artifact for row in proof.rows}
    with TemporaryDirectory(dir=runs, prefix=".bundle.") as scratch:
        bundle = Path(scratch) / BUNDLE_FOLDER
        if leave is not None:
            with search_path(base):
                report = _with_bundle(report, leave(report, models, config, bundle))
        beside = {PICTURES_FILE: pictures, **texts}
        drawn = {page: draw(report, beside) for page, draw in (pages or {}).items()}
        publish(report, models, runs / report.name, bundle, beside | drawn)
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
        proof = prove(config, memo, {}, events)
    ungated = config.model_copy(update={"gates": Gates()})
    rows = (judged(*row, Latency(()), ungated) for row in zip(proof.rows, proof.qualities, strict=True))
    return (*rows, *(not_made(name, failure) for name, failure in proof.failures.items()))


def _of_winner(config: RunConfig, parts: Sequence[RunConfig], winner: str | None) -> RunConfig:
    """The config with stages and variants of the part that the winner is from."""
    part = next((part for part in parts if winner in part.variants), config)
    return config.model_copy(update={"model": part.model, "stages": part.stages, "variants": part.variants})


def _caveats(config: RunConfig, parts: Sequence[RunConfig], measured: Sequence[Candidate], memo: Memo) -> Iterator[str]:
    """What the figures do not show by themselves."""
    yield from unproven(config, memo.data_key)
    yield from unlabelled(config, {spec.name for spec in model_inputs(config)})
    yield from guessing(measured)
    for part in parts:
        yield from noisy(part.model_copy(update={"gates": config.gates}), measured)
    yield from disturbed(config, measured)
    yield from misplaced(measured)
    yield from parted(measured)
    yield from undecided(measured)


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

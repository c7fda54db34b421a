"""The rows of a report: every model that is compared, what is known of it, and what the gates make of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import OnnxSource
from onnxshrink.core.artifact import ONNX_FILE, Artifact, Facts
from onnxshrink.core.errors import ModelError, ParityError, ShrinkError
from onnxshrink.core.events import Events
from onnxshrink.core.report import Candidate, Verdict
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import refuse_labels
from onnxshrink.stages.references import original_of, quantized_from, reference_of
from onnxshrink.stages.rehearsal import rehearse_exports
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.across import compare_targets
from onnxshrink.verify.close_up import look_closer
from onnxshrink.verify.evidence import load_quality, save_quality
from onnxshrink.verify.gates import judge
from onnxshrink.verify.leaks import find_leaks
from onnxshrink.verify.package import with_package, with_package_times
from onnxshrink.verify.pictures import PICTURES_FILE, draw_pictures, image_input, worst_numbers
from onnxshrink.verify.verify import Latency, Quality, Row, measure_latency, measure_quality

Latencies: TypeAlias = MutableMapping[tuple[Artifact, Artifact], Latency]
"""What the clock said in this run, by model and reference."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The models of a run, and what is known of them without a clock.

    Attributes:
        rows: Original, references, variants.
        qualities: Of each row.
        failures: Variants that could not be made, and why.
    """

    rows: tuple[Row, ...]
    qualities: tuple[Quality, ...]
    failures: Mapping[str, ShrinkError]


def prove(config: RunConfig, memo: Memo, candidates: Mapping[str, Path], events: Events) -> Proof:
    """Make every model of a config, and measure its quality.

    Args:
        config: The run.
        memo: Of the run.
        candidates: Variants that were made elsewhere, name to ``.onnx`` file.
        events: Listener for progress.

    Raises:
        ShrinkError: No variant can be made, one fails for another reason than the model, labels do not fit it, or what
            is to be trained could not be exported.
    """
    source = memo.open(config.model)
    facts = next((step.facts for step in memo.steps if step.name == "source"), {})
    refuse_labels(config, facts.get("classes", ()))
    rehearse_exports(config, memo)
    trunk = memo.fold(source, config.stages)
    branches, failures = _branches(config, memo, trunk, candidates)
    rows = tuple(_rows(config, memo, trunk, branches))
    _look_for_leaks(config, memo, rows[0].reference)
    return Proof(rows, tuple(_measure_qualities(config, memo, rows, events)), failures)


def united(proofs: Sequence[Proof]) -> Proof:
    """What several configs gave as one: an original and a reference that they share are one row."""
    rows, qualities = list(proofs[0].rows), list(proofs[0].qualities)
    for proof in proofs[1:]:
        variant = next(row.name for row in proof.rows if row.role == "variant")
        for row, quality in zip(proof.rows, proof.qualities, strict=True):
            seen = any(row.role == other.role and row.artifact == other.artifact for other in rows)
            if row.role == "variant":
                rows.append(row)
                qualities.append(quality)
            elif row.role == "reference" and not seen:
                at = next(index for index, other in enumerate(rows) if other.role == "variant")
                rows.insert(at, replace(row, name=f"reference-{variant}"))
                qualities.insert(at, quality)
    failures = {name: failure for proof in proofs for name, failure in proof.failures.items()}
    return Proof(tuple(rows), tuple(qualities), failures)


def closer(proof: Proof, config: RunConfig, memo: Memo) -> Proof:
    """The same with `look_closer`'s details of each variant: nothing is decided by them, so a search does without."""

    def looked(row: Row, quality: Quality) -> Quality:
        key = {
            "candidate": row.artifact.digest,
            "reference": row.reference.digest,
            "before": row.before.digest if row.before else None,
            "calibration": row.calibration.digest if row.calibration else None,
            "data": memo.data_key("evaluation") or memo.data_key("calibration"),
        }

        def work(out: Path) -> Facts:
            save_quality(look_closer(Quality(quality.metrics), row, config), out)
            return {}

        evidence = memo.once(f"close-up/{row.name}", "close_up", key, "evidence", work, uses={"onnx"})
        return replace(quality, details={**quality.details, **load_quality(evidence.path).details})

    return replace(
        proof,
        qualities=tuple(
            looked(row, quality) if row.role == "variant" else quality
            for row, quality in zip(proof.rows, proof.qualities, strict=True)
        ),
    )


def draw_worst(config: RunConfig, memo: Memo, proof: Proof) -> str | None:
    """``pictures.json`` with the samples that drifted most, where they are images; else None."""
    data, specs = config.data.evaluation, input_specs(load_model(proof.rows[0].reference.model_path))
    numbers = worst_numbers(quality.details for quality in proof.qualities)
    if data is None or not numbers or image_input(specs) is None:
        return None
    key = {"inputs": list(map(str, specs)), "data": memo.data_key("evaluation"), "samples": numbers}
    draw = partial(draw_pictures, data, specs, numbers)
    drawn = memo.once("pictures", "pictures", key, "evidence", draw, uses={"onnx"})
    return (drawn.path / PICTURES_FILE).read_text(encoding="utf-8")


def measure(proof: Proof, config: RunConfig, known: Latencies, events: Events) -> list[Candidate]:
    """The rows with their latency, measured now and alone, and the gates' verdicts.

    Rows that are equal byte for byte share one measurement, and what this run has measured is in ``known``.
    """
    for row in proof.rows:
        if (row.artifact, row.reference) not in known:
            latency = measure_latency(
                name=row.name, artifact=row.artifact, reference=row.reference, config=config, events=events
            )
            known[row.artifact, row.reference] = with_package_times(latency, row, config)
    return [
        judged(row, quality, known[row.artifact, row.reference], config)
        for row, quality in zip(proof.rows, proof.qualities, strict=True)
    ]


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
            "data": memo.data_key("evaluation"),
            "targets": [target.outputs_key() for target in config.targets],
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
            save_quality(with_package(compare_targets(quality, row, config, events), row, config), out)
            return {}

        evidence = memo.once(f"verify/{row.name}", "verify", key, "evidence", work, uses={"onnx"})
        qualities.append(load_quality(evidence.path))
        first = first or evidence
    return qualities


def judged(row: Row, quality: Quality, latency: Latency, config: RunConfig) -> Candidate:
    """One row of the report: what was measured, and what the gates make of it."""
    metrics = (*quality.metrics, *latency.metrics)
    verdicts = judge(config.gates, metrics, config.targets) if row.role == "variant" else ()
    folder = f"variants/{row.name}" if row.role == "variant" else row.name
    details = {**quality.details, **latency.details}
    return Candidate(row.name, row.role, f"{folder}/{ONNX_FILE}", row.artifact.digest, metrics, verdicts, details)


def not_made(name: str, failure: ShrinkError) -> Candidate:
    """The row of a variant without a model."""
    verdict = Verdict("completed", 1.0, "failed", f"it could not be made: {failure.what}")
    return Candidate(name, "variant", "", "", (), (verdict,))


def _first_name(names: Mapping[str, Artifact], artifact: Artifact) -> str:
    return next(name for name, value in names.items() if value == artifact)

"""What a run found out, as plain data: metrics with intervals, verdicts with reasons, steps with facts.

The JSON is the record. Tables and pages are drawn from it, and a report written years ago can still be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import StoreError

SCHEMA = 1
"""Raised when the meaning of a field changes; adding a field does not raise it."""

OPTIMISTIC = "are optimistic"
"""In a warning that says so of the run's figures; a page calls nothing proven by them."""

_LINE = 120

Outcome: TypeAlias = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One measured number.

    Attributes:
        name: What was measured, such as ``latency_ratio``.
        value: The number; None when it has no finite value (the SQNR of identical outputs), and ``note`` says why.
        unit: ``ms``, ``bytes``, ``dB``, ``ratio``, ``count`` or empty.
        lo: Lower end of the 95% interval, or None where the number is exact.
        hi: Upper end.
        target: The execution target it was measured on, or None where it does not depend on one.
        output: The model output it belongs to, or None.
        note: Anything a reader must know to use the number.
    """

    name: str
    value: float | None
    unit: str = ""
    lo: float | None = None
    hi: float | None = None
    target: str | None = None
    output: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One gate applied to one metric.

    Attributes:
        gate: The gate's name in the config, such as ``max_accuracy_drop``.
        limit: The configured limit.
        outcome: passed, failed, or inconclusive when the interval straddles the limit.
        reason: One line that a person can act on.
        target: The execution target, or None.
    """

    gate: str
    limit: float
    outcome: Outcome
    reason: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One arrow of the run: which stage, on which branch, what it said of its work.

    Attributes:
        name: ``distill`` or ``int8_per_channel/quantize_static``.
        kind: The stage's kind.
        digest: Digest of the artifact it gave.
        cached: True if the store had it.
        seconds: How long the work took when it was done.
        facts: What the stage says of its work. Of every step that gives a model ``size_bytes``: of a network its
            weights.
    """

    name: str
    kind: str
    digest: str
    cached: bool
    seconds: float
    facts: Facts


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of the comparison: a model and everything measured on it.

    Attributes:
        name: The variant's name, or ``teacher``, ``source`` or ``reference``.
        role: ``original`` is what the user brought, ``reference`` the float ONNX model that drift and latency are
            measured against, ``variant`` a branch of the config.
        model: Path of the ``.onnx`` file.
        digest: sha256 of the artifact.
        metrics: Everything measured.
        verdicts: One per gate and target; empty for rows that are not variants.
        details: Evidence behind the metrics that is more than a number, as plain JSON by topic, such as ``latency``:
            what was measured under which conditions. A topic that was not looked into is left out. ``startup``: by
            target, the figures of each process, of ``candidate`` and ``reference``; of a GPU ``device_memory_note``
            says where they are from, or why there are none. ``worst_samples``: by target and output, those farthest
            from the reference's. ``sample_errors``: likewise, the squared error of every sample, where they are few.
            ``drift_split``: by target, how quantization and kernel error were told apart, or why not. ``coverage``: by
            target, the graph that runs as stretches of nodes in integers and in float, with causes, for quantized
            models. ``ranges``: of these, what their tensors are stored with, the worst first. ``nodes``: where their
            error is born, or why nobody looked. Beside the report lies ``pictures.json`` with the worst samples, where
            they are images. ``package``: the ``.ort`` files of a variant and how far their outputs are from it.
            ``package_times``: by target, how they load and run.
    """

    name: str
    role: Literal["original", "reference", "variant"]
    model: str
    digest: str
    metrics: tuple[Metric, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    def metric(self, name: str, *, target: str | None = None, output: str | None = None) -> Metric | None:
        """The first metric of that name, of that target and output where they are given.

        Without ``output`` one of the whole model goes before those of its outputs: of both there is a ``cosine``.
        """
        found = [
            m for m in self.metrics if m.name == name and target in (None, m.target) and output in (None, m.output)
        ]
        return min(found, key=lambda m: m.output is not None, default=None)

    @property
    def outcome(self) -> Outcome:
        """``failed`` if any gate failed, else inconclusive if any is, else passed."""
        return worst([verdict.outcome for verdict in self.verdicts])


@dataclass(frozen=True, slots=True)
class Report:
    """Everything a run leaves as evidence.

    Attributes:
        name: The run's name.
        config: The full config, defaults filled in.
        candidates: Original, reference and variants.
        steps: Every stage that ran or was found.
        winner: Name of the selected variant, or None when none passed.
        selection: Why that one.
        machine: Processor, memory, operating system.
        versions: Library versions.
        seconds: Wall time of the whole run.
        warnings: What the user should know.
        finished: When the run ended, ISO 8601 in UTC.
        inputs: Fingerprints of what went in: the model and each role of the data, digests in place of paths.
        home: The config's folder as seen from the folder of the runs, which a project that is moved as a whole keeps;
            empty where it is not known.
        schema: Version of this layout.
    """

    name: str
    config: dict[str, Any]
    candidates: tuple[Candidate, ...]
    steps: tuple[Step, ...]
    winner: str | None
    selection: str
    machine: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    warnings: tuple[str, ...] = ()
    finished: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    home: str = ""
    schema: int = field(default=SCHEMA)

    @property
    def variants(self) -> tuple[Candidate, ...]:
        """The rows that are branches of the config."""
        return tuple(candidate for candidate in self.candidates if candidate.role == "variant")

    def candidate(self, name: str) -> Candidate:
        """The row of that name.

        Raises:
            KeyError: There is none.
        """
        return {candidate.name: candidate for candidate in self.candidates}[name]

    def _repr_html_(self) -> str:
        """What a notebook shows: one row a model, the winner's first column marked."""
        from onnxshrink.core.notebook import report_table

        return report_table(self)

    def to_json(self) -> str:
        """The report as JSON text, what is short on one line; floats that are not finite never get in."""
        return _json_text(asdict(self)) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """Read a report of this or an older schema; fields this version does not know are left out.

        Raises:
            StoreError: The text is no report, or one of a newer schema.
        """
        try:
            raw = json.loads(text)
            schema = raw.get("schema", SCHEMA)
            report: Report = _known(
                Report,
                raw
                | {
                    "candidates": tuple(map(_candidate, raw["candidates"])),
                    "steps": tuple(_known(Step, step) for step in raw["steps"]),
                    "warnings": tuple(raw.get("warnings", ())),
                },
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:  # no JSON, or JSON of something else
            raise StoreError(f"this is no report: {type(e).__name__}: {e}", want="report.json as a run wrote it") from e
        if schema > SCHEMA:
            raise StoreError(
                "the report was written by a newer onnxshrink",
                got=f"schema {schema}",
                want=f"schema {SCHEMA} or older",
                fix="pip install --upgrade onnxshrink",
            )
        return report

    @staticmethod
    def read(path: str | Path) -> Report:
        """Read ``report.json``.

        Raises:
            StoreError: There is none, or it is no report; names the file.
        """
        path = Path(path)
        try:
            return Report.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as e:
            around = list(path.parents)[:3]  # of a run, of all runs, and of a report in place of its folder
            runs = dict.fromkeys(file.parent for folder in around for file in sorted(folder.glob(f"*/{path.name}")))
            raise StoreError(
                f"the report cannot be read: {e.strerror if isinstance(e, OSError) else e}",
                where=str(path),
                got="no such file" if isinstance(e, FileNotFoundError) else type(e).__name__,
                want="the folder of a finished run",
                fix=f"these have one: {', '.join(map(str, list(runs)[:3]))}" if runs else "onnxshrink run cfg.yaml",
            ) from e
        except StoreError as e:
            e.where = str(path)
            raise


def _json_text(value: Any, indent: str = "") -> str:
    """Indented JSON with lists of numbers, and all that fits into a line, on one line: half the size."""
    flat = json.dumps(value, allow_nan=False)
    has_parts = isinstance(value, (dict, list, tuple)) and any(
        isinstance(part, (dict, list, tuple, str)) for part in value
    )
    if len(flat) + len(indent) <= _LINE or not has_parts:
        return flat
    deeper = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(name)}: {_json_text(part, deeper)}" for name, part in value.items()]
        return "{\n" + deeper + f",\n{deeper}".join(parts) + f"\n{indent}}}"
    return "[\n" + deeper + f",\n{deeper}".join(_json_text(part, deeper) for part in value) + f"\n{indent}]"


def _candidate(row: dict[str, Any]) -> Any:
    metrics = tuple(_known(Metric, metric) for metric in row.get("metrics", ()))
    verdicts = tuple(_known(Verdict, verdict) for verdict in row.get("verdicts", ()))
    return _known(Candidate, row | {"metrics": metrics, "verdicts": verdicts})


def _known(kind: Any, raw: dict[str, Any]) -> Any:
    return kind(**{name: value for name, value in raw.items() if name in kind.__dataclass_fields__})


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    """``failed`` over inconclusive over passed."""
    order: tuple[Outcome, ...] = ("failed", "inconclusive")
    return next((outcome for outcome in order if outcome in outcomes), "passed")


def finite(value: float) -> float | None:
    """``value`` as a plain float, or None where it is infinite or NaN, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None

"""Drift of one candidate on every target: its metrics, its worst samples, and where the drift comes from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxshrink.core.errors import ModelError
from onnxshrink.core.report import Metric
from onnxshrink.data.reader import Reader
from onnxshrink.runtime.graph import is_quantized, load_model
from onnxshrink.runtime.session import Session
from onnxshrink.verify.drift import compare_outputs
from onnxshrink.verify.kernel_error import LITERAL, not_covered, open_literal, why_no_split
from onnxshrink.verify.steps import output_steps


class DriftEvidence:
    """Measures target by target, and keeps what is more than a number.

    Args:
        model: Path of the candidate.

    Attributes:
        details: For `Candidate.details`. ``worst_samples`` by target and output, see `Comparison`; likewise
            ``sample_errors``, where the samples are few; ``drift_split`` by target for quantized models: ``against``,
            what stands between the float and the deployed model, and the operators ``not_covered`` by it; or
            ``declined``, the reason.
    """

    def __init__(self, model: Path) -> None:
        graph = load_model(model)
        self._model = model
        self._quantized = is_quantized(graph)
        self._declined = why_no_split(graph) if self._quantized else None
        self._not_covered = not_covered(graph)
        self._steps = output_steps(graph)
        self.details: dict[str, Any] = {}

    def measure(
        self,
        reference: Session,
        candidate: Session,
        reader: Reader,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Metric, ...]:
        """One pass over the samples on one target.

        Args:
            reference: The float model.
            candidate: The candidate, opened ``like`` the reference's inputs, on the target that counts.
            reader: Samples, of the candidate's `inputs`.
            progress: Told the samples done and their total after each batch.

        Returns:
            The metrics of `Comparison`, and ``output_step`` of each output that is quantized.

        Raises:
            DataError: The reader is empty.
            ModelError: The models' outputs do not match.
        """
        target = candidate.target.name
        literal = self._literal(reference, candidate) if self._quantized else None
        found = compare_outputs(reference, candidate, reader, target, progress, literal=literal)
        self.details.setdefault("worst_samples", {})[target] = found.worst_samples
        if found.sample_errors:
            self.details.setdefault("sample_errors", {})[target] = found.sample_errors
        steps = (
            Metric("output_step", self._steps[own], target=target, output=name)
            for name, own in found.partner.items()
            if own in self._steps
        )
        return (*found.metrics, *steps)

    def _literal(self, reference: Session, candidate: Session) -> Session | None:
        splits = self.details.setdefault("drift_split", {})
        declined = self._declined
        if declined is None:
            try:
                session = open_literal(self._model, candidate.target, reference.inputs)
            except ModelError as e:  # an operator without a float kernel costs the split, not the run
                declined = e.what
            else:
                splits[candidate.target.name] = {"against": LITERAL, "not_covered": list(self._not_covered)}
                return session
        splits[candidate.target.name] = {"declined": declined}
        return None

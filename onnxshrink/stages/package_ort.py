"""``.ort`` files beside the model, for builds of ONNX Runtime that read no ONNX; each is run against the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from onnxshrink.config.stages import OrtStyle, PackageOrt
from onnxshrink.core.artifact import ONNX_FILE, Artifact, Facts
from onnxshrink.core.errors import ParityError
from onnxshrink.core.run_folder import copy_files
from onnxshrink.data.batching import n_samples
from onnxshrink.runtime.mobile import mobile_usability
from onnxshrink.runtime.ort_format import ORT_FILES, OrtConversion, open_ort, required_operators
from onnxshrink.runtime.parity import relative_errors
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.instruction_sets import instruction_sets
from onnxshrink.stages.optimize import Evidence, evidence_of

REQUIRED_FILES = {True: "required_operators_and_types.config", False: "required_operators.config"}
"""With element types, and without."""


def package_ort(settings: PackageOrt, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Write the model's ``.ort`` files and the list of what they need; the model itself stays as it is.

    Every file has to give the outputs of the ``.onnx`` file with the same optimizations, bit by bit.

    Returns:
        Each file with its size, the distance of its outputs from the deployed model's, and what it asks of a processor;
        the required operators; what the accelerators of phones would take.

    Raises:
        ModelError: ONNX Runtime cannot write the model in its format.
        ParityError: A file gives other outputs; names the output and the distance.
    """
    copy_files(source, out)
    model = out / ONNX_FILE
    conversion = OrtConversion(settings.level, settings.platform)
    files = {style: out / ORT_FILES[style] for style in settings.styles}
    for style, path in files.items():
        conversion.write(model, path, style)
    required = out / REQUIRED_FILES[settings.type_reduction]
    conversion.write_required(model, files, required, types=settings.type_reduction)
    session = Session(model)
    deployed = evidence_of(session, ctx)
    operators = required_operators(required.read_text(encoding="utf-8"))
    return {
        "samples": sum(n_samples(batch, session.inputs) for batch in deployed.batches),
        "samples_from": deployed.origin,
        "onnx_bytes": model.stat().st_size,
        "files": {
            style: _verified(conversion, model, path, style, deployed, where=ctx.step) for style, path in files.items()
        },
        "required": required.name,
        "operators": [f"{domain}:{name}:{opset}" for (domain, name), opset in operators.items()],
        "mobile": [asdict(found) for found in mobile_usability(model)],
    }


def _verified(
    conversion: OrtConversion, model: Path, path: Path, style: OrtStyle, deployed: Evidence, *, where: str
) -> Facts:
    """What a file is, once it has given the outputs of the model with the same optimizations."""
    session = open_ort(path, replay=style == "runtime")
    _require_equal(conversion.session(model, style), session, deployed, where=where)
    if style == "runtime":  # who does not ask for the noted optimizations runs the basic graph
        _require_equal(Session(model, optimization="basic"), open_ort(path), deployed, where=where)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "same_optimizations": "bit-identical",
        "max_error_from_deployed": deployed.error(session),
        "instruction_sets": instruction_sets(conversion.graph(model, style)),
    }


def _require_equal(reference: Session, candidate: Session, evidence: Evidence, *, where: str) -> None:
    for batch in evidence.batches:
        for name, error in relative_errors(reference.run(batch), candidate.run(batch)).items():
            if error > 0:
                raise ParityError(
                    f"output {name!r} of {Path(candidate.name).name} differs from that of the model it was made of",
                    where=f"{where}, on {evidence.origin}",
                    got=f"max|candidate - reference| = {error:.3g} of max(1, max|reference|)",
                    want="the same numbers, bit by bit",
                    fix="try another `level` or fewer `styles`; a model that draws random numbers cannot be compared",
                )

"""ONNX model in, a smaller and better-quantizable one out; no pass is believed before the numbers are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxshrink.config.stages import Optimize
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ModelError, ParityError, ShrinkError
from onnxshrink.core.tensors import Array, Batch, TensorSpec
from onnxshrink.data.batching import n_samples
from onnxshrink.runtime.graph import (
    PROTOBUF_LIMIT_BYTES,
    input_specs,
    is_quantized,
    load_model,
    opset_of,
    output_specs,
    save_model,
)
from onnxshrink.runtime.parity import AXIS_LENGTHS, axis_lengths, random_batch, reference_session, relative_errors
from onnxshrink.runtime.quiet import quiet
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.origins import record_origins
from onnxshrink.stages.passes import (
    PASSES,
    SAFE_ON_QUANTIZED,
    Pass,
    count_ops,
    domains_of,
    strip_metadata,
)

_SAMPLES = 32
_BATCH = 8
_MOST_GROWTH = 1.1  # folding a constant may cost some bytes; unfolding a tensor may cost megabytes
_FREE_GROWTH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Evidence:
    """Samples, and what the stage's input makes of them.

    Attributes:
        origin: Where the samples come from.
        batches: Inputs of the model.
        outputs: Outputs of the stage's input for each batch.
    """

    origin: str
    batches: Sequence[Batch]
    outputs: Sequence[dict[str, Array]]

    def error(self, session: Session) -> float:
        """The largest `relative_error` over all outputs and batches."""
        errors = [0.0]
        for batch, reference in zip(self.batches, self.outputs, strict=True):
            errors.extend(relative_errors(reference, session.run(batch)).values())
        return max(errors)


def optimize(settings: Optimize, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Run the passes in order; what fails, breaks the graph or changes the numbers is dropped, and the facts say so.

    The inputs and outputs keep their names, order, dtypes and axes, the model its opset, and every node gets a unique
    name and remembers the names of those that were fused into it.

    Returns:
        Nodes and bytes before and after, what each pass did, and what the record of the old names takes.

    Raises:
        ModelError: ONNX Runtime cannot run the model, or there is nothing to run it on.
        ParityError: The model that was written gives other numbers than the stage's input.
    """
    original = load_model(source.model_path)
    evidence = gather(original, ctx)
    model, facts = run_passes(original, evidence, settings.max_abs_error, ctx)
    optimized_bytes = model.ByteSize()
    record_origins(original, model)
    error = evidence.error(Session(save_model(model, out), optimization="disabled"))
    if not error <= settings.max_abs_error:
        changed = [fact["name"] for fact in facts if fact["outcome"] == "changed"]
        raise ParityError(
            f"the optimized model differs from the one it was made of, after {', '.join(changed) or 'no pass'}",
            where=f"{ctx.step}, on {evidence.origin}",
            got=f"max|candidate - reference| = {error:.3g} of max(1, max|reference|)",
            want=f"at most {settings.max_abs_error:.3g}",
            fix="leave the stage out: a model that draws random numbers cannot be compared",
        )
    return {
        "samples": sum(n_samples(batch, input_specs(original)) for batch in evidence.batches),
        "samples_from": evidence.origin,
        "max_error": error,
        "max_abs_error": settings.max_abs_error,
        "passes": facts,
        "record_bytes": model.ByteSize() - optimized_bytes,
        "batch_norms_left": batch_norms_left(model),
        **_growth(original, model),
    }


def pass_names() -> tuple[str, ...]:
    """Every pass, in order."""
    return tuple(pass_.__name__ for pass_ in PASSES)


def optimize_partly(settings: Optimize, source: Artifact, out: Path, ctx: Context, *, n_passes: int) -> Facts:
    """Write what `optimize` had made of the model after its first ``n_passes`` passes.

    Returns:
        What each of them did.

    Raises:
        ModelError: ONNX Runtime cannot run the model, or there is nothing to run it on.
    """
    original = load_model(source.model_path)
    model, facts = run_passes(original, gather(original, ctx), settings.max_abs_error, ctx, n_passes=n_passes)
    save_model(model, out)
    return {"passes": facts}


def run_passes(
    original: onnx.ModelProto, evidence: Evidence, limit: float, ctx: Context, *, n_passes: int | None = None
) -> tuple[onnx.ModelProto, list[Facts]]:
    """The model after every pass that could be believed, or after the first ``n_passes``, and what each did."""
    strict, quantized = _is_valid(original), is_quantized(original)
    passes = PASSES[:n_passes]
    model, changed = original, list[str]()
    facts: list[Facts] = []
    for number, pass_ in enumerate(passes):
        name = pass_.__name__
        ctx.events.progress(ctx.step, number, len(passes), name)
        before = model
        try:
            if quantized and pass_ not in SAFE_ON_QUANTIZED:
                fact: Facts = {"outcome": "declined", "reason": "the model is quantized"}
            else:
                model, fact = attempt(pass_, model, original, evidence, limit, strict=strict)
        except Exception as e:  # noqa: BLE001  optimizers raise anything, and a refusal is no error: the model stays as it was
            what = e.what if isinstance(e, ShrinkError) else f"{type(e).__name__}: {_first_line(e)}"
            after = f" (after {', '.join(changed)})" if changed else ""
            fact = {"outcome": "declined", "reason": f"{what}{after}"}
        if fact["outcome"] == "changed":
            changed.append(name)
        facts.append({"name": name, **fact, **_growth(before, model)})
    ctx.events.progress(ctx.step, len(passes), len(passes))
    return model, facts


def attempt(
    pass_: Pass, model: onnx.ModelProto, original: onnx.ModelProto, evidence: Evidence, limit: float, *, strict: bool
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Run one pass on a copy and judge the result.

    Args:
        pass_: What to do.
        model: What the passes before it made; kept as it is.
        original: The stage's input, whose interface the result must have.
        evidence: What the result is compared on.
        limit: Largest relative error.
        strict: Let onnx.checker judge the result; pointless where it refuses the stage's input already.

    Returns:
        The result with ``outcome: changed``, or ``model`` with ``unchanged`` or ``declined`` and a reason.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with quiet():
        result, notes = pass_(copy)
        # What a pass notes for itself is no change; and shapes noted by one pass have led another to wrong rewrites.
        result, _ = strip_metadata(result)
    extra = {"notes": notes} if notes else {}
    for values, wanted in ((result.graph.input, input_specs(original)), (result.graph.output, output_specs(original))):
        source = {value.name: value for value in (*original.graph.input, *original.graph.output)}
        restored = [source[spec.name] for spec in wanted]
        del values[:]
        values.extend(restored)
    if result == model:
        return model, {"outcome": "unchanged", **extra}
    reason = _misfit(result, model, original, strict=strict)
    if reason is None:
        error = evidence.error(reference_session(result, name=f"the model after {pass_.__name__}"))
        if error <= limit:
            return result, {"outcome": "changed", "max_error": error, **extra}
        reason = f"the outputs differ by {error:.3g} of their largest value, and {limit:.3g} is allowed"
    return model, {"outcome": "declined", "reason": reason, **extra}


def gather(model: onnx.ModelProto, ctx: Context) -> Evidence:
    """The first calibration samples, or seeded random values where the config gives none, with the model's outputs.

    Raises:
        ModelError: The model cannot be run on them.
    """
    return evidence_of(reference_session(model, name="the model to optimize"), ctx)


def evidence_of(session: Session, ctx: Context) -> Evidence:
    """As `gather`, with the outputs of a model as a session runs it."""
    specs = session.inputs
    reader = ctx.reader("calibration", specs, batch_size=_BATCH)
    if reader is None:
        return _random_evidence(session, specs, ctx.seed)
    batches: list[Batch] = []
    count = 0
    for batch in reader:
        batches.append(batch)
        count += n_samples(batch, specs)
        if count >= _SAMPLES:
            break
    return Evidence(reader.where, batches, [session.run(batch) for batch in batches])


def _random_evidence(session: Session, specs: Sequence[TensorSpec], seed: int) -> Evidence:
    refusals: list[ModelError] = []
    for length in AXIS_LENGTHS:
        batches = [
            random_batch(specs, axis_lengths(specs, batch=batch, length=length), seed=seed + batch)
            for batch in (1, _BATCH)
        ]
        try:
            return Evidence("seeded random values", batches, [session.run(batch) for batch in batches])
        except ModelError as e:
            refusals.append(e)
    raise ModelError(
        f"the model cannot be tried on random values, so nothing can be compared: {refusals[0].what}",
        want=", ".join(map(str, specs)),
        fix="give real samples: data.calibration",
    ) from refusals[0]


def _misfit(result: onnx.ModelProto, before: onnx.ModelProto, original: onnx.ModelProto, *, strict: bool) -> str | None:
    """Why the result cannot be taken, whatever its numbers are."""
    foreign = domains_of(result) - domains_of(original) - {""}
    if foreign:
        return f"it writes operators that are not ONNX's: {', '.join(sorted(foreign))}"
    if opset_of(result) != opset_of(original):
        return f"it changes the opset from {opset_of(original)} to {opset_of(result)}"
    if result.ByteSize() > before.ByteSize() * _MOST_GROWTH + _FREE_GROWTH_BYTES:
        return f"it grows the model from {before.ByteSize()} to {result.ByteSize()} bytes"
    if strict and result.ByteSize() < PROTOBUF_LIMIT_BYTES:
        onnx.checker.check_model(result, full_check=True)
    return None


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:  # noqa: BLE001  the checker's errors have no common base, and ONNX Runtime took the model
        return False
    return True


def _growth(before: onnx.ModelProto, after: onnx.ModelProto) -> dict[str, Any]:
    """Nodes and bytes before and after, and the operator types whose number changed."""
    old, new = count_ops(before), count_ops(after)
    return {
        "nodes_before": sum(old.values()),
        "nodes": sum(new.values()),
        "ops": {op: new[op] - old[op] for op in sorted(old | new) if new[op] != old[op]},
        "bytes_before": before.ByteSize(),
        "bytes": after.ByteSize(),
    }


def batch_norms_left(model: onnx.ModelProto) -> dict[str, str]:
    """Name of each BatchNormalization that is left, and why: in a quantized model it stays an island in float."""
    producers = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in node.input)
    readers.update(value.name for value in model.graph.output)
    left = {}
    for node in model.graph.node:
        if node.op_type != "BatchNormalization":
            continue
        producer = producers.get(node.input[0])
        if producer is None or producer.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            before = producer.op_type if producer else "an input"
            left[node.name] = f"it follows {before}, which has no weights to fold it into"
        elif readers[node.input[0]] > 1:
            left[node.name] = f"the output of {producer.name!r} before it is read elsewhere as well"
        else:
            left[node.name] = f"the weights of {producer.name!r} before it are shared or computed"
    return left


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

"""Torch network in, ONNX model out: the user's names, the asked opset, and the same numbers at two batch sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from torch import nn

from onnxshrink.config.stages import Export
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.graph import load_model, opset_of, save_model
from onnxshrink.runtime.parity import random_batch, reference_session, relative_errors
from onnxshrink.runtime.session import Session
from onnxshrink.runtime.torch_export import export_network, fix_for, run_torch, runnable_lengths
from onnxshrink.runtime.torch_model import count_parameters, load_network
from onnxshrink.stages.context import Context

_CHECK_BATCHES = (1, 3)


def export(settings: Export, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Write the network as ONNX and compare the two on seeded random inputs.

    Returns:
        The opset, the size, internal values that had to be renamed, and for each batch size the largest error relative
        to ``max(1, max|torch|)``.

    Raises:
        ModelError: The exporter cannot take the network, or not with the asked names, axes or opset.
        ParityError: The ONNX model gives other numbers than torch.
    """
    network, architecture = load_network(source)
    ctx.events.progress(ctx.step, 0, 2, "export")
    model, renamed = export_network(network, architecture.inputs, architecture.outputs, settings, seed=ctx.seed)
    ctx.events.progress(ctx.step, 1, 2, "parity")
    trials = compare(network, model, architecture.inputs, settings, seed=ctx.seed)
    name_output_axes(model, architecture.inputs, trials)
    path = save_model(model, out)
    Session(path)
    ctx.events.progress(ctx.step, 2, 2)
    return {
        "exporter": settings.exporter,
        "opset": opset_of(model),
        "nodes": len(model.graph.node),
        "parameters": count_parameters(network),
        "bytes": load_model(path).ByteSize(),
        "max_error": {f"batch {trial.batch}": max(trial.errors.values(), default=0.0) for trial in trials},
        "max_abs_error": settings.max_abs_error,
        "renamed": renamed,
    }


@dataclass(frozen=True, slots=True)
class Trial:
    """One comparison: lengths of the named axes, relative error and shape of each output."""

    batch: int
    lengths: Mapping[str, int]
    errors: Mapping[str, float]
    shapes: Mapping[str, tuple[int, ...]]


def compare(
    network: nn.Module, model: onnx.ModelProto, inputs: Sequence[TensorSpec], settings: Export, *, seed: int
) -> list[Trial]:
    """Run both on the same random inputs, at two batch sizes where the batch axis is named.

    Raises:
        ModelError: ONNX Runtime cannot load the model.
        ParityError: It cannot run it on one of the inputs, or an output differs by more than the settings allow.
    """
    session = reference_session(model, name="the exported model")
    fixed = inputs[0].shape[0]
    trials = []
    for number, batch in enumerate(_CHECK_BATCHES if isinstance(fixed, str) else (fixed,)):
        lengths = runnable_lengths(network, inputs, batch=batch, seed=seed)
        values = random_batch(inputs, lengths, seed=seed + 1 + number)
        wanted = run_torch(network, inputs, values)
        reference = dict(zip((spec.name for spec in session.outputs), wanted, strict=True))
        at = ", ".join(f"{name}={length}" for name, length in lengths.items()) or f"batch={batch}"
        try:
            candidate = session.run(values)
        except ModelError as e:
            raise ParityError(
                f"the exported model does not run at {at}, and the network does: {e.what}",
                want="a model that takes every length of a named axis",
                fix=fix_for(settings),
            ) from e
        errors = relative_errors(reference, candidate)
        for name, error in errors.items():
            if not error <= settings.max_abs_error:
                raise ParityError(
                    f"the exported model and the network differ in the output {name!r} at {at}",
                    got=f"max|onnx - torch| = {error:.3g} of max(1, max|torch|)",
                    want=f"at most {settings.max_abs_error:.3g}",
                    fix=f"{fix_for(settings)}, or raise `max_abs_error` if the difference is known to be harmless",
                )
        trials.append(Trial(batch, lengths, errors, {name: value.shape for name, value in candidate.items()}))
    return trials


def name_output_axes(model: onnx.ModelProto, inputs: Sequence[TensorSpec], trials: Sequence[Trial]) -> None:
    """Name an output's axis after the input's axis that had its length in every trial, where the exporter did not.

    The classic exporter writes names such as ``Addoutput_dim_0``. With fewer than two trials nothing is known.
    """
    asked = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    if len(trials) < 2:
        return
    for value in model.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") or any(re.search(rf"\b{re.escape(name)}\b", dim.dim_param) for name in asked):
                continue
            lengths = [trial.shapes[value.name][axis] for trial in trials]
            names = sorted(name for name in asked if [trial.lengths[name] for trial in trials] == lengths)
            if len(names) == 1 and len(set(lengths)) > 1:
                dim.dim_param = names[0]

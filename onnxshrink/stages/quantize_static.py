"""ONNX Runtime's static quantization, with ranges from our own calibration.

ONNX Runtime's quantizers are given the ranges and the nodes to leave alone, and nothing else is different: with equal
ranges the graph equals that of ``onnxruntime.quantization.quantize_static`` byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod as OrtMethod
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from onnxshrink.calibration.calibrate import load_calibration, ranges_of
from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.observe import tensors_to_calibrate
from onnxshrink.calibration.prepare import LAYER_NORMS, QUANTIZABLE_OP_TYPES, SUITED_TO_TRANSFORMERS, prepare
from onnxshrink.calibration.ranges import Range
from onnxshrink.config.stages import Calibrate, CalibrationMethod, QuantizeStatic
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.runtime.graph import input_specs, load_model, opset_of, require_valid, save_model
from onnxshrink.runtime.isa import detect_isa, resolve_scheme
from onnxshrink.runtime.session import Session
from onnxshrink.stages.choose_ranges import choose_ranges
from onnxshrink.stages.compact import compact
from onnxshrink.stages.context import Context
from onnxshrink.stages.correct_bias import correct_bias
from onnxshrink.stages.hold_float import hold_float, own_constants
from onnxshrink.stages.reduce_range import forecast_samples, reduced_range
from onnxshrink.stages.selection import captured_warnings, chosen_op_types, excluded_nodes, outermost_nodes, strip
from onnxshrink.stages.static_facts import float_nodes, node_facts, quantized_activations

_BATCH = 4
_METHODS: tuple[CalibrationMethod, ...] = ("mse", "minmax", "percentile", "entropy")  # of equals the first is kept
_NOTHING = "the model has no node that static quantization could take"
# Activation type, weight type.
_TYPES = {
    "u8s8": (QuantType.QUInt8, QuantType.QInt8),
    "s8s8": (QuantType.QInt8, QuantType.QInt8),
    "u8u8": (QuantType.QUInt8, QuantType.QUInt8),
}


def quantize_static(settings: QuantizeStatic, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Quantize weights and activations to 8 bits, with ranges from the calibration samples.

    A tensor that no 8-bit range can serve (an attention mask of ``finfo.min``) keeps its nodes in float, and the facts
    say why. A model without anything to quantize is passed on as it is, and the facts say that.

    Args:
        settings: Granularity, types, format, method, and what to leave in float.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run; the statistics come from the stage ``calibrate`` on the same source.

    Raises:
        ConfigError: An operator type or a node name that is not there.
        DataError: The calibration samples do not fit.
        ModelError: The model is quantized already, computes in float16, or cannot be loaded when quantized.
    """
    loaded = load_model(source.model_path)
    before: Facts = {"opset_before": opset_of(loaded), "bytes_before": size_bytes(source.path)}
    with captured_warnings() as warnings:
        plan = plan_static(settings, loaded, source, ctx)
        facts = before | plan.facts
        if plan.declined:
            save_model(loaded, out)
            ctx.events.warned(f"{ctx.step}: {plan.declined}; it stays in float")
            return facts | {"declined": plan.declined, "bytes_after": size_bytes(out), "quantized_nodes": {}}
        model = plan.model
        if settings.bias_correction:
            model, facts["bias_correction"] = plan.corrected(ctx)
        quantized = plan.quantized(model=model)
    strip(quantized)
    facts["held_in_float"] = hold_float(quantized)
    if settings.compact:
        facts["compact"] = compact(quantized)
    path = save_model(quantized, out)
    require_valid(path)
    Session(path, name=ctx.step)
    in_float = float_nodes(quantized, settings.format)
    return facts | {
        "bytes_after": size_bytes(out),
        "activations": quantized_activations(quantized, plan.activations),
        "ranges": len(plan.ranges),
        **node_facts(plan.model.graph.node, quantizable_op_types(plan.settings), plan.excluded, in_float),
        "warnings": warnings,
    }


@dataclass(frozen=True, slots=True)
class StaticPlan:
    """What is decided before a model is quantized; it serves any choice of further nodes to leave in float.

    Attributes:
        step: What to call the stage in messages.
        settings: The stage's, with types, instruction set and whether all weights get 7 bits.
        model: The prepared float model; every use copies it.
        excluded: Names of nodes that stay in float, each with the reason.
        ranges: A range for every activation that may be quantized.
        activations: Every tensor that was observed.
        reduced: Weights that get 7 bits, each with the axis of its scales.
        facts: What was decided and why.
        declined: Why there is nothing to quantize; then the rest is empty.
    """

    step: str
    settings: QuantizeStatic
    model: onnx.ModelProto
    excluded: Mapping[str, str]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    activations: frozenset[str] = frozenset()
    reduced: Mapping[str, int | None] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)
    declined: str | None = None

    def quantized(self, exclude: Iterable[str] = (), *, model: onnx.ModelProto | None = None) -> onnx.ModelProto:
        """What ONNX Runtime's quantizers make of ``model``, the plan's own by default, with ``exclude`` left as well.

        Raises:
            ModelError: They do not understand the graph.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(model or self.model)
        nodes = [*self.excluded, *exclude]
        own_constants(copy, nodes, quantizable_op_types(self.settings))
        try:
            return quantized_model(copy, self.ranges, self.settings, exclude=nodes, reduced=self.reduced)
        except (ValueError, RuntimeError, KeyError) as e:  # what the quantizers raise on such a graph
            raise ModelError(
                f"ONNX Runtime cannot quantize the model: {str(e).strip().partition(chr(10))[0]}",
                where=self.step,
                got=type(e).__name__,
                fix="name the nodes at fault in exclude_nodes, or choose the other format (qdq, qoperator)",
            ) from e

    def corrected(self, ctx: Context) -> tuple[onnx.ModelProto, Facts]:
        """The float model whose biases make up for what quantization does to its weights, and facts.

        Raises:
            DataError: There are no calibration samples.
        """
        reader = ctx.reader("calibration", input_specs(self.model), batch_size=_BATCH)
        if reader is None:  # the config refuses this; the Python API may not
            raise DataError("there are no calibration samples", where=ctx.step, fix="give the data role `calibration`")
        return correct_bias(self.model, self.quantized(), reader, name=ctx.step)


def plan_static(settings: QuantizeStatic, loaded: onnx.ModelProto, source: Artifact, ctx: Context) -> StaticPlan:
    """Decide on types, ranges, 7-bit weights and the nodes that have to stay in float.

    Args:
        settings: The stage's.
        loaded: The model of ``source``.
        source: A float32 model, whose calibration is derived.
        ctx: The run.

    Raises:
        ConfigError: An operator type or a node name that is not there.
        DataError: The calibration samples do not fit.
        ModelError: The model is quantized already, or computes in float16.
    """
    isa = detect_isa() if settings.isa == "auto" else settings.isa
    scheme = resolve_scheme(isa, types=settings.types, format=settings.format, op_types=settings.op_types)
    settings = settings.model_copy(update={"types": scheme.types, "isa": isa})
    model = prepare(loaded, where=ctx.step)
    reasons = list(scheme.reasons)
    if settings.op_types is None and (norms := LAYER_NORMS & {node.op_type for node in model.graph.node}):
        settings = settings.model_copy(update={"op_types": SUITED_TO_TRANSFORMERS})
        reasons.append(f"the graph has {min(norms)}: only {', '.join(SUITED_TO_TRANSFORMERS)} take 8 bits well there")
    op_types = quantizable_op_types(settings)
    excluded = outermost_nodes(model, settings.float_first, settings.float_last)
    excluded |= excluded_nodes(settings.exclude_nodes, model, stage=settings.kind)
    facts: Facts = {
        "granularity": settings.granularity,
        "types": settings.types,
        "isa": isa,
        "scheme": reasons,
        "format": settings.format,
        "method": settings.method,
        "opset_after": opset_of(model),
    }
    if not any(node.op_type in op_types and node.name not in excluded for node in model.graph.node):
        return StaticPlan(ctx.step, settings, model, excluded, facts=facts, declined=_NOTHING)

    calibration = load_calibration(ctx.derive(Calibrate(), source).path)
    unfit = calibration.absurd() | masked_tensors(model)
    facts["absurd_tensors"] = {name: unfit[name] for name in tensors_to_calibrate(model) if name in unfit}
    excluded |= _nodes_at(unfit, model, op_types)
    methods = _METHODS if settings.method == "auto" else (settings.method,)
    candidates = {
        method: ranges_of(calibration, method, percentile=settings.percentile, leave_out=unfit) for method in methods
    }
    activations = frozenset(calibration.tensors)
    plan = StaticPlan(ctx.step, settings, model, excluded, candidates[methods[0]], activations, facts=facts)
    reduced = reduced_range(
        settings, scheme, lambda other: replace(plan, settings=other).quantized(), model, forecast_samples(ctx, model)
    )
    settings = settings.model_copy(update={"reduce_range": reduced.everywhere})
    plan = replace(plan, settings=settings, reduced=reduced.weights, facts=facts | reduced.facts)
    return plan if len(candidates) == 1 else _with_chosen_ranges(plan, candidates, ctx)


def _with_chosen_ranges(
    plan: StaticPlan, candidates: Mapping[CalibrationMethod, Mapping[str, Range]], ctx: Context
) -> StaticPlan:
    """The plan with each tensor's range by the method that serves the outputs best."""
    model = plan.corrected(ctx)[0] if plan.settings.bias_correction else plan.model
    trial = replace(plan, settings=plan.settings.model_copy(update={"format": "qdq"}))
    chosen = choose_ranges(
        candidates,
        lambda ranges: replace(trial, ranges=ranges).quantized(model=model),
        plan.model,
        forecast_samples(ctx, plan.model),
        progress=lambda done, total: ctx.events.progress(ctx.step, done, total, "ranges"),
        name=ctx.step,
    )
    return replace(plan, ranges=chosen.ranges, facts=plan.facts | {"chosen_ranges": chosen.facts})


def quantized_model(
    model: onnx.ModelProto,
    ranges: Mapping[str, Range],
    settings: QuantizeStatic,
    *,
    exclude: Iterable[str] = (),
    reduced: Mapping[str, int | None] = MappingProxyType({}),
) -> onnx.ModelProto:
    """What ``onnxruntime.quantization.quantize_static`` makes of ``model`` with these ranges, byte for byte.

    Args:
        model: A prepared model; the quantizers change it in place.
        ranges: A range for every float activation that a node to be quantized reads or writes.
        settings: Granularity, types (not ``auto``), format, operator types; 7 bits for all weights if
            ``reduce_range`` is true, for ``auto`` has been decided by then.
        exclude: Names of nodes to leave in float.
        reduced: Weights that get 7 bits, for ``qdq``: each with the axis of its scales, or None where it has one.
    """
    activation_type, weight_type = _TYPES[settings.types]
    limits = TensorsData(
        OrtMethod.MinMax,
        {name: TensorData(lowest=np.float32(lo), highest=np.float32(hi)) for name, (lo, hi) in ranges.items()},
    )
    op_types = list(quantizable_op_types(settings))
    per_channel, reduce_all = settings.granularity == "per_channel", settings.reduce_range is True
    options = {"TensorQuantOverrides": {name: [_seven_bits(axis)] for name, axis in reduced.items()}} if reduced else {}
    shared: tuple[Any, ...] = (weight_type, activation_type, limits, [], list(exclude), op_types, options)
    if settings.format == "qdq":
        quantizer = QDQQuantizer(model, per_channel, reduce_all, *shared)
    else:
        mode = QuantizationMode.QLinearOps
        quantizer = ONNXQuantizer(model, per_channel, reduce_all, mode, True, *shared)  # noqa: FBT003
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    result: onnx.ModelProto = quantizer.model.model
    return result


def _seven_bits(axis: int | None) -> dict[str, Any]:
    """ONNX Runtime's override for a tensor with one scale, or with one for each place along ``axis``."""
    return {"reduce_range": True} | ({} if axis is None else {"axis": axis})


def quantizable_op_types(settings: QuantizeStatic) -> tuple[str, ...]:
    """The operator types that the settings let ONNX Runtime quantize, sorted."""
    return chosen_op_types(
        settings.op_types,
        QUANTIZABLE_OP_TYPES,
        QUANTIZABLE_OP_TYPES,
        stage=settings.kind,
        what="static quantization cannot take",
    )


def _nodes_at(tensors: Mapping[str, str], model: onnx.ModelProto, op_types: Iterable[str]) -> dict[str, str]:
    """Quantizable nodes that read or write one of ``tensors``, each with the reason to leave it in float."""
    wanted = set(op_types)
    touching = {
        node.name: next((name for name in (*node.input, *node.output) if name in tensors), None)
        for node in model.graph.node
        if node.op_type in wanted
    }
    return {node: f"{tensor!r} {tensors[tensor]}" for node, tensor in touching.items() if tensor is not None}

"""Drift in two parts: what quantization costs, and what the kernels that run it add.

A QDQ model says in ONNX's terms what shall be computed: float operators between QuantizeLinear and DequantizeLinear.
With ``session.disable_quant_qdq`` ONNX Runtime computes literally that; without, it fuses groups into integer kernels.
From the float model to the literal one is quantization error; from there to what is deployed is kernel error:
saturation, other rounding, activations that a weight-only kernel rounds as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from onnxshrink.config.gates import Target
from onnxshrink.config.stages import Isa, QuantizeWeights, Stage
from onnxshrink.core.drift import IDENTICAL, Drift
from onnxshrink.core.report import Candidate, Metric, finite
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.runtime.graph import graphs_of, quantized_op_types
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.runtime.session import Session

LITERAL = "the QDQ model in float on the CPU provider (session.disable_quant_qdq)"
"""What stands between the float model and the deployed one."""

LEAST_LOSS_DB = 1.0
"""What kernels must cost of the SQNR, beside what quantization costs, to be told."""

LEAST_MARGIN_DB = 6.0
"""Kernel error that is smaller than this below quantization error, half its size, is told.

Right kernels differ as well: float sums that fall on either side of a rounding step give other numbers from there on.
On EfficientNet-Lite0 that was 9 dB below quantization error, and cost nothing.
"""

FINE_SQNR_DB = 40.0
"""Above, the outputs differ by less than a hundredth of their size, whatever the cause."""

_BORDERS = {"QuantizeLinear", "DequantizeLinear"}


def not_covered(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that compute on quantized numbers in any session: what they lose counts as quantization error."""
    return tuple(name for name in quantized_op_types(model) if name not in _BORDERS)


def why_no_split(model: onnx.ModelProto) -> str | None:
    """Why a quantized model's drift cannot be split, or None where it can.

    Args:
        model: A quantized model.
    """
    for graph in graphs_of(model.graph):
        dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        if any(node.op_type not in _BORDERS and dequantized & set(node.input) for node in graph.node):
            return None
    return f"only QDQ models can be run in float, and this one computes with {', '.join(not_covered(model))}"


def open_literal(model: Path, target: Target, like: Sequence[TensorSpec]) -> Session:
    """A session that runs the model's float operators in float, with the rounding between them.

    It is always the CPU provider: others fuse QDQ groups in ways of their own, whatever the session says.

    Args:
        model: A QDQ model.
        target: Where the model is deployed; its threads count.
        like: Inputs of the reference.

    Raises:
        ModelError: ONNX Runtime cannot run it so.
    """
    return Session(model, Target(threads=target.threads), config={"session.disable_quant_qdq": "1"}, like=like)


def split_metrics(quantization: Drift, kernel: Drift, target_name: str) -> Iterator[Metric]:
    """``quantization_sqnr_db`` and ``kernel_sqnr_db`` of one output.

    Args:
        quantization: From the float model to the literal one.
        kernel: From the literal one to the deployed one.
        target_name: Where the model is deployed.
    """
    for name, drift in (("quantization_sqnr_db", quantization), ("kernel_sqnr_db", kernel)):
        note = drift.flaw or (IDENTICAL if not drift.sum_squares else None)
        value = None if note else finite(drift.sqnr_db)
        note = note or (None if value is not None else "one side is all zeros")
        yield Metric(name, value, "dB", target=target_name, output=drift.output, note=note)


def find_kernel_error(variant: Candidate, chain: Sequence[Stage]) -> Iterator[str]:
    """A line for each target where the kernels cost more than quantization explains, with what to do about it.

    Args:
        variant: A row of the report with everything measured.
        chain: The stages that made it.
    """
    worst: dict[str | None, tuple[float, str]] = {}
    for deployed in (metric for metric in variant.metrics if metric.name == "sqnr_db"):
        quantization, kernel = (
            _decibels(variant.metric(name, target=deployed.target, output=deployed.output))
            for name in ("quantization_sqnr_db", "kernel_sqnr_db")
        )
        if deployed.value is None or quantization is None or kernel is None:
            continue
        loss = quantization - deployed.value
        matters = kernel < quantization + LEAST_MARGIN_DB and deployed.value < FINE_SQNR_DB
        if matters and loss >= max(LEAST_LOSS_DB, worst.get(deployed.target, (0.0, ""))[0]):
            text = (
                f"{variant.name}: kernel error on {deployed.target}: output {deployed.output!r} has "
                f"{deployed.value:.1f} dB SQNR, and {_said(quantization)} where the same model is computed in float"
            )
            worst[deployed.target] = loss, text
    for _, text in worst.values():
        yield f"{text}; {_remedy(chain, detect_isa())}"


def _remedy(chain: Sequence[Stage], isa: Isa) -> str:
    """What to try, by what may be the cause."""
    if any(isinstance(stage, QuantizeWeights) for stage in chain):
        return "weight-only kernels round activations to 8 bits: try quantize_weights with activations: float"
    if isa == "x86_avx2":
        return (
            "without VNNI this processor adds two products in 16 bits, which saturates: try reduce_range: true, or "
            "types: u8u8; a processor with VNNI does not need it"
        )
    return "a fused kernel computes something else than the model says: leave its node in float with exclude_nodes"


def _said(decibels: float) -> str:
    return "no error at all" if math.isinf(decibels) else f"{decibels:.1f} dB"


def _decibels(metric: Metric | None) -> float | None:
    """Infinite for identical outputs; None where there is no number for another reason."""
    if metric is not None and metric.note == IDENTICAL:
        return math.inf
    return metric.value if metric is not None else None

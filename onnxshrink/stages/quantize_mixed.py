"""Static int8 and float in one model: the nodes whose 8 bits cost most, for the work they save, return to float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from onnxshrink.config.stages import QuantizeMixed
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.report import finite
from onnxshrink.runtime.graph import load_model
from onnxshrink.stages.context import Context
from onnxshrink.stages.quantize_static import plan_static, quantize_static
from onnxshrink.stages.selection import captured_warnings
from onnxshrink.stages.sensitivity import Group, Sensitivity, Trials, decibels, measure_sensitivity


def quantize_mixed(settings: QuantizeMixed, source: Artifact, out: Path, ctx: Context) -> Facts:
    """Quantize, and return nodes to float one group after the other until the outputs are near enough.

    The result is that of `quantize_static` with the chosen nodes in ``exclude_nodes``; the facts name them under
    ``returned``, say how each group was measured under ``sensitivity``, and whether the drift that was asked for was
    reached. The drift is that of some calibration samples, so held-out samples may differ by some tenths of a decibel.

    Args:
        settings: Those of static quantization, the drift to reach and the work that may go back to float.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run.

    Raises:
        ShrinkError: As of `quantize_static`.
    """
    with captured_warnings():  # the last quantization says them again
        plan = plan_static(settings.static(settings.exclude_nodes), load_model(source.model_path), source, ctx)
        if plan.declined:
            return quantize_static(settings.static(settings.exclude_nodes), source, out, ctx)
        trials = Trials(plan, ctx)
        int8_db, table = measure_sensitivity(trials, ctx)
        returned, reached_db = choose(trials, table, int8_db, settings)
    nodes = tuple(name for group in returned for name in group.nodes)
    facts = quantize_static(settings.static((*settings.exclude_nodes, *nodes)), source, out, ctx)
    if reached_db < settings.min_sqnr_db:
        ctx.events.warned(
            f"{ctx.step}: {reached_db:.1f} dB of {settings.min_sqnr_db:g} dB with "
            f"{settings.max_float_ratio:.0%} of the multiply-accumulates in float"
        )
    return facts | {
        "min_sqnr_db": settings.min_sqnr_db,
        "max_float_ratio": settings.max_float_ratio,
        "sqnr_db_int8": finite(int8_db),
        "sqnr_db_mixed": finite(reached_db),
        "reached": reached_db >= settings.min_sqnr_db,
        "float_ratio": sum(group.macs_ratio for group in returned),
        "returned": list(nodes),
        "sensitivity": [one.facts() for one in table],
    }


def choose(
    trials: Trials, table: Sequence[Sensitivity], int8_db: float, settings: QuantizeMixed
) -> tuple[list[Group], float]:
    """The groups that return to float, each only if that makes the outputs nearer, and the SQNR in dB with them.

    Args:
        trials: Measures the model with any nodes in float.
        table: The groups, the most worthwhile first.
        int8_db: The SQNR to start from.
        settings: The drift to reach and the work that may go back.
    """
    chosen: list[Group] = []
    reached, spent = int8_db, 0.0
    for one in table:
        if reached >= settings.min_sqnr_db:
            break
        if one.gain <= 0 or spent + one.group.macs_ratio > settings.max_float_ratio:
            continue
        sqnr_db = decibels(trials.noise([name for group in (*chosen, one.group) for name in group.nodes]))
        if sqnr_db > reached and not math.isnan(sqnr_db):
            chosen.append(one.group)
            reached, spent = sqnr_db, spent + one.group.macs_ratio
    return chosen, reached

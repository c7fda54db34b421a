"""Static int8, dynamic int8, 8-bit weights and float in one model: each group of nodes what measuring speaks for.

Times are measured, so a second search may decide otherwise where two choices are near. The stage's result is memoized
with them, its key names the processor, and the facts hold every measurement: what was found stays. With ``schemes`` and
``overrides`` that leave no choice nothing is measured, and the same bytes come out everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxshrink.config.stages import NodeScheme, QuantizeMixed
from onnxshrink.core.artifact import Artifact, Facts, size_bytes
from onnxshrink.core.report import finite
from onnxshrink.runtime.graph import load_model, opset_of, save_model
from onnxshrink.runtime.session import Session
from onnxshrink.stages.context import Context
from onnxshrink.stages.mixture import Found, find_mixture
from onnxshrink.stages.node_cost import Stopwatch
from onnxshrink.stages.quantize_static import plan_static, quantize_static
from onnxshrink.stages.schemes import finished_model
from onnxshrink.stages.selection import captured_warnings
from onnxshrink.stages.sensitivity import Trials


def quantize_mixed(
    settings: QuantizeMixed, source: Artifact, out: Path, ctx: Context, *, stopwatch: Stopwatch | None = None
) -> Facts:
    """Quantize each group of nodes by the scheme that serves the whole best.

    The facts name under ``assigned`` every node that differs from the ``base``, say how each group was measured under
    ``sensitivity`` and each scheme alone under ``singles``, and whether the drift that was asked for was reached. The
    drift is that of some calibration samples, so held-out samples may differ by some tenths of a decibel.

    Args:
        settings: Those of static quantization, the schemes, the drift to reach and the work that may stay in float.
        source: A float32 model of kind ``onnx``.
        out: Where ``model.onnx`` goes.
        ctx: The run.
        stopwatch: Measures time; the machine's own by default.

    Raises:
        ConfigError: An override that names no node, or asks for what its node cannot become.
        ShrinkError: As of `quantize_static`.
    """
    with captured_warnings():  # the last quantization says them again
        plan = plan_static(settings.static(settings.exclude_nodes), load_model(source.model_path), source, ctx)
        trials = Trials(plan, settings, ctx, stopwatch or Stopwatch())
    if not trials.takes:
        return quantize_static(settings.static(settings.exclude_nodes), source, out, ctx)
    with captured_warnings():
        found = find_mixture(trials, settings, ctx)
        schemes = trials.nodes(found.mixture)
        model, facts = finished_model(settings, schemes, source, ctx)
    op_types = {node.name: node.op_type for node in plan.model.graph.node}
    Session(save_model(model, out), name=ctx.step)
    sqnr_db = None if found.is_given else trials.measured(model.SerializeToString()).sqnr_db
    shortfall = _shortfall(found, schemes, settings, sqnr_db)
    return facts | {
        "opset_after": opset_of(model),
        "bytes_before": size_bytes(source.path),
        "bytes_after": size_bytes(out),
        "quantized_nodes": _counts(op_types, schemes),
        "nodes": dict(sorted(Counter(schemes.values()).items())),
        "float_nodes": {
            name: _reason(name, trials, reason)
            for name, reason in facts.get("float_nodes", {}).items()
            if schemes.get(name, "float") == "float"
        },
        **_found_facts(found, trials, settings, sqnr_db),
        **shortfall,
        "warnings": [*facts.get("warnings", ()), *shortfall.get("warnings", ())],
    }


def _reason(name: str, trials: Trials, reason: str) -> str:
    """Why a node is in float, where static quantization was only told to leave it."""
    if name in trials.fixed:
        return "float in overrides"
    return "float in the mixture" if name in trials.takes and name not in trials.plan.excluded else reason


def _shortfall(
    found: Found, schemes: Mapping[str, NodeScheme], settings: QuantizeMixed, sqnr_db: float | None
) -> Facts:
    """What the user has to know: that nothing became 8 bits, or that the drift was not reached."""
    warnings = []
    if set(schemes.values()) == {"float"} != set(settings.schemes):
        if found.is_given:
            return {"declined": f"no node is left that could become {' or '.join(settings.schemes)}"}
        warnings.append(f"all nodes stay in float: {found.decision}")
    if sqnr_db is not None and sqnr_db < settings.min_sqnr_db:
        warnings.append(
            f"{sqnr_db:.1f} dB of {settings.min_sqnr_db:g} dB, the nearest with at most "
            f"{settings.max_float_ratio:.0%} of the multiply-accumulates in float"
        )
    return {"warnings": warnings}


def _found_facts(found: Found, trials: Trials, settings: QuantizeMixed, sqnr_db: float | None) -> Facts:
    single = trials.nodes(trials.single(found.base))
    facts: dict[str, Any] = {
        "min_sqnr_db": settings.min_sqnr_db,
        "max_float_ratio": settings.max_float_ratio,
        "base": found.base,
        "assigned": {name: scheme for name, scheme in trials.nodes(found.mixture).items() if scheme != single[name]},
        "decision": found.decision,
    }
    if sqnr_db is None:
        return facts
    return facts | {
        "sqnr_db_base": finite(found.base_db),
        "sqnr_db_mixed": finite(sqnr_db),
        "reached": sqnr_db >= settings.min_sqnr_db,
        "float_ratio": trials.float_ratio(found.mixture),
        "time_ratio": list(found.time_ratio),
        "singles": found.singles,
        "sensitivity": [one.facts() for one in found.table],
    }


def _counts(op_types: Mapping[str, str], schemes: Mapping[str, NodeScheme]) -> dict[str, int]:
    return dict(sorted(Counter(op_types[name] for name, scheme in schemes.items() if scheme != "float").items()))

"""Which weights get 7 bits: where an x86 processor without VNNI would saturate, and 7 bits lose less than that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from onnxshrink.calibration.forecast import forecast_saturation
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.core.artifact import Facts
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Batch
from onnxshrink.data.batching import n_samples
from onnxshrink.runtime.graph import input_specs
from onnxshrink.runtime.isa import Scheme
from onnxshrink.stages.context import Context

FORECAST_SAMPLES = 16
"""Saturation is a matter of pairs, of which one sample has millions."""


@dataclass(frozen=True, slots=True)
class ReducedRange:
    """Which weights get 7 bits.

    Attributes:
        everywhere: All of them do.
        weights: Those that do, each with the axis of its scales, or None where it has one.
        facts: Why, for the report.
    """

    everywhere: bool = False
    weights: Mapping[str, int | None] = field(default_factory=dict)
    facts: Facts = field(default_factory=dict)


def reduced_range(
    settings: QuantizeStatic,
    scheme: Scheme,
    quantize: Callable[[QuantizeStatic], onnx.ModelProto],
    original: onnx.ModelProto,
    samples: Iterable[Batch],
) -> ReducedRange:
    """Decide on 7-bit weights, tensor by tensor where the format lets us.

    Only where a kernel can saturate is the model quantized for a trial and run on the samples.

    Args:
        settings: The stage's, with types and instruction set known.
        scheme: What suits them.
        quantize: Quantizes the model with other settings than the stage's own; the result is free to keep.
        original: The prepared float model.
        samples: Some calibration samples; all are run.
    """
    if settings.reduce_range != "auto":
        return ReducedRange(settings.reduce_range, facts={"reduce_range": f"{settings.reduce_range}, as asked for"})
    if scheme.reduce_range == "never":
        return ReducedRange(facts={"reduce_range": f"no: {settings.types} does not saturate on {settings.isa}"})
    trial = settings.model_copy(update={"format": "qdq", "reduce_range": False})
    forecasts = forecast_saturation(
        quantize(trial), quantize(trial.model_copy(update={"reduce_range": True})), original, samples
    )
    reduced = {forecast.weight: forecast.axis for forecast in forecasts if forecast.needs_reduced_range}
    everywhere = bool(reduced) and settings.format == "qoperator"
    summary = f"{len(reduced)} of {len(forecasts)} weights"
    facts = {
        "reduce_range": f"all weights, as {summary} would saturate; format: qdq reduces these alone"
        if everywhere
        else summary,
        "saturation": {forecast.node: str(forecast) for forecast in forecasts},
    }
    return ReducedRange(everywhere, {} if everywhere else reduced, facts)


def forecast_samples(ctx: Context, model: onnx.ModelProto) -> Iterator[Batch]:
    """Up to 16 calibration samples, evenly spread, one at a time; read only when they are asked for.

    Raises:
        DataError: There are no calibration samples.
    """
    specs = input_specs(model)
    reader = ctx.reader("calibration", specs, batch_size=1)
    if reader is None:  # the config refuses this; the Python API may not
        raise DataError("there are no calibration samples", where=ctx.step, fix="give the data role `calibration`")
    seen = 0
    for batch in reader.shard(0, max(1, len(reader) // FORECAST_SAMPLES)):
        yield batch
        seen += n_samples(batch, specs)
        if seen >= FORECAST_SAMPLES:
            return

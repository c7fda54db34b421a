"""Observe a float model's activations on the calibration samples, once for every way to quantize it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from onnxshrink.calibration.calibrate import Calibration, save_calibration
from onnxshrink.calibration.health import examine
from onnxshrink.calibration.parts import observe_parts
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.data import Data
from onnxshrink.config.stages import Calibrate
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import Reader, open_reader
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.stages.context import Context


def calibrate(settings: Calibrate, source: Artifact, out: Path, ctx: Context) -> Facts:  # noqa: ARG001 (a stage's form)
    """Write the statistics of every tensor that may be quantized; they serve every method and granularity.

    The facts say under ``health`` whether the samples suffice, and ``warnings`` what needs doing.

    Args:
        settings: None yet: what is observed follows from the model.
        source: A float model of kind ``onnx``.
        out: Where ``statistics.npz`` goes.
        ctx: The run; the data role ``calibration`` is read.

    Raises:
        DataError: No samples, samples that do not fit, or an activation that is NaN or infinite.
        ModelError: The model is quantized already, computes in float16, or cannot be run.
    """
    model = prepare(load_model(source.model_path), where=ctx.step)
    specs = input_specs(model)

    data = ctx.data.calibration
    if data is None:  # the config refuses this; the Python API may not
        raise DataError("there are no calibration samples", where=ctx.step, fix="give the data role `calibration`")
    open_samples = partial(_opened, data, specs)
    observed = observe_parts(
        model, open_samples, events=ctx.events, step=ctx.step, name=ctx.step, sharding=ctx.sharding
    )
    calibration = Calibration.of(observed)
    health = examine(observed, calibration, model)
    save_calibration(calibration, out)
    return {
        "samples": calibration.samples,
        "tensors": len(calibration.tensors),
        "tensors_derived": len(observed.plan.derived),
        "values": sum(statistics.size for statistics in calibration.tensors.values()),
        "degenerate_tensors": calibration.degenerate(),
        "absurd_tensors": calibration.absurd(),
        "masked_tensors": observed.plan.masked,
        "health": health.facts(),
        "warnings": [str(finding) for finding in health.findings],
    }


def _opened(data: Data, specs: Sequence[TensorSpec], batch_size: int) -> Reader:
    """The samples, in any process."""
    return open_reader(data, specs, batch_size=batch_size)

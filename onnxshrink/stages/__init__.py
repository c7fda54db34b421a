"""The table of stages: settings in, work out. The only registry; mypy proves it complete."""

from __future__ import annotations

from functools import partial
from typing import assert_never

from onnxshrink.config.stages import (
    AnyStage,
    Calibrate,
    Distill,
    Equalize,
    Export,
    Finetune,
    Optimize,
    PackageOrt,
    PruneChannels,
    PruneWeights,
    QuantizeDynamic,
    QuantizeMixed,
    QuantizeStatic,
    QuantizeWeights,
    SmoothQuant,
    ToFp16,
)
from onnxshrink.stages.context import Context, Work

__all__ = ["Context", "Work", "work_of"]


def work_of(stage: AnyStage) -> Work:  # noqa: C901, PLR0912  one arm for each stage
    """The function that does a stage's work, its settings bound.

    Imports are local so that a run loads only the frameworks of the stages it has to run: a cached torch trunk costs no
    torch import.
    """
    match stage:
        case Distill():
            from onnxshrink.stages.distill import distill

            return partial(distill, stage)
        case PruneChannels():
            from onnxshrink.stages.prune_channels import prune_channels

            return partial(prune_channels, stage)
        case PruneWeights():
            from onnxshrink.stages.prune_weights import prune_weights

            return partial(prune_weights, stage)
        case Finetune():
            from onnxshrink.stages.finetune import finetune

            return partial(finetune, stage)
        case Export():
            from onnxshrink.stages.export import export

            return partial(export, stage)
        case Optimize():
            from onnxshrink.stages.optimize import optimize

            return partial(optimize, stage)
        case Calibrate():
            from onnxshrink.stages.calibrate import calibrate

            return partial(calibrate, stage)
        case Equalize():
            from onnxshrink.stages.equalize import equalize

            return partial(equalize, stage)
        case SmoothQuant():
            from onnxshrink.stages.smooth_quant import smooth_quant

            return partial(smooth_quant, stage)
        case QuantizeStatic():
            from onnxshrink.stages.quantize_static import quantize_static

            return partial(quantize_static, stage)
        case QuantizeMixed():
            from onnxshrink.stages.quantize_mixed import quantize_mixed

            return partial(quantize_mixed, stage)
        case QuantizeDynamic():
            from onnxshrink.stages.quantize_dynamic import quantize_dynamic

            return partial(quantize_dynamic, stage)
        case QuantizeWeights():
            from onnxshrink.stages.quantize_weights import quantize_weights

            return partial(quantize_weights, stage)
        case ToFp16():
            from onnxshrink.stages.to_fp16 import to_fp16

            return partial(to_fp16, stage)
        case PackageOrt():
            from onnxshrink.stages.package_ort import package_ort

            return partial(package_ort, stage)
        case _:
            assert_never(stage)

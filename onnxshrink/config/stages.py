"""The table of all stages. A stage's kind, file, function and config class carry the same name."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import Field

from onnxshrink.config.onnx_stages import (
    BLOCKS_OPSET,
    Calibrate,
    CalibrationMethod,
    Equalize,
    Isa,
    NodeScheme,
    Optimize,
    OrtLevel,
    OrtPlatform,
    OrtStyle,
    PackageOrt,
    QuantizeDynamic,
    QuantizeMixed,
    QuantizeStatic,
    QuantizeWeights,
    SmoothQuant,
    StaticQuantization,
    ToFp16,
)
from onnxshrink.config.torch_stages import Distill, Export, Finetune, PruneChannels, PruneWeights

__all__ = [
    "BLOCKS_OPSET",
    "AnyStage",
    "Calibrate",
    "CalibrationMethod",
    "Distill",
    "Equalize",
    "Export",
    "Finetune",
    "Isa",
    "NodeScheme",
    "Optimize",
    "OrtLevel",
    "OrtPlatform",
    "OrtStyle",
    "PackageOrt",
    "PruneChannels",
    "PruneWeights",
    "QuantizeDynamic",
    "QuantizeMixed",
    "QuantizeStatic",
    "QuantizeWeights",
    "SmoothQuant",
    "Stage",
    "StaticQuantization",
    "ToFp16",
]

Stage: TypeAlias = Annotated[
    Distill
    | PruneChannels
    | PruneWeights
    | Finetune
    | Export
    | Optimize
    | Equalize
    | SmoothQuant
    | QuantizeStatic
    | QuantizeMixed
    | QuantizeDynamic
    | QuantizeWeights
    | ToFp16
    | PackageOrt,
    Field(discriminator="kind"),
]
"""What a config may list."""

AnyStage: TypeAlias = Stage | Calibrate
"""What the pipeline can run: the config's stages, and those that they derive."""

"""Settings of the stages that work on an ONNX model."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from onnxshrink.config.base import Ratio
from onnxshrink.config.data import Role
from onnxshrink.config.stage import StageSettings
from onnxshrink.core.artifact import Kind

CalibrationMethod: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]

Isa: TypeAlias = Literal["x86_vnni", "x86_avx2", "arm64"]
"""What a processor multiplies bytes with; x86_avx2 is any x86 processor without VNNI."""

OrtStyle: TypeAlias = Literal["fixed", "runtime"]
"""Optimizations that are applied when an ``.ort`` file is written, or noted in it and applied when it is loaded."""

OrtLevel: TypeAlias = Literal["basic", "extended"]
"""ONNX Runtime's level of graph optimization that an ``.ort`` file is written with; higher ones fit one processor."""

OrtPlatform: TypeAlias = Literal["any", "arm"]
"""The processors that an ``.ort`` file is for."""

BLOCKS_OPSET = 21
"""From this version on ONNX has weights in blocks of 4 bits, which convolutions are stored in."""


class Optimize(StageSettings):
    """Rewrite the float graph into fewer and better-quantizable nodes; the result is compared on real samples."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"
    uses: ClassVar[tuple[Role, ...]] = ("calibration",)

    kind: Literal["optimize"] = "optimize"
    max_abs_error: float = Field(default=1e-4, gt=0)
    """Largest difference allowed between input and result, relative to the largest output."""


class Equalize(StageSettings):
    """Cross-layer equalization: even ranges for the channels between Convs; the float function stays as it is."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"
    uses: ClassVar[tuple[Role, ...]] = ("calibration",)

    kind: Literal["equalize"] = "equalize"
    max_abs_error: float = Field(default=1e-4, gt=0)
    """Largest difference allowed between input and result, relative to the largest output."""


class SmoothQuant(StageSettings):
    """SmoothQuant: outlier channels move from the input of a MatMul into its weights; the float function stays."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"
    needs: ClassVar[tuple[Role, ...]] = ("calibration",)

    kind: Literal["smooth_quant"] = "smooth_quant"
    alpha: Ratio | Literal["auto"] = "auto"
    """Share of the outliers that moves; `auto` searches it, for each input, by the measured error of the outputs."""
    max_abs_error: float = Field(default=1e-4, gt=0)
    """Largest difference allowed between input and result, relative to the largest output."""


class Calibrate(StageSettings):
    """Observe activations on the calibration data once; every quantize stage on the same model shares the result."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "ranges"
    needs: ClassVar[tuple[Role, ...]] = ("calibration",)

    kind: Literal["calibrate"] = "calibrate"


class StaticQuantization(StageSettings):
    """What the stages of static quantization have in common."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"
    needs: ClassVar[tuple[Role, ...]] = ("calibration",)

    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    """One scale for each weight tensor, or one for each of its output channels."""
    types: Literal["auto", "u8s8", "s8s8", "u8u8"] = "auto"
    """Activation and weight types; `auto` takes those that suit `isa`: u8s8 on x86, s8s8 on arm64."""
    isa: Literal["auto"] | Isa = "auto"
    """Instruction set of the processor the model is for; `auto` is that of this machine."""
    format: Literal["qdq", "qoperator"] = "qdq"
    """QuantizeLinear/DequantizeLinear pairs that the runtime fuses, or integer operators in the file itself."""
    method: CalibrationMethod | Literal["auto"] = "minmax"
    """How the range of an activation follows from its observed values; `auto` chooses among the methods for each
    tensor, by the measured error of the outputs on some calibration samples."""
    percentile: Annotated[float, Field(gt=0.5, le=1.0)] = 0.9999
    """For `method: percentile`, and its part in `auto`: share of the values that the range covers."""
    bias_correction: bool = True
    """Take what rounding the weights adds to each channel's mean, on the calibration samples, out of its bias."""
    reduce_range: Literal["auto"] | bool = "auto"
    """Use 7 bits for weights. `auto` does so where `isa` is x86_avx2, for those weights whose layers saturate on
    calibration samples and lose more by it than by the missing bit."""
    compact: bool = False
    """Leave out of a `qdq` file what follows from the rest, such as zero points that are zero, and shorten the names of
    what was added; no output changes by it. Store the scales of wide layers in float16, which costs next to nothing."""
    op_types: tuple[str, ...] | None = None
    """Quantize only these operator types. None takes all that ONNX Runtime can; in a network with LayerNormalization
    only products, lookups and what is fused into them."""
    exclude_nodes: tuple[str, ...] = ()
    """Names of nodes to leave in float. A name that matches nothing is an error."""
    float_first: Annotated[int, Field(ge=0)] = 0
    """Leave this many of the nodes that multiply, from the model's input on, in float: they often drift most."""
    float_last: Annotated[int, Field(ge=0)] = 0
    """As many before the model's output."""


class QuantizeStatic(StaticQuantization):
    """ONNX Runtime's static quantization, with ranges from our own one-pass calibration."""

    kind: Literal["quantize_static"] = "quantize_static"


NodeScheme: TypeAlias = Literal["static", "dynamic", "weights", "float"]
"""What a node can become: int8 with fixed or with computed ranges, float with 8-bit weights, or float."""


class QuantizeMixed(StaticQuantization):
    """Static int8, dynamic int8, 8-bit weights or float, node by node: chosen by measured drift and measured time."""

    times: ClassVar[bool] = True

    kind: Literal["quantize_mixed"] = "quantize_mixed"
    schemes: Annotated[tuple[NodeScheme, ...], Field(min_length=1)] = ("static", "dynamic", "weights", "float")
    """What nodes may become. With one alone nothing is searched: every node that can take it gets it."""
    overrides: dict[str, NodeScheme] = Field(default_factory=dict)
    """Nodes by name, each with what it becomes whatever the search finds. A name that matches nothing is an error."""
    min_sqnr_db: float = 20.0
    """The fastest mixture is sought whose outputs are this near the float model's, on some calibration samples."""
    max_float_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the multiply-accumulates that may stay in float though an 8-bit scheme exists for them."""

    def static(self, exclude_nodes: tuple[str, ...]) -> QuantizeStatic:
        """Static quantization as set here, with these nodes left in float."""
        shared = {name: getattr(self, name) for name in StaticQuantization.model_fields}
        return QuantizeStatic(**(shared | {"exclude_nodes": exclude_nodes}))


class QuantizeDynamic(StageSettings):
    """ONNX Runtime's dynamic quantization: 8-bit weights, activation ranges computed for every input; no samples."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"

    kind: Literal["quantize_dynamic"] = "quantize_dynamic"
    granularity: Literal["per_tensor", "per_channel"] = "per_channel"
    """One scale for each weight tensor, or one for each of its output channels."""
    weights: Literal["s8", "u8"] = "s8"
    """Weight type; activations are u8 always. `s8` is far faster on x86 with VNNI."""
    reduce_range: bool = False
    """Use 7 bits for weights; for x86 processors without VNNI, whose 16-bit sums may saturate."""
    op_types: tuple[str, ...] | None = None
    """Quantize only these operator types; None takes Attention, EmbedLayerNormalization, Gather, Gemm, LSTM, MatMul."""
    exclude_nodes: tuple[str, ...] = ()
    """Names of nodes to leave in float. A name that matches nothing is an error."""


class QuantizeWeights(StageSettings):
    """Only the weights in 4 or 8 bits, in blocks with a scale each: the file shrinks, activations stay in float."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"

    kind: Literal["quantize_weights"] = "quantize_weights"
    bits: Literal[4, 8] = 4
    """Bits of a weight."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share a scale; smaller blocks are nearer the float weights and cost bytes."""
    activations: Literal["float", "int8"] = "int8"
    """`int8` lets MatMul round its activations block by block: much faster, little less exact."""
    op_types: tuple[str, ...] | None = None
    """Quantize only these operator types; None takes Conv, ConvTranspose, Gather, Gemm, MatMul."""
    exclude_nodes: tuple[str, ...] = ()
    """Names of nodes whose weights stay as they are. A name that matches nothing is an error."""


class ToFp16(StageSettings):
    """Weights and arithmetic in float16, inputs and outputs as before: for processors that compute in it."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"

    kind: Literal["to_fp16"] = "to_fp16"
    keep_op_types: tuple[str, ...] | None = None
    """Operator types that stay in float32; None keeps those whose sums or powers leave float16's range."""
    keep_nodes: tuple[str, ...] = ()
    """Names of nodes that stay in float32. A name that matches nothing is an error."""
    keep_io_types: bool = True
    """Leave the model's inputs and outputs in float32; verification needs that."""


class PackageOrt(StageSettings):
    """For devices: ``.ort`` files beside the model, each proven to give its numbers, and what they need there."""

    takes: ClassVar[Kind] = "onnx"
    gives: ClassVar[Kind] = "onnx"
    uses: ClassVar[tuple[Role, ...]] = ("calibration",)

    kind: Literal["package_ort"] = "package_ort"
    styles: Annotated[tuple[OrtStyle, ...], Field(min_length=1)] = ("fixed", "runtime")
    """`fixed` writes ``model.ort`` with all optimizations applied: for the CPU. `runtime` writes
    ``model.with_runtime_opt.ort`` with the basic ones, the others noted for nodes that NNAPI or CoreML leave."""
    level: OrtLevel = "extended"
    """Level of the optimizations; those above `extended` would tie the file to a kind of processor."""
    platform: OrtPlatform = "any"
    """Processors that the files are for; `arm` keeps signed 8-bit activations, `any` makes them unsigned."""
    type_reduction: bool = True
    """List the element types of each required operator as well, which makes a reduced build smaller still."""

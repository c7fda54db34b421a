"""Settings of every stage. A stage's kind, file, function and config class carry the same name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import Model, Ratio, SizeBytes
from onnxshrink.config.data import Role
from onnxshrink.config.training import Learning, Teacher
from onnxshrink.core.artifact import Kind

CalibrationMethod: TypeAlias = Literal["minmax", "percentile", "entropy", "mse"]

Isa: TypeAlias = Literal["x86_vnni", "x86_avx2", "arm64"]
"""What a processor multiplies bytes with; x86_avx2 is any x86 processor without VNNI."""

BLOCKS_OPSET = 21
"""From this version on ONNX has weights in blocks of 4 bits, which convolutions are stored in."""


def _require_kind(schema: dict[str, Any]) -> None:
    """Say in the JSON schema what the union says in Python: a stage is told by its kind."""
    schema["required"] = list(dict.fromkeys(["kind", *schema.get("required", [])]))
    schema["properties"]["kind"]["description"] = "Which stage this is."


class StageSettings(Model):
    """What the pipeline needs to know of a stage: what flows in and out, and which data it reads."""

    model_config = ConfigDict(json_schema_extra=_require_kind)

    takes: ClassVar[Kind]
    gives: ClassVar[Kind]
    needs: ClassVar[tuple[Role, ...]] = ()
    uses: ClassVar[tuple[Role, ...]] = ()
    """Data that is read where it is given, and done without where it is not."""
    trains: ClassVar[bool] = False
    """A network learns in it: where there are several processes, they share the work."""


class Distill(Learning, StageSettings):
    """Teach the student what the teacher knows."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "torch"
    needs: ClassVar[tuple[Role, ...]] = ("train",)
    trains: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    teacher: Teacher
    """The network to learn from."""


class Recovery(Learning):
    """Training that makes good what pruning cost: from labels, or against a teacher."""

    epochs: int = Field(default=4, gt=0)
    """Passes over the training data."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""


class PruneChannels(StageSettings):
    """Remove whole channels, and whatever depends on them (Fang et al. 2023, "DepGraph"); exactly one target."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "torch"

    kind: Literal["prune_channels"] = "prune_channels"
    pruning_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Target: share of the channels to remove; those of the outputs are kept."""
    max_macs_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Target: share of the multiply-accumulates to keep at most; the pruning ratio is searched."""
    max_size: SizeBytes | None = None
    """Target: size of the model after int8 quantization at most, estimated; the pruning ratio is searched."""
    importance: Literal["group_norm", "magnitude_l1", "magnitude_l2", "taylor", "lamp", "random"] = "group_norm"
    """What makes a channel worth keeping: the weights of all layers that share it, those of the first of them, what the
    loss would lose to first order (needs `data.train`), layer-adaptive magnitude, or chance: a control."""
    scope: Literal["per_layer", "global"] = "per_layer"
    """Rank channels within each layer, or across the whole network."""
    round_to: int = Field(default=1, gt=0)
    """Keep a multiple of this many channels, rounded down but never to none: 32 at 0.3 in eights become 16."""
    num_heads: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Layers that give queries, keys and values, one for each or one for all three, and their number of heads: whole
    heads are removed. The heads of `nn.MultiheadAttention` are known, and become narrower instead."""
    ignore: tuple[str, ...] = ()
    """Names of modules to leave alone."""
    steps: int = Field(default=1, gt=0)
    """Go to the target in this many equal steps."""
    finetune: Recovery | None = None
    """Train between the steps; after the last one, the stage `finetune` does that."""

    @property
    def needs(self) -> tuple[Role, ...]:  # type: ignore[override]
        """Samples, where gradients are taken of them."""
        return ("train",) if self.importance == "taylor" or self.finetune is not None else ()

    @property
    def trains(self) -> bool:  # type: ignore[override]
        """True with training between the steps."""
        return self.finetune is not None

    @model_validator(mode="after")
    def _one_target(self) -> PruneChannels:
        targets = ("pruning_ratio", "max_macs_ratio", "max_size")
        given = [name for name in targets if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(given)} are {len(given)} targets" if given else "there is no target"
            context = {"what": what, "want": f"exactly one of {', '.join(targets)}", "fix": None}
            raise PydanticCustomError("misfit", "{what}", context)
        if self.finetune is not None and self.steps == 1:
            what, fix = "`finetune` trains between steps, and there is one step", "put {kind: finetune} behind it"
            raise PydanticCustomError("misfit", "{what}", {"what": what, "want": "steps: 2 or more", "fix": fix})
        return self


class PruneWeights(StageSettings):
    """Set the smallest weights of convolutions and linear layers to zero, and keep them so in later training."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "torch"

    kind: Literal["prune_weights"] = "prune_weights"
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the weights that are zero afterwards, wherever they are."""
    pattern: Annotated[str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*$")] | None = None
    """`N:M`, such as `2:4`: of every M weights along the inputs of a channel, the N largest stay. A last group that is
    shorter keeps N as well, or all it has."""
    scope: Literal["per_layer", "global"] = "per_layer"
    """For `sparsity`: the share of each layer, or of the whole network, where some layers may lose more."""
    ignore: tuple[str, ...] = ()
    """Names of modules to leave alone, with all they contain."""

    @property
    def group(self) -> tuple[int, int]:
        """N and M of the pattern."""
        kept, of = (self.pattern or "0:0").split(":")
        return int(kept), int(of)

    @model_validator(mode="after")
    def _one_way(self) -> PruneWeights:
        what = fix = None
        if (self.sparsity is None) == (self.pattern is None):
            what = (
                "there is neither `sparsity` nor `pattern`" if self.pattern is None else "`pattern` is a sparsity too"
            )
            want = "exactly one of sparsity, pattern"
        elif self.pattern is not None and self.group[0] >= self.group[1]:
            what, want = f"the pattern {self.pattern!r} keeps every weight", "N:M with N below M, such as '2:4'"
        elif self.pattern is not None and self.scope == "global":
            what, want = "`scope` is for `sparsity`: a pattern is kept in every group of weights", "one of the two"
            fix = "leave `scope` out"
        if what is not None:
            raise PydanticCustomError("misfit", "{what}", {"what": what, "want": want, "fix": fix})
        return self


class Finetune(Recovery, StageSettings):
    """Train further: to recover from pruning, from labels or against a teacher, or to get ready for quantization."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "torch"
    trains: ClassVar[bool] = True

    kind: Literal["finetune"] = "finetune"
    simulate: Annotated[QuantizeStatic | QuantizeWeights, Field(discriminator="kind")] | None = None
    """Quantization-aware training: compute as this quantize stage of the variant will, with the same settings, and
    learn the network's own float outputs on `data.calibration`. The learning rate counts in steps of the integer
    grid; where none is given it is 0.003, and a batch has 4 samples."""

    @property
    def needs(self) -> tuple[Role, ...]:  # type: ignore[override]
        """Its own data, but for learning from the network as it was."""
        return ("train",) if self.simulate is None else ("calibration",)

    @property
    def is_taught(self) -> bool:
        """True if there is something to learn from besides labels: a teacher, or the network as it was."""
        return self.simulate is not None or super().is_taught

    @model_validator(mode="before")
    @classmethod
    def _simulates(cls, value: Any) -> Any:
        """Weights that are right but for rounding move little, and many times."""
        if isinstance(value, Mapping) and value.get("simulate") is not None:
            return {"learning_rate": 0.003, "batch_size": 4} | dict(value)
        return value

    @model_validator(mode="after")
    def _learns_itself(self) -> Finetune:
        if self.simulate is not None and (self.teacher is not None or self.losses):
            raise PydanticCustomError(
                "misfit",
                "{what}",
                {
                    "what": "with `simulate` a network learns its own float outputs, and nothing else",
                    "want": "no `teacher` and no `losses` beside `simulate`",
                    "fix": "put a stage that learns from them before this one",
                },
            )
        return self


class Export(StageSettings):
    """Write the torch network as ONNX, and check that both give the same numbers at two batch sizes."""

    takes: ClassVar[Kind] = "torch"
    gives: ClassVar[Kind] = "onnx"

    kind: Literal["export"] = "export"
    opset: int = Field(default=20, ge=13, le=23)
    """ONNX opset version."""
    exporter: Literal["dynamo", "torchscript"] = "dynamo"
    """`torchscript` is the classic tracer, for networks the newer exporter cannot take."""
    max_abs_error: float = Field(default=1e-4, gt=0)
    """Largest difference allowed: max|onnx - torch| <= max_abs_error * max(1, max|torch|)."""


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
    method: CalibrationMethod = "minmax"
    """How the range of an activation follows from its observed values."""
    percentile: Annotated[float, Field(gt=0.5, le=1.0)] = 0.9999
    """For `method: percentile`: share of the values that the range covers."""
    bias_correction: bool = True
    """Take what rounding the weights adds to each channel's mean, on the calibration samples, out of its bias."""
    reduce_range: Literal["auto"] | bool = "auto"
    """Use 7 bits for weights. `auto` does so where `isa` is x86_avx2, for those weights whose layers saturate on
    calibration samples and lose more by it than by the missing bit."""
    compact: bool = False
    """Leave out of a `qdq` file what follows from the rest, such as zero points that are zero; the outputs stay."""
    op_types: tuple[str, ...] | None = None
    """Quantize only these operator types; None takes all that ONNX Runtime can."""
    exclude_nodes: tuple[str, ...] = ()
    """Names of nodes to leave in float. A name that matches nothing is an error."""


class QuantizeStatic(StaticQuantization):
    """ONNX Runtime's static quantization, with ranges from our own one-pass calibration."""

    kind: Literal["quantize_static"] = "quantize_static"


class QuantizeMixed(StaticQuantization):
    """Static quantization with the nodes that drift most, for what they cost, left in float: found by measuring."""

    kind: Literal["quantize_mixed"] = "quantize_mixed"
    min_sqnr_db: float = 20.0
    """Nodes return to float until the outputs are this near the float model's, on some calibration samples."""
    max_float_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Share of the multiply-accumulates that may return to float."""

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


Finetune.model_rebuild()  # it names stages that are defined after it


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
    | ToFp16,
    Field(discriminator="kind"),
]
"""What a config may list."""

AnyStage: TypeAlias = (
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
    | Calibrate
)
"""What the pipeline can run: the config's stages, and those that they derive."""

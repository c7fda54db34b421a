"""Settings of the stages that work on a torch network, up to its export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from onnxshrink.config.base import SizeBytes
from onnxshrink.config.data import Role
from onnxshrink.config.onnx_stages import QuantizeStatic, QuantizeWeights
from onnxshrink.config.stage import StageSettings
from onnxshrink.config.training import Learning, Teacher
from onnxshrink.core.artifact import Kind


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

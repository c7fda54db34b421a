"""Where the model comes from: a torch factory with weights, or an ONNX file."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from onnxshrink.config.base import Arguments, EntryPoint, FilePath, Model
from onnxshrink.core.artifact import Kind
from onnxshrink.core.tensors import TensorSpec


class InputSettings(Model):
    """One input of a torch network; torch modules do not say what they take."""

    shape: tuple[int | str, ...] = Field(min_length=1)
    """Axis lengths, batch first; a name such as `batch` makes the axis dynamic and is kept in the ONNX model."""
    dtype: Literal["float32", "float16", "float64", "int8", "uint8", "int32", "int64", "bool"] = "float32"
    """Element type."""

    def spec(self, name: str) -> TensorSpec:
        """This input as a `TensorSpec` named ``name``."""
        return TensorSpec(name, self.dtype, self.shape)


class FactorySource(Model):
    """A torch network: a function that builds the module, and its weights."""

    gives: ClassVar[Kind] = "torch"

    factory: EntryPoint
    """`package.module:function` that returns a `torch.nn.Module`."""
    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    weights: FilePath | None = None
    """State dict as `.safetensors`, `.pth` or `.pt`; nothing but tensors is read. None keeps the factory's weights."""
    inputs: dict[str, InputSettings] = Field(min_length=1)
    """The network's inputs in the order of its `forward`, by the names they will have in ONNX."""
    outputs: tuple[str, ...] | None = None
    """Names for the outputs in ONNX; None keeps the exporter's."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The inputs as specs, in order."""
        return tuple(settings.spec(name) for name, settings in self.inputs.items())


class OnnxSource(Model):
    """An ONNX model, with its external data if it has any."""

    gives: ClassVar[Kind] = "onnx"

    onnx: FilePath
    """The `.onnx` file."""


def _which_source(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return "OnnxSource" if "onnx" in keys else "FactorySource"


ModelSource: TypeAlias = Annotated[
    Annotated[FactorySource, Tag("FactorySource")] | Annotated[OnnxSource, Tag("OnnxSource")],
    Discriminator(_which_source),
]

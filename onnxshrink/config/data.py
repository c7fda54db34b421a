"""Where samples come from: numpy archives, loose arrays, or the user's own reader."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Field, Tag

from onnxshrink.config.base import Arguments, EntryPoint, FilePath, Model

Role: TypeAlias = Literal["train", "calibration", "evaluation"]
MetricName: TypeAlias = Literal["top1", "top5", "mae", "rmse"]


class DataSettings(Model):
    """What every source of samples shares."""

    split: str | None = None
    """Use only the samples whose entry in the array `split` equals this."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Array name to input name. An array named `labels` is the target, one named `split` names each sample's split."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use at most this many samples, the first ones."""
    metric: MetricName | None = None
    """Task metric for evaluation; needs labels."""


class NpzData(DataSettings):
    """Arrays in one `.npz` archive, samples on axis 0. Streamed: memory does not grow with the number of samples."""

    npz: FilePath
    """The archive."""


class NpyData(DataSettings):
    """One `.npy` file for each input, samples on axis 0. Memory-mapped."""

    npy: dict[str, FilePath] = Field(min_length=1)
    """Input name (or `labels`, or `split`) to file."""


class EntryData(DataSettings):
    """The user's own reader: a callable that returns an iterable of batches, or a CalibrationDataReader."""

    entry: EntryPoint
    """`package.module:callable`; called anew for each pass, so that every pass gives the same batches."""
    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the callable."""


def _which_data(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    return "NpyData" if "npy" in keys else "EntryData" if "entry" in keys else "NpzData"


Data: TypeAlias = Annotated[
    Annotated[NpzData, Tag("NpzData")] | Annotated[NpyData, Tag("NpyData")] | Annotated[EntryData, Tag("EntryData")],
    Discriminator(_which_data),
]


class DataRoles(Model):
    """Which samples serve which purpose. Evaluation samples must not be seen by training or calibration."""

    train: Data | None = None
    """Samples to learn from."""
    calibration: Data | None = None
    """Samples whose activations give the quantization ranges."""
    evaluation: Data | None = None
    """Samples that drift and accuracy are measured on."""

    def of(self, role: Role) -> Data | None:
        """The data of one role."""
        data: Data | None = getattr(self, role)
        return data

"""Where samples come from: numpy archives, loose arrays, folders of images, data sets, or the user's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidationInfo

from onnxshrink.config.base import Arguments, EntryPoint, FilePath, Model, existing_path
from onnxshrink.config.metrics import TaskMetric
from onnxshrink.config.steps import ImageStep, NormalizeStep

Role: TypeAlias = Literal["train", "calibration", "evaluation"]


def _labels(value: object, info: ValidationInfo) -> object:
    return value if value is None or value == "folders" else existing_path(value, info)


ImageLabels: TypeAlias = Annotated[
    Literal["folders"] | Path | None,
    BeforeValidator(_labels),
    WithJsonSchema({"anyOf": [{"const": "folders"}, {"type": "string", "format": "path"}, {"type": "null"}]}),
]


def _folder_or_name(value: object, info: ValidationInfo) -> object:
    try:
        return existing_path(value, info)
    except PydanticCustomError:
        return value


HfName: TypeAlias = Annotated[Path | str, BeforeValidator(_folder_or_name), WithJsonSchema({"type": "string"})]


def _misfit(what: str, want: str, fix: str | None) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{what}", {"what": what, "want": want, "fix": fix})


class DataSettings(Model):
    """What every source of samples shares."""

    split: str | None = None
    """Use only the samples whose entry in the array (or the column) `split` equals this."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Array name to input name. An array named `labels` is the target, one named `split` names each sample's split."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use at most this many samples, the first ones."""
    metric: TaskMetric | None = None
    """Task metric for evaluation; needs labels. One of its names, or `{entry: "mine:score", better: higher}`."""


class NpzData(DataSettings):
    """Arrays in one `.npz` archive, samples on axis 0. Streamed: memory does not grow with the number of samples."""

    npz: FilePath
    """The archive."""


class NpyData(DataSettings):
    """One `.npy` file for each input, samples on axis 0. Memory-mapped."""

    npy: dict[str, FilePath] = Field(min_length=1)
    """Input name (or `labels`, or `split`) to file."""


class ImageData(DataSettings):
    """A folder of images, read as they are drawn. They feed the model's one input, in colour if it has three channels.

    Without `normalize` values are 0 to 255. Only `train` may have steps that act at random: they follow from the seed,
    the epoch and the image, and where its samples are only looked at `random_crop` is `crop` and `flip` does nothing.
    """

    images: FilePath
    """The folder; its sub-folders are searched too."""
    labels: ImageLabels = None
    """`folders`: an image's class is its sub-folder, numbered in sorted order. Or a CSV file with the columns `file`
    (relative to `images`), `label` and `split`, of which `file` is needed; `rename` maps other names to these. Labels
    that are no numbers are classes, numbered in sorted order. None uses every image, without labels."""
    steps: tuple[ImageStep, ...] = ()
    """What is done to each image, in order; `normalize` is the last."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """Order of the input's axes."""

    @property
    def random_step(self) -> int | None:
        """Place of the first step that acts at random, or None."""
        return next((at for at, step in enumerate(self.steps) if step.is_random), None)

    @model_validator(mode="after")
    def _normalized_last(self) -> Self:
        if any(isinstance(step, NormalizeStep) for step in self.steps[:-1]):
            raise _misfit("`normalize` is not the last step", "sizes and crops before it", None)
        return self


class HfData(DataSettings):
    """A data set of Hugging Face's `datasets`, read from its Arrow files as it is drawn."""

    hf: HfName
    """A folder that `save_to_disk` wrote, or a name on the hub, which is downloaded."""
    revision: str | None = None
    """Commit of a data set on the hub, which is needed: a name alone does not say what it stands for."""
    columns: dict[str, str] = Field(min_length=1)
    """Input name (or `labels`) to column. Values are taken as they are; what needs preparing needs an `entry`."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if isinstance(self.hf, str) and self.revision is None:
            raise _misfit(
                f"there is no folder {self.hf!r}, and a data set on the hub needs a revision",
                "a folder that save_to_disk wrote, or a name with a commit",
                "revision: the commit that the hub shows for the data set",
            )
        if self.rename:
            raise _misfit("`columns` names the columns, and `rename` does nothing", "columns: {input: column}", None)
        return self


class EntryData(DataSettings):
    """The user's own data: a callable that returns an iterable of batches, a CalibrationDataReader, or a Dataset."""

    entry: EntryPoint
    """`package.module:callable`; called anew for each pass, so that every pass gives the same batches."""
    args: Arguments = Field(default_factory=dict)
    """Keyword arguments of the callable."""


def _which_data(value: Any) -> str:
    keys = value if isinstance(value, dict) else getattr(type(value), "model_fields", {})
    tags = {"npy": "NpyData", "images": "ImageData", "hf": "HfData", "entry": "EntryData"}
    return next((tag for key, tag in tags.items() if key in keys), "NpzData")


Data: TypeAlias = Annotated[
    Annotated[NpzData, Tag("NpzData")]
    | Annotated[NpyData, Tag("NpyData")]
    | Annotated[ImageData, Tag("ImageData")]
    | Annotated[HfData, Tag("HfData")]
    | Annotated[EntryData, Tag("EntryData")],
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

"""What can be done to an image, each step under its name: `[{resize: 256}, {crop: 224}, {normalize: …}]`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Discriminator, Field, Tag

from onnxshrink.config.base import Model, Ratio


class Step(Model):
    """One step; the option's name says which."""

    is_random: ClassVar[bool] = False


class ResizeStep(Step):
    """Scale, bilinear and antialiased as Pillow does; the aspect is kept."""

    resize: int = Field(gt=0)
    """Length of the shorter side in pixels."""


class CropStep(Step):
    """Cut a square out of the middle."""

    crop: int = Field(gt=0)
    """Length of its sides in pixels."""


class RandomCropStep(Step):
    """Cut a square out of a place that is drawn anew each time; out of the middle where nothing may be random."""

    is_random: ClassVar[bool] = True

    random_crop: int = Field(gt=0)
    """Length of its sides in pixels."""


class FlipStep(Step):
    """Swap left and right, at random."""

    is_random: ClassVar[bool] = True

    flip: Ratio
    """How probable it is."""


class Moments(Model):
    """What values are normalized with, one number for each channel or one for all."""

    mean: tuple[Ratio, ...] = Field(min_length=1)
    """Subtracted from values that go from 0 to 1. Of one given for 0 to 255 it is the 255th part."""
    std: tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] = Field(min_length=1)
    """What the rest is divided by, for values from 0 to 1 as well."""


class NormalizeStep(Step):
    """Scale to 0…1, subtract a mean and divide by a standard deviation, as torchvision does."""

    normalize: Moments
    """Both."""


_STEPS = (ResizeStep, CropStep, RandomCropStep, FlipStep, NormalizeStep)


def _which_step(value: Any) -> str | None:
    names = {name for step in _STEPS for name in step.model_fields}
    keys = [str(key) for key in (value if isinstance(value, dict) else getattr(type(value), "model_fields", [value]))]
    return next((key for key in keys if key in names), keys[0] if keys else None)


ImageStep: TypeAlias = Annotated[
    Annotated[ResizeStep, Tag("resize")]
    | Annotated[CropStep, Tag("crop")]
    | Annotated[RandomCropStep, Tag("random_crop")]
    | Annotated[FlipStep, Tag("flip")]
    | Annotated[NormalizeStep, Tag("normalize")],
    Discriminator(_which_step),
]

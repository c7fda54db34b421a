"""Samples from image files: decoded and prepared by named steps as they are drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, assert_never

import numpy as np

from onnxshrink.config.data import ImageData
from onnxshrink.config.steps import CropStep, FlipStep, ImageStep, NormalizeStep, RandomCropStep, ResizeStep
from onnxshrink.core.errors import DataError, DependencyError
from onnxshrink.core.tensors import LABELS, Array, Batch, TensorSpec, check_finite
from onnxshrink.data.image_files import ImageFiles, find_images
from onnxshrink.data.indexed import Draw, Numbers

if TYPE_CHECKING:
    from PIL.Image import Image

_FLOATS = ("float16", "float32", "float64")


def open_images(settings: ImageData, specs: Sequence[TensorSpec], *, labels: bool) -> ImageSamples:
    """Find the images, and prepare the first to see whether it fits the model.

    Args:
        settings: Folder, labels, steps.
        specs: The model's inputs: one, of four axes, floating or uint8.
        labels: Give labels with each batch.

    Raises:
        DependencyError: Pillow is not installed.
        DataError: No images, labels that are asked for and missing, or images that do not fit.
    """
    try:
        import PIL.Image as _  # noqa: F401
    except ImportError as e:
        raise DependencyError(
            "images need Pillow, and it is not installed",
            where=str(settings.images),
            got="no pillow",
            want="the images extra",
            fix="pip install pillow",
        ) from e
    where = str(settings.images)
    if len(specs) != 1:
        raise DataError(
            f"images feed one input, and the model has {len(specs)}",
            where=where,
            want=", ".join(map(str, specs)),
            fix="write an `entry` that gives all of them",
        )
    files = find_images(settings)
    if labels and files.labels is None:
        raise DataError(
            "labels are needed, and the images have none",
            where=files.where,
            want="a class or a value for each image",
            fix="labels: folders, or a CSV file with the columns file and label",
        )
    samples = ImageSamples(files, settings, specs[0], _channels(specs[0], settings, where), labels)
    samples.take(np.arange(1))
    return samples


@dataclass(frozen=True, slots=True)
class ImageSamples:
    """Images by number; made by `open_images`."""

    _files: ImageFiles
    _settings: ImageData
    _spec: TensorSpec
    _channels: int
    _with_labels: bool

    @property
    def where(self) -> str:
        """The folder, or the CSV file."""
        return self._files.where

    @property
    def has_labels(self) -> bool:
        """True if the images have labels, given or not."""
        return self._files.labels is not None

    @property
    def is_random(self) -> bool:
        """True if a step acts at random."""
        return self._settings.random_step is not None

    def __len__(self) -> int:
        return len(self._files.paths)

    def take(self, numbers: Numbers, draw: Draw | None = None) -> Batch:
        """Decode and prepare some images, on several threads; see `Indexed.take`."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            arrays = list(threads.map(lambda number: self._array(int(number), draw), numbers))
        for number, array in zip(numbers, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise self._misfit(self._files.paths[number], array, f"{list(arrays[0].shape)}, as of others")
        batch = {self._spec.name: np.stack(arrays)}
        return batch | ({LABELS: self.labels()[numbers]} if self._with_labels else {})

    def labels(self) -> Array:
        """The labels of all images."""
        labels = self._files.labels
        assert labels is not None  # noqa: S101  # `open_images` refuses to give what is not there
        check_finite(LABELS, labels, where=self.where)
        return labels

    def _array(self, number: int, draw: Draw | None) -> Array:
        """One sample, in the input's layout and dtype."""
        path = self._files.paths[number]
        random = None if draw is None else np.random.default_rng([*draw, number])
        image = _read(path, "L" if self._channels == 1 else "RGB")
        for step in self._settings.steps:
            image = _changed(image, step, random, path)
        pixels: Array = np.asarray(image, np.float32 if self._spec.dtype in _FLOATS else np.uint8)
        pixels = pixels.reshape(image.height, image.width, self._channels)
        last = self._settings.steps[-1] if self._settings.steps else None
        if isinstance(last, NormalizeStep):
            # On 0…255 with the moments scaled up: what a mean of 127/255 subtracts is then exactly 127.
            mean, std = (np.float32(np.array(m) * 255) for m in (last.normalize.mean, last.normalize.std))
            pixels = (pixels - mean) / std
        array = pixels.transpose(2, 0, 1) if self._settings.layout == "nchw" else pixels
        if not self._spec.admits_shape((1, *array.shape), any_batch=True):
            raise self._misfit(path, array, str(self._spec))
        return array.astype(self._spec.dtype)

    def _misfit(self, path: Path, array: Array, want: str) -> DataError:
        height, width = self._spec.shape[2:] if self._settings.layout == "nchw" else self._spec.shape[1:3]
        return DataError(
            "an image does not have the size that is wanted",
            where=str(path),
            got=f"{list(array.shape)} after the steps",
            want=want,
            fix=f"steps: [{{resize: {height}}}, {{crop: {height}}}, …]"
            if isinstance(height, int) and height == width
            else "give all images one size: steps: [{resize: …}, {crop: …}]",
        )


def _channels(spec: TensorSpec, settings: ImageData, where: str) -> int:
    """Channels of the input, 1 or 3. Refuses one that images and steps cannot feed."""
    axis, others = (1, 3) if settings.layout == "nchw" else (3, 1)
    if len(spec.shape) != 4 or (spec.shape[axis] not in (1, 3) and not isinstance(spec.shape[axis], str)):
        swapped = len(spec.shape) == 4 and spec.shape[others] in (1, 3)
        raise DataError(
            f"images of layout {settings.layout} cannot feed the input {spec.name!r}",
            where=where,
            want=f"{spec}: one channel or three on axis {axis} of four",
            fix=f"layout: {'nhwc' if settings.layout == 'nchw' else 'nchw'}" if swapped else None,
        )
    channels = spec.shape[axis] if isinstance(spec.shape[axis], int) else 3
    if spec.dtype not in (*_FLOATS, "uint8"):
        raise DataError(f"images cannot feed {spec.dtype}", where=where, want="a floating input, or uint8")
    for step in settings.steps:
        if isinstance(step, NormalizeStep):
            if spec.dtype == "uint8":
                raise DataError(
                    "`normalize` gives fractions, and the model takes uint8", where=where, fix="leave `normalize` out"
                )
            for name, numbers in (("mean", step.normalize.mean), ("std", step.normalize.std)):
                if len(numbers) not in (1, channels):
                    raise DataError(
                        f"`normalize` has a {name} of {len(numbers)} numbers, and the input {channels} channels",
                        where=where,
                        want="one number for each channel, or one for all",
                    )
    return int(channels)


def _read(path: Path, mode: str) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # which Pillow would cut off at 255, silently
                raise DataError(
                    "an image has more than 8 bits for each value",
                    where=str(path),
                    got=f"Pillow's mode {image.mode}",
                    want="values from 0 to 255",
                    fix="save it with 8 bits, or read it in an `entry` of your own",
                )
            return image.convert(mode)
    # What damaged files make Pillow raise, and a picture too large to be one.
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(
            f"an image cannot be read: {str(e).partition(chr(10))[0] or type(e).__name__}",
            where=str(path),
            fix="check that the file was copied whole, or remove it",
        ) from e


def _changed(image: Image, step: ImageStep, random: np.random.Generator | None, path: Path) -> Image:
    """The image after one step; without a generator, after the step's form without chance."""
    from PIL import Image

    match step:
        case ResizeStep(resize=size):
            shorter = min(image.size)
            width, height = (size if side == shorter else size * side // shorter for side in image.size)
            return image.resize((width, height), Image.Resampling.BILINEAR)
        case CropStep(crop=size):
            return _cropped(image, size, None, path)
        case RandomCropStep(random_crop=size):
            return _cropped(image, size, random, path)
        case FlipStep(flip=probability):
            flips = random is not None and random.random() < probability
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else image
        case NormalizeStep():
            return image
        case _:
            assert_never(step)


def _cropped(image: Image, size: int, random: np.random.Generator | None, path: Path) -> Image:
    rest = image.width - size, image.height - size
    if min(rest) < 0:
        raise DataError(
            f"an image is smaller than the crop of {size}",
            where=str(path),
            got=f"{image.width} x {image.height}",
            fix=f"put {{resize: {size}}} before it",
        )
    left, top = (side // 2 if random is None else int(random.integers(side + 1)) for side in rest)
    return image.crop((left, top, left + size, top + size))

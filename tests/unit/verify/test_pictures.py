"""What the pictures of the worst samples promise: PNG files that another reader reads, of the right samples."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxshrink.config.data import Data, EntryData, NpzData
from onnxshrink.core.importing import search_path
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.verify.pictures import (
    MAX_PICTURES,
    MAX_SIDE,
    PICTURES_FILE,
    draw_pictures,
    image_input,
    png,
    thumbnail,
    worst_numbers,
)

RNG = np.random.default_rng(0)


def read(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return np.asarray(image)


@pytest.mark.parametrize("shape", [(8, 8, 1), (5, 9, 3), (1, 1, 1), (64, 64, 3)])
def test_pillow_reads_what_is_written(shape: tuple[int, int, int]) -> None:
    """Grey and colour, whatever the sides, pixel by pixel."""
    image = RNG.integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(read(png(image)).reshape(shape), image)


def test_thumbnails_are_means_of_squares() -> None:
    """A large image shrinks to at most 64 pixels a side, a small one stays; the values fill 0 to 255."""
    image = RNG.standard_normal((200, 128, 3))
    small = thumbnail(image)
    assert small.shape == (50, 32, 3)
    means = np.array([[image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((0, 1)) for j in range(32)] for i in range(50)])
    want = 255 * (means - means.min()) / (means.max() - means.min())
    assert np.abs(small - want).max() <= 0.5 + 1e-9
    assert max(thumbnail(RNG.random((1000, 3, 1))).shape) <= MAX_SIDE
    assert thumbnail(np.full((8, 8, 1), 7.0)).max() == 0
    digits = np.arange(64.0).reshape(8, 8, 1)
    assert np.array_equal(thumbnail(digits.astype(np.uint8)), np.rint(digits * 255 / 63).astype(np.uint8))


def test_what_is_not_finite_is_drawn_as_zero() -> None:
    """A broken sample is looked at as well."""
    image = np.array([[np.nan, np.inf], [-np.inf, 4.0]])[..., None]
    assert thumbnail(image)[..., 0].tolist() == [[0, 0], [0, 255]]


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ([("batch", 1, 8, 8)], ("in0", 1)),
        ([("batch", 3, "h", "w")], ("in0", 1)),
        ([("batch", 224, 224, 3)], ("in0", 3)),
        ([("batch", 12, 8, 8)], None),
        ([("batch", 3)], None),
        ([("batch", 3, 8, 8), ("batch", 4)], None),
        ([], None),
    ],
)
def test_only_images_are_drawn(shapes: list[tuple[int | str, ...]], found: tuple[str, int] | None) -> None:
    """One input of four axes with one or three channels, before or behind the others."""
    assert image_input([TensorSpec(f"in{i}", "float32", shape) for i, shape in enumerate(shapes)]) == found


def test_the_worst_of_every_list_are_drawn() -> None:
    """Each output's worst sample comes before any other's second, each once; rising, and not more than 32."""

    def row(*numbers: int) -> dict[str, Any]:
        return {"worst_samples": {"cpu": {"y": [{"sample": number} for number in numbers]}}}

    assert worst_numbers([{}, row(5, 3, 9), row(3)]) == (3, 5, 9)
    many = [row(*range(100 * i, 100 * i + 8)) for i in range(20)]
    assert len(worst_numbers(many)) == MAX_PICTURES
    assert {100 * i for i in range(20)} < set(worst_numbers(many))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("source", ["npz", "entry"])
def test_the_file_has_the_samples_of_those_numbers(tmp_path: Path, layout: str, source: str) -> None:
    """By number, from disk or from a callable; the same bytes each time, less than 12 kB for noise in colour."""
    images = RNG.random((40, 3, 100, 80) if layout == "nchw" else (40, 100, 80, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", image=images)
    (tmp_path / "mine_pictures.py").write_text(
        "import numpy as np\ndef batches(path):\n    x = np.load(path)['image']\n"
        "    return [{'image': x[i : i + 7]} for i in range(0, 40, 7)]\n",
        encoding="utf-8",
    )
    specs = [TensorSpec("image", "float32", ("batch", *images.shape[1:]))]
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
        with search_path(tmp_path):
            data: Data = NpzData(npz=tmp_path / "x.npz")
            if source == "entry":
                data = EntryData(entry="mine_pictures:batches", args={"path": str(tmp_path / "x.npz")})
            assert draw_pictures(data, specs, (3, 8, 39), tmp_path / out) == {"pictures": 3}
    text = (tmp_path / "one" / PICTURES_FILE).read_text()
    assert text == (tmp_path / "two" / PICTURES_FILE).read_text()
    document = json.loads(text)
    assert (document["input"], list(document["samples"])) == ("image", ["3", "8", "39"])
    for number, uri in document["samples"].items():
        head, _, body = uri.partition(",")
        assert head == "data:image/png;base64"
        assert len(uri) < 12_000
        image = images[int(number)]
        assert np.array_equal(
            read(base64.b64decode(body)), thumbnail(np.moveaxis(image, 0, -1) if layout == "nchw" else image)
        )

"""What image folders promise: which files, which labels, what each step does, and clear refusals."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional

from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import ImageData
from onnxshrink.core.errors import DataError, DependencyError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.indexed import Indexed, by_number
from onnxshrink.data.reader import Reader, open_reader

SIZE = (20, 12)
COLOUR = TensorSpec("x", "float32", ("batch", 3, "height", "width"))


def pixels(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray[Any, Any]:
    """Height and width from ``size`` (width, height), three channels, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def save(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    """A PNG of `pixels`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, size)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats, a dog and a note, in sub-folders; an index of all three beside them."""
    save(tmp_path / "pets" / "dog" / "a.png", 0)
    save(tmp_path / "pets" / "cat" / "b.PNG", 1)
    save(tmp_path / "pets" / "cat" / "deep" / "c.png", 2)
    (tmp_path / "pets" / "cat" / "note.txt").write_text("no image")
    lines = ["file,label,split", "dog/a.png,7,train", "cat/b.PNG,3,test", "cat/deep/c.png,3,train"]
    (tmp_path / "index.csv").write_text("\n".join(lines))
    return tmp_path / "pets"


def opened(folder: Path, *specs: TensorSpec, **settings: Any) -> Indexed:
    """The images of a folder by number."""
    data = ImageData.model_validate({"images": folder, **settings})
    return by_number(open_reader(data, specs or (COLOUR,)), specs or (COLOUR,))


def by_folder(folder: Path, **options: Any) -> Reader:
    """The images with sub-folders as labels."""
    return open_reader(ImageData.model_validate({"images": folder, "labels": "folders"}), (COLOUR,), **options)


def all_of(source: Indexed) -> np.ndarray[Any, Any]:
    """Every image."""
    return source.take(np.arange(len(source)))["x"]


def refused(folder: Path, *specs: TensorSpec, **settings: Any) -> DataError:
    """The error of reading all images."""
    with pytest.raises(DataError) as caught:
        all_of(opened(folder, *specs, **settings))
    return caught.value


def test_every_image_is_found_in_sorted_order(folder: Path) -> None:
    """Other files are passed over; without steps values are 0 to 255."""
    source = opened(folder)
    assert len(source) == 3
    assert not source.has_labels
    expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in (1, 2, 0)]).astype(np.float32)
    np.testing.assert_array_equal(all_of(source), expected)


def test_sub_folders_are_classes(folder: Path) -> None:
    """Numbered in sorted order, whatever the depth."""
    batches = list(by_folder(folder, batch_size=2, labels=True))
    assert by_folder(folder).has_labels
    assert [batch["labels"].tolist() for batch in batches] == [[0, 0], [1]]
    assert batches[0]["labels"].dtype == np.int64


@pytest.mark.parametrize(
    ("column", "expected"),
    [(["7", "3", "3"], [7, 3, 3]), (["0.5", "2", "1"], [0.5, 2.0, 1.0]), (["owl", "ant", "owl"], [1, 0, 1])],
)
def test_an_index_gives_order_labels_and_split(folder: Path, column: Sequence[str], expected: Sequence[float]) -> None:
    """Numbers are taken as they are, names are numbered; a split does so over the whole file."""
    index = folder.parent / "index.csv"
    files = ("dog/a.png", "cat/b.PNG", "cat/deep/c.png")
    rows = [f"{f},{label},{s}" for f, label, s in zip(files, column, ("train", "test", "train"), strict=True)]
    index.write_text("\n".join(["file,target,split", *rows]))
    settings = {"labels": index, "rename": {"target": "label"}}
    data = ImageData.model_validate({"images": folder, **settings})
    (batch,) = open_reader(data, (COLOUR,), labels=True)
    assert batch["labels"].tolist() == expected
    np.testing.assert_array_equal(batch["x"][1], pixels(1).transpose(2, 0, 1))
    (part,) = open_reader(data.model_copy(update={"split": "train"}), (COLOUR,), labels=True)
    assert part["labels"].tolist() == [expected[0], expected[2]]
    assert len(opened(folder, **settings, max_samples=2)) == 2


def test_steps_follow_one_another(folder: Path) -> None:
    """A shorter side of 8, its middle of 6, and the moments in units of 0 to 1; against torch's antialiased scaling."""
    steps = [{"resize": 8}, {"crop": 6}, {"normalize": {"mean": [0.5, 0.25, 0.0], "std": [0.5, 0.25, 1.0]}}]
    ours = all_of(opened(folder, steps=steps))
    given = torch.from_numpy(np.stack([pixels(seed).transpose(2, 0, 1) for seed in (1, 2, 0)])).double()
    scaled = functional.interpolate(given, size=(8, 13), mode="bilinear", antialias=True)[:, :, 1:7, 3:9] / 255
    mean, std = (torch.tensor(m).reshape(3, 1, 1) for m in ([0.5, 0.25, 0.0], [0.5, 0.25, 1.0]))
    np.testing.assert_allclose(ours, ((scaled - mean) / std).numpy(), atol=1.01 / 255 / 0.25)
    assert ours.dtype == np.float32


def test_layout_channels_and_dtype_are_the_inputs(folder: Path) -> None:
    """One channel is grey, uint8 stays as it is, and nhwc is not transposed."""
    np.testing.assert_array_equal(
        all_of(opened(folder, TensorSpec("x", "uint8", ("b", 12, 20, 3)), layout="nhwc"))[2], pixels(0)
    )
    grey = all_of(opened(folder, TensorSpec("x", "float32", ("b", 1, 12, 20))))
    weighted = pixels(0).astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(grey[2, 0], weighted, atol=1)


def test_random_steps_follow_from_seed_epoch_and_image(folder: Path) -> None:
    """However they are batched; another epoch or seed draws others, and without a draw there is no chance."""
    steps = [{"random_crop": 6}, {"flip": 0.5}]
    source = opened(folder, steps=steps)
    assert source.is_random
    first = source.take(np.arange(3), (0, 1))["x"]
    np.testing.assert_array_equal(source.take(np.array([2, 0]), (0, 1))["x"], first[[2, 0]])
    drawn = {source.take(np.array([1]), draw)["x"].tobytes() for draw in [(s, e) for s in (0, 1) for e in range(4)]}
    assert len(drawn) > 5
    np.testing.assert_array_equal(all_of(source), all_of(opened(folder, steps=[{"crop": 6}])))
    assert not opened(folder, steps=[{"crop": 6}]).is_random


def test_crops_and_flips_are_drawn_evenly(folder: Path) -> None:
    """Every place of the crop and both directions appear; a flip of 0 or 1 leaves no chance."""
    source = opened(folder, steps=[{"random_crop": 10}, {"flip": 0.5}])
    whole = pixels(1).transpose(2, 0, 1)
    places = {
        (flip, top, left): whole[:, top : top + 10, left : left + 10][:, :, :: -1 if flip else 1].astype(np.float32)
        for flip in (False, True)
        for top in range(3)
        for left in range(11)
    }
    names = {value.tobytes(): name for name, value in places.items()}
    found = [names[source.take(np.array([0]), (0, epoch))["x"].tobytes()] for epoch in range(600)]
    assert set(found) == set(places)
    assert 240 < sum(flip for flip, _, _ in found) < 360
    always = opened(folder, steps=[{"flip": 1.0}]).take(np.array([0]), (0, 0))["x"][0]
    np.testing.assert_array_equal(always, whole[:, :, ::-1])


def test_a_fixed_batch_axis_is_kept(folder: Path) -> None:
    """As for stored arrays: whole batches or a refusal, and shards of them."""
    spec = TensorSpec("x", "float32", (2, 3, 12, 20))
    assert "do not fill batches of 2" in refused(folder, spec).what
    save(folder / "z.png", 9)
    data = ImageData.model_validate({"images": folder})
    reader = open_reader(data, (spec,))
    np.testing.assert_array_equal(next(iter(reader.shard(1, 2)))["x"][1], pixels(9).transpose(2, 0, 1))
    assert [len(reader), len(reader.shard(1, 2))] == [4, 2]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_images_of_more_than_eight_bits_are_refused(folder: Path, dtype: str) -> None:
    """Pillow would make 255 of every larger value, and nobody would know."""
    path = folder / "cat" / "wide.tif"
    Image.fromarray((np.arange(240).reshape(12, 20) * 250).astype(dtype)).save(path)
    error = refused(folder)
    assert error.where == str(path)
    assert "more than 8 bits" in error.what


def test_damaged_images_are_named(folder: Path) -> None:
    """A file cut short, and one that is no image; others can be read."""
    path = folder / "cat" / "deep" / "c.png"
    path.write_bytes(path.read_bytes()[:200])
    error = refused(folder)
    assert error.where == str(path)
    assert "cannot be read" in error.what
    opened(folder).take(np.array([0, 2]))
    path.write_bytes(b"nothing of the kind")
    assert refused(folder).where == str(path)


@pytest.mark.parametrize(
    ("settings", "shape", "what"),
    [
        ({}, (3, 8, 8), "does not have the size"),
        ({"steps": [{"crop": 40}]}, (3, 8, 8), "smaller than the crop of 40"),
        ({}, (8, 8, 3), "images of layout nchw cannot feed"),
        ({"layout": "nhwc"}, (3, 8, 8), "images of layout nhwc cannot feed"),
        ({"steps": [{"normalize": {"mean": [0, 0], "std": [1]}}]}, (3, 12, 20), "a mean of 2 numbers"),
        ({"split": "train"}, (3, 12, 20), "`split` is about the columns"),
        ({"rename": {"a": "file"}}, (3, 12, 20), "`rename` is about the columns"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, settings: Any, shape: tuple[int, ...], what: str) -> None:
    """Before any work, with what is wanted."""
    assert what in refused(folder, TensorSpec("x", "float32", ("batch", *shape)), **settings).what


def test_inputs_that_images_cannot_feed_are_refused(folder: Path) -> None:
    """Several inputs, integers, and fractions for uint8."""
    assert "images feed one input" in refused(folder, COLOUR, TensorSpec("y", "float32", ("batch",))).what
    assert "int64" in refused(folder, TensorSpec("x", "int64", ("batch", 3, 12, 20))).what
    normal = [{"normalize": {"mean": [0], "std": [1]}}]
    assert "fractions" in refused(folder, TensorSpec("x", "uint8", ("batch", 3, 12, 20)), steps=normal).what


def test_images_of_several_sizes_are_refused(folder: Path) -> None:
    """Where the model would take any: the file is named."""
    save(folder / "z.png", 5, (9, 9))
    error = refused(folder)
    assert error.where == str(folder / "z.png")
    assert error.fix is not None
    assert "crop" in error.fix


@pytest.mark.parametrize(
    ("text", "settings", "what", "fix"),
    [
        ("fill,label\ndog/a.png,1", {}, "no column 'file'", "did you mean 'fill'?"),
        ("file,label\ndog/a.png,", {}, "an image has no label", ""),
        ("file,label\ndog/z.png,1", {}, "there is no image 'dog/z.png'", ""),
        ("file\n../index.csv", {}, "there is no image '../index.csv'", ""),
        ("file,split\ndog/a.png,train", {"split": "trian"}, "no split 'trian'", "did you mean 'train'?"),
        ("file\ndog/a.png", {"split": "train"}, "no column 'split'", "rename: {file: split}"),
        ("file,label\ndog/a.png,1", {"rename": {"labell": "label"}}, "no column of the file", "did you mean 'label'?"),
        ("file", {}, "there are no images", "an index needs rows"),
        ("\xff\xfe", {}, "cannot be read", ""),
    ],
)
def test_a_wrong_index_is_refused(folder: Path, text: str, settings: Any, what: str, fix: str) -> None:
    """With its line where there is one, and a suggestion."""
    index = folder.parent / "index.csv"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        opened(folder, **{"labels": index, **settings})
    error = caught.value
    assert what in error.what
    assert fix in (error.fix or "")
    assert "index.csv" in (error.where or "")


def test_labels_that_are_needed_and_missing_are_told(folder: Path) -> None:
    """With the two ways to give them; a loose image has no class."""
    with pytest.raises(DataError, match="labels are needed"):
        list(open_reader(ImageData.model_validate({"images": folder}), (COLOUR,), labels=True))
    save(folder / "loose.png", 3)
    with pytest.raises(DataError, match="lies in no sub-folder"):
        by_folder(folder)


def test_pillow_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed."""
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match="Pillow") as caught:
        opened(folder)
    assert "pip install" in (caught.value.fix or "")


def test_the_memo_key_follows_contents(folder: Path) -> None:
    """A changed image, index or step is another key; the place of the folder is none."""
    index = folder.parent / "index.csv"

    def key(**settings: Any) -> Any:
        return fingerprint(ImageData.model_validate({"images": folder, "labels": index, **settings}))

    before = key(steps=[{"crop": 6}])
    assert key(steps=[{"crop": 6}]) == before
    assert key(steps=[{"crop": 5}]) != before
    assert key(steps=[{"random_crop": 6}]) != before
    moved = folder.parent / "elsewhere"
    shutil.copytree(folder, moved)
    assert fingerprint(ImageData.model_validate({"images": moved, "labels": index, "steps": [{"crop": 6}]})) == before
    save(folder / "cat" / "b.PNG", 77)
    assert key(steps=[{"crop": 6}]) != before


@pytest.mark.parametrize(
    ("steps", "what"),
    [
        ([{"normalize": {"mean": [0], "std": [1]}}, {"crop": 6}], "`normalize` is not the last step"),
        ([{"normalize": {"mean": [127], "std": [1]}}], "less than or equal to 1"),
        ([{"normalize": {"mean": [0], "std": [0]}}], "greater than 0"),
        ([{"crop": 0}], "greater than 0"),
        ([{"flip": 1.5}], "less than or equal to 1"),
    ],
)
def test_steps_without_a_meaning_are_refused(folder: Path, steps: Any, what: str) -> None:
    """A mean for 0 to 255 among them."""
    with pytest.raises(ValidationError, match=what):
        ImageData.model_validate({"images": folder, "steps": steps})

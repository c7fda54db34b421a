"""What `init` finds out about samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxshrink.core.errors import ConfigError, DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.setup.samples import look_at_samples, renamed


def archive(folder: Path, **arrays: object) -> str:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return str(folder / "data.npz")


IMAGES = np.linspace(0, 1, 12 * 4, dtype=np.float32).reshape(12, 4)


def test_splits_serve_the_purposes_that_their_names_say(tmp_path: Path) -> None:
    """Train, validation and test become train, calibration and evaluation, and their counts are told."""
    split = np.array(["train"] * 6 + ["val"] * 2 + ["test"] * 4)
    path = archive(tmp_path, x=IMAGES, labels=np.arange(12) % 3, split=split)
    found = look_at_samples(path)
    assert {role: settings["split"] for role, settings in found.roles.items()} == {
        "train": "train",
        "calibration": "val",
        "evaluation": "test",
    }
    assert found.metric == "top1"
    assert "splits: test (4 samples), train (6 samples), val (2 samples)" in found.notes
    assert not any("share samples" in note for note in found.notes)


def test_one_heap_of_samples_is_said_to_be_shared(tmp_path: Path) -> None:
    """Without splits calibration and evaluation see the same samples, and that is told, not hidden."""
    found = look_at_samples(archive(tmp_path, x=IMAGES))
    assert found.metric is None
    assert any("share samples" in note for note in found.notes)
    (tmp_path / "more").mkdir()
    held_out = look_at_samples(str(tmp_path / "data.npz"), archive(tmp_path / "more", x=IMAGES))
    assert not any("share samples" in note for note in held_out.notes)
    assert held_out.roles["evaluation"] == {"npz": str(tmp_path / "more" / "data.npz")}


def test_the_same_samples_held_out_are_still_shared(tmp_path: Path) -> None:
    """Naming one file twice keeps nothing apart, and hides nothing."""
    path = archive(tmp_path, x=IMAGES)
    assert look_at_samples(path, path).is_shared
    (tmp_path / "more").mkdir()
    assert not look_at_samples(path, archive(tmp_path / "more", x=IMAGES)).is_shared


def test_labels_of_another_name_are_renamed(tmp_path: Path) -> None:
    """`y` holds the labels; whole numbers are classes, fractions are values."""
    found = look_at_samples(archive(tmp_path, x=IMAGES, y=np.arange(12)))
    assert found.roles["evaluation"]["rename"] == {"y": "labels"}
    assert [spec.name for spec in found.arrays] == ["x"]
    assert look_at_samples(archive(tmp_path, x=IMAGES, y=np.arange(12) / 2)).metric == "mae"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (IMAGES, "x float32[12,4], values from 0 to 1"),
        (IMAGES * 255, "not scaled"),
        ((IMAGES * 255).astype(np.uint8), "x uint8[12,4], values from 0 to 255"),
    ],
)
def test_the_range_of_the_values_is_told(tmp_path: Path, array: np.ndarray, words: str) -> None:
    """Bytes, fractions, and floats that look like bytes can be told apart."""
    assert words in " ".join(look_at_samples(archive(tmp_path, x=array)).notes)


def test_folders_of_images_are_divided_by_their_sub_folders(tmp_path: Path) -> None:
    """`train/cat`, `val/cat`: purposes and classes; a CSV file goes before both."""
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = look_at_samples(str(tmp_path))
    assert found.roles["train"] == {"images": f"{tmp_path}/train", "labels": "folders"}
    assert found.roles["evaluation"] == {"images": f"{tmp_path}/val", "labels": "folders"}
    (tmp_path / "index.csv").write_text("file,label,split\ntrain/cat/1.png,cat,test\ntrain/dog/2.png,dog,calibration\n")
    indexed = look_at_samples(str(tmp_path))
    assert indexed.roles["calibration"]["labels"] == f"{tmp_path}/index.csv"
    assert indexed.roles["calibration"]["split"] == "calibration"
    assert indexed.metric == "top1"


def test_arrays_are_matched_to_inputs_by_their_form() -> None:
    """An array of another name feeds the one input that has its form; one that could feed two feeds neither."""
    ids = TensorSpec("input_ids", "int64", ("batch", 8))
    scores = TensorSpec("scores", "float32", ("batch", 8))

    def found(*arrays: TensorSpec) -> dict[str, str]:
        from onnxshrink.setup.samples import Samples

        return renamed(Samples({}, arrays, None, ()), (ids, scores))

    extra = TensorSpec("extra", "float64", ("batch", 2))
    tokens = TensorSpec("tokens", "int64", ("batch", 8))
    assert found(tokens, TensorSpec("scores", "float32", ("batch", 8)), extra) == {"tokens": "input_ids"}
    assert found(tokens, TensorSpec("again", "int64", ("batch", 8)), scores) == {}


def test_what_is_no_data_is_told(tmp_path: Path) -> None:
    """A missing file, a file of another kind and an archive of labels alone are mistakes with a way out."""
    with pytest.raises(ConfigError, match="no samples"):
        look_at_samples(str(tmp_path / "gone.npz"))
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ConfigError, match="cannot be used"):
        look_at_samples(str(tmp_path / "data.csv"))
    with pytest.raises(DataError, match="no inputs"):
        look_at_samples(archive(tmp_path, labels=np.arange(3)))

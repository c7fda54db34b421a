"""What readers of numpy files promise: which array feeds which input, which samples, and clear refusals."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxshrink.config.data import NpyData, NpzData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.arrays import ArrayReader
from onnxshrink.data.reader import Reader, open_reader

IMAGE = TensorSpec("image", "float32", ("batch", 2, 3))
RNG = np.random.default_rng(0)


def images(count: int) -> np.ndarray[Any, Any]:
    """``[count, 2, 3]`` float32; every sample differs."""
    return np.arange(count * 6, dtype=np.float32).reshape(count, 2, 3)


def npz(folder: Path, *, compressed: bool = False, **arrays: Any) -> Path:
    """An archive of ``arrays``."""
    path = folder / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def read(path: Path, *specs: TensorSpec, batch_size: int = 4, labels: bool = False, **settings: Any) -> ArrayReader:
    """Open ``path`` for ``specs``, the image by default."""
    opened = open_reader(NpzData(npz=path, **settings), specs or (IMAGE,), batch_size=batch_size, labels=labels)
    assert isinstance(opened, ArrayReader)
    return opened


def whole(reader: Reader, name: str = "image") -> np.ndarray[Any, Any]:
    """All batches of one array, joined."""
    return np.concatenate([batch[name] for batch in reader])


def refused(path: Path, *specs: TensorSpec, labels: bool = False, **settings: Any) -> DataError:
    """The error that reading ``path`` to the end gives."""
    with pytest.raises(DataError) as caught:
        list(read(path, *specs, labels=labels, **settings))
    return caught.value


@pytest.mark.parametrize("compressed", [False, True])
def test_batches_follow_the_file_and_repeat(tmp_path: Path, compressed: bool) -> None:  # noqa: FBT001 - a parameter
    """Batches are slices of the stored array, the last one smaller, and the same in a second pass."""
    reader = read(npz(tmp_path, image=images(10), compressed=compressed))
    assert [len(batch["image"]) for batch in reader] == [4, 4, 2]
    assert len(reader) == 10
    for _ in range(2):
        np.testing.assert_array_equal(whole(reader), images(10))


def test_two_passes_may_run_at_once(tmp_path: Path) -> None:
    """Two iterations of one reader do not disturb each other."""
    reader = read(npz(tmp_path, image=images(9)))
    for one, other in zip(reader, reader, strict=True):
        np.testing.assert_array_equal(one["image"], other["image"])


def test_split_chooses_samples_and_labels_alike(tmp_path: Path) -> None:
    """A split takes the samples named so, wherever they lie, each with its own label."""
    split = np.array(["train", "test", "train", "test", "test"])
    path = npz(tmp_path, image=images(5), labels=np.arange(5), split=split)
    reader = read(path, labels=True, split="test", batch_size=2)
    assert len(reader) == 3
    assert whole(reader, "labels").tolist() == [1, 3, 4]
    np.testing.assert_array_equal(whole(reader), images(5)[[1, 3, 4]])
    assert "split 'test'" in reader.where


@pytest.mark.parametrize("split", [np.array([b"a", b"b"]), np.array(["a", "b"]), np.array(["a", "b"], "U30")])
def test_split_names_may_be_text_or_bytes(tmp_path: Path, split: np.ndarray[Any, Any]) -> None:
    """Split names compare as text however they are stored."""
    np.testing.assert_array_equal(whole(read(npz(tmp_path, image=images(2), split=split), split="b")), images(2)[1:])


def test_split_names_may_be_numbers(tmp_path: Path) -> None:
    """Folds numbered 0, 1, … are chosen by their digits."""
    reader = read(npz(tmp_path, image=images(3), split=np.array([0, 1, 0])), split="0")
    np.testing.assert_array_equal(whole(reader), images(3)[[0, 2]])


def test_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """A misspelt split names the splits of the file and the nearest one."""
    error = refused(npz(tmp_path, image=images(2), split=np.array(["train", "test"])), split="tset")
    assert "no split 'tset'" in error.what
    assert error.want == "'test', 'train'"
    assert error.fix == "did you mean 'test'?"


def test_split_without_split_array_is_refused(tmp_path: Path) -> None:
    """A split asked of a file that has none is an error, never all samples."""
    assert "no array 'split'" in refused(npz(tmp_path, image=images(2)), split="test").what


def test_without_split_all_samples_are_used(tmp_path: Path) -> None:
    """An array named split is no input, and without the setting it chooses nothing."""
    assert len(read(npz(tmp_path, image=images(2), split=np.array(["a", "b"])))) == 2


def test_max_samples_takes_the_first_of_the_split(tmp_path: Path) -> None:
    """max_samples counts after the split was chosen."""
    path = npz(tmp_path, image=images(6), split=np.array(list("abbabb")))
    np.testing.assert_array_equal(whole(read(path, split="b", max_samples=3)), images(6)[[1, 2, 4]])
    assert len(read(path, max_samples=100)) == 6


def test_labels_are_given_only_where_asked(tmp_path: Path) -> None:
    """Labels stay out of the batch unless asked for, and has_labels tells of them either way."""
    path = npz(tmp_path, image=images(3), labels=np.array([2, 0, 1]))
    assert set(next(iter(read(path)))) == {"image"}
    assert read(path).has_labels
    assert whole(read(path, labels=True), "labels").tolist() == [2, 0, 1]


def test_missing_labels_are_refused_with_a_rename(tmp_path: Path) -> None:
    """Labels under another name: the fix is the line of config that maps them."""
    path = npz(tmp_path, image=images(3), label=np.arange(3))
    error = refused(path, labels=True)
    assert error.fix == "name them: `rename: {label: labels}`"
    assert not read(path).has_labels
    assert whole(read(path, labels=True, rename={"label": "labels"}), "labels").tolist() == [0, 1, 2]


def test_labels_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    """A NaN among regression targets spoils the metric, so it is named."""
    error = refused(npz(tmp_path, image=images(3), labels=np.array([0.0, np.nan, 1.0])), labels=True)
    assert "sample 1 of 'labels' holds nan" in error.what


def test_arrays_feed_inputs_by_order_when_no_name_fits(tmp_path: Path) -> None:
    """As many arrays as inputs, labels and split not counted, feed the inputs in the archive's order."""
    specs = (TensorSpec("a", "float32", ("n", 2, 3)), TensorSpec("b", "int64", ("n",)))
    path = npz(tmp_path, x=images(2), labels=np.arange(2), y=np.array([5, 6]))
    assert whole(read(path, *specs), "b").tolist() == [5, 6]


def test_one_fitting_name_ends_matching_by_order(tmp_path: Path) -> None:
    """A file that knows one input's name is read by name: the other is missing, not guessed."""
    specs = (TensorSpec("a", "float32", ("n", 2, 3)), TensorSpec("b", "float32", ("n", 2, 3)))
    error = refused(npz(tmp_path, b=images(2), x=images(2)), *specs)
    assert error.what == "the data has no array for the model input 'a'"
    assert error.got == "'b', 'x'"


def test_arrays_that_feed_nothing_are_left_alone(tmp_path: Path) -> None:
    """An archive may hold more than one model needs, even arrays that could not be read."""
    reader = read(npz(tmp_path, ids=np.array([{}], dtype=object), image=images(2)))
    assert set(next(iter(reader))) == {"image"}


def test_rename_maps_an_array_to_an_input(tmp_path: Path) -> None:
    """A renaming says which array is the image among several."""
    path = npz(tmp_path, x=images(2), y=images(2) + 1)
    np.testing.assert_array_equal(whole(read(path, rename={"y": "image"})), images(2) + 1)


@pytest.mark.parametrize(
    ("rename", "what", "fix"),
    [
        ({"imgae": "image"}, "`rename` names 'imgae', which is no array of the data", "did you mean 'image'?"),
        ({"image": "imag"}, "`rename` names 'imag', which is no input of the model", "did you mean 'image'?"),
        ({"other": "image"}, "two arrays of the data are called 'image' after `rename`", None),
    ],
)
def test_a_rename_that_cannot_be_meant_is_refused(
    tmp_path: Path, rename: dict[str, str], what: str, fix: str | None
) -> None:
    """Misspelt or clashing renamings stop here, with the nearest name."""
    error = refused(npz(tmp_path, image=images(2), other=images(2)), rename=rename)
    assert (error.what, error.fix) == (what, fix)


def test_shards_take_every_nth_sample(tmp_path: Path) -> None:
    """Shard i of n holds samples i, i + n, …; a shard beyond the samples is empty."""
    reader = read(npz(tmp_path, image=images(5)))
    np.testing.assert_array_equal(whole(reader.shard(1, 2)), images(5)[[1, 3]])
    np.testing.assert_array_equal(whole(reader.shard(1, 2).shard(1, 2)), images(5)[[3]])
    assert list(reader.shard(6, 7)) == []
    assert len(reader.shard(6, 7)) == 0


def test_a_fixed_batch_axis_decides_the_batch_size(tmp_path: Path) -> None:
    """A model exported for two samples gets two at a time, and shards of whole batches."""
    spec = TensorSpec("image", "float32", (2, 2, 3))
    reader = read(npz(tmp_path, image=images(6)), spec, batch_size=5)
    assert [len(batch["image"]) for batch in reader] == [2, 2, 2]
    np.testing.assert_array_equal(whole(reader.shard(1, 2)), images(6)[[2, 3]])


def test_a_partial_fixed_batch_is_refused(tmp_path: Path) -> None:
    """Samples that do not fill the last fixed batch are an error whose fix is the number that does."""
    error = refused(npz(tmp_path, image=images(5)), TensorSpec("image", "float32", (2, 2, 3)))
    assert error.fix == "max_samples: 4"
    one = TensorSpec("image", "float32", (1, 2, 3))
    assert [len(batch["image"]) for batch in read(npz(tmp_path, image=images(3)), one)] == [1, 1, 1]


def test_inputs_without_samples_are_given_whole(tmp_path: Path) -> None:
    """A scalar, and a table whose axis 0 is no batch axis, are the same in every batch."""
    specs = (TensorSpec("scale", "float32", ()), IMAGE, TensorSpec("anchors", "float32", (3, 2)))
    table = RNG.random((3, 2), dtype=np.float32)
    path = npz(tmp_path, image=images(5), anchors=table, scale=np.float32(2))
    batches = list(read(path, *specs))
    assert [len(batch["image"]) for batch in batches] == [4, 1]
    for batch in batches:
        np.testing.assert_array_equal(batch["anchors"], table)
        assert batch["scale"] == np.float32(2)


def test_inputs_that_take_different_fixed_batches_are_refused(tmp_path: Path) -> None:
    """Two fixed batch axes that disagree cannot be fed, and the error names both."""
    specs = (TensorSpec("a", "float32", (2, 2, 3)), TensorSpec("b", "float32", (3, 2, 3)))
    error = refused(npz(tmp_path, a=images(6), b=images(6)), *specs)
    assert error.got == "'a' 2, 'b' 3"


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    """Arrays with different numbers of samples are named, both of them."""
    error = refused(npz(tmp_path, image=images(5), labels=np.arange(4)), labels=True)
    assert "'image' and 'labels'" in error.what
    assert error.got == "'image' 5, 'labels' 4"


def test_values_that_are_not_numbers_name_the_sample_in_the_file(tmp_path: Path) -> None:
    """The sample's index counts in the file, not in the split, shard or batch."""
    values = images(8)
    values[6, 1, 2] = np.inf
    path = npz(tmp_path, image=values, split=np.array(list("abababab")))
    error = refused(path, split="a")
    assert error.what == "sample 6 of 'image' holds inf"
    assert error.got == "inf at image[6, 1, 2]"


@pytest.mark.parametrize(
    ("array", "what", "fix"),
    [
        (images(2).astype(np.uint8), "has dtype uint8, and the model takes float32", "scaled as the model was trained"),
        (images(2).astype(np.float64), "has dtype float64", "array.astype('float32')"),
        (images(2)[0], "has a shape the model cannot take", "add the batch axis: array[None]"),
        (images(2)[..., None], "has a shape the model cannot take", "give samples of the wanted shape"),
        (np.float32(1), "has a shape the model cannot take", "give samples of the wanted shape"),
    ],
)
def test_headers_that_do_not_fit_are_refused_at_open(
    tmp_path: Path, array: np.ndarray[Any, Any], what: str, fix: str
) -> None:
    """Dtypes and shapes are checked before any value is read."""
    with pytest.raises(DataError, match=what) as caught:
        read(npz(tmp_path, image=array))
    assert fix in (caught.value.fix or "")


def test_nhwc_is_recognised(tmp_path: Path) -> None:
    """Images with channels last get the transpose as a fix."""
    spec = TensorSpec("x", "float32", ("n", 3, 8, 8))
    error = refused(npz(tmp_path, x=np.zeros((2, 8, 8, 3), np.float32)), spec)
    assert error.fix == "the layout is NHWC and the model wants NCHW: array.transpose(0, 3, 1, 2)"


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    """An object array would run the file's code; it is refused and the way out told."""
    error = refused(npz(tmp_path, image=np.array([images(1)[0], None], dtype=object)))
    assert error.what.startswith("pickled arrays are refused")
    assert "astype('float32')" in (error.fix or "")


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_byte_and_memory_order_do_not_matter(tmp_path: Path, dtype: str, order: Any) -> None:
    """Arrays written on another machine, or in Fortran order, give the same native batches."""
    path = npz(tmp_path, image=np.asarray(images(5), dtype=dtype, order=order))
    batch = next(iter(read(path, batch_size=5)))["image"]
    np.testing.assert_array_equal(batch, images(5))
    assert batch.dtype == np.float32
    assert batch.flags.c_contiguous


def test_no_samples_are_refused(tmp_path: Path) -> None:
    """An archive of empty arrays is an error, not an empty run."""
    assert refused(npz(tmp_path, image=images(0))).what == "there are no samples"


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    """Empty files, folders, text, .npy files and truncated archives each say what they are."""
    path = tmp_path / "data.npz"
    path.write_bytes(b"")
    assert refused(path).got == "an empty file"
    path.write_text("hello world")
    assert "begin with b'hello '" in (refused(path).got or "")
    np.save(tmp_path / "x.npy", images(1))
    assert "a .npy file" in (refused(tmp_path / "x.npy").got or "")
    assert "npy: {input: file.npy}" in (refused(tmp_path / "x.npy").fix or "")
    assert "folder" in refused(tmp_path).what
    content = npz(tmp_path, image=images(50)).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert refused(path).what.startswith("the file cannot be read as an .npz archive")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_damaged_value_is_noticed(tmp_path: Path, compressed: bool) -> None:  # noqa: FBT001 - a parameter
    """A flipped byte in the values fails the archive's checksum; nothing is believed."""
    path = npz(tmp_path, image=RNG.random((50, 2, 3), dtype=np.float32), compressed=compressed)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)
    assert refused(path).what.startswith("the data cannot be read")


def test_an_array_shorter_than_its_header_is_refused(tmp_path: Path) -> None:
    """A member that ends too early is noticed at open, with both lengths."""
    np.save(tmp_path / "image.npy", images(4))
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image.npy", (tmp_path / "image.npy").read_bytes()[:-8])
    error = refused(path)
    assert (error.got, error.want) == ("88 bytes", "96 bytes for float32[4,2,3]")


def test_an_archive_that_changes_between_passes_is_noticed(tmp_path: Path) -> None:
    """A file written anew with other shapes, or deleted, while it is in use is an error, never a mixture."""
    path = npz(tmp_path, image=images(4))
    reader = read(path)
    npz(tmp_path, image=images(5))
    with pytest.raises(DataError, match="changed while it was read"):
        list(reader)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        list(reader)


@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_files_are_mapped(tmp_path: Path, order: Any) -> None:
    """One .npy file for each input, labels and split gives the same as an archive of them."""
    np.save(tmp_path / "a.npy", np.asarray(images(5), order=order))
    np.save(tmp_path / "b.npy", np.arange(5))
    np.save(tmp_path / "c.npy", np.array(list("xyxyx")))
    files = {"image": tmp_path / "a.npy", "labels": tmp_path / "b.npy", "split": tmp_path / "c.npy"}
    reader = open_reader(NpyData(npy=files, split="x"), (IMAGE,), batch_size=2, labels=True)
    np.testing.assert_array_equal(whole(reader), images(5)[::2])
    assert whole(reader, "labels").tolist() == [0, 2, 4]
    assert all(type(batch["image"]) is np.ndarray for batch in reader)
    assert next(iter(reader))["image"].flags.c_contiguous


def test_npy_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """Truncated, pickled, empty or foreign .npy files and folders are the user's mistake, clearly told."""
    path = tmp_path / "a.npy"
    np.save(path, images(4))
    content = path.read_bytes()
    np.save(path, np.array([None]))
    pickled = path.read_bytes()
    for bad, what in (
        (content[:-1], "shorter than its header says"),
        (pickled, "pickled arrays are refused"),
        (b"", "cannot be read as a numpy array"),
        (b"hello world", "cannot be read as a numpy array"),
    ):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=what):
            open_reader(NpyData(npy={"image": path}), (IMAGE,))
    with pytest.raises(DataError, match="cannot be read"):
        open_reader(NpyData(npy={"image": tmp_path}), (IMAGE,))


@pytest.mark.parametrize("compressed", [False, True])
def test_memory_stays_flat(tmp_path: Path, compressed: bool) -> None:  # noqa: FBT001 - a parameter
    """Iterating a 64 MiB archive needs less than 8 MiB beyond the batch, stored or compressed."""
    spec = TensorSpec("x", "float32", ("n", 16, 1024))
    path = npz(tmp_path, x=np.zeros((1024, 16, 1024), np.float32), compressed=compressed)
    reader = read(path, spec, batch_size=16)
    tracemalloc.start()
    try:
        total = sum(len(batch["x"]) for batch in reader.shard(1, 2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == 512
    assert peak < 8 << 20, f"{peak / 2**20:.1f} MiB"

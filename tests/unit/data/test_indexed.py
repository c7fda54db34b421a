"""What random access promises: the reader's samples in any order, from disk, with the reader's checks."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxshrink.config.data import Data, NpyData, NpzData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import Batch, TensorSpec
from onnxshrink.data.indexed import HeldSamples, Indexed, by_number, in_order, numbered
from onnxshrink.data.reader import open_reader

X = TensorSpec("x", "float32", ("batch", 3))


def values(count: int) -> np.ndarray[Any, Any]:
    """``[count, 3]`` float32; every sample differs."""
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def opened(settings: Data, *specs: TensorSpec, labels: bool = True) -> Indexed:
    """The samples of ``settings`` by number, labels with them."""
    specs = specs or (X,)
    return by_number(open_reader(settings, specs, labels=labels), specs)


def stored(folder: Path, form: str, x: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Data:
    """The same arrays in each form that is read by number."""
    if form == "npy":
        np.save(folder / "x.npy", x)
        np.save(folder / "labels.npy", labels)
        return NpyData(npy={"x": folder / "x.npy", "labels": folder / "labels.npy"})
    (np.savez_compressed if form == "compressed" else np.savez)(folder / "d.npz", x=x, labels=labels)
    return NpzData(npz=folder / "d.npz")


@pytest.mark.parametrize("form", ["npz", "compressed", "npy"])
@pytest.mark.parametrize("layout", ["C", "F", ">f4"])
def test_rows_come_in_any_order(tmp_path: Path, form: str, layout: str) -> None:
    """Forwards, backwards and twice, whatever the byte order, the axis order or the packing; labels belong to them."""
    x = values(9).astype(layout) if layout == ">f4" else np.asarray(values(9), order=layout)  # type: ignore[call-overload]
    source = opened(stored(tmp_path, form, x, np.arange(9) * 10))
    numbers = np.array([8, 0, 3, 3])
    batch = source.take(numbers)
    np.testing.assert_array_equal(batch["x"], values(9)[numbers])
    assert batch["x"].dtype == np.dtype("float32")
    assert batch["x"].flags.writeable
    assert batch["x"].flags.c_contiguous
    assert batch["labels"].tolist() == [80, 0, 30, 30]
    assert source.labels().tolist() == (np.arange(9) * 10).tolist()
    assert (len(source), source.is_random) == (9, False)


def test_numbers_count_within_split_shard_and_max_samples(tmp_path: Path) -> None:
    """Sample 0 is the first of the chosen ones."""
    split = np.array(["a", "b"] * 5)
    np.savez(tmp_path / "d.npz", x=values(10), labels=np.arange(10), split=split)
    chosen = opened(NpzData(npz=tmp_path / "d.npz", split="b", max_samples=4))
    assert chosen.take(np.array([3, 0]))["labels"].tolist() == [7, 1]
    assert chosen.labels().tolist() == [1, 3, 5, 7]
    reader = open_reader(NpzData(npz=tmp_path / "d.npz"), (X,), labels=True).shard(1, 3)
    assert by_number(reader, (X,)).take(np.array([2, 1]))["labels"].tolist() == [7, 4]


def test_any_number_of_rows_is_given_to_a_training(tmp_path: Path) -> None:
    """A fixed batch axis is the exported model's; the network learns from batches of any size."""
    np.savez(tmp_path / "d.npz", x=values(6))
    source = opened(NpzData(npz=tmp_path / "d.npz"), TensorSpec("x", "float32", (2, 3)), labels=False)
    assert source.take(np.array([5, 0, 1]))["x"].shape == (3, 3)


def test_inputs_without_samples_are_given_whole(tmp_path: Path) -> None:
    """With every batch, as a reader gives them."""
    np.savez(tmp_path / "d.npz", x=values(6), table=np.eye(2, dtype=np.float32))
    specs = (TensorSpec("table", "float32", (2, 2)), X)
    assert opened(NpzData(npz=tmp_path / "d.npz"), *specs, labels=False).take(np.array([5]))["table"].shape == (2, 2)


def test_values_are_checked_as_they_are_read(tmp_path: Path) -> None:
    """A NaN is refused with its sample's number in the file; the other samples can be had."""
    x = values(8)
    x[6, 1] = np.nan
    np.savez(tmp_path / "d.npz", x=x, labels=np.arange(8))
    source = opened(NpzData(npz=tmp_path / "d.npz"))
    source.take(np.array([0, 7]))
    with pytest.raises(DataError, match="sample 6 of 'x' holds nan"):
        source.take(np.array([7, 6]))
    np.savez(tmp_path / "d.npz", x=values(8), labels=np.array([0, np.inf] * 4))
    with pytest.raises(DataError, match="sample 1 of 'labels' holds inf"):
        opened(NpzData(npz=tmp_path / "d.npz")).labels()


def test_a_changed_byte_is_found_before_the_first_row(tmp_path: Path) -> None:
    """The archive's checksum is compared although the array is mapped."""
    np.savez(tmp_path / "d.npz", x=values(1000))
    data = bytearray((tmp_path / "d.npz").read_bytes())
    data[6000] ^= 1
    (tmp_path / "d.npz").write_bytes(data)
    source = opened(NpzData(npz=tmp_path / "d.npz"), labels=False)
    with pytest.raises(DataError, match="cannot be read"):
        source.take(np.array([0]))


def test_members_behind_others_are_found(tmp_path: Path) -> None:
    """The archive's own headers may have any length: numpy's, and those of other tools with extra fields."""
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("readme.txt", "not an array")
        entry = zipfile.ZipInfo("x.npy")
        entry.extra = b"\x99\x99\x04\x00abcd"
        stream = io.BytesIO()
        np.save(stream, values(5))
        archive.writestr(entry, stream.getvalue())
    source = opened(NpzData(npz=tmp_path / "d.npz"), labels=False)
    np.testing.assert_array_equal(source.take(np.array([4, 1]))["x"], values(5)[[4, 1]])


class Streamed:
    """A reader that cannot be asked by number."""

    where, has_labels = "there", True

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Batch]:
        for part in (slice(0, 3), slice(3, 5)):
            yield {"x": values(5)[part], "labels": np.arange(5)[part]}

    def shard(self, index: int, count: int) -> Streamed:
        """Not asked for."""
        raise NotImplementedError(index, count)


def test_a_stream_is_read_into_memory() -> None:
    """All batches, once, in order."""
    source = by_number(Streamed(), (X,))
    assert isinstance(source, HeldSamples)
    assert source.take(np.array([4, 0]))["labels"].tolist() == [4, 0]
    assert source.labels().tolist() == [0, 1, 2, 3, 4]
    assert (len(source), source.where, source.has_labels) == (5, "there", True)


def mapped_bytes() -> int:
    """Of files, in this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, form: str) -> None:
    """A pass over 64 MB in drawn order allocates less than 5 MB at any time, and leaves no mapped pages behind."""
    spec = TensorSpec("x", "float32", ("batch", 1000))
    x = np.zeros((16_000, 1000), np.float32)
    x[:, 0] = np.arange(16_000)
    settings = stored(tmp_path, form, x, np.arange(16_000))
    before = mapped_bytes()
    tracemalloc.start()
    try:
        source = opened(settings, spec)
        for numbers in np.random.default_rng(0).permutation(16_000).reshape(-1, 80):
            batch = source.take(numbers)
            assert (batch["x"][:, 0] == batch["labels"]).all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
    assert mapped_bytes() - before < 10_000_000


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_nth_batch_is_read_alone(tmp_path: Path, count: int) -> None:
    """With its number and that of its first sample; of samples that lie by number no others are read."""
    read: list[int] = []

    class Counted(HeldSamples):
        def take(self, numbers: Any, draw: Any = None) -> Batch:
            """Kept."""
            read.extend(numbers.tolist())
            return super().take(numbers, draw)

    source = Counted("memory", {"x": values(11)})
    np.savez(tmp_path / "x.npz", x=values(11))
    streamed = open_reader(NpzData(npz=tmp_path / "x.npz"), (X,), batch_size=4)
    indexed = in_order(source, (X,), batch_size=4)
    for index in range(count):
        read.clear()
        mine = list(numbered(indexed, (X,), index, count))
        wanted = [number for number in range(3) if number % count == index]
        assert [(number, start) for number, start, _ in mine] == [(number, 4 * number) for number in wanted]
        assert read == [row for number in wanted for row in range(4 * number, min(4 * number + 4, 11))]
        for (_, _, batch), other in zip(mine, numbered(streamed, (X,), index, count), strict=True):
            assert mine[0][:2] == (index, 4 * index)
            np.testing.assert_array_equal(batch["x"], other[2]["x"])
    assert [batch["x"].tolist() for batch in indexed] == [batch["x"].tolist() for batch in streamed]

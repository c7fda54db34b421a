"""Laws of readers: streaming equals slicing, shards partition, and damaged files never surprise."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from onnxshrink.config.data import NpyData, NpzData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import Reader, open_reader

FEW = settings(derandomize=True, deadline=None, max_examples=60)
DTYPES = st.sampled_from(["float32", "float64", "float16", "uint8", "int64", "int32", "bool"])
SPLITS = ("train", "test", "calibration")


@st.composite
def samples(draw: st.DrawFn) -> dict[str, NDArray[Any]]:
    """Arrays of an archive: an input ``x`` of any shape, dtype and memory order, labels, splits."""
    count = draw(st.integers(1, 40))
    shape = (count, *draw(npst.array_shapes(min_dims=0, max_dims=3, max_side=4)))
    dtype = np.dtype(draw(DTYPES)).newbyteorder(draw(st.sampled_from("=<>")))
    x = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 100, shape).astype(dtype)
    split = draw(st.lists(st.sampled_from(SPLITS), min_size=count, max_size=count))
    order: Any = draw(st.sampled_from("CF"))
    return {"x": np.asarray(x, order=order), "labels": np.arange(count), "split": np.array(split)}


def spec_of(arrays: dict[str, NDArray[Any]]) -> TensorSpec:
    """The input that takes ``x``."""
    x = arrays["x"]
    return TensorSpec("x", x.dtype.newbyteorder("=").name, ("n", *x.shape[1:]))


def joined(reader: Reader, name: str, like: NDArray[Any]) -> NDArray[Any]:
    """All batches of one array; of the shape of ``like`` less its samples where there are none."""
    return np.concatenate([like[:0], *(batch[name] for batch in reader)])


@FEW
@given(
    arrays=samples(),
    compressed=st.booleans(),
    batch_size=st.integers(1, 50),
    split=st.sampled_from((None, *SPLITS)),
    max_samples=st.none() | st.integers(1, 50),
)
def test_streaming_equals_slicing(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    arrays: dict[str, NDArray[Any]],
    compressed: bool,
    batch_size: int,
    split: str | None,
    max_samples: int | None,
) -> None:
    """Any archive and any .npy files, batch size, split and limit give what numpy.load and a mask give."""
    folder = tmp_path_factory.mktemp("data")
    (np.savez_compressed if compressed else np.savez)(folder / "a.npz", **arrays)  # type: ignore[arg-type]
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    with np.load(folder / "a.npz") as loaded:
        mask = np.ones(len(loaded["x"]), bool) if split is None else loaded["split"] == split
        want = {name: loaded[name][mask][:max_samples] for name in ("x", "labels")}
    for source in (
        NpzData(npz=folder / "a.npz", split=split, max_samples=max_samples),
        NpyData(npy={name: folder / f"{name}.npy" for name in arrays}, split=split, max_samples=max_samples),
    ):
        if not mask.any():
            with pytest.raises(DataError, match="has no split"):
                open_reader(source, [spec_of(arrays)])
            continue
        reader = open_reader(source, [spec_of(arrays)], batch_size=batch_size, labels=True)
        assert len(reader) == len(want["x"])
        for name in ("x", "labels"):
            np.testing.assert_array_equal(joined(reader, name, want[name]), want[name])
        sizes = [len(batch["x"]) for batch in reader]
        assert all(size == batch_size for size in sizes[:-1])
        assert all(batch["x"].dtype == spec_of(arrays).dtype for batch in reader)


@FEW
@given(samples(), st.integers(1, 7), st.integers(1, 5), st.sampled_from([None, 1, 2, 3]))
def test_shards_are_disjoint_and_complete(
    tmp_path_factory: pytest.TempPathFactory,
    arrays: dict[str, NDArray[Any]],
    count: int,
    batch_size: int,
    fixed: int | None,
) -> None:
    """The shards of a reader hold every sample once, whatever their number and the model's batch axis."""
    path = tmp_path_factory.mktemp("data") / "a.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    n = len(arrays["labels"]) // (fixed or 1) * (fixed or 1)
    if n == 0:
        return
    spec = TensorSpec("x", spec_of(arrays).dtype, (fixed or "n", *arrays["x"].shape[1:]))
    reader = open_reader(NpzData(npz=path, max_samples=n), [spec], batch_size=batch_size, labels=True)
    parts = [reader.shard(index, count) for index in range(count)]
    seen = np.concatenate([joined(part, "labels", arrays["labels"]) for part in parts])
    assert sorted(seen.tolist()) == list(range(n))
    assert sum(map(len, parts)) == n


def _archive(*, compressed: bool) -> bytes:
    file = io.BytesIO()
    x = np.random.default_rng(0).random((12, 3)).astype(np.float32)
    save = np.savez_compressed if compressed else np.savez
    save(file, x=x, labels=np.arange(12), split=np.array(["a", "b"] * 6))
    return file.getvalue()


ARCHIVES = (_archive(compressed=False), _archive(compressed=True))


@settings(derandomize=True, deadline=None, max_examples=400)
@given(st.sampled_from(ARCHIVES), st.floats(0, 1, exclude_max=True), st.integers(1, 255), st.booleans())
def test_a_damaged_archive_is_refused_or_right(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    where: float,
    flip: int,
    cut: bool,  # noqa: FBT001 - drawn
) -> None:
    """With any byte changed or the end cut off, a reader raises DataError or gives the very samples, nothing else."""
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    damaged = bytearray(content)
    at = int(where * len(content))
    damaged[at] ^= flip
    path.write_bytes(damaged[:at] if cut else damaged)
    with np.load(io.BytesIO(content)) as loaded:
        want = loaded["x"][loaded["split"] == "a"], loaded["labels"][loaded["split"] == "a"]
    try:
        reader = open_reader(
            NpzData(npz=path, split="a"), [TensorSpec("x", "float32", ("n", 3))], batch_size=4, labels=True
        )
        got = joined(reader, "x", want[0]), joined(reader, "labels", want[1])
    except DataError:
        return
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])

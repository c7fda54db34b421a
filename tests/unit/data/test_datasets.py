"""What a user's Dataset or DataLoader promises: samples by number or in batches, as mappings or tuples."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from onnxshrink.config.data import EntryData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.indexed import HeldSamples, by_number
from onnxshrink.data.reader import Reader, open_reader

X = TensorSpec("x", "float32", ("batch", 2))
Y = TensorSpec("y", "int64", ("batch",))
VALUES = torch.arange(14.0).reshape(7, 2)
CLASSES = torch.arange(7) * 10


class Named(Dataset[dict[str, Any]]):
    """Mappings of plain values."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, at: int) -> dict[str, Any]:
        return {"x": VALUES[at].numpy(), "labels": int(CLASSES[at])}


class Broken(Named):
    """What goes wrong at sample 3."""

    def __init__(self, wrong: Any) -> None:
        self.wrong = wrong

    def __getitem__(self, at: int) -> Any:
        """Raises what is an exception, and gives the rest."""
        if at == 3 and isinstance(self.wrong, Exception):
            raise self.wrong
        return self.wrong if at == 3 else super().__getitem__(at)


def pairs() -> Dataset[tuple[Tensor, ...]]:
    """Tuples of tensors."""
    return TensorDataset(VALUES, CLASSES)


def loader() -> DataLoader[Any]:
    """Batches of three in torch's own collation, a list of tensors."""
    return DataLoader(pairs(), batch_size=3)


def named_loader() -> DataLoader[Any]:
    """Batches of mappings."""
    return DataLoader(Named(), batch_size=3)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Reader]:
    """Opens a callable as the entry of a user's module."""

    def open_callable(make: Callable[..., Any], *specs: TensorSpec, **settings: Any) -> Reader:
        module = ModuleType("users_data")
        module.make = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_data", module)
        options = {name: settings.pop(name) for name in ("labels", "batch_size") if name in settings}
        return open_reader(EntryData(entry="users_data:make", **settings), specs or (X,), **options)

    return open_callable


@pytest.mark.parametrize("make", [Named, pairs, lambda: Subset(pairs(), range(7)), loader, named_loader])
def test_every_form_gives_the_same_samples(opened: Any, make: Any) -> None:
    """In order for calibration and evaluation, by number for training; labels where they are asked for."""
    reader = opened(make, labels=True)
    assert reader.has_labels
    for _ in range(2):
        batches = list(reader)
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), VALUES)
        np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), CLASSES)
    source = by_number(reader, (X,))
    np.testing.assert_array_equal(source.take(np.array([6, 2]))["x"], VALUES[[6, 2]])
    assert source.labels().tolist() == CLASSES.tolist()
    assert len(source) == 7
    assert set(next(iter(opened(make)))) == {"x"}


def test_a_dataset_is_read_by_number_and_a_loader_once(opened: Any) -> None:
    """Nobody can tell whether a Dataset is random, so it counts as random."""
    assert by_number(opened(Named), (X,)).is_random
    held = by_number(opened(loader), (X,))
    assert isinstance(held, HeldSamples)
    assert not held.is_random


def test_batches_and_shards_of_a_dataset(opened: Any) -> None:
    """Of the size that is asked for, the model's where it has one, and at most `max_samples`."""
    assert [len(batch["x"]) for batch in opened(Named, batch_size=4)] == [4, 3]
    assert len(opened(Named, max_samples=5)) == 5
    fixed = TensorSpec("x", "float32", (2, 2))
    shard = opened(Named, fixed, max_samples=6).shard(1, 2)
    assert [batch["x"][:, 0].tolist() for batch in shard] == [[4.0, 6.0]]
    with pytest.raises(DataError, match="do not fill batches of 2"):
        opened(Named, fixed)


def test_inputs_are_taken_in_order_and_renamed_by_name(opened: Any) -> None:
    """A tuple has no names; a mapping's are mapped."""
    batch = next(iter(opened(pairs, X, Y)))
    assert batch["y"].tolist() == CLASSES.tolist()
    batch = next(iter(opened(Named, TensorSpec("z", "float32", ("n", 2)), rename={"x": "z"})))
    np.testing.assert_array_equal(batch["z"], VALUES)
    with pytest.raises(DataError, match="`rename` maps names"):
        opened(pairs, rename={"x": "z"})
    with pytest.raises(DataError, match="which is no array of sample 0"):
        opened(Named, rename={"xx": "x"})
    bare = next(iter(opened(lambda: DataLoader(VALUES, batch_size=7))))  # type: ignore[arg-type]
    np.testing.assert_array_equal(bare["x"], VALUES)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (ValueError("no picture"), "the reader failed: ValueError: no picture"),
        ({"x": np.zeros(3, np.float32), "labels": 1}, "sample 3 has another 'x' than sample 0"),
        ({"x": np.zeros(2), "labels": 1}, "sample 3 has another 'x' than sample 0"),
        ({"x": np.array([0, np.nan], np.float32), "labels": 1}, "sample 3 of 'x' holds nan"),
        ("text", "sample 3 is neither a mapping"),
        ((1, 2, 3), "sample 3 is neither a mapping"),
    ],
)
def test_a_wrong_sample_is_named(opened: Any, wrong: Any, what: str) -> None:
    """By its number, when it is read."""
    reader = opened(lambda: Broken(wrong), labels=True)
    with pytest.raises(DataError, match=what):
        list(reader)


def test_what_does_not_fit_is_refused_at_open(opened: Any) -> None:
    """The first sample is looked at: its form, and labels where they are needed."""
    with pytest.raises(DataError, match="a shape the model cannot take"):
        opened(Named, TensorSpec("x", "float32", ("batch", 5)))
    with pytest.raises(DataError, match="labels are needed"):
        opened(lambda: TensorDataset(VALUES), labels=True)
    with pytest.raises(DataError, match="there are no samples"):
        opened(lambda: TensorDataset(VALUES[:0]))
    reader = opened(lambda: Broken({"x": np.zeros(2, np.float32)}), labels=True)
    with pytest.raises(DataError, match="has no labels"):
        by_number(reader, (X,)).labels()

"""What readers of the user's own code promise: any iterable of batches, checked, the same in every pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader

from onnxshrink.config.data import EntryData
from onnxshrink.core.errors import DataError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.reader import open_reader
from onnxshrink.data.sources import EntryReader

X = TensorSpec("x", "float32", ("batch", 2))


def batches(*sizes: int) -> list[dict[str, Any]]:
    """Batches of the given sizes; sample i is ``[i, i]``, its label i."""
    ends = np.cumsum(sizes)
    ranges = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [{"x": np.stack([r, r], 1).astype(np.float32), "labels": r} for r in ranges]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EntryReader]:
    """Opens a callable as the entry of a user's module."""

    def open_callable(
        make: Callable[..., Any], *specs: TensorSpec, labels: bool = False, **settings: Any
    ) -> EntryReader:
        module = ModuleType("users_reader")
        module.make = make  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_reader", module)
        entry = EntryData(entry="users_reader:make", **settings)
        reader = open_reader(entry, specs or (X,), labels=labels)
        assert isinstance(reader, EntryReader)
        return reader

    return open_callable


def numbers(reader: Any) -> list[int]:
    """The samples of a reader."""
    return [int(value) for batch in reader for value in batch["x"][:, 0]]


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """A reader as ONNX Runtime's documentation shows one."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.given = iter(given)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None."""
        return next(self.given, None)


class OnlyGetNext:
    """ONNX Runtime's protocol without its class."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.get_next = Calibration(given).get_next


@pytest.mark.parametrize("kind", [list, iter, Calibration, OnlyGetNext, lambda given: (b for b in given)])
def test_every_kind_of_reader_gives_its_batches_each_pass(opened: Any, kind: Any) -> None:
    """Lists, iterators, generators and ONNX Runtime's readers give the same samples in each pass."""
    reader = opened(lambda: kind(batches(2, 3)))
    assert [len(batch["x"]) for batch in reader] == [2, 3]
    assert numbers(reader) == numbers(reader) == [0, 1, 2, 3, 4]
    assert len(reader) == 5


def test_arguments_reach_the_callable(opened: Any) -> None:
    """`args` are the callable's keyword arguments."""
    assert numbers(opened(lambda sizes: batches(*sizes), args={"sizes": [1, 2]})) == [0, 1, 2]


def test_the_same_list_may_be_returned_each_time(opened: Any) -> None:
    """A list is no iterator: returning one list at every call is fine."""
    given = batches(2)
    reader = opened(lambda: given)
    assert numbers(reader) == numbers(reader) == [0, 1]


def test_a_rewound_reader_may_be_returned_each_time(opened: Any) -> None:
    """A callable may rewind one reader and return it again."""
    reader_object = Calibration([])

    def make() -> Calibration:
        reader_object.given = iter(batches(2, 2))
        return reader_object

    reader = opened(make)
    assert numbers(reader) == numbers(reader) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", [iter, Calibration, OnlyGetNext])
def test_the_same_begun_iterator_is_refused(opened: Any, kind: Any) -> None:
    """A callable that returns one iterator again would lose the batches that were taken, so it is an error."""
    once = kind(batches(2, 2))
    reader = opened(lambda: once)
    with pytest.raises(DataError, match="the same iterator again, already begun"):
        list(reader)


def test_a_second_pass_that_gives_nothing_is_refused(opened: Any) -> None:
    """An exhausted source behind a new iterator is noticed when it gives nothing."""
    once = iter(batches(2, 2))
    reader = opened(lambda: (batch for batch in once))
    assert numbers(reader) == [2, 3]
    with pytest.raises(DataError, match="a second pass over the samples gave nothing") as caught:
        list(reader)
    assert caught.value.fix == "return a new iterator from each call"


def test_passes_of_different_length_are_refused(opened: Any) -> None:
    """A pass that gives another number of samples than an earlier one is an error."""
    sizes = iter([2, 2, 3])
    reader = opened(lambda: batches(next(sizes)))
    assert numbers(reader) == [0, 1]
    with pytest.raises(DataError, match="a pass gave 3 samples, and an earlier one 2"):
        list(reader)


def test_labels_are_dropped_unless_asked_for(opened: Any) -> None:
    """Labels come only where they are asked for; has_labels tells of them either way."""
    assert set(next(iter(opened(lambda: batches(2))))) == {"x"}
    assert opened(lambda: batches(2)).has_labels
    reader = opened(lambda: batches(2), labels=True)
    assert next(iter(reader))["labels"].tolist() == [0, 1]


def test_missing_labels_are_refused(opened: Any) -> None:
    """Labels that are asked for and not given are an error at open."""
    given = [{"x": batches(2)[0]["x"]}]
    assert not opened(lambda: given).has_labels
    with pytest.raises(DataError, match="labels are needed"):
        opened(lambda: given, labels=True)


def test_rename_maps_names(opened: Any) -> None:
    """`rename` maps the user's names; one that no batch has is refused with the nearest."""
    given = [{"pixels": batch["x"]} for batch in batches(2)]
    assert numbers(opened(lambda: given, rename={"pixels": "x"})) == [0, 1]
    with pytest.raises(DataError, match="`rename` names 'pixel'") as caught:
        opened(lambda: given, rename={"pixel": "x"})
    assert caught.value.fix == "did you mean 'pixels'?"


def test_max_samples_cuts_a_batch(opened: Any) -> None:
    """max_samples stops inside a batch, and the user's code is not run further."""

    def make() -> Iterator[dict[str, Any]]:
        yield from batches(2, 2)
        pytest.fail("the user's reader was run past max_samples")

    reader = opened(make, max_samples=3)
    assert numbers(reader) == [0, 1, 2]
    assert len(reader) == 3
    assert numbers(opened(lambda: batches(2, 2), max_samples=4)) == [0, 1, 2, 3]


def test_shards_take_every_nth_sample_across_batches(opened: Any) -> None:
    """Shards count samples, not batches, and shards of shards compose."""
    reader = opened(lambda: batches(3, 1, 4))
    assert numbers(reader.shard(0, 3)) == [0, 3, 6]
    assert numbers(reader.shard(2, 3)) == [2, 5]
    assert numbers(reader.shard(1, 2).shard(1, 2)) == [3, 7]
    assert len(reader.shard(2, 3)) == 2


def test_a_fixed_batch_axis_keeps_batches_whole(opened: Any) -> None:
    """A model exported for two samples gets whole batches of two, in shards as well; a part of one is refused."""
    spec = TensorSpec("x", "float32", (2, 2))
    reader = opened(lambda: batches(2, 2, 2), spec)
    assert numbers(reader.shard(1, 2)) == [2, 3]
    with pytest.raises(DataError, match="do not fill batches of 2"):
        list(opened(lambda: batches(2, 2), spec, max_samples=3))


def test_inputs_without_samples_are_never_cut(opened: Any) -> None:
    """A scalar input is the same in every batch, cut or not."""
    given = [{**batch, "scale": np.float32(3)} for batch in batches(3, 3)]
    reader = opened(lambda: given, TensorSpec("scale", "float32", ()), X, max_samples=4)
    assert [batch["scale"].item() for batch in reader] == [3, 3]
    assert numbers(reader.shard(1, 2)) == [1, 3]


def test_a_bad_value_names_the_sample_of_the_pass(opened: Any) -> None:
    """Samples count through the whole pass, over batches."""
    given = batches(3, 3)
    given[1]["x"][1, 0] = np.nan
    with pytest.raises(DataError, match="sample 4 of 'x' holds nan"):
        list(opened(lambda: given))


def test_arrays_of_one_batch_must_agree(opened: Any) -> None:
    """Labels of another length than the inputs are refused."""
    given = [{**batches(3)[0], "labels": np.arange(2)}]
    with pytest.raises(DataError, match="'x' and 'labels' have different numbers of samples"):
        opened(lambda: given, labels=True)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: 3, "returned something that is no reader"),
        (lambda: [(np.zeros((1, 2)), 1, 2)], "batch 0 is neither a mapping"),
        (lambda: {"x": np.zeros((1, 2))}, "batch 0 is neither a mapping"),
        (list, "there are no samples"),
        (lambda: [{"x": np.zeros((0, 2), np.float32)}], "there are no samples"),
        (lambda: [{"y": np.zeros((1, 2), np.float32)}], "an array 'y' that is no input"),
        (lambda: [{"x": np.zeros((1, 3), np.float32)}], "a shape the model cannot take"),
        (lambda: [{"x": [[1.0, 2.0]]}], "has dtype float64"),
        (lambda: [{"x": [[1.0], [2.0, 3.0]]}], "the reader failed: ValueError"),
        (lambda: [1 / 0], "the reader failed: ZeroDivisionError"),
        (lambda: ({"x": 1 / 0} for _ in "a"), "the reader failed: ZeroDivisionError"),
        (lambda missing: missing, "the reader failed: TypeError"),
    ],
)
def test_what_cannot_be_samples_is_refused_at_open(opened: Any, make: Any, what: str) -> None:
    """Wrong values, misfits and failures of the user's code are told before any work."""
    with pytest.raises(DataError, match=what) as caught:
        opened(make)
    assert caught.value.where == "users_reader:make"


def test_split_is_refused_for_a_callable(opened: Any) -> None:
    """A split has no meaning for a callable; the fix hands it over as an argument."""
    with pytest.raises(DataError, match="a callable has none") as caught:
        opened(lambda: batches(2), split="test")
    assert caught.value.fix == "let the callable choose: `args: {split: test}`"


def test_a_giant_batch_is_cut(opened: Any) -> None:
    """Batches hold at most the samples asked for, in the same order, so that memory follows from the batch size."""
    reader = opened(lambda: batches(40, 3))
    assert [len(batch["x"]) for batch in reader] == [16, 16, 8, 3]
    assert numbers(reader) == list(range(43))
    assert [len(batch["x"]) for batch in reader.shard(1, 2)] == [16, 4, 1]
    assert numbers(reader.shard(1, 2)) == list(range(1, 43, 2))
    assert len(reader) == 43


def test_labels_and_constants_follow_a_cut_batch(opened: Any) -> None:
    """Labels are cut with their samples; what holds no samples stays whole."""
    given = [{**batch, "scale": np.float32(3)} for batch in batches(20)]
    reader = opened(lambda: given, TensorSpec("scale", "float32", ()), X, labels=True)
    first, second = reader
    assert second["labels"].tolist() == second["x"][:, 0].tolist() == [16, 17, 18, 19]
    assert first["scale"].item() == second["scale"].item() == 3


def exits() -> None:
    """A script that ends the program."""
    raise SystemExit(0)


def test_users_code_cannot_end_the_program(opened: Any) -> None:
    """`sys.exit` in the user's callable is a failure as any other, not the end of the run with status 0."""
    with pytest.raises(DataError, match="the reader failed: SystemExit"):
        opened(exits)

"""What Hugging Face data sets promise: columns as inputs, by number, of the split that is named."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from onnxshrink.config.base import fingerprint
from onnxshrink.config.data import HfData
from onnxshrink.core.errors import DataError, DependencyError
from onnxshrink.core.tensors import TensorSpec
from onnxshrink.data.indexed import by_number
from onnxshrink.data.reader import Reader, open_reader

TOKENS = TensorSpec("tokens", "int32", ("batch", 2))
SCALE = TensorSpec("scale", "float16", ("batch",))
COLUMNS = {"tokens": "ids", "scale": "weight", "labels": "class"}


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven rows in each of two splits, with a column of text that feeds nothing."""
    datasets = pytest.importorskip("datasets", reason="the hf extra is heavy: pip install datasets to run this test")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    datasets.disable_progress_bars()
    splits = {
        name: datasets.Dataset.from_dict(
            {
                "ids": [[row, row + first] for row in range(7)],
                "weight": [row / 2 for row in range(7)],
                "class": [row % 3 for row in range(7)],
                "text": ["a"] * 7,
            }
        )
        for name, first in (("train", 10), ("test", 20))
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["test"].save_to_disk(str(tmp_path / "one"))
    return tmp_path


def opened(path: Path, *, labels: bool = False, **settings: Any) -> Reader:
    """With `COLUMNS` unless others are named."""
    data = HfData.model_validate({"hf": path, "columns": COLUMNS, **settings})
    return open_reader(data, (TOKENS, SCALE), batch_size=4, labels=labels)


def test_columns_feed_inputs(saved: Path) -> None:
    """In batches and by number, in the input's width."""
    reader = opened(saved / "both", split="test", labels=True)
    batches = list(reader)
    assert [len(batch["tokens"]) for batch in batches] == [4, 3]
    np.testing.assert_array_equal(batches[1]["tokens"], np.array([[4, 24], [5, 25], [6, 26]], np.int32), strict=True)
    np.testing.assert_array_equal(batches[1]["scale"], np.array([2, 2.5, 3], np.float16), strict=True)
    assert batches[1]["labels"].tolist() == [1, 2, 0]
    source = by_number(reader, (TOKENS, SCALE))
    assert source.take(np.array([6, 0]))["tokens"].tolist() == [[6, 26], [0, 20]]
    assert source.labels().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not source.is_random
    assert "labels" not in next(iter(opened(saved / "one")))
    assert len(opened(saved / "one", max_samples=5)) == 5


@pytest.mark.parametrize(
    ("name", "settings", "what", "fix"),
    [
        ("both", {}, "the data set has splits", "split: train"),
        ("both", {"split": "tests"}, "no split 'tests'", "did you mean 'test'?"),
        ("one", {"split": "test"}, "no split 'test'", None),
        ("one", {"columns": {"tokens": "idz"}}, "no column 'idz'", "did you mean 'ids'?"),
        (".", {}, "cannot be had", None),
    ],
)
def test_what_is_not_there_is_told(saved: Path, name: str, settings: Any, what: str, fix: str | None) -> None:
    """With what there is."""
    with pytest.raises(DataError, match=what) as caught:
        opened(saved / name, **settings)
    assert caught.value.fix == fix


def test_kinds_are_not_mixed(saved: Path) -> None:
    """Whole numbers do not feed fractions unasked."""
    with pytest.raises(DataError, match="has dtype int64, and the model takes float16"):
        opened(saved / "one", columns={"tokens": "ids", "scale": "class"})


def test_a_name_on_the_hub_needs_a_revision(tmp_path: Path) -> None:
    """It is part of the memo key, as the content of a folder is; `rename` has no place here."""
    with pytest.raises(ValidationError, match="needs a revision"):
        HfData(hf="nobody/nothing", columns=COLUMNS)
    with pytest.raises(ValidationError, match="`rename` does nothing"):
        HfData(hf=tmp_path, columns=COLUMNS, rename={"ids": "tokens"})
    one, other = (HfData(hf="nobody/nothing", columns=COLUMNS, revision=commit) for commit in ("a1", "b2"))
    assert fingerprint(one) != fingerprint(other)
    before = fingerprint(HfData(hf=tmp_path, columns=COLUMNS))
    (tmp_path / "new.arrow").write_bytes(b"rows")
    assert fingerprint(HfData(hf=tmp_path, columns=COLUMNS)) != before


def test_datasets_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed."""
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DependencyError, match="'datasets'") as caught:
        opened(tmp_path)
    assert caught.value.fix == "pip install datasets"

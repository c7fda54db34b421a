"""Task metrics against numpy, and labels that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sklearn.metrics import f1_score

from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.tensors import Batch
from onnxshrink.runtime.session import Session
from onnxshrink.verify.accuracy import score
from onnxshrink.verify.comparison import accuracy_metrics


class Arrays:
    """Arrays in memory, in batches of 8."""

    where = "memory"

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays["x"])

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self), 8):
            yield {name: array[start : start + 8] for name, array in self.arrays.items()}


def echo(columns: int) -> Session:
    """A model that gives its input back, beside an output that no metric fits."""
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMax", ["x"], ["m"], axes=[0, 1], keepdims=1),
            helper.make_node("Identity", ["x"], ["y"]),
        ],
        "echo",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", columns])],
        [
            helper.make_tensor_value_info("m", TensorProto.FLOAT, [1, 1]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", columns]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return Session(model.SerializeToString(), name="echo")


def classes(n: int = 100, n_classes: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and labels."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 6, (n, n_classes)).astype(np.float32), rng.integers(0, n_classes, n)


def named(metrics: Any) -> dict[str, Any]:
    """Metrics by name."""
    return {metric.name: metric for metric in metrics}


def test_top1_is_argmax() -> None:
    """A sample counts where argmax is its label, ties to the first."""
    logits, labels = classes()
    scores = score(echo(10), Arrays(x=logits, labels=labels), "top1")
    assert np.array_equal(scores.values[:, 0], logits.argmax(1) == labels)


def test_top5_is_the_five_best() -> None:
    """A sample counts where a stable descending sort has its label among the first five; unsigned labels do."""
    logits, labels = classes()
    scores = score(echo(10), Arrays(x=logits, labels=labels.astype(np.uint8)), "top5")
    best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert np.array_equal(scores.values[:, 0], (best == labels[:, None]).any(1))


@pytest.mark.parametrize("columns", [1, 4])
def test_errors_are_means_over_a_sample(columns: int) -> None:
    """Errors equal numpy's over all values; labels (n,) fit an output (n, 1)."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(2, 50, columns)).astype(np.float32)
    given = labels[:, 0] if columns == 1 else labels
    error = x.astype(np.float64) - labels
    for metric, expected in (("mae", np.abs(error).mean()), ("rmse", np.sqrt((error**2).mean()))):
        scores = score(echo(columns), Arrays(x=x, labels=given), metric)
        metrics = named(accuracy_metrics(None, scores, target_name="cpu", seed=0))
        assert metrics[metric].value == pytest.approx(expected)
        assert metrics[metric].lo < expected < metrics[metric].hi
        assert "accuracy_drop" not in metrics


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        (lambda y: y + 1, "the model has 10 classes", "labels - 1"),
        (lambda y: y - 1, "the model has 10 classes", "belong together"),
        (lambda y: y[:, None], "wrong shape", r"labels\[:, 0\]"),
        (lambda y: np.eye(10, dtype=np.int64)[y], "wrong shape", "argmax"),
        (lambda y: y.astype(np.float32), "no class numbers", "astype"),
    ],
)
def test_labels_that_do_not_fit(change: Any, what: str, fix: str) -> None:
    """Each way to get labels wrong is told with its own remedy."""
    logits, labels = classes(8)
    labels[:2] = 0, 9
    with pytest.raises(DataError, match=f"(?s){what}.*{fix}"):
        score(echo(10), Arrays(x=logits, labels=change(labels)), "top1")


def test_what_cannot_be_scored_is_refused() -> None:
    """No labels, no samples, no output that fits, labels of another shape, different samples: each an error."""
    logits, labels = classes(8)
    with pytest.raises(DataError, match="needs labels"):
        score(echo(10), Arrays(x=logits), "top1")
    with pytest.raises(DataError, match="no samples"):
        score(echo(10), Arrays(x=logits[:0], labels=labels[:0]), "top1")
    with pytest.raises(ModelError, match="at least 6 classes"):
        score(echo(4), Arrays(x=logits[:, :4], labels=labels % 4), "top5")
    with pytest.raises(DataError, match="shape of no output"):
        score(echo(10), Arrays(x=logits, labels=logits[:, :3]), "mae")


def test_progress_counts_samples() -> None:
    """Progress is told after each batch, in samples."""
    logits, labels = classes(20)
    told: list[tuple[int, int]] = []
    score(echo(10), Arrays(x=logits, labels=labels), "top1", lambda done, total: told.append((done, total)))
    assert told == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize("most", [60, 100, 10**6])
def test_counts_of_neighbours_are_added_where_they_are_many(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Memory is bounded, the metric is the same, and rows are of equally many samples however they are batched."""
    monkeypatch.setattr("onnxshrink.verify.accuracy._MOST_NUMBERS", most)
    monkeypatch.setattr("onnxshrink.verify.accuracy._FEWEST_ROWS", 2)
    logits, labels = classes(45, n_classes=4)
    scores = score(echo(4), Arrays(x=logits, labels=labels), "f1")
    group = {60: 9, 100: 6, 10**6: 1}[most]
    assert scores.values.shape == (45 // group + (45 % group > 0), 12)
    each = np.eye(4)[labels] * (logits.argmax(1) == labels)[:, None]
    assert np.array_equal(scores.values[0, :4], each[:group].sum(0))
    assert named(accuracy_metrics(None, scores, target_name="cpu", seed=0))["f1"].value == pytest.approx(
        f1_score(labels, logits.argmax(1), average="macro")
    )


def test_too_many_classes_to_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where hardly any rows would be left to resample, nothing is measured and the message says what would do."""
    monkeypatch.setattr("onnxshrink.verify.accuracy._MOST_NUMBERS", 100)
    logits, labels = classes(45, n_classes=4)
    with pytest.raises(DataError, match="4 classes are too many"):
        score(echo(4), Arrays(x=logits, labels=labels), "f1")

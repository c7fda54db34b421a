"""Every task metric against a second source, and what does not fit it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn

from onnxshrink.config.metrics import F1Score, MeanIou, OwnMetric, TaskMetric
from onnxshrink.core.errors import ConfigError, DataError, ModelError
from onnxshrink.core.importing import search_path
from onnxshrink.verify.scored_output import Place
from onnxshrink.verify.task_metrics import measure_of

HERE = Place("m.onnx", "d.npz", 40)


def value(metric: TaskMetric, output: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The metric of one output, of a resample where weights are given; batches of 7."""
    measure = measure_of(metric)
    starts = range(0, len(labels), 7)
    rows = np.vstack([measure.marks({"y": output[at : at + 7]}, labels[at : at + 7], HERE) for at in starts])
    return float(measure.total(rows, np.ones((1, len(rows))) if weights is None else weights[None])[0])


def logits(n: int = 60, n_classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Answers that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    return (rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[labels]).astype(np.float32), labels


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_of_classes_is_scikit_learns(average: Any) -> None:
    """Of the largest logit, macro and micro; a class that neither labels nor answers name is left out."""
    y, labels = logits()
    y = np.hstack([y, np.full((len(y), 1), -9, np.float32)])
    expected = sklearn.f1_score(labels, y.argmax(1), average=average)
    assert value(F1Score(average=average), y, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_f1_of_yes_or_no_is_scikit_learns(shape: tuple[int, ...]) -> None:
    """An output for one class answers yes above the threshold: 0 for logits, 0.5 for probabilities."""
    y, labels = logits(n_classes=2)
    margin = (y[:, 1] - y[:, 0]).reshape(shape)
    expected = sklearn.f1_score(labels, margin.ravel() > 0)
    assert value("f1", margin, labels) == pytest.approx(expected, abs=1e-12)
    probability = 1 / (1 + np.exp(-margin))
    assert value(F1Score(threshold=0.5), probability, labels.astype(bool)) == pytest.approx(expected, abs=1e-12)
    assert value(F1Score(average="binary"), y, labels) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ConfigError, match="binary"):
        value(F1Score(average="binary"), *logits(n_classes=3))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_of_several_labels_is_scikit_learns(average: Any) -> None:
    """Labels 0 and 1 in the output's shape: each class is answered by itself."""
    rng = np.random.default_rng(1)
    labels = (rng.random((50, 4)) < 0.4).astype(np.int64)
    y = (rng.normal(size=labels.shape) + labels - 0.5).astype(np.float32)
    expected = sklearn.f1_score(labels, y > 0, average=average)
    assert value(F1Score(average=average), y, labels) == pytest.approx(expected, abs=1e-12)


def segmented(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of four classes, and labels with pixels that do not count; the last class is never meant."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, (20, 6, 5)).astype(np.uint8)
    y = rng.normal(size=(20, 4, 6, 5)).astype(np.float32) + np.moveaxis(np.eye(4, dtype=np.float32)[labels], -1, 1)
    labels[rng.random(labels.shape) < 0.1] = 255
    return y, labels


@pytest.mark.parametrize("form", ["logits", "numbers", "channel"])
def test_mean_iou_is_scikit_learns_jaccard(form: str) -> None:
    """Over all pixels that count, from logits and from class numbers."""
    y, labels = segmented()
    answers, counts = y.argmax(1), labels != 255
    expected = sklearn.jaccard_score(labels[counts], answers[counts], average="macro")
    given = {"logits": y, "numbers": answers, "channel": answers[:, None].astype(np.uint8)}[form]
    metric: TaskMetric = "miou" if form == "logits" else MeanIou(n_classes=4)
    assert value(metric, given, labels) == pytest.approx(expected, abs=1e-12)


def test_spearman_is_scipys_in_every_resample() -> None:
    """Ranks with many ties, of all samples and of resamples that hold some of them several times."""
    rng = np.random.default_rng(0)
    y, labels = rng.integers(0, 8, (2, 70)).astype(np.float32)
    y += labels
    assert value("spearman", y[:, None], labels) == pytest.approx(stats.spearmanr(y, labels).statistic, abs=1e-12)
    for _ in range(20):
        picks = rng.integers(0, 70, 70)
        expected = stats.spearmanr(y[picks], labels[picks]).statistic
        found = value("spearman", y, labels, np.bincount(picks, minlength=70).astype(float))
        assert found == pytest.approx(expected, abs=1e-12)


def test_cosine_is_scikit_learns() -> None:
    """Mean over the samples, whatever the vectors' lengths; 0 where one is all zeros."""
    rng = np.random.default_rng(0)
    y, labels = rng.normal(size=(2, 30, 8)) * 10.0 ** rng.integers(-6, 6, (2, 30, 1))
    y[3], labels[4] = 0, 0
    expected = np.mean(
        [sklearn.pairwise.cosine_similarity(a[None], b[None])[0, 0] for a, b in zip(y, labels, strict=True)]
    )
    assert value("cosine", y, labels) == pytest.approx(expected, abs=1e-12)
    assert value("cosine", y[:3] * 1e200, y[:3] * 1e-200) == pytest.approx(1)


RESAMPLED: list[tuple[TaskMetric, Callable[[], tuple[np.ndarray, np.ndarray]]]] = [
    ("f1", logits),
    (F1Score(average="micro"), logits),
    ("miou", segmented),
    ("cosine", lambda: tuple(np.random.default_rng(0).normal(size=(2, 20, 3)))),  # type: ignore[arg-type,return-value]
    ("top1", logits),
    ("rmse", lambda: tuple(np.random.default_rng(0).normal(size=(2, 20)))),  # type: ignore[arg-type,return-value]
]


@pytest.mark.parametrize(("metric", "made"), RESAMPLED)
def test_weights_are_samples_taken_several_times(metric: TaskMetric, made: Callable[[], Any]) -> None:
    """The metric of a weighted sum of what is kept equals that of the samples themselves, drawn again."""
    y, labels = made()
    picks = np.random.default_rng(3).integers(0, len(labels), len(labels))
    weights = np.bincount(picks, minlength=len(labels)).astype(float)
    assert value(metric, y, labels, weights) == pytest.approx(value(metric, y[picks], labels[picks]), abs=1e-12)


@pytest.mark.parametrize(("metric", "made"), RESAMPLED)
def test_a_sample_with_nan_is_marked(metric: TaskMetric, made: Callable[[], Any]) -> None:
    """Everything kept of it is NaN, and nothing of the others."""
    y, labels = made()
    y[4:5].flat[0] = np.nan
    rows = measure_of(metric).marks({"y": y}, labels, HERE)
    assert np.isnan(rows[4]).all()
    assert np.isfinite(np.delete(rows, 4, axis=0)).all()


OWN = """
import numpy as np
def score(outputs, labels):
    return -np.abs(outputs["y"][:, 0] - labels)
def mean(outputs, labels):
    return score(outputs, labels).mean()
def broken(outputs, labels):
    return score(outputs, labels) / (labels != labels[2])
def fails(outputs, labels):
    raise ValueError("no such class")
"""


@pytest.mark.parametrize(
    ("name", "what", "where"),
    [
        ("mean", "something else than a number for each sample", "mine:mean"),
        ("broken", "metric of sample 42 is -inf|metric of sample 42 is nan", "mine:broken"),
        ("fails", "ValueError: no such class", "mine:fails"),
        ("absent", "has no 'absent'", None),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_the_users_own_metric(tmp_path: Any, name: str, what: str, where: str | None) -> None:
    """It is the mean of its scores; one that fails, or gives anything else, is told with its entry point."""
    (tmp_path / "mine.py").write_text(OWN)
    y, labels = np.random.default_rng(0).normal(size=(2, 10, 1)).astype(np.float32)
    with search_path(tmp_path):
        metric = partial(OwnMetric, better="higher")
        expected = -np.abs(y[:, 0] - labels[:, 0]).mean()
        assert value(metric(entry="mine:score"), y, labels[:, 0]) == pytest.approx(expected, rel=1e-6)
        with pytest.raises(ConfigError, match=what) as caught:
            value(metric(entry=f"mine:{name}"), y, labels[:, 0])
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("metric", "output", "labels", "kind", "what"),
    [
        ("f1", np.zeros((4, 3), np.float32), np.array([0, 1, 2, 3]), DataError, "label of sample 43 is 3"),
        ("f1", np.zeros((4, 3), np.float32), np.array([[0, 1, 2]] * 4), DataError, "neither 0 nor 1"),
        ("f1", np.zeros((4, 3), np.float32), np.zeros((4, 2), int), ModelError, "'f1'"),
        ("miou", np.zeros((4, 3, 2, 2), np.float32), np.full((4, 2, 2), 7), DataError, "sample 40 has the label 7"),
        ("miou", np.zeros((4, 3, 2, 2), np.float32), np.zeros((4, 1, 2, 2), int), DataError, "class numbers of pixels"),
        ("miou", np.zeros((4, 3, 2, 2), np.float32), np.zeros((4, 4, 4), int), ModelError, "'miou'"),
        ("miou", np.zeros((4, 1, 2, 2), np.float32), np.zeros((4, 2, 2), int), ModelError, "'miou'"),
        ("miou", np.zeros((4, 2, 2), int), np.zeros((4, 2, 2), int), ModelError, "how many classes"),
        (MeanIou(n_classes=2), np.full((4, 2, 2), 5), np.zeros((4, 2, 2), int), ModelError, "outside 0 to 1"),
        ("spearman", np.zeros((4, 3), np.float32), np.zeros((4, 3)), DataError, "one number"),
        ("cosine", np.zeros((4, 1), np.float32), np.zeros(4), DataError, "single numbers"),
        ("cosine", np.zeros((4, 3), np.float32), np.zeros((4, 2)), DataError, "shape of no output"),
    ],
)
def test_what_does_not_fit_is_refused(
    metric: TaskMetric, output: np.ndarray, labels: np.ndarray, kind: type[Exception], what: str
) -> None:
    """Labels and outputs of another form are told as whose mistake they are, with the sample's number in the data."""
    with pytest.raises(kind, match=what):
        measure_of(metric).marks({"y": output}, labels, HERE)

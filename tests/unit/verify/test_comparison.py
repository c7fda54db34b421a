"""The paired comparison against scipy, and how often its intervals hold the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from onnxshrink.config.metrics import METRIC_NAMES, F1Score, MeanIou, OwnMetric, TaskMetric
from onnxshrink.core.errors import DataError
from onnxshrink.core.intervals import matched_difference_interval
from onnxshrink.core.report import Metric
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.comparison import accuracy_details, accuracy_metrics
from onnxshrink.verify.evidence import load_quality, save_quality
from onnxshrink.verify.scored_output import Place
from onnxshrink.verify.task_metrics import measure_of
from onnxshrink.verify.verify import Quality


def named(metrics: Any) -> dict[str, Metric]:
    """Metrics by name."""
    return {metric.name: metric for metric in metrics}


def of(metric: TaskMetric, values: np.ndarray, n_classes: int | None = None) -> Scores:
    """Scores of one number a sample."""
    return Scores(metric, np.asarray(values, dtype=np.float64).reshape(len(values), -1), len(values), n_classes)


def scored(metric: TaskMetric, output: np.ndarray, labels: np.ndarray) -> Scores:
    """Scores of an output."""
    rows = measure_of(metric).marks({"y": output}, labels, Place("m", "d", 0))
    return Scores(metric, rows, len(labels), output.shape[1] if output.ndim > 1 else None)


def compared(original: Scores, candidate: Scores) -> dict[str, Metric]:
    """Metrics of the candidate."""
    return named(accuracy_metrics(original, candidate, target_name="cpu", seed=0))


def pair(metric: TaskMetric, n: int, rng: np.random.Generator, noise: float = 0.5) -> tuple[Scores, Scores]:
    """Two models' scores on samples drawn from a world without end; the second one is noisier."""
    if metric == "miou":
        labels = rng.integers(0, 3, (n, 1, 1)) * np.ones((1, 4, 4), int)
        labels[:, :2] = rng.integers(0, 3, (n, 1, 4))
        sharp = rng.normal(size=(n, 3, 4, 4)) + 1.5 * np.moveaxis(np.eye(3)[labels], -1, 1)
    elif metric in ("top1", "f1"):
        labels = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
        sharp = rng.normal(size=(n, 4)) + 1.5 * np.eye(4)[labels]
    else:
        labels = rng.normal(size=(n, 1) if metric == "spearman" else (n, 6))
        sharp = labels + rng.normal(size=labels.shape)
    return scored(metric, sharp, labels), scored(metric, sharp + noise * rng.normal(size=sharp.shape), labels)


def test_interval_of_a_mean_error_agrees_with_scipy() -> None:
    """The interval of rmse is about scipy's bootstrap of it."""
    values = np.random.default_rng(0).exponential(size=300)
    found = named(accuracy_metrics(None, of("rmse", values), target_name="cpu", seed=0))["rmse"]
    expected = stats.bootstrap(
        (values,), lambda v, axis: np.sqrt(v.mean(axis)), method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (found.lo, found.hi) == pytest.approx(tuple(expected), rel=0.02)


def test_interval_of_a_rank_correlation_agrees_with_scipy() -> None:
    """The drop of spearman has scipy's paired bootstrap interval, ranked anew in each resample."""
    original, candidate = pair("spearman", 150, np.random.default_rng(0))

    def drop(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> float:
        return float(stats.spearmanr(a, y).statistic - stats.spearmanr(b, y).statistic)

    expected = stats.bootstrap(
        (original.values[:, 0], candidate.values[:, 0], original.values[:, 1]),
        drop,
        paired=True,
        vectorized=False,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    found = compared(original, candidate)["accuracy_drop"]
    assert (found.lo, found.hi) == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))


@pytest.mark.parametrize("metric", [*METRIC_NAMES, OwnMetric(entry="m:f", better="lower")])
def test_drop_is_positive_where_the_candidate_is_worse(metric: TaskMetric, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the metric, and negative by the same amount the other way round; the interval is around it."""
    if isinstance(metric, OwnMetric):
        monkeypatch.setattr("onnxshrink.verify.task_metrics.load_entry", lambda _: None)
        name, made = "m:f", [Scores(metric, s.values, s.n_samples) for s in pair("mae", 300, np.random.default_rng(0))]
    else:
        form: TaskMetric = "top1" if metric == "top5" else metric
        name, made = metric, list(pair(form, 300, np.random.default_rng(0), noise=2.0))
        made = [Scores(metric, s.values, s.n_samples, 4) for s in made]
    found = compared(made[0], made[1])
    drop = found["accuracy_drop"]
    assert drop.value is not None and drop.lo is not None and drop.hi is not None  # noqa: PT018
    assert 0 < drop.lo < drop.value < drop.hi
    lo, value, hi = found[name].lo, found[name].value, found[name].hi
    assert value is not None and lo is not None and hi is not None and lo < value < hi  # noqa: PT018
    back = compared(made[1], made[0])["accuracy_drop"]
    assert back.value == pytest.approx(-drop.value)
    assert back.unit == drop.unit == ("ratio" if name in ("top1", "top5", "f1", "miou") else "")


def test_mcnemars_p_value_is_the_binomial_tests() -> None:
    """The p-value of the change is scipy's exact one of lost against won samples."""
    rng = np.random.default_rng(0)
    before, after = (rng.random((2, 500)) < np.array([[0.9], [0.86]])).astype(float)
    original, candidate = of("top1", before, 10), of("top1", after, 10)
    lost, won = int((before > after).sum()), int((after > before).sum())
    p_value = compared(original, candidate)["accuracy_drop_p"].value
    assert p_value == pytest.approx(stats.binomtest(lost, lost + won).pvalue, rel=1e-9)
    details = accuracy_details(original, candidate)
    assert (details["lost"], details["won"], details["better"]) == (lost, won, "higher")
    assert "accuracy_drop_p" not in compared(*pair("f1", 50, rng))


def test_pairing_narrows_the_interval() -> None:
    """Two models that err on the same samples are told apart more finely than their own intervals allow."""
    values = (np.random.default_rng(0).random(1000) < 0.8).astype(float)
    metrics = compared(of("top1", values, 10), of("top1", values, 10))
    drop, own = metrics["accuracy_drop"], metrics["top1"]
    assert drop.value == 0
    assert drop.hi - drop.lo < (own.hi - own.lo) / 5  # type: ignore[operator]
    assert metrics["evaluation_samples"].value == 1000


@pytest.mark.parametrize("n", [20, 400])
def test_f1_of_unchanged_samples_has_the_width_that_top1_has(n: int) -> None:
    """A bootstrap of samples that did not change has no width, and few of them prove nothing."""
    labels = np.arange(n) % 4
    scores = scored("f1", np.eye(4)[labels], labels)
    found = compared(scores, scores)
    drop, own = found["accuracy_drop"], found["f1"]
    assert (drop.value, own.value, own.hi) == (0, 1, 1)
    assert (drop.lo, drop.hi) == pytest.approx(matched_difference_interval(0, 0, n), rel=0.35)
    assert own.lo < 1 - 1 / n  # type: ignore[operator]


def test_nan_has_no_accuracy() -> None:
    """NaN from either model leaves metric and drop without a value, and the note names model and sample."""
    fine = of("top1", np.ones(20), 10)
    broken = of("top1", np.where(np.arange(20) == 13, np.nan, 1.0), 10)
    metrics = compared(fine, broken)
    assert metrics["top1"].value is None
    assert metrics["accuracy_drop"].note == "candidate gives NaN at sample 13"
    assert compared(broken, fine)["accuracy_drop"].value is None
    added = Scores("f1", np.array([[1.0, 0, 0], [np.nan, 0, 0]]), 7)
    assert compared(added, added)["f1"].note == "candidate gives NaN at sample 4 to 7"


def test_what_has_no_value_says_so() -> None:
    """Constant answers have no rank correlation: there is no number, and the note says why."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=30)
    fine, flat = scored("spearman", labels + 1, labels), scored("spearman", np.zeros(30), labels)
    assert "undefined" in (compared(fine, flat)["accuracy_drop"].note or "")
    with pytest.raises(DataError, match="one sample"):
        accuracy_metrics(None, of("mae", np.ones(1)), target_name="cpu", seed=0)


def test_different_samples_are_refused() -> None:
    """A drop is of the same samples and classes."""
    with pytest.raises(DataError, match="different samples"):
        compared(of("top1", np.ones(3), 10), of("top1", np.ones(4), 10))
    with pytest.raises(DataError, match="different numbers of classes"):
        compared(of("f1", np.ones((9, 6))), of("f1", np.ones((9, 9))))


def test_an_original_at_chance_level_is_noted() -> None:
    """Where the user's own model is not better than guessing, labels or preprocessing may be wrong."""
    right = (np.arange(300) % 10 == 0).astype(float)
    guessing = named(accuracy_metrics(None, of("top1", right, 10), target_name="cpu", seed=0))["top1"]
    assert guessing.note == "not above the chance of 10.0% with 10 classes"
    assert named(accuracy_metrics(None, of("top1", right, 100), target_name="cpu", seed=0))["top1"].note is None
    five = named(accuracy_metrics(None, of("top5", np.ones(300), 5), target_name="cpu", seed=0))["top5"]
    assert five.note == "not above the chance of 100.0% with 5 classes"


@pytest.mark.parametrize("metric", [*METRIC_NAMES, F1Score(threshold=0.5), MeanIou(n_classes=3)])
def test_evidence_is_read_back(metric: TaskMetric, tmp_path: Path) -> None:
    """Scores come back from the store as they were, with the metric's options, and equal ones in equal bytes."""
    scores = Scores(metric, np.random.default_rng(0).random((20, 6)), 40, 4)
    for name in "ab":
        (tmp_path / name).mkdir()
        save_quality(Quality((), {"cpu": scores}), tmp_path / name)
    back = load_quality(tmp_path / "a").scores["cpu"]
    assert (back.metric, back.n_samples, back.n_classes) == (metric, 40, 4)
    assert np.array_equal(back.values, scores.values)
    files = [[file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 200])
@pytest.mark.parametrize("metric", ["f1", "miou", "spearman", "cosine", "mae", "rmse", "top1"])
def test_intervals_hold_the_truth(metric: Any, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 90 of 100 intervals of the metric and of its drop hold those of 200,000 samples."""
    from onnxshrink.verify import comparison

    plain = comparison.resamples
    monkeypatch.setattr(comparison, "resamples", lambda *a, **k: plain(*a, **k, n_resamples=400))
    rng = np.random.default_rng(7)
    measure = measure_of(metric)
    parts = [pair(metric, 20_000, rng) for _ in range(10)]
    ones = np.ones((1, 200_000))
    before, after = (measure.total(np.vstack([p[i].values for p in parts]), ones)[0] for i in (0, 1))
    drop = (before - after) * (-1 if metric in ("mae", "rmse") else 1)
    held = np.zeros(2)
    for _ in range(300):
        found = compared(*pair(metric, n, rng))
        for i, (name, truth) in enumerate(((metric, after), ("accuracy_drop", drop))):
            held[i] += found[name].lo <= truth <= found[name].hi  # type: ignore[operator]
    assert (held / 300 > 0.9).all()

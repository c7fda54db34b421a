"""Drift against numpy over the whole arrays at once."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from onnxshrink.core.drift import CANDIDATE_NAN, INFINITE, N_LISTED, REFERENCE_NAN, Drift
from onnxshrink.core.errors import ModelError
from onnxshrink.core.worst import N_WORST


def drift(reference: np.ndarray, candidate: np.ndarray, size: int = 7) -> Drift:
    """Drift in batches."""
    starts = range(0, len(reference), size)
    return reduce(lambda d, i: d.update(reference[i : i + size], candidate[i : i + size]), starts, Drift("y"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8", "int32"])
@pytest.mark.parametrize("shape", [(30, 10), (23, 3, 4, 4), (11,)])
def test_measures_equal_numpy(dtype: str, shape: tuple[int, ...]) -> None:
    """Each measure is the textbook formula over all values in float64."""
    rng = np.random.default_rng(0)
    ref = (rng.standard_normal(shape) * 20 + 50).astype(dtype)
    cand = (ref.astype(np.float64) + rng.standard_normal(shape) * 3).astype(dtype)
    r, c = ref.astype(np.float64).ravel(), cand.astype(np.float64).ravel()
    measured = drift(ref, cand)
    assert measured.max_abs == np.abs(r - c).max()
    assert measured.mean_abs == pytest.approx(np.abs(r - c).mean())
    assert measured.sqnr_db == pytest.approx(10 * np.log10((r**2).sum() / ((r - c) ** 2).sum()))
    assert measured.cosine == pytest.approx(r @ c / np.linalg.norm(r) / np.linalg.norm(c))
    assert measured.relative_l2 == pytest.approx(np.linalg.norm(r - c) / np.linalg.norm(r))
    assert measured.rmse == pytest.approx(np.sqrt(((r - c) ** 2).mean()))
    assert measured.psnr_db == pytest.approx(20 * np.log10((r.max() - r.min()) / np.sqrt(((r - c) ** 2).mean())))
    row_errors = np.abs(ref.astype(np.float64) - cand.astype(np.float64)).reshape(shape[0], -1).max(axis=1)
    assert measured.worst_row == row_errors.argmax()


def test_top1_agreement_counts_rows() -> None:
    """The winning class decides, ties to the first; outputs that rank no classes have none."""
    ref = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 2.0]], np.float32)
    cand = np.array([[0.0, 9.0], [0.0, 1.0], [3.0, 3.0], [0.0, 2.0]], np.float32)
    assert drift(ref, cand, 3).top1_agreement == 0.75
    assert drift(ref[:, :1], cand[:, :1]).top1_agreement is None
    assert drift(ref[:, :, None], cand[:, :, None]).top1_agreement is None


def test_top5_agreement_asks_for_the_winner_only() -> None:
    """The reference's winner among the candidate's five best, as a label would be; it needs six classes."""
    ref = np.eye(8)[[0, 1, 3, 2]]
    cand = np.tile(np.arange(8.0)[::-1], (4, 1))  # the first five classes are the best, in this order
    cand[3] = np.arange(8.0)
    assert drift(ref, cand, 3).top5_agreement == 0.75
    assert drift(ref, cand, 3).top1_agreement == 0.25
    assert drift(ref[:, :5], cand[:, :5]).top5_agreement is None


def test_divergences_are_means_over_rows() -> None:
    """Probabilities have a divergence, on the last axis; other 2-D floats that of their softmax; the rest neither."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(20, 3, 6)) for _ in range(2))
    p, q = softmax(a, axis=-1), softmax(b, axis=-1)
    mean = entropy(p, q, axis=-1).mean()
    assert drift(p, q).kl_divergence == pytest.approx(mean)
    assert drift(p, q).softmax_kl is None
    flat = drift(a[:, 0], b[:, 0])
    assert (flat.kl_divergence, flat.softmax_kl) == (None, pytest.approx(entropy(p, q, axis=-1)[:, 0].mean()))
    assert (drift(a, b).kl_divergence, drift(a, b).softmax_kl) == (None, None)
    both = drift(p[:, 0], q[:, 0])
    assert both.kl_divergence is not None
    assert both.softmax_kl is None
    whole = np.arange(12).reshape(3, 4)
    assert drift(whole, whole[::-1]).softmax_kl is None


def test_one_batch_of_other_values_makes_no_distribution() -> None:
    """An output whose first rows happen to add up to 1 is not taken for probabilities."""
    p = np.full((4, 5), 0.2)
    mixed = drift(p, p * 1.01).merge(drift(p * 3, p * 3.1))
    assert mixed.kl_divergence is None
    assert mixed.softmax_kl is not None


def test_masked_rows_have_no_softmax() -> None:
    """Minus infinity on both sides masks a class; a row of nothing else, and plus infinity, are left out."""
    ref = np.array([[0.0, 1.0, -np.inf], [-np.inf, -np.inf, -np.inf], [np.inf, 0.0, 1.0]])
    measured = drift(ref, np.where(np.isfinite(ref), ref * 2, ref))
    wanted = entropy(softmax([0.0, 1.0]), softmax([0.0, 2.0]))
    assert (measured.n_logits, measured.softmax_kl) == (1, pytest.approx(wanted))


def test_the_worst_rows_are_named_in_order() -> None:
    """By relative error over all batches, a broken row before a silent one before the rest; equal rows are none."""
    rng = np.random.default_rng(0)
    ref = rng.normal(size=(40, 5))
    ref[3] = 0
    error = rng.normal(size=(40, 5)) * rng.uniform(0, 1, (40, 1))
    error[::2] = 0
    cand = ref + error
    cand[30, 2] = np.nan
    worst = drift(ref, cand).worst
    with np.errstate(divide="ignore"):
        relative = np.nan_to_num(np.linalg.norm(cand - ref, axis=1) / np.linalg.norm(ref, axis=1), nan=0)
    rest = [i for i in np.argsort(-relative, kind="stable") if i not in (3, 30)][: N_WORST - 2]
    assert [row.row for row in worst] == [30, 3, *rest]
    assert [row.relative_l2 for row in worst[2:]] == pytest.approx(relative[rest])
    assert worst[0].max_abs == math.inf
    assert worst[1].max_abs == np.abs(error[3]).max()
    one = drift(ref[rest[0]][None], cand[rest[0]][None])
    assert worst[2].sqnr_db == pytest.approx(one.sqnr_db)
    assert len(drift(ref[:5], cand[:5]).worst) == 2


def test_the_first_rows_have_their_own_errors() -> None:
    """As numpy sums them, in order, over batches of any size; no more of them than are listed."""
    rng = np.random.default_rng(0)
    ref, cand = rng.normal(size=(2, 50, 3, 2))
    squares = ((ref - cand) ** 2).sum(axis=(1, 2))
    for size in (1, 7, 40, 50):
        assert drift(ref, cand, size).first_squares == pytest.approx(squares[:N_LISTED])
    few = drift(ref[:20], cand[:20])
    assert sum(few.first_squares) == pytest.approx(few.sum_squares)


def test_equal_errors_name_the_earlier_rows() -> None:
    """Ties fall to the order of the samples, whatever the batches."""
    ref = np.ones((30, 4))
    for size in (1, 7, 30):
        assert [row.row for row in drift(ref, ref + 0.5, size).worst] == list(range(N_WORST))


def test_identical_outputs_have_infinite_sqnr() -> None:
    """No difference at all: infinite decibels, cosine 1, distance 0, zeros included."""
    for ref in (np.zeros((3, 4)), np.random.default_rng(0).normal(size=(3, 4))):
        measured = drift(ref, ref.copy())
        assert (measured.sqnr_db, measured.cosine, measured.relative_l2) == (math.inf, 1.0, 0.0)
        assert (measured.psnr_db, measured.rmse, measured.worst) == (math.inf, 0.0, ())
        assert measured.flaw is None


def test_silent_reference_has_no_ratio() -> None:
    """A reference of zeros makes every relative measure meaningless, and none raises."""
    measured = drift(np.zeros((3, 4)), np.ones((3, 4)))
    assert measured.sqnr_db == -math.inf
    assert measured.relative_l2 == math.inf
    assert math.isnan(measured.cosine)
    assert measured.psnr_db == -math.inf
    assert drift(np.full((3, 4), 2.0), np.ones((3, 4))).psnr_db == -math.inf


@pytest.mark.parametrize(
    ("ref", "cand", "flaw"),
    [
        (1.0, np.nan, CANDIDATE_NAN),
        (np.nan, 1.0, REFERENCE_NAN),
        (np.nan, np.nan, REFERENCE_NAN),
        (1.0, np.inf, INFINITE),
        (np.inf, -np.inf, INFINITE),
        (-np.inf, -np.inf, None),
    ],
)
def test_values_that_are_not_finite(ref: float, cand: float, flaw: str | None) -> None:
    """NaN and one-sided infinity are flaws that stay; equal infinities agree and are left out."""
    a = np.array([[1.0, 2.0], [3.0, ref], [5.0, 6.0]])
    b = np.array([[1.0, 2.0], [3.5, cand], [5.0, 6.0]])
    measured = drift(a, b, 1)
    assert measured.flaw == flaw
    assert measured.max_abs == 0.5 or flaw


def test_other_shapes_and_dtypes_are_refused() -> None:
    """Models of different interfaces cannot be compared, and the error shows both sides."""
    ref = np.zeros((2, 3), np.float32)
    for cand in (np.zeros((2, 4), np.float32), np.zeros((2, 3), np.int32)):
        with pytest.raises(ModelError, match="differ in the shape or dtype") as caught:
            Drift("y").update(ref, cand)
        assert str(cand.dtype) in str(caught.value)
    with pytest.raises(ModelError, match="holds no numbers"):
        Drift("y").update(np.array(["a"]), np.array(["a"]))


def test_floats_of_other_widths_are_compared_in_float64() -> None:
    """A float16 output drifts by its rounding, and nothing else is lost on the way."""
    ref = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4)
    measured = Drift("y").update(ref, ref.astype(np.float16))
    error = np.abs(ref.astype(np.float64) - ref.astype(np.float16).astype(np.float64))
    assert (measured.max_abs, measured.sum_abs) == (error.max(), pytest.approx(error.sum(), rel=1e-15))
    assert 0 < measured.max_abs < 3 / 2**10


def test_scalars_and_empty_outputs() -> None:
    """A scalar output is one row; an output without rows (no detections) adds nothing."""
    empty = np.zeros((0, 6), np.float32)
    measured = Drift("y").update(np.float32(2.0).reshape(()), np.float32(1.0).reshape(())).update(empty, empty)
    assert (measured.n_values, measured.n_rows, measured.max_abs) == (1, 1, 1.0)

"""Laws of calibration that hold for any data."""

from __future__ import annotations

import pickle
from concurrent.futures import Executor, Future
from functools import partial, reduce
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from onnx_models import ArrayReader, cnn, samples_of
from onnxruntime.quantization.quant_utils import compute_scale_zp

from onnxshrink.calibration.parts import Sharding, observe_parts
from onnxshrink.calibration.prepare import prepare
from onnxshrink.calibration.ranges import percentile_range, value_range
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.config.stages import CalibrationMethod

LAW = settings(derandomize=True, deadline=None, max_examples=60)
FLOATS = st.floats(-1e6, 1e6, width=32)
VALUES = arrays(np.float32, st.integers(1, 60), elements=FLOATS)
METHODS: tuple[CalibrationMethod, ...] = ("minmax", "percentile", "entropy", "mse")


def counted(*parts: NDArray[np.float32]) -> TensorStatistics:
    """Statistics of the parts, updated one after the other."""
    statistics = TensorStatistics()
    for part in parts:
        statistics.update(part)
    return statistics


def content(statistics: TensorStatistics) -> bytes:
    """Every byte of the statistics; a zero extreme counts as one value whatever its sign."""
    extremes = np.array([statistics.lo, statistics.hi], np.float32) + np.float32(0)
    return statistics.counts.tobytes() + extremes.tobytes()


@LAW
@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_knows_no_order(parts: list[NDArray[np.float32]], random: st.Random) -> None:
    """Shards merged in any order are one pass over all of them, byte for byte."""
    shards = [counted(part) for part in parts]
    random.shuffle(shards)
    assert content(reduce(TensorStatistics.merge, shards)) == content(counted(*parts))


@LAW
@given(VALUES, VALUES, VALUES)
def test_merging_knows_no_grouping(a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]) -> None:
    """Merging is associative and commutative, byte for byte."""
    x, y, z = counted(a), counted(b), counted(c)
    assert content(x.merge(y).merge(z)) == content(x.merge(y.merge(z)))
    assert content(x.merge(y)) == content(y.merge(x))


class Elsewhere(Executor):
    """Runs a task at once, on copies as another process would have them."""

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        """Done when it is given."""
        future: Future[Any] = Future()
        work, arguments = pickle.loads(pickle.dumps((fn, args)))  # noqa: S301  our own
        future.set_result(pickle.loads(pickle.dumps(work(*arguments))))  # noqa: S301  our own
        return future


NET = prepare(cnn(), where="test")
SAMPLES = samples_of(cnn(), 70)


def opened(n_samples: int, batch_size: int) -> ArrayReader:
    return ArrayReader({name: values[:n_samples] for name, values in SAMPLES.items()}, batch_size)


@settings(LAW, max_examples=25)
@given(st.integers(1, 70), st.integers(1, 12))
def test_shards_are_one_pass(n_samples: int, n_shards: int) -> None:
    """However many samples are cut into however many shards: the same parts, counts and extremes, byte for byte."""
    whole = observe_parts(NET, partial(opened, n_samples))
    sharded = observe_parts(NET, partial(opened, n_samples), sharding=Sharding(Elsewhere(), n_shards))
    assert sharded.samples == whole.samples
    assert list(sharded.counted) == list(whole.counted)
    for name, parts in whole.counted.items():
        for one, other in zip(parts, sharded.counted[name], strict=True):
            assert content(one.merge(TensorStatistics())) == content(other.merge(TensorStatistics()))


@LAW
@given(VALUES, FLOATS, FLOATS)
def test_clipping_commutes_with_counting(values: NDArray[np.float32], one: float, other: float) -> None:
    """Statistics of clipped values are the clipped statistics of the values."""
    lo, hi = sorted((abs(one), -abs(other)))
    got, want = counted(values).clipped(lo, hi), counted(np.clip(values, np.float32(lo), np.float32(hi)))
    assert (got.lo, got.hi, got.size) == (want.lo, want.hi, want.size)
    for side in range(2):
        np.testing.assert_array_equal(got.side_counts()[side][1:], want.side_counts()[side][1:])


@LAW
@given(VALUES, st.sampled_from(METHODS), st.floats(0.51, 1.0))
def test_ranges_contain_zero(values: NDArray[np.float32], method: CalibrationMethod, share: float) -> None:
    """Every range contains zero and lies within the observed values extended to zero."""
    lo, hi = value_range(counted(values), method, percentile=share)
    assert min(0.0, float(values.min())) <= lo <= 0.0 <= hi <= max(0.0, float(values.max()))


@LAW
@given(VALUES, st.floats(0.51, 1.0), st.floats(0.51, 1.0))
def test_percentile_is_monotone_and_covers(values: NDArray[np.float32], one: float, other: float) -> None:
    """A larger share gives a range at least as wide, and the share lies inside its range."""
    small, large = sorted((one, other))
    inner, outer = (percentile_range(counted(values), share) for share in (small, large))
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]
    assert np.count_nonzero((inner[0] <= values) & (values <= inner[1])) >= small * values.size - 1e-9


@LAW
@given(VALUES, st.sampled_from(METHODS), st.sampled_from([(0, 255), (-128, 127)]))
def test_dequantized_is_within_half_a_step(
    values: NDArray[np.float32], method: CalibrationMethod, limits: tuple[int, int]
) -> None:
    """Inside its range a value comes back within half a step (one, where the zero point was rounded against it)."""
    lo, hi = value_range(counted(values), method, percentile=0.9)
    q_type = np.uint8 if limits[0] == 0 else np.int8
    q_min, q_max = (np.array(limit, q_type) for limit in limits)
    zero_point, scale = compute_scale_zp(np.array(lo, np.float32), np.array(hi, np.float32), q_min, q_max)
    real, step, zero = values.astype(np.float64), float(scale), int(zero_point)
    inside = (real >= (limits[0] - zero) * step) & (real <= (limits[1] - zero) * step)
    back = (np.clip(np.rint(real / step) + zero, *limits) - zero) * step
    assert np.all(np.abs(back - real)[inside] <= step / 2 * (1 + 1e-9))
    covered = (real >= lo) & (real <= hi)
    assert np.all(np.abs(back - real)[covered] <= step * (1 + 1e-6))

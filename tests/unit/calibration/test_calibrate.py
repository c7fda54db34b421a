"""One pass over the samples: complete, exact, bounded in memory, and kept without loss."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import reduce
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from onnxshrink.calibration import parts
from onnxshrink.calibration.calibrate import Calibration, load_calibration, observe_all, ranges_of, save_calibration
from onnxshrink.calibration.masks import masked_tensors
from onnxshrink.calibration.observe import Derived, observed_model, plan_of, tensors_to_calibrate
from onnxshrink.calibration.prepare import QUANTIZABLE_OP_TYPES, prepare
from onnxshrink.calibration.statistics import TensorStatistics
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.events import Silent
from onnxshrink.core.tensors import Batch

SAMPLES = nets.samples_of(nets.cnn(), 40)


class OrtReader(CalibrationDataReader):  # type: ignore[misc]
    """The same batches, as ONNX Runtime's calibrators want them."""

    def __init__(self, reader: nets.ArrayReader) -> None:
        self.batches = iter(reader)

    def get_next(self) -> Batch | None:
        """The next batch, or None at the end."""
        return next(self.batches, None)


def observed(model: onnx.ModelProto, reader: nets.ArrayReader) -> Calibration:
    """The calibration of a model on a reader's samples, whatever batch size is asked for."""
    return observe_all(prepare(model, where="test"), lambda _: reader)


@pytest.mark.parametrize("model", [nets.cnn(), nets.attention(mark=-100.0)], ids=["cnn", "attention"])
def test_minmax_is_that_of_onnxruntime(model: onnx.ModelProto, tmp_path: Path) -> None:
    """The tensors are those of ONNX Runtime's MinMax calibrator, and so are their extremes, to the last bit."""
    reader = nets.ArrayReader(nets.samples_of(model, 40))
    onnx.save(model, tmp_path / "model.onnx")
    augmented = (tmp_path / "augmented.onnx").as_posix()
    theirs = create_calibrator(
        tmp_path / "model.onnx", list(QUANTIZABLE_OP_TYPES), augmented, calibrate_method=CalibrationMethod.MinMax
    )
    theirs.collect_data(OrtReader(reader))
    want = {name: tuple(np.ravel(data.range_value).tolist()) for name, data in theirs.compute_data().items()}
    ours = observed(model, reader).tensors
    assert {name: (float(statistics.lo), float(statistics.hi)) for name, statistics in ours.items()} == want


def test_derived_statistics_are_those_observed() -> None:
    """Relu, Clip and Flatten need no counting: what is derived equals what counting them gives."""
    model = prepare(nets.cnn(), where="test")
    plan = plan_of(model)
    assert {tensor.name for tensor in plan.derived} == {"r1", "k2", "f"}
    shown = nets.cnn()
    shown.graph.output.extend(
        helper.make_tensor_value_info(tensor.name, onnx.TensorProto.FLOAT, None) for tensor in plan.derived
    )
    from onnxshrink.runtime.session import Session

    values = Session(shown.SerializeToString(), optimization="disabled").run(SAMPLES)
    found = observed(nets.cnn(), nets.ArrayReader(SAMPLES)).tensors
    for tensor in plan.derived:
        counted = TensorStatistics()
        counted.update(values[tensor.name] + np.float32(0))
        np.testing.assert_array_equal(found[tensor.name].side_counts()[0][1:], counted.side_counts()[0][1:])
        assert found[tensor.name].hi == counted.hi


def opened(batch_size: int) -> nets.ArrayReader:
    """The samples, for shards in threads and processes."""
    return nets.ArrayReader(SAMPLES, batch_size)


def opened_bad(batch_size: int) -> nets.ArrayReader:
    """The same, with a NaN in sample 29."""
    bad = SAMPLES["x"].copy()
    bad[29, 0, 0, 0] = np.nan
    return nets.ArrayReader({"x": bad}, batch_size)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    """Two processes; spawned, for ONNX Runtime's threads do not survive a fork."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def file_of(calibration: Calibration, folder: Path) -> bytes:
    """The bytes that a calibration is kept as."""
    return save_calibration(calibration, folder).read_bytes()


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_shards_in_threads_are_one_pass(shards: int, tmp_path: Path) -> None:
    """Shards on threads, more than batches too, give the file of one pass byte for byte."""
    model = prepare(nets.cnn(), where="test")
    with ThreadPoolExecutor(2) as pool:
        sharded = observe_all(model, opened, sharding=parts.Sharding(pool, shards))
    assert file_of(sharded, tmp_path) == file_of(observe_all(model, opened), tmp_path)


@pytest.mark.slow
def test_shards_in_processes_are_one_pass(processes: Executor, tmp_path: Path) -> None:
    """Shards in processes give the file of one pass byte for byte."""
    model = prepare(nets.cnn(), where="test")
    sharded = observe_all(model, opened, sharding=parts.Sharding(processes, 3))
    assert file_of(sharded, tmp_path) == file_of(observe_all(model, opened), tmp_path)


@pytest.mark.slow
def test_errors_come_back_from_processes(processes: Executor) -> None:
    """A shard's error names the sample by its number in the whole stream."""
    with pytest.raises(DataError, match="sample 29"):
        observe_all(prepare(nets.cnn(), where="test"), opened_bad, sharding=parts.Sharding(processes, 3))


def test_shards_end_in_time_and_none_is_left_at_work() -> None:
    """At the given moment each ends after the batch it is at; those not begun never are."""
    model = prepare(nets.cnn(), where="test")
    begun: list[int] = []
    shards: list[Future[Any]] = []

    class OneByOne(ThreadPoolExecutor):
        def submit(self, fn: Any, /, *args: Any, **more: Any) -> Future[Any]:
            """Remembered."""
            shards.append(super().submit(fn, *args, **more))
            return shards[-1]

    def until_others_are_called_off(batch_size: int) -> nets.ArrayReader:
        if threading.current_thread() is not threading.main_thread():
            begun.append(batch_size)
            end = time.monotonic() + 60
            while len(begun) == 2 and not shards[-1].cancelled() and time.monotonic() < end:
                time.sleep(0.001)
        return opened(batch_size)

    with OneByOne(1) as pool, pytest.raises(TimeoutError):
        observe_all(model, until_others_are_called_off, sharding=parts.Sharding(pool, 8, until=time.time()))
    assert len(begun) in {1, 2}  # the second may be begun before the others are called off, or be one of them
    assert [shard.cancelled() for shard in shards] == [False] * len(begun) + [True] * (8 - len(begun))


def test_a_shard_that_was_lost_with_its_worker_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that does not answer holds nobody beyond the time and a grace."""
    monkeypatch.setattr(parts, "_GRACE_SECONDS", 0.05)

    class Gone(Executor):
        def submit(self, fn: Any, /, *_: Any, **__: Any) -> Future[Any]:
            """Never done, and it cannot be called off."""
            del fn
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()
            return future

    with pytest.raises(TimeoutError):
        observe_all(prepare(nets.cnn(), where="test"), opened, sharding=parts.Sharding(Gone(), 2, until=time.time()))


def test_shards_merge_in_any_order(tmp_path: Path) -> None:
    """Every order of merging three shards gives the same file; so do the parts, kept apart."""
    model = prepare(nets.cnn(), where="test")
    plan = plan_of(model)
    work = parts._Shards(observed_model(model, plan), plan, opened, 2, "test")
    shards = [work.count(index, 3) for index in range(3)]
    orders = [reduce(parts.Observed.merge, order) for order in permutations(shards)]
    assert {order.samples for order in orders} == {(10, 10, 10, 10)}
    assert len({file_of(Calibration.of(order), tmp_path) for order in orders}) == 1
    for name in orders[0].counted:
        assert len({order.statistics(name, [1, 2]).counts.tobytes() for order in orders}) == 1


def test_samples_go_to_the_parts_in_turn() -> None:
    """Part ``i`` holds every fourth batch, so sorted samples are spread; derived tensors follow in each part."""
    x = np.arange(40, dtype=np.float32).reshape(40, 1) - 20
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="a"), helper.make_node("Sigmoid", ["h"], ["y"], name="b")]
    model = prepare(nets.model_of(nodes, {"x": ["N", 1]}, {"y": ["N", 1]}, {}), where="test")
    observed = parts.observe_parts(model, lambda batch_size: nets.ArrayReader({"x": x}, batch_size))
    assert observed.samples == (10, 10, 10, 10)
    extremes = [(float(s.lo), float(s.hi)) for s in (observed.statistics("x", [part]) for part in range(4))]
    assert extremes == [(-20, 13), (-18, 15), (-16, 17), (-14, 19)]
    derived = observed.statistics("h", [0, 3])
    assert (float(derived.lo), float(derived.hi), derived.size) == (0, 19, 20)


def test_kept_without_loss(tmp_path: Path) -> None:
    """What is written reads back as it was: samples, order of tensors, counts and extremes."""
    calibration = observed(nets.cnn(), nets.ArrayReader(SAMPLES))
    save_calibration(calibration, tmp_path)
    back = load_calibration(tmp_path)
    assert back.samples == 40
    assert list(back.tensors) == list(calibration.tensors)
    for name, statistics in calibration.tensors.items():
        np.testing.assert_array_equal(back.tensors[name].counts, statistics.counts)
        assert (back.tensors[name].lo, back.tensors[name].hi) == (statistics.lo, statistics.hi)


def test_nothing_observed_is_kept_too(tmp_path: Path) -> None:
    """A calibration without tensors is written and read like any other."""
    save_calibration(Calibration(3, {}), tmp_path)
    assert load_calibration(tmp_path) == Calibration(3, {})


WRITE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import onnx_models as nets
from onnxshrink.calibration.calibrate import observe_all, save_calibration
from onnxshrink.calibration.prepare import prepare
model = nets.cnn()
reader = nets.ArrayReader(nets.samples_of(model, 40))
save_calibration(observe_all(prepare(model, where="test"), lambda _: reader), Path(sys.argv[2]))
"""


def test_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    """The file depends on the samples and the model, not on the process, its hash seed or the time."""
    command = [sys.executable, "-c", WRITE, str(Path(nets.__file__).parent), str(tmp_path)]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "1"})
    theirs = (tmp_path / "statistics.npz").read_bytes()
    save_calibration(observed(nets.cnn(), nets.ArrayReader(SAMPLES)), tmp_path)
    assert (tmp_path / "statistics.npz").read_bytes() == theirs


def test_batch_follows_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is as large as one sample's activations allow, from 1 to 4, and leaves 16 batches if it can."""
    asked: list[int] = []

    def batch_of(count: int, limit_bytes: int) -> int:
        def open_samples(batch_size: int) -> nets.ArrayReader:
            asked.append(batch_size)
            return nets.ArrayReader({"x": np.ones((count, 3, 16, 16), np.float32)}, batch_size)

        monkeypatch.setattr(parts, "BATCH_BYTES", limit_bytes)
        observe_all(model, open_samples)
        return asked[-1]

    model = prepare(nets.cnn(), where="test")
    per_sample = 4 * (3 * 256 + 4 * 8 * 256 + 8 + 10)
    assert batch_of(300, 1 << 26) == 4
    assert batch_of(300, 3 * per_sample) == 3
    assert batch_of(300, 1) == 1
    assert batch_of(64, 1 << 26) == 4
    assert batch_of(50, 1 << 26) == 3
    assert batch_of(3, 1 << 26) == 1


def test_progress_counts_samples() -> None:
    """Progress tells samples done of all samples, up to the last."""

    class Told(Silent):
        steps: list[tuple[int, int]] = []  # noqa: RUF012 (one test, one listener)

        def progress(self, step: str, done: int, total: int, detail: str = "") -> None:  # noqa: ARG002
            self.steps.append((done, total))

    told = Told()
    observe_all(prepare(nets.cnn(), where="test"), lambda _: nets.ArrayReader(SAMPLES), events=told)
    assert told.steps == [(16, 40), (32, 40), (40, 40)]


def test_not_finite_activation_is_named() -> None:
    """An activation that overflows is an error that names the tensor and the sample."""
    node = helper.make_node("Mul", ["x", "big"], ["h"], name="scale")
    relu = helper.make_node("Relu", ["h"], ["y"])
    weights = {"big": np.array(3e38, np.float32)}
    model = nets.model_of(
        [node, relu], {"x": ["N", 2]}, {"y": ["N", 2]}, weights | {"big": np.full(2, 1e8, np.float32)}
    )
    samples = np.ones((20, 2), np.float32)
    samples[18, 1] = 1e38
    with pytest.raises(DataError, match="activation 'h' holds inf on sample 18"):
        observed(model, nets.ArrayReader({"x": samples}))


def test_no_samples_is_an_error() -> None:
    """An empty reader is refused."""
    with pytest.raises(DataError, match="no calibration samples"):
        observed(nets.cnn(), nets.ArrayReader({"x": np.zeros((0, 3, 16, 16), np.float32)}))


def test_inputs_may_change_their_shape() -> None:
    """Batches of different spatial sizes are counted together."""
    nodes = [helper.make_node("Relu", ["x"], ["h"], name="a"), helper.make_node("Sigmoid", ["h"], ["y"], name="b")]
    model = nets.model_of(nodes, {"x": ["N", "length"]}, {"y": ["N", "length"]}, {})

    class Ragged(nets.ArrayReader):
        def __iter__(self):  # type: ignore[no-untyped-def]  # noqa: ANN204
            yield from ({"x": np.ones((2, length), np.float32)} for length in (3, 5))

    found = observed(model, Ragged({"x": np.zeros((4, 1), np.float32)}))
    assert found.samples == 4
    assert found.tensors["y"].size == 2 * 3 + 2 * 5


def test_ranges_leave_out_what_is_unfit() -> None:
    """Tensors that shall stay in float get no range."""
    calibration = observed(nets.cnn(), nets.ArrayReader(SAMPLES))
    ranges = ranges_of(calibration, "mse", leave_out={"c1": "why"})
    assert set(ranges) == set(calibration.tensors) - {"c1"}


def test_degenerate_tensors_are_told() -> None:
    """A tensor that the samples never make vary is listed."""
    reader = nets.ArrayReader({"x": np.zeros((4, 3, 16, 16), np.float32)})
    assert "x" in observed(nets.cnn(), reader).degenerate()


def test_masks_are_found_in_the_graph() -> None:
    """A mark spreads through what masks are built from, and ends at softmax; bounds of Clip are no marks."""
    assert set(masked_tensors(nets.attention())) == {"mark", "m", "sm"}
    clip = helper.make_node("Clip", ["x", "lo", "hi"], ["y"])
    bounds = {"lo": np.array(-3.4e38, np.float32), "hi": np.array(3.4e38, np.float32)}
    assert masked_tensors(nets.model_of([clip], {"x": ["N", 2]}, {"y": ["N", 2]}, bounds)) == {}


def test_infinite_mask_is_no_error() -> None:
    """A mask of minus infinity, as torch exports it, is left in float and not taken for an overflow."""
    value = helper.make_tensor("v", onnx.TensorProto.FLOAT, [], [-np.inf])
    nodes = [
        helper.make_node("Constant", [], ["inf"], value=value),
        helper.make_node("Greater", ["keep", "half"], ["on"]),
        helper.make_node("Where", ["on", "x", "inf"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"], axis=-1),
    ]
    inputs: dict[str, list[int | str]] = {"x": ["N", 4], "keep": ["N", 4]}
    model = nets.model_of(nodes, inputs, {"y": ["N", 4]}, {"half": np.array(0.5, np.float32)})
    samples = nets.samples_of(model, 8)
    samples["keep"][:] = [1, 1, 0, 1]
    found = observed(model, nets.ArrayReader(samples)).tensors
    assert "masked" not in found
    assert found["y"].hi <= 1


def test_nodes_get_names_that_depend_on_the_model_alone() -> None:
    """A node without a name is called after its type and place, beside whatever names there are."""
    model = nets.cnn()
    model.graph.node[1].name = ""
    model.graph.node[2].name = "Relu_1"
    names = [node.name for node in prepare(model, where="test").graph.node]
    assert names[1:3] == ["Relu_1_1", "Relu_1"]
    assert len(set(names)) == len(names)
    assert model.graph.node[1].name == ""


def test_float16_is_refused() -> None:
    """A model that computes in half precision is refused, with the way out."""
    model = nets.cnn()
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    model.graph.node.pop(0)
    with pytest.raises(ModelError, match="16-bit"):
        prepare(model, where="test")


def test_calibrated_tensors_are_in_graph_order() -> None:
    """The selection is ordered by the graph, not by a set's whim."""
    names = tensors_to_calibrate(prepare(nets.cnn(), where="test"))
    assert names == ("x", "c1", "r1", "c2", "k2", "c3", "a3", "p", "f", "y")


def test_bounds_and_marks_are_read_from_any_attribute() -> None:
    """Constants that hold their number in ``value_float`` bound a Clip, and mark a mask, as any other."""
    nodes = [
        helper.make_node("Constant", [], ["lo"], value_float=0.0),
        helper.make_node("Constant", [], ["hi"], value_floats=[6.0]),
        helper.make_node("Squeeze", ["hi"], ["six"]),
        helper.make_node("Constant", [], ["mark"], value_float=-1e9),
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Clip", ["a", "lo"], ["c"], name="clip"),
        helper.make_node("Clip", ["c", "lo", "six"], ["d"], name="computed"),
        helper.make_node("Mul", ["d", "mark"], ["m"], name="mask"),
        helper.make_node("MatMul", ["m", "w"], ["y"], name="last"),
    ]
    model = nets.model_of(nodes, {"x": ["N", 4]}, {"y": ["N", 4]}, {"w": np.eye(4, dtype=np.float32)})
    plan = plan_of(prepare(model, where="test"))
    assert Derived("c", "a", lo=0.0) in plan.derived
    assert "m" in plan.masked
    assert "d" not in [rule.name for rule in plan.derived]


def test_what_holds_no_samples_is_not_counted() -> None:
    """A scalar and a table that come first are no samples, and calibration sees all that are."""
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["s"], name="scaled"),
        helper.make_node("ReduceMean", ["table"], ["m"], name="mean", axes=[0], keepdims=0),
        helper.make_node("Add", ["s", "m"], ["y"], name="sum"),
    ]
    model = nets.model_of(nodes, {"scale": [], "table": [1000, 3], "x": ["N", 3]}, {"y": ["N", 3]}, {})
    x = np.arange(60, dtype=np.float32).reshape(20, 3)

    class Constants(nets.ArrayReader):
        """Adds the scalar and the table to every batch, first."""

        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                yield {"scale": np.asarray(2, np.float32), "table": np.zeros((1000, 3), np.float32), **batch}

    found = observed(model, Constants({"x": x}))
    assert found.samples == 20
    assert (found.tensors["s"].lo, found.tensors["s"].hi) == (0, 118)

"""What is measured on real sessions and files: drift, footprint, quality and latency of small models."""

from __future__ import annotations

import gzip
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxshrink.config.gates import Target
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.errors import ConfigError, DataError, ModelError
from onnxshrink.core.events import Silent
from onnxshrink.core.report import Metric
from onnxshrink.core.tensors import Batch, TensorSpec
from onnxshrink.data.batching import n_samples
from onnxshrink.runtime.session import Session
from onnxshrink.verify.drift import match_outputs, measure_drift
from onnxshrink.verify.footprint import measure_footprint
from onnxshrink.verify.verify import _tell_time, latency_batch, measure_latency, measure_quality

RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(6, 4)).astype(np.float32)
X = RNG.normal(size=(50, 6)).astype(np.float32)
LABELS = (X @ WEIGHT).argmax(1)


def linear(weight: np.ndarray, outputs: tuple[str, ...] = ("logits",), batch: int | str = "batch") -> onnx.ModelProto:
    """``x @ weight`` under each of the output names."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], [name]) for name in outputs],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, weight.shape[0]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, weight.shape[1]]) for name in outputs],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def session(model: onnx.ModelProto) -> Session:
    """Opened in memory."""
    return Session(model.SerializeToString(), name="linear")


def artifact(folder: Path, weight: np.ndarray) -> Artifact:
    """A linear model as an artifact."""
    folder.mkdir()
    onnx.save(linear(weight), folder / "model.onnx")
    return Artifact("onnx", folder, digest_folder(folder))


class Samples:
    """``X`` in batches of 16."""

    where = "memory"

    def __init__(self, x: np.ndarray = X) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[Batch]:
        return ({"x": self.x[i : i + 16]} for i in range(0, len(self.x), 16))

    def shard(self, index: int, count: int) -> Samples:
        """Every ``count``-th sample."""
        return Samples(self.x[index::count])


class Told(Silent):
    """Keeps steps and their progress."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int, str]] = []
        self.started_steps: list[str] = []
        self.finished_steps: list[tuple[str, float, bool]] = []

    def started(self, step: str) -> None:
        """One that began."""
        self.started_steps.append(step)

    def finished(self, step: str, seconds: float, *, cached: bool) -> None:
        """One that ended."""
        self.finished_steps.append((step, seconds, cached))

    def progress(self, step: str, done: int, total: int, detail: str = "") -> None:
        """One line of it."""
        self.steps.append((step, done, total, detail))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run over an archive of ``X`` with labels, quickly measured."""
    np.savez(tmp_path / "data.npz", x=X, labels=LABELS)
    artifact(tmp_path / "source", WEIGHT)
    raw: dict[str, Any] = {
        "model": {"onnx": "source/model.onnx"},
        "data": {"evaluation": {"npz": "data.npz", "metric": "top1"}},
        "targets": [{"latency_seconds": 0.1}, {"batch": 64, "latency_seconds": 0.1}],
    }
    return RunConfig.model_validate(raw, context={"base": str(tmp_path)})


def named(metrics: tuple[Metric, ...]) -> dict[str, Metric]:
    """Metrics by name, the first of each."""
    return {metric.name: metric for metric in reversed(metrics)}


def test_drift_equals_numpy() -> None:
    """The metrics of two linear models are numpy's, and the worst sample is named."""
    other = WEIGHT + 0.01
    reference, candidate = session(linear(WEIGHT)), session(linear(other))
    metrics = named(measure_drift(reference, candidate, Samples(), "cpu"))
    a, b = (s.run({"x": X})["logits"].astype(np.float64) for s in (reference, candidate))
    assert metrics["sqnr_db"].value == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), rel=1e-5)
    assert metrics["top1_agreement"].value == (a.argmax(1) == b.argmax(1)).mean()
    assert metrics["max_abs_error"].note == f"worst at sample {np.abs(a - b).max(1).argmax()}"
    assert {(m.target, m.output) for m in metrics.values()} == {("cpu", "logits")}


def test_identical_models_say_so() -> None:
    """No finite SQNR, the note 'identical', and everything else exact."""
    metrics = named(measure_drift(session(linear(WEIGHT)), session(linear(WEIGHT)), Samples(), "cpu"))
    assert (metrics["sqnr_db"].value, metrics["sqnr_db"].note) == (None, "identical")
    assert (metrics["max_abs_error"].value, metrics["cosine"].value) == (0.0, 1.0)
    assert metrics["max_abs_error"].note is None


def test_nan_in_a_candidate_leaves_no_number() -> None:
    """A candidate that gives NaN has no measure of drift at all, and each says why."""
    broken = session(linear(np.full_like(WEIGHT, np.nan)))
    metrics = measure_drift(session(linear(WEIGHT)), broken, Samples(), "cpu")
    assert {(m.value, m.note) for m in metrics} == {(None, "candidate gives NaN")}
    assert {"sqnr_db", "cosine", "top1_agreement"} <= {m.name for m in metrics}


def test_outputs_match_by_name_then_by_position() -> None:
    """Order does not matter where names agree; else as many outputs as the reference, or an error with both lists."""
    assert match_outputs(["a", "b"], ["b", "c", "a"], where="m") == {"a": "a", "b": "b"}
    assert match_outputs(["a", "b"], ["x", "y"], where="m") == {"a": "x", "b": "y"}
    with pytest.raises(ModelError, match=r"(?s)cannot be matched.*x.*a, b"):
        match_outputs(["a", "b"], ["x"], where="m")


def test_other_interface_and_no_samples_are_errors() -> None:
    """Outputs of another width, and a reader without samples."""
    with pytest.raises(ModelError, match="differ in the shape"):
        measure_drift(session(linear(WEIGHT)), session(linear(WEIGHT[:, :3])), Samples(), "cpu")
    with pytest.raises(DataError, match="no samples"):
        measure_drift(session(linear(WEIGHT)), session(linear(WEIGHT)), Samples(X[:0]), "cpu")


def test_footprint_counts_every_file(tmp_path: Path) -> None:
    """Bytes are those on disk, external data included; compressed is gzip's; parameters are the elements."""
    weight = np.zeros((64, 64), np.float32)
    path = tmp_path / "model.onnx"
    onnx.save(linear(weight), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    metrics = named(measure_footprint(path))
    files = [path, tmp_path / "weights.bin"]
    assert metrics["size_bytes"].value == sum(file.stat().st_size for file in files)
    assert metrics["compressed_bytes"].value == sum(len(gzip.compress(f.read_bytes(), 6)) for f in files)
    assert metrics["parameters"].value == 64 * 64
    assert metrics["sparsity"].value == 1.0


def test_quality_of_a_variant(tmp_path: Path, config: RunConfig) -> None:
    """Footprint once, drift and accuracy per target, the drop against the original; the same each time."""
    reference, candidate = artifact(tmp_path / "a", WEIGHT), artifact(tmp_path / "b", WEIGHT[:, ::-1].copy())
    told = Told()
    common: dict[str, Any] = {"reference": reference, "config": config, "events": told}
    original = measure_quality(name="o", role="original", artifact=reference, original_scores=None, **common)
    assert named(original.metrics)["top1"].value == 1.0
    assert {m.name for m in original.metrics}.isdisjoint({"sqnr_db", "accuracy_drop"})
    again = [
        measure_quality(name="v", role="variant", artifact=candidate, original_scores=original.scores, **common)
        for _ in range(2)
    ]
    assert again[0].metrics == again[1].metrics
    metrics = again[0].metrics
    assert [m.target for m in metrics if m.name == "accuracy_drop"] == ["cpu", "cpu, batch 64"]
    right = (X @ WEIGHT[:, ::-1]).argmax(1) == LABELS
    assert named(metrics)["accuracy_drop"].value == pytest.approx(1 - right.mean())
    assert ("verify/v", 50, 50, "drift on cpu") in told.steps
    assert ("verify/v", 50, 50, "accuracy on cpu") in told.steps


def test_without_data_only_the_file_is_weighed(tmp_path: Path, config: RunConfig) -> None:
    """No evaluation data: no drift, no accuracy, and no failure; a sample's MACs are 6 by 4, none of them integer."""
    model = artifact(tmp_path / "a", WEIGHT)
    bare = config.model_copy(update={"data": config.data.model_copy(update={"evaluation": None})})
    quality = measure_quality(
        name="v", role="variant", artifact=model, reference=model, original_scores=None, config=bare, events=Silent()
    )
    names = {metric.name for metric in quality.metrics}
    assert names == {"size_bytes", "compressed_bytes", "parameters", "sparsity", "macs", "integer_coverage"}
    values = named(quality.metrics)
    assert (values["macs"].value, values["integer_coverage"].value, values["sparsity"].value) == (24.0, 0.0, 0.0)
    assert not quality.scores


def test_latency_of_the_reference_is_one(tmp_path: Path, config: RunConfig) -> None:
    """The reference against itself has the ratio 1, exactly, with times of its own, on each target."""
    model = artifact(tmp_path / "a", WEIGHT)
    told = Told()
    metrics = measure_latency(name="r", artifact=model, reference=model, config=config, events=told).metrics
    ratios = [metric for metric in metrics if metric.name == "latency_ratio"]
    assert [(m.value, m.lo, m.hi, m.note) for m in ratios] == [(1.0, 1.0, 1.0, "the reference itself")] * 2
    times = [[m.value for m in metrics if m.name == name] for name in ("latency_p50_ms", "reference_latency_p50_ms")]
    assert times[0] == times[1]
    assert all(value is not None and value > 0 for value in times[0])
    assert {step[3] for step in told.steps} == {"on cpu", "on cpu, batch 64"}
    assert all(0 <= done <= total for _, done, total, _ in told.steps)


def test_latency_is_a_step_with_an_end(tmp_path: Path, config: RunConfig) -> None:
    """It begins before its progress and ends once with what it took: no bar of it is left. None where unasked."""
    model = artifact(tmp_path / "a", WEIGHT)
    told = Told()
    before = time.perf_counter()
    details = measure_latency(name="r", artifact=model, reference=model, config=config, events=told).details["latency"]
    whole = time.perf_counter() - before
    timed = sum(np.sum(d["candidate_ns"]) * d["inner_calls"] / 1e9 for d in details.values())  # the reference's as well
    assert {step[0] for step in told.steps} == {"latency/r"}
    assert told.started_steps == ["latency/r"]
    ((name, seconds, cached),) = told.finished_steps
    assert (name, cached) == ("latency/r", False)
    assert 0 < timed < seconds < whole  # the time asked for is a limit: a measurement may be done before it is up
    assert {total for _, _, total, _ in told.steps} <= {100, 400}
    untimed = [target.model_copy(update={"latency": False}) for target in config.targets]
    unasked = Told()
    assert not measure_latency(
        name="r", artifact=model, reference=model, config=config.model_copy(update={"targets": untimed}), events=unasked
    ).metrics
    assert unasked.started_steps == []


def test_progress_is_of_the_usual_time_and_then_of_the_longest() -> None:
    """Milliseconds; a round that ends after the time is up does not lead beyond it."""
    told: list[tuple[int, int]] = []
    for seconds in (0.05, 0.1, 0.2, 0.4, 9.0):
        _tell_time(lambda done, total: told.append((done, total)), 0.1, seconds)
    assert told == [(50, 100), (100, 100), (200, 400), (400, 400), (400, 400)]


def test_latency_states_its_conditions(tmp_path: Path, config: RunConfig) -> None:
    """Beside the figures stands, by target, what they hold for, and the times they were made of."""
    cores = os.sched_getaffinity(0)
    core = min(cores)
    quick = {"latency_seconds": 0.1}
    targets = (Target(spinning=False, affinity=(core,), **quick), Target(batch=8, threads=2, **quick))
    config = config.model_copy(update={"targets": targets})
    reference, candidate = artifact(tmp_path / "a", WEIGHT), artifact(tmp_path / "b", WEIGHT[:, ::-1].copy())
    latency = measure_latency(name="v", artifact=candidate, reference=reference, config=config, events=Silent())
    one, two = (latency.details["latency"][target.name] for target in config.targets)
    assert (one["threads"], one["spinning"], one["affinity"], one["copies"]) == (1, False, [core], "none")
    assert (one["cpu_clock"], two["cpu_clock"]) == ("thread", "process")
    assert (one["inputs"], two["inputs"]) == ({"x": "float32[1,6]"}, {"x": "float32[8,6]"})
    p50 = named(latency.metrics)["latency_p50_ms"].value
    kept = np.concatenate(one["candidate_ns"]) / 1e6
    assert kept.min() <= (p50 or 0) <= kept.max()
    assert os.sched_getaffinity(0) == cores


def test_latency_inputs_are_real_samples(config: RunConfig) -> None:
    """The first samples of the data; repeated where there are fewer than the batch."""
    specs = (TensorSpec("x", "float32", ("batch", 6)),)
    assert np.array_equal(latency_batch(config, specs, 8)["x"], X[:8])
    wide = latency_batch(config, specs, 64)["x"]
    assert np.array_equal(wide, np.concatenate([X, X[:14]]))
    assert len(latency_batch(config, (TensorSpec("x", "float32", (5, 6)),), 1)["x"]) == 5


def test_latency_inputs_without_data(config: RunConfig) -> None:
    """Seeded noise of the model's shapes and dtypes; an axis without a length is an error that names it."""
    bare = config.model_copy(update={"data": config.data.model_copy(update={"evaluation": None})})
    specs = (TensorSpec("x", "float16", ("batch", 6)), TensorSpec("ids", "int64", (1, 3)), TensorSpec("s", "bool", ()))
    first, second = (latency_batch(bare, specs, 2) for _ in range(2))
    assert [(a.shape, str(a.dtype)) for a in first.values()] == [((2, 6), "float16"), ((1, 3), "int64"), ((), "bool")]
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(DataError, match=r"(?s)'height'.*data.evaluation"):
        latency_batch(bare, (TensorSpec("x", "float32", ("batch", 3, "height", 8)),), 1)


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """A linear model in float16."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    weight = numpy_helper.to_array(model.graph.initializer[0]).astype(np.float16)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    return model


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A linear model whose input is called ``pixels``."""
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    return model


def saved(folder: Path, model: onnx.ModelProto) -> Artifact:
    """The model as an artifact."""
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return Artifact("onnx", folder, digest_folder(folder))


@pytest.mark.parametrize(
    ("reference", "candidate", "note"),
    [
        (linear(WEIGHT), renamed(linear(WEIGHT)), "identical"),
        (linear(WEIGHT), half(linear(WEIGHT)), "inputs cast to float16"),
        (linear(WEIGHT, batch=5), linear(WEIGHT), "identical"),
        (linear(WEIGHT), linear(WEIGHT, batch=5), "identical"),
    ],
    ids=["renamed", "half", "fixed reference", "fixed candidate"],
)
def test_models_of_other_interfaces_are_measured_on_the_same_samples(
    tmp_path: Path, config: RunConfig, reference: onnx.ModelProto, candidate: onnx.ModelProto, note: str
) -> None:
    """Names, float widths and a fixed batch on one side may differ: everything is measured all the same."""
    config = config.model_copy(update={"targets": config.targets[:1]})
    common: dict[str, Any] = {
        "name": "v",
        "artifact": saved(tmp_path / "b", candidate),
        "reference": saved(tmp_path / "a", reference),
        "config": config,
        "events": Silent(),
    }
    quality = named(measure_quality(role="variant", original_scores=None, **common).metrics)
    assert quality["sqnr_db"].note == note
    assert quality["top1"].value == pytest.approx(1.0, abs=0.05)
    assert quality["evaluation_samples"].value == len(X)
    assert named(measure_latency(**common).metrics)["latency_ratio"].value


def test_a_batch_that_the_model_cannot_take_is_refused(tmp_path: Path, config: RunConfig) -> None:
    """A latency at the model's own batch must not go by another; without a wish it is taken."""
    model = saved(tmp_path / "a", linear(WEIGHT, batch=5))
    targets = config.targets
    common: dict[str, Any] = {"name": "r", "artifact": model, "reference": model, "events": Silent()}
    assert measure_latency(config=config.model_copy(update={"targets": targets[:1]}), **common).metrics
    with pytest.raises(ConfigError, match=r"(?s)fixed to 5.*batch: 64"):
        measure_latency(config=config.model_copy(update={"targets": targets[1:]}), **common)


def test_a_table_is_no_samples() -> None:
    """What counts is the batch axis, wherever it stands among the inputs: neither a table of anchors nor a scalar."""
    specs = (
        TensorSpec("anchors", "float32", (1000, 4)),
        TensorSpec("scale", "float32", ()),
        TensorSpec("x", "float32", ("batch", 6)),
    )
    batch = {"anchors": np.zeros((1000, 4)), "scale": np.float32(1), "x": X[:7]}
    assert n_samples(batch, specs) == 7
    assert n_samples({"scale": np.asarray(1.0)}, specs[1:2]) == 1

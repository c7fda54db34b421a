"""Drift between targets, and which nodes of a model run where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnx_models import ArrayReader, cnn, model_of, samples_of

import onnxshrink.verify.verify as verify_module
from onnxshrink.config.gates import Gates, Target
from onnxshrink.config.run import RunConfig
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.errors import DataError
from onnxshrink.core.events import Silent
from onnxshrink.core.report import Candidate, Metric
from onnxshrink.runtime.session import Session
from onnxshrink.verify.across import compare_targets, differing, measure_across, parted
from onnxshrink.verify.gates import judge
from onnxshrink.verify.placement import evidence, misplaced
from onnxshrink.verify.verify import Quality, Row, measure_latency

CPU = "CPUExecutionProvider"
TARGETS = (Target(), Target(optimization="disabled", label="plain"), Target(threads=2))


def rounding(folder: Path) -> Path:
    """A network whose last bits change with the optimizer's fusions."""
    path = folder / "model.onnx"
    onnx.save(cnn(), path)
    return path


def test_each_target_is_compared_with_the_first_on_the_same_samples(tmp_path: Path) -> None:
    """Against numpy on the outputs of the two sessions, whole."""
    path, batch = rounding(tmp_path), samples_of(cnn(), 50)
    metrics = measure_across(path, TARGETS, lambda _: ArrayReader(batch, batch_size=16))
    first, plain = (Session(path, target).run(batch)["y"].astype(np.float64) for target in TARGETS[:2])
    assert np.abs(first - plain).max() > 0
    found = {metric.name: metric for metric in metrics if metric.target == "plain"}
    assert set(found) == {"across_max_abs_error", "across_sqnr_db", "across_top1_agreement"}
    assert all(metric.output == "y" and str(metric.note).startswith("from cpu") for metric in found.values())
    sqnr_db = 10 * np.log10(np.sum(first**2) / np.sum((first - plain) ** 2))
    assert found["across_sqnr_db"].value == pytest.approx(sqnr_db)
    assert found["across_max_abs_error"].value == pytest.approx(np.abs(first - plain).max())
    assert found["across_top1_agreement"].value == np.mean(first.argmax(1) == plain.argmax(1))
    same = next(metric for metric in metrics if metric.target == "cpu x2" and metric.name == "across_sqnr_db")
    assert same.value is None
    assert same.note == "from cpu; identical"


def test_samples_are_held_one_batch_at_a_time(tmp_path: Path) -> None:
    """A reader that lets go of each batch is enough: memory does not grow with the samples."""
    path, batch = rounding(tmp_path), samples_of(cnn(), 4)
    opened = []

    class Stream:
        """The same four samples, again and again, one batch alive at a time."""

        where = "stream"

        def __len__(self) -> int:
            return 40

        def __iter__(self) -> Any:
            for _ in range(10):
                opened.append(1)
                yield {name: array.copy() for name, array in batch.items()}

        def shard(self, index: int, count: int) -> Any:
            raise NotImplementedError

    seen: list[tuple[int, int]] = []
    metrics = measure_across(path, TARGETS, lambda _: Stream(), progress=lambda *done: seen.append(done))
    once = measure_across(path, TARGETS, lambda _: ArrayReader(batch))
    assert len(opened) == 10
    assert seen[-1] == (40, 40)
    errors = [[m.value for m in found if m.name == "across_max_abs_error"] for found in (metrics, once)]
    assert errors[0] == errors[1]


def test_no_samples_are_our_error(tmp_path: Path) -> None:
    """Nothing is called equal that was not compared."""
    empty = {name: array[:0] for name, array in samples_of(cnn(), 1).items()}
    with pytest.raises(DataError, match="no samples to compare targets"):
        measure_across(rounding(tmp_path), TARGETS, lambda _: ArrayReader(empty))


def test_targets_that_open_the_same_session_are_not_compared() -> None:
    """Batch and time for latency change no output."""
    first = Target(batch=1)
    assert differing((first, Target(batch=8), Target(latency=False, label="again"))) == (first,)
    assert len(differing((first, Target(threads=2), Target(provider="cuda"), Target(optimization="basic")))) == 4


def row_and_config(folder: Path, *targets: dict[str, Any]) -> tuple[Row, RunConfig]:
    """One variant, its reference the same file, and data for it."""
    (folder / "artifact").mkdir()
    onnx.save(cnn(), folder / "artifact" / "model.onnx")
    np.savez(folder / "x.npz", **samples_of(cnn(), 40))
    artifact = Artifact("onnx", folder / "artifact", digest_folder(folder / "artifact"))
    config = RunConfig.model_validate(
        {
            "model": {"onnx": str(folder / "artifact" / "model.onnx")},
            "data": {"evaluation": {"npz": str(folder / "x.npz")}},
            "targets": list(targets),
        }
    )
    return Row("int8", "variant", artifact, artifact), config


def test_what_shows_only_beside_another_target_is_added_to_a_row(tmp_path: Path) -> None:
    """One target adds nothing; a second level adds drift and, since both are the CPU, no placement."""
    row, config = row_and_config(tmp_path, {}, {"optimization": "disabled"})
    before = Quality((Metric("size_bytes", 1.0),), details={"drift": {}})
    after = compare_targets(before, row, config, Silent())
    assert after.metrics[0] == before.metrics[0]
    assert {(metric.name, metric.target) for metric in after.metrics[1:]} == {
        ("across_max_abs_error", "cpu, disabled"),
        ("across_sqnr_db", "cpu, disabled"),
        ("across_top1_agreement", "cpu, disabled"),
    }
    assert after.details == before.details
    alone = config.model_copy(update={"targets": config.targets[:1]})
    assert compare_targets(before, row, alone, Silent()) == before


def test_a_target_without_latency_is_not_timed_and_has_no_latency_gate(tmp_path: Path) -> None:
    """Its other gates stay."""
    row, config = row_and_config(tmp_path, {"latency_seconds": 0.05}, {"threads": 2, "latency": False})
    measured = measure_latency(
        name=row.name, artifact=row.artifact, reference=row.reference, config=config, events=Silent()
    )
    assert {metric.target for metric in measured.metrics} == {"cpu"}
    verdicts = judge(Gates(max_latency_ratio=2.0, min_sqnr_db=10.0), measured.metrics, config.targets)
    assert [(v.gate, v.target) for v in verdicts] == [
        ("min_sqnr_db", "cpu"), ("min_sqnr_db", "cpu x2"), ("max_latency_ratio", "cpu"),
    ]  # fmt: skip


def test_each_target_is_timed_until_its_own_limit_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of one is told nothing of another's limit."""
    row, config = row_and_config(tmp_path, {"latency_seconds": 0.05}, {"threads": 2, "latency_seconds": 0.05})
    gates = Gates(max_latency_ms={"cpu x2": 50.0})
    told, plain = [], verify_module.measure_pairs

    def measure(*args: Any, **settings: Any) -> Any:
        told.append(settings["max_ms"])
        return plain(*args, **settings)

    monkeypatch.setattr(verify_module, "measure_pairs", measure)
    config = config.model_copy(update={"gates": gates})
    measure_latency(name="v", artifact=row.artifact, reference=row.reference, config=config, events=Silent())
    assert told == [None, 50.0]


def test_a_latency_gate_that_no_target_can_meet_is_a_mistake(tmp_path: Path) -> None:
    """It would never be checked."""
    _, config = row_and_config(tmp_path, {})
    raw = config.model_dump(mode="json") | {"targets": [{"latency": False}]}
    for change in ({"gates": {"max_latency_ratio": 1.0}}, {"gates": {"max_latency_ms": 1.0}}, {"select": "fastest"}):
        with pytest.raises(ValueError, match="latency is measured on no target"):
            RunConfig.model_validate(raw | change)


PLACED = {
    "AExecutionProvider": [("c1", "Conv"), ("c2", "Conv"), ("r", "Relu")],
    CPU: [(f"g{index}", "Gather") for index in range(60)] + [("s", "Shape")],
}


def test_the_nodes_that_run_elsewhere_are_counted_and_the_first_named() -> None:
    """Counts by operator, the most frequent first; never more than fifty names."""
    found = evidence(PLACED, "AExecutionProvider")
    assert found["nodes"] == {"AExecutionProvider": {"Conv": 2, "Relu": 1}, CPU: {"Gather": 60, "Shape": 1}}
    assert list(found["nodes"][CPU]) == ["Gather", "Shape"]
    assert found["n_elsewhere"] == 61
    assert len(found["elsewhere"]) == 50
    assert found["elsewhere"][0] == {"name": "g0", "op_type": "Gather", "provider": CPU}


def test_a_partial_fallback_is_told_below_the_table() -> None:
    """One line with the operators; nothing where all is on the provider."""
    whole = {"A": evidence({"AExecutionProvider": PLACED["AExecutionProvider"]}, "AExecutionProvider")}
    partly = {"A": evidence(PLACED, "AExecutionProvider")}
    rows = [Candidate(name, "variant", "", "", details={"placement": d}) for name, d in (("x", whole), ("y", partly))]
    assert list(misplaced([*rows, Candidate("old", "variant", "", "")])) == [
        f"y: on A, 61 of 64 nodes run elsewhere: 60 Gather, 1 Shape on {CPU}"
    ]


def test_targets_that_part_are_told_below_the_table() -> None:
    """Where they are further apart than float rounding, and with the share of answers that agree."""
    metrics = (
        Metric("across_sqnr_db", 24.13, "dB", target="openvino", output="y", note="from cpu"),
        Metric("across_top1_agreement", 0.975, "ratio", target="openvino", output="y", note="from cpu"),
        Metric("across_sqnr_db", 120.0, "dB", target="cuda", output="y", note="from cpu"),
        Metric("across_sqnr_db", None, "dB", target="cpu x2", output="y", note="from cpu; identical"),
    )
    lines = list(parted([Candidate("int8", "variant", "", "", metrics)]))
    assert len(lines) == 1
    assert "output 'y' on openvino is 24.1 dB from cpu, and the top-1 answer agrees on 97.5%" in lines[0]
    assert not list(parted([Candidate("int8", "variant", "", "", metrics[2:])]))


@pytest.mark.skipif(
    "AzureExecutionProvider" not in ort.get_available_providers(), reason="no azure in this onnxruntime"
)
def test_a_model_without_nodes_falls_back_from_nothing() -> None:
    """Every node is a constant by the time that providers are asked: no node is misplaced."""
    model = model_of(
        [helper.make_node("Add", ["w", "w"], ["y"], name="add")], {}, {"y": [2]}, {"w": np.ones(2, np.float32)}
    )
    assert Session(model.SerializeToString(), Target(provider="azure")).placement == {}

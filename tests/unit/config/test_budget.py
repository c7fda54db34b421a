from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import cnn, samples_of

from onnxshrink.config.budget import Budget
from onnxshrink.config.gates import Gates, on_target
from onnxshrink.config.load import validate
from onnxshrink.core.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = cnn()
    onnx.save(model, str(tmp_path / "m.onnx"))
    np.savez(tmp_path / "data.npz", **samples_of(model, 4))
    (tmp_path / "nets.py").write_text("def build(width=8): ...\n")
    return tmp_path


ONNX = {"onnx": "m.onnx"}
TORCH = {"factory": "nets:build", "inputs": {"x": {"shape": ["batch", 3]}}, "outputs": ["y"]}
DATA = {"npz": "data.npz"}
SMALL = {"max_size": "1 MB"}


@pytest.mark.parametrize(
    ("document", "where", "what"),
    [
        ({"budget": {}}, "budget", "limits nothing"),
        ({"budget": {"minimize": "size", "time_limit": "1 min"}}, "budget", "limits nothing"),
        ({"budget": {"max_size": 0}}, "budget.max_size", "no model takes 0 bytes"),
        ({"budget": {"max_compressed_size": "0 kB"}}, "budget.max_compressed_size", "0 bytes"),
        ({"budget": {"min_sqnr_db": 20}}, "budget.min_sqnr_db", "nothing to measure drift on"),
        ({"budget": {"max_accuracy_drop": 0.01}}, "budget.max_accuracy_drop", "nothing to measure accuracy with"),
        (
            {"budget": {"max_accuracy_drop": 0.01}, "data": {"evaluation": DATA}},
            "budget.max_accuracy_drop",
            "nothing to measure accuracy with",
        ),
        ({"budget": {**SMALL, "minimize": "accuracy_drop"}}, "budget.minimize", "nothing to measure accuracy with"),
        (
            {"budget": {"max_latency_ratio": 0.5}, "targets": [{"latency": False}]},
            "budget.max_latency_ratio",
            "measured on no target",
        ),
        (
            {"budget": {"max_peak_memory": "1 MB"}, "targets": [{"latency": False}]},
            "budget.max_peak_memory",
            "measured on no target",
        ),
        (
            {"budget": {**SMALL, "minimize": "latency"}, "targets": [{"latency": False}]},
            "budget.minimize",
            "measured on no target",
        ),
        (
            {"budget": {"max_latency_ratio": {"cpu": 0.5, "gpu": 0.7}}},
            "budget.max_latency_ratio.gpu",
            "there is no target 'gpu'",
        ),
        (
            {"gates": {"max_latency_ms": {"cpu x2": 5}}, "targets": [{}, {"threads": 2, "latency": False}]},
            "gates.max_latency_ms.cpu x2",
            "latency is not measured on the target 'cpu x2'",
        ),
        (
            {"budget": {"max_accuracy_drop": 5}, "data": {"evaluation": {**DATA, "metric": "top1"}}},
            "budget.max_accuracy_drop",
            "top1 lies between 0 and 1",
        ),
        ({"budget": SMALL, "gates": {"max_size": "2 MB"}}, "budget.max_size", "max_size has two limits"),
        ({"budget": {"max_latency_ratio": {}}}, "budget.max_latency_ratio", "one for each target"),
        ({"budget": {"max_latency_ratio": {"cpu": 0}}}, "budget.max_latency_ratio", "a number above 0"),
        ({"budget": {"max_latency_ratio": True}}, "budget.max_latency_ratio", "a number above 0"),
        ({"budget": {**SMALL, "families": ["static"]}}, "budget.families[0]", "nothing of the family 'static'"),
        ({"budget": {**SMALL, "families": ["fp16", "pruned"]}}, "budget.families[1]", "nothing of the family 'pruned'"),
        (
            {"budget": {**SMALL, "families": ["quantization_aware"]}, "data": {"calibration": DATA}},
            "budget.families[0]",
            "nothing of the family 'quantization_aware'",
        ),
        (
            {
                "model": TORCH,
                "stages": [{"kind": "export"}],
                "data": {"calibration": DATA},
                "budget": {**SMALL, "families": ["quantization_aware"]},
            },
            "budget.families[0]",
            "nothing of the family 'quantization_aware'",
        ),
        ({"budget": {**SMALL, "families": ["fp32"]}}, "budget.families[0]", "fp32"),
        ({"budget": {**SMALL, "families": []}}, "budget.families", "[]"),
        ({"budget": {**SMALL, "vary": {"targets[0].threads": [1, 2]}}}, "budget.vary", "cannot be varied"),
        ({"budget": {**SMALL, "vary": {"data.calibration.npz": ["a.npz"]}}}, "budget.vary", "cannot be varied"),
        ({"budget": {**SMALL, "vary": {"stages[0].level": []}}}, "budget.vary", "[]"),
        ({"budget": {**SMALL, "time_limit": "soon"}}, "budget.time_limit", "soon"),
        ({"budget": {**SMALL, "time_limit": "soon"}}, "budget.time_limit", "give a duration, or leave the option out"),
        ({"budget": {**SMALL, "max_trials": 0}}, "budget.max_trials", "0"),
        ({"budget": {**SMALL, "max_trials": True}}, "budget.max_trials", "True"),
        ({"budget": {**SMALL, "parallel": {"kind": "threads"}}}, "budget.parallel", "threads"),
    ],
)
def test_a_budget_that_cannot_be_met_or_decided_is_refused(
    folder: Path, document: dict[str, Any], where: str, what: str
) -> None:
    """Each mistake names its place, and what is wanted instead or what to do."""
    document = {"model": ONNX, **document}
    with pytest.raises(ConfigError) as caught:
        validate(document, base=folder)
    error = caught.value
    assert (error.where or "").replace("config  ", "").endswith(where) or where in str(error)
    assert what in str(error)
    assert error.want or error.fix


@pytest.mark.parametrize(("text", "seconds"), [("20 min", 1200.0), ("1.5 h", 5400.0), ("90 s", 90.0), (30, 30.0)])
def test_a_duration_is_seconds_or_text(text: object, seconds: float) -> None:
    """People write minutes and hours."""
    assert Budget.model_validate({"max_size": 1000, "time_limit": text}).time_limit == seconds


def test_the_gates_hold_in_a_budget_unless_it_says_otherwise() -> None:
    """The tighter promise of the two is not guessed: the budget is what is searched for."""
    own = Gates(max_size=10, min_sqnr_db=15, max_macs=7, strict=True)
    budget = Budget.model_validate({"max_size": 20, "max_compressed_size": 9}).within(own)
    assert budget.limits == {"min_sqnr_db": 15, "max_size": 20, "max_compressed_size": 9, "max_macs": 7}
    assert budget.strict
    assert budget.as_gates == Gates(max_size=20, min_sqnr_db=15, max_macs=7, max_compressed_size=9, strict=True)


def test_a_limit_of_latency_may_be_each_targets_own(folder: Path) -> None:
    """By the names that the report has; what is not named has none."""
    limits = {"max_latency_ratio": {"cpu": 0.6, "cpu x2": "0.8"}, "max_latency_ms": 5}
    config = validate({"model": ONNX, "budget": limits, "targets": [{}, {"threads": 2}, {"threads": 4}]}, base=folder)
    assert config.budget is not None
    ratio = config.budget.max_latency_ratio
    assert [on_target(ratio, target.name) for target in config.targets] == [0.6, 0.8, None]
    assert {on_target(config.budget.max_latency_ms, target.name) for target in config.targets} == {5.0}

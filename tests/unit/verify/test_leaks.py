"""Leaks between the data roles: counted sample by sample, told in the report's warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_models as nets
import pytest

from onnxshrink.config.data import DataRoles, NpzData, Role
from onnxshrink.core.artifact import Facts
from onnxshrink.verify.leaks import find_leaks

ROWS = np.arange(300, dtype=np.float32).reshape(100, 3)
ROLES: tuple[Role, ...] = ("calibration", "train")


def found(folder: Path, *roles: Role, **rows: slice | list[int]) -> Facts:
    """What `find_leaks` says of roles that hold these rows."""
    (folder / "samples").mkdir()
    for role, chosen in rows.items():
        np.savez(folder / "samples" / f"{role}.npz", x=ROWS[chosen], labels=np.arange(len(ROWS))[chosen] * len(role))
    data = DataRoles(**{role: NpzData(npz=folder / "samples" / f"{role}.npz") for role in rows})
    relu = nets.helper.make_node("Relu", ["x"], ["y"])
    model = nets.model_of([relu], {"x": ["N", 3]}, {"y": ["N", 3]}, {})
    return find_leaks(data, roles, nets.artifact_of(model, folder / "model"))


def test_disjoint_roles_have_no_leak(tmp_path: Path) -> None:
    """Roles that share no sample give no warning, and say how many samples were compared."""
    rows = {"calibration": slice(40), "train": slice(40, 80), "evaluation": slice(80, 100)}
    assert found(tmp_path, *ROLES, **rows) == {
        "evaluation_samples": 20,
        "samples": {"calibration": 40, "train": 40},
        "shared_samples": {"calibration": 0, "train": 0},
        "warnings": [],
    }


def test_every_shared_sample_is_counted(tmp_path: Path) -> None:
    """Three samples were calibrated on and one trained on, in other places and with other labels: all are told."""
    rows = {"calibration": slice(40), "train": slice(40, 80), "evaluation": [99, 7, 98, 6, 41, 90, 5]}
    facts = found(tmp_path, *ROLES, **rows)
    assert facts["shared_samples"] == {"calibration": 3, "train": 1}
    assert facts["warnings"][0].startswith("3 of 7 evaluation samples gave the quantization ranges, byte for byte")
    assert facts["warnings"][1].startswith("1 of 7 evaluation samples were trained on")


def test_only_the_roles_asked_for_are_read(tmp_path: Path) -> None:
    """Training samples that no stage of the run has seen are no leak of this run."""
    facts = found(tmp_path, "calibration", calibration=slice(10), train=slice(100), evaluation=slice(5, 15))
    assert facts["shared_samples"] == {"calibration": 5}


@pytest.mark.parametrize("count", [1, 100])
def test_the_same_samples_are_a_leak_in_full(count: int, tmp_path: Path) -> None:
    """Measuring on the calibration samples themselves is told."""
    facts = found(tmp_path, "calibration", calibration=slice(count), evaluation=slice(count))
    assert f"{count} of {count}" in facts["warnings"][0]

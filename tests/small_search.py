"""A small budget search over a float CNN, and what of its trials must never change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_models import cnn, samples_of

from onnxshrink.config.load import validate
from onnxshrink.core.report import Report
from onnxshrink.search.budget import fit

BUDGET = {"max_size": "2 kB", "min_sqnr_db": 10, "families": ["fp16", "static"], "time_limit": "30 min"}


def make_search(folder: Path) -> Path:
    """The model and its samples."""
    model = cnn()
    onnx.save(model, str(folder / "m.onnx"))
    np.savez(folder / "calib.npz", **samples_of(model, 24))
    np.savez(folder / "test.npz", **samples_of(model, 48, seed=1))
    return folder


def searched(folder: Path, runs: str, budget: dict[str, Any], **more: Any) -> tuple[Report, dict[str, Any]]:
    """A search, and what it left."""
    document = {
        "name": "r",
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "calib.npz"}, "evaluation": {"npz": "test.npz"}},
        "stages": [{"kind": "optimize"}],
        "targets": [{"latency_seconds": 0.05}],
        "budget": {**BUDGET, **budget},
    }
    report = fit(validate(document, base=folder), runs=folder / runs, base=folder, **more)
    return report, json.loads((folder / runs / "r" / "search.json").read_text())


def essence(search: dict[str, Any]) -> list[Any]:
    """What of the trials does not depend on a clock."""
    exact = {"size_bytes", "compressed_bytes", "parameters", "macs", "integer_coverage", "sqnr_db", "max_abs_error"}
    return [
        (
            *(t["number"], t["point"], t["status"], t["digest"]),
            *((m["name"], m["target"], m["value"]) for m in t["metrics"] if m["name"] in exact),
        )
        for t in search["trials"]
    ]


def front(search: dict[str, Any]) -> list[Any]:
    """The points of the front with what they are."""
    trials = {trial["number"]: trial for trial in search["trials"]}
    return sorted((json.dumps(trials[n]["point"], sort_keys=True), trials[n]["digest"]) for n in search["front"])

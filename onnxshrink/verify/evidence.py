"""Quality as files, so that the store can keep it: what is deterministic is measured once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, TypeAdapter

from onnxshrink.config.metrics import TaskMetric
from onnxshrink.core.report import Metric
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.verify import Quality

_FILE = "quality.json"


def save_quality(quality: Quality, folder: Path) -> None:
    """Write metrics as JSON and per-sample scores as ``.npz``; equal quality gives equal bytes."""
    for index, scores in enumerate(quality.scores.values()):
        np.savez_compressed(folder / f"scores-{index}.npz", values=scores.values)
    document = {
        "metrics": [asdict(metric) for metric in quality.metrics],
        "scores": [_described(target, scores) for target, scores in quality.scores.items()],
        "details": dict(quality.details),
    }
    (folder / _FILE).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def load_quality(folder: Path) -> Quality:
    """Read what `save_quality` wrote."""
    document = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    scores = {row["target"]: _scores(row, folder / f"scores-{i}.npz") for i, row in enumerate(document["scores"])}
    return Quality(tuple(Metric(**metric) for metric in document["metrics"]), scores, document["details"])


def _described(target: str, scores: Scores) -> dict[str, Any]:
    """All of the scores but the values."""
    metric = scores.metric.model_dump(mode="json") if isinstance(scores.metric, BaseModel) else scores.metric
    return {"target": target, "metric": metric, "n_samples": scores.n_samples, "n_classes": scores.n_classes}


def _scores(row: dict[str, Any], path: Path) -> Scores:
    with np.load(path, allow_pickle=False) as arrays:
        values = arrays["values"]
    metric: TaskMetric = TypeAdapter(TaskMetric).validate_python(row["metric"])
    return Scores(metric, values, row["n_samples"], row["n_classes"])

"""Quality as files, so that the store can keep it: what is deterministic is measured once."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from onnxshrink.core.report import Metric
from onnxshrink.verify.accuracy import Scores
from onnxshrink.verify.verify import Quality

_FILE = "quality.json"


def save_quality(quality: Quality, folder: Path) -> None:
    """Write metrics as JSON and per-sample scores as ``.npy``; equal quality gives equal bytes."""
    targets = list(quality.scores)
    for index, target in enumerate(targets):
        np.save(folder / f"scores-{index}.npy", quality.scores[target].values)
    document = {
        "metrics": [asdict(metric) for metric in quality.metrics],
        "scores": [{"target": target, "metric": quality.scores[target].metric} for target in targets],
        "details": dict(quality.details),
    }
    (folder / _FILE).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def load_quality(folder: Path) -> Quality:
    """Read what `save_quality` wrote."""
    document = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    scores = {
        row["target"]: Scores(row["metric"], np.load(folder / f"scores-{index}.npy", allow_pickle=False))
        for index, row in enumerate(document["scores"])
    }
    return Quality(tuple(Metric(**metric) for metric in document["metrics"]), scores, document["details"])

"""Evaluation samples that the run has seen before: what is measured on them says nothing of new data."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxshrink.config.data import DataRoles, Role
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.report import OPTIMISTIC
from onnxshrink.data.overlap import sample_hashes
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model

_PURPOSE: dict[Role, str] = {"calibration": "gave the quantization ranges", "train": "were trained on"}


def find_leaks(data: DataRoles, roles: Iterable[Role], reference: Artifact) -> Facts:
    """Count the evaluation samples that are, byte for byte, samples of another role as well.

    Every role is streamed once; memory is 16 bytes a sample. Samples that were changed on the way, such as an image
    compressed anew, are not found.

    Args:
        data: Every role of the run; ``evaluation`` is among them.
        roles: ``calibration``, ``train``, or both.
        reference: The float model, whose inputs all roles feed.

    Returns:
        Facts: samples of each role, how many of evaluation's are among them, and a warning for each leak.

    Raises:
        DataError: Samples do not fit the model, or cannot be read.
    """
    specs = input_specs(load_model(reference.model_path))
    hashes = {
        role: sample_hashes(open_reader(settings, specs), specs)
        for role in ("evaluation", *roles)
        if (settings := data.of(role)) is not None
    }
    measured = hashes.pop("evaluation")
    shared = {role: int(np.isin(measured, seen).sum()) for role, seen in hashes.items()}
    return {
        "evaluation_samples": len(measured),
        "samples": {role: len(seen) for role, seen in hashes.items()},
        "shared_samples": shared,
        "warnings": [
            f"{count} of {len(measured)} evaluation samples {_PURPOSE[role]}, byte for byte: drift and accuracy "
            f"{OPTIMISTIC}; measure on samples that `data.{role}` does not hold"
            for role, count in shared.items()
            if count
        ],
    }

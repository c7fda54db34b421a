"""The models before and after the step that broke a limit, as files, and the command that says how they differ."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from onnxshrink.config.data import Data, NpzData
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.run_folder import BISECT_FOLDER, leave
from onnxshrink.core.tensors import Batch
from onnxshrink.data.reader import open_reader
from onnxshrink.runtime.graph import input_specs, load_model
from onnxshrink.search.checkpoints import Way
from onnxshrink.verify.explain import MAX_SAMPLES

_SAMPLES = "samples.npz"


def write_neighbours(way: Way, first: int | None, folder: Path) -> dict[str, str]:
    """Write the ONNX models before and after a step; torch's are none, and one that cannot be made is left out.

    Args:
        way: The steps.
        first: The step's place; None, and a step of the session, leave nothing.
        folder: ``runs/<name>``.

    Returns:
        ``before`` and ``after`` to the paths of those that are there.
    """
    if first is None or way.steps[first].is_session:
        return {}
    models = {"before": way.steps[first - 1].make() if first else way.reference}
    with suppress(ModelError, ParityError):
        models["after"] = way.steps[first].make()
    models = {name: model for name, model in models.items() if model.kind == "onnx"}
    leave(models, folder)
    return {name: str(folder / BISECT_FOLDER / name / model.model_path.name) for name, model in models.items()}


def explain_command(files: dict[str, str], data: Data) -> tuple[str, ...]:
    """The command that says which nodes differ, where there are both files.

    Samples that the command could not read as they are, such as images or one split of an archive, are written beside
    the models: the first `MAX_SAMPLES` of them, as long as their shapes are equal.
    """
    if set(files) != {"before", "after"}:
        return ()
    samples = data.npz if isinstance(data, NpzData) and data.is_plain else _write_samples(Path(files["before"]), data)
    return (f"onnxshrink explain {files['before']} {files['after']} --data {samples}",)


def _write_samples(model: Path, data: Data) -> Path:
    specs = input_specs(load_model(model))
    kept: list[Batch] = []
    for batch in open_reader(data, specs, batch_size=1):
        if len(kept) == MAX_SAMPLES or (kept and _shapes(batch) != _shapes(kept[0])):
            break
        kept.append(dict(batch))
    path = model.parent.parent / _SAMPLES
    arrays: dict[str, Any] = {spec.name: np.concatenate([batch[spec.name] for batch in kept]) for spec in specs}
    np.savez(path, **arrays)
    return path


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in batch.items()}

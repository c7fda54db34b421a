"""A checkpoint against where it came from: numbers of a second source, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from torch_models import Bench, digits_like, source

from onnxshrink.config.data import NpzData
from onnxshrink.config.stages import Export
from onnxshrink.core.artifact import Artifact
from onnxshrink.core.errors import DataError, ModelError
from onnxshrink.core.tensors import Array
from onnxshrink.runtime.graph import load_model
from onnxshrink.verify.checkpoints import (
    Deviation,
    Runtime,
    load_deviations,
    measure_deviations,
    measure_scores,
    save_deviations,
)


def damaged(model: onnx.ModelProto, name: str, change: float) -> onnx.ModelProto:
    """The model with one initializer multiplied."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(tensor for tensor in copy.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(tensor) * change).astype(np.float32), name))
    return copy


def answers(model: Artifact, arrays: dict[str, Array]) -> list[Array]:
    """ONNX Runtime's own, as a user would call it."""
    return list(ort.InferenceSession(model.model_path, providers=["CPUExecutionProvider"]).run(None, arrays))


def test_drift_is_what_numpy_says(tmp_path: Path) -> None:
    """Over several batches, SQNR and the largest error are those of all samples at once."""
    reference = nets.artifact_of(nets.cnn(), tmp_path / "reference")
    candidate = nets.artifact_of(damaged(nets.cnn(), "w1", 1.02), tmp_path / "candidate")
    arrays = nets.samples_of(nets.cnn(), 50)
    np.savez(tmp_path / "x.npz", **arrays)
    told: list[tuple[int, int]] = []
    data = NpzData(npz=tmp_path / "x.npz")
    (found,) = measure_deviations(reference, candidate, Runtime(), data, lambda *at: told.append(at))
    (want,), (got,) = answers(reference, arrays), answers(candidate, arrays)
    assert found.output == "y"
    assert found.max_abs_error == pytest.approx(np.abs(want - got).max(), rel=1e-3)
    assert found.sqnr_db == pytest.approx(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()), abs=0.01)
    assert told[-1] == (50, 50)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """A torch network with two outputs, and its export."""
    bench = Bench(tmp_path_factory.mktemp("bench"))
    network = bench.open(source("Residual", outputs=("logits", "features")))
    return network, bench.run(Export(), network)


@pytest.mark.slow
def test_torch_answers_output_by_output(exported: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """The export agrees with torch in both outputs; one that is damaged drifts, and the other does not."""
    network, model = exported
    data = digits_like(tmp_path / "x.npz", labels=False)
    found = {one.output: one for one in measure_deviations(network, model, Runtime(), data)}
    assert list(found) == ["logits", "features"]
    assert min(one.sqnr_db for one in found.values()) > 100
    worse = nets.artifact_of(damaged(load_model(model.model_path), "head.weight", 1.1), tmp_path / "worse")
    found = {one.output: one for one in measure_deviations(network, worse, Runtime(), data)}
    assert found["logits"].sqnr_db < 25
    assert found["features"].sqnr_db > 100


def test_a_value_that_is_no_number_breaks_every_limit(tmp_path: Path) -> None:
    """NaN has the worst of all values, the reason beside it, and comes back from a file as it was."""
    reference = nets.artifact_of(nets.cnn(), tmp_path / "reference")
    candidate = nets.artifact_of(damaged(nets.cnn(), "w4", math.nan), tmp_path / "candidate")
    np.savez(tmp_path / "x.npz", **nets.samples_of(nets.cnn(), 4))
    found = measure_deviations(reference, candidate, Runtime(), NpzData(npz=tmp_path / "x.npz"))
    assert found == (Deviation("y", -math.inf, math.inf, "candidate gives NaN"),)
    save_deviations(found, tmp_path)
    assert load_deviations(tmp_path) == found


@pytest.mark.slow
def test_outputs_that_do_not_fit_are_refused(exported: tuple[Artifact, Artifact], tmp_path: Path) -> None:
    """A network with two outputs has no counterpart in a model with one."""
    network, model = exported[0], load_model(exported[1].model_path)
    del model.graph.output[1:]
    one = nets.artifact_of(model, tmp_path / "one")
    with pytest.raises(ModelError, match="the number of their outputs"):
        measure_deviations(network, one, Runtime(), digits_like(tmp_path / "x.npz", labels=False))


def test_scores_are_those_of_argmax(tmp_path: Path) -> None:
    """Top-1 of each sample is what numpy says, and without a metric there is nothing to score."""
    model, arrays = nets.artifact_of(nets.cnn(), tmp_path / "model"), nets.samples_of(nets.cnn(), 20)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "x.npz", labels=labels, **arrays)
    found = measure_scores(model, Runtime(), NpzData(npz=tmp_path / "x.npz", metric="top1"))
    assert found.values.tolist() == (answers(model, arrays)[0].argmax(1) == labels).astype(float).tolist()
    with pytest.raises(DataError, match="nothing to score with"):
        measure_scores(model, Runtime(), NpzData(npz=tmp_path / "x.npz"))

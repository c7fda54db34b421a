from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from bundle_mutants import Mutant, model_mutants, tamperings
from onnx_models import ArrayReader, cnn, samples_of

from onnxshrink.calibration.calibrate import observe_all, ranges_of
from onnxshrink.calibration.prepare import prepare
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.regress.check import BundleError, check_bundle, write_baseline
from onnxshrink.stages.quantize_static import quantized_model

SAME_NETWORK = {"another producer", "in another order"}
SESSION = {"provider": "CPUExecutionProvider", "options": {}, "threads": 1}


def int8() -> onnx.ModelProto:
    model = prepare(cnn(), where="test")
    samples = samples_of(model, 16)
    ranges = ranges_of(observe_all(model, lambda _: ArrayReader(samples)), "minmax", leave_out={})
    return quantized_model(model, ranges, QuantizeStatic(kind="quantize_static", types="u8s8"))


@pytest.fixture(scope="module", params=["float", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the small CNN, float or quantized."""
    folder = tmp_path_factory.mktemp("made") / "cnn.bundle"
    folder.mkdir()
    onnx.save(cnn() if request.param == "float" else int8(), str(folder / "model.onnx"))
    samples = [{"x": sample[None]} for sample in samples_of(cnn(), 8)["x"]]
    write_baseline(folder, {"session": SESSION, "versions": {}, "metrics": [], "config": None}, samples)
    return folder


def made(bundle: Path, mutant: Mutant, folder: Path) -> Path:
    mutant.make(bundle / "model.onnx", folder / "mutant.onnx")
    return folder / "mutant.onnx"


def test_another_build_that_is_another_network_fails(bundle: Path, tmp_path: Path) -> None:
    """Of 21 mutants all but those that hold the very same network, by what the file says and by what it computes."""
    missed = [
        mutant.name
        for mutant in model_mutants(bundle / "model.onnx")
        if check_bundle(bundle, made(bundle, mutant, tmp_path), latency=False).outcome != "failed"
    ]
    assert set(missed) <= SAME_NETWORK


def test_a_mutant_in_the_bundle_fails_and_is_named(bundle: Path, tmp_path: Path) -> None:
    """Whatever it computes: the file is not the one that was signed."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    for mutant in model_mutants(bundle / "model.onnx"):
        shutil.copyfile(made(bundle, mutant, tmp_path), copy / "model.onnx")
        result = check_bundle(copy, latency=False)
        failed = {item.name for item in result.items if item.outcome == "failed"}
        assert "integrity model.onnx" in failed, mutant.name


@pytest.mark.parametrize("change", tamperings(), ids=lambda change: change.name)
def test_what_is_tampered_with_is_found(bundle: Path, tmp_path: Path, change: object) -> None:
    """As a file that is damaged, or as a manifest that is."""
    copy = shutil.copytree(bundle, tmp_path / "copy")
    change.make(copy)  # type: ignore[attr-defined]
    try:
        outcome = check_bundle(copy, latency=False).outcome
    except BundleError as e:
        assert "manifest" in e.what
    else:
        assert outcome == "failed"


def test_every_mutant_is_another_file_each_time_the_same(bundle: Path, tmp_path: Path) -> None:
    """A list with the original in it, or one drawn anew, would prove nothing."""
    original = onnx.load(bundle / "model.onnx").SerializeToString(deterministic=True)
    mutants = [mutant for mutant in model_mutants(bundle / "model.onnx") if mutant.family != "saved by ORT"]
    texts = [made(bundle, mutant, tmp_path).read_bytes() for mutant in mutants]
    assert len({original, *texts}) == len(mutants) + 1
    again = [mutant for mutant in model_mutants(bundle / "model.onnx") if mutant.family != "saved by ORT"]
    assert [made(bundle, mutant, tmp_path).read_bytes() for mutant in again] == texts

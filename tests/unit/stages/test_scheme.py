"""The scheme in the pipeline: types that suit the processor, keys that know it, CUDA refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_models as nets
import pytest
from numpy import savez

from onnxshrink.config.load import validate
from onnxshrink.config.stages import Calibrate, QuantizeStatic
from onnxshrink.core.artifact import Artifact, Facts
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.events import Silent
from onnxshrink.core.store import Store
from onnxshrink.runtime.isa import detect_isa
from onnxshrink.stages import memo as memo_module
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.preflight import preflight
from onnxshrink.stages.quantize_static import quantize_static


@pytest.mark.parametrize(
    ("isa", "types"), [("x86_vnni", "u8s8"), ("x86_avx2", "u8s8"), ("arm64", "s8s8"), ("auto", None)]
)
def test_types_follow_the_processor_and_the_facts_say_why(isa: Any, types: str | None, tmp_path: Path) -> None:
    """`types: auto` is resolved for `isa`, from any host; the facts hold both and a reason."""
    model = nets.cnn()
    (tmp_path / "out").mkdir()
    context = nets.context_of(nets.ArrayReader(nets.samples_of(model, 4)), tmp_path)
    source = nets.artifact_of(model, tmp_path / "source")
    facts = quantize_static(QuantizeStatic(isa=isa), source, tmp_path / "out", context)
    assert facts["isa"] == (detect_isa() if isa == "auto" else isa)
    assert types in (None, facts["types"])
    assert facts["scheme"]


def test_a_result_for_this_machine_is_keyed_by_its_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `isa: auto` another processor means another result; a named one is the same everywhere."""
    made: list[str] = []

    def work(stage: QuantizeStatic | Calibrate, *_: object) -> Facts:
        made.append(stage.kind)
        return {}

    monkeypatch.setattr(memo_module, "work_of", lambda stage: lambda *a: work(stage, *a))
    data = validate({"model": {"onnx": _model(tmp_path)}}, base=tmp_path, origin="test").data
    source = Artifact("onnx", tmp_path, "0" * 64)
    for isa, stage, count in (
        ("x86_vnni", QuantizeStatic(), 1),
        ("x86_vnni", QuantizeStatic(), 1),
        ("arm64", QuantizeStatic(), 2),
        ("arm64", QuantizeStatic(isa="x86_vnni"), 3),
        ("x86_avx2", QuantizeStatic(isa="x86_vnni"), 3),
    ):
        monkeypatch.setattr(memo_module, "detect_isa", lambda isa=isa: isa)
        Memo(Store(tmp_path / "store"), data, 0, Silent()).derive(stage, source)
        assert len(made) == count, (isa, stage)


def test_cuda_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA is there, a variant of quantize_static for it stops at once; variants without it do not."""
    monkeypatch.setattr("onnxshrink.stages.preflight.require_provider", lambda _: "CUDAExecutionProvider")
    config = {
        "model": {"onnx": _model(tmp_path)},
        "data": {"calibration": {"npz": tmp_path / "d.npz"}},
        "variants": {"fp32": [], "int8": [{"kind": "quantize_static"}]},
        "targets": [{"provider": "cuda"}],
    }
    savez(tmp_path / "d.npz", **nets.samples_of(nets.cnn(), 2))
    with pytest.raises(ConfigError, match="CUDA") as caught:
        preflight(validate(config, base=tmp_path, origin="test"))
    assert "int8" in str(caught.value.where)
    assert "fp16" in str(caught.value.fix)
    preflight(validate(config | {"targets": [{}]}, base=tmp_path, origin="test"))


def _model(folder: Path) -> Path:
    nets.save_model(nets.cnn(), folder)
    return folder / "model.onnx"

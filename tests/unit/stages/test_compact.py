"""A compacted file is smaller, gives the same bits and runs in the same integer kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest

from onnxshrink.config.data import DataRoles, NpzData
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.runtime.session import Session
from onnxshrink.stages.compact import compact
from onnxshrink.stages.quantize_static import quantize_static


def written(tmp_path: Path, name: str, **settings: object) -> Path:
    """The quantized cnn as the stage writes it."""
    model = nets.cnn()
    samples = nets.samples_of(model, 32)
    np.savez(tmp_path / "calibration.npz", **samples)  # type: ignore[arg-type]
    source = nets.artifact_of(model, tmp_path / name / "source")
    ctx = nets.context_of(nets.ArrayReader(samples), tmp_path / name)
    ctx = replace(ctx, data=DataRoles(calibration=NpzData(npz=tmp_path / "calibration.npz")))
    facts = quantize_static(QuantizeStatic(**settings), source, tmp_path / name, ctx)  # type: ignore[arg-type]
    assert ("compact" in facts) == bool(settings.get("compact"))
    return tmp_path / name / "model.onnx"


def fused(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    Session(path, save_optimized=folder / "fused.onnx")
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


@pytest.mark.parametrize("types", ["u8s8", "s8s8", "u8u8"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_same_bits_in_fewer_bytes(tmp_path: Path, granularity: str, types: str) -> None:
    """The outputs are equal bit for bit, the fused graph has the same operators, and the file is smaller."""
    plain = written(tmp_path, "plain", granularity=granularity, types=types)
    small = written(tmp_path, "small", granularity=granularity, types=types, compact=True)
    onnx.checker.check_model(str(small), full_check=True)
    x = nets.samples_of(nets.cnn(), 64, seed=5)
    for level in ("all", "disabled"):
        want, got = (Session(path, optimization=level).run(x)["y"] for path in (plain, small))  # type: ignore[arg-type]
        assert np.array_equal(want, got)
    assert fused(small, tmp_path) == fused(plain, tmp_path)
    if granularity == "per_channel":
        assert small.stat().st_size < plain.stat().st_size


def test_says_what_went(tmp_path: Path) -> None:
    """Four biases lose zero points and scales, three Convs the zero points of their weights; a second time, nothing."""
    model = onnx.load(written(tmp_path, "plain", types="u8s8", bias_correction=False))
    facts = compact(model)
    assert facts["bias_scales"] == 3  # conv3 has no bias
    assert facts["zero_points"] == 3 + 3
    assert facts["bytes_saved"] == onnx.load(tmp_path / "plain" / "model.onnx").ByteSize() - model.ByteSize()
    again = onnx.ModelProto()
    again.CopyFrom(model)
    assert compact(again) == {"zero_points": 0, "bias_scales": 0, "bytes_saved": 0}
    assert again == model


def test_float_models_are_left() -> None:
    """A model that is not QDQ stays as it is."""
    model = nets.cnn()
    assert compact(model)["bytes_saved"] == 0
    assert model == nets.cnn()

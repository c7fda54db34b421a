"""The one-liner on a transformer: the scheme that suits it, said aloud; a scheme that ruins it, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import onnxshrink, report_of
from encoder_models import encoder, sentences
from onnx_models import cnn, samples_of

pytestmark = pytest.mark.slow

LINE = ("quantize", "model.onnx", "--data", "calib.npz", "-o", "int8.onnx", "--eval-data", "test.npz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small encoder, and words to calibrate and to measure on."""
    onnx.save(encoder(), str(tmp_path / "model.onnx"))
    np.savez(tmp_path / "calib.npz", **sentences(16))
    np.savez(tmp_path / "test.npz", **sentences(16, seed=1))
    return tmp_path


def said(text: str) -> str:
    return " ".join(text.split())


def test_a_transformer_is_quantized_dynamically_by_default(folder: Path) -> None:
    """The file computes in dynamic integers, the terminal and the report say why, and nothing is called noise."""
    result = onnxshrink(*LINE, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "dynamic scheme: 100% of the multiply-accumulates lie in matrix products" in said(result.stdout)
    assert "noise has" not in result.stdout
    assert "MatMulInteger" in {node.op_type for node in onnx.load(folder / "int8.onnx").graph.node}
    report = report_of(onnxshrink(*LINE, "--json", cwd=folder))
    assert "dynamic scheme: 100%" in report["selection"]
    assert [step["kind"] for step in report["steps"] if step["name"].startswith("int8/")][-1] == "quantize_dynamic"
    assert report["winner"] == "int8"


@pytest.mark.parametrize("options", [("--scheme", "static"), ("--method", "minmax"), ("--types", "u8s8")])
def test_the_static_scheme_is_taken_where_it_is_asked_for(folder: Path, options: tuple[str, ...]) -> None:
    """By name, or by a setting that only it has; the reason is said."""
    result = onnxshrink(*LINE, *options, cwd=folder)
    assert result.returncode == 0, result.stderr
    reason = "it was asked for" if "static" in options else f"{options[0][2:]} is a setting of it"
    assert f"static scheme: {reason}" in said(result.stdout)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(folder / "int8.onnx").graph.node}


@pytest.mark.parametrize("option", [("--method", "mse"), ("--types", "s8s8"), ("--format", "qoperator")])
def test_a_static_setting_with_the_dynamic_scheme_is_refused(folder: Path, option: tuple[str, str]) -> None:
    """Exit code 2, both ways out, no file."""
    result = onnxshrink(*LINE, "--scheme", "dynamic", *option, cwd=folder)
    assert result.returncode == 2
    assert f"the dynamic scheme has no {option[0][2:]}" in result.stderr
    assert "static scheme" in result.stderr
    assert not (folder / "int8.onnx").exists()


def test_the_dynamic_scheme_takes_exclude_and_granularity(folder: Path) -> None:
    """Settings that both schemes have are kept; a node left out stays in float."""
    line = (*LINE, "--scheme", "dynamic", "--exclude", "widen0", "--granularity", "per_tensor", "--json")
    report = report_of(onnxshrink(*line, cwd=folder))
    facts = next(step["facts"] for step in report["steps"] if step["kind"] == "quantize_dynamic")
    assert facts["float_nodes"]["widen0"] == "excluded in the config"
    assert facts["granularity"] == "per_tensor"


def test_outputs_that_are_noise_are_told_without_a_gate(folder: Path) -> None:
    """Ranges from samples a thousand times too large leave one step for all values: exit 0, and a plain warning."""
    onnx.save(cnn(), str(folder / "model.onnx"))
    np.savez(folder / "test.npz", **samples_of(cnn(), 16, seed=1))
    loud = {name: 1000 * array for name, array in samples_of(cnn(), 16).items()}
    np.savez(folder / "calib.npz", **loud)
    result = onnxshrink(*LINE, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "int8: noise has" in said(result.stdout)
    assert "do not trust it" in said(result.stdout)
    assert "static scheme" in said(result.stdout)
    report = report_of(onnxshrink(*LINE, "--json", cwd=folder))
    assert any(text.startswith("int8: noise has") for text in report["warnings"])

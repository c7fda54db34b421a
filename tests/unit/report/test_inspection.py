"""The command `inspect`: what an ONNX file is, what of it runs in integers, and clear errors."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from rich.console import Console
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.config.stages import QuantizeStatic
from onnxshrink.core.errors import ConfigError, DataError, DependencyError, ModelError
from onnxshrink.report.inspection import inspect_model, print_inspection
from onnxshrink.stages.quantize_static import quantize_static


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An attention in int8 with two nodes left out."""
    folder = tmp_path_factory.mktemp("inspected")
    net = nets.attention(mark=-100.0)
    (folder / "out").mkdir()
    context = nets.context_of(nets.ArrayReader(nets.samples_of(net, 8)), folder)
    settings = QuantizeStatic(exclude_nodes=("query", "scores"), types="u8s8")
    quantize_static(settings, nets.artifact_of(net, folder / "source"), folder / "out", context)
    return folder / "out" / "model.onnx"


def shown(path: Path, width: int = 80) -> str:
    text = io.StringIO()
    print_inspection(inspect_model(path), Console(file=text, width=width))
    return text.getvalue()


def test_everything_is_said_in_80_columns(model: Path) -> None:
    """File, inputs, share, island, cause and change stand there, and no line is wider than the terminal."""
    text = shown(model)
    assert max(map(len, text.splitlines())) <= 80
    words = " ".join(text.split())
    for part in ("opset 17", "'x' float32[N,6,8]", "61.1% of 1,728", "38.9% of the MACs: 'query' and 1 more"):
        assert part in words
    assert "take it out of exclude_nodes" in words
    assert "DequantizeLinear, QuantizeLinear" in words


def test_json_is_all_of_it(model: Path) -> None:
    """The command prints plain JSON with the ratio, every row, and each island's cause and change."""
    result = CliRunner().invoke(app, ["inspect", str(model), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    coverage = document["coverage"]
    assert coverage["integer_coverage"] == pytest.approx(1056 / 1728)
    assert sum(row["macs"] for row in coverage["rows"]) == coverage["macs"] == 1728
    assert coverage["islands"][0]["nodes"] == ["query", "scores"]
    assert all(island["cause"] and island["change"] for island in coverage["islands"])
    assert document["inputs"][0]["name"] == "x"
    assert document["size_bytes"] == model.stat().st_size


def test_a_lower_level_is_looked_at_as_asked(model: Path) -> None:
    """`--optimization basic` shows what a session of that level runs."""
    result = CliRunner().invoke(app, ["inspect", str(model), "--optimization", "basic"])
    assert "0.0% of 1,728" in " ".join(result.stdout.split())
    assert "ORT_ENABLE_EXTENDED" in result.stdout


def test_samples_give_the_lengths(tmp_path: Path) -> None:
    """Dynamic axes have the length of the first sample of `--data`; samples that do not fit are an error."""
    net = nets.cnn()
    onnx.save(net, tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **nets.samples_of(net, 3))
    np.savez(tmp_path / "wrong.npz", z=np.zeros((3, 4), np.float32))
    macs = 16 * 16 * (8 * 3 * 9 + 8 * 9 + 8 * 8) + 80
    assert inspect_model(tmp_path / "m.onnx", data=tmp_path / "d.npz").coverage.macs == macs
    with pytest.raises(DataError):
        inspect_model(tmp_path / "m.onnx", data=tmp_path / "wrong.npz")


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    """A missing file and a file of something else are the user's to fix, each in its words."""
    with pytest.raises(ConfigError, match=r"no file .*gone\.onnx"):
        inspect_model(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ModelError, match="cannot be read"):
        inspect_model(tmp_path / "text.onnx")


def test_where_the_bytes_lie_and_what_hinders_are_told(model: Path) -> None:
    """Bytes by operator and type, the forms of quantization, and phones stand in the text and in the JSON."""
    words = " ".join(shown(model).split())
    for part in ("largest initializers", "qdq;", "the model is quantized already: qdq", "phone nnapi:"):
        assert part in words
    document = json.loads(CliRunner().invoke(app, ["inspect", str(model), "--json"]).stdout)
    assert sum(document["contents"]["bytes_by_dtype"].values()) <= document["size_bytes"]
    assert document["quantization"]["formats"] == ["qdq"]
    assert [row["provider"] for row in document["mobile"]] == ["nnapi", "coreml_neural_network", "coreml_ml_program"]
    assert document["hindrances"][0]["kind"] == "quantized"


def test_the_page_is_one_file_with_the_same_figures(model: Path, tmp_path: Path) -> None:
    """It loads nothing, has no scripts, escapes names, and says what the JSON says."""
    net = onnx.load(model)
    net.producer_name = "<script>alert(1)</script>"
    onnx.save(net, tmp_path / "model.onnx")
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "model.onnx"), "--json", "--html", str(page)])
    assert result.exit_code == 0, result.output
    text, document = page.read_text(encoding="utf-8"), json.loads(result.stdout)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not any(mark in text for mark in ("http://", "https://", "src=", "@import"))
    for name, number in document["contents"]["op_types"].items():
        assert f'<td>{name}</td><td class="n">{number}</td>' in text
    for stored in document["contents"]["largest"]:
        assert stored["name"] in text
    assert "61.1% of 1,728 multiply-accumulates" in text
    assert len(text.encode()) < 100_000


def test_a_page_does_not_replace_the_model(model: Path) -> None:
    """Writing over what is read is a mistake."""
    before = model.read_bytes()
    result = CliRunner().invoke(app, ["inspect", str(model), "--html", str(model)])
    assert isinstance(result.exception, ConfigError)
    assert model.read_bytes() == before


def test_netron_is_opened_where_it_is_installed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the file; where it is missing that is told before any work."""
    opened: list[str] = []
    viewer = types.ModuleType("netron")
    viewer.start = opened.append  # type: ignore[attr-defined]
    viewer.wait = lambda: opened.append("waited")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "netron", viewer)
    assert CliRunner().invoke(app, ["inspect", str(model), "--netron", "--quiet"]).exit_code == 0
    assert opened == [str(model), "waited"]
    monkeypatch.setitem(sys.modules, "netron", None)
    result = CliRunner().invoke(app, ["inspect", str(model), "--netron"])
    assert isinstance(result.exception, DependencyError)
    assert "pip install netron" in str(result.exception)


def test_what_is_too_long_goes_on_under_itself(tmp_path: Path) -> None:
    """A hindrance and its change are wrapped like a float island's: no word of them starts at the edge."""
    norm = onnx.helper.make_node("BatchNormalization", ["x", "one", "zero", "zero", "one"], ["y"], name="norm")
    arrays = {"one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32)}
    model = nets.model_of([norm], {"x": ["N", 3, "height", "width"]}, {"y": ["N", 3, "height", "width"]}, arrays)
    onnx.save(model, tmp_path / "model.onnx")
    lines = shown(tmp_path / "model.onnx").splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("hinders"))
    rows = [line for line in lines[start:] if line.strip()]
    assert sum(line.startswith(" ") for line in rows) >= 2
    assert {line.split()[0] for line in rows if not line.startswith(" ")} <= {"hinders", "change", "float"}

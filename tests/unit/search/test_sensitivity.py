"""The command ``sensitivity``: a table within 80 columns, and a stage that can be pasted into a config."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_models as nets
import pytest
from known_times import KnownTimes
from rich.console import Console
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.config.load import load_config
from onnxshrink.config.stages import QuantizeMixed, QuantizeStatic
from onnxshrink.core.errors import ConfigError, ModelError
from onnxshrink.report.sensitivity import print_sensitivity
from onnxshrink.search.sensitivity import Proposal, find_sensitivity, patch

STAGE = {
    "types": "u8s8",
    "reduce_range": False,
    "min_sqnr_db": 200,
    "max_float_ratio": 0.5,
    "schemes": ["static", "float"],
}


@pytest.fixture(scope="module", autouse=True)
def known_times() -> Iterator[None]:
    """No test waits for a clock."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("onnxshrink.stages.quantize_mixed.Stopwatch", KnownTimes)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small CNN and samples for it."""
    folder = tmp_path_factory.mktemp("files")
    onnx.save(nets.cnn(), folder / "model.onnx")
    np.savez(folder / "calib.npz", **nets.samples_of(nets.cnn(), 32))
    return folder / "model.onnx", folder / "calib.npz"


@pytest.fixture(scope="module")
def found(files: tuple[Path, Path]) -> Proposal:
    return find_sensitivity(*files, stage=STAGE)


def test_the_stage_can_be_pasted(found: Proposal, files: tuple[Path, Path], tmp_path: Path) -> None:
    """The YAML is one item of a list of stages, and a config with it is accepted as it means."""
    head = f"model: {{onnx: {files[0]}}}\ndata: {{calibration: {{npz: {files[1]}}}}}\nvariants:\n  mixed:\n"
    (tmp_path / "run.yaml").write_text(head + "".join(f"  {line}\n" for line in found.to_yaml().splitlines()))
    stage = load_config(tmp_path / "run.yaml").variants["mixed"][0]
    assert isinstance(stage, QuantizeStatic)
    assert stage.exclude_nodes == tuple(found.facts["assigned"])
    assert stage.exclude_nodes
    assert stage.types == "u8s8"


def test_the_table_fits_and_says_what_was_chosen(found: Proposal) -> None:
    """No line is longer than 80 columns, and each group that was given another scheme is marked."""
    console = Console(width=80, record=True, file=io.StringIO())
    print_sensitivity(found, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines[1 : lines.index("")]]
    assert len(rows) == 4
    marked = {row[0] for row in rows if row[-1] == "chosen"}
    assert marked
    assert marked <= set(found.facts["assigned"])
    (base,) = {line.rpartition(" in ")[2] for line in lines if line.startswith("dB then, noise gone, time:")}
    assert base == found.facts["base"]
    assert "all shares and ratios are of figures before rounding" in lines
    assert "200 dB is out of reach with at most 50% in float" in " ".join(" ".join(lines).split())


def test_the_command_writes_both(files: tuple[Path, Path], tmp_path: Path) -> None:
    """``--json`` prints the table and nothing else, ``-o`` writes the stage; both name the same nodes."""
    out = tmp_path / "patch.yaml"
    arguments = ["sensitivity", str(files[0]), "--data", str(files[1]), "--json", "-o", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--min-sqnr-db", "200", "--max-float-ratio", "0.5"])
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert {one["scheme"] for one in document["sensitivity"]} >= {"float"}
    assert set(document["singles"]) >= {"static", "float"}
    assert document["assigned"]
    assert all(name in out.read_text() for name in document["assigned"])


def test_a_mixture_is_patched_by_overrides() -> None:
    """What is not static and float alone becomes the mixed stage with one scheme and its exceptions."""
    settings = QuantizeMixed(min_sqnr_db=30, overrides={"a": "float"}, exclude_nodes=("z",))
    stage = patch(settings, {"base": "dynamic", "assigned": {"b": "static"}})
    assert stage["kind"] == "quantize_mixed"
    assert (stage["schemes"], stage["overrides"]) == (["dynamic"], {"a": "float", "b": "static"})
    assert QuantizeMixed.model_validate(stage).exclude_nodes == ("z",)
    assert patch(settings, {"base": "static", "assigned": {"b": "float"}})["exclude_nodes"] == ["z", "a", "b"]


def test_a_model_without_a_choice_is_told(files: tuple[Path, Path]) -> None:
    """With one scheme there is nothing to find out, and that is an error here."""
    with pytest.raises(ModelError, match="no node has a choice"):
        find_sensitivity(*files, stage={"schemes": ["static"]})


def test_a_model_that_is_quantized_already_is_refused_before_any_work(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the file's name: nothing is optimized first."""
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    path = tmp_path / "quantized.onnx"
    onnx.save(nets.model_of(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, weights), path)
    monkeypatch.setattr("onnxshrink.search.sensitivity.Memo", lambda *_: pytest.fail("it was worked on"))
    with pytest.raises(ModelError, match="quantized already") as caught:
        find_sensitivity(path, files[1])
    assert caught.value.where == str(path)


@pytest.mark.parametrize("out", ["nowhere/patch.yaml", "."])
def test_an_output_that_cannot_be_written_stops_before_any_work(
    files: tuple[Path, Path], tmp_path: Path, out: str
) -> None:
    """A folder that is not there, a folder in place of a file, and an input are refused at once."""
    for path in (tmp_path / out, files[0]):
        arguments = ["sensitivity", str(files[0]), "--data", str(files[1]), "-o", str(path)]
        assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)


def test_mistakes_are_told(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A file that is not there and a model with nothing to quantize are errors that say so."""
    with pytest.raises(ConfigError, match="no file"):
        find_sensitivity(tmp_path / "none.onnx", files[1])
    node = onnx.helper.make_node("Erf", ["x"], ["y"])
    erf = nets.model_of([node], {"x": ["N", 3, 16, 16]}, {"y": ["N", 3, 16, 16]}, {})
    onnx.save(erf, tmp_path / "erf.onnx")
    with pytest.raises(ModelError, match="no node"):
        find_sensitivity(tmp_path / "erf.onnx", files[1])
    with pytest.raises(ConfigError, match="nan") as caught:
        find_sensitivity(*files, stage={"min_sqnr_db": math.nan})
    assert (caught.value.want, bool(caught.value.fix)) == ("a finite number", True)

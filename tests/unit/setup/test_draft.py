"""What `init` writes: a config that a run would take, or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.config.load import load_config
from onnxshrink.config.source import FactorySource, OnnxSource
from onnxshrink.core.errors import ConfigError, DataError, ModelError, ShrinkError
from onnxshrink.setup.answers import Answers, read_input
from onnxshrink.setup.draft import draft, draft_digits, flow, write_draft

NET = "from torch import nn\n\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, samples and a factory."""
    monkeypatch.chdir(tmp_path)
    net = nets.cnn()
    onnx.save(net, "model.onnx")
    samples = nets.samples_of(net, 6)
    np.savez("data.npz", **samples, labels=np.arange(6))
    np.savez("turned.npz", x=np.zeros((6, 16, 16, 3), np.float32))
    np.savez("bytes.npz", x=np.zeros((6, 3, 16, 16), np.uint8))
    Path("mynets.py").write_text(NET)
    return tmp_path


def test_a_config_for_an_onnx_file_loads_and_says_what_was_found(project: Path) -> None:
    """Paths start at the config's folder, gates are those that were asked for, and the facts stand above."""
    (project / "configs").mkdir()
    out = Path("configs/mine.yaml")
    made = draft(Answers("model.onnx", "data.npz", max_size="1 MB", max_accuracy_drop=0.02), out)
    write_draft(made, out)
    config = load_config(out)
    assert made.template == "onnx"
    assert isinstance(config.model, OnnxSource)
    assert config.model.onnx == project / "model.onnx"
    assert config.gates.max_size == 1_000_000
    assert config.gates.max_accuracy_drop == 0.02
    assert config == made.config.model_copy(update={"name": "mine"})
    assert "# found: labels int64, classes 0 to 5" in made.text
    assert "# found: static int8 suits it" in made.text


def test_inputs_of_a_factory_follow_from_the_arrays(project: Path) -> None:
    """Torch does not say what a network takes; the archive does."""
    made = draft(Answers("mynets:build", "data.npz"), project / "c.yaml")
    assert made.template == "vision"
    assert isinstance(made.config.model, FactorySource)
    assert [str(spec) for spec in made.config.model.specs] == ["'x' float32[batch,3,16,16]"]


def test_the_processor_it_is_for_reaches_the_stages(project: Path) -> None:
    """arm64 stands in every static stage; this machine needs no word."""
    text = draft(Answers("model.onnx", "data.npz", device="arm64"), project / "c.yaml").text
    assert text.count("isa: arm64") == 2
    assert "isa" not in draft(Answers("model.onnx", "data.npz"), project / "c.yaml").text


@pytest.mark.parametrize(
    ("data", "fix"),
    [("turned.npz", "the layout is NHWC and the model wants NCHW"), ("bytes.npz", "save it as float32")],
)
def test_samples_that_do_not_fit_are_told_before_anything_is_written(project: Path, data: str, fix: str) -> None:
    """Wrong layout and bytes in place of floats are found now, with the way out."""
    with pytest.raises(DataError) as error:
        draft(Answers("model.onnx", data), project / "c.yaml")
    assert fix in str(error.value)


def test_a_quantized_model_is_refused(project: Path) -> None:
    """There is nothing to start from."""
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    weights = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.uint8)}
    onnx.save(nets.model_of(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, weights), "quantized.onnx")
    with pytest.raises(ModelError, match="quantized already"):
        draft(Answers("quantized.onnx", "data.npz"), project / "c.yaml")


def test_nothing_is_written_over_without_being_told(project: Path) -> None:
    """A file that is there stays byte for byte, unless --force is given."""
    out = project / "shrink.yaml"
    out.write_text("mine")
    arguments = ["init", str(out), "--model", "model.onnx", "--data", "data.npz", "--yes"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "--force" in str(result.exception)
    assert out.read_text() == "mine"
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0
    load_config(out)


def test_a_model_that_stands_first_is_the_model_and_is_never_written_over(project: Path) -> None:
    """As with every other command; --force gives up no model, no samples, and nothing that is no config."""
    call = CliRunner().invoke
    before = {name: (project / name).read_bytes() for name in ("model.onnx", "data.npz", "mynets.py")}
    assert call(app, ["init", "model.onnx", "--data", "data.npz", "--yes", "--force"]).exit_code == 0
    config = load_config(project / "shrink.yaml")
    assert isinstance(config.model, OnnxSource)
    assert config.model.onnx == project / "model.onnx"
    (project / "data.yaml").symlink_to("data.npz")
    rest = ["--data", "data.npz", "--yes", "--force"]
    for arguments, what in (
        (["model.onnx", "--model", "other.onnx"], "two models are named"),
        (["data.npz", "--model", "model.onnx"], "would overwrite an input|is no config"),
        (["mynets.py", "--model", "model.onnx"], "is no config"),
        (["data.yaml", "--model", "model.onnx"], "would overwrite an input"),
    ):
        error = call(app, ["init", *arguments, *rest]).exception
        assert isinstance(error, ConfigError), arguments
        assert re.search(what, error.what)
        assert all((error.where, error.got, error.want, error.fix))
    assert before == {name: (project / name).read_bytes() for name in before}


def test_the_command_says_what_to_do_next(project: Path) -> None:
    """The last line is the command that runs the config; without a terminal nothing is asked."""
    result = CliRunner().invoke(app, ["init", "a.yaml", "--model", "model.onnx", "--data", "data.npz"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].split() == ["next", "onnxshrink", "run", "a.yaml"]
    missing = CliRunner().invoke(app, ["init", "b.yaml", "--model", "model.onnx"])
    assert isinstance(missing.exception, ConfigError)
    assert "--data samples.npz" in str(missing.exception)
    assert not (project / "b.yaml").exists()


@pytest.mark.parametrize(
    ("model", "template", "message"),
    [
        ("model.onnx", "vision", "not for ONNX files"),
        ("mynets:build", "onnx", "not for torch factories"),
        ("gone.onnx", None, "no file"),
        ("mynets:gone", None, "no 'gone'"),
    ],
)
def test_answers_that_do_not_fit_are_mistakes(project: Path, model: str, template: str | None, message: str) -> None:
    """Each says what is wrong with it."""
    with pytest.raises(ShrinkError, match=message):
        draft(Answers(model, "data.npz"), project / "c.yaml", template)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "got", "fix"),
    [
        (["model.onnx"], "--model model.onnx", "leave out --template digits"),
        (["--model", "mynets:build", "--input", "x=n,3"], "--model mynets:build, --input …", "--template digits"),
        (["--max-size", "5 MB", "--eval-data", "d.npz"], "--eval-data d.npz, --max-size 5 MB", "leave out --eval-data"),
        (["--device", "arm64", "--max-accuracy-drop", "0"], "--device arm64, --max-accuracy-drop 0.0", "leave out"),
    ],
)
def test_what_the_demonstration_would_ignore_is_refused(
    project: Path, arguments: list[str], got: str, fix: str
) -> None:
    """It has a model, data and limits of its own: nothing that was asked for is passed over in silence."""
    command = ["init", "--template", "digits", "--yes", *arguments]
    refused = CliRunner().invoke(app, command, standalone_mode=False).exception
    assert isinstance(refused, ConfigError)
    assert refused.got == got
    assert fix in str(refused.fix)
    assert not (project / "shrink.yaml").exists()


@pytest.mark.parametrize(
    ("more", "where"), [({"weights": "w.pth"}, "--weights"), ({"inputs": {"x": read_input("x=n,3")[1]}}, "--input")]
)
def test_what_an_onnx_file_says_itself_is_not_given_beside_it(project: Path, more: dict[str, Any], where: str) -> None:
    """Neither weights nor inputs: they are those of a factory, and would be ignored."""
    with pytest.raises(ConfigError, match="brings its weights") as caught:
        draft(Answers("model.onnx", "data.npz", **more), project / "c.yaml")
    assert caught.value.where == where


def test_the_demonstration_is_the_recipe(tmp_path: Path) -> None:
    """Another folder, the same config."""
    made = draft_digits(tmp_path / "digits.yaml")
    recipe = load_config(Path(__file__).parents[3] / "onnxshrink" / "recipes" / "digits.yaml")
    assert made.config.model_copy(update={"name": "digits"}) == recipe
    with pytest.raises(ConfigError, match="are not at"):
        draft_digits(tmp_path / "digits.yaml", "gone.npz")


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("image=batch,3,224,224", "'image' float32[batch,3,224,224]"),
        ("ids=batch,128:int64", "'ids' int64[batch,128]"),
    ],
)
def test_inputs_are_read(text: str, spec: str) -> None:
    """Name, shape and dtype."""
    name, found = read_input(text)
    assert str(found.spec(name)) == spec


@pytest.mark.parametrize("text", ["image", "=1,2", "image=", "image=1,,2", "image=1,2:float33"])
def test_inputs_that_cannot_be_read_are_mistakes(text: str) -> None:
    """The message shows how one looks."""
    with pytest.raises(ConfigError, match="cannot be read"):
        read_input(text)


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs", "Cn"]), min_size=1, max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
@settings(derandomize=True, deadline=None)
def test_values_come_back_from_yaml_as_they_were(value: object) -> None:
    """Whatever a path or a name is, YAML reads it as it was."""
    assert YAML(typ="safe", pure=True).load(f"value: {flow(value)}\n") == {"value": value}


def test_a_size_that_cannot_be_read_is_told_by_its_option(project: Path) -> None:
    """Not by a line of a file that was never written."""
    command = ["init", "--yes", "--model", "model.onnx", "--data", "data.npz", "--max-size", "lots"]
    result = CliRunner().invoke(app, command, standalone_mode=False)
    assert isinstance(result.exception, ConfigError)
    assert (result.exception.where, result.exception.got) == ("--max-size", "lots")
    assert not (project / "shrink.yaml").exists()

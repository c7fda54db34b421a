"""Who has written no config is told of flags, and of a config only where there is no flag for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as nets
import pytest
from typer.testing import CliRunner

from onnxshrink.cli import app
from onnxshrink.commands.compare import compare
from onnxshrink.commands.explain import explain
from onnxshrink.commands.fit import fit
from onnxshrink.commands.flags import flags_of, in_flags, in_words_of
from onnxshrink.commands.quantize import quantize
from onnxshrink.commands.sensitivity import sensitivity
from onnxshrink.config.budget import Budget
from onnxshrink.config.gates import Gates
from onnxshrink.config.stages import QuantizeMixed, QuantizeStatic
from onnxshrink.core.errors import ConfigError, ConfigErrors, ShrinkError

COMMANDS = (quantize, fit, compare, explain, sensitivity)
YAML = re.compile(r"\b(data|budget|gates|targets|variants|stages)[.\[:]|\w: [{\[]|\b\w+_\w+: \S|`|arguments")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, one whose batch is fixed, and samples with labels, without, and with labels of another name."""
    monkeypatch.chdir(tmp_path)
    model = nets.cnn()
    samples = nets.samples_of(model, 8)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", **samples)
    np.savez("l.npz", **samples, labels=np.arange(8))
    np.savez("y.npz", **samples, y=np.arange(8))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, "fixed.onnx")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "where", "fix"),
    [
        ("compare m.onnx m.onnx --data d.npz --max-accuracy-drop 0.01", "--max-accuracy-drop", "the file of --data"),
        ("compare m.onnx m.onnx --data d.npz --metric top", "--metric", "did you mean"),
        ("compare m.onnx m.onnx --data d.npz --max-size lots", "--max-size", "60 kB"),
        ("compare m.onnx m.onnx --data y.npz --metric mae", "y.npz", "save 'y' as 'labels' in the file"),
        ("fit m.onnx --data d.npz --max-drop 0.01", "--max-drop", "--min-sqnr-db 20"),
        ("fit m.onnx --data l.npz --max-drop 5", "--max-drop", "0.05"),
        ("fit m.onnx --data l.npz --max-size lots", "--max-size", "60 kB"),
        ("fit m.onnx --data d.npz --max-size 9kB --time-limit soon", "--time-limit", ""),
        ("fit m.onnx --data d.npz --max-size 9kB --minimize accuracy_drop", "--minimize", ""),
        ("quantize fixed.onnx --data d.npz -o o.onnx", "d.npz", "--max-samples 6"),
        ("quantize m.onnx --data d.npz -o o.onnx --scheme static --exclude gone", "--exclude", "take the name"),
        ("quantize m.onnx --data d.npz -o o.onnx --scheme dynamic --method mse", "--scheme", "leave out method"),
    ],
)
def test_a_mistake_of_one_line_is_told_in_its_flags(folder: Path, command: str, where: str, fix: str) -> None:
    """Where it is and what to do about it: no field of a config that nobody wrote."""
    error = CliRunner().invoke(app, [*command.split(), "--quiet"], standalone_mode=False).exception
    assert isinstance(error, ShrinkError), error
    assert str(error.where).removeprefix(f"{folder}/") == where
    assert fix in str(error.fix)
    for text in (error.where, error.want, error.fix):
        assert not YAML.search(text or ""), text


def test_every_limit_and_setting_of_a_command_is_a_field() -> None:
    """So a field that is called otherwise on the command line must have its alias, or it is told as a field."""
    own = {"scheme", "max_samples", "threads"}
    fields = {
        compare: {*Gates.model_fields, "metric"},
        fit: {*Budget.model_fields},
        quantize: {*QuantizeStatic.model_fields},
        sensitivity: {*QuantizeMixed.model_fields},
    }
    for command, known in fields.items():
        aliases = {"max_drop", "workers", "exclude"}
        named = {name for name in flags_of(command) if "." not in name} - own
        assert named - aliases <= known, named - aliases - known


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_is_spelled_as_typer_spells_it(command: Callable[..., Any]) -> None:
    """Each one is in the command's help."""
    text = CliRunner().invoke(app, [command.__name__, "--help"], env={"COLUMNS": "200"}).stdout
    for flag in flags_of(command).values():
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", text), flag


def test_what_no_flag_says_stays_and_is_for_a_config() -> None:
    """A metric of several settings cannot be written on one line: where it can be is told; plain words are no field."""
    flags = flags_of(compare)
    for text in (
        "max_sizes, or the metric of the data",
        "variants.int8[0].percentile",
        "the data: all of them",
        "/home/max_size/max_size.npz",
        "a node such as 'max_size'",
        "max_size.onnx",
        "runs/gates.max_size",
    ):
        assert in_words_of(text, flags) == text
    with pytest.raises(ConfigError) as caught, in_flags(compare):
        raise ConfigError("no", fix="metric: {kind: miou, n_classes: …}")
    assert caught.value.fix == "in a config, as onnxshrink init writes it: metric: {kind: miou, n_classes: …}"


def test_several_mistakes_are_each_told_in_flags() -> None:
    """They are printed one by one."""
    errors = [
        ConfigError("a", where="arguments  gates.max_size"),
        ConfigError("b", where="arguments  gates.min_sqnr_db"),
    ]
    with pytest.raises(ConfigErrors) as caught, in_flags(compare):
        raise ConfigErrors(errors)
    assert [error.where for error in caught.value.errors] == ["--max-size", "--min-sqnr-db"]
    assert "gates" not in str(caught.value)

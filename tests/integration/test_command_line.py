from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import command, environment, onnxshrink

import onnxshrink as onnxshrink_package
from onnxshrink.config.schema import SCHEMA_FILE


def test_schema_prints_what_the_repository_keeps(tmp_path: Path) -> None:
    """``onnxshrink schema`` is the file beside the config's code."""
    result = onnxshrink("schema", cwd=tmp_path)
    assert json.loads(result.stdout) == json.loads(SCHEMA_FILE.read_text())


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    """A misspelt option and a missing argument are the user's to fix."""
    assert onnxshrink("run", "--nope", cwd=tmp_path).returncode == 2
    assert onnxshrink("quantize", "m.onnx", cwd=tmp_path).returncode == 2
    assert onnxshrink("runn", cwd=tmp_path).returncode == 2


def test_a_wrong_choice_is_told_in_plain_words(tmp_path: Path) -> None:
    """The option, what was given and the choices; nothing of how they are looked at."""
    said = onnxshrink("quantize", "m.onnx", "--scheme", "dinamic", cwd=tmp_path)
    assert said.returncode == 2
    assert "'dinamic' is not one of 'auto', 'static', 'dynamic'" in said.stderr
    assert "Value error" not in said.stderr


def test_a_python_without_the_dependencies_is_told_what_to_do(tmp_path: Path) -> None:
    """A checkout that was never installed, or whose environment is not active: no traceback, and the status is 2."""
    surroundings = environment() | {"PYTHONPATH": str(Path(onnxshrink_package.__file__).parents[1])}
    bare = [sys.executable, "-S", "-m", "onnxshrink", "--help"]  # -S: without site-packages
    said = subprocess.run(bare, cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert said.returncode == 2
    assert "No module named 'typer'" in said.stderr
    assert "pip install -e ." in said.stderr
    assert ".venv/bin/activate" in said.stderr
    assert "Traceback" not in said.stderr


def test_help_and_version_are_there(tmp_path: Path) -> None:
    """Every command is listed, and the version is the package's."""
    shown = onnxshrink("--help", cwd=tmp_path)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("run", "quantize", "compare", "schema", "Exit status"))
    assert onnxshrink("--version", cwd=tmp_path).stdout.startswith("onnxshrink ")


@pytest.mark.serial
def test_help_answers_in_half_a_second(tmp_path: Path) -> None:
    """No framework is imported before a command runs; where Python and typer are slow themselves, five times theirs."""
    lines = {"help": command("--help"), "typer": [*command()[:1], "-c", "import typer.rich_utils"]}
    times: dict[str, list[float]] = {name: [] for name in lines}
    for name in [*lines] * 5:
        start = time.perf_counter()
        subprocess.run(lines[name], cwd=tmp_path, env=environment(), capture_output=True, check=True)
        times[name].append(time.perf_counter() - start)
    assert min(times["help"]) < max(0.5, 5 * min(times["typer"])), times
    probe = "import sys, onnxshrink.cli; print({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules))"
    loaded = subprocess.run([*command()[:1], "-c", probe], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"

"""The task runner makes its environment whatever a run before left behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import venv
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "dev.py"


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The task runner, with its environment in a folder of its own."""
    spec = importlib.util.spec_from_file_location("dev", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / ".venv"
    monkeypatch.setattr(module, "VENV", folder)
    monkeypatch.setattr(module, "PYTHON", folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    return module


@pytest.mark.slow
def test_an_environment_without_pip_is_made_anew(dev: ModuleType) -> None:
    """Ctrl-C while the environment is made leaves a Python without pip; the next attempt mends that, and keeps it."""
    venv.create(dev.VENV, with_pip=False)
    (dev.VENV / "left over").touch()
    dev.make_environment()
    assert subprocess.run([dev.PYTHON, "-m", "pip", "--version"], check=False).returncode == 0
    assert not (dev.VENV / "left over").exists()
    (dev.VENV / "installed").touch()
    dev.make_environment()
    assert (dev.VENV / "installed").exists()


@pytest.mark.parametrize("status", [0, 1])
def test_the_demo_says_how_to_go_on_where_it_succeeded(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    """The commands that the run prints need the environment that the demo made."""
    monkeypatch.setattr(dev, "install", lambda _: None)
    monkeypatch.setattr(dev, "run", lambda *_: status)
    assert dev.demo([]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (status == 0)
    assert all(line.startswith("to go on: ") and "activate" in line for line in lines)

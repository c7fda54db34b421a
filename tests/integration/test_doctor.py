"""`onnxshrink doctor` on an installation that is broken."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from command_line import PATIENCE, command, environment


@pytest.mark.slow
def test_doctor_speaks_where_onnxruntime_does_not_load(tmp_path: Path) -> None:
    """It is needed most where nothing else works: exit status 1, the reason, and no traceback."""
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnxruntime.so: undefined symbol')")
    result = subprocess.run(
        command("doctor", "--json"),
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert result.returncode == 1, result.stderr
    assert not result.stderr
    document = json.loads(result.stdout)
    assert document["providers"] == []
    assert any("undefined symbol" in f["what"] for f in document["findings"] if f["level"] == "bad")

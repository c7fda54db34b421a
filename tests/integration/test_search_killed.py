"""kill -9 in the middle of a search: the same command goes on, and ends with the trials of an unbroken one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import PATIENCE, environment, onnxshrink, report_of
from small_search import make_search

pytest.importorskip("optuna")
pytestmark = pytest.mark.slow

CONFIG = """\
model: {onnx: m.onnx}
data: {calibration: {npz: calib.npz}, evaluation: {npz: test.npz}}
stages: [{kind: optimize}]
targets: [{latency_seconds: 0.05}]
budget: {max_size: 2 kB, min_sqnr_db: 10, families: [fp16, static], time_limit: 30 min}
"""
# The command line, killed when its third trial has ended and is not yet recorded.
KILLED = """
import os
import signal
import sys

from onnxshrink.__main__ import main
from onnxshrink.search.record import Record

add, done = Record.add, []


def add_or_end(record, trial):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    add(record, trial)
    done.append(trial)


Record.add = add_or_end
main()
"""


def project(folder: Path) -> Path:
    folder.mkdir()
    make_search(folder)
    (folder / "cfg.yaml").write_text(CONFIG)
    return folder


def n_recorded(folder: Path) -> int:
    """Trials that are remembered."""
    journal = folder / "runs" / ".cfg.search" / "search.journal"
    return journal.read_text().count('\\"status\\"') if journal.exists() else 0


def finished(folder: Path) -> dict[str, Any]:
    report_of(onnxshrink("run", "cfg.yaml", "--json", cwd=folder))
    found: dict[str, Any] = json.loads((folder / "runs/cfg/search.json").read_text())
    return found


def essence(search: dict[str, Any]) -> list[Any]:
    return [(t["number"], t["point"], t["status"], t["digest"]) for t in search["trials"]]


def test_a_killed_search_goes_on_and_ends_alike(tmp_path: Path) -> None:
    """Killed twice; nothing is tried twice, and front and trials are those of a search that nobody disturbed."""
    folder = project(tmp_path / "killed")
    for turn in (1, 2):
        killed = subprocess.run(
            [sys.executable, "-W", "error", "-c", KILLED, "run", "cfg.yaml", "--json"],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert n_recorded(folder) == 2 * turn
    resumed, unbroken = finished(folder), finished(project(tmp_path / "unbroken"))
    assert len(resumed["trials"]) > 4
    assert essence(resumed) == essence(unbroken)
    assert resumed["front"] == unbroken["front"]
    assert n_recorded(folder) == n_recorded(tmp_path / "unbroken") == len(unbroken["trials"])

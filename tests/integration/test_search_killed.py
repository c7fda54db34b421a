"""kill -9 in the middle of a search: the same command goes on, and ends with the trials of an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import command, environment, onnxshrink, report_of
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
    recorded = [0]
    for _ in range(2):
        with subprocess.Popen(
            command("run", "cfg.yaml", "--json"),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while process.poll() is None and n_recorded(folder) < recorded[-1] + 2:
                time.sleep(0.005)
            assert process.poll() is None, "it ended before it was killed"
            os.kill(process.pid, signal.SIGKILL)
        recorded.append(n_recorded(folder))
    resumed, unbroken = finished(folder), finished(project(tmp_path / "unbroken"))
    assert 0 < recorded[1] < recorded[2] < len(resumed["trials"])
    assert essence(resumed) == essence(unbroken)
    assert resumed["front"] == unbroken["front"]
    assert n_recorded(folder) == n_recorded(tmp_path / "unbroken") == len(unbroken["trials"])

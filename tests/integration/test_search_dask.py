"""A real dask scheduler and two workers, each a process of its own; one is killed in the middle of a search."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import PATIENCE
from small_search import essence, front, make_search, searched

from onnxshrink.core.errors import ConfigError
from onnxshrink.search.state import State

pytest.importorskip("distributed", reason="dask is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_search(tmp_path)


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A scheduler's address; it takes a port that is free and writes it down."""
    written = tmp_path / "scheduler.json"
    process = started(tmp_path, "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(written))
    until = time.monotonic() + PATIENCE
    while not (address := _address(written)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert address, (tmp_path / "scheduler.log").read_text()
    yield address
    ended(process)


def _address(written: Path) -> str | None:
    """None while the file is not there or not whole."""
    try:
        address: str = json.loads(written.read_text())["address"]
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return address


@pytest.fixture
def workers(tmp_path: Path, scheduler: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two workers that have joined it."""
    from distributed import Client

    processes = [
        started(tmp_path, "worker", scheduler, "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path))
        for _ in range(2)
    ]
    with Client(scheduler, timeout=PATIENCE) as client:
        client.wait_for_workers(2, timeout=PATIENCE)
    yield processes
    for process in processes:
        ended(process)


def started(folder: Path, what: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / f"{what}.log").open("ab") as log:
        line = [sys.executable, "-m", "dask", what, *arguments, "--no-dashboard"]
        return subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(PATIENCE)


def test_a_killed_worker_of_a_cluster_changes_nothing(
    folder: Path, scheduler: str, workers: list[subprocess.Popen[bytes]]
) -> None:
    """The other one does its work as well: front and trials are those of a search in this process alone."""
    _, alone = searched(folder, "alone", {})

    def kill_one(state: State) -> None:
        if len(state.trials) >= 2 and state.at_work and workers[0].poll() is None:
            os.kill(workers[0].pid, signal.SIGKILL)
            workers[0].wait(PATIENCE)

    cluster = {"parallel": {"kind": "dask", "address": scheduler}}
    report, together = searched(folder, "cluster", cluster, watch=kill_one)
    assert workers[0].poll() == -signal.SIGKILL
    assert workers[1].poll() is None
    assert report.winner is not None
    assert front(together) == front(alone)
    assert sorted(map(str, essence(together))) == sorted(map(str, essence(alone)))


def test_a_cluster_without_workers_is_told(folder: Path, scheduler: str) -> None:
    """It would wait forever; the error says how to start one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with pytest.raises(ConfigError) as caught:
            searched(folder, "runs", {"parallel": {"kind": "dask", "address": scheduler}})
        if "no workers" in caught.value.what or time.monotonic() > deadline:
            break
    assert "no workers" in caught.value.what
    assert f"dask worker {scheduler} --nthreads 1" in (caught.value.fix or "")

"""A real dask scheduler and two workers, each a process of its own; one is killed in the middle of a search."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
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
    """A scheduler's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    process = started(tmp_path, "scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2])
    yield address
    ended(process)


@pytest.fixture
def workers(tmp_path: Path, scheduler: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two workers that have joined it."""
    from distributed import Client

    processes = [
        started(tmp_path, "worker", scheduler, "--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path))
        for _ in range(2)
    ]
    with Client(scheduler, timeout=60) as client:
        client.wait_for_workers(2, timeout=120)
    yield processes
    for process in processes:
        ended(process)


def started(folder: Path, what: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (folder / f"{what}.log").open("ab") as log:
        line = [sys.executable, "-m", "dask", what, *arguments, "--no-dashboard"]
        return subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(60)


def test_a_killed_worker_of_a_cluster_changes_nothing(
    folder: Path, scheduler: str, workers: list[subprocess.Popen[bytes]]
) -> None:
    """The other one does its work as well: front and trials are those of a search in this process alone."""
    _, alone = searched(folder, "alone", {})

    def kill_one(state: State) -> None:
        if len(state.trials) >= 2 and state.at_work and workers[0].poll() is None:
            os.kill(workers[0].pid, signal.SIGKILL)
            workers[0].wait(60)

    cluster = {"parallel": {"kind": "dask", "address": scheduler}}
    report, together = searched(folder, "cluster", cluster, watch=kill_one)
    assert workers[0].poll() == -signal.SIGKILL
    assert workers[1].poll() is None
    assert report.winner is not None
    assert front(together) == front(alone)
    assert sorted(map(str, essence(together))) == sorted(map(str, essence(alone)))


def test_a_cluster_without_workers_is_told(folder: Path, scheduler: str) -> None:
    """It would wait forever; the error says how to start one."""
    deadline = time.monotonic() + 60
    while True:
        with pytest.raises(ConfigError) as caught:
            searched(folder, "runs", {"parallel": {"kind": "dask", "address": scheduler}})
        if "no workers" in caught.value.what or time.monotonic() > deadline:
            break
    assert "no workers" in caught.value.what
    assert f"dask worker {scheduler} --nthreads 1" in (caught.value.fix or "")

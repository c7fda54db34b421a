"""A search over real trials: repeated, answered from the store, decided by the clock, and with a worker that dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from small_search import essence, front, make_search, searched

from onnxshrink.core.report import Report
from onnxshrink.search.state import State

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_search(tmp_path)


def test_two_searches_are_equal_and_a_second_one_runs_nothing(folder: Path) -> None:
    """Equal trials in fresh folders; a repetition finds every step in the store, and only latency is measured."""
    first, search = searched(folder, "one", {})
    assert first.winner is not None
    assert essence(searched(folder, "two", {})[1]) == essence(search)
    again, repeated = searched(folder, "one", {})
    assert essence(repeated) == essence(search)
    assert again.steps
    assert all(step.cached for step in again.steps)
    assert again.winner == first.winner
    assert (folder / "one/r/model.onnx").is_file()
    assert Report.read(folder / "one/r/report.json") == again
    # The report's config is one that makes the winner.
    assert again.winner in again.config["variants"]
    points = [(json.dumps(t["point"], sort_keys=True), t["status"]) for t in search["trials"]]
    assert len(points) == len(set(points))


def test_a_limit_that_no_model_keeps_in_time_names_what_would_do(folder: Path) -> None:
    """Every model that keeps the others is timed before the latency limit is given up."""
    report, search = searched(folder, "runs", {"max_size": "1 MB", "max_latency_ratio": 0.001})
    assert report.winner is None
    assert "max_latency_ratio" in report.selection
    digests = {
        t["digest"] for t in search["trials"] if t["status"] == "evaluated" and t["limits"]["max_size"] == "passed"
    }
    assert {row.digest for row in report.variants} == digests
    assert all({v.gate for v in row.verdicts} >= {"max_latency_ratio", "max_size"} for row in report.variants)


def test_a_killed_worker_changes_nothing(folder: Path) -> None:
    """One of two processes is killed while it works: the same trials as here, one by one."""
    _, alone = searched(folder, "alone", {})
    killed: list[int] = []

    def kill_one(state: State) -> None:
        children = [child.pid for child in multiprocessing.active_children() if child.pid is not None]
        if state.trials and state.at_work and children and not killed:
            os.kill(children[0], signal.SIGKILL)
            killed.append(children[0])

    parallel = {"parallel": {"kind": "processes", "workers": 2}}
    _, together = searched(folder, "together", parallel, watch=kill_one)
    assert killed
    assert front(together) == front(alone)
    assert sorted(map(str, essence(together))) == sorted(map(str, essence(alone)))

"""kill -9 at any moment: the store holds whole results or none, and a rerun gives the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onnxshrink.core.artifact import Digest, digest_folder
from onnxshrink.core.store import Store

KEYS = ("first", "second")

# Makes two results in each of the stores named on the command line, each in a forked process. With "kill", a profiler,
# which Python calls before each C function, kills the process before the first operation on files in the first
# store, the second in the second store, and so on: every state that a crash can leave is left, one by one.
SCRIPT = """
import os, pathlib, signal, sys
from onnxshrink.core.store import Store

LOOKS = {"stat", "lstat", "fstat", "fspath", "scandir", "listdir", "read", "urandom"}  # they change nothing
os.fsync = lambda descriptor: None  # what a killed process wrote is not lost; only a power cut needs this

def work(name):
    def fill(folder):
        (folder / "sub").mkdir()
        for i in range(2):
            with (folder / "sub" / str(i)).open("wb") as file:
                file.write(name.encode() * 1000)
        return {"name": name}
    return fill

def run(root, kill_at):
    seen = 0
    def hook(frame, event, function):
        nonlocal seen
        if event == "c_call" and function.__name__ not in LOOKS:
            home = function.__module__ or type(function.__self__).__module__
            seen += home in ("posix", "io", "_io", "fcntl")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    if kill_at:
        sys.setprofile(hook)
    store = Store(root)
    for name in ("first", "second"):
        if store.find(name, "onnx") is None:
            store.make(name, "onnx", work(name), lambda: 0.0)

print("ready", flush=True)
for number, root in enumerate(sys.argv[2:], 1):
    child = os.fork()
    if child == 0:
        run(pathlib.Path(root), number if sys.argv[1] == "kill" else 0)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, flush=True)
    if sys.argv[1] == "kill" and status == 0:
        break  # it ran to its end before it was its turn
"""


def _start(mode: str, *roots: Path) -> subprocess.Popen[str]:
    """The script at work on ``roots``."""
    command = [sys.executable, "-S", "-c", SCRIPT, mode, *map(str, roots)]
    # A process group of its own, so that the script and the process it forked can be killed together.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        process_group=0,
    )


def _statuses(process: subprocess.Popen[str]) -> list[int]:
    """Exit status for each root, when all are done."""
    output, _ = process.communicate()
    return [int(line) for line in output.split()[1:]]


def _require_whole(root: Path) -> None:
    """Every object has the bytes of its name, and every memo can be read and names an object that is there."""
    objects = root / "objects"
    for path in objects.iterdir() if objects.exists() else ():
        assert digest_folder(path) == path.name
    memos = root / "memo"
    for path in memos.iterdir() if memos.exists() else ():
        assert (objects / json.loads(path.read_bytes())["object"]).is_dir()


def _results(root: Path) -> list[str]:
    """Digests of what the store holds, which has nothing else."""
    store = Store(root)
    found = [store.find(Digest(key), "onnx") for key in KEYS]
    assert list((root / "work").iterdir()) == []
    return [entry.artifact.digest for entry in found if entry is not None]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Digests of a run that nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    assert _statuses(_start("run", root)) == [0]
    results = _results(root)
    assert len(results) == len(KEYS)
    return results


def test_killed_before_each_operation_on_files(tmp_path: Path, expected: list[str]) -> None:
    """Killed before the first, second, … last operation on files, a store is whole and a rerun gives the same."""
    roots = [tmp_path / str(number) for number in range(600)]
    statuses = _statuses(_start("kill", *roots))
    n_killed = len(statuses) - 1
    assert statuses == [-signal.SIGKILL] * n_killed + [0], "the last one ran to its end"
    assert n_killed > 60, "the profiler saw too few operations for this to mean anything"
    roots = roots[:n_killed]
    for root in roots:
        _require_whole(root)
    assert set(_statuses(_start("run", *roots))) == {0}
    for root in roots:
        _require_whole(root)
        assert _results(root) == expected


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, expected: list[str]) -> None:
    """Killed again and again at random moments, in the middle of any operation, a store stays whole."""
    rng = random.Random(0)  # noqa: S311 - no secret
    for turn in range(30):
        root = tmp_path / str(turn // 3)
        process = _start("run", root)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.random() * 0.03)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        _require_whole(root)
        if turn % 3 == 2:
            assert _statuses(_start("run", root)) == [0]
            assert _results(root) == expected

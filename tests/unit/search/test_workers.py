from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_line import PATIENCE

import onnxshrink.search.workers as module
from onnxshrink.config.budget import Dask, Processes
from onnxshrink.core.errors import ConfigError, DependencyError
from onnxshrink.search.attempt import Task
from onnxshrink.search.trial import Trial
from onnxshrink.search.workers import open_workers

TASKS = [Task(number, {"scheme": str(number)}, "probe") for number in range(6)]


class Always:
    """As much time as one wants."""

    def allows(self, task: Task) -> bool:
        """Any."""
        del task
        return True

    def is_over(self) -> bool:
        """Never."""
        return False


class Until(Always):
    """Time until told otherwise."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def allows(self, task: Task) -> bool:
        """Any, until then."""
        del task
        return not self.over.is_set()

    def is_over(self) -> bool:
        """From then on."""
        return self.over.is_set()


def done(task: Task) -> Trial:
    time.sleep(0.02 * (5 - task.number))  # the last ones end first
    return Trial(task.number, task.point, "probed")


def lethal(folder: Path, task: Task) -> Trial:
    """Kill its own process the first time that the third task is done."""
    mark = folder / "killed"
    if task.number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return done(task)


def numbers(trials: list[Trial]) -> list[int]:
    return [trial.number for trial in trials]


@pytest.mark.parametrize("parallel", [None, "threads"])
def test_trials_come_in_the_order_of_their_tasks(parallel: str | None) -> None:
    """Whoever ends first: what is remembered does not depend on it."""
    with ThreadPoolExecutor(3) as executor, open_workers(None, executor if parallel else None) as workers:
        assert numbers(list(workers(done, TASKS, Always()))) == [0, 1, 2, 3, 4, 5]


def test_trials_are_given_as_soon_as_all_before_them_are_there() -> None:
    """So that a search that is killed has remembered them."""
    last = threading.Event()

    def slow_last(task: Task) -> Trial:
        if task.number == 5:
            assert last.wait(PATIENCE)
        return Trial(task.number, task.point, "probed")

    with ThreadPoolExecutor(3) as executor, open_workers(None, executor) as workers:
        given = workers(slow_last, TASKS, Always())
        assert numbers([next(given) for _ in range(5)]) == [0, 1, 2, 3, 4]
        last.set()
        assert numbers(list(given)) == [5]


@pytest.mark.slow
def test_a_killed_process_costs_no_trial(tmp_path: Path) -> None:
    """The pool is opened anew, and every task is done."""
    with open_workers(Processes(workers=2)) as workers:
        assert numbers(list(workers(partial(lethal, tmp_path), TASKS, Always()))) == [0, 1, 2, 3, 4, 5]
        assert (tmp_path / "killed").exists()
        assert numbers(list(workers(done, TASKS[:2], Always()))) == [0, 1]


class Lossy(Executor):
    """Loses every task but those that ``keeps`` names."""

    def __init__(self, keeps: Callable[[Task], bool]) -> None:
        self._keeps = keeps
        self.n_begun = 0

    def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
        """Done at once, or lost."""
        self.n_begun += 1
        future: Future[Any] = Future()
        if self._keeps(args[0]):
            future.set_result(fn(*args))
        else:
            future.set_exception(type("KilledWorker", (Exception,), {})("lost"))
        return future


def test_a_trial_that_kills_every_worker_ends_the_search() -> None:
    """Not forever again: after three rounds without a result the trial is named, with what to do."""
    executor = Lossy(lambda task: task.number != 3)
    with open_workers(None, executor) as workers, pytest.raises(ConfigError, match="died 3 times") as caught:
        list(workers(done, TASKS, Always()))
    assert "'scheme': '3'" in str(caught.value.got)
    assert caught.value.fix
    assert executor.n_begun == 6 + 3


def test_an_error_of_a_trial_is_no_lost_worker() -> None:
    """What the user must mend ends the search with its own message."""

    def wrong(task: Task) -> Trial:
        raise ConfigError(f"task {task.number} is wrong")

    with (
        ThreadPoolExecutor(1) as executor,
        open_workers(None, executor) as workers,
        pytest.raises(ConfigError, match="task 0 is wrong"),
    ):
        list(workers(wrong, TASKS, Always()))


@pytest.mark.parametrize("parallel", [None, "threads"])
def test_when_time_is_over_nothing_is_begun_and_nothing_invented(parallel: str | None) -> None:
    """What was finished is given; what ended without a result, or was not begun, is not."""
    until = Until()

    def work(task: Task) -> Trial | None:
        if task.number == 1:
            until.over.set()
            return None
        return Trial(task.number, task.point, "probed")

    with ThreadPoolExecutor(1) as executor, open_workers(None, executor if parallel else None) as workers:
        trials = list(workers(work, TASKS, until))
    assert 0 in numbers(trials)
    assert 1 not in numbers(trials)
    if not parallel:
        assert numbers(trials) == [0]


def test_workers_that_never_answer_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster without a single worker left does not hold the search beyond its time."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.05)
    until = Until()

    class Gone(Lossy):
        def submit(self, fn: Any, /, *args: Any, **_: Any) -> Future[Any]:
            """Never done."""
            del fn
            future: Future[Any] = Future()
            future.set_running_or_notify_cancel()  # cannot be called off
            if args[0].number == 5:
                until.over.set()
            return future

    with open_workers(None, Gone(lambda _: True)) as workers:
        assert list(workers(done, TASKS, until)) == []


def endless(mark: Path, task: Task) -> Trial | None:
    """A single step that tells nothing of itself, so that no deadline ends it."""
    del task
    mark.touch()
    while True:
        time.sleep(0.05)


def test_no_worker_is_left_where_the_clock_comes_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that works far beyond its time is given up and ended: latency is never measured beside it."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.05)
    mark, children = tmp_path / "begun", []

    class Begun(Always):
        def is_over(self) -> bool:
            """As soon as it is at work."""
            if mark.exists():
                children.extend(multiprocessing.active_children())
            return mark.exists()

    with open_workers(Processes(workers=1)) as workers:
        assert list(workers(partial(endless, mark), TASKS[:1], Begun())) == []
    assert children
    assert multiprocessing.active_children() == []


def test_a_cluster_that_is_not_there_is_told() -> None:
    """With the address, and how to start one."""
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match="cannot be reached") as caught, open_workers(Dask(address="not an address")):
        pass
    assert caught.value.got == "not an address"
    assert "dask scheduler" in (caught.value.fix or "")


def test_dask_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed the error says what to install."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match="dask") as caught, open_workers(Dask(address="tcp://h:1")):
        pass
    assert "pip install" in (caught.value.fix or "")


_KILLED = """
import os, signal
from onnxshrink.search.workers import _Pools

if __name__ == "__main__":
    pools = _Pools(1)
    print(pools.open(False).submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_workers_end_with_a_search_that_is_killed(tmp_path: Path) -> None:
    """Else they would wait for tasks for ever, with their memory."""
    script = tmp_path / "killed_search.py"
    script.write_text(_KILLED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    until = time.monotonic() + PATIENCE
    while _lives(int(done.stdout)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _lives(int(done.stdout))


_INTERRUPTED = """
import os, signal, time
from onnxshrink.search.workers import _Pools

if __name__ == "__main__":
    pools = _Pools(1)
    pools.open(False).submit(os.getpid).result()  # the worker has begun
    try:
        os.killpg(0, signal.SIGINT)
        time.sleep(600)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    time.sleep(0.5)  # time for a worker to say something
    pools.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_is_left_to_the_search_to_tell(tmp_path: Path) -> None:
    """A terminal sends it to every process of the group; the workers print no traceback of theirs, and end."""
    script = tmp_path / "interrupted_search.py"
    script.write_text(_INTERRUPTED)
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        start_new_session=True,
    )
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
    assert "Traceback" not in done.stderr


def _lives(pid: int) -> bool:
    """True for a process that runs; one that only waits to be reaped has ended."""
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

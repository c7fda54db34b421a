"""Where trials run: here one by one, in processes of this machine, on the workers of a dask cluster, on any executor.

A worker that dies costs nothing but time: what it had not finished is done again by another one, which finds in the
store what was finished. We schedule nothing ourselves.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, Protocol, TypeAlias

from onnxshrink.config.budget import Dask, Parallel, Processes
from onnxshrink.core.errors import ConfigError, DependencyError
from onnxshrink.search.attempt import Task
from onnxshrink.search.trial import Trial

Function: TypeAlias = Callable[[Task], Trial | None]
"""Does a task; None where its time was over."""


class Time(Protocol):
    """The time that there is for tasks."""

    def allows(self, task: Task) -> bool:
        """True if a task may be begun."""

    def is_over(self) -> bool:
        """True if what is at work must end."""


OpenExecutor: TypeAlias = Callable[[bool], Executor]
"""Gives the executor, and if asked to another one in its place, where it can: after a worker was lost."""

_LIVES = 3
"""So often in a row workers may be lost without a single trial being finished."""

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 30.0
"""How long after the end of time a task may need to notice it; one that does not was lost with its worker."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Where tasks run.

    Attributes:
        opened: The executor's; None for this process alone, one task after the other.
    """

    opened: OpenExecutor | None = None

    @property
    def executor(self) -> Executor | None:
        """For other work than tasks; None for this process alone."""
        return None if self.opened is None else self.opened(False)  # noqa: FBT003  by position, as any opener

    def __call__(self, function: Function, tasks: Sequence[Task], time_: Time) -> Iterator[Trial]:
        """Run a function on the tasks that there is time for, and give the trials in the tasks' order."""
        return _here(function, tasks, time_) if self.opened is None else _on(self.opened, function, tasks, time_)


here = Workers()
"""Workers that are this process alone."""


@contextmanager
def open_workers(parallel: Parallel | None, executor: Executor | None = None) -> Iterator[Workers]:
    """Workers as the config asks, or those of an executor.

    Args:
        parallel: The config's `budget.parallel`; None runs trials here, one after the other.
        executor: Any executor, in place of what ``parallel`` says; it is left open.

    Raises:
        ConfigError: The cluster cannot be reached, has no workers, or workers that run several tasks at a time.
        DependencyError: dask is not installed.
    """
    if executor is not None:
        yield Workers(lambda _: executor)
    elif isinstance(parallel, Processes):
        pools = _Pools(parallel.workers)
        try:
            yield Workers(pools.open)
        finally:
            pools.close()
    elif isinstance(parallel, Dask):
        client = _client(parallel.address)
        try:
            yield Workers(lambda _: client.get_executor(pure=False))
        finally:
            client.close()
    else:
        yield here


def is_loss(error: BaseException) -> bool:
    """True for what an executor raises where a worker was lost."""
    # dask's own exceptions cannot be named without dask
    dasks = ("KilledWorker", "CommClosedError", "FutureCancelledError")
    return isinstance(error, (BrokenExecutor, CancelledError)) or type(error).__name__ in dasks


def _here(function: Function, tasks: Sequence[Task], time_: Time) -> Iterator[Trial]:
    for task in tasks:
        trial = function(task) if time_.allows(task) else None
        if trial is not None:
            yield trial


def _on(open_executor: OpenExecutor, function: Function, tasks: Sequence[Task], time_: Time) -> Iterator[Trial]:
    """On an executor; it is opened anew, if it can be, after one of its workers was lost."""
    ended: dict[int, Trial | None] = {}
    given, lives, anew = 0, _LIVES, False
    while left := [task for task in tasks if task.number not in ended]:
        if not lives:
            raise _dying(left)
        before = len(ended)
        for task, trial in _results(open_executor(anew), function, left, time_):
            ended[task.number] = trial
            while given < len(tasks) and tasks[given].number in ended:
                ready = ended[tasks[given].number]
                given += 1
                if ready is not None:
                    yield ready
        anew, lives = True, lives - 1 if len(ended) == before else _LIVES


def _results(
    executor: Executor, function: Function, tasks: Sequence[Task], time_: Time
) -> Iterator[tuple[Task, Trial | None]]:
    """Each task that has ended, as it ends: None where there was no time for it. Lost ones are not among them."""
    futures: dict[Future[Trial | None], Task] = {}
    for task in tasks:
        if not time_.allows(task):
            yield task, None
            continue
        try:
            futures[executor.submit(function, task)] = task
        except BrokenExecutor:  # a worker was lost while others were being told
            break
    over_since: float | None = None
    while futures:
        done, _ = wait(futures, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: futures[future].number):
            task = futures.pop(future)
            trial, is_lost = _result(future)
            if not is_lost:
                yield task, trial
        if time_.is_over():
            over_since = over_since or time.monotonic()
            late = time.monotonic() - over_since > _GRACE_SECONDS
            for future in [future for future in futures if future.cancel() or late]:
                yield futures.pop(future), None


def _result(future: Future[Trial | None]) -> tuple[Trial | None, bool]:
    """A future's result, and whether its worker was lost."""
    try:
        return future.result(), False
    except Exception as e:
        if is_loss(e):
            return None, True
        raise


def _dying(tasks: Sequence[Task]) -> ConfigError:
    return ConfigError(
        f"workers died {_LIVES} times at the same trials",
        where="budget.parallel",
        got=", ".join(str(dict(task.point)) for task in tasks[:3]),
        want="workers with enough memory for a trial",
        fix="use fewer workers, or leave `parallel` out to see what ends them",
    )


class _Pools:
    """A pool of processes, opened anew after one of them died."""

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers
        self._pool: ProcessPoolExecutor | None = None
        self._ends: tuple[Connection, ...] = ()

    def open(self, anew: bool) -> Executor:  # noqa: FBT001  called by position, as any opener
        """The pool, or one in its place."""
        if anew:
            self.close()
        if self._pool is None:
            threads = max(1, (os.cpu_count() or 1) // self._n_workers)
            self._ends = multiprocessing.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(
                self._n_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(threads, self._ends[0]),
            )
        return self._pool

    def close(self) -> None:
        """End the processes, even one that works beyond its time: what comes next may be timed, alone."""
        if self._pool is not None:
            reading, writing = self._ends
            writing.close()
            self._pool.shutdown(cancel_futures=True)
            reading.close()
            self._pool = None


def _begin(threads: int, pool: Connection) -> None:
    """In a worker: share the cores, and end with the pool, or with a search that was killed: else it would wait on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them: the search alone speaks, and ends them
    os.environ["OMP_NUM_THREADS"] = str(threads)
    threading.Thread(target=_end_with, args=(pool,), daemon=True).start()


def _end_with(pool: Connection) -> None:
    search = multiprocessing.parent_process()
    wait_for([pool, *([search.sentinel] if search else [])])
    os._exit(1)


def _client(address: str) -> Any:
    if importlib.util.find_spec("distributed") is None:
        raise DependencyError(
            "trials on a dask cluster need dask, and it is not installed",
            where="budget.parallel",
            want="the dask extra",
            fix="pip install 'distributed>=2024.1'",
        )
    from distributed import Client

    try:
        client = Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as e:
        raise ConfigError(
            f"the dask scheduler cannot be reached: {e}",
            where="budget.parallel.address",
            got=address,
            want="a running scheduler, such as tcp://scheduler:8786",
            fix="start one: dask scheduler",
        ) from e
    threads = client.nthreads()  # type: ignore[no-untyped-call]
    if not threads or max(threads.values()) > 1:
        client.close()  # type: ignore[no-untyped-call]
        raise ConfigError(
            "the cluster has no workers" if not threads else "the cluster's workers run several tasks at a time",
            where="budget.parallel.address",
            got=", ".join(f"{worker} with {count} threads" for worker, count in threads.items()) or address,
            want="workers of one thread each: trials share what belongs to a whole process, such as imported modules",
            fix=f"start each as: dask worker {address} --nthreads 1",
        )
    return client

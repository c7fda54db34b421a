"""Where trials run: here one by one, in processes of this machine, on the workers of a dask cluster, on any executor.

A worker that dies costs nothing but time: what it had not finished is done again by another one, which finds in the
store what was finished. We schedule nothing ourselves.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import Any, TypeAlias

from onnxshrink.config.budget import Dask, Parallel, Processes
from onnxshrink.core.errors import ConfigError, DependencyError
from onnxshrink.search.attempt import Task
from onnxshrink.search.trial import Trial

Function: TypeAlias = Callable[[Task], Trial]
Workers: TypeAlias = Callable[[Function, Sequence[Task], Callable[[], bool]], Iterator[Trial]]
"""Run a function on every task, and give the trials in the tasks' order; once time is over, no further one is begun."""

_LIVES = 3
"""So often a task may lose its worker before the search gives up."""


@contextmanager
def open_workers(parallel: Parallel | None, executor: Executor | None = None) -> Iterator[Workers]:
    """Workers as the config asks, or those of an executor.

    Args:
        parallel: The config's `budget.parallel`; None runs trials here, one after the other.
        executor: Any executor, in place of what ``parallel`` says; it is left open.

    Raises:
        ConfigError: The cluster cannot be reached.
        DependencyError: dask is not installed.
    """
    if executor is not None:
        yield _on(lambda: executor)
    elif isinstance(parallel, Processes):
        pools = _Pools(parallel.workers)
        try:
            yield _on(pools.current)
        finally:
            pools.close()
    elif isinstance(parallel, Dask):
        client = _client(parallel.address)
        try:
            yield _on(lambda: client.get_executor(pure=False))
        finally:
            client.close()
    else:
        yield _here


def _here(function: Function, tasks: Sequence[Task], is_over: Callable[[], bool]) -> Iterator[Trial]:
    for task in tasks:
        if is_over():
            return
        yield function(task)


def _on(open_executor: Callable[[], Executor]) -> Workers:
    def run(function: Function, tasks: Sequence[Task], is_over: Callable[[], bool]) -> Iterator[Trial]:
        done: dict[int, Trial] = {}
        left = list(tasks)
        for _ in range(_LIVES):
            executor = open_executor()
            futures: dict[Future[Trial], Task] = {executor.submit(function, task): task for task in left}
            for future in as_completed(futures):
                if is_over():
                    for other in futures:
                        other.cancel()
                trial = _result(future)
                if trial is not None:
                    done[futures[future].number] = trial
            left = [task for task in left if task.number not in done]
            if not left or is_over():
                break
        else:
            raise ConfigError(
                f"workers died {_LIVES} times at the same trials",
                where="budget.parallel",
                got=", ".join(str(dict(task.point)) for task in left[:3]),
                want="workers with enough memory for a trial",
                fix="use fewer workers, or leave `parallel` out to see what ends them",
            )
        yield from (done[task.number] for task in tasks if task.number in done)

    return run


def _result(future: Future[Trial]) -> Trial | None:
    """A future's trial, or None where its worker was lost or it was called off."""
    try:
        return future.result()
    except (BrokenExecutor, CancelledError):
        return None
    except Exception as e:
        # dask's own exceptions of lost workers, which cannot be named without dask
        if type(e).__name__ in ("KilledWorker", "CommClosedError", "FutureCancelledError"):
            return None
        raise


class _Pools:
    """A pool of processes, opened anew after one of them died."""

    def __init__(self, n_workers: int) -> None:
        self._n_workers = n_workers
        self._pool: ProcessPoolExecutor | None = None

    def current(self) -> Executor:
        """A pool that works."""
        if self._pool is None or self._pool._broken:  # noqa: SLF001  no public way to ask
            self.close()
            threads = max(1, (os.cpu_count() or 1) // self._n_workers)
            self._pool = ProcessPoolExecutor(
                self._n_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_limit_threads,
                initargs=(threads,),
            )
        return self._pool

    def close(self) -> None:
        """End the processes; what they have not begun is called off."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _limit_threads(count: int) -> None:
    """Share the cores: as many threads as there are cores, over all workers."""
    os.environ["OMP_NUM_THREADS"] = str(count)


def _client(address: str) -> Any:
    if importlib.util.find_spec("distributed") is None:
        raise DependencyError(
            "trials on a dask cluster need dask, and it is not installed",
            where="budget.parallel",
            want="the dask extra",
            fix="pip install distributed",
        )
    from distributed import Client

    try:
        return Client(address, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, TimeoutError, ValueError) as e:
        raise ConfigError(
            f"the dask scheduler cannot be reached: {e}",
            where="budget.parallel.address",
            got=address,
            want="a running scheduler, such as tcp://scheduler:8786",
            fix="start one: dask scheduler",
        ) from e

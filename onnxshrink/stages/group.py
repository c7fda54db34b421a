"""Trainings by several processes that this one starts: it leads, and they end with it, however it ends.

So a trial of a search may train under accelerate wherever it runs: here, in a process of a pool, on a cluster's worker.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from onnxshrink.config.load import validate
from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ConfigError, ShrinkError
from onnxshrink.core.events import Events
from onnxshrink.core.importing import search_path
from onnxshrink.core.store import Store
from onnxshrink.runtime.processes import Leader, leave_group
from onnxshrink.stages.memo import Memo
from onnxshrink.stages.together import follow, is_trained, run_trainings

_FOLLOW = "from onnxshrink.stages.group import follow_leader; follow_leader()"
_READY = b"ready\n"


def train_together(config: RunConfig, *, runs: Path, base: Path, processes: int, events: Events) -> None:
    """Do all that trains in a config, and what leads to it, so that the store has it; nothing where it has it already.

    Args:
        config: What to train.
        runs: Folder of the store.
        base: The config file's folder, where the user's modules may lie.
        processes: How many train, this one among them.
        events: Listener for progress.

    Raises:
        ConfigError: Another of the processes was lost; says what it said.
        ShrinkError: As in one process.
    """
    with search_path(base), ExitStack() as stack:
        store = Store(runs / ".store")
        if is_trained(config, store):
            return
        settings = json.dumps([config.model_dump(mode="json", exclude_unset=True), str(base.absolute())])
        own, *further = _environments(processes)
        others = [_Other(settings, environment, stack) for environment in further]

        def look() -> None:
            for other in others:
                other.look()

        for other in others:
            other.await_ready()
        leave_group()  # accelerate remembers a training by this process alone
        stack.enter_context(_set(own))
        stack.callback(leave_group)
        try:
            leader = Leader(processes, look)
            run_trainings(config, Memo(store, config.data, config.seed, events, leader))
            leader.dismiss()
        except RuntimeError:  # so torch tells that another process was lost
            look()
            raise


class _Other:
    """A process that trains with this one.

    Args:
        settings: What it is told.
        environment: What a launcher would have told it.
        stack: Ends it.
    """

    def __init__(self, settings: str, environment: Mapping[str, str], stack: ExitStack) -> None:
        self._said: IO[bytes] = stack.enter_context(TemporaryFile())  # noqa: SIM115  the stack closes it
        self._process = stack.enter_context(
            subprocess.Popen(  # noqa: S603  # our own code
                [sys.executable, "-c", _FOLLOW],
                env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
            )
        )
        stack.callback(self._process.kill)
        assert self._process.stdin is not None  # noqa: S101  # for mypy
        self._process.stdin.write(settings.encode() + b"\n")
        self._process.stdin.flush()

    def await_ready(self) -> None:
        """Wait until it can be waited for without being looked at, or raise as `look` does."""
        assert self._process.stdout is not None  # noqa: S101  # for mypy
        if self._process.stdout.readline() != _READY:
            self._process.wait()
            self.look()

    def look(self) -> None:
        """Raise if it was lost.

        Raises:
            ConfigError: With what it said last.
        """
        if self._process.poll() in (None, 0):
            return
        self._said.seek(0)
        said = self._said.read().decode(errors="replace").strip()
        raise ConfigError(
            "a process that trained with another one was lost",
            where="budget.processes_per_training",
            got=f"exit status {self._process.returncode}" + (f": {said[-500:]}" if said else ""),
            want="memory and processors for so many processes",
            fix="use fewer, or leave `processes_per_training` out to see what ends them",
        )


def _environments(processes: int) -> list[dict[str, str]]:
    """What a launcher would tell each of the processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = str(processes)
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(number), "LOCAL_RANK": str(number)} for number in range(processes)]


@contextmanager
def _set(environment: Mapping[str, str]) -> Iterator[None]:
    """This process's environment has these variables; afterwards it is as it was."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def follow_leader() -> None:
    """What each of the other processes does, as its standard input says; it ends when that ends."""
    document, base = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_leader, daemon=True).start()
    import torch.distributed  # noqa: F401  # seconds, which the first one is spared to wait for blindly

    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    try:
        follow(validate(document, base=Path(base)), base=Path(base))
    except ShrinkError as e:
        sys.exit(str(e))


def _end_with_leader() -> None:
    sys.stdin.buffer.read()
    os._exit(1)

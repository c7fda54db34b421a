"""The cores that a measurement runs on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from onnxshrink.config.gates import Target
from onnxshrink.core.errors import ConfigError


def require_cores(target: Target) -> None:
    """Refuse cores that this process cannot run on.

    Raises:
        ConfigError: One is not there, or the system has no way to choose.
    """
    if target.affinity is None:
        return
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    missing = sorted(set(target.affinity) - usable)
    if missing:
        raise ConfigError(
            f"there is no core {missing[0]} to run on",
            got=f"targets: affinity: {list(target.affinity)}",
            want=f"of {', '.join(map(str, sorted(usable)))}" if usable else "no affinity: this system cannot set it",
            fix="name cores of this machine (taskset -p $$ tells them), or drop `affinity`",
        )


@contextmanager
def on_cores(target: Target) -> Iterator[None]:
    """Keep this thread on the target's cores, and the threads of every session that is opened meanwhile.

    A new thread inherits the cores of the one that starts it; ONNX Runtime pins its own only where their number is left
    to it, and a target always says it.

    Raises:
        ConfigError: As of `require_cores`.
    """
    if target.affinity is None:
        yield
        return
    require_cores(target)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, target.affinity)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

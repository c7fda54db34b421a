"""The part of a run that several processes share: every step up to the last that trains."""

from __future__ import annotations

import os
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from onnxshrink.config.run import RunConfig
from onnxshrink.core.errors import ModelError, ParityError
from onnxshrink.core.events import Silent
from onnxshrink.core.importing import search_path
from onnxshrink.core.store import Store
from onnxshrink.runtime.processes import Follower
from onnxshrink.stages.memo import Memo


def trains(config: RunConfig) -> bool:
    """True if there is work for several processes."""
    return any(stage.trains for _, chain in config.branches() for stage in chain)


def run_trainings(config: RunConfig, memo: Memo) -> None:
    """Run every branch up to its last stage that trains; all processes do so, and come to the same steps.

    Args:
        config: What to do.
        memo: With the process's part in it. What was done once is found by what is run afterwards.

    Raises:
        ShrinkError: The trunk fails, or a variant for a reason that is not the model's. A variant whose model cannot be
            made is left to the run to report.
    """
    n_shared = len(config.stages)
    for name, chain in config.branches():
        count = max((number for number, stage in enumerate(chain, 1) if stage.trains), default=0)
        if not count:
            continue
        shared = memo.fold(memo.open(config.model), chain[: min(count, n_shared)])
        try:
            memo.fold(shared[-1], chain[n_shared:count], f"{name}/")
        except (ModelError, ParityError):
            continue


def is_trained(config: RunConfig, store: Store) -> bool:
    """True if every step up to the last that trains is in the store, of every branch."""
    try:
        run_trainings(config, Memo(store, config.data, config.seed, _OnlyFound()))
    except _NotMade:
        return False
    return True


class _NotMade(BaseException):
    """A step is not in the store; no `Exception`, as `Events` wants it."""


class _OnlyFound(Silent):
    """A listener that lets nothing be done."""

    def started(self, step: str) -> None:
        """End the work before it begins."""
        raise _NotMade(step)


def follow(config: RunConfig, *, base: Path = Path()) -> None:
    """What every process but the first does in place of `onnxshrink.pipeline.run`: train with it, silently.

    Args:
        config: The same as the first one's; its files may lie elsewhere.
        base: The config file's folder, where the user's modules may lie.

    Raises:
        ShrinkError: This process cannot train.
    """
    if not trains(config):
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
        search_path(base),
        tempfile.TemporaryDirectory() as folder,
    ):
        team = Follower(Path(folder))
        store = Store(Path(folder) / "store")  # of which nothing is asked
        run_trainings(config, Memo(store, config.data, config.seed, Silent(), team))
        team.leave()

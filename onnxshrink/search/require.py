"""What of a search can be found wrong before any work is done."""

from __future__ import annotations

import inspect
import socket

from onnxshrink.config.budget import Budget
from onnxshrink.config.run import RunConfig
from onnxshrink.config.source import FactorySource
from onnxshrink.core.errors import ConfigError
from onnxshrink.core.importing import load_entry, search_path
from onnxshrink.runtime.processes import launched
from onnxshrink.search.space import Space
from onnxshrink.stages.preflight import preflight


def require_budget(config: RunConfig) -> Budget:
    """The budget of a config, with the limits of its gates.

    Raises:
        ConfigError: There is none, latency counts on another machine, or a launcher started several processes.
    """
    if config.budget is None:
        raise ConfigError("there is no budget to search for", where="budget", fix="budget: {max_size: 2 MB}")
    budget, host = config.budget.within(config.gates), socket.gethostname()
    if budget.latency_host not in (None, host):
        raise ConfigError(
            "latency counts on another machine than this one",
            where="budget.latency_host",
            got=host,
            want=str(budget.latency_host),
            fix="start the search there; trials may run anywhere, see `parallel`",
        )
    if (count := launched()[1]) > 1:
        raise ConfigError(
            "a search starts its own workers, and a launcher started several processes of it",
            where="budget",
            got=f"{count} processes",
            want="one",
            fix="start it without torchrun or accelerate; for trainings by several processes: "
            "budget: {processes_per_training: 2}; for several trials at a time: "
            "budget: {parallel: {kind: processes, workers: 2}}",
        )
    return budget


def require_space(space: Space) -> None:
    """Raise what would fail in every trial, or in all those with one of the options.

    Raises:
        ShrinkError: Of the kind that the mistake is.
    """
    first = {dimension.name: dimension.options[0].label for dimension in space.dimensions}
    scheme = space.dimensions[-1]
    with search_path(space.base):
        for part in space.together({option.label: first | {scheme.name: option.label} for option in scheme.options}):
            preflight(part)
        for dimension in space.dimensions[:-1]:
            for option in dimension.options:
                config = space.config(first | {dimension.name: option.label})
                _require_arguments(config, f"budget.vary.{dimension.name}")


def _require_arguments(config: RunConfig, where: str) -> None:
    """Raise where the factory has no such argument: it would be told in every trial, one by one."""
    if not isinstance(config.model, FactorySource):
        return
    try:
        signature = inspect.signature(load_entry(config.model.factory))
    except (TypeError, ValueError):  # a callable of C code has none to look at
        return
    try:
        signature.bind(**config.model.args)
    except TypeError as e:
        raise ConfigError(
            f"{config.model.factory} does not take these arguments: {e}",
            where=where,
            got=", ".join(config.model.args),
            want=f"arguments of {signature}",
        ) from e
